"""What an engine gives back and tells: files at close, memory that ran out, clocks that were set back, ids that look alike."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.gallery.care.lookalikes import key_of
from biodedup.gallery.catalogue.sqlite import SqliteCatalogue
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.transaction import Transaction
from biodedup.testing import internals
from biodedup.texts import KnownId
from tests.support.vectors import again, people

FACES = people(400)
CONFIG = bd.Config(gallery=bd.GalleryConfig(seal_rows=100, background=False))
OPEN_FILES, MAPS = Path("/proc/self/fd"), Path("/proc/self/maps")


def held(folder: Path) -> list[str]:
    """Files below a folder that this process has open or mapped."""
    targets = []
    for name in OPEN_FILES.iterdir():
        try:
            targets.append(os.readlink(name))
        except OSError:
            pass  # closed meanwhile
    targets += [line.split()[-1] for line in MAPS.read_text().splitlines()]
    return sorted({target for target in targets if target.startswith(str(folder))})


def filled(folder: Path) -> bd.Engine:
    engine = bd.Engine.open(folder, CONFIG)
    engine.add_templates([f"s{i}" for i in range(350)], {"face": FACES[:350]})
    engine.enroll(bd.Encounter("x", templates={"face": FACES[380]}, encounter_id="e1"))
    engine.compact()
    return engine


@pytest.mark.slow
@pytest.mark.skipif(not MAPS.exists(), reason="needs /proc")
def test_close_releases_every_file_at_once(tmp_path):
    engine = filled(tmp_path / "g")
    engine.search({"face": FACES[:3]}, k=3)
    engine.identify(bd.Encounter(templates={"face": FACES[5]}))
    assert engine.decision("e1").outcome == "unique"
    assert engine.templates("s1") and engine.info() and engine.find_duplicates() == []
    joining = engine.join()
    next(joining)
    snapshot = internals(engine).gallery.snapshot()
    assert len(held(tmp_path)) > 5
    engine.close()
    assert held(tmp_path) == []
    with pytest.raises(bd.EngineClosed):
        next(joining)
    with pytest.raises(bd.EngineClosed):
        snapshot.templates(0)
    engine.close()
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        assert engine.problems() == []
    with bd.Engine.open(tmp_path / "g", CONFIG, read_only=True) as reader:
        reader.refresh()
        assert reader.search({"face": FACES[:1]}, k=1).ids[0, 0] == "s0"
    assert held(tmp_path) == []


@pytest.mark.slow
def test_searches_that_are_under_way_at_close_say_so(tmp_path):
    engine = filled(tmp_path / "g")
    ended: list[BaseException] = []
    begun = threading.Barrier(3)

    def search() -> None:
        try:
            begun.wait()
            while True:
                engine.identify(bd.Encounter(templates={"face": FACES[5]}))
                engine.templates("s5")
        except BaseException as error:
            ended.append(error)

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    begun.wait()
    engine.close()
    for thread in threads:
        thread.join()
    assert [type(error) for error in ended] == [bd.EngineClosed] * 2
    del ended[:]
    assert held(tmp_path) == []


# memory -------------------------------------------------------------------------------------------------------------


class OutAt:
    """A profiler that raises MemoryError at the nth call of a function of the library, as an allocation would."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, frame, event, arg) -> None:
        code = frame.f_code
        inside = f"{os.sep}biodedup{os.sep}" in code.co_filename and not code.co_filename.endswith(
            ("memory.py", "texts.py")
        )
        if event == "call" and inside and not code.co_flags & inspect.CO_GENERATOR:  # one that is closed cannot raise
            self.left -= 1
            if self.left == 0:
                raise MemoryError


@pytest.mark.slow
def test_a_lack_of_memory_anywhere_acknowledges_nothing_and_leaves_the_engine_usable(tmp_path):
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        engine.add_templates([f"s{i}" for i in range(20)], {"face": FACES[:20]})
        engine.enroll(bd.Encounter("first", templates={"face": FACES[20]}))
        n, failures = 1, 0
        for i in range(21, 400):
            encounter = bd.Encounter(f"p{i}", templates={"face": FACES[i]}, encounter_id=f"e{i}")
            out = OutAt(n)
            sys.setprofile(out)
            try:
                engine.enroll(encounter)
            except bd.OutOfMemory:
                failures += 1
            finally:
                sys.setprofile(None)
            if out.left > 0:
                break
            assert engine.enroll(encounter).outcome == "unique"
            assert f"p{i}" in engine
            n += 7
        assert out.left > 0 and failures > 20
        assert engine.problems() == []
        size = len(engine)
    with bd.Engine.open(tmp_path / "g", CONFIG, read_only=True) as engine:
        assert len(engine) == size
        assert engine.problems() == []


def test_nothing_that_may_fail_is_called_between_a_commit_and_its_adoption(tmp_path, monkeypatch):
    committed, commit = [], SqliteCatalogue.commit
    changed = Transaction.changed.fget

    def failing(self):
        if committed:
            raise MemoryError
        return changed(self)

    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        monkeypatch.setattr(SqliteCatalogue, "commit", lambda self: (commit(self), committed.append(1)))
        monkeypatch.setattr(Transaction, "changed", property(failing))
        assert engine.enroll(bd.Encounter("a", templates={"face": FACES[0]})).outcome == "unique"
        committed.clear()
        assert engine.enroll(bd.Encounter("b", templates={"face": FACES[1]})).outcome == "unique"


class Meagre(LocalStorage):
    """A disk whose nth call finds no memory."""

    def __init__(self) -> None:
        self.left = 0

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise MemoryError

    def create(self, path):
        self._count()
        return super().create(path)

    def map(self, path):
        self._count()
        return super().map(path)

    def replace(self, source, target):
        self._count()
        super().replace(source, target)


