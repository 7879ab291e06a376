"""Fits the calibration table of a model card to labelled pairs.

Owns the fitted distributions of mated and non-mated scores. Never extracts, and never reads files.

Non-mated: the empirical distribution up to a threshold that one pair in a hundred reaches, and above it a generalised Pareto distribution
of the excesses (Pickands, 1975; Coles, "An Introduction to Statistical Modeling of Extreme Values", 2001), which is continuous at the
threshold and does not end within the table. Several sets (sensors, populations) have equal weight, whatever their numbers of pairs: the
result is the distribution for a sensor drawn from them at random. The 95 % confidence interval is a Bayesian bootstrap (Rubin, 1981) over
sets and subjects. It is not over pairs, because pairs of one subject are not independent.

Mated: the likelihood ratio is the ratio of both distributions' masses between knots, made non-decreasing by isotonic regression. The mated
mass stays one, so that the ratio never exceeds 1 / P(score or more | non-mated), also beyond the measured pairs.

scikit-learn and scipy.stats are imported when a table is fitted: their import is slow, and enrolment does not need them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biodedup.common.intervals import exact_interval
from biodedup.errors import InvalidInput
from biodedup.match.scores.calibration import SCORE_DB_MAX

MATED_MIN, NONMATED_MIN = 100, 1000
OUTLIER_SHARE = 0.01
"""The share of mated captures that show something else (another finger, a profile). It bounds the evidence against a mate to 20 dB."""
TAIL_SHARE, TAIL_MIN, TAIL_MAX = 0.01, 100, 10_000
"""The number of pairs in the tail: this share of all pairs, but between these limits."""
COSINE_POWER = 2.0
"""Power for cosines of many dimensions. Their distribution is nearly normal, and the tail of a normal variable's square is nearly
exponential. On random directions, whose distribution is known, the interval of the squares holds the true value up to 40 dB beyond the
measured pairs; the interval of the cosines does not."""
REPLICATES = 200
SHAPES = np.concatenate([-np.geomspace(1, 1e-3, 60), np.geomspace(1e-3, 30, 120)])
"""Tried values of shape / scale. Negative values are relative to the value at which the distribution ends with the table, positive values
to 1 / mean excess."""
Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Nonmates:
    """Non-mated scores of one set, float64 (n,). a, b: the numbers of each pair's subjects, int64 (n,) from 0; None: all pairs count as
    independent."""

    name: str
    scores: Float64 = field(repr=False)
    a: NDArray[np.int64] | None = field(default=None, repr=False)
    b: NDArray[np.int64] | None = field(default=None, repr=False)

    def weights(self, count: int, rng: np.random.Generator) -> Iterator[Float64]:
        """Weights of the pairs, float64 (n,), with sum 1: first equal weights, then `count` bootstrap replicates over subjects."""
        yield np.full(len(self.scores), 1 / len(self.scores))
        for _ in range(count):
            if self.a is None or self.b is None:
                drawn = rng.standard_exponential(len(self.scores))
            else:
                of_subject = rng.standard_exponential(1 + max(int(self.a.max()), int(self.b.max())))
                drawn = of_subject[self.a] * of_subject[self.b]
            yield drawn / drawn.sum()


def fit(
    mated: Sequence[Float64],
    nonmated: Sequence[Nonmates],
    knots: Float64,
    *,
    source: str,
    power: float = 1.0,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> dict[str, Any]:
    """The `[calibration]` table of a card, at these ascending scores (knots). mated, nonmated: scores by set; all sets have equal weight.
    power: the tail is fitted to score ** power.

    Raises InvalidInput for too few pairs.
    """
    mates, pairs = sum(map(len, mated)), sum(len(nonmates.scores) for nonmates in nonmated)
    if mates < MATED_MIN or pairs < NONMATED_MIN:
        raise InvalidInput(
            f"{mates} mated and {pairs} non-mated pairs; a calibration needs at least {MATED_MIN} and {NONMATED_MIN}"
        )
    table = _nonmated(nonmated, knots, power, replicates, seed)
    llr_db = ratio_db(mated, knots, np.array(table["nonmated_db"]))
    return table | {"llr_db": llr_db.tolist(), "mates_measured": True, "source": source}


def refit(
    old: Mapping[str, Any],
    nonmated: Sequence[Nonmates],
    *,
    source: str,
    power: float = 1.0,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> dict[str, Any]:
    """The `[calibration]` table of a card, fitted again to other non-mated pairs, without mated pairs. nonmated: by set, as in `fit`.

    Scores of equal rarity (nonmated_db) in the old and the new table have equal likelihood ratios, because a common camera or population
    makes mates more alike as well as impostors.

    Raises InvalidInput for too few pairs.
    """
    pairs = sum(len(nonmates.scores) for nonmates in nonmated)
    if pairs < NONMATED_MIN:
        raise InvalidInput(f"{pairs} non-mated pairs; a calibration needs at least {NONMATED_MIN}")
    knots, old_db, old_llr_db = (np.array(old[name], np.float64) for name in ("score", "nonmated_db", "llr_db"))
    table = _nonmated(nonmated, knots, power, replicates, seed)
    llr_db = np.interp(table["nonmated_db"], old_db, old_llr_db)
    return table | {"llr_db": llr_db.tolist(), "mates_measured": old.get("mates_measured", True), "source": source}


def _nonmated(sets: Sequence[Nonmates], knots: Float64, power: float, replicates: int, seed: int) -> dict[str, Any]:
    """The part of a table that describes non-mated scores."""
    nonmated_db, *replicated = survival_db(sets, knots, replicates, np.random.default_rng(seed), power)
    low, high = np.quantile(replicated, (0.025, 0.975), axis=0)
    return {
        "score": knots.tolist(),
        "nonmated_db": nonmated_db.tolist(),
        "nonmated_low_db": np.minimum(low, nonmated_db).tolist(),
        "nonmated_high_db": np.maximum(high, nonmated_db).tolist(),
        "measured_db": float(10 * np.log10(sum(len(nonmates.scores) for nonmates in sets))),
    }


def survival_db(
    sets: Sequence[Nonmates], knots: Float64, replicates: int, rng: np.random.Generator, power: float = 1.0
) -> Float64:
    """-10 log10 P(score or more), float64 (1 + replicates, m): first with equal weights, then for each bootstrap replicate."""
    shares = np.vstack([np.ones(len(sets)), rng.standard_exponential((replicates, len(sets)))])
    shares /= shares.sum(axis=1, keepdims=True)
    threshold = _threshold(sets)
    counted = np.zeros((1 + replicates, len(knots)))
    excesses, weights = [], []
    for nonmates, share in zip(sets, shares.T, strict=True):
        beyond = np.flatnonzero(nonmates.scores > threshold)
        excesses.append(_raised(nonmates.scores[beyond], power) - _raised(threshold, power))
        weights.append(np.zeros((1 + replicates, len(beyond))))
        bins = np.searchsorted(knots, nonmates.scores, side="right")
        for row, weight in enumerate(nonmates.weights(replicates, rng)):
            weights[-1][row] = share[row] * weight[beyond]
            counted[row] += share[row] * np.bincount(bins, weight, len(knots) + 1)[::-1].cumsum()[::-1][1:]
    excess, weight = np.concatenate(excesses), np.concatenate(weights, axis=1)
    reaching = weight.sum(axis=1)
    start = _raised(threshold, power)
    scale, shape = pareto(excess, weight, float(_raised(knots[-1], power) - start))
    above = np.maximum(_raised(knots, power) - start, 0.0)
    with np.errstate(divide="ignore"):
        log_ratio = np.log(np.maximum(1 + (shape / scale)[:, None] * above, 0)) / shape[:, None]
        tail_db = -10 * np.log10(reaching)[:, None] + 10 / np.log(10) * log_ratio
        all_db = np.where(knots > threshold, tail_db, -10 * np.log10(counted))
    return np.asarray(np.maximum.accumulate(np.clip(all_db, 0.0, SCORE_DB_MAX), axis=1))


def _threshold(sets: Sequence[Nonmates]) -> float:
    """The score at which the tail begins: TAIL_SHARE of the sets' equally weighted pairs, within the limits."""
    scores = np.concatenate([nonmates.scores for nonmates in sets])
    order = np.argsort(-scores)
    mass = np.cumsum(
        np.concatenate([np.full(len(nonmates.scores), 1 / len(nonmates.scores)) for nonmates in sets])[order]
    ) / len(sets)
    return float(scores[order[np.clip(np.searchsorted(mass, TAIL_SHARE), TAIL_MIN, TAIL_MAX)]])


