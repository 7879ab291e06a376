"""The command line: outcomes, exit codes, JSON, and jobs that go on where they were."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import typer

import biodedup as bd
from biodedup import jobs
from biodedup.cli import main, printing
from biodedup.cli.base import Panel
from biodedup.jobs.deduplication.folder import DedupResult, Unit
from biodedup.synthetic.vectors import population
from biodedup.values import Cluster, Link
from tests.support.images import finger, jpeg
from tests.support.shell import run as run_apart
from tests.support.shell import run_here as run
from tests.support.vectors import SFACE, again, people, unit

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path, portrait: np.ndarray) -> Path:
    (tmp_path / "a.jpg").write_bytes(jpeg(portrait))
    (tmp_path / "b.jpg").write_bytes(jpeg(portrait[:, ::-1], 60))
    (tmp_path / "dark.jpg").write_bytes(jpeg((portrait * 0.05).astype(np.uint8)))
    import cv2

    cv2.imwrite(str(tmp_path / "f.png"), finger(1))
    return tmp_path


def test_the_main_job_from_the_shell(folder):
    code, out, _ = run_apart(
        "enroll", "anna", "--face", "a.jpg", "--finger", "right_index=f.png", "--encounter-id", "e1", cwd=folder
    )
    assert (code, out.split(";")[0]) == (0, "unique")
    code, out, _ = run_apart("enroll", "bella", "--face", "b.jpg", "--json", cwd=folder)
    decision = json.loads(out)
    assert code == 10
    assert (decision["outcome"], decision["candidates"][0]["subject_id"]) == ("duplicate", "anna")
    code, out, _ = run_apart("enroll", "carla", "--face", "dark.jpg", "--missing", "left_thumb=amputated", cwd=folder)
    assert code == 12
    assert "too_dark" in out
    assert run_apart("identify", "--face", "b.jpg", cwd=folder)[0] == 10
    assert run_apart("verify", "anna", "--face", "b.jpg", cwd=folder)[0] == 0
    code, out, _ = run_apart("info", "--json", cwd=folder)
    assert json.loads(out)["subjects"] == 1
    code, out, _ = run_apart("doctor", "--gallery", "gallery", "--json", cwd=folder)
    assert (code, json.loads(out)["problems"]) == (0, [])
    assert run_apart("remove", "anna", cwd=folder)[0] == 0
    assert run_apart("identify", "--face", "b.jpg", cwd=folder)[0] == 0


@pytest.mark.models
def test_what_a_command_prints_says_what_to_do_next(folder):
    code, out, _ = run("enroll", "anna", "--face", "a.jpg", cwd=folder)
    assert code == 0 and re.search(r"encounter_id: [0-9a-f]{32}\n", out) and "1 subject," not in out
    code, out, _ = run("enroll", "carla", "--face", "dark.jpg", cwd=folder)
    assert code == 12 and "refused face (dark.jpg): too_dark" in out
    code, out, _ = run("update", "anna", "--face", "b.jpg", cwd=folder)
    assert code == 0 and "anna: this encounter was added" in out
    assert "doctor" not in run("info", "--gallery", "nowhere", cwd=folder)[2]
    assert "`biodedup enroll`" in run("info", "--gallery", "nowhere", cwd=folder)[2]
    (folder / "empty.csv").write_text("")
    assert "empty.csv is empty" in run("dedup", "empty.csv", cwd=folder)[2]
    np.save(folder / "v.npy", people(2))
    (folder / "ids.txt").write_text("a\nb\n")
    assert "--model-id" in run("load", "v.npy", "--ids", "ids.txt", "--gallery", "new", cwd=folder)[2]


def test_progress_is_reported_in_lines_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(printing, "LINE_S", 0.0)
    with printing.progress_bar(lines=True) as progress:
        progress("enrolling", 1_000, 2_000)
    assert capsys.readouterr().err == "enrolling: 1,000 of 2,000\n"
    with printing.progress_bar() as progress:
        progress("enrolling", 1_000, 2_000)
    assert capsys.readouterr().err == ""


def test_mistakes_have_an_exit_code_and_a_sentence(folder):
    code, _, error = run("identify", "--face", "a.jpg", "--gallery", "nowhere", cwd=folder)
    assert (code, "holds no gallery" in error) == (2, True)
    assert not (folder / "nowhere").exists()
    assert run("remove", "anna", "--gallery", "nowhere", cwd=folder)[0] == 2
    assert run("enroll", "anna", cwd=folder)[0] == 2
    code, out, _ = run("load", "absent.parquet", "--json", cwd=folder)
    assert (code, json.loads(out)["error"]["type"]) == (2, "InvalidInput")
    with bd.Engine.open(folder / "held"):
        code, _, error = run("enroll", "x", "--face", "a.jpg", "--gallery", "held", cwd=folder)
        assert code == 3
        assert str(os.getpid()) in error


def write_templates(path: Path, count: int, seed: int = 0) -> np.ndarray:
    vectors = people(count, seed)
    cells = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    pa.parquet.write_table(pa.table({"subject_id": [f"s{i}" for i in range(count)], "face": cells}), path)
    return vectors


def test_load_is_idempotent_and_refuses_bad_rows_one_by_one(tmp_path):
    vectors = write_templates(tmp_path / "t.parquet", 250)
    with bd.Engine.open(tmp_path / "g") as engine:
        first = jobs.load(engine, tmp_path / "t.parquet", batch_rows=100)
        second = jobs.load(engine, tmp_path / "t.parquet", batch_rows=100)
        assert (first.added, first.present, second.added, second.present) == (250, 0, 0, 250)
        ids, _ = engine.search({"face": vectors}, k=1)
        assert list(ids[:, 0]) == [f"s{i}" for i in range(250)]
    rows = people(4, seed=7).astype(np.float64)
    rows[1] *= 3
    rows[2, 5] = np.nan
    table = pa.table({"subject_id": ["a", "b", "c", None], "face": rows.tolist()})
    pa.parquet.write_table(table, tmp_path / "bad.parquet")
    with bd.Engine.open(tmp_path / "g") as engine:
        result = jobs.load(engine, tmp_path / "bad.parquet")
        assert (result.added, result.refused, result.refused_rows) == (1, 3, (1, 2, 3))


def test_a_command_leaves_no_core_dump_which_would_hold_keys():
    script = "import atexit, resource; atexit.register(lambda: print(resource.getrlimit(resource.RLIMIT_CORE)))\nimport biodedup.cli as c; c.main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "--version"], capture_output=True, text=True, preexec_fn=_dumps
    )
    assert done.stdout.splitlines()[-1] == "(0, 0)"


def _dumps() -> None:
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))


def test_care_of_a_gallery_from_the_shell(folder):
    vectors = write_templates(folder / "t.parquet", 300)
    np.save(folder / "more.npy", people(50, seed=8))
    (folder / "more.txt").write_text("\n".join(f"m{i}" for i in range(50)))
    assert run("load", "t.parquet", "--model-id", SFACE, cwd=folder)[0] == 0
    code, out, _ = run("load", "more.npy", "--ids", "more.txt", "--json", cwd=folder)
    assert (code, json.loads(out)["added"], json.loads(out)["subjects"]) == (0, 50, 350)
    assert run("enroll", "anna", "--face", "a.jpg", "--group", "north", cwd=folder)[0] == 0
    assert run("identify", "--face", "b.jpg", "--group", "south", cwd=folder)[0] == 0
    assert run("identify", "--face", "b.jpg", "--group", "north", cwd=folder)[0] == 10
    assert run("update", "anna", "--face", "b.jpg", "--group", "south", cwd=folder)[0] == 0
    assert run("identify", "--face", "a.jpg", "--group", "south", cwd=folder)[0] == 10
    assert run("remove", "s3", cwd=folder)[0] == 0
    code, out, _ = run("compact", "--json", cwd=folder)
    assert (code, json.loads(out)["subjects"]) == (0, 350)
    code, out, _ = run("backup", "copy", "--json", cwd=folder)
    assert (code, json.loads(out)["files_kept"]) == (0, 0)
    assert json.loads(run("backup", "copy", "--json", cwd=folder)[1])["files_copied"] == 0
    (damaged,) = (folder / "gallery" / "segments").glob("*.face")
    sound = damaged.read_bytes()
    damaged.write_bytes(sound[:5000] + bytes([sound[5000] ^ 4]) + sound[5001:])
    code, out, _ = run("doctor", "-g", "gallery", cwd=folder)
    assert code == 4
    assert f"segment {damaged.name.split('.')[0]}, column face" in out
    code, _, error = run("identify", "--face", "a.jpg", cwd=folder)
    assert code == 4
    assert damaged.name in error
    assert run("doctor", "-g", "gallery", "--repair", cwd=folder)[0] == 4
    code, out, _ = run("doctor", "-g", "gallery", "--repair", "--backup", "copy", cwd=folder)
    assert code == 0
    assert "taken from the backup" in out
    assert damaged.read_bytes() == sound
    with bd.Engine.open(folder / "gallery", read_only=True) as engine:
        assert engine.search({"face": vectors[:5]}, k=1).ids[:, 0].tolist()[:3] == ["s0", "s1", "s2"]


def test_load_says_what_is_wrong_with_a_file(tmp_path):
    (tmp_path / "text.parquet").write_text("no")
    pa.parquet.write_table(pa.table({"id": ["a"]}), tmp_path / "columns.parquet")
    pa.parquet.write_table(pa.table({"subject_id": ["a"], "face": ["x"]}), tmp_path / "kind.parquet")
    pa.parquet.write_table(
        pa.table({"subject_id": ["a", "b"], "face": [[1.0], [0.6, 0.8]]}), tmp_path / "ragged.parquet"
    )
    stream = pa.BufferOutputStream()
    table = pa.table({"subject_id": ["a", "b"], "face": people(2).tolist()})
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "cut.ipc").write_bytes(stream.getvalue().to_pybytes()[:-400])
    (tmp_path / "empty.npy").touch()
    (tmp_path / "empty.arrow").touch()
    with bd.Engine.open(tmp_path / "g") as engine:
        with pytest.raises(bd.InvalidInput, match="is cut short"):
            jobs.load(engine, tmp_path / "cut.ipc")
        for name in ("empty.npy", "empty.arrow"):
            with pytest.raises(bd.InvalidInput, match="is not a Parquet"):
                jobs.load(engine, tmp_path / name, ids=tmp_path / "empty.npy")
        for name, text in (
            ("text", "not a Parquet"),
            ("columns", "wanted subject_id"),
            ("kind", "list of float32"),
            ("ragged", "one dimension"),
        ):
            with pytest.raises(bd.InvalidInput, match=text):
                jobs.load(engine, tmp_path / f"{name}.parquet")


def album(folder: Path, portrait: np.ndarray) -> Path:
    """Three subjects' folders; two of them hold the same person."""
    for name, image in {
        "anna/1.jpg": portrait,
        "anna/2.jpg": portrait[:, ::-1],
        "bella/1.jpg": (portrait * 0.7).astype(np.uint8),
        "carla/1.jpg": (portrait * 0.05).astype(np.uint8),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(np.ascontiguousarray(image)))
    (folder / "carla" / "2.png").write_text("not an image")
    return folder


