"""Random histories of one register, checked against a model: several processes enrol, update, remove, adjudicate and send again.

    python -m tests.cluster.histories FOLDER --seed 1 --processes 6 --operations 20000

Each commit has a version of its own, since each process calls from one thread. So the versions are the order in which the calls took
effect, and the check is a replay: the state before each commit must give the answer of its call. A call that changed nothing saw the state
at the version that its front-end had reached by then. Calls that ended before another one began come before it in this order. Together
that is linearizability (Herlihy and Wing, 1990).

The model knows which person each row of a subject shows. A person has NAMES names, which processes enrol, update and remove at once. An odd
update shows a stranger; it opens a case, which any process closes. What a call sends depends on its number alone, so that any process may
send the encounter of another one, before it, after it, or at the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

import biodedup as bd
from biodedup.testing import internals
from tests.support import ROOT
from tests.support.postgres import Postgres, binaries
from tests.support.vectors import SFACE, again, orthogonal, people

POLICY = bd.Policy(duplicate_db=62, review_db=62)
PEOPLE, NAMES = 8, 2
KINDS, SHARES = ("enroll", "update", "remove", "odd", "adjudicate", "resend"), (0.34, 0.2, 0.14, 0.08, 0.08, 0.16)
NO_POLL = {"poll_ms": 3_600_000, "stale_ms_max": 3_600_000}


def config(folder: Path, seal_rows: int) -> bd.Config:
    """seal_rows: so small a journal that the processes seal and merge all the while; 0: they never do."""
    gallery = bd.GalleryConfig(seal_rows=seal_rows or 1 << 20, merge_fan=3, background=bool(seal_rows))
    cluster = bd.ClusterConfig(segments=f"file://{folder}/store", **NO_POLL)
    return bd.Config(policy=POLICY, gallery=gallery, cluster=cluster, threads=1)


class Caller:
    """One process. It notes each call with its answer before the next one."""

    def __init__(self, folder: Path, url: str, number: int, seed: int, processes: int, seal_rows: int) -> None:
        self._seed, self._number, self._processes = seed, number, processes
        self._engine = bd.Engine.open(url, config(folder, seal_rows))

    def run(self, operations: int, noted: Path) -> None:
        with noted.open("a") as file:
            for n in range(operations):
                chance = np.random.default_rng([self._seed, self._number, n, 0])
                kind, whose, which = self._kind(self._number, n), self._number, n
                if kind in ("resend", "adjudicate"):
                    whose, which = int(chance.integers(self._processes)), max(n - int(chance.integers(0, 6)), 0)
                    wanted = ("odd",) if kind == "adjudicate" else ("enroll", "update")
                    while which and self._kind(whose, which) not in wanted:
                        which -= 1
                    kind = kind if kind == "adjudicate" else self._kind(whose, which)
                    if kind not in ("enroll", "update", "adjudicate"):
                        continue
                began = time.monotonic()
                answer = self._call(kind, whose, which)
                ended = time.monotonic()
                about = {"kind": kind, "call": f"{whose}-{which}", "version": self._engine.gallery_version}
                file.write(json.dumps({**about, "began": began, "ended": ended, **answer}) + "\n")
                file.flush()
        self._engine.close()

    def _kind(self, whose: int, which: int) -> str:
        return str(np.random.default_rng([self._seed, whose, which]).choice(KINDS, p=SHARES))

    def _call(self, kind: str, whose: int, which: int) -> dict[str, object]:
        chance = np.random.default_rng([self._seed, whose, which, 1])
        person = int(chance.integers(PEOPLE))
        subject = f"s{person}-{int(chance.integers(NAMES))}"
        about: dict[str, object] = {"person": person, "subject": subject}
        shown = orthogonal(PEOPLE)[person] if kind != "odd" else people(1, seed=int(chance.integers(1 << 40)))[0]
        shown[:PEOPLE] *= kind != "odd"  # a stranger resembles no person of the model
        face = bd.Template("face", SFACE, again(shown / np.linalg.norm(shown), 0.95, seed=which))
        encounter = bd.Encounter(subject, templates={"face": face}, encounter_id=f"e{whose}-{which}")
        while True:
            try:
                if kind == "remove":
                    self._engine.remove(subject)
                    return {**about, "answer": "removed"}
                if kind == "adjudicate":
                    decision = self._engine.adjudicate(f"e{whose}-{which}", "recapture", "clerk")
                    return {**about, "answer": decision.outcome}
                decision = (self._engine.enroll if kind == "enroll" else self._engine.update)(encounter)
                best = decision.best.subject_id if decision.candidates else None
                return {**about, "answer": decision.outcome, "committed": decision.gallery_version, "best": best}
            except bd.RetryableError:
                time.sleep(0.01)
            except bd.CallerError as error:
                return {**about, "answer": type(error).__name__}


# the model ------------------------------------------------------------------------------------------------------------


class Model:
    """The register as the documentation describes it. enrolled: subject -> person; open: the encounters in review."""

    def __init__(self) -> None:
        self.enrolled: dict[str, int] = {}
        self.open: set[str] = set()
        self.closed: set[str] = set()

    def expected(self, call: dict) -> str:
        """The answer of a call in this state."""
        subject, kind = call["subject"], call["kind"]
        if kind == "adjudicate":
            return "refused" if call["call"] in self.open | self.closed else "InvalidInput"
        if kind == "enroll" and subject in self.enrolled:
            return "SubjectExists"
        if kind != "enroll" and subject not in self.enrolled:
            return "UnknownSubject"
        if kind in ("remove", "odd"):
            return "removed" if kind == "remove" else "review"
        others = [name for name, person in self.enrolled.items() if person == call["person"] and name != subject]
        return "duplicate" if others else "unique"

    def take(self, call: dict) -> None:
        """The effect of a call that was answered as expected."""
        if call["kind"] == "remove":
            del self.enrolled[call["subject"]]
        elif call["kind"] == "odd":
            self.open.add(call["call"])
        elif call["kind"] == "adjudicate":
            self.open.discard(call["call"])
            self.closed.add(call["call"])
        elif call["answer"] == "unique":
            self.enrolled[call["subject"]] = call["person"]


def violations(calls: list[dict]) -> list[str]:
    """What contradicts a linearizable register."""
    problems, first, writers, readers = [], {}, {}, []
    for call in sorted(calls, key=lambda call: call["ended"]):
        if "committed" in call:
            known = first.setdefault(call["call"], call)
            if known is not call:
                if any(known[name] != call[name] for name in ("answer", "committed", "best", "subject")):
                    problems.append(f"sent again, another answer: {known} and {call}")
                if call["began"] < known["began"]:  # the call that both share may have taken effect since the earlier
                    known["began"] = call["began"]
                continue
            call["version"] = call["committed"]
        writes = "committed" in call or call["answer"] == "removed"
        if call["kind"] == "adjudicate" and call["answer"] == "refused":
            writes = call["version"] not in writers
        if writes and writers.setdefault(call["version"], call) is not call:
            other = writers[call["version"]]
            if other["kind"] == "adjudicate" and other["call"] != call["call"]:
                readers.append(other)  # it changed nothing after all
                writers[call["version"]] = call
            else:
                problems.append(f"two commits of one version: {other} and {call}")
        elif not writes:
            readers.append(call)
    return problems + _replayed(writers, readers) + _out_of_order([*writers.values(), *readers])


def _replayed(writers: dict[int, dict], readers: list[dict]) -> list[str]:
    problems, model, at = [], Model(), {}
    for call in readers:
        at.setdefault(call["version"], []).append(call)
    for version in range(max([0, *writers, *at]) + 1):
        if version:
            call = writers.get(version)
            if call is None:
                return [*problems, f"version {version} is of no call"]
            if call["answer"] != model.expected(call):
                problems.append(f"version {version}: wanted {model.expected(call)} of {model.enrolled}, got {call}")
            if call["answer"] == "duplicate" and model.enrolled.get(call["best"]) != call["person"]:
                problems.append(f"version {version}: a duplicate of another person: {call}")
            model.take(call)
        for call in at.get(version, ()):
            if call["answer"] != model.expected(call):
                problems.append(f"at version {version}: wanted {model.expected(call)} of {model.enrolled}, got {call}")
    return problems


def _out_of_order(calls: list[dict]) -> list[str]:
    """Calls that took effect before one that had ended when they began."""
    problems, by_end, reached, done = [], sorted(calls, key=lambda call: call["ended"]), 0, 0
    for call in sorted(calls, key=lambda call: call["began"]):
        while done < len(by_end) and by_end[done]["ended"] < call["began"]:
            reached = max(reached, by_end[done]["version"])
            done += 1
        if call["version"] < reached:
            problems.append(f"took effect at {call['version']}, after a call at {reached} had ended: {call}")
    return problems


# a run ----------------------------------------------------------------------------------------------------------------


def run(url: str, folder: Path, *, seed: int, processes: int, operations: int, seal_rows: int = 0) -> dict[str, object]:
    """Returns counts. Raises AssertionError where the register was not linearizable. operations: of all processes together."""
    folder.mkdir(parents=True, exist_ok=True)
    bd.Engine.open(url, config(folder, seal_rows)).close()
    each, env = -(-operations // processes), {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    given = [str(folder), "--url", url, "--seed", str(seed), "--processes", str(processes), "--operations", str(each)]
    given += ["--seal-rows", str(seal_rows)]
    command = [sys.executable, "-m", "tests.cluster.histories", *given, "--number"]
    running = [subprocess.Popen([*command, str(n)], cwd=ROOT, env=env) for n in range(processes)]
    assert [process.wait() for process in running] == [0] * processes
    files = [folder / f"calls-{n}.jsonl" for n in range(processes)]
    calls = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    problems = violations([dict(call) for call in calls])
    assert not problems, "\n".join(problems[:20])
    with bd.Engine.open(url, config(folder, seal_rows), read_only=True) as engine:
        assert engine.problems() == []
        sealed = {"segments": len(internals(engine).gallery.snapshot().segments)} if seal_rows else {}
    return {
        "seed": seed,
        **sealed,
        "calls": len(calls),
        **Counter(f"{call['kind']}: {call['answer']}" for call in calls),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--operations", type=int, default=20_000)
    parser.add_argument("--seal-rows", type=int, default=0)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.number is not None:
        noted = given.folder / f"calls-{given.number}.jsonl"
        caller = Caller(given.folder, given.url, given.number, given.seed, given.processes, given.seal_rows)
        caller.run(given.operations, noted)
        return
    source = binaries()
    assert source is not None, "there is no PostgreSQL"
    server = Postgres(source)
    try:
        settings = {"seed": given.seed, "processes": given.processes, "operations": given.operations}
        settings["seal_rows"] = given.seal_rows
        sys.stdout.write(json.dumps(run(server.url("history"), given.folder.resolve(), **settings), indent=1) + "\n")
    finally:
        server.close()


if __name__ == "__main__":
    main()
