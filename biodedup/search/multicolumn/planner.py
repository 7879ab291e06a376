"""Decides for a gallery which rows are searched in several columns at once, and keeps the plans that it chose.

Owns the plans of the last galleries, by codec and calibration. Never scans; how a plan is chosen: `plan.py`. Columns of the FAISS engine
are searched one after the other; what that misses: `apart.py`.
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

_REVIEW_STEP_DB = 3.0  # the threshold is rounded down to this, so that a plan lasts until the gallery has doubled
LONE_ROWS = 4
"""Of each finger, rows of impostors that are candidates because this finger agrees alone, on average: so many to five quarters of that."""


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
        """The query for rows that have several of these columns; None if no rows are searched in several columns at
        once. rescored: other columns, which are compared for the candidates alone; then the plan is for all mates that these columns put among
        the candidates."""
        native = [name for name in sorted(columns) if snapshot.indexing.spec(name).is_native]
        models = {name: snapshot.models[name] for name in native if name in snapshot.models}
        calibrations = {n: self._comparer.calibration(m.model_id) for n, m in models.items() if m.dimension is not None}
        # without measured mates nothing can be said of what is missed
        calibrations = {name: calibration for name, calibration in calibrations.items() if calibration.mates_measured}
        if len(calibrations) < 2 or self._config.miss_risk <= 0:
            return None
        _, review_db = self._policy().thresholds_db(snapshot.live_count)
        review_db = _REVIEW_STEP_DB * (review_db // _REVIEW_STEP_DB)
        plans = {}
        for names, group in largest_groups(snapshot, calibrations).items():
            of_group = {name: calibrations[name] for name in sorted(names)}
            codecs = [codec_of(group.part.columns[name]).codec_id for name in of_group]
            least_db = min(review_db, self._candidate_db(snapshot)) if rescored else review_db
            key = (least_db, *of_group, *of_group.values(), *codecs)
            if key not in self._plans:
                threshold_llr_db = self._comparer.llr_reaching(least_db, [models[name].model_id for name in of_group])
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
        rare_db = floor(
            10 * log10(max(unsealed / LONE_ROWS, 1.0))
        )  # whole decibels, so that its evidence is computed seldom
        lone_db = {name: llr_of_score(c, rare_db) for name, c in calibrations.items() if name != "face"}
        return MultiColumnQuery(plans, tables, k, joint=True, lone_db=lone_db)

    def joint(self, snapshot: Snapshot, query: MultiColumnQuery) -> JointPlan:
        """How the query compares the rows of the journal, and which fingers that agree alone it misses."""
        fingers, missed = len(query.lone_db), 0.0
        needed_db = self._policy().thresholds_db(snapshot.searched_count)[0] + 10 * log10(max(fingers, 1))
        for name, from_db in query.lone_db.items():
            model = self._comparer.score_model(snapshot.models[name].model_id)
            if model.with_minutiae is not None:
                missed = max(missed, lone_fingers_missed(model.alone, model.with_minutiae, needed_db, from_db))
        return JointPlan(query.columns, _unsealed(snapshot, query.columns), LONE_ROWS, missed)

    def scanned(self, snapshot: Snapshot, columns: Collection[str]) -> ScannedPlan | None:
        """What is missed because only the configured columns of these are scanned; None if all are scanned."""
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
        together = self.query(snapshot, scanned, rescored)
        at_once = together is not None and frozenset(scanned) in together.plans
        candidate_db = self._candidate_db(snapshot, 0.0)
        reach = [scanned] if at_once else [[name] for name in scanned]
        return with_miss(
            calibrations,
            {tuple(some): self._comparer.llr_reaching(candidate_db, [ids[name] for name in some]) for some in reach},
            self._comparer.llr_reaching(review_db, list(ids.values())),
            ScannedPlan(tuple(scanned), tuple(rescored), self._config.candidates, self._config.capture_correlation),
        )

    def _candidate_db(self, snapshot: Snapshot, step_db: float = _REVIEW_STEP_DB) -> float:
        """The score that as many rows as there are candidates reach by chance, rounded down to a step, so that a plan lasts; 0 for none."""
        exact_db = 10 * log10(max(snapshot.searched_count / self._config.candidates, 1.0))
        return step_db * (exact_db // step_db) if step_db else exact_db

    def apart(self, snapshot: Snapshot, columns: Collection[str]) -> ApartPlan | None:
        """What is missed of rows that are searched in these columns one after the other, because FAISS searches some of them; None for
        fewer than two columns that are compared by embeddings, or without measured mates."""
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
        # The order by all embeddings is nearly final, unless rows have other captures to compare.
        others = any(m.dimension is None or self._comparer.adds_minutiae(m.model_id) for m in snapshot.models.values())
        return self._config.candidates if others else min(4 * self._config.returned, self._config.candidates)


def _unsealed(snapshot: Snapshot, columns: Collection[str]) -> int:
    """How many rows the parts without codes have, if some of these rows have several of the columns."""
    bits = sum(BIT[column] for column in columns)
    parts = [part for part in snapshot.parts if is_journal(part, columns)]
    several = any((has & bits).bit_count() > 1 for part in parts for has in part.bits)
    return sum(part.count for part in parts) if several else 0
