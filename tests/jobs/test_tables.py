"""Tables and folders as people send them: ids are text, one bad cell costs one row, nothing is left out without a word."""

from __future__ import annotations

import csv
import os
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.jobs import load as load_module
from biodedup.jobs.evaluation.labelled import read_labelled
from biodedup.jobs.evaluation.rates import bands_of
from biodedup.jobs.kits.manifest import read_manifest
from biodedup.jobs.manifests.captures import images_of, read_rows
from biodedup.jobs.manifests.encounters import Manifest
from biodedup.jobs.manifests.fields import (
    Unusable,
    column_name,
    dpi_of,
    groups_of,
    id_of,
    moment_of,
    path_of,
    position_of,
)
from biodedup.jobs.manifests.roll import read_roll
from biodedup.jobs.manifests.tables import TableFile
from tests.support.images import jpeg
from tests.support.vectors import people

IDS = (
    "0012",
    "012",
    "12",
    "31710123049900011111",
    "1e5",
    "007",
    "7",
    "100000",
    "NA",
    "NULL",
    "nan",
    "true",
    "TRUE",
    "1.0",
    "=1",
    "-",
    "2024-01-02",
)


def write(path: Path, *rows: bytes, header: bytes = b"subject_id,path,position,dpi") -> Path:
    path.write_bytes(b"\n".join((header, *rows)) + b"\n")
    return path


# cells --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        *((name, "right_index") for name in ("right_index", "Right Index", "right-index", "RIGHT_INDEX", "RightIndex", "Index Right")),
        *((name, "right_index") for name in ("2", "02", 2, 2.0, "2.0", "finger 2", "FGP 2", "Right IndexFinger", "index finger, right")),
        *(("left little", "left_little"), ("10", "left_little"), ("Left Pinky", "left_little"), ("1", "right_thumb")),
        *(("11", "right_thumb"), ("12", "left_thumb"), ("0", "unknown"), ("UNKNOWN", "unknown")),
        *(("", "face"), (None, "face"), ("Face", "face"), ("portrait", "face")),
    ],
)  # fmt: skip
def test_a_position_is_known_by_its_usual_names_and_codes(written, meant):
    assert position_of(written) == meant


@pytest.mark.parametrize(
    "written", ["13", "14", "-1", "1-0", "1,0", "righ_index", "index", "right", "2 3", "100", True, b"1", "٣"]
)
def test_what_is_no_position_is_not_guessed(written):
    with pytest.raises(Unusable) as refused:
        position_of(written)
    assert refused.value.refusal.reason in ("unknown_position", "wrong_type")


def test_resolutions_times_groups_and_paths_are_read_as_people_write_them():
    assert [dpi_of(cell) for cell in ("500", "500.0", "500 dpi", "500DPI", "500,0", "1000 ppi", 500, " ", None)] == [
        500, 500, 500, 500, 500, 1000, 500, None, None,
    ]  # fmt: skip
    for cell in ("50", "many", "nan", "inf", "5e2", "500 dpm", True, -500, float("nan")):
        with pytest.raises(Unusable, match="wrong_type"):
            dpi_of(cell)
    at = datetime(2026, 1, 2, 3, tzinfo=UTC).timestamp()
    assert [moment_of(c) for c in ("2026-01-02T03:00Z", "2026-01-02 10:00+07:00", str(at), at, "soon", "inf", 1e400)] == [
        at, at, at, at, None, None, None,
    ]  # fmt: skip
    assert groups_of([{"groups": "a; b|c", "group": "d"}, {"groups": ["e", "a"]}]) == ("a", "b", "c", "d", "e")
    with pytest.raises(Unusable):
        groups_of([{"groups": ";".join(map(str, range(101)))}])
    for path in ("a\0b", "x" * 5000, 7):
        with pytest.raises(Unusable):
            path_of(path)
    assert [column_name(n) for n in ("\ufeffSubject ID", "subject-id", "Right Index", "Age ", "DPI")] == [
        "subject_id", "subject_id", "right_index", "Age", "dpi",
    ]  # fmt: skip


