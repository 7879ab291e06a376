"""What a card's calibration is worth in a gallery that has not checked it: nobody is turned away by a machine alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.jobs.enrolment.outcomes import WORDS, decided
from biodedup.match.judgement import REASONS
from biodedup.match.scores.calibrations import CHECKED_PEOPLE
from tests.support.galleries import PEOPLE
from tests.support.vectors import SFACE, again, people, unit

FINGER = "finger256-3"


def face(vector: np.ndarray) -> bd.Encounter:
    return bd.Encounter("new", templates={"face": bd.Template("face", SFACE, vector)})


def decision_of(engine: bd.Engine, cosine: float, of: np.ndarray = PEOPLE[0]) -> bd.Decision:
    """On a face that is as similar to somebody enrolled."""
    return engine.identify(face(again(of[None], cosine)[0]))


@pytest.fixture
def four(engine: bd.Engine) -> bd.Engine:
    engine.add_templates(["a", "b", "c", "d"], {"face": PEOPLE[:4]}, model_id=SFACE)
    return engine


def test_impostors_of_an_unknown_camera_are_no_duplicates_in_a_small_gallery(four):
    """ORL's two most similar people have 0.501: 60.7 dB by the card, where a gallery of four asked for 36."""
    decision = decision_of(four, 0.5)
    assert decision.best.score_db > 60 > decision.duplicate_db
    assert (decision.outcome, decision.best.kind, decision.reasons) == ("review", "same_person", ("uncalibrated",))
    assert decision.best.interval_db[0] < decision.duplicate_db
    assert REASONS["uncalibrated"] and WORDS["uncalibrated"]


def test_a_face_beyond_what_the_card_may_be_off_is_a_duplicate_at_once(four):
    decision = decision_of(four, 0.8)
    assert (decision.outcome, decision.reasons) == ("duplicate", ())


def test_a_face_alone_is_as_sure_as_its_cosine_says(four):
    """Also beyond 0.84, where the likelihood ratio does not grow any more."""
    worst_case_db = [four.pairs.compare(*({"face": bd.Template("face", SFACE, one)} for one in (PEOPLE[0], again(PEOPLE[:1], cosine)[0]))).worst_case_db for cosine in (0.8, 0.9, 0.999)]  # fmt: skip
    assert worst_case_db[0] > 60 and worst_case_db[1] > worst_case_db[0] + 5 and worst_case_db[2] > worst_case_db[1] + 5


def test_a_face_and_two_fingers_that_agree_are_a_duplicate_at_once(engine):
    fingers = people(3, 5, 256)
    ids = {"face": SFACE, "right_index": FINGER, "left_index": FINGER}
    columns = {"face": PEOPLE[:2], "right_index": fingers[:2], "left_index": fingers[1:]}
    engine.add_templates(["a", "b"], columns, model_id=ids)
    mates = {column: again(rows[:1], 0.7)[0] for column, rows in columns.items()}
    decision = engine.identify(bd.Encounter(templates=mates))
    assert decision.best.score_db > 120 and decision.outcome == "duplicate"
    alone = engine.identify(bd.Encounter(templates={"face": again(PEOPLE[:1], 0.55)[0]}))
    assert alone.outcome == "review"


def test_no_score_below_the_floor_makes_a_duplicate_however_small_the_gallery():
    assert bd.Policy().thresholds_db(4)[0] == bd.Policy().thresholds_db(1)[0] == bd.Policy.duplicate_floor_db
    assert bd.Policy(duplicate_db=30).thresholds_db(4)[0] == bd.Policy.duplicate_floor_db
    assert bd.Policy(duplicate_db=30, duplicate_floor_db=0).thresholds_db(4)[0] == 30
    assert bd.Policy().thresholds_db(10**6)[0] == pytest.approx(90)
    assert bd.Policy().link_db(4) == pytest.approx(36.02, abs=0.01)  # a join's pairs go to a person
    assert bd.Policy().thresholds_db(4)[1] == pytest.approx(29.03, abs=0.01)
    with pytest.raises(bd.InvalidInput, match="duplicate_floor_db"):
        bd.Policy(duplicate_floor_db=-1)


def test_between_the_review_band_and_the_floor_a_person_looks(four):
    decision = decision_of(four, 0.4)
    assert 36 < decision.best.score_db < 50
    assert (decision.outcome, decision.reasons) == ("review", ("between_thresholds",))


def alike(count: int, seed: int, share: float = 0.45) -> np.ndarray:
    """People who have something in common, as portraits of one camera have."""
    return unit(people(count, seed) + share * people(1, 99))


