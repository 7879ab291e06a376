"""Frames around prints: padding and the rims of sensors are neither ridges nor the contrast by which ridges are judged."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

import biodedup as bd
from biodedup.capture.fingers.frame import unframed
from biodedup.synthetic import draw_impression, draw_master
from tests.support.images import finger

EXTRACTOR = bd.Extractor()
FAINT = (200 + (finger(1).astype(int) - 200) // 4).astype(np.uint8)


def padded(grey: np.ndarray, level: int) -> np.ndarray:
    return cv2.copyMakeBorder(grey, 50, 50, 50, 50, cv2.BORDER_CONSTANT, value=level)


def in_window(grey: np.ndarray, level: int, noise: float = 0.0) -> np.ndarray:
    """The print in a trapezoid, as of a prism, with a dark or bright surrounding."""
    height, width = grey.shape
    corners = np.array([[0.05, 0.03], [0.95, 0.03], [0.85, 0.97], [0.15, 0.97]]) * (width, height)
    window = cv2.fillPoly(np.zeros(grey.shape, np.uint8), [corners.astype(np.int32)], 1)
    rim = level + np.random.default_rng(0).normal(0, noise, grey.shape)
    return np.where(window > 0, grey, np.clip(rim, 0, 255)).astype(np.uint8)


FRAMES = {
    "black padding": lambda grey: padded(grey, 0),
    "grey padding": lambda grey: padded(grey, 60),
    "black padding on two sides": lambda grey: padded(grey, 0)[50:, :-50],
    "a dark rim": lambda grey: in_window(grey, 10),
    "a dark rim with noise": lambda grey: in_window(grey, 25, 4),
}


@pytest.mark.parametrize("frame", FRAMES)
def test_a_faint_print_in_a_frame_is_the_same_print(frame):
    (plain, framed) = EXTRACTOR.extract([bd.Finger(FAINT), bd.Finger(FRAMES[frame](FAINT))])
    assert isinstance(framed, bd.Template), framed
    compared = bd.compare(plain, framed)
    assert compared.minutiae > 30
    assert compared.similarity > 0.9


def test_a_frame_does_not_change_the_resolution_that_the_ridges_show():
    rng = np.random.default_rng(100)  # its ridges are 0.55 mm apart; its picture has a black border
    (framed,) = EXTRACTOR.extract([bd.Finger(draw_impression(rng, draw_master(rng)).image, "right_index")])
    assert isinstance(framed, bd.Template), framed
    assert framed.provenance == ()


def test_the_frame_takes_the_level_of_what_is_beside_it():
    image = np.full((300, 300), 180, np.uint8)
    image[90:210, 90:210] = finger(2)[100:220, 100:220]
    found = unframed(padded(image, 0))
    assert found[:40].min() > 170
    assert (found[140:260, 140:260] == image[90:210, 90:210]).all()


def test_a_large_picture_keeps_its_size_and_its_print():
    image = cv2.resize(finger(1), None, fx=4, fy=4)
    found = unframed(padded(image, 0))
    assert found.shape == (image.shape[0] + 100, image.shape[1] + 100)
    assert found[:30].min() > 200
    assert (found[400:900, 400:900] == padded(image, 0)[400:900, 400:900]).all()


@pytest.mark.parametrize(
    "grey", [finger(1), finger(2, size=96), np.zeros((1, 1), np.uint8), np.full((90, 70), 9, np.uint8)]
)
def test_a_picture_without_a_frame_stays_as_it_is(grey):
    assert unframed(grey) is grey
