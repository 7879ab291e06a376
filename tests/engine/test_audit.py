"""The audit log: which calls it records, when they are durable, and that lost or changed records are named."""

from __future__ import annotations

import json
import threading
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import biodedup as bd
from biodedup import jobs
from biodedup.cli.commands import app
from biodedup.engine.callers import audit
from biodedup.gallery.catalogue import sqlite
from biodedup.gallery.catalogue.audit import AuditRecord, chained
from biodedup.gallery.catalogue.chain import NO_LINK, ChainHash
from biodedup.gallery.catalogue.sqlite import row_checksum
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.testing import internals
from tests.support.faults import Countdown, FailingStorage
from tests.support.vectors import SFACE, again, people

PEOPLE = people(8, seed=5)
KEY = bytes(range(1, 33))
IDENTITIES = {"anna": " ".join(bd.ROLES), "kiosk": "search", "budi": "verify"}
NOW = 1_800_000_000.0


@pytest.fixture
def still(monkeypatch) -> None:
    """Nothing is committed by the clock on the wall."""
    monkeypatch.setattr(audit, "FLUSH_S", 3_600.0)


@pytest.fixture
def opened(tmp_path: Path, still):
    engines = []

    def open_it(name: str = "g", *, storage: Any = None, **settings: Any) -> bd.Engine:
        config = bd.Config(**({"identities": IDENTITIES} | settings))
        engine = bd.Engine.open(tmp_path / name, config, clock=lambda: NOW, storage=storage)
        engines.append(engine)
        if not len(engine):
            engine.add_templates([f"s{i}" for i in range(4)], {"face": PEOPLE[:4]}, model_id=SFACE)
        return engine

    yield open_it
    for engine in engines:
        engine.close()


def seen(i: int, subject_id: str | None = None, seed: int = 1, **more) -> bd.Encounter:
    vector = again(PEOPLE[i : i + 1], 0.8, seed)[0]
    return bd.Encounter(subject_id, templates={"face": vector}, model_id=SFACE, **more)


def recorded(engine: bd.Engine) -> list[tuple[str, str, str, str, str]]:
    """(principal, call, subject, encounter, outcome) of each call but the loading and the look at the log."""
    calls = ((r.principal, r.call, r.subject_id, r.encounter_id, r.outcome) for r in engine.audit_records())
    return [call for call in calls if call[1] not in ("add_templates", "audit_records")]


def stored(folder: Path, config: bd.Config | None = None) -> list[str]:
    """The calls that are on the disk."""
    keys = None if config is None else config.keys
    with closing(LocalStorage(keys).connect(folder / "gallery.sqlite3", read_only=True)) as database:
        return [call for (call,) in database.execute("SELECT call FROM audit ORDER BY number")]


def test_each_call_is_recorded_with_its_caller_purpose_ids_and_outcome(opened):
    engine = opened()
    anna = engine.as_principal("anna", purpose="roll check")
    anna.enroll(seen(5, "s5", encounter_id="e5"))
    anna.identify(seen(5, encounter_id="asked"))
    anna.verify(seen(1), "s1")
    anna.verify(seen(2), "s1")
    anna.search({"face": PEOPLE[:3]}, k=1)
    anna.templates("s1")
    anna.subject("s1")
    list(anna.decisions("s5"))
    anna.remove("s2", "s3")
    assert recorded(engine) == [
        ("anna", "enroll", "s5", "e5", "unique"),
        ("anna", "identify", "", "asked", "duplicate"),
        ("anna", "verify", "s1", "", "accepted"),
        ("anna", "verify", "s1", "", "not accepted"),
        ("anna", "search", "", "", "done"),
        ("anna", "templates", "s1", "", "done"),
        ("anna", "subject", "s1", "", "done"),
        ("anna", "decisions", "s5", "", "done"),
        ("anna", "remove", "s2", "", "done"),
        ("anna", "remove", "s3", "", "done"),
    ]
    records = list(engine.audit_records(principal="anna"))
    assert {record.purpose for record in records} == {"roll check"}
    assert {record.at for record in records} == {NOW}
    assert [record.count for record in records if record.call == "search"] == [3]
    assert [record.call for record in engine.audit_records(subject_id="s5")] == ["enroll", "decisions"]
    assert not list(engine.audit_records(until=NOW))


