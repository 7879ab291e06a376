"""Calibration and fusion: decibels that mean what they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

import biodedup as bd
from biodedup.embed.cards import load_card
from biodedup.match.scores.calibration import Calibration
from biodedup.match.scores.calibrations import from_embeddings
from biodedup.match.scores.fusion import (
    STEP_DB,
    bounded,
    fused_score_db,
    llr_reaching,
    mated_quantile_db,
    mated_share_below,
    score_db_of_steps,
    steps_of,
)

SCORE = np.linspace(-0.5, 1, 151)
NORMAL = Calibration.from_card(
    {
        "score": SCORE,
        "llr_db": np.maximum.accumulate(
            10 / np.log(10) * (norm.logpdf(SCORE, 0.6, 0.15) - norm.logpdf(SCORE, 0, 0.1)).clip(-10)
        ),
        "nonmated_db": -10 / np.log(10) * norm.logsf(SCORE, 0, 0.1),
        "measured_db": 60.0,
        "source": "a test",
    }
)
WITH_INTERVAL = Calibration.from_card(
    {
        "score": SCORE,
        "llr_db": NORMAL.llr_knots_db,
        "nonmated_db": NORMAL.nonmated_knots_db,
        "nonmated_low_db": NORMAL.nonmated_knots_db * 0.9,
        "nonmated_high_db": NORMAL.nonmated_knots_db * 1.2,
        "measured_db": 60.0,
        "source": "a test",
    }
)
SHIPPED = [
    Calibration.from_card(load_card(name).calibration)
    for name in ("sface", "skeleton_cylinders", "mindtct_cylinders", "leader_cylinders")
]


def test_score_db_is_minus_ten_log10_of_the_false_match_rate():
    scores = np.random.default_rng(0).normal(0, 0.1, 1_000_000)
    for db in (10, 20, 30):
        assert np.mean(NORMAL.score_db(scores) >= db) == pytest.approx(10 ** (-db / 10), rel=0.15)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_fused_scores_keep_the_false_match_rate_and_are_never_optimistic(parts):
    rng = np.random.default_rng(parts)
    sums = NORMAL.llr_db(rng.normal(0, 0.1, (400_000, parts))).sum(axis=1)
    score_db, _ = fused_score_db(sums, (NORMAL,) * parts)
    for db in (10, 20, 30):
        measured = np.mean(score_db >= db)
        nominal = 10 ** (-db / 10)
        noise = 3 / np.sqrt(nominal * len(sums))
        assert nominal / 1.5 <= measured <= nominal * (1 + noise), db


def test_one_capture_fused_is_that_capture():
    for cosine in (0.3, 0.45, 0.6, 0.8):
        fused, _ = fused_score_db(float(NORMAL.llr_db(cosine)), (NORMAL,))
        assert fused == pytest.approx(float(NORMAL.score_db(cosine)), abs=1.0)


def test_the_far_tail_is_exact_where_a_national_register_needs_it():
    fused, extrapolated = fused_score_db(float(2 * NORMAL.llr_db(0.62)), (NORMAL, NORMAL))
    assert 120 < fused < 250
    assert extrapolated
    assert not fused_score_db(float(2 * NORMAL.llr_db(0.25)), (NORMAL, NORMAL))[1]


@pytest.mark.slow
@given(st.lists(st.floats(-60, 200), min_size=2, max_size=20))
def test_more_evidence_is_never_a_lower_score(sums):
    scores, extrapolated = fused_score_db(sorted(sums), SHIPPED)
    assert (np.diff(scores) >= 0).all()
    assert (extrapolated == (scores > max(calibration.measured_db for calibration in SHIPPED))).all()
    assert float(fused_score_db(min(sums), SHIPPED)[0]) == scores[0]


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_mates_stay_below_the_scores_that_the_likelihood_ratio_predicts(parts):
    rng = np.random.default_rng(parts)
    scores, _ = fused_score_db(NORMAL.llr_db(rng.normal(0.6, 0.15, (200_000, parts))).sum(axis=1), (NORMAL,) * parts)
    for share in (0.01, 0.1, 0.5, 0.9):
        foretold = mated_quantile_db(share, (NORMAL,) * parts)
        assert foretold == pytest.approx(np.quantile(scores, share), rel=0.03, abs=1.5)
    for score_db in (20, 60, 120):
        foretold = mated_share_below(score_db, (NORMAL,) * parts)
        assert foretold == pytest.approx(np.mean(scores < score_db), rel=0.1, abs=0.003)


def test_every_mate_stays_below_what_cannot_be_reached():
    assert mated_share_below(1e4, (NORMAL,)) == 1.0
    assert mated_share_below(0.0, (NORMAL,)) == 0.0


def test_an_interval_is_reported_where_a_table_has_one():
    low, high = WITH_INTERVAL.interval_db([0.2, 0.6, 1.5])
    middle = WITH_INTERVAL.score_db([0.2, 0.6, 1.5])
    assert low == pytest.approx(np.minimum(middle * 0.9, 300), rel=0.2)
    assert (low <= middle).all() and (middle <= high).all() and high[2] == 300
    assert NORMAL.interval_db(0.5) is None


def test_a_fused_interval_holds_the_fused_score_and_needs_every_table_to_have_one():
    sums = np.linspace(-20, 150, 50)
    both = (WITH_INTERVAL, WITH_INTERVAL)
    low, middle, high = (score_db_of_steps(steps_of(sums), both, bound) for bound in ("low", "best", "high"))
    assert np.array_equal(middle, fused_score_db(sums, both)[0])
    assert (low <= middle).all() and (middle <= high).all()
    assert np.mean(high - low) > 5
    assert bounded(both) and not bounded((WITH_INTERVAL, NORMAL))


def test_the_least_sum_that_scores_as_much_scores_as_much():
    least = llr_reaching(90, (NORMAL, NORMAL))
    assert float(fused_score_db(least, (NORMAL, NORMAL))[0]) >= 90
    assert float(fused_score_db(least - 2 * STEP_DB, (NORMAL, NORMAL))[0]) < 90


@pytest.mark.parametrize("calibration", [NORMAL, *SHIPPED])
def test_the_nonmated_distribution_sums_to_one(calibration):
    _, mass = calibration.nonmated_llr_pmf(STEP_DB)
    assert mass.sum() == pytest.approx(1, abs=1e-9)
    assert (mass >= 0).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 40))
def test_tables_are_read_as_numpy_reads_them_however_their_knots_lie(seed, count):
    rng = np.random.default_rng(seed)
    knots, values = np.cumsum(rng.exponential(size=count) ** 3 + 1e-6), np.cumsum(rng.random(count))
    table = {"score": knots, "llr_db": values, "nonmated_db": values, "measured_db": 60, "source": "a test"}
    places = np.concatenate([knots, rng.uniform(knots[0] - 5, knots[-1], 50)])
    found = Calibration.from_card(table).llr_db(places)
    assert found == pytest.approx(np.interp(places, knots, values), abs=1e-9)
    assert np.isnan(Calibration.from_card(table).llr_db([np.nan])[0])


def test_beyond_the_table_the_last_slope_goes_on_up_to_the_cap():
    finger = SHIPPED[1]
    assert float(finger.score_db(450)) == 300
    assert float(finger.score_db(-5)) == 0
    assert np.all(np.diff(finger.score_db(np.arange(0, 500))) >= 0)


def test_unlabelled_embeddings_calibrate_themselves():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((1024, 512)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    calibration = from_embeddings(vectors)
    cosines = (vectors[:512] @ vectors[512:].T).ravel()
    assert np.mean(calibration.score_db(cosines) >= 20) == pytest.approx(0.01, rel=0.4)
    assert float(from_embeddings(vectors[:0]).score_db(0.3)) == pytest.approx(25.7, abs=0.2)  # 3 sd of 0.1


@pytest.mark.parametrize("known", [0, 512])
def test_no_score_is_unbounded_where_the_tail_was_not_measured(known):
    vectors = np.random.default_rng(0).standard_normal((known, 512)).astype(np.float32)
    calibration = from_embeddings(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    scores_db = calibration.score_db([0.5, 0.7, 0.9, 1.0])
    assert (np.diff(scores_db) > 0).all() and scores_db[-1] < 220


def test_sface_tail_falls_as_that_of_a_model_without_a_card_is_taken_to():
    card, cosines = SHIPPED[0], np.linspace(0.3, 1, 8)
    mean, sd = card.nonmated_moments
    alike = from_embeddings(np.zeros((0, 1), np.float32)).with_impostors(mean, sd, "as wide as SFace's")
    assert alike.score_db(cosines) == pytest.approx(card.score_db(cosines), abs=8)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"score": [1, 0]}, "ascend"),
        ({"llr_db": [0]}, "one equal length"),
        ({"measured_db": "x"}, "numeric"),
        ({"score": None}, "one equal length"),
        ({"nonmated_low_db": [0, 1], "nonmated_high_db": [0]}, "interval"),
        ({"nonmated_low_db": [0], "nonmated_high_db": [0]}, "as long as"),
        ({"nonmated_low_db": [0, 2], "nonmated_high_db": [0, 3]}, "lie between"),
    ],
)
def test_a_broken_table_is_a_card_error(change, text):
    table = {"score": [0, 1], "llr_db": [0, 1], "nonmated_db": [0, 1], "measured_db": 1, "source": "x"} | change
    with pytest.raises(bd.ModelCardError, match=text):
        Calibration.from_card(table)


@pytest.mark.parametrize("calibration", SHIPPED)
def test_a_shipped_table_speaks_against_impostors_and_for_mates(calibration):
    assert float(calibration.llr_db(calibration.score[0])) < -10
    assert float(calibration.llr_db(calibration.score[-1])) > 60
