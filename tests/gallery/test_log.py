"""The hash chain over the commits: what `log verify` names, with and without a key, and against a checkpoint."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import random
import shutil
import subprocess
import sys
import threading
from contextlib import closing, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from unittest.mock import patch

import pytest
from typer.testing import CliRunner

import biodedup as bd
from biodedup import jobs
from biodedup.cli.commands import app
from biodedup.gallery.catalogue import chain_writer
from biodedup.gallery.catalogue.chain import CHAINED, ChainHash, Digest, is_chained, pack_row
from biodedup.gallery.catalogue.sqlite import SqliteCatalogue
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.testing import internals
from tests.support.faults import Countdown, FailingStorage
from tests.support.galleries import PEOPLE, enroll, small
from tests.support.places import Folder, Register
from tests.support.vectors import SFACE

KEY = bytes(range(1, 33))
CONFIGS = {"clear": small(seal_rows=1000), "keyed": replace(small(seal_rows=1000), keys=lambda: KEY)}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def fill(engine):
    for i in range(4):
        enroll(engine, i)
    gallery = internals(engine).gallery
    with gallery.transaction() as transaction:
        transaction.judge([bd.Verdict("e1", "s1", "s0", "different", "anna", 1.0, "")], [])
    engine.remove("s2")
    gallery.seal()
    for i in range(4, 7):
        enroll(engine, i)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    for name, config in CONFIGS.items():
        with bd.Engine.open(folder / name, config) as engine:
            fill(engine)
    return folder


REGISTER = (pytest.mark.cluster, pytest.mark.slow)


@pytest.fixture(params=[*CONFIGS, *(pytest.param(f"register, {name}", marks=REGISTER) for name in CONFIGS)])
def place(request, tmp_path, made):
    """A gallery in a folder, or a register in PostgreSQL, in the clear or with a key."""
    where, _, name = request.param.rpartition(", ")
    if not where:
        shutil.copytree(made / name, tmp_path / "g")
        yield Folder(CONFIGS[name], tmp_path / "g")
        return
    postgres = request.getfixturevalue("postgres")
    register = Register.new(CONFIGS[name], postgres, f"log{next(_numbers)}", tmp_path / "store")
    with register.open() as engine:
        fill(engine)
    yield register
    if register.connection is not None:
        register.connection.close()


_numbers = itertools.count()


@pytest.fixture
def folder(tmp_path, config, made):
    name = next(name for name in CONFIGS if CONFIGS[name] is config)
    shutil.copytree(made / name, tmp_path / "g")
    return tmp_path / "g"


def problems(folder, config, **more):
    return list(jobs.verify_log(folder, config, **more).problems)


def forge(folder, config, statement, values=()):
    """What an attacker with the database's key, or of a gallery in the clear, can do."""
    with closing(LocalStorage(config.keys).connect(folder / "gallery.sqlite3", read_only=False)) as database:
        return database.execute(statement, values).fetchall()


@pytest.fixture
def auditor(tmp_path):
    jobs.make_signing_key(tmp_path / "auditor.key")
    return tmp_path / "auditor.key", tmp_path / "auditor.pub"


@pytest.mark.slow
def test_a_gallery_that_nobody_touched_is_sound_from_its_first_commit_on(place):
    found = place.verified()
    assert found.problems == found.notes == ()
    assert found.first_commit == 0 and found.commit == found.links - 1
    assert found.keyed == (place.config.keys is not None) and found.files


@pytest.mark.slow
def test_the_digest_of_a_table_is_the_sum_of_its_rows_hashes(place):
    with place.catalogue() as catalogue:
        stored = catalogue.digests()
        for table in ("subject", "cell", "encounter", "verdict", "segment", "policy"):
            rows = list(catalogue.rows_of(table))
            key = catalogue.chain.hash.of(b"biodedup row key 1")
            block = (key + b"biodedup row 1\0" + table.encode()).ljust(168, b"\0")
            hashes = [hashlib.shake_128(block + pack_row(row)).digest(256) for row in rows]
            assert stored[table] == Digest(len(rows), sum(int.from_bytes(value, "big") for value in hashes) % 2**2048)


def test_a_deleted_verdict_is_named_with_its_commit(place):
    place.run("DELETE FROM verdict")
    assert place.problems() == [
        "table verdict: its 0 rows differ from the 1 rows of the last commit: rows were changed, forged, deleted or restored from an older copy",
        "table verdict: a row of commit 5 is missing or changed",
    ]


