"""`kit ingest` and `enroll-batch`, killed anywhere and started again, end with the table of a run without a kill.

The galleries are large enough for calibrations to move with them: a score depends on who was enrolled when it was taken.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.engine.search import BatchedSearch
from biodedup.gallery.files.handles import Connection
from biodedup.gallery.gallery import Gallery
from biodedup.jobs.kits.format.record import Record
from tests.support import ROOT
from tests.support.kits import MONDAY, enrolled, forged, ingested
from tests.support.vectors import again, people
from tests.support.workers import InProcess

pytestmark = pytest.mark.slow

NOW = 1_800_000_000.0
BATCH = 20
CONFIG = bd.Config(batch_size=BATCH, gallery=bd.GalleryConfig(background=False))


class Killed(BaseException):
    """The process ends here, as far as the disk can tell."""


def visits() -> tuple[np.ndarray, list[str]]:
    """60 encounters: 44 people; ten of them again under other names, near the thresholds; then three of the first under their own names,
    and three names with another subject's face."""
    vectors = people(44, seed=5)
    mates = again(vectors[:10], 0.5, seed=2)
    strangers = people(3, seed=99)
    order = np.concatenate([vectors[:40], mates[:6], vectors[40:], mates[6:], again(vectors[:3], 0.9), strangers])
    names = [f"s{i}" for i in range(40)] + [f"m{i}" for i in range(6)] + [f"s{i}" for i in range(40, 44)]
    return order, names + [f"m{i}" for i in range(6, 10)] + [f"s{i}" for i in (0, 1, 2, 10, 11, 12)]


@pytest.fixture
def kill_at(monkeypatch):
    """Makes every connection count its commits, and die at the nth: before it, or right behind it."""

    class Dying(Connection):
        count, nth, behind, dead = 0, 0, False, False

        def execute(self, sql, *values):
            sql = sql.replace(
                "synchronous=FULL", "synchronous=OFF"
            )  # no power is cut: a disk that need not sync is quicker
            Dying.count += sql.startswith("COMMIT")
            here = sql.startswith("COMMIT") and Dying.count == Dying.nth
            if Dying.dead or (here and not Dying.behind):
                Dying.dead = True  # a dead worker answers no request
                raise Killed
            done = super().execute(sql, *values)
            if here:
                Dying.dead = True
                raise Killed
            return done

    monkeypatch.setattr(os, "fsync", lambda handle: None)
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **more: real(*args, **more | {"factory": Dying}))

    def arm(nth: int, behind: bool) -> None:
        Dying.count, Dying.nth, Dying.behind, Dying.dead = 0, nth, behind, False

    arm.connection = Dying
    return arm


def killed_everywhere(kill_at, job, whole: int) -> int:
    """Runs a job with a kill at each commit, and then again. whole: how many commits a run has; returns how many kills there were."""
    for nth in range(1, whole + 1):
        behind = nth % 2 == 0  # behind one commit is before the next
        kill_at(nth, behind)
        with suppress(Killed):
            job(f"{nth}-killed")
            assert nth == whole, "only the last commit has nothing behind it"
        kill_at(0, False)
        job(f"{nth}-killed")
    return whole


def test_kit_ingest_killed_at_any_commit_ends_with_the_same_files(centre, kill_at):
    vectors, names = visits()
    records = [
        Record(bd.Encounter(name, (), {"face": vector}, f"e{i}"), i + 1, None, MONDAY)
        for i, (vector, name) in enumerate(zip(vectors, names, strict=True))
    ]
    a = forged(centre, "A", "a.kit", records[:35])
    b = forged(centre, "B", "b.kit", records[30:])  # five copies

    def job(name: str) -> jobs.IngestResult:
        return ingested(centre, a, b, out=f"{name}.parquet", gallery=f"g {name}", batch_size=BATCH)

    kill_at(0, False)
    whole = job("whole")
    commits = kill_at.connection.count
    assert {"enrolled", "review", "already_taken", "subject_exists"} <= {o.outcome for o in whole.outcomes}
    assert killed_everywhere(kill_at, job, commits) > 10
    for path in centre.glob("*-killed.parquet"):
        for suffix in (".parquet", ".summary.json", ".html"):
            assert path.with_suffix(suffix).read_bytes() == (centre / "whole").with_suffix(suffix).read_bytes(), path
        assert enrolled(centre, f"g {path.stem}") == enrolled(centre, "g whole")


