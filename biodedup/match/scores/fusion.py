"""Fusion: turns the evidence of several captures into one score.

Owns the distributions of summed log-likelihood ratios of mates and of non-mates. Never compares captures.

The log-likelihood ratios of the captures are added, and the sum is calibrated again: score_db = -10 log10 P(sum or more | all captures
non-mated). Non-mated scores of different captures are assumed to be independent. The distribution of the sum is the convolution of the
captures' distributions. It is computed directly, because a Fourier transform would lose the far tail below 1e-16, where the thresholds of
a national register are. Direct sums of positive terms keep the full relative precision.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biodedup.match.scores.calibration import SCORE_DB_MAX, Bound, Calibration

STEP_DB = 0.25
Distribution = Bound | Literal["mated"]
"""A distribution of sums: of non-mates, by a `Bound`, or of mates."""

_tables: dict[tuple[Distribution, tuple[int, ...]], tuple[tuple[Calibration, ...], int, NDArray[np.float64]]] = {}
_lock = threading.Lock()


def fused_score_db(
    llr_sums_db: ArrayLike, calibrations: Sequence[Calibration]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(score_db, extrapolated), float64 and bool (n,), of sums of llr_db (n,) over captures with these calibrations. For a single sum they
    are 0-dimensional.

    extrapolated: the score is above the measured range of every capture's calibration.
    """
    scores = score_db_of_steps(steps_of(llr_sums_db), calibrations)
    return scores, scores > measured_db(calibrations)


def measured_db(calibrations: Sequence[Calibration]) -> float:
    """The score_db beyond which no pairs were measured for any of the captures."""
    return max([calibration.measured_db for calibration in calibrations])


def steps_of(llr_sums_db: ArrayLike) -> NDArray[np.int64]:
    """Sums of llr_db in whole steps of STEP_DB, rounded down.

    The tables are of rounded-up values. Rounding the sum down keeps the score from being too high.
    """
    return np.floor(np.asarray(llr_sums_db, np.float64) * (1 / STEP_DB)).astype(np.int64)


def score_db_of_steps(
    steps: NDArray[np.int64] | np.int64, calibrations: Sequence[Calibration], bound: Bound = "best"
) -> NDArray[np.float64]:
    """score_db of sums in steps, over captures with these calibrations. bound: the distribution of non-mates. "low" and "high" assume that
    the tables of all captures err in the same direction, so that the interval is wider than 95 %."""
    first, score_db = _table(calibrations, bound)
    return np.asarray(score_db.take(steps - first, mode="clip"))


def bounded(calibrations: Sequence[Calibration]) -> bool:
    """Whether all of these calibrations have an interval."""
    return all([calibration.bounds_db is not None for calibration in calibrations])


def llr_reaching(score_db: float, calibrations: Sequence[Calibration]) -> float:
    """The lowest sum of llr_db that reaches score_db."""
    first, scores = _table(calibrations, "best")
    return float(first + np.searchsorted(scores, score_db)) * STEP_DB


def mated_quantile_db(share: float, calibrations: Sequence[Calibration], mated_shares: Sequence[float] = ()) -> float:
    """The score_db below which this share of mates score. mated_shares: as in `mated_share_below`."""
    return _quantile_db(share, tuple(calibrations), tuple(mated_shares))


@lru_cache(maxsize=256)
def _quantile_db(share: float, calibrations: tuple[Calibration, ...], mated_shares: tuple[float, ...]) -> float:
    first, below = _mated_table(calibrations, mated_shares)
    index = int(np.searchsorted(below, share, side="right")) - 1
    return float(score_db_of_steps(np.int64(first + max(index, 0)), calibrations))


def mated_share_below(
    score_db: float, calibrations: Sequence[Calibration], mated_shares: Sequence[float] = ()
) -> float:
    """The share of mates that score below score_db.

    mated_shares: for each capture, the share of its mated comparisons that score as mates do; the rest scores as non-mates do, as the
    comparisons of poor captures do. (): 1 for each capture.
    """
    first, below = _mated_table(calibrations, mated_shares)
    index = round(llr_reaching(score_db, calibrations) / STEP_DB) - first
    return float(below[index]) if index < len(below) else 1.0


def _table(calibrations: Sequence[Calibration], distribution: Distribution) -> tuple[int, NDArray[np.float64]]:
    """(first, values) by sums of llr_db in steps: the score_db for non-mates, the share of lower sums for mates."""
    key = distribution, tuple(sorted(map(id, calibrations)))  # one table for all orders
    if (entry := _tables.get(key)) is None:
        with _lock:
            if len(_tables) >= 1024:
                _tables.clear()
            # a fixed order makes sums equal to the last bit; the entry keeps its calibrations alive, so that no id in a key is reused
            ordered = sorted(calibrations, key=lambda calibration: (calibration.source, id(calibration)))
            entry = _tables[key] = (tuple(ordered), *_convolved(ordered, distribution))
    return entry[1:]


def _mated_table(calibrations: Sequence[Calibration], mated_shares: Sequence[float]) -> tuple[int, NDArray[np.float64]]:
    """As `_table` for mates. Tables of poor captures are not cached: such captures are few, and have many combinations."""
    if all([share == 1 for share in mated_shares]):
        return _table(calibrations, "mated")
    parts = []
    for calibration, share in zip(calibrations, mated_shares, strict=True):
        (first, mated), (_, nonmated) = mass_of(calibration, "mated"), mass_of(calibration, "best")
        parts.append((first, share * mated + (1 - share) * nonmated / nonmated.sum()))
    return _below(*_summed(parts))


def _below(first: int, mass: NDArray[np.float64]) -> tuple[int, NDArray[np.float64]]:
    """(first, probability of a lower value) of a probability mass function."""
    return first, np.append(0.0, np.minimum(np.cumsum(mass[:-1]), 1.0))


def _summed(parts: Sequence[tuple[int, NDArray[np.float64]]]) -> tuple[int, NDArray[np.float64]]:
    """The probability mass function of a sum of independent numbers."""
    first, mass = parts[0]
    for start, more in parts[1:]:
        first += start
        mass = np.convolve(mass, more)
    return first, mass


def _convolved(calibrations: Sequence[Calibration], distribution: Distribution) -> tuple[int, NDArray[np.float64]]:
    first, mass = _summed([mass_of(calibration, distribution) for calibration in calibrations])
    if distribution == "mated":
        return _below(first, mass)
    survival = np.cumsum(mass[::-1])[
        ::-1
    ]  # from the end: small terms are added first, so that the tail keeps its precision
    with np.errstate(divide="ignore"):
        return first, np.clip(-10 * np.log10(survival), 0.0, SCORE_DB_MAX)


def mass_of(calibration: Calibration, distribution: Distribution) -> tuple[int, NDArray[np.float64]]:
    """The probability mass function of one capture's llr_db, as `Calibration.nonmated_llr_pmf` gives it, in steps of STEP_DB."""
    if distribution != "mated":
        return calibration.nonmated_llr_pmf(STEP_DB, distribution)
    first, mass = calibration.nonmated_llr_pmf(STEP_DB)
    # mated density = non-mated density x likelihood ratio; dividing by the sum corrects rounding and the ends of the table
    mates = mass * 10 ** ((first + np.arange(len(mass))) * STEP_DB / 10)
    return first, mates / mates.sum()
