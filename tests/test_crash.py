"""Faults: fail the nth call to the disk, kill the writer, and look at what is there afterwards."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import again, people

import biodedup as bd
from biodedup.gallery.health import inspect
from biodedup.gallery.storage import LocalStorage

SUBJECTS = people(8)


class Countdown:
    """Raises at the nth call. after: do what was asked first, and fail then, as a lost acknowledgement does."""

    def __init__(self, n: int, *, after: bool = False) -> None:
        self.left = n
        self.after = after

    def call(self, action: Callable[[], object]) -> object:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise sqlite3.OperationalError("disk I/O error")
        result = action()
        if self.left == 0:
            raise sqlite3.OperationalError("disk I/O error")
        return result


class FailingConnection:
    """A connection whose statements count down."""

    def __init__(self, connection: sqlite3.Connection, countdown: Countdown) -> None:
        self._connection = connection
        self._countdown = countdown

    def execute(self, *args: object) -> object:
        return self._countdown.call(lambda: self._connection.execute(*args))

    def executemany(self, *args: object) -> object:
        return self._countdown.call(lambda: self._connection.executemany(*args))

    def __getattr__(self, name: str) -> object:
        return getattr(self._connection, name)


class FailingStorage(LocalStorage):
    """Every call to the disk counts down."""

    def __init__(self, countdown: Countdown) -> None:
        self._countdown = countdown

    def list_names(self, folder):
        return self._countdown.call(lambda: LocalStorage.list_names(self, folder))

    def make_folder(self, folder):
        return self._countdown.call(lambda: LocalStorage.make_folder(self, folder))

    def replace(self, source, target):
        return self._countdown.call(lambda: LocalStorage.replace(self, source, target))

    def remove(self, path):
        return self._countdown.call(lambda: LocalStorage.remove(self, path))

    def connect(self, path, *, read_only):
        return FailingConnection(super().connect(path, read_only=read_only), self._countdown)


def state(folder: Path) -> tuple[list[str], bool]:
    with bd.Engine.open(folder) as engine:
        assert engine.problems() == []
        ids, _ = engine.search({"face": SUBJECTS}, k=1)
        listed = engine.subject_ids()
        assert set(ids[:, 0]) - {""} <= set(listed)
        return listed, engine.decision("e") is not None


def prepare(folder: Path) -> None:
    with bd.Engine.open(folder) as engine:
        engine.add_templates(["s0", "s1"], {"face": SUBJECTS[:2]})


OPERATIONS = {
    "enroll": lambda e: e.enroll(bd.Encounter("s2", templates={"face": SUBJECTS[2]}, encounter_id="e")),
    "enroll_many": lambda e: list(
        e.enroll_many([bd.Encounter(f"s{i}", templates={"face": SUBJECTS[i]}, encounter_id=f"e{i}") for i in (2, 3, 4)])
    ),
    "remove": lambda e: e.remove("s1"),
    "add_templates": lambda e: e.add_templates(["s5", "s6"], {"face": SUBJECTS[5:7]}),
}


@pytest.mark.parametrize("after", [False, True], ids=["refused", "acknowledgement lost"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_after_any_single_fault_the_state_is_that_before_or_after(tmp_path, name, after):
    prepare(tmp_path / "model")
    before = state(tmp_path / "model")
    with bd.Engine.open(tmp_path / "model") as engine:
        OPERATIONS[name](engine)
    done = state(tmp_path / "model")
    assert before != done
    n, failures = 0, 0
    while True:
        n += 1
        folder = tmp_path / f"g{n}"
        prepare(folder)
        countdown = Countdown(n, after=after)
        acknowledged = False
        try:
            with bd.Engine.open(folder, storage=FailingStorage(countdown)) as engine:
                try:
                    OPERATIONS[name](engine)
                    acknowledged = True
                except bd.StorageUnavailable:
                    failures += 1
                    listed = engine.subject_ids()  # memory agrees with the disk after the fault, too
                    assert listed in (before[0], done[0])
        except bd.StorageUnavailable:
            failures += 1
        found = state(folder)
        assert found in (before, done), f"fault {n}"
        if acknowledged:
            assert found == done, f"fault {n} lost an acknowledged write"
        if countdown.left > 0:
            break
    assert failures >= 5


@pytest.mark.parametrize("after", [False, True], ids=["refused", "acknowledgement lost"])
def test_after_any_single_fault_while_creating_the_gallery_opens_again(tmp_path, after):
    n = 0
    while True:
        n += 1
        countdown = Countdown(n, after=after)
        try:
            bd.Engine.open(tmp_path / f"g{n}", storage=FailingStorage(countdown)).close()
        except bd.StorageUnavailable:
            pass
        if countdown.left > 0:
            break
        with bd.Engine.open(tmp_path / f"g{n}") as engine:
            assert len(engine) == 0
    assert n > 5


def test_an_engine_goes_on_after_a_fault_anywhere_in_a_write(tmp_path):
    n, faults = 0, 0
    while True:
        n += 1
        countdown = Countdown(10**9)
        with bd.Engine.open(tmp_path / f"g{n}", storage=FailingStorage(countdown)) as engine:
            engine.enroll(bd.Encounter("s0", templates={"face": SUBJECTS[0]}))
            countdown.left = n
            try:
                engine.enroll(bd.Encounter("s1", templates={"face": SUBJECTS[1]}))
                passed = countdown.left > 0
            except bd.StorageUnavailable:
                faults, passed = faults + 1, False
            countdown.left = 10**9
            if "s1" not in engine:
                assert engine.enroll(bd.Encounter("s1", templates={"face": SUBJECTS[1]})).outcome == "unique"
            engine.enroll(bd.Encounter("s2", templates={"face": SUBJECTS[2]}))
            for i in range(3):
                again_i = bd.Encounter(templates={"face": again(SUBJECTS[i], 0.9)})
                assert engine.identify(again_i).candidates[0].subject_id == f"s{i}"
            assert len(engine) == 3
        assert state(tmp_path / f"g{n}")[0] == ["s0", "s1", "s2"]
        if passed:
            break
    assert faults >= 5


WRITER = """
import sys
import numpy as np
import biodedup as bd
vectors = np.load(sys.argv[2])
with bd.Engine.open(sys.argv[1]) as engine:
    print("ready", flush=True)
    for i, vector in enumerate(vectors):
        if f"s{i}" in engine:
            continue
        decision = engine.enroll(bd.Encounter(f"s{i}", templates={"face": vector}, encounter_id=f"e{i}"))
        print(i, decision.outcome, flush=True)
