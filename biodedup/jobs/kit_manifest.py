"""The manifest of a field kit's batch: rows of captures into planned records, and what is broken, told row by row.

Owns the reading of the table, and which files it may name. Never opens a capture.

1. A record is everything of one encounter_id or, where rows name none, of one subject_id. A mistake in one row leaves that record
   out and no other.
2. A manifest names files below its own folder alone: no absolute path, no `..`, and no symbolic link that leads out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from biodedup.capture.minutiae_layouts import is_record
from biodedup.errors import InvalidInput
from biodedup.jobs.kit_names import unusable_id
from biodedup.values import COLUMNS, Capture, Encounter, Face, Finger, Float32, Missing, check_id

TEXTS = ("subject_id", "path", "position", "dpi", "encounter_id", "captured_at", "groups", "missing")

_ROWS_MAX, _BYTES_MAX = 1_000_000, 1 << 30


@dataclass(frozen=True, eq=False)
class Planned:
    """encounter: captures are paths; encounter_id None where the manifest names none. rows: of the manifest, from 1; capture_rows: the row
    of each of the encounter's captures."""

    encounter: Encounter
    captured_at: float | None
    rows: tuple[int, ...]
    capture_rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Broken:
    """A record that cannot be packed as the manifest has it."""

    rows: tuple[int, ...]
    subject_id: str
    problem: str


@dataclass(eq=False)
class _Draft:
    subject_ids: dict[str, None] = field(default_factory=dict)
    encounter_id: str | None = None
    captures: dict[tuple[object, ...], tuple[Capture, int]] = field(default_factory=dict)
    templates: dict[str, Float32 | bytes] = field(default_factory=dict)
    groups: set[str] = field(default_factory=set)
    times: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_manifest(manifest: Path, *, bytes_max: int) -> tuple[list[Planned], list[Broken]]:
    """The records of a CSV or Parquet manifest, in its order.

    Columns: subject_id; path (relative to the manifest), position (`face` where empty), dpi; or, with no path, missing: why the
    capture at this position cannot be had; encounter_id, captured_at (ISO 8601, UTC where it names no zone, or seconds), groups
    (`a;b`, or a list). Parquet may have ready templates as columns named by position: lists of float32, or minutiae records.
    Raises InvalidInput for what is no manifest at all.
    """
    table = _table(manifest)
    ready = [name for name in table.column_names if name in COLUMNS]
    absent = {"subject_id"} | (set() if ready else {"path"})
    if absent - set(table.column_names):
        raise InvalidInput(
            f"{manifest} lacks the columns {sorted(absent - set(table.column_names))}; it has {table.column_names}"
        )
    drafts: dict[tuple[str, str], _Draft] = {}
    for number, row in enumerate(table.to_pylist(), start=1):
        subject_id, encounter_id = (_text(row.get(name)) for name in ("subject_id", "encounter_id"))
        draft = drafts.setdefault(("encounter", encounter_id) if encounter_id else ("subject", subject_id), _Draft())
        draft.rows.append(number)
        draft.subject_ids[subject_id] = None
        draft.encounter_id = encounter_id or None
        try:
            _fill(draft, row, ready, manifest.parent, bytes_max)
        except InvalidInput as error:
            draft.problems.append(f"row {number}: {error}")
    if not drafts:
        raise InvalidInput(f"{manifest} has no rows; write one row a capture")
    made = [_planned(draft) for draft in drafts.values()]
    return [one for one in made if isinstance(one, Planned)], [one for one in made if isinstance(one, Broken)]


def _table(manifest: Path) -> Any:
    if not manifest.is_file():
        raise InvalidInput(f"{manifest} does not exist; name a CSV or Parquet manifest")
    try:
        if manifest.suffix == ".parquet":
            with pa.parquet.ParquetFile(manifest) as file:
                groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
                _check_size(manifest, file.metadata.num_rows, sum(group.total_byte_size for group in groups))
                return file.read()
        _check_size(manifest, 0, manifest.stat().st_size)
        # ids with leading zeros are text; a number would lose them
        options = pa.csv.ConvertOptions(column_types=dict.fromkeys(TEXTS, pa.string()), strings_can_be_null=False)
        table = pa.csv.read_csv(manifest, convert_options=options)
        _check_size(manifest, len(table), 0)
        return table
    except InvalidInput:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{manifest} is not a readable manifest ({error}); pass CSV or Parquet") from error