def _raised(scores: ArrayLike, power: float) -> Float64:
    return np.asarray(np.sign(scores) * np.abs(scores) ** power, np.float64)


def pareto(excess: Float64, weights: Float64, end: float) -> tuple[Float64, Float64]:
    """(scale, shape) of the most likely generalised Pareto distribution of excesses (n,), for each row of weights (r, n).

    The distribution does not end before `end`. For a given shape / scale the best shape has a closed form (Grimshaw, 1993), so that a
    single parameter is left. It is searched on a grid, for all rows at once.
    """
    tried = np.where(SHAPES < 0, SHAPES / max(end, float(excess.max())), SHAPES / excess.mean())
    total = weights.sum(axis=1, keepdims=True)
    shape = weights @ np.log1p(np.maximum(excess[:, None] * tried, -1 + 1e-9)) / total
    best = np.argmax(-np.log(shape / tried) - shape, axis=1)
    rows = np.arange(len(weights))
    return shape[rows, best] / tried[best], shape[rows, best]


def ratio_db(mated: Sequence[Float64], knots: Float64, nonmated_db: Float64) -> Float64:
    """10 log10 of the likelihood ratio at each knot, non-decreasing."""
    from scipy.stats import gaussian_kde
    from sklearn.isotonic import IsotonicRegression

    edges = (knots[1:] + knots[:-1]) / 2
    scores = np.concatenate(mated)
    density = gaussian_kde(
        scores, weights=np.concatenate([np.full(len(of_set), 1 / len(of_set)) for of_set in mated if len(of_set)])
    )
    below = np.array([density.integrate_box_1d(-np.inf, edge) for edge in edges])
    mates = np.diff(np.concatenate([[0.0], below, [1.0]]))
    survival = np.concatenate([[1.0], 10 ** (-np.interp(edges, knots, nonmated_db) / 10), [0.0]])
    nonmates = np.maximum(-np.diff(survival), 1e-300)
    ratio = IsotonicRegression().fit(knots, mates / nonmates, sample_weight=nonmates).predict(knots)
    return np.asarray(10 * np.log10((1 - OUTLIER_SHARE) * ratio + OUTLIER_SHARE))


@dataclass(frozen=True)
class MeasuredFmr:
    """A measured false match rate beside the nominal rate. low, high: the confidence interval, exact for independent pairs (Clopper and
    Pearson, 1934)."""

    nominal: float
    measured: float
    low: float
    high: float
    matches: int
    pairs: int

    @property
    def ratio(self) -> float:
        """The measured rate divided by the nominal rate."""
        return self.measured / self.nominal

    @property
    def differs(self) -> bool:
        """Whether the rates differ significantly by more than a factor of two."""
        return self.low > 2 * self.nominal or self.high < self.nominal / 2


def measured_fmr(score_db: Float64, nominal_db: float) -> MeasuredFmr:
    """The false match rate at nominal_db of non-mated pairs. score_db: their scores, float64 (n,)."""
    pairs, matches = len(score_db), int(np.count_nonzero(score_db >= nominal_db))
    low, high = exact_interval(matches, pairs)
    return MeasuredFmr(10 ** (-nominal_db / 10), matches / max(pairs, 1), low, high, matches, pairs)
