"""BOZORTH3 behind its seam: threads agree, and crowded records cannot hold it up."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from biodedup.capture.minutiae_record import MinutiaeRecord, write_record
from biodedup.errors import InvalidInput
from biodedup.match.minutiae import Bozorth3

SIDE = 400
compare = Bozorth3().compare


def record(count: int, seed: int = 0, shift: int = 0, spread: int = 300) -> bytes:
    """Minutiae strewn over spread x spread pixels, moved by `shift`."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, spread, (2, count)) + shift
    angle, quality = rng.integers(0, 256, count), np.full(count, 50)
    rows = np.stack([0x40 | (x >> 8), x & 255, y >> 8, y & 255, angle, quality], axis=1)
    return write_record(MinutiaeRecord(SIDE, SIDE, rows.astype(np.uint8).tobytes()), 0, 50)


def test_a_moved_print_scores_far_above_another_finger():
    same, other = compare(record(40), [record(40, shift=20), record(40, seed=1)])
    assert same > 100 > 20 > other


def test_threads_score_as_one_thread_does():
    records = [record(40, seed, shift) for seed in range(6) for shift in (0, 15)]
    alone = [compare(probe, records).tolist() for probe in records]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda probe: compare(probe, records).tolist(), records * 3)) == alone * 3


@pytest.mark.parametrize("spread", [1, 40, 60])
def test_more_minutiae_in_one_place_than_a_finger_has_are_refused(spread):
    crowd = record(255, spread=spread)
    with pytest.raises(InvalidInput, match="extract it again"):
        compare(crowd, [crowd])