@pytest.mark.parametrize("count", [8, 64, 150, 300])
def test_from_two_hundred_people_on_a_gallery_has_checked_its_card(tmp_path, count):
    config = bd.Config(gallery=bd.GalleryConfig(background=False))
    with bd.Engine.open(tmp_path / "g", config) as engine:
        vectors = alike(count, 20)
        engine.add_templates([f"s{i}" for i in range(count)], {"face": vectors}, model_id=SFACE)
        law = engine.pairs.calibrations.of(SFACE)
        assert law.unchecked == (count < CHECKED_PEOPLE)
        decision = decision_of(engine, 0.62, vectors[0])
        assert decision.best.score_db > decision.duplicate_db
        assert decision.outcome == ("review" if count < CHECKED_PEOPLE else "duplicate")


def test_with_more_people_the_card_may_be_off_by_less(tmp_path):
    sure, crowd = [], people(64)
    for count in (8, 64):
        with bd.Engine.open(tmp_path / str(count)) as engine:
            engine.add_templates([f"s{i}" for i in range(count)], {"face": crowd[:count]}, model_id=SFACE)
            best = decision_of(engine, 0.6, crowd[0]).best
            sure.append(best.score_db - best.interval_db[0])
    assert sure[1] < sure[0] - 8


def test_where_most_people_look_like_mates_no_card_is_taken_as_checked(tmp_path):
    """A camera that makes everybody alike: the card says 50 dB of most pairs of strangers."""
    crowd = alike(300, 20, 0.9)
    with bd.Engine.open(tmp_path / "g") as engine:
        engine.add_templates([f"s{i}" for i in range(300)], {"face": crowd}, model_id=SFACE)
        assert engine.pairs.calibrations.of(SFACE).unchecked
        strangers = [engine.identify(face(vector)).outcome for vector in alike(20, 21, 0.9)]
        assert set(strangers) == {"review"}


def test_a_card_that_is_not_to_be_moved_is_checked_all_the_same(tmp_path):
    config = bd.Config(policy=bd.Policy(use_gallery_impostors=False))
    for name, crowd, holds in (("g", people(300, 20), True), ("alike", alike(300, 20), False)):
        with bd.Engine.open(tmp_path / name, config) as engine:
            engine.add_templates([f"s{i}" for i in range(300)], {"face": crowd}, model_id=SFACE)
            assert engine.pairs.calibrations.of(SFACE).unchecked == (not holds)


def test_a_model_without_a_calibration_makes_no_duplicates(tmp_path):
    for name, count in (("few", 4), ("many", 2000)):
        vectors = people(count, dimension=512)
        with bd.Engine.open(tmp_path / name) as engine:
            engine.add_templates([f"s{i}" for i in range(count)], {"face": vectors}, model_id="mine-1")
            for probe in (vectors[2], again(vectors[2:3], 0.6)[0]):
                decision = engine.enroll(bd.Encounter("new", templates={"face": probe}, encounter_id=f"{probe[0]}"))
                assert decision.outcome == "review" and "uncalibrated" in decision.reasons
                assert decision.best.subject_id == "s2" and decision.best.score_db < 250


def test_a_face_is_trusted_beside_a_finger_of_a_model_without_a_calibration(engine):
    fingers = people(2, dimension=300)
    columns = {"face": PEOPLE[:2], "right_index": fingers}
    engine.add_templates(["a", "b"], columns, model_id={"face": SFACE, "right_index": "mine-1"})

    def outcome(face_cosine: float) -> str:
        probe = {"face": again(PEOPLE[:1], face_cosine)[0], "right_index": fingers[0]}
        return engine.identify(bd.Encounter(templates=probe)).outcome

    assert (outcome(0.8), outcome(0.5)) == ("duplicate", "review")


def test_no_page_takes_for_granted_what_a_person_has_to_judge(four, tmp_path: Path):
    decision = decision_of(four, 0.5)
    told = decided(decision)
    assert (told.status, told.reason, told.duplicate_of) == ("adjudicate", "uncalibrated", None)
    probe = {"face": bd.Template("face", SFACE, again(PEOPLE[:1], 0.5)[0])}
    stored = four.templates("a")
    for engine, size in ((four, None), (None, 4)):
        page = tmp_path / f"{size}.html"
        found = jobs.explain_templates(probe, stored, page, size=size, engine=engine)
        assert found.outcome == "review" and found.headline.startswith("For a person to judge")
        assert "Not checked here" in page.read_text() and "Same person" not in page.read_text()