@pytest.mark.slow
def test_a_decision_that_was_changed_with_its_checksum_is_named(place):
    changed = change_decision(place)
    found = place.problems()
    assert "table encounter: no commit wrote the row 'e5' in this form" in found and len(found) == 3
    assert changed[2] == "duplicate"


def test_a_journal_that_was_changed_is_not_opened(place):
    change_decision(place)
    for read_only in (False, True):
        with pytest.raises(bd.GalleryDamaged, match=r"table encounter .* log verify"):
            place.open(read_only=read_only)


def test_verdicts_and_audit_records_that_were_dropped_are_not_answered_as_if_all_were_there(place):
    place.run("DELETE FROM verdict")
    place.run("DELETE FROM audit WHERE number = (SELECT max(number) FROM audit)")
    with place.open(read_only=True) as engine:
        with pytest.raises(bd.GalleryDamaged, match=r"table verdict .* log verify"):
            engine.verdicts()
        with pytest.raises(bd.GalleryDamaged, match=r"newest records were deleted; run `biodedup log verify`"):
            list(engine.audit_records())


def change_decision(place):
    (row,) = (row for row in place.rows("encounter") if row[0] == "e5")
    changed = (*row[:2], "duplicate", row[3])
    place.put("encounter", changed)
    return changed


def test_what_was_tampered_with_stays_visible_after_later_commits_and_a_seal(place):
    place.run("DELETE FROM verdict")
    with place.open() as engine:
        enroll(engine, 8)
        internals(engine).gallery.seal()
    assert any("table verdict" in problem for problem in place.problems())


def test_rows_of_the_journal_are_listed_until_they_are_sealed(folder, config):
    def listed():
        return forge(folder, config, "SELECT sum(journal), sum(1 - journal) FROM row_change")[0]

    assert listed() == (
        3,
        5,
    )  # three enrolments; the beginning, the model and its card, a verdict, a removal and the seal
    with bd.Engine.open(folder, config) as engine:
        internals(engine).gallery.seal()
    assert listed() == (0, 6) and not problems(folder, config)


def test_earlier_digests_stop_the_next_writer(place):
    old = next(row for row in place.rows("digest") if row[0] == "subject")
    with place.open() as engine:
        enroll(engine, 8)
        place.put("digest", old)
    assert any("table digest" in problem for problem in place.problems())
    with pytest.raises(bd.GalleryDamaged, match="log verify"):
        place.open()


def test_counters_that_were_put_back_are_named(place):
    old = next(row for row in place.rows("meta") if row[0] == "state")
    with place.open() as engine:
        engine.remove("s4")
    place.put("meta", old)
    assert any("counters" in problem for problem in place.problems())
    with pytest.raises(bd.GalleryDamaged, match="counters"):
        place.open()


def probe(i):
    return bd.Encounter(templates={"face": PEOPLE[i]}, model_id=SFACE)


@pytest.mark.parametrize("forged", ["put back", "deleted", "changed"])
def test_budgets_that_were_forged_are_named_and_refill_nothing(place, forged):
    with place.open() as engine:
        engine.set_policy(replace(engine.policy, subject_calls_per_day=3), by="anna", reason="scores leak")
        engine.verify(probe(0), "s0")
        engine.verify(probe(1), "s1")
        before = next(row for row in place.rows("budget") if "s0" in row[0])
        engine.verify(probe(0), "s0")
    assert not place.problems()
    if forged == "deleted":
        place.run("DELETE FROM budget WHERE key = ?", before[:1])
    else:
        place.put("budget", before if forged == "put back" else (before[0], 1.0, 0))
    (problem,) = place.problems()
    assert problem.startswith("table budget: its ")
    with place.open() as engine, pytest.raises(bd.GalleryDamaged, match=r"table budget .* log verify"):
        engine.verify(probe(0), "s0")


def test_a_chain_from_before_it_covered_budgets_takes_them_in(place):
    with place.open() as engine:
        engine.set_policy(replace(engine.policy, subject_calls_per_day=3), by="anna", reason="scores leak")
        with patch.object(chain_writer, "is_chained", lambda table, row: table != "budget" and is_chained(table, row)):
            internals(engine).catalogue.chain.anew = "as an older release"
            engine.verify(probe(0), "s0")
            internals(engine).catalogue.chain.anew = ""
            with internals(engine).gallery.transaction() as transaction:
                transaction.caller_tables()._delete("meta WHERE key = ?", [("budgets",)])
    with place.open() as engine:
        engine.verify(probe(0), "s0")
    found = place.verified()
    assert not found.problems and any("more tables" in note for note in found.notes)