def test_a_call_that_is_refused_is_recorded_with_its_error(opened):
    engine = opened()
    kiosk = engine.as_principal("kiosk")
    with pytest.raises(bd.NotAllowed):
        kiosk.remove("s1")
    with pytest.raises(bd.NotAllowed):
        list(kiosk.enroll_many([seen(6, "s6")]))
    with pytest.raises(bd.UnknownSubject):
        engine.as_principal("budi").verify(seen(1), "absent")
    assert recorded(engine) == [
        ("kiosk", "remove", "s1", "", "NotAllowed"),
        ("kiosk", "enroll_many", "", "", "NotAllowed"),
        ("budi", "verify", "absent", "", "UnknownSubject"),
    ]


def test_odd_texts_in_place_of_ids_do_not_stop_the_log(opened):
    engine = opened()
    for name in ("\ud800", "a\0b", "x" * 10_000, ""):
        with suppress(bd.CallerError):
            engine.templates(name)
    with suppress(bd.CallerError):
        engine.verify("no encounter", 7)  # type: ignore[arg-type]
    names = [subject for _, call, subject, *_ in recorded(engine) if call == "templates"]
    assert names == ["?", "a?b", "x" * 256, ""]


def test_each_encounter_of_a_stream_is_recorded_once(opened):
    engine = opened()
    stream = [seen(5, "s5", encounter_id="e5"), seen(1, "s9", encounter_id="e9"), seen(6, "s1", encounter_id="e1")]
    list(engine.enroll_many(stream))
    list(engine.enroll_many(stream[:1]))  # known: it gets its first answer
    assert recorded(engine) == [
        (audit.process_user(), "enroll", "s5", "e5", "unique"),
        (audit.process_user(), "enroll", "s9", "e9", "duplicate"),
        (audit.process_user(), "enroll", "s1", "e1", "SubjectExists"),
        (audit.process_user(), "enroll", "s5", "e5", "unique"),
    ]


def test_simultaneous_enrolments_are_recorded_under_their_own_callers(opened):
    engine = opened(identities={f"p{i}": "enrol" for i in range(4)})
    threads = [
        threading.Thread(target=engine.as_principal(f"p{i}").enroll, args=[seen(4 + i, f"new{i}")]) for i in range(4)
    ]
    with internals(engine).gallery.lock:  # so that they are committed as a group
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join()
    assert sorted((who, subject) for who, _, subject, *_ in recorded(engine)) == [
        (f"p{i}", f"new{i}") for i in range(4)
    ]


def test_a_change_is_recorded_in_its_own_commit_and_a_search_in_the_next(opened, tmp_path):
    engine = opened()
    commits = internals(engine).gallery.snapshot().version
    engine.identify(seen(1))
    assert stored(tmp_path / "g") == ["add_templates"]
    engine.remove("s1")
    assert stored(tmp_path / "g") == ["add_templates", "identify", "remove"]
    assert engine.gallery_version == commits + 1
    engine.identify(seen(1))
    engine.close()
    assert stored(tmp_path / "g") == ["add_templates", "identify", "remove", "identify"]


def test_searches_are_committed_after_a_second(tmp_path, monkeypatch):
    flushed = threading.Event()
    monkeypatch.setattr(audit, "FLUSH_S", 0.001)
    original = audit.AuditLog.settle
    monkeypatch.setattr(audit.AuditLog, "settle", lambda log: (original(log), flushed.set()))
    with bd.Engine.open(tmp_path / "g", bd.Config(audit="all")) as engine:
        engine.search({"face": PEOPLE[:1]})
        assert flushed.wait(60)
    assert stored(tmp_path / "g") == ["search"]


def test_many_waiting_calls_are_committed_by_one_of_them(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "WAITING_MAX", 3)
    engine = opened()
    for _ in range(4):
        engine.subject_ids()
    assert stored(tmp_path / "g") == ["add_templates", *["subject_ids"] * 4]


def test_a_call_that_cannot_be_recorded_is_not_answered(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "WAITING_MAX", 2)
    faults = Countdown(0)
    engine = opened(storage=FailingStorage(faults))
    engine.subject_ids()
    engine.subject_ids()
    faults.left = 1
    with pytest.raises(bd.StorageUnavailable):
        engine.subject_ids()
    faults.left = 0
    engine.subject_ids()
    assert stored(tmp_path / "g").count("subject_ids") == 4


