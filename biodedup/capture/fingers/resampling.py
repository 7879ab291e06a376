"""Resamples pictures to another resolution, and checks a stated resolution by the ridges.

Owns resampling, and the range of a scanner's resolutions. Never compares the two axes (`pictures/resolution.py`).
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from biodedup.capture.pictures.resolution import SCANNER_DPI_MIN

DPI = 500
MM_PER_PIXEL = 25.4 / DPI


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