def test_a_dropped_link_is_named(place):
    place.run("DELETE FROM chain WHERE number = 4")
    assert place.problems() == ["links 4 to 4 of the chain are missing: commits were deleted"]


def test_a_changed_link_is_named(place):
    row = place.rows("chain")[3]
    place.put("chain", (*row[:5], bytes(32), row[6]))
    assert place.problems() == [
        "link 4 (commit 3) does not follow the link before: it was changed, or restored from an older copy"
    ]


@pytest.mark.slow
def test_any_page_of_the_database_that_is_put_back_is_named_or_changes_nothing(folder, config):
    """Pages of an encrypted database prove themselves, also those of an earlier time."""
    database = folder / "gallery.sqlite3"
    earlier = database.read_bytes()
    with bd.Engine.open(folder, config) as engine:
        enroll(engine, 7)
        engine.remove("s5")
        with internals(engine).gallery.transaction() as transaction:
            transaction.judge([bd.Verdict("e6", "s6", "s0", "different", "anna", 1.0, "")], [])
    later, rows, size, named = database.read_bytes(), content(folder, config), 4096, 0
    for at in range(0, min(len(earlier), len(later)), size):
        if earlier[at : at + size] != later[at : at + size]:
            database.write_bytes(later[:at] + earlier[at : at + size] + later[at + size :])
            if problems(folder, config):
                named += 1
            else:
                assert content(folder, config) == rows
    database.write_bytes(later)
    assert named > 5 and not problems(folder, config)


@pytest.mark.slow
def test_structural_forgeries_of_rows_are_all_named(place):
    """Rows deleted, swapped, doubled and put back from another time, with right checksums, by a forger who reads and writes the database."""
    rng = random.Random(5)
    earlier = place.content()
    with place.open() as engine:
        enroll(engine, 7)
        engine.remove("s6")
        with internals(engine).gallery.transaction() as transaction:
            transaction.judge([bd.Verdict("e7", "s7", "s0", "different", "anna", 1.0, "")], [])
    later, kept, named = place.content(), place.kept(), {}
    tables = [table for table in CHAINED if later[table]]
    for n in range(40):
        table = tables[n % len(tables)]
        rows, forged = later[table], forged_rows(rng, earlier[table], later[table])
        if sorted(map(repr, forged)) == sorted(map(repr, rows)):
            continue
        place.run(f"DELETE FROM {table}")
        for row in forged:
            place.insert(table, row)
        assert any(table in problem or "read" in problem or "counters" in problem for problem in place.problems())
        named[table] = named.get(table, 0) + 1
        place.put_back(kept)
    assert sum(named.values()) > 25 and {"cell", "verdict", "encounter", "subject"} <= named.keys()


def forged_rows(rng, earlier, later):
    """Another set of rows of a table. Keys stay unique."""
    rows = list(later)
    kind = rng.choice(["delete", "swap", "put back", "add"])
    if kind == "swap" and len(rows) > 1:
        i, j = rng.sample(range(len(rows)), 2)
        rows[i], rows[j] = (rows[i][0], *rows[j][1:]), (rows[j][0], *rows[i][1:])
    elif kind == "put back" and earlier != later:
        rows = list(earlier)
    elif kind == "add" and isinstance(rows[-1][0], int):
        rows.append((rows[-1][0] + 1, *rows[-1][1:]))
    else:
        del rows[rng.randrange(len(rows))]
    return rows


def content(folder, config):
    """What the gallery holds. The lists of changes only help to name what is wrong."""
    with closing(LocalStorage(config.keys).connect(folder / "gallery.sqlite3", read_only=True)) as database:
        catalogue = SqliteCatalogue(database)
        return {table: list(catalogue.rows_of(table)) for table in catalogue.tables if table != "row_change"}


@pytest.mark.slow
def test_a_segment_of_earlier_time_put_back_is_named(folder, config):
    name = next((folder / "segments").glob("*.subject"))
    other = folder.parent / "other"
    with bd.Engine.open(other, config) as engine:
        enroll(engine, 1)
        internals(engine).gallery.seal()
    shutil.copy(next((other / "segments").glob("*.subject")), name)
    assert any("segment 1" in problem for problem in problems(folder, config))


