"""Chooses the rows of a gallery that are searched in several columns at once, and caches the plans.

Owns the cache of plans, by codec and calibration. Never scans. `plan.py` chooses a plan. Columns of the FAISS engine are searched one after the
other; `apart.py` estimates the miss risk of that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from math import floor, log10

from biodedup.config import Policy, SearchConfig
from biodedup.gallery.segments.part import Column
from biodedup.gallery.snapshot import Snapshot
from biodedup.match.compare import Comparer
from biodedup.match.staged import lone_fingers_missed
from biodedup.search.multicolumn.apart import ApartPlan, apart
from biodedup.search.multicolumn.joint import JointPlan
from biodedup.search.multicolumn.plan import (
    LlrTable,
    MultiColumnPlan,
    MultiColumnQuery,
    choose,
    codec_of,
    is_journal,
    largest_groups,
    llr_of_score,
)
from biodedup.search.multicolumn.scanned import ScannedPlan, with_miss
from biodedup.values import BIT

_REVIEW_STEP_DB = 3.0  # thresholds are rounded down to a step, so that a plan lasts until the gallery has doubled
LONE_ROWS = 4
"""Average number of impostors' rows that are candidates because of a lone finger, for each finger: between this and a quarter more."""


class MultiColumnPlanner:
    """Plans multi-column searches. Thread-safe."""

    def __init__(self, comparer: Comparer, config: SearchConfig, policy: Callable[[], Policy]) -> None:
        self._comparer = comparer
        self._config = config
        self._policy = policy
        self._plans: dict[tuple[object, ...], MultiColumnPlan | None] = {}

    def query(
        self, snapshot: Snapshot, columns: Collection[str], rescored: Collection[str] = ()
    ) -> MultiColumnQuery | None:
        """The query for rows that have several of these columns; None if no rows are searched in several columns at once. rescored: other
        columns, which are compared for the candidates alone; then the plan must find all mates whose scanned columns make them candidates."""
        native = [name for name in sorted(columns) if snapshot.indexing.spec(name).is_native]
        models = {name: snapshot.models[name] for name in native if name in snapshot.models}
        calibrations = {n: self._comparer.calibration(m.model_id) for n, m in models.items() if m.dimension is not None}
        # without measured mates the miss risk is unknown
        calibrations = {name: calibration for name, calibration in calibrations.items() if calibration.mates_measured}
        if len(calibrations) < 2 or self._config.miss_risk <= 0:
            return None
        _, review_db = self._policy().thresholds_db(snapshot.live_count)
        review_db = _REVIEW_STEP_DB * (review_db // _REVIEW_STEP_DB)
        plans = {}
        for names, group in largest_groups(snapshot, calibrations).items():
            of_group = {name: calibrations[name] for name in sorted(names)}
            codecs = [codec_of(group.part.columns[name]).codec_id for name in of_group]
            threshold_db = min(review_db, self._candidate_db(snapshot)) if rescored else review_db
            key = (threshold_db, *of_group, *of_group.values(), *codecs)
            if key not in self._plans:
                threshold_llr_db = self._comparer.llr_reaching(
                    threshold_db, [models[name].model_id for name in of_group]
                )
                self._plans[key] = choose(
                    group, of_group, self._config.miss_risk, threshold_llr_db, self._config.capture_correlation
                )
            plan = self._plans[key]
            if plan is not None:
                plans[names] = plan
        unsealed = 0 if rescored else _unsealed(snapshot, calibrations)
        if not plans and not unsealed:
            return None
        k = self._config.candidates if rescored else self._candidates(snapshot)
        tables = {name: LlrTable.of(calibration) for name, calibration in calibrations.items()}
        if not unsealed:
            return MultiColumnQuery(plans, tables, k)
        # whole decibels, so that llr_of_score has few different arguments
        rare_db = floor(10 * log10(max(unsealed / LONE_ROWS, 1.0)))
        lone_db = {name: llr_of_score(c, rare_db) for name, c in calibrations.items() if name != "face"}
        return MultiColumnQuery(plans, tables, k, joint=True, lone_db=lone_db)

    def joint(self, snapshot: Snapshot, query: MultiColumnQuery) -> JointPlan:
        """The plan of the query for the rows of the journal, with the share of lone fingers that it misses."""
        fingers, missed = len(query.lone_db), 0.0
        needed_db = self._policy().thresholds_db(snapshot.searched_count)[0] + 10 * log10(max(fingers, 1))
        for name, from_db in query.lone_db.items():
            model = self._comparer.score_model(snapshot.models[name].model_id)
            if model.with_minutiae is not None:
                missed = max(missed, lone_fingers_missed(model.alone, model.with_minutiae, needed_db, from_db))
        return JointPlan(query.columns, _unsealed(snapshot, query.columns), LONE_ROWS, missed)

    def scanned(self, snapshot: Snapshot, columns: Collection[str]) -> ScannedPlan | None:
        """The miss risk of scanning only the configured columns; None if all columns are scanned."""
        held = [n for n in sorted(columns) if n in snapshot.models and snapshot.models[n].dimension is not None]
        scanned = [name for name in held if name in self._config.scanned]
        rescored = [name for name in held if name not in scanned]
        if not self._config.scanned or not rescored:
            return None
        if not scanned:
            return ScannedPlan((), tuple(rescored), self._config.candidates)
        ids = {name: snapshot.models[name].model_id for name in held}
        calibrations = {name: self._comparer.calibration(model_id) for name, model_id in ids.items()}
        if not all(calibration.mates_measured for calibration in calibrations.values()):
            return ScannedPlan(tuple(scanned), tuple(rescored), self._config.candidates)
        _, review_db = self._policy().thresholds_db(snapshot.live_count)
        query = self.query(snapshot, scanned, rescored)
        at_once = query is not None and frozenset(scanned) in query.plans
        candidate_db = self._candidate_db(snapshot, 0.0)
        reach = [scanned] if at_once else [[name] for name in scanned]
        return with_miss(
            calibrations,
            {tuple(names): self._comparer.llr_reaching(candidate_db, [ids[n] for n in names]) for names in reach},
            self._comparer.llr_reaching(review_db, list(ids.values())),
            ScannedPlan(tuple(scanned), tuple(rescored), self._config.candidates, self._config.capture_correlation),
        )

    def _candidate_db(self, snapshot: Snapshot, step_db: float = _REVIEW_STEP_DB) -> float:
        """The score that as many impostors as there are candidates are expected to reach, rounded down to a step, so that a plan lasts. step_db: 0
        does not round."""
        exact_db = 10 * log10(max(snapshot.searched_count / self._config.candidates, 1.0))
        return step_db * (exact_db // step_db) if step_db else exact_db

    def apart(self, snapshot: Snapshot, columns: Collection[str]) -> ApartPlan | None:
        """The miss risk of searching these columns one after the other, if FAISS searches some of them. None for fewer than two columns of
        embeddings, and without measured mates."""
        by_faiss = [name for name in columns if not snapshot.indexing.spec(name).is_native]
        models = {name: snapshot.models[name] for name in sorted(columns) if name in snapshot.models}
        calibrations = {n: self._comparer.calibration(m.model_id) for n, m in models.items() if m.dimension is not None}
        largest: dict[str, tuple[Column, int]] = {}
        for part in snapshot.parts:
            for name in calibrations:
                column = part.columns.get(name)
                if column is not None and column.codec is not None:
                    known, rows = largest.get(name, (column, 0))
                    largest[name] = (column if column.count > known.count else known, rows + column.count)
        if len(largest) < 2 or not by_faiss or not all(calibrations[name].mates_measured for name in largest):
            return None
        _, review_db = self._policy().thresholds_db(snapshot.live_count)
        threshold_llr_db = self._comparer.llr_reaching(review_db, [models[name].model_id for name in largest])
        return apart(largest, calibrations, self._config.candidates, threshold_llr_db, self._config.capture_correlation)

    def _candidates(self, snapshot: Snapshot) -> int:
        # the order by all embeddings is nearly final, unless rows have other captures to compare
        others = any(m.dimension is None or self._comparer.adds_minutiae(m.model_id) for m in snapshot.models.values())
        return self._config.candidates if others else min(4 * self._config.returned, self._config.candidates)


def _unsealed(snapshot: Snapshot, columns: Collection[str]) -> int:
    """The number of rows in parts without codes if some of these rows have several of the columns; otherwise 0."""
    bits = sum(BIT[column] for column in columns)
    parts = [part for part in snapshot.parts if is_journal(part, columns)]
    several = any((has & bits).bit_count() > 1 for part in parts for has in part.bits)
    return sum(part.count for part in parts) if several else 0
