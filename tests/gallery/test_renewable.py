"""Renewable templates: what a secret transform of the stored embeddings keeps, and what it hides."""

from __future__ import annotations

import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.gallery.care.copying import copy_rows
from biodedup.gallery.catalogue.sqlite import STRIDE
from biodedup.gallery.files.codec import make_codec
from biodedup.gallery.files.codes import dequantise, join_nibbles
from biodedup.gallery.files.column_file import open_column_file
from biodedup.gallery.files.encryption.transform import Transform
from biodedup.gallery.files.filesystem import LocalStorage, stored_key
from biodedup.gallery.files.packed import pack_text, text
from biodedup.gallery.segments import indexing
from biodedup.gallery.segments.new_cells import vectors_alone
from biodedup.gallery.transaction import Transaction
from biodedup.testing import internals
from tests.support.faults import Countdown
from tests.support.galleries import PEOPLE, enroll, small
from tests.support.vectors import SFACE, again, people

KEY = bytes(range(1, 33))


def renewable(key: bytes = KEY, **more: object) -> bd.Config:
    config = small(**more)
    return replace(config, gallery=replace(config.gallery, renewable=True), keys=lambda: key)


def fill(folder: Path, config: bd.Config, count: int = 14) -> None:
    with bd.Engine.open(folder, config) as engine:
        for i in range(count):
            enroll(engine, i)
            if i % 5 == 4:
                engine.maintain()


def stored_vectors(folder: Path, key: bytes = KEY) -> np.ndarray:
    """What the files hold, sealed rows and then the journal's: without the secret of any transform."""
    storage, vectors = LocalStorage(lambda: key), []
    for path in sorted((folder / "segments").iterdir()):
        file = open_column_file(storage, path)
        if file.about["kind"] == "face":
            rest = open_column_file(storage, path.with_name(path.name + ".rest"))
            codes = join_nibbles(file.read("high").copy(), rest.read("rest").copy())
            vectors.append(dequantise(codes, file.read("norm")[: len(codes)]) @ file.read("rotation"))
    with closing(storage.connect(folder / "gallery.sqlite3", read_only=True)) as connection:
        cells = list(connection.execute("SELECT key, vector FROM cell ORDER BY key"))
    vectors += [np.frombuffer(vector, "<f4")[None] for key, vector in cells if key % STRIDE == 0]
    return np.concatenate(vectors)


def answers(folder: Path, config: bd.Config) -> list[tuple[str, float]]:
    with bd.Engine.open(folder, config, read_only=True) as engine:
        found = [engine.search({"face": again(PEOPLE[i : i + 1], 0.8)}, k=2) for i in range(14)]
        return [(str(f.ids[0, 0]), float(f.similarity[0, 0])) for f in found]


@pytest.mark.slow
def test_a_transform_is_orthogonal_its_secrets_own_and_each_columns_own():
    transform = Transform(KEY)
    matrix = transform.of("face").matrix(128)
    assert np.abs(matrix @ matrix.T - np.eye(128)).max() < 1e-12
    assert np.array_equal(matrix, Transform(KEY).of("face").matrix(128))
    others = [
        Transform(bytes(32)).of("face").matrix(128),
        transform.of("right_index").matrix(128),
        make_codec(128, []).rotation,
    ]
    for other in others:
        assert np.abs(np.trace(matrix.T @ other)) / 128 < 0.1
    known = people(20, seed=3)
    assert np.allclose(transform.of("face").invert(transform.of("face").apply(known)), known, atol=1e-6)
    assert np.allclose(
        transform.of("face").apply(known) @ transform.of("face").apply(known).T, known @ known.T, atol=1e-5
    )


@pytest.mark.slow
def test_answers_are_those_without_a_transform_and_what_is_stored_is_a_strangers(tmp_path):
    other = bytes(range(2, 34))
    fill(tmp_path / "plain", replace(small(), keys=lambda: KEY))
    fill(tmp_path / "a", renewable())
    fill(tmp_path / "b", renewable(other))
    wanted = answers(tmp_path / "plain", replace(small(), keys=lambda: KEY))
    for name, key in (("a", KEY), ("b", other)):
        got = answers(tmp_path / name, renewable(key))
        assert [subject for subject, _ in got] == [subject for subject, _ in wanted]
        assert np.allclose([s for _, s in got], [s for _, s in wanted], atol=0.005)
    plain = stored_vectors(tmp_path / "plain")
    assert np.einsum("ij,ij->i", plain, PEOPLE[:14]).min() > 0.99, "the files are read right"
    a, b = stored_vectors(tmp_path / "a"), stored_vectors(tmp_path / "b", other)
    for one, two in ((a, b), (a, plain), (b, plain)):
        cosines = np.einsum("ij,ij->i", one, two)
        assert len(cosines) == 14
        assert abs(cosines.mean()) < 6 / np.sqrt(14 * 128)  # six standard deviations of strangers: secrets are random
        assert np.abs(cosines).max() < 6 / np.sqrt(128)


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """Segments, a journal, a case that waits, and canaries."""
    folder = tmp_path_factory.mktemp("renewable") / "g"
    config = replace(renewable(), policy=bd.Policy(duplicate_db=60, review_db=10, required=()))
    fill(folder, config)
    jobs.examine(folder, renewable(), canaries=True)
    with bd.Engine.open(folder, config) as engine:
        between = (0.45 * PEOPLE[0] + np.sqrt(1 - 0.45**2) * PEOPLE[40]).astype(np.float32)
        assert (
            engine.enroll(bd.Encounter("waits", templates={"face": between}, encounter_id="case")).outcome == "review"
        )
    return folder


