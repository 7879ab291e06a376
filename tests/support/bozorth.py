"""BOZORTH3 of NBIS behind the package's matcher protocol: the peer of the minutiae matcher in tests and in benchmarks/minutiae.py.

NBIS keeps work areas in global variables, so one thread calls it at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

import nbis
import numpy as np
from numpy.typing import NDArray

from biodedup.capture.fingers.nbis_parts import MINUTIAE_MAX
from biodedup.capture.minutiae.record import MinutiaeRecord, read_record

HEADER = struct.Struct(">4s4sIHHH7sB")  # magic, version, length, 0, width, height, nothing of use, count
FILLER = bytes.fromhex("00004100000000")


class Bozorth3:
    """Symmetric, since the larger of both directions counts."""

    def compare(self, probe: bytes, candidates: Sequence[bytes]) -> NDArray[np.float32]:
        scores = np.zeros(len(candidates), np.float32)
        first = read_record(probe)
        if not first.count:
            return scores
        loaded = load(first)
        for i, candidate in enumerate(candidates):
            second = read_record(candidate)
            if second.count:
                other = load(second)
                scores[i] = max(loaded.compare(other), other.compare(loaded), 0)
        return scores


def load(record: MinutiaeRecord) -> Any:
    record = record.strongest(MINUTIAE_MAX)
    header = HEADER.pack(
        b"FMR\0", b" 20\0", HEADER.size + len(record.body), 0, record.width, record.height, FILLER, record.count
    )
    return extractor().load_iso_19794_2_2005(header + record.body)


@cache
def extractor() -> Any:
    settings = nbis.NbisExtractorSettings(
        min_quality=0.0, get_center=False, check_fingerprint=False, compute_nfiq2=False, ppi=500.0
    )
    return nbis.new_nbis_extractor(settings)
