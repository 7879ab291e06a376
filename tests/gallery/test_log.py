"""The hash chain over the commits: what `log verify` names, with and without a key, and against a checkpoint."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

import biodedup as bd
from biodedup import jobs
from biodedup.cli import main
from biodedup.gallery.catalogue.chain import ChainHash, Digest, pack_row
from biodedup.gallery.catalogue.sqlite import SqliteCatalogue, row_checksum
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.testing import internals
from tests.support.galleries import enroll, small

KEY = bytes(range(1, 33))
CONFIGS = {"clear": small(seal_rows=1000), "keyed": replace(small(seal_rows=1000), keys=lambda: KEY)}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def folder(tmp_path, config):
    with bd.Engine.open(tmp_path / "g", config) as engine:
        for i in range(4):
            enroll(engine, i)
        gallery = internals(engine).gallery
        with gallery.transaction() as transaction:
            transaction.judge([bd.Verdict("e1", "s1", "s0", "different", "anna", 1.0, "")], [])
        engine.remove("s2")
        gallery.seal()
        for i in range(4, 7):
            enroll(engine, i)
    return tmp_path / "g"


def problems(folder, config, **more):
    return list(jobs.verify_log(folder, config, **more).problems)


def forge(folder, config, statement, values=()):
    """What an attacker with the database's key, or of a gallery in the clear, can do."""
    with closing(LocalStorage(config.keys).connect(folder / "gallery.sqlite3", read_only=False)) as database:
        return database.execute(statement, values).fetchall()


@pytest.fixture
def auditor(tmp_path):
    def made(name="auditor"):
        path = tmp_path / f"{name}.pem"
        private = Ed25519PrivateKey.generate()
        path.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return path

    return made


def test_a_gallery_that_nobody_touched_is_sound_from_its_first_commit_on(folder, config):
    found = jobs.verify_log(folder, config)
    assert found.problems == found.notes == ()
    assert found.first_commit == 0 and found.commit == found.links - 1
    assert found.keyed == (config.keys is not None) and found.files


def test_the_digest_of_a_table_is_the_sum_of_its_rows_hashes(folder, config):
    with closing(LocalStorage(config.keys).connect(folder / "gallery.sqlite3", read_only=True)) as database:
        catalogue = SqliteCatalogue(database)
        stored = catalogue.digests()
        for table in ("subject", "cell", "encounter", "verdict", "segment", "policy"):
            rows = list(catalogue.rows_of(table))
            hashes = [catalogue.chain_hash.row(table, pack_row(row)) for row in rows]
            total = sum(int.from_bytes(value, "big") for value in hashes) % 2**256
            assert stored[table] == Digest(len(rows), total)


def test_a_deleted_verdict_is_named_with_its_commit(folder, config):
    forge(folder, config, "DELETE FROM verdict")
    assert problems(folder, config) == ["table verdict: a row that commit 5 wrote is lost or changed"]


def test_a_decision_that_was_changed_with_its_checksum_is_named(folder, config):
    (row,) = forge(folder, config, "SELECT * FROM encounter WHERE encounter_id = 'e5'")
    changed = (*row[:2], "duplicate", row[3])
    forge(folder, config, "REPLACE INTO encounter VALUES (?, ?, ?, ?, ?)", (*changed, row_checksum(changed)))
    found = problems(folder, config)
    assert "table encounter: the row 'e5' is not as a commit wrote it" in found and len(found) == 2


def test_what_was_tampered_with_stays_visible_after_later_commits_and_a_seal(folder, config):
    forge(folder, config, "DELETE FROM verdict")
    with bd.Engine.open(folder, config) as engine:
        enroll(engine, 8)
        internals(engine).gallery.seal()
    assert any("table verdict" in problem for problem in problems(folder, config))


def test_an_earlier_table_of_digests_stops_the_next_writer(folder, config):
    old = forge(folder, config, "SELECT * FROM digest WHERE name = 'subject'")[0]
    with bd.Engine.open(folder, config) as engine:
        enroll(engine, 8)
    forge(folder, config, "REPLACE INTO digest VALUES (?, ?, ?, ?)", old)
    assert any("table digest" in problem for problem in problems(folder, config))
    with bd.Engine.open(folder, config) as engine, pytest.raises(bd.GalleryDamaged, match="log verify"):
        enroll(engine, 9)


