"""Galleries that someone spoilt on purpose: an answer or an error of the tree, and never the end of the process."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import biodedup as bd
from biodedup.gallery.care.verify import inspect
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.testing import internals
from tests.support import ROOT
from tests.support.galleries import PEOPLE, nearest, small
from tests.support.hostile_gallery import Opened, change, name_anew

pytestmark = pytest.mark.slow

RECORDS = 12


def record(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    body = bytearray()
    for _ in range(30):
        x, y = (int(v) for v in rng.integers(20, 380, 2))
        body += bytes([0x40 | x >> 8, x & 255, y >> 8, y & 255, int(rng.integers(256)), 80])
    head = b"FMR\0 20\0" + bytes(2) + (28 + len(body) + 2).to_bytes(2, "big") + bytes(2)
    head += b"".join(n.to_bytes(2, "big") for n in (400, 400, 197, 197)) + bytes([1, 0, 2, 0, 80, 30])
    return head + bytes(body) + bytes(2)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two segments, one of them sparse, faces of most and fingers of some, groups, a case, removals, and rows in the journal."""
    folder = tmp_path_factory.mktemp("hostile")
    config = bd.Config(
        gallery=bd.GalleryConfig(4, 9, False), policy=bd.Policy(duplicate_db=60, review_db=10), batch_size=4
    )
    with bd.Engine.open(folder / "g", config) as engine:
        for i in range(RECORDS):
            templates: dict[str, object] = {} if i % 4 == 1 else {"face": PEOPLE[i]}
            if i % 3 < 2:
                templates["right_index"] = record(i)
            engine.enroll(
                bd.Encounter(f"s{i}", templates=templates, encounter_id=f"e{i}", groups=["north"] if i % 2 else [])
            )
            if i == 4:
                engine.remove("s2")
            if i in (4, 8):
                engine.maintain()
        between = (0.45 * PEOPLE[0] + np.sqrt(1 - 0.45**2) * PEOPLE[20]).astype(np.float32)
        assert engine.enroll(bd.Encounter("y", templates={"face": between}, encounter_id="case")).outcome == "review"
        engine.remove("s6")
        assert engine.info()["segments"] == 2
        assert engine.problems() == []
    np.savez(folder / "probes.npz", face=PEOPLE[3], right_index=np.frombuffer(record(3), np.uint8))
    return folder / "g"


@pytest.fixture
def gallery(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "g")
    return tmp_path / "g"


