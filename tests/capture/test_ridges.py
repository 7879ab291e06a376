"""Ridge maps, their minutiae and what the finger network is given: known waves and known points come out as they went in."""

from __future__ import annotations

import numpy as np
import pytest

from biodedup.capture.fingers import oriented
from biodedup.capture.fingers.finger import resampled
from biodedup.capture.fingers.oriented import RIDGE_DPI, OrientedFilter
from biodedup.capture.fingers.ridges import RidgeMap, ridge_map
from biodedup.capture.fingers.skeleton import skeleton_minutiae
from biodedup.embed.finger_input import CELL_PX, CELLS, MINUTIAE_MAX, finger_input


def waves(degrees: float, period: float, side: int = 160) -> np.ndarray:
    """Parallel ridges in that direction (x right, y down), dark on light; uint8 (side, side)."""
    y, x = np.mgrid[0:side, 0:side] - side / 2
    angle = np.radians(degrees)
    return (140 - 90 * np.cos(2 * np.pi * (y * np.cos(angle) - x * np.sin(angle)) / period)).astype(np.uint8)


def map_of(ridges: np.ndarray) -> RidgeMap:
    """A map whose ridges are drawn by hand; all of it is inside."""
    ridges = ridges.astype(np.float32)
    return RidgeMap(
        ridges,
        np.zeros_like(ridges),
        np.full_like(ridges, 6),
        np.ones(ridges.shape, np.uint8),
        ridges,
        np.ones_like(ridges),
        np.ones_like(ridges),
    )


def test_each_pixel_goes_through_the_filter_of_its_own_direction_and_period():
    rng = np.random.default_rng(0)
    image = rng.standard_normal((30, 41)).astype(np.float32)
    direction = rng.uniform(-1, 4, image.shape).astype(np.float32)
    period = rng.uniform(3, 10, image.shape).astype(np.float32)
    where = (rng.random(image.shape) < 0.8).astype(np.uint8)
    found = OrientedFilter(direction, period, where)(image)
    padded = np.pad(image, ((7, 8), (7, 8)), "reflect").astype(np.float64)
    bank = oriented._bank()
    nearest = np.abs(period[..., None] - oriented.PERIODS_PX).argmin(axis=-1)
    turn = np.rint(direction / np.pi * oriented.DIRECTIONS).astype(int) % oriented.DIRECTIONS
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            wanted = (padded[y : y + 15, x : x + 16] * bank[nearest[y, x], turn[y, x]]).sum() if where[y, x] else 0.0
            assert found[y, x] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("degrees", [0, 30, 77, 90, 140, 179])
@pytest.mark.parametrize("period", [5.0, 6.0, 8.0])
def test_direction_and_period_of_parallel_ridges_are_found(degrees, period):
    found = ridge_map(waves(degrees, period))
    middle = np.s_[40:-40, 40:-40]
    turned = np.angle(np.exp(2j * (found.direction[middle] - np.radians(degrees)))) / 2
    assert np.degrees(np.abs(turned)).max() < 3
    assert np.abs(found.period[middle] / period - 1).max() < 0.1  # the derivative of short waves is a little low
    assert found.inside[middle].all()
    grey = waves(degrees, period)[middle].astype(int)
    clear = np.abs(grey - 140) > 30  # what lies on the edge of a ridge may fall to either side
    assert np.mean((found.ridges[middle] > 0) == (grey < 140), where=clear) > 0.99


def test_contrast_and_brightness_do_not_change_the_map():
    strong, weak = ridge_map(waves(20, 6)), ridge_map((200 + (waves(20, 6).astype(int) - 140) / 3).astype(np.uint8))
    assert np.mean(np.abs(strong.ridges - weak.ridges)) < 0.03


def test_a_blank_picture_has_no_ridges_and_no_minutiae():
    found = ridge_map(np.full((90, 120), 180, np.uint8))
    assert not found.inside.any() and not found.ridges.any()
    assert skeleton_minutiae(found).shape == (0, 3)
    given = finger_input(found)
    assert not given.directions.any() and not given.minutiae.any()


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (17, 16)])
def test_tiny_pictures_are_no_trouble(shape):
    found = ridge_map(np.zeros(shape, np.uint8))
    assert found.ridges.shape == shape
    finger_input(found)


def test_a_ridge_that_ends_is_a_minutia_that_points_into_it():
    ridges = np.full((60, 60), -1.0)
    ridges[29:32, 20:60] = 1
    x, y, direction = skeleton_minutiae(map_of(ridges))[0]
    assert abs(x - 20) <= 2 and abs(y - 30) <= 1
    assert abs(direction) < 0.1  # to the right


def test_a_fork_is_a_minutia_that_points_between_its_branches():
    ridges = np.full((60, 60), -1.0)
    for i in range(60):
        if i < 30:
            ridges[29:32, i] = 1
        else:
            for sign in (-1, 1):
                at = 30 + sign * round((i - 30) * 0.5)
                ridges[at - 1 : at + 2, i] = 1
    found = skeleton_minutiae(map_of(ridges))
    assert len(found) == 1
    x, y, direction = found[0]
    assert abs(x - 31) <= 4 and abs(y - 30) <= 1
    assert abs(direction) < 0.3


def test_two_ends_that_face_each_other_are_a_broken_ridge_and_no_minutiae():
    ridges = np.full((60, 60), -1.0)
    ridges[29:32, :28] = 1
    ridges[29:32, 31:] = 1
    assert len(skeleton_minutiae(map_of(ridges))) == 0


def test_the_network_is_given_the_print_centred_and_bounded():
    image = np.full((420, 380), 200, np.uint8)
    image[220:380, 20:180] = waves(45, 6)
    given = finger_input(ridge_map(image))
    assert abs(given.centre[0] - 100) <= 8 and abs(given.centre[1] - 300) <= 8
    assert given.directions.shape == (4, CELLS, CELLS) and given.minutiae.shape == (MINUTIAE_MAX, 5)
    share = given.directions[2]
    assert 0 <= share.min() and share.max() <= 1 and share[18, 18] > 0.9
    assert 160 < np.sqrt(share.sum()) * CELL_PX < 160 + 24  # smoothing takes in a little of what is around
    cosine, sine = given.directions[:2, 18, 18]
    assert abs(np.degrees(np.arctan2(sine, cosine)) / 2 - 45) < 4


def test_any_resolution_is_brought_to_one():
    assert resampled(np.zeros((300, 150), np.uint8), 500, RIDGE_DPI).shape == (200, 100)
    assert resampled(np.zeros((300, 150), np.uint8), 333.3, RIDGE_DPI).shape == (300, 150)
    assert resampled(np.zeros((100, 50), np.uint8), 200, RIDGE_DPI).shape == (167, 83)
