"""Resamples pictures to another resolution, and checks a stated resolution by the ridges.

Owns resampling, and the range of a scanner's resolutions. Never compares the two axes (`pictures/resolution.py`).
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from biodedup.capture.pictures.resolution import RIDGE_MM, SCANNER_DPI_MIN, ridge_periods

DPI = 500
MM_PER_PIXEL = 25.4 / DPI
_NEAR, _FAR, _NEARER, _FITS = 0.1, 0.2, 0.15, 0.2
"""Differences of logarithms. A resolution within _NEAR of 500 dpi is not checked. Another resolution is contradicted if it puts the ridge
period outside 0.38 to 0.56 mm (_FAR), and 500 dpi puts it inside (_FITS) and nearer to the mean period by _NEARER. Median periods of prints
in FVC2002 and UareU are 0.39 to 0.59 mm (2026-11)."""


def scanner_dpi(stated: float | None) -> float:
    """The file's resolution if it is plausible for a scanner; otherwise 500."""
    return stated if stated is not None and stated >= SCANNER_DPI_MIN else float(DPI)


def resampled(grey: NDArray[np.uint8], dpi: float, wanted_dpi: float = DPI) -> NDArray[np.uint8]:
    """The image at another resolution, uint8 (h, w). If the resolutions differ by less than 1 %, it is returned unchanged."""
    factor = wanted_dpi / dpi
    if abs(factor - 1) < 0.01:
        return grey
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(grey, None, fx=factor, fy=factor, interpolation=interpolation), np.uint8)


def contradicted(grey: NDArray[np.uint8], dpi: float) -> float | None:
    """The ridge period in pixels if it contradicts this resolution and fits 500 dpi; otherwise None."""
    if abs(np.log(dpi / DPI)) <= _NEAR or (periods := ridge_periods(grey)) is None:
        return None
    period_px = float(np.sqrt(periods[0] * periods[1]))
    stated, usual = (abs(float(np.log(period_px * 25.4 / value / RIDGE_MM))) for value in (dpi, DPI))
    return period_px if usual <= _FITS and stated > max(_FAR, usual + _NEARER) else None
