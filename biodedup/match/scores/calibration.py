"""Calibration: turns the raw scores of one model into decibels.

Owns the table of a model card, and its interpolation. Never fits a table (`fitting.py`).

A table has ascending raw scores (knots). At each knot it gives `nonmated_db` = -10 log10 P(score or more | non-mated) and `llr_db` = 10
log10 of the likelihood ratio, mated to non-mated. Both are non-decreasing, and linear between the knots. `nonmated_low_db` and
`nonmated_high_db` are the 95 % confidence interval of nonmated_db, if the table was fitted with an interval.
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
Bound = Literal["low", "best", "high", "worst_case"]
"""A distribution of non-mated scores: the best estimate, or an end of its interval. "low" gives the lowest scores in dB. "worst_case" is
"low" for an unchecked table, and "best" for a checked table."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """A calibration table.

    score, llr_knots_db, nonmated_knots_db: float64 (m,), m >= 2. measured_db: the highest score_db that the number of pairs could measure.
    mates_measured: whether llr_db comes from mated pairs of this model; False: it is assumed. bounds_db: float64 (2, m), the confidence
    interval of nonmated_db, or None. unchecked: whether the table was not yet compared with impostor pairs of the gallery.
    """

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
        """The calibration in the `[calibration]` table of a card. Raises ModelCardError."""
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
        """-10 log10(FMR) at each raw score. Beyond the table the last slope continues, up to SCORE_DB_MAX."""
        return _clipped(_interpolate(np.asarray(scores, np.float64), self.score, self.nonmated_knots_db))

    def interval_db(self, scores: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """(low, high) of score_db, the 95 % confidence interval; None if the table has none."""
        if self.bounds_db is None:
            return None
        x = np.asarray(scores, np.float64)
        low, high = (_clipped(_interpolate(x, self.score, bound)) for bound in self.bounds_db)
        return low, high

    def llr_db(self, scores: ArrayLike) -> NDArray[np.float64]:
        """10 log10 of the likelihood ratio at each raw score."""
        return np.minimum(_interpolate(np.asarray(scores, np.float64), self.score, self.llr_knots_db), SCORE_DB_MAX)

    @cached_property
    def nonmated_moments(self) -> tuple[float, float]:
        """(mean, standard deviation) of non-mated scores."""
        fine = np.linspace(self.score[0], self.score[-1], 8001)
        survival = 10 ** (-_interpolate(fine, self.score, self.nonmated_knots_db) / 10)
        mass = survival - np.append(survival[1:], 0.0)
        mass[0] += 1.0 - survival[0]
        mean = float(mass @ fine)
        return mean, float(np.sqrt(mass @ (fine - mean) ** 2))

    def with_impostors(self, mean: float, sd: float, source: str) -> Calibration:
        """The same table, shifted and scaled to impostor scores of this mean and standard deviation.

        Likelihood ratios move with the scores, because a common camera or population makes mates more alike as well as impostors.
        """
        old_mean, old_sd = self.nonmated_moments
        return replace(self, score=mean + (self.score - old_mean) * (sd / old_sd), source=source)

    def widened(self, shift_sd: float, stretch: float) -> Calibration:
        """The same table, `unchecked`, with a wider interval. Its lower end also covers impostor scores that are shift_sd standard deviations
        higher and spread `stretch` times as widely."""
        mean, sd = self.nonmated_moments
        low, high = (self.nonmated_knots_db,) * 2 if self.bounds_db is None else self.bounds_db
        moved = self.with_impostors(mean + shift_sd * sd, sd * stretch, self.source).score
        bounds = np.stack([np.minimum(low, _interpolate(self.score, moved, low)), high])
        return replace(self, bounds_db=bounds, unchecked=True)

    def mated_similarities(self, quantiles: NDArray[np.float64], min_similarity: float = -1.0) -> NDArray[np.float64]:
        """The similarities of mated pairs at these quantiles. Their density is that of non-mated pairs times the likelihood ratio.
        min_similarity: only mated pairs of at least this similarity count."""
        grid = np.linspace(-1, 1, 4001)
        survival = 10 ** (-self.score_db(grid) / 10)
        density = np.append(survival[:-1] - survival[1:], 0.0) * 10 ** (self.llr_db(grid) / 10)
        total = np.cumsum(density * (grid >= min_similarity))
        return np.asarray(np.interp(quantiles * total[-1], total, grid))

    def nonmated_llr_pmf(self, step_db: float, bound: Bound = "best") -> tuple[int, NDArray[np.float64]]:
        """The probability mass function of llr_db over non-mated comparisons. bound: a `Bound`; a table without an interval gives the same
        for all bounds.

        Returns (first, p): p[i] is the probability of a value in ((first + i - 1), (first + i)] * step_db. Values are rounded up, so that
        scores from their sums are never too high.
        """
        # a fine grid, so that no bin spans a jump; it continues beyond the table up to the last distinct score
        last = self.score[-1] + 4 * (self.score[-1] - self.score[0])
        fine = np.unique(np.concatenate([np.linspace(self.score[0], last, 8001), self.score]))
        knots_db = self.nonmated_knots_db
        if bound == "worst_case":
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
    """The ends of the interval, float64 (2, m), or None if the table has no interval. Raises ModelCardError."""
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
    """Linear between the knots, constant below them, with the last slope beyond them. NaN gives NaN."""
    out = np.empty(x.shape)
    _interpolate_into(np.ascontiguousarray(x).reshape(-1), knots, values, out.reshape(-1))
    return out


@njit(nogil=True, cache=True)
def _interpolate_into(x: Any, knots: Any, values: Any, out: Any) -> None:
    # faster than np.interp: knots are nearly evenly spaced, so that the first guess of the interval is nearly always right
    last = knots.shape[0] - 2
    scale = (last + 1) / (knots[last + 1] - knots[0])
    for i in range(x.shape[0]):
        if not x[i] > knots[0]:
            out[i] = x[i] if np.isnan(x[i]) else values[0]
            continue
        at = min(int(min((x[i] - knots[0]) * scale, 1e9)), last)
        while at > 0 and x[i] < knots[at]:
            at -= 1
        while at < last and x[i] >= knots[at + 1]:
            at += 1
        slope = (values[at + 1] - values[at]) / (knots[at + 1] - knots[at])
        out[i] = values[at] + slope * (x[i] - knots[at])


def _clipped(score_db: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.minimum(np.maximum(score_db, 0.0), SCORE_DB_MAX)  # three times as fast as np.clip
