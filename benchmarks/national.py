"""A national register on one machine: builds, opens and searches a gallery of 200 million subjects.

    python benchmarks/national.py --rows 200e6 --folder /somewhere    36 GB of disk; goes on where it was interrupted
    python benchmarks/national.py --index faiss:IVF2048,PQ64x4fs      the same with the FAISS engine
    python benchmarks/national.py --rows 2e6                          the smoke size; keeps no result

Isotropic embeddings of 128 numbers from a seeded generator, which makes any batch of them again at any time. Probes are mates of
enrolled subjects at stated cosines. Peer: FAISS's bare fast-scan kernel (PQ64x4fs, 32 bytes a row) over codes of the same rows, in
pieces of 20 million so that both fit beside each other, the same probes, in a process of its own.

Every stage runs in a process of its own; the build notes its time in `progress.json`, however often it is interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from report import model_ids, record

import biodedup as bd
from biodedup.synthetic.vectors import mates_of
from biodedup.testing import internals

ROWS, DIMENSION, BATCH, K = 200_000_000, 128, 1 << 16, 100
COSINES = (0.4, 0.45, 0.5, 0.6, 0.7, 0.8)
PROBES, FEW = 1008, 64
"""A large batch, as many at each cosine, and a small one."""
PEER_PIECE = 20_000_000


def batch(index: int, rows: int) -> np.ndarray:
    """float32 (rows, 128), unit rows: one batch of the population, the same on every run."""
    vectors = np.random.default_rng([2026, index]).standard_normal((rows, DIMENSION), np.float32)
    vectors /= np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None]
    return vectors


def subject_id(row: int) -> str:
    return f"{row:010d}"


def batches(rows: int) -> list[int]:
    """The size of each."""
    return [min(BATCH, rows - low) for low in range(0, rows, BATCH)]


def probes_of(rows: int) -> tuple[np.ndarray, list[int]]:
    """Mates of subjects of the first batch: float32 (PROBES, 128), and whose they are."""
    whose = list(range(0, min(BATCH, rows), min(BATCH, rows) // PROBES))[:PROBES]
    return mates_of(batch(0, min(BATCH, rows))[whose], np.repeat(COSINES, PROBES // len(COSINES))), whose


def memory_mb() -> dict[str, int]:
    """Of this process: its own, and what it has mapped of files, which the system takes back when it needs it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(status[name].split()[0]) // 1024 for key, name in (("own", "RssAnon"), ("mapped", "RssFile"), ("peak", "VmHWM"))}  # fmt: skip


def build(gallery: Path, rows: int, notes: Path, engine_text: str) -> dict[str, Any]:
    noted = json.loads(notes.read_text()) if notes.exists() else {"seconds": 0.0, "own peak": 0}
    started = time.perf_counter()
    peak = noted["own peak"]

    def note(done: int) -> None:
        content = {"seconds": noted["seconds"] + time.perf_counter() - started, "own peak": peak, "rows": done}
        notes.with_suffix(".new").write_text(json.dumps(content))
        os.replace(notes.with_suffix(".new"), notes)

    with bd.Engine.open(gallery, bd.Config(gallery=bd.GalleryConfig(index=engine_text))) as engine:
        low = 0
        for index, count in enumerate(batches(rows)):
            if low + count > len(engine):  # a batch is there as a whole or not at all
                ids = [subject_id(row) for row in range(low, low + count)]
                engine.add_templates(ids, {"face": batch(index, count)}, model_id=model_ids("face", 128))
                peak = max(peak, memory_mb()["own"])
                if index % 16 == 0:
                    note(low + count)
                    done, rate = low + count, (low + count) / (noted["seconds"] + time.perf_counter() - started)
                    print(f"{done:,} rows, {rate:,.0f} a second", file=sys.stderr, flush=True)
            low += count
        engine.maintain()
        note(rows)
        segments = engine.info()["segments"]
    seconds = json.loads(notes.read_text())["seconds"]
    disk = sum(file.stat().st_size for file in gallery.rglob("*") if file.is_file())
    return {
        "built in, minutes": round(seconds / 60, 1),
        "built, rows a second": round(rows / seconds),
        "build, peak of its own memory, MB": peak,
        "segments": segments,
        "disk, GB": round(disk / 1e9, 2),
        "disk, bytes a row": round(disk / rows, 1),
    }


