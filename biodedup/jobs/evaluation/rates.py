"""Computes error rates of labelled comparisons and searches, with confidence intervals, in the terms of ISO/IEC 19795-1.

Owns only the arithmetic: arrays in, numbers out. Never compares templates, and never reads a file.

1. A comparison is positive at a threshold if its score is equal or higher.
2. `exact` is the interval of Clopper and Pearson (1934), which assumes independent trials.
3. `bootstrap` resamples subjects with replacement, because comparisons of one subject depend on each other. An impostor pair is weighted by the
   product of both subjects' draws (Bolle, Ratha and Pankanti, 2004). It has no width if none or all of the trials are events.
4. `interval` takes the wider bound of both on each side.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from biodedup.common.intervals import CONFIDENCE, exact_interval

_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)([.][0-9]+)?")

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Rate:
    """The rate of events among trials. drawn: the rate in each bootstrap replicate, NaN if a replicate has no trials."""

    events: int
    trials: int
    drawn: Float64 | None = None

    @property
    def value(self) -> float | None:
        return self.events / self.trials if self.trials else None

    @property
    def exact(self) -> Interval:
        return exact_interval(self.events, self.trials)

    @property
    def bootstrap(self) -> Interval | None:
        return None if self.drawn is None else _percentiles(self.drawn)

    @property
    def interval(self) -> Interval:
        return _hull(self.exact, self.bootstrap)

    def to_dict(self) -> dict[str, Any]:
        """The rate with its intervals, JSON-ready."""
        found = {"events": self.events, "trials": self.trials, "value": self.value}
        if not self.trials:
            return found | {"interval": None, "exact": None, "bootstrap": None}
        bootstrap = self.bootstrap
        return found | {
            "interval": list(self.interval),
            "exact": list(self.exact),
            "bootstrap": None if bootstrap is None else list(bootstrap),
        }


def difference(part: Rate, whole: Rate) -> dict[str, Any]:
    """The difference between a group's rate and the rate of all, JSON-ready: `value` and `interval`. The interval is the wider of two: the
    bootstrap's, with both rates in the same replicates; and the group's exact interval minus the rate of all."""
    if part.value is None or whole.value is None:
        return {"value": None, "interval": None}
    low, high = part.exact
    drawn = None if part.drawn is None or whole.drawn is None else _percentiles(part.drawn - whole.drawn)
    return {
        "value": part.value - whole.value,
        "interval": list(_hull((low - whole.value, high - whole.value), drawn)),
    }


class Resampling:
    """A bootstrap over subjects: subjects are drawn with replacement, with the same draws for every rate. subjects: their number; rng: the only
    source of randomness."""

    def __init__(self, subjects: int, replicates: int, rng: np.random.Generator) -> None:
        drawn = rng.integers(0, max(subjects, 1), (replicates, subjects))
        self._weights = np.zeros((replicates, subjects), np.float32)
        for weights, picks in zip(self._weights, drawn, strict=True):
            weights += np.bincount(picks, minlength=subjects).astype(np.float32)

    def rate(self, events: Bool, subject: Int64) -> Rate:
        """The rate of trials that belong to one subject each: mated pairs, searches, enrolments. events: bool (n,); subject: int64 (n,)."""
        count = self._weights.shape[1]
        trials = np.bincount(subject, minlength=count).astype(np.float32)
        happened = np.bincount(subject[events], minlength=count).astype(np.float32)
        return Rate(int(events.sum()), len(events), _ratio(self._weights @ happened, self._weights @ trials))

    def impostor_pairs(self, subject_a: Int64, subject_b: Int64) -> ImpostorPairs:
        return ImpostorPairs(self._weights, subject_a, subject_b)


class ImpostorPairs:
    """Pairs of two subjects, for several rates. The weights of the trials are computed once."""

    def __init__(self, weights: NDArray[np.float32], subject_a: Int64, subject_b: Int64) -> None:
        self._weights, self._a, self._b = weights, subject_a, subject_b
        self._trials = self._weighted(slice(None))

    def rate(self, events: Bool) -> Rate:
        """The rate of pairs that are events. events: bool (n,)."""
        return Rate(int(events.sum()), len(events), _ratio(self._weighted(np.flatnonzero(events)), self._trials))

    def _weighted(self, some: Any) -> Float64:
        """In each replicate: the sum, over some pairs, of the product of both subjects' draws. some: indices or a slice of the pairs."""
        count = self._weights.shape[1]
        a, b = self._a[some], self._b[some]
        pairs = csr_array((np.ones(len(a), np.float32), (a, b)), shape=(count, count))
        sums = np.zeros(len(self._weights))
        for low in range(0, len(sums), 100):  # in blocks, to limit the memory
            weights = self._weights[low : low + 100]
            sums[low : low + 100] = np.einsum("ij,ij->i", np.asarray(weights @ pairs), weights, dtype=np.float64)
        return sums


