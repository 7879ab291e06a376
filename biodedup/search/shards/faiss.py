"""The FAISS index engine: searches a segment's FAISS index, and re-ranks what it finds by the stored eight-bit vectors.

Owns the search of one segment's indexes. Never trains or builds them (`gallery/indexing.py`), never merges shards.

FAISS estimates similarities. As in the native engine, the similarity that the k best rows reach is foreseen from the distribution of
unrelated rows, and the cut-off lies so far below it that a row at this similarity is lost with at most the miss risk, by the error that
was measured on planted mates (`files/index_codec.py`). All rows above the cut-off are asked for, by a range search, and the best of
them are compared exactly.

A search is left to the native engine where the index cannot serve it: a miss risk that its codec cannot keep, few rows, or a cut-off that
a large share of all rows reaches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biodedup.gallery.files import index_codec
from biodedup.gallery.files.index_codec import FaissCodec
from biodedup.gallery.segments.part import Column, Int64, Part
from biodedup.gallery.snapshot import Snapshot
from biodedup.search.multicolumn.plan import MultiColumnHits, MultiColumnQuery
from biodedup.search.native.column_statistics import population_of
from biodedup.search.native.scanner import Hits, Scanner
from biodedup.search.shards import cells as shared
from biodedup.search.shards.base import Shard, ShardHits, ShardQuery
from biodedup.search.shards.cells import CellRange, HitCollector, Reranking
from biodedup.search.shards.native import NativeShard, shares
from biodedup.values import Float32

_SHARE_MAX = 0.1  # above this share of rows to re-rank, the native engine is cheaper
ROWS_A_LIST_MIN = 64
"""A list costs FAISS 0.5 us a probe in batches of 256, and 3 us alone; below so many rows a list the native engine is faster tenfold."""
_SPREAD = 0.02  # of cut-offs that share one range search, which has one radius
_HITS_MOST = 1 << 23  # of one range search, about


def shards(snapshot: Snapshot, scanner: Scanner) -> list[Shard]:
    """A snapshot as shards: each segment with an index is one, the others are native shards."""
    return [shard_of(snapshot, parts, scanner) for parts in divided(snapshot)]


def divided(snapshot: Snapshot) -> list[Sequence[Part]]:
    """The parts of each shard of a snapshot."""
    indexed = [part for part in snapshot.parts if _is_indexed(part)]
    others = [part for part in snapshot.parts if part not in indexed]
    return [*([part] for part in indexed), *shares(others)]


def shard_of(snapshot: Snapshot, parts: Sequence[Part], scanner: Scanner) -> Shard:
    """The shard of some parts, as `divided` put them together."""
    if any(map(_is_indexed, parts)):
        (part,) = parts
        return FaissShard(snapshot, part, scanner)
    return NativeShard(snapshot, parts, scanner)


def _is_indexed(part: Part) -> bool:
    return any(column.index is not None for column in part.columns.values())


def usable_codec(snapshot: Snapshot, name: str, column: Column, miss_risk: float) -> FaissCodec | None:
    """The codec of a column's index; None where it has none that keeps this miss risk."""
    if column.index is None or miss_risk <= 0:
        return None
    codec = snapshot.indexing.codec(name, column.index.codec_id)
    if codec is None or not (codec.keeps(miss_risk) or snapshot.indexing.forced):
        return None
    return codec


