"""Calls of processes that only read: recorded beside a writer, taken into the audit log once, and named where they were forged."""

from __future__ import annotations

import os
import pwd
import threading
from contextlib import closing

import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.engine.callers import audit
from biodedup.gallery.catalogue.readings import Readings
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.testing import internals
from tests.support.galleries import PEOPLE, enroll
from tests.support.vectors import SFACE

USER = f"os:{pwd.getpwuid(os.geteuid()).pw_name}"
KEY = bytes(range(1, 33))
CONFIGS = {
    "clear": bd.Config(audit="all", gallery=bd.GalleryConfig(background=False)),
    "keyed": bd.Config(audit="all", gallery=bd.GalleryConfig(background=False), keys=lambda: KEY),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(autouse=True)
def still(monkeypatch):
    """Nothing is committed by the clock on the wall."""
    monkeypatch.setattr(audit, "FLUSH_S", 3_600.0)


@pytest.fixture
def writer(tmp_path, config):
    with bd.Engine.open(tmp_path / "g", config) as engine:
        for i in range(3):
            enroll(engine, i)
        yield engine


def reader(tmp_path, config):
    return bd.Engine.open(tmp_path / "g", config, read_only=True)


def calls(engine, **more):
    return [(r.principal, r.call, r.subject_id) for r in engine.audit_records(**more) if r.call != "audit_records"]


def forge(tmp_path, config, statement, *values):
    with closing(LocalStorage(config.keys).connect(tmp_path / "g" / "readers.sqlite3", read_only=False)) as database:
        return database.execute(statement, values).fetchall()


def look(engine):
    engine.subject("s0")
    engine.templates("s1")
    list(engine.decisions("s2"))
    engine.verify(bd.Encounter(templates={"face": PEOPLE[0]}, model_id=SFACE), "s0")


LOOKED = [(USER, "subject", "s0"), (USER, "templates", "s1"), (USER, "decisions", "s2"), (USER, "verify", "s0")]


def test_a_reader_without_a_name_is_recorded_as_the_systems_user_beside_a_writer(writer, tmp_path, config):
    with reader(tmp_path, config) as engine:
        look(engine)
    enroll(writer, 3)
    enrolled = [(USER, "enroll", f"s{i}") for i in range(4)]
    assert calls(writer) == [*enrolled[:3], *LOOKED, enrolled[3]]
    assert not jobs.verify_log(tmp_path / "g", config).problems
    numbers = [record.number for record in writer.audit_records()]
    assert numbers == list(range(1, len(numbers) + 1))


def test_what_a_reader_reads_is_durable_when_it_has_the_first_answer(writer, tmp_path, config):
    engine = reader(tmp_path, config)
    engine.subject("s0")
    assert calls(writer)[3:] == [(USER, "subject", "s0")]  # before the reader is closed
    engine.close()


def test_a_named_caller_of_a_reader_is_recorded_by_name(writer, tmp_path, config):
    with reader(tmp_path, config) as engine:
        engine.as_principal(bd.Principal("dewi", bd.ROLES), purpose="complaint").subject("s0")
    (record,) = [r for r in writer.audit_records() if r.call == "subject"]
    assert (record.principal, record.purpose) == ("dewi", "complaint")


def test_a_principal_cannot_have_the_name_of_a_systems_user():
    with pytest.raises(bd.InvalidInput, match="os:"):
        bd.Principal(USER, bd.ROLES)


def test_records_that_wait_are_shown_and_noted_until_a_writer_takes_them(tmp_path, config):
    with bd.Engine.open(tmp_path / "g", config) as engine:
        enroll(engine, 0)
    with reader(tmp_path, config) as engine:
        engine.subject("s0")
    with reader(tmp_path, config) as engine:
        assert [(r.call, r.number) for r in engine.audit_records()] == [("enroll", 1), ("subject", 0)]
    found = jobs.verify_log(tmp_path / "g", config)
    assert not found.problems and any("2 calls of readers are not in the audit log yet" in note for note in found.notes)
    with bd.Engine.open(tmp_path / "g", config):
        pass
    found = jobs.verify_log(tmp_path / "g", config)
    assert found.calls == 3 and not found.problems and not found.notes


def test_records_are_taken_once_where_the_writer_dies_after_its_commit(writer, tmp_path, config, monkeypatch):
    monkeypatch.setattr(Readings, "forget", lambda self, number: None)
    with reader(tmp_path, config) as engine:
        look(engine)
    enroll(writer, 3)
    enroll(writer, 4)
    assert len(calls(writer)) == 3 + 4 + 2
    with reader(tmp_path, config) as engine:
        engine.subject("s1")
    assert calls(writer)[-1] == (USER, "subject", "s1") and len(calls(writer)) == 3 + 4 + 2 + 1
    assert not jobs.verify_log(tmp_path / "g", config).problems


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("DELETE FROM call WHERE number = 2", "records 2 to 2 are lost"),
        ("DELETE FROM call WHERE number = 4", "records 4 to 4 are lost"),
        ("DELETE FROM call", "records 1 to 4 are lost"),
        ("UPDATE call SET principal = 'budi' WHERE number = 3", "record 3 was changed"),
        ("UPDATE head SET number = 3", "is not the one that was written last"),
    ],
)
def test_forged_records_are_named_before_and_after_they_are_taken(writer, tmp_path, config, statement, told):
    with reader(tmp_path, config) as engine:
        look(engine)
    forge(tmp_path, config, statement)
    assert any(told in problem for problem in jobs.verify_log(tmp_path / "g", config).problems)
    enroll(writer, 3)
    assert any(r.call == "readers" and told in r.outcome for r in writer.audit_records())
    found = jobs.verify_log(tmp_path / "g", config)
    assert not found.problems and any(told in note for note in found.notes)


