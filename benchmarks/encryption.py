"""The cost of encryption: a gallery in the clear and an encrypted one of the same rows, measured in turns.

    python benchmarks/encryption.py                                          200,000 subjects, 128 numbers each
    python benchmarks/encryption.py --subjects 10000000 --folder DISK/enc    ten million; keeps both galleries, and resumes there
    python benchmarks/encryption.py --subjects 20000                         the smoke size; keeps no result

Both galleries are filled piece by piece in turns, and then both are open in one process: each batch, probe and enrolment is timed on both,
one directly after the other, and which is first alternates. `times as fast` is the median of the ratios of these pairs, in elapsed time:
run it on a quiet machine. Opening (with the first search, which decrypts what a scan reads) and memory are those of a new process for each
gallery, which has opened it once before. Answers of both galleries are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from report import model_ids, record

import biodedup as bd
from biodedup.gallery.files.encryption.keyring import Key
from biodedup.gallery.files.encryption.sealed_file import SealedMap, SealedWriter
from biodedup.gallery.files.handles import LocalFile
from biodedup.synthetic.vectors import DIMENSION, mates_of, population
from biodedup.values import Float32

SUBJECTS, PIECE, BATCH, ROUNDS, PROBES, ENROLMENTS = 200_000, 1_000_000, 256, 7, 64, 100
MODEL = model_ids("face", DIMENSION)
KINDS = ("clear", "encrypted")
OWN = "memory of its own, MB"
_AES_BYTES = 1 << 26
Pair = dict[str, float]
"""The seconds of one task on each kind of gallery."""


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def in_turns(number: int, task: Callable[[str], object]) -> Pair:
    return {kind: seconds(partial(task, kind)) for kind in (KINDS if number % 2 == 0 else KINDS[::-1])}


def aes_speed(folder: Path) -> tuple[float, float]:
    """(sealing, opening) of one file, GB/s on one thread, the disk's share included; in blocks of 64 KiB."""
    key, content = Key(secrets.token_bytes(32)), np.random.default_rng(0).bytes(_AES_BYTES)

    def seal() -> None:
        writer = SealedWriter(LocalFile(folder / "sealed"), key, "sealed", 1 << 16)
        writer.write(content)
        writer.finish()

    def unseal() -> None:
        SealedMap.of(os.open(folder / "sealed", os.O_RDONLY), key, "sealed").need(0, _AES_BYTES)

    best = [min(seconds(action) for _ in range(3)) for action in (seal, unseal)]
    (folder / "sealed").unlink()
    return _AES_BYTES / best[0] / 1e9, _AES_BYTES / best[1] / 1e9


