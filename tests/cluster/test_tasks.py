"""Jobs whose pieces are done by a real Ray cluster: the files are those of one machine, whatever dies meanwhile."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.capture.minutiae.record import MinutiaeRecord, write_record
from biodedup.config import IsolationConfig
from biodedup.embed.cards import joint_id, load_card
from biodedup.engine import joining
from biodedup.jobs.merging import ids
from biodedup.jobs.shared.workers import Workers
from tests.support.shell import run
from tests.support.vectors import again, people
from tests.support.workers import told

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning"),
]

CONFIG = bd.Config(threads=1, gallery=bd.GalleryConfig(seal_rows=200, background=False))
NOW = 1_800_000_000.0
DB = 60.0


@pytest.fixture(scope="module")
def on_ray(cluster):
    with jobs.ray_executor(cluster.address) as executor:
        yield executor


@pytest.fixture(scope="module")
def gallery(tmp_path_factory) -> Path:
    """500 people, 30 of them twice, most of them sealed."""
    vectors = people(500, seed=3)
    vectors = np.concatenate([vectors, again(vectors[:30], 0.8)])
    return filled(tmp_path_factory.mktemp("tiles") / "g", vectors, "s")


def filled(folder: Path, vectors: np.ndarray, letter: str) -> Path:
    with bd.Engine.open(folder, CONFIG) as engine:
        for low in range(0, len(vectors), 250):
            some = vectors[low : low + 250]
            engine.add_templates([f"{letter}{low + i}" for i in range(len(some))], {"face": some})
            engine.maintain()
    return folder


def task_processes() -> list[int]:
    """Processes in which Ray compares a tile now."""
    found = []
    for about in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            if (about / "cmdline").read_bytes().startswith(b"ray::JoinWork"):
                found.append(int(about.name))
    return found


def test_a_join_survives_lost_workers_and_an_interruption_and_writes_the_same_bytes(
    gallery, on_ray, tmp_path, monkeypatch
):
    monkeypatch.setattr(joining, "JOIN_ROWS", 40)
    killed, seen = [], []

    class Cut(Exception):
        pass

    def cut(stage: str, done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 3:
            raise Cut

    def kill(stage: str, done: int, total: int) -> None:
        assert not stage.startswith("warning")
        seen.append(done)
        for process in task_processes():
            if len(killed) < 2:
                os.kill(process, signal.SIGKILL)
                killed.append(process)

    with bd.Engine.open(gallery, CONFIG, read_only=True) as engine:
        here = jobs.find_duplicates(engine, tmp_path / "here.parquet", threshold_db=DB)
        with pytest.raises(Cut):
            jobs.find_duplicates(engine, tmp_path / "there.parquet", threshold_db=DB, progress=cut, executor=on_ray)
        seen.clear()
        there = jobs.find_duplicates(
            engine, tmp_path / "there.parquet", threshold_db=DB, progress=kill, executor=on_ray
        )
    assert killed and seen[0] == 160
    assert there == here and len(here.clusters) >= 30
    assert (tmp_path / "there.parquet").read_bytes() == (tmp_path / "here.parquet").read_bytes()


def test_what_other_machines_cannot_see_any_more_is_compared_here(gallery, on_ray, tmp_path):
    folder, said = shutil.copytree(gallery, tmp_path / "g"), []
    with bd.Engine.open(folder, CONFIG, read_only=True) as engine:
        with bd.Engine.open(folder, CONFIG) as writer:
            writer.remove("s3")
        there = jobs.find_duplicates(
            engine, tmp_path / "o.csv", threshold_db=DB, progress=lambda stage, *_: said.append(stage), executor=on_ray
        )
        here = jobs.find_duplicates(engine, tmp_path / "h.csv", threshold_db=DB)
    assert there == here and "s3" in str(here.clusters)
    assert any("the gallery changed" in stage for stage in said)


def test_a_merge_by_the_command_line_writes_the_same_five_files(cluster, tmp_path):
    a, b = people(60, seed=1), people(60, seed=2)
    b[:5] = again(a[:5], 0.9)
    sources = [filled(tmp_path / name, vectors, name) for name, vectors in (("a", a), ("b", b))]
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    jobs.merge(sources, tmp_path / "here" / "m.parquet", min_db=70.0)
    asked = ("--out", tmp_path / "there" / "m.parquet", "--min-db", 70, "--ray", cluster.address)
    code, _, error = run("merge", *sources, *asked, cwd=tmp_path)
    assert code == 10, error
    files = sorted(path.name for path in (tmp_path / "here").iterdir() if path.is_file())
    assert len(files) == 5
    for name in files:
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes(), name


def test_ids_that_two_registers_gave_are_compared_on_other_machines_too(on_ray, tmp_path, monkeypatch):
    monkeypatch.setattr(ids, "_CHECKPOINT_IDS", 16)
    a, b = people(60, seed=1), people(60, seed=2)
    b[:5] = again(a[:5], 0.9)
    sources = [filled(tmp_path / name, vectors, "s") for name, vectors in (("a", a), ("b", b))]
    sent: list[str] = []

    class Noting:
        pieces_ahead = on_ray.pieces_ahead

        def submit(self, work, piece):
            sent.append(type(work).__name__)
            return on_ray.submit(work, piece)

    for name, more in (("here", {}), ("there", {"executor": Noting()})):
        (tmp_path / name).mkdir()
        jobs.merge(sources, tmp_path / name / "m.parquet", min_db=70.0, **more)
    assert sent.count("IdWork") == 4
    for file in (path for path in (tmp_path / "here").iterdir() if path.is_file()):
        assert (tmp_path / "there" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_batch_with_captures_that_kill_their_process_ends_with_the_same_outcomes(on_ray, tmp_path):
    vectors = people(24, seed=8)
    content = [vector.tobytes() for vector in [*vectors, *again(vectors[:3], 0.95)]]
    content[5], content[11] = b"KILL", b"not sharp"
    rows = {
        "subject_id": [f"s{i}" for i in range(len(content))],
        "encounter_id": [f"e{i}" for i in range(len(content))],
        "face": pa.array(content, pa.binary()),
    }
    pa.parquet.write_table(pa.table(rows), tmp_path / "m.parquet")
    config = bd.Config(batch_size=8, isolation=IsolationConfig(capture_s_max=20), gallery=CONFIG.gallery)
    results = []
    for name, executor in (("here", None), ("there", on_ray)):
        with (
            bd.Engine.open(tmp_path / name, config, clock=lambda: NOW) as engine,
            jobs.Backlog.open(tmp_path / name) as backlog,
            Workers(config, 1, told) as pool,
        ):
            more = {} if executor is None else {"executor": executor}
            out = tmp_path / f"{name}.parquet"
            result = jobs.enroll_batch(
                engine, backlog, tmp_path / "m.parquet", out, clock=lambda: NOW, pool=pool, **more
            )
            results.append((result.statuses, result.reasons))
            assert (pool._isolated._pool is None) == (executor is not None)
    assert results[0] == results[1] and results[0][0] == {"enrolled": 22, "duplicate": 3, "adjudicate": 0, "refused": 2}
    assert results[0][1] == {"decoder_failed": 1, "blurred": 1}
    assert (tmp_path / "there.parquet").read_bytes() == (tmp_path / "here.parquet").read_bytes()


def test_a_calibration_writes_the_same_card(on_ray, tmp_path):
    rng, model = np.random.default_rng(3), joint_id(load_card("finger256"), load_card("skeleton_cylinders"))
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        records = []
        for _ in range(60):
            points = rng.integers(0, 256, (30, 3)).tolist()
            body = b"".join(bytes([0x40 | x >> 8, x & 255, y >> 8, y & 255, way, 50]) for x, y, way in points)
            records.append(write_record(MinutiaeRecord(300, 300, body), 0, 50))
        for i, (vector, record) in enumerate(zip(people(60, 22, 256), records, strict=True)):
            template = bd.Template("right_index", model, vector, record)
            engine.import_captures([bd.Encounter(f"s{i}", templates={"right_index": template})])
    for name, more in (("here", {}), ("there", {"executor": on_ray})):
        (tmp_path / name).mkdir()
        jobs.calibrate(tmp_path / "g", "finger256-3+skeleton-1", tmp_path / name / "my.toml", **more)
    assert (tmp_path / "there" / "my.toml").read_bytes() == (tmp_path / "here" / "my.toml").read_bytes()


def test_an_error_of_the_work_is_raised_as_it_is_and_a_cluster_that_is_not_there_is_said(on_ray, tmp_path, gallery):
    (tmp_path / "g").mkdir()
    with bd.Engine.open(shutil.copytree(gallery, tmp_path / "c"), CONFIG, read_only=True) as engine:
        shutil.rmtree(tmp_path / "c")
        with pytest.raises(bd.InvalidInput, match="a Ray node does not have the gallery"):
            jobs.find_duplicates(engine, tmp_path / "o.csv", threshold_db=DB, executor=on_ray)
