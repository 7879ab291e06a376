"""Finds the pairs of enrolled rows that score at least a threshold: the self-join of a gallery.

Owns the choice of the rows that are compared with each other. Never decides and never writes.

1. In a gallery that has only faces, each row is compared with all later rows. In a large gallery it is compared only with the rows that share
   an LSH bucket with it (`buckets.py`).
2. In any other gallery, each row is searched as a probe among the later rows. So each pair is searched once, with the miss risk of a search.
   If subjects have several rows, each row is searched in the whole gallery.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biodedup.common.executors import results_in_order
from biodedup.config import SearchConfig
from biodedup.errors import GalleryDamaged
from biodedup.gallery.segments.part import Column
from biodedup.gallery.snapshot import Snapshot
from biodedup.match.compare import Comparer
from biodedup.match.ranked import Ranked
from biodedup.match.scores.calibrations import SampleOf
from biodedup.search.scope import Scope
from biodedup.search.searcher import PROBES, CandidateSet, Searcher, SnapshotRows
from biodedup.search.selfjoin.bucket_join import join_buckets, parts_with_codec
from biodedup.search.selfjoin.buckets import Buckets, choose
from biodedup.search.selfjoin.crowds import FoundPairs, PairCollector
from biodedup.search.selfjoin.estimate import JoinEstimate, estimate_of
from biodedup.values import BIT, Float32, Template

JOIN_ROWS = 4096
"""Rows in a tile, which is compared with all later rows."""
_ROWS_FIRST, _PAIRS_AT_ONCE = 16, 1 << 15
"""Number of rows in the first scan of a tile, and expected pairs of a later scan. The number of rows per scan depends on the pairs found so
far, so that crowds fit into memory."""
_SEARCHED_ROWS, _BATCHES = 128, 2
"""If rows have more than a face: the number of rows that are searched in one call, and of calls that run at the same time."""


class SelfJoin:
    """Self-joins of snapshots. Thread-safe."""

    def __init__(self, searcher: Searcher, comparer: Comparer, config: SearchConfig) -> None:
        self._searcher = searcher
        self._comparer = comparer
        self._config = config
        self._buckets: list[tuple[tuple[Column, int, float], Buckets | None]] = []  # of the last join only

    def calibrated_on(self, sample_of: SampleOf) -> SelfJoin:
        """The same self-join, with calibrations measured on these subjects."""
        join = copy(self)
        join._searcher = self._searcher.calibrated_on(sample_of)
        join._comparer = self._comparer.calibrated_on(sample_of)
        return join

    def buckets(self, snapshot: Snapshot, threshold_db: float) -> Buckets | None:
        """The LSH buckets for a join of a gallery of faces at threshold_db; None if all pairs are compared."""
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
        """(the buckets of the join, its estimate). listed: number of subjects that are compared with all subjects; None: all."""
        buckets = None if listed is not None else self.buckets(snapshot, threshold_db)
        faces_only, columns = _has_faces_only(snapshot), len(snapshot.models)
        given: dict[str, Any] = {"faces_only": faces_only, "listed": listed, "buckets": buckets}
        return buckets, estimate_of(subjects, threshold_db, columns, **given)

    def pairs(
        self, snapshot: Snapshot, rows: Sequence[int], threshold_db: float, *, with_all: bool = False
    ) -> FoundPairs:
        """The pairs of a row of `rows` and a later row that score at least threshold_db, each once. rows: live rows, ascending. with_all: also
        pairs with earlier rows."""
        if not _has_faces_only(snapshot):
            return self._searched(snapshot, rows, threshold_db, with_all=with_all)
        faces = snapshot.embeddings(rows, "face")
        model_id = snapshot.models["face"].model_id
        similarity = np.full(len(rows), self._searcher.similarity_reaching(model_id, threshold_db), np.float32)
        # the last part, the tail, has no codes; it is compared exactly, once, in the scan of its own rows
        tail = snapshot.parts[-1].first_row
        everywhere = rows[-1] >= tail or with_all
        scope = Scope(snapshot, 0 if everywhere else rows[0])
        query = replace(scope.query("face", 0, self._config.miss_risk), end_row=None if everywhere else tail)
        collector = self._collector(snapshot, threshold_db)
        low, at_once = 0, _ROWS_FIRST
        while low < len(rows):
            part = slice(low, low + at_once)
            reached = self._searcher.fan_out.reached(
                self._searcher.shards(snapshot), faces[part], replace(query, min_similarity=similarity[part])
            )
            if reached.failures:
                raise GalleryDamaged(f"a self-join needs every row, and a shard failed: {reached.failures[0]}")
            for row, face, (reached_rows, _) in zip(rows[part], faces[part], reached.found, strict=True):
                up_to_tail, after_row = reached_rows < tail, reached_rows > row
                later = after_row & up_to_tail if row < tail else up_to_tail | after_row
                others = reached_rows[reached_rows != row if with_all else later]
                if len(others):
                    collector.add(row, self._compared(snapshot, row, others, face))
            low += len(reached.found)
            most = max(len(found) for found, _ in reached.found)
            at_once = min(PROBES, max(_PAIRS_AT_ONCE // max(most, 1), _ROWS_FIRST))
        return collector.found()

    def pairs_in_buckets(self, snapshot: Snapshot, buckets: Buckets, step: slice, threshold_db: float) -> FoundPairs:
        """The pairs of live rows, the lower row first, that share a bucket of this step and score at least threshold_db, each once."""
        low, high = join_buckets(self._searcher.scanner, snapshot, "face", buckets, step)
        rows, starts = np.unique(low, return_index=True)
        faces = snapshot.embeddings(rows.tolist(), "face")
        collector = self._collector(snapshot, threshold_db)
        for row, face, others in zip(rows.tolist(), faces, np.split(high, starts)[1:], strict=True):
            collector.add(row, self._compared(snapshot, row, others, face))
        return collector.found()

    def _collector(self, snapshot: Snapshot, threshold_db: float) -> PairCollector:
        def compare(row: int, others: NDArray[np.int64]) -> Ranked:
            return self._compared(snapshot, row, others)

        return PairCollector(compare, snapshot.siblings, threshold_db, kinds=not _has_faces_only(snapshot))

    def _compared(self, snapshot: Snapshot, row: int, others: NDArray[np.int64], face: Float32 | None = None) -> Ranked:
        """The comparisons of a row with other rows. face: its embedding if it has only a face, or None."""
        faces_only = face is not None
        probe = (
            {"face": Template("face", snapshot.models["face"].model_id, face)}
            if faces_only
            else snapshot.templates(row)
        )
        across = self._config.across_positions and not faces_only
        return self._searcher.compare(probe, SnapshotRows(snapshot), others, _excluded_rows(snapshot, row), across)

    def _searched(self, snapshot: Snapshot, rows: Sequence[int], threshold_db: float, *, with_all: bool) -> FoundPairs:
        """The pairs found by searching for each row among the later rows; with_all: in the whole gallery. If subjects have several rows,
        always in the whole gallery: their rows are compared together, so that the score of a pair depends on which of them is the probe."""
        all_rows = with_all or bool(snapshot.extra_rows)
        collector = self._collector(snapshot, threshold_db)
        batches = [rows[start : start + _SEARCHED_ROWS] for start in range(0, len(rows), _SEARCHED_ROWS)]

        def search(some: Sequence[int]) -> list[CandidateSet]:
            excluded = [_excluded_rows(snapshot, row) for row in some]
            across, probes = self._config.across_positions, snapshot.templates_of(some)
            return self._searcher.search(
                snapshot,
                probes,
                from_row=0 if all_rows else some[0] + 1,
                floor_db=threshold_db,
                across=across,
                excluded=excluded,
            )

        # while one batch waits for its scan, another is compared
        with ThreadPoolExecutor(min(_BATCHES, self._searcher.scanner.threads), "biodedup-join") as pool:
            for some, results in zip(
                batches, results_in_order(lambda some: pool.submit(search, some), batches, _BATCHES), strict=True
            ):
                for row, candidates in zip(some, results, strict=True):
                    collector.add(row, candidates.comparisons)
        return collector.found()


def _has_faces_only(snapshot: Snapshot) -> bool:
    removed = 0  # the presence of a removed subject that is still in the journal
    return all(bits in (BIT["face"], removed) for part in snapshot.parts for bits in part.bits)


def _excluded_rows(snapshot: Snapshot, row: int) -> Collection[int]:
    """The rows that are not compared with a row: rows of the same subject, and rows that a person judged to be of another person."""
    return {*snapshot.siblings(row), *snapshot.different.get(row, ())}
