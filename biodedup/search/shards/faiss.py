"""The FAISS index engine: searches a segment's FAISS index, and compares the best hits exactly by the stored eight-bit vectors.

Owns the search of a segment's indexes. Never trains or builds an index (`gallery/indexing.py`), and never merges shards.

1. As in the native engine, the similarity that the k best rows reach is predicted from the distribution of unrelated rows.
2. FAISS estimates similarities. The cut-off is below the predicted similarity by a margin: a row at this similarity is lost with at most
   the miss risk, by the estimate's error on planted mates (`files/index_codec.py`).
3. A range search finds all rows above the cut-off, and the best of them are compared exactly.

The native engine searches instead if the index's codec cannot keep the miss risk, if there are few rows, or if a large share of all rows
reaches the cut-off.
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
"""Minimum number of rows per inverted list. A list costs FAISS 0.5 us per probe in batches of 256, and 3 us for a single probe. With fewer rows
the native engine is ten times as fast."""
_FIRST = 4
"""Times k: of the best estimates so many are compared first, so that the k-th best similarity raises the cut-off for the others."""
_SPREAD = 0.02  # greatest difference of cut-offs that share a range search, which has a single radius
_HITS_MAX = 1 << 23  # expected hits of a range search


def shards(snapshot: Snapshot, scanner: Scanner) -> list[Shard]:
    """The shards of a snapshot: each segment with an index is a shard; the other parts form native shards."""
    return [shard_of(snapshot, parts, scanner) for parts in divided(snapshot)]


def divided(snapshot: Snapshot) -> list[Sequence[Part]]:
    """The parts of each shard of a snapshot."""
    indexed = [part for part in snapshot.parts if _is_indexed(part)]
    others = [part for part in snapshot.parts if part not in indexed]
    return [*([part] for part in indexed), *shares(others)]


def shard_of(snapshot: Snapshot, parts: Sequence[Part], scanner: Scanner) -> Shard:
    """The shard of some parts. parts: an item of `divided`."""
    if any(map(_is_indexed, parts)):
        (part,) = parts
        return FaissShard(snapshot, part, scanner)
    return NativeShard(snapshot, parts, scanner)


def _is_indexed(part: Part) -> bool:
    return any(column.index is not None for column in part.columns.values())


def usable_codec(snapshot: Snapshot, name: str, column: Column, miss_risk: float) -> FaissCodec | None:
    """The codec of a column's index; None if there is no index, or if its codec does not keep this miss risk."""
    if column.index is None or miss_risk <= 0:
        return None
    codec = snapshot.indexing.codec(name, column.index.codec_id)
    if codec is None or not (codec.keeps(miss_risk) or snapshot.indexing.forced):
        return None
    return codec


