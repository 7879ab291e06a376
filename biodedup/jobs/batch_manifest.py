"""The manifest of a bulk enrolment: encounters from a Parquet or CSV table, one by one, in bounded memory.

Owns the two shapes of the table, the validation of each record, and the reading of what its cells point to. Never extracts or decides.

1. Whatever a row holds, it becomes a record: one that cannot be used carries its refusal. Only what is no such table raises.
2. The same manifest and files give the same records with the same digests.

A table has a row a capture (`path` or `image`, with `position` and `dpi`) or a row an encounter (`face`, `right_index`, ...: a path,
an image's or a minutiae record's bytes, or an embedding). Columns that are neither are metadata.
"""

from __future__ import annotations

import array
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from math import isfinite
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import xxhash

from biodedup.capture.reading import MAY_COME, read
from biodedup.config import CaptureConfig
from biodedup.errors import InvalidInput
from biodedup.values import COLUMNS, Face, Finger, Float32, Missing, Refusal, check_groups, check_id

Row: TypeAlias = tuple[int, Mapping[str, Any]]
"""(number in the table, from 1; cells). No cells: a line that does not fit the table's columns."""

KEYS = ("subject_id", "encounter_id", "captured_at")
_CAPTURE_COLUMNS = ("path", "image", "position", "dpi", "missing")
_GROUP_COLUMNS = ("group", "groups")
_BATCH_ROWS = 256
_UNREADABLE = "\ufffd"  # what decoding puts in place of bytes that are no UTF-8


@dataclass(frozen=True)
class Cell:
    """One capture as the table has it: a path, an image's or record's content, or an embedding."""

    column: str
    source: str | bytes | list[float] = field(repr=False)
    dpi: float | None = None


@dataclass(frozen=True)
class Record:
    """One encounter of a manifest. row: its first. encounter_id: None where the table states none. problem: why it cannot be used."""

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
    """What a record's cells point to, read. digest: SHA-256 of all that matters to a decision.

    late: a file is absent or cannot be read, and may come. Then nothing else of the record is kept: it is not decided without the file.
    """

    captures: tuple[Face | Finger, ...]
    templates: Mapping[str, Float32]
    refusals: tuple[Refusal, ...]
    digest: bytes
    byte_count: int
    late: bool = False


@dataclass(frozen=True)
class Survey:
    """A first look: how many records, and the hashes of names that several of them have."""

    count: int
    repeated: frozenset[int]


