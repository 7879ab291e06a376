"""The native index engine: searches the parts of a snapshot in this process.

Owns the search of one local shard, and the choice between an exact scan and a scan of codes. Never merges shards, never
compares minutiae and never decides.

Codes are scanned as in FAISS's fast scan (André, Kermarrec and Le Scouarnec, VLDB 2015), then the survivors are
re-ranked by exact similarity. There is no heap: a probe's similarities to unrelated rows are nearly normal, so the mean
and deviation of a sample give a similarity T that a little more than k of all rows reach. Rows at T have a known
distribution of estimates (`ErrorLaw`); its lower tail bound at `miss_risk` is the cut-off of the scan. Of the rows
above the cut-off the k best estimates are compared exactly, and then each row whose estimate could still belong among
the k best.

Batches of probes may first rule out most rows by table look-ups (`signs.py`), if that is cheaper (`costs.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from scipy.special import ndtri

from biodedup.gallery.files.codec import ErrorLaw
from biodedup.gallery.files.codes import dequantise
from biodedup.gallery.segments.part import PIECE_ROWS, Column, Int64, Part
from biodedup.gallery.snapshot import Snapshot
from biodedup.search import costs
from biodedup.search.multicolumn import scan as multicolumn
from biodedup.search.multicolumn.plan import MultiColumnHits, MultiColumnQuery, covered_presences
from biodedup.search.native.column_statistics import population_of, signs_of
from biodedup.search.native.exact_pairs import compared, ranked
from biodedup.search.native.scan_kernel import INSTRUCTIONS
from biodedup.search.native.scanner import Hits, Probes, Scanner, Tile, Unit
from biodedup.search.native.sign_kernel import SignedProbes
from biodedup.search.native.sign_tile import CLASS_TABLES, SIGN_TABLES
from biodedup.search.native.signs import TABLES_MOST, Signs
from biodedup.search.shards.base import Shard, ShardHits, ShardQuery
from biodedup.values import COLUMNS, Float32

EXACT_CELLS = 1 << 14
"""A group of at most so many cells of one codec is compared exactly."""
_RELEASE_PAIRS = 1_000  # compared at a time; after more, the memory of what was read is released
_READ_THROUGH_PAIRS = 10_000  # of a column; above it the disk has read the column from end to end
_COST_PROBES = 16  # about so many of a batch foresee its cost
_SIGN_PROBES = 16  # from so many probes on, unpacking the signs of a block pays
_USUAL_NORM = 450.0  # of a code of 128 numbers; only foresees how many rows pass
_SHARE_MAX = 0.02  # above this share of rows wanted, all are compared exactly
_HITS_MOST = 1_000_000  # rows a probe that a search above a similarity collects


class NativeShard:
    """Some parts of a snapshot, as a `Shard`."""

    def __init__(self, snapshot: Snapshot, parts: Sequence[Part], scanner: Scanner) -> None:
        self._snapshot = snapshot
        self._parts = parts
        self._scanner = scanner

    def search(self, probes: Float32, query: ShardQuery) -> ShardHits:
        ranges = [_CellRange(self._snapshot, part, query) for part in self._parts if query.column in part.columns]
        ranges = [cells for cells in ranges if cells.first < cells.last]
        exact, coded = by_codec(ranges)
        collector = _HitCollector(len(probes), self._snapshot.version)
        for group in coded:
            scan = _code_scan(group, probes, query)
            if scan is None or not self._scan_codes(group, scan, collector):
                exact += group
        self._scan_exactly(exact, probes, query, collector)
        collector.scanned = sum(cells.last - cells.first for cells in ranges)
        return collector.hits()

    def search_multicolumn(self, probes: Mapping[str, Float32], query: MultiColumnQuery) -> MultiColumnHits:
        return multicolumn.search(self._scanner, self._snapshot, self._parts, probes, query)

    def _scan_exactly(
        self, ranges: Sequence[_CellRange], probes: Float32, query: ShardQuery, collector: _HitCollector
    ) -> None:
        tiles = [tile for cells in ranges for tile in cells.tiles()]
        if not query.k:
            assert query.min_similarity is not None, "a query for all rows has a similarity"
            for which, rows, similarity in self._scanner.exact_above(tiles, probes, query.min_similarity):
                collector.add(which, rows, similarity)
        elif tiles:
            rows, similarity = self._scanner.exact(tiles, probes, min(query.k, sum(tile.count for tile in tiles)))
            which, at = np.nonzero(rows >= 0)
            collector.add(which, rows[which, at], similarity[which, at])

    def _scan_codes(self, ranges: Sequence[_CellRange], scan: _CodeScan, collector: _HitCollector) -> bool:
        """False if more rows passed the cut-offs than can be collected; nothing was collected then."""
        units = [cells.unit(i) for i, cells in enumerate(ranges)]
        hits = self._scanner.above(
            units, scan.probes, scan.cuts, bounded=scan.bounded, most=scan.hits_most, signs=scan.signs
        )
        raised = hits.cuts > scan.cuts
        if raised.any() and (scan.bounded or not scan.k):
            return False
        min_similarity = scan.min_similarity
        if raised.any():
            reliable = scan.law.similarity_at(hits.cuts, scan.margin)
            min_similarity = np.where(raised, np.maximum(min_similarity, reliable), min_similarity)
        remaining = np.ones(len(hits.which), bool)
        if scan.k and not scan.bounded:
            first = self._compare_best(ranges, scan, hits, collector)
            kth = np.maximum(collector.kth(scan.k), min_similarity)
            remaining = hits.estimate >= scan.cut(kth)[hits.which]
            remaining[first] = False
        self._compare(ranges, scan.probes, hits, np.flatnonzero(remaining), collector)
        collector.complete_above = np.maximum(collector.complete_above, min_similarity)
        return True

    def _compare_best(
        self, ranges: Sequence[_CellRange], scan: _CodeScan, hits: Hits, collector: _HitCollector
    ) -> Int64:
        """Compares the k best estimates of each probe exactly; returns which hits they were."""
        order, rank = ranked(hits.which, hits.estimate, hits.cell, len(scan.cuts))
        best = order[rank < scan.k]
        self._compare(ranges, scan.probes, hits, best, collector)
        return best

    def _compare(
        self, ranges: Sequence[_CellRange], probes: Probes, hits: Hits, chosen: Int64, collector: _HitCollector
    ) -> None:
        """Compares the chosen hits exactly, in the order of the disk."""
        chosen = chosen[np.argsort(hits.number[chosen].astype(np.int64) << 40 | hits.cell[chosen])]
        by_range = [(cells, chosen[hits.number[chosen] == number]) for number, cells in enumerate(ranges)]

        def compare(job: tuple[_CellRange, Int64]) -> None:
            cells, at = job
            similarity = compared(cells.column, hits.cell[at], probes.rotated, hits.which[at])
            collector.add(hits.which[at].astype(np.int64), cells.rows(hits.cell[at]), similarity, compared=len(at))
            if len(at) > _RELEASE_PAIRS:
                cells.column.release(forget=False)

        jobs = [(c, at[low : low + PIECE_ROWS]) for c, at in by_range for low in range(0, len(at), PIECE_ROWS)]
        self._scanner.each(compare, jobs)
        for cells, at in by_range if self._snapshot.streamed else ():
            if cells.column in self._snapshot.streamed and len(at) > _READ_THROUGH_PAIRS:
                cells.column.release(forget=True)


# the strategy ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _CodeScan:
    """How codes are scanned.

    k: how many rows, 0 for all of at least min_similarity, float32 (q,). cuts: float32 (q,), the estimates from which
    on rows are collected. bounded: no row may be missed; the cut-offs then allow for the largest error there can be.
    margin: standard deviations of the estimate's error, as `law` measured it, that the cut-offs allow for otherwise.
    signs: tables that rule rows out first, or None. hits_most: of each probe, about.
    """

    k: int
    probes: Probes
    min_similarity: Float32
    law: ErrorLaw
    margin: float
    bounded: bool
    signs: SignedProbes | None
    hits_most: int

    @property
    def cuts(self) -> Float32:
        return self.cut(self.min_similarity)

    def cut(self, similarity: Float32) -> Float32:
        """The estimates that rows of at least these similarities reach, float32 (q,)."""
        return similarity - self.probes.rounding if self.bounded else self.law.cut(similarity, self.margin)


def _code_scan(ranges: Sequence[_CellRange], vectors: Float32, query: ShardQuery) -> _CodeScan | None:
    """How to scan the codes of these cells; None if an exact scan is cheaper, or the codes cannot bound the error."""
    codec = ranges[0].column.codec
    assert codec is not None, "cells without a codec are compared exactly"
    bounded = query.miss_risk <= 0
    if bounded and codec.scanned < codec.rotation.shape[0]:
        return None
    probes = Probes(codec, vectors)
    largest = max((cells.column for cells in ranges), key=lambda column: column.count)
    population = population_of(largest)
    if query.min_similarity is None:
        wanted = query.k + 4 * np.sqrt(query.k) + 8
        if wanted > _SHARE_MAX * query.total_rows:
            return None
        k, hits_most = query.k, 50 * query.k + 20_000
        min_similarity = population.reached_by(probes.rotated, wanted / query.total_rows)
    else:
        k, hits_most, min_similarity = 0, _HITS_MOST, query.min_similarity
    law, margin = codec.law, 0.0 if bounded else codec.law.margin(query.miss_risk)[0]
    signed = None
    if not bounded and len(vectors) >= _SIGN_PROBES:
        signs = _cheapest_signs(largest, probes, min_similarity, query.miss_risk)
        if signs is not None:
            margin, _ = signs.laws[0].margin(query.miss_risk)
            limits, law = signs.laws[0].cut(min_similarity, margin), signs.laws[1]
            signed = signs.probes(probes.rotated, limits, probes.codes, probes.parameters)
    scan = _CodeScan(k, probes, min_similarity, law, margin, bounded, signed, hits_most)
    slack = 16 * probes.scales * probes.slack / _USUAL_NORM if bounded else np.float32(0)
    share = population.share_reaching(scan.cuts - slack, probes.rotated[:, : codec.scanned])
    return scan if share <= _SHARE_MAX else None


def _cheapest_signs(column: Column, probes: Probes, min_similarity: Float32, miss_risk: float) -> Signs | None:
    """The tables that find rows of at least these similarities soonest; None if a scan of all high nibbles is cheaper,
    or the processor has no byte shuffles."""
    cost = costs.ROW_COSTS.get(INSTRUCTIONS)
    if cost is None:
        return None
    options = []
    sampled = slice(None, None, max(len(min_similarity) // _COST_PROBES, 1))
    all_signs = signs_of(column, SIGN_TABLES).tables
    for kind, tables in (
        (SIGN_TABLES, all_signs // 8 * 4),
        (SIGN_TABLES, all_signs * 3 // 16 * 4),
        (SIGN_TABLES, TABLES_MOST),
        (CLASS_TABLES, TABLES_MOST),
    ):
        if not tables:
            continue
        signs = signs_of(column, kind, tables)
        cuts = signs.quick_law.cut(min_similarity[sampled], -float(ndtri(miss_risk / 2)))
        share = signs.share_passing(cuts, probes.rotated[sampled])
        row_cost = signs.tables * cost.table + share * cost.compared + cost.taken / len(probes.codes)
        options.append((row_cost, kind, tables))
    row_cost, kind, tables = min(options)
    if row_cost >= probes.codec.scanned * cost.number:
        return None
    signs = signs_of(column, kind, tables)
    return signs if signs.laws[0].margin(miss_risk)[1] else None


# what is searched --------------------------------------------------------------------------------------------------

_HasColumn = TypeVar("_HasColumn", bound="_Coded")


class _Coded(Protocol):
    @property
    def column(self) -> Column: ...


def by_codec(ranges: Iterable[_HasColumn]) -> tuple[list[_HasColumn], list[list[_HasColumn]]]:
    """Splits ranges of cells into those to compare exactly, and groups of the others, one a codec."""
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


class _HitCollector:
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
        """The k-th best similarity of each probe so far, float32 (q,), -inf if there are fewer."""
        which, rows, similarity = self._joined()
        order, rank = ranked(which, similarity, rows, len(self.complete_above))
        last = order[rank == k - 1]
        kth = np.full(len(self.complete_above), -np.inf, np.float32)
        kth[which[last]] = similarity[last]
        return kth

    def hits(self) -> ShardHits:
        return ShardHits(*self._joined(), self.complete_above, self._version, self.scanned, self._compared)

    def _joined(self) -> tuple[Int64, Int64, Float32]:
        which, rows, similarity = zip(*self._pieces, strict=True)
        return np.concatenate(which), np.concatenate(rows), np.concatenate(similarity)


class _CellRange:
    """The cells of one part's column that a query searches."""

    def __init__(self, snapshot: Snapshot, part: Part, query: ShardQuery) -> None:
        self.column = part.columns[query.column]
        self._snapshot, self._part, self._groups = snapshot, part, query.groups
        skip = query.skip_covered
        self._excluded_presence = frozenset[int]() if skip is None else covered_presences(part, skip)
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


def _rows_from(cells: _CellRange, low: int) -> Callable[[Int64], Int64]:
    return lambda near: cells.rows(low + near)


def _rows_of(cells: _CellRange, kept: Int64) -> Callable[[Int64], Int64]:
    return lambda near: cells.rows(kept[near])


def native_shards(snapshot: Snapshot, scanner: Scanner) -> list[Shard]:
    """A snapshot as shards."""
    return [NativeShard(snapshot, parts, scanner) for parts in shares(snapshot)]


def shares(snapshot: Snapshot, rows_min: int = 1 << 20) -> list[Sequence[Part]]:
    """The parts of each shard: a large segment is a shard of its own, all others form one shard."""
    large = [part for part in snapshot.parts if part.count >= rows_min]
    small = [part for part in snapshot.parts if part.count < rows_min]
    return [*([part] for part in large), *([small] if small else [])]


def as_set(groups: Collection[str] | None) -> frozenset[str] | None:
    return None if groups is None else frozenset(groups)
