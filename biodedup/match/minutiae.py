"""Comparing minutiae: one probe with many candidates, behind a seam.

Owns the seam and its first implementation, BOZORTH3. Never extracts minutiae. Records: `capture.minutiae_record`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from biodedup.capture.minutiae_record import read_record
from biodedup.capture.nbis_parts import bozorth3


class MinutiaeMatcher(Protocol):
    def compare(self, probe: bytes, candidates: Sequence[bytes]) -> NDArray[np.float32]:
        """Scores float32 (n,), at least 0, higher is more alike. Raises InvalidInput for an unsound record."""


class Bozorth3:
    """BOZORTH3 of NBIS; symmetric, since the larger of both directions counts."""

    def compare(self, probe: bytes, candidates: Sequence[bytes]) -> NDArray[np.float32]:
        return bozorth3(read_record(probe), [read_record(candidate) for candidate in candidates])
