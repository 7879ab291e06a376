"""Searching, against peers in the same run: raw FAISS, usearch and hnswlib, each with the share of mates that it finds.

    python benchmarks/speed.py                             1 and 10 million rows of 128 and of 512 numbers; hours, 20 GB of disk
    python benchmarks/speed.py --rows 10e6 --dimension 128  one of the four
    python benchmarks/speed.py --rows 10e6 --index faiss:IVF2048,PQ64x4fs   our FAISS engine against the same index of raw FAISS
    python benchmarks/speed.py --rows 1e6 --no-peers         without usearch, hnswlib and FAISS flat, which take minutes
    python benchmarks/speed.py --rows 30000 --dimension 128 --mates 64   the smoke size; keeps no result

Isotropic embeddings; mates at given cosines in random directions. Ours and the FAISS index take turns, batch by batch, so that what
else the machine does falls on both. `of at least`: the search asks for rows of at least this similarity alone, as a decision does. `candidates`: share of mates among the 1,000 best; `in place`: of mates whose rank is the very
one that exact float32 search gives them. usearch and hnswlib are asked for where they are installed (extra `bench`), hnswlib up to
a million rows, since it takes hours to build.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from report import model_ids, record

import biodedup as bd
from biodedup.synthetic.vectors import mates_of
from biodedup.testing import internals

SIZES = [(1_000_000, 128), (1_000_000, 512), (10_000_000, 128), (10_000_000, 512)]
PIECE, COSINES, K, CANDIDATES = 1 << 16, (0.4, 0.5, 0.6, 0.7, 0.8), 10, 1_000
BATCHES = (1, 16, 256)
LEAST = 0.45  # below the mates that a search must find, above most impostors
LOADS = (0.25, 0.5, 0.75)


def piece(index: int, rows: int, dimension: int) -> np.ndarray:
    """float32 (rows, dimension), unit rows, the same on every run."""
    vectors = np.random.default_rng([7, index]).standard_normal((rows, dimension), np.float32)
    return vectors / np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None]


def pieces(rows: int) -> list[tuple[int, int, int]]:
    """(number, first row, rows) of each."""
    return [(index, low, min(PIECE, rows - low)) for index, low in enumerate(range(0, rows, PIECE))]


def timed(call: Callable[[np.ndarray], Any], probes: np.ndarray, size: int, seconds: float) -> list[float]:
    """Seconds of each batch, for about so long, three at least."""
    took: list[float] = []
    while len(took) < 3 or (sum(took) < seconds and len(took) < 200):
        low = len(took) * size % (len(probes) - size + 1)
        started = time.perf_counter()
        call(probes[low : low + size])
        took.append(time.perf_counter() - started)
    return took


def told(took: list[float], size: int, rows: int) -> dict[str, Any]:
    rate = size / float(np.median(took))
    return {
        "probes/s": float(f"{rate:.4g}"),
        "p50 ms": float(f"{1000 * np.median(took):.4g}"),
        "p99 ms": float(f"{1000 * np.quantile(took, 0.99):.4g}"),
        "1e9 rows/s/core": round(rate * rows / 1e9 / (os.cpu_count() or 1), 3),
    }


def exact_ranks(probes: np.ndarray, whose: np.ndarray, rows: int) -> np.ndarray:
    """The rank of each probe's mate by exact float32 search, int64 (q,), 1 for the first. whose: rows of the first piece."""
    dimension = probes.shape[1]
    own = np.einsum("ij,ij->i", probes, piece(0, min(rows, PIECE), dimension)[whose])
    ranks = np.ones(len(probes), np.int64)
    for i, _, n in pieces(rows):
        vectors = piece(i, n, dimension)
        for start in range(0, len(probes), 512):
            some = slice(start, start + 512)
            above = probes[some] @ vectors.T > own[some, None]
            if i == 0:
                above[np.arange(len(above)), whose[some]] = False
            ranks[some] += np.count_nonzero(above, axis=1)
    return ranks


