"""Hostile pictures: each costs seconds and some memory at most, in the process that decodes; ordinary ones of every kind pass."""

from __future__ import annotations

import io
import subprocess
import sys

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import biodedup as bd
from biodedup.capture.fingers.finger import around_ridges, ridge_blocks
from biodedup.capture.pictures.formats import FORMATS, Pixels, decode
from biodedup.capture.pictures.headers import excess_of
from tests.support import ROOT
from tests.support.attacks import ATTACKS, jpeg_of_many_scans, ridges, saved, tiff
from tests.support.images import jpeg

LIMITS = bd.CaptureConfig()
SECONDS_MAX, GROWTH_MB_MAX = 10, 500
ANSWERED = {
    "png_of_as_many_pixels_as_are_allowed": "no_face",
    "png_with_data_behind_its_picture": "no_face",
    "png_of_an_orientation_of_many_numbers": "no_face",
    "png_of_text_bombs": "truncated",
    "png_of_a_profile_bomb": "truncated",
    "tiff_that_deflates": "no_face",
    "tiff_whose_directories_go_round": "no_face",
    "gif_of_many_frames": "several_pictures",
    "webp_of_many_frames": "several_pictures",
    "jpeg_of_many_pixels": "no_face",
    "jpeg_of_many_scans": "too_many_scans",
    "jpeg_of_many_scans_behind_a_thumbnail": "too_many_scans",
    "jp2_of_as_many_pixels_as_are_allowed": "no_face",
    "wsq_of_as_many_pixels_as_are_allowed": "too_large",
    "wsq_of_many_markers": "truncated",
    "finger_of_127_mm": "too_large_area",
    "finger_as_large_as_is_allowed": None,
    "finger_of_noise": "no_ridges",
}
"""The others ask for too many pixels, or are too complex; None: whatever it is."""


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[str, float, int]]:
    """Name -> (reason, seconds of the processor, megabytes), of one process that extracts them all without isolation."""
    command = [sys.executable, "-m", "tests.support.attacks"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    return {name: (reason, float(seconds), int(growth)) for name, reason, seconds, growth, _ in lines}


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_capture_costs_little_time_and_memory(measured, name):
    reason, seconds, growth = measured[name]
    assert seconds < SECONDS_MAX
    assert growth < GROWTH_MB_MAX
    expected = ANSWERED.get(name, ("too_many_pixels", "too_complex"))
    assert expected is None or reason in expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options",
    [
        ("JPEG", {}),
        pytest.param("JPEG", {"progressive": True}, marks=pytest.mark.slow),
        pytest.param(
            "JPEG",
            {"exif": Image.Exif(), "icc_profile": bytes(200_000), "comment": b"x" * 1000},
            marks=pytest.mark.slow,
        ),
        ("PNG", {}),
        pytest.param("TIFF", {}, marks=pytest.mark.slow),
        ("TIFF", {"compression": "tiff_deflate"}),
        pytest.param("TIFF", {"compression": "jpeg"}, marks=pytest.mark.slow),
        pytest.param("TIFF", {"big_tiff": True}, marks=pytest.mark.slow),
        pytest.param("BMP", {}, marks=pytest.mark.slow),
        pytest.param("PPM", {}, marks=pytest.mark.slow),
        pytest.param("GIF", {}, marks=pytest.mark.slow),
        ("WEBP", {}),
        pytest.param("WEBP", {"lossless": True}, marks=pytest.mark.slow),
        pytest.param("WEBP", {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}, marks=pytest.mark.slow),
        pytest.param("JPEG2000", {"quality_layers": [40, 20, 10]}, marks=pytest.mark.slow),
        ("JPEG2000", {"no_jp2": True}),
        pytest.param("JPEG2000", {"tile_size": (128, 128)}, marks=pytest.mark.slow),
        pytest.param("JPEG2000", {"precinct_size": (128, 128), "codeblock_size": (32, 32)}, marks=pytest.mark.slow),
    ],
)
def test_ordinary_files_pass(portrait, name, options):
    large = Image.fromarray(portrait).resize((1600, 1200))
    content = saved(large, name, **options)
    assert excess_of(name, content, 1600 * 1200) is None
    assert isinstance(decode(content, "face", LIMITS), Pixels)
    assert excess_of(name, content, 1600 * 1200 - 1).reason == "too_many_pixels"


def test_a_plain_file_of_words_and_odd_levels_of_ordinary_size_pass():
    assert decode(b"P2 50 50 255\n" + b"7 " * 2500, "face", LIMITS).grey[0, 0] == 7
    assert decode(b"P5\n# made by a scanner\n50 50\n127\n" + bytes([127] * 2500), "face", LIMITS).grey[0, 0] == 255
    assert isinstance(decode(tiff((273, 4, 1, 200), (278, 4, 1, 400), (279, 4, 1, 160_000), tail=bytes(161_000)), "face", LIMITS), Pixels)  # fmt: skip


def test_scans_are_counted_wherever_they_stand(portrait):
    usual = saved(Image.fromarray(portrait), "JPEG", progressive=True)
    assert usual.count(b"\xff\xda") > 5
    assert isinstance(decode(usual, "face", LIMITS), Pixels)
    assert decode(jpeg_of_many_scans(), "face", LIMITS).reason == "too_many_scans"


@pytest.mark.slow
@pytest.mark.parametrize("side, shown", [(4000, 4000), (5000, 2500), (9000, 2250)])
def test_a_large_jpeg_of_a_face_is_decoded_small_and_gives_its_template(portrait, side, shown):
    content = jpeg(cv2.resize(portrait, (side, side)), 80)
    pixels = decode(content, "face", LIMITS)
    assert pixels.rgb.shape == (shown, shown, 3)
    extractor = bd.Extractor()
    small, large = extractor.extract([bd.Face(portrait), bd.Face(content)])
    assert bd.compare(small, large).similarity > 0.95
    if side > 4000:
        assert decode(content, "right_index", LIMITS).reason == "too_many_pixels"


def test_orientation_is_applied_as_before(portrait):
    small = np.ascontiguousarray(portrait[:120, :200])
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        content = saved(Image.fromarray(small), "PNG", exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
        assert (decode(content, "face", LIMITS).rgb == expected).all()


@pytest.mark.slow
def test_margins_cost_nothing_and_change_no_minutiae(portrait):
    print_ = ridges(700)
    page = np.full((2000, 2000), 250, np.uint8)
    page[600:1300, 400:1100] = print_
    cut, blocks = around_ridges(page, ridge_blocks(page))
    assert max(cut.shape) < 800
    assert blocks.shape == (cut.shape[0] // 16, cut.shape[1] // 16)
    blank = np.full((2000, 2000), 250, np.uint8)
    assert around_ridges(blank, ridge_blocks(blank))[0].size == 0
    extractor = bd.Extractor()
    alone, on_page, empty = extractor.extract([bd.Finger(print_), bd.Finger(page), bd.Finger(blank)])
    assert isinstance(alone, bd.Template)
    assert bd.compare(alone, on_page).score_db > 60
    assert empty.reason == "no_ridges"


SOUND = {name: saved(Image.fromarray(np.arange(9216, dtype=np.uint8).reshape(96, 96)), name) for name in FORMATS}


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(SOUND)), st.data())
def test_no_bytes_make_a_check_raise(name, data):
    damaged = bytearray(SOUND[name])
    for _ in range(data.draw(st.integers(0, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    found = excess_of(name, damaged, LIMITS.pixels_max)
    assert found is None or found.reason
