"""Encounters that lack captures: refused as incomplete, each capture named, and taken when they come again repaired."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import biodedup as bd
from biodedup import jobs
from biodedup.cli import app
from biodedup.cli.exits import Exit
from biodedup.required import shortfall
from biodedup.testing import internals
from tests.support.galleries import PEOPLE, small
from tests.support.images import finger, jpeg
from tests.support.vectors import again, people

ANNA, BELLA = people(2)


@pytest.fixture(scope="module")
def prints() -> list[bytes]:
    return [jpeg(finger(seed)[..., None].repeat(3, axis=2)) for seed in (1, 2)]


def broken(good: bytes) -> list[bd.Face | bd.Finger]:
    """An unreadable face and an empty finger beside one good finger."""
    return [bd.Face(b"no image"), bd.Finger(b"", "left_index"), bd.Finger(good, "right_index")]


def test_a_decision_tells_which_capture_to_take_again_and_why(tmp_path, portrait):
    dark = (portrait * 0.05).astype(np.uint8)
    with bd.Engine.open(tmp_path / "g", bd.Config(policy=bd.Policy(required=()))) as engine:
        decision = engine.enroll(bd.Encounter("anna", captures=[bd.Face(dark)], encounter_id="1"))
        (column,) = decision.recaptures
        assert column == "face"
        assert "too dark" in decision.recaptures["face"] and "recapture with more light" in decision.recaptures["face"]
        faint = bd.Template("face", "m-1", np.eye(1, 8, dtype=np.float32)[0], quality=0.75)
        decision = engine.enroll(bd.Encounter("bert", templates={"face": faint}, encounter_id="2"))
        assert "0.75" in decision.recaptures["face"] and "low quality" in decision.recaptures["face"]
        assert engine.decision("2").recaptures == decision.recaptures
        sharp = bd.Template("face", "m-1", np.eye(1, 8, 3, dtype=np.float32)[0], quality=0.97)
        assert engine.identify(bd.Encounter(templates={"face": sharp})).recaptures == {}


def named(decision: bd.Decision) -> dict[str, str]:
    return {refusal.column: refusal.reason for refusal in decision.refusals}


# the rules ------------------------------------------------------------------------------------------------------------


def lacks(*required: str, usable: str = "", declined: str = "", missing: str = "") -> list[str]:
    """Columns that are named; captures are given as texts of columns."""
    refusals = [bd.Refusal(column, "blurred") for column in declined.split()]
    stated = [bd.Missing(column, "amputated") for column in missing.split()]
    return [one.column for one in shortfall(bd.Policy(required=required).required, usable.split(), refusals, stated)]


def test_every_capture_that_was_sent_has_to_be_usable():
    assert lacks("sent", usable="right_index", declined="face left_index") == ["face", "left_index"]
    assert lacks("sent", usable="right_index") == []
    assert lacks(usable="right_index", declined="face") == []


def test_a_better_capture_of_the_same_finger_leaves_nothing_lacking():
    superseded = bd.Refusal("right_index", "superseded", "a better capture was kept", 40.0)
    assert shortfall(("sent",), ["right_index"], [superseded], []) == ()


def test_an_exception_that_is_stated_excuses_its_column():
    assert lacks("sent", usable="face", declined="left_thumb", missing="left_thumb") == []
    assert lacks("face", "right_thumb", usable="face", missing="right_thumb") == []
    assert lacks("face", usable="right_index") == ["face"]


def test_so_many_fingers_are_asked_for_as_there_are():
    others = "right_middle right_ring right_little left_thumb left_index left_middle left_ring left_little"
    assert lacks("2 fingers", usable="right_index") == ["fingers"]
    assert lacks("2 fingers", usable="face right_index unknown") == []
    assert lacks("2 fingers", missing="right_thumb right_index") == ["fingers"]  # eight are left
    assert lacks("2 fingers", usable="right_index", missing=f"right_thumb {others}") == []  # the only one
    assert lacks("2 fingers", missing=f"right_thumb right_index {others}") == []  # none is left
    assert lacks("2 fingers", usable="left_index", declined="right_index") == ["right_index", "fingers"]


@pytest.mark.parametrize(
    "wrong", ["face", ("nose",), ("11 fingers",), ("0 fingers",), ("unknown",), ("two fingers",), (2,)]
)
def test_a_requirement_that_says_nothing_known_is_refused(wrong):
    with pytest.raises(bd.InvalidInput, match="required"):
        bd.Policy(required=wrong)


# the engine -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_broken_upload_is_refused_and_its_resend_enrols(engine, portrait, prints):
    decision = engine.enroll(bd.Encounter("anna", broken(prints[0]), encounter_id="e1"))
    assert (decision.outcome, decision.reasons, decision.incomplete) == ("refused", ("incomplete",), False)
    assert named(decision) == {"face": "not_an_image", "left_index": "empty_file"}
    assert "anna" not in engine and not decision.final
    assert engine.decision("e1") == decision

    repaired = [bd.Face(portrait), bd.Finger(prints[1], "left_index"), bd.Finger(prints[0], "right_index")]
    again = engine.enroll(bd.Encounter("anna", repaired, encounter_id="e1"))
    assert (again.outcome, again.final, "anna" in engine) == ("unique", True, True)
    assert engine.enroll(bd.Encounter("anna", repaired, encounter_id="e1")) == again == engine.decision("e1")
    with pytest.raises(bd.EncounterConflict):
        engine.enroll(bd.Encounter("anna", broken(prints[0]), encounter_id="e1"))


@pytest.mark.slow
def test_a_stream_and_an_update_ask_for_the_same(engine, prints):
    anna = bd.Encounter("anna", templates={"face": ANNA})
    assert engine.enroll(anna).outcome == "unique"
    (streamed,) = engine.enroll_many([bd.Encounter("bella", broken(prints[0]), encounter_id="e1")])
    updated = engine.update(bd.Encounter("anna", [bd.Face(b"")], {"right_index": people(1)[0]}, encounter_id="e2"))
    assert (streamed.reasons, updated.reasons) == (("incomplete",), ("incomplete",))
    assert updated.outcome == "refused" and engine.templates("anna").keys() == {"face"}
    assert (
        engine.update(bd.Encounter("anna", templates={"face": again(ANNA, 0.9)}, encounter_id="e2")).outcome == "unique"
    )


@pytest.mark.slow
def test_identify_and_verify_use_what_can_be_used(engine, prints):
    engine.enroll(bd.Encounter("anna", [bd.Finger(prints[0], "right_index")]))
    probe = bd.Encounter(None, broken(prints[0]))
    assert engine.identify(probe).outcome in ("duplicate", "review")
    assert engine.verify(probe, "anna").evidence


def test_captures_that_were_declined_elsewhere_count_as_sent(engine):
    blurred = bd.Refusal("right_index", "blurred", "", 1.0, 2.0)
    decision = engine.enroll(bd.Encounter("anna", (), {"face": ANNA}, "e1", declined=[blurred]))
    assert (decision.reasons, decision.refusals) == (("incomplete",), (blurred,))
    assert engine.enroll(bd.Encounter("anna", (), {"face": ANNA}, "e1")).outcome == "unique"  # the operator left it out
    with pytest.raises(bd.InvalidInput, match="declined"):
        bd.Encounter("anna", declined=["blurred"])


def test_required_captures_are_required_of_every_encounter_and_an_amputee_can_enrol(tmp_path):
    policy = bd.Policy(required=("face", "2 fingers"))
    with bd.Engine.open(tmp_path / "g", bd.Config(policy=policy)) as engine:
        print_ = people(1, seed=9)[0]
        one = {"face": ANNA, "right_index": print_}
        decision = engine.enroll(bd.Encounter("anna", templates=one, encounter_id="e1"))
        assert (decision.outcome, decision.reasons, named(decision)) == (
            "refused", ("incomplete",), {"fingers": "too_few_fingers"})  # fmt: skip
        assert (decision.refusals[0].measured, decision.refusals[0].limit) == (1, 2)
        lost = [bd.Missing(position, "amputated") for position in bd.FINGER_POSITIONS[:-1] if position != "right_index"]
        assert engine.enroll(bd.Encounter("anna", lost, one, "e1")).outcome == "unique"


@pytest.mark.slow
def test_a_refusal_can_be_made_good_after_sealing_and_merging(tmp_path):
    def sent(i: int, *declined: bd.Refusal) -> bd.Encounter:
        return bd.Encounter(f"s{i}", (), {"face": PEOPLE[i]}, f"e{i}", declined=declined)

    with bd.Engine.open(tmp_path / "g", small(seal_rows=1000)) as engine:
        for i in range(6):
            assert engine.enroll(sent(i, bd.Refusal("right_index", "blurred"))).outcome == "refused"
        internals(engine).gallery.seal()
        for i in range(6):
            assert engine.enroll(sent(i)).outcome == "unique"
        for merge in (
            internals(engine).gallery.seal,
            engine.compact,
        ):  # of two answers in two segments, then in one, the last one counts
            merge()
            assert [engine.decision(f"e{i}").outcome for i in range(6)] == ["unique"] * 6
            assert engine.enroll(sent(3)) == engine.decision("e3")
        assert engine.problems() == []


def test_a_case_that_waits_is_not_measured_by_it(tmp_path):
    with bd.Engine.open(
        tmp_path / "g", bd.Config(policy=bd.Policy(duplicate_db=100, review_db=30, required=()))
    ) as engine:
        engine.enroll(bd.Encounter("anna", templates={"face": ANNA}))
        blurred = bd.Refusal("right_index", "blurred")
        twin = bd.Encounter("bella", (), {"face": again(ANNA, 0.6)}, "e1", declined=[blurred])
        assert engine.enroll(twin).outcome == "review"
    with bd.Engine.open(
        tmp_path / "g", bd.Config(policy=bd.Policy(duplicate_db=100, review_db=30, required=()))
    ) as engine:
        assert engine.adjudicate("e1", "different", "A. Officer").outcome == "unique"


def test_a_case_judged_for_recapture_keeps_its_encounter_id(tmp_path):
    with bd.Engine.open(tmp_path / "g", bd.Config(policy=bd.Policy(duplicate_db=100, review_db=30))) as engine:
        engine.enroll(bd.Encounter("anna", templates={"face": ANNA}))
        assert (
            engine.enroll(bd.Encounter("bella", templates={"face": again(ANNA, 0.6)}, encounter_id="e1")).outcome
            == "review"
        )
        assert engine.adjudicate("e1", "recapture", "A. Officer").final
        with pytest.raises(bd.EncounterConflict):
            engine.enroll(bd.Encounter("bella", templates={"face": BELLA}, encounter_id="e1"))


# the command line and the jobs ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_says_what_to_do(tmp_path, prints):
    (tmp_path / "face.jpg").write_bytes(b"no image")
    (tmp_path / "li.jpg").write_bytes(b"")
    (tmp_path / "ri.jpg").write_bytes(prints[0])
    arguments = [
        "--face",
        str(tmp_path / "face.jpg"),
        "--finger",
        f"right_index={tmp_path / 'ri.jpg'}",
        "--gallery",
        str(tmp_path / "g"),
    ]
    result = CliRunner().invoke(app, ["enroll", "anna", *arguments, "--encounter-id", "e1"])
    assert result.exit_code == Exit.REFUSED
    assert "under the same encounter_id" in result.stdout
    assert f"refused face ({tmp_path / 'face.jpg'}): not_an_image" in result.stdout
    assert "take face again: the file is no image" in result.stdout
    assert "gallery was not compared" not in result.stdout


def run_batch(folder: Path, policy: bd.Policy | None = None) -> tuple[jobs.BatchResult, list[dict[str, object]]]:
    config = bd.Config() if policy is None else bd.Config(policy=policy)
    with bd.Engine.open(folder / "g", config) as engine, jobs.Backlog.open(folder / "g") as backlog:
        result = jobs.enroll_batch(
            engine, backlog, folder / "m.csv", folder / "out.parquet", report=folder / "out.html", workers=1
        )
    return result, pq.read_table(folder / "out.parquet").to_pylist()


@pytest.mark.slow
def test_a_batch_names_each_capture_and_takes_the_repaired_ones(tmp_path, prints, portrait):
    (tmp_path / "face.jpg").write_bytes(b"no image")
    (tmp_path / "li.jpg").write_bytes(b"")
    (tmp_path / "ri.jpg").write_bytes(prints[0])
    (tmp_path / "m.csv").write_text(
        "subject_id,encounter_id,path,position\nanna,e1,face.jpg,face\nanna,e1,li.jpg,left_index\nanna,e1,ri.jpg,right_index\n"
    )
    result, (row,) = run_batch(tmp_path)
    assert (result.statuses["refused"], row["status"], row["reason"]) == (1, "refused", "incomplete")
    assert row["detail"] == "face: not_an_image; left_index: empty_file"
    assert {one["column"] for one in json.loads(row["refusals"])} == {"face", "left_index"}
    assert "face: not_an_image; left_index: empty_file" in (tmp_path / "out.html").read_text()
    again, rows = run_batch(tmp_path)
    assert (again.extracted, rows) == (0, [row])  # run again, it changes nothing

    (tmp_path / "face.jpg").write_bytes(jpeg(portrait))
    (tmp_path / "li.jpg").write_bytes(prints[1])
    _, (row,) = run_batch(tmp_path)
    assert (row["status"], row["reason"], row["refusals"]) == ("enrolled", None, None)
    assert run_batch(tmp_path)[1] == [row]