@pytest.mark.parametrize("cell", [1.5, True, b"x", ["a"], "a\u202eb", "e\u0301", "x" * 300, "Jos\ufffd"])
def test_what_is_no_id_is_refused_and_never_made_into_one(cell):
    with pytest.raises(Unusable):
        id_of({"subject_id": cell}, "subject_id")


# tables -------------------------------------------------------------------------------------------------------------


def test_ids_are_text_in_every_job(tmp_path):
    with (tmp_path / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("subject_id", "path"), *((name, "a.jpg") for name in IDS)])
    assert [row.subject_id for row in read_rows(tmp_path / "m.csv")[0]] == list(IDS)
    result = jobs.dedup(tmp_path / "m.csv", tmp_path / "o.parquet")
    assert [unit.unit_id for unit in result.units] == list(IDS)
    found, _ = read_labelled(tmp_path / "m.csv", bd.Config())
    assert [one.subject_id for one in found] == list(IDS)
    with (tmp_path / "r.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("subject_id",), *((name,) for name in IDS)])
    assert read_roll(tmp_path / "r.csv").texts("subject_id") == list(IDS)
    pairs = {"similarity": [0.1] * 4, "mated": [False] * 4, "subject_a": ["01", "1", "1", "2"], "subject_b": ["3"] * 4}
    pa.csv.write_csv(pa.table(pairs), tmp_path / "p.csv")
    from biodedup.jobs.evaluation.calibrate import read_pairs

    assert len(set(read_pairs(tmp_path / "p.csv", ("similarity",)).a.tolist())) == 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables_are_read_with_and_without_a_byte_order_mark(tmp_path, encoding, delimiter):
    lines = (("Subject ID", "Path"), ("001", "José.jpg"), ("002", " b.jpg "))
    text = "\r\n".join(delimiter.join(line) for line in lines)
    (tmp_path / "m.csv").write_text(text, encoding=encoding, newline="")
    assert [cells for _, cells in TableFile(tmp_path / "m.csv").rows()] == [
        {"subject_id": "001", "path": "José.jpg"},
        {"subject_id": "002", "path": "b.jpg"},
    ]


def test_a_header_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "m.csv").write_bytes(b"subject_id,path,\xe9t\xe9\na,b,c\n")
    with pytest.raises(
        bd.InvalidInput, match=r"the header of .* is not UTF-8 text; name its encoding, such as --encoding cp1252"
    ):
        TableFile(tmp_path / "m.csv")
    (tmp_path / "m.csv").write_text("subject_id,Subject ID,path\na,b,c\n")
    with pytest.raises(bd.InvalidInput, match="repeats a column name"):
        TableFile(tmp_path / "m.csv")


def test_typed_tables_give_what_python_has_a_value_for(tmp_path):
    broken = pa.array([b"a", b"Jos\xe9"], pa.binary()).view(pa.string())
    times = pa.array([1, 2**62], pa.timestamp("ns"))
    pq.write_table(pa.table({"subject_id": broken, "captured_at": times, "n": [1, 2]}), tmp_path / "m.parquet")
    rows = [cells for _, cells in TableFile(tmp_path / "m.parquet").rows()]
    assert [row["subject_id"] for row in rows] == ["a", "Jos\ufffd"]
    assert [row["n"] for row in rows] == [1, 2]


BAD = {
    b"two,a.jpg,right_index,many": "wrong_type",
    b"two,a.jpg,right_index,50": "wrong_type",
    b"two,a.jpg,toe,500": "unknown_position",
    b",a.jpg,right_index,500": "no_subject_id",
    b"Jos\xe9,a.jpg,right_index,500": "not_utf8",
    b"two,fot\xf3.jpg,right_index,500": "not_utf8",
    b"two,,right_index,500": "no_capture",
    b"two,a.jpg,right_index": "malformed_row",
    b"a\x1bb,a.jpg,right_index,500": "unusable_id",
    "e\u0301,a.jpg,right_index,500".encode(): "unusable_id",
    b"x" * 300 + b",a.jpg,right_index,500": "unusable_id",
    b"two,a\x00b.jpg,right_index,500": "wrong_type",
}


