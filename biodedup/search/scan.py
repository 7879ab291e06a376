"""The scan: one pass over the embeddings of a column, exact.

Owns top-k over float vectors, tile by tile. Never reads minutiae, never knows thresholds.

FAISS's exact k-nearest-neighbour kernel does the arithmetic. A tile is small enough to stay in a core's cache while its
eight-bit codes become floats and meet the probes; tiles are shared out among the threads of one pool, each of which
computes alone, so that callers who scan together never take the cores from each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

from biodedup.values import Float32


@dataclass(frozen=True)
class Tile:
    """Some embeddings of one column. vectors(): float32 (n, d); rows(indices): the gallery's row of each, int64."""

    count: int
    vectors: Callable[[], Float32]
    rows: Callable[[NDArray[np.int64]], NDArray[np.int64]]


class Scanner:
    """A pool of threads that scan. One for each engine."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "biodedup-scan", initializer=faiss.omp_set_num_threads, initargs=(1,))

    def top_k(self, tiles: Iterable[Tile], probes: Float32, k: int) -> tuple[NDArray[np.int64], Float32]:
        """The k most similar rows of each probe.

        probes: float32 (q, d), unit rows. Returns rows int64 (q, k), -1 pads; similarity float32 (q, k), descending, -inf
        pads. Ties: the lower row first.
        """
        best = _Best(len(probes), k)

        def scan(tile: Tile) -> None:
            near_similarity, near = faiss.knn(
                probes, tile.vectors(), min(k, tile.count), metric=faiss.METRIC_INNER_PRODUCT
            )
            best.add(tile, near, near_similarity)

        for _ in self._pool.map(scan, tiles):
            pass
        return best.rows, best.similarity

    def close(self) -> None:
        self._pool.shutdown()


class _Best:
    """The best k so far, from any order of tiles: always the same result."""

    def __init__(self, probes: int, k: int) -> None:
        self.rows = np.full((probes, k), -1, np.int64)
        self.similarity = np.full((probes, k), -np.inf, np.float32)
        self._k = k
        self._lock = threading.Lock()

    def add(self, tile: Tile, near: NDArray[np.int64], similarity: Float32) -> None:
        # an unlocked look: the bar only rises, so that what does not reach it now never will
        which = np.flatnonzero(similarity[:, 0] >= self.similarity[:, -1])
        if not len(which):
            return
        rows = tile.rows(near[which].reshape(-1)).reshape(len(which), -1)
        with self._lock:
            all_rows = np.concatenate([self.rows[which], rows], axis=1)
            all_similarity = np.concatenate([self.similarity[which], similarity[which]], axis=1)
            order = np.lexsort((all_rows, -all_similarity), axis=1)[:, : self._k]
            self.rows[which] = np.take_along_axis(all_rows, order, axis=1)
            self.similarity[which] = np.take_along_axis(all_similarity, order, axis=1)
