"""Reads the manifest of a field kit's batch: turns its rows into planned records, and reports mistakes by row.

Owns the reading of the table, and the rule which files it may name. `manifests/fields.py` parses the cells. Never opens a capture.

1. A record has all rows with the same encounter_id; or, without encounter_ids, with the same subject_id. A mistake in a row excludes only its
   record.
2. A manifest may only name files below its own folder: no absolute path, no `..`, and no symbolic link that leads out of the folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from biodedup.capture.minutiae.layouts import is_record
from biodedup.config import Config
from biodedup.errors import InvalidInput
from biodedup.jobs.kits.names import unusable_id
from biodedup.jobs.manifests.captures import RefusedRow
from biodedup.jobs.manifests.check import Checked
from biodedup.jobs.manifests.fields import (
    Unusable,
    capture_of,
    check_fields,
    groups_of,
    id_of,
    moment_of,
    subject_of,
)
from biodedup.jobs.manifests.options import DEFAULT_OPTIONS, TableOptions
from biodedup.jobs.manifests.tables import TableFile
from biodedup.values import COLUMNS, Capture, Encounter, Float32, Missing, Refusal

_USED = ("subject_id", "encounter_id", "captured_at", "path", "position", "dpi", "missing", "group", "groups", *COLUMNS)
_ROWS_MAX, _BYTES_MAX = 1_000_000, 1 << 30


@dataclass(frozen=True, eq=False)
class Planned:
    """A record to be packed. encounter: its captures are paths; its encounter_id is None if the manifest states none. rows: its rows in the
    manifest, from 1; capture_rows: the row of each capture."""

    encounter: Encounter
    captured_at: float | None
    rows: tuple[int, ...]
    capture_rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Broken:
    """A record that cannot be packed."""

    rows: tuple[int, ...]
    subject_id: str
    problem: str


@dataclass(eq=False)
class _Draft:
    """The rows of a record that were read so far."""

    subject_ids: dict[str, None] = field(default_factory=dict)
    encounter_id: str | None = None
    captures: dict[tuple[object, ...], tuple[Capture, int]] = field(default_factory=dict)
    templates: dict[str, Float32 | bytes] = field(default_factory=dict)
    groups: set[str] = field(default_factory=set)
    times: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_manifest(
    manifest: Path, *, bytes_max: int, options: TableOptions = DEFAULT_OPTIONS
) -> tuple[list[Planned], list[Broken]]:
    """The records of a CSV or Parquet manifest, in order. Returns (usable records, records with mistakes).

    Columns: subject_id; path (relative to the manifest), position (empty means `face`) and dpi; or, without a path, missing: the reason why a
    capture is impossible; encounter_id; captured_at (ISO 8601 or seconds; UTC without a zone); groups (`a;b`, or a list). Parquet may have
    templates in columns named by position: lists of float32, or minutiae records. Raises InvalidInput if the file is not a manifest.
    """
    _check_size(manifest, 0)
    table = TableFile(manifest, options)
    ready = [name for name in table.names if name in COLUMNS]
    absent = {"subject_id"} | (set() if ready else {"path"})
    if absent - set(table.names):
        raise InvalidInput(f"{manifest} lacks the columns {sorted(absent - set(table.names))}; it has {table.names}")
    options.check_columns(
        table.names, _USED if ready else [n for n in _USED if n not in COLUMNS], manifest, carried=False
    )
    drafts: dict[tuple[str, str], _Draft] = {}
    for number, row in table.rows():
        if number > _ROWS_MAX:
            _check_size(manifest, number)
        try:
            check_fields(row)
        except Unusable as error:
            problem = f"row {number}: {error.refusal.detail}"
            drafts["row", str(number)] = _Draft({"": None}, rows=[number], problems=[problem])
            continue
        subject_id, encounter_id = (_text(row.get(name)) for name in ("subject_id", "encounter_id"))
        draft = drafts.setdefault(("encounter", encounter_id) if encounter_id else ("subject", subject_id), _Draft())
        draft.rows.append(number)
        draft.subject_ids[subject_id] = None
        draft.encounter_id = encounter_id or None
        try:
            _fill(draft, row, ready, manifest.parent, bytes_max, options.date_format)
        except Unusable as error:
            draft.problems.append(f"row {number}: {error.refusal.detail}")
        except InvalidInput as error:
            draft.problems.append(f"row {number}: {error}")
    records = [_planned(draft) for draft in drafts.values()]
    return (
        [record for record in records if isinstance(record, Planned)],
        [record for record in records if isinstance(record, Broken)],
    )


def check_kit_manifest(manifest: Path, config: Config, options: TableOptions = DEFAULT_OPTIONS) -> Checked:
    """Checks a manifest as `pack_batch` reads it. A record counts as one row. Changes nothing. Raises InvalidInput."""
    planned, broken = read_manifest(manifest, bytes_max=config.capture.bytes_max, options=options)
    refused = [
        RefusedRow(record.rows[0], record.subject_id or None, Refusal("encounter", "invalid_input", record.problem))
        for record in broken
    ]
    return Checked(str(manifest), len(planned) + len(broken), tuple(refused))


def _check_size(manifest: Path, rows: int) -> None:
    byte_count = manifest.stat().st_size if manifest.is_file() else 0
    if rows > _ROWS_MAX or byte_count > _BYTES_MAX:
        raise InvalidInput(
            f"{manifest} has {rows:,} rows or more, {byte_count:,} bytes; wanted at most {_ROWS_MAX:,} and {_BYTES_MAX:,}: pack several "
            "batches"
        )


def _fill(
    draft: _Draft, row: Mapping[str, Any], ready: Sequence[str], folder: Path, bytes_max: int, date_format: str | None
) -> None:
    subject_of(row), id_of(row, "encounter_id")  # raise Unusable for wrong ids
    if problem := unusable_id(draft.encounter_id or ""):
        raise InvalidInput(problem)
    draft.groups.update(groups_of([row]))
    captured_at = moment_of(row.get("captured_at"), date_format)
    if captured_at is not None:
        draft.times.append(captured_at)
    capture = capture_of(row)
    for column in ready:
        if row[column] is not None:
            cell = row[column]
            if isinstance(cell, bytes) and not is_record(cell):
                raise InvalidInput(f"{column} holds {len(cell):,} bytes that are no minutiae record; leave it empty")
            draft.templates[column] = cell if isinstance(cell, bytes) else np.asarray(cell, np.float32)
    if isinstance(capture, Missing):
        draft.captures["missing", capture.position] = capture, draft.rows[-1]
    elif capture is not None:
        path = str(capture.source)
        file = _below(folder, path)
        if file.stat().st_size > bytes_max:
            raise InvalidInput(
                f"{path} has {file.stat().st_size:,} bytes, wanted at most {bytes_max:,}; save it smaller"
            )
        draft.captures.setdefault((path, capture.position, capture.dpi), (capture.capture(file), draft.rows[-1]))
    elif not any(row[column] is not None for column in ready):
        raise InvalidInput("it has no path; name the capture's file, or state in `missing` why there is none")


def _below(folder: Path, path: str) -> Path:
    """The file of a path, with links resolved. Raises InvalidInput if it is not below the folder."""
    if "\0" in path or Path(path).is_absolute() or ".." in Path(path).parts:
        raise InvalidInput(
            f"{path!r} leads out of the manifest's folder; name files below that folder, by relative paths"
        )
    try:
        file = (folder / path).resolve()
        inside = file.is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a circle
        file, inside = folder / path, False
    if not inside:
        raise InvalidInput(f"{path} is a link that leads out of the manifest's folder; put the file itself there")
    if not file.is_file():
        raise InvalidInput(f"{path} {'is not a file' if file.exists() else 'does not exist'}; correct the path")
    return file


def _planned(draft: _Draft) -> Planned | Broken:
    rows, subject_ids = tuple(draft.rows), list(draft.subject_ids)
    if len(subject_ids) > 1:
        named = " and ".join(repr(name) for name in subject_ids[:3])
        draft.problems.append(f"encounter_id {draft.encounter_id!r} is given to subjects {named}; give each its own")
    if not draft.problems:
        # sorted by position, so that the order of the manifest's rows does not change the record
        captures = sorted(draft.captures.values(), key=_position_order)
        try:
            encounter = Encounter(
                subject_ids[0],
                [capture for capture, _ in captures],
                draft.templates,
                draft.encounter_id,
                sorted(draft.groups),
            )
            return Planned(encounter, min(draft.times, default=None), rows, tuple(row for _, row in captures))
        except InvalidInput as error:
            draft.problems.append(str(error))
    return Broken(rows, ", ".join(subject_ids[:3]), "; ".join(dict.fromkeys(draft.problems)))


def _position_order(capture: tuple[Capture, int]) -> tuple[bool, int]:
    return isinstance(capture[0], Missing), COLUMNS.index(capture[0].column)


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell)