@pytest.mark.parametrize("row", BAD, ids=BAD.values())
def test_a_bad_row_is_refused_by_its_number_and_the_others_are_compared(tmp_path, row):
    write(tmp_path / "m.csv", b"one,a.jpg,face,", row, b"three,b.jpg,face,")
    result = jobs.dedup(tmp_path / "m.csv", tmp_path / "o.parquet")
    units = {unit["unit_id"]: unit for unit in pq.read_table(tmp_path / "o.parquet").to_pylist()}
    assert (units["one"]["refusal"], units["three"]["refusal"]) == ("missing_file", "missing_file")
    (bad,) = [unit for name, unit in units.items() if name not in ("one", "three")]
    assert bad["refusal"] == BAD[row]
    assert bad["detail"].startswith("row 2 refused: ")
    assert result.summary()["rows_refused"] == 1
    found, left_out = read_labelled(tmp_path / "m.csv", bd.Config())
    assert [one.subject_id for one in found] == ["one", "three"]
    assert [(r.number, r.refusal.reason) for r in left_out.rows] == [(2, BAD[row])]


@pytest.mark.slow
def test_a_subject_with_a_bad_row_is_compared_by_the_others(tmp_path, portrait):
    (tmp_path / "a.jpg").write_bytes(jpeg(portrait))
    write(tmp_path / "m.csv", b"a,a.jpg,face,", b"a,f.png,right_index,50", b"row 4,a.jpg,,", b",a.jpg,,")
    result = jobs.dedup(tmp_path / "m.csv", tmp_path / "o.parquet")
    units = pq.read_table(tmp_path / "o.parquet").to_pylist()
    assert [(u["unit_id"], u["refusal"]) for u in units] == [("a", None), ("row 4", None), ("row 4~", "no_subject_id")]
    assert "row 2 refused: dpi is '50'" in units[0]["detail"]
    assert [cluster.subject_ids for cluster in result.clusters] == [("a", "row 4")]


def test_more_captures_of_a_subject_than_an_encounter_takes_cost_their_rows(tmp_path):
    write(tmp_path / "m.csv", *(b"a,a.jpg,," for _ in range(103)))
    result = jobs.dedup(tmp_path / "m.csv", tmp_path / "o.parquet")
    assert [row.number for row in result.left_out.rows] == [101, 102, 103]


def test_templates_with_bad_ids_cost_their_rows_in_an_evaluation(tmp_path):
    table = {
        "subject_id": ["a", None, "b", "e\u0301"],
        "face": people(4).tolist(),
        "Encounter ID": ["1", "2", "3", "4"],
    }
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    found, left_out = read_labelled(tmp_path / "t.parquet", bd.Config(), model_id="a-model")
    assert [(one.subject_id, one.encounter_id) for one in found] == [("a", "1"), ("b", "3")]
    assert np.allclose(found[1].templates["face"].embedding, people(4)[2])
    assert [(row.number, row.refusal.reason) for row in left_out.rows] == [(2, "no_subject_id"), (4, "unusable_id")]


def test_ages_of_a_csv_are_numbers_and_codes_are_not():
    ages = [str(age) for age in range(20, 60)]
    assert len(set(bands_of(ages))) == 4
    assert len(set(bands_of([f"0{age}" for age in ages]))) == 40


def test_rolls_know_positions_and_resolutions_by_their_usual_names(tmp_path):
    write(
        tmp_path / "r.csv",
        b"a.png,Right Index,500 dpi",
        b"b.png,2,",
        b"c.png,,",
        b"d.png,toe,",
        b"e.png,3,50",
        header=b"Path,Position,DPI",
    )
    roll = read_roll(tmp_path / "r.csv")
    assert roll.texts("position") == ["right_index", "right_index", ""]
    assert roll.texts("dpi") == ["500.0", "", ""]
    assert [(line, reason[:8]) for line, _, reason in roll.refused] == [(5, "position"), (6, "dpi is n")]


