"""Reads the manifest of a bulk enrolment: encounters from a Parquet or CSV table, one by one, in bounded memory.

Owns the two forms of the table, the validation of each record, and the reading of the files it names. Never extracts or decides.

1. Every row becomes a record; one that cannot be used carries its refusal. Only a file that is no such table raises.
2. The same manifest and files give the same records with the same digests.

A table has one row a capture (`path` or `image`, with `position` and `dpi`) or one row an encounter (`face`, `right_index`, ...: a path, the
bytes of an image or a minutiae record, or an embedding). All other columns are metadata.
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
    """One capture of the table: a path, the content of an image or a minutiae record, or an embedding."""

    column: str
    source: str | bytes | list[float] = field(repr=False)
    dpi: float | None = None


@dataclass(frozen=True)
class Record:
    """One encounter of a manifest. row: its first row. encounter_id: None where the table has none. problem: why it cannot be used."""

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
    """The content of a record's cells. digest: SHA-256 of everything that matters to a decision.

    late: a file is absent or unreadable, and may come later. Then nothing else is kept: the record is not decided without the file.
    """

    captures: tuple[Face | Finger, ...]
    templates: Mapping[str, Float32]
    refusals: tuple[Refusal, ...]
    digest: bytes
    byte_count: int
    late: bool = False


@dataclass(frozen=True)
class Survey:
    """The number of records, and the hashes of names that several records share."""

    count: int
    repeated: frozenset[int]


class Manifest:
    """An opened manifest. metadata: the schema of its metadata columns."""

    def __init__(self, path: Path, options: TableOptions = DEFAULT_OPTIONS) -> None:
        """Raises InvalidInput where the file is no table, or has no captures in it."""
        self.path, self.options = path, options
        self._table = TableFile(path, options)
        self._schema = self._table.schema
        names = self._table.names
        self.has_ids = "encounter_id" in names
        self.by_capture = "path" in names or "image" in names
        columns = [name for name in names if name in COLUMNS]
        if "subject_id" not in names or not (self.by_capture or columns):
            raise InvalidInput(
                f"{path} has the columns {names}; wanted subject_id and either path (a row a capture) or face, right_index, ... "
                "(a row an encounter). Name them, as --column subject_id=NAME"
            )
        used = (*KEYS, *GROUP_COLUMNS, *(_CAPTURE_COLUMNS if self.by_capture else (*COLUMNS, "dpi")))
        options.check_columns(names, used, path, carried=True)
        known = {*KEYS, *GROUP_COLUMNS, *(_CAPTURE_COLUMNS if self.by_capture else COLUMNS)} - {"captured_at"}
        self.metadata = pa.schema([one for one in self._schema if one.name not in known])
        self._columns = columns
        self._scattered = False

    def survey(self) -> Survey:
        """Reads the names alone, to count the records and to find which names are repeated. Raises InvalidInput."""
        whole, names = array.array("Q"), array.array("Q")
        for rows in self._groups([name for name in KEYS if name in self._schema.names]):
            subject_id, encounter_id = (rows[0][1].get(name) for name in KEYS[:2])
            whole.append(name_hash(f"{subject_id!r} {encounter_id!r}"))
            names.append(name_hash(_text(encounter_id) or f"\0{_text(subject_id)}"))
        # a row a capture: rows of one encounter that lie apart are brought together
        self._scattered = self.by_capture and bool(_repeated(whole))
        if self._scattered:
            names = array.array("Q")
            for rows in self._groups(None):
                subject_id, encounter_id = (rows[0][1].get(name) for name in KEYS[:2])
                names.append(name_hash(_text(encounter_id) or f"\0{_text(subject_id)}"))
        return Survey(len(names), frozenset(_repeated(names)))

    def records(self) -> Iterator[Record]:
        """All records, in the table's order. Raises InvalidInput where the file breaks off."""
        for rows in self._groups(None):
            yield self._record(rows)

    def keys(self) -> Iterator[Record]:
        """Records with their names alone."""
        for rows in self._groups([name for name in KEYS if name in self._schema.names]):
            cells = rows[0][1]
            try:
                names = id_of(cells, "subject_id"), id_of(cells, "encounter_id")
                captured_at = moment_of(cells.get("captured_at"), self.options.date_format)
            except Unusable:
                continue  # it will be refused, and has no line in a queue
            yield Record(rows[0][0], *names, captured_at=captured_at)

    def read(self, record: Record, limits: CaptureConfig) -> Content:
        """Reads the files of a record that can be used; paths are relative to the manifest."""
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
            captures = [self._capture(row) for _, row in rows] if self.by_capture else list(self._cells(cells))
            if not captures:
                raise Unusable("no_capture", "every capture's cell is empty")
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

    def _capture(self, row: Mapping[str, Any]) -> Cell | Missing:
        """The capture of a row, in the shape of a row a capture."""
        capture = capture_of(row, images=True)
        if capture is None:
            raise Unusable(
                "no_capture", f"{position_of(row.get('position'))}: neither a path nor a reason why it is missing"
            )
        if isinstance(capture, Missing):
            return capture
        return Cell(capture.position, capture.source, capture.dpi)

    def _cells(self, cells: Mapping[str, Any]) -> Iterator[Cell]:
        """The captures of a row, in the shape of a row an encounter."""
        dpi = dpi_of(cells.get("dpi"))
        for column in self._columns:
            cell = cells.get(column)
            if cell is None or (isinstance(cell, (str, bytes)) and not cell):
                continue
            if isinstance(cell, list):
                if not cell or not all(isinstance(number, float) for number in cell):
                    raise Unusable("wrong_type", f"{column} is a list that is not of floating-point numbers alone")
                yield Cell(column, cell)
            else:
                yield Cell(column, cell if isinstance(cell, bytes) else path_of(cell, column) or "", dpi)

    # rows -------------------------------------------------------------------------------------------------------

    def _groups(self, columns: list[str] | None) -> Iterator[list[Row]]:
        """The rows of each encounter."""
        rows = self._gathered(columns) if self._scattered else self._table.rows(columns)
        held: list[Row] = []
        name: object = None
        for row in rows:
            same = self.by_capture and bool(held) and bool(row[1]) and _key(row[1]) == name
            if held and not same:
                yield held
                held = []
            held.append(row)
            # a row without a subject is a record by itself
            name = _key(row[1]) if row[1] and row[1].get("subject_id") not in (None, "") else object()
        if held:
            yield held

    def _gathered(self, columns: list[str] | None) -> Iterator[Row]:
        """The rows, those of an encounter together, in the order in which encounters begin; all in memory."""
        order: dict[object, list[Row]] = {}
        for row in self._table.rows(columns):
            order.setdefault(_key(row[1]) if row[1] else row[0], []).append(row)
        for rows in order.values():
            yield from rows


def name_hash(name: str) -> int:
    """A 64-bit hash of a name, to find candidates for repetition."""
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass"))


def name_of(record: Record) -> str:
    """The name of a record before its content is read: its encounter_id, or else its subject."""
    return record.encounter_id or f"\0{record.subject_id}"


def derived_id(record: Record, content: Content) -> str:
    """The encounter_id of a record that states none: of its subject and its content, the same whenever it is sent."""
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
    """An identifier as text; None where it is absent or nothing of the kind."""
    if isinstance(cell, int) and not isinstance(cell, bool):
        return str(cell)
    return cell if isinstance(cell, str) and cell else None
