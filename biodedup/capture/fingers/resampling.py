"""Resamples pictures to another resolution.

Owns resampling, and which resolutions are a scanner's. Never checks one axis against the other (`pictures/resolution.py`).
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from biodedup.capture.pictures.resolution import SCANNER_DPI_MIN

DPI = 500
MM_PER_PIXEL = 25.4 / DPI


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
