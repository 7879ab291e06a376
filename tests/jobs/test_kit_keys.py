"""Keys of kits and of the centre: private, with passphrases, trusted and revoked."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.cli import main
from biodedup.jobs.kits.format.keys import load_centre_key, load_centre_public, load_key
from biodedup.jobs.kits.trust import load_trusted
from tests.support.kits import MONDAY, YEAR, table
from tests.support.vectors import people

SECRET = "correct horse battery staple"


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["biodedup", "kit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


# files ------------------------------------------------------------------------------------------------------------


def test_a_private_key_is_for_its_owner_alone_and_is_never_overwritten(tmp_path):
    public = jobs.make_keys("kit-07", tmp_path / "kit.key", clock=lambda: MONDAY)
    assert os.stat(tmp_path / "kit.key").st_mode & 0o777 == 0o600
    assert "PRIVATE" not in (tmp_path / "kit.pub").read_text()
    loaded = load_key(tmp_path / "kit.key")
    assert loaded.public.fingerprint == public.fingerprint
    assert "PRIVATE" not in repr(loaded)
    (trusted,) = load_trusted(tmp_path).values()
    assert (trusted.kit_id, trusted.made_at, trusted.expires_at) == ("kit-07", MONDAY, MONDAY + 2 * YEAR)
    with pytest.raises(bd.InvalidInput, match="never overwritten"):
        jobs.make_keys("kit-07", tmp_path / "kit.key")
    for wrong in ("", "../x", "a b", "x" * 65, "kit:a"):
        with pytest.raises(bd.InvalidInput, match="kit id"):
            jobs.make_keys(wrong, tmp_path / "other.key")
    secret = json.loads((tmp_path / "kit.key").read_text())["private_key"]
    (tmp_path / "kit.key").write_text(json.dumps({"kit_id": "k", "made_at": 0, "private_key": secret[:60]}))
    with pytest.raises(bd.InvalidInput) as caught:
        load_key(tmp_path / "kit.key")
    assert secret[30:60] not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(bd.InvalidInput, match=r"no \.pub files"):
        load_trusted(tmp_path / "empty")


def test_a_passphrase_is_needed_for_a_key_that_has_one(tmp_path):
    jobs.make_keys("A", tmp_path / "A.key", passphrase=SECRET)
    jobs.make_centre_key(tmp_path / "centre.key", passphrase=SECRET)
    for name, load in (("A.key", load_key), ("centre.key", load_centre_key)):
        path = tmp_path / name
        content = path.read_text()
        assert "ENCRYPTED PRIVATE KEY" in content and SECRET not in content and jobs.needs_passphrase(path)
        assert path.stat().st_mode & 0o777 == 0o600
        assert load(path, SECRET).public.fingerprint
        with pytest.raises(bd.InvalidInput, match="no passphrase was given"):
            load(path)
        for wrong in ("", "a wrong passphrase", SECRET + " "):
            with pytest.raises(bd.InvalidInput) as caught:
                load(path, wrong)
            assert "does not open" in str(caught.value) and "wrong passphrase" not in str(caught.value)
    with pytest.raises(bd.InvalidInput, match="9 characters, wanted at least 10"):
        jobs.make_keys("B", tmp_path / "B.key", passphrase="too short")
    assert not (tmp_path / "B.key").exists()
    jobs.make_keys("B", tmp_path / "B.key")
    assert not jobs.needs_passphrase(tmp_path / "B.key")
    assert load_key(tmp_path / "B.key", SECRET).public.kit_id == "B"  # one passphrase may stand for several keys


def test_a_key_of_an_earlier_release_expires_as_one_of_today(tmp_path):
    jobs.make_keys("A", tmp_path / "A.key", clock=lambda: MONDAY)
    fields = json.loads((tmp_path / "A.pub").read_text())
    del fields["expires_at"]
    (tmp_path / "A.pub").write_text(json.dumps(fields))
    (trusted,) = load_trusted(tmp_path).values()
    assert trusted.expires_at == MONDAY + 2 * YEAR
    (tmp_path / "A.pub").write_text(json.dumps(fields | {"expires_at": MONDAY + 500 * YEAR}))
    (trusted,) = load_trusted(tmp_path).values()
    assert trusted.expires_at == MONDAY + 10 * YEAR  # a kit does not make itself eternal


def test_keys_of_kits_and_centres_are_not_taken_for_one_another(tmp_path):
    jobs.make_keys("A", tmp_path / "A.key")
    jobs.make_centre_key(tmp_path / "centre.key")
    for load, name in (
        (load_key, "centre.key"),
        (load_centre_key, "A.key"),
        (load_centre_public, "A.pub"),
        (load_trusted, "centre.pub"),
    ):
        with pytest.raises(bd.InvalidInput):
            load(tmp_path / name)


# trust ------------------------------------------------------------------------------------------------------------


def test_what_a_key_may_do_is_kept_beside_it_and_changed_bit_by_bit(tmp_path):
    public = jobs.make_keys("A", tmp_path / "A.key", clock=lambda: MONDAY)
    trusted = tmp_path / "trusted"
    known = jobs.set_trust(tmp_path / "A.pub", trusted, groups=("b", "a"), void_max=7)
    assert (known.trust.groups, known.trust.void_max, known.trust.encounters_batch_max) == (("a", "b"), 7, 5_000)
    jobs.set_trust("A", trusted, not_after=MONDAY + 5)
    (loaded,) = load_trusted(trusted).values()
    assert loaded.trust == jobs.set_trust(public.fingerprint.hex()[:8], trusted).trust
    assert (loaded.trust.groups, loaded.trust.not_after) == (("a", "b"), MONDAY + 5)
    assert load_trusted(trusted).problems == ()
    for wrong in ({"void_max": -1}, {"groups": ("\n",)}, {"encounters_day_max": "9"}):
        with pytest.raises(bd.InvalidInput):
            jobs.set_trust("A", trusted, **wrong)
    with pytest.raises(bd.InvalidInput, match=r"neither a \.pub file"):
        jobs.set_trust("Z", trusted)


def test_a_revoked_key_stays_revoked_and_the_first_entry_stays(tmp_path):
    jobs.make_keys("A", tmp_path / "A.key", clock=lambda: MONDAY)
    trusted = tmp_path / "trusted"
    jobs.set_trust(tmp_path / "A.pub", trusted)
    jobs.revoke("A", trusted, by="Ani", reason='lost "somewhere" \\ — di jalan', clock=lambda: MONDAY + 1)
    again = jobs.revoke("A", trusted, by="Budi", reason="again", clock=lambda: MONDAY + 2)
    (loaded,) = load_trusted(trusted).values()
    assert loaded.trust == again.trust
    assert (loaded.trust.revoked_at, loaded.trust.revoked_by) == (MONDAY + 1, "Ani")
    assert loaded.trust.revoked_reason == 'lost "somewhere" \\ — di jalan'
    with pytest.raises(bd.InvalidInput, match="permanent"):
        jobs.set_trust("A", trusted, groups=("a",))
    for by, reason in (("", "lost"), ("Ani", " "), ("Ani", "two\nlines"), ("Ani", "x" * 501)):
        with pytest.raises(bd.InvalidInput):
            jobs.revoke("A", trusted, by=by, reason=reason)


def test_of_two_keys_of_a_kit_the_one_that_is_meant_is_named(tmp_path):
    trusted = tmp_path / "trusted"
    first, second = (jobs.make_keys("A", tmp_path / f"{n}.key") for n in "12")
    for n in "12":
        jobs.set_trust(tmp_path / f"{n}.pub", trusted)
    with pytest.raises(bd.InvalidInput) as caught:
        jobs.revoke("A", trusted, by="Ani", reason="lost")
    assert first.fingerprint.hex()[:16] in str(caught.value) and second.fingerprint.hex()[:16] in str(caught.value)
    jobs.revoke(first.fingerprint.hex()[:16], trusted, by="Ani", reason="lost")
    assert {k.fingerprint: k.trust.revoked_by for k in load_trusted(trusted).values()} == {
        first.fingerprint: "Ani",
        second.fingerprint: "",
    }


# from the command line ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_official_does_it_from_the_command_line(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    pa.parquet.write_table(
        table(people(3), ["<b>anna</b>", "bella", "carla"], groups=[["north"]] * 3), tmp_path / "m.parquet"
    )
    monkeypatch.setenv("BIODEDUP_KIT_PASSPHRASE", SECRET)
    monkeypatch.setenv("BIODEDUP_CENTRE_PASSPHRASE", SECRET[::-1])
    assert run("centre-key")[0] == 0
    code, out, _ = run("keys", "--kit-id", "K7", "--out", "kit.key", "--days", "30", "--json")
    assert (code, json.loads(out)["encrypted"]) == (0, True)
    code, out, _ = run("trust", "kit.pub", "--group", "north", "--batch-max", "9", "--until", "2099-12-31", "--json")
    told = json.loads(out)
    assert (told["groups"], told["encounters_batch_max"], told["not_after"]) == (["north"], 9, "2099-12-31")
    assert run("pack", "m.parquet", "--out", "b.kit", "--key", "kit.key")[0] == 0
    code, out, _ = run("inspect", "b.kit", "--json")
    assert (code, json.loads(out)["batches"][0]["records"]) == (0, 3)
    code, out, _ = run("ingest", "b.kit", "--gallery", "g", "--out", "o.csv", "--report", "r.html", "--json")
    assert (code, json.loads(out)["enrolled"]) == (0, 3)
    page = (tmp_path / "r.html").read_text()
    assert "<b>anna" not in page and "3 records" in page
    assert pa.csv.read_csv(tmp_path / "o.csv").column("outcome").to_pylist() == ["enrolled"] * 3
    content = (tmp_path / "b.kit").read_bytes()
    (tmp_path / "b.kit").write_bytes(content[:-10])
    code, _, err = run("ingest", "b.kit", "--gallery", "g", "--out", "o.csv")
    assert code == 4 and "breaks off: 3 records were whole" in err
    assert run("ingest", "m.parquet", "--gallery", "g")[0] == 2
    assert run("revoke", "K7", "--by", "Ani", "--reason", "lost")[0] == 0
    (tmp_path / "b.kit").write_bytes(content)
    code, _, err = run("ingest", "b.kit", "--gallery", "g", "--out", "o.csv")
    assert code == 2 and "was revoked on" in err and "by Ani (lost)" in err


@pytest.mark.slow
def test_a_passphrase_comes_from_a_descriptor_or_the_environment_and_never_from_an_argument(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())  # no terminal
    code, _, err = run("keys", "--kit-id", "K7")
    assert code == 2 and "BIODEDUP_KIT_PASSPHRASE" in err and not Path("kit.key").exists()
    Path("secret").write_text(SECRET + "\n")
    with open("secret") as file:
        assert run("keys", "--kit-id", "K7", "--passphrase-fd", file.fileno())[0] == 0
    assert load_key(tmp_path / "kit.key", SECRET).public.kit_id == "K7"
    assert run("keys", "--kit-id", "K7", "--out", "other.key", "--passphrase-fd", 987)[0] == 2
    assert run("keys", "--kit-id", "K8", "--out", "open.key", "--no-passphrase")[0] == 0
    assert not jobs.needs_passphrase(tmp_path / "open.key")
    assert run("keys", "--kit-id", "K9", "--passphrase", SECRET)[0] == 2
    assert run("centre-key", "--no-passphrase")[0] == 0
    pa.parquet.write_table(table(people(1)), tmp_path / "m.parquet")
    code, _, err = run("pack", "m.parquet")
    assert code == 2 and "kit.key needs a passphrase" in err
    monkeypatch.setenv("BIODEDUP_KIT_PASSPHRASE", "something else")
    code, _, err = run("pack", "m.parquet")
    assert code == 2 and "does not open with this passphrase" in err


def test_packing_with_an_expired_key_is_reported(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    jobs.make_keys("K", tmp_path / "kit.key", days=1, clock=lambda: time.time() - 3 * 86_400)
    jobs.make_centre_key(tmp_path / "centre.key")
    pa.parquet.write_table(table(people(1)), tmp_path / "m.parquet")
    code, _, err = run("pack", "m.parquet")
    assert code == 0 and "key has expired" in err


def test_without_the_library_that_signs_everything_says_what_to_install(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for call in (
        lambda: jobs.make_keys("A", tmp_path / "A.key"),
        lambda: load_key(tmp_path / "A.key"),
        lambda: jobs.load_trusted(tmp_path),
    ):
        with pytest.raises(bd.InvalidInput, match=r"biodedup\[kit\]"):
            call()
