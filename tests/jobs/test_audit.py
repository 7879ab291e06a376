"""A roll against a gallery: what is found, where, and what becomes of broken rolls."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import biodedup as bd
from biodedup import jobs
from biodedup.cli import app
from biodedup.engine import joining
from biodedup.jobs.manifests.roll import read_roll
from biodedup.testing import internals
from tests.support.images import jpeg
from tests.support.vectors import again, people

pytestmark = pytest.mark.slow

THRESHOLD_DB = 70.0
SUBJECTS = 400
CONFIG = bd.Config(policy=bd.Policy(duplicate_db=100, review_db=30))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """s0 ... s399; of s0 to s9 also t0 ... t9, doubles; of s0 a third, u0. Partly sealed; s20 was removed."""
    folder = tmp_path_factory.mktemp("built") / "g"
    vectors = people(SUBJECTS)
    doubles = again(vectors[:10], 0.85)
    third = again(vectors[:1], 0.85, seed=3)
    with bd.Engine.open(folder, CONFIG) as engine:
        engine.add_templates([f"s{i}" for i in range(SUBJECTS)], {"face": vectors})
        engine.compact()
        names = [f"t{i}" for i in range(10)] + ["u0"]
        engine.add_templates(names, {"face": np.concatenate([doubles, third])})
        engine.remove("s20")
    return folder


@pytest.fixture
def gallery(built, tmp_path, monkeypatch):
    monkeypatch.setattr(joining, "JOIN_ROWS", 50)
    return shutil.copytree(built, tmp_path / "g")


@pytest.fixture
def engine(gallery):
    with bd.Engine.open(gallery, CONFIG, read_only=True) as engine:
        yield engine


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def audited(engine: bd.Engine, roll: Path, **more: object) -> jobs.AuditResult:
    return jobs.audit(
        engine, roll, roll.with_suffix(".parquet"), threshold_db=THRESHOLD_DB, clock=lambda: 1.8e9, **more
    )


def of_kind(result: jobs.AuditResult, kind: str) -> list[tuple[object, ...]]:
    return [(f.line, f.subject_id, f.other_id, f.other_line) for f in result.findings if f.finding == kind]


ROLL = """subject_id,district,polling station
s1,North,1
s5,North,1
t1,South,2
s2,South,2
s30,East,3
s20,East,3
nobody,East,3
s5,South,2
,East,3
s31,East
"""


def test_each_kind_of_finding_is_found_with_its_line_and_district(engine, tmp_path):
    result = audited(engine, written(tmp_path / "roll.csv", ROLL), report=tmp_path / "report.html")
    assert of_kind(result, "two_ids") == [(2, "s1", "t1", 4)]
    assert of_kind(result, "listed_twice") == [(9, "s5", None, 3)]
    assert of_kind(result, "enrolled_twice") == [(3, "s5", "t5", None), (5, "s2", "t2", None)]
    assert [(f.line, f.subject_id) for f in result.findings if f.finding == "not_enrolled"] == [
        (7, "s20"),
        (8, "nobody"),
    ]
    assert [(f.line, f.detail) for f in result.findings if f.finding == "refused"] == [
        (10, "subject_id is empty"),
        (11, "the line has 2 fields, wanted 3"),
    ]
    assert (result.lines, result.subjects, result.gallery_size) == (10, 5, 410)
    districts = result.districts()
    assert districts["North"] == {"lines": 2, "two_ids": 1, "listed_twice": 0, "enrolled_twice": 1, "not_enrolled": 0, "unclear": 0, "refused": 0, "any": 2}  # fmt: skip
    assert (districts["South"]["two_ids"], districts["South"]["any"]) == (1, 3)
    assert (districts["East"]["not_enrolled"], districts["East"]["refused"], districts[""]["refused"]) == (2, 1, 1)
    assert sum(counts["lines"] for counts in districts.values()) == result.lines
    pairs = 5 * 409 - 10
    assert result.expected_false == pytest.approx(pairs * 1e-7)
    table = pq.read_table(tmp_path / "roll.parquet")
    assert table.schema.names == [*jobs.AUDIT_SCHEMA.names, "polling station"]
    assert table["polling station"].to_pylist()[:2] == ["1", "2"]
    page = (tmp_path / "report.html").read_text()
    for text in ("South", "t5", "nobody", "70.0 dB", "the line has 2 fields, wanted 3"):
        assert text in page
    assert "<script" not in page and "polling" not in page


def test_every_double_of_a_listed_subject_is_found_and_no_other(engine, tmp_path):
    listed = [f"s{i}" for i in range(0, 60)] + ["t3", "u0"]
    result = audited(engine, written(tmp_path / "roll.csv", "subject_id\n" + "\n".join(listed)))
    vectors = {name: engine.templates(name)["face"].embedding for name in engine.subject_ids()}
    near = {frozenset(pair) for pair in combinations(vectors, 2) if float(vectors[pair[0]] @ vectors[pair[1]]) > 0.6}
    wanted = {pair for pair in near if pair & set(listed)}
    found = {frozenset((f.subject_id, f.other_id)) for f in result.findings if f.other_id}
    assert found == wanted and len(found) == len([f for f in result.findings if f.other_id]) > 10
    three = {f.person for f in result.findings if f.subject_id == "s0"}
    assert len(three) == 1  # s0, t0 and u0 are one person


def test_of_most_of_a_gallery_the_same_is_found_by_joining_it_whole(engine, tmp_path):
    most = [name for name in engine.subject_ids() if name not in ("t4", "s6")]
    result = audited(engine, written(tmp_path / "roll.csv", "subject_id\n" + "\n".join(most)))
    found = {(f.finding, frozenset((f.subject_id, f.other_id))) for f in result.findings}
    expected = {("two_ids", frozenset((f"s{i}", f"t{i}"))) for i in range(10) if i not in (4, 6)}
    expected |= {("enrolled_twice", frozenset((f"s{i}", f"t{i}"))) for i in (4, 6)}
    expected |= {("two_ids", frozenset(pair)) for pair in (("s0", "u0"), ("t0", "u0"))}
    assert found == expected


def test_subjects_with_fingers_are_compared_by_all_their_captures(tmp_path):
    faces, fingers = people(60), people(60, seed=9)
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        engine.add_templates([f"s{i}" for i in range(60)], {"face": faces, "right_index": fingers})
        engine.add_templates(["t1"], {"right_index": again(fingers[1:2], 0.9)})
        engine.add_templates(["t2"], {"face": again(faces[2:3], 0.9), "right_index": again(fingers[2:3], 0.9)})
        result = audited(engine, written(tmp_path / "roll.csv", "subject_id\ns1\ns2\ns3\nt2\n"))
    assert of_kind(result, "two_ids") == [(3, "s2", "t2", 5)]
    assert of_kind(result, "enrolled_twice") == [(2, "s1", "t1", None)]


def test_a_pair_judged_different_is_not_raised_and_a_case_that_waits_is_named(gallery, tmp_path):
    with bd.Engine.open(gallery, CONFIG) as engine:
        for name, like in (("v1", 50), ("v2", 51)):
            vector = again(people(SUBJECTS)[like], 0.58, seed=like)
            encounter = bd.Encounter(name, templates={"face": vector}, encounter_id=f"e-{name}")
            assert engine.enroll(encounter).outcome == "review"
        assert engine.adjudicate("e-v1", "different", "A. Officer").outcome == "unique"
        result = audited(engine, written(tmp_path / "roll.csv", "subject_id\nv1\ns50\nv2\n"))
    assert [(f.finding, f.subject_id, f.detail) for f in result.findings] == [
        ("not_enrolled", "v2", "in review: case e-v2")
    ]


def test_an_interrupted_audit_goes_on_and_ends_as_if_it_had_not_been(engine, tmp_path):
    roll = written(tmp_path / "roll.csv", "subject_id\n" + "\n".join(f"s{i}" for i in range(160)))
    audited(engine, roll, report=tmp_path / "whole.html")
    whole = (tmp_path / "roll.parquet").read_bytes(), (tmp_path / "whole.html").read_bytes()
    (tmp_path / "roll.parquet").unlink()

    seen: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        seen.append(done)
        if done == 100:
            raise Cut

    with pytest.raises(Cut):
        audited(engine, roll, progress=progress)
    assert not (tmp_path / "roll.parquet").exists()
    notes = tmp_path / "roll.parquet.notes"
    notes.write_bytes(notes.read_bytes()[:-10])  # the machine went down in the middle of a line
    seen.clear()
    with pytest.raises(Cut):
        audited(engine, roll, progress=progress)
    assert seen == [100]
    seen.clear()
    audited(engine, roll, report=tmp_path / "again.html", progress=lambda stage, done, total: seen.append(done))
    assert seen == [150, 159]  # s20 is not enrolled
    assert ((tmp_path / "roll.parquet").read_bytes(), (tmp_path / "again.html").read_bytes()) == whole
    assert not notes.exists()


class Cut(Exception):
    pass


@pytest.mark.parametrize("listed", [160, 300], ids=["some of the gallery", "most of it"])
def test_an_audit_goes_on_with_a_gallery_that_has_gone_on_and_ends_as_one_of_its_last_version(
    gallery, tmp_path, listed
):
    names = [f"s{i}" for i in range(listed)] + ["late"]
    roll = written(tmp_path / "roll.csv", "subject_id\n" + "\n".join(names))
    seen: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        seen.append(done)
        if done == 100:
            raise Cut

    with bd.Engine.open(gallery, CONFIG) as engine, pytest.raises(Cut):
        audited(engine, roll, progress=progress)
    vectors = people(SUBJECTS)
    with bd.Engine.open(gallery, CONFIG) as engine:
        doubles = again(vectors[[3, 7, 140]], 0.85, seed=8)
        engine.add_templates(
            ["n3", "late", "n140"], {"face": doubles}
        )  # of one who was compared, and of one who was not
        engine.remove("t5")
        for name in ("s6", "s150"):  # other people under their ids
            engine.remove(name)
            engine.add_templates([name], {"face": again(vectors[[9 if name == "s6" else 8]], 0.85, seed=5)})
        near = again(vectors[:1], 0.58, seed=4)[0]
        assert engine.update(bd.Encounter("s0", templates={"face": near}, encounter_id="e")).outcome == "review"
        engine.adjudicate("e", "different", "A. Officer", candidate="t0")  # u0 is still to be judged: s0 is not updated
        internals(engine).gallery.seal()
    seen.clear()
    with bd.Engine.open(gallery, CONFIG, read_only=True) as engine:
        with pytest.raises(Cut):
            audited(engine, roll, progress=lambda stage, done, total: progress(stage, done - 50, total))
        assert seen == [100]
    with bd.Engine.open(gallery, CONFIG) as engine:
        engine.add_templates(["m3", "m149"], {"face": again(vectors[[3, 149]], 0.85, seed=9)})
    seen.clear()
    with bd.Engine.open(gallery, CONFIG, read_only=True) as engine:
        result = audited(engine, roll, progress=lambda stage, done, total: seen.append(done))
        assert seen[0] > 150
        (tmp_path / "anew").mkdir()
        anew = audited(engine, Path(shutil.copy(roll, tmp_path / "anew")))
    assert [without_score(f) for f in result.findings] == [without_score(f) for f in anew.findings]
    assert [f.score_db for f in result.findings] == pytest.approx(
        [f.score_db for f in anew.findings], abs=0.1
    )  # rounded when they were sealed
    assert result.summary() == anew.summary() and result.versions == (engine_version(gallery),) * 2
    found = {frozenset((f.subject_id, f.other_id)) for f in result.findings if f.other_id}
    assert found >= {frozenset(p) for p in (("s3", "n3"), ("s3", "m3"), ("s7", "late"), ("s140", "n140"), ("s6", "s9"))}
    assert not found & {frozenset(pair) for pair in (("s5", "t5"), ("s6", "t6"), ("s0", "t0"))}


def without_score(finding: object) -> object:
    return replace(finding, score_db=None)


def engine_version(gallery: Path) -> int:
    with bd.Engine.open(gallery, CONFIG, read_only=True) as engine:
        return engine.gallery_version


def test_notes_of_another_roll_or_threshold_are_not_gone_on_with(engine, tmp_path):
    roll = written(tmp_path / "roll.csv", "subject_id\n" + "\n".join(f"s{i}" for i in range(90)))

    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audited(engine, roll, progress=stop)
    written(roll, "subject_id\n" + "\n".join(f"s{i}" for i in range(91)))
    seen: list[int] = []
    audited(engine, roll, progress=lambda stage, done, total: seen.append(done))
    assert seen[0] == 50


KILLED = """
import os, signal, sys
from pathlib import Path
import biodedup as bd
from biodedup import jobs
from biodedup.engine import joining
joining.JOIN_ROWS = 50
def progress(stage, done, total):
    if done == 100:
        os.kill(os.getpid(), signal.SIGKILL)
