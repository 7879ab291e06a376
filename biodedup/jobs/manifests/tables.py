"""Reads CSV and Parquet tables row by row, in bounded memory.

Owns the reading in batches, and the names of the columns. Never interprets a cell: `fields.py` does.

1. A CSV cell is text without spaces around it, and is never converted to a number. An empty cell is None. Bytes that the file's encoding
   (`text_form.py`) cannot decode become `UNREADABLE`, only in their cell.
2. A line whose number of fields differs from the header's is returned as a row without cells. Only a file that is not a table raises
   InvalidInput.
3. Rows are numbered from 1, without the header. Blank rows are counted but not returned, so that numbers agree with a spreadsheet.
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
from biodedup.jobs.manifests.text_form import TextForm, header_of, open_utf8, refuse_undecodable_header, text_form
from biodedup.jobs.shared.spreadsheet import unescaped

Row: TypeAlias = tuple[int, Mapping[str, Any]]
"""(number, column -> cell). Without cells: the line has another number of fields than the header."""

CSV_SUFFIXES = (".csv", ".tsv", ".txt")
_BATCH_ROWS = 256
_IMAGES = (b"\x89PNG", b"\xff\xd8\xff", b"\xff\xa0\xff", b"GIF8", b"II*\0", b"MM\0*")


class TableFile:
    """A CSV or Parquet file. schema: its columns under the library's names, all of them texts if it is CSV; form: the form of a CSV file,
    None for Parquet; written: the library's name of a column -> its name in the file."""

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
        """All rows but blank ones. columns: the columns to read; None reads all. Raises InvalidInput if the file is cut short, or has no row."""
        names, number, empty = list(columns or self.names), 0, True
        try:
            for number, cells in enumerate(
                self._parquet_rows(names) if self.form is None else self._csv_rows(names, self.form), 1
            ):
                if cells is not None:
                    empty = False
                    yield number, cells
        except (pa.ArrowException, OSError, EOFError, csv.Error) as error:
            raise InvalidInput(
                f"{self.path} cannot be read after row {number} ({type(error).__name__}); send the whole file again, finished rows are kept"
            ) from error
        if empty:
            raise no_rows(self.path)

    def _parquet_rows(self, names: list[str]) -> Iterator[dict[str, Any]]:
        written = [self.written[name] for name in names]
        with pa.parquet.ParquetFile(self.path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=written):
                yield from _rows_of(batch, names, written)

    def _csv_rows(self, names: list[str], form: TextForm) -> Iterator[dict[str, Any] | None]:
        """The cells of each row; None for a blank row."""
        # Arrow's CSV reader guesses types, and one of its threads may crash the process at exit
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
            raise InvalidInput(f"{path} is empty; write a header line, and a row for each capture")
        if path.suffix.lower() == ".parquet":
            return None, pa.parquet.read_schema(path)
        if path.suffix.lower() in CSV_SUFFIXES:
            refuse_other_kinds(path)
            form = text_form(path, options.encoding)
            refuse_undecodable_header(form, path)
            return form, pa.schema([(name, pa.string()) for name in header_of(path, form)])
    except FileNotFoundError:
        raise InvalidInput(f"{path} does not exist; name a Parquet or CSV manifest") from None
    except (pa.ArrowException, OSError) as error:
        raise InvalidInput(
            f"{path} is not a readable table ({type(error).__name__}); write it as Parquet or CSV"
        ) from error
    refuse_other_kinds(path)
    raise InvalidInput(f"{path} does not end like a table; name a CSV or Parquet file (.csv, .tsv, .txt, .parquet)")


def no_rows(path: Path) -> InvalidInput:
    """The error for a table that has only a header."""
    return InvalidInput(
        f"{path} has no rows below its header; write one row for each capture or person, or check the export"
    )


def refuse_other_kinds(path: Path) -> None:
    """Raises InvalidInput for a folder, and for a file whose first bytes are those of a spreadsheet program's own formats, of HTML, or of an
    image."""
    if path.is_dir():
        raise InvalidInput(
            f"{path} is a folder, but a table is wanted; name a CSV or Parquet file (`biodedup dedup FOLDER` compares the images of a folder)"
        )
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise InvalidInput(f"{path} is a workbook (.xlsx, .xls, .ods), not a CSV file; save the sheet as CSV UTF-8")
    if start.lstrip(b"\xef\xbb\xbf \r\n\t").lower().startswith((b"<html", b"<!doctype", b"<table", b"<?xml")):
        raise InvalidInput(f"{path} is an HTML or XML page, not a CSV file; export or save the table as CSV UTF-8")
    if start.startswith(_IMAGES):
        raise InvalidInput(
            f"{path} is an image, but a table is wanted; name a CSV or Parquet file whose column path names the images"
        )


def _trimmed(cell: str, column: str) -> str | None:
    """The text of a CSV cell; None if it is blank. Spaces around an id are kept, so that `fields.py` refuses it."""
    trimmed = cell.strip()
    return unescaped(cell if trimmed and column in ID_COLUMNS else trimmed) or None


def _rows_of(batch: Any, names: Sequence[str], written: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of an Arrow batch. written: the batch's names of the columns `names`."""
    columns = [values_of(batch.column(name)) for name in written]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def values_of(cells: Any) -> list[Any]:
    """The Python values of an Arrow array. Bytes that are not UTF-8 become `UNREADABLE`; a value that Python cannot represent becomes None."""
    kind = cells.type
    if pa.types.is_dictionary(kind):
        cells = cells.dictionary_decode()
        kind = cells.type
    if pa.types.is_timestamp(kind):
        cells = cells.cast(pa.timestamp("us", kind.tz), safe=False)  # Python's datetime has no nanoseconds
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
