"""One read of a capture: bounded, of files alone; a file that comes late is taken when it comes."""

from __future__ import annotations

import hashlib
import os
import resource
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.capture.reading import Unread, held, read, read_path
from biodedup.embed.cards import load_card
from biodedup.engine.prepare import in_memory
from biodedup.gallery import answers
from biodedup.gallery.answers import digest_of
from tests.support.images import jpeg

LIMITS = bd.CaptureConfig(bytes_max=1000)


def odd_paths(folder: Path) -> dict[str, Path]:
    """What a path may name that is no file."""
    os.mkfifo(folder / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(folder / "socket.jpg"))
    (folder / "folder.jpg").mkdir()
    (folder / "link.jpg").symlink_to(folder / "pipe.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    names = ("pipe.jpg", "socket.jpg", "folder.jpg", "link.jpg", "loop.jpg")
    return {name: folder / name for name in names} | {"device": Path("/dev/zero"), "null": Path("/dev/null")}


@pytest.fixture
def denied(tmp_path, monkeypatch) -> Path:
    """A file that the disk refuses to read; the tests may run as root, whom no permission stops."""
    path = tmp_path / "denied.jpg"
    path.write_bytes(b"here")
    opened = os.open

    def refusing(name, *more, **named):
        if Path(name) == path and not path.with_suffix(".allowed").exists():
            raise PermissionError(13, "Permission denied")
        return opened(name, *more, **named)

    monkeypatch.setattr(os, "open", refusing)
    return path


@pytest.mark.timeout(60)
def test_what_is_no_file_is_refused_at_once_and_reads_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    for name, path in odd_paths(tmp_path).items():
        refusal = read_path(path, "face", 10**9)
        assert isinstance(refusal, bd.Refusal), name
        assert refusal.reason == "not_a_file", name
    assert read_path("a\0b", "face", 10).reason == "not_a_file"
    assert time.monotonic() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_file_is_read_up_to_its_limit_and_not_further(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(1000))
    assert read(path, "face", LIMITS) == bytes(1000)
    with path.open("ab") as file:
        file.truncate(1 << 40)  # a sparse file
    refusal = read(path, "face", LIMITS)
    assert (refusal.reason, refusal.measured, refusal.limit) == ("too_large_file", 1 << 40, 1000)
    assert read(bytes(1001), "face", LIMITS).reason == "too_large_file"
    assert read(b"", "face", LIMITS).reason == "empty_file"


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("with_id", [True, False])
def test_an_encounter_of_odd_paths_is_refused_by_value(tmp_path, monkeypatch, with_id):
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    with bd.Engine.open(tmp_path / "g") as engine:
        for name, path in odd_paths(tmp_path).items():
            encounter = bd.Encounter("anna", [bd.Face(path)], encounter_id=f"e-{name}" if with_id else None)
            for decision in (engine.enroll(encounter), engine.identify(encounter), *engine.enroll_many([encounter])):
                assert decision.outcome == "refused"
                assert decision.refusals[0].reason == "not_a_file"
        assert "anna" not in engine
    assert time.monotonic() - began < 30


@pytest.mark.slow
@pytest.mark.parametrize("call", ["enroll", "update", "dispute", "enroll_many", "import_captures"])
def test_digest_and_template_are_of_the_same_bytes(tmp_path, portrait, monkeypatch, call):
    """Of an encounter with an encounter_id a path is read once: its digest names the content that was enrolled."""
    path = tmp_path / "face.jpg"
    content = jpeg(portrait)
    path.write_bytes(content)
    opened = []
    with bd.Engine.open(tmp_path / "g") as engine:
        if call in ("update", "dispute"):
            engine.enroll(bd.Encounter("anna", [bd.Face(content)]))
        monkeypatch.setattr(os, "open", counting(os.open, opened, path))
        monkeypatch.setattr(Path, "read_bytes", counting(Path.read_bytes, opened, path))
        encounter = bd.Encounter("anna", [bd.Face(path)], encounter_id="e")
        if call in ("enroll_many", "import_captures"):
            (decision,) = getattr(engine, call)([encounter])
        else:
            decision = getattr(engine, call)(encounter)
        assert decision.outcome == ("review" if call == "dispute" else "unique")
        assert len(opened) == 1
        # the digests of updates and disputes say what they are
        if call in ("enroll", "enroll_many", "import_captures"):
            assert engine.recall(bd.Encounter("anna", [bd.Face(content)], encounter_id="e")) is not None


def counting(original, opened, path):
    def call(name, *more, **named):
        if not isinstance(name, int) and Path(name) == path:
            opened.append(name)
        return original(name, *more, **named)

    return call


def test_a_digest_is_that_of_releases_before(tmp_path):
    """Their formula, written out: a gallery of theirs knows what is sent again."""
    (tmp_path / "a.jpg").write_bytes(b"content")
    encounter = bd.Encounter("anna", [bd.Face(tmp_path / "a.jpg"), bd.Missing("left_thumb", "lost")], encounter_id="e")
    digest = hashlib.sha256()
    for part in (b"anna", b"Face", b"face", b"content", b"None", b"Missing", b"left_thumb", b"lost"):
        digest.update(len(part).to_bytes(8, "little") + part)
    assert digest_of(in_memory(encounter, bd.CaptureConfig())) == digest.digest()
    by_bytes = bd.Encounter("anna", [bd.Face(b"content"), bd.Missing("left_thumb", "lost")], encounter_id="e")
    assert digest_of(by_bytes) == digest.digest()


def test_a_path_that_gave_nothing_is_not_opened_again(tmp_path):
    os.mkfifo(tmp_path / "p")
    (capture,) = held([bd.Face(tmp_path / "p")], LIMITS)
    assert isinstance(capture.data, Unread)
    (tmp_path / "p").unlink()
    (tmp_path / "p").write_bytes(b"now it is a file")
    assert read(capture.data, "face", LIMITS).reason == "not_a_file"


@pytest.mark.slow
@pytest.mark.parametrize("call", ["enroll", "update", "dispute"])
def test_a_file_that_comes_late_is_taken_under_the_same_encounter(tmp_path, portrait, call):
    late = tmp_path / "late.jpg"
    encounter = bd.Encounter("anna", [bd.Face(late)], encounter_id="e")
    with bd.Engine.open(tmp_path / "g") as engine:
        if call != "enroll":
            engine.enroll(bd.Encounter("anna", [bd.Face(jpeg(portrait, 60))]))
        version = engine.gallery_version
        for _ in range(2):
            with pytest.raises(bd.CaptureUnavailable, match=r"late\.jpg"):
                getattr(engine, call)(encounter)
        assert engine.decision("e") is None
        assert engine.gallery_version == version
        late.write_bytes(jpeg(portrait))
        decision = getattr(engine, call)(encounter)
        assert decision.outcome == ("review" if call == "dispute" else "unique")
        assert getattr(engine, call)(encounter) == decision


def test_one_absent_file_of_several_holds_the_encounter_back(tmp_path, portrait):
    captures = [bd.Face(jpeg(portrait)), bd.Finger(tmp_path / "late.png", "right_index")]
    with bd.Engine.open(tmp_path / "g") as engine:
        with pytest.raises(bd.CaptureUnavailable):
            engine.enroll(bd.Encounter("anna", captures, encounter_id="e"))
        assert "anna" not in engine


def test_an_unreadable_file_is_retryable(denied):
    with bd.Engine.open(denied.parent / "g") as engine:
        encounter = bd.Encounter("anna", [bd.Face(denied)], encounter_id="e")
        with pytest.raises(bd.CaptureUnavailable) as told:
            engine.enroll(encounter)
        assert told.value.reason == "unreadable"
        assert isinstance(told.value, bd.RetryableError)
        denied.with_suffix(".allowed").touch()
        assert engine.enroll(encounter).outcome == "refused"  # read, and no image


@pytest.mark.slow
def test_in_a_stream_it_costs_its_own_encounter_and_is_not_recorded(tmp_path, portrait):
    late = tmp_path / "late.jpg"
    encounters = [
        bd.Encounter("late", [bd.Face(late)], encounter_id="e1"),
        bd.Encounter("anna", [bd.Face(jpeg(portrait))], encounter_id="e2"),
    ]
    with bd.Engine.open(tmp_path / "g") as engine:
        first, second = engine.enroll_many(encounters)
        assert (first.outcome, first.refusals[0].reason, second.outcome) == ("refused", "missing_file", "unique")
        assert engine.decision("e1") is None
        late.write_bytes(jpeg(portrait[:, ::-1]))
        first, second = engine.enroll_many(encounters)
        assert (first.outcome, second.outcome) == ("duplicate", "unique")
        admitted = engine.import_captures([bd.Encounter("bella", [bd.Face(tmp_path / "absent")], encounter_id="e3")])
        assert admitted[0].refusals[0].reason == "missing_file"
        assert engine.decision("e3") is None


@pytest.mark.slow
def test_a_job_decides_a_record_when_its_last_file_is_there(tmp_path, portrait):
    (tmp_path / "face.jpg").write_bytes(jpeg(portrait))
    columns = {"subject_id": ["a"] * 2, "encounter_id": ["e"] * 2, "path": ["face.jpg", "f.png"]}
    columns["position"] = ["face", "right_index"]
    pa.parquet.write_table(pa.table(columns), tmp_path / "m.parquet")

    def run() -> tuple[str, str | None]:
        config = bd.Config(policy=bd.Policy(required=()))
        with bd.Engine.open(tmp_path / "g", config) as engine, jobs.Backlog.open(tmp_path / "g") as backlog:
            jobs.enroll_batch(engine, backlog, tmp_path / "m.parquet", tmp_path / "o.parquet", workers=1)
        (row,) = pa.parquet.read_table(tmp_path / "o.parquet").to_pylist()
        return row["status"], row["reason"]

    assert run() == ("refused", "missing_file")
    assert run() == ("refused", "missing_file")
    (tmp_path / "f.png").write_bytes(b"no image")
    assert run()[0] == "enrolled"
    (tmp_path / "f.png").unlink()  # what was decided stands, also when its files were put away
    assert run()[0] == "enrolled"


@pytest.mark.timeout(60)
def test_a_model_card_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "card.toml")
    with pytest.raises(bd.ModelCardError, match="a pipe, not a file"):
        load_card(str(tmp_path / "card.toml"))


