"""Receipts of decisions: what they hold, and that they prove themselves without the gallery."""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import biodedup as bd
from biodedup import jobs
from biodedup.cli.commands import app
from biodedup.gallery.answers import to_json
from biodedup.gallery.catalogue.sqlite import SqliteCatalogue
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.policies import policy_digest
from biodedup.testing import internals
from tests.support.galleries import PEOPLE, enroll, small
from tests.support.vectors import SFACE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("receipts")
    jobs.make_signing_key(folder / "a.key")
    jobs.make_signing_key(folder / "b.key")
    with bd.Engine.open(folder / "g", small(seal_rows=1000)) as engine:
        for i in range(3):
            enroll(engine, i)
        internals(engine).gallery.seal()
        second = bd.Encounter("other", templates={"face": PEOPLE[1]}, encounter_id="again", model_id=SFACE)
        engine.enroll(second)
        enroll(engine, 3)
    return folder


@pytest.fixture
def engine(folder):
    with bd.Engine.open(folder / "g", read_only=True) as engine:
        yield engine


def links_of(gallery):
    with closing(LocalStorage().connect(gallery / "gallery.sqlite3", read_only=True)) as database:
        return {link.number: link for link in SqliteCatalogue(database).links()}


@pytest.mark.slow
def test_a_receipt_holds_what_the_decision_rests_on(engine, folder):
    for encounter_id, position in (("e1", 3), ("again", 6), ("e3", 7)):
        decision, receipt = engine.decision(encounter_id), engine.receipt(encounter_id)
        assert (receipt.outcome, receipt.gallery_version) == (decision.outcome, decision.gallery_version)
        assert (receipt.duplicate_db, receipt.review_db) == (decision.duplicate_db, decision.review_db)
        assert receipt.rows_examined == decision.compared
        assert receipt.policy == policy_digest(engine.policy) and receipt.policy_version == 1
        assert list(receipt.model_digests) == [SFACE] and len(receipt.model_digests[SFACE]) == 64
        assert receipt.decision == hashlib.sha256(to_json(decision).encode()).hexdigest()
        links = links_of(folder / "g")
        assert receipt.link == position and receipt.chain == links[position].value.hex()
        assert json.loads(links[position].state)[0] == decision.gallery_version
    assert engine.receipt("again").outcome != "unique"


@pytest.mark.slow
def test_the_receipt_of_an_encounter_that_is_not_there_is_refused(engine):
    with pytest.raises(bd.InvalidInput, match="no decision on encounter 'nobody'"):
        engine.receipt("nobody")


def test_a_policy_of_the_process_alone_is_told_from_the_gallery_s(folder, tmp_path):
    other = bd.Policy(fpir=2e-6)
    with bd.Engine.open(tmp_path / "g", small()):
        pass
    with bd.Engine.open(tmp_path / "g", replace(small(), policy=other), override_policy=True) as engine:
        enroll(engine, 5)
        receipt = engine.receipt("e5")
    assert receipt.policy == policy_digest(other) and receipt.policy_version is None


def test_a_receipt_is_checked_without_the_gallery(engine, folder, tmp_path):
    document = jobs.write_receipt(engine, "again", folder / "a.key", tmp_path / "r", clock=lambda: 7.0)
    assert document["issued_at"] == 7.0 and json.loads((tmp_path / "r").read_text()) == document
    check = jobs.verify_receipt(tmp_path / "r", folder / "a.pub")
    assert check.problems == check.notes == () and check.receipt["encounter_id"] == "again"
    assert "no public key" in jobs.verify_receipt(tmp_path / "r").notes[0]
    assert "signature" in jobs.verify_receipt(tmp_path / "r", folder / "b.pub").problems[0]
    forged = {**document, "outcome": "unique"}
    (tmp_path / "r").write_text(json.dumps(forged))
    assert "signature" in jobs.verify_receipt(tmp_path / "r", folder / "a.pub").problems[0]


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_receipt_that_states_a_field_twice_is_refused(engine, folder, tmp_path, place):
    jobs.write_receipt(engine, "e1", folder / "a.key", tmp_path / "r.json")
    text, forged = (tmp_path / "r.json").read_text().strip(), '"outcome": "duplicate"'
    twice = f"{{{forged}, {text[1:]}" if place == "first" else f"{text[:-1]}, {forged}}}"
    (tmp_path / "r.json").write_text(twice)
    with pytest.raises(bd.InvalidInput, match="is not a signed document"):
        jobs.verify_receipt(tmp_path / "r.json", folder / "a.pub")


def test_a_checkpoint_is_no_receipt(folder, tmp_path):
    jobs.log_checkpoint(folder / "g", folder / "a.key", tmp_path / "c")
    with pytest.raises(bd.InvalidInput, match="not a receipt"):
        jobs.verify_receipt(tmp_path / "c", folder / "a.pub")


@pytest.mark.slow
def test_the_commands_write_a_receipt_and_check_it(folder, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, ["receipt", *map(str, arguments)])

    assert run("e1", "-g", folder / "g", "--sign", folder / "a.key", "-o", tmp_path / "short").exit_code == 0
    made = ("write", "e1", "-g", folder / "g", "--sign", folder / "a.key", "-o", tmp_path / "r")
    assert run(*made).exit_code == 0
    assert isinstance(run(*made).exception, bd.InvalidInput)  # a receipt is never replaced
    assert "unique" in run("verify", tmp_path / "r", "--public-key", folder / "a.pub").output
    (tmp_path / "r").write_text((tmp_path / "r").read_text().replace("unique", "duplicate"))
    changed = run("verify", tmp_path / "r", "--public-key", folder / "a.pub")
    assert changed.exit_code == 4 and changed.output.startswith("wrong: ")
    for absent in (
        ("verify", tmp_path / "nope"),
        ("e1", "-g", folder / "g", "--sign", folder / "nope", "-o", tmp_path / "n"),
    ):
        assert "cannot be read: No such file" in str(run(*absent).exception)
