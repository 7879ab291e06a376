"""Isolation: a capture that crashes, hangs or fills the memory costs itself; nothing else notices."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.embed.isolation import IsolatedWorkers
from tests.support.hostile import hostile
from tests.support.images import finger, jpeg

pytestmark = pytest.mark.slow

LIMITS = bd.IsolationConfig(capture_s_max=0.5, memory_bytes_max=1 << 28)
CONFIG = bd.Config(isolation=LIMITS)


@pytest.fixture(scope="module")
def workers():
    with IsolatedWorkers(CONFIG, 2, hostile) as workers:
        yield workers


def answers(workers: IsolatedWorkers, *orders: str) -> list[bd.Refusal]:
    return workers.extract([bd.Face(order.encode()) for order in orders])


@pytest.mark.parametrize(
    "order, reason",
    [
        ("crash", "decoder_failed"),
        ("abort", "decoder_failed"),
        ("killed", "decoder_failed"),
        ("hang", "too_slow"),
        ("loop", "too_slow"),
        ("memory", "too_much_memory"),
        ("mapped", "too_much_memory"),
        ("bug", "failed"),
        ("files", "failed"),
    ],
)
def test_it_costs_its_own_capture_and_the_others_are_answered_in_order(workers, order, reason):
    got = answers(workers, "one", order, "two", "three", order, "four")
    assert [one.reason for one in got] == ["one", reason, "two", "three", reason, "four"]
    assert "secret" not in got[1].detail
    if reason.startswith("too_"):
        assert got[1].limit == (0.5 if reason == "too_slow" else 1 << 28)


def test_a_worker_fills_no_disk(workers, tmp_path):
    flood = tmp_path / "flood"
    assert [one.reason for one in answers(workers, f"write {flood}")] == ["failed"]
    assert flood.stat().st_size <= 64 << 20


def test_many_hostile_captures_in_a_row_break_nothing(workers):
    orders = ["crash", "killed", "abort"] * 4
    assert {one.reason for one in answers(workers, *orders)} == {"decoder_failed"}
    assert [one.reason for one in answers(workers, "one", "two")] == ["one", "two"]


def test_processes_that_die_while_nothing_is_asked_of_them_are_replaced(workers):
    answers(workers, "warm")
    for child in active_children():
        if child.name == "pebble_pool_worker":
            child.kill()
    time.sleep(0.5)
    assert [one.reason for one in answers(workers, "one", "two")] == ["one", "two"]


def test_a_worker_leaves_no_core_and_hears_no_ctrl_c(workers):
    (told,) = answers(workers, "limits")
    assert told.reason == "core 0, deaf True"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_closed_pool_takes_nothing_more():
    workers = IsolatedWorkers(CONFIG, 1, hostile)
    workers.close()
    with pytest.raises(bd.RetryableError, match="closed"):
        answers(workers, "one")


def test_limits_are_checked():
    for wrong in (0, -1, float("nan"), float("inf"), 86_401):
        with pytest.raises(bd.InvalidInput, match="capture_s_max"):
            bd.IsolationConfig(capture_s_max=wrong)
    with pytest.raises(bd.InvalidInput, match="memory_bytes_max"):
        bd.IsolationConfig(memory_bytes_max=1000)


def test_an_isolated_extractor_gives_what_another_gives_with_the_same_trace(portrait, tmp_path):
    (tmp_path / "face.jpg").write_bytes(jpeg(portrait))
    captures = [
        bd.Face(tmp_path / "face.jpg"),
        bd.Finger(finger(1), "right_index"),
        bd.Missing("left_thumb", "lost"),
        bd.Face(b"no image"),
        bd.Face(tmp_path / "absent.jpg"),
        bd.Face("/dev/zero"),
    ]
    with bd.explain() as here:
        expected = bd.Extractor(bd.Config()).extract(captures)
    with bd.Extractor(bd.Config(isolation=bd.IsolationConfig())) as extractor, bd.explain() as there:
        got = extractor.extract(captures)
    assert isinstance(got[0], bd.Template)
    np.testing.assert_allclose(got[0].embedding, expected[0].embedding, atol=1e-5)
    assert got[1].minutiae == expected[1].minutiae
    assert got[2:] == expected[2:]
    steps = [sorted((step.name, step.column, step.item) for step in trace) for trace in (here, there)]
    assert steps[0] == steps[1]


def test_an_engine_with_isolation_decides_as_one_without(tmp_path, portrait):
    with bd.Engine.open(tmp_path / "g", bd.Config(isolation=bd.IsolationConfig())) as engine:
        assert engine.enroll(bd.Encounter("anna", [bd.Face(jpeg(portrait))], encounter_id="e")).outcome == "unique"
        assert engine.identify(bd.Encounter(captures=[bd.Face(jpeg(portrait, 60))])).outcome == "duplicate"
    with bd.Engine.open(tmp_path / "g") as engine:
        assert engine.enroll(bd.Encounter("bella", [bd.Face(jpeg(portrait, 70))])).outcome == "duplicate"


SCRIPT = """
import sys, time
from multiprocessing import active_children, forkserver
import biodedup as bd
from biodedup.embed.isolation import IsolatedWorkers
if __name__ == "__main__":
    workers = IsolatedWorkers(bd.Config(), 1)
    (refusal,) = workers.extract([bd.Face(b"no image")])
    server = forkserver._forkserver._forkserver_pid
    print(refusal.reason, server, *(child.pid for child in active_children()), flush=True)
    if sys.argv[1] == "wait":
        time.sleep(100)
