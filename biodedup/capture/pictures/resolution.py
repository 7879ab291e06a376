"""Determines the resolution of a finger's picture: compares the stated resolution with the ridge periods on both axes.

Owns the limits of a scanner's resolution and the correction of pixels that are not square. Never decodes and never refuses for quality.

1. `Pixels.provenance` names each correction.
2. If neither the stated resolution nor square pixels fit the ridges, the picture is refused as `resolution`, with the numbers.
"""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
from numpy.typing import NDArray

from biodedup.capture.pictures.formats import DPI_MAX, Pixels
from biodedup.values import Refusal

SCANNER_DPI_MIN = 250.0
"""Lower stated resolutions are not those of a scanner: image editors write 72 and 96."""
DPI = 500.0
SQUARE_MAX = 1.02
"""Resolutions of both axes that differ by a smaller factor count as equal, because some files round pixels per centimetre."""
_FIT_MAX = 1.5
"""The measured ratio of the ridge periods on both axes is within this factor of the true ratio for nineteen of twenty prints of FVC2002
DB1-4_B and UareU, unchanged and stretched by 1.4 and 2 (2026-11)."""
_TRUSTED_MAX = 1.3
"""The ridges cannot confirm a smaller ratio of the stated resolutions. It is believed."""
_SQUARE_FACE_MAX, _ASPECT_MAX = 1.1, 3.0
RIDGE_MM = 0.46
"""The mean period of ridges of adults: Kücken and Champod, "Merkel cells and the individuality of friction ridge skin", 2013."""
_WINDOW = 64
_PERIODS = (3.5, 25.0)
_RATIOS = np.exp(np.arange(-10, 11) * 0.1)
"""Tried ratios of the resolutions of both axes: 0.37 to 2.7."""
_RING = 0.12
"""Width of a ring, in the logarithm of its radius."""
_CONTRAST_MIN = 15.0
_WINDOWS_MIN = 4


def settled(pixels: Pixels, column: str) -> Pixels | Refusal:
    """The picture with square pixels and a plausible resolution, or a refusal. `dpi` is None if the default of 500 applies."""
    if pixels.stated is None:
        return pixels
    x, y = pixels.stated
    scanners = [value for value in (x, y) if SCANNER_DPI_MIN <= value <= DPI_MAX]
    if not scanners:
        return replace(
            pixels, dpi=None, provenance=(f"states {_dpi_text(x, y)}, which is not a scanner's; taken as {DPI:g}",)
        )
    if len(scanners) == 1:
        note = f"states {_dpi_text(x, y)}, only one of which is a scanner's; taken as {scanners[0]:g}"
        return replace(pixels, dpi=scanners[0], provenance=(note,))
    if max(x, y) <= SQUARE_MAX * min(x, y):
        return replace(pixels, dpi=x)
    periods = ridge_periods(pixels.grey)
    if periods is None:
        return Refusal(
            column, "resolution", f"states {_dpi_text(x, y)}, and shows no ridges to check it by", x / y, SQUARE_MAX
        )
    measured = periods[0] / periods[1]
    from_stated, from_square = _apart(measured, x / y), _apart(measured, 1.0)
    if min(from_stated, from_square) > _FIT_MAX:
        detail = f"states {_dpi_text(x, y)}, its ridges show a ratio of {measured:.2f}; state the scanner's dpi"
        return Refusal(column, "resolution", detail, round(measured, 3), round(x / y, 3))
    if from_stated <= from_square or max(x, y) < _TRUSTED_MAX * min(x, y):
        dpi = max(x, y)
        note = f"states {_dpi_text(x, y)}; resampled to {dpi:g} on both axes"
        return replace(_resized(pixels, dpi / x, dpi / y), dpi=dpi, provenance=(note,))
    period = float(np.sqrt(periods[0] * periods[1]))
    dpi = min((x, y), key=lambda value: _apart(period * 25.4 / value, RIDGE_MM))
    note = f"states {_dpi_text(x, y)}, but its ridges show square pixels; taken as {dpi:g}"
    return replace(pixels, dpi=dpi, provenance=(note,))


def squared(pixels: Pixels) -> Pixels | None:
    """The picture, resampled to square pixels by the resolutions that its file states. None if the pixels are square already, or the stated ratio
    is implausible."""
    x, y = pixels.stated or (1.0, 1.0)
    if not _SQUARE_FACE_MAX < _apart(x, y) <= _ASPECT_MAX:
        return None
    dpi = max(x, y)
    note = f"states {_dpi_text(x, y)}; resampled to {dpi:g} on both axes"
    return replace(_resized(pixels, dpi / x, dpi / y), dpi=None, provenance=(note,))


def ridge_periods(grey: NDArray[np.uint8]) -> tuple[float, float] | None:
    """The ridge period in pixels along x and along y; None if the picture has too little contrast.

    Ridges of one period in all directions give a ring in the mean power spectrum of small windows. If pixels are not square, the ring is an
    ellipse. Of the tried ratios, the ratio whose ellipse has the most power is taken.
    """
    half = _WINDOW // 2
    if min(grey.shape) < _WINDOW:
        return None
    windows = np.lib.stride_tricks.sliding_window_view(grey, (_WINDOW, _WINDOW))[::half, ::half]
    windows = windows.reshape(-1, _WINDOW, _WINDOW).astype(np.float32)
    contrast = windows.std(axis=(1, 2))
    chosen = windows[contrast >= max(_CONTRAST_MIN, float(np.median(contrast)))]
    if len(chosen) < _WINDOWS_MIN:
        return None
    hann = np.hanning(_WINDOW).astype(np.float32)
    chosen = (chosen - chosen.mean(axis=(1, 2), keepdims=True)) * hann[:, None] * hann
    spectra = np.abs(np.fft.rfft2(chosen, (2 * _WINDOW,) * 2)) ** 2
    power = (spectra / spectra.sum(axis=(1, 2), keepdims=True)).mean(axis=0)
    fy, fx = np.meshgrid(np.fft.fftfreq(2 * _WINDOW), np.fft.rfftfreq(2 * _WINDOW), indexing="ij")
    peaks = [(*_ring(power, np.hypot(fx * np.sqrt(ratio), fy / np.sqrt(ratio))), ratio) for ratio in _RATIOS]
    _, period, ratio = max(peaks)
    return float(period * np.sqrt(ratio)), float(period / np.sqrt(ratio))


def _ring(power: NDArray[np.float64], radius: NDArray[np.float64]) -> tuple[float, float]:
    """(mean power of the strongest ring, its period in pixels). Power is weighted by the squared radius, because pictures have most power at
    long periods."""
    inside = (radius >= 1 / _PERIODS[1]) & (radius <= 1 / _PERIODS[0])
    bins = np.round(np.log(radius[inside]) / _RING).astype(int)
    bins -= bins.min()
    count = np.bincount(bins)
    profile = np.bincount(bins, power[inside] * radius[inside] ** 2) / np.maximum(count, 1)
    best = int(np.argmax(profile))
    return float(profile[best]), float(1 / np.exp(np.log(radius[inside][bins == best]).mean()))


def _resized(pixels: Pixels, wide: float, tall: float) -> Pixels:
    image = pixels.rgb_or_grey
    size = round(image.shape[1] * wide), round(image.shape[0] * tall)
    return replace(pixels, rgb_or_grey=np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_CUBIC), np.uint8))


def _apart(a: float, b: float) -> float:
    """The factor between two positive numbers, at least 1."""
    return max(a, b) / min(a, b)


def _dpi_text(x: float, y: float) -> str:
    return f"{x:g} dpi" if x == y else f"{x:g} x {y:g} dpi"