class Pairs:
    """Both galleries of a folder, and the figures of the stages that are done, which a later run in this folder takes over."""

    def __init__(self, folder: Path, subjects: int) -> None:
        self.folder, self.subjects = folder, subjects
        folder.mkdir(parents=True, exist_ok=True)
        self._state, self._key = folder / "done.json", folder / "register.key"
        self.done: dict[str, Any] = json.loads(self._state.read_text()) if self._state.exists() else {}
        if self.done.setdefault("subjects", subjects) != subjects:
            raise SystemExit(f"{folder} holds galleries of {self.done['subjects']} subjects; name another folder")
        if not self._key.exists():
            self._key.write_text(secrets.token_hex(32))
            self._key.chmod(0o600)

    def open(self, kind: str) -> bd.Engine:
        keys = bd.KeyProvider(file=self._key) if kind == "encrypted" else None
        config = bd.Config(keys=keys, gallery=bd.GalleryConfig(background=False))
        return bd.Engine.open(self.folder / kind, config)

    def stage(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` returns, or returned in an earlier run."""
        if name not in self.done:
            started = time.perf_counter()
            self.done[name] = measure()
            new = self._state.with_suffix(".new")
            new.write_text(json.dumps(self.done))
            new.replace(self._state)
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        return self.done[name]

    def load(self, number: int) -> Pair:
        """Adds a piece of the rows to both. A piece that an interrupted run has added already is not timed."""
        low = number * PIECE
        names = [f"s{i}" for i in range(low, min(low + PIECE, self.subjects))]
        vectors, before = population(len(names), seed=1_000 + number), {}

        def add(kind: str) -> None:
            with self.open(kind) as engine:
                before[kind] = len(engine)
                engine.add_templates(names, {"face": vectors}, encounter_id=f"piece-{number}", model_id=MODEL)

        pair = in_turns(number, add)
        return pair if set(before.values()) == {low} else {}

    def probes(self, count: int) -> Float32:
        some = population(min(PIECE, self.subjects), seed=1_000)[:count]
        return mates_of(some, np.full(len(some), 0.7), seed=2)


def opening(folder: Path, subjects: int, kind: str) -> dict[str, float]:
    """Seconds of an opening and of its first search, and MB of memory afterwards: the process's own, and mapped files."""
    pairs = Pairs(folder, subjects)
    probe = pairs.probes(1)
    before = _memory()
    for _ in range(2):  # the first opening loads kernels and files
        started = time.perf_counter()
        with pairs.open(kind) as engine:
            opened = time.perf_counter() - started
            engine.search({"face": probe}, k=10)
            searched = time.perf_counter() - started
            after = _memory()
    size = sum(file.stat().st_size for file in (folder / kind).rglob("*") if file.is_file())
    grown = {name: after[name] - before[name] for name in after}
    return {"open, s": opened, "open and first search, s": searched, "files, MB": size / 1e6} | grown


def in_new_process(folder: Path, subjects: int, kind: str) -> dict[str, float]:
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(opening, folder, subjects, kind).result()


def _memory() -> dict[str, float]:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        OWN: int(lines["RssAnon"].split()[0]) * 1024 / 1e6,
        "memory of mapped files, MB": int(lines["RssFile"].split()[0]) * 1024 / 1e6,
    }


def searches(pairs: Pairs) -> dict[str, Any]:
    """Seconds of batches and of single probes, in pairs, and whether the answers agree."""
    probes = pairs.probes(BATCH)
    with pairs.open("clear") as clear, pairs.open("encrypted") as encrypted:
        engines = {"clear": clear, "encrypted": encrypted}
        found = {kind: engine.search({"face": probes}, k=10) for kind, engine in engines.items()}
        same = all(
            np.array_equal(getattr(found["clear"], name), getattr(found["encrypted"], name))
            for name in ("ids", "similarity")
        )
        first = [str(name) for name in found["clear"].ids[:, 0]]
        batch = [in_turns(i, lambda kind: engines[kind].search({"face": probes}, k=10)) for i in range(ROUNDS)]
        one = [
            in_turns(i, lambda kind, i=i: engines[kind].search({"face": probes[i : i + 1]}, k=10))
            for i in range(min(PROBES, len(probes)))
        ]
    mates = float(np.mean([name == f"s{i}" for i, name in enumerate(first)]))
    return {"batch": batch, "one probe": one, "same": same, "mates that are first": mates}


def enrolments(pairs: Pairs) -> dict[str, Any]:
    """Seconds of single enrolments, each with its search and its commit, in pairs."""
    with pairs.open("clear") as clear, pairs.open("encrypted") as encrypted:
        engines = {"clear": clear, "encrypted": encrypted}
        attempt = max(len(engine) for engine in engines.values())  # other people after an interruption
        newcomers = population(ENROLMENTS + 2, seed=attempt)
        outcomes: dict[str, list[str]] = {kind: [] for kind in KINDS}

        def enrol(kind: str, i: int) -> None:
            person = bd.Encounter(f"n{attempt}-{i}", templates={"face": newcomers[i]}, model_id=MODEL)
            outcomes[kind].append(engines[kind].enroll(person).outcome)

        times = [in_turns(i, lambda kind, i=i: enrol(kind, i)) for i in range(len(newcomers))][2:]
    return {"enrolments": times, "same": outcomes["clear"] == outcomes["encrypted"]}


def compared(task: str, times: list[Pair]) -> dict[str, Any]:
    times = [pair for pair in times if pair]
    ratios = [pair["clear"] / pair["encrypted"] for pair in times]
    middle = {kind: round(float(np.median([pair[kind] for pair in times])), 4) for kind in KINDS}
    return {
        f"{task}, clear, s": middle["clear"],
        f"{task}, encrypted, s": middle["encrypted"],
        f"{task}, times as fast": round(float(np.median(ratios)), 2),
        f"{task}, times as fast, from and to": [round(min(ratios), 2), round(max(ratios), 2)],
    }


def measured(folder: Path, subjects: int) -> dict[str, Any]:
    warm, pairs = Pairs(folder / "warm", 20_000), Pairs(folder, subjects)
    warm.stage("load 0", lambda: warm.load(0))
    for kind in KINDS:  # kernels are compiled
        with warm.open(kind) as engine:
            engine.search({"face": warm.probes(BATCH)}, k=10)
    sealing, unsealing = pairs.stage("AES", lambda: aes_speed(folder))
    pieces = -(-subjects // PIECE)
    loads = [pairs.stage(f"load {number}", lambda number=number: pairs.load(number)) for number in range(pieces)]
    found = pairs.stage("searches", lambda: searches(pairs))
    opened: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        opened[kind] = pairs.stage(f"opening, {kind}", lambda kind=kind: in_new_process(folder, subjects, kind))
    enrolled = pairs.stage("enrolments", lambda: enrolments(pairs))

    facts: dict[str, Any] = {"subjects": subjects, "AES-256-GCM, sealing, GB/s": round(sealing, 2)}
    facts["AES-256-GCM, opening, GB/s"] = round(unsealing, 2)
    if any(loads):
        facts |= compared(f"load of {min(PIECE, subjects)}", loads)
    for task in ("batch", "one probe"):
        facts |= compared(task, found[task])
    facts |= compared("one enrolment", enrolled["enrolments"])
    for kind, figures in opened.items():
        facts |= {f"{kind}: {name}": round(value, 2) for name, value in figures.items()}
    sealed, clear = opened["encrypted"], opened["clear"]
    extra = sealed["open and first search, s"] - clear["open and first search, s"]
    facts["decryption of what a scan reads, s"] = round(extra, 2)
    facts["decryption of what a scan reads, GB/s"] = round((sealed[OWN] - clear[OWN]) / 1e3 / extra, 2)
    facts["mates that are first"] = found["mates that are first"]
    facts["same answers"] = found["same"] and enrolled["same"]
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=SUBJECTS)
    parser.add_argument("--folder", type=Path, help="keeps the galleries here, and resumes; by default nothing is kept")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        facts = measured(given.folder or Path(name), given.subjects)
    record("encryption", facts, keep=given.subjects >= SUBJECTS)


if __name__ == "__main__":
    main()