def fuzz(sound: Path, seed: int, count: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.support.hostile_gallery", str(sound), str(seed), str(count)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_spoilt_gallery_gives_an_answer_or_an_error_of_the_tree(sound):
    done = fuzz(sound, 0, 150)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(done.stdout.split()[-1]) > 50


# one fault each -----------------------------------------------------------------------------------------------------


def spoil(gallery: Path, name: str, change: object) -> None:
    file = Opened(gallery / "segments" / name)
    change(file)
    name_anew(gallery, name, file.save())


def set_array(array: str, at: int, value: float) -> object:
    def changed(file: Opened) -> None:
        values = file.array(array).copy()
        values.reshape(-1)[at] = value
        start = file.table["arrays"][array]["offset"]
        file.body[start : start + values.nbytes] = values.tobytes()

    return changed


def copy_first(array: str) -> object:
    return lambda file: set_array(array, 1, int(file.array(array)[0]))(file)


def about(**facts: object) -> object:
    return lambda file: file.table["about"].update(facts)


def place(array: str, **facts: object) -> object:
    return lambda file: file.table["arrays"][array].update(facts)


SPOILT = {
    "an offset of minus a terabyte": ("1.face", place("high", offset=-(1 << 40))),
    "an offset behind the end": ("1.face", place("norm", offset=1 << 40)),
    "a shape larger than the file": ("1.face", place("high", shape=[1 << 30, 64])),
    "a negative shape": ("1.face", place("norm", shape=[-64])),
    "objects for numbers": ("1.face", place("norm", dtype="|O")),
    "more cells than rows": ("1.face", about(cells=1 << 40)),
    "another dimension": ("1.face", about(dimension=64)),
    "a codec that scans more than there is": ("1.face", lambda f: f.table["about"]["codec"].update(scanned=1 << 20)),
    "positions behind the last row": ("1.face", set_array("position", -1, 10_000)),
    "positions out of order": ("1.face", set_array("position", 0, 3)),
    "rows behind the last": ("1.subject", set_array("row", -1, 1 << 30)),
    "strings that end before they begin": ("1.subject", set_array("subject_id.offset", 2, -(1 << 40))),
    "strings behind the end": ("1.subject", set_array("subject_id.offset", -1, 1 << 40)),
    "a look-up that points outside": ("1.subject.lookup", set_array("position", 0, 1 << 30)),
    "a look-up that names a row twice": ("1.subject.lookup", copy_first("position")),
    "ids that are no text": ("1.subject", set_array("subject_id.bytes", 0, 0xFF)),
    "a vector without length": ("1.face", set_array("norm", 0, 0)),
    "a presence that no row has": ("1.subject", about(presence={"1": 5})),
}


@pytest.mark.parametrize("name", SPOILT)
def test_contents_that_contradict_themselves_are_damage_though_every_checksum_is_right(gallery, name):
    file, change_of = SPOILT[name]
    spoil(gallery, file, change_of)
    problems = inspect(LocalStorage(), gallery)
    assert problems, name
    assert problems[0].segment == 1
    with pytest.raises(bd.GalleryDamaged), bd.Engine.open(gallery, read_only=True) as engine:
        engine.subject_ids()
        engine.search({"face": PEOPLE}, k=3)
        for i in range(RECORDS):
            if f"s{i}" in engine:
                engine.templates(f"s{i}")
        list(engine.join(threshold_db=0.0))
        [part.lookup() for part in internals(engine).gallery.snapshot().parts]


@pytest.mark.parametrize("norm", [np.nan, 0.0, -300.0])
def test_one_vector_without_length_hides_no_other_row_of_a_scan(tmp_path, norm):
    vectors = np.random.default_rng(1).standard_normal((20_000, 64), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1)[:, None]
    with bd.Engine.open(tmp_path / "g", bd.Config(gallery=bd.GalleryConfig(background=False))) as engine:
        engine.add_templates([f"s{i}" for i in range(20_000)], {"face": vectors}, model_id="mine-1")
        engine.compact()
    (path,) = (tmp_path / "g" / "segments").glob("*.face")
    sampled = set(
        (np.linspace(0, 19_999, 256).astype(int) // 64).tolist()
    )  # the statistics of a column read these blocks
    cell = 64 * next(block for block in range(313) if block not in sampled)
    spoil(tmp_path / "g", path.name, set_array("norm", cell, norm))
    with (
        bd.Engine.open(tmp_path / "g", read_only=True) as engine,
        pytest.raises(bd.GalleryDamaged, match="norm of a vector"),
    ):
        engine.search({"face": vectors[:3]}, k=1)


def test_an_answer_that_unpacks_to_gigabytes_is_damage(gallery):
    file = Opened(gallery / "segments" / "1.encounter")
    bomb = zlib.compress(bytes(1 << 28), 9)
    count = len(file.array("answer.offset")) - 1
    spec = file.table["arrays"]["answer.bytes"]
    spec["offset"], spec["shape"] = len(file.body) + -len(file.body) % 64, [len(bomb) * count]
    file.body += bytes(-len(file.body) % 64) + bomb * count
    start = file.table["arrays"]["answer.offset"]["offset"]
    file.body[start : start + 8 * (count + 1)] = (np.arange(count + 1) * len(bomb)).astype("<i8").tobytes()
    name_anew(gallery, "1.encounter", file.save())
    with bd.Engine.open(gallery, read_only=True) as engine, pytest.raises(bd.GalleryDamaged, match="longer than"):
        engine.decision("e0")


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER t AFTER INSERT ON subject BEGIN DELETE FROM cell; END",
        "CREATE VIEW v AS SELECT * FROM cell",
        "CREATE TABLE another (x)",
        "CREATE INDEX i ON subject (subject_id)",
        "ALTER TABLE cell RENAME COLUMN quality TO q",
        "DROP TABLE held",
        "ALTER TABLE meta RENAME TO was; CREATE VIEW meta AS SELECT * FROM was;",
        "ALTER TABLE meta RENAME TO was; "
        "CREATE VIEW meta AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x FROM n) SELECT x, x, x FROM n;",
    ],
)
def test_a_database_with_more_or_other_things_than_ours_is_damage(gallery, statement):
    with closing(sqlite3.connect(gallery / "gallery.sqlite3")) as database:
        database.executescript(statement)
    for read_only in (True, False):
        with pytest.raises(bd.GalleryDamaged):
            bd.Engine.open(gallery, read_only=read_only)
    assert inspect(LocalStorage(), gallery)