class FaissShard:
    """One segment, as a `Shard`."""

    def __init__(self, snapshot: Snapshot, part: Part, scanner: Scanner) -> None:
        self._snapshot = snapshot
        self._part = part
        self._scanner = scanner
        self._native = NativeShard(snapshot, [part], scanner)

    def search(self, probes: Float32, query: ShardQuery) -> ShardHits:
        scan = self._scan(probes, query)
        if scan is None:
            return self._native.search(probes, query)
        cells, cuts = scan.cells, scan.cuts
        hits = self._above(scan, probes)
        collector = HitCollector(len(probes), self._snapshot.version)
        collector.scanned = cells.last - cells.first
        reranking = Reranking(self._scanner, self._snapshot, [cells], scan.rotated, collector)
        remaining = np.ones(len(hits.which), bool)
        if query.k:
            first = _best_of_each(hits.which, hits.estimate, query.k)
            reranking.compare(hits, first)
            kth = np.maximum(collector.kth(query.k), scan.min_similarity)
            cuts = scan.codec.law.cut(kth, scan.margin)
            remaining = hits.estimate >= cuts[hits.which]
            remaining[first] = False
        reranking.compare(hits, np.flatnonzero(remaining))
        collector.complete_above = scan.min_similarity
        return collector.hits()

    def search_multicolumn(self, probes: Mapping[str, Float32], query: MultiColumnQuery) -> MultiColumnHits:
        return self._native.search_multicolumn(probes, query)

    def _scan(self, probes: Float32, query: ShardQuery) -> _IndexScan | None:
        """How to search the index; None where the native engine searches."""
        column = self._part.columns.get(query.column)
        codec = None if column is None else usable_codec(self._snapshot, query.column, column, query.miss_risk)
        if column is None or codec is None or column.codec is None:
            return None
        cells = CellRange(self._snapshot, self._part, query)
        least = ROWS_A_LIST_MIN * codec.lists[0] if codec.lists else 0
        if cells.last - cells.first <= max(shared.EXACT_CELLS, least):
            return None
        rotated = column.codec.rotate_probes(probes)
        population = population_of(column)
        if query.min_similarity is None:
            # a range search costs by its hits: a second round is cheaper than many
            wanted = query.k + 2 * np.sqrt(query.k) + 2
            if wanted > _SHARE_MAX * query.total_rows:
                return None
            reached = population.reached_by(rotated, wanted / query.total_rows, standard_errors=1.0)
            min_similarity = query.wanted(reached)
        else:
            min_similarity = query.min_similarity
        margin, _ = codec.law.margin(codec.tail_risk(query.miss_risk))
        cuts = codec.law.cut(min_similarity, margin)
        mean, sd = population.similarity(rotated)
        share = codec.law.share_reaching(cuts, mean, sd)
        if len(share) and float(share.max()) > _SHARE_MAX:
            return None
        return _IndexScan(
            cells=cells,
            codec=codec,
            rotated=rotated,
            min_similarity=min_similarity,
            margin=margin,
            cuts=cuts,
            expected=share * (cells.last - cells.first),
        )

    def _above(self, scan: _IndexScan, probes: Float32) -> Hits:
        """The rows whose estimates reach the cut-offs."""
        stored = scan.cells.column.index
        assert stored is not None, "a scan has an index"
        index, selected, probes = stored.loaded(), scan.selected(), scan.codec.transformed(probes)
        which, cell, estimate = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
        with self._scanner.alone():
            for batch in scan.batches():
                least = float(scan.cuts[batch].min())
                some = np.ascontiguousarray(probes[batch])
                limits, ids, estimates = index_codec.in_range(index, scan.codec.spec, some, least, selected)
                owner = batch[np.repeat(np.arange(len(batch)), np.diff(limits))]
                reached = (estimates >= scan.cuts[owner]) & (ids >= 0) & (ids < scan.cells.column.count)
                which.append(owner[reached].astype(np.int32))
                cell.append(ids[reached])
                estimate.append(estimates[reached])
        whose = np.concatenate(which)
        return Hits(whose, np.zeros(len(whose), np.int32), np.concatenate(cell), np.concatenate(estimate), scan.cuts)


def _best_of_each(which: NDArray[np.int32], estimate: Float32, k: int) -> Int64:
    """Numbers of the k best estimates of each probe. which: the probe of each, those of a probe next to each other."""
    edges = np.flatnonzero(np.diff(which, prepend=-1, append=-1))
    best = [np.zeros(0, np.int64)]
    for low, high in pairwise(edges.tolist()):  # a partition a probe: sorting all of them takes twenty times as long
        own = np.arange(low, high)
        best.append(own if high - low <= k else own[np.argpartition(estimate[low:high], high - low - k)[-k:]])
    return np.concatenate(best)


@dataclass(frozen=True)
class _IndexScan:
    """How an index is searched. rotated: the probes, as the codes' codec rotates them; min_similarity: float32 (q,), rows of at least
    this are wanted; margin: standard deviations of the error that cut-offs allow for; expected: how many rows reach a cut-off, (q,)."""

    cells: CellRange
    codec: FaissCodec
    rotated: Float32
    min_similarity: Float32
    margin: float
    cuts: Float32
    expected: NDArray[np.float64]

    def batches(self) -> Iterator[Int64]:
        """Numbers of the probes that share a range search: their cut-offs are alike, and so many hits fit memory."""
        order, start = np.argsort(self.cuts, kind="stable"), 0
        while start < len(order):
            some = order[start:]
            alike = int(np.searchsorted(self.cuts[some], self.cuts[some[0]] + _SPREAD, "right"))
            room = int(np.searchsorted(np.cumsum(self.expected[some]), _HITS_MOST))
            end = start + max(min(alike, room), 1)
            yield order[start:end]
            start = end

    def selected(self) -> NDArray[np.uint8] | None:
        """One bit a cell: those that count; None for all."""
        cells = self.cells
        count, live = cells.column.count, cells.unit(0).live
        if not len(live) and cells.first == 0 and cells.last == count:
            return None
        bits: NDArray[Any] = live.copy() if len(live) else np.full(-(-count // 64), ~np.uint64(0))
        octets = bits.view(np.uint8)
        for low, high in ((0, cells.first), (cells.last, 8 * len(octets))):
            at = np.arange(low, min(high, -(-low // 8) * 8))  # single bits up to a whole byte, and behind the last one
            octets[-(-low // 8) : high // 8] = 0
            at = np.concatenate([at, np.arange(max(high // 8 * 8, low), high)])
            np.bitwise_and.at(octets, at // 8, ~(np.uint8(1) << (at % 8).astype(np.uint8)))
        return octets