def test_dedup_of_a_folder_finds_one_person_under_two_names(tmp_path, portrait):
    album(tmp_path / "album", portrait)
    code, out, _ = run("dedup", "album", "--out", "r.parquet", "--json", cwd=tmp_path)
    summary = json.loads(out)
    assert code == 10
    assert (summary["units"], summary["refused"], summary["pairs"], summary["pairs_across_labels"]) == (5, 2, 3, 2)
    assert summary["refusal_reasons"] == {"not_an_image": 1, "too_dark": 1}
    units = pa.parquet.read_table(tmp_path / "r.parquet").to_pylist()
    assert [u["cluster"] for u in units] == [1, 1, 1, None, None]
    assert json.loads((tmp_path / "r.summary.json").read_text()).items() <= summary.items()


def test_dedup_started_again_extracts_only_what_changed(tmp_path, portrait, monkeypatch):
    album(tmp_path / "album", portrait)
    extracted: list[int] = []
    extract = bd.Extractor.extract
    monkeypatch.setattr(bd.Extractor, "extract", lambda self, c: (extracted.append(len(c)), extract(self, c))[1])
    first = jobs.dedup(tmp_path / "album", tmp_path / "r.csv")
    assert sum(extracted) == 5
    extracted.clear()
    assert jobs.dedup(tmp_path / "album", tmp_path / "r.csv").summary() == first.summary()
    assert sum(extracted) == 0
    (tmp_path / "album" / "bella" / "1.jpg").unlink()
    (tmp_path / "album" / "carla" / "1.jpg").write_bytes(jpeg(portrait, 70))
    changed = jobs.dedup(tmp_path / "album", tmp_path / "r.csv")
    assert sum(extracted) == 1
    assert [c.subject_ids for c in changed.clusters] == [("anna/1.jpg", "anna/2.jpg", "carla/1.jpg")]
    assert (tmp_path / "r.pairs.csv").read_text().count("\n") == 4


