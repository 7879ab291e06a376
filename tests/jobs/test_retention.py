"""Retention: what the policy keeps no longer leaves every file, and nothing else does."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.testing import internals
from tests.support.faults import Countdown, FailingStorage
from tests.support.galleries import PEOPLE, enroll, small
from tests.support.minutiae import record, strewn
from tests.support.vectors import SFACE

DAY = 86_400.0
POLICY = bd.Policy(duplicate_db=60, review_db=10, required=("face",), keep_refused_days=30, keep_cases_days=90)
NOW = 200 * DAY


def config(**more: object) -> bd.Config:
    """Without an audit log, which keeps the ids of encounters that are erased."""
    return replace(small(**more), policy=POLICY, audit="none")


def near(i: int, other: int) -> np.ndarray:
    return (0.45 * PEOPLE[i] + np.sqrt(1 - 0.45**2) * PEOPLE[other]).astype(np.float32)


def enrol(engine: bd.Engine, name: str, vector: np.ndarray | None) -> str:
    """Without a vector: a finger alone, which the policy refuses."""
    finger = bd.Template("right_index", "external-minutiae", None, record(strewn(20, seed=1)))
    templates = {"right_index": finger} if vector is None else {"face": bd.Template("face", SFACE, vector)}
    return engine.enroll(bd.Encounter(name, templates=templates, encounter_id=f"visit-{name}")).outcome


def a_year(folder: Path, settings: bd.Config) -> None:
    """Refused on days 0 and 180, cases closed on day 10 and 150 and open since day 5, and people who stay."""
    today = [0.0]
    with bd.Engine.open(folder, settings, clock=lambda: today[0]) as engine:
        for i in range(6):
            enroll(engine, i)
        assert enrol(engine, "refused-early", None) == "refused"
        today[0] = 5 * DAY
        for name, i in (("case-early", 0), ("case-late", 1), ("case-open", 2)):
            assert enrol(engine, name, near(i, 40 + i)) == "review"
        engine.seal()
        today[0] = 10 * DAY
        engine.adjudicate("visit-case-early", "same", by="anna")
        today[0] = 150 * DAY
        engine.adjudicate("visit-case-late", "different", by="anna")
        today[0] = 180 * DAY
        assert enrol(engine, "refused-late", None) == "refused"
        enroll(engine, 7)


def decided(folder: Path, settings: bd.Config) -> dict[str, str]:
    with bd.Engine.open(folder, settings, read_only=True, clock=lambda: NOW) as engine:
        return {decision.encounter_id: decision.outcome for decision in engine.decisions()}


@pytest.fixture(scope="module")
def year(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("year") / "g"
    a_year(folder, config())
    return folder


@pytest.mark.slow
def test_what_is_due_leaves_every_file_and_all_else_stays(year, tmp_path):
    folder = tmp_path / "g"
    shutil.copytree(year, folder)
    before = decided(folder, config())
    assert jobs.retention_plan(folder, config(), clock=lambda: NOW) == jobs.RetentionPlan(
        ("visit-refused-early",), ("visit-case-early",), ("visit-case-open",)
    )
    assert decided(folder, config()) == before, "a plan erases nothing"
    key = tmp_path / "auditor.key"
    jobs.make_signing_key(key)
    result = jobs.run_retention(folder, config(), key=key, receipt=tmp_path / "r.json", clock=lambda: NOW)
    assert (result.refused, result.cases, result.waiting, result.problems) == (1, 1, 1, ())
    assert decided(folder, config()) == {
        name: outcome for name, outcome in before.items() if name not in ("visit-refused-early", "visit-case-early")
    }
    content = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    for gone in (b"refused-early", b"case-early"):
        assert gone not in content
    assert b"case-late" in content
    with bd.Engine.open(folder, config(), clock=lambda: NOW) as engine:
        assert engine.problems() == []
        assert {f"s{i}" for i in (0, 1, 2, 3, 4, 5, 7)} | {"case-late"} == set(engine.subject_ids())
        assert [case.encounter_id for case in engine.cases()] == ["visit-case-open"]
        engine.adjudicate("visit-case-open", "same", by="anna")
        assert enrol(engine, "case-early", PEOPLE[50]) == "unique", "its encounter_id is free again"
    assert jobs.verify_log(folder, config()).problems == ()
    text = (tmp_path / "r.json").read_text()
    assert "early" not in text
    assert json.loads(text)["chain"] == result.chain
    again = jobs.run_retention(folder, config(), clock=lambda: NOW)
    assert (again.refused, again.cases, again.number, again.segments) == (0, 0, None, 0)


def test_the_template_of_a_closed_case_leaves_with_it(year, tmp_path):
    folder = tmp_path / "g"
    shutil.copytree(year, folder)
    jobs.run_retention(folder, config(), clock=lambda: NOW)
    with bd.Engine.open(folder, config(), read_only=True) as engine:
        parts = internals(engine).gallery.snapshot().parts
        rows = np.concatenate(
            [part.columns["face"].vectors(0, part.columns["face"].count) for part in parts if part.columns]
        )
    cosines = rows @ near(0, 40)
    assert cosines.max() < 0.9
    assert (rows @ near(1, 41)).max() > 0.99


def test_without_limits_nothing_is_due(year, tmp_path):
    folder = tmp_path / "g"
    shutil.copytree(year, folder)
    with bd.Engine.open(folder, config(), clock=lambda: NOW) as engine:
        engine.set_policy(replace(POLICY, keep_refused_days=None, keep_cases_days=None), by="anna", reason="keep")
    assert jobs.retention_plan(folder, small(), clock=lambda: NOW) == jobs.RetentionPlan((), (), ())
    with pytest.raises(bd.InvalidInput, match="keep_cases_days"):
        bd.Policy(keep_cases_days=-1)
    with pytest.raises(bd.InvalidInput, match="must be given together"):
        jobs.run_retention(folder, small(), key=tmp_path / "x")


def test_where_identities_are_configured_a_run_is_an_administrators_and_recorded_as_his(year, tmp_path):
    folder = tmp_path / "g"
    shutil.copytree(year, folder)
    who = replace(config(), identities={"anna": "administer audit", "budi": "supervise"}, audit="all")
    for by in ("", "budi", "citra"):
        with pytest.raises(bd.NotAllowed):
            jobs.run_retention(folder, who, clock=lambda: NOW, by=by)
    assert len(decided(folder, config())) == 12
    assert jobs.run_retention(folder, who, clock=lambda: NOW, by="anna").cases == 1
    with bd.Engine.open(folder, who, read_only=True) as engine:
        (record,) = engine.audit_records(principal="anna")
    assert (record.call, record.outcome) == ("run_retention", "done")


def test_a_run_makes_no_gallery_of_a_mistyped_name(tmp_path):
    with pytest.raises(bd.NotAGallery):
        jobs.run_retention(tmp_path / "galery", config())
    assert not (tmp_path / "galery").exists()


@pytest.mark.slow
def test_an_encounter_that_was_refused_and_then_enrolled_keeps_its_decision(tmp_path):
    today = [0.0]
    with bd.Engine.open(tmp_path / "g", config(), clock=lambda: today[0]) as engine:
        assert enrol(engine, "sent-twice", None) == "refused"
        engine.seal()
        today[0] = DAY
        assert enrol(engine, "sent-twice", PEOPLE[3]) == "unique"
        engine.seal()
    assert jobs.run_retention(tmp_path / "g", config(), clock=lambda: NOW).refused == 1
    assert decided(tmp_path / "g", config()) == {"visit-sent-twice": "unique"}


@pytest.mark.slow
def test_a_run_that_fails_anywhere_is_ended_by_the_next(year, tmp_path):
    wanted = None
    for n in itertools.count(2, 13):
        folder = tmp_path / f"g{n}"
        shutil.copytree(year, folder)
        countdown = Countdown(n)
        try:
            with bd.Engine.open(folder, config(), clock=lambda: NOW, storage=FailingStorage(countdown)) as engine:
                engine.run_retention()
        except bd.StorageUnavailable:
            pass
        result = jobs.run_retention(folder, config(), clock=lambda: NOW)
        assert result.problems == (), n
        with bd.Engine.open(folder, config(), read_only=True) as engine:
            assert engine.problems() == []
        wanted = wanted or decided(folder, config())
        assert decided(folder, config()) == wanted
        shutil.rmtree(folder)
        if countdown.left > 0:
            break
    assert n > 20
    assert "visit-case-early" not in wanted
