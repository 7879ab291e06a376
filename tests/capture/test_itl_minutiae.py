"""Minutiae of ANSI/NIST-ITL files (type 9): the INCITS block and the legacy fields, against the minutiae that were written."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import biodedup as bd
from biodedup import jobs
from biodedup.capture.minutiae.record import read_record
from biodedup.capture.pictures.containers import pictures_in, read_captures
from biodedup.common.quality import of_score
from biodedup.embed.extractor import Extractor
from tests.support.images import finger
from tests.support.records import encoded, itl, tagged, type_4, type_9, type_9_legacy, type_9_m1

EXTRACTOR = Extractor(bd.Config())
RNG = np.random.default_rng(9)
MINUTIAE = [
    (int(x), int(y), int(angle) * 2, int(kind))
    for x, y, angle, kind in zip(
        RNG.integers(20, 380, 40),
        RNG.integers(20, 380, 40),
        RNG.integers(0, 180, 40),
        RNG.integers(1, 3, 40),
        strict=True,
    )
]


def read(content: bytes) -> np.ndarray:
    """float (n, 4): x, y, degrees, type of the only finger in a file."""
    (picture,) = pictures_in(content)
    rows = np.frombuffer(read_record(picture.data).body, np.uint8).reshape(-1, 6).astype(int)
    x, y = (rows[:, 0] & 0x3F) << 8 | rows[:, 1], rows[:, 2] << 8 | rows[:, 3]
    return np.column_stack([x, y, rows[:, 4] * 360 / 256, rows[:, 0] >> 6])


def test_the_incits_block_gives_its_minutiae_as_they_are():
    got, wanted = read(itl([type_9_m1(MINUTIAE, 2)])), np.array(MINUTIAE, float)
    assert (got[:, [0, 1, 3]] == wanted[:, [0, 1, 3]]).all()
    assert np.abs((got[:, 2] - wanted[:, 2] + 180) % 360 - 180).max() <= 0.75


def test_legacy_minutiae_are_turned_the_right_way_up_and_half_round():
    got, wanted = read(itl([type_9_legacy(MINUTIAE, 2)])), np.array(MINUTIAE, float)
    shift = np.median(got[:, :2] - wanted[:, :2], axis=0)  # such a record does not state where the image ends
    assert np.abs(got[:, :2] - wanted[:, :2] - shift).max() <= 1
    assert np.abs((got[:, 2] - wanted[:, 2] + 180) % 360 - 180).max() <= 0.75
    assert (got[:, 3] == wanted[:, 3]).all()


def test_both_forms_of_a_finger_match_each_other_and_no_other_finger():
    other = [(399 - x, y, (540 - angle) % 360, kind) for x, y, angle, kind in MINUTIAE]
    contents = [itl([type_9_m1(MINUTIAE, 2)]), itl([type_9_legacy(MINUTIAE, 2)]), itl([type_9_m1(other, 2)])]
    m1, legacy, mirrored = EXTRACTOR.extract([bd.Finger(content, "right_index") for content in contents])
    assert bd.compare(m1, legacy).score_db > 60 > 40 > bd.compare(m1, mirrored).score_db


def test_another_scale_is_brought_to_500_dpi():
    got = read(itl([type_9_m1(MINUTIAE, 2, dpi=1000)]))
    assert np.abs(got[:, 0] - np.array(MINUTIAE)[:, 0] / 2).max() <= 1


def test_an_encounter_takes_all_fingers_of_a_file_by_their_positions(tmp_path):
    content = itl([type_9_m1(MINUTIAE, 2), type_9_legacy(MINUTIAE[:30], 7)])
    assert [capture.position for capture in read_captures(content)] == ["right_index", "left_index"]
    with bd.Engine.open(tmp_path / "g") as engine:
        assert engine.enroll(bd.Encounter("anna", [bd.Finger(content)], encounter_id="e")).outcome == "unique"
        assert sorted(engine.templates("anna")) == ["left_index", "right_index"]
        assert engine.templates("anna")["right_index"].quality == of_score(80)


def test_a_picture_counts_more_than_the_minutiae_beside_it():
    picture = encoded(finger(3), "PNG")
    content = itl([type_4(2, picture, (320, 320), 1), type_9_m1(MINUTIAE, 2), type_9_m1(MINUTIAE, 7)])
    (capture,) = read_captures(content)
    assert (capture.position, capture.data) == ("right_index", picture)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (type_9({2: 0, 4: "U", 300: "1", 331: "x"}), "the extended feature set"),
        (type_9({2: 0, 4: "U", 55: "1"}), "features of a vendor"),
        (type_9({2: 0, 4: "S", 6: 2, 10: 0}), "no minutiae"),
        (type_9({2: 0, 4: "S", 6: 2, 12: [[1, "12345", 20, "A"]]}), "eleven digits"),
        (type_9({2: 0, 4: "U", 128: 400, 129: 400, 130: 0, 137: [[1, 5, 5, 9, 1, 50]]}), "states no scale"),
        (type_9_m1([(5, 5, 400, 1)], 2), "from 0 to 179"),
        (type_9_m1(MINUTIAE, 13), "position code 13"),
        (type_9_m1(MINUTIAE * 7, 2), "at most 255"),
    ],
)
def test_what_is_not_read_is_refused_by_name(record, text):
    with pytest.raises(bd.InvalidInput, match=text):
        read_captures(itl([record]))
    (refusal,) = EXTRACTOR.extract([bd.Finger(itl([record]), "right_index")])
    assert refusal.reason == "unsound_record" and text in refusal.detail


def test_a_palm_is_refused_by_name():
    fields = {2: 1, 3: 10, 6: 8, 7: 8, 8: 1, 9: 500, 10: 500, 11: "NONE", 12: 8, 13: 21}
    (refusal,) = EXTRACTOR.extract([bd.Finger(itl([tagged(15, fields, bytes(64))]), "right_index")])
    assert (refusal.reason, "a palm (type 15)" in refusal.detail) == ("several_fingers", True)


def test_load_names_what_takes_such_a_file(tmp_path):
    path = tmp_path / "card.an2"
    path.write_bytes(itl([type_9_m1(MINUTIAE, 2)]))
    with bd.Engine.open(tmp_path / "g") as engine, pytest.raises(bd.InvalidInput, match="manifest for `enroll-batch`"):
        jobs.load(engine, path)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.sampled_from([itl([type_9_m1(MINUTIAE, 2)]), itl([type_9_legacy(MINUTIAE, 2)])]), st.data())
def test_damaged_minutiae_are_a_sound_record_or_invalid_input(content, data):
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(150, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        pictures = pictures_in(bytes(damaged))
    except bd.InvalidInput:
        return
    assert all(read_record(picture.data).count <= 255 for picture in pictures)
