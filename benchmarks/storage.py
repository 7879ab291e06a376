"""The gallery as a storage engine: bulk load, opening, look-ups, memory, durable enrolments, at ten million rows.

    python benchmarks/storage.py                  ten million subjects, 128 numbers each (6 GB of disk for source and gallery)
    python benchmarks/storage.py --subjects 20000 the smoke size; keeps no result

The source is a Parquet file of synthetic embeddings (ids of 16 characters). Each figure of reading is taken in a process of its
own, so that nothing is warm but the system's page cache. Recall is against exact float32 search on the same rows.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from report import model_ids, record

import biodedup as bd
from biodedup import jobs
from biodedup.gallery.files.codes import dequantise, quantise
from biodedup.synthetic.vectors import mates_of, population
from biodedup.testing import internals

SUBJECTS, DIMENSION, PIECE, PROBES = 10_000_000, 128, 100_000, 64
MODEL = model_ids("face", DIMENSION)
THREADS, ENROLMENTS = 8, 2_000


def piece(index: int, rows: int) -> np.ndarray:
    """float32 (rows, 128): the embeddings of one piece of the population, the same on every run."""
    return population(rows, seed=1000 + index)


def subject_id(row: int) -> str:
    return f"{row * 2654435761 % 10**10:010d}{row % 10**6:06d}"  # spread, as a register's numbers are, and unique


def write_source(path: Path, count: int) -> None:
    schema = pa.schema({"subject_id": pa.string(), "face": pa.list_(pa.float32(), DIMENSION)})
    with pa.parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for index, low in enumerate(range(0, count, PIECE)):
            rows = min(PIECE, count - low)
            ids = pa.array([subject_id(row) for row in range(low, low + rows)])
            cells = pa.FixedSizeListArray.from_arrays(pa.array(piece(index, rows).reshape(-1)), DIMENSION)
            writer.write_batch(pa.record_batch([ids, cells], schema=schema))


def load(source: Path, gallery: Path, count: int) -> dict[str, Any]:
    marks: list[tuple[float, int]] = []
    started = time.perf_counter()
    with bd.Engine.open(gallery) as engine:
        jobs.load(
            engine,
            source,
            model_id=MODEL,
            progress=lambda stage, done, total: marks.append((time.perf_counter(), done)),
        )
        whole = time.perf_counter() - started
        assert len(engine) == count
        segments = engine.info()["segments"]
    last = [mark for mark in marks if mark[1] >= 0.9 * count]
    started = time.perf_counter()
    with bd.Engine.open(gallery) as engine:
        again = jobs.load(engine, source, model_id=MODEL)
    assert (again.added, again.present) == (0, count)
    return {
        "loaded, subjects a second": round(count / whole),
        "the last tenth, subjects a second": round((last[-1][1] - last[0][1]) / (last[-1][0] - last[0][0]))
        if len(last) > 1
        else None,
        "loaded again (nothing to do), subjects a second": round(count / (time.perf_counter() - started)),
        "segments after it": segments,
        "peak memory of the load, MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "disk, bytes a subject": round(sum(f.stat().st_size for f in gallery.rglob("*") if f.is_file()) / count, 1),
    }


def resident() -> dict[str, int]:
    """Bytes of this process in memory: all, its own, and those of mapped files (which the system may drop at any time)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.partition(":") for line in lines)
    return {key: 1024 * int(text.split()[0]) for key, _, text in fields if key in ("VmRSS", "RssAnon", "RssFile")}


