"""Calibration: turns the raw scores of one model into decibels.

Owns the table of a model card, and its interpolation. Never knows which captures are compared.

A table gives, at ascending raw scores, `nonmated_db` = -10 log10 P(score or more | non-mated) and `llr_db` = 10 log10 of
the likelihood ratio mated : non-mated, both non-decreasing; between them it is linear. `nonmated_low_db` and `nonmated_high_db`
bound nonmated_db, 95 %, where the table was fitted with an interval. How tables are fitted: `fitting.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from biodedup.errors import ModelCardError

SCORE_DB_MAX = 300.0
Bound = Literal["low", "best", "high", "sure"]
"""Which distribution of non-mated scores: the best estimate, or an end of its interval. "low" gives the lowest scores in dB.
"sure": "low" for an unchecked table, "best" for others."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """One table. score, llr_knots_db, nonmated_knots_db: float64 (m,), m >= 2. measured_db: score_db beyond which no pairs were measured.
    mates_measured: whether llr_db comes from mated pairs of this model and is not assumed. bounds_db: float64 (2, m), the interval of
    nonmated_db, or None. unchecked: the table was not compared with impostor pairs of the gallery that uses it."""

    score: NDArray[np.float64] = field(repr=False)
    llr_knots_db: NDArray[np.float64] = field(repr=False)
    nonmated_knots_db: NDArray[np.float64] = field(repr=False)
    measured_db: float
    source: str
    mates_measured: bool = True
    bounds_db: NDArray[np.float64] | None = field(default=None, repr=False)
    unchecked: bool = False

    @classmethod
    def from_card(cls, table: Mapping[str, Any]) -> Calibration:
        """From the `[calibration]` table of a card. Raises ModelCardError."""
        try:
            score, llr, nonmated = (np.array(table[k], np.float64) for k in ("score", "llr_db", "nonmated_db"))
            measured_db, source = float(table["measured_db"]), str(table["source"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelCardError(
                f"the calibration table is incomplete or not numeric ({error}); see models/sface.toml"
            ) from error
        shapes = [score.shape, llr.shape, nonmated.shape]
        if score.ndim != 1 or score.size < 2 or len(set(shapes)) > 1:
            raise ModelCardError(f"calibration arrays have shapes {shapes}; wanted one equal length, 2 or more")
        if (np.diff(score) <= 0).any() or (np.diff(llr) < 0).any() or (np.diff(nonmated) < 0).any():
            raise ModelCardError("calibration: score must ascend, llr_db and nonmated_db must not descend")
        bounds = _bounds(table, nonmated)
        mates_measured = bool(table.get("mates_measured", True))
        return cls(score, llr, nonmated, measured_db, source, mates_measured=mates_measured, bounds_db=bounds)

    def score_db(self, scores: ArrayLike) -> NDArray[np.float64]:
        """-10 log10(FMR) at each raw score; beyond the table its last slope continues, up to SCORE_DB_MAX."""
        return _within(_interpolate(np.asarray(scores, np.float64), self.score, self.nonmated_knots_db))

    def interval_db(self, scores: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """(low, high) of score_db, 95 %; None if the table has no interval."""
        if self.bounds_db is None:
            return None
        x = np.asarray(scores, np.float64)
        low, high = (_within(_interpolate(x, self.score, bound)) for bound in self.bounds_db)
        return low, high

    def llr_db(self, scores: ArrayLike) -> NDArray[np.float64]:
        """10 log10 of the likelihood ratio at each raw score."""
        return np.minimum(_interpolate(np.asarray(scores, np.float64), self.score, self.llr_knots_db), SCORE_DB_MAX)

    @cached_property
    def nonmated_law(self) -> tuple[float, float]:
        """(mean, standard deviation) of non-mated scores."""
        fine = np.linspace(self.score[0], self.score[-1], 8001)
        survival = 10 ** (-_interpolate(fine, self.score, self.nonmated_knots_db) / 10)
        mass = survival - np.append(survival[1:], 0.0)
        mass[0] += 1.0 - survival[0]
        mean = float(mass @ fine)
        return mean, float(np.sqrt(mass @ (fine - mean) ** 2))

    def with_impostors(self, mean: float, sd: float, source: str) -> Calibration:
        """The same table, shifted and scaled to impostor scores of this mean and standard deviation.

        A score that is as rare here as another was there keeps that one's likelihood ratio: what makes impostors more alike (one
        camera, one population) makes mates more alike, too."""
        own_mean, own_sd = self.nonmated_law
        return replace(self, score=mean + (self.score - own_mean) * (sd / own_sd), source=source)

    def doubted(self, shift_sd: float, stretch: float) -> Calibration:
        """The same table, `unchecked`. The lower end of its interval also covers impostor scores that lie shift_sd standard deviations
        higher and spread `stretch` times as wide."""
        mean, sd = self.nonmated_law
        low, high = (self.nonmated_knots_db,) * 2 if self.bounds_db is None else self.bounds_db
        there = self.with_impostors(mean + shift_sd * sd, sd * stretch, self.source).score
        bounds = np.stack([np.minimum(low, _interpolate(self.score, there, low)), high])
        return replace(self, bounds_db=bounds, unchecked=True)

    def mated_similarities(self, quantiles: NDArray[np.float64], min_similarity: float = -1.0) -> NDArray[np.float64]:
        """Similarities of mates at these quantiles: the density of non-mates times the likelihood ratio. min_similarity: only mates
        that are at least this similar count."""
        grid = np.linspace(-1, 1, 4001)
        survival = 10 ** (-self.score_db(grid) / 10)
        density = np.append(survival[:-1] - survival[1:], 0.0) * 10 ** (self.llr_db(grid) / 10)
        total = np.cumsum(density * (grid >= min_similarity))
        return np.asarray(np.interp(quantiles * total[-1], total, grid))

    def nonmated_llr_pmf(self, step_db: float, bound: Bound = "best") -> tuple[int, NDArray[np.float64]]:
        """The probability mass function of llr_db over non-mated comparisons. bound: see `Bound`; without an interval all are equal.

        Returns (first, p): p[i] is the probability of a value in ((first + i - 1), (first + i)] * step_db. Values are
        rounded up, so that sums of them are never optimistic.
        """
        # so many points that no bin spans a jump, and beyond the table up to the last distinct score
        last = self.score[-1] + 4 * (self.score[-1] - self.score[0])
        fine = np.unique(np.concatenate([np.linspace(self.score[0], last, 8001), self.score]))
        knots_db = self.nonmated_knots_db
        if bound == "sure":
            bound = "low" if self.unchecked else "best"
        if self.bounds_db is not None and bound != "best":
            knots_db = self.bounds_db[0 if bound == "low" else 1]
        survival = 10 ** (-_interpolate(fine, self.score, knots_db) / 10)
        mass = survival - np.append(survival[1:], 0.0)
        mass[0] += 1.0 - survival[0]
        upper = np.minimum(_interpolate(np.append(fine[1:], fine[-1]), self.score, self.llr_knots_db), SCORE_DB_MAX)
        bins = np.ceil(upper / step_db - 1e-9).astype(np.int64)
        first = int(bins.min())
        return first, np.bincount(bins - first, weights=np.maximum(mass, 0.0)).astype(np.float64)


def _bounds(table: Mapping[str, Any], nonmated: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """The interval's ends, float64 (2, m), or None if the table has none. Raises ModelCardError."""
    if not {"nonmated_low_db", "nonmated_high_db"} <= table.keys():
        return None
    try:
        bounds = np.array([table["nonmated_low_db"], table["nonmated_high_db"]], np.float64)
    except (TypeError, ValueError) as error:
        raise ModelCardError(f"the calibration's interval is not numeric ({error}); see models/sface.toml") from error
    if bounds.shape != (2, *nonmated.shape) or (np.diff(bounds) < 0).any():
        raise ModelCardError(
            "calibration: nonmated_low_db and nonmated_high_db must be as long as score, and must not descend"
        )
    if (bounds[0] > nonmated + 1e-9).any() or (bounds[1] < nonmated - 1e-9).any():
        raise ModelCardError("calibration: nonmated_db must lie between nonmated_low_db and nonmated_high_db")
    return bounds


