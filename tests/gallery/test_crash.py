"""Faults: fail the nth call to the disk, kill the writer, and look at what is there afterwards."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.gallery.care.verify import inspect
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.testing import internals
from tests.support import GOLDEN
from tests.support.faults import Countdown, FailingConnection, FailingStorage
from tests.support.vectors import again, people

pytestmark = pytest.mark.slow

SUBJECTS = people(20)
SMALL = bd.Config(gallery=bd.GalleryConfig(seal_rows=4, merge_fan=2, background=False))
"""A gallery so small that a handful of rows is sealed and merged, and only when the test asks for it."""


def state(folder: Path, config: bd.Config = SMALL) -> tuple[object, ...]:
    """All that a caller can see of a gallery."""
    with bd.Engine.open(folder, config) as engine:
        assert engine.problems() == []
        ids, similarity = engine.search({"face": SUBJECTS}, k=1)
        listed = engine.subject_ids()
        assert set(ids[:, 0]) - {""} <= set(listed)
        assert len(engine) == len(listed) == len(set(listed))
        kept = [i for i in listed if i.startswith("s")]
        grouped = set(engine.search({"face": SUBJECTS[:1]}, k=20, groups=["north"]).ids[0]) - {""}
        found = tuple((str(i), round(float(s), 2)) for i, s in zip(ids[:, 0], similarity[:, 0], strict=True) if s > 0.9)
        return tuple(kept), found, engine.decision("e"), frozenset(grouped)


def prepare(folder: Path) -> None:
    """Two segments, one removed row, and two rows in the journal."""
    with bd.Engine.open(folder, SMALL) as engine:
        for low in (0, 4):
            names = [f"s{i}" for i in range(low, low + 4)]
            engine.add_templates(names, {"face": SUBJECTS[low : low + 4]}, groups=[["north"]] * 4)
        engine.remove("s2")
        for i in (8, 9):
            encounter = bd.Encounter(f"s{i}", templates={"face": SUBJECTS[i]}, encounter_id=f"e{i}", groups=["north"])
            engine.enroll(encounter)


def encounter(i: int, encounter_id: str, vector: int | None = None) -> bd.Encounter:
    return bd.Encounter(
        f"s{i}", templates={"face": SUBJECTS[i if vector is None else vector]}, encounter_id=encounter_id
    )


def load(engine: bd.Engine) -> None:
    """Six rows, one of them enrolled with other templates; they are sealed at once, behind the journal."""
    table = pa.table({"subject_id": [f"s{i}" for i in (0, 10, 11, 12, 13, 14)], "face": SUBJECTS[10:16].tolist()})
    jobs.load(engine, table.to_batches())


OPERATIONS = {
    "enroll": lambda e: e.enroll(encounter(10, "e")),
    "enroll_many": lambda e: list(e.enroll_many([encounter(i, f"e{i}") for i in (10, 11, 12)])),
    "update": lambda e: e.update(encounter(5, "e", vector=15)),
    "remove from a segment": lambda e: e.remove("s1"),
    "remove from the journal": lambda e: e.remove("s9"),
    "add_templates": lambda e: e.add_templates(
        ["s10", "s11"], {"face": SUBJECTS[10:12]}, groups=[["south"], ["north"]]
    ),
    "load": load,
}
CARE = {
    "seal": lambda e: e.maintain(),
    "merge": lambda e: e.compact(),
    "backup": lambda e: e.backup(internals(e).gallery.folder.parent / f"{internals(e).gallery.folder.name}-backup"),
}


def faults(tmp_path: Path, operation: Callable[[bd.Engine], object], after: bool) -> Iterator[tuple[Path, bool, int]]:
    """Runs an operation again and again on an open gallery, failing its nth call to the disk, until none fails: (folder,
    acknowledged, n)."""
    n = 0
    prepare(tmp_path / "before")
    while True:
        n += 1
        folder = tmp_path / f"g{n}"
        shutil.copytree(tmp_path / "before", folder)
        countdown = Countdown(10**9, after=after)
        acknowledged = False
        try:
            with bd.Engine.open(folder, SMALL, storage=FailingStorage(countdown)) as engine:
                countdown.left = n
                try:
                    operation(engine)
                    acknowledged = True
                except bd.StorageUnavailable:
                    engine.subject_ids()
        except bd.StorageUnavailable:
            pass
        yield folder, acknowledged, n
        if countdown.left > 0:
            return


@pytest.mark.parametrize("after", [False, True], ids=["refused", "acknowledgement lost"])
@pytest.mark.usefixtures("at_rest")
def test_any_single_fault_while_a_gallery_is_opened_and_closed_changes_nothing(tmp_path, after):
    prepare(tmp_path / "before")
    before = state(tmp_path / "before")
    for n in itertools.count(1):
        shutil.copytree(tmp_path / "before", tmp_path / f"g{n}")
        countdown = Countdown(n, after=after)
        try:
            bd.Engine.open(tmp_path / f"g{n}", SMALL, storage=FailingStorage(countdown)).close()
        except bd.StorageUnavailable:
            pass
        assert state(tmp_path / f"g{n}") == before, f"fault {n}"
        if countdown.left > 0:
            break
    assert n > 2


@pytest.mark.parametrize("after", [False, True], ids=["refused", "acknowledgement lost"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_after_any_single_fault_the_state_is_that_before_or_after(tmp_path, name, after):
    prepare(tmp_path / "model")
    before = state(tmp_path / "model")
    with bd.Engine.open(tmp_path / "model", SMALL) as engine:
        OPERATIONS[name](engine)
    done = state(tmp_path / "model")
    assert before != done
    lost, kept = 0, 0
    for folder, acknowledged, n in faults(tmp_path, OPERATIONS[name], after):
        found = without_time(state(folder))
        assert found in (without_time(before), without_time(done)), f"fault {n}"
        if acknowledged:
            assert found == without_time(done), f"fault {n} lost an acknowledged write"
        lost, kept = lost + (not acknowledged), kept + acknowledged
    assert lost >= 5
    assert kept >= 1


@pytest.mark.parametrize(
    ("name", "after", "at_rest"),
    [(name, after, "in the clear") for name in CARE for after in (False, True)]
    + [("merge", False, "encrypted"), ("backup", True, "encrypted")],
    ids=lambda value: ("refused", "acknowledgement lost")[value] if isinstance(value, bool) else value,
    indirect=["at_rest"],
)
def test_no_single_fault_while_sealing_merging_or_copying_changes_what_is_stored(tmp_path, name, after, at_rest):
    prepare(tmp_path / "model")
    before = state(tmp_path / "model")
    failed = 0
    for folder, acknowledged, n in faults(tmp_path, CARE[name], after):
        assert state(folder) == before or without_time(state(folder)) == without_time(before), f"fault {n}"
        failed += not acknowledged
        copy = folder.parent / f"{folder.name}-backup"
        if name == "backup" and acknowledged:
            assert without_time(state(copy)) == without_time(before)
    assert failed >= 10


def without_time(state: tuple[object, ...]) -> tuple[object, ...]:
    ids, found, decision, grouped = state
    return ids, found, decision and replace(decision, decided_at=0.0), grouped


@pytest.mark.parametrize("after", [False, True], ids=["refused", "acknowledgement lost"])
def test_memory_agrees_with_the_disk_after_a_fault(tmp_path, after):
    prepare(tmp_path / "model")
    before = state(tmp_path / "model")[0]
    for n in itertools.count(1, 3):
        shutil.copytree(tmp_path / "model", tmp_path / f"g{n}")
        countdown = Countdown(10**9, after=after)
        with bd.Engine.open(tmp_path / f"g{n}", SMALL, storage=FailingStorage(countdown)) as engine:
            countdown.left = n
            try:
                load(engine)
                passed = countdown.left > 0
            except bd.StorageUnavailable:
                passed = False
            countdown.left = 10**9
            listed = tuple(engine.subject_ids())
        assert state(tmp_path / f"g{n}")[0] == listed
        assert listed == before or len(listed) == len(before) + 5
        if passed:
            break
    assert n > 100


@pytest.mark.parametrize(
    ("after", "at_rest"),
    [(False, "in the clear"), (True, "in the clear"), (False, "encrypted")],
    ids=["refused", "acknowledgement lost", "encrypted, refused"],
    indirect=["at_rest"],
)
def test_after_any_single_fault_while_creating_the_gallery_opens_again(tmp_path, after, at_rest):
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


@pytest.mark.parametrize("after", [False, True], ids=["refused", "acknowledgement lost"])
def test_after_any_single_fault_while_upgrading_the_gallery_is_of_one_format_or_the_other(tmp_path, after):
    for n in itertools.count(1):
        shutil.copytree(GOLDEN / "format-1", tmp_path / f"g{n}")
        countdown = Countdown(n, after=after)
        try:
            bd.Engine.open(tmp_path / f"g{n}", storage=FailingStorage(countdown)).close()
        except bd.StorageUnavailable:
            pass
        with bd.Engine.open(tmp_path / f"g{n}") as engine:
            assert engine.subject_ids() == ["anna", "bella", "dora", "emil"]
        if countdown.left > 0:
            break
    assert n > 20


class OrderedStorage(LocalStorage):
    """Notes what a loss of power would take: names and bytes that were not synced when a commit became durable."""

    def __init__(self) -> None:
        super().__init__()
        self.unsynced: set[str] = set()
        self.at_commits: list[set[str]] = []
        self.created = 0

    def create(self, path):
        self.created += 1
        self.unsynced.add(path.name)
        file = super().create(path)
        finish = file.finish

        def finished() -> None:
            finish()
            self.unsynced.remove(path.name)

        file.finish = finished
        return file

    def replace(self, source, target):
        assert source.name not in self.unsynced, f"{source.name} gets its name before it is synced"
        super().replace(source, target)
        self.unsynced.add(target.name)

    def claim(self, source, target):
        assert source.name not in self.unsynced, f"{source.name} gets its name before it is synced"
        super().claim(source, target)
        self.unsynced.add(target.name)

    def sync_folder(self, folder):
        super().sync_folder(folder)
        self.unsynced -= {path.name for path in folder.iterdir()}

    def remove(self, path):
        super().remove(path)
        self.unsynced.discard(path.name)

    def connect(self, path, *, read_only):
        storage, connection = self, super().connect(path, read_only=read_only)

        class Connection(FailingConnection):
            def execute(self, statement: str, *args: object) -> object:
                if statement == "COMMIT":
                    storage.at_commits.append(set(storage.unsynced))
                return super().execute(statement, *args)

        return Connection(connection, Countdown(10**9))


@pytest.mark.usefixtures("at_rest")
def test_every_file_is_synced_before_the_commit_that_names_it(tmp_path):
    storage = OrderedStorage()
    with bd.Engine.open(tmp_path / "g", SMALL, storage=storage) as engine:
        for i in range(10):
            engine.enroll(encounter(i, f"e{i}"))
        for name in ("update", "remove from a segment", "add_templates", "load"):
            OPERATIONS[name](engine)
            engine.maintain()
        for operation in CARE.values():
            operation(engine)
    assert storage.created >= 20
    assert len(storage.at_commits) > 10
    assert set().union(*storage.at_commits) == set()


@pytest.mark.usefixtures("at_rest")
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
        assert state(tmp_path / f"g{n}")[0] == ("s0", "s1", "s2")
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
        decision = engine.enroll(bd.Encounter(f"s{i}", templates={"face": vector}, encounter_id=f"e{i}", model_id="sface-2021dec-mirror-centred-1"))
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
        told = "".join(process.stdout.readline() for _ in range(8))  # it is at work, however busy the machine is
        time.sleep(0.02 + 0.03 * kill)
        process.send_signal(signal.SIGKILL)
        told += process.stdout.read()
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
    connection.execute("DELETE FROM cell WHERE key / 32 = 8")
    connection.commit()
    connection.close()
    assert [str(problem) for problem in inspect(LocalStorage(), tmp_path / "g")] == [
        "database, journal: 1 enrolled subjects of the journal have no template"
    ]
    with pytest.raises(bd.GalleryDamaged, match="lacks templates"):
        bd.Engine.open(tmp_path / "g")
