"""Approvals by two people: signed, in the commit that carries the call out, and checked by `log verify`."""

from __future__ import annotations

from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

import biodedup as bd
from biodedup import jobs
from biodedup.gallery.catalogue.approvals import approval_content
from biodedup.gallery.catalogue.sqlite import row_checksum
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.testing import internals
from tests.support.faults import Countdown, FailingStorage
from tests.support.vectors import SFACE, again, people

PEOPLE = people(8, seed=5)
KEY = bytes(range(1, 33))
NOW = 1_800_000_000.0
EVERY = " ".join(bd.ROLES)
REVIEWING = {"duplicate_db": 110.0, "duplicate_floor_db": 110.0, "review_db": 30.0}
ALL = ("remove", "replace", "adjudicate", "policy", "index")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """name -> the file of a private key, and its public key."""
    folder = tmp_path_factory.mktemp("keys")
    return {name: (folder / f"{name}.key", jobs.make_signing_key(folder / f"{name}.key")) for name in ("anna", "budi")}


@pytest.fixture
def identities(keys):
    return {name: f"{EVERY} ed25519:{public}" for name, (_, public) in keys.items()} | {"citra": EVERY}


@pytest.fixture
def opened(tmp_path: Path, identities):
    engines = []

    def open_it(storage: Any = None, **settings: Any) -> bd.Engine:
        config = bd.Config(**({"identities": identities} | settings))
        policy = bd.Policy(**REVIEWING, two_people=ALL)
        if not (tmp_path / "g").exists():
            config = bd.Config(**({"identities": identities, "policy": policy} | settings))
        engine = bd.Engine.open(tmp_path / "g", config, clock=lambda: NOW, storage=storage)
        engines.append(engine)
        if not len(engine):
            engine.add_templates([f"s{i}" for i in range(4)], {"face": PEOPLE[:4]}, model_id=SFACE)
        return engine

    yield open_it
    for engine in engines:
        engine.close()


def seen(i: int, subject_id: str | None = None, seed: int = 1, cosine: float = 0.8, **more) -> bd.Encounter:
    vector = again(PEOPLE[i : i + 1], cosine, seed)[0]
    return bd.Encounter(subject_id, templates={"face": vector}, model_id=SFACE, **more)


def asked(call) -> None:
    with pytest.raises(bd.ApprovalNeeded):
        call()


CALLS = {
    "remove": lambda e: e.remove("s1"),
    "replace": lambda e: e.update(seen(1, "s1"), replace=True, reason="burnt"),
    "adjudicate": lambda e: e.adjudicate("visit", "same"),
    "policy": lambda e: e.set_policy(bd.Policy(fpir=1e-6), reason="fewer"),
}


@pytest.mark.slow
@pytest.mark.parametrize("action", CALLS)
def test_an_approval_and_what_it_allows_are_one_commit(opened, action, tmp_path):
    countdown = Countdown(0)
    engine = opened(FailingStorage(countdown), identities={"citra": EVERY, "dewi": EVERY}, audit="changes")
    assert engine.enroll(seen(2, "new", cosine=0.6, encounter_id="visit")).outcome == "review"
    asked(lambda: CALLS[action](engine.as_principal("citra")))
    commits, n = internals(engine).commits, 0
    while engine.approvals()[0].approved_by is None:
        n += 1
        countdown.left = n
        with suppress(bd.StorageUnavailable):
            CALLS[action](engine.as_principal("dewi"))
        countdown.left = 0
        assert (internals(engine).commits == commits) is (engine.approvals()[0].approved_by is None)
    assert n > 1
    assert internals(engine).commits == commits + 1
    engine.close()
    assert not jobs.verify_log(tmp_path / "g").problems


