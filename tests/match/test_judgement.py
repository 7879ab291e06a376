"""What kind of resemblance it is, and what becomes of it: rules on evidence, and the decisions of an engine."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import biodedup as bd
from biodedup.gallery.answers import from_json, to_json
from biodedup.match.judgement import judge, kinds_of
from biodedup.match.ranked import Comparison
from biodedup.values import Evidence
from tests.support.vectors import again, people

DUPLICATE, REVIEW = 60.0, 50.0


def candidate(score_db: float, row: int = 0, extrapolated: bool = False, **llr_db: float) -> Comparison:
    """llr_db: of each capture by its column; right_index__left_index is one that was enrolled under another label."""
    evidence = tuple(
        Evidence(*(name.split("__") * 2)[:2], score_db=max(value, 0.0), llr_db=value) for name, value in llr_db.items()
    )
    return Comparison(row, score_db, sum(llr_db.values()), extrapolated, evidence)


def judged(*candidates: Comparison, review_db: float = REVIEW, **more: bool):
    return judge(candidates, DUPLICATE, review_db, band_db=REVIEW, **more)


def test_captures_that_agree_are_one_person():
    verdict = judged(candidate(90, face=50, right_index=40))
    assert (verdict.outcome, verdict.kinds, verdict.reasons) == ("duplicate", ("same_person",), ())


def test_a_face_that_the_fingers_contradict_is_a_look_alike_and_goes_to_a_person():
    verdict = judged(candidate(95, face=120, right_index=-10, left_index=-9))
    assert (verdict.outcome, verdict.kinds, verdict.reasons) == ("review", ("look_alike",), ("look_alike",))


def test_fingers_overrule_a_face_whose_sum_they_pull_below_the_thresholds():
    verdict = judged(candidate(40, face=65, right_index=-12, left_index=-12))
    assert (verdict.outcome, verdict.kinds) == ("unique", ("",))


@pytest.mark.parametrize("score_db", [70.0, 20.0])
def test_one_finger_that_all_else_contradicts_is_reported_even_below_the_thresholds(score_db):
    verdict = judged(candidate(score_db, face=-20, right_index=75, left_index=-9))
    assert (verdict.outcome, verdict.kinds, verdict.reasons) == ("review", ("shared_finger",), ("shared_finger",))


def test_below_the_thresholds_a_finger_has_to_be_a_duplicate_by_itself_for_each_that_had_the_chance():
    assert judged(candidate(30, face=-15, right_index=62, left_index=-9)).outcome == "unique"  # 60 and 3 for two
    assert judged(candidate(30, face=-15, right_index=64, left_index=-9)).outcome == "review"


def test_a_face_alone_or_a_finger_alone_contradicts_nothing():
    for one in (candidate(70, face=70), candidate(70, right_index=70)):
        assert judged(one).kinds == ("same_person",)


def test_captures_of_two_people_filed_as_one_are_a_mixed_record():
    verdict = judged(
        candidate(80, row=1, face=90, right_index=-10),
        candidate(70, row=2, face=-15, right_index=80),
        candidate(20, row=3),
    )
    assert verdict.kinds == ("mixed_record", "mixed_record", "")
    assert (verdict.outcome, verdict.reasons) == ("review", ("mixed_record",))


def test_two_who_agree_by_the_same_captures_are_no_mixed_record():
    verdict = judged(candidate(80, row=1, face=60, right_index=30), candidate(70, row=2, face=50, right_index=30))
    assert (verdict.outcome, verdict.kinds) == ("duplicate", ("same_person", "same_person"))


def test_swapped_labels_are_a_duplicate_of_their_kind():
    verdict = judged(candidate(90, face=50, right_index__left_index=25, left_index__right_index=25))
    assert (verdict.outcome, verdict.kinds) == ("duplicate", ("swapped_fingers",))


def test_between_the_thresholds_it_says_whether_evidence_was_scarce():
    assert judged(candidate(55, face=55)).reasons == ("between_thresholds",)
    assert judged(candidate(45, face=45)).outcome == "unique"
    scarce = judged(candidate(45, face=45), review_db=40.0)
    assert (scarce.outcome, scarce.reasons) == ("review", ("little_evidence",))


def test_extrapolated_scores_are_trusted_unless_the_policy_says_otherwise():
    assert judged(candidate(90, face=90, extrapolated=True)).outcome == "duplicate"
    doubted = judged(candidate(90, face=90, extrapolated=True), trust_extrapolation=False)
    assert (doubted.outcome, doubted.reasons) == ("review", ("extrapolated",))


@settings(deadline=None)
@given(
    st.lists(st.dictionaries(st.sampled_from(["face", "right_index", "left_index"]), st.floats(-30, 150), min_size=1), max_size=4),
    st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_an_incomplete_search_is_never_unique_and_no_weak_candidate_makes_a_duplicate(parts, incomplete, bare):
    candidates = [candidate(max(sum(one.values()), 0.0), row, **one) for row, one in enumerate(parts)]
    candidates.sort(key=lambda one: -one.score_db)
    verdict = judged(*candidates, incomplete=incomplete, nothing_in_common=bare)
    if incomplete or bare:
        assert verdict.outcome != "unique"
    if verdict.outcome == "duplicate":
        assert candidates[0].score_db >= DUPLICATE
    if verdict.outcome == "review":
        assert verdict.reasons
    assert kinds_of(candidates, DUPLICATE, REVIEW) == verdict.kinds


def test_a_probe_without_a_capture_is_refused():
    assert judged(candidate(90, face=90), usable=False).outcome == "refused"


# an engine's decisions ------------------------------------------------------------------------------------------


def enrolled(path, policy: bd.Policy, columns=("face", "right_index"), count: int = 40):
    engine = bd.Engine.open(path, bd.Config(policy=policy))
    everybody = {column: people(count, seed=i, dimension=128) for i, column in enumerate(columns)}
    engine.add_templates([f"s{i}" for i in range(count)], everybody)
    return engine, everybody


def test_a_decision_says_what_these_captures_could_attain(tmp_path):
    engine, everybody = enrolled(tmp_path / "g", bd.Policy())
    with engine:
        both = {column: again(rows[:1], 0.7, seed=9)[0] for column, rows in everybody.items()}
        one, two = (
            engine.identify(bd.Encounter(templates={name: both[name] for name in names}))
            for names in (["face"], ["face", "right_index"])
        )
        assert one.compared == two.compared == 40
        assert one.attainable_db < two.attainable_db and one.expected_fnir > two.expected_fnir
        assert from_json(to_json(two)) == two
        assert json.loads(to_json(two))["attainable_db"] == two.attainable_db


def test_who_could_not_have_been_recognised_is_not_cleared(tmp_path):
    strict = bd.Policy(duplicate_db=None, fpir=1e-9, review_fpir=1e-9, fnir_review=0.01)
    engine, _ = enrolled(tmp_path / "g", strict, columns=("face",), count=400)
    with engine:
        stranger = bd.Encounter("new", templates={"face": people(1, seed=77, dimension=128)[0]})
        decision = engine.enroll(stranger)
        assert decision.expected_fnir <= 0.011 and decision.review_db < 10 * np.log10(400 / 1e-9)
        assert (decision.outcome, decision.reasons) == ("review", ("little_evidence",))
        assert "new" not in engine


def test_a_probe_with_nothing_in_common_with_the_gallery_is_never_unique(tmp_path):
    engine, _ = enrolled(tmp_path / "g", bd.Policy(), columns=("face",))
    with engine:
        decision = engine.enroll(bd.Encounter("new", templates={"left_thumb": people(1, seed=5, dimension=128)[0]}))
        assert (decision.outcome, decision.reasons, decision.compared) == ("review", ("nothing_in_common",), 0)
        (added,) = engine.import_captures(
            [bd.Encounter("other", templates={"left_thumb": people(1, seed=6, dimension=128)[0]})]
        )
        assert added.outcome == "unique" and "other" in engine


def test_the_first_of_all_is_unique(tmp_path):
    with bd.Engine.open(tmp_path / "g") as engine:
        decision = engine.enroll(bd.Encounter("first", templates={"face": people(1, dimension=128)[0]}))
        assert (decision.outcome, decision.compared, decision.attainable_db) == ("unique", 0, None)


def test_twins_are_distinguished_from_one_person(tmp_path):
    engine, everybody = enrolled(tmp_path / "g", bd.Policy())
    with engine:
        twin = {
            "face": again(everybody["face"][:1], 0.95, seed=3)[0],
            "right_index": people(1, seed=91, dimension=128)[0],
        }
        decision = engine.enroll(bd.Encounter("twin", templates=twin))
        assert decision.best.subject_id == "s0"
        assert decision.outcome == "review" and decision.best.kind == "look_alike"