"""


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def deaf(process: str) -> bool:
    """Whether SIGINT is blocked."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    (blocked,) = [line.split()[1] for line in lines if line.startswith("SigBlk")]
    return bool(int(blocked, 16) >> (signal.SIGINT - 1) & 1)


ENVIRONMENTS = """
import os
from multiprocessing import active_children, forkserver
import biodedup as bd
from biodedup import jobs
from biodedup.jobs.shared.workers import Workers
if __name__ == "__main__":
    config = bd.Config(keys=bd.KeyProvider(environment="REGISTER_KEY"), isolation=bd.IsolationConfig())
    with Workers(config, 1) as workers:
        workers.submit([[bd.Face(b"no image")]]).result()
        server = forkserver._forkserver._forkserver_pid
        print(server, *(child.pid for child in active_children()), flush=True)
        print("REGISTER_KEY" in os.environ, flush=True)
        input()
"""


def test_no_process_that_decodes_captures_inherits_the_registers_key(tmp_path):
    key = "7f" * 32
    (tmp_path / "script.py").write_text(ENVIRONMENTS)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"],
        env={**os.environ, "REGISTER_KEY": key},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    pids, mine = process.stdout.readline().split(), process.stdout.readline().strip()
    environments = [Path(f"/proc/{pid}/environ").read_text() for pid in pids]
    process.communicate("\n", timeout=60)
    assert mine == "True" and len(pids) >= 2
    assert not any(key in environment for environment in environments)


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_workers_end_with_the_process_that_started_them(tmp_path, how):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "script.py", "wait" if how == "killed" else "end"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        reason, server, worker = process.stdout.readline().split()
        assert reason == "not_an_image"
        if how == "killed":
            assert deaf(server) and deaf(worker), "Ctrl-C is the parent's, also while they start"
        if how == "killed":
            process.kill()
        process.wait(60)
    deadline = time.monotonic() + 20
    while lives(int(worker)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not lives(int(worker))


def test_a_kit_remembers_no_verdict_that_a_failure_gave(tmp_path, portrait, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(jpeg(portrait))
    (tmp_path / "m.csv").write_text("subject_id,path\nanna,a.jpg\n")
    jobs.make_keys("K", tmp_path / "k.key")
    jobs.make_centre_key(tmp_path / "centre.key")

    def packed() -> jobs.PackResult:
        return jobs.pack_batch(tmp_path / "m.csv", tmp_path / "b.kit", tmp_path / "k.key", bd.Config())

    with monkeypatch.context() as patch:
        failing = [bd.Refusal("face", "too_slow")]
        patch.setattr("biodedup.jobs.kits.judge.Extractor.extract", lambda self, captures: failing)
        assert packed().broken
    assert not packed().broken


def test_a_kit_leaves_out_a_record_whose_file_cannot_be_read(tmp_path, portrait, monkeypatch):
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(portrait, 60 if name == "a" else 90))
    (tmp_path / "m.csv").write_text("subject_id,path\nanna,a.jpg\nbella,b.jpg\n")
    jobs.make_keys("K", tmp_path / "k.key")
    jobs.make_centre_key(tmp_path / "centre.key")
    opened = os.open

    def failing(path, *more, **named):
        if str(path).endswith("a.jpg"):
            raise OSError(5, "Input/output error")
        return opened(path, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing)
        result = jobs.pack_batch(tmp_path / "m.csv", tmp_path / "b.kit", tmp_path / "k.key", bd.Config())
    assert [one.subject_id for one in result.packed] == ["bella"]
    assert "row 1: its file cannot be opened as a face capture" in result.broken[0].problem
    whole = jobs.pack_batch(tmp_path / "m.csv", tmp_path / "b.kit", tmp_path / "k.key", bd.Config())
    assert len(whole.packed) == 2
    before = (tmp_path / "b.kit").read_bytes()
    monkeypatch.setattr(os, "open", failing)  # now the batch file has the record
    with pytest.raises(bd.InvalidInput):
        jobs.pack_batch(tmp_path / "m.csv", tmp_path / "b.kit", tmp_path / "k.key", bd.Config())
    assert (tmp_path / "b.kit").read_bytes() == before
