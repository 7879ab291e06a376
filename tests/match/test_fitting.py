"""Fitting: tables that keep their promise on data that was not fitted."""

from __future__ import annotations

import json
import tomllib

import numpy as np
import pyarrow as pa
import pytest
from scipy.special import betainc
from scipy.stats import genpareto, norm
from typer.testing import CliRunner

import biodedup as bd
from biodedup import jobs
from biodedup.capture.minutiae.record import MinutiaeRecord, write_record
from biodedup.cli import app
from biodedup.embed.cards import joint_id, load_card
from biodedup.jobs.evaluation.calibrate import card_text
from biodedup.jobs.shared.output import write_table
from biodedup.match.scores.calibration import Calibration
from biodedup.match.scores.fitting import COSINE_POWER, Nonmates, fit, measured_fmr, pareto, ratio_db, survival_db
from tests.support.vectors import again, people, unit

KNOTS = np.round(np.arange(-0.4, 1.001, 0.02), 2)


def strangers(count: int, seed: int, name: str = "strangers") -> Nonmates:
    vectors = people(count, seed)
    a, b = np.triu_indices(count, 1)
    return Nonmates(name, (vectors @ vectors.T)[a, b].astype(np.float64), a, b)


def mates(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.65, 0.12, count).clip(-1, 0.99)


@pytest.fixture(scope="module")
def table() -> dict:
    return fit([mates(3000)], [strangers(700, 1)], KNOTS, source="a test", replicates=100, power=COSINE_POWER)


@pytest.mark.slow
def test_the_false_match_rate_of_others_is_as_promised(table):
    score_db = Calibration.from_card(table).score_db(strangers(1500, 2).scores)
    for nominal_db in (10, 20, 30, 40):
        found = measured_fmr(score_db, nominal_db)
        assert 0.5 < found.ratio < 2 and not found.differs, nominal_db


def test_the_interval_of_an_extrapolation_holds_the_truth_and_widens(table):
    low, high = Calibration.from_card(table).interval_db([0.3, 0.5, 0.6])
    truth = -10 * np.log10(betainc(127 / 2, 0.5, 1 - np.array([0.3, 0.5, 0.6]) ** 2) / 2)  # of random directions
    assert (low <= truth).all() and (truth <= high).all()
    assert (np.diff(high - low) > 0).all()
    assert table["measured_db"] == pytest.approx(10 * np.log10(700 * 699 / 2))
    assert truth[1] > table["measured_db"] + 20


@pytest.mark.slow
def test_a_pareto_law_is_found_again():
    rng = np.random.default_rng(3)
    for shape in (-0.2, 0.05, 0.3):
        excess = genpareto.rvs(shape, scale=2.0, size=20_000, random_state=rng)
        scale, found = pareto(excess, np.ones((1, len(excess))), float(excess.max()))
        assert found[0] == pytest.approx(shape, abs=0.05)
        assert scale[0] == pytest.approx(2.0, rel=0.05)


def test_a_law_does_not_end_before_the_table_does():
    excess = np.random.default_rng(0).uniform(0, 0.1, 5000)  # ends at 0.1
    scale, shape = pareto(excess, np.ones((1, len(excess))), 0.6)
    assert shape[0] < 0
    assert -scale[0] / shape[0] >= 0.6 - 1e-9


