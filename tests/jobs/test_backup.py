"""A backup takes along what jobs keep beside a gallery: with the copy they go on as they would have with the gallery."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.gallery.care.backup import backup
from biodedup.gallery.care.repair import repair
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.files.names import BACKLOG_NAME, LEDGER_NAME, MERGES_FOLDER
from biodedup.jobs.enrolment.queue import Arrival, Backlog
from biodedup.jobs.kits.ledger import Ledger
from tests.support.faults import Countdown, FailingStorage
from tests.support.vectors import again, people

CONFIG = bd.Config(gallery=bd.GalleryConfig(background=False))
NOW = 1_800_000_000.0


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    """Three subjects, two encounters that wait, and a batch of a kit that was noted."""
    folder = tmp_path / "g"
    with bd.Engine.open(folder, CONFIG) as engine:
        engine.add_templates(["s0", "s1", "s2"], {"face": people(3)})
    note(folder, 2)
    return folder


def note(folder: Path, waiting: int) -> None:
    """From now on so many encounters wait, and so many batches were here."""
    with Backlog.open(folder) as backlog:
        backlog.enqueue([Arrival(f"e{i}") for i in range(waiting)], NOW)
    ledger = Ledger(folder)
    for i in range(waiting):
        ledger.first_received(f"digest{i}", "K", "key", f"{i}.kit", 1, NOW)
    ledger.close()


def noted(folder: Path) -> tuple[int, int]:
    """(encounters that wait, batches that were here)."""
    with sqlite3.connect(folder / LEDGER_NAME) as ledger:
        (batches,) = ledger.execute("SELECT count(*) FROM batches").fetchone()
    ledger.close()
    return jobs.queue_status(folder, NOW).waiting, batches


def copied(folder: Path, target: Path) -> Path:
    with bd.Engine.open(folder, CONFIG, read_only=True) as engine:
        assert engine.backup(target).left_out == ()
    return target


def test_the_backlog_of_a_copy_says_who_waits(gallery, tmp_path):
    copy = copied(gallery, tmp_path / "copy")
    assert jobs.queue_status(copy, NOW) == jobs.queue_status(gallery, NOW)
    assert noted(copy) == (2, 2)
    note(gallery, 5)
    assert noted(copied(gallery, copy)) == (5, 5)
    assert not list(copy.glob("*.new*"))


def test_databases_are_counted_among_what_a_backup_copied(tmp_path):
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        result = engine.backup(tmp_path / "copy")
    assert (result.files_copied, result.databases) == (0, 1)
    assert result.byte_count == (tmp_path / "copy" / "gallery.sqlite3").stat().st_size > 0


def test_a_kits_batch_that_was_taken_is_known_after_a_restoration(tmp_path):
    jobs.make_keys("K", tmp_path / "K.key", clock=lambda: NOW)
    jobs.make_centre_key(tmp_path / "centre.key")
    centre = [jobs.load_centre_key(tmp_path / "centre.key")]
    (tmp_path / "trusted").mkdir()
    shutil.copy(tmp_path / "K.pub", tmp_path / "trusted")
    table = pa.table({"subject_id": ["s0", "s1"], "face": people(2).tolist()})
    pa.parquet.write_table(table, tmp_path / "m.parquet")
    jobs.pack_batch(tmp_path / "m.parquet", tmp_path / "b.kit", tmp_path / "K.key", clock=lambda: NOW + 1)

    def ingested(folder: Path, now: float) -> jobs.IngestResult:
        return jobs.ingest_batches(
            [tmp_path / "b.kit"],
            folder,
            tmp_path / "trusted",
            tmp_path / "o.parquet",
            CONFIG,
            centre=centre,
            clock=lambda: now,
        )

    assert ingested(tmp_path / "g", NOW + 2).batches[0].state == "whole"
    copy = copied(tmp_path / "g", tmp_path / "copy")
    result = ingested(copy, NOW + 3)
    assert (result.batches[0].state, result.batches[0].first_received_at) == ("repeated", NOW + 2)
    assert [one.outcome for one in result.outcomes] == ["already_taken"] * 2
    assert result.outcomes[0].first_from == "kit K, sequence 1"


@pytest.mark.slow
def test_a_merge_is_undone_in_a_copy(gallery, tmp_path):
    with bd.Engine.open(tmp_path / "d", CONFIG) as engine:
        engine.add_templates(["d0", "d1"], {"face": [*again(people(1), 0.9), *people(1, 7)]})
    found = jobs.merge([tmp_path / "d"], tmp_path / "m.parquet", into=gallery, apply=True, min_db=60, config=CONFIG)
    assert found.applied is not None and found.applied.subjects == 4
    copy = copied(gallery, tmp_path / "copy")
    assert jobs.undo(found.merge_id, copy, CONFIG).subjects == 3
    with bd.Engine.open(gallery, CONFIG, read_only=True) as engine:
        assert len(engine) == 4
        assert engine.backup(tmp_path / "another").files_kept == 0
        assert engine.backup(tmp_path / "another").files_copied == 0  # a log is copied once


def test_a_restoration_takes_the_state_of_the_backup_and_keeps_what_it_replaces(gallery, tmp_path):
    copy = copied(gallery, tmp_path / "copy")
    note(gallery, 5)
    (gallery / "gallery.sqlite3").write_bytes(b"")
    assert jobs.examine(gallery, mend=True, backup=copy).problems == ()
    assert noted(gallery) == (2, 2)  # what came later is not in the gallery, and has to be missed again
    assert {BACKLOG_NAME, LEDGER_NAME} <= {path.name for path in (gallery / "damaged").iterdir()}


def test_a_restoration_into_an_empty_folder_brings_everything(gallery, tmp_path):
    copy = copied(gallery, tmp_path / "copy")
    (copy / MERGES_FOLDER).mkdir()
    (copy / MERGES_FOLDER / "1.parquet").write_bytes(b"log")
    shutil.rmtree(gallery)
    gallery.mkdir()
    repair(LocalStorage(), gallery, copy)
    assert noted(gallery) == (2, 2)
    assert (gallery / MERGES_FOLDER / "1.parquet").read_bytes() == b"log"


@pytest.mark.slow
def test_a_disk_that_fails_leaves_each_file_of_a_backup_as_it_was_or_as_it_is_now(gallery, tmp_path):
    copy = copied(gallery, tmp_path / "copy")
    note(gallery, 5)
    (gallery / MERGES_FOLDER).mkdir()
    (gallery / MERGES_FOLDER / "1.parquet").write_bytes(b"a log" * 100)
    for n in range(1, 200, 2):
        shutil.rmtree(tmp_path / "try", ignore_errors=True)
        shutil.copytree(copy, tmp_path / "try")
        countdown = Countdown(n)
        try:
            backup(FailingStorage(countdown), gallery, tmp_path / "try")
        except bd.StorageUnavailable:
            pass
        assert set(noted(tmp_path / "try")) <= {2, 5}
        logs = [path.read_bytes() for path in (tmp_path / "try").glob("merges/*.parquet")]
        assert logs in ([], [b"a log" * 100])
        if countdown.left > 0:
            break
    assert n > 40
    assert noted(tmp_path / "try") == (5, 5) and len(logs) == 1
    assert not list((tmp_path / "try").glob("**/*.new*"))


def test_what_a_backup_writes_gets_its_name_when_it_is_whole(gallery, tmp_path):
    begun: list[str] = []

    class Watched(LocalStorage):
        def create(self, path):
            begun.append(path.name)
            return super().create(path)

        def connect(self, path, *, read_only):
            begun.extend([] if read_only else [path.name])
            return super().connect(path, read_only=read_only)

    (gallery / MERGES_FOLDER).mkdir()
    (gallery / MERGES_FOLDER / "1.parquet").write_bytes(b"a log")
    backup(Watched(), gallery, tmp_path / "copy")
    wanted = {BACKLOG_NAME, LEDGER_NAME, "gallery.sqlite3", "1.parquet"}
    assert {name.removesuffix(".new") for name in begun} == wanted
    assert all(name.endswith(".new") for name in begun)


def test_a_damaged_ledger_does_not_stop_a_backup_and_is_not_copied_over_a_good_one(gallery, tmp_path):
    copy = copied(gallery, tmp_path / "copy")
    (gallery / LEDGER_NAME).write_bytes(b"no database" * 100)
    with bd.Engine.open(gallery, CONFIG, read_only=True) as engine:
        assert engine.backup(copy).left_out == (LEDGER_NAME,)
    assert noted(copy) == (2, 2)
