"""The native index engine: searches the parts of a snapshot in this process.

Owns the search of a local shard, and the choice between an exact scan and a scan of codes. Never merges shards, never compares minutiae and
never decides.

Codes are scanned as in FAISS's fast scan (André, Kermarrec and Le Scouarnec, VLDB 2015). The rows that pass are re-ranked by exact
similarity. There is no heap, because the cut-off is known before the scan:

1. A probe's similarities to unrelated rows are nearly normal. Their mean and standard deviation in a sample give a similarity T that a little
   more than k rows reach.
2. The distribution of estimates of rows at T is known (`ErrorLaw`). Its lower tail bound at `miss_risk` is the cut-off.
3. Of the rows above the cut-off, the k best estimates are compared exactly, and then all rows whose estimate may belong to the k best.

Table look-ups (`estimator.py`) exclude most rows first, if that is faster (`costs.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
from scipy.special import ndtri

from biodedup.gallery.files.codec import ErrorLaw
from biodedup.gallery.segments.part import Column, Part
from biodedup.gallery.snapshot import Snapshot
from biodedup.search import costs
from biodedup.search.multicolumn import scan as multicolumn
from biodedup.search.multicolumn.plan import MultiColumnHits, MultiColumnQuery
from biodedup.search.native.column_statistics import classes_of, population_of, signs_of
from biodedup.search.native.dot_kernel import INSTRUCTIONS
from biodedup.search.native.estimator import TableEstimator
from biodedup.search.native.scan_kernel import ScanProbes
from biodedup.search.native.scanner import Probes, Scanner
from biodedup.search.shards.base import ShardHits, ShardQuery
from biodedup.search.shards.cells import CellRange, HitCollector, Reranking, by_codec
from biodedup.values import Float32

_COST_PROBES = 64  # rows that serve as probes to predict the cost of a scan
_COST_PROBES_MAX = 256  # beyond this number of probes the cost per probe is constant
TABLE_SHARES = (0.25, 0.375, 0.5, 0.625, 0.75)  # tried shares of the number pairs that tables cover
SIGN_SHARES = (0.25, 0.5, 1.0)  # tried shares of the signs that tables cover
_TABLES_MAX = 200  # with more tables, rounded sums would lose too much precision in a byte
_USUAL_NORM = 450.0  # of a code of 128 numbers; it only predicts the number of rows that pass
_SHARE_MAX = 0.02  # if a larger share of rows is wanted, all rows are compared exactly
_HITS_MAX = 1_000_000  # rows per probe that a search above a similarity collects


class NativeShard:
    """Parts of a snapshot, as a `Shard`."""

    def __init__(self, snapshot: Snapshot, parts: Sequence[Part], scanner: Scanner) -> None:
        self._snapshot = snapshot
        self._parts = parts
        self._scanner = scanner

    def search(self, probes: Float32, query: ShardQuery) -> ShardHits:
        ranges = [CellRange(self._snapshot, part, query) for part in self._parts if query.column in part.columns]
        ranges = [cells for cells in ranges if cells.first < cells.last]
        exact, coded = by_codec(ranges)
        collector = HitCollector(len(probes), self._snapshot.version)
        for group in coded:
            scan = _code_scan(group, self._largest_like(group[0].column, query.column), probes, query)
            if scan is None or not self._scan_codes(group, scan, collector):
                exact += group
        self._scan_exactly(exact, probes, query, collector)
        collector.scanned = sum(cells.last - cells.first for cells in ranges)
        return collector.hits()

    def _largest_like(self, column: Column, name: str) -> Column:
        """The largest column of the snapshot with the same codec. Its statistics hold for all, so that they are measured once."""
        codec = column.codec
        columns = [part.columns[name] for part in self._snapshot.parts if name in part.columns]
        same = [other for other in columns if codec and other.codec and other.codec.codec_id == codec.codec_id]
        return max([column, *same], key=lambda other: other.count)

    def search_multicolumn(self, probes: Mapping[str, Float32], query: MultiColumnQuery) -> MultiColumnHits:
        return multicolumn.search(self._scanner, self._snapshot, self._parts, probes, query)

    def _scan_exactly(
        self, ranges: Sequence[CellRange], probes: Float32, query: ShardQuery, collector: HitCollector
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

    def _scan_codes(self, ranges: Sequence[CellRange], scan: _CodeScan, collector: HitCollector) -> bool:
        """Scans codes and collects the hits. Returns False, and collects nothing, if too many rows pass the cut-offs."""
        units = [cells.unit(i) for i, cells in enumerate(ranges)]
        hits = self._scanner.above(units, scan.scanned, scan.cuts, most=scan.hits_most)
        raised = hits.cuts > scan.cuts
        if raised.any() and (scan.bounded or not scan.k):
            return False
        min_similarity = scan.min_similarity
        if raised.any():
            reliable = scan.law.similarity_at(hits.cuts, scan.margin)
            min_similarity = np.where(raised, np.maximum(min_similarity, reliable), min_similarity)
        remaining = np.ones(len(hits.which), bool)
        reranking = Reranking(self._scanner, self._snapshot, ranges, scan.probes.rotated, collector)
        if scan.k and not scan.bounded and len(hits.which) > scan.k:  # of fewer, none is too weak
            first = reranking.best(hits, scan.k)
            kth = np.maximum(collector.kth(scan.k), min_similarity)
            remaining = hits.estimate >= scan.cut(kth)[hits.which]
            remaining[first] = False
        reranking.compare(hits, np.flatnonzero(remaining))
        collector.complete_above = np.maximum(collector.complete_above, min_similarity)
        return True


# the strategy ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _CodeScan:
    """How codes are scanned.

    k: number of rows, 0 for all rows of at least min_similarity, float32 (q,). cuts: float32 (q,), the estimates from which rows are collected.
    bounded: whether no row may be missed; then the cut-offs allow for the largest possible error. Otherwise they allow for `margin` standard
    deviations of the error, by the measured distribution `law`. scanned: the probes for the kernel, with tables if these exclude most rows.
    hits_most: approximate maximum of hits per probe.
    """

    k: int
    probes: Probes
    min_similarity: Float32
    law: ErrorLaw
    margin: float
    bounded: bool
    scanned: ScanProbes
    hits_most: int

    @cached_property
    def cuts(self) -> Float32:
        return self.cut(self.min_similarity)

    def cut(self, similarity: Float32) -> Float32:
        """The cut-offs for rows of at least these similarities, float32 (q,)."""
        return similarity - self.probes.rounding if self.bounded else self.law.cut(similarity, self.margin)


def _code_scan(ranges: Sequence[CellRange], largest: Column, vectors: Float32, query: ShardQuery) -> _CodeScan | None:
    """How to scan the codes of these cells; None if an exact scan is faster, or if the codes cannot bound the error. largest: the column whose
    statistics stand for these cells."""
    codec = ranges[0].column.codec
    assert codec is not None, "cells without a codec are compared exactly"
    bounded = query.miss_risk <= 0
    if bounded and codec.scanned < codec.rotation.shape[0]:
        return None
    probes = Probes(codec, vectors)
    rows = sum(cells.last - cells.first for cells in ranges)
    population = population_of(largest)
    if query.min_similarity is None:
        wanted = query.k + 4 * np.sqrt(query.k) + 8
        if wanted > _SHARE_MAX * query.total_rows:
            return None
        k, hits_most = query.k, 50 * query.k + 20_000
        min_similarity = query.wanted(population.reached_by(probes.rotated, wanted / query.total_rows))
    else:
        k, hits_most, min_similarity = 0, _HITS_MAX, query.min_similarity
    law, margin = codec.law, 0.0 if bounded else codec.law.margin(query.miss_risk)[0]
    scanned = probes.untabled(bounded)
    if not bounded:
        similarity = round(float(np.sort(min_similarity)[len(min_similarity) // 2]), 2)
        estimator = _cheapest(largest, similarity, len(probes.codes), query.miss_risk, rows)
        if estimator is not None:
            margin, _ = estimator.error_distributions[0].margin(query.miss_risk)
            limits, law = estimator.error_distributions[0].cut(min_similarity, margin), estimator.error_distributions[1]
            scanned = estimator.tabled(scanned, probes.rotated, limits)
    scan = _CodeScan(
        k=k,
        probes=probes,
        min_similarity=min_similarity,
        law=law,
        margin=margin,
        bounded=bounded,
        scanned=scanned,
        hits_most=hits_most,
    )
    slack = 16 * probes.scales * probes.slack / _USUAL_NORM if bounded else np.float32(0)
    share = population.share_reaching(scan.cuts - slack, probes.rotated[:, : codec.scanned])
    return scan if share <= _SHARE_MAX else None


_spent: WeakKeyDictionary[Column, float] = WeakKeyDictionary()
"""Column -> nanoseconds that its scans without tables have taken."""
_chosen: WeakKeyDictionary[Column, dict[tuple[float, int, float], TableEstimator | None]] = WeakKeyDictionary()
_measuring = threading.Lock()


def _cheapest(column: Column, similarity: float, probes: int, miss_risk: float, rows: int) -> TableEstimator | None:
    """The fastest tables for rows of about this similarity; None if a scan of all high nibbles is faster, or if the processor has no byte
    shuffles. Rows of the column stand for the probes. rows: of the scan.

    The error distributions of tables are measured when scans without tables have taken as long as this measurement (the ski rental problem):
    so the total time is at most twice the minimum. Most columns of small galleries are never measured. While one search measures, others
    scan without tables.
    """
    cost, known = costs.ROW_COSTS.get(INSTRUCTIONS), _chosen.setdefault(column, {})
    key = (similarity, min(probes, _COST_PROBES_MAX), miss_risk)
    if cost is None or key in known:
        return known.get(key)
    assert column.codec is not None, "only coded columns have tables"
    scanned = column.codec.scanned
    without = cost.of_all(scanned, probes)
    spent = _spent.get(column, 0.0) + rows * probes * without
    if spent < costs.CLASSES_MEASURED_NS:
        _spent[column] = spent
        return None
    if not _measuring.acquire(blocking=False):
        return None
    try:
        known[key] = _measured(column, similarity, probes, miss_risk)
    finally:
        _measuring.release()
    return known[key]


def _measured(column: Column, similarity: float, probes: int, miss_risk: float) -> TableEstimator | None:
    """`_cheapest`, from the error distributions of tables."""
    cost, codec = costs.ROW_COSTS[INSTRUCTIONS], column.codec
    assert codec is not None, "only coded columns have tables"
    scanned = codec.scanned
    sample = population_of(column).sample[:_COST_PROBES]
    level, margin = np.full(len(sample), similarity, np.float32), -float(ndtri(miss_risk / 2))

    def row_cost(estimator: TableEstimator) -> float:
        share = estimator.share_passing(estimator.quick_error_distribution.cut(level, margin), sample)
        return cost.of(estimator.tables, estimator.octets, share, probes, scanned)

    options = [
        *(signs_of(column, share) for share in SIGN_SHARES),
        *(classes_of(column, tables_for(scanned, table_share)) for table_share in TABLE_SHARES),
    ]
    best = min(options, key=row_cost)
    pays = row_cost(best) < cost.of_all(scanned, probes) and best.error_distributions[0].margin(miss_risk)[1]
    return best if pays else None


def tables_for(scanned: int, share: float) -> int:
    """The number of tables that cover this share of the number pairs: a multiple of four, or all."""
    return min(-(-int(share * scanned / 2) // 4) * 4, scanned // 2, _TABLES_MAX)


def shares(parts: Sequence[Part], rows_min: int = 1 << 20) -> list[Sequence[Part]]:
    """The parts of each shard: a large segment is a shard of its own, all others form one shard."""
    large = [part for part in parts if part.count >= rows_min]
    small = [part for part in parts if part.count < rows_min]
    return [*([part] for part in large), *([small] if small else [])]


def as_set(groups: Collection[str] | None) -> frozenset[str] | None:
    return None if groups is None else frozenset(groups)