def threshold_at(nonmated: Float64, rate: float) -> float | None:
    """The lowest threshold that at most this share of the scores reaches. None if the share is less than one score: then it cannot be
    measured."""
    allowed = int(rate * len(nonmated) + 1e-9)
    if allowed < 1:
        return None
    if allowed >= len(nonmated):
        return float(nonmated.min())
    return float(np.nextafter(np.partition(nonmated, -allowed - 1)[-allowed - 1], np.inf))


def det(mated: Float64, nonmated: Float64, points: int = 500) -> tuple[Float64, Float64, Float64]:
    """(threshold, FMR, FNMR) of a detection error trade-off (DET), with ascending thresholds: all scores that occur, or `points` of them, which
    are dense in both tails."""
    mated, nonmated = np.sort(mated), np.sort(nonmated)
    threshold = np.unique(np.concatenate([mated, nonmated]))
    fmr, fnmr = _reaching(nonmated, threshold), 1 - _reaching(mated, threshold)
    if len(threshold) > points:
        change = np.cumsum(_steps(fmr) + _steps(fnmr))
        chosen = np.unique(np.searchsorted(change, np.linspace(0, change[-1], points)))
        chosen = np.minimum(chosen, len(threshold) - 1)
        threshold, fmr, fnmr = threshold[chosen], fmr[chosen], fnmr[chosen]
    return threshold, fmr, fnmr


def equal_error_rate(mated: Float64, nonmated: Float64) -> tuple[float, float]:
    """(rate, threshold) at the threshold where FMR and FNMR are closest. The rate is the mean of both."""
    mated, nonmated = np.sort(mated), np.sort(nonmated)
    threshold = np.unique(np.concatenate([mated, nonmated]))
    fmr, fnmr = _reaching(nonmated, threshold), 1 - _reaching(mated, threshold)
    closest = int(np.argmin(np.abs(fmr - fnmr)))
    return float(fmr[closest] + fnmr[closest]) / 2, float(threshold[closest])


def cmc(ranks: Int64, searches: int, depth: int) -> list[int]:
    """Cumulative match characteristic: the number of searches whose mate is among the first 1, 2, ... depth candidates.

    ranks: int64 (n,), from 1; 0 if the mate was not compared. searches: the number of all searches, including those whose mate failed to enrol.
    """
    assert searches >= len(ranks), "every rank is of a search"
    found = np.bincount(ranks[(ranks > 0) & (ranks <= depth)], minlength=depth + 1)[1:]
    return [int(n) for n in np.cumsum(found)]


def bands_of(values: Sequence[Any]) -> list[str]:
    """The group of each value of a manifest's column. If a column has more than eight different numbers, they become four ranges (quartiles)."""
    values = _as_numbers(values)
    stated = [value for value in values if _is_stated(value)]
    numbers = [value for value in stated if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) < len(stated) or len(set(numbers)) <= 8:
        return [str(value) if _is_stated(value) else "not stated" for value in values]
    given = np.array(numbers, np.float64)
    edges = np.unique(np.quantile(given, [0, 0.25, 0.5, 0.75, 1], method="nearest"))
    names = []
    for number, (low, high) in enumerate(pairwise(edges)):
        inside = given[(given >= low) & ((given < high) | (number == len(edges) - 2))]
        names.append(f"{inside.min():g} to {inside.max():g}")
    which = np.clip(np.searchsorted(edges, given, side="right") - 1, 0, len(names) - 1)
    banded = iter(which.tolist())
    return [names[next(banded)] if _is_stated(value) else "not stated" for value in values]


def _as_numbers(values: Sequence[Any]) -> Sequence[Any]:
    """The texts of a CSV column as numbers, if all of them are numbers. A text with a leading zero is a code, not a number."""
    texts = [value for value in values if _is_stated(value)]
    if not texts or not all(isinstance(text, str) and _NUMBER.fullmatch(text) for text in texts):
        return values
    return [float(value) if _is_stated(value) else None for value in values]


def _is_stated(value: Any) -> bool:
    return value is not None and value != "" and value == value  # NaN is unequal to itself


def _reaching(ordered: Float64, thresholds: Float64) -> Float64:
    return 1 - np.searchsorted(ordered, thresholds) / len(ordered)


def _steps(rate: Float64) -> Float64:
    """The change of a rate between neighbouring thresholds, on a logarithmic scale."""
    least = np.min(rate[rate > 0], initial=1.0) / 2
    return np.abs(np.diff(np.log(np.maximum(rate, least)), prepend=np.log(max(float(rate[0]), least))))


def _ratio(events: NDArray[Any], trials: NDArray[Any]) -> Float64:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(trials > 0, events.astype(np.float64) / trials, np.nan)


def _percentiles(drawn: Float64) -> Interval | None:
    kept = drawn[np.isfinite(drawn)]
    if not len(kept):
        return None
    low, high = np.quantile(kept, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _hull(a: Interval, b: Interval | None) -> Interval:
    return a if b is None else (min(a[0], b[0]), max(a[1], b[1]))