def test_dedup_says_by_its_exit_code_that_images_or_rows_were_refused(tmp_path, portrait):
    (tmp_path / "a.jpg").write_bytes(jpeg(portrait))
    (tmp_path / "b.jpg").write_bytes(jpeg(portrait[:, ::-1], 60))
    (tmp_path / "rows.csv").write_text("subject_id,path\na,a.jpg\n b,b.jpg\n")
    code, out, _ = run("dedup", "rows.csv", "--out", "rows.parquet", cwd=tmp_path)
    assert code == 12 and "row 2 refused: subject_id" in out
    (tmp_path / "both.csv").write_text("subject_id,path\na,a.jpg\nb,b.jpg\nc,absent.jpg\n")
    code, out, _ = run("dedup", "both.csv", "--out", "r.parquet", cwd=tmp_path)
    assert code == 10
    assert "row 3: c (" in out and "absent.jpg) refused: missing_file" in out
    code, _, error = run("dedup", "both.csv", "--out", "r.csv", cwd=tmp_path)
    assert code == 2 and "r.parquet is a result" in error


def test_doctor_takes_the_gallery_as_others_do_and_checks_the_default_one(tmp_path):
    assert "gallery" not in run("doctor", cwd=tmp_path)[1]
    bd.Engine.open(tmp_path / "gallery").close()
    bd.Engine.open(tmp_path / "gm").close()
    code, out, error = run("doctor", cwd=tmp_path)
    assert (code, "gallery gallery: 0 subjects" in out, "checking ./gallery" in error) == (0, True, True)
    code, out, error = run("doctor", "gm", cwd=tmp_path)
    assert (code, "gallery gm: 0 subjects" in out, error) == (0, True, "")


