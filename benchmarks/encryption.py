"""What encryption costs: the same gallery in the clear and encrypted, measured in turns.

    python benchmarks/encryption.py                   200,000 subjects, 128 numbers each
    python benchmarks/encryption.py --subjects 20000  the smoke size; keeps no result

Figures are processor time, on the same rows in the same run, the best of several rounds. The answers of both galleries are compared. The first search of an opened gallery decrypts what a scan reads.
"""

from __future__ import annotations

import argparse
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from report import model_ids, record

import biodedup as bd
from biodedup.gallery.files.encryption.keyring import Key
from biodedup.gallery.files.encryption.sealed_file import SealedMap, SealedWriter
from biodedup.gallery.files.handles import LocalFile
from biodedup.synthetic.vectors import mates_of, population

SUBJECTS, DIMENSION, BATCH, ROUNDS, ENROLMENTS = 200_000, 128, 256, 3, 150
MODEL = model_ids("face", DIMENSION)
TASKS = ("load", "first search", "batch", "one probe", "enrolments")
_AES_BYTES = 1 << 26


def seconds(action: Callable[[], object]) -> float:
    """Processor time of all threads: other work on the machine hardly changes it."""
    started = time.process_time()
    action()
    return time.process_time() - started


def aes_speed(folder: Path) -> tuple[float, float]:
    """(sealing, opening) of one file, GB/s on one thread, the disk's share included; in blocks of 64 KiB."""
    key, content = Key(secrets.token_bytes(32)), np.random.default_rng(0).bytes(_AES_BYTES)

    def seal() -> None:
        writer = SealedWriter(LocalFile(folder / "sealed"), key, "sealed", 1 << 16)
        writer.write(content)
        writer.finish()

    def unseal() -> None:
        SealedMap.of(os.open(folder / "sealed", os.O_RDONLY), key, "sealed").need(0, _AES_BYTES)

    best = [min(seconds(action) for _ in range(ROUNDS)) for action in (seal, unseal)]
    return _AES_BYTES / best[0] / 1e9, _AES_BYTES / best[1] / 1e9


def measured(folder: Path, subjects: int, keys: Callable[[], bytes] | None, round_number: int) -> dict[str, Any]:
    """Seconds of each task on a new gallery, and the answers."""
    config, gallery = bd.Config(keys=keys), folder / f"{'encrypted' if keys else 'plain'}-{round_number}"
    vectors = population(subjects, seed=1)
    probes = mates_of(vectors[:BATCH], np.full(len(vectors[:BATCH]), 0.7), seed=2)
    newcomers = population(ENROLMENTS, seed=3)
    times: dict[str, Any] = {}
    with bd.Engine.open(gallery, config) as engine:
        names = [f"s{i}" for i in range(subjects)]
        times["load"] = seconds(lambda: engine.add_templates(names, {"face": vectors}, model_id=MODEL))
    with bd.Engine.open(gallery, config) as engine:
        times["first search"] = seconds(lambda: engine.search({"face": probes[:1]}, k=10))
        found = engine.search({"face": probes}, k=10)
        times["answers"] = found.ids.tolist(), found.similarity.tolist()
        times["batch"] = min(seconds(lambda: engine.search({"face": probes}, k=10)) for _ in range(ROUNDS))
        one = [seconds(lambda i=i: engine.search({"face": probes[i : i + 1]}, k=10)) for i in range(64)]
        times["one probe"] = float(np.median(one))

        def enrol() -> None:
            for i, vector in enumerate(newcomers):
                engine.enroll(bd.Encounter(f"n{i}", templates={"face": vector}, model_id=MODEL))

        engine.enroll(bd.Encounter("first", templates={"face": -newcomers[0]}, model_id=MODEL))
        times["enrolments"] = seconds(enrol)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=SUBJECTS)
    parser.add_argument("--folder", type=Path, help="where the galleries are made; a temporary folder by default")
    given = parser.parse_args()
    key = secrets.token_bytes(32)
    runs: dict[str, list[dict[str, Any]]] = {"plain": [], "encrypted": []}
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        sealing, opening = aes_speed(Path(name))
        measured(Path(name), 2_000, None, -1)  # kernels are compiled
        for number in range(2):
            runs["plain"].append(measured(Path(name), given.subjects, None, number))
            runs["encrypted"].append(measured(Path(name), given.subjects, lambda: key, number))
    facts: dict[str, Any] = {"subjects": given.subjects, "AES-256-GCM, sealing, GB/s": round(sealing, 2)}
    facts["AES-256-GCM, opening, GB/s"] = round(opening, 2)
    for task in TASKS:
        plain, encrypted = (min(run[task] for run in runs[kind]) for kind in ("plain", "encrypted"))
        facts |= {f"{task}, encrypted, s": round(encrypted, 4), f"{task}, in the clear, s": round(plain, 4)}
        facts[f"{task}, times as fast"] = round(plain / encrypted, 2)
    facts["same answers"] = all(run["answers"] == runs["plain"][0]["answers"] for kind in runs.values() for run in kind)
    record("encryption", facts, keep=given.subjects >= SUBJECTS)


if __name__ == "__main__":
    main()
