"""The scan: one pass over a column's rows.

Owns the pool of threads and the two passes, and how rows are cut into units of work. Never reads minutiae, never decides how
much is enough (`shard.py`).

* `exact`: every row as float32, by FAISS's k-nearest-neighbour kernel, on tiles that stay in a core's cache: the tail, small
  segments, and whatever must not be estimated.
* `above`: every row's upper halves (gallery/codes.py) by the project's own kernel; what reaches the cut is kept, with its
  estimate. A cut is known beforehand, so that there is no heap; should it let too many through, it rises.

Each thread of the pool computes alone, so that callers who search together never take the cores from each other. A caller has
a few units in the pool at a time, so that one probe does not wait for the whole pass of a thousand that came before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import faiss
import numpy as np
from numpy.typing import NDArray

from biodedup.gallery.files.codec import Codec
from biodedup.gallery.files.codes import BLOCK_ROWS, rotate
from biodedup.gallery.segments.part import Column
from biodedup.search.native import scan_kernel as kernel
from biodedup.search.native import sign_kernel
from biodedup.search.native.exact_pairs import ranked
from biodedup.search.native.sign_kernel import SignedProbes
from biodedup.values import Float32

_READERS = 8
_EXACT_PROBES = 256  # so many by a tile's rows of similarities stay in the cache
_AT_ONCE = 1 << 18  # pairs that take no longer than another thread takes to hear of them
_SIGNED_PROBES = 256
"""Probes whose tables lie in the second-level cache."""
_ROOM = 1 << 15  # hits that a thread collects before it hands them over

Int64 = NDArray[np.int64]
_Piece = TypeVar("_Piece")
_Done = TypeVar("_Done")


@dataclass(frozen=True)
class Tile:
    """Some embeddings of one column. vectors(): float32 (n, D), as the codec turns them, or None: as they are; rows(indices): the
    gallery's row of each, int64."""

    count: int
    vectors: Callable[[], Float32]
    rows: Callable[[Int64], Int64]
    codec: Codec | None = None


@dataclass(frozen=True)
class Unit:
    """Cells [first, last) of a coded column. number: which column of a search it is; live: bits of all its cells, or empty."""

    column: Column
    number: int
    first: int
    last: int
    live: NDArray[np.uint64]