with bd.Engine.open(sys.argv[1], bd.Config(policy=bd.Policy(duplicate_db=100, review_db=30)), read_only=True) as opened:
    jobs.audit(opened, Path(sys.argv[2]), Path(sys.argv[3]), threshold_db=70.0, progress=progress)
"""


def test_a_killed_audit_leaves_no_result_and_goes_on(engine, gallery, tmp_path):
    roll = written(tmp_path / "roll.csv", "subject_id\n" + "\n".join(f"s{i}" for i in range(160)))
    arguments = [sys.executable, "-c", KILLED, str(gallery), str(roll), str(tmp_path / "roll.parquet")]
    assert subprocess.run(arguments, env=os.environ, timeout=240).returncode == -signal.SIGKILL
    assert not (tmp_path / "roll.parquet").exists()
    seen: list[int] = []
    result = audited(engine, roll, progress=lambda stage, done, total: seen.append(done))
    assert seen == [150, 159]
    assert len(of_kind(result, "enrolled_twice")) == 11


# rolls of captures -------------------------------------------------------------------------------------------------


def test_a_roll_of_captures_is_identified_entry_by_entry(tmp_path, portrait):
    folder = tmp_path / "captures"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg(portrait))
    (folder / "b.jpg").write_bytes(jpeg(portrait[:, ::-1], 70))
    (folder / "dark.jpg").write_bytes(jpeg((portrait * 0.05).astype(np.uint8)))
    roll = written(
        folder / "roll.csv",
        "path;position;district\na.jpg;face;North\ndark.jpg;;North\nb.jpg;;South\nabsent.jpg;;South\na.jpg;toe;South\n",
    )
    with bd.Engine.open(tmp_path / "g") as engine:
        engine.add_templates([f"s{i}" for i in range(20)], {"face": people(20)})
        result = jobs.audit(engine, roll, tmp_path / "out.csv")
        assert [(f.finding, f.line) for f in result.findings] == [
            ("not_enrolled", 2),
            ("not_enrolled", 4),
            ("refused", 3),
            ("refused", 5),
            ("refused", 6),
        ]
        assert [f.detail for f in result.findings][2:] == ["too dark", "missing file", "position is not known"]
        engine.enroll(bd.Encounter("anna", captures=[bd.Face(portrait)]))
        result = jobs.audit(engine, roll, tmp_path / "out.csv", report=tmp_path / "report.html")
    assert of_kind(result, "listed_twice") == [(4, "anna", None, 2)]
    assert result.districts()["South"]["listed_twice"] == 1
    assert "by its captures" in (tmp_path / "report.html").read_text()


def test_entries_of_captures_stand_as_of_their_versions_which_the_report_states(tmp_path, portrait, monkeypatch):
    monkeypatch.setattr(importlib.import_module("biodedup.jobs.deduplication.audit"), "_CHECKPOINT_ENTRIES", 1)
    for name, image in (("a.jpg", portrait), ("b.jpg", portrait[:, ::-1])):
        (tmp_path / name).write_bytes(jpeg(image))
    roll = written(tmp_path / "roll.csv", "path\na.jpg\nb.jpg\n")

    def stop(stage: str, done: int, total: int) -> None:
        raise Cut

    with bd.Engine.open(tmp_path / "g") as engine:
        engine.add_templates([f"s{i}" for i in range(20)], {"face": people(20)})
        threshold_db = engine.policy.link_db(20)
        with pytest.raises(Cut):
            jobs.audit(engine, roll, tmp_path / "out.csv", progress=stop)
        engine.enroll(bd.Encounter("anna", captures=[bd.Face(portrait)]))
        result = jobs.audit(engine, roll, tmp_path / "out.csv", report=tmp_path / "report.html", clock=lambda: 1.8e9)
        gallery_id = engine.info()["gallery_id"]
    assert [(f.finding, f.line, f.detail) for f in result.findings] == [("not_enrolled", 2, "as of version 1")]
    assert (result.versions, result.threshold_db) == ((1, 2), threshold_db)
    page = (tmp_path / "report.html").read_text()
    assert "Gallery versions 1 to 2" in page
    assert f"Gallery {gallery_id}, 2027-01-15 08:00 UTC" in page


# broken rolls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, text",
    [
        (b"", "no header"),
        (b"\n\n", "no header"),
        (b"name,district\na,b\n", "wanted subject_id"),
        ("name,district\na,b\n".encode("utf-16"), "wanted subject_id"),
        (b"subject_id,subject_id\na,b\n", "repeats a column name"),
        (b"subject_id,Subject_ID\na,b\n", "repeats a column name"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "is an image"),
    ],
)
def test_a_file_that_is_no_roll_is_the_callers_mistake(engine, tmp_path, content, text):
    (tmp_path / "roll.csv").write_bytes(content)
    with pytest.raises(bd.InvalidInput, match=text):
        audited(engine, tmp_path / "roll.csv")
    assert not (tmp_path / "roll.parquet").exists()


def test_bad_lines_are_refused_one_by_one_and_good_ones_kept(tmp_path):
    content = (
        b"\xef\xbb\xbfSubject_ID ;District\r\n001;A \r\n\r\n3.17E+15;A\r\n\xff\xfe;B\r\na\tb;B\r\n"
        + b"x" * 300
        + b";C\r\n002;C\r\n;\r\n 001;A\r\n"
    )
    (tmp_path / "roll.csv").write_bytes(content)
    roll = read_roll(tmp_path / "roll.csv")
    assert (roll.texts("subject_id"), roll.lines.tolist()) == (["001", "002"], [2, 8])
    assert [(line, district, reason.split(";")[0].split(":")[0]) for line, district, reason in roll.refused] == [
        (4, "A", "subject_id was rounded by a spreadsheet"),
        (5, "B", "subject_id is not UTF-8 text"),
        (6, "B", "subject_id is not usable"),
        (7, "C", "subject_id is not usable"),
        (10, "A", "subject_id is not usable"),
    ]


def test_parquet_rolls_keep_their_ids_and_wrong_types_are_named(engine, tmp_path):
    table = pa.table({"subject_id": pa.array(["s1", None, "t1"]).dictionary_encode(), "vectors": [[1.0], [2.0], [3.0]]})
    pq.write_table(table, tmp_path / "in.parquet")
    result = jobs.audit(engine, tmp_path / "in.parquet", tmp_path / "out.csv", threshold_db=THRESHOLD_DB)
    assert [(f.finding, f.line) for f in result.findings] == [("two_ids", 1), ("refused", 2)]
    pq.write_table(pa.table({"subject_id": [7, 8]}), tmp_path / "in.parquet")
    assert read_roll(tmp_path / "in.parquet").texts("subject_id") == ["7", "8"]
    pq.write_table(pa.table({"subject_id": [7.5, 8.5]}), tmp_path / "in.parquet")
    with pytest.raises(bd.InvalidInput, match="of type double"):
        read_roll(tmp_path / "in.parquet")
    (tmp_path / "in.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(bd.InvalidInput, match="not a readable"):
        read_roll(tmp_path / "in.parquet")
    with pytest.raises(bd.InvalidInput, match="does not exist"):
        read_roll(tmp_path / "absent.csv")
    with pytest.raises(bd.InvalidInput, match="end the name with"):
        jobs.audit(engine, tmp_path / "in.parquet", tmp_path / "out.xlsx")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_roll_or_the_callers_mistake(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(b"subject_id,district\n" + content)
    try:
        roll = read_roll(path)
    except bd.InvalidInput:
        return
    lines = [*roll.lines.tolist(), *(line for line, _, _ in roll.refused)]
    assert len(lines) == len(set(lines))
    assert all(roll.texts("subject_id"))


def test_audit_from_the_shell(gallery, tmp_path):
    roll = written(tmp_path / "roll.csv", ROLL)
    arguments = ["audit", roll, "--gallery", gallery, "--out", tmp_path / "a.csv", "--report", tmp_path / "a.html"]
    done = CliRunner().invoke(app, [*map(str, arguments), "--threshold-db", "70", "--json"])
    assert done.exit_code == 10, done.output
    document = json.loads(done.stdout)
    assert document["findings"] == {"two_ids": 1, "listed_twice": 1, "enrolled_twice": 2, "not_enrolled": 2, "unclear": 0, "refused": 2}  # fmt: skip
    assert (tmp_path / "a.html").exists() and len((tmp_path / "a.csv").read_text().splitlines()) == 9
    done = CliRunner().invoke(
        app, ["audit", str(written(roll, "subject_id\ns40\n")), "-g", str(gallery), "-o", str(tmp_path / "b.parquet")]
    )
    assert done.exit_code == 0 and "listed, but not enrolled" in done.output
