"""Captures that are copies of enrolled ones."""

from __future__ import annotations

import numpy as np
import pytest

import biodedup as bd
from biodedup.errors import InvalidInput
from tests.support.vectors import again, people


@pytest.fixture
def engine(tmp_path):
    with bd.Engine.open(tmp_path / "g") as engine:
        yield engine


def encounter(subject_id, vector, **more):
    return bd.Encounter(subject_id, templates={"face": vector}, **more)


def test_a_duplicate_by_the_same_template_is_told_from_one_by_another_capture(engine):
    (anna,) = people(1)
    engine.enroll(encounter("anna", anna))
    copied, another = engine.identify(encounter("x", anna)), engine.identify(encounter("x", again(anna, 0.9)))
    assert copied.replays == (("face", "anna"),)
    assert copied.candidates[0].evidence[0].replay
    assert another.best.subject_id == "anna" and another.replays == ()
    assert copied.to_dict()["candidates"][0]["evidence"][0]["replay"] is True


def test_by_default_a_copy_is_reported_and_accepted(engine):
    (anna,) = people(1)
    engine.enroll(encounter("anna", anna))
    verified = engine.verify(encounter("anna", anna), "anna")
    assert verified.accepted and verified.replays == ("face",)
    assert engine.update(encounter("anna", anna)).outcome == "unique"


def test_a_policy_that_refuses_copies_reviews_an_update_and_accepts_no_verification(tmp_path):
    (anna,) = people(1)
    with bd.Engine.open(tmp_path / "g", bd.Config(policy=bd.Policy(replays="refuse"))) as engine:
        engine.enroll(encounter("anna", anna))
        assert not engine.verify(encounter("anna", anna), "anna").accepted
        assert engine.verify(encounter("anna", again(anna, 0.9)), "anna").accepted
        decision = engine.update(encounter("anna", anna, encounter_id="e2"))
        assert (decision.outcome, decision.reasons[0]) == ("review", "replay_suspected")
        assert decision.best.subject_id == "anna" and decision.replays == (("face", "anna"),)
        assert engine.decision("e2").replays == decision.replays
        assert engine.update(encounter("anna", again(anna, 0.9))).outcome == "unique"


def test_templates_of_a_model_without_a_limit_are_never_taken_for_copies(tmp_path):
    vector = np.eye(1, 64, dtype=np.float32)[0]
    with bd.Engine.open(tmp_path / "g") as engine:
        template = bd.Template("face", "mine-1", embedding=vector)
        engine.enroll(bd.Encounter("anna", templates={"face": template}))
        assert engine.identify(bd.Encounter("x", templates={"face": template})).replays == ()


def test_a_policy_names_what_it_does_with_copies():
    with pytest.raises(InvalidInput, match="replays is 'forbid', wanted one of report, refuse"):
        bd.Policy(replays="forbid")