def _check_size(manifest: Path, rows: int, byte_count: int) -> None:
    if rows > _ROWS_MAX or byte_count > _BYTES_MAX:
        raise InvalidInput(
            f"{manifest} has {rows:,} rows, {byte_count:,} bytes; wanted at most {_ROWS_MAX:,} and {_BYTES_MAX:,}: pack several batches"
        )


def _fill(draft: _Draft, row: dict[str, Any], ready: Sequence[str], folder: Path, bytes_max: int) -> None:
    check_id(_text(row["subject_id"]), "subject_id")
    if problem := unusable_id(draft.encounter_id or ""):
        raise InvalidInput(problem)
    groups = row.get("groups") or ()
    draft.groups.update(g.strip() for g in (groups.split(";") if isinstance(groups, str) else groups) if g.strip())
    captured_at = _seconds(row.get("captured_at"))
    if captured_at is not None:
        draft.times.append(captured_at)
    position, path, reason = (_text(row.get(name)) for name in ("position", "path", "missing"))
    position = position or "face"
    for column in ready:
        if row[column] is not None:
            cell = row[column]
            if isinstance(cell, bytes) and not is_record(cell):
                raise InvalidInput(f"{column} holds {len(cell):,} bytes that are no minutiae record; leave it empty")
            draft.templates[column] = cell if isinstance(cell, bytes) else np.asarray(cell, np.float32)
    if path and reason:
        raise InvalidInput(f"it has both a path and a reason why {position} is missing; leave one of them empty")
    if reason:
        draft.captures["missing", position] = Missing(position, reason), draft.rows[-1]
    elif path:
        file = _below(folder, path)
        if file.stat().st_size > bytes_max:
            raise InvalidInput(
                f"{path} has {file.stat().st_size:,} bytes, wanted at most {bytes_max:,}; save it smaller"
            )
        dpi = _number(row.get("dpi"))
        capture = Face(file) if position == "face" else Finger(file, position, dpi)
        draft.captures.setdefault((path, position, dpi), (capture, draft.rows[-1]))
    elif not any(row[column] is not None for column in ready):
        raise InvalidInput("it has no path; name the capture's file, or say in `missing` why there is none")


def _below(folder: Path, path: str) -> Path:
    """The file of a path, links resolved. Raises InvalidInput unless it lies below the folder."""
    if "\0" in path or Path(path).is_absolute() or ".." in Path(path).parts:
        raise InvalidInput(
            f"{path!r} leads out of the manifest's folder; name files below it, by their path from there"
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
        # in the order of positions: what two kits pack of one encounter is the same, however their manifests are sorted
        captures = sorted(draft.captures.values(), key=_place)
        try:
            encounter = Encounter(
                subject_ids[0], [one for one, _ in captures], draft.templates, draft.encounter_id, sorted(draft.groups)
            )
            return Planned(encounter, min(draft.times, default=None), rows, tuple(row for _, row in captures))
        except InvalidInput as error:
            draft.problems.append(str(error))
    return Broken(rows, ", ".join(subject_ids[:3]), "; ".join(dict.fromkeys(draft.problems)))


def _place(capture: tuple[Capture, int]) -> tuple[bool, int]:
    return isinstance(capture[0], Missing), COLUMNS.index(capture[0].column)


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell).strip()


def _number(cell: Any) -> float | None:
    if _text(cell) == "":
        return None
    try:
        return float(cell)
    except (TypeError, ValueError):
        raise InvalidInput(f"dpi is {_text(cell)!r}, wanted a number; state the scanner's resolution") from None


def _seconds(cell: Any) -> float | None:
    """Seconds since 1970, None where it is empty or cannot be read: a clock's word never keeps a record out."""
    text = _text(cell)
    try:
        if isinstance(cell, datetime):
            moment = cell
        else:
            try:
                seconds = float(text)
                return seconds if math.isfinite(seconds) else None
            except ValueError:
                moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
