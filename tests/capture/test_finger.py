"""Fingers: resolution, ridges, the gate, minutiae records and their comparison."""

from __future__ import annotations

import io
import threading

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data

import biodedup as bd
from biodedup.capture.fingers.finger import resampled, scanner_dpi
from biodedup.capture.minutiae.record import MinutiaeRecord, read_record, write_record
from biodedup.common.quality import of_score
from biodedup.match.prints.minutiae import CylinderMatcher
from biodedup.synthetic import draw_impression, draw_master
from tests.support.images import finger

EXTRACTOR = bd.Extractor()


def extract(image: np.ndarray, **more: object) -> bd.Template | bd.Refusal:
    return EXTRACTOR.extract([bd.Finger(np.ascontiguousarray(image), **more)])[0]


def minutiae_score(a: bd.Template, b: bd.Template) -> float:
    return bd.compare(a, b).minutiae


@pytest.mark.slow
def test_impressions_of_one_finger_score_far_above_those_of_two():
    rng = np.random.default_rng(4)
    mine, theirs = draw_master(rng), draw_master(rng)

    def usable(master):
        while True:
            template = extract(draw_impression(rng, master).image)
            if isinstance(template, bd.Template):
                return template

    a, again, other = usable(mine), usable(mine), usable(theirs)
    mated, nonmated = bd.compare(a, again), bd.compare(a, other)
    assert mated.minutiae > 3 * nonmated.minutiae
    assert mated.score_db > 30 > nonmated.score_db
    assert mated.similarity > 0.5 > nonmated.similarity


@pytest.mark.slow
def test_any_resolution_is_brought_to_500_dpi():
    image = finger(1)
    fine = cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    stated = extract(fine, dpi=1000)
    assert minutiae_score(extract(image), stated) > 30
    assert resampled(fine, 1000).shape == image.shape
    assert resampled(image, 500) is image
    assert scanner_dpi(None) == scanner_dpi(72) == 500
    assert scanner_dpi(569) == 569


def test_the_template_holds_a_standard_record_with_position_and_quality():
    template = extract(finger(1), position="left_index")
    assert template.column == "left_index"
    assert template.minutiae[:8] == b"FMR\0 20\0"
    assert template.minutiae[24] == 7  # ISO/IEC 19794-2: left index finger
    assert len(template.minutiae) == int.from_bytes(template.minutiae[8:12], "big")
    assert template.quality == of_score(template.minutiae[26])
    record = read_record(template.minutiae)
    assert record.count == template.minutiae[27] >= 8


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.full((300, 300), 255, np.uint8), "no_ridges"),
        (np.random.default_rng(0).integers(0, 256, (300, 300), dtype=np.uint8), "no_ridges"),
        (np.asarray(data.astronaut()), "no_ridges"),
        (np.asarray(data.coins()), "no_ridges"),
        (np.pad(finger(1)[120:180, 120:180], 120, constant_values=245), "too_small_area"),
        (np.full((41, 3000), 200, np.uint8), "too_large"),
    ],
    ids=["blank", "noise", "photo", "coins", "corner", "strip"],
)
def test_what_shows_no_finger_is_refused_with_the_number(image, reason):
    refusal = extract(image)
    assert isinstance(refusal, bd.Refusal)
    assert refusal.reason == reason
    assert refusal.measured is not None
    assert refusal.limit is not None


def test_a_limit_of_the_config_decides():
    strict = bd.Extractor(bd.Config(finger=bd.FingerConfig(quality_min=1.0)))
    refusal = strict.extract([bd.Finger(finger(1))])[0]
    assert (refusal.reason, refusal.limit) == ("low_quality", 1.0)


@pytest.mark.slow
def test_threads_get_what_one_thread_gets():
    images = [finger(seed) for seed in range(3)]
    alone = [extract(image).minutiae for image in images]
    answers: list[bool] = []

    def work() -> None:
        for image, expected in zip(images, alone, strict=True):
            answers.append(extract(image).minutiae == expected)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 9