class Manifest:
    """An opened manifest. metadata: the schema of its metadata columns."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidInput where the file is no table, or has no captures in it."""
        self.path = path
        self._schema = _schema_of(path)
        names = self._schema.names
        if len(set(names)) != len(names):
            raise InvalidInput(f"{path} repeats a column name in {names}; give each column a name of its own")
        self.has_ids = "encounter_id" in names
        self.by_capture = "path" in names or "image" in names
        columns = [name for name in names if name in COLUMNS]
        if "subject_id" not in names or not (self.by_capture or columns):
            raise InvalidInput(
                f"{path} has the columns {names}; wanted subject_id and either path (a row a capture) or face, right_index, ... "
                "(a row an encounter)"
            )
        known = {*KEYS, *_GROUP_COLUMNS, *(_CAPTURE_COLUMNS if self.by_capture else COLUMNS)} - {"captured_at"}
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
            yield Record(
                rows[0][0],
                _text(cells.get("subject_id")),
                _text(cells.get("encounter_id")),
                captured_at=_moment(cells.get("captured_at")),
            )

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
                self.path.parent / cell.source if isinstance(cell.source, str) else cell.source, cell.column, limits
            )
            if isinstance(found, Refusal):
                refusals.append(found)
                add("refused", found.reason, str(cell.source) if isinstance(cell.source, str) else "")
                continue
            add("content", found)
            byte_count += len(found)
            captures.append(Face(found) if cell.column == "face" else Finger(found, cell.column, cell.dpi))
        late = [refusal for refusal in refusals if refusal.reason in MAY_COME]
        if late:
            return Content((), {}, tuple(late), digest.digest(), 0, late=True)
        return Content(tuple(captures), templates, tuple(refusals), digest.digest(), byte_count)

    def _record(self, rows: Sequence[Row]) -> Record:
        number, cells = rows[0]
        metadata = {name: cells.get(name) for name in self.metadata.names}
        try:
            if not cells:
                raise _Unusable("malformed_row", "the line has another number of fields than the header")
            subject_id = _name(cells, "subject_id")
            encounter_id = _name(cells, "encounter_id")
            record = Record(
                number, subject_id, encounter_id, captured_at=_moment(cells.get("captured_at")), metadata=metadata
            )
        except _Unusable as error:
            return Record(number, metadata=metadata, problem=error.refusal)
        try:
            if subject_id is None:
                raise _Unusable("no_subject_id", "the cell is empty")
            named = {group for _, row in rows for group in _groups_of(row)}
            found = [self._capture(row) for _, row in rows] if self.by_capture else list(self._cells(cells))
            if not found:
                raise _Unusable("no_capture", "every capture's cell is empty")
            return Record(
                number,
                subject_id,
                encounter_id,
                tuple(one for one in found if isinstance(one, Cell)),
                tuple(one for one in found if isinstance(one, Missing)),
                _checked_groups(named),
                record.captured_at,
                metadata,
            )
        except _Unusable as error:
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
        position = row.get("position")
        position = "face" if position in (None, "") else position
        if position not in COLUMNS:
            shown = repr(position)[:60] if isinstance(position, str) else type(position).__name__
            raise _Unusable("unknown_position", f"position is {shown}, wanted {', '.join(COLUMNS)}")
        image, path, reason = row.get("image"), row.get("path"), row.get("missing")
        if image in (None, b"", "") and path in (None, ""):
            if isinstance(reason, str) and reason:
                return Missing(position, reason)
            raise _Unusable("no_capture", f"{position}: neither a path nor a reason why it is missing")
        source = _typed(image, "image", bytes) if image not in (None, b"", "") else _typed(path, "path", str)
        return Cell(position, source, _dpi(row.get("dpi")))

    def _cells(self, cells: Mapping[str, Any]) -> Iterator[Cell]:
        """The captures of a row, in the shape of a row an encounter."""
        dpi = _dpi(cells.get("dpi"))
        for column in self._columns:
            cell = cells.get(column)
            if cell is None or (isinstance(cell, (str, bytes)) and not cell):
                continue
            if isinstance(cell, list):
                if not cell or not all(isinstance(number, float) for number in cell):
                    raise _Unusable("wrong_type", f"{column} is a list that is not of floating-point numbers alone")
                yield Cell(column, cell)
            else:
                yield Cell(column, _typed(cell, column, (str, bytes)), dpi)

    # rows -------------------------------------------------------------------------------------------------------

    def _groups(self, columns: list[str] | None) -> Iterator[list[Row]]:
        """The rows of each encounter."""
        rows = self._gathered(columns) if self._scattered else self._rows(columns)
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
        for row in self._rows(columns):
            order.setdefault(_key(row[1]) if row[1] else row[0], []).append(row)
        for rows in order.values():
            yield from rows

    def _rows(self, columns: list[str] | None) -> Iterator[Row]:
        malformed: list[int] = []
        number = 0
        try:
            for batch in _batches(self.path, columns, malformed):
                for cells in batch:
                    number += 1
                    while malformed and malformed[0] <= number:
                        yield malformed.pop(0), {}
                        number += 1
                    yield number, cells
        except (pa.ArrowException, OSError, EOFError) as error:
            raise InvalidInput(
                f"{self.path} breaks off behind row {number} ({type(error).__name__}); send a whole one, what is done stays done"
            ) from error
        for behind in malformed:
            yield behind, {}