def read(gallery: Path, count: int) -> dict[str, Any]:
    base = resident()
    probe = mates_of(piece(0, min(PIECE, count))[:1], np.array([0.6]))
    started = time.perf_counter()
    engine = bd.Engine.open(gallery, read_only=True)
    opened = time.perf_counter() - started
    with engine:
        ids, _ = engine.search({"face": probe}, k=10)
        first = time.perf_counter() - started
        assert ids[0, 0] == subject_id(0)
        after = resident()
        singles = timed(lambda i: engine.search({"face": probe}, k=10), 20)
        rows = np.random.default_rng(5).integers(count, size=1000).tolist()
        known = timed(lambda i: subject_id(rows[i]) in engine, 1000)
        unknown = timed(lambda i: f"x{rows[i]}" in engine, 1000)
    codes_and_ids = count * (DIMENSION + 4 + 16 + 8)
    return {
        "open, s": round(opened, 3),
        "open and first search, s": round(first, 2),
        "one probe, p50 ms": round(float(np.median(singles)), 1),
        "subject look-up, p50 / p99 us": f"{np.median(known) * 1e3:.0f} / {np.quantile(known, 0.99) * 1e3:.0f}",
        "absent subject, p50 / p99 us": f"{np.median(unknown) * 1e3:.0f} / {np.quantile(unknown, 0.99) * 1e3:.0f}",
        "resident, of its own / mapped files, MB": f"{after['RssAnon'] >> 20} / {after['RssFile'] >> 20}",
        "resident of the whole process / (codes + ids)": round(after["VmRSS"] / codes_and_ids, 2),
        "grown since before opening / (codes + ids)": round((after["VmRSS"] - base["VmRSS"]) / codes_and_ids, 2),
    }


def timed(call: Any, times: int) -> list[float]:
    """Milliseconds of each call."""
    took = []
    for i in range(times):
        started = time.perf_counter()
        call(i)
        took.append(1000 * (time.perf_counter() - started))
    return took