def test_a_whole_gallery_of_an_earlier_time_is_a_rollback_against_a_checkpoint(place, auditor, tmp_path):
    (key, public), old = auditor, place.kept()
    with place.open() as engine:
        enroll(engine, 8)
    made = jobs.log_checkpoint(place.gallery, key, tmp_path / "c", place.config, clock=lambda: 5.0)
    assert made.time == json.loads((tmp_path / "c").read_text())["time"] == 5.0
    assert place.problems(checkpoint=tmp_path / "c", public_key=public) == []
    place.put_back(old)
    (problem,) = place.problems(checkpoint=tmp_path / "c", public_key=public)
    assert problem.startswith("rollback")
    with place.open() as engine:
        enroll(engine, 9)
        enroll(engine, 10)
    (problem,) = place.problems(checkpoint=tmp_path / "c", public_key=public)
    assert problem.startswith("fork")


def test_a_chain_that_a_forger_computed_anew_is_a_fork_against_a_checkpoint(place, auditor, tmp_path):
    """In the clear anybody can compute it. With the key, that is the insider who holds it."""
    key, public = auditor
    jobs.log_checkpoint(place.gallery, key, tmp_path / "c", place.config)
    place.run("DELETE FROM verdict")
    for table in ("chain", "digest", "row_change"):
        place.run(f"DELETE FROM {table}")
    with place.open() as engine:
        for i in range(8, 12):
            enroll(engine, i)
    assert not place.problems()
    (problem,) = place.problems(checkpoint=tmp_path / "c", public_key=public)
    assert problem.startswith(("fork", "rollback"))


def test_a_checkpoint_of_another_gallery_key_or_content_is_told(folder, config, auditor, tmp_path):
    key, public = auditor
    with bd.Engine.open(tmp_path / "other", config):
        pass
    jobs.log_checkpoint(tmp_path / "other", key, tmp_path / "c", config)
    (problem,) = problems(folder, config, checkpoint=tmp_path / "c", public_key=public)
    assert "belongs to gallery" in problem
    jobs.log_checkpoint(folder, key, tmp_path / "d", config)
    jobs.make_signing_key(tmp_path / "another.key")
    (problem,) = problems(folder, config, checkpoint=tmp_path / "d", public_key=tmp_path / "another.pub")
    assert "signature" in problem
    report = jobs.verify_log(folder, config, checkpoint=tmp_path / "d")
    assert not report.problems and any("no public key" in note for note in report.notes)
    (tmp_path / "d").write_text((tmp_path / "d").read_text().replace('"commit": ', '"commit": 1'))
    (problem,) = problems(folder, config, checkpoint=tmp_path / "d")
    assert "signature" in problem
    for content in ("{}", "[]", "", '{"signature": "00", "signed_by": "00"}'):
        (tmp_path / "d").write_text(content)
        with pytest.raises(bd.InvalidInput, match="not a signed document"):
            jobs.verify_log(folder, config, checkpoint=tmp_path / "d")


def test_a_key_pair_is_private_and_never_replaced(tmp_path):
    public = jobs.make_signing_key(tmp_path / "a.key")
    assert len(public) == 64 and (tmp_path / "a.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(bd.InvalidInput, match="exists"):
        jobs.make_signing_key(tmp_path / "a.key")


@pytest.mark.slow
def test_a_checkpoint_is_posted_to_an_address(folder, config, auditor, tmp_path):
    if config.keys is not None:
        return
    taken = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self):
            taken.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response((200, 500, 302)[len(taken) - 1])
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def do_GET(self):  # what a redirected POST becomes
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        serving = threading.Thread(target=server.serve_forever, daemon=True)
        serving.start()
        url = f"http://127.0.0.1:{server.server_port}/"
        jobs.log_checkpoint(folder, auditor[0], tmp_path / "c", url=url)
        with pytest.raises(bd.StorageUnavailable, match="500"):
            jobs.log_checkpoint(folder, auditor[0], tmp_path / "d", url=url)
        with pytest.raises(bd.StorageUnavailable, match="302"):
            jobs.log_checkpoint(folder, auditor[0], tmp_path / "f", url=url)
        server.shutdown()
        serving.join()
    assert taken[0] == (tmp_path / "c").read_bytes() and (tmp_path / "d").exists()
    with pytest.raises(bd.InvalidInput, match="HTTP"):
        jobs.log_checkpoint(folder, auditor[0], tmp_path / "e", url="file:///etc/passwd")


