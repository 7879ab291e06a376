"""Random histories of a register, checked against a small model: no person has two ids, and no acknowledged decision is lost.

    python benchmarks/histories.py                      20,000 operations, three processes of six threads, kills and forks
    python benchmarks/histories.py --operations 300     the smoke size; keeps no result

Three processes want to write one gallery. The one that gets it works with six threads for a while: it enrols, updates, removes,
disputes, judges cases as the truth says, sends encounters again, and forks. The others read meanwhile, and take over when it closes or is
killed. Captures are strong (two of them score as one person) or weak (between the thresholds), so that many cases wait. An
encounter's id names the person whose captures it holds; thus the gallery itself tells the truth about every row.

A violation is
* a person who is enrolled under two ids;
* a subject with rows of two people (no update here says `replace`);
* an acknowledged decision that is not there, or not the same when the encounter is sent again;
* an acknowledged enrolment whose subject is neither enrolled nor was it asked to be removed;
* a forked child that gets anything but `EngineClosed`;
* a gallery that does not open, or whose check finds a problem, or an exception that is not of biodedup's tree.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from report import record

import biodedup as bd

PEOPLE, IDS = 60, 90
STRONG, WEAK = 0.9, 0.72
"""Cosine of a capture to its person: of two strong ones 0.81 (some 165 dB), of two weak ones 0.52 (some 70 dB)."""
CONFIG = bd.Config(
    policy=bd.Policy(duplicate_db=100, review_db=30),
    gallery=bd.GalleryConfig(seal_rows=64, merge_fan=2),
)
HOLD_S = 4.0
"""A writer's turn; opening the gallery and loading compiled code takes some two seconds."""
OPERATIONS_A_KILL = 150
ONE_BLAS_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
"""Before a fork OpenBLAS ends its threads, and hangs where another thread of the process has work for them (seen with numpy 2.4)."""
OPERATIONS = ("enrol", "update", "remove", "dispute", "judge", "resend", "fork")
WEIGHTS = (30, 18, 4, 3, 24, 8, 1)


def capture(person: int, number: int, cosine: float) -> np.ndarray:
    """One of a person's embeddings; people are orthogonal to one another."""
    noise = np.random.default_rng([person, number]).normal(size=128)
    noise[:PEOPLE] = 0.0
    noise /= np.linalg.norm(noise)
    vector = np.sqrt(1 - cosine**2) * noise
    vector[person] = cosine
    return vector.astype(np.float32)


def encounter(subject: str, person: int, number: int, cosine: float) -> bd.Encounter:
    face = bd.Template("face", "sface-2021dec-mirror-centred-1", capture(person, number, cosine))
    return bd.Encounter(subject, templates={"face": face}, encounter_id=f"p{person}-{number}-{cosine}-{subject}")


def person_of(encounter_id: str) -> int:
    return int(encounter_id.split("-")[0][1:])


# a process -----------------------------------------------------------------------------------------------------------