def test_a_dropped_and_a_forged_link_are_named(folder, config):
    forge(folder, config, "DELETE FROM chain WHERE number = 4")
    assert any("link 5 (commit 4) does not follow link 3" in problem for problem in problems(folder, config))


def test_a_segment_of_earlier_time_put_back_is_named(folder, config):
    name = next((folder / "segments").glob("*.subject"))
    other = folder.parent / "other"
    with bd.Engine.open(other, config) as engine:
        enroll(engine, 1)
        internals(engine).gallery.seal()
    shutil.copy(next((other / "segments").glob("*.subject")), name)
    assert any("segment 1" in problem for problem in problems(folder, config))


def test_a_whole_gallery_of_an_earlier_time_is_a_rollback_against_a_checkpoint(folder, config, auditor, tmp_path):
    key, old = auditor(), tmp_path / "old"
    shutil.copytree(folder, old)
    with bd.Engine.open(folder, config) as engine:
        enroll(engine, 8)
    jobs.log_checkpoint(folder, key, tmp_path / "c", config, clock=lambda: 5.0)
    assert json.loads((tmp_path / "c").read_text())["time"] == 5.0
    assert problems(folder, config, checkpoint=tmp_path / "c", key=key) == []
    (found,) = problems(old, config, checkpoint=tmp_path / "c", key=key)
    assert found.startswith("rollback")
    with bd.Engine.open(old, config) as engine:
        enroll(engine, 9)
        enroll(engine, 10)
    (found,) = problems(old, config, checkpoint=tmp_path / "c", key=key)
    assert found.startswith("fork")


def test_a_checkpoint_of_another_gallery_key_or_content_is_told(folder, config, auditor, tmp_path):
    key = auditor()
    with bd.Engine.open(tmp_path / "other", config):
        pass
    jobs.log_checkpoint(tmp_path / "other", key, tmp_path / "c", config)
    (found,) = problems(folder, config, checkpoint=tmp_path / "c", key=key)
    assert "is of gallery" in found
    jobs.log_checkpoint(folder, key, tmp_path / "d", config)
    (found,) = problems(folder, config, checkpoint=tmp_path / "d", key=auditor("another"))
    assert "signature" in found
    (tmp_path / "d").write_text((tmp_path / "d").read_text().replace('"commit": ', '"commit": 1'))
    (found,) = problems(folder, config, checkpoint=tmp_path / "d")
    assert "signature" in found
    (tmp_path / "d").write_text("{}")
    with pytest.raises(bd.InvalidInput, match="no checkpoint"):
        jobs.verify_log(folder, config, checkpoint=tmp_path / "d")


def test_a_log_that_is_not_sound_is_not_signed(folder, config, auditor, tmp_path):
    forge(folder, config, "DELETE FROM verdict")
    with pytest.raises(bd.GalleryDamaged, match="not sound"):
        jobs.log_checkpoint(folder, auditor(), tmp_path / "c", config)
    assert not (tmp_path / "c").exists()


def test_a_wrong_key_of_the_gallery_is_refused(folder, config):
    if config.keys is not None:
        with pytest.raises(bd.KeyMismatch):
            jobs.verify_log(folder, replace(config, keys=lambda: bytes(32)[:-1] + b"x"))


def test_with_a_key_the_chain_cannot_be_computed_without_it():
    assert ChainHash(KEY).row("cell", b"") != ChainHash(None).row("cell", b"")


def test_a_gallery_of_an_older_format_begins_its_chain_with_the_next_writer(tmp_path):
    shutil.copytree("tests/golden/format-5", tmp_path / "g")
    assert "no hash chain" in problems(tmp_path / "g", bd.Config())[0]
    with bd.Engine.open(tmp_path / "g"):
        pass
    found = jobs.verify_log(tmp_path / "g")
    assert not found.problems and "is checked from commit" in found.notes[0]


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


def test_the_command_ends_with_exit_code_4_where_something_is_wrong(tmp_path, capsys):
    with bd.Engine.open(tmp_path / "g", CONFIGS["clear"]) as engine:
        enroll(engine, 0)
    with pytest.raises(SystemExit) as ended:
        main(["log", "verify", "-g", str(tmp_path / "g")])
    assert ended.value.code == 0
    forge(tmp_path / "g", CONFIGS["clear"], "DELETE FROM encounter")
    with pytest.raises(SystemExit) as ended:
        main(["log", "verify", "-g", str(tmp_path / "g")])
    assert ended.value.code == 4 and "table encounter" in capsys.readouterr().out