def units_of(whole: Sequence[Unit], probes: int, threads: int) -> list[Unit]:
    """Cuts columns at whole blocks into units that keep a core busy for some milliseconds, and all cores to the end."""
    total = sum(unit.last - unit.first for unit in whole)
    some_milliseconds = (
        1 << 24 >> max(probes - 1, 7).bit_length()
    )  # one probe is bound by memory, as eight are by arithmetic
    cells = max(min(some_milliseconds, total // (4 * threads)) // BLOCK_ROWS, 64) * BLOCK_ROWS
    units = []
    for unit in whole:
        bounds = [unit.first, *range((unit.first // cells + 1) * cells, unit.last, cells), unit.last]
        units += [replace(unit, first=low, last=high) for low, high in pairwise(bounds) if low < high]
    return units


class Probes:
    """Probes as a codec's kernel takes them. rotated: float32 (q, D), rotated; codes int8 (q, scanned) = rotated / scale."""

    def __init__(self, codec: Codec, vectors: Float32) -> None:
        self.codec = codec
        self.rotated = rotate(vectors, codec.rotation)
        seen = self.rotated[:, : codec.scanned]
        self.scales = np.maximum(np.abs(seen).max(axis=1), 1e-9).astype(np.float32) / np.float32(127)
        self.codes = np.ascontiguousarray(np.rint(seen / self.scales[:, None]).astype(np.int8))
        self.middle = 7.5 * self.codes.sum(axis=1, dtype=np.float32)  # halves count from 0, and stand for their middles
        self.slack = 0.5 * np.abs(self.codes.astype(np.float32)).sum(axis=1)
        """What lower halves can add to a dot product at most."""

    def estimates(self, which: NDArray[np.int32], dots: NDArray[np.int32], norms: Float32) -> Float32:
        """Similarity as far as the scan knows it, float32 (n,)."""
        return np.asarray(16 * self.scales[which] * (dots - self.middle[which]) / norms, np.float32)

    @property
    def parameters(self) -> Float32:
        """A similarity as the scan knows it is the first times (dot product - the second) over the row's norm, float32 (q, 2)."""
        return np.stack([16 * self.scales, self.middle], axis=1).astype(np.float32)

    @property
    def rounding(self) -> Float32:
        """By how much a similarity can differ for the rounding of the probe, at most, float32 (q,)."""
        return np.asarray(0.5 * self.scales * np.sqrt(self.codec.scanned), np.float32)


@dataclass
class Hits:
    """What reached the cuts: probe, number of the column, cell and estimate of each, in no order. cuts: as they ended, float32
    (q,), higher than they were asked for where too many came."""

    which: NDArray[np.int32]
    number: NDArray[np.int32]
    cell: Int64
    estimate: Float32
    cuts: Float32


@contextmanager
def _one_thread() -> Iterator[None]:
    """FAISS computes alone in this thread, too."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def in_turn(pool: Executor, threads: int, work: Callable[[_Piece], _Done], pieces: Iterable[_Piece]) -> Iterator[_Done]:
    """Work on each piece, done by the pool's threads, as it is done. No more than keeps these busy is handed over at once: pieces
    of callers who come later have their turn between."""
    waiting: set[Future[_Done]] = set()
    try:
        for piece in pieces:
            while len(waiting) > threads:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (one.result() for one in done)
            waiting.add(pool.submit(work, piece))
        for one in as_completed(waiting):
            yield one.result()
    finally:
        for one in waiting:
            one.cancel()


class Scanner:
    """A pool of threads that scan. One for each engine."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, "biodedup-scan", initializer=faiss.omp_set_num_threads, initargs=(1,))
        self._readers = ThreadPoolExecutor(_READERS, "biodedup-read")  # they wait for the disk while others scan

    def exact(self, tiles: Sequence[Tile], probes: Float32, k: int) -> tuple[Int64, Float32]:
        """The k most similar rows of each probe.

        probes: float32 (q, d), unit rows. Returns rows int64 (q, k), -1 pads; similarity float32 (q, k), descending, -inf
        pads. Ties: the lower row first.
        """
        best = Best(len(probes), k)
        turned_by = _turned_by(tiles, probes)

        def scan(tile: Tile) -> None:
            mine = turned_by[tile.codec]
            similarity, near = faiss.knn(mine, tile.vectors(), min(k, tile.count), metric=faiss.METRIC_INNER_PRODUCT)
            best.add(tile, near, similarity)

        if len(tiles) == 1 and len(probes) * tiles[0].count <= _AT_ONCE:
            with _one_thread():
                scan(tiles[0])
            return best.rows, best.similarity
        self.run(scan, tiles)
        return best.rows, best.similarity

    def exact_above(self, tiles: Sequence[Tile], probes: Float32, least: Float32) -> list[tuple[Int64, Int64, Float32]]:
        """All pairs of at least this similarity, float32 (q,): (probe, row, similarity) in pieces."""

        turned_by = _turned_by(tiles, probes)

        def scan(tile: Tile) -> list[tuple[Int64, Int64, Float32]]:
            mine, vectors = turned_by[tile.codec], tile.vectors()
            found = []
            for low in range(0, len(probes), _EXACT_PROBES):
                similarity = mine[low : low + _EXACT_PROBES] @ vectors.T
                which, near = np.nonzero(similarity >= least[low : low + _EXACT_PROBES, None])
                if len(which):
                    found.append((which + low, tile.rows(near), similarity[which, near]))
            return found

        return [piece for pieces in in_turn(self._pool, self.threads, scan, tiles) for piece in pieces]

    def above(
        self,
        whole: Sequence[Unit],
        probes: Probes,
        cuts: Float32,
        *,
        bounded: bool = False,
        most: int,
        signs: SignedProbes | None = None,
    ) -> Hits:
        """Every cell of some columns whose estimate reaches the probe's cut; bounded: whose similarity may, whatever its lower
        half. most: of each probe, about; beyond it the cut rises. signs: rule most cells out beforehand."""
        collected = Collected(cuts, most)
        count = len(probes.codes)
        offsets = (probes.middle - probes.slack if bounded else probes.middle).astype(np.float32)
        scales = 16 * probes.scales
        signed = [] if signs is None else list(signs.pieces(_SIGNED_PROBES))

        def scan(unit: Unit) -> None:
            base = unit.first // BLOCK_ROWS
            plane, norms = unit.column.high_nibbles(unit.first, unit.last)
            live = unit.live[base : base + len(plane)]
            span = (unit.first - base * BLOCK_ROWS, unit.last - base * BLOCK_ROWS)
            room = max(_ROOM, 4 * BLOCK_ROWS * count, *(2 * mine.room for _, mine in signed))
            which, cells, estimates = np.empty(room, np.int32), np.empty(room, np.int64), np.empty(room, np.float32)
            dots = np.empty(room if signs is None else 0, np.int32)

            def collect(number: int, first: int, values: Float32) -> None:
                if number:
                    collected.add(which[:number] + first, unit.number, cells[:number] + base * BLOCK_ROWS, values)

            block = 0
            while signs is None and block < len(plane):
                slopes = (collected.cuts / scales).astype(np.float32)
                found = (which, cells, dots)
                number, block = kernel.scan(plane, norms, live, span, block, probes.codes, offsets, slopes, found)
                collect(number, 0, probes.estimates(which[:number], dots[:number], norms[cells[:number]]))
            for some, mine in signed:
                block = 0
                while block < len(plane):
                    number, block, _ = sign_kernel.scan(
                        [(plane, norms)],
                        None,
                        live,
                        span,
                        block,
                        mine,
                        collected.cuts[some],
                        (which, cells, estimates),
                    )
                    collect(number, some.start, estimates[:number].copy())

        self.run(scan, units_of(whole, count, self.threads))
        return collected.hits()

    def run(self, work: Callable[[_Piece], None], pieces: Iterable[_Piece]) -> None:
        """Does work that computes on each piece, and waits."""
        for _ in in_turn(self._pool, self.threads, work, pieces):
            pass

    def each(self, work: Callable[[_Piece], None], pieces: Sequence[_Piece]) -> None:
        """Does work that reads the disk on each piece, some at the same time, and waits."""
        if len(pieces) == 1:
            work(pieces[0])
            return
        for _ in in_turn(self._readers, _READERS, work, pieces):
            pass

    def close(self) -> None:
        self._pool.shutdown()
        self._readers.shutdown()


def _turned_by(tiles: Sequence[Tile], probes: Float32) -> dict[Codec | None, Float32]:
    """The probes as each codec turns them: turning the few spares turning the many back."""
    codecs = {tile.codec for tile in tiles}
    return {codec: probes if codec is None else rotate(probes, codec.rotation) for codec in codecs}


class Collected:
    """Hits from all threads. A probe that has too many keeps its best, and its cut rises to the worst of them, but never above the
    floor, from which on all are kept."""

    def __init__(self, cuts: Float32, most: int, floor: float = np.inf) -> None:
        self.cuts = cuts.astype(np.float32)
        self._most, self._floor = most, np.float32(floor)
        self._counts = np.zeros(len(cuts), np.int64)
        self._pieces: list[tuple[NDArray[np.int32], NDArray[np.int32], Int64, Float32]] = []
        self._lock = threading.Lock()

    def add(self, which: NDArray[np.int32], number: int, cells: Int64, estimates: Float32) -> None:
        with self._lock:
            self._pieces.append((which, np.full(len(which), number, np.int32), cells, estimates))
            counted = which if np.isposinf(self._floor) else which[estimates < self._floor]
            self._counts += np.bincount(counted, minlength=len(self._counts))
            if self._counts.max() > 2 * self._most:
                self._thin()

    def _thin(self) -> None:
        which, number, cells, estimates = self._joined()
        order, rank = ranked(which, estimates, number.astype(np.int64) << 40 | cells, len(self.cuts))
        last = order[rank == self._most - 1]
        worst = np.minimum(estimates[last], self._floor)
        self.cuts[which[last]] = np.maximum(self.cuts[which[last]], worst)
        kept = order[(rank < self._most) | (estimates[order] >= self._floor)]
        self._pieces = [(which[kept], number[kept], cells[kept], estimates[kept])]
        below = which[kept][estimates[kept] < self._floor]
        self._counts = np.bincount(below, minlength=len(self.cuts))

    def _joined(self) -> tuple[NDArray[np.int32], NDArray[np.int32], Int64, Float32]:
        nothing = (np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.float32))
        which, number, cells, estimates = zip(*(self._pieces or [nothing]), strict=True)
        return np.concatenate(which), np.concatenate(number), np.concatenate(cells), np.concatenate(estimates)

    def hits(self) -> Hits:
        return Hits(*self._joined(), self.cuts)

    def best(self) -> Hits:
        """Of each probe no more than `most` below the floor."""
        self._thin()
        return self.hits()


class Best:
    """The best k so far, from any order of tiles: always the same result."""

    def __init__(self, probes: int, k: int) -> None:
        self.rows = np.full((probes, k), -1, np.int64)
        self.similarity = np.full((probes, k), -np.inf, np.float32)
        self._k = k
        self._lock = threading.Lock()

    def add(self, tile: Tile, near: Int64, similarity: Float32) -> None:
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
