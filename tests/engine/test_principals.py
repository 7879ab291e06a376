"""Callers by name: their roles, calls that need two people, and the right to hand out templates."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

import biodedup as bd
from biodedup.engine.callers.approvals import OPEN_S
from biodedup.testing import internals
from tests.support.vectors import SFACE, again, people

PEOPLE = people(8, seed=5)
EVERYBODY = {name: " ".join(bd.ROLES) for name in ("anna", "budi")} | {"kiosk": "verify"}
BOTH = bd.Policy(two_people=("remove", "replace", "adjudicate", "policy"))


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def opened(tmp_path: Path, clock: Clock):
    engines = []

    def open_it(policy: bd.Policy | None = None, **settings: Any) -> bd.Engine:
        engine = bd.Engine.open(tmp_path / "gallery", bd.Config(policy=policy, **settings), clock=clock)
        engines.append(engine)
        if not len(engine):
            engine.add_templates([f"s{i}" for i in range(8)], {"face": PEOPLE}, model_id=SFACE)
        return engine

    yield open_it
    for engine in engines:
        engine.close()


def seen(i: int, subject_id: str | None = None, seed: int = 1, cosine: float = 0.8, **more) -> bd.Encounter:
    vector = again(PEOPLE[i : i + 1], cosine, seed)[0]
    return bd.Encounter(subject_id, templates={"face": vector}, model_id=SFACE, **more)


def acting(engine: bd.Engine, name: str, *roles: str) -> bd.Engine:
    return engine.as_principal(bd.Principal(name, roles or bd.ROLES))


CALLS = {
    "enrol": lambda e: (e.enroll(seen(1, "new")), e.update(seen(1, "s1")), list(e.enroll_many([]))),
    "search": lambda e: (e.identify(seen(1)), e.search({"face": PEOPLE[:1]})),
    "verify": lambda e: (e.verify(seen(1), "s1"),),
    "review": lambda e: (list(e.cases()), e.verdicts()),
    "supervise": lambda e: (
        e.remove("s7"),
        e.update(seen(1, "s1"), replace=True, reason="new"),
        e.end_lockout("x", "s1"),
    ),
    "administer": lambda e: (e.set_policy(bd.Policy(), reason="same"), e.seal(), e.templates("s1"), e.encounters("s1")),
    "audit": lambda e: (list(e.decisions()), e.policies(), e.alarms(), e.approvals(), e.info()),
}
EACH = [
    ("enrol", lambda e: e.enroll(seen(1, "new"))),
    ("enrol", lambda e: e.update(seen(1, "s1"))),
    ("enrol", lambda e: list(e.enroll_many([seen(1, "new")]))),
    ("enrol", lambda e: e.dispute(seen(1, "s1"))),
    ("search", lambda e: e.identify(seen(1))),
    ("search", lambda e: e.search({"face": PEOPLE[:1]})),
    ("verify", lambda e: e.verify(seen(1), "s1")),
    ("review", lambda e: list(e.cases())),
    ("review", lambda e: e.adjudicate("visit", "same")),
    ("supervise", lambda e: e.remove("s7")),
    ("supervise", lambda e: e.update(seen(1, "s1"), replace=True, reason="new")),
    ("supervise", lambda e: e.end_lockout("x", "s1")),
    ("administer", lambda e: e.set_policy(bd.Policy(fpir=1e-6), reason="test")),
    ("administer", lambda e: e.add_templates(["x"], {"face": PEOPLE[:1]})),
    ("administer", lambda e: e.import_captures([seen(1, "x")])),
    ("administer", lambda e: e.templates("s1")),
    ("administer", lambda e: e.unrestricted()),
    ("administer", lambda e: e.find_duplicates()),
    ("audit", lambda e: list(e.decisions())),
]


@pytest.mark.slow
@pytest.mark.parametrize("role", bd.ROLES)
def test_a_role_allows_its_calls(opened, role):
    CALLS[role](acting(opened(), "anna", role))


def test_no_call_is_allowed_by_other_roles_and_nothing_is_done(opened):
    engine = opened()
    version = engine.gallery_version
    for role, call in EACH:
        others = acting(
            engine,
            "anna",
            *(set(bd.ROLES) - {role} - ({"audit"} if role == "review" else {"review"} if role == "audit" else set())),
        )
        with pytest.raises(bd.NotAllowed, match=role):
            call(others)
    assert engine.gallery_version == version


def test_every_public_method_of_an_engine_asks_for_a_role_or_is_named_here(opened):
    harmless = {
        "as_principal",
        "check_open",
        "close",
        "config",
        "folder",
        "gallery_version",
        "open",
        "pairs",
        "policy",
        "refresh",
    }
    deprecated = {"admit", "tidy"}
    nobody = acting(opened(), "nobody", "verify")
    arguments: dict[str, tuple[Any, ...]] = {
        "add_templates": (["x"], {"face": PEOPLE[:1]}),
        "adjudicate": ("visit", "same"),
        "archive_audit": ("old.audit",),
        "archived_audit": ("old.audit",),
        "are_enrolled": (["s1"],),
        "backup": ("copy",),
        "case": ("visit",),
        "decision": ("visit",),
        "dispute": (seen(1, "s1"),),
        "encounters": ("s1",),
        "end_lockout": ("x", "s1"),
        "enroll": (seen(1, "x"),),
        "enroll_many": ([],),
        "identify": (seen(1),),
        "import_captures": ([],),
        "index": ("face",),
        "load_templates": (["x"], {"face": PEOPLE[:1]}),
        "notes": (0.0,),
        "recall": (seen(1, "x"),),
        "receipt": ("visit",),
        "reindex": ("native",),
        "remove": ("s1",),
        "rows_of": (["s1"],),
        "search": ({"face": PEOPLE[:1]},),
        "subject": ("s1",),
        "subjects_of_rows": ([1],),
        "templates": ("s1",),
        "update": (seen(1, "s1"),),
    }
    for name in set(dir(bd.Engine)) - harmless - deprecated - {"verify"}:
        if name.startswith("_"):
            continue
        with pytest.raises(bd.NotAllowed):
            given = {"set_policy": {"policy": bd.Policy(), "reason": "x"}, "archive_audit": {"before": 0.0}}.get(
                name, {}
            )
            answer = getattr(nobody, name)(*arguments.get(name, ()), **given)
            list(answer)  # a generator asks when it is first read


def test_a_role_that_is_not_known_is_a_mistake():
    with pytest.raises(bd.InvalidInput, match="'root'"):
        bd.Principal("anna", ["root"])
    with pytest.raises(bd.InvalidInput, match="put it in a list"):
        bd.Principal("anna", "verify")


def test_a_principal_cannot_take_another_ones_engine(opened):
    with pytest.raises(bd.NotAllowed):
        acting(opened(), "kiosk", "verify").as_principal(bd.Principal("chief", bd.ROLES))


def test_a_trace_shows_a_principal_no_more_than_the_policy_discloses(opened):
    engine = opened(bd.Policy(disclosure="coarse"))
    with bd.explain(), pytest.raises(bd.NotAllowed, match="audit"):
        acting(engine, "kiosk", "verify").verify(seen(1), "s1")


def test_closing_one_engine_closes_the_other(opened):
    engine = opened()
    kiosk = acting(engine, "kiosk", "verify")
    engine.close()
    with pytest.raises(bd.EngineClosed):
        kiosk.verify(seen(1), "s1")


# names ----------------------------------------------------------------------------------------------------------------


def in_review(engine: bd.Engine) -> None:
    decision = engine.enroll(seen(1, "new", cosine=0.6, encounter_id="visit"))
    assert decision.outcome == "review"


REVIEWING = {"duplicate_db": 110.0, "duplicate_floor_db": 110.0, "review_db": 30.0}


def test_with_identities_by_is_one_of_them_with_the_role(opened):
    engine = opened(bd.Policy(**REVIEWING), identities=EVERYBODY)
    in_review(engine)
    for by in ("somebody", "kiosk", ""):
        with pytest.raises(bd.NotAllowed):
            engine.adjudicate("visit", "same", by)
        with pytest.raises(bd.NotAllowed):
            engine.set_policy(bd.Policy(), by=by, reason="x")
    engine.adjudicate("visit", "same", "anna")
    assert [verdict.by for verdict in engine.verdicts()] == ["anna"]
    for principal in ("somebody", bd.Principal("somebody"), bd.Principal("kiosk", ["review"])):
        with pytest.raises(bd.NotAllowed):
            engine.as_principal(principal)
    assert engine.as_principal("kiosk").verify(seen(1), "s1").accepted


def test_a_principals_verdict_has_its_name_whatever_it_says(opened):
    engine = opened(bd.Policy(**REVIEWING))
    in_review(engine)
    with pytest.raises(bd.NotAllowed, match="budi"):
        acting(engine, "anna").adjudicate("visit", "same", "budi")
    acting(engine, "anna").adjudicate("visit", "same")
    assert [verdict.by for verdict in engine.verdicts()] == ["anna"]


@pytest.mark.parametrize("wrong", [{"anna": "root"}, {"anna ": "verify"}])
def test_identities_are_checked(wrong):
    with pytest.raises(bd.InvalidInput):
        bd.Config(identities=wrong)


def test_identities_are_not_stored_with_the_gallery():
    stored = bd.Config(identities=EVERYBODY, allow_template_export=True).to_dict()
    assert stored == bd.Config().to_dict()


# two people -----------------------------------------------------------------------------------------------------------


def needs_two(call) -> bd.ApprovalNeeded:
    with pytest.raises(bd.ApprovalNeeded) as raised:
        call()
    return raised.value


def test_a_removal_waits_for_a_second_person(opened, clock):
    engine = opened(BOTH)
    anna, budi = acting(engine, "anna"), acting(engine, "budi")
    assert needs_two(lambda: anna.remove("s1")).number == 1
    assert needs_two(lambda: anna.remove("s1")).number == 1  # the same person again is no second one
    assert "s1" in engine
    needs_two(lambda: budi.remove("s1", "s2"))  # another request
    clock.now += 60
    budi.remove("s1")
    assert "s1" not in engine and "s2" in engine
    first, second = engine.approvals()
    assert (first.action, dict(first.facts)) == ("remove", {"subject_ids": ["s1"]})
    assert (first.requested_by, first.approved_by, first.approved_at) == ("anna", "budi", clock.now)
    assert second.approved_by is None


def test_without_a_name_nothing_that_needs_two_people_is_done(opened):
    engine = opened(BOTH)
    for call in (
        lambda: engine.remove("s1"),
        lambda: engine.update(seen(1, "s1"), replace=True, reason="new"),
        lambda: engine.set_policy(bd.Policy(), by="anna", reason="x"),
    ):
        with pytest.raises(bd.NotAllowed, match="two people"):
            call()


def test_an_approval_counts_once_and_for_what_was_enrolled_when_it_was_asked_for(opened):
    engine = opened(BOTH)
    anna, budi = acting(engine, "anna"), acting(engine, "budi")
    needs_two(lambda: anna.remove("s1"))
    engine.update(seen(1, "s1"))  # another row
    needs_two(lambda: budi.remove("s1"))
    anna.remove("s1")
    engine.import_captures([seen(1, "s1")])
    needs_two(lambda: anna.remove("s1"))
    assert "s1" in engine


def test_a_request_ends_after_a_week_and_outlives_the_process(opened, clock):
    with opened(BOTH) as engine:
        needs_two(lambda: acting(engine, "anna").remove("s1"))
        needs_two(lambda: acting(engine, "anna").remove("s2"))
    engine = opened()
    clock.now += OPEN_S - 1
    acting(engine, "budi").remove("s1")
    clock.now += 2
    needs_two(lambda: acting(engine, "budi").remove("s2"))
    assert "s2" in engine


def test_a_replacement_needs_the_same_captures_from_both(opened):
    engine = opened(BOTH)

    def replaced(name: str, seed: int, reason: str = "burnt") -> bd.Decision:
        return acting(engine, name).update(seen(1, "s1", seed), replace=True, reason=reason)

    needs_two(lambda: replaced("anna", 1))
    needs_two(lambda: replaced("budi", 2))
    needs_two(lambda: replaced("budi", 1, "another reason"))
    assert replaced("budi", 1).outcome == "unique"
    assert all("embedding" not in str(request.facts) for request in engine.approvals())
    assert acting(engine, "budi").update(seen(1, "s1", seed=3)).outcome == "unique"  # an ordinary update needs one


def test_a_replacement_that_is_sent_again_gets_its_first_answer(opened):
    engine = opened(BOTH)

    def replaced(name: str) -> bd.Decision:
        visit = seen(1, "s1", encounter_id="visit")
        return acting(engine, name).update(visit, replace=True, reason="burnt")

    needs_two(lambda: replaced("anna"))
    decision = replaced("budi")
    assert replaced("budi") == replaced("anna") == decision


def test_a_verdict_and_a_policy_need_two(opened):
    engine = opened(bd.Policy(**REVIEWING, two_people=("adjudicate", "policy")))
    in_review(engine)
    anna, budi = acting(engine, "anna"), acting(engine, "budi")
    needs_two(lambda: anna.adjudicate("visit", "same"))
    needs_two(lambda: budi.adjudicate("visit", "different"))
    assert budi.adjudicate("visit", "same").outcome == "duplicate"
    needs_two(lambda: anna.set_policy(bd.Policy(), reason="alone again"))
    needs_two(lambda: budi.set_policy(bd.Policy(fpir=1e-4), reason="alone again"))
    assert engine.policy.two_people == ("adjudicate", "policy")
    assert budi.set_policy(bd.Policy(), reason="alone again").by == "budi"
    engine.remove("s1")


@pytest.mark.parametrize("wrong", [("everything",), "remove"])
def test_a_policy_refuses_actions_that_it_does_not_know(wrong):
    with pytest.raises(bd.InvalidInput, match="two_people"):
        bd.Policy(two_people=wrong)


# templates ------------------------------------------------------------------------------------------------------------


def test_templates_are_handed_out_as_before_and_logged(opened, caplog):
    engine = opened()
    with caplog.at_level(logging.INFO, "biodedup"):
        assert set(engine.templates("s1")) == {"face"}
    (record,) = [r for r in caplog.records if "handed out" in r.message]
    assert record.levelname == "INFO" and "s1" not in record.message


def test_with_identities_they_are_handed_out_with_a_warning_unless_it_is_stated(opened, caplog):
    with opened(identities=EVERYBODY) as engine:
        engine.as_principal("anna").templates("s1")
    (record,) = [r for r in caplog.records if "handed out" in r.message]
    assert record.levelname == "WARNING"
    caplog.clear()
    opened(identities=EVERYBODY, allow_template_export=True).templates("s1")
    assert "handed out" not in caplog.text


def test_an_engine_that_may_not_hands_out_none(opened, tmp_path):
    engine = opened(allow_template_export=False)
    for call in (engine.templates, engine.encounters):
        with pytest.raises(bd.NotAllowed, match="allow_template_export"):
            call("s1")
    assert engine.subject("s1").encounters[0].templates == {}
    with pytest.raises(bd.NotAllowed):
        bd.jobs.export_gallery(tmp_path / "gallery", tmp_path / "files", engine.config)
    assert engine.verify(seen(1), "s1").accepted


def test_an_approval_is_carried_out_in_the_commit_that_stores_it(opened, monkeypatch):
    """The target changes after the approval was looked up and before the removal: there is no such moment."""
    engine = opened(BOTH)
    anna, budi = acting(engine, "anna"), acting(engine, "budi")
    with pytest.raises(bd.ApprovalNeeded):
        anna.remove("s1")
    commits = []
    catalogue = internals(engine).catalogue
    commit = catalogue.commit
    monkeypatch.setattr(catalogue, "commit", lambda: (commit(), commits.append(1)))
    budi.remove("s1")
    assert len(commits) == 1 and "s1" not in engine


@pytest.mark.parametrize("other", ["ANNA", "\uff41nna", "anna "])
def test_another_spelling_is_not_another_person(opened, other):
    engine = opened(BOTH)
    with pytest.raises(bd.ApprovalNeeded):
        acting(engine, "anna").remove("s1")
    with pytest.raises((bd.ApprovalNeeded, bd.InvalidInput)):
        acting(engine, other).remove("s1")
    assert "s1" in engine
    with pytest.raises(bd.InvalidInput, match="differ in case alone"):
        bd.Config(identities={"anna": "enrol", "ANNA": "supervise"})


def test_an_override_of_the_policy_does_not_end_the_rule_of_two_people(opened, tmp_path, clock):
    opened(BOTH).close()
    config = bd.Config(policy=bd.Policy())
    with bd.Engine.open(tmp_path / "gallery", config, override_policy=True, clock=clock) as engine:
        with pytest.raises(bd.ApprovalNeeded):
            acting(engine, "anna").remove("s1")
        with pytest.raises(bd.NotAllowed):
            engine.remove("s1")


def test_an_import_replaces_no_subject_past_the_rule_of_two_people(opened):
    engine = opened(BOTH)
    with pytest.raises(bd.NotAllowed, match="supervise"):
        acting(engine, "anna", "administer").import_captures([seen(1, "s2")])
    with pytest.raises(bd.NotAllowed, match="two people"):
        acting(engine, "anna").import_captures([seen(1, "s2")])
    assert acting(engine, "anna").import_captures([seen(1, "new")])[0].outcome == "unique"


def test_a_trace_that_begins_between_two_batches_needs_the_role_audit(opened):
    engine = opened(bd.Policy(disclosure="coarse"), batch_size=1)
    stream = acting(engine, "kiosk", "enrol").enroll_many([seen(1, "x1"), seen(2, "x2"), seen(3, "x3")])
    next(stream)
    with bd.explain(), pytest.raises(bd.NotAllowed, match="audit"):
        list(stream)
