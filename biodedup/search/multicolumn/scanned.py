"""Estimates how many mates a search misses if it scans only some of the captures, such as the face and not the fingers.

Owns this estimate, by drawn mates. Never searches and never plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt

import numpy as np
from scipy.special import ndtr

from biodedup.common.intervals import upper_bound
from biodedup.match.scores.calibration import Calibration

_MATES, _SEED = 200_000, 20_268


@dataclass(frozen=True)
class ScannedPlan:
    """scanned: the columns of a probe whose every row is scanned, () if the setting names none of its columns; rescored: its other columns,
    compared for the candidates alone; candidates: how many rows these are. correlation: between the captures of a subject, as assumed;
    drawn: mates that reach the review threshold by all columns, 0 where a calibration has no mates; missed: of these, those that are no
    candidates."""

    scanned: tuple[str, ...]
    rescored: tuple[str, ...]
    candidates: int
    correlation: float = 0.0
    drawn: int = 0
    missed: int = 0

    @property
    def others(self) -> tuple[str, ...]:
        """The columns that are not scanned beside scanned ones."""
        return self.rescored if self.scanned else ()

    @property
    def miss_bound(self) -> float:
        """The upper end of the one-sided 95 % interval of the miss rate."""
        return float(upper_bound(self.missed, self.drawn)) if self.drawn else 1.0


def with_miss(
    calibrations: Mapping[str, Calibration],
    candidate_llr_db: Mapping[tuple[str, ...], float],
    threshold_llr_db: float,
    plan: ScannedPlan,
) -> ScannedPlan:
    """The plan with its miss.

    calibrations: of all columns. candidate_llr_db: columns that are searched at once -> the sum of their llr_db from which a row is a
    candidate. threshold_llr_db: that mates have to reach by the sum over all columns.
    """
    rng = np.random.default_rng(_SEED)
    common = sqrt(plan.correlation) * rng.standard_normal(_MATES)
    llr_db = {}
    for name, calibration in calibrations.items():
        quantiles = ndtr(common + sqrt(1 - plan.correlation) * rng.standard_normal(_MATES))
        llr_db[name] = calibration.llr_db(calibration.mated_similarities(quantiles))
    reaching = sum(llr_db.values()) >= threshold_llr_db
    seen = np.zeros(_MATES, bool)
    for names, least_db in candidate_llr_db.items():
        seen |= sum(llr_db[name] for name in names) >= least_db
    missed = int(np.count_nonzero(reaching & ~seen))
    return replace(plan, drawn=int(np.count_nonzero(reaching)), missed=missed)
