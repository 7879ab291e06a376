"""Forked processes and second writers: none of them can spoil a gallery that another process has open."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.gallery.care.verify import inspect
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.files.handles import FileLock
from biodedup.testing import internals
from tests.support import ROOT
from tests.support.galleries import PEOPLE, enroll, nearest, small

pytestmark = pytest.mark.slow


def forked(action) -> str:
    """What the action returns in a child, or the name and text of its error."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            text = str(action())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return text


def probe(i: int) -> bd.Encounter:
    return bd.Encounter(templates={"face": PEOPLE[i]})


CALLS = {
    "enroll": lambda e: enroll(e, 1),
    "enroll_many": lambda e: list(e.enroll_many([bd.Encounter("x", templates={"face": PEOPLE[1]})])),
    "update": lambda e: e.update(bd.Encounter("s0", templates={"face": PEOPLE[1]})),
    "identify": lambda e: e.identify(probe(0)),
    "verify": lambda e: e.verify(probe(0), "s0"),
    "search": lambda e: nearest(e, 0),
    "len": len,
    "in": lambda e: "s0" in e,
    "gallery_version": lambda e: e.gallery_version,
    "pairs": lambda e: e.pairs,
    "remove": lambda e: e.remove("s0"),
    "add_templates": lambda e: e.add_templates(["x"], {"face": PEOPLE[1:2]}),
    "templates": lambda e: e.templates("s0"),
    "decision": lambda e: e.decision("e0"),
    "cases": lambda e: list(e.cases()),
    "join": lambda e: list(e.join()),
    "info": lambda e: e.info(),
    "refresh": lambda e: e.refresh(),
    "maintain": lambda e: e.maintain(),
    "compact": lambda e: e.compact(),
    "problems": lambda e: e.problems(),
}


@pytest.mark.parametrize("read_only", [False, True])
def test_every_call_in_a_forked_child_names_the_fork_and_the_parent_goes_on(tmp_path, read_only):
    with bd.Engine.open(tmp_path / "g", small()) as engine:
        enroll(engine, 0)
    with bd.Engine.open(tmp_path / "g", small(), read_only=read_only) as engine:
        for name, call in CALLS.items():
            told = forked(lambda call=call: call(engine))
            assert told.startswith("EngineClosed: the gallery was opened by process"), (name, told)
            assert "fork" in told
        assert nearest(engine, 0) == "s0"
        if not read_only:
            assert enroll(engine, 1).outcome == "unique"
            engine.compact()
            assert engine.problems() == []


