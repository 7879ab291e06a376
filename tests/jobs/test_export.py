"""An exported gallery is loaded back without loss, and other programs can read it."""

from __future__ import annotations

import json
import stat
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import biodedup as bd
from biodedup import jobs
from biodedup.cli import app
from biodedup.gallery.files import codec as codecs
from biodedup.jobs.exchange import export as export_module
from biodedup.jobs.exchange import gallery_files
from tests.support.cases import CONFIG, Clock, sent
from tests.support.said import found_by, said
from tests.support.story import PEOPLE, Story
from tests.support.vectors import SFACE, again, people

KEPT = replace(CONFIG, policy=None)
"""The gallery's own policy counts."""


STEPS = [name for name in vars(Story) if not name.startswith("_")]


def exported(folder: Path, **more: object) -> tuple[Path, Path]:
    """(the export of folder/g, a gallery loaded from it)."""
    jobs.export_gallery(folder / "g", folder / "export", **more)
    jobs.load_gallery(folder / "export", folder / "again")
    return folder / "export", folder / "again"


@pytest.mark.slow
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 23)), max_size=40))
@example([(name, i) for i in range(6) for name in STEPS])
def test_a_gallery_that_was_exported_and_loaded_says_the_same(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("story")
    with bd.Engine.open(folder / "g", CONFIG, clock=Clock()) as engine:
        story = Story(engine)
        for name in ("enroll", "enroll"):
            getattr(story, name)(len(story.encounter_ids))
        for name, i in steps:
            getattr(story, name)(i)
        before = said(engine, story.encounter_ids)
        searched = found_by(engine, PEOPLE[:8])
        exported(folder)
    with bd.Engine.open(folder / "again", KEPT, clock=Clock(), read_only=True) as engine:
        assert said(engine, story.encounter_ids) == before
        found = found_by(engine, PEOPLE[:8])
        assert [replace(d, decided_at=0) for d in found] == [replace(d, decided_at=0) for d in searched]


@pytest.mark.slow
def test_what_happens_after_loading_is_what_would_have_happened(tmp_path):
    with bd.Engine.open(tmp_path / "g", CONFIG, clock=Clock()) as engine:
        story = Story(engine)
        for i in range(12):
            story.enroll(i)
        story.resemble(3)
        story.remove(1)
    exported(tmp_path)
    answers = []
    for name in ("g", "again"):
        with bd.Engine.open(tmp_path / name, KEPT, clock=Clock()) as engine:
            sent_again = engine.enroll(sent("r", again(PEOPLE[3], 0.9), "e-new"))
            row = int(engine.rows_of(["r"])[0])
            judged = engine.adjudicate("e12", "different", "A. Officer")
            engine.maintain()
            engine.compact()
            answers.append((sent_again, row, judged, said(engine, [*story.encounter_ids, "e-new"])))
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_codes_of_sealed_vectors_survive_several_exports_bit_by_bit(tmp_path, monkeypatch):
    """Segments with a trained rotation, too."""
    monkeypatch.setattr(codecs, "TRAINING_ROWS_MIN", 64)
    monkeypatch.setattr("biodedup.gallery.segments.writer.TRAINING_ROWS_MIN", 64)
    config = replace(CONFIG, gallery=bd.GalleryConfig(seal_rows=64, merge_fan=8, background=False))
    vectors = people(192, seed=9, dimension=160)
    with bd.Engine.open(tmp_path / "g", config) as engine:
        for low in (0, 64, 128):
            engine.load_templates([f"s{i}" for i in range(low, low + 64)], {"face": vectors[low : low + 64]})
        engine.load_templates(["tail"], {"face": people(1, seed=10, dimension=160)})
        before = said(engine)
    for _ in range(2):
        export, again_folder = exported(tmp_path)
        with bd.Engine.open(again_folder, config, read_only=True) as engine:
            assert said(engine) == before
        for path in (tmp_path / "g").rglob("*"):
            if path.is_file():
                path.unlink()
        (tmp_path / "g" / "segments").rmdir()
        (tmp_path / "g").rmdir()
        again_folder.rename(tmp_path / "g")
        for path in export.iterdir():
            path.unlink()


def test_other_programs_read_the_rows_with_their_model(tmp_path):
    with bd.Engine.open(tmp_path / "g", CONFIG, clock=Clock()) as engine:
        story = Story(engine)
        story.enroll(0)
        story.enroll(1)
        story.resemble(1)
    result = jobs.export_gallery(tmp_path / "g", tmp_path / "export")
    assert (result.subjects, result.rows, result.decisions) == (2, 3, 3)
    table = pq.read_table(tmp_path / "export" / "rows.parquet")
    assert table.schema.field("face").metadata[b"model_id"].decode() == SFACE
    rows = table.to_pylist()
    assert [(row["subject_id"], row["state"], row["groups"]) for row in rows] == [
        ("s0", "enrolled", ["north"]),
        ("s1", "enrolled", ["north", "south"]),
        ("re2", "waiting", ["east"]),
    ]
    assert np.allclose(rows[0]["face"], PEOPLE[0], atol=1e-6)
    assert (
        "right_index" in bd.read_minutiae(rows[0]["right_index_minutiae"]) and rows[1]["right_index_minutiae"] is None
    )
    assert (rows[0]["face_quality"], rows[1]["face_quality"]) == (0.75, None)
    decisions = pq.read_table(tmp_path / "export" / "decisions.parquet").to_pylist()
    assert [(d["encounter_id"], d["outcome"], d["subject_id"]) for d in decisions] == [
        ("e0", "unique", "s0"),
        ("e1", "unique", "s1"),
        ("e2", "review", "re2"),
    ]


def test_nothing_of_a_removed_subject_is_exported(tmp_path):
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        for i in range(3):
            engine.load_templates([f"person-{i}"], {"face": PEOPLE[i : i + 1]})
        engine.remove("person-1")
        exported(tmp_path)
    content = "".join(str(pq.read_table(path).to_pylist()) for path in (tmp_path / "export").glob("*.parquet"))
    assert "person-0" in content and "person-1" not in content
    assert not (tmp_path / "export" / "database.copy").exists()


def test_an_export_is_for_its_owner_alone(tmp_path):
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        engine.load_templates(["anna"], {"face": PEOPLE[:1]})
    jobs.export_gallery(tmp_path / "g", tmp_path / "export")
    assert stat.S_IMODE((tmp_path / "export").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "export").iterdir()} == {0o600}


