"""Artefacts: what makes strangers' faces alike is measured, named and refused."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

import biodedup as bd
from biodedup.capture.faces.artefacts import block_ratio, details, eyes_light, noise_level, regularity, signs
from biodedup.embed.cards import load_card
from biodedup.trace import explain
from tests.support import spoilt

EXTRACTOR = bd.Extractor()
SMALL = 250
"""Side in pixels of a portrait as small as LFW's: noise and lines of a few pixels are fine for a large picture."""


@pytest.fixture(scope="module")
def large(portrait):
    return cv2.resize(portrait[:300, 90:390], (512, 512))


@pytest.fixture(scope="module")
def small(portrait):
    return cv2.resize(portrait[:300, 90:390], (SMALL, SMALL), interpolation=cv2.INTER_AREA)


def extract(image: np.ndarray) -> bd.Template | bd.Refusal:
    return EXTRACTOR.extract([bd.Face(np.ascontiguousarray(image))])[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "reasons"),
    [
        ("negative", {"negative", "no_face"}),
        ("noise 60", {"noisy", "no_face"}),
        ("1 bit", {"noisy", "no_face"}),
        ("wavy lines", {"pattern"}),
    ],
)
def test_a_spoilt_portrait_is_refused_with_its_reason_and_number(small, way, reasons):
    assert isinstance(extract(small), bd.Template)
    refusal = extract(spoilt.WAYS[way](small))
    assert isinstance(refusal, bd.Refusal), refusal
    assert refusal.reason in reasons
    assert None not in (refusal.measured, refusal.limit)


@pytest.mark.slow
def test_the_coarsest_compression_is_low_quality(large):
    refusal = extract(spoilt.compressed(large, 2))
    assert isinstance(refusal, bd.Refusal), refusal
    assert refusal.reason == "low_quality"
    assert "blocks" in refusal.detail


@pytest.mark.slow
def test_dark_glasses_and_a_mask_are_occluded(large):
    with explain() as steps:
        extract(large)
    (step,) = steps.of("face")
    lax = bd.Extractor(bd.Config(face=bd.FaceConfig(confidence_min=0.5)))
    (refusal,) = lax.extract([bd.Face(spoilt.covered(large, step["landmarks"]))])
    assert isinstance(refusal, bd.Refusal), refusal
    assert refusal.reason == "occluded"


@pytest.mark.slow
@pytest.mark.parametrize("shade", [5, 30])
def test_dark_glasses_alone_are_occluded_with_the_number_and_the_limit(large, shade):
    with explain() as steps:
        extract(large)
    (step,) = steps.of("face")
    refusal = extract(spoilt.covered(large, step["landmarks"], shade, masked=False))
    assert isinstance(refusal, bd.Refusal), refusal
    assert refusal.reason == "occluded" and refusal.measured < refusal.limit


def test_the_light_of_the_eyes_is_that_of_the_lighter_one_and_does_not_depend_on_the_skin():
    grey = np.full((112, 112), 160, np.float32)
    grey[44:60, 20:90] = 40
    assert eyes_light(grey) == eyes_light(grey / 4) == pytest.approx(0.25)
    grey[44:60, 60:90] = 160  # one side in shadow
    assert eyes_light(grey) == 1.0
    assert np.isfinite(eyes_light(np.zeros((112, 112), np.float32)))


@pytest.mark.slow
def test_a_negative_is_refused_in_grey_and_in_colour(portrait):
    grey = cv2.cvtColor(portrait, cv2.COLOR_RGB2GRAY)
    for negative in (255 - portrait, 255 - grey):
        assert extract(negative).reason in ("negative", "no_face")


def test_the_detector_prefers_a_face_to_its_negative(portrait):
    with explain() as steps:
        extract(portrait)
    (step,) = steps.of("face")
    margin = EXTRACTOR._detector.negative_margin(step["aligned"])
    assert margin > 0.1
    assert EXTRACTOR._detector.negative_margin(255 - step["aligned"]) == pytest.approx(-margin, abs=1e-4)


@pytest.mark.slow
def test_quality_is_a_probability_that_falls_with_blur_and_noise(small):
    extractor = bd.Extractor(bd.Config(face=bd.FaceConfig(quality_min=0)))
    pictures = [small, cv2.GaussianBlur(small, (0, 0), 2), spoilt.noisy(small, 12)]
    first, *others = [t.quality for t in extractor.extract([bd.Face(picture) for picture in pictures])]
    assert 0.9 < first < 1
    assert all(0 <= other < first for other in others)


def test_a_face_below_the_limit_of_quality_is_refused_with_the_number_and_the_limit(small):
    extractor = bd.Extractor(bd.Config(face=bd.FaceConfig(quality_min=0.999)))
    (refusal,) = extractor.extract([bd.Face(small)])
    assert (refusal.reason, refusal.limit) == ("low_quality", 0.999)
    assert refusal.measured == pytest.approx(extract(small).quality, abs=0.001)
    assert "mated comparison" in refusal.detail


def test_a_model_without_a_table_of_quality_gives_none_and_still_refuses_negatives(small, monkeypatch):
    extractor = bd.Extractor()
    monkeypatch.setattr(extractor, "_face_card", replace(load_card("sface"), quality=None))
    template, refusal = extractor.extract([bd.Face(small), bd.Face(255 - small)])
    assert template.quality is None
    assert refusal.reason in ("negative", "no_face")


def test_noise_is_estimated_as_it_was_added():
    smooth = cv2.GaussianBlur(np.random.default_rng(0).uniform(0, 255, (112, 112)).astype(np.float32), (0, 0), 12)
    for deviation in (5.0, 20.0):
        noise = np.random.default_rng(1).normal(0, deviation, smooth.shape).astype(np.float32)
        assert noise_level(smooth + noise) == pytest.approx(deviation, rel=0.1)


def test_regularity_sees_lines_of_any_direction_and_no_chance_texture():
    y, x = np.mgrid[:112, :112]
    texture = cv2.GaussianBlur(np.random.default_rng(2).uniform(0, 255, (112, 112)).astype(np.float32), (0, 0), 2)
    assert regularity(texture) < 0.45
    for degrees in (0, 30, 90):
        along = x * np.cos(np.radians(degrees)) + y * np.sin(np.radians(degrees))
        assert regularity((128 + 60 * np.sin(along * 2 * np.pi / 8)).astype(np.float32)) > 1
    assert regularity(np.full((112, 112), 100, np.float32)) == 0


def test_blocks_are_seen_at_any_phase(small):
    grey = cv2.cvtColor(spoilt.compressed(small, 2), cv2.COLOR_RGB2GRAY)
    for top, left in ((0, 0), (3, 5)):
        assert block_ratio(grey[top:, left:]) > 4
    assert block_ratio(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)) < 2
    assert block_ratio(np.zeros((3, 3), np.uint8)) == 1


def test_a_flat_face_shows_no_detail_and_gives_finite_signs():
    grey = np.full((112, 112), 90, np.float32)
    assert details(grey, 8.0) == pytest.approx((0, 0), abs=1e-4)
    assert {sign.reason for sign in signs(np.full((112, 112, 3), 90, np.uint8), 1.0)} == {"occluded"}
