"""What an id, a note or a file name says is data: it is refused or shown, and never obeyed."""

from __future__ import annotations

import csv
import errno
import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.cli import main
from biodedup.config import LabelConfig
from biodedup.gallery.files.faults import translated
from biodedup.jobs.enrolment.outcomes import Outcome, outcome_table
from biodedup.jobs.manifests.encounters import Record
from biodedup.jobs.manifests.roll import read_roll
from biodedup.jobs.manifests.tables import TableFile
from biodedup.jobs.shared.files import write_json
from biodedup.jobs.shared.output import write_table
from biodedup.jobs.shared.page import PAGES
from biodedup.jobs.shared.spreadsheet import escaped_formulas, unescaped
from biodedup.texts import KnownId, id_problem, json_text, shown
from tests.support.vectors import again, people

HOSTILE = (
    "3171[/x]",
    "[bold]x",
    "[link=file:///etc/passwd]x[/link]",
    "a\\[b",
    "{{ 7*7 }}",
    "<script>alert(1)</script>",
    "=1+1",
)
"""Ids that are allowed, and that a printer, a page or a spreadsheet could obey."""
STEERING = (
    "\x1b[2J",
    "\x9b2J",
    "\u202e",
    "\u2066",
    "\u200b",
    "\ufeff",
    "\u00ad",
    "\u3164",
    "\x00",
    "\x7f",
    "\r",
    "\udce9",
    "\u2028",
)