INTERRUPTED = """
import os, runpy, signal, biodedup
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it otherwise
import_captures = biodedup.Engine.import_captures
def import_and_interrupt(engine, encounters):
    answers = import_captures(engine, encounters)
    os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C, between two batches
    return answers
biodedup.Engine.import_captures = import_and_interrupt
runpy.run_module("biodedup.cli", run_name="__main__", alter_sys=True)
"""


def test_dedup_interrupted_in_the_middle_goes_on_where_it_was(tmp_path, portrait):
    import cv2

    for i in range(80):
        path = tmp_path / "album" / f"p{i:03d}" / "1.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(jpeg(cv2.convertScaleAbs(portrait, alpha=0.5 + i / 160)))
    command = ["dedup", "album", "--out", "r.parquet", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *command], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 130, done.stderr
    assert "again to resume" in done.stderr
    with bd.Engine.open(tmp_path / "r.parquet.work", read_only=True) as engine:
        assert len(engine) == bd.Config().batch_size < 80
    assert not (tmp_path / "r.parquet").exists()
    code, out, _ = run(*command, cwd=tmp_path)
    assert code == 10
    assert json.loads(out)["clusters"] == 1


def test_dedup_of_a_manifest_compares_subjects_with_all_their_captures(tmp_path, portrait):
    import cv2

    (tmp_path / "face.jpg").write_bytes(jpeg(portrait))
    for seed in (1, 2):
        cv2.imwrite(str(tmp_path / f"f{seed}.png"), finger(seed))
    cv2.imwrite(str(tmp_path / "f1b.png"), finger(1, degrees=4, noise_seed=1))
    rows = [
        ("anna", "face.jpg", "face"), ("anna", "f1.png", "right_index"),
        ("bella", "f1b.png", "right_index"), ("carla", "f2.png", "right_index"), ("dora", "gone.png", "right_index"),
    ]  # fmt: skip
    table = pa.table({name: [row[i] for row in rows] for i, name in enumerate(("subject_id", "path", "position"))})
    pa.csv.write_csv(table, tmp_path / "m.csv")
    result = jobs.dedup(tmp_path / "m.csv", tmp_path / "r.parquet")
    assert [c.subject_ids for c in result.clusters] == [("anna", "bella")]
    assert {k: v[0].reason for k, v in result.refusals.items()} == {"dora": "missing_file"}


