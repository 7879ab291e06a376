"""Measures how far apart the ridges of a print are, and checks a resolution by it.

Owns the distance of ridges and what may be concluded from it. Never resamples and never refuses (`finger` does).

The distance is read from power spectra of windows: each window of a print has one wave. The likelihoods of two resolutions are compared
by the distances that fingers have at them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import log

import cv2
import numpy as np
from numpy.typing import NDArray

from biodedup.capture.pictures.resolution import RIDGE_MM
from biodedup.values import Float32

_SPREAD = 0.13
"""Standard deviation of the logarithm of the distance, over the prints of all these sets."""
_LEAST_MM, _MOST_MM = 0.285, 0.65
"""All of 940 prints of FVC2002 DB1-4_B, UareU and SFinGe's demonstration set have 0.29 to 0.63 mm. Of prints of 300 dpi that are taken for
500 dpi, 87 % have less (2026-11-30)."""
_DPI_MAX = 1250.0
"""At a higher resolution the windows are too small for two ridges. The picture is shrunk to half of it, or less."""
_STANDARD_DPI = {500.0: 0.3, 1000.0: 0.15}
"""What a scanner usually has, with the largest difference of logarithms that is taken for it: 1000 must not be taken for 800."""
_NEAR = 0.1
"""Of logarithms: resolutions as near to one another cannot be told apart."""
_SURE, _DOUBT, _DOUBT_DPI_MAX = 2.0, 0.5, 375.0
"""Log likelihood ratios. Above the first another resolution is taken for the stated one: of real prints that state 600 or 700 dpi rightly 11
in 828, that state 400 or less 5 in 1,242. Between them a low stated one is doubtful, as image editors write 300 and 350: 8 of 828 that state
these rightly (FVC2002 DB1-3_B, every third print of UareU, resampled). SFinGe's prints have nearer ridges: 15 in 100 of 700 dpi."""

_WINDOW = 64
_WINDOWS, _WINDOWS_MIN = 48, 4
_PERIODS_PX = (3.5, 25.0)
_CONTRAST_MIN = 15.0
_REGULAR_MIN, _POWER_MIN, _SAME = 0.6, 0.08, 0.25


@dataclass(frozen=True)
class RidgeDistance:
    """px: median over windows. regular: share of windows that lie within a quarter of it; prints have 0.69 and more, most 0.9. power: of
    the wave, as a share of a window's; the median. Prints have 0.09 and more, noise has 0.05."""

    px: float
    regular: float
    power: float

    def mm(self, dpi: float) -> float:
        """The distance if the picture has this resolution."""
        return self.px * 25.4 / dpi


@dataclass(frozen=True)
class Judged:
    """What ridges say of a resolution. better: another one that fits where this does not; None: none. doubtful: another fits a little
    better. impossible: no finger's ridges are so far apart, or so near."""

    distance: RidgeDistance | None = None
    better: float | None = None
    doubtful: bool = False
    impossible: bool = False

    def mm(self, dpi: float) -> float:
        """The distance of the ridges if the picture has this resolution; 0 where it shows none."""
        return 0.0 if self.distance is None else self.distance.mm(dpi)


def judged(grey: NDArray[np.uint8], dpi: float) -> Judged:
    """grey: uint8 (h, w). A picture without regular waves says nothing."""
    distance = _at_any_scale(grey, dpi)
    if distance is None or distance.regular < _REGULAR_MIN or distance.power < _POWER_MIN:
        return Judged(distance)
    away = _away(distance, dpi)
    impossible = not _LEAST_MM <= distance.mm(dpi) <= _MOST_MM
    if abs(log(dpi / 500)) <= _NEAR and not impossible:
        return Judged(distance)
    others = [other for other, near in _STANDARD_DPI.items() if _away(distance, other) <= near]
    others = [other for other in others if abs(log(dpi / other)) > _NEAR]
    gain = max(((away**2 - _away(distance, other) ** 2) / (2 * _SPREAD**2) for other in others), default=0.0)
    if gain > _SURE:
        return Judged(distance, min(others, key=lambda other: _away(distance, other)))
    return Judged(distance, None, gain > _DOUBT and dpi < _DOUBT_DPI_MAX, impossible)