@pytest.mark.slow
def test_rekey_transforms_all_embeddings_keeps_answers_and_destroys_the_old_secret(filled, tmp_path):
    folder = copied(filled, tmp_path / "g")
    before, old = stored_vectors(folder), stored_key(folder).transforms
    wanted = answers(folder, renewable())
    assert np.einsum("ij,ij->i", before, before).min() > 0.98
    with bd.Engine.open(folder, renewable(), read_only=True) as reader, bd.Engine.open(folder, renewable()) as engine:
        transform_id = engine.rekey()
        assert reader.search({"face": PEOPLE[3:4]}, k=1).ids[0, 0] == "s3", "a reader goes on with what it has"
        reader.refresh()
        assert reader.search({"face": PEOPLE[3:4]}, k=1).ids[0, 0] == "s3"
        enroll(engine, 15)
        assert engine.problems() == []
    assert list(stored_key(folder).transforms) == [transform_id]
    assert transform_id not in old
    after = stored_vectors(folder)
    assert np.abs(np.einsum("ij,ij->i", before[:14], after[:14])).max() < 6 / np.sqrt(128)
    got = answers(folder, renewable())
    assert [subject for subject, _ in got[:14]] == [subject for subject, _ in wanted[:14]]
    assert np.allclose([s for _, s in got[:14]], [s for _, s in wanted[:14]], atol=0.01)
    report = jobs.examine(folder, renewable(), canaries=True)
    assert not report.problems
    with bd.Engine.open(folder, renewable()) as engine:
        assert [case.encounter_id for case in engine.cases()] == ["case"]
        assert engine.case("case").templates["face"].embedding @ PEOPLE[0] > 0.4


@pytest.mark.slow
def test_a_gallery_in_the_clear_or_of_plain_templates_becomes_renewable_and_plain_again(tmp_path):
    fill(tmp_path / "g", small())
    with bd.Engine.open(tmp_path / "g", small()) as engine, pytest.raises(bd.InvalidInput, match="encrypted gallery"):
        engine.rekey()
    with pytest.raises(bd.InvalidInput, match=r"Config\.keys"):
        bd.Engine.open(tmp_path / "h", bd.Config(gallery=bd.GalleryConfig(renewable=True)))
    jobs.encrypt(tmp_path / "g", lambda: KEY)
    with pytest.raises(bd.InvalidInput, match="key rekey"):
        bd.Engine.open(tmp_path / "g", renewable())
    wanted, keyed = answers(tmp_path / "g", replace(small(), keys=lambda: KEY)), replace(small(), keys=lambda: KEY)
    with bd.Engine.open(tmp_path / "g", keyed) as engine:
        assert engine.rekey()
        assert len(engine.subject_ids()) == 14
    assert np.abs(np.einsum("ij,ij->i", stored_vectors(tmp_path / "g"), PEOPLE[:14])).max() < 6 / np.sqrt(128)
    with pytest.raises(bd.InvalidInput, match="--plain"):
        jobs.decrypt(tmp_path / "g", lambda: KEY)
    with bd.Engine.open(tmp_path / "g", renewable()) as engine:
        assert engine.rekey(renewable=False) == ""
    assert stored_key(tmp_path / "g").transforms == {}
    assert [subject for subject, _ in answers(tmp_path / "g", keyed)] == [subject for subject, _ in wanted]
    jobs.decrypt(tmp_path / "g", lambda: KEY)


