"""Looking subjects up: their rows, groups, decisions and open cases."""

from __future__ import annotations

import json
from collections import Counter

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import biodedup as bd
from biodedup.cli import app
from tests.support.cases import CONFIG, Clock, sent
from tests.support.story import Story
from tests.support.vectors import again, people

(ANNA, BELLA) = people(2)


@pytest.fixture
def engine(tmp_path):
    with bd.Engine.open(tmp_path / "g", CONFIG, clock=Clock()) as engine:
        yield engine


def test_a_subject_has_its_rows_groups_and_decisions_in_order(engine):
    engine.enroll(sent("anna", ANNA, "e1", groups=["north"]))
    engine.update(sent("anna", again(ANNA, 0.9), "e2", groups=["south"]))
    anna = engine.subject("anna")
    assert anna.enrolled and anna.groups == ("north", "south") and anna.columns == ("face",)
    assert [encounter.encounter_id for encounter in anna.encounters] == ["e1", "e2"]
    assert [decision.encounter_id for decision in anna.decisions] == ["e1", "e2"]
    assert anna.decisions == tuple(engine.decisions(subject_id="anna")) == tuple(engine.decisions())


def test_a_subject_that_was_removed_keeps_its_history(engine):
    engine.enroll(sent("anna", ANNA, "e1"))
    engine.remove("anna")
    anna = engine.subject("anna")
    assert not anna.enrolled and [decision.outcome for decision in anna.decisions] == ["unique"]
    with pytest.raises(bd.UnknownSubject, match="has no decision"):
        engine.subject("bella")


def test_a_refusal_that_was_repaired_counts_no_more_and_a_case_stands_as_it_was_judged(engine):
    engine.enroll(bd.Encounter("bella", [bd.Missing("face", "bandaged")], encounter_id="e1"))
    assert [decision.outcome for decision in engine.decisions()] == ["refused"]
    engine.seal()
    engine.enroll(sent("bella", BELLA, "e1"))
    engine.enroll(sent("carla", again(BELLA, 0.5), "e2"))
    assert engine.subject("carla").open_cases == ("e2",)
    assert [decision.outcome for decision in engine.decisions()] == ["unique", "review"]
    engine.adjudicate("e2", "same", "A. Officer")
    assert [decision.outcome for decision in engine.decisions("carla")] == ["duplicate"]
    assert engine.subject("carla").open_cases == ()


def test_an_id_that_is_a_candidate_is_not_the_subject_of_a_decision(engine):
    engine.enroll(sent("anna", ANNA, "e1"))
    engine.enroll(sent("annas double", again(ANNA, 0.9), "e2"))
    assert [decision.encounter_id for decision in engine.decisions("anna")] == ["e1"]
    name = 'quote"\\ \N{LATIN SMALL LETTER E WITH ACUTE}'
    engine.enroll(sent(name, BELLA, "e3"))
    assert [decision.encounter_id for decision in engine.decisions(name)] == ["e3"]


STEPS = [name for name in vars(Story) if not name.startswith("_")]


@pytest.mark.slow
@settings(max_examples=10)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 23)), max_size=30))
def test_groups_and_lists_are_what_the_encounters_of_every_subject_say(tmp_path_factory, steps):
    with bd.Engine.open(tmp_path_factory.mktemp("story") / "g", CONFIG, clock=Clock()) as engine:
        story = Story(engine)
        for name, i in steps:
            getattr(story, name)(i)
        subjects = {name: engine.encounters(name) for name in engine.subject_ids()}
        groups = Counter(g for rows in subjects.values() for g in {g for row in rows for g in row.groups})
        assert engine.groups() == dict(groups)
        listed = list(engine.subjects())
        assert [(s.subject_id, s.rows, s.encounter_ids) for s in listed] == [
            (name, tuple(row.row for row in rows), tuple(row.encounter_id for row in rows))
            for name, rows in subjects.items()
        ]
        for subject in listed:
            whole = engine.subject(subject.subject_id)
            assert (whole.groups, whole.columns) == (subject.groups, subject.columns)
        north = [subject.subject_id for subject in engine.subjects(["north"])]
        assert north == [subject.subject_id for subject in listed if "north" in subject.groups]
        answers = [engine.decision(name) for name in story.encounter_ids]
        ours = [decision for decision in answers if decision is not None]
        theirs = {decision.encounter_id: decision for decision in engine.decisions()}
        assert theirs == {decision.encounter_id: decision for decision in ours}


@pytest.mark.slow
def test_the_commands_list_subjects_and_show_one(engine, tmp_path):
    engine.enroll(sent("anna", ANNA, "e1", groups=["north"]))
    engine.enroll(sent("bella", BELLA, "e2"))
    engine.enroll(sent("carla", again(ANNA, 0.5), "e3"))
    run, of = CliRunner(), ["--gallery", str(tmp_path / "g")]
    listed = json.loads(run.invoke(app, ["list", *of, "--json"]).stdout)
    assert listed["subjects"] == 2 and listed["groups"] == {"north": 1}
    assert [subject["subject_id"] for subject in listed["listed"]] == ["anna", "bella"]
    text = run.invoke(app, ["list", *of, "--limit", "1"]).output
    assert "2 subjects; 1 more, --out FILE writes all" in text and "bella" not in text
    table = tmp_path / "subjects.parquet"
    run.invoke(app, ["list", *of, "--group", "north", "--out", str(table)])
    assert pq.read_table(table).to_pylist() == [
        {"subject_id": "anna", "rows": 1, "row": 0, "encounter_id": "e1", "groups": "north", "columns": "face"}
    ]
    shown = run.invoke(app, ["subject", "carla", *of]).output
    assert "not enrolled" in shown and "review" in shown and "biodedup cases show e3" in shown
    document = json.loads(run.invoke(app, ["subject", "anna", *of, "--json"]).stdout)
    assert document["encounters"][0]["templates"]["face"].keys() == {"column", "model_id", "quality", "provenance"}
    assert run.invoke(app, ["list", *of, "--out", str(tmp_path / "s.csv")]).exit_code == 0
    assert (tmp_path / "s.csv").read_text().splitlines()[0].startswith('"subject_id"')