def test_dedup_says_what_is_wrong_with_its_source(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "m.csv").write_text("a,b\n1,2\n")
    for source, text in (("empty", "no images"), ("absent", "does not exist"), ("m.csv", "lacks the columns")):
        with pytest.raises(bd.InvalidInput, match=text):
            jobs.dedup(tmp_path / source, tmp_path / "r.parquet")
    with pytest.raises(bd.InvalidInput, match="end the name with"):
        jobs.dedup(tmp_path / "empty", tmp_path / "r.xlsx")


def test_the_demo_blocks_every_recapture_and_agrees_with_numpy(tmp_path):
    lines: list[str] = []
    result = jobs.demo(tmp_path / "g", subjects=3000, probes=200, say=lines.append)
    outcomes = dict(result.decisions)
    assert outcomes["portrait"].outcome == "unique"
    assert {d.outcome for name, d in result.decisions if name.startswith("portrait,")} == {"duplicate", "refused"}
    blocked = [d.best.subject_id for d in outcomes.values() if d.outcome == "duplicate"]
    assert blocked == ["astronaut"] * 7 + ["person-1"]
    assert outcomes["a face and a finger"].outcome == outcomes["another face and finger"].outcome == "unique"
    assert result.agrees_with_numpy == 1.0
    assert result.mates_first > 0.95
    assert len(lines) > 10


def test_the_demos_population_has_the_spread_measured_on_real_faces():
    vectors = population(2000)
    cosines = (vectors @ vectors.T)[np.triu_indices(2000, 1)]
    assert cosines.std() == pytest.approx(0.092, abs=0.002)
    assert np.allclose(vectors, unit(vectors))
    assert np.allclose(np.sum(again(vectors, 0.6) * vectors, axis=1), 0.6, atol=1e-4)


def test_help_groups_the_commands_and_loads_no_engine_code():
    code = """
import sys
from biodedup.cli import app
try:
    app(["--help"])
except SystemExit:
    heavy = {"numba", "faiss", "onnxruntime", "cv2", "pyarrow", "scipy", "sklearn", "skimage"} & sys.modules.keys()
    sys.exit(f"imported {sorted(heavy)}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", "import biodedup.cli\n" + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    headings = [line for line in done.stdout.splitlines() if line.startswith("\u256d")]
    places = [next(i for i, line in enumerate(headings) if panel in line) for panel in Panel]
    assert places == sorted(places)
    assert not any(" Commands " in line for line in headings)  # a command without a panel


def test_ctrl_c_while_the_commands_are_imported_is_reported_without_a_traceback(tmp_path):
    code = """
import builtins, sys
imported = builtins.__import__
def interrupted(name, *rest):
    if name == "typer":
        raise KeyboardInterrupt
    return imported(name, *rest)
