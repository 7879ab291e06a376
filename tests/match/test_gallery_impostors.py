"""A card's scores among the strangers of the gallery at hand: what is as rare here scores the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

import biodedup as bd
from biodedup.embed.cards import load_card
from biodedup.jobs.evaluation.evaluate import evaluate_encounters
from biodedup.jobs.evaluation.labelled import Labelled
from biodedup.match.scores.calibration import Calibration
from biodedup.match.scores.calibrations import moved
from biodedup.match.scores.fitting import measured_fmr
from biodedup.search.searcher import Searcher
from biodedup.testing import internals
from tests.support.vectors import again, people, unit

CARD = Calibration.from_card(load_card("sface").calibration)
ALL_REACH = bd.Policy(review_db=0.5)
"""With it impostors are candidates."""
CONFIG = bd.Config(gallery=bd.GalleryConfig(seal_rows=64, merge_fan=2, background=False), policy=ALL_REACH)


def alike(count: int, seed: int) -> np.ndarray:
    """People who have something in common, as portraits of one camera have: cosines of 0.17 in the mean."""
    return unit(people(count, seed) + 0.45 * people(1, 99))


def scores_db(folder: Path, cosines: np.ndarray, config: bd.Config = CONFIG) -> np.ndarray:
    """What the gallery makes of faces as similar."""
    with bd.Engine.open(folder, config, override_policy=True) as engine:
        model_id = internals(engine).gallery.snapshot().models["face"].model_id
        return engine.pairs.calibrations.of(model_id).score_db(cosines)


@pytest.mark.slow
def test_impostors_of_any_gallery_reach_a_score_as_rarely_as_it_says(tmp_path):
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        engine.add_templates([f"s{i}" for i in range(1_000)], {"face": alike(1_000, 20)})
    others = alike(600, 21)  # who are not enrolled
    cosines = (others @ others.T)[np.triu_indices(600, 1)]
    own = scores_db(tmp_path / "g", cosines)
    shipped = scores_db(tmp_path / "g", cosines, bd.Config(policy=bd.Policy(use_gallery_impostors=False)))
    assert measured_fmr(shipped, 20).ratio > 5
    for nominal_db in (20, 30):
        assert 0.4 < measured_fmr(own, nominal_db).ratio < 1.6  # the tail's shape stays the card's


def test_few_people_say_less_than_the_card_does(tmp_path):
    vectors = alike(33, 20)
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        engine.add_templates([f"s{i}" for i in range(31)], {"face": vectors[:31]})
    cosines = np.linspace(0.2, 0.6, 5)
    assert scores_db(tmp_path / "g", cosines) == pytest.approx(CARD.score_db(cosines))
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        engine.add_templates(["s31"], {"face": vectors[31:32]})
    assert (scores_db(tmp_path / "g", cosines) < CARD.score_db(cosines) - 2).all()


@pytest.mark.slow
def test_removals_sealing_merging_and_reopening_move_no_score(tmp_path):
    """Nor do people who come after: the same ones are asked until there are twice as many."""
    vectors, probe = alike(250, 20), alike(4, 21)
    with bd.Engine.open(tmp_path / "g", bd.Config(policy=ALL_REACH)) as engine:
        engine.add_templates([f"s{i}" for i in range(200)], {"face": vectors[:200]})
    of = {}
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:

        def ask(what: str) -> None:
            found = engine.identify(bd.Encounter("new", templates={"face": probe[0]}))
            of[what] = {one.subject_id: one.score_db for one in found.candidates}

        ask("before")
        engine.add_templates([f"s{i}" for i in range(200, 250)], {"face": vectors[200:]})
        for i in range(130, 160):  # behind the first 128
            engine.remove(f"s{i}")
        ask("removed")
        engine.compact()
        ask("merged")
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        ask("reopened")
        engine.remove("s0")  # one of the first
        ask("one less")
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        engine.compact()
        ask("one less, merged and reopened")
    shared = set.intersection(*(set(found) for found in of.values()))
    assert shared
    rounding = 0.3  # of sealed vectors
    for name in shared:
        assert of["removed"][name] == pytest.approx(of["before"][name], abs=rounding)
        assert of["merged"][name] == pytest.approx(of["before"][name], abs=rounding)
        assert of["reopened"][name] == of["merged"][name]
        assert of["one less, merged and reopened"][name] == of["one less"][name]
    assert any(of["one less"][name] != of["reopened"][name] for name in shared)


@pytest.mark.slow
@pytest.mark.parametrize("call", ["identify", "enroll"])
def test_a_decision_is_calibrated_on_the_snapshot_that_was_searched(tmp_path, monkeypatch, call):
    """And not on a later one, from which a part of the calibration sample was removed meanwhile."""
    vectors = alike(100, 20)
    probe = bd.Encounter("new", templates={"face": again(vectors[90:91], 0.3)[0]})
    search = Searcher.search

    def removing(self, snapshot, *more, **named):
        monkeypatch.setattr(Searcher, "search", search)
        for i in range(40):
            engine.remove(f"s{i}")
        return search(self, snapshot, *more, **named)

    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        engine.add_templates([f"s{i}" for i in range(100)], {"face": vectors})
        wanted = engine.identify(probe)
        monkeypatch.setattr(Searcher, "search", removing)
        got = getattr(engine, call)(probe)
        assert len(engine) in (60, 61) and wanted.candidates
        scores_db = {candidate.subject_id: candidate.score_db for candidate in wanted.candidates}
        shared = [candidate for candidate in got.candidates if candidate.subject_id in scores_db]
        assert shared
        for candidate in shared:  # searched again among fewer rows, float32 products are added up in another order
            assert candidate.score_db == pytest.approx(scores_db[candidate.subject_id], abs=1e-3)
        assert (got.attainable_db, got.expected_fnir) == (
            wanted.attainable_db,
            wanted.expected_fnir,
        ) or call == "enroll"


def test_a_few_who_are_enrolled_twice_do_not_make_all_impostors_alike():
    once = alike(300, 20)
    cosines = (once @ once.T)[np.triu_indices(300, 1)]
    mates = np.sum(once * again(once, 0.75), axis=1)
    some = np.concatenate([cosines, *[mates] * 4])  # 3 % of the pairs
    grid = np.linspace(0.2, 0.6, 5)
    assert moved(CARD, some, "").score_db(grid) == pytest.approx(moved(CARD, cosines, "").score_db(grid), abs=0.1)
    assert (moved(CARD, cosines, "").score_db(grid) < CARD.score_db(grid) - 2).all()


@pytest.mark.slow
def test_where_most_pairs_are_mates_they_are_not_taken_for_impostors(tmp_path):
    """As in a folder of many pictures of a few."""
    few = alike(4, 20)
    pictures = np.concatenate([again(few, 0.75, seed) for seed in range(20)])
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        engine.add_templates([f"s{i}" for i in range(80)], {"face": pictures})
    cosines = np.linspace(0.2, 0.8, 5)
    assert scores_db(tmp_path / "g", cosines) == pytest.approx(CARD.score_db(cosines))


def test_a_table_among_other_impostors_says_of_what_is_as_rare_the_same():
    score = np.linspace(-0.5, 1, 151)
    table = {"score": score, "llr_db": 40 * score, "nonmated_db": -10 / np.log(10) * norm.logsf(score, 0.02, 0.1)}
    known = Calibration.from_card(table | {"measured_db": 60, "source": "a test"})
    assert known.nonmated_moments == (pytest.approx(0.02, abs=0.006), pytest.approx(0.1, rel=0.01))
    there = known.with_impostors(0.1, 0.2, "elsewhere")
    for z in (-1.0, 0.5, 2.0, 4.0):
        here = known.nonmated_moments[0] + known.nonmated_moments[1] * z
        assert there.score_db([0.1 + 0.2 * z]) == pytest.approx(known.score_db([here]))
        assert there.llr_db([0.1 + 0.2 * z]) == pytest.approx(known.llr_db([here]))


def test_an_evaluation_scores_as_a_gallery_of_its_people_would():
    faces = alike(40, 20)
    made = [
        Labelled(f"e{i}", f"s{i}", templates={"face": bd.Template("face", load_card("sface").model_id, face)})
        for i, face in enumerate(faces)
    ]
    for own in (True, False):
        config = bd.Config(policy=bd.Policy(use_gallery_impostors=own))
        found = evaluate_encounters(made, config, source="a test", made_at=0.0).comparisons.calibrations
        assert ("own people" in found.of(load_card("sface").model_id).source) == own


@pytest.mark.slow
def test_people_are_drawn_among_the_first_and_only_those_who_live(tmp_path):
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        engine.add_templates([f"s{i}" for i in range(300)], {"face": people(300)})
        column, rows = (
            internals(engine).gallery.snapshot().drawn(internals(engine).gallery.snapshot().models["face"].model_id, 64)
        )
        assert column == "face" and len(rows) == 64 and len(set(rows.tolist())) == 64
        assert rows.max() < 256 and (np.diff(rows) > 0).all()
        engine.remove(f"s{rows[0]}")
        _, again_rows = (
            internals(engine).gallery.snapshot().drawn(internals(engine).gallery.snapshot().models["face"].model_id, 64)
        )
        assert set(rows[1:].tolist()) < set(again_rows.tolist()) and rows[0] not in again_rows
        assert internals(engine).gallery.snapshot().drawn("nobody's", 64)[0] == ""
