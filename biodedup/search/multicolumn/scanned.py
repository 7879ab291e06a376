"""Estimates the miss risk of a search that scans only some columns, such as the face and not the fingers.

Owns this estimate, from randomly drawn mates. Never searches and never plans.
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
    """A search that scans only some columns of a probe.

    scanned: columns that are scanned; () if `SearchConfig.scanned` names none of the probe's columns. rescored: the other columns, which are
    compared for the candidates alone. candidates: number of candidates. correlation: assumed correlation between the captures of a subject.
    drawn: number of drawn mates that reach the review threshold by all columns; 0 if a calibration has no mates. missed: number of these that
    are not candidates.
    """

    scanned: tuple[str, ...]
    rescored: tuple[str, ...]
    candidates: int
    correlation: float = 0.0
    drawn: int = 0
    missed: int = 0

    @property
    def others(self) -> tuple[str, ...]:
        """The columns that are not scanned; () if all columns are scanned."""
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
    """The plan with its miss risk.

    calibrations: of all columns. candidate_llr_db: columns that are searched at once -> the sum of their llr_db from which a row is a
    candidate. threshold_llr_db: the sum of llr_db over all columns that counts as the review threshold.
    """
    rng = np.random.default_rng(_SEED)
    common = sqrt(plan.correlation) * rng.standard_normal(_MATES)
    llr_db = {}
    for name, calibration in calibrations.items():
        quantiles = ndtr(common + sqrt(1 - plan.correlation) * rng.standard_normal(_MATES))
        llr_db[name] = calibration.llr_db(calibration.mated_similarities(quantiles))
    reaching = sum(llr_db.values()) >= threshold_llr_db
    is_candidate = np.zeros(_MATES, bool)
    for names, from_db in candidate_llr_db.items():
        is_candidate |= sum(llr_db[name] for name in names) >= from_db
    missed = int(np.count_nonzero(reaching & ~is_candidate))
    return replace(plan, drawn=int(np.count_nonzero(reaching)), missed=missed)