# one meaning in every reader ----------------------------------------------------------------------------------------

ODD_IDS = {
    "007": True,
    "7": True,
    "1e5": True,
    "NA": True,
    "true": True,
    "José": True,
    "31710123049900011111": True,
    "3.17E+15": False,  # rounded by a spreadsheet: several people would share it
    "1E+05": False,
    "Jose\u0301": False,
    "a\u202eb": False,
    "x" * 257: False,
    "Jos\ufffd": False,
    "": False,
}
"""id -> whether it can be used."""

ODD_PLACES = {
    ("Right Index", "500 dpi"): ("right_index", 500.0),
    ("2", ""): ("right_index", None),
    ("11", "500,0"): ("right_thumb", 500.0),
    ("", ""): ("face", None),
    ("portrait", ""): ("face", None),
    ("toe", ""): None,
    ("13", ""): None,
    ("2", "50"): None,
    ("2", "many"): None,
}
"""(position, dpi) as written -> as meant, None where the row cannot be used."""


def of_captures(path: Path) -> dict[int, tuple[str, object, float | None]]:
    return {
        row.number: (row.subject_id, row.capture.column, getattr(row.capture, "dpi", None))
        for row in read_rows(path)[0]
    }


def of_encounters(path: Path) -> dict[int, tuple[str, object, float | None]]:
    records = [record for record in Manifest(path).records() if record.problem is None]
    return {r.row: (str(r.subject_id), r.cells[0].column, r.cells[0].dpi) for r in records}


def of_a_kit(path: Path) -> dict[int, tuple[str, object, float | None]]:
    plans, _ = read_manifest(path, bytes_max=1 << 20)
    return {
        plan.rows[0]: (plan.encounter.subject_id, one.column, getattr(one, "dpi", None))
        for plan in plans
        for one in plan.encounter.captures
    }


def of_a_roll(path: Path) -> dict[int, tuple[str, object, float | None]]:
    roll = read_roll(path)
    first = 2 if path.suffix == ".csv" else 1
    if roll.of_captures:
        cells = zip(roll.lines.tolist(), roll.texts("position"), roll.texts("dpi"), strict=True)
        return {
            line - first + 1: ("", position or "face", float(dpi) if dpi else None) for line, position, dpi in cells
        }
    return {
        line - first + 1: (name, "", None)
        for line, name in zip(roll.lines.tolist(), roll.texts("subject_id"), strict=True)
    }


def of_a_load(path: Path) -> dict[int, tuple[str, object, float | None]]:
    table = pq.read_table(path)
    table = table.append_column("Face", pa.array(people(len(table)).tolist(), pa.list_(pa.float32())))
    with bd.Engine.open(path.with_suffix(".gallery")) as engine:
        result = jobs.load(engine, iter(table.to_batches()), model_id="m")
        assert result.refused == len(table) - len(engine.subject_ids())
        known = set(engine.subject_ids())
    return {i: (n, "", None) for i, n in enumerate(table["Subject ID"].to_pylist(), start=1) if n in known}


def odd(path: Path, columns: dict[str, list[str]]) -> Path:
    (path.parent / "a.png").write_bytes(b"x")
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([tuple(columns), *zip(*columns.values(), strict=True)])
    else:
        pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("read", [of_captures, of_encounters, of_a_kit, of_a_roll, of_a_load])
