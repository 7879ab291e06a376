"""Fits the calibration table of a model card to labelled pairs.

Owns the fitted distributions of mated and non-mated scores. Never extracts, and never reads files.

Non-mated: the empirical distribution up to a threshold that one pair in a hundred reaches, and above it a generalised Pareto distribution
of the excesses (Pickands, 1975; Coles, "An Introduction to Statistical Modeling of Extreme Values", 2001), which is continuous at the
threshold and does not end within the table. Several sets (sensors, populations) have equal weight, however many pairs each has: the
distribution is that of a sensor drawn from them at random. The interval, 95 %, is a Bayesian bootstrap (Rubin, 1981) over sets and
subjects, not over pairs, since pairs of one subject are not independent.

Mated: the likelihood ratio is that of both distributions' masses between knots, made non-decreasing by isotonic regression. That keeps
the mated mass at one, so that the ratio never exceeds 1 / P(score or more | non-mated), measured or not.

scikit-learn and scipy.stats are imported when a table is fitted: enrolment needs neither, and they take long.
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
"""One mated capture in a hundred shows something else (another finger, a profile): nothing speaks against a mate by more than 20 dB."""
TAIL_SHARE, TAIL_MIN, TAIL_MAX = 0.01, 100, 10_000
"""The number of pairs in the tail: this share, within these limits."""
COSINE_POWER = 2.0
"""For cosines of many dimensions, which fall as a normal law does, whose square's tail soon is exponential: of random directions, whose
law is known, the interval then holds the truth 40 dB beyond the pairs; of cosines themselves it does not."""
REPLICATES = 200
SHAPES = np.concatenate([-np.geomspace(1, 1e-3, 60), np.geomspace(1e-3, 30, 120)])
"""Where the law's one free parameter is looked for: as shares of what lets it end with the table; upwards, of one by the mean excess."""
Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Nonmates:
    """Non-mated scores of one set, float64 (n,). a, b: numbers of the subjects of each pair, int64 (n,) from 0; None: all pairs are taken
    as independent."""

    name: str
    scores: Float64 = field(repr=False)
    a: NDArray[np.int64] | None = field(default=None, repr=False)
    b: NDArray[np.int64] | None = field(default=None, repr=False)

    def weights(self, count: int, rng: np.random.Generator) -> Iterator[Float64]:
        """Weights of the pairs, float64 (n,), with sum 1: first equal ones, then `count` bootstrap replicates over subjects."""
        yield np.full(len(self.scores), 1 / len(self.scores))
        for _ in range(count):
            if self.a is None or self.b is None:
                drawn = rng.standard_exponential(len(self.scores))
            else:
                of = rng.standard_exponential(1 + max(int(self.a.max()), int(self.b.max())))
                drawn = of[self.a] * of[self.b]
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
    """The `[calibration]` table of a card, at these ascending scores. mated, nonmated: by set, each set counts alike. power: the tail's
    law is one of score ** power.

    Raises InvalidInput for too few pairs.
    """
    mates, pairs = sum(map(len, mated)), sum(len(one.scores) for one in nonmated)
    if mates < MATED_MIN or pairs < NONMATED_MIN:
        raise InvalidInput(
            f"{mates} mated and {pairs} non-mated pairs; a calibration needs {MATED_MIN} and {NONMATED_MIN} at least"
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
    """The `[calibration]` table of a card, refitted to other non-mated pairs without mated pairs. nonmated: by set, as in `fit`.

    A score that is as rare here as another was in the old table keeps that one's likelihood ratio: what makes impostors more alike (one
    camera, one population) makes mates more alike, too.

    Raises InvalidInput for too few pairs.
    """
    pairs = sum(len(one.scores) for one in nonmated)
    if pairs < NONMATED_MIN:
        raise InvalidInput(f"{pairs} non-mated pairs; a calibration needs {NONMATED_MIN} at least")
    knots, old_db, old_llr_db = (np.array(old[name], np.float64) for name in ("score", "nonmated_db", "llr_db"))
    table = _nonmated(nonmated, knots, power, replicates, seed)
    llr_db = np.interp(table["nonmated_db"], old_db, old_llr_db)
    return table | {"llr_db": llr_db.tolist(), "mates_measured": old.get("mates_measured", True), "source": source}


def _nonmated(sets: Sequence[Nonmates], knots: Float64, power: float, replicates: int, seed: int) -> dict[str, Any]:
    """The part of a table that describes non-mated scores."""
    nonmated_db, *anew = survival_db(sets, knots, replicates, np.random.default_rng(seed), power)
    low, high = np.quantile(anew, (0.025, 0.975), axis=0)
    return {
        "score": knots.tolist(),
        "nonmated_db": nonmated_db.tolist(),
        "nonmated_low_db": np.minimum(low, nonmated_db).tolist(),
        "nonmated_high_db": np.maximum(high, nonmated_db).tolist(),
        "measured_db": float(10 * np.log10(sum(len(one.scores) for one in sets))),
    }


def survival_db(
    sets: Sequence[Nonmates], knots: Float64, replicates: int, rng: np.random.Generator, power: float = 1.0
) -> Float64:
    """-10 log10 P(score or more), float64 (1 + replicates, m): of all sets alike, then with sets and their subjects weighed anew."""
    shares = np.vstack([np.ones(len(sets)), rng.standard_exponential((replicates, len(sets)))])
    shares /= shares.sum(axis=1, keepdims=True)
    threshold = _threshold(sets)
    counted = np.zeros((1 + replicates, len(knots)))
    excesses, weights = [], []
    for one, share in zip(sets, shares.T, strict=True):
        beyond = np.flatnonzero(one.scores > threshold)
        excesses.append(_raised(one.scores[beyond], power) - _raised(threshold, power))
        weights.append(np.zeros((1 + replicates, len(beyond))))
        bins = np.searchsorted(knots, one.scores, side="right")
        for row, weight in enumerate(one.weights(replicates, rng)):
            weights[-1][row] = share[row] * weight[beyond]
            counted[row] += share[row] * np.bincount(bins, weight, len(knots) + 1)[::-1].cumsum()[::-1][1:]
    excess, weight = np.concatenate(excesses), np.concatenate(weights, axis=1)
    reaching = weight.sum(axis=1)
    start = _raised(threshold, power)
    scale, shape = pareto(excess, weight, float(_raised(knots[-1], power) - start))
    above = np.maximum(_raised(knots, power) - start, 0.0)
    with np.errstate(divide="ignore"):
        falls = np.log(np.maximum(1 + (shape / scale)[:, None] * above, 0)) / shape[:, None]
        law = -10 * np.log10(reaching)[:, None] + 10 / np.log(10) * falls
        found = np.where(knots > threshold, law, -10 * np.log10(counted))
    return np.asarray(np.maximum.accumulate(np.clip(found, 0.0, SCORE_DB_MAX), axis=1))


def _threshold(sets: Sequence[Nonmates]) -> float:
    """Where the tail begins: that share of all sets alike, and not too few or too many pairs."""
    scores = np.concatenate([one.scores for one in sets])
    order = np.argsort(-scores)
    mass = np.cumsum(np.concatenate([np.full(len(one.scores), 1 / len(one.scores)) for one in sets])[order]) / len(sets)
    return float(scores[order[np.clip(np.searchsorted(mass, TAIL_SHARE), TAIL_MIN, TAIL_MAX)]])


def _raised(scores: ArrayLike, power: float) -> Float64:
    return np.asarray(np.sign(scores) * np.abs(scores) ** power, np.float64)


def pareto(excess: Float64, weights: Float64, end: float) -> tuple[Float64, Float64]:
    """(scale, shape) of the most likely generalised Pareto law of excesses (n,), for each row of weights (r, n).

    It does not end before `end`. Given shape / scale, the best shape has a closed form (Grimshaw, 1993): what is left is one
    parameter, tried on a grid, for all rows at once.
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
        scores, weights=np.concatenate([np.full(len(one), 1 / len(one)) for one in mated if len(one)])
    )
    below = np.array([density.integrate_box_1d(-np.inf, edge) for edge in edges])
    mates = np.diff(np.concatenate([[0.0], below, [1.0]]))
    survival = np.concatenate([[1.0], 10 ** (-np.interp(edges, knots, nonmated_db) / 10), [0.0]])
    nonmates = np.maximum(-np.diff(survival), 1e-300)
    ratio = IsotonicRegression().fit(knots, mates / nonmates, sample_weight=nonmates).predict(knots)
    return np.asarray(10 * np.log10((1 - OUTLIER_SHARE) * ratio + OUTLIER_SHARE))


@dataclass(frozen=True)
class MeasuredFmr:
    """A false match rate beside what was promised. low, high: exact for independent pairs (Clopper and Pearson, 1934)."""

    nominal: float
    measured: float
    low: float
    high: float
    matches: int
    pairs: int

    @property
    def ratio(self) -> float:
        """1: as promised; 2: twice as many false matches."""
        return self.measured / self.nominal

    @property
    def differs(self) -> bool:
        """By more than a factor of two, and not by chance."""
        return self.low > 2 * self.nominal or self.high < self.nominal / 2


def measured_fmr(score_db: Float64, nominal_db: float) -> MeasuredFmr:
    """Of non-mated pairs' score_db, float64 (n,)."""
    pairs, matches = len(score_db), int(np.count_nonzero(score_db >= nominal_db))
    low, high = exact_interval(matches, pairs)
    return MeasuredFmr(10 ** (-nominal_db / 10), matches / max(pairs, 1), low, high, matches, pairs)
