"""Settings: which file, variable or option says what, and errors that name the place."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

import biodedup as bd
from biodedup.cli import app
from biodedup.cli.base import Exit
from biodedup.common.tables import differences, flat, made, plain, typed
from biodedup.settings import settings_for
from biodedup.synthetic import draw_impression, draw_master
from tests.support.images import jpeg
from tests.support.vectors import SFACE, people

RUN = CliRunner()


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_has_the_names_of_config_and_leaves_the_rest_at_its_default(tmp_path):
    file = written(
        tmp_path / "s.toml",
        """
        threads = 3
        [face]
        sharpness_min = 1
        model = "cards/own.toml"
        model_folder = "cards"
        [finger]
        model = ""
        [search]
        across_positions = true
        [policy]
        required = ["face", "2 fingers"]
        """,
    )
    config = bd.Config.load(file)
    assert (config.threads, config.batch_size) == (3, 32)
    assert (config.face.sharpness_min, config.face.roll_deg_max) == (1.0, 60.0)
    assert config.face.model == str(tmp_path / "cards" / "own.toml")
    assert config.face.model_folder == tmp_path / "cards"
    assert (config.finger.model, config.search.across_positions) == (None, True)
    assert config.policy == bd.Policy(required=("face", "2 fingers"))
    assert bd.Config.load(written(tmp_path / "empty.toml", "")) == bd.Config()


@pytest.mark.parametrize(
    "text, told",
    [
        ("thread = 3", ["thread is not known", "did you mean threads?"]),
        ("[face]\nsharpnes_min = 1", ["face.sharpnes_min is not known", "face.sharpness_min"]),
        ("[nose]\nx = 1", ["nose is not known", "known are face, finger"]),
        ("threads = 'two'", ["threads is 'two'", "wanted a whole number"]),
        ("threads = true", ["threads is True", "wanted a whole number"]),
        ("threads = 2.0", ["threads is 2.0", "wanted a whole number"]),
        ("threads = 0", ["threads is 0", "wanted at least 1"]),
        ("[face]\nsharpness_min = nan", ["face.sharpness_min is nan", "wanted a number"]),
        ("[face]\nconfidence_min = 1.5", ["face.confidence_min is 1.5", "wanted 0 to 1"]),
        ("[face]\nmodel = ''", ["face.model is empty", "wanted a name"]),
        ("[finger]\nminutiae_min = -1", ["finger.minutiae_min is -1", "wanted at least 0"]),
        ("[finger]\nmodel = 3", ["finger.model is 3", 'wanted a text, or "" for none']),
        ("[capture]\npixels_max = 0", ["capture.pixels_max is 0", "wanted at least 1"]),
        ("[search]\nmiss_risk = 0.7", ["search.miss_risk is 0.7", "less than 0.5"]),
        ("[gallery]\nbackground = 1", ["gallery.background is 1", "wanted true or false"]),
        ("[policy]\nfpir = 2", ["policy.fpir is 2.0", "between 0 and 1"]),
        ("[policy]\nrequired = 'face'", ["policy.required is 'face'", "wanted a list of texts"]),
        ("[policy]\nrequired = ['nose']", ["policy.required has 'nose'", "'N fingers'"]),
        ("face = 3", ["face is 3", "wanted a table"]),
        ("threads = ", ["is not TOML"]),
    ],
)
def test_a_mistake_names_the_file_the_setting_what_it_got_and_what_it_wanted(tmp_path, text, told):
    file = written(tmp_path / "s.toml", text)
    with pytest.raises(bd.InvalidInput) as error:
        bd.Config.load(file)
    for one in (str(file), *told):
        assert one in str(error.value)
    with pytest.raises(bd.InvalidInput, match="does not exist"):
        bd.Config.load(tmp_path / "absent.toml")


def test_each_setting_comes_from_the_strongest_place_that_names_it(tmp_path):
    gallery = tmp_path / "g"
    beside = written(
        tmp_path / "biodedup.toml", "threads = 3\nbatch_size = 5\n[search]\ncandidates = 7\nreturned = 8\n"
    )
    variable = written(tmp_path / "v.toml", "threads = 4\n[search]\ncandidates = 9\n")
    option = written(tmp_path / "o.toml", "threads = 5\n")

    def found(**more: object) -> tuple[list[int], list[str]]:
        chosen = settings_for(gallery, **more)
        values = flat(chosen.config)
        names = ("threads", "search.candidates", "search.returned", "batch_size")
        return [values[name] for name in names], [chosen.sources.get(name, "default") for name in names]

    environ = {"BIODEDUP_CONFIG": str(variable)}
    file, from_variable = str(beside), f"{variable} (BIODEDUP_CONFIG)"
    assert found(environ={}) == ([3, 7, 8, 5], [file] * 4)
    assert found(environ=environ) == ([4, 9, 8, 5], [from_variable, from_variable, file, file])
    assert found(environ=environ, file=option)[0] == [5, 9, 8, 5]
    values, sources = found(environ=environ, file=option, given={"threads": 6, "batch_size": None})
    assert (values, sources) == ([6, 9, 8, 5], ["command line", from_variable, file, file])
    beside.unlink()
    assert found(environ={}, usual={"batch_size": 256})[0] == [2, 100, 10, 256]
    assert settings_for(None, environ={}).config == bd.Config()
    with pytest.raises(bd.InvalidInput, match="does not exist"):
        found(environ={"BIODEDUP_CONFIG": str(tmp_path / "absent.toml")})


def test_every_dataclass_of_settings_goes_into_a_table_and_back():
    for instance in (bd.Config(), bd.Config(policy=bd.Policy(duplicate_db=40, review_db=30, required=()))):
        values = flat(instance)
        nested: dict[str, object] = {}
        for name, value in values.items():
            *outer, inner = name.split(".")
            table = nested.setdefault(outer[0], {}) if outer else nested
            table[inner] = plain(value)
        assert made(bd.Config, typed(bd.Config, json.loads(json.dumps(nested)), "a test")) == instance
    assert differences(bd.Policy(), bd.Policy(fpir=1e-6)) == {"fpir": (1e-3, 1e-6)}


# the command line -----------------------------------------------------------------------------------------------------


def commands(group: typer.main.TyperCommand) -> dict[str, set[str]]:
    """Name -> the options of each command."""
    found = {}
    for name, command in getattr(group, "commands", {}).items():
        if hasattr(command, "commands"):
            found |= {f"{name} {inner}": options for inner, options in commands(command).items()}
        else:
            found[name] = {option for parameter in command.params for option in parameter.opts}
    return found


def test_every_command_that_opens_a_gallery_or_takes_captures_takes_settings():
    without = {name for name, options in commands(typer.main.get_command(app)).items() if "--config" not in options}
    assert without == {
        "calibrate",
        "demo",
        "key new",
        "key status",
        "kit centre-key",
        "kit inspect",
        "kit keys",
        "kit revoke",
        "kit trust",
        "log key",
        "receipt verify",
        "status",
    }


@pytest.mark.slow
def test_commands_go_by_the_settings_of_each_place(tmp_path, portrait, monkeypatch):
    monkeypatch.delenv("BIODEDUP_CONFIG", raising=False)
    (tmp_path / "face.jpg").write_bytes(jpeg(portrait))
    strict = written(tmp_path / "strict.toml", "[face]\nbrightness_min = 250\nbrightness_max = 255\n")
    enroll = ["enroll", "anna", "--face", str(tmp_path / "face.jpg"), "--gallery", str(tmp_path / "g")]
    assert RUN.invoke(app, [*enroll, "--config", str(strict)]).exit_code == Exit.REFUSED
    assert RUN.invoke(app, enroll, env={"BIODEDUP_CONFIG": str(strict)}).exit_code == Exit.REFUSED
    beside = written(tmp_path / "biodedup.toml", strict.read_text())
    assert RUN.invoke(app, enroll).exit_code == Exit.REFUSED
    assert RUN.invoke(app, [*enroll, "--config", str(written(tmp_path / "w.toml", "[face]\nbrightness_min = 14\n"))]).exit_code == Exit.DONE  # fmt: skip
    beside.write_text("[face]\nbrightness = 1\n")
    for command in (
        ["info"],
        ["identify", "--face", str(tmp_path / "face.jpg")],
        ["policy", "show"],
        ["cases", "list"],
    ):
        error = RUN.invoke(app, [*command, "--gallery", str(tmp_path / "g")]).exception
        assert isinstance(error, bd.InvalidInput) and f"{beside}: face.brightness is not known" in str(error)


@pytest.mark.slow
def test_config_prints_each_setting_and_where_it_comes_from(tmp_path):
    gallery, beside = tmp_path / "g", written(tmp_path / "biodedup.toml", "batch_size = 5\n")
    option = written(tmp_path / "o.toml", "[search]\nreturned = 3\n")

    def printed(*more: str) -> dict[str, tuple[object, str]]:
        result = RUN.invoke(app, ["config", str(gallery), "--threads", "7", "--config", str(option), "--json", *more])
        return {name: (one["value"], one["from"]) for name, one in json.loads(result.stdout)["settings"].items()}

    got = printed()
    assert got["batch_size"] == (5, str(beside))
    assert got["search.returned"] == (3, f"{option} (--config)")
    assert (got["threads"], got["face.model"]) == ((7, "command line"), ("sface", "default"))
    assert got["policy.fpir"] == (1e-3, "default")
    with bd.Engine.open(gallery, bd.Config(policy=bd.Policy(fpir=1e-4))) as engine:
        engine.set_policy(bd.Policy(fpir=1e-6), by="A", reason="why")
    assert printed()["policy.fpir"] == (1e-6, "gallery, version 2")
    shown = RUN.invoke(app, ["config", "--gallery", str(gallery)])
    assert shown.exit_code == 0 and "batch_size" in shown.stdout


@pytest.mark.slow
def test_a_policy_is_set_and_shown_by_the_command_line(tmp_path):
    gallery = tmp_path / "g"
    bd.Engine.open(gallery).close()
    change = ["policy", "set", "--by", "A. Officer", "--reason", "decree 7"]
    done = RUN.invoke(app, [*change, "--fpir", "1e-6", "--required", "face", "--required", "2 fingers", "--duplicate-db", "90", "--no-use-gallery-impostors", str(gallery)])  # fmt: skip
    assert done.exit_code == 0, done.output
    wanted = bd.Policy(fpir=1e-6, duplicate_db=90, use_gallery_impostors=False, required=("face", "2 fingers"))
    with bd.Engine.open(gallery) as engine:
        assert engine.policy == wanted
        assert (engine.policies()[-1].by, engine.policies()[-1].reason) == ("A. Officer", "decree 7")
    assert RUN.invoke(app, [*change, "--duplicate-db", "none", "--required", "none", "-g", str(gallery)]).exit_code == 0
    shown = json.loads(RUN.invoke(app, ["policy", "show", str(gallery), "--json"]).stdout)
    assert (shown["version"], shown["policy"]["duplicate_db"], shown["policy"]["required"]) == (3, None, [])
    assert [one["by"] for one in shown["versions"]] == ["", "A. Officer", "A. Officer"]
    text = RUN.invoke(app, ["policy", "show", str(gallery)]).stdout
    assert "by A. Officer: fpir from 0.001 to 1e-06; duplicate_db from none to 90.0;" in text and "decree 7" in text
    for wrong in (["--fpir", "2"], ["--duplicate-db", "many"], ["--required", "nose"], []):
        assert isinstance(RUN.invoke(app, [*change, *wrong, str(gallery)]).exception, bd.InvalidInput)
    absent = RUN.invoke(app, [*change, "--fpir", "1e-6", str(tmp_path / "absent")])
    assert isinstance(absent.exception, bd.NotAGallery) and not (tmp_path / "absent").exists()


def test_every_field_of_a_policy_can_be_set():
    options = commands(typer.main.get_command(app))["policy set"]
    assert {f"--{field.name.replace('_', '-')}" for field in fields(bd.Policy)} <= options


@pytest.mark.slow
def test_a_policy_in_the_settings_makes_galleries_and_never_changes_one(tmp_path):
    gallery = tmp_path / "g"
    beside = written(tmp_path / "biodedup.toml", "[policy]\nfpir = 1e-6\n")
    np.save(tmp_path / "t.npy", people(1))
    (tmp_path / "ids.txt").write_text("a\n")
    made = RUN.invoke(app, ["load", str(tmp_path / "t.npy"), "--ids", str(tmp_path / "ids.txt"), "--model-id", SFACE, "-g", str(gallery)])  # fmt: skip
    assert made.exit_code == 0
    assert RUN.invoke(app, ["info", "-g", str(gallery)]).exit_code == 0
    with bd.Engine.open(gallery) as engine:
        assert engine.policy.fpir == 1e-6
    beside.write_text("[policy]\nfpir = 1e-5\n")
    for command in ("info", "compact"):
        assert isinstance(RUN.invoke(app, [command, "-g", str(gallery)]).exception, bd.PolicyMismatch)
    shown = RUN.invoke(app, ["config", str(gallery)])
    assert "fpir is 1e-06 in the gallery, 1e-05 in the settings" in shown.stderr
    change = ["policy", "set", "--fpir", "1e-5", "--by", "A", "--reason", "as the settings say", str(gallery)]
    assert RUN.invoke(app, change).exit_code == 0
    assert RUN.invoke(app, ["info", "-g", str(gallery)]).exit_code == 0


@pytest.mark.slow
def test_a_verification_that_compared_nothing_says_so(tmp_path):
    with bd.Engine.open(tmp_path / "g") as engine:
        engine.enroll(bd.Encounter("anna", templates={"face": people(1)[0]}, model_id=SFACE))
    rng = np.random.default_rng(3)
    Image.fromarray(draw_impression(rng, draw_master(rng)).image).save(tmp_path / "print.png", dpi=(500, 500))
    done = RUN.invoke(
        app, ["verify", "anna", "--finger", f"right_index={tmp_path}/print.png", "-g", str(tmp_path / "g")]
    )
    assert done.exit_code == Exit.NOT_ACCEPTED and "nothing was compared" in done.output