def search(gallery: Path, rows: int) -> dict[str, Any]:
    probes, whose = probes_of(rows)
    peaks = {"own": 0, "mapped": 0}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            now = memory_mb()
            peaks.update({key: max(peaks[key], now[key]) for key in peaks})

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    figures: dict[str, Any] = {}
    started = time.perf_counter()
    with bd.Engine.open(gallery, read_only=True) as engine:
        figures["opened in, s"] = round(time.perf_counter() - started, 2)
        engine.search({"face": probes[:1]}, k=10)
        figures["opened, with the first search, s"] = round(time.perf_counter() - started, 2)
        searcher, snapshot = internals(engine).searcher, internals(engine).gallery.snapshot()
        searcher.nearest(snapshot, "face", probes[:FEW], K)
        for size in (FEW, PROBES):
            took = []
            for low in range(0, 4 * FEW if size == FEW else size, size):
                started = time.perf_counter()
                found = searcher.nearest(snapshot, "face", probes[low : low + size], K)
                took.append((time.perf_counter() - started) / size)
            figures[f"batches of {size}, probes a second"] = round(1 / float(np.mean(took)), 2)
        assert found.rows_scanned == rows
        figures["rows a second"] = float(f"{rows / float(np.mean(took)):.3g}")
        figures["compared exactly, a probe"] = round(found.compared / PROBES)
        cosines = np.repeat(COSINES, PROBES // len(COSINES))
        ranks = np.array([np.flatnonzero(ours == row)[0] + 1 if row in ours else 0 for ours, row in zip(found.rows, whose, strict=True)])  # fmt: skip
        for cosine in COSINES:
            mine = ranks[cosines == cosine]
            shares = [float(np.mean((mine > 0) & (mine <= n))) for n in (1, 10, K)]
            figures[f"mates at {cosine}: first / in 10 / in {K}"] = " / ".join(f"{share:.3f}" for share in shares)
        single = []
        for probe in probes[:40]:
            started = time.perf_counter()
            engine.search({"face": probe[None]}, k=10)
            single.append(time.perf_counter() - started)
        figures["one probe, p50 / p99 s"] = f"{np.median(single):.3f} / {np.quantile(single, 0.99):.3f}"
    stop.set()
    watcher.join()
    figures["search, peak of its own memory, MB"] = peaks["own"]
    figures["search, peak with mapped files, MB"] = peaks["own"] + peaks["mapped"]
    return figures


def peer(rows: int, some: int) -> dict[str, Any]:
    """FAISS's bare kernel on the first `some` of the rows; its time for all of them."""
    import faiss

    probes, whose = probes_of(rows)
    index = faiss.index_factory(DIMENSION, "PQ64x4fs", faiss.METRIC_INNER_PRODUCT)
    index.train(batch(0, min(BATCH, rows)))
    seconds = {FEW: 0.0, PROBES: 0.0}
    best, best_rows = np.zeros((PROBES, 0), np.float32), np.zeros((PROBES, 0), np.int64)
    sizes = batches(some)
    low = 0
    for number, count in enumerate(sizes):
        index.add(batch(number, count))
        if index.ntotal >= min(PEER_PIECE, some) or number == len(sizes) - 1:
            index.search(probes[:FEW], K)
            for size in seconds:
                started = time.perf_counter()
                similarity, near = index.search(probes[:size], K)
                seconds[size] += (time.perf_counter() - started) / size * rows / some
            best = np.concatenate([best, similarity], axis=1)
            best_rows = np.concatenate([best_rows, near + low], axis=1)
            low += index.ntotal
            index.reset()
            print(f"{low:,} rows of the peer", file=sys.stderr, flush=True)
    order = np.argsort(-best, axis=1)[:, :K]
    found = np.take_along_axis(best_rows, order, axis=1)
    cosines = np.repeat(COSINES, PROBES // len(COSINES))
    has = np.array([row in ours for ours, row in zip(found, whose, strict=True)])
    figures: dict[str, Any] = {"rows of the peer": some}
    figures |= {f"FAISS PQ64x4fs, batches of {size}, probes a second": round(1 / s, 2) for size, s in seconds.items()}
    shares = [f"{has[cosines == cosine].mean():.3f}" for cosine in COSINES]
    return figures | {f"FAISS, mates in {K} at {' / '.join(map(str, COSINES))}": " / ".join(shares)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, default=ROWS)
    parser.add_argument("--folder", type=Path, help="keep the gallery here, and use what is there")
    parser.add_argument("--only", choices=["build", "search", "peer"], help="one stage")
    parser.add_argument("--peer-rows", type=float, help="of them, that the peer searches; its time is multiplied")
    parser.add_argument("--index", default="native", help="the index engine: native, or faiss:FACTORY")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rows = int(arguments.rows)
    some = min(int(arguments.peer_rows or rows), rows)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        name = str(rows) if arguments.index == "native" else f"{rows}.faiss"
        gallery, notes = folder / f"{name}.gallery", folder / f"{name}.progress.json"
        stages = {"build": lambda: build(gallery, rows, notes, arguments.index), "search": lambda: search(gallery, rows),
                  "peer": lambda: peer(rows, some)}  # fmt: skip
        if arguments.stage:
            print(json.dumps(stages[arguments.stage]()))
            return
        figures: dict[str, Any] = {"rows": rows, "dimension": DIMENSION, "index": arguments.index}
        for stage in [arguments.only] if arguments.only else stages:
            command = [sys.executable, __file__, "--rows", str(rows), "--folder", str(folder), "--stage", stage]
            command += ["--peer-rows", str(some), "--index", arguments.index]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            figures |= json.loads(done.stdout)
        ours, theirs = (figures.get(f"{who}batches of {PROBES}, probes a second") for who in ("", "FAISS PQ64x4fs, "))
        if ours and theirs:
            figures["times the bare FAISS kernel's probes a second"] = round(ours / theirs, 2)
        record("national", figures, keep=rows == ROWS and not arguments.only)


if __name__ == "__main__":
    main()
