"""Shared parts of all index engines: the cells (templates in a column) that a shard searches, and the collection of its hits.

Owns the choice of the cells that count, the exact comparison of hits, and their collection. Never scans and never chooses hits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np

from biodedup.gallery.files.codes import dequantise
from biodedup.gallery.segments.part import PIECE_ROWS, Column, Int64, Part
from biodedup.gallery.snapshot import Snapshot
from biodedup.search.multicolumn.plan import covered_presences
from biodedup.search.native.exact_pairs import compared, ranked
from biodedup.search.native.scanner import Hits, Scanner, Tile, Unit
from biodedup.search.shards.base import ShardHits, ShardQuery
from biodedup.values import COLUMNS, Float32

EXACT_CELLS = 1 << 14
"""A group of at most this many cells with the same codec is compared exactly."""
_RELEASE_PAIRS = 1_000  # after the comparison of more pairs, the memory that holds the read cells is released
_READ_THROUGH_PAIRS = 10_000  # pairs of a column from which nearly the whole column was read

_HasColumn = TypeVar("_HasColumn", bound="_Coded")


class _Coded(Protocol):
    @property
    def column(self) -> Column: ...


def by_codec(ranges: Iterable[_HasColumn]) -> tuple[list[_HasColumn], list[list[_HasColumn]]]:
    """(ranges to compare exactly, other ranges in groups with the same codec)."""
    groups: dict[str, list[_HasColumn]] = {}
    for cells in ranges:
        groups.setdefault(cells.column.codec.codec_id if cells.column.codec else "", []).append(cells)
    exact = groups.pop("", [])
    coded = []
    for group in groups.values():
        if sum(cells.column.count for cells in group) > EXACT_CELLS:
            coded.append(group)
        else:
            exact += group
    return exact, coded


class HitCollector:
    """Collects the hits of a shard from several threads. Thread-safe."""

    def __init__(self, probes: int, version: int) -> None:
        self.complete_above = np.full(probes, -np.inf, np.float32)
        self.scanned = 0
        self._version = version
        self._compared = 0
        self._pieces = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))]
        self._lock = threading.Lock()

    def add(self, which: Int64, rows: Int64, similarity: Float32, compared: int = 0) -> None:
        with self._lock:
            self._pieces.append((which, rows, similarity))
            self._compared += compared

    def kth(self, k: int) -> Float32:
        """The k-th best similarity of each probe so far, float32 (q,); -inf for a probe with fewer hits."""
        which, rows, similarity = self._joined()
        order, rank = ranked(which, similarity, rows, len(self.complete_above))
        last = order[rank == k - 1]
        kth = np.full(len(self.complete_above), -np.inf, np.float32)
        kth[which[last]] = similarity[last]
        return kth

    def hits(self, floor: Float32 | None = None) -> ShardHits:
        """floor: float32 (q,), hits below it are dropped; None: all are kept."""
        which, rows, similarity = self._joined()
        if floor is not None:
            kept = similarity >= floor[which]
            which, rows, similarity = which[kept], rows[kept], similarity[kept]
        return ShardHits(which, rows, similarity, self.complete_above, self._version, self.scanned, self._compared)

    def _joined(self) -> tuple[Int64, Int64, Float32]:
        which, rows, similarity = zip(*self._pieces, strict=True)
        return np.concatenate(which), np.concatenate(rows), np.concatenate(similarity)


class CellRange:
    """The cells of a part's column that a query searches."""

    def __init__(self, snapshot: Snapshot, part: Part, query: ShardQuery) -> None:
        self.column = part.columns[query.column]
        self._snapshot, self._part, self._groups = snapshot, part, query.groups
        skip = query.skip_covered
        covered = frozenset[int]() if skip is None else covered_presences(part, skip)
        skipped = [bits for bits in part.bits if bits & query.skip_columns] if query.skip_columns else []
        self._excluded_presence = covered.union(skipped)
        end_row = part.end_row if query.end_row is None else query.end_row
        low, high = part.position_range(query.from_row, max(end_row, query.from_row))
        bit = 1 << COLUMNS.index(query.column)
        excluded = self._excluded_presence
        all_excluded = bool(excluded) and not any(bits & bit and bits not in excluded for bits in part.bits)
        searched = self.column.dimension is not None and not all_excluded
        self.first, self.last = self.column.cell_range(low, high) if searched else (0, 0)

    def rows(self, cells: Int64) -> Int64:
        return self._part.rows(cells if self.column.full else self.column.positions(0, self.column.count)[cells])

    def unit(self, number: int) -> Unit:
        live = self._snapshot.live_bits(self._part, self.column, self._groups, self._excluded_presence)
        return Unit(self.column, number, self.first, self.last, live)

    def tiles(self) -> Iterator[Tile]:
        mask = self._snapshot.mask(self._part, self._groups, self._excluded_presence)
        for low in range(self.first, self.last, PIECE_ROWS):
            high = min(low + PIECE_ROWS, self.last)
            kept = None if mask is None else low + np.flatnonzero(mask[self.column.positions(low, high)])
            if kept is None or len(kept) == high - low:
                yield Tile(high - low, _reading(self.column, low, high), _rows_from(self, low), self.column.codec)
            elif len(kept):
                yield Tile(len(kept), _taking(self.column, kept), _rows_of(self, kept), self.column.codec)


