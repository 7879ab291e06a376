"""Faces: the right one, aligned, or a refusal that says what was measured."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image

import biodedup as bd
from biodedup.capture.faces.face import SIDE_PX, AlignedFace, angles_deg, choose, judge, similarity_transform

EXTRACTOR = bd.Extractor()


def extract(image: np.ndarray) -> bd.Template | bd.Refusal:
    return EXTRACTOR.extract([bd.Face(np.ascontiguousarray(image))])[0]


def similarity(a: bd.Template, b: bd.Template) -> float:
    return bd.compare(a, b).similarity


@pytest.mark.slow
def test_the_same_face_recaptured_is_similar_and_scored(portrait):
    first = extract(portrait)
    assert isinstance(first, bd.Template)
    assert first.embedding.shape == (128,)
    assert np.linalg.norm(first.embedding) == pytest.approx(1, abs=1e-5)
    assert first.embedding.dtype == np.float32
    for again in (
        portrait[:300, 90:380],
        cv2.resize(portrait, None, fx=0.5, fy=0.5),
        (portrait * 0.6).astype(np.uint8),
    ):
        score = bd.compare(first, extract(again))
        assert score.similarity > 0.6
        assert score.score_db > 60
        assert score.minutiae is None


@pytest.mark.slow
def test_a_batch_gives_what_single_captures_give_in_order(portrait, tmp_path):
    images = [portrait, portrait[:, ::-1], portrait[:300, 90:380]] * 3
    captures = [bd.Face(np.ascontiguousarray(i)) for i in images]
    captures.insert(4, bd.Face(tmp_path / "absent.png"))
    together = EXTRACTOR.extract(captures)
    assert together[4].reason == "missing_file"
    for one, capture in zip(together, captures, strict=True):
        if isinstance(one, bd.Template):
            alone = EXTRACTOR.extract([capture])[0]
            assert float(one.embedding @ alone.embedding) > 0.99999


def test_grey_small_and_tightly_cropped_faces_are_found(portrait):
    grey = cv2.cvtColor(portrait, cv2.COLOR_RGB2GRAY)
    assert isinstance(extract(grey), bd.Template)
    assert isinstance(extract(cv2.resize(grey[60:210, 160:290], (92, 112), interpolation=cv2.INTER_AREA)), bd.Template)


def refused(image: np.ndarray, reason: str) -> bd.Refusal:
    result = extract(image)
    assert isinstance(result, bd.Refusal), "not refused"
    assert result.reason == reason
    assert result.measured is not None
    assert result.limit is not None
    return result


@pytest.mark.slow
def test_poor_faces_are_refused_with_the_number(portrait):
    refused(portrait[-120:, :120], "no_face")
    refused(np.full((300, 300, 3), 127, np.uint8), "no_face")
    refused(np.hstack([portrait, portrait[:, ::-1]]), "several_faces")
    refused(cv2.GaussianBlur(portrait, (0, 0), 10), "blurred")
    refused((portrait * 0.08).astype(np.uint8), "too_dark")
    refused(np.clip(portrait * 0.12 + 235, 0, 255).astype(np.uint8), "too_bright")
    refused(cv2.resize(portrait, (110, 110), interpolation=cv2.INTER_AREA), "too_small")


@pytest.mark.slow
def test_a_second_face_counts_from_a_share_of_the_first_ones_prominence_on(portrait):
    def beside(length: float) -> np.ndarray:
        other = cv2.resize(portrait[:, ::-1], None, fx=length, fy=length, interpolation=cv2.INTER_AREA)
        picture = np.full((portrait.shape[0], portrait.shape[1] + other.shape[1], 3), 127, np.uint8)
        picture[:, : portrait.shape[1]] = portrait
        picture[: other.shape[0], portrait.shape[1] :] = other
        return picture

    assert 0.6 < refused(beside(0.9), "several_faces").measured < 0.9
    alone, together = extract(portrait), extract(beside(0.5))
    assert isinstance(together, bd.Template) and similarity(alone, together) > 0.9


def judged(landmarks: np.ndarray) -> bd.Refusal | None:
    image = np.random.default_rng(0).integers(60, 200, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    return judge(AlignedFace(image, 0.9, landmarks), (100, 100), bd.FaceConfig())


def test_a_face_turned_away_is_refused_by_its_landmarks():
    frontal = np.array([[20.0, 40], [60, 40], [40, 60], [25, 80], [55, 80]])
    assert judged(frontal) is None
    turned = frontal.copy()
    turned[2, 0] = 90  # the nose lies outside the eyes
    assert judged(turned).reason == "turned_away"
    upside_down = 100 - frontal
    assert judged(upside_down).reason == "turned_away"


def test_eyes_outside_the_image_are_refused():
    landmarks = np.array([[-3.0, 40], [40, 40], [20, 60], [5, 80], [38, 80]])
    refusal = judged(landmarks)
    assert refusal is not None
    assert (refusal.reason, refusal.measured) == ("eyes_out_of_frame", 3.0)


def test_a_small_bystander_does_not_make_a_portrait_ambiguous(portrait):
    scene = np.full((600, 900, 3), 120, np.uint8)
    scene[50:562, 190:702] = portrait
    scene[20:148, 760:888] = cv2.resize(portrait[:, ::-1], (128, 128), interpolation=cv2.INTER_AREA)
    result = extract(scene)
    assert isinstance(result, bd.Template)
    assert similarity(result, extract(portrait)) > 0.8


@pytest.mark.slow
def test_a_small_face_in_a_large_picture_is_aligned_as_well_as_a_large_one(portrait):
    whole = extract(portrait)
    for factor in (2, 4):
        scene = np.full((512 * factor, 512 * factor, 3), 120, np.uint8)
        start = 256 * (factor - 1)
        scene[start : start + 512, start : start + 512] = portrait
        assert similarity(whole, extract(scene)) > 0.93


@pytest.mark.slow
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_picture_that_lies_on_its_side_or_head_gives_the_template_of_the_upright_one(portrait, turns):
    assert similarity(extract(portrait), extract(np.rot90(portrait, turns))) > 0.95


@pytest.mark.slow
def test_real_photographs_that_lie_or_stand_on_their_head_give_the_upright_ones_template(data_folder):
    paths = sorted((data_folder / "faces" / "lfw").glob("*/*_0001.jpg"))[::100]
    pictures = [np.asarray(Image.open(path)) for path in paths]
    upright = EXTRACTOR.extract([bd.Face(picture) for picture in pictures])
    for turns in (1, 2, 3):
        turned = EXTRACTOR.extract([bd.Face(np.ascontiguousarray(np.rot90(p, turns))) for p in pictures])
        for a, b in zip(upright, turned, strict=True):
            assert isinstance(a, bd.Template) == isinstance(b, bd.Template)
            assert isinstance(a, bd.Refusal) or similarity(a, b) > 0.95


def test_of_two_faces_of_one_size_the_central_one_is_chosen():
    faces = np.zeros((2, 15), np.float32)
    faces[:, 2:4] = 50
    faces[0, :2], faces[1, :2] = (0, 0), (75, 75)
    index, share = choose(faces, (200, 200))
    assert index == 1
    assert 0 < share < 1


def test_yaw_and_roll_follow_the_landmarks():
    frontal = np.array([[0, 0], [10, 0], [5.0, 6], [1, 12], [9, 12]])
    assert angles_deg(frontal) == pytest.approx((0, 0))
    turned = frontal.copy()
    turned[2, 0] = 11
    assert angles_deg(turned)[0] == pytest.approx(45)
    tilted = frontal @ np.array([[np.cos(0.5), np.sin(0.5)], [-np.sin(0.5), np.cos(0.5)]])
    assert angles_deg(tilted)[1] == pytest.approx(np.degrees(0.5))


def test_alignment_recovers_a_known_similarity_transform():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(5, 2)) * 30
    linear = 1.7 * np.array([[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]])
    found = similarity_transform(points, points @ linear.T + (4, -9))
    np.testing.assert_allclose(found, np.column_stack([linear, (4, -9)]), atol=1e-9)


@pytest.mark.slow
def test_an_extractor_may_be_used_by_several_threads(portrait):
    from concurrent.futures import ThreadPoolExecutor

    alone = extract(portrait)
    with ThreadPoolExecutor(4) as pool:
        for template in pool.map(extract, [portrait] * 8):
            assert float(template.embedding @ alone.embedding) > 0.99999


@pytest.mark.slow
def test_images_of_absurd_shape_are_refused_not_raised():
    for shape in ((40, 50_000), (50_000, 40)):
        assert extract(np.zeros(shape, np.uint8)).reason == "no_face"


def test_a_dark_but_legible_face_is_accepted(portrait):
    template = extract((portrait * 0.2).astype(np.uint8))
    assert isinstance(template, bd.Template)
    assert similarity(template, extract(portrait)) > 0.6


def test_one_face_is_found_once_however_many_boxes_the_network_draws(portrait):
    bd_face = bd.Face(portrait)
    assert isinstance(EXTRACTOR.extract([bd_face])[0], bd.Template)
    assert len(EXTRACTOR._detector._detect(portrait)) == 1


def test_a_detector_that_is_no_yunet_is_the_callers_mistake(portrait):
    config = bd.Config(face=bd.FaceConfig(detector="sface"))
    with pytest.raises(bd.ModelCardError, match="not YuNet"):
        bd.Extractor(config).extract([bd.Face(portrait)])


def test_a_defect_in_one_capture_costs_that_capture_alone(portrait, monkeypatch, caplog):
    extractor = bd.Extractor()
    assert isinstance(extractor.extract([bd.Face(portrait)])[0], bd.Template)
    align = extractor._detector.align

    def fails_on_grey(pixels):
        if pixels.rgb_or_grey.ndim == 2:
            raise ArithmeticError("a text that might quote pixels")
        return align(pixels)

    monkeypatch.setattr(extractor._detector, "align", fails_on_grey)
    good, bad = extractor.extract([bd.Face(portrait), bd.Face(portrait[..., 0])])
    assert isinstance(good, bd.Template)
    assert (bad.column, bad.reason, bad.detail) == ("face", "failed", "ArithmeticError")
    assert "could not be processed: ArithmeticError" in caplog.text
    assert "pixels" not in caplog.text


@pytest.mark.slow
def test_pixels_that_are_not_square_are_believed_as_far_as_the_face_agrees(portrait):
    def jpeg(image):
        out = io.BytesIO()
        Image.fromarray(image).save(out, "JPEG", quality=95, dpi=(600, 300))
        return out.getvalue()

    squeezed = cv2.resize(portrait, (512, 256), interpolation=cv2.INTER_AREA)
    plain, corrected, wrongly = EXTRACTOR.extract([bd.Face(portrait), bd.Face(jpeg(squeezed)), bd.Face(jpeg(portrait))])
    assert similarity(plain, corrected) > 0.9
    assert "resampled" in corrected.provenance[0]
    assert similarity(plain, wrongly) > 0.95
    assert wrongly.provenance == ()
