"""A gallery joined with itself: time, and the share of planted duplicates that is found, against exact search.

    python benchmarks/selfjoin.py --rows 10e6 --folder /somewhere   hours; interrupted, it goes on where it was
    python benchmarks/selfjoin.py                                   a million rows
    python benchmarks/selfjoin.py --rows 20000                      the smoke size; keeps no result

Planted: one duplicate for every thousand rows, at a cosine from the mated distribution measured on faces (normal, mean 0.66 and
deviation 0.115, at most 0.98: median and 5 % point of SFace on LFW). Exact search of the duplicates alone, in float32, says
which of the planted pairs reach the threshold; the threshold is a similarity, by default 0.6, turned into decibels by the gallery's own
calibration.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from report import model_ids, record

import biodedup as bd
from biodedup import jobs
from biodedup.synthetic.vectors import mates_of
from biodedup.testing import internals

ROWS, DIMENSION, BATCH, KEPT = 1_000_000, 128, 1 << 16, (1_000_000, 10_000_000)


def batch(index: int, rows: int) -> np.ndarray:
    vectors = np.random.default_rng([11, index]).standard_normal((rows, DIMENSION), np.float32)
    return vectors / np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None]


def planted(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Duplicates float32 (n, 128), the row of each one's mate, and their cosines."""
    count = rows // 1000
    rng = np.random.default_rng(12)
    cosines = np.clip(rng.normal(0.66, 0.115, count), 0.0, 0.98)
    whose = np.sort(rng.choice(rows, count, replace=False))
    mates = np.empty((count, DIMENSION), np.float32)
    for index, low in enumerate(range(0, rows, BATCH)):
        mine = (whose >= low) & (whose < low + BATCH)
        mates[mine] = batch(index, min(BATCH, rows - low))[whose[mine] - low]
    return mates_of(mates, cosines, seed=13), whose, np.einsum("ij,ij->i", mates_of(mates, cosines, seed=13), mates)


def build(gallery: Path, rows: int) -> None:
    with bd.Engine.open(gallery) as engine:
        for index, low in enumerate(range(0, rows, BATCH)):
            count = min(BATCH, rows - low)
            if low + count > len(engine):
                engine.add_templates(
                    [f"s{row}" for row in range(low, low + count)],
                    {"face": batch(index, count)},
                    model_id=model_ids("face", 128),
                )
        vectors, whose, _ = planted(rows)
        for low in range(max(len(engine) - rows, 0), len(vectors), BATCH):
            names = [f"d{row}" for row in whose[low : low + BATCH]]
            engine.add_templates(names, {"face": vectors[low : low + BATCH]})
        # what is in the journal is compared with everybody, whatever else a join does
        if engine.info()["sealed_rows"] < len(engine):
            engine.compact()


def join(gallery: Path, rows: int, folder: Path, similarity: float) -> dict[str, Any]:
    notes = folder / f"{rows}.seconds.json"
    before = json.loads(notes.read_text()) if notes.exists() else 0.0
    started = time.perf_counter()

    def progress(stage: str, done: int, total: int) -> None:
        notes.write_text(json.dumps(before + time.perf_counter() - started))

    with bd.Engine.open(gallery, read_only=True) as engine:
        probe = bd.Template("face", engine.info()["columns"]["face"]["model_id"], batch(0, 1)[0])
        threshold_db = float(internals(engine).comparer.score_db(probe, np.array([similarity], np.float32))[0])
        result = jobs.find_duplicates(engine, folder / f"{rows}.pairs.parquet", threshold_db=threshold_db, progress=progress)  # fmt: skip
    seconds = before + time.perf_counter() - started
    notes.unlink(missing_ok=True)
    links = {frozenset(link.subject_ids) for cluster in result.clusters for link in cluster.links}
    _, whose, cosines = planted(rows)
    exact = {frozenset((f"s{row}", f"d{row}")) for row in whose[cosines >= similarity]}
    edge = {frozenset((f"s{row}", f"d{row}")) for row in whose[np.abs(cosines - similarity) < 0.002]}
    everybody = {frozenset((f"s{row}", f"d{row}")) for row in whose}
    pairs = result.subjects * (result.subjects - 1) / 2
    return {
        "rows": rows,
        "planted duplicates": len(whose),
        "threshold, similarity": similarity,
        "plan": result.plan,
        "minutes": round(seconds / 60, 2),
        "1e9 pairs a second": round(pairs / seconds / 1e9, 2),
        "found of all planted": round(len(links & everybody) / len(everybody), 4),
        "exact search finds": round(len(exact) / len(everybody), 4),
        "of those, found": round(len(links & exact) / max(len(exact), 1), 5),
        "lacking, but for those within 0.002 of the threshold": len(exact - links - edge),
        "pairs of strangers": len(links - everybody),
        "hours for 200 million on 64 cores, extrapolated": round(
            seconds / 3600 * (200e6 / result.subjects) ** 2 * (os.cpu_count() or 1) / 64, 1
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, default=ROWS)
    parser.add_argument("--similarity", type=float, default=0.6)
    parser.add_argument("--folder", type=Path, help="keep the gallery here, and use what is there")
    arguments = parser.parse_args()
    rows = int(arguments.rows)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        build(folder / f"{rows}.gallery", rows)
        record("selfjoin", join(folder / f"{rows}.gallery", rows, folder, arguments.similarity), keep=rows in KEPT)


if __name__ == "__main__":
    main()