def test_an_export_goes_on_beside_the_writer_and_shows_one_version(tmp_path):
    with bd.Engine.open(tmp_path / "g", CONFIG, clock=Clock()) as engine:
        story = Story(engine)
        story.enroll(0)
        stop = threading.Event()

        def write() -> None:
            for i in range(1, 24):
                if not stop.is_set():
                    story.enroll(i)

        writer = threading.Thread(target=write)
        writer.start()
        jobs.export_gallery(tmp_path / "g", tmp_path / "export")
        stop.set()
        writer.join()
    about = json.loads((tmp_path / "export" / "export.json").read_text())
    loaded = jobs.load_gallery(tmp_path / "export", tmp_path / "again")
    assert loaded.version == about["state"]["version"] == loaded.subjects == loaded.decisions


def test_an_interrupted_export_leaves_nothing_and_can_be_started_again(tmp_path, monkeypatch):
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        engine.load_templates(["anna"], {"face": PEOPLE[:1]})

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(export_module, "_write_codecs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            jobs.export_gallery(tmp_path / "g", tmp_path / "export")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g"]
    left = tmp_path / ".export.new"  # as of a process that was killed
    left.mkdir()
    (left / "rows.parquet").write_bytes(b"half")
    jobs.export_gallery(tmp_path / "g", tmp_path / "export")
    assert not left.exists() and jobs.is_export(tmp_path / "export")


