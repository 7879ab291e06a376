"""Reads the manifest of a bulk enrolment: a Parquet or CSV table of encounters, which are read one by one in bounded memory.

Owns the two forms of the table, the validation of each record, and the reading of the named files. Never extracts templates or decides.

A table has one row for each capture (`path` or `image`, with `position` and `dpi`), or one row for each encounter (`face`, `right_index`, ...:
a path, the bytes of an image or a minutiae record, or an embedding). All other columns are metadata.

1. Every row belongs to a record. A record that cannot be used carries its refusal. Only a file that is not such a table raises.
2. The same manifest and files give the same records with the same digests.
"""

from __future__ import annotations

import array
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from biodedup.capture.pictures.containers import opened
from biodedup.capture.reading import MAY_COME, read
from biodedup.config import CaptureConfig
from biodedup.errors import InvalidInput
from biodedup.jobs.manifests.fields import (
    GROUP_COLUMNS,
    Unusable,
    capture_of,
    check_fields,
    dpi_of,
    groups_of,
    id_of,
    located,
    moment_of,
    path_of,
    position_of,
    subject_of,
)
from biodedup.jobs.manifests.options import DEFAULT_OPTIONS, TableOptions
from biodedup.jobs.manifests.tables import Row, TableFile
from biodedup.texts import KnownId
from biodedup.values import CAPTURES_MAX, COLUMNS, Face, Finger, Float32, Missing, Refusal

KEYS = ("subject_id", "encounter_id", "captured_at")
_CAPTURE_COLUMNS = ("path", "image", "position", "dpi", "missing")


@dataclass(frozen=True)
class Cell:
    """One capture of the table. source: a path, the content of an image or a minutiae record, or an embedding."""

    column: str
    source: str | bytes | list[float] = field(repr=False)
    dpi: float | None = None


@dataclass(frozen=True)
class Record:
    """One encounter of a manifest. row: number of its first row; encounter_id: None if the table states none; problem: the refusal of a record
    that cannot be used."""

    row: int
    subject_id: str | None = None
    encounter_id: str | None = None
    cells: tuple[Cell, ...] = ()
    missing: tuple[Missing, ...] = ()
    groups: tuple[str, ...] = ()
    captured_at: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    problem: Refusal | None = None


@dataclass(frozen=True, eq=False)
class Content:
    """The content of a record's cells. digest: SHA-256 of everything that a decision depends on.

    late: a file is absent or unreadable, and may arrive later. Then only the refusals and the digest are set: the record is not decided without
    the file.
    """

    captures: tuple[Face | Finger, ...]
    templates: Mapping[str, Float32]
    refusals: tuple[Refusal, ...]
    digest: bytes
    byte_count: int
    late: bool = False


@dataclass(frozen=True)
class Survey:
    """The number of records of a manifest, and the hashes (`name_hash`) of names that several records share."""

    count: int
    repeated: frozenset[int]