def test_enroll_batch_killed_at_any_commit_ends_with_the_same_table(tmp_path, kill_at):
    vectors, names = visits()
    manifest = tmp_path / "m.parquet"
    columns = {"subject_id": names, "encounter_id": [f"e{i}" for i in range(60)], "face": vectors.tolist()}
    pa.parquet.write_table(pa.table(columns), manifest)

    def job(name: str) -> jobs.BatchResult:
        with (
            bd.Engine.open(tmp_path / f"g {name}", CONFIG, clock=lambda: NOW) as engine,
            jobs.Backlog.open(tmp_path / f"g {name}") as backlog,
        ):
            out = tmp_path / f"{name}.parquet"
            return jobs.enroll_batch(engine, backlog, manifest, out, clock=lambda: NOW, pool=InProcess(CONFIG, 1))

    kill_at(0, False)
    whole = job("whole")
    commits = kill_at.connection.count
    assert all(whole.statuses.values()) or whole.statuses["refused"] == 0
    assert whole.already == 3 and whole.statuses["adjudicate"] >= 3
    assert killed_everywhere(kill_at, job, commits) > 10
    expected = (tmp_path / "whole.parquet").read_bytes()
    for path in tmp_path.glob("*-killed.parquet"):
        assert path.read_bytes() == expected, path


def late(method):
    def slowly(*arguments, **more):
        time.sleep(0.6)
        return method(*arguments, **more)

    return slowly


def test_scores_do_not_depend_on_how_far_the_next_batch_was_searched(tmp_path, monkeypatch):
    """The next batch is not searched before the one before it is committed: whether searches or commits are slow changes no score."""
    vectors, names = visits()
    manifest = tmp_path / "m.parquet"
    columns = {"subject_id": names, "encounter_id": [f"e{i}" for i in range(60)], "face": vectors.tolist()}
    pa.parquet.write_table(pa.table(columns), manifest)
    tables = []
    for name, slow in (("searches", (BatchedSearch, "search")), ("commits", (Gallery, "transaction"))):
        with monkeypatch.context() as patched:
            patched.setattr(*slow, late(getattr(*slow)))
            with (
                bd.Engine.open(tmp_path / name, CONFIG, clock=lambda: NOW) as engine,
                jobs.Backlog.open(tmp_path / name) as backlog,
            ):
                out = tmp_path / f"{name}.parquet"
                jobs.enroll_batch(engine, backlog, manifest, out, clock=lambda: NOW, pool=InProcess(CONFIG, 1))
        tables.append(out.read_bytes())
    assert tables[0] == tables[1]


_CHILD = """
import sys
from pathlib import Path
from tests.support.kits import ingested
import os, signal

def progress(stage, done, total):
    if stage == "enrolling" and done == {count}:
        os.kill(os.getpid(), signal.SIGKILL)

folder = Path({folder!r})
ingested(folder, folder / "a.kit", out="killed.parquet", gallery="killed", batch_size={batch}, progress=progress)
"""


def test_a_kit_ingest_that_was_really_killed_goes_on(centre):
    vectors, names = visits()
    records = [
        Record(bd.Encounter(name, (), {"face": vector}, f"e{i}"), i + 1, None, MONDAY)
        for i, (vector, name) in enumerate(zip(vectors, names, strict=True))
    ]
    a = forged(centre, "A", "a.kit", records)
    ingested(centre, a, out="whole.parquet", gallery="whole", batch_size=BATCH)
    code = _CHILD.format(folder=str(centre), count=45, batch=BATCH)
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert child.returncode == -signal.SIGKILL, child.stderr
    ingested(centre, a, out="killed.parquet", gallery="killed", batch_size=BATCH)
    assert (centre / "killed.parquet").read_bytes() == (centre / "whole.parquet").read_bytes()