def test_an_approval_is_signed_by_the_private_key_of_the_principal(opened, keys, tmp_path, identities):
    engine = opened()
    anna = engine.as_principal("anna", key=keys["anna"][0])
    asked(lambda: anna.remove("s1"))
    engine.as_principal("budi", key=keys["budi"][0]).remove("s1")
    assert [(a.approved_by, a.signed) for a in engine.approvals()] == [("budi", "ed25519")]
    with internals(engine).gallery.transaction() as transaction:
        catalogue = transaction.caller_tables(noted=False)
        (row,), signatures = catalogue.approvals(), catalogue.approval_signatures()
    for (name, state), (_, _, by, method, key, signature) in zip(
        [("anna", (*row[:6], None, None)), ("budi", row)], signatures, strict=True
    ):
        assert (by, method, key) == (name, "ed25519", keys[name][1])
        content = approval_content(internals(engine).gallery.gallery_id, state)
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(signature, content)  # raises if it is wrong
    engine.close()
    report = jobs.verify_log(tmp_path / "g", bd.Config(identities=identities))
    assert (report.problems, report.notes) == ((), ())


def test_one_key_is_one_person(keys):
    (_, public) = keys["anna"]
    with pytest.raises(bd.InvalidInput, match="same public key"):
        bd.Config(identities={"anna": f"{EVERY} ed25519:{public}", "budi": f"{EVERY} ed25519:{public.upper()}"})


def test_a_principal_that_a_program_makes_signs_as_its_identity_does(opened, keys):
    engine = opened()
    with pytest.raises(bd.NotAllowed, match="private key"):
        engine.as_principal(bd.Principal("anna", ["supervise"])).remove("s1")
    with pytest.raises(bd.NotAllowed, match="not the private key"):
        engine.as_principal(bd.Principal("anna", ["supervise"], [keys["budi"][1]]), key=keys["budi"][0])


def test_a_principal_with_a_public_key_has_to_sign(opened, keys):
    engine = opened()
    with pytest.raises(bd.NotAllowed, match="private key was not given"):
        engine.as_principal("anna").remove("s1")
    asked(lambda: engine.as_principal("citra").remove("s1"))
    with pytest.raises(bd.NotAllowed, match="private key was not given"):
        engine.as_principal("anna").remove("s1")
    with pytest.raises(bd.NotAllowed, match="not the private key of 'anna'"):
        engine.as_principal("anna", key=keys["budi"][0])
    assert "s1" in engine


@pytest.mark.parametrize("keyed", [False, True])
def test_without_a_public_key_the_gallery_signs(opened, tmp_path, keyed):
    settings = {"keys": lambda: KEY} if keyed else {}
    settings["identities"] = {"citra": EVERY, "dewi": EVERY}
    engine = opened(**settings)
    asked(lambda: engine.as_principal("citra").remove("s1"))
    engine.as_principal("dewi").remove("s1")
    assert engine.approvals()[0].signed == ("hmac" if keyed else "sha256")
    engine.close()
    assert not jobs.verify_log(tmp_path / "g", bd.Config(**settings)).problems


