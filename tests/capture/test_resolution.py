"""The resolution of a finger's picture: what its file states, checked against its ridges."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image

import biodedup as bd
from biodedup.capture.pictures.formats import Pixels, decode
from biodedup.capture.pictures.resolution import ridge_periods, settled, squared
from biodedup.config import CaptureConfig
from biodedup.synthetic import draw_impression, draw_master


@pytest.fixture(scope="module")
def print_() -> np.ndarray:
    rng = np.random.default_rng(7)
    return draw_impression(rng, draw_master(rng)).image


def png(grey: np.ndarray, dpi: tuple[float, float]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(grey).save(out, "PNG", dpi=dpi)
    return out.getvalue()


def believed(grey: np.ndarray, dpi: tuple[float, float]) -> Pixels | bd.Refusal:
    pixels = decode(png(grey, dpi), "right_index", CaptureConfig())
    assert isinstance(pixels, Pixels)
    return settled(pixels, "right_index")


def stretched(grey: np.ndarray, wide: float, tall: float) -> np.ndarray:
    return cv2.resize(grey, None, fx=wide, fy=tall, interpolation=cv2.INTER_CUBIC)


def test_the_periods_of_ridges_on_the_two_axes_tell_the_shape_of_a_pixel(print_):
    across, down = ridge_periods(print_)
    assert 6 < across < 13
    assert across / down == pytest.approx(1, rel=0.25)
    across, down = ridge_periods(stretched(print_, 2, 1))
    assert across / down == pytest.approx(2, rel=0.25)
    assert ridge_periods(np.full((200, 200), 255, np.uint8)) is None


def test_a_plausible_resolution_is_taken_without_a_word(print_):
    pixels = believed(print_, (500, 500))
    assert pixels.dpi == pytest.approx(500, rel=0.01)
    assert pixels.provenance == ()


@pytest.mark.parametrize("dpi", [(72, 72), (1, 1), (9000, 9000)])
def test_a_resolution_that_no_scanner_has_is_not_believed_and_noted(print_, dpi):
    pixels = believed(print_, dpi)
    assert pixels.dpi is None
    (note,) = pixels.provenance
    assert "a scanner's" in note


def test_of_two_axes_the_plausible_one_counts(print_):
    pixels = believed(print_, (500, 72))
    assert pixels.dpi == pytest.approx(500, rel=0.01)
    assert "72" in pixels.provenance[0]
    assert pixels.grey.shape == print_.shape


def test_pixels_that_are_not_square_are_made_square(print_):
    pixels = believed(stretched(print_, 2, 1), (1000, 500))
    assert pixels.dpi == pytest.approx(1000, rel=0.01)
    assert pixels.grey.shape == (2 * print_.shape[0], 2 * print_.shape[1])
    assert "resampled" in pixels.provenance[0]


def test_square_ridges_contradict_a_file_that_states_other_pixels(print_):
    pixels = believed(print_, (500, 1000))
    assert pixels.grey.shape == print_.shape
    assert pixels.dpi == pytest.approx(500, rel=0.01)
    assert "square" in pixels.provenance[0]


def test_axes_that_cannot_be_checked_are_refused_with_the_numbers():
    refusal = believed(np.full((200, 200), 255, np.uint8), (500, 1000))
    assert isinstance(refusal, bd.Refusal)
    assert refusal.reason == "resolution"
    assert "500" in refusal.detail and "1000" in refusal.detail


@pytest.mark.slow
def test_the_template_tells_what_was_corrected_and_still_resembles_its_mate(print_):
    rng = np.random.default_rng(7)
    draw_master(rng)
    again = draw_impression(np.random.default_rng(8), draw_master(np.random.default_rng(7))).image
    extractor = bd.Extractor()
    captures = [bd.Finger(print_, "right_index"), bd.Finger(png(stretched(again, 2, 1), (1000, 500)), "right_index")]
    first, second = extractor.extract(captures)
    assert isinstance(second, bd.Template), second
    assert "resampled" in second.provenance[0]
    assert first.provenance == ()
    assert bd.compare(first, second).score_db > 40


def test_a_picture_turned_by_a_quarter_exchanges_its_axes(print_):
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(print_).save(out, "JPEG", dpi=(600, 300), exif=exif)
    assert decode(out.getvalue(), "right_index", CaptureConfig()).stated == (300, 600)


def test_a_face_is_squared_only_as_far_as_a_camera_can_have_been_wrong():
    pixels = Pixels(np.zeros((50, 50), np.uint8), None, (300.0, 600.0))
    assert squared(pixels).grey.shape == (50, 100)
    for stated in (None, (300.0, 300.0), (1.0, 900.0)):
        assert squared(Pixels(pixels.grey, None, stated)) is None