class FaissShard:
    """A segment with FAISS indexes, as a `Shard`."""

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
        kth = None
        if query.k and len(hits.which) > query.k:  # of fewer, none is too weak
            first = _best_of_each(hits.which, hits.estimate, _FIRST * query.k)
            reranking.compare(hits, first)
            kth = collector.kth(query.k)
            cuts = scan.codec.law.cut(np.maximum(kth, scan.min_similarity), scan.margin)
            remaining = hits.estimate >= cuts[hits.which]
            remaining[first] = False
        reranking.compare(hits, np.flatnonzero(remaining))
        collector.complete_above = scan.min_similarity
        return collector.hits(kth)

    def search_multicolumn(self, probes: Mapping[str, Float32], query: MultiColumnQuery) -> MultiColumnHits:
        return self._native.search_multicolumn(probes, query)

    def _scan(self, probes: Float32, query: ShardQuery) -> _IndexScan | None:
        """How to search the index; None if the native engine searches."""
        column = self._part.columns.get(query.column)
        codec = None if column is None else usable_codec(self._snapshot, query.column, column, query.miss_risk)
        if column is None or codec is None or column.codec is None:
            return None
        cells = CellRange(self._snapshot, self._part, query)
        rows_min = ROWS_A_LIST_MIN * codec.lists[0] if codec.lists else 0
        if cells.last - cells.first <= max(shared.EXACT_CELLS, rows_min):
            return None
        rotated = column.codec.rotate_probes(probes)
        population = population_of(column)
        if query.min_similarity is None:
            # the cost of a range search grows with its hits, so that an occasional second round is cheaper than many hits
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
        """The hits whose estimates reach the cut-offs."""
        stored = scan.cells.column.index
        assert stored is not None, "a scan has an index"
        index, selected, probes = stored.loaded(), scan.selected(), scan.codec.transformed(probes)
        which, cell, estimate = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
        with self._scanner.alone():
            for batch in scan.batches():
                radius = float(scan.cuts[batch].min())
                of_batch = np.ascontiguousarray(probes[batch])
                limits, ids, estimates = index_codec.in_range(index, scan.codec.spec, of_batch, radius, selected)
                owner = batch[np.repeat(np.arange(len(batch)), np.diff(limits))]
                reached = (estimates >= scan.cuts[owner]) & (ids >= 0) & (ids < scan.cells.column.count)
                which.append(owner[reached].astype(np.int32))
                cell.append(ids[reached])
                estimate.append(estimates[reached])
        numbers = np.concatenate(which)
        zeros = np.zeros(len(numbers), np.int32)
        return Hits(numbers, zeros, np.concatenate(cell), np.concatenate(estimate), scan.cuts)


def _best_of_each(which: NDArray[np.int32], estimate: Float32, k: int) -> Int64:
    """The indices of the k best estimates of each probe. which: the probe of each estimate; equal probes are adjacent."""
    edges = np.flatnonzero(np.diff(which, prepend=-1, append=-1))
    best = [np.zeros(0, np.int64)]
    for low, high in pairwise(edges.tolist()):  # a partition per probe is twenty times as fast as a sort
        of_probe = np.arange(low, high)
        best.append(of_probe if high - low <= k else of_probe[np.argpartition(estimate[low:high], high - low - k)[-k:]])
    return np.concatenate(best)


@dataclass(frozen=True)
class _IndexScan:
    """How an index is searched. rotated: the probes, as the codes' codec rotates them. min_similarity: float32 (q,), the wanted similarity.
    margin: distance to the cut-offs, in standard deviations of the error. cuts: float32 (q,), the cut-offs. expected: float64 (q,), the
    expected number of rows above each cut-off."""

    cells: CellRange
    codec: FaissCodec
    rotated: Float32
    min_similarity: Float32
    margin: float
    cuts: Float32
    expected: NDArray[np.float64]

    def batches(self) -> Iterator[Int64]:
        """The numbers of the probes that share a range search: they have similar cut-offs, and their hits fit into memory."""
        order, start = np.argsort(self.cuts, kind="stable"), 0
        while start < len(order):
            rest = order[start:]
            similar = int(np.searchsorted(self.cuts[rest], self.cuts[rest[0]] + _SPREAD, "right"))
            room = int(np.searchsorted(np.cumsum(self.expected[rest]), _HITS_MAX))
            end = start + max(min(similar, room), 1)
            yield order[start:end]
            start = end

    def selected(self) -> NDArray[np.uint8] | None:
        """A bit per cell, set for cells that count; None if all cells count."""
        cells = self.cells
        count, live = cells.column.count, cells.unit(0).live
        if not len(live) and cells.first == 0 and cells.last == count:
            return None
        bits: NDArray[Any] = live.copy() if len(live) else np.full(-(-count // 64), ~np.uint64(0))
        octets = bits.view(np.uint8)
        for low, high in ((0, cells.first), (cells.last, 8 * len(octets))):
            at = np.arange(
                low, min(high, -(-low // 8) * 8)
            )  # single bits before the first and after the last whole byte
            octets[-(-low // 8) : high // 8] = 0
            at = np.concatenate([at, np.arange(max(high // 8 * 8, low), high)])
            np.bitwise_and.at(octets, at // 8, ~(np.uint8(1) << (at % 8).astype(np.uint8)))
        return octets
