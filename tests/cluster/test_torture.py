"""Front-ends in processes of their own, offering the same people, while connections are cut and front-ends killed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import biodedup as bd
from tests.cluster.offering import POLICY
from tests.support import ROOT

FRONT_ENDS, SEED = 3, 11
PEOPLE = int(os.environ.get("BIODEDUP_TORTURE", "40"))
"""How many people are offered; more take longer."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nobody_is_enrolled_twice_and_nothing_acknowledged_is_lost(register, postgres, tmp_path):
    count = PEOPLE
    with register(bd.Config(policy=POLICY)):
        pass  # the register is there, with this policy
    store = f"file://{tmp_path}/store"
    answers = [tmp_path / f"answers-{i}" for i in range(FRONT_ENDS)]
    processes = [_start(register.url, store, i, count, answers[i]) for i in range(FRONT_ENDS)]
    chance, kills, cuts = random.Random(SEED), 0, 0
    while any(process.poll() is None for process in processes):
        time.sleep(0.5)
        if any(file.exists() and file.stat().st_size for file in answers):  # they have begun
            cuts += postgres.terminate_backends() if chance.random() < 0.3 or not cuts else 0
            if kills < 2 + count // 100 and chance.random() < 0.1:
                i = chance.randrange(FRONT_ENDS)
                processes[i].kill()
                processes[i].wait()
                processes[i] = _start(register.url, store, i, count, answers[i])
                kills += 1
    assert [process.returncode for process in processes] == [0] * FRONT_ENDS
    assert cuts > 0
    _check(register(bd.Config(policy=POLICY)), answers, count)


def _check(engine: bd.Engine, answers: list[Path], count: int) -> None:
    enrolled = engine.subject_ids()
    first: dict[str, str] = {}
    for file in answers:
        for line in file.read_text().splitlines():
            person, subject_id, encounter_id, outcome = line.split()
            assert first.setdefault(encounter_id, outcome) == outcome  # sent again, the same answer
            assert outcome == ("unique" if subject_id in enrolled else "duplicate"), person
            assert engine.decision(encounter_id).outcome == outcome
    assert len(first) == FRONT_ENDS * count
    assert sorted(int(name[1:].partition("-")[0]) for name in enrolled) == list(range(count))  # each person once
    assert engine.problems() == []


def _start(url: str, store: str, number: int, count: int, answers: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.cluster.offering", url, store, str(number), str(count), str(answers)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
