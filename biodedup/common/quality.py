"""Converts the quality of finger captures between its stored scale, 0 to 100, and the scale of `Template.quality`, 0 to 1.

Owns the tables. Never measures a capture.

1. `Template.quality` has one meaning for faces and fingers: the probability that a comparison with another capture of the same person
   passes at FMR 1e-4 (40 dB).
2. Files use the scales of earlier releases: 0 to 1 for a face, 0 to 100 for a finger. So galleries, kits and logs of all releases agree,
   and no file must be rewritten.
3. The tables are strictly ascending, so that the conversion to a file and back loses nothing.

Method: logistic regression. The dependent variable is whether a comparison passes (embedding and minutiae, at 40 dB); the independent
variables are the quality scores of both prints. Fitted with `benchmarks/finger_quality.py --fit` on the tuning half of FVC2002 DB1-4_B and
UareU, 2026-11.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

MEANING = "probability that a mated comparison passes at FMR 1e-4"
SCORE_MAX = 100.0

_SCORE = (0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 100.0, 101.0)
_PROBABILITY = (0.0, 0.185, 0.36, 0.583, 0.776, 0.896, 0.955, 0.982, 0.992, 0.997, 0.999, 1.0)
"""The probability for each value of _SCORE. A score is that of one pass over a print (`Measures.score`), or the quality in a minutiae
record. A print with a score of 0 has nothing to compare. No print has a score of 101: files use it for a quality of 1."""

_NFIQ2 = (0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 100.0)
_NFIQ2_PROBABILITY = (0.806, 0.867, 0.911, 0.941, 0.962, 0.975, 0.984, 0.99, 0.994, 0.996, 0.997)
"""The probability for each NFIQ 2 score. NFIQ 2 predicts the errors of this matcher less well than the score, so that the values differ
less."""

_DIGITS = 6
"""The decimals of a quality that is read: the precision of float32."""


def of_score(score: float) -> float:
    """The quality, 0 to 1, of a finger whose score is 0 to 100."""
    return round(float(np.interp(score, _SCORE, _PROBABILITY)), _DIGITS)


def of_nfiq2(score: float) -> float:
    """The quality, 0 to 1, of a finger whose NFIQ 2 score is 0 to 100."""
    return round(float(np.interp(score, _NFIQ2, _NFIQ2_PROBABILITY)), _DIGITS)


def as_stored(column: str, quality: float | None) -> float | None:
    """The stored value of a template's quality. None stays None."""
    if quality is None or column == "face":
        return None if quality is None else float(quality)
    return float(np.interp(quality, _PROBABILITY, _SCORE))


def from_stored(column: str, stored: float | None) -> float | None:
    """The quality of a template from its stored value; None if it was not measured."""
    if stored is None or np.isnan(stored):
        return None
    return min(max(float(stored), 0.0), 1.0) if column == "face" else of_score(stored)


def each_as_stored(column: str, qualities: ArrayLike) -> NDArray[np.float32]:
    """As `as_stored`, for the templates of one column. NaN stays NaN."""
    given = np.asarray(qualities, np.float64)
    return np.asarray(given if column == "face" else np.interp(given, _PROBABILITY, _SCORE), np.float32)


def each_from_stored(column: str, stored: ArrayLike) -> NDArray[np.float32]:
    """As `from_stored`, for the templates of one column: 0 to 1. NaN stays NaN."""
    given = np.asarray(stored, np.float64)
    made = np.clip(given, 0, 1) if column == "face" else np.interp(given, _SCORE, _PROBABILITY).round(_DIGITS)
    return np.asarray(made, np.float32)


def each_of_table(column: str, qualities: ArrayLike) -> NDArray[np.float32]:
    """The stored values of qualities from an Arrow table, 0 to 1. A finger's value above 1 is on the scale of earlier releases, and is
    kept."""
    given = np.asarray(qualities, np.float32)
    return np.where(given > 1, given, each_as_stored(column, given)).astype(np.float32)