def _at_any_scale(grey: NDArray[np.uint8], dpi: float) -> RidgeDistance | None:
    """The distance with the clearest waves, in the picture and, if its resolution is high, in smaller copies: the resolution may be wrong."""
    found = [ridge_distance(grey)]
    factor = 2
    while dpi / factor * 2 > _DPI_MAX:
        smaller = ridge_distance(
            np.asarray(cv2.resize(grey, None, fx=1 / factor, fy=1 / factor, interpolation=cv2.INTER_AREA))
        )
        found.append(smaller and replace(smaller, px=smaller.px * factor))
        factor *= 2
    return max((one for one in found if one is not None), key=lambda one: one.regular * one.power, default=None)


def ridge_distance(grey: NDArray[np.uint8]) -> RidgeDistance | None:
    """Of the windows with most contrast; None for a picture that is too small, or has too little contrast."""
    if min(grey.shape) < _WINDOW:
        return None
    step = _WINDOW // 2
    windows = np.lib.stride_tricks.sliding_window_view(grey, (_WINDOW, _WINDOW))[::step, ::step]
    windows = windows.reshape(-1, _WINDOW, _WINDOW)
    windows = windows[:: -(-len(windows) // (4 * _WINDOWS))].astype(np.float32)
    contrast = windows.std(axis=(1, 2))
    chosen = np.argsort(-contrast, kind="stable")[: max(_WINDOWS_MIN, len(windows) // 2)]
    chosen = chosen[contrast[chosen] >= _CONTRAST_MIN]
    chosen = chosen[:: max(-(-len(chosen) // _WINDOWS), 1)]
    if len(chosen) < _WINDOWS_MIN:
        return None
    periods, shares = _waves(windows[chosen])
    order = np.argsort(periods, kind="stable")
    total = np.cumsum(shares[order])
    px = periods[order][np.searchsorted(total, total[-1] / 2)]
    same = np.abs(np.log(periods / px)) < _SAME
    return RidgeDistance(float(px), float(shares[same].sum() / total[-1]), float(np.median(shares)))


def _waves(windows: Float32) -> tuple[Float32, Float32]:
    """(period of the strongest wave in pixels, its share of the window's power) of windows, float32 (n, side, side)."""
    radius, hann = _radius(), np.hanning(_WINDOW).astype(np.float32)
    level = windows - windows.mean(axis=(1, 2), keepdims=True)
    power = np.abs(np.fft.rfft2(level * (hann[:, None] * hann))).astype(np.float32) ** 2
    # pictures have most power at long periods: it is weighted with the radius
    power *= np.where((radius >= 1 / _PERIODS_PX[1]) & (radius <= 1 / _PERIODS_PX[0]), radius, 0)
    whole = power.reshape(len(power), -1)
    y, x = np.unravel_index(whole.argmax(axis=1), radius.shape)
    # the centre of the peak: three by three numbers; those left of the first column are the mirrored ones
    down, across = (a[..., None, None] for a in (y, x))
    rows, columns = np.broadcast_arrays(down + np.arange(-1, 2)[:, None], across + np.arange(-1, 2))
    rows = np.where(columns < 0, -rows, rows) % _WINDOW
    columns = np.minimum(np.abs(columns), _WINDOW // 2)
    peak = power[np.arange(len(power))[:, None, None], rows, columns]
    near = np.maximum(peak.sum(axis=(1, 2)), np.float32(1e-12))
    periods = near / np.maximum((peak * radius[rows, columns]).sum(axis=(1, 2)), np.float32(1e-12))
    return periods, near / np.maximum(whole.sum(axis=1), np.float32(1e-12))


@cache
def _radius() -> Float32:
    """float32 (side, side // 2 + 1): waves a pixel."""
    fy, fx = np.meshgrid(np.fft.fftfreq(_WINDOW), np.fft.rfftfreq(_WINDOW), indexing="ij")
    return np.asarray(np.hypot(fx, fy), np.float32)


def _away(distance: RidgeDistance, dpi: float) -> float:
    return abs(log(distance.mm(dpi) / RIDGE_MM))
