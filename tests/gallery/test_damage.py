"""What a gallery survives: flipped bits, lost files, a full disk, killed writers, older formats; and how it is mended."""

from __future__ import annotations

import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import biodedup as bd
from biodedup import jobs
from biodedup.gallery.care.verify import inspect
from biodedup.gallery.catalogue.sqlite import SqliteCatalogue
from biodedup.gallery.files.column_file import Stream, open_column_file, write_column_file
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.segments.layout import file_name
from biodedup.gallery.segments.reader import Segment
from biodedup.testing import internals
from tests.support import GOLDEN
from tests.support.galleries import PEOPLE, enroll, nearest, small
from tests.support.vectors import SFACE, people


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """Two segments, a tombstone, and two rows in the journal."""
    with bd.Engine.open(tmp_path / "g", small(merge_fan=9)) as engine:
        for low in (0, 6):
            for i in range(low, low + 6):
                enroll(engine, i)
            engine.maintain()
        engine.remove("s2")
        enroll(engine, 12)
        enroll(engine, 13)
        assert engine.info()["segments"] == 2
    return tmp_path / "g"


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1
    path.write_bytes(content)


def contents(folder: Path) -> tuple[object, ...]:
    with bd.Engine.open(folder, small(), read_only=True) as engine:
        ids, similarity = engine.search({"face": PEOPLE}, k=1)
        return (
            *engine.subject_ids(),
            *ids.ravel(),
            *similarity.ravel(),
            *(engine.decision(f"e{i}") for i in range(14)),
        )


