"""Reads a roll: an office's list of subject ids, or of captures of people whose ids are unknown. The job `audit` compares it with a gallery.

Owns the rule which lines can be used; `fields.py` parses the cells. Never opens a gallery.

1. Everything is read as text, so that ids keep their leading zeros. In CSV, spaces around a value are removed, except around an id.
2. A line that cannot be used is refused with its number and the reason. Only a file that is not a roll raises.
3. Lines are numbered as in a spreadsheet: the header of a CSV file is line 1. Rows of a Parquet file count from 1.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from numpy.typing import NDArray

from biodedup.engine.arrow.ids import UNREADABLE, ids_of, utf8_of
from biodedup.errors import InvalidInput
from biodedup.jobs.manifests.fields import (
    ID_COLUMNS,
    Unusable,
    dpi_of,
    path_of,
    position_of,
)
from biodedup.jobs.manifests.options import DEFAULT_OPTIONS, TableOptions
from biodedup.jobs.manifests.tables import no_rows, refuse_other_kinds
from biodedup.jobs.manifests.text_form import open_text, refuse_undecodable_header, text_form
from biodedup.jobs.shared.spreadsheet import unescaped_cells

KNOWN = ("subject_id", "path", "district", "position", "dpi", "entry")

_Lines: TypeAlias = tuple[dict[str, Any], NDArray[np.int64], list[tuple[int, str, str]]]
"""(column -> values; the number of each line; the refused lines: number, district, reason)."""


@dataclass(frozen=True, eq=False)
class Roll:
    """The lines of a roll. table: the usable lines, as texts. Its columns are `subject_id`, or `path`, `position`, `dpi` and `entry`; and
    `district`, '' if not stated; and the other columns of the file, `others`. lines: int64 (n,), their numbers. refused: (line, district,
    reason)."""

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


def read_roll(path: Path, options: TableOptions = DEFAULT_OPTIONS) -> Roll:
    """Reads a CSV or Parquet file that has the column subject_id or the column path. Raises InvalidInput."""
    refuse_other_kinds(path)
    try:
        found, lines, refused = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path, options)
    except FileNotFoundError:
        raise InvalidInput(f"{path} does not exist; name a CSV or Parquet file") from None
    except (pa.ArrowException, OSError) as error:
        raise InvalidInput(
            f"{path} is not a readable CSV or Parquet file ({type(error).__name__}); save it again"
        ) from error
    reasons = np.full(len(lines), "", object)
    columns: dict[str, Any] = {}
    names = _column_names(list(found), path, options)
    if not len(lines) and not refused:
        raise no_rows(path)
    for name, values in zip(names, found.values(), strict=True):
        columns[name], unreadable = _texts(values, name, csv_file=path.suffix.lower() != ".parquet")
        reasons[unreadable] = f"{name} is not UTF-8 text"
    with_districts = "district" in columns
    for reason, wrong in _checks(columns):
        reasons[wrong & (reasons == "")] = reason
    if not with_districts:
        columns["district"] = pa.array([""] * len(lines), pa.string())
    kept = np.flatnonzero(reasons == "")
    bad = np.flatnonzero(reasons != "")
    districts = columns["district"].take(pa.array(bad)).to_pylist()
    refused += list(zip(lines[bad].tolist(), districts, reasons[bad].tolist(), strict=True))
    others = tuple(name for name in columns if name not in KNOWN)
    return Roll(pa.table(columns).take(pa.array(kept)), lines[kept], tuple(sorted(refused)), others, with_districts)


def _read_parquet(path: Path) -> _Lines:
    table = pa.parquet.read_table(path)
    _refuse_repeated(table.column_names, path)
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
            continue  # not a text that an office can read in the report
        columns[name] = pc.fill_null(utf8_of(cells.cast(pa.string())), "")
    return columns, np.arange(1, len(table) + 1), []


def _read_csv(path: Path, options: TableOptions) -> _Lines:
    rows: list[list[str]] = []
    lines: list[int] = []
    refused: list[tuple[int, str, str]] = []
    form = text_form(path, options.encoding)
    if not form.header.strip():
        raise InvalidInput(f"{path} has no header line; the first line names the columns, such as subject_id,district")
    refuse_undecodable_header(form, path)
    names = _refuse_repeated(next(csv.reader([form.header], delimiter=form.delimiter)), path)
    with open_text(path, form.encoding, errors="surrogateescape" if form.is_utf8 else "replace") as file:
        for _ in range(form.lines_before + 1):
            file.readline()
        reader = csv.reader(file, delimiter=form.delimiter)
        before = 0
        try:
            for row in reader:
                # the number of the row's first line: a quoted value may hold several lines
                line, before = before + form.lines_before + 2, reader.line_num
                if not any(value.strip() for value in row):
                    continue  # an empty line
                if len(row) == len(names):
                    rows.append(row)
                    lines.append(line)
                else:
                    refused.append((line, "", f"the line has {len(row)} fields, wanted {len(names)}"))
        except csv.Error as error:
            raise InvalidInput(f"{path} cannot be read after line {before + 1} ({error}); save it again") from error
    columns = zip(*rows, strict=True) if rows else ((),) * len(names)
    return dict(zip(names, columns, strict=True)), np.array(lines, np.int64), refused


def _column_names(found: Sequence[str], path: Path, options: TableOptions) -> list[str]:
    """The library's names of the columns. found: their names in the file."""
    names = options.names(found, path, KNOWN)
    if not {"subject_id", "path"} & set(names):
        raise InvalidInput(
            f"{path} has the columns {names}; wanted subject_id, or path for captures. Map it to its name in the file: --column subject_id=NAME"
        )
    options.check_columns(names, KNOWN, path, carried=True)
    return names