def test_a_failed_commit_leaves_neither_the_change_nor_its_record(opened, tmp_path):
    faults, n = Countdown(0), 0
    engine = opened(storage=FailingStorage(faults), audit="changes")
    while "s1" in engine:
        n += 1
        faults.left = n
        with suppress(bd.StorageUnavailable):
            engine.remove("s1")
        faults.left = 0
        there = "s1" in engine
        assert ("remove" in stored(tmp_path / "g")) is not there
    assert n > 1
    assert stored(tmp_path / "g") == ["add_templates", "remove"]
    assert not jobs.verify_log(tmp_path / "g").problems


@pytest.mark.parametrize(
    ("mode", "kept"),
    [("none", []), ("changes", ["add_templates", "remove"]), ("all", ["add_templates", "identify", "remove"])],
)
def test_the_setting_says_which_calls_are_recorded(opened, tmp_path, mode, kept):
    engine = opened(audit=mode)
    engine.identify(seen(1))
    engine.remove("s1")
    engine.close()
    assert stored(tmp_path / "g") == kept


def test_without_identities_changes_are_recorded_and_searches_are_not(opened, tmp_path):
    assert bd.Config().audited == "changes"
    assert bd.Config(identities=IDENTITIES).audited == "all"
    with pytest.raises(bd.InvalidInput, match="audit is 'some'"):
        bd.Config(audit="some")


def test_the_chained_values_are_those_of_a_plain_computation():
    records = [AuditRecord(float(i), "anna", "", "verify", f"s{i}", number=i) for i in (1, 2)]
    import hashlib

    from biodedup.gallery.catalogue.chain import pack_row

    first = hashlib.sha256(b"biodedup audit 1\0" + NO_LINK + pack_row(records[0].values)).digest()
    second = hashlib.sha256(b"biodedup audit 1\0" + first + pack_row(records[1].values)).digest()
    assert list(chained(ChainHash(None), NO_LINK, records)) == [first, second]