def test_an_id_means_the_same_in_every_reader(tmp_path, read, suffix):
    if read is of_a_load and suffix == ".csv":
        pytest.skip("templates are not loaded from CSV")
    columns = {"Subject ID": list(ODD_IDS)}
    if read not in (of_a_roll, of_a_load):
        columns["PATH"] = ["a.png"] * len(ODD_IDS)
    found = read(odd(tmp_path / f"m{suffix}", columns))
    assert [name for name, _, _ in found.values()] == [name for name, usable in ODD_IDS.items() if usable]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_an_id_with_spaces_around_it_is_refused_by_every_reader_and_never_changed(tmp_path, suffix):
    ids = [" 007", "007 ", "008"]
    path = odd(tmp_path / f"m{suffix}", {"Subject ID": ids, "path": ["a.png"] * 3})
    visits = odd(tmp_path / f"v{suffix}", {"subject_id": list("abc"), "encounter_id": ids, "path": ["a.png"] * 3})
    roll = odd(tmp_path / f"r{suffix}", {"subject_id": ids})
    for read in (of_captures, of_encounters, of_a_kit):
        assert [name for name, _, _ in read(path).values()] == ["008"]
    for read in (of_encounters, of_a_kit):
        assert [name for name, _, _ in read(visits).values()] == ["c"]
    assert [name for name, _, _ in of_a_roll(roll).values()] == ["008"]
    assert [reason for _, _, reason in read_roll(roll).refused] == [
        "subject_id is not usable: it has spaces around it"
    ] * 2


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("read", [of_captures, of_encounters, of_a_kit, of_a_roll])
def test_positions_and_resolutions_mean_the_same_in_every_reader(tmp_path, read, suffix):
    positions, resolutions = zip(*ODD_PLACES, strict=True)
    columns = {"Path": ["a.png"] * len(ODD_PLACES), "position": list(positions), "DPI": list(resolutions)}
    if read is not of_a_roll:
        columns["subject_id"] = [f"s{i}" for i in range(len(ODD_PLACES))]
    found = read(odd(tmp_path / f"m{suffix}", columns))
    wanted = {i: meant for i, meant in enumerate(ODD_PLACES.values(), start=1) if meant is not None}
    assert {i: (position, dpi) for i, (_, position, dpi) in found.items()} == wanted


def test_a_row_with_a_path_and_a_reason_why_there_is_none_is_refused_by_every_reader(tmp_path):
    columns = {"subject_id": ["a", "b", "c"], "path": ["a.png", "a.png", ""], "missing": ["", "amputated", "amputated"]}
    path = odd(tmp_path / "m.csv", columns | {"position": ["2"] * 3})
    assert list(of_captures(path)) == [1]
    problems = {r.row: r.problem.detail for r in Manifest(path).records() if r.problem}
    plans, broken = read_manifest(path, bytes_max=1 << 20)
    assert [plan.rows for plan in plans] == [(1,), (3,)]
    assert [problems.keys(), {row for one in broken for row in one.rows}] == [{2}, {2}]
    assert "both a path and a reason" in problems[2] and "both a path and a reason" in broken[0].problem


# folders ------------------------------------------------------------------------------------------------------------


def test_images_are_recognised_by_suffix_or_content_and_the_rest_is_counted(tmp_path, portrait):
    picture = jpeg(portrait)
    for name in (
        "a/1.jpg",
        "b/1.jfif",
        "c/1.JPG",
        "d/1.jpe",
        "e/1",
        "f/1.heic",
        "f/2.HEIC",
        "a/._1.jpg",
        "g/notes.txt",
        "g/README",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture if name[0] in "abcde" else b"text")
    os.mkfifo(tmp_path / "g" / "pipe")
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    found, left_out = images_of(tmp_path)
    assert list(found) == ["a/1.jpg", "b/1.jfif", "c/1.JPG", "d/1.jpe", "e/1"]
    assert left_out.files == {".heic": 2, "no suffix": 2, "._*": 1, ".txt": 1, "linked folder": 1}
    assert left_out.sentences(files_max=0) == ["7 files left out: .heic 2, no suffix 2, ._* 1, .txt 1, linked folder 1"]


