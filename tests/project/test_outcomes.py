"""One vocabulary of outcomes: in the code, in exit codes, in tables, in printed lines and on the page of the documentation."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.advice import advice
from biodedup.cli.bulk import _labelled
from biodedup.cli.exits import Exit
from biodedup.cli.printing import print_summary
from biodedup.jobs.kits.outcomes import IngestResult, Outcome, write_result
from biodedup.outcomes import MEANINGS, OLDER_WORDS, outcome_of
from tests.support import ROOT
from tests.support.shell import run_here as run
from tests.support.vectors import SFACE, people

PAGE = (ROOT / "docs" / "reference" / "outcomes.md").read_text("utf-8")
INDONESIAN = bd.LabelConfig(unique="TUNGGAL", duplicate="GANDA", review="DITINJAU", refused="DITOLAK")


def test_every_outcome_of_a_decision_has_a_meaning_and_an_exit_code():
    assert set(MEANINGS) == set(get_args(bd.values.Outcome))
    codes = {"unique": Exit.DONE, "duplicate": Exit.DUPLICATE, "review": Exit.REVIEW, "refused": Exit.REFUSED}
    assert {outcome: row.exit_code for outcome, row in MEANINGS.items()} == codes
    assert set(OLDER_WORDS.values()) <= set(MEANINGS) and not set(OLDER_WORDS) & set(MEANINGS)
    assert (outcome_of("adjudicate"), outcome_of("review"), outcome_of("searching")) == ("review", "review", None)


def test_the_page_is_the_table():
    for outcome, row in MEANINGS.items():
        line = next(line for line in PAGE.splitlines() if line.startswith(f"| `{outcome}`"))
        assert [cell.strip() for cell in line.split("|")[2:5]] == [row.meaning, str(row.exit_code), row.action]


def test_labels_replace_the_words_of_outcomes_and_of_their_older_names():
    assert INDONESIAN.of("adjudicate") == INDONESIAN.of("review") == "DITINJAU"
    assert INDONESIAN.of("searching") == "searching"
    assert bd.LabelConfig().of("enrolled") == "unique"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"unique": "duplicate"}, "wanted four different words"),
        ({"review": "two\nlines"}, "wanted one line"),
        ({"review": "x" * 41}, "label review"),
        ({"review": "\x1b[31m"}, "label review"),
        ({"refused": 3}, "refused"),
    ],
)
def test_labels_that_would_confuse_are_refused(words, text):
    with pytest.raises(bd.InvalidInput, match=text):
        bd.LabelConfig(**words)


@pytest.fixture
def batch(tmp_path):
    """A manifest with a double of an enrolled subject, a new subject, and a vector that cannot be used."""
    faces = people(3)
    with bd.Engine.open(tmp_path / "g", bd.Config()) as engine:
        engine.add_templates(["before"], {"face": faces[:1]}, model_id=SFACE)
    cells = pa.array([*faces[:2].tolist(), [0.0] * 128], pa.list_(pa.float32()))
    names = {"subject_id": ["a", "b", "c"], "encounter_id": ["ea", "eb", "ec"], "label": ["x", "y", "z"]}
    pq.write_table(pa.table(names | {"face": cells}), tmp_path / "m.parquet")
    return tmp_path / "m.parquet"


def test_a_table_has_the_fixed_word_and_the_registers_word(tmp_path, batch):
    config = bd.Config(labels=INDONESIAN)
    out, page = tmp_path / "o.csv", tmp_path / "o.html"
    with bd.Engine.open(tmp_path / "g", config) as engine, jobs.Backlog.open(tmp_path / "g") as backlog:
        result = jobs.enroll_batch(
            engine, backlog, batch, out, report=page, options=jobs.TableOptions(ignore_columns=True)
        )
    rows = pyarrow.csv.read_csv(out).to_pylist()
    assert {row["outcome"] for row in rows} <= set(MEANINGS)
    assert [row["label"] for row in rows] == [INDONESIAN.of(row["outcome"]) for row in rows]
    assert [outcome_of(row["status"]) for row in rows] == [row["outcome"] for row in rows]
    assert [row["manifest_label"] for row in rows] == ["x", "y", "z"], "the manifest's own column keeps its content"
    assert sum(result.outcomes.values()) == 3 and result.outcomes["refused"] == 1
    text = page.read_text("utf-8")
    assert "DITOLAK: " in text and "TUNGGAL: newly enrolled" in text and "adjudicate" not in text


def test_the_table_of_kits_has_the_registers_word_of_each_record(tmp_path):
    plain = Outcome(
        **dict.fromkeys(Outcome.__dataclass_fields__, "")
        | {
            "sequence": 1,
            "candidate": None,
            "score_db": None,
            "captured_at": None,
            "packed_at": 1.0,
            "received_at": 2.0,
        }
    )
    told = {
        ("enrolled", "unique"): "TUNGGAL",
        ("review", "review"): "DITINJAU",
        ("already_taken", "duplicate"): "GANDA",
        ("conflict", "unique"): "DITOLAK",
        ("subject_exists", ""): "DITOLAK",
    }
    outcomes = tuple(replace(plain, outcome=outcome, decision=decision) for outcome, decision in told)
    write_result(IngestResult((), outcomes, (), (), 2.0), tmp_path / "o.csv", None, INDONESIAN)
    rows = pyarrow.csv.read_csv(tmp_path / "o.csv").to_pylist()
    assert [row["label"] for row in rows] == list(told.values())


@pytest.mark.slow
def test_the_tables_of_a_merge_have_the_registers_words(tmp_path):
    faces = people(3)
    for name, rows in (("a", faces[:2]), ("b", faces[1:])):
        with bd.Engine.open(tmp_path / name) as engine:
            engine.add_templates([f"{name}{i}" for i in range(2)], {"face": rows}, model_id=SFACE)
    jobs.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m.parquet", config=bd.Config(labels=INDONESIAN))
    members, pairs = (pq.read_table(tmp_path / name).to_pylist() for name in ("m.parquet", "m.pairs.parquet"))
    words = {"apply": "GANDA", "adjudicate": "DITINJAU"}
    assert len(members) == 2 and [row["label"] for row in members] == [words[row["decision"]] for row in members]
    assert pairs and [row["label"] for row in pairs] == [INDONESIAN.of(row["strength"]) for row in pairs]


def test_a_summary_prints_counts_by_name_as_words(capsys):
    print_summary({"reasons": {"low_quality": 1_200, "no_ridges": 3}, "written": True, "other": {}, "at": None}, False)
    printed = capsys.readouterr().out
    assert "low quality: 1,200, no ridges: 3" in printed and "yes" in printed and "none" in printed
    assert "{" not in printed and "None" not in printed


def test_a_word_that_is_the_name_of_another_count_hides_no_count():
    counts = {"records": 9, "enrolled": 1, "duplicate": 2, "adjudicate": 3, "refused": 4}
    assert list(_labelled(counts, bd.LabelConfig(duplicate="records")).values()) == [9, 1, 2, 3, 4]
    assert list(_labelled(counts, INDONESIAN)) == ["records", "TUNGGAL", "GANDA", "DITINJAU", "DITOLAK"]


@pytest.mark.slow
def test_printed_lines_use_the_registers_words_and_json_does_not(tmp_path):
    face = bd.Template("face", SFACE, people(1)[0])
    with bd.Engine.open(tmp_path / "g", bd.Config()) as engine:
        engine.enroll(bd.Encounter("anna", encounter_id="e1", templates={"face": face}))
    (tmp_path / "biodedup.toml").write_text('[labels]\nunique = "TUNGGAL"\n', "utf-8")
    code, printed, _ = run("subject", "anna", "--gallery", "g", cwd=tmp_path)
    assert code == 0 and "TUNGGAL" in printed and "unique" not in printed
    assert "TUNGGAL" not in run("subject", "anna", "--gallery", "g", "--json", cwd=tmp_path)[1]


@pytest.mark.parametrize("reason", ["missing_file", "not_a_file", "empty_file", "unreadable", "not_an_image"])
def test_advice_about_a_file_names_no_detail_that_is_not_there(reason):
    told = advice(reason, "0 bytes", 0.0, 1.0)
    assert "see the detail" not in told and "manifest" not in told and told.count("0 bytes") == 1 and ": 0" not in told
