"""Scans a column's rows with a pool of threads, and collects the rows that are similar enough to a probe.

Owns the threads, the two kinds of scan, and the division of rows into units of work. Never reads minutiae, and never chooses cut-offs
(`shards/native.py`).

* `exact` compares every row as float32 with FAISS's k-nearest-neighbour kernel, in tiles that fit a core's cache. It is for the tail, for
  small segments, and for rows that must not be estimated.
* `above` estimates every row by its high nibbles (`gallery/files/codes.py`) with compiled kernels, and keeps each row whose estimate reaches
  the cut-off. The cut-off is known before the scan, so that there is no heap. If too many rows pass, the cut-off rises.

A thread never starts further threads, so that concurrent callers do not compete for cores. Callers take turns of a
few milliseconds, so that a single probe does not wait for the whole pass of an earlier batch of a thousand probes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import faiss
import numpy as np
from numpy.typing import NDArray

from biodedup.gallery.files import index_codec
from biodedup.gallery.files.codec import Codec
from biodedup.gallery.files.codes import BLOCK_ROWS, STEP
from biodedup.gallery.segments.part import Column
from biodedup.search.native import scan_kernel
from biodedup.search.native.dot_kernel import PROBE_ALIGNMENT
from biodedup.search.native.exact_pairs import ranked
from biodedup.search.native.scan_kernel import ScanProbes
from biodedup.search.native.table_tile import ENTRIES, TableKind, aligned
from biodedup.values import Float32

_READERS = 8
_EXACT_PROBES = 256  # number of probes whose similarities to a tile's rows fit into the cache
_INLINE_PAIRS = 1 << 18  # number of pairs up to which handing them to another thread takes longer than the comparison
_PROBES = 256
"""Number of probes whose tables fit into the second-level cache."""
NO_EVIDENCE = np.zeros((1, 0), np.float32)
"""The evidence table of `ScanProbes` of a single column, whose estimates are similarities."""
_ROOM = 1 << 15  # hits that a thread buffers
_TURN_S = 0.004  # a single probe waits for about so long beside a batch of a thousand

Int64 = NDArray[np.int64]
_Piece = TypeVar("_Piece")
_Done = TypeVar("_Done")


@dataclass(frozen=True)
class Tile:
    """Some embeddings of a column. vectors(): float32 (n, D), rotated by the codec, or unchanged without a codec. rows(indices): the gallery
    rows of these embeddings, int64."""

    count: int
    vectors: Callable[[], Float32]
    rows: Callable[[Int64], Int64]
    codec: Codec | None = None


@dataclass(frozen=True)
class Unit:
    """Cells [first, last) of a coded column. number: of the column in the search. live: a bit for each cell of the column, or empty if all cells
    are live."""

    column: Column
    number: int
    first: int
    last: int
    live: NDArray[np.uint64]


def units_of(whole: Sequence[Unit], probes: int, threads: int) -> list[Unit]:
    """Divides columns at block boundaries into units that take a core some milliseconds, and that keep all cores busy until the end."""
    total = sum(unit.last - unit.first for unit in whole)
    # up to eight probes take the same time, because memory bandwidth is the limit
    some_milliseconds = 1 << 24 >> max(probes - 1, 7).bit_length()
    cells = min(some_milliseconds, max(total // (4 * threads), some_milliseconds // 8)) // BLOCK_ROWS * BLOCK_ROWS
    units = []
    for unit in whole:
        bounds = [unit.first, *range((unit.first // cells + 1) * cells, unit.last, cells), unit.last]
        units += [replace(unit, first=low, last=high) for low, high in pairwise(bounds) if low < high]
    return units


class Probes:
    """Probes in the form of the kernels. rotated: float32 (q, D), rotated by the codec. codes: int8 (q, scanned), rotated / scale."""

    def __init__(self, codec: Codec, vectors: Float32) -> None:
        self.codec = codec
        self.rotated = codec.rotate_probes(vectors)
        scanned = self.rotated[:, : codec.scanned]
        self.scales = np.maximum(np.abs(scanned).max(axis=1), 1e-9).astype(np.float32) / np.float32(127)
        self.codes = np.ascontiguousarray(np.rint(scanned / self.scales[:, None]).astype(np.int8))
        self.middle = 7.5 * self.codes.sum(
            axis=1, dtype=np.float32
        )  # a nibble starts from 0 and stands for the middle of its interval
        self.slack = 0.5 * np.abs(self.codes.astype(np.float32)).sum(axis=1)
        """The greatest contribution of low nibbles to a dot product."""

    def parameters(self, bounded: bool = False) -> Float32:
        """The parameters (a, b) of each probe, float32 (q, 2): the estimate is a (dot product - b) / norm of the row. bounded: gives the greatest
        possible similarity for any low nibbles in place of an estimate."""
        middle = self.middle - self.slack if bounded else self.middle
        return np.stack([16 * self.scales, middle], axis=1).astype(np.float32)

    def untabled(self, bounded: bool = False) -> ScanProbes:
        """The probes for the kernel, without tables: all rows are compared."""
        count, of_none = len(self.codes), np.zeros(1, np.int64)
        tables, places = np.zeros((count, 0, ENTRIES), np.uint8), np.zeros((count, 0), np.int32)
        compared = (paired([self.codes]), self.parameters(bounded)[None], NO_EVIDENCE)
        return ScanProbes(*compared, tables, places, np.zeros(count, np.uint8), of_none, TableKind.CLASSES)

    @property
    def rounding(self) -> Float32:
        """The largest error of a similarity due to the rounding of the probe, float32 (q,)."""
        return np.asarray(0.5 * self.scales * np.sqrt(self.codec.scanned), np.float32)


@dataclass
class Hits:
    """The cells that reached the cut-offs, unordered. which, number, cell, estimate: probe, number of the column, cell and estimate of each.
    cuts: float32 (q,), the final cut-offs; they are higher than at the start if too many cells passed."""

    which: NDArray[np.int32]
    number: NDArray[np.int32]
    cell: Int64
    estimate: Float32
    cuts: Float32


def paired(codes: Sequence[NDArray[np.int8]]) -> NDArray[np.int8]:
    """Probes of several columns, int8 (q, scanned) each, in the layout of `make_row_dots`: int8 (columns, q, 2,
    octets)."""
    octets = max(-(-c.shape[1] // 2 // PROBE_ALIGNMENT) * PROBE_ALIGNMENT for c in codes)
    shape = len(codes), len(codes[0]), 2, octets
    out: NDArray[np.int8] = aligned(int(np.prod(shape))).view(np.int8).reshape(shape)
    for laid_out, of_column in zip(out, codes, strict=True):
        halves = of_column.reshape(len(of_column), -1, 2, STEP // 2).transpose(0, 2, 1, 3)
        laid_out[:, :, : of_column.shape[1] // 2] = halves.reshape(len(of_column), 2, -1)
    return out


def in_turn(
    pool: Executor, threads: int, work: Callable[[_Piece], _Done], pieces: Sequence[_Piece], turn_s: float = _TURN_S
) -> Iterator[_Done]:
    """Yields the result for each piece, unordered. Each of some threads of the pool works on one piece after the other for a few milliseconds;
    then it is the turn of later callers."""
    remaining = iter(pieces)  # of a sequence: threads may share it

    def turn() -> tuple[list[_Done], bool]:
        end, done = time.perf_counter() + turn_s, []
        for piece in remaining:
            done.append(work(piece))
            if time.perf_counter() > end:
                return done, True
        return done, False

    waiting = {pool.submit(turn) for _ in range(min(threads, len(pieces)))}
    try:
        while waiting:
            ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ended:
                done, goes_on = future.result()
                if goes_on:
                    waiting.add(pool.submit(turn))
                yield from done
    finally:
        for _ in remaining:  # after an error no thread begins another piece
            pass
        for future in waiting:
            future.cancel()


class Scanner:
    """A pool of threads for scans. Each engine has a scanner."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._alone = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, "biodedup-scan", initializer=faiss.omp_set_num_threads, initargs=(1,))
        self._readers = ThreadPoolExecutor(
            _READERS, "biodedup-read"
        )  # they wait for the disk while the other threads scan

    def exact(self, tiles: Sequence[Tile], probes: Float32, k: int) -> tuple[Int64, Float32]:
        """The k most similar rows of each probe.

        probes: float32 (q, d), unit rows. Returns rows int64 (q, k), padded with -1, and similarity float32 (q, k), descending, padded with -inf.
        Of equal similarities the lower row is first.
        """
        best = Best(len(probes), k)
        rotated_by = _rotated_by(tiles, probes)

        def scan(tile: Tile) -> None:
            rotated = rotated_by[tile.codec]
            similarity, near = faiss.knn(rotated, tile.vectors(), min(k, tile.count), metric=faiss.METRIC_INNER_PRODUCT)
            best.add(tile, near, similarity)

        if len(tiles) == 1 and len(probes) * tiles[0].count <= _INLINE_PAIRS:
            with index_codec.threads(1):
                scan(tiles[0])
            return best.rows, best.similarity
        self.run(scan, tiles)
        return best.rows, best.similarity

    def exact_above(
        self, tiles: Sequence[Tile], probes: Float32, min_similarity: Float32
    ) -> list[tuple[Int64, Int64, Float32]]:
        """All pairs of at least min_similarity, float32 (q,): (probe, row, similarity) in pieces."""
        rotated_by = _rotated_by(tiles, probes)

        def scan(tile: Tile) -> list[tuple[Int64, Int64, Float32]]:
            rotated, vectors = rotated_by[tile.codec], tile.vectors()
            pieces = []
            for low in range(0, len(probes), _EXACT_PROBES):
                similarity = rotated[low : low + _EXACT_PROBES] @ vectors.T
                which, near = np.nonzero(similarity >= min_similarity[low : low + _EXACT_PROBES, None])
                if len(which):
                    pieces.append((which + low, tile.rows(near), similarity[which, near]))
            return pieces

        return [piece for pieces in in_turn(self._pool, self.threads, scan, tiles) for piece in pieces]

    def above(self, whole: Sequence[Unit], probes: ScanProbes, cuts: Float32, *, most: int) -> Hits:
        """Every cell that passes the probes' tables and whose estimate reaches the probe's cut-off. most: approximate maximum of cells per probe;
        beyond it the cut-off rises."""
        collected = Collected(cuts, most)
        batches = list(probes.pieces(_PROBES))

        def scan(unit: Unit) -> None:
            base = unit.first // BLOCK_ROWS
            rows = unit.column.scanned(unit.first, unit.last)
            live = unit.live[base : base + len(rows.signs)]
            span = (unit.first - base * BLOCK_ROWS, unit.last - base * BLOCK_ROWS)
            room = max(_ROOM, *(2 * batch.room for _, batch in batches))
            out = (np.empty(room, np.int32), np.empty(room, np.int64), np.empty(room, np.float32))
            for probes_of_batch, batch in batches:
                block = 0
                while block < len(rows.signs):
                    number, block, _ = scan_kernel.scan(
                        columns=[rows],
                        members=None,
                        live=live,
                        span=span,
                        start=block,
                        probes=batch,
                        cuts=collected.cuts[probes_of_batch],
                        out=out,
                    )
                    if number:
                        which, cells = out[0][:number] + probes_of_batch.start, out[1][:number] + base * BLOCK_ROWS
                        collected.add(which, unit.number, cells, out[2][:number].copy())

        self.run(scan, units_of(whole, len(probes), self.threads))
        return collected.hits()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """In this block FAISS computes with as many threads as the scanner has. Only one caller at a time is in the block."""
        with self._alone, index_codec.threads(self.threads):
            yield

    def run(self, work: Callable[[_Piece], None], pieces: Sequence[_Piece]) -> None:
        """Does the work on each piece in the scan threads, and waits."""
        for _ in in_turn(self._pool, self.threads, work, pieces):
            pass

    def each(self, work: Callable[[_Piece], None], pieces: Sequence[_Piece]) -> None:
        """Does work that reads the disk on each piece, several pieces at the same time, and waits."""
        if len(pieces) == 1:
            work(pieces[0])
            return
        for _ in in_turn(self._readers, _READERS, work, pieces):
            pass

    def close(self) -> None:
        self._pool.shutdown()
        self._readers.shutdown()


def _rotated_by(tiles: Sequence[Tile], probes: Float32) -> dict[Codec | None, Float32]:
    """Codec -> the probes as it rotates them: the few probes are rotated instead of the many rows."""
    codecs = {tile.codec for tile in tiles}
    return {codec: probes if codec is None else codec.rotate_probes(probes) for codec in codecs}


class Collected:
    """Collects the hits of all threads. A probe with too many hits keeps the best, and its cut-off rises to the worst of these, but not above
    the floor: every hit above the floor is kept."""

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
        """The hits, at most `most` per probe below the floor."""
        self._thin()
        return self.hits()


class Best:
    """The k best rows so far. The result does not depend on the order of the tiles."""

    def __init__(self, probes: int, k: int) -> None:
        self.rows = np.full((probes, k), -1, np.int64)
        self.similarity = np.full((probes, k), -np.inf, np.float32)
        self._k = k
        self._lock = threading.Lock()

    def add(self, tile: Tile, near: Int64, similarity: Float32) -> None:
        # no lock is needed here: the k-th best only rises, so that a tile below it stays below it
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