def _reading(column: Column, low: int, high: int) -> Callable[[], Float32]:
    codec = column.codec
    return lambda: column.vectors(low, high) if codec is None else dequantise(*column.coded(codec, low, high))


def _taking(column: Column, cells: Int64) -> Callable[[], Float32]:
    return lambda: column.vectors_at(cells) if column.codec is None else dequantise(*column.codes_at(cells))


def _rows_from(cells: CellRange, low: int) -> Callable[[Int64], Int64]:
    return lambda near: cells.rows(low + near)


def _rows_of(cells: CellRange, kept: Int64) -> Callable[[Int64], Int64]:
    return lambda near: cells.rows(kept[near])


class Reranking:
    """Compares hits exactly, by the eight-bit codes of their cells, and collects them. rotated: the probes, float32 (q, D), as the codec of
    the cells rotates them."""

    def __init__(
        self,
        scanner: Scanner,
        snapshot: Snapshot,
        ranges: Sequence[CellRange],
        rotated: Float32,
        collector: HitCollector,
    ) -> None:
        self._scanner, self._snapshot, self._ranges = scanner, snapshot, ranges
        self._rotated, self._collector = rotated, collector

    def best(self, hits: Hits, k: int) -> Int64:
        """Compares the k best estimates of each probe; returns the indices of these hits."""
        order, rank = ranked(hits.which, hits.estimate, hits.cell, len(self._rotated))
        best = order[rank < k]
        self.compare(hits, best)
        return best

    def compare(self, hits: Hits, chosen: Int64) -> None:
        """Compares the chosen hits, in the order of their position on disk. chosen: indices of hits."""
        chosen = chosen[np.argsort(hits.number[chosen].astype(np.int64) << 40 | hits.cell[chosen])]
        by_range = [(cells, chosen[hits.number[chosen] == number]) for number, cells in enumerate(self._ranges)]

        def compare(job: tuple[CellRange, Int64]) -> None:
            cells, at = job
            similarity = compared(cells.column, hits.cell[at], self._rotated, hits.which[at])
            self._collector.add(
                hits.which[at].astype(np.int64), cells.rows(hits.cell[at]), similarity, compared=len(at)
            )
            if len(at) > _RELEASE_PAIRS:
                cells.column.release(forget=False)

        jobs = [(c, at[low : low + PIECE_ROWS]) for c, at in by_range for low in range(0, len(at), PIECE_ROWS)]
        self._scanner.each(compare, jobs)
        for cells, at in by_range if self._snapshot.streamed else ():
            if cells.column in self._snapshot.streamed and len(at) > _READ_THROUGH_PAIRS:
                cells.column.release(forget=True)