def forged(tmp_path: Path, statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
    with closing(LocalStorage().connect(tmp_path / "g" / "gallery.sqlite3", read_only=False)) as database:
        return database.execute(statement, values).fetchall()


@pytest.mark.parametrize("column", [3, 4, 5, 6])
def test_a_changed_approval_is_named_by_its_signature(opened, keys, tmp_path, identities, column):
    engine = opened()
    asked(lambda: engine.as_principal("anna", key=keys["anna"][0]).remove("s1"))
    engine.as_principal("budi", key=keys["budi"][0]).remove("s1")
    engine.close()
    ((*row, _),) = forged(tmp_path, "SELECT * FROM approval")
    row[column] = NOW - 1 if column == 5 else '{"subject_ids": ["s2"]}' if column == 3 else "citra"
    forged(tmp_path, "DELETE FROM approval")
    forged(tmp_path, f"INSERT INTO approval VALUES ({','.join('?' * 9)})", (*row, row_checksum(row)))
    named = jobs.verify_log(tmp_path / "g", bd.Config(identities=identities)).problems
    assert any("approval 1 (remove)" in text and "is wrong" in text for text in named)


def test_a_signature_by_a_key_that_the_identities_do_not_state_is_named(opened, keys, tmp_path, identities):
    engine = opened(identities={"anna": identities["budi"].replace("budi", "anna"), "citra": EVERY})
    asked(lambda: engine.as_principal("anna", key=keys["budi"][0]).remove("s1"))
    engine.close()
    named = jobs.verify_log(tmp_path / "g", bd.Config(identities=identities)).problems
    assert named == (
        "request 1 (remove) of anna is signed with a key that the configured identities do not list for anna",
    )
    others = {"anna": f"audit ed25519:{keys['anna'][1]} ed25519:{keys['budi'][1]}"}  # its keys of before stay valid
    assert not jobs.verify_log(tmp_path / "g", bd.Config(identities=others)).problems


def test_a_request_that_another_call_approved_meanwhile_does_not_stand(opened):
    engine = opened(identities={"citra": EVERY, "dewi": EVERY})
    approvals = internals(engine).approvals
    asked(lambda: engine.as_principal("citra").remove("s1"))
    approve = approvals.require(
        "remove",
        bd.Principal("dewi", bd.ROLES),
        lambda: {"subject_ids": ["s1"]},
        lambda transaction: [[int(row) for row in transaction.snapshot().rows_under("s1")]],
    )
    engine.as_principal("dewi").remove("s1")
    with (
        pytest.raises(bd.ApprovalNeeded, match="is not valid any more"),
        internals(engine).gallery.transaction() as t,
    ):
        approve(t)


def test_another_index_engine_needs_two_people_and_going_on_with_it_one(opened):
    engine = opened(identities={"citra": EVERY, "dewi": EVERY})
    citra, dewi = engine.as_principal("citra"), engine.as_principal("dewi")
    asked(lambda: citra.reindex("faiss:Flat", force=True))
    assert engine.index("face") == "native"
    dewi.reindex("faiss:Flat", force=True)
    assert engine.index("face") == "faiss:Flat"
    citra.reindex("faiss:Flat", force=True)
    assert engine.approvals()[0].facts == {"index": {"*": "faiss:Flat"}, "force": True}


@pytest.mark.parametrize("wrong", ["supervise ed25519:12", "supervise ed25519:" + "g" * 64])
def test_a_public_key_of_an_identity_is_checked(wrong):
    with pytest.raises(bd.InvalidInput, match="not an Ed25519 public key"):
        bd.Config(identities={"anna": wrong})


# models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("two", [False, True])
def test_another_calibration_is_an_event_and_with_the_rule_two_people_accept_it(tmp_path, monkeypatch, two):
    policy = bd.Policy(two_people=("model",) if two else ())
    with bd.Engine.open(tmp_path / "g", bd.Config(policy=policy), clock=lambda: NOW) as engine:
        engine.add_templates(["s0"], {"face": PEOPLE[:1]}, model_id=SFACE)
        engine.add_templates(["s1"], {"face": PEOPLE[1:2]}, model_id=SFACE)
        (first,) = engine.bound_models()
        assert (first.model_id, first.at) == (SFACE, NOW)
        assert first.weights == internals(engine).extractor.cards[0].sha256
        assert engine.accept_models() == []
    changed = replace(internals(engine).extractor.cards[0], replay=0.123)
    monkeypatch.setattr("biodedup.embed.extractor.Extractor.cards", property(lambda extractor: (changed,)))
    assert changed.digest != first.digest
    with bd.Engine.open(tmp_path / "g", clock=lambda: NOW) as engine:
        if two:
            with pytest.raises(bd.NotAllowed, match="accept_models"):
                engine.remove("s0")
            assert "s0" in engine
            citra, dewi = (engine.as_principal(bd.Principal(name, bd.ROLES)) for name in ("citra", "dewi"))
            asked(citra.accept_models)
            assert len(engine.bound_models()) == 1
            assert dewi.accept_models() == [SFACE]
        engine.remove("s0")
        assert [bound.digest for bound in engine.bound_models()] == [first.digest, changed.digest]
    assert not jobs.verify_log(tmp_path / "g").problems


# jobs -------------------------------------------------------------------------------------------------------------


def kept(folder: Path, two_people: tuple[str, ...], count: int = 3, prefix: str = "s", **settings: Any) -> Path:
    """A small gallery."""
    with bd.Engine.open(folder, bd.Config(policy=bd.Policy(two_people=two_people), **settings)) as engine:
        engine.add_templates([f"{prefix}{i}" for i in range(count)], {"face": PEOPLE[:count]}, model_id=SFACE)
    return folder


def recorded(folder: Path, config: bd.Config) -> list[tuple[str, str, str]]:
    with bd.Engine.open(folder, config, read_only=True) as engine:
        return [(r.principal, r.call, r.outcome) for r in engine.audit_records() if r.principal in config.identities]


def test_the_key_of_a_gallery_is_set_rotated_and_taken_away_by_two_people(tmp_path):
    folder, other = kept(tmp_path / "g", ("key",)), bytes(32)
    who = bd.Config(identities={"citra": EVERY, "dewi": EVERY, "kiosk": "enrol"})
    steps = [
        (lambda **by: jobs.encrypt(folder, lambda: KEY, who, **by), None),
        (lambda **by: jobs.rotate_key(folder, lambda: KEY, lambda: other, who, **by), lambda: KEY),
        (lambda **by: jobs.decrypt(folder, lambda: other, who, **by), lambda: other),
    ]
    for step, _ in steps:
        before = jobs.key_status(folder)
        for by in ("kiosk", "somebody", ""):
            with pytest.raises(bd.NotAllowed):
                step(by=by)
        asked(lambda step=step: step(by="citra"))
        asked(lambda step=step: step(by="citra"))
        assert jobs.key_status(folder) == before
        assert step(by="dewi") != before
    assert not jobs.key_status(folder).encrypted
    done = [(principal, outcome) for principal, call, outcome in recorded(folder, who) if call == "key"]
    assert done == [("citra", "ApprovalNeeded"), ("citra", "ApprovalNeeded"), ("dewi", "done")] * 3
    assert not jobs.verify_log(folder, who).problems


def test_the_key_that_two_people_approve_is_the_one_that_is_taken(tmp_path):
    """Also where its source answers otherwise the second time."""
    folder, who = kept(tmp_path / "g", ("key",)), bd.Config(identities={"citra": EVERY, "dewi": EVERY})
    asked(lambda: jobs.encrypt(folder, lambda: KEY, who, by="citra"))
    answers = iter([KEY, bytes(32)])
    jobs.encrypt(folder, lambda: next(answers), who, by="dewi")
    bd.Engine.open(folder, bd.Config(keys=lambda: KEY), read_only=True).close()
    other = bytes(range(2, 34))
    asked(lambda: jobs.rotate_key(folder, lambda: KEY, lambda: other, who, by="citra"))
    answers = iter([other, bytes(32)])
    jobs.rotate_key(folder, lambda: KEY, lambda: next(answers), who, by="dewi")
    bd.Engine.open(folder, bd.Config(keys=lambda: other), read_only=True).close()


@pytest.mark.slow
def test_another_transform_of_templates_takes_two_people_as_a_key_does(tmp_path):
    folder = kept(tmp_path / "g", ("key",), keys=lambda: KEY)
    who = bd.Config(identities={"citra": EVERY, "dewi": EVERY}, keys=lambda: KEY)
    for renewable in (True, False):
        with bd.Engine.open(folder, who) as engine:
            engine.seal()
            with pytest.raises(bd.NotAllowed):
                engine.rekey(renewable=renewable)
            asked(lambda engine=engine, to=renewable: engine.as_principal("citra").rekey(renewable=to))
            with pytest.raises(KeyboardInterrupt):
                engine.as_principal("dewi").rekey(renewable=renewable, progress=interrupted)
        with bd.Engine.open(folder, who) as engine:
            transform_id = engine.as_principal("citra").rekey(renewable=renewable)  # it only goes on: nobody is asked
            assert bool(transform_id) is renewable and engine.problems() == []
            assert [a.approved_by for a in engine.approvals()][-1] == "dewi"
    assert not jobs.verify_log(folder, who).problems


def interrupted(done: int, total: int) -> None:
    raise KeyboardInterrupt


def test_a_request_ends_when_the_policy_that_asked_for_it_changes(tmp_path):
    folder = kept(tmp_path / "g", ("remove",))
    who = bd.Config(identities={"citra": EVERY, "dewi": EVERY})
    with bd.Engine.open(folder, who) as engine:
        citra, dewi = engine.as_principal("citra"), engine.as_principal("dewi")
        asked(lambda: citra.remove("s1"))
        citra.set_policy(replace(engine.policy, two_people=("remove", "merge")), reason="merges, too")
        asked(lambda: dewi.remove("s1"))
        assert "s1" in engine
        assert [(a.requested_by, a.approved_by) for a in engine.approvals()] == [("citra", None), ("dewi", None)]
        citra.remove("s1")
        assert "s1" not in engine


def test_a_gallery_in_the_clear_refuses_another_transform_before_anybody_is_asked(tmp_path):
    folder = kept(tmp_path / "g", ("key",))
    who = bd.Config(identities={"citra": EVERY, "dewi": EVERY})
    with bd.Engine.open(folder, who) as engine:
        with pytest.raises(bd.InvalidInput, match="need an encrypted gallery"):
            engine.as_principal("citra").rekey()
        assert engine.approvals() == []


def test_a_reader_does_not_rekey(tmp_path):
    folder = kept(tmp_path / "g", (), keys=lambda: KEY)
    with bd.Engine.open(folder, bd.Config(keys=lambda: KEY), read_only=True) as engine:
        with pytest.raises(bd.InvalidInput, match="read_only"):
            engine.rekey(renewable=False)


def test_without_the_rule_a_key_is_rotated_beside_a_writer(tmp_path):
    folder = kept(tmp_path / "g", (), keys=lambda: KEY)
    with bd.Engine.open(folder, bd.Config(keys=lambda: KEY)) as engine:
        jobs.rotate_key(folder, lambda: KEY, lambda: bytes(32))
        engine.remove("s1")


@pytest.mark.slow
def test_a_merge_is_applied_and_undone_by_two_people(tmp_path):
    district = kept(tmp_path / "district", (), 4, "d")
    centre = kept(tmp_path / "centre", ("merge",), 3)
    who = bd.Config(identities={"citra": EVERY, "dewi": EVERY, "kiosk": "enrol"})

    def apply(by: str) -> Any:
        return jobs.merge([district], tmp_path / "m.parquet", into=centre, apply=True, config=who, by=by)

    def subjects() -> int:
        with bd.Engine.open(centre, who, read_only=True) as engine:
            return len(engine)

    with pytest.raises(bd.NotAllowed):
        apply("kiosk")
    asked(lambda: apply("citra"))
    assert subjects() == 3
    merged = apply("dewi")
    assert merged.applied is not None and subjects() == 7
    asked(lambda: jobs.undo(merged.merge_id, centre, who, by="dewi"))
    assert subjects() == 7
    jobs.undo(merged.merge_id, centre, who, by="citra")
    assert subjects() == 3
    done = [(who, call) for who, call, outcome in recorded(centre, who) if outcome == "done"]
    assert done == [("dewi", "merge"), ("citra", "undo")]
    assert not jobs.verify_log(centre, who).problems