class Worker:
    """One process: writes while it can, reads otherwise, and says what it begins and what was acknowledged."""

    def __init__(self, gallery: Path, seed: int) -> None:
        self.gallery = gallery
        self.seed = seed
        self._told = threading.Lock()

    def say(self, **line: Any) -> None:
        with self._told:
            os.write(1, (json.dumps(line) + "\n").encode())

    def run(self) -> None:
        for turn in range(1_000_000):
            try:
                with bd.Engine.open(self.gallery, CONFIG) as engine:
                    self.say(what="turn")
                    until = time.monotonic() + HOLD_S
                    threads = [
                        threading.Thread(target=self.write, args=(engine, until, [self.seed, turn, i]))
                        for i in range(6)
                    ]
                    for thread in threads:
                        thread.start()
                    for thread in threads:
                        thread.join()
                time.sleep(0.05)  # another process may want it
            except bd.GalleryBusy:
                self.read()

    def read(self) -> None:
        with bd.Engine.open(self.gallery, CONFIG, read_only=True) as engine:
            for _ in range(20):
                engine.refresh()
                for fault in faults_of(engine):
                    self.say(what="fault", text=f"seen by a reader: {fault}")
                time.sleep(0.1)

    def write(self, engine: bd.Engine, until: float, seed: list[int]) -> None:
        rng = random.Random(str(seed))
        while time.monotonic() < until:
            (name,) = rng.choices(OPERATIONS, WEIGHTS)
            try:
                getattr(self, name)(engine, rng)
            except (bd.SubjectExists, bd.UnknownSubject, bd.EncounterConflict, bd.InvalidInput):
                self.say(what="declined", operation=name)
            except Exception as error:
                self.say(what="fault", text=f"{name}: {type(error).__name__}: {error}")

    def enrol(self, engine: bd.Engine, rng: random.Random) -> None:
        one = encounter(
            f"s{rng.randrange(IDS)}", rng.randrange(PEOPLE), rng.randrange(10**6), rng.choice((STRONG, WEAK))
        )
        self.answered(engine, "enrol", one)

    def update(self, engine: bd.Engine, rng: random.Random) -> None:
        ids = engine.subject_ids()
        if ids:
            subject = rng.choice(ids)
            owned = engine.encounters(subject)
            person = person_of(owned[0].encounter_id) if rng.random() < 0.7 else rng.randrange(PEOPLE)
            self.answered(
                engine, "update", encounter(subject, person, rng.randrange(10**6), rng.choice((STRONG, WEAK)))
            )

    def dispute(self, engine: bd.Engine, rng: random.Random) -> None:
        if ids := engine.subject_ids():
            one = encounter(rng.choice(ids), rng.randrange(PEOPLE), rng.randrange(10**6), WEAK)
            self.answered(engine, "dispute", one)

    def answered(self, engine: bd.Engine, operation: str, one: bd.Encounter) -> None:
        call = {"enrol": engine.enroll, "update": engine.update, "dispute": engine.dispute}[operation]
        self.say(what="begun", operation=operation, encounter_id=one.encounter_id, subject=one.subject_id)
        decision = call(one)
        self.say(what="done", operation=operation, encounter_id=one.encounter_id, outcome=decision.outcome)

    def resend(self, engine: bd.Engine, rng: random.Random) -> None:
        """The same encounter twice, at once or later: both times one answer."""
        one = encounter(
            f"s{rng.randrange(IDS)}", rng.randrange(PEOPLE), rng.randrange(10**6), rng.choice((STRONG, WEAK))
        )
        self.say(what="begun", operation="enrol", encounter_id=one.encounter_id, subject=one.subject_id)
        first = engine.enroll(one)
        self.say(what="done", operation="enrol", encounter_id=one.encounter_id, outcome=first.outcome)
        second = engine.enroll(one)
        if second.outcome != first.outcome and first.outcome != "review":
            self.say(what="fault", text=f"resent: {first.outcome}, then {second.outcome}")

    def remove(self, engine: bd.Engine, rng: random.Random) -> None:
        if ids := engine.subject_ids():
            subject = rng.choice(ids)
            self.say(what="begun", operation="remove", subject=subject)
            engine.remove(subject)
            self.say(what="done", operation="remove", subject=subject)

    def judge(self, engine: bd.Engine, rng: random.Random) -> None:
        """Some cases, as the truth says; the rows of a candidate say whose captures they are."""
        waiting = [case for _, case in zip(range(30), engine.cases(), strict=False)]
        for case in rng.sample(waiting, min(3, len(waiting))):
            person = person_of(case.encounter_id)
            if not case.undecided:
                self.judged(engine, case, "different", None)
            for candidate in case.undecided:
                other = self.person(engine, candidate)
                if other is not None and not engine.case(case.encounter_id).closed:
                    self.judged(engine, case, "same" if other == person else "different", candidate.key)

    def judged(self, engine: bd.Engine, case: bd.Case, ruling: Any, key: str | None) -> None:
        stands = engine.adjudicate(case, ruling, "the truth", candidate=key).outcome
        about = {"encounter_id": case.encounter_id, "ruling": ruling, "candidate": key, "stands": stands}
        self.say(what="done", operation="judge", **about)

    @staticmethod
    def person(engine: bd.Engine, candidate: bd.Candidate) -> int | None:
        if candidate.case:
            return person_of(candidate.case)
        for owned in engine.encounters(candidate.subject_id):
            if owned.row in candidate.rows:
                return person_of(owned.encounter_id)
        return None

    def fork(self, engine: bd.Engine, rng: random.Random) -> None:
        one = encounter(f"s{rng.randrange(IDS)}", rng.randrange(PEOPLE), rng.randrange(10**6), STRONG)
        child = os.fork()
        if not child:
            try:
                engine.enroll(one)
            except bd.EngineClosed:
                os._exit(0)
            except BaseException:
                os._exit(2)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        if status:
            self.say(what="fault", text=f"a forked child ended with {status}")
        self.say(what="done", operation="fork")


# the audit -----------------------------------------------------------------------------------------------------------


def faults_of(engine: bd.Engine) -> Iterator[str]:
    """What is wrong with the rows of a gallery that nothing writes to."""
    ids_of: dict[int, set[str]] = defaultdict(set)
    for subject in engine.subject_ids():
        people = {person_of(one.encounter_id) for one in engine.encounters(subject)}
        if len(people) != 1:
            yield f"{subject} has rows of {len(people)} people"
        for person in people:
            ids_of[person].add(subject)
    for person, ids in ids_of.items():
        if len(ids) > 1:
            yield f"person {person} is enrolled as {', '.join(sorted(ids))}"