class _Unusable(Exception):
    """Why a record is refused before anything of it is read."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.refusal = Refusal("encounter", reason, detail)


def name_hash(name: str) -> int:
    """64 bits of a name, by which repetitions are suspected; equal names have equal ones."""
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass"))


def name_of(record: Record) -> str:
    """What a record is known by before its content is read: its encounter_id, or else its subject."""
    return record.encounter_id or f"\0{record.subject_id}"


def derived_id(record: Record, content: Content) -> str:
    """The encounter_id of a record that states none: of its subject and its content, the same whenever it is sent."""
    return f"batch:{hashlib.sha256((record.subject_id or '').encode() + content.digest).hexdigest()[:40]}"


def _schema_of(path: Path) -> Any:
    try:
        if path.suffix == ".parquet":
            return pa.parquet.read_schema(path)
        if path.suffix == ".csv":
            with pa.csv.open_csv(path, parse_options=_dialect(path, lambda row: "skip")) as reader:
                return pa.schema([(name, pa.string()) for name in reader.schema.names])
    except FileNotFoundError:
        raise InvalidInput(f"{path} does not exist; name a Parquet or CSV manifest") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InvalidInput(
            f"{path} is not a readable table ({type(error).__name__}); write it as Parquet or CSV"
        ) from error
    raise InvalidInput(f"{path.name} is no manifest by its name; end it with .parquet or .csv")


def _batches(path: Path, columns: list[str] | None, malformed: list[int]) -> Iterator[list[dict[str, Any]]]:
    """Rows as dictionaries. malformed: gets the numbers of lines that do not fit."""
    if path.suffix == ".parquet":
        with pa.parquet.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                yield batch.to_pylist()
        return

    def skip(row: Any) -> str:
        malformed.append(row.number - 1)  # without the header
        return "skip"

    names = columns or _schema_of(path).names
    # bytes, and decoded here: types guessed would take the zeros off an id, and one line in another encoding would end it all
    reader = pa.csv.open_csv(
        path,
        read_options=pa.csv.ReadOptions(use_threads=False),
        parse_options=_dialect(path, skip),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.binary()),
            include_columns=names,
            strings_can_be_null=True,
            null_values=[""],
        ),
    )
    with reader:
        for batch in reader:
            yield [
                {name: None if cell is None else cell.decode("utf-8", "replace").strip() for name, cell in row.items()}
                for row in batch.to_pylist()
            ]


def _dialect(path: Path, skip: Callable[[Any], str]) -> Any:
    """How the file's columns are parted: whatever of comma, semicolon and tabulator the header has most of."""
    with path.open("rb") as file:
        header = file.readline(1 << 16)
    delimiter = max(",;\t", key=lambda mark: header.count(mark.encode()))
    return pa.csv.ParseOptions(delimiter=delimiter, invalid_row_handler=skip, newlines_in_values=True)


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


def _name(cells: Mapping[str, Any], column: str) -> str | None:
    cell = cells.get(column)
    if cell is None or cell == "":
        return None
    text = _text(cell)
    if text is None:
        raise _Unusable("wrong_type", f"{column} is of type {type(cell).__name__}, wanted text")
    if _UNREADABLE in text:
        raise _Unusable("not_utf8", f"{column} is not UTF-8 text")
    try:
        check_id(text, column)
    except InvalidInput as error:
        raise _Unusable("unusable_id", str(error)) from None
    return text


def _typed(cell: Any, column: str, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(cell, kind):
        raise _Unusable(
            "wrong_type", f"{column} is of type {type(cell).__name__}, wanted a path, bytes or a list of numbers"
        )
    return cell


def _dpi(cell: Any) -> float | None:
    if cell is None or cell == "":
        return None
    try:
        dpi = float(cell)
        Finger(b"", dpi=dpi)
    except (TypeError, ValueError):
        shown = repr(cell)[:40] if isinstance(cell, (str, int, float)) else type(cell).__name__
        raise _Unusable("wrong_type", f"dpi is {shown}, wanted a number from 72 to 4000") from None
    return dpi


def _groups_of(cells: Mapping[str, Any]) -> list[str]:
    named: list[str] = []
    for column in _GROUP_COLUMNS:
        cell = cells.get(column)
        if isinstance(cell, str):
            named += [part.strip() for part in cell.replace("|", ";").split(";") if part.strip()]
        elif isinstance(cell, list) and all(isinstance(part, str) for part in cell):
            named += cell
        elif isinstance(cell, int) and not isinstance(cell, bool):
            named.append(str(cell))
        elif cell is not None:
            raise _Unusable("wrong_type", f"{column} is of type {type(cell).__name__}, wanted text or a list of texts")
    return named


def _checked_groups(named: set[str]) -> tuple[str, ...]:
    try:
        return check_groups(named)
    except InvalidInput as error:
        raise _Unusable("unusable_id", str(error)) from None


def _moment(cell: Any) -> float | None:
    """Seconds since 1970 of a time, a date, a number, or ISO 8601 text; None where it is nothing of the kind. UTC where no zone is said."""
    if isinstance(cell, str):
        try:
            cell = datetime.fromisoformat(cell)
        except ValueError:
            return None
    if isinstance(cell, date) and not isinstance(cell, datetime):
        cell = datetime(cell.year, cell.month, cell.day)
    if isinstance(cell, datetime):
        return (cell if cell.tzinfo else cell.replace(tzinfo=UTC)).timestamp()
    return float(cell) if isinstance(cell, (int, float)) and isfinite(cell) else None
