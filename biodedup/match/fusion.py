"""Fusion: the evidence of several captures as one score.

Owns the distribution of summed log-likelihood ratios. Never compares captures.

Captures add as log-likelihood ratios, and the sum is calibrated again: score_db = -10 log10 P(sum or more | all captures
non-mated). Non-mated scores of different captures are taken as independent. The distribution of the sum is the
convolution of the single ones; it is computed directly, since all terms are positive and so the far tail, where a
national register's thresholds lie, keeps its full relative precision (a Fourier transform would lose it at 1e-16).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from biodedup.match.calibration import SCORE_DB_MAX, Calibration

STEP_DB = 0.25

_tables: dict[tuple[int, ...], tuple[tuple[Calibration, ...], int, NDArray[np.float64]]] = {}
_lock = threading.Lock()


def fused_score_db(llr_sum_db: float, calibrations: Sequence[Calibration]) -> tuple[float, bool]:
    """(score_db, extrapolated) of a sum of llr_db over captures with these calibrations.

    extrapolated: the score lies beyond what the non-mated pairs of any capture among them could measure.
    """
    first, score_db = _table(calibrations)
    # The sum of exact values is below the sum of rounded-up ones: rounding it down keeps the score from being optimistic.
    index = int(np.floor(llr_sum_db / STEP_DB)) - first
    value = float(score_db[min(max(index, 0), len(score_db) - 1)])
    return value, value > max(calibration.measured_db for calibration in calibrations)


def llr_reaching(score_db: float, calibrations: Sequence[Calibration]) -> float:
    """The least sum of llr_db that scores as much."""
    first, scores = _table(calibrations)
    return float(first + np.searchsorted(scores, score_db)) * STEP_DB


def _table(calibrations: Sequence[Calibration]) -> tuple[int, NDArray[np.float64]]:
    ordered = sorted(calibrations, key=id)
    key = tuple(map(id, ordered))
    with _lock:
        if key not in _tables:
            if len(_tables) >= 256:
                _tables.clear()
            # the calibrations are kept with their table, so that no id is given away while it is a key
            _tables[key] = (tuple(ordered), *_convolved(ordered))
        return _tables[key][1:]


def _convolved(calibrations: Sequence[Calibration]) -> tuple[int, NDArray[np.float64]]:
    first, mass = calibrations[0].nonmated_llr_pmf(STEP_DB)
    for calibration in calibrations[1:]:
        start, more = calibration.nonmated_llr_pmf(STEP_DB)
        first += start
        mass = np.convolve(mass, more)
    survival = np.cumsum(mass[::-1])[::-1]  # smallest first: the tail is summed before the bulk drowns it
    with np.errstate(divide="ignore"):
        return first, np.clip(-10 * np.log10(survival), 0.0, SCORE_DB_MAX)