def test_another_key_and_a_lost_secret_are_named_and_a_rotation_keeps_the_transform(filled, tmp_path):
    folder, new = copied(filled, tmp_path / "g"), bytes(range(50, 82))
    with pytest.raises(bd.KeyMismatch, match="encrypted with key"):
        bd.Engine.open(folder, renewable(new))
    transforms = stored_key(folder).transforms
    jobs.rotate_key(folder, lambda: KEY, lambda: new)
    assert stored_key(folder).transforms.keys() == transforms.keys()
    assert answers(folder, renewable(new)) == answers(filled, renewable())
    (folder / "gallery.key").write_bytes(stored_key(folder).content({}))
    with pytest.raises(bd.GalleryDamaged, match=r"gallery\.key lacks the transform"):
        bd.Engine.open(folder, renewable(new))


@pytest.mark.slow
def test_a_rekey_that_is_killed_anywhere_goes_on(filled, tmp_path, monkeypatch):
    wanted = [subject for subject, _ in answers(filled, renewable())]
    for n in itertools.count(3, 13):
        folder = copied(filled, tmp_path / f"g{n}")
        countdown = Countdown(n)
        with monkeypatch.context() as patched:
            for name in ("create", "replace", "remove", "sync_folder"):
                patched.setattr(LocalStorage, name, failing(getattr(LocalStorage, name), countdown))
            for name in ("add_transform", "keep_transforms"):
                patched.setattr(LocalStorage, name, failing(getattr(LocalStorage, name), countdown))
            patched.setattr(Transaction, "swap", failing(Transaction.swap, countdown))
            with suppress(bd.StorageUnavailable, bd.RetryableError, OSError):
                with bd.Engine.open(folder, renewable()) as engine:
                    engine.rekey()
        assert [subject for subject, _ in answers(folder, renewable())] == wanted, n
        with bd.Engine.open(folder, renewable()) as engine:
            transform_id = engine.rekey()
            assert engine.problems() == []
        assert list(stored_key(folder).transforms) == [transform_id], n
        assert transform_id not in stored_key(filled).transforms
        assert [subject for subject, _ in answers(folder, renewable())] == wanted, n
        if countdown.left > 0:
            break
    assert n > 20


@pytest.mark.slow
def test_a_rekey_after_an_interrupted_one_to_plain_templates_does_not_take_the_old_secret_again(filled, tmp_path):
    folder = copied(filled, tmp_path / "g")
    (old,) = stored_key(folder).transforms

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with bd.Engine.open(folder, renewable()) as engine, pytest.raises(KeyboardInterrupt):
        engine.rekey(renewable=False, progress=stop)
    with bd.Engine.open(folder, replace(renewable(), gallery=small().gallery)) as engine:
        transform_id = engine.rekey()
        assert engine.problems() == []
    assert transform_id != old and list(stored_key(folder).transforms) == [transform_id]
    assert [subject for subject, _ in answers(folder, renewable())] == [s for s, _ in answers(filled, renewable())]


def failing(action, countdown: Countdown):
    def call(*given, **named):
        return countdown.call(lambda: action(*given, **named), OSError(5, "input/output error"))

    return call


@pytest.mark.slow
def test_backups_before_between_and_after_open_and_restore(filled, tmp_path):
    folder = copied(filled, tmp_path / "g")
    with bd.Engine.open(folder, renewable()) as engine:
        engine.backup(tmp_path / "early")
        engine.backup(tmp_path / "late")
        engine.rekey()
        engine.backup(tmp_path / "late")
        transforms = stored_key(folder).transforms
    assert stored_key(tmp_path / "late").transforms == transforms
    wanted = [subject for subject, _ in answers(filled, renewable())]
    for name in ("early", "late"):
        assert [subject for subject, _ in answers(tmp_path / name, renewable())] == wanted
    (folder / "gallery.sqlite3").write_bytes(b"lost" * 4096)
    report = jobs.examine(folder, renewable(), mend=True, backup=tmp_path / "early")
    assert not report.problems
    assert [subject for subject, _ in answers(folder, renewable())] == wanted


@pytest.mark.slow
def test_exports_merges_and_templates_are_in_the_clear(filled, tmp_path):
    with bd.Engine.open(filled, renewable(), read_only=True) as engine:
        assert engine.templates("s3")["face"].embedding @ PEOPLE[3] > 0.99
    jobs.export_gallery(filled, tmp_path / "export", renewable())
    for name, config in (("plain", small()), ("transformed", renewable(bytes(range(2, 34))))):
        jobs.load_gallery(tmp_path / "export", tmp_path / name, config)
        assert [s for s, _ in answers(tmp_path / name, config)][:14] == [f"s{i}" for i in range(14)]
    assert (
        np.abs(
            np.einsum("ij,ij->i", stored_vectors(tmp_path / "transformed", bytes(range(2, 34)))[:14], PEOPLE[:14])
        ).max()
        < 0.4
    )


