"""Computes a print's ridge map, skeleton and minutiae in one pass, and predicts its quality from them.

Owns the measures of a print, its predicted score, and the certainty that the picture shows friction ridges. Never refuses a capture.

Score and certainty are regressions on few measures (`models/fit_one_pass.py`). The score predicts the mean score of a print with its mates.
It is a linear regression, fitted on the tuning half of FVC2002 DB1-4_B and UareU and on SFinGe's demonstration set, 2026-11. The certainty
distinguishes prints from other pictures (photographs, textures, documents, noise). It is a logistic regression, fitted on the same prints,
SOCOFing and generated prints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp, log

import cv2
import numpy as np
from numpy.typing import NDArray

from biodedup.capture.fingers.oriented import RIDGE_DPI
from biodedup.capture.fingers.resampling import DPI, resampled
from biodedup.capture.fingers.ridge_minutiae import RidgeMinutiae, ridge_minutiae
from biodedup.capture.fingers.ridges import RidgeMap, ridge_map
from biodedup.capture.fingers.skeleton import thinned
from biodedup.common import quality as quality_scale

_MM2 = (25.4 / RIDGE_DPI) ** 2
_RELIABLE = 0.5
_EMPTY, _FINGER_MM2, _FINGERS_MM = 0.5, 60.0, 26.0
"""To count fingers: the greatest power of the picture (with even contrast) where there are no ridges; the minimum area of a finger; the
minimum length of two fingers together. No print of the tuning half of FVC2002 and UareU splits into two regions. Some generated prints do,
but they are shorter than two fingers. Of two fingers at a distance of 1 mm 80 % are separated, at 3 mm all (2026-11)."""

_QUALITY = (6.623, 7.116, -10.271)
"""Weights of log(1 + reliable minutiae) and agreement, and the constant. They predict a score of CylinderMatcher."""
_SCORE_OF_100 = 25.0
_CERTAINTY = (7.735, -6.329, 14.958, 25.111, -20.734)
"""Weights of agreement, coherence, filtered coherence and reliability, and the constant. They predict log odds."""


@dataclass(frozen=True)
class Measures:
    """The measures of a print.

    area_mm2: area of the ridges. agreement: correlation of the ridge map with the picture. coherence, filtered_coherence: means over the
    ridge map. period_px: median period of the ridges, at 500 dpi. expected: sum of the minutiae's reliabilities. reliable: number of
    minutiae with a reliability above 0.5. reliability: mean of the reliabilities. fingers: number of separate regions of ridges.
    """

    area_mm2: float
    agreement: float
    coherence: float
    filtered_coherence: float
    period_px: float
    expected: float
    reliable: int
    reliability: float
    fingers: int = 1

    @property
    def score(self) -> float:
        """A whole number from 0 to 100: four times the expected score of a comparison with a mate."""
        reliable, agreement, constant = _QUALITY
        expected = reliable * log(1 + self.reliable) + agreement * self.agreement + constant
        return float(round(min(max(100 * expected / _SCORE_OF_100, 0.0), 100.0)))

    @property
    def quality(self) -> float:
        """As `Template.quality`, 0 to 1."""
        return quality_scale.of_score(self.score)

    @property
    def certainty(self) -> float:
        """The probability, 0 to 1, that the picture shows friction ridges."""
        given = (self.agreement, self.coherence, self.filtered_coherence, self.reliability)
        odds = sum(w * v for w, v in zip(_CERTAINTY, given, strict=False)) + _CERTAINTY[-1]
        return 1 / (1 + exp(-min(max(odds, -50.0), 50.0)))


@dataclass(frozen=True, eq=False)
class Print:
    """The result of one pass over a picture. thin: uint8 (h, w), the skeleton. ridges and thin are at RIDGE_DPI."""

    ridges: RidgeMap = field(repr=False)
    thin: NDArray[np.uint8] = field(repr=False)
    minutiae: RidgeMinutiae = field(repr=False)
    measures: Measures


def one_pass(grey: NDArray[np.uint8]) -> Print:
    """The ridge map, skeleton, minutiae and measures of a picture. grey: uint8 (h, w) at 500 dpi, ridges dark."""
    ridges = ridge_map(resampled(grey, DPI, RIDGE_DPI))
    thin = thinned(ridges)
    minutiae = ridge_minutiae(ridges, grey.shape)
    return Print(ridges, thin, minutiae, _measures(ridges, minutiae))


def _measures(ridges: RidgeMap, minutiae: RidgeMinutiae) -> Measures:
    inside, reliability = ridges.inside, minutiae.reliability
    count = cv2.countNonZero(inside)
    if not count:
        return Measures(
            area_mm2=0.0,
            agreement=0.0,
            coherence=0.0,
            filtered_coherence=0.0,
            period_px=0.0,
            expected=0.0,
            reliable=0,
            reliability=0.0,
        )
    mean = [cv2.mean(a, inside)[0] for a in (ridges.flat * ridges.ridges, ridges.flat**2, ridges.ridges**2)]
    return Measures(
        area_mm2=count * _MM2,
        agreement=mean[0] / max(mean[1] * mean[2], 1e-12) ** 0.5,
        coherence=cv2.mean(ridges.coherence, inside)[0],
        filtered_coherence=cv2.mean(ridges.filtered_coherence, inside)[0],
        period_px=float(np.median(ridges.period[::2, ::2][inside[::2, ::2] > 0])) * 500 / RIDGE_DPI,
        expected=float(reliability.sum()),
        reliable=int(np.count_nonzero(reliability > _RELIABLE)),
        reliability=float(reliability.mean()) if len(reliability) else 0.0,
        fingers=_fingers(ridges),
    )


def _fingers(ridges: RidgeMap) -> int:
    """The number of separate regions of ridges that are as large as a fingerprint; at least 1."""
    power = cv2.blur(ridges.flat * ridges.flat, (5, 5))
    region = ((power > _EMPTY) & (ridges.inside > 0)).astype(np.uint8)
    region = np.asarray(
        cv2.morphologyEx(region, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (7, 7))), np.uint8
    )
    _, _, statistics, _ = cv2.connectedComponentsWithStats(region)
    large = statistics[1:][statistics[1:, cv2.CC_STAT_AREA] * _MM2 >= _FINGER_MM2]
    if len(large) < 2:
        return 1
    first, size = large[:, :2], large[:, 2:4]
    length_px = int(((first + size).max(axis=0) - first.min(axis=0)).max())
    return len(large) if length_px * 25.4 / RIDGE_DPI >= _FINGERS_MM else 1
