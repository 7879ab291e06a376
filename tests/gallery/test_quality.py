"""The quality of templates: one scale for faces and fingers, and files that keep the scales of earlier releases."""

from __future__ import annotations

import sqlite3
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

import biodedup as bd
from biodedup.common import quality as scale
from biodedup.embed.cards import load_card
from biodedup.gallery.files.names import DATABASE_NAME
from biodedup.match.scores.calibration import Calibration
from biodedup.match.scores.fusion import mated_quantile_db, mated_share_below
from biodedup.search import expected
from tests.support.minutiae import record, strewn
from tests.support.vectors import SFACE, people

VECTORS = people(4)
RECORD = record(strewn(20, seed=1))


@pytest.mark.parametrize("table", [scale.of_score, scale.of_nfiq2])
def test_a_higher_score_of_a_finger_is_a_higher_quality(table):
    qualities = [table(score) for score in range(101)]
    assert 0.0 <= qualities[0] and 0.9 < qualities[-1] < 1.0
    assert (np.diff(qualities) > 0).all()


def test_no_quality_is_lost_on_the_way_to_a_file_and_back():
    given = np.linspace(0, 1, 501).round(4)
    for column in ("face", "right_index"):
        stored = scale.each_as_stored(column, given)
        np.testing.assert_allclose(scale.each_from_stored(column, stored), given, atol=1e-6)
        for quality, kept in zip(given.tolist(), stored.tolist(), strict=True):
            assert scale.from_stored(column, kept) == pytest.approx(quality, abs=1e-6)
            assert scale.as_stored(column, quality) == pytest.approx(kept, abs=1e-5)
    scores = np.arange(101, dtype=np.float32)
    kept = scale.each_as_stored("right_index", scale.each_from_stored("right_index", scores))
    np.testing.assert_allclose(kept, scores, atol=1e-2)
    assert np.isnan(scale.each_from_stored("left_thumb", [np.nan])).all()
    assert scale.from_stored("face", None) is None and scale.from_stored("face", np.nan) is None


@pytest.mark.parametrize("column", ["face", "right_index"])
@pytest.mark.parametrize("quality", [-0.1, 1.1, 60.0, float("nan")])
def test_a_quality_of_another_scale_is_refused(column, quality):
    with pytest.raises(bd.InvalidInput, match="wanted 0 to 1"):
        bd.Template(column, "m", VECTORS[0], quality=quality)


@pytest.mark.slow
def test_fingers_of_an_earlier_release_have_the_quality_that_their_score_predicts(tmp_path):
    """Earlier releases stored the score, 0 to 100, of a finger."""
    finger = bd.Template("right_index", "external-minutiae", None, RECORD, quality=0.5)
    face = bd.Template("face", SFACE, VECTORS[0], quality=0.75)
    with bd.Engine.open(tmp_path / "g") as engine:
        engine.import_captures([bd.Encounter("anna", templates={"right_index": finger, "face": face})])
    with sqlite3.connect(tmp_path / "g" / DATABASE_NAME) as database:
        stored = sorted(database.execute("SELECT quality FROM cell").fetchall())
    database.close()
    assert stored == [(0.75,), (pytest.approx(scale.as_stored("right_index", 0.5)),)] and stored[1][0] > 1
    with bd.Engine.open(tmp_path / "g") as engine:
        for _ in ("journal", "segment"):
            templates = engine.templates("anna")
            assert (templates["face"].quality, templates["right_index"].quality) == (0.75, 0.5)
            engine.compact()


def test_a_table_may_state_the_qualities_of_fingers_on_the_scale_of_earlier_releases(tmp_path):
    columns = {"subject_id": ["a", "b", "c"], "right_index": [RECORD] * 3, "right_index_quality": [55, 1, None]}
    with bd.Engine.open(tmp_path / "g") as engine:
        engine.load_templates(pa.RecordBatch.from_pydict(columns), model_id="external-minutiae")
        qualities = [engine.templates(name)["right_index"].quality for name in "abc"]
    assert qualities == [scale.of_score(55), 1.0, None]


def test_a_poor_finger_is_told_to_be_captured_again_and_expected_to_miss_more_often(tmp_path):
    good = bd.Template("right_index", "external-128", VECTORS[0], quality=0.95)
    with bd.Engine.open(tmp_path / "g") as engine:
        engine.import_captures([bd.Encounter("anna", templates={"right_index": good})])
        decisions = [
            engine.identify(bd.Encounter(templates={"right_index": replace(good, quality=quality)}))
            for quality in (None, 0.95, 0.5, 0.2)
        ]
    unknown, usual, poor, poorest = decisions
    assert unknown.expected_fnir == usual.expected_fnir < poor.expected_fnir < poorest.expected_fnir
    assert usual.review_db == poor.review_db == poorest.review_db
    assert poorest.doubtful[0].measured == 0.2 and usual.doubtful == ()


def test_as_many_mates_of_a_poor_capture_pass_40_db_as_its_quality_says():
    calibration = Calibration.from_card(load_card("sface").calibration)
    for quality in (0.2, 0.5, 0.85):
        likely = (expected._mated_share(quality, calibration),)
        assert 1 - mated_share_below(40.0, (calibration,), likely) == pytest.approx(quality, abs=0.01)
    assert mated_quantile_db(0.5, (calibration,), (0.2,)) < mated_quantile_db(0.5, (calibration,))
    assert expected._mated_share(0.95, calibration) == 1.0