from biodedup.cli import main
builtins.__import__ = interrupted
sys.argv = ["biodedup", "info"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_in_a_command_is_reported_without_a_traceback(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(bd.Engine, "open", interrupted)
    monkeypatch.setattr(sys, "argv", ["biodedup", "info"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_pairs_with_an_image_of_unknown_label_are_not_across_labels():
    units = [Unit(name, label, ()) for name, label in (("a/1", "a"), ("a/2", "a"), ("b/1", "b"), ("x", None))]
    links = [Link(pair, 50.0, False, ()) for pair in (("a/1", "a/2"), ("a/1", "b/1"), ("a/1", "x"))]
    cluster = Cluster(("a/1", "a/2", "b/1", "x"), tuple(links), 50.0)
    summary = DedupResult(tuple(units), (cluster,), {}, 40.0).summary()
    assert (summary["pairs"], summary["pairs_of_one_label"], summary["pairs_across_labels"]) == (3, 1, 1)
    assert summary["precision"] == 0.5


def test_the_reason_of_a_duplicate_is_a_note_not_a_task(capsys):
    decision = bd.Decision("duplicate", "anna", "e1", (), (), (), 50.0, 23.0, 2, 3, reasons=("open_case",))
    with pytest.raises(typer.Exit):
        printing.finish_decision(decision, False, labels=bd.Config().labels)
    with pytest.raises(typer.Exit):
        printing.finish_decision(replace(decision, outcome="review"), False, labels=bd.Config().labels)
    note, task = re.findall(r"^  (.+): another case is open", capsys.readouterr().out, re.M)
    assert (note, task) == ("note", "a person has to look")


def loaded(folder: Path, vectors, ids) -> Path:
    with bd.Engine.open(folder) as engine:
        engine.add_templates(ids, {"face": vectors}, model_id=SFACE)
    return folder


def test_a_position_on_the_command_line_has_any_name_that_tables_know(tmp_path):
    from biodedup.cli.options import captures_of

    captures = captures_of(None, ["RI=a.png", "telunjuk kiri=b.png", "c.png"], ["Left Thumb=amputated"], None)
    assert [c.column for c in captures[:3]] == ["right_index", "left_index", "unknown"]
    assert captures[3].position == "left_thumb"
    with pytest.raises(bd.InvalidInput, match="position 'toe' is not known"):
        captures_of(None, ["toe=a.png"], None, None)


def test_a_search_in_a_group_that_nobody_is_in_says_so(tmp_path):
    loaded(tmp_path / "gallery", people(3), ["a", "b", "c"])
    (tmp_path / "x.jpg").write_bytes(b"no picture")
    _, _, err = run("identify", "--face", "x.jpg", "--group", "north", cwd=tmp_path)
    assert "no subject is in the group 'north'" in err


def test_a_replacement_without_a_reason_names_the_option(tmp_path):
    loaded(tmp_path / "gallery", people(3), ["a", "b", "c"])
    code, _, err = run("update", "a", "--face", "x.jpg", "--replace", cwd=tmp_path)
    assert code == 2 and "--reason TEXT" in err


def test_facts_are_words_and_long_ids_are_never_cut(tmp_path, monkeypatch):
    loaded(tmp_path / "gallery", people(3), ["a", "b", "c"])
    _, out, _ = run("info", cwd=tmp_path)
    assert "None" not in out and "[]" not in out and "('sent',)" not in out and "…" not in out


def test_a_merge_names_the_gallery_for_undo_and_how_to_decide_by_hand(tmp_path):
    vectors = people(40)
    loaded(tmp_path / "agam", vectors[:20], [f"a{i}" for i in range(20)])
    loaded(tmp_path / "bantul", np.concatenate([vectors[:2], vectors[20:]]), [f"b{i}" for i in range(22)])
    code, out, _ = run("merge", "agam", "bantul", "--into", "central", "--apply", cwd=tmp_path)
    assert code == 0 and "--gallery central" in out and "2 clusters to be decided by hand" in out
    assert "biodedup remove ID" in (tmp_path / "merge.html").read_text()


def test_a_damaged_gallery_is_reported_with_the_command_that_restores_it(tmp_path):
    with bd.Engine.open(loaded(tmp_path / "gallery", people(3), ["a", "b", "c"])) as engine:
        engine.compact()
    (column,) = (tmp_path / "gallery" / "segments").glob("*.face")
    content = bytearray(column.read_bytes())
    content[-8] ^= 1
    column.write_bytes(content)
    code, out, _ = run("doctor", "--gallery", "gallery", cwd=tmp_path)
    assert code == 4 and "--gallery gallery --repair --backup COPY" in out and "run `biodedup doctor`" not in out
