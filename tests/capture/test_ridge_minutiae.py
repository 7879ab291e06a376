"""Minutiae of the skeleton, the measures of a print and its quality: known points come out as they were drawn."""

from __future__ import annotations

import numpy as np
import pytest

import biodedup as bd
from biodedup.capture.fingers.one_pass import one_pass
from biodedup.capture.fingers.ridge_minutiae import record_of, ridge_minutiae
from biodedup.capture.fingers.ridges import RidgeMap, directions
from biodedup.capture.minutiae.record import read_record
from biodedup.common.quality import of_nfiq2
from biodedup.synthetic import draw_impression, draw_master
from tests.support.images import finger

SKELETON = bd.Extractor()


def dislocated(x: float, y: float, side: int = 240) -> np.ndarray:
    """Level ridges nine pixels apart with one more ridge to the right of a point; uint8 (side, side)."""
    v, u = np.mgrid[0:side, 0:side].astype(float)
    phase = 2 * np.pi * v / 9 + np.arctan2(v - y, u - x)
    return np.asarray(128 - 90 * np.cos(phase), np.uint8)


def map_of(ridges: np.ndarray) -> RidgeMap:
    """A map whose ridges are drawn by hand; all of it is inside."""
    ridges = ridges.astype(np.float32)
    direction, coherence, _ = directions(ridges, 4.0)
    even = np.full_like(ridges, 6)
    return RidgeMap(ridges, direction, even, np.ones(ridges.shape, np.uint8), ridges, coherence, coherence)


@pytest.mark.parametrize(("x", "y"), [(120.0, 118.0), (101.0, 133.5)])
def test_where_a_ridge_begins_is_the_only_minutia_and_it_points_into_it(x, y):
    found = one_pass(dislocated(x, y)).minutiae
    near = np.hypot(found.points[:, 0] - x, found.points[:, 1] - y) < 9
    assert near.sum() == 1
    assert abs(np.sin(found.points[near][0, 2])) < 0.2 and found.reliability[near][0] > 0.5
    assert found.reliability[~near].max(initial=0) < found.reliability[near][0]


def test_a_turned_picture_has_its_minutiae_turned():
    image = dislocated(100.0, 130.0)
    x, y, direction = one_pass(image).minutiae.points[0]
    turned = one_pass(np.ascontiguousarray(image[::-1, ::-1])).minutiae.points
    apart = np.hypot(turned[:, 0] - (239 - x), turned[:, 1] - (239 - y))
    assert apart.min() < 2.5
    assert abs(np.angle(np.exp(1j * (turned[apart.argmin(), 2] - direction - np.pi)))) < 0.1


def test_short_spurs_islands_and_broken_ridges_are_no_minutiae():
    ridges = np.full((120, 120), -1.0)
    for row in range(6, 120, 6):
        ridges[row - 1 : row + 1] = 1
    ridges[54:57, 60] = 1  # a spur
    ridges[27, 40:43] = 1  # an island
    ridges[77:79, 58:60] = -1  # a break
    found = ridge_minutiae(map_of(ridges), (180, 180))
    middle = (np.abs(found.points[:, :2] - 90) < 60).all(axis=1)
    assert not middle.any()


@pytest.mark.slow
def test_reliability_tells_a_generated_fingers_own_minutiae_from_the_noise():
    """The area under the curve; half of all minutiae that are extracted are the finger's own."""
    rng = np.random.default_rng(31)
    sure, true = [], []
    for _ in range(3):
        master = draw_master(rng)
        ridges = master.ridges.astype(np.float32) / 127
        own = ridge_minutiae(map_of(ridges), (495, 495)).points / np.float32([1.5, 1.5, 1])
        impression = draw_impression(rng, master)
        found = one_pass(impression.image).minutiae
        x, y = (np.clip(np.rint(found.points[:, i]), 0, 430).astype(int) for i in (0, 1))
        at = impression.at[:, y, x]
        true.append((np.hypot(at[0][:, None] - own[:, 0], at[1][:, None] - own[:, 1]) < 6).any(axis=1))
        sure.append(found.reliability)
    sure, true = np.concatenate(sure), np.concatenate(true)
    assert np.mean(sure[true][:, None] > sure[~true]) > 0.8


def test_the_record_states_place_direction_kind_and_reliability():
    found = one_pass(finger(1)).minutiae
    record = record_of(found, finger(1).shape)
    body = np.frombuffer(record.body, np.uint8).reshape(-1, 6).astype(int)
    x, y = (body[:, 0] & 63) << 8 | body[:, 1], (body[:, 2] & 63) << 8 | body[:, 3]
    assert np.abs(x - found.points[:, 0]).max() <= 0.5 and np.abs(y - found.points[:, 1]).max() <= 0.5
    assert ((body[:, 0] >> 6 == 1) == found.ending).all()
    apart = np.exp(1j * (-body[:, 4] * 2 * np.pi / 256 - found.points[:, 2]))
    assert np.abs(np.angle(apart)).max() <= np.pi / 256 + 1e-6  # anticlockwise
    assert np.abs(body[:, 5] - 100 * found.reliability).max() <= 1
    assert (np.diff(found.reliability) <= 0).all()


@pytest.mark.slow
def test_the_records_directions_are_those_of_mindtct():
    """So that a record may be given to another matcher."""
    image = finger(1)
    ours = read_record(SKELETON.extract([bd.Finger(image)])[0].minutiae)
    theirs = read_record(bd.Extractor(bd.Config(finger=bd.FingerConfig(minutiae="mindtct"))).extract([bd.Finger(image)])[0].minutiae)  # fmt: skip
    a, b = (np.frombuffer(one.body, np.uint8).reshape(-1, 6).astype(int) for one in (ours, theirs))
    place = [np.stack([(m[:, 0] & 63) << 8 | m[:, 1], (m[:, 2] & 63) << 8 | m[:, 3]], 1) for m in (a, b)]
    apart = np.hypot(*(place[0][:, None] - place[1]).transpose(2, 0, 1))
    i, j = np.nonzero(apart < 8)
    turn = (a[i, 4] - b[j, 4] + 128) % 256 - 128
    assert len(i) >= 5 and np.mean(np.abs(turn) < 20) > 0.6


@pytest.mark.parametrize("shape", [(1, 1), (40, 41), (3, 400), (90, 120)])
def test_a_blank_or_tiny_picture_measures_nothing(shape):
    found = one_pass(np.full(shape, 180, np.uint8))
    assert len(found.minutiae.points) == 0
    assert found.measures.quality == 0 and found.measures.certainty < 0.4


def test_noise_over_a_print_lowers_its_quality_and_certainty():
    rng = np.random.default_rng(3)
    image = draw_impression(rng, draw_master(rng)).image.astype(float)
    measures = [
        one_pass(np.asarray(np.clip(image + sd * rng.standard_normal(image.shape), 0, 255), np.uint8)).measures
        for sd in (0, 60, 250)
    ]
    assert measures[0].quality > measures[1].quality > measures[2].quality
    assert measures[0].certainty > 0.4 > measures[2].certainty


@pytest.mark.slow
def test_nfiq2_is_the_quality_on_request():
    image = finger(1)
    asked = bd.Extractor(bd.Config(finger=bd.FingerConfig(nfiq2=True))).extract([bd.Finger(image)])[0]
    plain = bd.Extractor().extract([bd.Finger(image)])[0]
    assert asked.minutiae[28:] == plain.minutiae[28:]
    assert asked.quality != plain.quality and asked.quality == of_nfiq2(asked.minutiae[26])
    assert plain.quality == one_pass(image).measures.quality