# tampering --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["clear", "keyed"])
def kept(request, opened, tmp_path):
    """A closed gallery with eight records, its configuration, and a way to change its database."""
    settings = {} if request.param == "clear" else {"keys": lambda: KEY}
    engine = opened(**settings)
    for _ in range(6):
        engine.subject_ids()
    engine.remove("s1")
    engine.close()
    config = bd.Config(**settings)

    def change(statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
        with closing(
            LocalStorage(config.keys).connect(tmp_path / "g" / "gallery.sqlite3", read_only=False)
        ) as database:
            return database.execute(statement, values).fetchall()

    return tmp_path / "g", config, change


def problems(kept) -> list[str]:
    return list(jobs.verify_log(kept[0], kept[1]).problems)


def test_an_untouched_audit_log_is_sound(kept):
    report = jobs.verify_log(kept[0], kept[1])
    assert (report.problems, report.calls) == ((), 8)


def test_a_dropped_audit_record_is_named(kept):
    kept[2]("DELETE FROM audit WHERE number = 3")
    assert any("audit record 3 is missing" in text for text in problems(kept))


def test_a_changed_audit_record_is_named(kept):
    (row,) = kept[2]("SELECT * FROM audit WHERE number = 4")
    row = [*row[:2], "somebody else", *row[3:-1]]
    kept[2]("UPDATE audit SET principal = ?, checksum = ? WHERE number = 4", (row[2], row_checksum(row)))
    assert any("audit record 4 (subject_ids) has a wrong hash" in text for text in problems(kept))


def test_reordered_audit_records_are_named(kept):
    rows = kept[2]("SELECT * FROM audit WHERE number IN (1, 8) ORDER BY number")
    kept[2]("DELETE FROM audit WHERE number IN (1, 8)")
    for row, number in zip(rows, (8, 1), strict=True):
        moved = [number, *row[1:-1]]
        kept[2](f"INSERT INTO audit VALUES ({','.join('?' * len(row))})", (*moved, row_checksum(moved)))
    named = problems(kept)
    assert any("audit record 1 (" in text for text in named)
    assert any("audit record 8 (" in text for text in named)


def test_a_truncated_audit_log_is_named(kept):
    kept[2]("DELETE FROM audit WHERE number > 5")
    assert any("audit records 6 to 8 are missing" in text for text in problems(kept))


def test_a_truncated_audit_log_with_a_forged_head_is_named_by_the_chain_of_commits(kept):
    (value,) = kept[2]("SELECT value FROM audit WHERE number = 5")[0]
    text = json.dumps([1, 5, value.hex(), ChainHash(None).key_id])
    kept[2]("DELETE FROM audit WHERE number > 5")
    kept[2](
        "UPDATE meta SET value = ?, checksum = ? WHERE key = 'audit_head'", (text, row_checksum(("audit_head", text)))
    )
    assert any("table meta" in text for text in problems(kept))


def test_old_records_are_packed_and_verified(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite, "SPAN_ROWS", 4)
    monkeypatch.setattr(sqlite, "UNPACKED_MAX", 6)
    engine = opened()
    for i in range(20):
        engine.are_enrolled([f"s{i}"])
        internals(engine).audit.flush()
    assert [record.number for record in engine.audit_records()] == list(range(1, 22))
    engine.close()
    report = jobs.verify_log(tmp_path / "g")
    assert (report.problems, report.calls) == ((), 22)
    with closing(LocalStorage().connect(tmp_path / "g" / "gallery.sqlite3", read_only=False)) as database:
        spans = database.execute("SELECT number, last FROM audit_span").fetchall()
        assert spans[:2] == [(1, 4), (5, 8)]
        database.execute("DELETE FROM audit_span WHERE number = 5")
    named = jobs.verify_log(tmp_path / "g").problems
    assert any("table audit_span" in text for text in named)
    assert any("do not follow the record before" in text for text in named)


def test_old_records_move_to_a_file_that_the_gallery_proves(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite, "SPAN_ROWS", 4)
    monkeypatch.setattr(sqlite, "UNPACKED_MAX", 6)
    engine, file = opened(), tmp_path / "old.audit"
    for i in range(12):
        engine.are_enrolled([f"s{i}"])
        internals(engine).audit.flush()
    before = list(engine.audit_records())
    assert engine.archive_audit(file, before=NOW) == 0 and not file.exists()
    with pytest.raises(bd.NotAllowed):
        engine.as_principal("kiosk").archive_audit(file, before=NOW + 1)
    assert engine.archive_audit(file, before=NOW + 1) == 8
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(engine.archived_audit(file)) == before[:8]
    assert next(iter(engine.audit_records())).number == 9
    with pytest.raises(bd.InvalidInput, match="exists"):
        engine.archive_audit(file, before=NOW + 1)
    engine.close()
    report = jobs.verify_log(tmp_path / "g")
    assert report.problems == ()
    assert report.notes == (
        "audit records 1 to 8 are in archive files; verify each with `biodedup log show --archive FILE`",
    )
    content, reader = file.read_bytes(), opened()
    title, first, last, end = content.split(b"\n")
    for changed in (
        content.replace(b'"]', b'00"]', 1),
        b"\n".join([title, last, end]),
        b"\n".join([title, first, end]),
        b"\n".join([title, end]),
        b"\n".join([title, first, first, last, end]),
        b"\n".join([title, last, first, end]),
    ):
        file.write_bytes(changed)
        with pytest.raises(bd.GalleryDamaged):
            list(reader.archived_audit(file))
    file.write_bytes(b"something else")
    with pytest.raises(bd.InvalidInput):
        list(opened("h").archived_audit(file))


def test_encrypting_a_gallery_keeps_its_audit_log_sound(opened, tmp_path):
    opened().close()
    jobs.encrypt(tmp_path / "g", lambda: KEY)
    opened(keys=lambda: KEY).remove("s1")
    report = jobs.verify_log(tmp_path / "g", bd.Config(keys=lambda: KEY))
    assert (report.problems, report.calls) == ((), 2)


def test_names_and_purposes_are_nowhere_in_the_clear_in_an_encrypted_gallery(opened, tmp_path):
    engine = opened(keys=lambda: KEY)
    engine.as_principal("anna", purpose="a rare purpose").templates("s1")
    engine.remove("s1")
    engine.close()
    for path in filter(Path.is_file, (tmp_path / "g").rglob("*")):
        assert b"rare purpose" not in path.read_bytes()
        assert b"anna" not in path.read_bytes()


# the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_shows_the_calls_to_those_with_the_role_audit(opened, tmp_path):
    engine = opened()
    engine.as_principal("anna", purpose="complaint 7").templates("s1")
    engine.close()
    settings = tmp_path / "settings.toml"
    settings.write_text('[identities]\nanna = "audit"\nkiosk = "search"\n')
    run = ["log", "show", "-g", str(tmp_path / "g"), "--config", str(settings), "--principal", "anna"]
    shown = CliRunner().invoke(app, [*run, "--by", "anna", "--json"])
    assert [r["purpose"] for r in json.loads(shown.stdout)["records"]] == ["complaint 7"]
    assert CliRunner().invoke(app, [*run, "--by", "anna", "--since", "2100-01-01"]).stdout.strip() == "0 calls"
    assert isinstance(CliRunner().invoke(app, [*run, "--by", "kiosk"]).exception, bd.NotAllowed)
    assert isinstance(CliRunner().invoke(app, run).exception, bd.NotAllowed)
    assert isinstance(CliRunner().invoke(app, [*run, "--by", "anna", "--since", "soon"]).exception, bd.InvalidInput)


def test_calls_on_a_closed_engine_wait_for_nothing(opened, monkeypatch):
    monkeypatch.setattr(audit, "WAITING_MAX", 2)
    engine = opened()
    engine.close()
    for _ in range(5):
        with pytest.raises(bd.EngineClosed):
            engine.subject_ids()


@pytest.fixture
def run(opened, tmp_path):
    """Runs a command on a gallery with `IDENTITIES`, and returns what the audit log then has of it: (principal, purpose, call, outcome)."""
    opened().close()
    settings = tmp_path / "settings.toml"
    settings.write_text("[identities]\n" + "".join(f'{name} = "{roles}"\n' for name, roles in IDENTITIES.items()))

    def run_it(*words: str) -> list[tuple[str, str, str, str]]:
        before = audited(tmp_path / "g")
        done = CliRunner().invoke(app, [*words, "-g", str(tmp_path / "g"), "--config", str(settings)])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return audited(tmp_path / "g")[len(before) :]

    return run_it


def audited(folder: Path) -> list[tuple[str, str, str, str]]:
    with bd.Engine.open(folder, read_only=True) as engine:
        return [(r.principal, r.purpose, r.call, r.outcome) for r in engine.audit_records()]


def test_a_command_that_reads_for_somebody_is_recorded_with_its_purpose(run):
    assert run("subject", "s1", "--by", "anna", "--purpose", "complaint 7") == [
        ("anna", "complaint 7", "subject", "done")
    ]
    assert ("anna", "", "subjects", "done") in run("list", "--by", "anna")
    assert run("subject", "s1") == [(audit.process_user(), "", "subject", "done")], "beside the gallery"
    with pytest.raises(bd.NotAllowed, match="'kiosk' has the roles search"):
        run("subject", "s1", "--by", "kiosk")
    with pytest.raises(bd.NotAllowed):
        run("subject", "s1", "--purpose", "nobody's")


def test_a_command_that_writes_for_somebody_takes_a_purpose_and_compaction_a_name(run):
    removed = run("remove", "s1", "--by", "anna", "--purpose", "court order")
    assert removed[-1] == ("anna", "court order", "remove", "done")
    assert run("compact", "--by", "anna") == [("anna", "", "compact", "done")]
    with pytest.raises(bd.NotAllowed, match="administer"):
        run("compact", "--by", "kiosk")


def test_a_purpose_without_a_person_is_refused(tmp_path):
    with bd.Engine.open(tmp_path / "g") as engine:
        engine.add_templates(["s1"], {"face": PEOPLE[:1]}, model_id=SFACE)
    done = CliRunner().invoke(app, ["subject", "s1", "--purpose", "why", "-g", str(tmp_path / "g")])
    assert isinstance(done.exception, bd.InvalidInput)
    done = CliRunner().invoke(app, ["subject", "s1", "--purpose", "why", "--by", "anna", "-g", str(tmp_path / "g")])
    assert done.exit_code == 0 and "not recorded" in done.output