@pytest.mark.slow
def test_a_lack_of_memory_while_sealing_loses_nothing(tmp_path):
    storage = Meagre()
    with bd.Engine.open(tmp_path / "g", CONFIG, storage=storage) as engine:
        engine.add_templates([f"s{i}" for i in range(60)], {"face": FACES[:60]})
        for n in range(1, 100):
            storage.left = n
            try:
                engine.compact()
            except bd.OutOfMemory:
                pass
            done, storage.left = storage.left > 0, 0
            assert len(engine) == 60 + n - 1
            engine.add_templates([f"t{n}"], {"face": FACES[60 + n][None]})
            assert engine.search({"face": FACES[:1]}, k=1).ids[0, 0] == "s0"
            if done:
                break
        assert done and n > 5
        assert engine.problems() == []


# clocks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("now", [float("nan"), float("inf"), -float("inf"), None])
def test_a_clock_that_gives_no_time_is_refused_and_nothing_is_stored(tmp_path, now):
    at = [1_000_000.0]
    with bd.Engine.open(tmp_path / "g", CONFIG, clock=lambda: at[0]) as engine:
        at[0] = now
        sent = bd.Encounter("s0", templates={"face": FACES[0]}, encounter_id="e0")
        with pytest.raises(bd.InvalidInput, match="the clock returned"):
            engine.enroll(sent)
        with pytest.raises(bd.InvalidInput, match="the clock returned"):
            engine.set_policy(bd.Policy(duplicate_db=90.0), by="me", reason="a test")
        assert len(engine) == 0 and engine.decision("e0") is None
        at[0] = 1_000_001.0
        assert engine.enroll(sent).outcome == "unique"


@pytest.mark.slow
def test_a_clock_that_goes_backwards_is_noted_and_decisions_go_on(tmp_path, caplog):
    at = [1_000_000.0]
    notes = []

    def sent(i: int) -> bd.Encounter:
        return bd.Encounter(f"s{i}", templates={"face": FACES[i]}, encounter_id=f"e{i}")

    with caplog.at_level(logging.WARNING, logger="biodedup"):
        with bd.Engine.open(tmp_path / "g", CONFIG, clock=lambda: at[0]) as engine:
            engine.enroll(sent(0))
            assert not caplog.records and engine.notes(at[0]) == []
            at[0] -= 3600
            decision = engine.enroll(sent(1))
            assert (decision.outcome, decision.decided_at) == ("unique", at[0])
            engine.enroll(sent(2))
            assert [record.name for record in caplog.records] == ["biodedup.gallery"]
            assert "3600 s behind the newest decision" in caplog.text
            notes = engine.notes(at[0])
            engine.compact()
        assert "2 of the newest 3 decisions have an earlier date than a previous decision, by up to 3,600 s" in notes[0]
        assert "3,600 s ahead of this machine's clock" in notes[1]
        caplog.clear()
        with bd.Engine.open(tmp_path / "g", CONFIG, clock=lambda: at[0]) as engine:
            assert engine.enroll(sent(3)).outcome == "unique"
        assert len(caplog.records) == 1
        caplog.clear()
        at[0] += 7200
        with bd.Engine.open(tmp_path / "g", CONFIG, clock=lambda: at[0]) as engine:
            engine.enroll(sent(4))
        assert not caplog.records
    report = jobs.examine(tmp_path / "g", clock=lambda: at[0])
    assert report.problems == () and any("the clock was set back" in note for note in report.notes)


# look-alikes --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ids_that_look_alike_are_reported_and_others_are_not(tmp_path):
    alike = [
        ("JOSE-1", "Jose 1", "jose1"),
        ("\uff21-7", "a7"),
        ("straße", "STRASSE"),
        ("ﬁ 3", "FI3"),
        ("José", "Jose\u0301"),
    ]
    alone = ["0012", "012", "12", "O1", "01", "l1", "11", "José2", "Jose2"]
    ids = [KnownId(name) for group in alike for name in group] + [KnownId(name) for name in alone]
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        engine.add_templates(ids, {"face": FACES[: len(ids)]})
        engine.add_templates(["Removed", "removed"], {"face": FACES[50:52]})
        engine.remove("removed")
        found = [note for note in engine.notes(0.0) if "look alike" in note]
        assert found == [f"subject ids that look alike: {', '.join(map(repr, group))}" for group in alike]
        engine.compact()
        assert [note for note in engine.notes(0.0) if "look alike" in note] == found
    report = jobs.examine(tmp_path / "g")
    assert report.problems == () and list(report.notes) == found


def test_of_many_look_alikes_some_are_named_and_all_counted(tmp_path):
    with bd.Engine.open(tmp_path / "g", replace(CONFIG, gallery=bd.GalleryConfig(background=False))) as engine:
        ids = [f"{prefix}{i}" for i in range(100) for prefix in ("s", "S", "x-")]
        engine.add_templates(ids, {"face": FACES[:300]})
        notes = engine.notes(0.0)
    assert len(notes) == 21 and notes[0].endswith("'s0', 'S0'") and notes[-1].startswith("... and 80 more groups")


def test_one_subject_is_not_its_own_look_alike(engine):
    engine.add_templates(["Anna"], {"face": FACES[:1]})
    engine.update(bd.Encounter("Anna", templates={"face": again(FACES[:1], 0.999)[0]}))
    assert [note for note in engine.notes(0.0) if "look alike" in note] == []
    assert key_of("Anna\u2010\u00a0Maria") == "annamaria"
    assert np.isfinite(FACES).all()
