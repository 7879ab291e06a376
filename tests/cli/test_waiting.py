"""Short commands beside a writer: they wait for it, or say which process it is and what to do."""

from __future__ import annotations

import os
import sys
import threading

import pytest
import typer
from typer.testing import CliRunner

import biodedup as bd
from biodedup.cli import app, opening
from tests.support.cases import CONFIG, Clock, sent
from tests.support.vectors import again, people

(ANNA, BELLA) = people(2)
COMMANDS = {
    "remove": ["remove", "bella"],
    "decide": ["cases", "decide", "e3", "same", "--by", "A. Officer"],
    "policy": ["policy", "set", "--fpir", "1e-4", "--by", "A. Officer", "--reason", "a trial"],
    "compact": ["compact"],
    "update": ["update", "bella", "--finger", "right_index=none.png"],
    "accept-models": ["accept-models"],
    "retention": ["retention", "run"],
}
NOT_OPENED_TO_WRITE = {"update"}
"""Commands of which only the refusal is tested: their capture does not exist."""


@pytest.fixture
def gallery(tmp_path):
    with bd.Engine.open(tmp_path / "g", CONFIG, clock=Clock()) as engine:
        engine.enroll(sent("anna", ANNA, "e1"))
        engine.enroll(sent("bella", BELLA, "e2"))
        engine.enroll(sent("carla", again(ANNA, 0.5), "e3"))
    return tmp_path / "g"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [v for k, v in COMMANDS.items() if k not in NOT_OPENED_TO_WRITE], ids=lambda v: v[0]
)
def test_a_short_command_waits_until_the_writer_ends(gallery, arguments, monkeypatch):
    waiting = threading.Event()
    held = bd.Engine.open(gallery)
    told = opening.complain

    def complain(*lines: str) -> None:
        told(*lines)
        waiting.set()

    monkeypatch.setattr(opening, "complain", complain)
    ending = threading.Thread(target=lambda: waiting.wait(60) and held.close())
    ending.start()
    done = CliRunner().invoke(app, [*arguments, "--gallery", str(gallery), "--wait", "60"])
    ending.join()
    assert done.exit_code == 0, done.output
    assert f"the holder is process {os.getpid()}" in done.output and "waiting up to 60 s" in done.output


@pytest.mark.slow
@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_a_holder_is_named_with_what_to_do(gallery, arguments):
    with bd.Engine.open(gallery):
        refused = CliRunner().invoke(app, [*arguments, "--gallery", str(gallery)])
        late = CliRunner().invoke(app, [*arguments, "--gallery", str(gallery), "--wait", "0.1"])
    assert isinstance(refused.exception, bd.GalleryBusy) and isinstance(late.exception, bd.GalleryBusy)
    assert f"process {os.getpid()}" in str(refused.exception)
    assert "--wait SECONDS waits for it" in str(refused.exception)
    assert "after 0.1 s it was still held" in str(late.exception)


def test_a_mistyped_gallery_is_not_waited_for(tmp_path):
    done = CliRunner().invoke(app, ["compact", "--gallery", str(tmp_path / "x"), "--wait", "60"])
    assert isinstance(done.exception, bd.NotAGallery)


def test_what_a_holder_was_called_with_is_not_told(gallery):
    with bd.Engine.open(gallery):
        told = opening.holder(gallery)
    assert "/" not in told and not any(argument in told for argument in sys.argv[1:] if len(argument) > 3)
    (gallery / "writer.lock").write_text("")
    assert opening.holder(gallery) == "the holder is not known"


WRITERS = (
    *("enroll", "update", "remove", "enroll-batch", "load", "merge", "undo", "cases decide", "policy set", "compact"),
    *(
        "retention run",
        "reindex",
        "accept-models",
        "export",
        "encrypt",
        "decrypt",
        "key rekey",
        "log archive",
        "kit ingest",
    ),
    "doctor",
)


@pytest.mark.parametrize("command", WRITERS)
def test_every_command_that_writes_a_gallery_can_wait_for_another_writer(command):
    found = typer.main.get_command(app)
    for name in command.split():
        found = found.commands[name]
    assert "--wait" in [option for parameter in found.params for option in parameter.opts]


@pytest.mark.slow
def test_enrolling_and_a_batch_name_the_holder(gallery, tmp_path):
    (tmp_path / "m.csv").write_text("subject_id,path\nx,none.png\n")
    with bd.Engine.open(gallery):
        for command in (["enroll", "x", "--face", "none.png"], ["enroll-batch", str(tmp_path / "m.csv")]):
            refused = CliRunner().invoke(app, [*command, "--gallery", str(gallery)])
            assert isinstance(refused.exception, bd.GalleryBusy)
            assert "--wait SECONDS waits for it" in str(refused.exception)
