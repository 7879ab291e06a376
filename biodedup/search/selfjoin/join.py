"""Finds the pairs of enrolled rows that score at least a threshold: the self-join of a gallery.

Owns which rows are compared with which. Never decides and never writes.

1. Galleries of faces alone: each row is compared with the rows behind it, or, in a large gallery, only with the rows
   that share an LSH bucket with it (`buckets.py`).
2. Other galleries: each row is searched for like a probe.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biodedup.config import SearchConfig
from biodedup.errors import GalleryDamaged
from biodedup.gallery.segments.part import Column
from biodedup.gallery.snapshot import Snapshot
from biodedup.match.calibrations import SampleOf
from biodedup.match.compare import Comparer
from biodedup.match.ranked import Comparison
from biodedup.search.scope import Scope
from biodedup.search.searcher import PROBES, Searcher, SnapshotRows
from biodedup.search.selfjoin.bucket_join import join_buckets, parts_with_codec
from biodedup.search.selfjoin.buckets import Buckets, choose
from biodedup.search.selfjoin.estimate import JoinEstimate, estimate_of
from biodedup.values import BIT, Float32, Template

JOIN_ROWS = 4096
"""Rows that are compared at once with all rows behind them."""
_SEARCHED_ROWS = 32  # searched for at once, where rows have more than a face

RowPair = tuple[int, Comparison]
"""A row, and its comparison with another row."""


class SelfJoin:
    """Self-joins of snapshots. Thread-safe."""

    def __init__(self, searcher: Searcher, comparer: Comparer, config: SearchConfig) -> None:
        self._searcher = searcher
        self._comparer = comparer
        self._config = config
        self._buckets: list[tuple[tuple[Column, int, float], Buckets | None]] = []  # of the last join alone

    def calibrated_on(self, sample_of: SampleOf) -> SelfJoin:
        """The same self-join, with scores that are calibrated on these subjects."""
        join = copy(self)
        join._searcher = self._searcher.calibrated_on(sample_of)
        join._comparer = self._comparer.calibrated_on(sample_of)
        return join

    def buckets(self, snapshot: Snapshot, threshold_db: float) -> Buckets | None:
        """The LSH buckets by which a gallery of faces is joined, for pairs that score threshold_db or more; None if all
        pairs are compared."""
        columns = [part.columns["face"] for part in snapshot.parts if "face" in part.columns]
        largest = max(columns, key=lambda column: column.count, default=None)
        if not _has_faces_only(snapshot) or largest is None or largest.codec is None:
            return None
        model_id = snapshot.models["face"].model_id
        inside = {id(part) for part in parts_with_codec(snapshot, "face", largest.codec)}
        rows = snapshot.live_count - sum(part.count for part in snapshot.parts if id(part) not in inside)
        key = (largest, rows, self._searcher.similarity_reaching(model_id, threshold_db))
        known = next(iter(self._buckets), None)
        if known is None or known[0] != key:
            known = key, choose(*key[:2], self._comparer.calibration(model_id), key[2], self._config.miss_risk)
            self._buckets[:] = [known]
        return known[1]

    def estimate(
        self, snapshot: Snapshot, subjects: int, threshold_db: float, *, listed: int | None = None
    ) -> tuple[Buckets | None, JoinEstimate]:
        """(the buckets of the join, what it is expected to take). listed: so many subjects are compared with all; None: all are."""
        buckets = None if listed is not None else self.buckets(snapshot, threshold_db)
        faces_only, columns = _has_faces_only(snapshot), len(snapshot.models)
        given: dict[str, Any] = {"faces_only": faces_only, "listed": listed, "buckets": buckets}
        return buckets, estimate_of(subjects, threshold_db, columns, **given)

    def pairs(
        self, snapshot: Snapshot, rows: Sequence[int], threshold_db: float, *, with_all: bool = False
    ) -> list[RowPair]:
        """Pairs of one of these live rows, ascending, and a row behind it, that score threshold_db or more; each once.
        with_all: of one of these rows and any other row."""
        if not _has_faces_only(snapshot):
            return self._searched(snapshot, rows, threshold_db)
        faces = snapshot.embeddings(rows, "face")
        model_id = snapshot.models["face"].model_id
        similarity = np.full(len(rows), self._searcher.similarity_reaching(model_id, threshold_db), np.float32)
        # The last part, the tail, has no codes and is compared exactly: once, together with its own rows.
        tail = snapshot.parts[-1].first_row
        everywhere = rows[-1] >= tail or with_all
        scope = Scope(snapshot, 0 if everywhere else rows[0])
        query = replace(scope.query("face", 0, self._config.miss_risk), end_row=None if everywhere else tail)
        near: list[tuple[NDArray[np.int64], Float32]] = []
        for low in range(0, len(rows), PROBES):
            some = slice(low, low + PROBES)
            reached = self._searcher.fan_out.reached(
                self._searcher.shards(snapshot), faces[some], replace(query, min_similarity=similarity[some])
            )
            if reached.failures:
                raise GalleryDamaged(f"a self-join needs every row, and a shard failed: {reached.failures[0]}")
            near += reached.found
        others = []
        for row, (found, _) in zip(rows, near, strict=True):
            behind = (found > row) & (found < tail) if row < tail else (found < tail) | (found > row)
            others.append(found[found != row if with_all else behind])
        return self._reaching(snapshot, rows, faces, others, threshold_db)

    def pairs_in_buckets(self, snapshot: Snapshot, buckets: Buckets, some: slice, threshold_db: float) -> list[RowPair]:
        """Pairs of live rows, the lower one first, that share one of some buckets and score threshold_db or more; each
        once."""
        low, high = join_buckets(self._searcher.scanner, snapshot, "face", buckets, some)
        rows, starts = np.unique(low, return_index=True)
        faces = snapshot.embeddings(rows.tolist(), "face")
        return self._reaching(snapshot, rows.tolist(), faces, np.split(high, starts)[1:], threshold_db)

    def _reaching(
        self,
        snapshot: Snapshot,
        rows: Sequence[int],
        faces: Float32,
        others: Sequence[NDArray[np.int64]],
        threshold_db: float,
    ) -> list[RowPair]:
        """Compares each row's face with its other rows; returns the pairs that score threshold_db or more."""
        source, model_id, pairs = SnapshotRows(snapshot), snapshot.models["face"].model_id, []
        for row, face, candidates in zip(rows, faces, others, strict=True):
            if len(candidates):
                probe = {"face": Template("face", model_id, face)}
                compared = self._searcher.compare(probe, source, candidates, _excluded_rows(snapshot, row))
                pairs += [(row, comparison) for comparison in compared.reaching(threshold_db)]
        return pairs

    def _searched(self, snapshot: Snapshot, rows: Sequence[int], threshold_db: float) -> list[RowPair]:
        """The pairs found by searching for each row in the whole gallery."""
        pairs: dict[tuple[int, int], RowPair] = {}
        for start in range(0, len(rows), _SEARCHED_ROWS):
            some = rows[start : start + _SEARCHED_ROWS]
            probes = [snapshot.templates(row) for row in some]
            excluded = [_excluded_rows(snapshot, row) for row in some]
            across = self._config.across_positions
            results = self._searcher.search(snapshot, probes, floor_db=threshold_db, across=across, excluded=excluded)
            for row, candidates in zip(some, results, strict=True):
                for comparison in candidates.comparisons.reaching(threshold_db):
                    # the search for the other row may miss this pair, so it counts from either side
                    pairs.setdefault((min(row, comparison.row), max(row, comparison.row)), (row, comparison))
        return list(pairs.values())


def _has_faces_only(snapshot: Snapshot) -> bool:
    removed = 0  # the presence of a removed subject that is still in the journal
    return all(bits in (BIT["face"], removed) for part in snapshot.parts for bits in part.bits)


def _excluded_rows(snapshot: Snapshot, row: int) -> Collection[int]:
    """Rows that a row is not joined with: those of the same subject, and those judged to be of another person."""
    return {*snapshot.siblings(row), *snapshot.different.get(row, ())}