@pytest.mark.slow
def test_galleries_of_different_keys_are_merged_and_mates_are_found(tmp_path):
    """As `jobs.merge` copies rows: codes of another transform are encoded anew."""
    other = bytes(range(2, 34))
    fill(tmp_path / "a", renewable(), 8)
    fill(tmp_path / "b", renewable(other), 8)
    with bd.Engine.open(tmp_path / "b", renewable(other), read_only=True) as source:
        part = internals(source).gallery.snapshot()
        with bd.Engine.open(tmp_path / "a", renewable()) as target:
            gallery = internals(target).gallery
            for _ in copy_rows(part, gallery, "merge", lambda _: None, rename=renamed):
                pass
            found = target.search({"face": PEOPLE[:8]}, k=2)
            assert {tuple(sorted(row)) for row in found.ids.tolist()} == {(f"b-s{i}", f"s{i}") for i in range(8)}
            assert found.similarity.min() > 0.99
    vectors = stored_vectors(tmp_path / "a")
    assert np.abs(vectors @ PEOPLE[:8].T).max() < 6 / np.sqrt(128)
    assert ((vectors @ vectors.T > 0.99).sum(axis=1) == 2).all(), "both are stored with one transform"


def renamed(ids):
    return pack_text([f"b-{name}" for name in text(ids)])


@pytest.mark.slow
def test_rows_that_were_written_before_a_rekey_and_attached_after_it_are_not_lost_in_an_old_transform(tmp_path):
    with bd.Engine.open(tmp_path / "g", renewable()) as engine:
        enroll(engine, 0)
        gallery = internals(engine).gallery
        cells = {"face": vectors_alone(SFACE, PEOPLE[5:7])}
        entry = gallery.write_rows(pack_text(["a", "b"]), cells, np.zeros(2, np.uint32))
        engine.rekey()
        with pytest.raises(bd.GalleryBusy, match="got a new transform"), gallery.transaction() as transaction:
            transaction.attach(entry)
        entry = gallery.write_rows(pack_text(["a", "b"]), cells, np.zeros(2, np.uint32))
        with gallery.transaction() as transaction:
            transaction.attach(entry)
    with bd.Engine.open(tmp_path / "g", renewable()) as engine:
        assert sorted(engine.subject_ids()) == ["a", "b", "s0"]
        assert engine.problems() == []


@pytest.mark.slow
def test_two_rekeys_at_once_follow_one_another(tmp_path):
    fill(tmp_path / "g", renewable(), 6)
    with bd.Engine.open(tmp_path / "g", renewable()) as engine, ThreadPoolExecutor(3) as pool:
        apply = [pool.submit(engine.rekey) for _ in range(3)]
        ids = [future.result() for future in apply]
    assert len(set(ids)) == 3
    (left,) = stored_key(tmp_path / "g").transforms
    assert left in ids
    assert [subject for subject, _ in answers(tmp_path / "g", renewable())][:6] == [f"s{i}" for i in range(6)]


@pytest.mark.slow
def test_a_faiss_index_is_transformed_and_rekeyed_too(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "CELLS_MIN", 1_000)
    vectors = people(6_000, seed=8)
    config = renewable(seal_rows=3_000, merge_fan=9)
    config = replace(config, gallery=replace(config.gallery, index="faiss:OPQ16_64,IVF16,PQ16x4fs"))
    with bd.Engine.open(tmp_path / "g", config) as engine:
        for low in (0, 3_000):
            engine.add_templates(
                [f"p{i}" for i in range(low, low + 3_000)], {"face": vectors[low : low + 3_000]}, model_id=SFACE
            )
            engine.maintain()
        for _ in range(2):
            snapshot = internals(engine).gallery.snapshot()
            columns = [segment.columns["face"] for segment in snapshot.segments]
            codec = snapshot.indexing.wanted("face")
            assert [column.index.codec_id for column in columns] == [codec.codec_id] * len(columns)
            assert codec.transform.transform_id == snapshot.transform.transform_id
            inner = columns[0].index.loaded()
            own = inner.search(np.ascontiguousarray(codec.transformed(vectors[:20])), 1)[1][:, 0]
            assert (own == np.arange(20)).mean() > 0.8, "the stored index holds transformed vectors"
            assert (inner.search(vectors[:20], 1)[1][:, 0] == np.arange(20)).mean() < 0.2
            for index in (engine.faiss_index("face"), next(iter(engine.faiss_copies("face")))[1]):
                assert (index.search(vectors[:20], 1)[1][:, 0] == np.arange(20)).mean() > 0.8
            assert engine.search({"face": again(vectors[:50], 0.7)}, k=1).ids[:, 0].tolist() == [
                f"p{i}" for i in range(50)
            ]
            engine.rekey()
        assert len(stored_key(tmp_path / "g").transforms) == 1