def test_pairs_of_few_subjects_say_less_than_as_many_of_many():
    captures = again(np.repeat(people(20, 4), 15, axis=0), 0.8)
    a, b = np.triu_indices(300, 1)
    a, b = a[a // 15 != b // 15], b[a // 15 != b // 15]
    scores = np.einsum("nd,nd->n", captures[a], captures[b]).astype(np.float64)
    widths = []
    for one in (Nonmates("as many", scores, a, b), Nonmates("few", scores, a // 15, b // 15)):
        laws = survival_db([one], KNOTS, 100, np.random.default_rng(0))
        widths.append(np.ptp(np.quantile(laws[1:], (0.025, 0.975), axis=0)[:, KNOTS.searchsorted(0.15)]))
    assert widths[1] > 2 * widths[0]


def test_sets_count_alike_however_large():
    rng = np.random.default_rng(0)
    small, large = (
        Nonmates("", rng.normal(mean, 0.1, count).clip(-1, 1)) for mean, count in ((0.2, 2000), (0, 200_000))
    )
    alike, _ = survival_db([small, large], KNOTS, 1, rng)
    middle = KNOTS.searchsorted(0.2)
    assert 10 ** (-alike[middle] / 10) == pytest.approx((0.5 + norm.sf(2)) / 2, rel=0.05)


@pytest.mark.slow
def test_the_likelihood_ratio_is_that_of_the_densities_never_falls_and_keeps_the_mass():
    nonmated_db = -10 / np.log(10) * norm.logsf(KNOTS, 0, 0.09)
    llr = ratio_db([mates(20_000)], KNOTS, nonmated_db)
    truth = 10 / np.log(10) * (norm.logpdf(KNOTS, 0.65, 0.12) - norm.logpdf(KNOTS, 0, 0.09))
    middle = (KNOTS > 0.3) & (KNOTS < 0.6)
    assert llr[middle] == pytest.approx(truth[middle], abs=2.5)
    assert (np.diff(llr) >= 0).all() and llr[0] == pytest.approx(-20, abs=0.1)
    assert (llr <= nonmated_db + 0.2)[KNOTS > 0].all()  # no stronger than the survival allows


def test_fitting_twice_is_fitting_once(table):
    again = fit([mates(3000)], [strangers(700, 1)], KNOTS, source="a test", replicates=100, power=COSINE_POWER)
    assert again == table


def test_too_few_pairs_are_refused():
    with pytest.raises(bd.InvalidInput, match="50 mated and 190 non-mated"):
        fit([mates(50)], [strangers(20, 0)], KNOTS, source="a test")


@pytest.mark.parametrize(("score_db", "ratio", "differs"), [([30.0] * 100, 1000, True), ([0.0] * 100, 0, False)])
def test_a_rate_differs_only_beyond_chance(score_db, ratio, differs):
    found = measured_fmr(np.array(score_db), 30)
    assert (found.ratio, found.differs) == (pytest.approx(ratio), differs)


def pairs_table(count: int = 260) -> pa.Table:
    """As a model scores whose strangers are more alike than the shipped card expects."""
    vectors = people(count, 9)
    a, b = np.triu_indices(count, 1)
    cosine = np.append((vectors @ vectors.T)[a, b] + 0.1, np.repeat(mates(count), 3))
    own = np.repeat(np.arange(count), 3)
    names = np.array([f"p{i}" for i in range(count)])
    return pa.table(
        {
            "similarity": cosine.astype(np.float32),
            "mated": np.arange(len(cosine)) >= len(a),
            "subject_a": names[np.append(a, own)],
            "subject_b": names[np.append(b, own)],
            "position": np.where(np.arange(len(cosine)) % 2, "left_index", "right_index"),
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_card_fitted_on_ones_own_pairs_is_a_working_card_with_their_rates(tmp_path, suffix):
    write_table(pairs_table(), tmp_path / f"pairs{suffix}")
    done = CliRunner().invoke(
        app,
        [
            "calibrate",
            str(tmp_path / f"pairs{suffix}"),
            "--model",
            "sface",
            "--out",
            str(tmp_path / "my.toml"),
            "--json",
        ],
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    card, shipped = load_card(str(tmp_path / "my.toml")), load_card("sface")
    card.verify()
    assert (card.model_id, card.mirror, card.dimension) == (shipped.model_id, shipped.mirror, shipped.dimension)
    assert card.mean == pytest.approx(shipped.mean, rel=1e-4)
    assert told["mated_pairs"] == 780 and told["subjects"] == 260
    at_20 = told["held_out"]["calibration"][0]
    assert at_20["fmr_before"] > 0.03 and at_20["fmr"] == pytest.approx(0.01, rel=0.5)
    assert {row["position"] for row in told["positions"]} == {"left_index", "right_index"}
    others = people(500, 10)
    cosines = (others @ others.T)[np.triu_indices(500, 1)] + 0.1
    assert measured_fmr(Calibration.from_card(card.calibration).score_db(cosines), 30).ratio == pytest.approx(
        1, abs=0.5
    )


def alike(count: int, seed: int) -> np.ndarray:
    """People who look more alike than those of the shipped table: all have something in common."""
    return unit(people(count, seed) + 0.45 * people(1, 99))


@pytest.mark.slow
def test_a_gallery_calibrates_a_card_on_its_own_impostors(tmp_path):
    with bd.Engine.open(tmp_path / "g") as engine:
        engine.add_templates([f"s{i}" for i in range(600)], {"face": alike(600, 20)})
    others = alike(600, 21)
    cosines = (others @ others.T)[np.triu_indices(600, 1)]
    shipped = Calibration.from_card(load_card("sface").calibration)
    assert measured_fmr(shipped.score_db(cosines), 20).ratio > 4
    told = jobs.calibrate(tmp_path / "g", "sface", tmp_path / "my.toml")
    fitted = Calibration.from_card(load_card(str(tmp_path / "my.toml")).calibration)
    for nominal_db in (20, 30):
        assert measured_fmr(fitted.score_db(cosines), nominal_db).ratio == pytest.approx(1, abs=0.6)
    assert (told.mated, told.nonmated, told.subjects) == (0, 600 * 599 // 2, 600)
    assert told.held_out["calibration"][0]["fmr_before"] > 0.04
    # what is as rare has the likelihood ratio that it had
    scores = np.linspace(0.3, 0.5, 5)
    same = np.interp(fitted.score_db(scores), shipped.nonmated_knots_db, shipped.llr_knots_db)
    assert fitted.llr_db(scores) == pytest.approx(same, abs=0.5)
    assert (fitted.llr_db(scores) < shipped.llr_db(scores)).all()


@pytest.mark.slow
def test_a_gallery_calibrates_a_finger_with_its_minutiae(tmp_path):
    config = bd.Config()
    rng = np.random.default_rng(3)
    with bd.Engine.open(tmp_path / "g", config) as engine:
        model = joint_id(load_card("finger256"), load_card("skeleton_cylinders"))
        vectors = people(60, 22, 256)
        for i, vector in enumerate(vectors):
            body = b"".join(
                bytes([0x40 | x >> 8, x & 255, y >> 8, y & 255, way, 50])
                for x, y, way in rng.integers(0, 256, (30, 3)).tolist()
            )
            record = write_record(MinutiaeRecord(300, 300, body), 0, 50)
            engine.enroll(
                bd.Encounter(f"s{i}", templates={"right_index": bd.Template("right_index", model, vector, record)})
            )
    told = jobs.calibrate(tmp_path / "g", "finger256-3+skeleton-1", tmp_path / "my.toml")
    card, shipped = load_card(str(tmp_path / "my.toml")), load_card("finger256")
    assert told.nonmated == 60 * 59 // 2 and set(told.held_out) == set()  # too few for halves
    assert card.both["skeleton-1"]["nonmated_db"] != shipped.both["skeleton-1"]["nonmated_db"]
    assert jobs.calibrate(tmp_path / "g", "skeleton-1", tmp_path / "minutiae.toml").nonmated == 60 * 59 // 2
    with pytest.raises(bd.InvalidInput, match="has no template of sface"):
        jobs.calibrate(tmp_path / "g", "sface", tmp_path / "other.toml")


def test_both_tables_of_a_finger_are_fitted_from_similarity_and_minutiae(tmp_path):
    pairs = pairs_table()
    minutiae = np.where(pairs["mated"], 12.0, 2.0) + np.random.default_rng(0).exponential(0.8, len(pairs))
    write_table(pairs.append_column("minutiae", pa.array(minutiae)), tmp_path / "pairs.parquet")
    jobs.calibrate(tmp_path / "pairs.parquet", "finger256-3+skeleton-1", tmp_path / "my.toml")
    card, shipped = load_card(str(tmp_path / "my.toml")), load_card("finger256")
    assert card.both["leader-1"] == shipped.both["leader-1"]
    assert "pairs.parquet" in card.calibration["source"] and "pairs.parquet" in card.both["skeleton-1"]["source"]


@pytest.mark.parametrize(
    ("change", "model", "text"),
    [
        (lambda t: t.slice(0, 40), "sface", "needs at least 1000"),
        (lambda t: t.slice(0, len(t) - 700), "sface", "no mated pairs or at least 100"),
        (lambda t: t.drop_columns(["mated"]), "sface", "wanted also mated"),
        (lambda t: t, "skeleton-1", "wanted also minutiae"),
        (lambda t: t, "nobody+skeleton-1", "not known"),
        (lambda t: t, "yunet", "not known"),
    ],
)
def test_pairs_that_cannot_be_fitted_are_refused_with_what_is_wanted(tmp_path, change, model, text):
    write_table(change(pairs_table()), tmp_path / "pairs.parquet")
    with pytest.raises(bd.InvalidInput, match=text):
        jobs.calibrate(tmp_path / "pairs.parquet", model, tmp_path / "my.toml")
    assert not (tmp_path / "my.toml").exists()


def test_a_card_written_and_read_is_the_same():
    document = {"name": 'a "b"\n', "n": 3, "mirror": True, "both": {"x+y 1": {"score": [0.0, 1.5], "db": 2.5}}}
    assert tomllib.loads(card_text(document)) == document