@pytest.fixture
def shell(monkeypatch, capsys):
    """Runs the command line in this process: (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["biodedup", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return run


def test_hidden_characters_are_shown_as_escapes_and_everything_else_stays():
    for text in (*HOSTILE, "Siti Nurhaliza", "José", "李", "می‌خواهم", "a\u00a0b"):
        assert shown(text) == text
    assert shown("a\x1b[31mb") == "a\\x1b[31mb"
    assert shown("\x9b2J\u202e\u200b\r\n\udce9") == "\\x9b2J\\u202e\\u200b\\r\\n\\xe9"
    assert shown("a\n\tb", keep="\n\t") == "a\n\tb"
    for text in STEERING:
        assert shown(text).isprintable()
        assert id_problem(f"a{text}b"), text


@pytest.mark.parametrize("text", STEERING)
def test_json_is_valid_and_harmless_whatever_is_in_it(text):
    document = {"id": f"a{text}b", text: ["José"]}
    told = json_text(document)
    assert json.loads(told) == document
    assert told.replace("\n", "").isprintable() and "José" in told


@pytest.mark.slow
@pytest.mark.parametrize("field", ["subject_id", "encounter_id", "groups", "by", "model_id"])
@pytest.mark.parametrize("text", [*STEERING[:9], " a", "a ", "e\u0301", "", "x" * 257])
def test_ids_with_invisible_characters_are_refused_with_the_reason(engine, field, text):
    value = f"a{text}b" if text in STEERING else text
    (face,) = people(1)
    with pytest.raises(bd.InvalidInput) as refused:
        if field == "by":
            bd.Verdict("e", "s", None, "same", value, 0.0)
        elif field == "model_id":
            engine.enroll(bd.Encounter("a", templates={"face": bd.Template("face", value, face)}))
        else:
            bd.Encounter(**({"subject_id": "a"} | {field: [value] if field == "groups" else value}))
    assert {"groups": "group"}.get(field, field) in str(refused.value)
    assert str(refused.value).isprintable()


def test_ids_are_never_changed_to_fit():
    for text in ("José", "3171[/x]", "a b", "=x", "O'Brien", "李小龍"):
        assert bd.Encounter(text, encounter_id=text, groups=[text]).subject_id == text


@pytest.mark.parametrize("prefix", ["merge:", "load:", "batch:", "stage:"])
def test_encounter_ids_that_the_library_makes_are_reserved(engine, prefix):
    (face,) = people(1)
    with pytest.raises(bd.InvalidInput, match=f"'{prefix}', which is reserved"):
        bd.Encounter("a", templates={"face": face}, encounter_id=f"{prefix}1:undone")
    with pytest.raises(bd.InvalidInput, match="reserved"):
        engine.add_templates(["a"], {"face": face[None]}, encounter_id=f"{prefix}1")
    assert bd.Encounter("a", encounter_id=f"x{prefix}1").encounter_id == f"x{prefix}1"
    assert bd.Encounter(f"{prefix}1").subject_id == f"{prefix}1"


def test_a_manifest_cannot_take_the_names_of_records_without_one(tmp_path):
    (tmp_path / "m.csv").write_text("subject_id,encounter_id,path\na,batch:0123,a.jpg\n")
    with bd.Engine.open(tmp_path / "g") as engine, jobs.Backlog.open(tmp_path / "g") as backlog:
        result = jobs.enroll_batch(engine, backlog, tmp_path / "m.csv", tmp_path / "o.parquet", workers=1)
    assert result.reasons == {"unusable_id": 1}


def test_every_text_of_a_caller_is_bounded():
    for make, what in (
        (lambda: bd.Missing("left_thumb", "x" * 1001), "1,000"),
        (lambda: bd.Missing("left_thumb", "\x1b[2J"), "U\\+001B"),
        (lambda: bd.Missing("left_thumb", "a\u202eb"), "U\\+202E"),
        (lambda: bd.Missing("left_thumb", None), "str"),
        (
            lambda: bd.Verdict(
                encounter_id="e", subject_id="s", candidate=None, ruling="same", by="A", at=0.0, note="x" * 4001
            ),
            "4,000",
        ),
        (
            lambda: bd.Verdict(
                encounter_id="e", subject_id="s", candidate=None, ruling="same", by="A", at=0.0, note="a\x1bb"
            ),
            "U\\+001B",
        ),
        (lambda: bd.Encounter("a", groups=[str(i) for i in range(101)]), "at most 100"),
        (lambda: bd.Encounter("a", [bd.Face(b"")] * 101), "at most 100"),
        (lambda: bd.FingerConfig(record_model_id="x" * 257), "record_model_id"),
    ):
        with pytest.raises(bd.InvalidInput, match=what):
            make()
    assert bd.Missing("left_thumb", "ditahan,\nدستش می‌لرزد").reason


def test_a_gallery_that_holds_what_would_be_refused_now_still_works(tmp_path):
    old, nfd = KnownId(" anna "), KnownId("e\u0301va")
    faces = people(3)
    config = bd.Config(policy=bd.Policy(duplicate_db=250, review_db=10))
    with bd.Engine.open(tmp_path / "g", config) as engine:
        engine.add_templates([old, nfd], {"face": faces[:2]}, groups=[[KnownId("e\u0301")], []])
        missing = bd.Missing("left_thumb", KnownId("\x1b" * 2000))
        new = again(faces[:1], 0.5)[0]
        encounter = bd.Encounter(KnownId("b\u0301"), [missing], {"face": new}, KnownId("load:1"), [KnownId("g ")])
        assert engine.enroll(encounter).outcome == "review"
    with bd.Engine.open(tmp_path / "g", config) as engine:
        assert engine.subject_ids() == [" anna ", "e\u0301va"]
        assert engine.templates("e\u0301va")["face"] is not None
        assert engine.verify(bd.Encounter(templates={"face": faces[0]}), " anna ").accepted
        found = engine.identify(bd.Encounter(templates={"face": faces[0]}), groups=["e\u0301"])
        assert found.best.subject_id == " anna "
        assert engine.decision("load:1").missing[0].reason == "\x1b" * 2000
        (case,) = engine.cases()
        assert engine.adjudicate(case.encounter_id, "different", "A").outcome == "unique"
        engine.remove(" anna ")
        assert engine.subject_ids() == ["e\u0301va", "b\u0301"]


def test_who_is_asked_for_by_an_undecodable_name_is_not_enrolled(engine):
    with pytest.raises(bd.UnknownSubject):
        engine.remove("Jos\udce9")
    with pytest.raises(bd.UnknownSubject):
        engine.templates("Jos\udce9")
    assert "Jos\udce9" not in engine
    assert engine.decision("\udce9") is None
    assert engine.are_enrolled(["\udce9"]).tolist() == [False]
    with pytest.raises(bd.InvalidInput):
        engine.case("\udce9")


# the command line ---------------------------------------------------------------------------------------------------


@pytest.fixture
def register(tmp_path: Path) -> Path:
    """A gallery whose ids and notes a printer could obey, with a case."""
    faces = people(len(HOSTILE) + 1)
    config = bd.Config(policy=bd.Policy(duplicate_db=250, review_db=10))
    with bd.Engine.open(tmp_path / "[/g]", config) as engine:
        engine.add_templates(list(HOSTILE), {"face": faces[:-1]}, groups=[[name] for name in HOSTILE])
        for name, face in zip(HOSTILE, again(faces[:-1], 0.5), strict=True):
            refused = bd.Missing("left_thumb", "[/x] <b>")
            engine.enroll(bd.Encounter(f"{name} 2", [refused], {"face": face}, f"e {name}"))
    return tmp_path / "[/g]"


@pytest.mark.slow
def test_ids_with_markup_are_printed_and_not_obeyed(shell, register, tmp_path):
    code, out, _ = shell("cases", "list", "-g", register, "--report", tmp_path / "cases.html")
    assert code == 0 and "3171[/x]" in out and "[bold]x" in out
    code, out, _ = shell("cases", "show", "e 3171[/x]", "-g", register, "--report", tmp_path / "case.html")
    assert code == 0 and "case e 3171[/x], subject 3171[/x] 2" in out
    for page in ("cases.html", "case.html"):
        text = (tmp_path / page).read_text()
        assert "<script>alert" not in text and "3171[/x]" in text
    code, out, _ = shell(
        "cases",
        "decide",
        "e 3171[/x]",
        "same",
        "--by",
        "[red]A",
        "--note",
        "x[/y]\nunique",
        "-g",
        register,
        "--candidate",
        "3171[/x]",
    )
    assert code == 0 and "3171[/x] 2 is a duplicate of 3171[/x]" in out
    code, out, _ = shell("cases", "show", "e 3171[/x]", "-g", register)
    assert "by [red]A." in out and "x[/y]" in out and "\nunique" not in out
    assert "<script>alert(1)</script>" in shell("info", "-g", register)[1].replace("\n", "")
    assert shell("remove", "[bold]x", "-g", register)[0] == 0
    code, _, error = shell("remove", "[/nobody]", "-g", register)
    assert (code, "[/nobody]" in error) == (2, True)
    code, _, error = shell("cases", "show", "e\x1b[2J", "-g", register)
    assert code == 2 and "\x1b" not in error
    code, _, error = shell("remove", "Jos\udce9", "-g", register)
    assert code == 2 and "Jos" in error


@pytest.mark.slow
def test_a_decision_about_an_id_with_markup_has_its_exit_code(shell, tmp_path, portrait):
    import cv2

    cv2.imwrite(str(tmp_path / "[bold].jpg"), portrait[..., ::-1])
    where = ("--face", tmp_path / "[bold].jpg", "-g", tmp_path / "g")
    assert shell("enroll", "3171[/x]", *where)[0] == 0
    code, out, _ = shell("enroll", "b", *where)
    assert code == 10 and "strongest 3171[/x] at" in out
    code, out, _ = shell("enroll", "c", *where, "--missing", "left_thumb=\x1b[2J")
    assert code == 2


def test_error_texts_and_logs_show_what_steers_a_terminal():
    assert str(bd.InvalidInput("a\x1b[2Jb\nc\u202e")) == "a\\x1b[2Jb\\nc\\u202e"
    assert str(bd.InvalidInput("José")) == "José"


# files --------------------------------------------------------------------------------------------------------------

CELLS = [
    "=cmd|' /C calc'!A0",
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "\uff1d1",
    "'=1",
    "''=1",
    "'plain",
    "a=b",
    "",
    "José",
]


def test_csv_cells_are_no_formulas_and_are_read_back_as_they_were(tmp_path):
    table = pa.table({"=name": CELLS, "number": [-1.5] * len(CELLS)})
    write_table(table, tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["'=name", "number"]
    assert all(not row[0].startswith(tuple("=+-@\t\r\n\uff1d")) and row[1] == "-1.5" for row in rows)
    assert [unescaped(row[0]) for row in rows] == CELLS
    assert escaped_formulas(pa.table({"a": pa.array(["=x"]).dictionary_encode()}))["a"].to_pylist() == ["'=x"]
    write_table(table, tmp_path / "t.parquet")
    assert pa.parquet.read_table(tmp_path / "t.parquet")["=name"].to_pylist() == CELLS


def test_ids_that_look_like_formulas_survive_the_way_through_csv(tmp_path):
    ids = ["=1+1", "-5", "@a", "'=1", "+62 812"]
    write_table(pa.table({"subject_id": ids, "path": ["a.jpg"] * 5}), tmp_path / "t.csv")
    assert [cells["subject_id"] for _, cells in TableFile(tmp_path / "t.csv").rows()] == ids
    write_table(pa.table({"subject_id": ids}), tmp_path / "r.csv")
    assert read_roll(tmp_path / "r.csv").texts("subject_id") == ids


def test_the_outcomes_of_a_batch_are_no_formulas_in_csv(tmp_path):
    metadata = pa.schema([("=head", pa.string())])
    with outcome_table(tmp_path / "o.csv", metadata, LabelConfig()) as writer:
        writer.add(Record(1, "=1+1", metadata={"=head": "@x"}), "-e", Outcome("refused", detail="+d"))
    text = (tmp_path / "o.csv").read_text()
    assert '"\'=1+1"' in text and '"\'@x"' in text and '"\'-e"' in text and '"\'=head"' in text and '"\'+d"' in text


def test_pages_show_hidden_characters_and_quote_attributes():
    hostile = '"><script>alert(1)</script>\u202e\x1b\udce9'
    page = PAGES.from_string("<p title=\"{{ x }}\">{{ x|replace('_', ' ') }}{{ [x]|join(', ') }}</p>").render(x=hostile)
    assert "<script>" not in page and "\u202e" not in page and "\x1b" not in page
    assert page.count("&#34;&gt;&lt;script&gt;") == 3 and page.count("\\u202e\\x1b\\xe9") == 3


def test_json_files_hold_file_names_that_are_no_utf_8(tmp_path):
    write_json({"a": "\x9b\udce9"}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": "\x9b\udce9"}


def test_numbers_of_an_array_stay_numbers_in_csv(tmp_path):
    write_table(pa.table({"x": np.array([-1, 2])}), tmp_path / "n.csv")
    assert pa.csv.read_csv(tmp_path / "n.csv")["x"].to_pylist() == [-1, 2]


def test_what_was_declined_elsewhere_is_bounded_and_steers_no_terminal(engine):
    for told in (
        ("nose", "blurred", ""),
        ("face", "x" * 1001, ""),
        ("face", "why\x07", ""),
        ("face", "blurred", "\x1b[2J"),
    ):
        with pytest.raises(bd.InvalidInput):
            bd.Encounter("anna", declined=[bd.Refusal(*told)])
    with pytest.raises(bd.InvalidInput, match="at most 100"):
        bd.Encounter("anna", declined=[bd.Refusal("face", "blurred")] * 101)
    decision = engine.identify(bd.Encounter(declined=[bd.Refusal("face", "blurred", "a finger on the lens")]))
    assert [refusal.reason for refusal in decision.refusals] == ["blurred"]


def test_what_a_kit_says_of_a_capture_is_shown_and_does_not_end_an_ingest():
    from biodedup.jobs.kits.format import record as kit_record

    told = bd.Refusal("nose\x1b[2J", "why\x07", "\u202e" * 400)
    encounter = bd.Encounter("anna", templates={"left_index": people(1)[0]}, encounter_id="e1", model_id="mine-1")
    record = kit_record.decode(kit_record.encode(kit_record.Record(encounter, 1, 0.0, 0.0, (told,) * 120)), 1)
    (one, *_) = record.refusals
    assert (one.column, one.reason, one.detail[:6], len(one.detail)) == ("unknown", "why\\x07", "\\u202e", 500)
    bd.Encounter(declined=record.refusals[:100])


@pytest.mark.parametrize("out", ["no/r.parquet", "no/deeper/r.parquet"])
def test_a_folder_that_cannot_be_made_is_reported_like_any_other_that_cannot_be_written(tmp_path, monkeypatch, out):
    made = Path.mkdir

    def refused(path, *arguments, **more):
        if path == tmp_path / "no":
            raise PermissionError(errno.EACCES, "Permission denied")
        made(path, *arguments, **more)

    monkeypatch.setattr(Path, "mkdir", refused)
    (tmp_path / "m.csv").write_text("subject_id,path\na,a.png\nb,b.png\n")
    with pytest.raises(bd.StorageUnavailable, match="permission denied; give this process access to the folder"):
        jobs.dedup(tmp_path / "m.csv", tmp_path / out)
    with pytest.raises(bd.StorageUnavailable, match="permission denied; give this process access to the folder"):
        jobs.evaluate(tmp_path / "m.csv", (tmp_path / out).with_suffix(".json"))


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "free the disk"), (errno.EDQUOT, "free the disk"), (errno.ENOENT, "check the path"),
     (errno.EROFS, "name a folder that can be"), (errno.EIO, "check the disk")],
)  # fmt: skip
def test_only_a_full_disk_is_to_be_freed(number, remedy):
    with pytest.raises(bd.StorageUnavailable, match=remedy), translated("writing r.csv"):
        raise OSError(number, os.strerror(number))