def audit(gallery: Path, lines: list[dict[str, Any]]) -> list[str]:
    """All violations."""
    faults = [line["text"] for line in lines if line["what"] == "fault"]
    removed = {line["subject"] for line in lines if line["what"] == "begun" and line["operation"] == "remove"}
    subject_of = {
        line["encounter_id"]: line["subject"] for line in lines if line["what"] == "begun" and "encounter_id" in line
    }
    with bd.Engine.open(gallery, CONFIG) as engine:
        faults += faults_of(engine)
        faults += engine.problems()
        if engine.info()["open_cases"] != len(list(engine.cases())):
            faults.append("open cases are not counted right")
        for line in lines:
            if line["what"] != "done" or "outcome" not in line:
                continue
            found = engine.decision(line["encounter_id"])
            if found is None:
                faults.append(f"lost: {line}")
            elif line["outcome"] != "review" and found.outcome != line["outcome"]:
                faults.append(f"changed to {found.outcome}: {line}")
            subject = subject_of[line["encounter_id"]]
            if line["outcome"] == "unique" and subject not in removed and subject not in engine:
                faults.append(f"not enrolled any more: {line}")
    return faults


def run(operations: int, processes: int, seed: int) -> dict[str, Any]:
    start, rng = time.monotonic(), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        gallery, logs = Path(folder) / "gallery", Path(folder) / "logs"
        logs.mkdir()
        bd.Engine.open(gallery, CONFIG).close()
        running: list[subprocess.Popen[bytes]] = []
        said = Logs(logs)
        kills, launched, next_kill, counted, done, faulty = 0, 0, OPERATIONS_A_KILL // 3, 0, 0, False
        while True:
            while len(running) < processes:
                command = [sys.executable, __file__, "--worker", str(gallery), "--seed", str(seed * 1000 + launched)]
                with (logs / f"{launched}.jsonl").open("wb") as out:
                    running.append(subprocess.Popen(command, stdout=out, env=os.environ | ONE_BLAS_THREAD))
                launched += 1
            time.sleep(0.2)
            new = said.refresh()[counted:]
            counted += len(new)
            done += sum(line["what"] in ("done", "declined") for line in new)
            faulty = faulty or any(line["what"] == "fault" for line in new)
            if done >= operations or faulty:
                break
            if done < next_kill:
                continue
            next_kill = done + int(OPERATIONS_A_KILL * (0.5 + rng.random()))
            victim = rng.choice(running)
            victim.send_signal(signal.SIGKILL)
            victim.wait()
            running.remove(victim)
            kills += 1
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.wait()
        lines = said.refresh()
        faults = audit(gallery, lines)
        with bd.Engine.open(gallery, CONFIG) as engine:
            info = engine.info()
    counts = Counter(line.get("operation") for line in lines if line["what"] in ("done", "declined"))
    outcomes = Counter(line["outcome"] for line in lines if "outcome" in line)
    for fault in faults[:20]:
        print("violation:", fault)
    if faults:
        named = set(re.findall(r"\bs\d+\b", faults[0]))
        for line in lines:
            if line.get("subject", line.get("encounter_id", "").rpartition("-")[2]) in named:
                print(line)
    return {
        "operations": sum(counts.values()),
        "of which": dict(sorted((str(k), v) for k, v in counts.items())),
        "outcomes": dict(sorted(outcomes.items())),
        "kills": kills + processes,
        "turns of a writer": sum(line["what"] == "turn" for line in lines),
        "subjects, rows, open cases at the end": [info["subjects"], info["rows"], info["open_cases"]],
        "seconds": round(time.monotonic() - start, 1),
        "violations": len(faults),
    }


class Logs:
    """What all processes said. Each log is read on from where the last call stopped; a killed process may leave half a line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[dict[str, Any]] = []
        self._read: Counter[Path] = Counter()

    def refresh(self) -> list[dict[str, Any]]:
        for path in sorted(self.folder.iterdir()):
            with path.open("rb") as log:
                log.seek(self._read[path])
                whole, newline, _ = log.read().rpartition(b"\n")
            self._read[path] += len(whole) + len(newline)
            self.lines += map(json.loads, whole.splitlines())
        return self.lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        Worker(options.worker, options.seed).run()
        return
    figures = run(options.operations, options.processes, options.seed)
    record("histories", figures, keep=options.operations >= 20_000)
    sys.exit(1 if figures["violations"] else 0)


if __name__ == "__main__":
    main()