def test_a_folder_that_is_taken_is_left_alone(tmp_path):
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        engine.load_templates(["anna"], {"face": PEOPLE[:1]})
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "letter.txt").write_text("dear")
    with pytest.raises(bd.InvalidInput, match="not an empty folder"):
        jobs.export_gallery(tmp_path / "g", taken)
    (tmp_path / ".export.new").mkdir()
    (tmp_path / ".export.new" / "letter.txt").write_text("dear")
    with pytest.raises(bd.InvalidInput, match="other files"):
        jobs.export_gallery(tmp_path / "g", tmp_path / "export")
    (tmp_path / ".export.new" / "letter.txt").unlink()
    jobs.export_gallery(tmp_path / "g", tmp_path / "export")
    with pytest.raises(bd.InvalidInput, match="loaded into a new gallery"):
        jobs.load_gallery(tmp_path / "export", tmp_path / "g")
    assert (taken / "letter.txt").read_text() == "dear"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    with bd.Engine.open(folder / "g", CONFIG, clock=Clock()) as engine:
        story = Story(engine)
        for i in range(12):
            story.enroll(i)
        story.resemble(2)
        story.judge(1)
    jobs.export_gallery(folder / "g", folder / "export")
    return folder / "export"


def copied(export: Path, target: Path) -> Path:
    target.mkdir()
    for path in export.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(gallery_files.NAMES))
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_export_is_refused_and_nothing_is_made(sound, tmp_path, name, damage):
    export = copied(sound, tmp_path / "export")
    path = export / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0x55
        path.write_bytes(content)
    with pytest.raises(bd.InvalidInput):
        jobs.check_export(export)
    try:
        jobs.load_gallery(export, tmp_path / "again")
    except bd.InvalidInput:
        assert not (tmp_path / "again").exists()
    assert not (tmp_path / ".again.new").exists()


def test_a_check_reads_all_and_changes_nothing(sound, tmp_path):
    checked = jobs.check_export(sound)
    assert checked.rows == pq.read_metadata(sound / "rows.parquet").num_rows
    done = CliRunner().invoke(app, ["load", str(sound), "--check", "--gallery", str(tmp_path / "x")])
    assert done.exit_code == 0 and "nothing was changed" in done.output
    assert not (tmp_path / "x").exists()


def test_an_export_of_a_later_release_is_named(sound, tmp_path):
    export = copied(sound, tmp_path / "export")
    about = json.loads((export / "export.json").read_text())
    (export / "export.json").write_text(json.dumps(about | {"format_version": 2, "written_by": "9.0"}))
    with pytest.raises(bd.InvalidInput, match="format 2, but this release reads 1"):
        jobs.load_gallery(export, tmp_path / "again")


@pytest.mark.slow
def test_the_commands_take_a_gallery_out_and_back(tmp_path):
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        engine.load_templates(["anna", "bella"], {"face": PEOPLE[:2]}, groups=[["north"], []])
        before = said(engine)
    run = CliRunner()
    out = run.invoke(app, ["export", "--to", str(tmp_path / "e"), "--gallery", str(tmp_path / "g"), "--json"])
    assert out.exit_code == 0 and json.loads(out.stdout)["subjects"] == 2
    back = run.invoke(app, ["load", str(tmp_path / "e"), "--gallery", str(tmp_path / "again"), "--json"])
    assert back.exit_code == 0 and json.loads(back.stdout)["subjects"] == 2
    with bd.Engine.open(tmp_path / "again", CONFIG) as engine:
        assert said(engine) == before
    for wrong in (["export"], ["export", "--to", "a", "--faiss", "b"], ["export", "--to", "a", "--column", "face"]):
        failed = run.invoke(app, [*wrong, "--gallery", str(tmp_path / "g")])
        assert isinstance(failed.exception, bd.InvalidInput)
    for option in (["--model-id", "m-1"], ["--ids", "x"], ["--column", "a=b"], ["--faiss"]):
        failed = run.invoke(app, ["load", str(tmp_path / "e"), *option, "--gallery", str(tmp_path / "h")])
        assert isinstance(failed.exception, bd.InvalidInput), option


def test_a_folder_that_is_no_export_is_named_as_such(tmp_path):
    (tmp_path / "empty").mkdir()
    with bd.Engine.open(tmp_path / "g") as engine:
        with pytest.raises(bd.InvalidInput, match="a folder that `biodedup export` did not write"):
            jobs.load(engine, tmp_path / "empty")
        assert len(engine) == 0