def test_a_file_that_was_put_back_to_before_what_was_taken_goes_on_behind_it(writer, tmp_path, config):
    file = tmp_path / "g" / "readers.sqlite3"
    with reader(tmp_path, config) as engine:
        engine.subject("s0")
    kept = file.read_bytes()
    with reader(tmp_path, config) as engine:
        engine.subject("s1")
    assert len(calls(writer)) == 5
    file.write_bytes(kept)
    with reader(tmp_path, config) as engine:
        engine.subject("s2")
    file.with_name("readers.sqlite3-journal").unlink(missing_ok=True)
    assert [name for *_, name in calls(writer)[3:]] == ["s0", "s1", "s2"]
    assert not jobs.verify_log(tmp_path / "g", config).problems


def test_a_call_that_cannot_be_recorded_is_not_answered(writer, tmp_path, config):
    (tmp_path / "g" / "readers.sqlite3").mkdir()
    with reader(tmp_path, config) as engine, pytest.raises(bd.BiodedupError, match=r"readers\.sqlite3"):
        engine.subject("s0")
    enroll(writer, 3)  # and no writer is stopped


def test_an_export_of_the_gallery_is_recorded(writer, tmp_path, config):
    jobs.export_gallery(tmp_path / "g", tmp_path / "out", config)
    (record,) = [r for r in writer.audit_records() if r.call == "export_gallery"]
    assert (record.principal, record.count, record.outcome) == (USER, 3, "done")


def test_a_reader_whose_settings_record_less_records_nothing(writer, tmp_path, config):
    with bd.Engine.open(tmp_path / "g", bd.Config(keys=config.keys), read_only=True) as engine:
        engine.subject("s0")
    assert not (tmp_path / "g" / "readers.sqlite3").exists()


def test_ids_are_not_readable_in_the_records_of_readers_of_an_encrypted_gallery(tmp_path):
    config = CONFIGS["keyed"]
    with bd.Engine.open(tmp_path / "g", config) as engine:
        enroll(engine, 0)
    with reader(tmp_path, config) as engine:
        engine.as_principal(bd.Principal("dewi-of-the-office", bd.ROLES)).subject("s0")
    content = b"".join(file.read_bytes() for file in (tmp_path / "g").glob("readers*"))
    assert b"dewi-of-the-office" not in content and b"CREATE TABLE" not in content


@pytest.mark.parametrize("cross", ["encrypt", "decrypt"])
def test_records_that_wait_cross_into_an_encrypted_gallery_and_back(tmp_path, cross):
    before = CONFIGS["clear" if cross == "encrypt" else "keyed"]
    after = CONFIGS["keyed" if cross == "encrypt" else "clear"]
    with bd.Engine.open(tmp_path / "g", before) as engine:
        enroll(engine, 0)
    with reader(tmp_path, before) as engine:
        engine.subject("s0")
    getattr(jobs, cross)(tmp_path / "g", lambda: KEY)
    with bd.Engine.open(tmp_path / "g", after) as engine:
        assert calls(engine) == [(USER, "enroll", "s0"), (USER, "subject", "s0")]
    assert not jobs.verify_log(tmp_path / "g", after).problems


def test_a_flush_and_a_commit_at_once_do_not_wait_for_each_other(writer):
    gallery, log = internals(writer).gallery, internals(writer).audit
    holds, asked = threading.Event(), threading.Event()

    def commit():
        with gallery.transaction() as transaction:
            transaction.manifest_changed = True
            holds.set()
            asked.wait()
            flushing.join(0.3)  # it waits for the gallery's lock

    committing = threading.Thread(target=commit, daemon=True)
    flushing = threading.Thread(target=log.flush, daemon=True)
    committing.start()
    holds.wait()
    flushing.start()
    asked.set()
    committing.join(10)
    flushing.join(10)
    assert not committing.is_alive() and not flushing.is_alive()