def recall(gallery: Path, count: int) -> dict[str, Any]:
    """Against exact float32 search, piece by piece."""
    first = piece(0, min(PIECE, count))
    probes = mates_of(first[:PROBES], np.repeat([0.4, 0.5, 0.6, 0.8], PROBES // 4))
    best = np.full((PROBES, 0), 0.0, np.float32)
    rows = np.zeros((PROBES, 0), np.int64)
    for index, low in enumerate(range(0, count, PIECE)):
        cosines = probes @ piece(index, min(PIECE, count - low)).T
        best = np.concatenate([best, cosines], axis=1)
        rows = np.concatenate([rows, np.broadcast_to(np.arange(low, low + cosines.shape[1]), cosines.shape)], axis=1)
        order = np.argsort(-best, axis=1)[:, :10]
        best, rows = np.take_along_axis(best, order, axis=1), np.take_along_axis(rows, order, axis=1)
    exact = np.vectorize(subject_id, otypes=[object])(rows)
    with bd.Engine.open(gallery, read_only=True) as engine:
        started = time.perf_counter()
        ids, _ = engine.search({"face": probes}, k=10)
        took = time.perf_counter() - started
    same = [len(set(a) & set(b)) / 10 for a, b in zip(ids, exact, strict=True)]
    codes, scales = quantise(first[:2000])
    changed = probes[:32] @ dequantise(codes, scales).T - probes[:32] @ first[:2000].T
    found = [subject_id(row) in ids[row] for row in range(PROBES) if subject_id(row) in exact[row]]
    return {
        f"batch of {PROBES}, probes a second": round(PROBES / took, 1),
        "recall@10 against float32": round(float(np.mean(same)), 4),
        "mates of the exact first 10 that are found": round(float(np.mean(found)), 4),
        "cosine changed by eight bits, mean / sd": f"{changed.mean():.1e} / {changed.std():.1e}",
    }


def care(gallery: Path, count: int) -> dict[str, Any]:
    """Checking, copying and merging everything."""
    with bd.Engine.open(gallery) as engine:
        started = time.perf_counter()
        assert engine.problems() == []
        checked = time.perf_counter() - started
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            started = time.perf_counter()
            copied = engine.backup(Path(folder) / "b")
            backed_up = time.perf_counter() - started
        engine.remove(subject_id(0))
        started = time.perf_counter()
        engine.compact()
        merged = time.perf_counter() - started
        assert len(engine) == count - 1
    return {
        "doctor's check, subjects a second": round(count / checked),
        "backup, MB a second": round(copied.byte_count / backed_up / 1e6),
        "compaction of all, subjects a second": round(count / merged),
        "peak memory of these, MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def enrolments(count: int) -> dict[str, Any]:
    """Single durable enrolments into a small gallery, so that next to nothing is the search's. Fewer at a smoke size."""
    single = min(ENROLMENTS, count // 100)
    gallery = bd.GalleryConfig(seal_rows=min(bd.GalleryConfig().seal_rows, count // 5))
    vectors = population(THREADS * single, seed=7)
    took: list[float] = []
    with (
        tempfile.TemporaryDirectory(dir=Path.cwd()) as folder,
        bd.Engine.open(Path(folder) / "g", bd.Config(gallery=gallery)) as engine,
    ):

        def encounter(row: int) -> bd.Encounter:
            return bd.Encounter(f"s{row}", templates={"face": vectors[row]}, encounter_id=f"e{row}", model_id=MODEL)

        def work(thread: int) -> None:
            for i in range(single // THREADS):
                started = time.perf_counter()
                engine.enroll(encounter(thread * single + i))
                took.append(1000 * (time.perf_counter() - started))

        threads = [threading.Thread(target=work, args=(t,)) for t in range(THREADS)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rate = len(took) / (time.perf_counter() - started)
        alone = [encounter(single // 2 + i) for i in range(single // 4)]
        searched = timed(lambda i: engine.identify(alone[i]), len(alone))
        enrolled = timed(lambda i: engine.enroll(alone[i]), len(alone))
        overhead = np.array(enrolled) - np.median(searched)
        more = (
            engine.config.gallery.seal_rows - 2 * len(engine)
        ) // 2 - 1  # a tail that holds a row for each encounter
        others = population(more, seed=8)
        stream = (
            bd.Encounter(f"t{i}", templates={"face": vector}, encounter_id=f"t{i}") for i, vector in enumerate(others)
        )
        started = time.perf_counter()
        together = sum(decision.outcome == "unique" for decision in engine.enroll_many(stream))
        batched = together / (time.perf_counter() - started)
        started = time.perf_counter()
        internals(engine).gallery.seal()
        sealed = time.perf_counter() - started
    return {
        f"durable enrolments a second, {THREADS} threads": round(rate),
        f"of one enrolment, {THREADS} threads, p50 / p99 ms": f"{np.median(took):.1f} / {np.quantile(took, 0.99):.1f}",
        "commit overhead, one thread, p50 / p99 ms": f"{np.median(overhead):.1f} / {np.quantile(overhead, 0.99):.1f}",
        "durable enrolments a second, one enroll_many": round(batched),
        "sealing a full tail holds commits up for, ms": round(1000 * sealed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=SUBJECTS)
    parser.add_argument("--folder", type=Path, help="keep source and gallery here, and use what is there")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    count = arguments.subjects
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        source, gallery = folder / f"{count}.parquet", folder / f"{count}.gallery"
        stages = {"load": lambda: load(source, gallery, count), "read": lambda: read(gallery, count),
                  "recall": lambda: recall(gallery, count), "care": lambda: care(gallery, count), "enrolments": lambda: enrolments(count)}  # fmt: skip
        if arguments.stage:
            print(json.dumps(stages[arguments.stage]()))
            return
        if not source.exists():
            write_source(source, count)
        figures: dict[str, Any] = {"subjects": count, "dimension": DIMENSION}
        for stage in stages:
            command = [sys.executable, __file__, "--subjects", str(count), "--folder", str(folder), "--stage", stage]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            figures |= json.loads(done.stdout)
        record("storage", figures, keep=count == SUBJECTS)


if __name__ == "__main__":
    main()
