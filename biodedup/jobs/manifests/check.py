"""Checks an input table as its job would read it, and changes nothing: the option `--check` of the commands.

Owns the report of a check. Never opens a gallery, and never decodes a capture.
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

_ENCODINGS = {
    "utf-8": "UTF-8",
    "utf-16": "UTF-16",
    "utf-16-le": "UTF-16",
    "utf-16-be": "UTF-16",
    "utf-32": "UTF-32",
    "cp1252": "Windows-1252",
}
_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}


@dataclass(frozen=True)
class Checked(Described):
    """The report on a readable source. rows: all rows, refused rows included; columns: the library's name -> name in the file; form: encoding
    and separator of a CSV file, in words; notes: sentences about problems for which a job does not refuse a row; left_out: skipped files."""

    source: str
    rows: int
    refused: tuple[RefusedRow, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    form: str = ""
    notes: tuple[str, ...] = ()
    left_out: LeftOut = field(default_factory=LeftOut)
    counted: str = "rows"
    """What `rows` counts: `rows`, or `records` (encounters) where a record may have several rows."""

    def _left_out(self) -> LeftOut:
        return replace(self.left_out, rows=self.refused)

    def sentences(self, rows_max: int = 20) -> list[str]:
        """The report as sentences. rows_max: how many refused rows it names."""
        renamed = [f"{written} is {name}" for name, written in self.columns.items() if name != written]
        report = [f"{self.source}{f': {self.form}' if self.form else ''}"]
        report += [f"columns: {', '.join(renamed)}"] if renamed else []
        report += self._left_out().sentences(rows_max)
        report += self.notes
        counted = self.counted.removesuffix("s") if self.rows == 1 else self.counted
        return [
            *report,
            f"{self.rows:,} {counted}, {self.rows - len(self.refused):,} can be used, {len(self.refused):,} refused; nothing was changed",
        ]

    def to_dict(self) -> dict[str, Any]:
        """The report, JSON-ready."""
        facts = {"source": self.source, "rows": self.rows, "form": self.form, "columns": dict(self.columns)}
        return facts | {"notes": list(self.notes)} | self._left_out().to_dict()


def check_captures(source: Path, options: TableOptions = DEFAULT_OPTIONS, *, carried: bool = False) -> Checked:
    """Checks a folder of images, or a manifest with one row for each capture. carried: False as `dedup` reads it, True as `evaluate` does,
    which accepts further columns and tables of templates. Raises InvalidInput."""
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
    """Checks the ids of a table of templates, which `evaluate` reads."""
    if "subject_id" not in table.names:
        raise InvalidInput(f"{table.path} has the columns {table.names}; wanted subject_id and the templates")
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
    """Checks a manifest as `enroll_batch` reads it. A record counts as one row. Raises InvalidInput."""
    table = Manifest(manifest, options)
    refused: list[RefusedRow] = []
    count = unreadable_times = 0
    first_unreadable: Record | None = None
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
            unreadable_times += 1
            first_unreadable = first_unreadable or record
    notes = []
    if first_unreadable is not None:
        notes.append(
            f"captured_at is not a time in {unreadable_times:,} of {count:,} records, first in row {first_unreadable.row}; state the date format, such as "
            "--date-format %d/%m/%Y, and write a spreadsheet's day numbers as dates"
        )
    return _checked(TableFile(manifest, options), count, refused, notes, counted="records")


def accept_encounters(manifest: Path, options: TableOptions = DEFAULT_OPTIONS) -> None:
    """Raises InvalidInput if `enroll_batch` cannot read a manifest to its end."""
    Manifest(manifest, options).survey()


def check_roll(roll: Path, options: TableOptions = DEFAULT_OPTIONS) -> Checked:
    """Checks a roll (an office's list of people) as `audit` reads it. Raises InvalidInput."""
    listed = read_roll(roll, options)
    refused = [RefusedRow(line, None, Refusal("encounter", "invalid_input", why)) for line, _, why in listed.refused]
    if listed.of_captures:
        lines = zip(listed.lines.tolist(), listed.texts("path"), strict=True)
        refused += [
            bad for line, path in lines if (bad := _absent(line, None, [located(roll.parent, path)])) is not None
        ]
    return Checked(str(roll), len(listed.lines) + len(listed.refused), _in_order(refused))


def _absent(number: int, subject_id: str | None, paths: Iterable[Any]) -> RefusedRow | None:
    """The refusal of a row of which a file does not exist, or is not a regular file; None if all files are there."""
    for path in paths:
        if isinstance(path, Path) and not path.exists():
            return RefusedRow(number, subject_id, Refusal("encounter", "missing_file", f"{path} does not exist"))
        if isinstance(path, Path) and not path.is_file():
            detail = f"{path} is a folder" if path.is_dir() else f"{path} is no regular file"
            return RefusedRow(number, subject_id, Refusal("encounter", "not_a_file", detail))
    return None


def _checked(
    table: TableFile, rows: int, refused: Iterable[RefusedRow], notes: Iterable[str] = (), *, counted: str = "rows"
) -> Checked:
    form, refused, notes = "", _in_order(refused), list(notes)
    if table.form is not None:
        encoding = _ENCODINGS.get(table.form.encoding, table.form.encoding)
        guessed = " (guessed from its letters; --encoding sets another)" if table.form.guessed else ""
        form = f"{encoding}{guessed}, separated by {_SEPARATORS.get(table.form.delimiter, repr(table.form.delimiter))}"
        if table.form.titles:
            form += f"; {table.form.titles} lines before the header are skipped as titles"
        if refused:
            notes.append(f"row 1 is line {table.form.lines_before + 2} of the file, below the header")
    return Checked(str(table.path), rows, refused, table.written, form, tuple(notes), counted=counted)


def _in_order(refused: Iterable[RefusedRow]) -> tuple[RefusedRow, ...]:
    return tuple(sorted(refused, key=lambda row: row.number))
