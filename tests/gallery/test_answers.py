"""What the gallery stores under an id: decisions, receipts of loads, and steps of jobs, each told apart whatever ids they hold."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import numpy as np
import pytest

import biodedup as bd
from biodedup.gallery.answers import LOADED, StoredDecision
from biodedup.gallery.care.copying import record
from biodedup.gallery.catalogue.chain import CHAIN_COLUMNS
from biodedup.testing import internals
from tests.support.galleries import PEOPLE, enroll, small
from tests.support.vectors import SFACE, again

ODD_IDS = ["added", "outcome", "review", 'x"added":1', '"outcome":"review"', "kind", "job", "loaded"]


@pytest.mark.slow
@pytest.mark.parametrize("sealed", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ODD_IDS)
def test_a_decision_is_found_whatever_the_ids_in_it_are(tmp_path, name, sealed):
    with bd.Engine.open(tmp_path / "g", small(seal_rows=64)) as engine:
        sent = bd.Encounter(name, templates={"face": PEOPLE[0]}, encounter_id=f"{name} 1", model_id=SFACE)
        first = engine.enroll(sent)
        second = bd.Encounter("other", templates={"face": again(PEOPLE[0], 0.95)}, encounter_id=name, model_id=SFACE)
        duplicate = engine.enroll(second)
        assert (first.outcome, duplicate.outcome, duplicate.best.subject_id) == ("unique", "duplicate", name)
        if sealed:
            engine.compact()
        assert engine.decision(f"{name} 1") == first
        assert engine.decision(name) == duplicate
        assert engine.enroll(second) == duplicate
        assert [case.encounter_id for case in engine.cases()] == []


@pytest.mark.slow
@pytest.mark.parametrize("sealed", [False, True])
def test_the_receipt_of_a_load_is_no_decision(tmp_path, sealed):
    with bd.Engine.open(tmp_path / "g", small(seal_rows=64)) as engine:
        assert engine.add_templates(["a", "b"], {"face": PEOPLE[:2]}, model_id=SFACE, encounter_id="batch") == 2
        if sealed:
            engine.compact()
        assert engine.decision("batch") is None
        assert engine.add_templates(["a", "b"], {"face": PEOPLE[:2]}, model_id=SFACE, encounter_id="batch") == 0
        with pytest.raises(bd.EncounterConflict):
            engine.enroll(bd.Encounter("c", templates={"face": PEOPLE[2]}, encounter_id="batch", model_id=SFACE))
        assert internals(engine).gallery.answer("batch").kind == "load"
        assert engine.info()["encounters"] == {LOADED: 1}


@pytest.mark.slow
def test_steps_of_jobs_are_no_encounters_and_outlive_sealing(tmp_path):
    with bd.Engine.open(tmp_path / "g", small(seal_rows=64)) as engine:
        gallery = internals(engine).gallery
        record(gallery, "merge:m:begun")
        record(gallery, "merge:m:begun", again=True)  # changes nothing
        with gallery.transaction() as transaction:
            transaction.record_step("merge:m:removed", {"removed": 3})
        first = enroll(engine, 0)
        engine.compact()
        assert gallery.snapshot().job_step("merge:m:begun") == {}
        assert gallery.snapshot().job_step("merge:m:removed") == {"removed": 3}
        assert gallery.snapshot().job_step("merge:m:applied") is None
        assert gallery.snapshot().job_step("e0") is None
        assert engine.info()["encounters"] == {"unique": 1}
        assert engine.decision("merge:m:begun") is None
        assert engine.problems() == []
    with bd.Engine.open(tmp_path / "g", small(), read_only=True) as engine:
        assert internals(engine).gallery.snapshot().job_step("merge:m:removed") == {"removed": 3}
        assert engine.decision("e0") == first


def noted_as_before(engine: bd.Engine, name: str, **facts: object) -> None:
    """A step of a job as releases before kept it: the answer of an encounter."""
    with internals(engine).gallery.transaction() as transaction:
        transaction.record(name, StoredDecision(b"", "merged", json.dumps({"added": 0} | facts)))


@pytest.mark.slow
@pytest.mark.parametrize("sealed", [False, True])
def test_steps_that_were_noted_as_encounters_are_found(tmp_path, sealed):
    with bd.Engine.open(tmp_path / "g", small(seal_rows=64)) as engine:
        noted_as_before(engine, "merge:m:begun")
        noted_as_before(engine, "merge:m:completed:0", first_row=1, end_row=2)
        enroll(engine, 0)
        if sealed:
            engine.compact()
        gallery = internals(engine).gallery
        assert gallery.snapshot().job_step("merge:m:completed:0") == {"added": 0, "first_row": 1, "end_row": 2}
        assert gallery.snapshot().job_step("merge:m:begun") == {"added": 0}
        assert engine.decision("merge:m:begun") is None
        record(gallery, "merge:m:begun")  # noted already
        assert gallery.snapshot().job_step("merge:m:begun") == {"added": 0}


def test_a_gallery_without_the_table_of_steps_gets_it_from_its_first_writer(tmp_path):
    with bd.Engine.open(tmp_path / "g", small()) as engine:
        noted_as_before(engine, "merge:m:begun")
        enroll(engine, 0)
    with closing(sqlite3.connect(tmp_path / "g" / "gallery.sqlite3")) as database, database:
        for table in ("job_step", *CHAIN_COLUMNS):  # that gallery had no hash chain either
            database.execute(f"DROP TABLE {table}")
        database.execute("DELETE FROM meta WHERE key IN ('job_steps', 'chain')")
    with bd.Engine.open(tmp_path / "g", small(), read_only=True) as engine:
        assert internals(engine).gallery.snapshot().job_step("merge:m:begun") == {"added": 0}
        assert internals(engine).gallery.snapshot().job_step("merge:m:applied") is None
        assert engine.problems() == []
    with bd.Engine.open(tmp_path / "g", small()) as engine:
        record(internals(engine).gallery, "merge:m:applied")
        assert internals(engine).gallery.snapshot().job_step("merge:m:applied") == {}
        assert engine.problems() == []
    with closing(sqlite3.connect(tmp_path / "g" / "gallery.sqlite3")) as database, database:
        database.execute("DROP TABLE job_step")
    with pytest.raises(bd.GalleryDamaged, match="job_step"), bd.Engine.open(tmp_path / "g", small()) as engine:
        internals(engine).gallery.snapshot().job_step("merge:m:applied")


@pytest.mark.parametrize(
    "text", ["", "[]", "7", "{", '{"added":1', "null", '"added"', '{"outcome": 7}', '{"outcome": null}']
)
def test_a_stored_answer_that_was_never_written_is_damage(text):
    with pytest.raises(bd.GalleryDamaged):
        StoredDecision.read(b"x", text)


def test_a_merge_that_copied_rows_says_so_of_itself_alone(tmp_path):
    with bd.Engine.open(tmp_path / "g", small(seal_rows=64)) as engine:
        record(internals(engine).gallery, "added", added=np.int64(3).item())
        assert internals(engine).gallery.snapshot().job_step("added") == {"added": 3}
        assert engine.decision("added") is None