@pytest.mark.slow
def test_a_log_that_is_not_sound_is_not_signed(place, auditor, tmp_path):
    place.run("DELETE FROM verdict")
    with pytest.raises(bd.GalleryDamaged, match="not valid"):
        jobs.log_checkpoint(place.gallery, auditor[0], tmp_path / "c", place.config)
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_a_fault_in_the_middle_of_a_commit_leaves_a_chain_that_verifies(folder):
    if (folder / "gallery.key").exists():
        return  # the connection that fails is one in the clear
    for n in range(2, 44, 7):
        for after in (False, True):
            countdown = Countdown(n, after=after)
            gallery = folder.parent / f"{n}{after}"
            shutil.copytree(folder, gallery)
            with suppress(bd.BiodedupError), bd.Engine.open(gallery, storage=FailingStorage(countdown)) as engine:
                enroll(engine, 9)
                internals(engine).gallery.seal()
            gc.collect()  # the error holds a cursor, and its connection a lock
            assert not problems(gallery, CONFIGS["clear"])
            with bd.Engine.open(gallery, CONFIGS["clear"]) as engine:
                enroll(engine, 9)
            assert not problems(gallery, CONFIGS["clear"])
            shutil.rmtree(gallery)


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIGS["keyed"]], ids=["keyed"])
def test_a_killed_writer_leaves_a_chain_that_verifies(folder, config):
    script = f"""
import sys
from tests.gallery.test_log import CONFIGS, bd, enroll
with bd.Engine.open({str(folder)!r}, CONFIGS["keyed"]) as engine:
    for i in range(7, 60):
        enroll(engine, i)
        print(i, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as writer:
        for _ in range(4):
            writer.stdout.readline()
        writer.kill()
    assert not problems(folder, config)
    with bd.Engine.open(folder, config) as engine:
        assert engine.decision("e10") is not None
        engine.compact()
    assert not problems(folder, config)


def test_a_backup_has_the_chain_and_so_has_what_goes_on_from_it(folder, config, tmp_path):
    with bd.Engine.open(folder, config) as engine:
        engine.backup(tmp_path / "copy")
        enroll(engine, 8)
        engine.compact()
        engine.backup(tmp_path / "copy")
    assert not problems(tmp_path / "copy", config)
    with bd.Engine.open(tmp_path / "copy", config) as engine:
        enroll(engine, 9)
    assert not problems(tmp_path / "copy", config)


def test_a_wrong_key_of_the_gallery_is_refused(folder, config):
    if config.keys is not None:
        with pytest.raises(bd.KeyMismatch):
            jobs.verify_log(folder, replace(config, keys=lambda: bytes(32)[:-1] + b"x"))


def test_with_a_key_the_chain_cannot_be_computed_without_it():
    assert ChainHash(KEY).rows("cell", [b""]) != ChainHash(None).rows("cell", [b""])
    assert ChainHash(KEY).of(b"") != ChainHash(None).of(b"")


def test_a_gallery_of_an_older_format_begins_its_chain_with_the_next_writer(tmp_path):
    shutil.copytree("tests/golden/format-5", tmp_path / "g")
    assert "no hash chain" in problems(tmp_path / "g", bd.Config())[0]
    with bd.Engine.open(tmp_path / "g"):
        pass
    found = jobs.verify_log(tmp_path / "g")
    assert not found.problems and "begins at commit" in found.notes[0]


def test_encrypting_a_gallery_goes_on_with_its_chain(tmp_path):
    keyed = CONFIGS["keyed"]
    with bd.Engine.open(tmp_path / "g", CONFIGS["clear"]) as engine:
        enroll(engine, 0)
    jobs.encrypt(tmp_path / "g", keyed.keys)
    assert not problems(tmp_path / "g", keyed)
    with bd.Engine.open(tmp_path / "g", keyed) as engine:
        enroll(engine, 1)
    found = jobs.verify_log(tmp_path / "g", keyed)
    assert not found.problems and found.keyed and any("new key" in note for note in found.notes)


@pytest.mark.slow
def test_the_command_ends_with_exit_code_4_where_something_is_wrong(folder, config):
    if config.keys is None:
        assert command("log", "verify", "-g", folder).exit_code == 0
        forge(folder, config, "DELETE FROM encounter")
        done = command("log", "verify", "-g", folder)
        assert done.exit_code == 4 and "table encounter" in done.output


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_log_that_is_not_sound_is_neither_encrypted_nor_decrypted(folder, config):
    crossing = jobs.encrypt if config.keys is None else jobs.decrypt
    forge(folder, config, "DELETE FROM verdict")
    before = problems(folder, config)
    assert before
    with pytest.raises(bd.GalleryDamaged, match="is damaged"):
        crossing(folder, config.keys or (lambda: KEY))
    assert problems(folder, config) == before
