"""Commands whose gallery is the URL of a register: those that take it, and what the others say."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import biodedup as bd
from biodedup import jobs
from biodedup.cli import app
from biodedup.errors import InvalidInput, NotAGallery
from tests.support.vectors import people


@pytest.fixture
def called(register, tmp_path):
    """Calls a command on a register of three people with an open case; returns its exit code and what it printed."""
    with register(bd.Config(gallery=bd.GalleryConfig(background=False))) as engine:
        engine.add_templates([f"s{i}" for i in range(3)], {"face": people(3, seed=1)}, groups=[["roll"]] * 3)
        engine.dispute(bd.Encounter("s0", templates={"face": people(9, seed=2)[8]}, encounter_id="e3"))
    (tmp_path / "s.toml").write_text(
        f'[cluster]\nsegments = "file://{tmp_path}/store"\nray_address = "127.0.0.1:1"\nreplicas = 2\n'
    )

    def call(*arguments: str, url: str = register.url):
        done = CliRunner().invoke(app, [*arguments, "--gallery", url, "--config", str(tmp_path / "s.toml")])
        if isinstance(done.exception, bd.BiodedupError):
            raise done.exception
        return done.exit_code, done.stdout

    return call


@pytest.mark.slow
def test_commands_that_look_take_a_url_and_need_no_ray(called, tmp_path):
    code, out = called("list", "--json")
    assert code == 0 and json.loads(out)["subjects"] == 3 and json.loads(out)["groups"]["roll"] == 3
    assert json.loads(called("subject", "s1", "--json")[1])["subject_id"] == "s1"
    assert json.loads(called("info", "--json")[1])["subjects"] == 3
    assert called("callers")[0] == 0
    assert json.loads(called("policy", "show", "--json")[1])["version"] == 1
    assert "policy.review_fpir" in json.loads(called("config", "--json")[1])["settings"]
    assert {case["encounter_id"] for case in json.loads(called("cases", "list", "--json")[1])["cases"]} == {"e3"}
    assert called("cases", "export", "--out", str(tmp_path / "judged.csv"))[0] == 0
    assert called("list", "--out", str(tmp_path / "all.csv"))[0] == 0 and "s2" in (tmp_path / "all.csv").read_text()


@pytest.mark.slow
def test_the_log_of_a_register_is_verified_and_signed_and_a_receipt_has_its_place(called, register, tmp_path):
    jobs.make_signing_key(tmp_path / "a.key")
    register().seal()
    assert called("log", "verify")[0] == 0
    assert called("log", "checkpoint", "--sign", str(tmp_path / "a.key"), "--out", str(tmp_path / "c"))[0] == 0
    assert called("receipt", "e3", "--sign", str(tmp_path / "a.key"), "-o", str(tmp_path / "r"))[0] == 0
    receipt = json.loads((tmp_path / "r").read_text())
    cluster = bd.ClusterConfig(segments=f"file://{tmp_path}/store")
    mark = jobs.verify_log(register.url, bd.Config(cluster=cluster)).mark
    assert 0 < receipt["link"] <= mark.number and len(receipt["chain"]) == 64
    files = list((tmp_path / "store").rglob("1.face.*"))
    assert files
    for file in files:
        file.unlink()
    assert called("log", "verify")[0] == 4
    with pytest.raises(bd.GalleryDamaged, match=r"the register is not valid: segment 1: .* lacks"):
        called("log", "checkpoint", "--sign", str(tmp_path / "a.key"), "--out", str(tmp_path / "d"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("status",),
        ("export", "--to", "x"),
        ("backup", "x"),
        ("compact",),
        ("load", "x.parquet"),
        ("enroll-batch", "x.csv"),
        ("undo", "m"),
        ("key", "status"),
        ("doctor",),
    ],
    ids=" ".join,
)
def test_commands_on_files_of_a_folder_say_what_to_do(arguments):
    done = CliRunner().invoke(app, [*arguments, "--gallery", "postgresql://u@h/d?gallery=g"])
    assert isinstance(done.exception, InvalidInput) and "gallery export URL --to FOLDER" in str(done.exception)


@pytest.mark.slow
def test_a_register_without_settings_or_that_is_not_there_is_refused_and_none_is_made(called, register):
    done = CliRunner().invoke(app, ["list", "--gallery", register.url])
    assert isinstance(done.exception, InvalidInput) and "segments" in str(done.exception)
    with pytest.raises(NotAGallery):
        called("remove", "s1", url=register.url + "x")
    with pytest.raises(NotAGallery):
        called("list", url=register.url + "x")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["list", "status", "policy show", "info"])
def test_without_an_option_the_gallery_is_the_default_folder(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, command.split())
    assert isinstance(done.exception, NotAGallery) and "gallery" in str(done.exception), done.exception
