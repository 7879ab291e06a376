"""Reading a roll: a list of subjects, or of captures of people whose ids are not known, as an office keeps it.

Owns what a usable line is. Never looks into a gallery.

1. Everything is read as text, so that ids keep their leading zeros. Spaces around a value do not count.
2. A line that cannot be used is refused with its number and the reason; only a file that makes no sense as a whole is an error.
3. Lines are numbered as a spreadsheet numbers them: the header of a CSV file is line 1. Rows of a Parquet file count from 1.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from biodedup.errors import InvalidInput
from biodedup.values import COLUMNS

KNOWN = ("subject_id", "path", "district", "position", "dpi", "entry")
_ROUNDED = r"^[0-9]+([.,][0-9]+)?[eE]\+?[0-9]+$"


@dataclass(frozen=True, eq=False)
class Roll:
    """table: the usable lines, texts: `subject_id`, or `path`, `position`, `dpi` and `entry`; `district`, '' where not stated; and what
    else the file holds, `others`. lines: int64, their numbers. refused: (line, district, reason)."""

    table: pa.Table
    lines: NDArray[np.int64]
    refused: tuple[tuple[int, str, str], ...]
    others: tuple[str, ...]
    with_districts: bool

    @property
    def of_captures(self) -> bool:
        return "subject_id" not in self.table.column_names

    def texts(self, column: str) -> list[str]:
        return [str(text) for text in self.table[column].to_pylist()]


def read_roll(path: Path) -> Roll:
    """A CSV file (comma, semicolon or tab; UTF-8) or a Parquet file with the column subject_id, or with path. Raises InvalidInput."""
    try:
        table, lines, refused = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    except FileNotFoundError:
        raise InvalidInput(f"{path} does not exist; name a CSV or Parquet file") from None
    except (pa.ArrowException, OSError) as error:
        raise InvalidInput(
            f"{path} is not a readable CSV or Parquet file ({type(error).__name__}); save it again"
        ) from error
    table = _named(table, path)
    with_districts = "district" in table.column_names
    reasons = np.full(len(table), "", object)
    columns = {}
    for name in table.column_names:
        columns[name], unreadable = _decoded(table[name])
        reasons[unreadable] = f"{name} is not UTF-8 text"
    empty = np.ones(len(table), bool)
    for cells in columns.values():
        empty &= _mask(pc.equal(cells, "")) & (reasons == "")
    for reason, wrong in _checks(columns):
        reasons[wrong & (reasons == "")] = reason
    if not with_districts:
        columns["district"] = pa.array([""] * len(table), pa.string())
    kept = np.flatnonzero((reasons == "") & ~empty)
    bad = np.flatnonzero((reasons != "") & ~empty)
    districts = columns["district"].take(pa.array(bad)).to_pylist()
    refused += list(zip(lines[bad].tolist(), districts, reasons[bad].tolist(), strict=True))
    others = tuple(name for name in columns if name not in KNOWN)
    return Roll(pa.table(columns).take(pa.array(kept)), lines[kept], tuple(sorted(refused)), others, with_districts)


def _read_parquet(path: Path) -> tuple[pa.Table, NDArray[np.int64], list[tuple[int, str, str]]]:
    table = pa.parquet.read_table(path)
    columns = {}
    for name in table.column_names:
        cells = table[name].combine_chunks()
        if pa.types.is_dictionary(cells.type):
            cells = cells.dictionary_decode()
        kind = cells.type
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        if name.strip().lower() in ("subject_id", "path") and not (text or pa.types.is_integer(kind)):
            raise InvalidInput(f"{path}: column {name} is of type {kind}; wanted strings")
        if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            continue  # nothing that an office would read
        columns[name] = pc.fill_null(cells.cast(pa.string()), "")
    if len(set(table.column_names)) != len(table.column_names):
        raise InvalidInput(f"{path} has a column twice: {table.column_names}; give each its own name")
    return pa.table(columns), np.arange(1, len(table) + 1), []


def _read_csv(path: Path) -> tuple[pa.Table, NDArray[np.int64], list[tuple[int, str, str]]]:
    with path.open("rb") as file:
        first = file.readline(1 << 20)
    try:
        header = first.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        raise InvalidInput(f"{path} is not UTF-8 text; save it as CSV UTF-8") from None
    if "\0" in header or not header.strip():
        raise InvalidInput(f"{path} has no header line; the first line names the columns, as subject_id,district")
    delimiter = max(",;\t", key=header.count)
    names = next(csv.reader([header], delimiter=delimiter))
    if len(set(names)) != len(names):
        raise InvalidInput(f"{path} has a column twice: {names}; give each its own name")
    short: list[int] = []

    def skip(row: Any) -> str:
        short.append(row.number)
        return "skip"

    table = pa.csv.read_csv(
        path,
        read_options=pa.csv.ReadOptions(use_threads=False),  # else rows that are skipped have no number
        parse_options=pa.csv.ParseOptions(
            delimiter=delimiter, invalid_row_handler=skip, ignore_empty_lines=False, newlines_in_values=True
        ),
        convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.binary())),
    )
    lines = np.setdiff1d(np.arange(2, len(table) + len(short) + 2), np.array(short, np.int64))
    return table, lines, [(number, "", f"it has not {len(names)} fields") for number in short]


def _named(table: pa.Table, path: Path) -> pa.Table:
    """Known columns under their own names, however they are capitalised."""
    names = [n.strip().lower() if n.strip().lower() in KNOWN else n.strip() for n in table.column_names]
    if len(set(names)) != len(names):
        raise InvalidInput(f"{path} has a column twice: {names}; give each its own name")
    if not {"subject_id", "path"} & set(names):
        raise InvalidInput(f"{path} has the columns {names}; wanted subject_id, or path for captures")
    return table.rename_columns(names)


def _decoded(cells: Any) -> tuple[Any, NDArray[np.int64]]:
    """(texts without spaces around them, which rows are no text)."""
    cells = cells.combine_chunks()
    unreadable: list[int] = []
    try:
        cells = cells.cast(pa.string())
    except pa.ArrowInvalid:  # somewhere; find where
        found = []
        for row, value in enumerate(cells.to_pylist()):
            try:
                found.append(value.decode())
            except UnicodeDecodeError:
                found.append(value.decode(errors="replace"))
                unreadable.append(row)
        cells = pa.array(found, pa.string())
    return pc.utf8_trim_whitespace(cells), np.array(unreadable, np.int64)


def _checks(columns: dict[str, Any]) -> list[tuple[str, NDArray[np.bool_]]]:
    """(reason, bool (n,)) of what makes a line useless."""
    name = "subject_id" if "subject_id" in columns else "path"
    cells = columns[name]
    checks = [(f"{name} is empty", _mask(pc.equal(cells, "")))]
    if name == "subject_id":
        usable = pc.and_(pc.utf8_is_printable(cells), pc.less_equal(pc.utf8_length(cells), 256))
        checks.append(
            ("subject_id is not usable: longer than 256 characters, or with control characters", ~_mask(usable))
        )
        rounded = _mask(pc.match_substring_regex(cells, _ROUNDED))
        checks.append(("subject_id was rounded by a spreadsheet; format the column as text", rounded))
        return checks
    if "position" in columns:
        known = pc.is_in(columns["position"], pa.array(["", *COLUMNS]))
        checks.append(("position is not known", ~_mask(known)))
    if "dpi" in columns:
        number = _mask(pc.match_substring_regex(columns["dpi"], r"^([0-9]+(\.[0-9]+)?)?$"))
        checks.append(("dpi is not a number", ~number))
    return checks


def _mask(cells: Any) -> NDArray[np.bool_]:
    return np.asarray(cells.to_numpy(zero_copy_only=False), bool)