def _refuse_repeated(names: list[str], path: Path) -> list[str]:
    if len(set(names)) != len(names):
        raise InvalidInput(f"{path} repeats a column name: {names}; give each column its own name")
    return names


def _texts(values: Any, column: str, *, csv_file: bool) -> tuple[Any, NDArray[np.bool_]]:
    """(the texts of a column; bool (n,): which are not UTF-8). csv_file: spaces around texts are removed, but not around ids."""
    try:
        cells = pa.array(values, pa.string())
    except UnicodeEncodeError:  # some bytes are not UTF-8
        cells = pa.array([value if _is_text(value) else UNREADABLE for value in values], pa.string())
    unreadable = _mask(pc.match_substring(cells, UNREADABLE))
    if not csv_file:
        return cells, unreadable
    trimmed = pc.utf8_trim_whitespace(cells)
    if column in ID_COLUMNS:
        trimmed = pc.if_else(pc.equal(trimmed, ""), "", cells)
    return unescaped_cells(trimmed), unreadable


def _parsed(cells: Any, parse: Callable[[str], Any]) -> tuple[Any, NDArray[np.bool_]]:
    """(the parsed cells as texts, '' if a cell is empty or wrong; bool (n,): which cells are wrong)."""
    parsed: dict[str, str | None] = {"": ""}
    for text in pc.unique(cells).to_pylist():
        try:
            parsed.setdefault(text, str(parse(text)))
        except Unusable:
            parsed[text] = None
    values = [parsed[text] for text in cells.to_pylist()]
    return pa.array([text or "" for text in values], pa.string()), np.array([text is None for text in values], bool)


def _is_text(value: str) -> bool:
    """Whether a value has no undecodable bytes, which `surrogateescape` reads as U+DC80 to U+DCFF."""
    return value.isascii() or not any("\udc80" <= letter <= "\udcff" for letter in value)


def _checks(columns: dict[str, Any]) -> list[tuple[str, NDArray[np.bool_]]]:
    """Checks the cells of all lines: (reason, bool (n,): the lines with this fault). Replaces positions and resolutions by their parsed
    values."""
    name = "subject_id" if "subject_id" in columns else "path"
    cells = columns[name]
    checks = [(f"{name} is empty", _mask(pc.equal(cells, "")))]
    if name == "subject_id":
        _, problems = ids_of(cells, name)
        return checks + [(problem, problems == problem) for problem in sorted({*problems} - {""})]
    parsers: tuple[tuple[str, Callable[[str], Any], str], ...] = (
        ("path", path_of, "path is not a file path"),
        ("position", position_of, "position is not known"),
        ("dpi", dpi_of, "dpi is not a number from 72 to 4000"),
    )
    for column, parse, reason in parsers:
        if column in columns:
            columns[column], wrong = _parsed(columns[column], parse)
            checks.append((reason, wrong))
    return checks


def _mask(cells: Any) -> NDArray[np.bool_]:
    return np.asarray(cells.to_numpy(zero_copy_only=False), bool)