def test_the_manifest_leads_to_no_file_outside_the_gallery(gallery, tmp_path):
    (tmp_path / "secret").write_bytes(b"x")
    with closing(sqlite3.connect(gallery / "gallery.sqlite3")) as database:
        (row,) = database.execute("SELECT number, first_row, end_row, files FROM segment WHERE number = 1")
        files = json.loads(row[3]) | {"/../../../secret": "0" * 32}
        change(database, "segment", "number", 1, [*row[:3], json.dumps(files)])
    with pytest.raises(bd.GalleryDamaged, match="missing or unknown files"):
        bd.Engine.open(gallery)


def test_values_of_another_type_than_the_tables_columns_are_damage(gallery):
    with closing(sqlite3.connect(gallery / "gallery.sqlite3")) as database:
        row = list(database.execute("SELECT row, subject_id, encounter_id, group_set FROM subject").fetchone())
        change(database, "subject", "row", row[0], [row[0], b"s9", *row[2:]])
    with pytest.raises(bd.GalleryDamaged, match="table subject"):
        bd.Engine.open(gallery)


CUT = """
import os, sys
import numpy as np
import biodedup as bd
from pathlib import Path
gallery = Path(sys.argv[1])
with bd.Engine.open(gallery, read_only=True) as engine:
    probe = np.load(gallery.parent / "probes.npz")["face"]
    engine.search({"face": probe[None]}, k=3)
    for path in sorted((gallery / "segments").iterdir()):
        os.truncate(path, 100)
    told = []
    for call in (
        lambda: engine.search({"face": probe[None]}, k=3),
        lambda: engine.identify(bd.Encounter(templates={"face": probe})),
        lambda: engine.templates("s0"),
        lambda: engine.subject_ids(),
        lambda: engine.decision("e0"),
        lambda: "s0" in engine,
        lambda: engine.backup(gallery.parent / "copy"),
    ):
        try:
            told.append(f"an answer: {call()}")
        except bd.GalleryDamaged as error:
            told.append("damaged")
    print(told)
"""


def test_a_file_that_is_cut_short_under_a_reader_is_damage_and_not_its_end(gallery, sound):
    shutil.copy(sound.parent / "probes.npz", gallery.parent)
    done = subprocess.run([sys.executable, "-c", CUT, str(gallery)], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stdout.strip() == str(["damaged"] * 7)
    assert inspect(LocalStorage(), gallery)


def test_a_sound_gallery_of_this_kind_answers(gallery):
    with bd.Engine.open(gallery, small(), read_only=True) as engine:
        assert nearest(engine, 3) == "s3"
        assert engine.decision("e3") is not None
    assert inspect(LocalStorage(), gallery) == []


def within(seconds: float, work: Callable[[], object]) -> str:
    """The name of the error that work raises, "" where it raises none."""
    told: list[str] = []

    def done() -> None:
        try:
            work()
        except bd.BiodedupError as error:
            told.append(type(error).__name__)
        else:
            told.append("")

    thread = threading.Thread(target=done, daemon=True)  # it must not outlive a test that fails
    thread.start()
    thread.join(seconds)
    return told[0] if told else "it waits for ever"


@pytest.mark.parametrize(
    "name", ["gallery.sqlite3", "gallery.sqlite3-journal", "gallery.sqlite3-wal", "writer.lock", "segments/1.subject"]
)
@pytest.mark.parametrize("read_only", [False, True])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(gallery, name, read_only):
    (gallery / name).unlink(missing_ok=True)
    os.mkfifo(gallery / name)
    told = within(20, lambda: bd.Engine.open(gallery, read_only=read_only).close())
    wanted = "GalleryDamaged" if name.startswith("segments") else "NotAGallery"
    assert told == ("" if read_only and name == "writer.lock" else wanted)


def test_a_backup_writes_over_a_pipe_and_does_not_wait(gallery, tmp_path):
    (tmp_path / "b" / "segments").mkdir(parents=True)
    os.mkfifo(tmp_path / "b" / "segments" / "1.subject")
    with bd.Engine.open(gallery, read_only=True) as engine:
        assert within(20, lambda: engine.backup(tmp_path / "b")) == ""
    with bd.Engine.open(tmp_path / "b", read_only=True) as copy:
        assert copy.problems() == []