def measure(
    rows: int, dimension: int, mates: int, seconds: float, engine_text: str, peers: bool = True
) -> dict[str, Any]:
    whose = np.random.default_rng(1).permutation(min(rows, PIECE))[: mates * len(COSINES)]
    whose = np.resize(whose, mates * len(COSINES))
    cosines = np.tile(COSINES, mates)
    probes = mates_of(piece(0, min(rows, PIECE), dimension)[whose], cosines)
    figures: dict[str, Any] = {"rows": rows, "dimension": dimension, "index": engine_text}
    config = bd.Config(threads=os.cpu_count() or 1, gallery=bd.GalleryConfig(index=engine_text))
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder, bd.Engine.open(Path(folder) / "g", config) as engine:
        started = time.perf_counter()
        for i, low, n in pieces(rows):
            engine.add_templates(
                [f"{row:09d}" for row in range(low, low + n)],
                {"face": piece(i, n, dimension)},
                model_id=model_ids("face", dimension),
            )
        engine.maintain()
        figures["built, rows a second"] = round(rows / (time.perf_counter() - started))
        column = next(part.columns["face"] for part in internals(engine).gallery.snapshot().parts if part.count)
        codec = column.codec
        figures["bytes a row: scanned in memory, in all"] = (
            f"{3 * codec.scanned // 4 + 4} + {codec.rest_bytes} = {3 * codec.scanned // 4 + 4 + codec.rest_bytes}"
            if codec
            else "-"
        )
        lists = 2048 if rows >= 5_000_000 else 256
        spec = (
            f"IVF{lists},PQ64x4fs"
            if engine_text == "native"
            else engine_text.removeprefix("faiss:").partition(",nprobe=")[0]
        )
        figures |= _against_faiss(engine, spec, probes, whose, cosines, seconds)
        if engine_text != "native":
            return figures  # what follows compares the native engine with other peers
        figures |= _found(engine, probes, whose, cosines, rows)
        figures |= _under_load(engine, probes, figures["batch 256"]["probes/s"], seconds)
        figures |= _by_threads(Path(folder) / "g", probes, seconds)
    if not peers:
        return figures
    figures |= _flat(rows, dimension, probes, seconds)
    figures |= _usearch(rows, dimension, probes, whose, cosines, seconds)
    figures |= _hnswlib(rows, dimension, probes, whose, cosines, seconds)
    return figures


def _shares(found: np.ndarray, whose: np.ndarray, cosines: np.ndarray) -> str:
    """Of mates found, at each cosine. found: (q, k) row numbers."""
    has = (found == whose[: len(found), None]).any(axis=1)
    return " / ".join(f"{has[cosines[: len(found)] == cosine].mean():.4f}" for cosine in COSINES)


def _against_faiss(
    engine: bd.Engine, spec: str, probes: np.ndarray, whose: np.ndarray, cosines: np.ndarray, seconds: float
) -> dict[str, Any]:
    rows, dimension = len(engine), probes.shape[1]
    index = faiss.index_factory(dimension, spec, faiss.METRIC_INNER_PRODUCT)
    index.train(piece(0, min(rows, PIECE), dimension))
    for i, _, n in pieces(rows):
        index.add(piece(i, n, dimension))
    if hasattr(index, "nprobe"):
        index.nprobe = index.nlist
    figures: dict[str, Any] = {}
    some = probes[: 5 * 256]
    for least, said in ((None, ""), (LEAST, f", of at least {LEAST}")):

        def search(some: np.ndarray, least: float | None = least) -> bd.SearchResult:
            return engine.search({"face": some}, k=K, min_similarity=least)

        for size in BATCHES:
            ours: list[float] = []
            theirs: list[float] = []
            for _ in range(3):
                ours += timed(search, probes, size, seconds)
                theirs += timed(lambda some: index.search(some, K), probes, size, seconds)
            figures[f"batch {size}{said}"] = told(ours, size, rows)
            figures[f"batch {size}{said}, FAISS {spec}"] = told(theirs, size, rows)
            figures[f"batch {size}{said}, times FAISS {spec}"] = round(float(np.median(theirs) / np.median(ours)), 2)
        names = np.array([[int(name or -1) for name in row] for row in search(some).ids])
        figures[f"mates in {K} at {COSINES}{said}"] = _shares(names, whose, cosines)
    figures[f"mates in {K}, FAISS {spec}"] = _shares(index.search(some, K)[1], whose, cosines)
    return figures


def _found(engine: bd.Engine, probes: np.ndarray, whose: np.ndarray, cosines: np.ndarray, rows: int) -> dict[str, Any]:
    k = min(CANDIDATES, rows)
    found = internals(engine).searcher.nearest(internals(engine).gallery.snapshot(), "face", probes, k).rows
    hit = found == whose[:, None]
    ranks = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, 0)
    exact = exact_ranks(probes, whose, rows)
    figures: dict[str, Any] = {"mates at each cosine": int(np.sum(cosines == COSINES[0]))}
    for name, good in (("candidates", ranks > 0), ("in place", ranks == exact)):
        figures[f"mates, {name}, at {COSINES}"] = " / ".join(f"{good[cosines == c].mean():.4f}" for c in COSINES)
        figures[f"mates, {name}, at 0.5 and above"] = round(float(good[cosines >= 0.5].mean()), 5)
    figures["mates of the exact first 1,000 that are lacking"] = int(np.sum((exact <= k) & (ranks == 0)))
    return figures