ENDINGS = {
    "close": "engine.close()",
    "with": "engine.__exit__(None, None, None)",
    "collected": "pass",
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_childs_end_releases_nothing_of_the_parents(tmp_path, name):
    script = f"""
import gc, os, sys
import biodedup as bd
from biodedup.gallery.answers import StoredDecision
from biodedup.testing import internals
from tests.support.galleries import enroll, small
engine = bd.Engine.open({str(tmp_path / "g")!r}, small(background=True))
for i in range(9):
    enroll(engine, i)
parts = internals(engine)
with parts.gallery.lock:
    parts.catalogue.begin()  # as in the midst of a commit
    parts.catalogue.add_answer("half", StoredDecision(b"", "unique", "{{}}"))
    pid = os.fork()
    if not pid:
        {ENDINGS[name]}
        del engine, parts
        gc.collect()
        sys.exit(0)  # with all that Python does at exit
    assert os.waitpid(pid, 0)[1] == 0
    journal = open({str(tmp_path / "g" / "gallery.sqlite3-journal")!r}, "rb").read(8)
    parts.catalogue.rollback()
again = os.system("flock -n " + {str(tmp_path / "g" / "writer.lock")!r} + " true")
assert again != 0, "the parent's lock is gone"
enroll(engine, 10)
assert len(engine) == 10
engine.close()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with bd.Engine.open(tmp_path / "g", small()) as engine:
        assert len(engine) == 10
        assert engine.problems() == []


def test_a_child_that_outlives_its_parents_engine_does_not_hold_the_gallery(tmp_path):
    engine = bd.Engine.open(tmp_path / "g", small())
    enroll(engine, 0)
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    try:
        engine.close()
        with bd.Engine.open(tmp_path / "g", small()) as again:
            assert len(again) == 1
    finally:
        os.close(writing)
        os.waitpid(pid, 0)


def test_a_closed_gallery_is_free_although_a_copy_of_its_lock_is_open(tmp_path):
    """As in a child that was forked a moment ago."""
    engine = bd.Engine.open(tmp_path / "g", small())
    descriptors = [int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]
    (lock,) = [fd for fd in descriptors if os.readlink(f"/proc/self/fd/{fd}") == str(tmp_path / "g" / "writer.lock")]
    copy = os.dup(lock)
    try:
        engine.close()
        bd.Engine.open(tmp_path / "g", small()).close()
    finally:
        os.close(copy)


def test_a_child_opens_an_engine_of_its_own(tmp_path):
    with bd.Engine.open(tmp_path / "g", small()) as engine:
        enroll(engine, 0)

        def read() -> str:
            with bd.Engine.open(tmp_path / "g", small(), read_only=True) as own:
                return nearest(own, 0)

        assert forked(read) == "s0"
        assert forked(lambda: bd.Engine.open(tmp_path / "g")).startswith("GalleryBusy")


def test_a_fork_waits_for_a_commit(tmp_path):
    with bd.Engine.open(tmp_path / "g", small()) as engine:
        enroll(engine, 0)
        began, until = threading.Event(), []

        def commit() -> None:
            with internals(engine).gallery.transaction() as transaction:
                began.set()
                time.sleep(0.3)
                transaction.remove("s0")
            until.append(time.monotonic())

        thread = threading.Thread(target=commit)
        thread.start()
        began.wait()
        forked(lambda: None)
        thread.join()
        assert until
        assert "s0" not in engine


def test_a_half_written_file_is_not_written_on_by_a_child(tmp_path):
    file = LocalStorage().create(tmp_path / "f")
    file.write(b"once")
    pid = os.fork()
    if not pid:
        del file  # a buffer of Python's own would be flushed here
        os._exit(0)
    os.waitpid(pid, 0)
    file.finish()
    assert (tmp_path / "f").read_bytes() == b"once"


# second writers ----------------------------------------------------------------------------------------------------


def steal(folder: Path) -> None:
    (folder / "writer.lock").unlink()


def test_a_writer_whose_lock_was_removed_stops_and_loses_nothing_of_the_second(tmp_path):
    first = bd.Engine.open(tmp_path / "g", small())
    enroll(first, 0)
    steal(tmp_path / "g")
    second = bd.Engine.open(tmp_path / "g", small())
    for i in range(1, 4):
        assert enroll(second, i).outcome == "unique"
    for write in (lambda: enroll(first, 9), lambda: first.remove("s0"), first.compact):
        with pytest.raises(bd.GalleryBusy, match="another process"):
            write()
    second.maintain()
    enroll(second, 5)
    first.close()
    assert nearest(second, 3) == "s3"
    second.close()
    with bd.Engine.open(tmp_path / "g", small()) as again:
        assert sorted(again.subject_ids()) == ["s0", "s1", "s2", "s3", "s5"]
        assert again.problems() == []


def test_the_lock_is_checked_even_before_the_second_writer_has_written(tmp_path):
    with bd.Engine.open(tmp_path / "g", small()) as first:
        enroll(first, 0)
        steal(tmp_path / "g")
        with pytest.raises(bd.GalleryBusy, match=r"writer\.lock"):
            enroll(first, 1)
        with bd.Engine.open(tmp_path / "g", small()) as second:
            assert enroll(second, 2).outcome == "unique"


def test_another_writers_commit_of_the_same_number_is_not_taken_for_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(FileLock, "is_held", lambda self: self._file >= 0)  # only the fence in the database is left
    first = bd.Engine.open(tmp_path / "g", small())
    enroll(first, 0)
    steal(tmp_path / "g")
    second = bd.Engine.open(tmp_path / "g", small())
    with pytest.raises(bd.GalleryBusy):
        with internals(first).gallery.transaction() as transaction:
            transaction.content_changed = True
            internals(first).catalogue.rollback()  # lost, and the second writer commits under the same number
            enroll(second, 1)
            raise bd.GalleryBusy("the commit failed")
    assert internals(first).commits + 1 == internals(second).commits
    with pytest.raises(bd.GalleryBusy, match="another process wrote"):
        enroll(first, 2)
    first.close()
    second.close()
    with bd.Engine.open(tmp_path / "g", small()) as again:
        assert again.subject_ids() == ["s0", "s1"]


def test_a_recovery_does_not_take_over_what_another_writer_committed(tmp_path):
    first = bd.Engine.open(tmp_path / "g", small())
    enroll(first, 0)
    steal(tmp_path / "g")
    second = bd.Engine.open(tmp_path / "g", small())
    enroll(second, 1)
    internals(first).break_gallery()  # as after a commit that failed with the disk
    for _ in range(2):
        with pytest.raises(bd.GalleryBusy, match="another process wrote"):
            enroll(first, 2)
    first.close()
    second.close()


def test_two_writers_never_overwrite_or_remove_each_others_segments(tmp_path):
    first = bd.Engine.open(tmp_path / "g", small(seal_rows=100))
    for i in range(3):
        enroll(first, i)
    gallery, writer_lock = internals(first).gallery, internals(first).writer_lock
    tail = gallery.snapshot().parts[-1]
    held = FileLock.is_held

    def overtaken(self) -> bool:  # the second writer comes when the first has checked its lock
        if self is writer_lock and not second:
            steal(tmp_path / "g")
            second.append(bd.Engine.open(tmp_path / "g", small(seal_rows=2)))
            second[0].maintain()
            return True
        return held(self)

    second: list[bd.Engine] = []
    FileLock.is_held = overtaken
    try:
        with pytest.raises(bd.GalleryBusy):
            gallery.write_part(tail, None)
    finally:
        FileLock.is_held = held
    first.close()
    assert second[0].problems() == []
    assert second[0].info()["segments"] == 1
    second[0].close()
    with bd.Engine.open(tmp_path / "g", small()) as again:
        assert len(again) == 3


# counters ----------------------------------------------------------------------------------------------------------


def spoil(folder: Path, **counters: object) -> None:
    """As a writer with stale counters leaves the state."""
    from biodedup.gallery.catalogue.sqlite import SqliteCatalogue

    catalogue = SqliteCatalogue(LocalStorage().connect(folder / "gallery.sqlite3", read_only=False))
    state = vars(catalogue.state()) | counters
    catalogue.begin()
    catalogue.set_state(type(catalogue.state())(**state))
    catalogue.commit()
    catalogue.close()


@pytest.mark.parametrize(
    "counters", [{"row_count": 2}, {"row_count": 99}, {"next_segment": 1}, {"row_count": 0, "version": 0, "commits": 0}]
)
def test_doctor_recomputes_counters_from_the_rows(tmp_path, counters):
    with bd.Engine.open(tmp_path / "g", small(merge_fan=9)) as engine:
        for i in range(6):
            enroll(engine, i)
            if i == 3:
                engine.maintain()
        engine.remove("s1")
    spoil(tmp_path / "g", **counters)
    assert "counter" in str(inspect(LocalStorage(), tmp_path / "g")[0])
    report = jobs.examine(tmp_path / "g", mend=True)
    assert report.problems == ()
    assert "counters" in report.mended[0]
    with bd.Engine.open(tmp_path / "g", small(merge_fan=9)) as engine:
        assert engine.subject_ids() == ["s0", "s2", "s3", "s4", "s5"]
        assert engine.gallery_version >= 7
        assert enroll(engine, 7).outcome == "unique"
        engine.maintain()
        assert engine.problems() == []


def test_doctor_recomputes_counters_that_are_lost(tmp_path):
    with bd.Engine.open(tmp_path / "g", small()) as engine:
        for i in range(3):
            enroll(engine, i)
    with closing(sqlite3.connect(tmp_path / "g" / "gallery.sqlite3")) as database:
        database.execute("DELETE FROM meta WHERE key = 'state'")
        database.commit()
    with pytest.raises(bd.GalleryDamaged):
        bd.Engine.open(tmp_path / "g", small())
    assert jobs.examine(tmp_path / "g", mend=True).problems == ()
    with bd.Engine.open(tmp_path / "g", small()) as engine:
        assert engine.subject_ids() == ["s0", "s1", "s2"]