@pytest.mark.slow
def test_a_job_over_a_folder_takes_no_pipe_for_a_picture(tmp_path, portrait):
    (tmp_path / "album").mkdir()
    (tmp_path / "album" / "a.jpg").write_bytes(jpeg(portrait))
    os.mkfifo(tmp_path / "album" / "b.jpg")
    result = jobs.dedup(tmp_path / "album", tmp_path / "r.parquet")
    assert {name: some[0].reason for name, some in result.refusals.items()} == {"b.jpg": "not_a_file"}


def test_reading_never_waits_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "p")
    done = threading.Event()

    def work() -> None:
        read_path(tmp_path / "p", "face", 10)
        done.set()

    threading.Thread(target=work, daemon=True).start()
    assert done.wait(20)


def test_an_array_of_too_many_pixels_is_refused_before_it_is_digested(tmp_path, monkeypatch):
    digested = []
    content = answers._content
    monkeypatch.setattr(answers, "_content", lambda data: (digested.append(type(data)), content(data))[1])
    config = bd.Config(capture=bd.CaptureConfig(pixels_max=10_000))
    with bd.Engine.open(tmp_path / "g", config) as engine:
        decision = engine.enroll(bd.Encounter("s", [bd.Face(np.zeros((200, 100), np.uint8))], encounter_id="e"))
    assert np.ndarray not in digested and digested
    (refusal,) = decision.refusals
    told = (refusal.column, refusal.reason, refusal.detail, refusal.measured, refusal.limit)
    assert told == ("face", "too_many_pixels", "array, 100 x 200 pixels", 20_000, 10_000)
