"""Generated fingers: a seed is a finger, impressions of one finger agree, and they look like fingers to the rest of the library."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from biodedup.capture.fingers.oriented import RIDGE_DPI
from biodedup.capture.fingers.ridges import ridge_map
from biodedup.capture.fingers.skeleton import skeleton_minutiae
from biodedup.synthetic import draw_impression, draw_master
from biodedup.synthetic import masters as masters_module

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def masters():
    rng = np.random.default_rng(1)
    return [draw_master(rng) for _ in range(4)]


def upright(impression) -> np.ndarray:
    """Minutiae in the finger's own frame: float (n, 3), pixels from the core."""
    found = skeleton_minutiae(ridge_map(impression.image))
    x, y = found[:, 0] - impression.core[0], found[:, 1] - impression.core[1]
    c, s = np.cos(impression.angle), np.sin(impression.angle)
    return np.stack([c * x + s * y, c * y - s * x, found[:, 2] - impression.angle], axis=1)


def shared(a: np.ndarray, b: np.ndarray) -> float:
    """The share of a's minutiae that have one of b's within 7 pixels and 25 degrees."""
    apart = np.hypot(a[:, None, 0] - b[None, :, 0], a[:, None, 1] - b[None, :, 1])
    turned = np.abs(np.angle(np.exp(1j * (a[:, None, 2] - b[None, :, 2]))))
    return float(np.mean(((apart < 7) & (turned < np.radians(25))).any(axis=1)))


def test_a_seed_gives_the_same_finger_and_the_same_impressions():
    def drawn():
        rng = np.random.default_rng(9)
        master = draw_master(rng)
        return master.ridges, draw_impression(rng, master).image

    for first, again in zip(drawn(), drawn(), strict=True):
        assert (first == again).all()


def test_impressions_of_a_finger_share_its_minutiae_and_those_of_two_fingers_do_not(masters):
    rng = np.random.default_rng(2)
    prints = [[upright(draw_impression(rng, master, RIDGE_DPI)) for _ in range(4)] for master in masters]
    same = [shared(a, b) for finger in prints for a in finger for b in finger if a is not b]
    other = [shared(a, b) for i, f in enumerate(prints) for g in prints[i + 1 :] for a in f for b in g]
    assert np.median(same) > 0.35 > 2 * np.median(other)


def test_a_pattern_can_be_asked_for_and_is_otherwise_drawn_in_natural_shares(monkeypatch):
    assert draw_master(np.random.default_rng(0), "whorl").pattern == "whorl"
    monkeypatch.setattr(masters_module, "_grown", lambda *_: np.zeros((1, 1), np.int8))
    rng = np.random.default_rng(3)
    found = Counter(draw_master(rng).pattern for _ in range(600))
    for pattern, share in masters_module.PATTERNS.items():
        assert found[pattern] / 600 == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 600))


def test_ridges_fill_the_master_at_periods_that_fingers_have(masters):
    for master in masters:
        assert 0.4 < np.mean(master.ridges > 0) < 0.6
        found = ridge_map((128 - 0.8 * master.ridges).astype(np.uint8))
        assert found.inside.mean() > 0.9
        assert 4.8 < np.median(found.period) < 7.8  # 7.2 to 11.7 pixels at 500 dpi


def test_an_impression_at_another_resolution_is_the_same_size_in_millimetres(masters):
    fine = draw_impression(np.random.default_rng(4), masters[0], 1000)
    coarse = draw_impression(np.random.default_rng(4), masters[0], 500)
    assert coarse.image.shape == (431, 431) and fine.image.shape == (862, 862)
    assert np.allclose(np.divide(fine.core, coarse.core), 2, atol=0.02)


def test_of_a_long_tip_some_prints_show_the_core_at_the_lower_edge_or_not_at_all():
    rng = np.random.default_rng(4)
    long, usual = draw_master(rng, tip_px=240), draw_master(rng)
    seen = {}
    for name, master in (("long", long), ("usual", usual)):
        ridges = []
        for _ in range(8):
            impression = draw_impression(rng, master, RIDGE_DPI)
            inside = ridge_map(impression.image).inside
            rows = np.nonzero(inside)[0]
            ridges.append(float(np.mean(rows > impression.core[1])))
        seen[name] = ridges
    assert min(seen["long"]) < 0.05 < max(seen["long"])
    assert np.median(seen["long"]) < 0.3 < np.median(seen["usual"])