def test_a_file_with_another_suffix_is_compared_if_its_content_is_a_picture(tmp_path, portrait):
    import cv2

    def encoded(suffix):
        return cv2.imencode(suffix, portrait[:64, :64])[1].tobytes()

    files = {
        "1.dat": encoded(".jpg"), "2.jpg_old": encoded(".png"), "3.bak": encoded(".bmp"), "4.v2": encoded(".ppm"), "5.x": encoded(".tif"),
        "6.x": encoded(".webp"),
    }  # fmt: skip
    others = {
        "photo.heic": (b"\0\0\0\x18ftypheic" + bytes(8), "HEIC, which is not read"),
        "film.mp4": (b"\0\0\0\x18ftypisom" + bytes(8), "a video, which is not read"),
        "scan.pdf": (b"%PDF-1.7\n", "a PDF, not an image"),
        "list.docx": (b"PK\3\4" + bytes(20), "a ZIP archive or an office document, not an image"),
        "raw.nef": (b"II*\0" + bytes(20), "a raw photograph, which is not read"),
        "plan.txt": (b"P1 is the first plan", "its first bytes are not those of an image"),
        "more.txt": (b"BM is short for benchmark", "its first bytes are not those of an image"),
        "nothing": (b"", "empty"),
    }
    for name, content in (files | {name: content for name, (content, _) in others.items()}).items():
        (tmp_path / name).write_bytes(content)
    found, left_out = images_of(tmp_path)
    assert list(found) == list(files)
    assert left_out.reasons.keys() == others.keys()
    assert all(left_out.reasons[name].startswith(why) for name, (_, why) in others.items())
    assert left_out.to_dict()["left_out_files"] == left_out.reasons
    assert sum(left_out.files.values()) == len(others)
    assert any("photo.heic: HEIC" in sentence for sentence in left_out.sentences())


@pytest.mark.slow
def test_odd_file_names_neither_end_a_job_nor_rename_others(tmp_path, portrait):
    folder = tmp_path / "photos"
    odd = [
        b"Jos\xe9/1.jpg",
        b"Jos\\xe9/1.jpg",
        "e\u0301/1.jpg".encode(),
        b"a\x1b[2J/1.jpg",
        b" b /1.jpg",
        b"x" * 200 + b"/" + b"y" * 100 + b".jpg",
    ]
    for name in odd:
        path = os.fsencode(folder) + b"/" + name
        os.makedirs(os.path.dirname(path))
        with open(path, "wb") as file:
            file.write(jpeg(portrait))
    result = jobs.dedup(folder, tmp_path / "o.parquet")
    assert not result.refusals and len(result.clusters[0].subject_ids) == len(odd)
    units = pq.read_table(tmp_path / "o.parquet").to_pylist()
    names = {unit["unit_id"] for unit in units}
    assert {"Jos\\xe9/1.jpg", "Jos\\xe9/1.jpg~", "e\u0301/1.jpg", "a\x1b[2J/1.jpg", " b /1.jpg"} < names
    assert "Jos\\xe9" in {unit["label"] for unit in units}
    again = jobs.dedup(folder, tmp_path / "o.parquet")
    assert again.summary() == result.summary()
    found, _ = read_labelled(folder, bd.Config())
    assert {one.encounter_id for one in found} == names


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f/1.heic").write_bytes(b"x")
    with pytest.raises(bd.InvalidInput, match=r"1 file left out: \.heic 1"):
        jobs.dedup(tmp_path / "f", tmp_path / "o.parquet")


# load ---------------------------------------------------------------------------------------------------------------

FACES = people(6)


def loaded(
    tmp_path: Path, table: dict[str, object], **more: object
) -> tuple[load_module.LoadResult, dict[str, list[str]], list[str]]:
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    with bd.Engine.open(tmp_path / "g") as engine:
        result = jobs.load(engine, tmp_path / "t.parquet", **more)
        assert jobs.load(engine, tmp_path / "t.parquet", **more).added == 0
        return result, {name: sorted(engine.templates(name)) for name in engine.subject_ids()}, engine.info()["groups"]


def vectors(*rows: object) -> pa.Array:
    return pa.array([None if row is None else list(row) for row in rows], pa.list_(pa.float32()))


