"""The segment store, its copies on each machine, and the lease of the front-end that seals and merges."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs

import biodedup as bd
from biodedup.cluster import gallery as cluster_gallery
from biodedup.cluster.store import SegmentStore
from biodedup.testing import internals
from tests.support.vectors import again, people

NO_POLL = {"poll_ms": 3_600_000, "stale_ms_max": 3_600_000}
SMALL = bd.Config(gallery=bd.GalleryConfig(background=False, seal_rows=10, merge_fan=2))


def fill(engine: bd.Engine, count: int, seed: int = 0) -> np.ndarray:
    vectors = people(count, seed=seed)
    engine.add_templates([f"p{seed}-{i}" for i in range(count)], {"face": vectors})
    return vectors


def best(engine: bd.Engine, vector: np.ndarray) -> str:
    return engine.identify(bd.Encounter(templates={"face": vector})).best.subject_id


def stored(tmp_path: Path) -> list[Path]:
    return sorted(file for file in (tmp_path / "store").rglob("*") if file.is_file())


def test_a_store_returns_what_was_uploaded_and_lacks_what_was_not(tmp_path):
    store = SegmentStore(f"file://{tmp_path}/store", "r1")
    (tmp_path / "a").write_bytes(b"some bytes")
    store.upload(tmp_path / "a", "1.face.00")
    store.upload(tmp_path / "a", "1.face.00")
    store.download("1.face.00", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"some bytes"
    assert (
        (tmp_path / "b").stat().st_mode & 0o777
        == (tmp_path / "store" / "r1" / "1.face.00").stat().st_mode & 0o777
        == 0o600
    )
    with pytest.raises(bd.GalleryDamaged, match="lacks"):
        store.download("2.face.00", tmp_path / "c")


def test_an_upload_that_the_store_does_not_return_is_refused(tmp_path, monkeypatch):
    store = SegmentStore(f"file://{tmp_path}/store", "r1")
    (tmp_path / "a").write_bytes(b"some bytes")
    monkeypatch.setattr(
        SegmentStore, "_write_local", staticmethod(lambda source, target: target.write_bytes(b"same size!"))
    )
    with pytest.raises(bd.StorageUnavailable, match="returns another content"):
        store.upload(tmp_path / "a", "1.face.00")


def test_an_address_that_is_none_is_named():
    with pytest.raises(bd.InvalidInput, match="s3://bucket"):
        SegmentStore("nowhere://x", "r1")


@pytest.mark.slow
def test_a_bulk_load_and_a_merge_of_one_front_end_are_searched_by_another(register):
    first, second = register(SMALL, cluster=NO_POLL), register(SMALL, cluster=NO_POLL)
    one, two = fill(first, 12, seed=1), fill(second, 12, seed=2)
    assert first.maintain() is None
    second.refresh()
    assert second.info()["segments"] == first.info()["segments"] == 1
    assert best(second, again(one[3], 0.9)) == "p1-3"
    assert best(first, again(two[5], 0.9)) == "p2-5"
    assert register(SMALL).info()["subjects"] == 24


@pytest.mark.slow
def test_a_store_without_a_file_of_the_manifest_is_named(register, tmp_path):
    fill(register(SMALL), 12)
    for file in stored(tmp_path):
        if ".face." in file.name:
            file.unlink()
    with pytest.raises(bd.GalleryDamaged, match="lacks"):
        register(SMALL)


@pytest.mark.slow
def test_a_file_that_was_changed_in_the_store_is_not_used(register, tmp_path):
    fill(register(SMALL), 12)
    file = next(file for file in stored(tmp_path) if ".face." in file.name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(bd.GalleryDamaged, match="segment store"):
        register(SMALL)


@pytest.mark.slow
def test_a_damaged_copy_is_fetched_again(register, tmp_path):
    vectors = fill(register(SMALL, cluster={"cache": tmp_path / "cache"}), 12)
    file = next((tmp_path / "cache" / "segments").glob("*.face"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    file.write_bytes(content)
    engine = register(SMALL, cluster={"cache": tmp_path / "cache"})
    assert best(engine, again(vectors[3], 0.9)) == "p0-3"
    assert engine.problems() == []


@pytest.mark.slow
def test_copies_that_do_not_fit_are_refused(register, tmp_path):
    fill(register(SMALL), 12)
    with pytest.raises(bd.StorageUnavailable, match="cache_bytes_max"):
        register(SMALL, cluster={"cache_bytes_max": 1_000})


@pytest.mark.slow
def test_old_copies_make_room(register, tmp_path):
    engine = register(SMALL, cluster=NO_POLL)
    fill(engine, 200, seed=1)
    size = sum(file.stat().st_size for file in stored(tmp_path))
    cache = {"cache": tmp_path / "cache", "cache_bytes_max": size * 3 // 2, **NO_POLL}
    other = register(SMALL, cluster=cache)
    for seed in range(2, 5):  # each time all is written anew
        engine.remove(*engine.subject_ids())
        fill(engine, 200, seed=seed)
        engine.compact()
        other.refresh()
    assert best(other, people(200, seed=4)[7]) == "p4-7"


@pytest.mark.slow
def test_a_temporary_cache_is_removed_at_the_end(register, tmp_path):
    engine = register(SMALL)
    folder = internals(engine).gallery.folder
    fill(engine, 12)
    assert any((folder / "segments").iterdir())
    engine.close()
    assert not folder.exists()


@pytest.mark.slow
def test_front_ends_of_one_machine_share_their_copies(register, tmp_path):
    shared = {"cache": tmp_path / "cache", **NO_POLL}
    first, second = register(SMALL, cluster=shared), register(SMALL, cluster=shared)
    vectors = {seed: fill((first, second)[seed % 2], 12, seed=seed) for seed in range(1, 6)}
    first.maintain()
    second.compact()
    for seed, of_seed in vectors.items():
        first.refresh()
        assert best(first, again(of_seed[3], 0.9)) == best(second, again(of_seed[3], 0.9)) == f"p{seed}-3"
    assert first.problems() == second.problems() == []


@pytest.mark.slow
def test_one_front_end_at_a_time_merges(register):
    first, second = register(SMALL, cluster=NO_POLL), register(SMALL, cluster=NO_POLL)
    fill(first, 12)
    with internals(first).gallery.maintaining(), pytest.raises(bd.GalleryBusy, match="seals and merges"):
        second.compact()
    second.compact()


@pytest.mark.slow
def test_a_holder_that_died_is_replaced_and_commits_nothing_afterwards(register, monkeypatch):
    first, second = register(SMALL, cluster=NO_POLL), register(SMALL, cluster=NO_POLL)
    fill(first, 12)
    monkeypatch.setattr(cluster_gallery, "_LEASE_S", 0.05)
    gallery = internals(first).gallery
    with gallery.maintaining():
        time.sleep(0.1)  # it does not renew: as a process that was stopped
        second.maintain()
        with pytest.raises(bd.GalleryBusy, match="taken over"), gallery.transaction() as transaction:
            transaction.seal()
    assert second.problems() == []


@pytest.mark.slow
def test_garbage_is_what_no_manifest_names_for_the_time_of_grace(register, postgres, tmp_path):
    engine = register(SMALL, cluster={**NO_POLL, "garbage_grace_s": 3600.0})
    vectors = fill(engine, 12, seed=1)
    fill(engine, 12, seed=2)
    before = {file.name for file in stored(tmp_path)}
    (stored(tmp_path)[0].parent / "9.face.0123").write_bytes(b"of a front-end that was killed")
    engine.maintain()
    assert before < {file.name for file in stored(tmp_path)}
    gallery = internals(engine).gallery
    for file in stored(tmp_path):
        os.utime(file, (0, 0))
    assert gallery.collect_garbage() == ["9.face.0123"]
    with postgres.connect() as connection:
        schema = register.url.rpartition("=")[2]
        connection.execute(f"UPDATE biodedup_{schema}.retired SET since = now() - interval '2 hours'")
    assert set(gallery.collect_garbage()) == before
    assert {file.name for file in stored(tmp_path)}.isdisjoint(before)
    assert best(register(SMALL), again(vectors[3], 0.9)) == "p1-3"


@pytest.mark.slow
def test_a_front_end_that_is_killed_while_it_uploads_leaves_no_segment(register, tmp_path, monkeypatch):
    engine = register(SMALL, cluster=NO_POLL)
    engine.enroll(bd.Encounter("anna", templates={"face": people(1)[0]}))

    def fails(source: Path, target: Path) -> None:
        raise OSError("no network")

    monkeypatch.setattr(SegmentStore, "_write_local", staticmethod(fails))
    with pytest.raises(bd.StorageUnavailable):
        engine.seal()
    monkeypatch.undo()
    assert engine.info()["segments"] == 0
    engine.seal()
    assert engine.info()["segments"] == 1
    assert register(SMALL).subject_ids() == ["anna"]


@pytest.mark.slow
def test_others_enrol_update_and_remove_while_a_segment_is_written(register, monkeypatch):
    first, second = register(SMALL, cluster=NO_POLL), register(SMALL, cluster=NO_POLL)
    vectors, upload, done = people(30), SegmentStore.upload, []

    def send(engine: bd.Engine, i: int, name: str = "") -> bd.Decision:
        encounter = bd.Encounter(name or f"p{i}", templates={"face": vectors[i]}, encounter_id=f"e{i}")
        return engine.enroll(encounter)

    for i in range(8):
        send(first, i)
    refused = bd.Encounter("p20", [bd.Missing("face", "amputated")], encounter_id="e20")
    first.enroll(refused)
    first.remove("p1")

    def meanwhile(store: SegmentStore, source: Path, name: str) -> None:
        if not done:
            done.append(1)
            send(second, 8)
            send(second, 20)  # refused before; now with a face
            second.remove("p2")
            second.update(bd.Encounter("p3", templates={"face": again(vectors[3], 0.9)}, encounter_id="u3"))
        upload(store, source, name)

    monkeypatch.setattr(SegmentStore, "upload", meanwhile)
    first.seal()
    assert done
    third = register(SMALL)
    for engine in (first, second, third):
        engine.refresh()
        assert engine.subject_ids() == ["p0", "p3", "p4", "p5", "p6", "p7", "p8", "p20"]
        assert len(engine.encounters("p3")) == 2
        assert engine.decision("e20").outcome == "unique"
        assert engine.decision("e5").outcome == "unique"
        assert best(engine, again(vectors[8], 0.9)) == "p8"
        assert engine.info()["sealed_rows"] == 8
        assert engine.problems() == []
    assert first.info() == second.info() == third.info()
    first.compact()
    assert first.info()["removed_not_erased"] == 0
    assert first.problems() == []


@pytest.mark.slow
def test_two_front_ends_that_seal_at_once_make_one_segment(register, monkeypatch):
    first, second = register(SMALL, cluster=NO_POLL), register(SMALL, cluster=NO_POLL)
    first.enroll(bd.Encounter("anna", templates={"face": people(1)[0]}))
    upload, done = SegmentStore.upload, []

    def meanwhile(store: SegmentStore, source: Path, name: str) -> None:
        if not done:
            done.append(1)
            second.seal()
        upload(store, source, name)

    monkeypatch.setattr(SegmentStore, "upload", meanwhile)
    first.seal()
    assert first.info() == second.info()
    assert first.info()["segments"] == 1
    assert first.problems() == []


@pytest.mark.slow
def test_files_are_for_their_owner_alone(register, tmp_path):
    engine = register(SMALL, cluster={"cache": tmp_path / "cache"})
    fill(engine, 12)
    for place in (tmp_path / "store", tmp_path / "cache"):
        for folder, _, files in os.walk(place):
            assert os.stat(folder).st_mode & 0o077 == 0
            assert all((Path(folder) / file).stat().st_mode & 0o077 == 0 for file in files)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of a bucket on a server in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    where = {"endpoint_override": f"127.0.0.1:{port}", "scheme": "http", "region": "us-east-1"}
    files = fs.S3FileSystem(access_key="a", secret_key="b", allow_bucket_creation=True, **where)
    until = time.monotonic() + 60
    while True:
        try:
            files.create_dir("bucket")
            break
        except OSError:
            if time.monotonic() > until or server.poll() is not None:
                raise
            time.sleep(0.2)
    yield "s3://a:b@bucket/register?" + "&".join(f"{name}={value}" for name, value in where.items())
    server.terminate()
    server.wait()


@pytest.mark.slow
def test_a_register_has_its_segments_in_s3(s3, register):
    first, second = (
        register(SMALL, cluster={"segments": s3, **NO_POLL}),
        register(SMALL, cluster={"segments": s3, **NO_POLL}),
    )
    one, two = fill(first, 12, seed=1), fill(second, 12, seed=2)
    first.maintain()
    second.refresh()
    assert best(second, again(one[3], 0.9)) == "p1-3"
    assert best(first, again(two[5], 0.9)) == "p2-5"
    assert first.problems() == second.problems() == []
    gallery, store = internals(first).gallery, SegmentStore(s3, internals(first).catalogue.register_id)
    assert gallery.collect_garbage() == []
    assert {kind for name in store.ages(time.time()) for kind in [name.split(".")[1]]} == {"subject", "face"}


@pytest.mark.slow
def test_registers_with_one_store_never_remove_each_others_files(register, postgres, tmp_path):
    config = bd.Config(cluster=bd.ClusterConfig(segments=f"file://{tmp_path}/store", garbage_grace_s=0.0))
    first = register(SMALL, cluster=NO_POLL)
    vectors = fill(first, 12)
    with bd.Engine.open(f"{register.url}_other", config) as other:
        fill(other, 12, seed=1)
        other.seal()
        assert len({file.parent for file in stored(tmp_path)}) == 2
        assert internals(other).gallery.collect_garbage() == []
    assert best(register(SMALL), again(vectors[3], 0.9)) == "p0-3"
