"""What the loggers `biodedup.*` say of each change of state, and what they never say."""

from __future__ import annotations

import ast
import logging
import os
import subprocess
import sys

import numpy as np
import pytest

import biodedup as bd
from biodedup.errors import StorageUnavailable
from biodedup.search.shards.fan_out import FanOut
from biodedup.testing import internals
from tests.support import ROOT
from tests.support.vectors import SFACE, again, people

FACES = people(120)
QUIET = bd.GalleryConfig(seal_rows=1000, background=False)
CONFIG = bd.Config(gallery=QUIET)
SECRET = "nik-3171234567890001"
DOCUMENTED = (ROOT / "docs" / "reference" / "logging.md").read_text("utf-8")


@pytest.fixture(autouse=True)
def everything(caplog) -> None:
    caplog.set_level(logging.DEBUG, logger="biodedup")


def enrolled(engine: bd.Engine, number: int, face: np.ndarray | None = None) -> bd.Decision:
    embedding = FACES[number] if face is None else face
    sent = {"face": embedding}
    return engine.enroll(bd.Encounter(f"{SECRET}-{number}", templates=sent, encounter_id=f"visit-{SECRET}-{number}"))


def messages(caplog, logger: str, level: int = logging.INFO) -> list[str]:
    """The messages of one logger of at least this level, in their order."""
    return [r.getMessage() for r in caplog.records if r.name == f"biodedup.{logger}" and r.levelno >= level]


@pytest.mark.slow
def test_opening_sealing_merging_and_closing_are_told(tmp_path, caplog):
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        enrolled(engine, 0)
        engine.seal()
        enrolled(engine, 1)
        engine.remove(f"{SECRET}-0")
        engine.compact()
        engine.close()
    opened, sealed, again_sealed, merged, closed = messages(caplog, "gallery")
    assert opened.startswith(f"opened {tmp_path / 'g'} for writing: 0 subjects, 0 segments, 0 entries in the journal")
    assert sealed.startswith("sealed 1 rows and 1 decisions") and again_sealed.startswith("sealed 1 rows")
    assert merged.startswith("merged 2 segments of 2 rows into one, without 1 removed rows")
    assert closed.startswith(f"closed {tmp_path / 'g'} at version")
    assert "removed 1 subjects" in messages(caplog, "engine")


def test_each_outcome_is_told_once_without_ids(tmp_path, caplog):
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        engine.add_templates([f"{SECRET}-b{i}" for i in range(40)], {"face": FACES[20:60]}, model_id=SFACE)
        enrolled(engine, 0)
        enrolled(engine, 1, again(FACES[:1], 0.9)[0])
        enrolled(engine, 0 + 1, again(FACES[:1], 0.9)[0])  # repeated: no new decision
        engine.identify(bd.Encounter(templates={"face": FACES[3]}))
        engine.set_policy(bd.Policy(fpir=1e-4), by=f"officer {SECRET}", reason=f"because of {SECRET}")
    told = messages(caplog, "engine")
    assert told[0].startswith("loaded without a search: 40 subjects added")
    assert told[1].startswith("decision: enroll is unique; ")
    assert told[2].startswith(("decision: enroll is duplicate", "decision: enroll is review"))
    assert told[3:] == ["policy: version 2 is in force"]
    assert any(text.startswith("decision: identify is") for text in messages(caplog, "engine", logging.DEBUG))


def test_a_verdict_is_told_with_the_state_of_its_case(tmp_path, caplog):
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        enrolled(engine, 0)
        sent = bd.Encounter(f"{SECRET}-0", templates={"face": FACES[9]}, encounter_id="e9")
        assert engine.dispute(sent).outcome == "review"
        engine.adjudicate("e9", "different", by=f"officer {SECRET}", note=SECRET)
    assert messages(caplog, "engine")[-2].startswith("decision: dispute is review")
    assert messages(caplog, "engine")[-1].startswith("verdict: different, the case is refused; 0 linked cases closed")


@pytest.mark.slow
def test_no_id_vector_or_path_of_a_capture_is_in_any_message(tmp_path, caplog):
    picture = tmp_path / f"{SECRET}.jpg"
    picture.write_bytes(b"no picture")
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        enrolled(engine, 0)
        engine.enroll(bd.Encounter(f"{SECRET}-p", [bd.Face(picture)]))
        list(engine.enroll_many([bd.Encounter(f"{SECRET}-q", [bd.Face(tmp_path / f"absent-{SECRET}.jpg")])]))
        engine.import_captures([bd.Encounter(f"{SECRET}-r", [bd.Face(picture)])])
        engine.update(bd.Encounter(f"{SECRET}-0", templates={"face": again(FACES[:1], 0.9)[0]}))
        engine.identify(bd.Encounter(templates={"face": FACES[1]}))
        engine.verify(bd.Encounter(templates={"face": FACES[1]}), f"{SECRET}-0")
        engine.remove(f"{SECRET}-0")
        engine.compact()
    assert len(messages(caplog, "engine", logging.DEBUG)) >= 6
    for text in (record.getMessage() for record in caplog.records if record.name.startswith("biodedup")):
        assert SECRET not in text and "array" not in text and "[" not in text.replace(str(tmp_path), "")
        assert not any(f"{value:.3f}"[1:] in text.replace(str(tmp_path), "") for value in FACES[0, :3].tolist())