@pytest.mark.slow
@pytest.mark.usefixtures("at_rest")
def test_a_flipped_bit_in_any_segment_file_is_found_and_named(sealed):
    rng = np.random.default_rng(3)
    files = sorted((sealed / "segments").iterdir())
    assert len(files) == 12
    for path in files:
        sound = path.read_bytes()
        number, _, kind = path.name.partition(".")
        size = len(sound)
        for place in [0, 9, 13, 30, 60, 4095, 4096, size - 1, size - 9, *rng.integers(size, size=12).tolist()]:
            flip(path, place)
            problems = inspect(LocalStorage(), sealed)
            assert [(str(p.segment), p.kind) for p in problems] == [(number, kind)], (path.name, place)
            try:
                contents(sealed)
                assert kind.endswith("lookup") or kind in ("subject", "encounter"), "a scan reads the whole column"
            except bd.GalleryDamaged as error:
                assert path.name in str(error)
            path.write_bytes(sound)
        path.write_bytes(sound[: size // 2])
        assert [(str(p.segment), p.kind) for p in inspect(LocalStorage(), sealed)] == [(number, kind)]
        path.unlink()
        assert "missing" in str(inspect(LocalStorage(), sealed)[0])
        path.write_bytes(sound)
    assert inspect(LocalStorage(), sealed) == []


@pytest.mark.slow
def test_doctor_counts_subjects_that_are_enrolled_twice_and_no_removed_ones(tmp_path):
    with bd.Engine.open(tmp_path / "g", small(seal_rows=50)) as engine:
        enroll(engine, 0)
        internals(engine).gallery.seal()
        for person in (1, 2, 3):  # one row in the segment and two in the journal are removed
            encounter = bd.Encounter("s0", templates={"face": PEOPLE[person]})
            assert engine.update(encounter, replace=True, reason="a test").outcome == "unique"
        enroll(engine, 4)
        assert engine.problems() == []
        with internals(engine).gallery.transaction() as transaction:  # what `add` would refuse
            template = bd.Template("face", transaction.models["face"].model_id, PEOPLE[5])
            transaction._catalogue.add_subjects([(transaction.tail.end_row, "s4", "", 0)])
            transaction._catalogue.add_cells([(transaction.tail.end_row, template)])
            transaction.tail.append("s4", "", 0, {"face": template}, repeated=True)
            transaction.content_changed = True
        assert engine.problems() == [
            "database, counters: its counters have 0 rows beyond the first of their subject, wanted 1 by its rows"
        ]


@pytest.mark.slow
@pytest.mark.usefixtures("at_rest")
def test_a_flipped_bit_in_the_journal_is_found_or_changes_nothing(sealed):
    before = contents(sealed)
    database = sealed / "gallery.sqlite3"
    sound = database.read_bytes()
    written = np.flatnonzero(np.frombuffer(sound, np.uint8))  # most of a small database is empty pages
    found = 0
    for place in np.random.default_rng(0).choice(written, 150, replace=False).tolist():
        flip(database, place)
        try:
            problems = inspect(LocalStorage(), sealed)
        except bd.BiodedupError:
            problems = ["refused"]
        if problems:
            found += 1
        else:
            assert contents(sealed) == before, place
        database.write_bytes(sound)
    assert found > 140


@pytest.mark.slow
def test_doctor_rebuilds_look_ups_byte_for_byte(sealed):
    lookups = sorted((sealed / "segments").glob("*.lookup"))
    sound = [path.read_bytes() for path in lookups]
    flip(lookups[0], 5000)
    lookups[1].unlink()
    lookups[2].write_bytes(b"")
    assert len(jobs.examine(sealed).problems) == 3
    report = jobs.examine(sealed, mend=True)
    assert report.problems == ()
    assert len(report.mended) == 3
    assert [path.read_bytes() for path in lookups] == sound


@pytest.mark.slow
@pytest.mark.usefixtures("at_rest")
def test_doctor_takes_damaged_columns_from_a_backup_and_loses_nothing_newer(sealed, tmp_path):
    with bd.Engine.open(sealed, small(merge_fan=9)) as engine:
        engine.backup(tmp_path / "b")
        enroll(engine, 14)
    before = contents(sealed)
    (sealed / "segments" / "1.face").unlink()
    flip(sealed / "segments" / "2.subject", 4200)
    flip(sealed / "segments" / "2.encounter.lookup", 4200)
    assert len(jobs.examine(sealed, mend=True).problems) == 2
    report = jobs.examine(sealed, backup=tmp_path / "b", mend=True)
    assert report.problems == ()
    assert contents(sealed) == before
    assert "s14" in before


@pytest.mark.slow
def test_a_lost_database_is_restored_with_the_backups_whole_state(sealed, tmp_path):
    with bd.Engine.open(sealed, small(merge_fan=9)) as engine:
        engine.backup(tmp_path / "b")
        before = contents(sealed)
        enroll(engine, 14)
        for i in range(20, 24):
            enroll(engine, i)
        engine.maintain()
    (sealed / "gallery.sqlite3").write_bytes(b"")
    assert len(jobs.examine(sealed).problems) == 1
    with pytest.raises(bd.GalleryDamaged):
        bd.Engine.open(sealed)
    report = jobs.examine(sealed, mend=True, backup=tmp_path / "b")
    assert report.problems == ()
    assert "later commits are lost" in report.mended[0]
    assert contents(sealed) == before
    assert len(list((sealed / "damaged").iterdir())) >= 2


@pytest.mark.slow
def test_a_database_is_not_restored_from_another_gallerys_backup(sealed, tmp_path):
    with bd.Engine.open(tmp_path / "other") as other:
        enroll(other, 0)
        other.backup(tmp_path / "b")
    database = sealed / "gallery.sqlite3"
    database.write_bytes(b"")
    with pytest.raises(bd.InvalidInput, match="another gallery"):
        jobs.examine(sealed, mend=True, backup=tmp_path / "b")
    assert database.exists()
    assert not (sealed / "damaged").exists()


@pytest.mark.slow
def test_a_merge_survives_a_recovery_that_opened_the_segments_anew(sealed):
    with bd.Engine.open(sealed, small(merge_fan=9)) as engine:
        parts = internals(engine)
        old = [part for part in parts.gallery.snapshot().parts if isinstance(part, Segment)]
        taken = parts.take_segment_number()
        parts.break_gallery()
        enroll(engine, 14)  # recovers first
        assert parts.take_segment_number() == taken + 1
        parts.maintenance.merge(old)
        assert engine.info()["segments"] == 1
        assert engine.problems() == []
        assert nearest(engine, 14) == "s14"


@pytest.mark.slow
@pytest.mark.usefixtures("at_rest")
def test_a_backup_is_incremental_consistent_and_a_gallery(sealed, tmp_path):
    with bd.Engine.open(sealed, small(merge_fan=9)) as engine:
        first = engine.backup(tmp_path / "b")
        assert (first.files_copied, first.files_kept) == (12, 0)
        assert contents(tmp_path / "b") == contents(sealed)
        for i in range(20, 26):
            enroll(engine, i)
        engine.maintain()
        second = engine.backup(tmp_path / "b")
        assert (second.files_copied, second.files_kept) == (6, 12)
        engine.compact()
        assert engine.backup(tmp_path / "b").files_copied == 6
    assert contents(tmp_path / "b") == contents(sealed)
    assert inspect(LocalStorage(), tmp_path / "b") == []
    assert len(list((tmp_path / "b" / "segments").iterdir())) == 6
    with bd.Engine.open(tmp_path / "other", small()) as other, pytest.raises(bd.InvalidInput, match="another gallery"):
        other.backup(tmp_path / "b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with bd.Engine.open(sealed, small()) as engine, pytest.raises(bd.InvalidInput, match="other files"):
        engine.backup(tmp_path / "full")


@pytest.mark.slow
def test_a_damaged_gallery_is_not_copied_over_a_good_backup(sealed, tmp_path):
    with bd.Engine.open(sealed, small(merge_fan=9)) as engine:
        engine.backup(tmp_path / "b")
        before = contents(tmp_path / "b")
        for i in range(20, 26):
            enroll(engine, i)
        engine.maintain()
    flip(next((sealed / "segments").glob("3.face")), 5000)
    with (
        bd.Engine.open(sealed, small(merge_fan=9), read_only=True) as engine,
        pytest.raises(bd.GalleryDamaged, match=r"3\.face"),
    ):
        engine.backup(tmp_path / "b")
    assert contents(tmp_path / "b") == before


@pytest.mark.slow
def test_leftovers_of_a_killed_writer_are_swept_up(sealed):
    before = contents(sealed)
    for name in ("7.face.new", "7.subject", "99.face"):
        (sealed / "segments" / name).write_bytes(b"half")
    bd.Engine.open(sealed, small(), read_only=True).close()
    assert (sealed / "segments" / "99.face").exists()
    bd.Engine.open(sealed, small()).close()
    assert len(list((sealed / "segments").iterdir())) == 12
    assert contents(sealed) == before


FILLER = """
import resource, signal, sys
import numpy as np
import biodedup as bd
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
vectors = np.load(sys.argv[2])
config = bd.Config(gallery=bd.GalleryConfig(8, 2, False), policy=bd.Policy(duplicate_db=150, review_db=150))
with bd.Engine.open(sys.argv[1], config) as engine:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
    failed = 0
    for i, vector in enumerate(vectors):
        try:
            if i % 3:
                engine.add_templates([f"s{i}"], {"face": vector[None]}, model_id="sface-2021dec-mirror-centred-1")
            else:
                engine.enroll(bd.Encounter(f"s{i}", templates={"face": vector}, model_id="sface-2021dec-mirror-centred-1"))
            print(i, flush=True)
            if i % 8 == 7:
                engine.maintain()
        except bd.StorageUnavailable:
            failed += 1
        if failed == 5:
            break
    assert failed
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    engine.enroll(bd.Encounter("later", templates={"face": -vectors[0]}, model_id="sface-2021dec-mirror-centred-1"))
    engine.maintain()
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [8_000, 30_000, 110_000, 140_000])
def test_a_full_disk_refuses_and_loses_nothing(tmp_path, limit):
    np.save(tmp_path / "v.npy", people(3000, seed=12))
    command = [sys.executable, "-c", FILLER, str(tmp_path / "g"), str(tmp_path / "v.npy"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    acknowledged = {f"s{line}" for line in done.stdout.split()}
    with bd.Engine.open(tmp_path / "g", small()) as engine:
        listed = set(engine.subject_ids())
        assert engine.problems() == []
    assert acknowledged | {"later"} <= listed
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY


# the container ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(
    arrays=st.lists(
        st.tuples(st.sampled_from(["|u1", "<u4", "<f4", "|i1", "<i8"]), st.lists(st.integers(0, 90_000), max_size=4)),
        max_size=4,
    ),
    piece=st.integers(1, 70_000),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_column_file_gives_back_what_was_written_in_whatever_pieces(tmp_path, arrays, piece):
    rng = np.random.default_rng(0)
    written = {}
    for i, (dtype, lengths) in enumerate(arrays):
        written[f"a{i}"] = rng.integers(0, 100, size=sum(lengths)).astype(dtype)
    streams = [
        Stream(
            name, values.dtype.str, values.shape, [values[low : low + piece] for low in range(0, len(values), piece)]
        )
        for name, values in written.items()
    ]
    digest = write_column_file(LocalStorage(), tmp_path / "f", {"kind": "x"}, streams, replaces=True)
    file = open_column_file(LocalStorage(), tmp_path / "f")
    assert (file.digest, file.about, list(file.problems())) == (digest, {"kind": "x"}, [])
    for name, values in written.items():
        assert np.array_equal(file.read(name), values)
        some = rng.integers(0, max(len(values), 1), size=min(len(values), 5))
        assert np.array_equal(file.take(name, some), values[some])


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_the_golden_gallery_of_each_format_that_is_read_opens_and_answers(tmp_path, number):
    shutil.copytree(GOLDEN / f"format-{number}", tmp_path / "g")
    assert inspect(LocalStorage(), tmp_path / "g") == []
    with bd.Engine.open(tmp_path / "g", read_only=True) as engine:
        assert engine.subject_ids() == ["anna", "bella", "dora", "emil"]
        vectors = np.eye(8, dtype=np.float32)
        ids, similarity = engine.search({"face": vectors[:5]}, k=1)
        assert list(ids[[0, 1, 3, 4], 0]) == ["anna", "bella", "dora", "emil"]
        assert np.allclose(similarity[[0, 1, 3, 4], 0], 1)
        assert list(engine.search({"face": vectors[:1]}, k=3, groups=["north"]).ids[0]) == ["anna", "", ""]
        assert engine.decision("e-dora").outcome == "unique"
        assert engine.info()["removed_not_erased"] == 1
    with bd.Engine.open(tmp_path / "g") as engine:
        resent = bd.Encounter("dora", templates={"face": vectors[3]}, encounter_id="e-dora")
        assert engine.enroll(resent) == engine.decision("e-dora")
        engine.compact()
        assert list(engine.search({"face": vectors[[0, 1, 3, 4]]}, k=1).ids[:, 0]) == ["anna", "bella", "dora", "emil"]
        assert engine.problems() == []
    assert len(list((tmp_path / "g" / "segments").glob("*.face.rest"))) == 1  # of the present layout now
    with closing(sqlite3.connect(tmp_path / "g" / "gallery.sqlite3")) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (5,)


def test_the_golden_gallery_is_rewritten_byte_for_byte(tmp_path):
    shutil.copytree(GOLDEN / "format-2", tmp_path / "g")
    path = tmp_path / "g" / "segments" / "1.subject.lookup"
    sound = path.read_bytes()
    path.unlink()
    assert jobs.examine(tmp_path / "g", mend=True).problems == ()
    assert path.read_bytes() == sound
    assert file_name(1, "subject.lookup") == path.name


def test_a_gallery_of_the_first_release_is_upgraded_and_answers_as_before(tmp_path):
    shutil.copytree(GOLDEN / "format-1", tmp_path / "g")
    with pytest.raises(bd.NotAGallery, match="for writing once"):
        bd.Engine.open(tmp_path / "g", read_only=True)
    for config in (small(), small()):
        with bd.Engine.open(tmp_path / "g", config) as engine:
            assert engine.subject_ids() == ["anna", "bella", "dora", "emil"]
            vectors = np.eye(8, dtype=np.float32)
            ids, _ = engine.search({"face": vectors[:5]}, k=1)
            assert list(ids[[0, 1, 3, 4], 0]) == ["anna", "bella", "dora", "emil"]
            assert engine.decision("e-dora").outcome == "unique"
            assert engine.gallery_version == 4
            resent = bd.Encounter("dora", templates={"face": vectors[3]}, encounter_id="e-dora")
            assert engine.enroll(resent) == engine.decision("e-dora")
            assert engine.problems() == []
            engine.maintain()
    assert list((tmp_path / "g" / "segments").glob("*.face"))


@pytest.mark.slow
def test_a_check_beside_a_writer_that_seals_sees_one_state_of_the_journal(tmp_path, monkeypatch):
    read = SqliteCatalogue._all
    with bd.Engine.open(tmp_path / "g", bd.Config(gallery=bd.GalleryConfig(background=False))) as engine:
        engine.add_templates(["anna", "bella"], {"face": people(2)}, model_id=SFACE)
        sealing, reads = threading.Thread(target=engine.seal), []

        def sealed_meanwhile(catalogue, table, *given, **named):
            reads.append(table)
            if reads.count("cell") == 2 and table == "cell":  # the second time its rows are compared with the subjects
                sealing.start()
                sealing.join(2)
            yield from read(catalogue, table, *given, **named)

        monkeypatch.setattr(SqliteCatalogue, "_all", sealed_meanwhile)
        assert engine.problems() == []
        sealing.join()
        assert engine.info()["segments"] == 1