def _interpolate(
    x: NDArray[np.float64], knots: NDArray[np.float64], values: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Linear between the knots, constant below them, beyond them with the last slope; NaN stays NaN."""
    found = np.empty(x.shape)
    _fill(np.ascontiguousarray(x).reshape(-1), knots, values, found.reshape(-1))
    return found


@njit(nogil=True, cache=True)
def _fill(x: Any, knots: Any, values: Any, found: Any) -> None:
    # faster than np.interp, which searches for each value: knots are nearly evenly spaced, so the first guess is nearly always right
    last = knots.shape[0] - 2
    scale = (last + 1) / (knots[last + 1] - knots[0])
    for i in range(x.shape[0]):
        if not x[i] > knots[0]:
            found[i] = x[i] if np.isnan(x[i]) else values[0]
            continue
        at = min(int(min((x[i] - knots[0]) * scale, 1e9)), last)
        while at > 0 and x[i] < knots[at]:
            at -= 1
        while at < last and x[i] >= knots[at + 1]:
            at += 1
        slope = (values[at + 1] - values[at]) / (knots[at + 1] - knots[at])
        found[i] = values[at] + slope * (x[i] - knots[at])


def _within(score_db: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.minimum(np.maximum(score_db, 0.0), SCORE_DB_MAX)  # np.clip takes three times as long
