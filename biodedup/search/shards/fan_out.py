"""Searches several shards in parallel and merges their hits into one result.

Owns the thread pool that calls shards, the merge of their hits, and the second round. Never scans and never decides.

A shard's hits are complete above a similarity (`ShardHits.complete_above`). If the k-th best similarity over all shards is lower, this shard
is asked in a second round for all rows from the k-th best on. Usually no shard needs a second round.

1. If some shards fail, the result has the hits of the other shards and names the failures. If all shards fail, or a queue is full
   (`QueueFull`), the search raises.
2. Equal similarities are ordered by row, the lower row first.

`faiss.merge_knn_results` is not used: it needs exactly k hits per shard, and orders equal similarities by shard.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np

from biodedup.errors import BiodedupError
from biodedup.gallery.segments.part import Int64
from biodedup.search.multicolumn.plan import MultiColumnHits, MultiColumnQuery
from biodedup.search.native.exact_pairs import ranked
from biodedup.search.shards.base import QueueFull, Shard, ShardHits, ShardQuery
from biodedup.values import Float32

_log = logging.getLogger("biodedup.search")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Nearest:
    """The merged hits. rows: int64 (q, k), padded with -1. similarity: float32 (q, k), descending, padded with -inf. failures: a message for
    each failed shard; with a failure the result is incomplete."""

    rows: Int64
    similarity: Float32
    rows_scanned: int
    compared: int
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Reached:
    """All rows of at least a similarity. found: for each probe (rows int64 (n,), similarity float32 (n,), descending)."""

    found: tuple[tuple[Int64, Float32], ...]
    failures: tuple[str, ...]


class FanOut:
    """Searches shards in parallel. Thread-safe."""

    def __init__(self) -> None:
        # its threads only wait: for the pool of the scan, or for other machines
        self._pool = ThreadPoolExecutor(16, "biodedup-shard")

    def close(self) -> None:
        self._pool.shutdown()

    def nearest(self, shards: Sequence[Shard], probes: Float32, query: ShardQuery) -> Nearest:
        """The k most similar rows of all shards, without those below `query.floor_similarity`."""
        hits, failures = self._search(shards, [(probes, query)] * len(shards))
        rows, similarity = top_k(hits.values(), len(probes), query.k)
        scanned, compared = sum(h.rows_scanned for h in hits.values()), sum(h.compared for h in hits.values())
        kth = query.wanted(similarity[:, -1])
        incomplete = {i: np.flatnonzero(h.complete_above > kth) for i, h in hits.items()}
        incomplete = {i: which for i, which in incomplete.items() if len(which)}
        if incomplete:
            captures = sum(map(len, incomplete.values()))
            _log.debug("second round: %d captures in %d of %d shards", captures, len(incomplete), len(shards))
            second = [
                (probes[which], replace(query, min_similarity=kth[which], floor_similarity=None))
                for which in incomplete.values()
            ]
            more, lost = self._search([shards[i] for i in incomplete], second)
            failures += lost
            for place, (i, which) in enumerate(incomplete.items()):
                if place in more:
                    hits[i] = _replaced(hits[i], which, more[place])
                    compared += more[place].compared
            rows, similarity = top_k(hits.values(), len(probes), query.k)
        if query.floor_similarity is not None:
            weak = similarity < query.floor_similarity[:, None]
            rows, similarity = np.where(weak, -1, rows), np.where(weak, np.float32(-np.inf), similarity)
        return Nearest(rows, similarity, scanned, compared, tuple(failures))

    def reached(self, shards: Sequence[Shard], probes: Float32, query: ShardQuery) -> Reached:
        """All rows of at least query.min_similarity."""
        hits, failures = self._search(shards, [(probes, query)] * len(shards))
        which, rows, similarity = _joined(hits.values())
        order, _ = ranked(which, similarity, rows, len(probes))
        cuts = np.searchsorted(which[order], np.arange(1, len(probes)))
        by_probe = zip(np.split(rows[order], cuts), np.split(similarity[order], cuts), strict=True)
        return Reached(tuple(by_probe), tuple(failures))

    def multicolumn(
        self, shards: Sequence[Shard], probes: Mapping[str, Float32], query: MultiColumnQuery
    ) -> tuple[MultiColumnHits, tuple[str, ...]]:
        """(the hits of all shards, by probe, most evidence first; a message for each failed shard)."""
        hits, failures = self._all([partial(shard.search_multicolumn, probes, query) for shard in shards])
        which, rows, llr_db = (
            np.concatenate([getattr(h, name) for h in hits.values()]) for name in ("which", "rows", "llr_db")
        )
        order, rank = ranked(which, llr_db, rows, len(next(iter(probes.values()))))
        lone = np.concatenate([np.zeros(len(h.which), bool) if h.lone is None else h.lone for h in hits.values()])
        kept = order[(rank < query.k) | (llr_db[order] >= query.floor_llr_db) | lone[order]]
        passed = sum(h.passed for h in hits.values())
        scanned = sum(h.rows_scanned for h in hits.values())
        return MultiColumnHits(which[kept], rows[kept], llr_db[kept], scanned, passed, lone[kept]), tuple(failures)

    def _search(
        self, shards: Sequence[Shard], queries: Sequence[tuple[Float32, ShardQuery]]
    ) -> tuple[dict[int, ShardHits], list[str]]:
        return self._all([partial(shard.search, *query) for shard, query in zip(shards, queries, strict=True)])

    def _all(self, calls: Sequence[Callable[[], _Result]]) -> tuple[dict[int, _Result], list[str]]:
        """(shard number -> result, messages of the failed shards)."""
        pending = list(calls)
        if len(pending) > 1:
            pending = [self._pool.submit(call).result for call in calls]
        results: dict[int, _Result] = {}
        errors: dict[int, BiodedupError | OSError] = {}
        for i, result in enumerate(pending):
            try:
                results[i] = result()
            except QueueFull:
                raise
            except (BiodedupError, OSError) as error:
                errors[i] = error
        if errors and not results:
            raise next(iter(errors.values()))
        for i, failed in errors.items():
            _log.warning("a search is incomplete: shard %d: %s", i, failed)
        return results, [f"shard {i}: {failed}" for i, failed in errors.items()]


def _joined(hits: Iterable[ShardHits]) -> tuple[Int64, Int64, Float32]:
    """(probe numbers, rows, similarities) of several shards, unordered."""
    arrays = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))]
    arrays += [(h.which, h.rows, h.similarity) for h in hits]
    which, rows, similarity = zip(*arrays, strict=True)
    return np.concatenate(which), np.concatenate(rows), np.concatenate(similarity)


def top_k(hits: Iterable[ShardHits], count: int, k: int) -> tuple[Int64, Float32]:
    """The k best hits of each of `count` probes: (rows int64 (count, k), padded with -1; similarity float32 (count, k), padded with
    -inf)."""
    which, rows, similarity = _joined(hits)
    order, rank = ranked(which, similarity, rows, count)
    kept = order[rank < k]
    best_rows, best = np.full((count, k), -1), np.full((count, k), -np.inf, np.float32)
    best_rows[which[kept], rank[rank < k]] = rows[kept]
    best[which[kept], rank[rank < k]] = similarity[kept]
    return best_rows, best


def _replaced(hits: ShardHits, which: Int64, second: ShardHits) -> ShardHits:
    """The hits, with the hits of the probes `which` replaced by those of the second round."""
    keep = ~np.isin(hits.which, which)
    return replace(
        hits,
        which=np.concatenate([hits.which[keep], which[second.which]]),
        rows=np.concatenate([hits.rows[keep], second.rows]),
        similarity=np.concatenate([hits.similarity[keep], second.similarity]),
    )