def record_of(points: list[tuple[int, int, int, int]], width: int = 500, height: int = 500) -> bytes:
    body = b"".join(
        (0x4000 | x).to_bytes(2, "big") + y.to_bytes(2, "big") + bytes([angle, q]) for x, y, angle, q in points
    )
    return write_record(MinutiaeRecord(width, height, body), 0, 50)


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 3, 255])
def test_few_and_many_minutiae_are_compared(count):
    rng = np.random.default_rng(count)
    points = [tuple(int(v) for v in (*rng.integers(0, 500, 2), rng.integers(0, 256), 50)) for _ in range(count)]
    record, sound = record_of(points), extract(finger(1)).minutiae
    scores = CylinderMatcher().compare(record, [record, sound, record_of([])])
    assert scores.dtype == np.float32
    assert (scores >= 0).all()
    if count <= 3:
        assert (scores == 0).all()
    else:
        assert scores[0] > 60 > 10 > scores[1]


def test_comparison_is_symmetric_and_repeatable():
    a, b = extract(finger(1)).minutiae, extract(finger(1, degrees=9)).minutiae
    matcher = CylinderMatcher()
    assert matcher.compare(a, [b])[0] == matcher.compare(b, [a])[0] == matcher.compare(a, [b])[0]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_hostile_record_is_invalid_input_or_harmless(data):
    sound = record_of([(10 * i, 9 * i, 7 * i, 60) for i in range(12)])
    damaged = bytearray(sound)
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        CylinderMatcher().compare(sound, [damaged])
    except bd.InvalidInput as error:
        assert ";" in str(error)  # says what to do next


@given(st.binary(max_size=80))
def test_any_bytes_are_no_record(content):
    with pytest.raises(bd.InvalidInput):
        read_record(content)


@pytest.mark.slow
def test_fingers_decide_with_and_without_a_face(tmp_path):
    def encounter(subject, noise, missing=()):
        fingers = [
            bd.Finger(finger(seed, noise_seed=noise, degrees=3 * noise), position=position)
            for seed, position in ((1, "right_index"), (2, "left_index"))
            if position not in missing
        ]
        return bd.Encounter(subject, fingers)

    with bd.Engine.open(tmp_path / "g") as engine:
        assert engine.enroll(encounter("anna", 0)).outcome == "unique"
        decision = engine.enroll(encounter("bella", 1))
        assert decision.outcome == "duplicate"
        assert [e.column for e in decision.best.evidence] == ["right_index", "left_index"]
        both, one = decision.best.score_db, engine.identify(encounter("x", 1, ["left_index"])).best.score_db
        assert both > one


@pytest.mark.slow
def test_a_finger_of_unknown_position_is_tried_against_all(tmp_path):
    with bd.Engine.open(tmp_path / "g") as engine:
        fingers = [bd.Finger(finger(i), position=p) for i, p in enumerate(bd.FINGER_POSITIONS[:4])]
        engine.enroll(bd.Encounter("anna", fingers))
        decision = engine.identify(bd.Encounter(captures=[bd.Finger(finger(2, noise_seed=5))]))
        (evidence,) = decision.best.evidence
        assert (evidence.column, evidence.candidate_column) == ("unknown", "right_middle")
        known = engine.identify(bd.Encounter(captures=[bd.Finger(finger(2, noise_seed=5), position="right_middle")]))
        assert evidence.score_db == pytest.approx(known.best.score_db - 10 * np.log10(4))


@pytest.mark.slow
def test_a_search_that_could_not_compare_all_fingers_says_incomplete_and_never_unique(tmp_path):
    config = bd.Config(finger=bd.FingerConfig(model=None), search=bd.SearchConfig(finger_rows_max=2))
    extractor = bd.Extractor(config)
    with bd.Engine.open(tmp_path / "g", config) as engine:
        outcomes = []
        for i, seed in enumerate((0, 4, 8, 10)):
            (template,) = extractor.extract([bd.Finger(finger(seed), position="right_index")])
            outcomes.append(engine.enroll(bd.Encounter(f"s{i}", templates={"right_index": template})))
        assert [d.outcome for d in outcomes[:3]] == ["unique"] * 3
        assert outcomes[3].incomplete
        assert outcomes[3].outcome == "review"


