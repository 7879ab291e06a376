"""Estimates the miss risk of a search of several columns one after the other: a mate may be among the best candidates of no column.

Owns this estimate, from randomly drawn mates. Never searches and never plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy.special import ndtr

from biodedup.common.intervals import upper_bound
from biodedup.gallery.segments.part import Column
from biodedup.match.scores.calibration import Calibration
from biodedup.search.native.column_statistics import population_of

_MATES, _SEED, _PROBES = 200_000, 20_265, 64


@dataclass(frozen=True)
class ApartPlan:
    """A search of columns one after the other.

    candidates: rows that each column finds. drawn: number of drawn mates that reach the review threshold. missed: number of these that are
    among the candidates of no column. correlation: assumed correlation between the captures of a subject.
    """

    columns: tuple[str, ...]
    candidates: int
    drawn: int
    missed: int
    correlation: float

    @property
    def miss_bound(self) -> float:
        """The upper end of the one-sided 95 % interval of the miss rate."""
        return float(upper_bound(self.missed, self.drawn)) if self.drawn else 1.0


def apart(
    columns: Mapping[str, tuple[Column, int]],
    calibrations: Mapping[str, Calibration],
    candidates: int,
    threshold_llr_db: float,
    correlation: float,
) -> ApartPlan:
    """The plan with its miss risk. columns: name -> (its largest part, its rows in all parts). threshold_llr_db: the sum of llr_db that counts as
    the review threshold."""
    rng = np.random.default_rng(_SEED)
    common = sqrt(correlation) * rng.standard_normal(_MATES)
    llr_db, is_candidate = np.zeros(_MATES), np.zeros(_MATES, bool)
    for name, (column, rows) in columns.items():
        quantiles = ndtr(common + sqrt(1 - correlation) * rng.standard_normal(_MATES))
        similarity = calibrations[name].mated_similarities(quantiles)
        llr_db += calibrations[name].llr_db(similarity)
        population = population_of(column)
        reached = population.reached_by(population.sample[:_PROBES], min(candidates / max(rows, 1), 1.0))
        is_candidate |= similarity >= float(np.median(reached))
    reaching = llr_db >= threshold_llr_db
    missed = int(np.count_nonzero(reaching & ~is_candidate))
    return ApartPlan(tuple(columns), candidates, int(np.count_nonzero(reaching)), missed, correlation)
