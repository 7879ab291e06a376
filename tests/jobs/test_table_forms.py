"""Tables as offices write them: encodings, separators, other names of columns, other forms of dates; checked before anything is touched."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.engine.arrow.ids import ids_of
from biodedup.jobs import TableOptions
from biodedup.jobs.evaluation.labelled import read_labelled
from biodedup.jobs.kits.manifest import read_manifest
from biodedup.jobs.manifests.captures import read_rows
from biodedup.jobs.manifests.encounters import Manifest
from biodedup.jobs.manifests.fields import Unusable, id_of, located, moment_of, position_of
from biodedup.jobs.manifests.roll import read_roll
from biodedup.jobs.manifests.tables import TableFile
from biodedup.jobs.manifests.text_form import GUESSED_LINES_MIN, text_form
from tests.support.shell import run_here as run
from tests.support.vectors import SFACE, people

NAMES = ("José", "Müller", "Zoë", "François", "Ñañez", "Åse", "Núñez", "Gonçalves")


def lines(*rows: tuple[str, ...], separator: str = ",") -> str:
    return "".join(separator.join(row) + "\r\n" for row in rows)


def manifest(path: Path, encoding: str, separator: str = ",", names=NAMES) -> Path:
    rows = [("subject_id", "path"), *((name, f"{name}.jpg") for name in names)]
    path.write_bytes(lines(*rows, separator=separator).encode(encoding))
    return path


def read_by_every_job(path: Path, options: TableOptions = TableOptions()) -> list[list[str]]:  # noqa: B008
    """The ids of a manifest as each reader has them."""
    return [
        [row.subject_id for row in read_rows(path, options)[0]],
        [one.subject_id for one in read_labelled(path, bd.Config(), options=options)[0]],
        [record.subject_id for record in Manifest(path, options).records()],
        read_roll(path, options).texts("subject_id"),
    ]


# encodings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252", "latin-1"])
def test_every_job_finds_the_encoding_of_a_table(tmp_path, encoding):
    path = manifest(tmp_path / "m.csv", encoding)
    for ids in read_by_every_job(path):
        assert ids == list(NAMES)


@pytest.mark.parametrize("declared", ["utf-16", "UTF16", "utf_32"])
@pytest.mark.parametrize("order", ["", "-le", "-be"])
def test_a_declared_encoding_of_wide_characters_needs_no_mark(tmp_path, declared, order):
    wide = "utf-32" if "32" in declared else "utf-16"
    path = manifest(tmp_path / "m.csv", wide + order)
    for ids in read_by_every_job(path, TableOptions(encoding=declared)):
        assert ids == list(NAMES)


def test_utf_32_is_known_by_its_mark(tmp_path):
    path = manifest(tmp_path / "m.csv", "utf-32")
    assert [row.subject_id for row in read_rows(path)[0]] == list(NAMES)


def test_a_table_that_is_not_of_the_declared_encoding_is_refused_in_words(tmp_path):
    path = manifest(tmp_path / "m.csv", "utf-8")
    with pytest.raises(bd.InvalidInput, match="is not UTF-16"):
        read_rows(path, TableOptions(encoding="utf-16"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "cp1252", "cp1250", "mac_roman"])
def test_a_declared_encoding_is_taken_at_its_word(tmp_path, encoding):
    names = ("José", "Müller")
    path = manifest(tmp_path / "m.csv", encoding, names=names)
    for ids in read_by_every_job(path, TableOptions(encoding=encoding)):
        assert ids == list(names)


def test_a_few_letters_are_no_evidence_of_an_encoding_and_cost_their_rows(tmp_path):
    few = NAMES[: GUESSED_LINES_MIN - 1]
    path = manifest(tmp_path / "m.csv", "cp1252", names=("one", *few, "two"))
    rows, left_out = read_rows(path)
    assert [row.subject_id for row in rows] == ["one", "two"]
    assert [row.number for row in left_out.rows] == [2, 3, 4, 5]
    assert all("--encoding" in row.sentence for row in left_out.rows)


def test_damaged_cells_of_a_utf_8_table_never_make_it_another_encoding(tmp_path):
    bad = b"".join(b"J%d\xe9,a.jpg\r\n" % i for i in range(20))
    (tmp_path / "m.csv").write_bytes("subject_id,path\r\nZoë,z.jpg\r\n".encode() + bad)
    rows, left_out = read_rows(tmp_path / "m.csv")
    assert [row.subject_id for row in rows] == ["Zoë"] and len(left_out.rows) == 20


@pytest.mark.parametrize("encoding", ["cp1250", "cp1251", "cp1254", "shift_jis", "gbk"])
def test_letters_of_another_code_page_are_not_taken_for_windows_1252(tmp_path, encoding):
    words = {
        "cp1250": "Šťastný Dvořák Žižka Křepelka Wałęsa Łukasz Čapek Ježek Świątek",
        "cp1251": "Иван Пётр Мария Ольга Юрий Дмитрий Сергей Наталья Татьяна",
        "cp1254": "Şahin Gülşen Ağaoğlu Çağlar Öztürk Şimşek İnce Doğan Güneş",
        "shift_jis": "佐藤 鈴木 高橋 田中 伊藤 渡辺 山本 中村 小林",
        "gbk": "王伟 李娜 张敏 刘洋 陈静 杨磊 赵强 黄丽 周杰",
    }[encoding].split()
    assert not text_form(manifest(tmp_path / "m.csv", encoding, names=words)).guessed


def test_a_long_table_in_another_encoding_is_read_whole(tmp_path):
    names = [f"{NAMES[i % 8]} {i}" for i in range(30_000)]
    for encoding in ("utf-16", "cp1252"):
        rows = TableFile(manifest(tmp_path / "m.csv", encoding, names=names)).rows()
        assert [(number, cells["subject_id"]) for number, cells in rows] == list(enumerate(names, start=1))


def test_an_encoding_that_is_none_is_refused():
    for encoding in ("utf-9", "base64", ""):
        with pytest.raises(bd.InvalidInput, match="is not known; wanted a name such as"):
            TableOptions(encoding=encoding)


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
def test_ids_of_vectors_are_read_in_any_encoding(tmp_path, encoding):
    np.save(tmp_path / "v.npy", people(len(NAMES)))
    (tmp_path / "ids.txt").write_bytes("".join(f"{name}\r\n" for name in NAMES).encode(encoding))
    with bd.Engine.open(tmp_path / "g") as engine:
        jobs.load(engine, tmp_path / "v.npy", ids=tmp_path / "ids.txt", model_id=SFACE)
        assert sorted(engine.subject_ids()) == sorted(NAMES)


# separators ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_the_separator_is_found(tmp_path, separator, encoding):
    for ids in read_by_every_job(manifest(tmp_path / "m.csv", encoding, separator)):
        assert ids == list(NAMES)


def test_separators_within_a_quoted_name_do_not_count(tmp_path):
    (tmp_path / "m.csv").write_text('subject_id;path;"born, where, when"\n1;a.jpg;"Bogor, 1990"\n2;b.jpg;\n')
    assert TableFile(tmp_path / "m.csv").names == ["subject_id", "path", "born, where, when"]


def test_the_line_in_which_excel_names_the_separator_is_no_header(tmp_path):
    (tmp_path / "m.csv").write_text("sep=;\nsubject_id;path\n001;a,b.jpg\n002;c.jpg;\n003;d.jpg\n")
    rows, left_out = read_rows(tmp_path / "m.csv")
    assert [(row.number, row.subject_id) for row in rows] == [(1, "001"), (3, "003")]
    assert [row.number for row in left_out.rows] == [2]
    roll = read_roll(tmp_path / "m.csv")
    assert (roll.texts("subject_id"), roll.lines.tolist()) == (["001", "003"], [3, 5])


def test_empty_lines_before_the_header_and_line_ends_in_its_names_are_no_trouble(tmp_path):
    (tmp_path / "m.csv").write_text('\n\n"subject_id";path\n1;a.jpg\n2;b.jpg;\n3;c.jpg\n')
    rows, left_out = read_rows(tmp_path / "m.csv")
    assert [row.number for row in rows] == [1, 3] and [row.number for row in left_out.rows] == [2]
    (tmp_path / "n.csv").write_text('subject_id,"path\nof the file"\n1,a.jpg\n')
    table = TableFile(tmp_path / "n.csv", TableOptions(columns={"path": "path\nof the file"}))
    assert [cells for _, cells in table.rows()] == [{"subject_id": "1", "path": "a.jpg"}]


@pytest.mark.parametrize("title", ["Daftar pemilih Kecamatan X", "List of voters;;;", "Provinsi Y\nKota Z 2026;;"])
def test_titles_of_a_sheet_before_its_header_are_left_out_and_told(tmp_path, title):
    (tmp_path / "m.csv").write_text(f"{title}\n\nsubject_id;path;name\n001;a.jpg;A B\n;;\n002;b.jpg;\n")
    table = TableFile(tmp_path / "m.csv")
    assert table.names == ["subject_id", "path", "name"]
    assert [(number, row["subject_id"]) for number, row in table.rows()] == [(1, "001"), (3, "002")]
    assert "skipped as titles" in jobs.check_encounters(tmp_path / "m.csv").form


def test_a_header_of_one_column_is_no_title(tmp_path):
    (tmp_path / "m.csv").write_text("Nomor KTP\n001\n002\n")
    assert TableFile(tmp_path / "m.csv").names == ["Nomor KTP"]


# positions, ids and dates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        *(("RI", "right_index"), ("ri", "right_index"), ("LT", "left_thumb"), ("RL", "right_little"), ("L. Ring", "left_ring")),
        *(("R index", "right_index"), ("left-middle finger", "left_middle"), ("LM", "left_middle"), ("RR", "right_ring")),
        *(("Telunjuk Kanan", "right_index"), ("ibu jari kiri", "left_thumb"), ("jempol kanan", "right_thumb"), ("wajah", "face")),
        *(("jari manis tangan kiri", "left_ring"), ("kelingking kanan", "right_little"), ("Jari tengah kanan", "right_middle")),
    ],
)  # fmt: skip
def test_positions_are_known_by_their_abbreviations_and_in_indonesian(written, meant):
    assert position_of(written) == meant


@pytest.mark.parametrize("written", ["R", "I", "IR", "XI", "kanan", "jari", "ibu", "RIM"])
def test_an_abbreviation_that_names_no_finger_is_not_guessed(written):
    with pytest.raises(Unusable):
        position_of(written)


@pytest.mark.parametrize("cell", ["3.17E+15", "3.17e+15", "3,17E+15", "1E+05"])
def test_an_id_that_a_spreadsheet_rounded_is_refused_by_name(tmp_path, cell):
    with pytest.raises(Unusable) as refused:
        id_of({"subject_id": cell}, "subject_id")
    assert "was rounded by a spreadsheet" in refused.value.refusal.detail
    (tmp_path / "m.csv").write_text(f"subject_id;path\n{cell};a.jpg\n1;b.jpg\n2;c.jpg\n")
    for ids in read_by_every_job(tmp_path / "m.csv"):
        assert ids[-2:] == ["1", "2"] and cell not in ids


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        ("3171234567890123.0", "has decimals"),
        ("317123456789,00", "has decimals"),
        ("#N/A", "error of a spreadsheet"),
        ("#####", "error of a"),
    ],
)
def test_an_id_that_a_program_wrote_over_is_refused_by_name(tmp_path, cell, why):
    with pytest.raises(Unusable) as refused:
        id_of({"subject_id": cell}, "subject_id")
    assert why in refused.value.refusal.detail
    assert why in ids_of(pa.array(["1.5.0", cell, "N/A", "#12"]), "subject_id")[1][1]
    (tmp_path / "m.csv").write_text(f"subject_id;path\n{cell};a.jpg\n1;b.jpg\n2;c.jpg\n")
    for ids in read_by_every_job(tmp_path / "m.csv"):
        assert ids[-2:] == ["1", "2"] and cell not in ids


@pytest.mark.parametrize(
    "written", ["faces\\José.jpg", "faces/Jose\u0301.jpg", ".\\faces\\Jose\u0301.jpg", "faces/José.jpg"]
)
def test_a_path_is_found_as_another_system_writes_it(tmp_path, written):
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces" / "José.jpg").write_bytes(b"here")
    assert located(tmp_path, written).read_bytes() == b"here"
    (tmp_path / "m.csv").write_text(f"subject_id,path\na,{written}\n", "utf-8")
    assert jobs.check_encounters(tmp_path / "m.csv").refused == ()
    (row,) = read_rows(tmp_path / "m.csv")[0]
    assert row.capture.data.exists()


def test_a_file_that_exists_is_never_taken_for_another_one(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"2")
    (tmp_path / "a\\b").write_bytes(b"1")
    assert located(tmp_path, "a\\b").read_bytes() == b"1"
    assert located(tmp_path, "gone\\b") == tmp_path / "gone\\b"


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("m.csv", b"PK\x03\x04 and more", "workbook"),
        ("m.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "workbook"),
        ("m.xls", b"<html><table><tr><td>subject_id</td>", "HTML"),
        ("m.csv", b"\xef\xbb\xbf  <!DOCTYPE html>", "HTML"),
    ],
)
def test_a_workbook_or_a_page_is_named_and_what_to_do(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(bd.InvalidInput, match=what) as refused:
        jobs.check_encounters(tmp_path / name)
    assert "save" in str(refused.value) and "CSV UTF-8" in str(refused.value)


@pytest.mark.parametrize("cell", ["45291", "45291.43", 45291])
def test_a_day_number_of_a_spreadsheet_is_no_time(cell):
    assert moment_of(cell) is None and moment_of("1735689600") == 1735689600


@pytest.mark.parametrize(("encoding", "separator"), [("utf-8", ","), ("utf-16", ";"), ("utf-8-sig", "\t")])
def test_a_calibration_reads_the_same_tables_and_refuses_rounded_ids(tmp_path, encoding, separator):
    from biodedup.jobs.evaluation.calibrate import read_pairs

    header = ("similarity", "mated", "subject_a", "subject_b")
    rows = [("0.1", "false", "José", "001"), ("0.2", "false", "1", "01"), ("0.9", "true", "José", "José")]
    (tmp_path / "p.csv").write_bytes(lines(header, *rows, separator=separator).encode(encoding))
    pairs = read_pairs(tmp_path / "p.csv", ("similarity",))
    assert pairs.mated.tolist() == [False, False, True] and len({*pairs.a.tolist(), *pairs.b.tolist()}) == 4
    (tmp_path / "p.csv").write_bytes(
        lines(header, *rows, ("0.1", "false", "1", "3.17E+15"), separator=separator).encode(encoding)
    )
    with pytest.raises(bd.InvalidInput, match="in row 4 and 0 more, subject_b was rounded by a spreadsheet"):
        read_pairs(tmp_path / "p.csv", ("similarity",))


def test_dates_are_read_in_the_declared_form_and_others_cost_their_row(tmp_path):
    at = datetime(2026, 3, 4, tzinfo=UTC).timestamp()
    assert moment_of("04/03/2026", "%d/%m/%Y") == at
    (tmp_path / "m.csv").write_text(
        "subject_id,encounter_id,path,captured_at\na,e1,a.jpg,04/03/2026\nb,e2,b.jpg,03/14/2026\nc,e3,c.jpg,\n"
    )
    records = list(Manifest(tmp_path / "m.csv", TableOptions(date_format="%d/%m/%Y")).records())
    assert [record.captured_at for record in records] == [at, None, None]
    assert [record.problem and record.problem.reason for record in records] == [None, "wrong_type", None]
    assert "wanted the format %d/%m/%Y" in records[1].problem.detail
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(b"x")
    planned, broken = read_manifest(tmp_path / "m.csv", bytes_max=100, options=TableOptions(date_format="%d/%m/%Y"))
    assert [one.captured_at for one in planned] == [at, None] and [one.rows for one in broken] == [(2,)]


@pytest.mark.parametrize("form", ["%H:%M", "dd/mm/yyyy", "%Y-%m", "%Q", ""])
def test_a_form_that_states_no_day_is_refused(form):
    with pytest.raises(bd.InvalidInput, match="does not state year, month and day"):
        TableOptions(date_format=form)


# columns ------------------------------------------------------------------------------------------------------------


def test_columns_are_known_by_the_names_that_the_caller_maps(tmp_path):
    (tmp_path / "m.csv").write_text("NIK;Foto;Jari\n0012;a.jpg;RI\n012;b.jpg;Right Index\n")
    options = TableOptions(columns={"subject_id": "nik", "path": "Foto", "position": "Jari"})
    for ids in read_by_every_job(tmp_path / "m.csv", options):
        assert ids == ["0012", "012"]
    (first, second), _ = read_rows(tmp_path / "m.csv", options)
    assert (first.capture.position, second.capture.position) == ("right_index", "right_index")
    pq.write_table(pa.table({"NIK": ["a", "b"], "vektor": list(people(2))}), tmp_path / "v.parquet")
    with bd.Engine.open(tmp_path / "g") as engine:
        mapped = TableOptions(columns={"subject_id": "NIK", "face": "vektor"})
        assert jobs.load(engine, tmp_path / "v.parquet", model_id=SFACE, options=mapped).added == 2


def test_a_mapping_that_does_not_fit_is_refused(tmp_path):
    path = manifest(tmp_path / "m.csv", "utf-8")
    with pytest.raises(bd.InvalidInput, match="has no column 'NIK' for subject_id; it has"):
        read_rows(path, TableOptions(columns={"subject_id": "NIK"}))
    with pytest.raises(bd.InvalidInput, match="repeats a column name"):
        TableFile(path, TableOptions(columns={"subject_id": "path"}))
    with pytest.raises(bd.InvalidInput, match="column 'subject' is not known"):
        TableOptions(columns={"subject": "NIK"})
    with pytest.raises(bd.InvalidInput, match="twice"):
        TableOptions(columns={"subject_id": "NIK", "encounter_id": "NIK"})


def test_a_column_that_a_job_would_leave_out_is_an_error_unless_it_is_to_be_ignored(tmp_path):
    (tmp_path / "m.csv").write_text("subject_id,path,village\n1,a.jpg,Bogor\n2,b.jpg,Depok\n")
    with pytest.raises(bd.InvalidInput, match=r"unknown columns: 'village'.*--ignore-columns"):
        jobs.dedup(tmp_path / "m.csv", tmp_path / "out" / "o.csv")
    assert not (tmp_path / "out").exists()
    with pytest.raises(bd.InvalidInput, match="'village'"):
        read_manifest(tmp_path / "m.csv", bytes_max=100)
    ignoring = TableOptions(ignore_columns=True)
    assert len(read_rows(tmp_path / "m.csv", ignoring)[0]) == 2
    pq.write_table(
        pa.table({"subject_id": ["a"], "face": list(people(1)), "rihgt_index": [b""]}), tmp_path / "v.parquet"
    )
    with bd.Engine.open(tmp_path / "g") as engine:
        with pytest.raises(bd.InvalidInput, match=r"'rihgt_index'.*did you mean right_index"):
            jobs.load(engine, tmp_path / "v.parquet", model_id=SFACE)
        assert jobs.load(engine, tmp_path / "v.parquet", model_id=SFACE, options=ignoring).added == 1


def test_jobs_that_carry_columns_along_refuse_those_that_look_misspelt(tmp_path):
    (tmp_path / "m.csv").write_text("subject_id,path,postion,village\n1,a.jpg,right_index,Bogor\n2,b.jpg,face,Depok\n")
    for read in (Manifest, read_roll, lambda path: read_labelled(path, bd.Config())):
        with pytest.raises(bd.InvalidInput, match="unknown column 'postion'; did you mean position"):
            read(tmp_path / "m.csv")
    ignoring = TableOptions(ignore_columns=True)
    assert next(iter(Manifest(tmp_path / "m.csv", ignoring).records())).metadata == {"postion": "right_index", "village": "Bogor"}  # fmt: skip
    mapped = TableOptions(columns={"position": "postion"})
    assert read_roll(tmp_path / "m.csv", mapped).others == ("village",)


# checks -------------------------------------------------------------------------------------------------------------


def test_a_check_says_what_a_job_would_refuse_and_touches_nothing(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "m.csv").write_bytes(
        "NIK;Path;Position\n001;a.jpg;\n3.17E+15;b.jpg;\n003;gone.jpg;\n004;b.jpg;toe\n".encode("utf-16")
    )
    before = sorted(tmp_path.rglob("*"))
    options = TableOptions(columns={"subject_id": "NIK"})
    for check in (jobs.check_captures, jobs.check_encounters):
        checked = check(tmp_path / "m.csv", options)
        assert (checked.rows, [row.number for row in checked.refused]) == (4, [2, 3, 4])
        assert [row.refusal.reason for row in checked.refused] == ["unusable_id", "missing_file", "unknown_position"]
        assert "UTF-16, separated by semicolon" in checked.form
        assert checked.columns == {"subject_id": "NIK", "path": "Path", "position": "Position"}
        assert checked.sentences()[-1] == f"4 {checked.counted}, 1 can be used, 3 refused; nothing was changed"
        assert "row 1 is line 2 of the file, below the header" in checked.notes
    assert [row.number for row in jobs.check_roll(tmp_path / "m.csv", options).refused] == [3]
    assert len(jobs.check_kit_manifest(tmp_path / "m.csv", bd.Config(), options).refused) == 3
    assert sorted(tmp_path.rglob("*")) == before


def test_a_check_refuses_a_folder_in_place_of_a_picture(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "m.csv").write_text("subject_id,path\n1,photos\n")
    for check in (jobs.check_captures, jobs.check_encounters):
        (refused,) = check(tmp_path / "m.csv").refused
        assert refused.refusal.reason == "not_a_file"


def test_a_check_names_times_that_cannot_be_read(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "m.csv").write_text("subject_id,path,captured_at\n1,a.jpg,31/12/2026\n2,a.jpg,2026-12-31\n")
    (note,) = jobs.check_encounters(tmp_path / "m.csv").notes
    assert note.startswith("captured_at is not a time in 1 of 2 records, first in row 1; state the date format")
    declared = jobs.check_encounters(tmp_path / "m.csv", TableOptions(date_format="%d/%m/%Y"))
    assert not any("captured_at" in note for note in declared.notes) and [row.number for row in declared.refused] == [2]


@pytest.mark.models
def test_a_check_of_templates_finds_the_rows_that_load_refuses(tmp_path):
    faces = people(3)
    faces[1] = 0
    pq.write_table(pa.table({"subject_id": ["a", "b", "c"], "face": list(faces)}), tmp_path / "v.parquet")
    checked = jobs.check_load(bd.Config(), tmp_path / "v.parquet", model_id=SFACE)
    assert [(row.number, row.subject_id, row.refusal.detail) for row in checked.refused] == [(1, "b", "face is a vector of zeros")]  # fmt: skip
    with pytest.raises(bd.InvalidInput, match="have no model_id"):
        jobs.check_load(bd.Config(), tmp_path / "v.parquet")
    with bd.Engine.open(tmp_path / "g") as engine:
        assert jobs.load(engine, tmp_path / "v.parquet", model_id=SFACE).refused_rows == (1,)


def test_a_check_of_labelled_templates_names_rows_without_a_usable_subject(tmp_path):
    table = pa.table({"subject_id": ["a", "", "3.17E+15", "b"], "face": list(people(4)), "age": [1, 2, 3, 4]})
    pq.write_table(table, tmp_path / "t.parquet")
    checked = jobs.check_captures(tmp_path / "t.parquet", carried=True)
    assert (checked.rows, [row.number for row in checked.refused]) == (4, [2, 3])


# the command line ---------------------------------------------------------------------------------------------------


@pytest.mark.models
@pytest.mark.slow
def test_no_command_makes_a_gallery_for_a_table_that_is_not_accepted(tmp_path):
    (tmp_path / "m.csv").write_text("NIK,path\n1,a.jpg\n")
    pq.write_table(pa.table({"subject_id": ["a"], "face": list(people(1))}), tmp_path / "v.parquet")
    (tmp_path / "not.parquet").write_bytes(b"PAR1")
    (tmp_path / "good.csv").write_text("subject_id,path\n1,a.jpg\n")
    for command in (
        ("enroll-batch", "m.csv"),
        ("enroll-batch", "absent.csv"),
        ("enroll-batch", "not.parquet"),
        ("enroll-batch", "good.csv", "--out", "outcomes.txt"),
        ("enroll-batch", "m.csv", "--announce"),
        ("load", "v.parquet"),
        ("load", "absent.parquet"),
        ("load", "m.csv"),
        ("load", "v.parquet", "--model-id", "mindtct-1"),
    ):
        assert run(*command, "--gallery", "g", cwd=tmp_path)[0] == 2, command
        assert not (tmp_path / "g").exists(), command
    assert run("load", "v.parquet", "--model-id", SFACE, "--gallery", "g", cwd=tmp_path)[0] == 0
    assert (tmp_path / "g").is_dir()


@pytest.mark.slow
def test_check_on_the_command_line_ends_with_12_where_rows_are_refused_and_writes_nothing(tmp_path, portrait):
    from tests.support.images import jpeg

    (tmp_path / "a.jpg").write_bytes(jpeg(portrait))
    (tmp_path / "m.csv").write_text("NIK;path;umur\n1;a.jpg;7\n;a.jpg;8\n")
    (tmp_path / "good.csv").write_text("subject_id,path\n1,a.jpg\n")
    before = sorted(tmp_path.rglob("*"))
    options = ("--column", "subject_id=NIK", "--ignore-columns", "--json")
    for command in (
        ("dedup",),
        ("evaluate",),
        ("enroll-batch",),
        ("kit", "pack"),
        ("audit", "--column", "district=umur"),
    ):
        code, out, _ = run(*command, "m.csv", "--check", *options, cwd=tmp_path)
        document = json.loads(out)
        assert (code, document["rows"], document["rows_refused"]) == (12, 2, 1), command
        assert run(*command[:2] if command[0] == "kit" else command[:1], "good.csv", "--check", cwd=tmp_path)[0] == 0
    assert run("dedup", "m.csv", "--check", cwd=tmp_path)[0] == 2
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_jobs_end_with_12_where_rows_were_refused(tmp_path):
    with bd.Engine.open(tmp_path / "gallery") as engine:
        engine.add_templates(["s0", "s1", "s2"], {"face": people(3)}, model_id=SFACE)
    (tmp_path / "r.csv").write_text("subject_id\ns0\n3.17E+15\ns1\n")
    assert run("audit", "r.csv", cwd=tmp_path)[0] == 12
    (tmp_path / "r.csv").write_text("subject_id\ns0\ns1\n")
    assert run("audit", "r.csv", cwd=tmp_path)[0] == 0


@pytest.mark.slow
def test_several_subjects_are_removed_together_or_not_at_all(tmp_path):
    with bd.Engine.open(tmp_path / "gallery") as engine:
        engine.add_templates(["a", "b", "c"], {"face": people(3)}, model_id=SFACE)
        with pytest.raises(bd.UnknownSubject):
            engine.remove("a", "nobody")
        assert len(engine) == 3
    code, _, error = run("remove", "a", "nobody", "b", "none", cwd=tmp_path)
    assert code == 2 and "not enrolled: 'nobody', 'none'; nothing was removed" in error
    code, out, _ = run("remove", "a", "b", "a", cwd=tmp_path)
    assert (code, out) == (0, "removed 2, 1 remain\n")


@pytest.mark.slow
def test_a_guessed_encoding_is_reported(tmp_path):
    manifest(tmp_path / "m.csv", "cp1252")
    code, out, error = run("enroll-batch", "m.csv", "--check", cwd=tmp_path)
    assert code == 12  # the files are not there
    assert "is read as Windows-1252" in error and "Windows-1252 (guessed from its letters" in out
    assert (
        "Windows-1252, guessed from"
        not in run("enroll-batch", "m.csv", "--check", "--encoding", "cp1252", cwd=tmp_path)[2]
    )


@pytest.mark.parametrize("content", ["subject_id,path\n", "subject_id,path\n,\n\n,\n"], ids=["header", "blank rows"])
def test_every_job_says_that_a_table_has_no_rows(tmp_path, content):
    (tmp_path / "m.csv").write_text(content)
    pq.write_table(
        pa.table({"subject_id": pa.array([], pa.string()), "path": pa.array([], pa.string())}), tmp_path / "m.parquet"
    )
    pq.write_table(
        pa.table({"subject_id": pa.array([], pa.string()), "face": pa.array([], pa.list_(pa.float32()))}),
        tmp_path / "t.parquet",
    )
    for name in ("m.csv", "m.parquet"):
        for check in (jobs.check_captures, jobs.check_encounters, jobs.check_roll, jobs.accept_encounters):
            with pytest.raises(bd.InvalidInput, match="no rows below its header"):
                check(tmp_path / name)
    with pytest.raises(bd.InvalidInput, match="no rows below its header"):
        jobs.check_load(bd.Config(), tmp_path / "t.parquet", model_id="mine-1")
    code, _, err = run("enroll-batch", "m.csv", "--gallery", "g", cwd=tmp_path)
    assert code == 2 and "no rows" in err and not (tmp_path / "g").exists()


def test_every_job_names_a_folder_an_image_or_a_workbook_in_place_of_a_table(tmp_path):
    (tmp_path / "photos.csv").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    (tmp_path / "b.xlsx").write_bytes(b"PK\x03\x04 and more")
    for name, word in (("photos.csv", "folder"), ("photos", "folder"), ("a.jpg", "image"), ("b.xlsx", "workbook")):
        for check in (jobs.check_encounters, jobs.check_roll, jobs.check_load):
            given = (bd.Config(),) if check is jobs.check_load else ()
            with pytest.raises(bd.InvalidInput, match=word):
                check(*given, tmp_path / name)
    (tmp_path / "c.csv").write_text("subject_id,path\n1,a.jpg\n")
    with pytest.raises(bd.InvalidInput, match="enroll-batch"):
        jobs.check_load(bd.Config(), tmp_path / "c.csv")


def test_a_record_of_several_rows_names_the_row_that_cannot_be_used(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "m.csv").write_text("subject_id,path,position\n1,a.jpg,face\n1,a.jpg,toe\n")
    checked = jobs.check_encounters(tmp_path / "m.csv")
    (refused,) = checked.refused
    assert refused.number == 1 and refused.refusal.detail.startswith("row 2: position is 'toe'")
    assert checked.sentences()[-1] == "1 record, 0 can be used, 1 refused; nothing was changed"
