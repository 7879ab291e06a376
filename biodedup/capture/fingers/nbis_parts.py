"""Calls NBIS (MINDTCT, NFIQ 2) through the package `nbis-py`, one call at a time.

Owns the library's settings, its lock and its private record layout. Never judges quality.

NBIS keeps work areas in global variables, so that a lock guards every call. The ISO records of `nbis-py` have a header of 26 bytes instead
of 28. This module converts them to standard records.
"""

from __future__ import annotations

import struct
import threading
from functools import cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from biodedup.capture.minutiae.record import MinutiaeRecord

_lock = threading.Lock()
_HEADER = struct.Struct(">4s4sIHHH7sB")  # magic, version, length, 0, width, height, unused, count

MINUTIAE_MAX = 150
"""The default of BOZORTH3. Further minutiae come from noise, and BOZORTH3's time grows with the fourth power of their number."""


def extract(grey: NDArray[np.uint8]) -> MinutiaeRecord:
    """MINDTCT minutiae of a 500 dpi image, uint8 (h, w). Raises ValueError if NBIS cannot process the image."""
    native = bytes(_call(grey, False).to_iso_19794_2_2005())
    body = native[_HEADER.size :]
    return MinutiaeRecord(grey.shape[1], grey.shape[0], body[: len(body) // 6 * 6]).strongest(MINUTIAE_MAX)


def nfiq2(grey: NDArray[np.uint8]) -> float:
    """The NFIQ 2 score (0..100) of a 500 dpi image, uint8 (h, w).

    NFIQ 2 accepts 129 to 800 x 1000 pixels after white margins are trimmed. Raises ValueError if NBIS refuses the image.
    """
    return float(_call(grey, True).quality().score)


def _call(grey: NDArray[np.uint8], with_nfiq2: bool) -> Any:
    content = cv2.imencode(".png", grey)[1].tobytes()
    with _lock:
        import nbis

        try:
            return _extractor(with_nfiq2).extract_minutiae(content)
        except (nbis.NbisError, nbis.InternalError) as error:
            raise ValueError(f"NBIS: {type(error).__name__}") from error


@cache
def _extractor(with_nfiq2: bool) -> Any:
    import nbis

    settings = nbis.NbisExtractorSettings(
        min_quality=0.0, get_center=False, check_fingerprint=False, compute_nfiq2=with_nfiq2, ppi=500.0
    )
    return nbis.new_nbis_extractor(settings)
