"""Short commands beside a writer: they wait for it, or say which process it is and what to do."""

from __future__ import annotations

import os
import sys
import threading

import pytest
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
}


@pytest.fixture
def gallery(tmp_path):
    with bd.Engine.open(tmp_path / "g", CONFIG, clock=Clock()) as engine:
        engine.enroll(sent("anna", ANNA, "e1"))
        engine.enroll(sent("bella", BELLA, "e2"))
        engine.enroll(sent("carla", again(ANNA, 0.5), "e3"))
    return tmp_path / "g"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
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