def two_impressions(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    master = draw_master(rng)
    return [draw_impression(rng, master).image for _ in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("size", [(752, 800), (752, 804), (1001, 752)])
def test_a_page_larger_than_a_component_takes_is_a_print_all_the_same(size):
    mate, again = two_impressions(7)
    page = np.full(size, 248, np.uint8)
    page[150:581, 180:611] = again
    template = extract(page, dpi=500)
    assert isinstance(template, bd.Template)
    assert minutiae_score(extract(mate), template) > 8


@pytest.mark.slow
def test_where_nfiq2_cannot_work_the_refusal_says_so():
    """It takes 129 pixels at least; NBIS says so by an error without words."""
    small = finger(1)[150:275, 150:275]
    plain, asked = (
        bd.Extractor(bd.Config(finger=bd.FingerConfig(nfiq2=wanted, minutiae_min=1))) for wanted in (False, True)
    )
    assert isinstance(plain.extract([bd.Finger(np.ascontiguousarray(small))])[0], bd.Template)
    refusal = asked.extract([bd.Finger(np.ascontiguousarray(small))])[0]
    assert (refusal.reason, refusal.measured) == ("component_limit", 125)
    assert "NFIQ 2" in refusal.detail


def test_several_fingers_in_one_picture_are_refused():
    gap = np.full((350, 60), 255, np.uint8)
    left, right = (two_impressions(seed)[0][40:390, 60:370] for seed in (7, 8))
    refusal = extract(np.hstack([left, gap, right]))
    assert (refusal.reason, refusal.measured, refusal.limit) == ("several_fingers", 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("dpi", [255, 300, 700])
def test_a_files_resolution_that_no_finger_has_is_not_believed_and_a_stated_one_is_refused(dpi):
    mate, again = two_impressions(7)
    with io.BytesIO() as out:
        Image.fromarray(again).save(out, "PNG", dpi=(dpi, dpi))
        content = out.getvalue()
    (template,) = EXTRACTOR.extract([bd.Finger(content)])
    assert minutiae_score(extract(mate), template) > 8
    assert "taken as 500" in template.provenance[0]
    refusal = extract(again, dpi=dpi)
    assert refusal.reason == "resolution"
    assert str(dpi) in refusal.detail and refusal.measured != refusal.limit


@pytest.mark.slow
@pytest.mark.parametrize("dpi", [None, 72, 300, 500])
def test_a_print_of_1000_dpi_is_known_by_its_ridges_whatever_its_file_says(dpi):
    mate, again = two_impressions(7)
    fine = cv2.resize(again, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    with io.BytesIO() as out:
        Image.fromarray(fine).save(out, "PNG", **({} if dpi is None else {"dpi": (dpi, dpi)}))
        (template,) = EXTRACTOR.extract([bd.Finger(out.getvalue())])
    assert minutiae_score(extract(mate), template) > 8
    assert "taken as 1000" in template.provenance[-1]
    refusal = extract(fine, dpi=500)
    assert (refusal.reason, refusal.measured > 0.7) == ("resolution", True)


@pytest.mark.slow
@pytest.mark.parametrize("true", [250, 900])
def test_ridges_that_no_finger_has_are_refused_by_their_distance_where_no_usual_resolution_fits(true):
    again = two_impressions(7)[1]
    scaled = cv2.resize(again, None, fx=true / 500, fy=true / 500, interpolation=cv2.INTER_AREA)
    refusal = extract(scaled)
    assert refusal.reason == "resolution"
    assert "state the scanner's dpi" in refusal.detail
    assert isinstance(extract(scaled, dpi=true), bd.Template)


def test_a_low_resolution_that_the_ridges_doubt_is_refused_from_a_file_and_believed_from_the_caller():
    """At 350 dpi its ridges would be 0.56 mm apart, which is possible; 0.39 mm, at 500 dpi, is more likely."""
    near = two_impressions(7)[1]
    with io.BytesIO() as out:
        Image.fromarray(near).save(out, "PNG", dpi=(350, 350))
        (refusal,) = EXTRACTOR.extract([bd.Finger(out.getvalue())])
    assert refusal.reason == "resolution"
    assert "350 dpi" in refusal.detail and "500 dpi fits" in refusal.detail
    assert getattr(extract(near, dpi=350), "reason", None) != "resolution"


def test_a_photograph_in_place_of_a_finger_is_told_as_such_and_not_by_its_resolution():
    from skimage.data import astronaut

    assert extract(np.ascontiguousarray(astronaut()[:, :, 1])).reason in ("no_ridges", "too_small_area")


def test_a_negative_has_the_minutiae_of_its_positive():
    mate, again = two_impressions(7)
    positive, negative = (minutiae_score(extract(mate), extract(one)) for one in (again, 255 - again))
    assert negative > 0.6 * positive > 5


def test_a_print_of_2000_dpi_is_measured_at_a_scale_that_shows_its_ridges():
    image = finger(1)
    fine = cv2.resize(image, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
    assert minutiae_score(extract(image), extract(fine, dpi=2000)) > 30
