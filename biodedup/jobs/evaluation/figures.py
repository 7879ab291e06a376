"""Computes the figures of an evaluation: error rates and counts of labelled comparisons, in the layout of the JSON result.

Owns the choice of figures and their layout; `rates.py` has the arithmetic. Never compares templates, and never writes a file.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biodedup.config import Policy
from biodedup.jobs.evaluation.comparisons import Comparisons
from biodedup.jobs.evaluation.rates import (
    Rate,
    Resampling,
    bands_of,
    cmc,
    det,
    difference,
    equal_error_rate,
    threshold_at,
)

FMR_TARGETS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
FPIR_TARGETS = (1e-1, 1e-2, 1e-3)
NOMINAL_DB = (10.0, 20.0, 30.0, 40.0, 50.0, 60.0)
GROUP_SUBJECTS_MIN = 20
GROUP_VALUES_MAX = 40
CMC_DEPTH = 20
WORST_PAIRS = 24
HISTOGRAM_DB = 2.0

Bool = NDArray[np.bool_]
Int64 = NDArray[np.int64]


class Figures:
    """The figures of one set of comparisons. Every method returns one part of the document, JSON-ready."""

    def __init__(self, compared: Comparisons, policy: Policy, resampling: Resampling) -> None:
        self._compared, self._pairs, self._searches = compared, compared.pairs, compared.searches
        self._resampling = resampling
        mated = self._pairs.mated
        self._mated_db, self._nonmated_db = self._pairs.score_db[mated], self._pairs.score_db[~mated]
        self._mated_subject = compared.subject[self._pairs.a[mated]]
        self._impostor_pairs = resampling.impostor_pairs(*self._subjects(~mated))
        self._lost = self._lost_pairs()
        self._is_mated = self._searches.enrolled & self._searches.searched
        self._probe_subject = compared.subject[self._searches.probe]
        self._size = int(compared.gallery.sum())
        self._verify_fmr, self._verify_db = policy.verify_fmr, -10 * math.log10(policy.verify_fmr)
        self._duplicate_db, self._review_db = policy.thresholds_db(self._size)

    def sizes(self) -> dict[str, Any]:
        compared = self._compared
        return {
            "subjects": int(compared.subject.max()) + 1,
            "encounters": len(compared.encounters),
            "captures": sum(
                len(encounter.captures) or len(encounter.templates) + len(encounter.refusals)
                for encounter in compared.encounters
            ),
            "encounters_enrolled": sum(encounter.enrolled for encounter in compared.encounters),
            "mated_pairs": len(self._mated_db),
            "mated_pairs_lost": len(self._lost),
            "nonmated_pairs": len(self._nonmated_db),
            "nonmated_pairs_possible": compared.nonmated_possible,
            "nonmated_pairs_sampled": compared.sampled,
            "extrapolated_pairs": int(self._pairs.extrapolated.sum()),
        }

    def failure_to_enrol(self) -> dict[str, Any]:
        """The rate of encounters without any template, and the reasons of refused captures."""
        failed = np.array([not encounter.enrolled for encounter in self._compared.encounters], bool)
        reasons = Counter(
            (refusal.column, refusal.reason)
            for encounter in self._compared.encounters
            for refusal in encounter.refusals
        )
        return {
            "rate": self._resampling.rate(failed, self._compared.subject).to_dict(),
            "captures_declined": [
                {"column": column, "reason": reason, "count": count}
                for (column, reason), count in sorted(reasons.items(), key=lambda entry: (-entry[1], entry[0]))
            ],
        }

    def verification(self) -> dict[str, Any]:
        """Error rates of 1:1 comparisons, by score_db."""
        if not len(self._mated_db) or not len(self._nonmated_db):
            return {"at_policy": None, "at_fmr": [], "equal_error_rate": None, "det": None, "histogram": None}
        rate, at = equal_error_rate(self._mated_db, self._nonmated_db)
        threshold, fmr, fnmr = det(self._mated_db, self._nonmated_db)
        at_fmr = [
            {"target": target, **self._at(value)}
            for target in FMR_TARGETS
            if (value := threshold_at(self._nonmated_db, target)) is not None
        ]
        return {
            "at_policy": {"target": self._verify_fmr, **self._at(self._verify_db)},
            "at_fmr": at_fmr,
            "equal_error_rate": {"value": rate, **self._at(at)},
            "det": {"threshold_db": threshold.tolist(), "fmr": fmr.tolist(), "fnmr": fnmr.tolist()},
            "histogram": self._histogram(),
        }

    def alone(self) -> list[dict[str, Any]]:
        """Error rates of each raw score alone (one column, embedding or minutiae), if the score_db combines several."""
        found = []
        raw = self._pairs.raw
        for (column, kind), values in raw.items() if len(raw) > 1 else ():
            compared = ~np.isnan(values)
            mated, nonmated = values[compared & self._pairs.mated], values[compared & ~self._pairs.mated]
            if not len(mated) or not len(nonmated):
                continue
            rate, _ = equal_error_rate(mated, nonmated)
            _, fmr, fnmr = det(mated, nonmated)
            at_fmr = []
            for target in FMR_TARGETS:
                threshold = threshold_at(nonmated, target)
                if threshold is not None:
                    missed = mated < threshold
                    subject = self._compared.subject[self._pairs.a[compared & self._pairs.mated]]
                    fnmr_at = self._resampling.rate(missed, subject).to_dict()
                    at_fmr.append({"target": target, "threshold": threshold, "fnmr": fnmr_at})
            found.append(
                {
                    "column": column,
                    "evidence": kind,
                    "mated_pairs": len(mated),
                    "nonmated_pairs": len(nonmated),
                    "equal_error_rate": rate,
                    "at_fmr": at_fmr,
                    "det": {"fmr": fmr.tolist(), "fnmr": fnmr.tolist()},
                }
            )
        return found

    def calibration(self) -> list[dict[str, Any]]:
        """Checks the calibration: for some values of score_db, the FMR that the value states and the measured FMR."""
        found = []
        for nominal_db in NOMINAL_DB:
            nominal = 10 ** (-nominal_db / 10)
            if nominal * len(self._nonmated_db) < 1:
                break  # fewer than one false match is expected
            rate = self._impostor_pairs.rate(self._nonmated_db >= nominal_db)
            low, high = rate.interval
            verdict = "too_high" if low > nominal else "too_low" if high < nominal else "agrees"
            found.append({"nominal_db": nominal_db, "nominal_fmr": nominal, "fmr": rate.to_dict(), "fmr_is": verdict})
        return found

    def identification(self) -> dict[str, Any]:
        """Error rates of 1:N searches. Every search is compared with the whole gallery."""
        searches = self._searches
        nonmated = searches.searched & (searches.impostor >= 0)
        strongest = searches.impostor_db[nonmated]
        later = int(searches.later.sum())
        found: dict[str, Any] = {
            "gallery_subjects": self._size,
            "mated_searches": int(self._is_mated.sum()),
            "mated_searches_with_failures": later,
            "nonmated_searches": len(strongest),
            "nonmated": "leave one out: each probe is searched in the gallery without its own subject",
        }
        if not self._is_mated.any() or not len(strongest):
            return found | {"at_fpir": [], "at_policy": [], "cmc": None, "det": None}
        thresholds, fpir, fnir = det(np.maximum(searches.mate_db[self._is_mated], -1.0), strongest)
        depth = min(CMC_DEPTH, self._size)
        ranks = searches.rank[self._is_mated]
        first = self._resampling.rate(ranks == 1, self._probe_subject[self._is_mated])
        all_ranks = np.where(self._is_mated, searches.rank, 0)[searches.later]
        return found | {
            "at_fpir": [
                {"target": target, **self._searched_at(value)}
                for target in FPIR_TARGETS
                if (value := threshold_at(strongest, target)) is not None
            ],
            "at_policy": [
                {"outcome": "duplicate", **self._searched_at(self._duplicate_db)},
                {"outcome": "duplicate or review", **self._searched_at(self._review_db)},
            ],
            "cmc": {
                "rank": list(range(1, depth + 1)),
                "found": cmc(ranks, len(ranks), depth),
                "searches": len(ranks),
                "searches_with_failures": later,
                "rank_1": first.to_dict(),
                "rank_1_with_failures": self._resampling.rate(
                    all_ranks == 1, self._probe_subject[searches.later]
                ).to_dict(),
            },
            "det": {"threshold_db": thresholds.tolist(), "fpir": fpir.tolist(), "fnir": fnir.tolist()},
        }

    def groups(self) -> dict[str, Any]:
        """Error rates by the values of each further column of the source. A pair belongs to a group if both encounters do; a search belongs to
        the group of its probe."""
        compared = self._compared
        columns = list(dict.fromkeys(name for encounter in compared.encounters for name in encounter.groups))
        found: dict[str, Any] = {
            "threshold_db": self._verify_db,
            "search_threshold_db": self._review_db,
            "small_below_subjects": GROUP_SUBJECTS_MIN,
            "columns": {},
            "left_out": [],
        }
        for column in columns:
            named = bands_of([encounter.groups.get(column) for encounter in compared.encounters])
            values = sorted(set(named), key=lambda name: (name == "not stated", _numbers_first(name)))
            if len(values) > GROUP_VALUES_MAX:
                found["left_out"].append({"column": column, "values": len(values)})
                continue
            number = {name: i for i, name in enumerate(values)}
            group_of = np.array([number[name] for name in named], np.int64)
            found["columns"][column] = self._groups_of(values, group_of)
        return found

    def worst(self) -> dict[str, Any]:
        """The non-mated pairs with the highest scores, and the mated pairs with the lowest."""

        def described(i: int) -> dict[str, Any]:
            a, b = (self._compared.encounters[int(side[i])] for side in (self._pairs.a, self._pairs.b))
            return {
                "encounter_a": a.encounter_id,
                "encounter_b": b.encounter_id,
                "subject_a": a.subject_id,
                "subject_b": b.subject_id,
                "score_db": float(self._pairs.score_db[i]),
            }

        order = np.lexsort((-self._pairs.llr_db, -self._pairs.score_db))
        mated = self._pairs.mated[order]
        return {
            "false_matches": [described(int(i)) for i in order[~mated][:WORST_PAIRS]],
            "misses": [described(int(i)) for i in order[mated][::-1][:WORST_PAIRS]],
        }

    def _groups_of(self, values: list[str], group_of: Int64) -> list[dict[str, Any]]:
        compared, pairs, threshold_db, review_db = self._compared, self._pairs, self._verify_db, self._review_db
        whole = self._resampling.rate(self._mated_db < threshold_db, self._mated_subject)
        whole_fmr = self._impostor_pairs.rate(self._nonmated_db >= threshold_db)
        whole_fnir = self._fnir(self._is_mated, review_db)
        same = group_of[pairs.a] == group_of[pairs.b]
        rows = []
        for number, name in [*enumerate(values), (-1, "two groups")]:
            inside = ~same if number < 0 else same & (group_of[pairs.a] == number)
            mated, nonmated = inside & pairs.mated, inside & ~pairs.mated
            members = len(np.unique(compared.subject if number < 0 else compared.subject[group_of == number]))
            fnmr = self._resampling.rate(pairs.score_db[mated] < threshold_db, compared.subject[pairs.a[mated]])
            impostor_pairs = self._resampling.impostor_pairs(*self._subjects(nonmated))
            fmr = impostor_pairs.rate(pairs.score_db[nonmated] >= threshold_db)
            row: dict[str, Any] = {
                "group": name,
                "subjects": None if number < 0 else members,
                "encounters": None if number < 0 else int((group_of == number).sum()),
                "small": number >= 0 and members < GROUP_SUBJECTS_MIN,
                "fnmr": fnmr.to_dict() | {"difference": difference(fnmr, whole)},
                "fmr": fmr.to_dict() | {"difference": difference(fmr, whole_fmr)},
                "fnir": None,
                "failure_to_enrol": None,
            }
            if number >= 0:
                fnir = self._fnir(self._is_mated & (group_of[self._searches.probe] == number), review_db)
                failed = np.array([not encounter.enrolled for encounter in compared.encounters], bool)[
                    group_of == number
                ]
                row["fnir"] = fnir.to_dict() | {"difference": difference(fnir, whole_fnir)}
                row["failure_to_enrol"] = self._resampling.rate(failed, compared.subject[group_of == number]).to_dict()
            elif not inside.any():
                continue
            rows.append(row)
        return rows

    def _subjects(self, some: Bool) -> tuple[Int64, Int64]:
        """The subjects of both sides of some pairs. some: bool (pairs,)."""
        return self._compared.subject[self._pairs.a[some]], self._compared.subject[self._pairs.b[some]]

    def _lost_pairs(self) -> Int64:
        """The subject of each mated pair that could not be compared, because an encounter failed to enrol."""
        compared = np.bincount(self._mated_subject, minlength=int(self._compared.subject.max()) + 1)
        encounters = np.bincount(self._compared.subject)
        return np.repeat(np.arange(len(encounters)), encounters * (encounters - 1) // 2 - compared)

    def _at(self, threshold_db: float) -> dict[str, Any]:
        """Error rates of verification at a threshold."""
        missed = self._mated_db < threshold_db
        with_failures = np.concatenate([missed, np.ones(len(self._lost), bool)])
        subject = np.concatenate([self._mated_subject, self._lost])
        return {
            "threshold_db": threshold_db,
            "fmr": self._impostor_pairs.rate(self._nonmated_db >= threshold_db).to_dict(),
            "fnmr": self._resampling.rate(missed, self._mated_subject).to_dict(),
            "fnmr_with_failures": self._resampling.rate(with_failures, subject).to_dict(),
        }

    def _fnir(self, some: Bool, threshold_db: float) -> Rate:
        """The FNIR of some searches. some: bool (searches,)."""
        return self._resampling.rate(self._searches.mate_db[some] < threshold_db, self._probe_subject[some])

    def _searched_at(self, threshold_db: float) -> dict[str, Any]:
        """Error rates of identification at a threshold."""
        searches = self._searches
        nonmated = searches.searched & (searches.impostor >= 0)
        missed = ~self._is_mated | (searches.mate_db < threshold_db)
        return {
            "gallery_subjects": self._size,
            "threshold_db": threshold_db,
            "fpir": self._resampling.rate(
                searches.impostor_db[nonmated] >= threshold_db, self._probe_subject[nonmated]
            ).to_dict(),
            "fnir": self._fnir(self._is_mated, threshold_db).to_dict(),
            "fnir_with_failures": self._resampling.rate(
                missed[searches.later], self._probe_subject[searches.later]
            ).to_dict(),
        }

    def _histogram(self) -> dict[str, Any]:
        high = max(float(self._mated_db.max()), float(self._nonmated_db.max()))
        edges = np.arange(0.0, high + 2 * HISTOGRAM_DB, HISTOGRAM_DB)
        return {
            "edges_db": edges.tolist(),
            "mated": np.histogram(self._mated_db, edges)[0].tolist(),
            "nonmated": np.histogram(self._nonmated_db, edges)[0].tolist(),
        }


def _numbers_first(name: str) -> tuple[float, str]:
    """A sort key: ranges of numbers in ascending order, then names in alphabetical order."""
    try:
        return float(name.split(" to ")[0]), name
    except ValueError:
        return math.inf, name