def test_ids_are_in_messages_where_they_are_asked_for(tmp_path, caplog):
    config = bd.Config(gallery=QUIET, log=bd.LogConfig(ids=True))
    with bd.Engine.open(tmp_path / "g", config) as engine:
        engine.enroll(bd.Encounter("andré", templates={"face": FACES[0]}, encounter_id="e0"))
        engine.remove("andré")
    assert messages(caplog, "engine")[0].endswith("; subject andré; encounter e0")
    assert messages(caplog, "engine")[1] == "removed 1 subjects; subjects andré"


def test_a_search_above_the_limit_is_a_warning_and_one_below_is_not(tmp_path, caplog):
    for limit_ms, warned in ((0.0, True), (1e9, False)):
        caplog.clear()
        config = bd.Config(gallery=QUIET, log=bd.LogConfig(slow_search_ms=limit_ms))
        with bd.Engine.open(tmp_path / "g", config) as engine:
            engine.identify(bd.Encounter(templates={"face": FACES[3]}))
        assert bool(messages(caplog, "search", logging.WARNING)) is warned
    with pytest.raises(bd.InvalidInput, match="slow_search_ms is -1"):
        bd.LogConfig(slow_search_ms=-1)


def test_a_shard_that_fails_is_a_warning(caplog):
    class Failing:
        def search(self, probes: object, query: object) -> object:
            raise StorageUnavailable("the disk failed")

    def sound() -> str:
        return "hits"

    fan_out = FanOut()
    results, failures = fan_out._all([sound, lambda: Failing().search(None, None)])
    fan_out.close()
    assert results == {0: "hits"} and failures == ["shard 1: the disk failed"]
    assert messages(caplog, "search", logging.WARNING) == ["a search is incomplete: shard 1: the disk failed"]


def test_a_second_round_at_the_commit_is_told_at_debug(tmp_path, caplog):
    config = bd.Config(gallery=QUIET, search=bd.SearchConfig(returned=1))
    with bd.Engine.open(tmp_path / "g", config) as engine:
        engine.add_templates([f"b{i}" for i in range(40)], {"face": FACES[20:60]}, model_id=SFACE)
        parts = internals(engine)
        sought = parts.enrolment.search([bd.Encounter("x", templates={"face": FACES[20]})], False)
        engine.remove("b0")
        parts.enrolment.commit(sought)
    assert any(text.startswith("second round") for text in messages(caplog, "search", logging.DEBUG))
    assert not messages(caplog, "search", logging.INFO)


@pytest.mark.slow
def test_the_library_is_silent_where_a_program_sets_up_no_logging(tmp_path):
    code = (
        "import numpy as np, biodedup as bd\n"
        "config = bd.Config(log=bd.LogConfig(slow_search_ms=0))\n"
        f"with bd.Engine.open({str(tmp_path / 'g')!r}, config) as engine:\n"
        "    engine.identify(bd.Encounter(templates={'face': bd.Template('face', 'm', np.eye(128, dtype='f4')[0])}))\n"
        "import logging; print(logging.getLogger().handlers, logging.getLogger('biodedup').level)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("[] 0\n", "", 0)


@pytest.mark.slow
def test_a_command_shows_the_level_that_the_environment_asks_for(tmp_path):
    def run(level: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-c",
            "from biodedup.cli import main; main()",
            "list",
            "--gallery",
            str(tmp_path / "g"),
        ]
        environ = {**os.environ, "BIODEDUP_LOG": level, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, capture_output=True, text=True, env=environ, cwd=tmp_path, timeout=120)

    bd.Engine.open(tmp_path / "g", CONFIG).close()
    assert "INFO biodedup.gallery: opened" in run("INFO").stderr
    assert run("WARNING").stderr == ""
    wrong = run("LOUD")
    assert wrong.returncode == 2 and "BIODEDUP_LOG is 'LOUD', wanted one of DEBUG, INFO" in wrong.stderr


def formats_of(source: str) -> list[str]:
    """The format strings of all calls of loggers in a module."""
    levels = {"debug", "info", "warning", "error", "log"}
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    calls = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in levels]
    texts = [arg.value for call in calls for arg in call.args if isinstance(arg, ast.Constant)]
    return [text for text in texts if isinstance(text, str)]


def test_the_page_lists_every_message_of_the_code():
    sources = [path.read_text("utf-8") for path in sorted((ROOT / "biodedup").rglob("*.py"))]
    formats = [text for source in sources if "getLogger" in source for text in formats_of(source)]
    assert len(formats) > 20
    listed = tuple(line.split("|")[3].strip() for line in DOCUMENTED.splitlines() if line.startswith("| `biodedup."))
    for text in formats:
        assert text.replace("a %s capture", "a face capture").startswith(listed), (
            f"docs/reference/logging.md lacks {text!r}"
        )
