"""Checks a manifest as a job would read it, without touching anything: `--check` of the commands.

Owns the report of such a check. Never opens a gallery, and never decodes a capture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from biodedup.common.described import Described
from biodedup.errors import InvalidInput
from biodedup.jobs.manifests.captures import RESERVED, LeftOut, RefusedRow, images_of, no_images, read_rows
from biodedup.jobs.manifests.encounters import Manifest, Record
from biodedup.jobs.manifests.fields import Unusable, check_fields, id_of, located, moment_of, subject_of
from biodedup.jobs.manifests.options import DEFAULT_OPTIONS, TableOptions
from biodedup.jobs.manifests.roll import read_roll
from biodedup.jobs.manifests.tables import TableFile
from biodedup.values import COLUMNS, Refusal

_NAMES = {
    "utf-8": "UTF-8",
    "utf-16": "UTF-16",
    "utf-16-le": "UTF-16",
    "utf-16-be": "UTF-16",
    "utf-32": "UTF-32",
    "cp1252": "Windows-1252",
}
_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tabulator", "|": "vertical bar"}


@dataclass(frozen=True)
class Checked(Described):
    """A manifest that was accepted. rows: of it, those refused included; columns: our name -> its name in the file; form: encoding and separator
    of a CSV file, in words; notes: sentences about what a job does not refuse."""

    source: str
    rows: int
    refused: tuple[RefusedRow, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    form: str = ""
    notes: tuple[str, ...] = ()
    left_out: LeftOut = field(default_factory=LeftOut)

    def _left_out(self) -> LeftOut:
        return replace(self.left_out, rows=self.refused)

    def sentences(self, rows_max: int = 20) -> list[str]:
        """The sentences of a report."""
        renamed = [f"{own} is {name}" for name, own in self.columns.items() if name != own]
        told = [f"{self.source}{f': {self.form}' if self.form else ''}"]
        told += [f"columns: {', '.join(renamed)}"] if renamed else []
        told += self._left_out().sentences(rows_max)
        told += self.notes
        return [
            *told,
            f"{self.rows:,} rows, {self.rows - len(self.refused):,} can be used, {len(self.refused):,} refused; nothing was changed",
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        facts = {"source": self.source, "rows": self.rows, "form": self.form, "columns": dict(self.columns)}
        return facts | {"notes": list(self.notes)} | self._left_out().to_dict()


def check_captures(source: Path, options: TableOptions = DEFAULT_OPTIONS, *, carried: bool = False) -> Checked:
    """A folder of images, or a manifest with a row a capture, as `dedup` and `evaluate` (carried) read it. Raises InvalidInput."""
    if source.is_dir():
        images, left_out = images_of(source)
        if not images:
            raise no_images(source, left_out)
        return Checked(str(source), len(images), left_out=left_out)
    if carried and source.exists():
        table = TableFile(source, options)
        if "path" not in table.names and set(table.names) & set(COLUMNS):
            return _check_templates(table)
    rows, left_out = read_rows(source, options, carried=carried)
    refused = list(left_out.rows)
    refused += [bad for row in rows if (bad := _absent(row.number, row.subject_id, [row.capture.data])) is not None]
    return _checked(TableFile(source, options), len(rows) + len(left_out.rows), refused)


def _check_templates(table: TableFile) -> Checked:
    """A table of templates, as `evaluate` reads it: the ids of its rows."""
    if "subject_id" not in table.names:
        raise InvalidInput(f"{table.path} has the columns {table.names}; wanted subject_id beside the templates")
    table.options.check_columns(table.names, (*RESERVED, *COLUMNS), table.path, carried=True)
    refused: list[RefusedRow] = []
    count = 0
    for number, cells in table.rows([name for name in ("subject_id", "encounter_id") if name in table.names]):
        count += 1
        try:
            check_fields(cells)
            subject_of(cells), id_of(cells, "encounter_id")
        except Unusable as error:
            refused.append(RefusedRow(number, None, error.refusal))
    return _checked(table, count, refused)


def check_encounters(manifest: Path, options: TableOptions = DEFAULT_OPTIONS) -> Checked:
    """A manifest as `enroll_batch` reads it; a record counts as one row. Raises InvalidInput."""
    table = Manifest(manifest, options)
    refused: list[RefusedRow] = []
    count = clocks = 0
    first_clock: Record | None = None
    table.survey()
    for record in table.records():
        count += 1
        paths = [located(manifest.parent, cell.source) for cell in record.cells if isinstance(cell.source, str)]
        bad = _absent(record.row, record.subject_id, paths)
        if record.problem is not None:
            bad = RefusedRow(record.row, record.subject_id, record.problem)
        refused += [] if bad is None else [bad]
        stated = record.metadata.get("captured_at")
        if stated is not None and record.problem is None and moment_of(stated, options.date_format) is None:
            clocks += 1
            first_clock = first_clock or record
    notes = []
    if first_clock is not None:
        notes.append(
            f"captured_at is no time in {clocks:,} of {count:,} rows, first in row {first_clock.row}; state its form, as --date-format %d/%m/%Y, or write "
            "day numbers of a spreadsheet as dates"
        )
    return _checked(TableFile(manifest, options), count, refused, notes)


def accept_encounters(manifest: Path, options: TableOptions = DEFAULT_OPTIONS) -> None:
    """Raises InvalidInput for a manifest that `enroll_batch` cannot read to its end."""
    Manifest(manifest, options).survey()


def check_roll(roll: Path, options: TableOptions = DEFAULT_OPTIONS) -> Checked:
    """A roll as `audit` reads it. Raises InvalidInput."""
    listed = read_roll(roll, options)
    refused = [RefusedRow(line, None, Refusal("encounter", "invalid_input", why)) for line, _, why in listed.refused]
    if listed.of_captures:
        lines = zip(listed.lines.tolist(), listed.texts("path"), strict=True)
        refused += [
            bad for line, path in lines if (bad := _absent(line, None, [located(roll.parent, path)])) is not None
        ]
    return Checked(str(roll), len(listed.lines) + len(listed.refused), _in_order(refused))


def _absent(number: int, subject_id: str | None, paths: Iterable[Any]) -> RefusedRow | None:
    """A refusal for a file that is not there, or for what is no file."""
    for path in paths:
        if isinstance(path, Path) and not path.exists():
            return RefusedRow(number, subject_id, Refusal("encounter", "missing_file", f"{path} does not exist"))
        if isinstance(path, Path) and not path.is_file():
            detail = f"{path} is a folder" if path.is_dir() else f"{path} is no regular file"
            return RefusedRow(number, subject_id, Refusal("encounter", "not_a_file", detail))
    return None


def _checked(table: TableFile, rows: int, refused: Iterable[RefusedRow], notes: Iterable[str] = ()) -> Checked:
    form = ""
    if table.form is not None:
        encoding = _NAMES.get(table.form.encoding, table.form.encoding)
        guessed = " (found by its letters; --encoding names another)" if table.form.guessed else ""
        form = f"{encoding}{guessed}, separated by {_SEPARATORS.get(table.form.delimiter, repr(table.form.delimiter))}"
        if table.form.titles:
            form += f"; {table.form.titles} lines before the header are taken for titles"
    return Checked(str(table.path), rows, _in_order(refused), table.written, form, tuple(notes))


def _in_order(refused: Iterable[RefusedRow]) -> tuple[RefusedRow, ...]:
    return tuple(sorted(refused, key=lambda row: row.number))