def _under_load(engine: bd.Engine, probes: np.ndarray, capacity: float, seconds: float) -> dict[str, Any]:
    """Callers with one probe each, who come at random moments; a probe's time counts from when it came."""
    figures = {}
    with ThreadPoolExecutor(256) as pool:
        for share in LOADS:
            rate = share * capacity
            moments = np.cumsum(np.random.default_rng(2).exponential(1 / rate, max(int(rate * 4 * seconds), 50)))
            started = time.perf_counter()

            def ask(i: int, moments: np.ndarray = moments, started: float = started) -> float:
                engine.search({"face": probes[i % len(probes)][None]}, k=K)
                return time.perf_counter() - started - float(moments[i])

            waiting = []
            for i, moment in enumerate(moments):
                time.sleep(max(started + moment - time.perf_counter(), 0))
                waiting.append(pool.submit(ask, i))
            took = np.array([one.result() for one in waiting])
            served = len(took) / (time.perf_counter() - started)
            figures[f"single probes at {share:.0%} of the rate of batches"] = (
                f"{served:.4g} a second, p50 {1000 * np.median(took):.0f} ms, p99 {1000 * np.quantile(took, 0.99):.0f} ms"
            )
    return figures


def _by_threads(folder: Path, probes: np.ndarray, seconds: float) -> dict[str, Any]:
    """The rate of batches with each number of threads over that with one."""
    rates = {}
    for threads in range(1, (os.cpu_count() or 1) + 1):
        with bd.Engine.open(folder, bd.Config(threads=threads), read_only=True) as other:
            took = timed(lambda some, other=other: other.search({"face": some}, k=K), probes, BATCHES[-1], seconds)
        rates[threads] = BATCHES[-1] / float(np.median(took))
    return {f"batches of {BATCHES[-1]}, times one thread": {n: round(rate / rates[1], 2) for n, rate in rates.items()}}


def _flat(rows: int, dimension: int, probes: np.ndarray, seconds: float) -> dict[str, Any]:
    """FAISS flat, on a million rows; its time grows with the rows."""
    some = min(rows, 1_000_000)
    index = faiss.IndexFlatIP(dimension)
    for i, _, n in pieces(some):
        index.add(piece(i, n, dimension))
    return {f"batch {size}, FAISS flat ({some} rows)": told(timed(lambda p: index.search(p, K), probes, size, seconds), size, some) for size in BATCHES}  # fmt: skip


def _usearch(
    rows: int, dimension: int, probes: np.ndarray, whose: np.ndarray, cosines: np.ndarray, seconds: float
) -> dict[str, Any]:
    try:
        from usearch.index import search
    except ImportError:
        return {"usearch": "not installed"}
    some = min(rows, 1_000_000)
    vectors = np.concatenate([piece(i, n, dimension) for i, _, n in pieces(some)])
    figures: dict[str, Any] = {}
    for kind in ("i8", "f16"):
        stored, asked = ((v * 127).round().astype(np.int8) if kind == "i8" else v.astype(np.float16) for v in (vectors, probes))  # fmt: skip
        for size in (1, 16):
            took = timed(lambda p, stored=stored: search(stored, p, K, exact=True, threads=os.cpu_count()), asked, size, seconds)  # fmt: skip
            figures[f"batch {size}, usearch exact {kind} ({some} rows)"] = told(took, size, some)
    return figures


def _hnswlib(
    rows: int, dimension: int, probes: np.ndarray, whose: np.ndarray, cosines: np.ndarray, seconds: float
) -> dict[str, Any]:
    try:
        import hnswlib
    except ImportError:
        return {"hnswlib": "not installed"}
    if rows > 1_000_000:
        return {}
    index = hnswlib.Index("ip", dimension)
    index.init_index(rows, ef_construction=100, M=16)
    started = time.perf_counter()
    for i, low, n in pieces(rows):
        index.add_items(piece(i, n, dimension), np.arange(low, low + n))
    figures: dict[str, Any] = {"hnswlib, built in s": round(time.perf_counter() - started)}
    for ef in (100, 1000):
        index.set_ef(ef)
        figures[f"batch 256, hnswlib ef {ef}"] = told(timed(lambda p: index.knn_query(p, K), probes, min(256, len(probes)), seconds), 256, rows)  # fmt: skip
        found, _ = index.knn_query(probes[: 5 * 256], K)
        figures[f"mates in {K}, hnswlib ef {ef}"] = _shares(found.astype(np.int64), whose, cosines)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float)
    parser.add_argument("--dimension", type=int, default=128)
    parser.add_argument("--mates", type=int, default=1_000, help="at each cosine")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--index", default="native", help="our index engine: native, or faiss:FACTORY")
    parser.add_argument("--no-peers", action="store_true", help="without usearch, hnswlib and FAISS flat")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        given = int(arguments.rows), arguments.dimension, arguments.mates, arguments.seconds, arguments.index
        print(json.dumps(measure(*given, peers=not arguments.no_peers)))
        return
    for rows, dimension in [(int(arguments.rows), arguments.dimension)] if arguments.rows else SIZES:
        command = [sys.executable, __file__, "--here", "--rows", str(rows), "--dimension", str(dimension)]
        command += ["--mates", str(arguments.mates), "--seconds", str(arguments.seconds), "--index", arguments.index]
        command += ["--no-peers"] * arguments.no_peers
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        record("speed", json.loads(done.stdout), keep=(rows, dimension) in SIZES)


if __name__ == "__main__":
    main()
