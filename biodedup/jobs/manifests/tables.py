"""Reads CSV and Parquet tables row by row, in bounded memory.

Owns the batches, column names, and lines that do not fit. Never says what a cell means (`fields.py`).

1. Cells of CSV are text without the spaces around it; an empty cell is None; nothing is converted to a number. Bytes that are no text in the
   file's encoding (`text_form.py`) become `fields.UNREADABLE` in that cell alone.
2. A line that does not fit comes out as a row without cells. Only a file that is no table raises InvalidInput.
3. Rows are numbered from 1, without the header. Blank rows count, so that numbers are those of the spreadsheet, and do not come out.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet

from biodedup.errors import InvalidInput
from biodedup.jobs.manifests.fields import ID_COLUMNS
from biodedup.jobs.manifests.options import DEFAULT_OPTIONS, TableOptions
from biodedup.jobs.manifests.text_form import TextForm, header_of, open_utf8, refuse_no_text, text_form
from biodedup.jobs.shared.spreadsheet import rearmed

Row: TypeAlias = tuple[int, Mapping[str, Any]]
"""(number, cells). No cells: a line that does not fit the table's columns."""

CSV_SUFFIXES = (".csv", ".tsv", ".txt")
_BATCH_ROWS = 256


class TableFile:
    """A CSV or Parquet file. schema: its columns under the names by which jobs know them, texts where it is CSV; form: how the text is
    written, None for Parquet; written: our name of a column -> its name in the file."""

    def __init__(self, path: Path, options: TableOptions = DEFAULT_OPTIONS) -> None:
        """Raises InvalidInput."""
        self.path, self.options = path, options
        self.form, found = _form_and_schema(path, options)
        names = options.names(found.names, path)
        self.schema = pa.schema([field.with_name(name) for name, field in zip(names, found, strict=True)])
        self.written = dict(zip(names, found.names, strict=True))

    @property
    def names(self) -> list[str]:
        names: list[str] = self.schema.names
        return names

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """columns: only these. Raises InvalidInput where the file breaks off."""
        names, number = list(columns or self.names), 0
        try:
            for number, cells in enumerate(
                self._listed(names) if self.form is None else self._text(names, self.form), 1
            ):
                if cells is not None:
                    yield number, cells
        except (pa.ArrowException, OSError, EOFError, csv.Error) as error:
            raise InvalidInput(
                f"{self.path} breaks off behind row {number} ({type(error).__name__}); send a whole one, what is done stays done"
            ) from error

    def _listed(self, names: list[str]) -> Iterator[dict[str, Any]]:
        written = [self.written[name] for name in names]
        with pa.parquet.ParquetFile(self.path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=written):
                yield from _listed(batch, names, written)

    def _text(self, names: list[str], form: TextForm) -> Iterator[dict[str, Any] | None]:
        """The cells of each row; None for a blank one."""
        # not by Arrow's reader: it guesses types, and a thread of it that outlives the interpreter ends the process
        with open_utf8(self.path, form) as stream, TextIOWrapper(stream, "utf-8-sig", "replace", newline="") as text:
            for _ in range(form.lines_before):
                text.readline()
            rows = csv.reader(text, delimiter=form.delimiter)
            header = next(rows, [])
            at = [(name, header.index(self.written[name])) for name in names]
            for cells in rows:
                fits = len(cells) == len(header)
                blank = not any(map(str.strip, cells))
                yield None if blank else {name: _trimmed(cells[i], name) for name, i in at} if fits else {}


def _form_and_schema(path: Path, options: TableOptions) -> tuple[TextForm | None, Any]:
    try:
        if path.is_file() and not path.stat().st_size:
            raise InvalidInput(f"{path} is empty; write a line of column names, and a row for each capture")
        if path.suffix.lower() == ".parquet":
            return None, pa.parquet.read_schema(path)
        if path.suffix.lower() in CSV_SUFFIXES:
            _refuse_workbook(path)
            form = text_form(path, options.encoding)
            refuse_no_text(form, path)
            # not by Arrow, whose threads may outlive a program that ends at once
            return form, pa.schema([(name, pa.string()) for name in header_of(path, form)])
    except FileNotFoundError:
        raise InvalidInput(f"{path} does not exist; name a Parquet or CSV manifest") from None
    except (pa.ArrowException, OSError) as error:
        raise InvalidInput(
            f"{path} is not a readable table ({type(error).__name__}); write it as Parquet or CSV"
        ) from error
    _refuse_workbook(path)
    raise InvalidInput(f"{path.name} is no manifest by its name; end it with .parquet or .csv")


def _refuse_workbook(path: Path) -> None:
    """Raises InvalidInput for the file of a spreadsheet program, by its first bytes."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise InvalidInput(
            f"{path} is a workbook (.xlsx, .xls, .ods), not a table of text; save the sheet as CSV UTF-8"
        )
    if start.lstrip(b"\xef\xbb\xbf \r\n\t").lower().startswith((b"<html", b"<!doctype", b"<table", b"<?xml")):
        raise InvalidInput(f"{path} is a page (HTML or XML), as some systems export tables; save it as CSV UTF-8")


def _trimmed(cell: str, column: str) -> str | None:
    """The text of a cell in CSV, None where it is blank. Spaces around an id stay, so that `fields.py` refuses it."""
    trimmed = cell.strip()
    return rearmed(cell if trimmed and column in ID_COLUMNS else trimmed) or None


def _listed(batch: Any, names: Sequence[str], written: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a typed table; a cell that Python has no value for is None."""
    columns = [values_of(batch.column(name)) for name in written]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def values_of(cells: Any) -> list[Any]:
    """An Arrow array as Python has it: bytes that are no UTF-8 replaced, a cell that Python has no value for None."""
    kind = cells.type
    if pa.types.is_dictionary(kind):
        cells = cells.dictionary_decode()
        kind = cells.type
    if pa.types.is_timestamp(kind):
        cells = cells.cast(pa.timestamp("us", kind.tz), safe=False)  # Python's times have no nanoseconds
    try:
        values: list[Any] = cells.to_pylist()
    except UnicodeDecodeError:
        values = [
            None if cell is None else cell.decode("utf-8", "replace")
            for cell in cells.cast(pa.large_binary()).to_pylist()
        ]
    except (ValueError, OverflowError):
        values = [_value(cell) for cell in cells]
    return values


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except (ValueError, OverflowError):
        return None
