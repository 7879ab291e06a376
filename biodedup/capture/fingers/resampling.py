"""Resamples pictures to another resolution.

Owns resampling, and which resolutions are a scanner's. Never checks one axis against the other (`pictures/resolution.py`).
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from biodedup.capture.pictures.resolution import RIDGE_MM, SCANNER_DPI_MIN, ridge_periods

DPI = 500
MM_PER_PIXEL = 25.4 / DPI
_NEAR, _FAR, _NEARER, _FITS = 0.1, 0.2, 0.15, 0.2
"""Of logarithms. A resolution as near to 500 dpi is not checked. One that makes ridges less than 0.38 mm apart, or more than 0.56, is not
believed if 500 dpi does not and is nearer to the mean distance. Medians of FVC2002's and UareU's prints are 0.39 to 0.59 mm (2026-11)."""


def scanner_dpi(stated: float | None) -> float:
    """The file's resolution if it is plausible for a scanner, else 500."""
    return stated if stated is not None and stated >= SCANNER_DPI_MIN else float(DPI)


def resampled(grey: NDArray[np.uint8], dpi: float, wanted_dpi: float = DPI) -> NDArray[np.uint8]:
    """The image at another resolution. uint8 (h, w) in and out; within 1 % it stays as it is."""
    factor = wanted_dpi / dpi
    if abs(factor - 1) < 0.01:
        return grey
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(grey, None, fx=factor, fy=factor, interpolation=interpolation), np.uint8)


def contradicted(grey: NDArray[np.uint8], dpi: float) -> float | None:
    """The distance of the ridges in pixels, where no finger's are as far apart at this resolution, and a finger's are at 500 dpi."""
    if abs(np.log(dpi / DPI)) <= _NEAR or (periods := ridge_periods(grey)) is None:
        return None
    period_px = float(np.sqrt(periods[0] * periods[1]))
    stated, usual = (abs(float(np.log(period_px * 25.4 / value / RIDGE_MM))) for value in (dpi, DPI))
    return period_px if usual <= _FITS and stated > max(_FAR, usual + _NEARER) else None