class Manifest:
    """An opened manifest. by_capture: it has one row for each capture; metadata: the schema of its metadata columns."""

    def __init__(self, path: Path, options: TableOptions = DEFAULT_OPTIONS) -> None:
        """Raises InvalidInput if the file is not a table, or has no column of captures."""
        self.path, self.options = path, options
        self._table = TableFile(path, options)
        self._schema = self._table.schema
        names = self._table.names
        self.has_ids = "encounter_id" in names
        self.by_capture = "path" in names or "image" in names
        columns = [name for name in names if name in COLUMNS]
        if "subject_id" not in names or not (self.by_capture or columns):
            raise InvalidInput(
                f"{path} has the columns {names}; wanted subject_id and either path (one row for each capture) or face, right_index, ... "
                "(one row for each encounter). Map each to its name in the file: --column subject_id=NAME"
            )
        used = (*KEYS, *GROUP_COLUMNS, *(_CAPTURE_COLUMNS if self.by_capture else (*COLUMNS, "dpi")))
        options.check_columns(names, used, path, carried=True)
        known = {*KEYS, *GROUP_COLUMNS, *(_CAPTURE_COLUMNS if self.by_capture else COLUMNS)} - {"captured_at"}
        self.metadata = pa.schema([column for column in self._schema if column.name not in known])
        self._columns = columns
        self._scattered = False

    def survey(self) -> Survey:
        """Counts the records and finds repeated names. Reads only the columns `KEYS`. Raises InvalidInput."""
        whole, names = array.array("Q"), array.array("Q")
        for rows in self._groups([name for name in KEYS if name in self._schema.names]):
            subject_id, encounter_id = (rows[0][1].get(name) for name in KEYS[:2])
            whole.append(name_hash(f"{subject_id!r} {encounter_id!r}"))
            names.append(name_hash(_text(encounter_id) or f"\0{_text(subject_id)}"))
        # with one row for each capture, the rows of an encounter may be scattered over the table: `_gathered` joins them
        self._scattered = self.by_capture and bool(_repeated(whole))
        if self._scattered:
            names = array.array("Q")
            for rows in self._groups(None):
                subject_id, encounter_id = (rows[0][1].get(name) for name in KEYS[:2])
                names.append(name_hash(_text(encounter_id) or f"\0{_text(subject_id)}"))
        return Survey(len(names), frozenset(_repeated(names)))

    def records(self) -> Iterator[Record]:
        """All records, in the table's order. Raises InvalidInput if the file is cut short."""
        for rows in self._groups(None):
            yield self._record(rows)

    def keys(self) -> Iterator[Record]:
        """All records with usable ids, with only their ids and times."""
        for rows in self._groups([name for name in KEYS if name in self._schema.names]):
            cells = rows[0][1]
            try:
                names = id_of(cells, "subject_id"), id_of(cells, "encounter_id")
                captured_at = moment_of(cells.get("captured_at"), self.options.date_format)
            except Unusable:
                continue  # the record will be refused, and is not listed in the queue
            yield Record(rows[0][0], *names, captured_at=captured_at)

    def read(self, record: Record, limits: CaptureConfig) -> Content:
        """Reads the files of a usable record. Paths are relative to the manifest."""
        digest = hashlib.sha256()
        captures: list[Face | Finger] = []
        templates: dict[str, Float32] = {}
        refusals: list[Refusal] = []
        byte_count = 0

        def add(*parts: str | bytes) -> None:
            for part in parts:
                content = part.encode() if isinstance(part, str) else part
                digest.update(len(content).to_bytes(8, "little") + content)

        add(record.subject_id or "", repr(record.groups))
        for missing in record.missing:
            add("missing", missing.position, missing.reason)
        for cell in record.cells:
            add(cell.column, repr(cell.dpi))
            if isinstance(cell.source, list):
                templates[cell.column] = np.asarray(cell.source, np.float32)
                add("embedding", templates[cell.column].tobytes())
                continue
            found = read(
                located(self.path.parent, cell.source) if isinstance(cell.source, str) else cell.source,
                cell.column,
                limits,
            )
            if isinstance(found, Refusal):
                refusals.append(found)
                add("refused", found.reason, str(cell.source) if isinstance(cell.source, str) else "")
                continue
            add("content", found)
            byte_count += len(found)
            capture = Face(found) if cell.column == "face" else Finger(found, cell.column, cell.dpi)
            for part in opened(capture, found):
                if isinstance(part, Refusal):
                    refusals.append(part)
                else:
                    captures.append(part)
        late = [refusal for refusal in refusals if refusal.reason in MAY_COME]
        if late:
            return Content((), {}, tuple(late), digest.digest(), 0, late=True)
        return Content(tuple(captures), templates, tuple(refusals), digest.digest(), byte_count)

    def _record(self, rows: Sequence[Row]) -> Record:
        number, cells = rows[0]
        metadata = {name: cells.get(name) for name in self.metadata.names}
        try:
            check_fields(cells)
            subject_id = id_of(cells, "subject_id")
            encounter_id = id_of(cells, "encounter_id")
            captured_at = moment_of(cells.get("captured_at"), self.options.date_format)
            record = Record(number, subject_id, encounter_id, captured_at=captured_at, metadata=metadata)
        except Unusable as error:
            return Record(number, metadata=metadata, problem=error.refusal)
        try:
            subject_id = subject_of(cells)
            groups = groups_of(row for _, row in rows)
            captures = (
                [self._capture(row, place, number) for place, row in rows]
                if self.by_capture
                else list(self._cells(cells))
            )
            if not captures:
                raise Unusable("no_capture", "all cells of captures are empty")
            if len(captures) > CAPTURES_MAX:
                raise Unusable(
                    "invalid_input", f"{len(captures):,} captures of one encounter, wanted at most {CAPTURES_MAX}"
                )
            return Record(
                number,
                subject_id,
                encounter_id,
                cells=tuple(capture for capture in captures if isinstance(capture, Cell)),
                missing=tuple(capture for capture in captures if isinstance(capture, Missing)),
                groups=groups,
                captured_at=record.captured_at,
                metadata=metadata,
            )
        except Unusable as error:
            return Record(
                number,
                subject_id,
                encounter_id,
                captured_at=record.captured_at,
                metadata=metadata,
                problem=error.refusal,
            )

    def _capture(self, row: Mapping[str, Any], place: int, first: int) -> Cell | Missing:
        """The capture of a row, in a table with one row for each capture. place: the row's number, which an error names if it is not `first`,
        the number of the record."""
        try:
            return self._capture_of(row)
        except Unusable as error:
            if place == first:
                raise
            raise Unusable(error.refusal.reason, f"row {place}: {error.refusal.detail}") from None

    def _capture_of(self, row: Mapping[str, Any]) -> Cell | Missing:
        capture = capture_of(row, images=True)
        if capture is None:
            raise Unusable(
                "no_capture",
                f"{position_of(row.get('position'))}: the row has neither a path nor a reason in the column missing",
            )
        if isinstance(capture, Missing):
            return capture
        return Cell(capture.position, capture.source, capture.dpi)

    def _cells(self, cells: Mapping[str, Any]) -> Iterator[Cell]:
        """The captures of a row, in a table with one row for each encounter."""
        dpi = dpi_of(cells.get("dpi"))
        for column in self._columns:
            cell = cells.get(column)
            if cell is None or (isinstance(cell, (str, bytes)) and not cell):
                continue
            if isinstance(cell, list):
                if not cell or not all(isinstance(number, float) for number in cell):
                    raise Unusable("wrong_type", f"{column} is a list; wanted only floating-point numbers in it")
                yield Cell(column, cell)
            else:
                yield Cell(column, cell if isinstance(cell, bytes) else path_of(cell, column) or "", dpi)

    # rows -------------------------------------------------------------------------------------------------------

    def _groups(self, columns: list[str] | None) -> Iterator[list[Row]]:
        """The rows of each encounter. columns: None reads all columns."""
        rows = self._gathered(columns) if self._scattered else self._table.rows(columns)
        held: list[Row] = []
        name: object = None
        for row in rows:
            same = self.by_capture and bool(held) and bool(row[1]) and _key(row[1]) == name
            if held and not same:
                yield held
                held = []
            held.append(row)
            # a row without a subject_id is a record of its own
            name = _key(row[1]) if row[1] and row[1].get("subject_id") not in (None, "") else object()
        if held:
            yield held

    def _gathered(self, columns: list[str] | None) -> Iterator[Row]:
        """All rows, grouped by encounter, in the order of each encounter's first row. Holds the table in memory."""
        order: dict[object, list[Row]] = {}
        for row in self._table.rows(columns):
            order.setdefault(_key(row[1]) if row[1] else row[0], []).append(row)
        for rows in order.values():
            yield from rows


def name_hash(name: str) -> int:
    """A 64-bit hash of a name. Equal hashes mean that a name may be repeated."""
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass"))


def name_of(record: Record) -> str:
    """The name of a record before its content is read: its encounter_id, or else its subject_id after a NUL."""
    return record.encounter_id or f"\0{record.subject_id}"


def derived_id(record: Record, content: Content) -> str:
    """An encounter_id for a record that states none: a digest of its subject and content, so that the same record always gets the same id."""
    digest = hashlib.sha256((record.subject_id or "").encode() + content.digest).hexdigest()
    return KnownId(f"batch:{digest[:40]}")


def _repeated(hashes: array.array[int]) -> set[int]:
    values, counts = np.unique(
        np.frombuffer(hashes, np.uint64) if hashes else np.zeros(0, np.uint64), return_counts=True
    )
    return set(values[counts > 1].tolist())


def _key(cells: Mapping[str, Any]) -> tuple[str, str]:
    return repr(cells.get("subject_id")), repr(cells.get("encounter_id"))


def _text(cell: Any) -> str | None:
    """An id as text; None if the cell is empty or not an id."""
    if isinstance(cell, int) and not isinstance(cell, bool):
        return str(cell)
    return cell if isinstance(cell, str) and cell else None