def test_a_subject_that_lacks_a_column_is_loaded_with_the_others(tmp_path):
    table = {
        "subject_id": ["a", "b", "c", "d", "nothing"],
        "face": vectors(FACES[0], None, FACES[2], [], None),
        "left_index": vectors(FACES[0], FACES[1], None, FACES[3], None),
        "left_thumb": pa.nulls(5),
    }
    result, found, _ = loaded(tmp_path, table)
    assert found == {"a": ["face", "left_index"], "c": ["face"], "b": ["left_index"], "d": ["left_index"]}
    assert (result.added, result.reasons, result.refused_ids) == (4, {"no template": 1}, ("nothing",))


def test_vectors_that_cannot_be_compared_are_reported_with_their_subject(tmp_path):
    rows = vectors(FACES[0], 0 * FACES[1], 2 * FACES[2], FACES[3][:100], np.full(128, np.nan), FACES[5])
    result, found, _ = loaded(tmp_path, {"subject_id": ["a", "zero", "long", "short", "nan", "f"], "face": rows})
    assert list(found) == ["a", "f"]
    assert result.refused_ids == ("zero", "long", "short", "nan")
    assert result.reasons == {
        "face is a vector of zeros": 1,
        "face is not a unit vector": 2,
        "face has another number of numbers than 128": 1,
    }


def test_groups_are_a_text_or_a_list_and_bad_ones_cost_their_row(tmp_path):
    groups = ["x;y", "x", None, "z|y ", "a\u202eb", ";".join(map(str, range(200)))]
    result, found, named = loaded(tmp_path, {"subject_id": list("abcdef"), "face": vectors(*FACES), "groups": groups})
    assert (named, list(found)) == (["x", "y", "z"], list("abcd"))
    assert result.reasons == {"groups: unusable id": 2}


def test_ids_that_cannot_be_compared_cost_their_row(tmp_path):
    result, found, _ = loaded(
        tmp_path, {"subject_id": ["a", " b", "e\u0301", "c\u200b", "x" * 257, "José"], "face": vectors(*FACES)}
    )
    assert list(found) == ["a", "José"]
    assert sorted(reason.partition(": it ")[2] for reason in result.reasons) == [
        "has hidden characters", "has spaces around it", "is not in form NFC", "is too long",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        (b"\xef\xbb\xbf001\r\n002\r\n003\r\n", ["001", "002", "003"]),
        (b"001\n002\n003", ["001", "002", "003"]),
        (b"Jos\xe9\n002\n003\n", ["002", "003"]),
        ("a\u2028b\n002\n003\n".encode(), ["002", "003"]),
        (b" 001\n002\t\n003 \r\n", []),
        (b"\n002\n003\n\n", None),
        (b"1e5\nNA\n1.0\n", ["1e5", "NA", "1.0"]),
    ],
)
def test_a_text_file_of_ids_costs_no_more_than_its_bad_lines(tmp_path, content, ids):
    np.save(tmp_path / "v.npy", FACES[:3])
    (tmp_path / "ids.txt").write_bytes(content)
    with bd.Engine.open(tmp_path / "g") as engine:
        if ids is None:
            with pytest.raises(bd.InvalidInput, match="one id for each vector"):
                jobs.load(engine, tmp_path / "v.npy", ids=tmp_path / "ids.txt")
        else:
            assert jobs.load(engine, tmp_path / "v.npy", ids=tmp_path / "ids.txt").refused == 3 - len(ids)
        assert engine.subject_ids() == (ids or [])


def test_files_of_ids_that_are_none_are_named(tmp_path):
    np.save(tmp_path / "v.npy", FACES[:2])
    np.save(tmp_path / "floats.npy", np.array([1.0, 2.0]))
    np.save(tmp_path / "bytes.npy", np.array([b"001", b"Jos\xe9"]))
    with bd.Engine.open(tmp_path / "g") as engine:
        with pytest.raises(bd.InvalidInput, match="wanted \\(n,\\) strings"):
            jobs.load(engine, tmp_path / "v.npy", ids=tmp_path / "floats.npy")
        assert jobs.load(engine, tmp_path / "v.npy", ids=tmp_path / "bytes.npy").reasons == {
            "subject_id is not UTF-8 text": 1
        }
        assert engine.subject_ids() == ["001"]