"""


def test_a_killed_writer_loses_nothing_that_it_acknowledged(tmp_path):
    np.save(tmp_path / "v.npy", people(3000, seed=11))
    acknowledged: set[int] = set()
    for kill in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "g"), str(tmp_path / "v.npy")],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1 + 0.07 * kill)
        process.send_signal(signal.SIGKILL)
        told = process.stdout.read()
        process.stdout.close()
        process.wait()
        acknowledged |= {int(line.split()[0]) for line in told.splitlines(keepends=True) if line.endswith("unique\n")}
        with bd.Engine.open(tmp_path / "g") as engine:
            assert {f"s{i}" for i in acknowledged} <= set(engine.subject_ids())
            assert engine.problems() == []
    assert len(acknowledged) > 20


def test_flipped_bytes_raise_from_the_error_tree_or_nothing(tmp_path):
    prepare(tmp_path / "g")
    database = tmp_path / "g" / "gallery.sqlite3"
    sound = database.read_bytes()
    rng = np.random.default_rng(0)
    raised = 0
    places = [*range(100), *rng.integers(len(sound), size=60).tolist()]  # all of SQLite's header, and anywhere
    for place in places:
        damaged = bytearray(sound)
        damaged[place] ^= 1 << int(rng.integers(8))
        database.write_bytes(damaged)
        try:
            with bd.Engine.open(tmp_path / "g", read_only=True) as engine:
                engine.search({"face": SUBJECTS}, k=2)
                engine.problems()
        except bd.BiodedupError:
            raised += 1
    assert raised > 10


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE meta SET key = 'gallery_ie' WHERE key = 'gallery_id'",
        "UPDATE meta SET value = '{' WHERE key = 'config'",
        "UPDATE meta SET value = 'x' WHERE key = 'state'",
        "UPDATE model SET column_index = 77",
        "UPDATE model SET dimension = 99",
        "DELETE FROM subject",
        "DROP TABLE cell",
    ],
)
def test_tables_that_contradict_themselves_are_damage_and_not_worth_a_retry(tmp_path, damage):
    prepare(tmp_path / "g")
    connection = sqlite3.connect(tmp_path / "g" / "gallery.sqlite3")
    connection.execute(damage)
    connection.commit()
    connection.close()
    with pytest.raises(bd.GalleryDamaged):
        bd.Engine.open(tmp_path / "g")


def test_an_emptied_database_is_a_lost_gallery_and_not_a_new_one(tmp_path):
    prepare(tmp_path / "g")
    (tmp_path / "g" / "gallery.sqlite3").write_bytes(b"")
    for read_only in (True, False):
        with pytest.raises(bd.GalleryDamaged, match="lost"):
            bd.Engine.open(tmp_path / "g", read_only=read_only)


def test_doctor_names_what_the_tables_contradict(tmp_path):
    prepare(tmp_path / "g")
    connection = sqlite3.connect(tmp_path / "g" / "gallery.sqlite3")
    connection.execute("DELETE FROM cell WHERE key < 32")
    connection.commit()
    connection.close()
    assert [str(problem) for problem in inspect(LocalStorage(), tmp_path / "g")] == [
        "database, journal: 1 enrolled subjects of the journal have no template"
    ]
    with pytest.raises(bd.GalleryDamaged, match="lacks templates"):
        bd.Engine.open(tmp_path / "g")
