"""`load`: adds ready templates from Parquet, Arrow or numpy files, or a stream, to a gallery without a search.

Owns the reading in bounded memory. Each batch is one durable, idempotent write named by its content, so that an interrupted load resumes when
it is started again.

A row that cannot be used is refused by itself, and reported. A subject may lack a column (null, or an empty list): it is loaded with the
columns it has.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet
import xxhash
from numpy.typing import NDArray

from biodedup.capture.minutiae_record import best_views, standard, view_of
from biodedup.config import Config
from biodedup.described import Described
from biodedup.engine import Engine
from biodedup.errors import InvalidInput, StorageUnavailable
from biodedup.jobs.manifests.captures import RefusedRow
from biodedup.jobs.manifests.check import Checked
from biodedup.jobs.manifests.fields import GROUP_COLUMNS, Unusable, groups_of, ids_of
from biodedup.jobs.manifests.options import DEFAULT_OPTIONS, TableOptions
from biodedup.jobs.manifests.tables import values_of
from biodedup.jobs.manifests.text_form import detected, open_text
from biodedup.jobs.shared.progress import Progress, silent
from biodedup.texts import KnownId
from biodedup.values import COLUMNS, Column, Refusal

BATCH_ROWS = 1 << 16
ROWS_NAMED_MAX = 20
_BAD_ID = ("subject_id is not", "subject_id was")
_KNOWN = ("subject_id", *GROUP_COLUMNS, *COLUMNS)


@dataclass(frozen=True)
class LoadResult(Described):
    """added: subjects new to the gallery; present: found there with the same templates; refused: rows left out.

    refused_rows: the first of these, by position in the source, from 0; refused_ids: the subject of each, '' where it has no usable id.
    reasons: how many were refused for each reason.
    """

    added: int
    present: int
    refused: int
    refused_rows: tuple[int, ...]
    reasons: dict[str, int] = field(default_factory=dict)
    refused_ids: tuple[str, ...] = ()


def load(
    engine: Engine,
    source: Path | Iterable[Any],
    *,
    ids: Path | None = None,
    column: str = "face",
    model_id: str | Mapping[str, str] | None = None,
    options: TableOptions = DEFAULT_OPTIONS,
    batch_rows: int = BATCH_ROWS,
    progress: Progress = silent,
) -> LoadResult:
    """Adds the subjects of a table: a string column `subject_id`, `face` (or a finger position) as a list of d
    floating-point numbers, unit length, null where a subject has none, and optionally `groups`, a list of strings, or a text, `a;b`.

    A binary column holds minutiae records of the finger that it is named by, null where a subject has none. Fingers of records
    in the column `unknown` are filed under the positions that the records state, unless the row has them already.

    source: a Parquet file, an Arrow file or stream (`-` reads a stream from standard input), an iterable of
    pyarrow.RecordBatch, or `vectors.npy`, float32 (n, d), which takes `ids` (`.npy`, or a text file with one id a line) and
    `column`. options: names of columns, and the encoding of `ids`. model_id: what made the vectors, one for all or by column; it can be left out where the gallery has a model there.
    Rows that cannot be used are refused one by one, those among them whose subject_id is enrolled with other
    templates.

    Raises InvalidInput, ModelMismatch, StorageUnavailable; batches before it are in the gallery.
    """
    batches, total = _opened(source, ids, column, options)
    batches = _read(batches, source)
    added = present = position = 0
    reasons: Counter[str] = Counter()
    refused: list[tuple[int, str]] = []
    for batch in _rechunked(batches, batch_rows):
        rows = _rows_of(batch, position, _name(source), options)
        for some in rows.alike():
            ids_kept, columns, groups = rows.at(some)
            encounter_id = _batch_id(ids_kept, columns, groups)
            loaded = engine.load_templates(
                ids_kept, columns, model_id=model_id, groups=groups, encounter_id=encounter_id
            )
            added += loaded.added
            present += loaded.present
            rows.refusals[some[list(loaded.conflicting)]] = "enrolled with other templates"
        bad = np.flatnonzero(rows.refusals != "")
        reasons.update(rows.refusals[bad].tolist())
        named = bad[: ROWS_NAMED_MAX - len(refused)]
        refused += zip((position + named).tolist(), (rows.name(i) for i in named.tolist()), strict=True)
        position += len(batch)
        progress("loading", position, max(total, position))
    try:
        engine.maintain()
    except StorageUnavailable:
        pass  # everything is durable already; the next writer merges
    places, names = (tuple(values) for values in zip(*refused, strict=True)) if refused else ((), ())
    return LoadResult(added, present, reasons.total(), places, dict(sorted(reasons.items())), names)


def accept_load(
    config: Config,
    source: Path | Iterable[Any],
    *,
    ids: Path | None = None,
    column: str = "face",
    model_id: str | Mapping[str, str] | None = None,
    options: TableOptions = DEFAULT_OPTIONS,
) -> Path | Iterable[Any]:
    """Checks the beginning of a source before a gallery is made for it, and returns what `load` is to read. Its first rows are loaded into a
    gallery that is thrown away, so that all rules of a new gallery are applied. Raises what `load` raises."""
    batches = _read(_opened(source, ids, column, options)[0], source)
    first = next(batches, None)
    if first is not None:
        rows = _rows_of(first, 0, _name(source), options)
        with tempfile.TemporaryDirectory() as folder, Engine.open(Path(folder) / "gallery", config) as engine:
            for some in rows.alike():
                ids_kept, columns, groups = rows.at(some[:1])
                engine.load_templates(ids_kept, columns, model_id=model_id, groups=groups)
    if isinstance(source, Path) and str(source) != "-":
        return source
    return batches if first is None else chain([first], batches)


def check_load(
    config: Config,
    source: Path,
    *,
    ids: Path | None = None,
    column: str = "face",
    model_id: str | Mapping[str, str] | None = None,
    options: TableOptions = DEFAULT_OPTIONS,
) -> Checked:
    """Reads a whole source as `load` does, and says which rows it would refuse. Touches no gallery. Raises what `load` raises."""
    accepted = accept_load(config, source, ids=ids, column=column, model_id=model_id, options=options)
    batches = _read(_opened(accepted, ids, column, options)[0], source)
    refused: list[RefusedRow] = []
    position = 0
    for batch in _rechunked(batches, BATCH_ROWS):
        rows = _rows_of(batch, position, _name(source), options)
        for i in np.flatnonzero(rows.refusals != "").tolist():
            refusal = Refusal("encounter", "invalid_input", str(rows.refusals[i]))
            refused.append(RefusedRow(position + i, rows.name(i) or None, refusal))
        position += len(batch)
    return Checked(str(source), position, tuple(refused))


@dataclass(frozen=True, eq=False)
class _Rows:
    """A batch of the source. subject_ids: an Arrow array; refusals: object (n,), why each row is refused, '' where it is not; vectors,
    present: column -> float32 (n, d) and bool (n,); records: column -> minutiae records, b'' where a row has none."""

    subject_ids: Any
    refusals: NDArray[Any]
    vectors: dict[str, NDArray[np.float32]]
    present: dict[str, NDArray[np.bool_]]
    records: dict[str, list[bytes]]
    groups: list[list[str]] | None

    def alike(self) -> Iterator[NDArray[np.int64]]:
        """The usable rows, those together that have embeddings in the same columns: such are added in one call."""
        kinds = np.zeros(len(self.refusals), np.int64)
        for bit, has in enumerate(self.present.values()):
            kinds |= has.astype(np.int64) << bit
        kept = np.flatnonzero(self.refusals == "")
        for kind in np.unique(kinds[kept])[::-1]:  # those with everything first
            yield kept[kinds[kept] == kind]

    def at(self, rows: NDArray[np.int64]) -> tuple[list[str], dict[str, Column], list[list[str]] | None]:
        """What `load_templates` takes of some rows that are alike."""
        columns: dict[str, Column] = {
            name: cells if len(rows) == len(cells) else cells[rows]
            for name, cells in self.vectors.items()
            if self.present[name][rows[0]]
        }
        for name, records in self.records.items():
            some = [records[i] for i in rows.tolist()]
            if any(some):
                columns[name] = some
        groups = None if self.groups is None else [self.groups[i] for i in rows.tolist()]
        return self.subject_ids.take(pa.array(rows)).to_pylist(), columns, groups

    def name(self, row: int) -> str:
        """The subject of a row, '' where it has no usable id."""
        return "" if str(self.refusals[row]).startswith(_BAD_ID) else self.subject_ids[row].as_py() or ""


def _rows_of(batch: Any, position: int, source: str, options: TableOptions) -> _Rows:
    """Raises InvalidInput where the columns are none that can be loaded."""
    batch = batch.rename_columns(options.names(batch.schema.names, source, _KNOWN))
    columns = [n for n in batch.schema.names if n in COLUMNS and not pa.types.is_null(batch.column(n).type)]
    if "subject_id" not in batch.schema.names or not columns:
        raise InvalidInput(
            f"{source} has the columns {batch.schema.names}; wanted subject_id, and at least one of {', '.join(COLUMNS)}"
        )
    options.check_columns(batch.schema.names, _KNOWN, source, carried=False)
    subject_ids, refusals = _ids(batch.column("subject_id"))
    binary = {name for name in columns if name != "face" and _is_binary(batch.column(name).type)}
    vectors, present = {}, {}
    for name in columns:
        if name not in binary:
            vectors[name], present[name] = _matrix(batch.column(name), name, position, refusals)
            _refuse_lengths(name, vectors[name], present[name], refusals)
    records = _records({name: batch.column(name).to_pylist() for name in columns if name in binary}, refusals)
    has = _any(records, len(batch)) | np.logical_or.reduce([np.zeros(len(batch), bool), *present.values()])
    refusals[(refusals == "") & ~has] = "no template"
    grouped = {name: batch.column(name) for name in GROUP_COLUMNS if name in batch.schema.names}
    groups = _groups(grouped, refusals) if grouped else None
    return _Rows(subject_ids, refusals, vectors, present, records, groups)


def _opened(
    source: Path | Iterable[Any], ids: Path | None, column: str, options: TableOptions
) -> tuple[Iterator[Any], int]:
    """(record batches, their rows in all or 0)."""
    if not isinstance(source, Path):
        return iter(source), 0
    if source.is_dir():
        raise InvalidInput(
            f"{source} is a folder that `biodedup export` did not write; name one that it did, or a file"
        )
    try:
        if str(source) == "-":
            return iter(pa.ipc.open_stream(sys.stdin.buffer)), 0
        if source.suffix == ".npy":
            return _numpy_batches(source, ids, column, options)
        if source.suffix in (".arrow", ".feather", ".ipc", ".arrows"):
            return _arrow_batches(source)
        file = pa.parquet.ParquetFile(source, pre_buffer=False)  # its buffers would be kept to the end of the file
        written = file.schema_arrow.names
        names = options.names(written, source, _KNOWN)
        if "subject_id" in names and set(names) & set(COLUMNS):  # else that is what is wrong
            options.check_columns(names, _KNOWN, source, carried=False)
        wanted = [own for own, name in zip(written, names, strict=True) if name in _KNOWN] or None
        return file.iter_batches(batch_size=BATCH_ROWS // 4, columns=wanted), file.metadata.num_rows
    except FileNotFoundError as error:
        raise InvalidInput(
            f"{error.filename or source} does not exist; name a Parquet, Arrow or npy file, or an exported folder"
        ) from None
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(
            f"{source} is not a Parquet, Arrow or npy file ({type(error).__name__}); write it with pyarrow, pandas or numpy"
        ) from error


def _read(batches: Iterator[Any], source: Path | Iterable[Any]) -> Iterator[Any]:
    """The batches; a source that breaks off is the caller's mistake."""
    try:
        yield from batches
    except (pa.ArrowException, OSError, EOFError) as error:
        raise InvalidInput(
            f"{_name(source)} breaks off ({type(error).__name__}); what came before is in the gallery, load the whole one again"
        ) from error


def _arrow_batches(source: Path) -> tuple[Iterator[Any], int]:
    mapped = pa.memory_map(str(source))
    try:
        file = pa.ipc.open_file(mapped)
    except pa.ArrowInvalid:
        mapped.seek(0)
        return iter(pa.ipc.open_stream(mapped)), 0
    return (file.get_batch(i) for i in range(file.num_record_batches)), 0


def _numpy_batches(source: Path, ids: Path | None, column: str, options: TableOptions) -> tuple[Iterator[Any], int]:
    if ids is None:
        raise InvalidInput(f"{source} holds vectors alone; name the file of their subject_ids, as ids")
    if column not in COLUMNS:
        raise InvalidInput(f"column {column!r} is not known; use one of {', '.join(COLUMNS)}")
    vectors = np.load(source, mmap_mode="r", allow_pickle=False)
    names = _loaded_ids(ids) if ids.suffix == ".npy" else _ids_of_text(ids, options)
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
        raise InvalidInput(f"{source} has shape {vectors.shape}, dtype {vectors.dtype}; wanted float32 (n, d)")
    if len(names) != len(vectors):
        raise InvalidInput(f"{ids} has shape ({len(names)},) for {len(vectors)} vectors; pass one id each")

    def batches() -> Iterator[Any]:
        for low in range(0, len(vectors), BATCH_ROWS // 4):
            rows = np.ascontiguousarray(vectors[low : low + BATCH_ROWS // 4], np.float32)
            cells = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
            labels = names[low : low + len(rows)]
            yield pa.record_batch({options.columns.get("subject_id", "subject_id"): labels, column: cells})

    return batches(), len(vectors)


def _loaded_ids(path: Path) -> Any:
    """An Arrow array of strings; bytes that are no UTF-8 come out as they are read elsewhere."""
    names = np.load(path, allow_pickle=False)
    if names.ndim != 1 or names.dtype.kind not in "USiu":
        raise InvalidInput(f"{path} has shape {names.shape}, dtype {names.dtype}; wanted (n,) strings or whole numbers")
    if names.dtype.kind == "S":
        return pa.array([name.decode("utf-8", "replace") for name in names.tolist()], pa.string())
    return pa.array(names.astype(str).tolist(), pa.string())


def _ids_of_text(path: Path, options: TableOptions) -> Any:
    """One id a line. A line that is no text in the file's encoding costs its own row."""
    with open_text(path, options.encoding or detected(path)[0]) as file:
        lines = file.read().removeprefix("\ufeff").split("\n")
    if not lines[-1].strip():
        lines.pop()
    return pa.array([line.removesuffix("\r") for line in lines], pa.string())


def _rechunked(batches: Iterator[Any], rows: int) -> Iterator[Any]:
    """Batches of exactly `rows` but the last: what a batch holds does not depend on how the source was cut."""
    held: list[Any] = []
    count = 0
    for batch in batches:
        while count + len(batch) >= rows:
            head = batch.slice(0, rows - count)
            yield pa.Table.from_batches([*held, head]).combine_chunks().to_batches()[0]
            batch, held, count = batch.slice(rows - count), [], 0
        if len(batch):
            held.append(batch)
            count += len(batch)
    if held:
        yield pa.Table.from_batches(held).combine_chunks().to_batches()[0]


def _ids(cells: Any) -> tuple[Any, NDArray[Any]]:
    """(an Arrow array of strings; object (n,): why each row is refused, '' where it is not)."""
    subject_ids, problems = ids_of(cells, "subject_id")
    refusals = np.full(len(subject_ids), "", object)
    indices = subject_ids.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
    _, first = np.unique(indices, return_index=True)
    repeated = np.ones(len(indices), bool)
    repeated[first] = False
    refusals[repeated] = "subject_id is repeated"
    refusals[problems != ""] = problems[problems != ""]
    return subject_ids, refusals


def _refuse_lengths(name: str, rows: NDArray[np.float32], present: NDArray[np.bool_], refusals: NDArray[Any]) -> None:
    """Refuses rows whose vectors are not of unit length."""
    with np.errstate(invalid="ignore", over="ignore"):
        length = np.sqrt(np.einsum("ij,ij->i", rows, rows))
        unit = np.abs(length - 1) < 0.01  # False for NaN too
    refusals[present & ~unit & (refusals == "")] = f"{name} is not a unit vector"
    refusals[present & (length == 0) & (refusals == f"{name} is not a unit vector")] = f"{name} is a vector of zeros"


def _is_binary(kind: Any) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _records(columns: dict[str, list[bytes | None]], refusals: NDArray[Any]) -> dict[str, list[bytes]]:
    """Column -> records as galleries store them, b'' where a row has none; refusals gets the rows whose records are unsound."""
    found: dict[str, list[bytes]] = {name: [b""] * len(refusals) for name in columns}
    for name in sorted(columns, key=lambda name: name == "unknown"):  # named fingers first
        for i, content in enumerate(columns[name]):
            if not content or refusals[i]:
                continue
            try:
                views = best_views(content).values() if name == "unknown" else [view_of(content, name)]
            except InvalidInput:
                refusals[i] = f"{name} is not a sound minutiae record"
                continue
            for view in views:
                cells = found.setdefault(view.position, [b""] * len(refusals))
                cells[i] = cells[i] or standard(view)
    return found


def _any(columns: dict[str, list[bytes]], rows: int) -> NDArray[np.bool_]:
    """bool (rows,): which rows have something in one of the columns."""
    return (
        np.array([any(cells) for cells in zip(*columns.values(), strict=True)], bool)
        if columns
        else np.zeros(rows, bool)
    )


def _matrix(
    cells: Any, column: str, position: int, refusals: NDArray[Any]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(float32 (n, d) of a list column, bool (n,): which rows have a vector). refusals gets rows whose vector has fewer or more numbers
    than most have."""
    kind = cells.type
    if not (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind)):
        raise InvalidInput(f"column {column} is of type {kind}; wanted a list of float32, or binary minutiae records")
    if not pa.types.is_floating(kind.value_type):
        raise InvalidInput(f"column {column} holds lists of {kind.value_type}; wanted lists of float32")
    lengths = pa.compute.fill_null(pa.compute.list_value_length(cells), 0).to_numpy(zero_copy_only=False)
    kinds, counts = np.unique(lengths[lengths > 0], return_counts=True)
    if len(kinds) > 1 and 2 * counts.max() <= counts.sum():
        raise InvalidInput(
            f"column {column} holds vectors of {kinds.tolist()} numbers (rows from {position}); one model has one dimension"
        )
    dimension = int(kinds[np.argmax(counts)]) if len(kinds) else 1
    other = (lengths > 0) & (lengths != dimension)
    refusals[other & (refusals == "")] = f"{column} has another number of numbers than {dimension}"
    present = lengths == dimension if len(kinds) else np.zeros(len(cells), bool)
    if present.all() and not cells.null_count:
        values = cells.flatten().to_numpy(zero_copy_only=False)
        return np.asarray(values.reshape(len(cells), dimension), np.float32), present
    matrix = np.full((len(cells), dimension), np.nan, np.float32)
    some = cells.filter(pa.array(present))
    matrix[present] = some.flatten().to_numpy(zero_copy_only=False).reshape(-1, dimension)
    return matrix, present


def _groups(columns: dict[str, Any], refusals: NDArray[Any]) -> list[list[str]]:
    """The groups of each row; refusals gets the rows whose groups cannot be used."""
    known: dict[str, list[str]] = {}  # most rows have the groups of others
    found: list[list[str]] = []
    for i, cells in enumerate(zip(*map(values_of, columns.values()), strict=True)):
        key = repr(cells)
        try:
            if key not in known:
                known[key] = list(groups_of([dict(zip(columns, cells, strict=True))]))
            found.append(known[key])
        except Unusable as error:
            found.append([])
            refusals[i] = refusals[i] or f"groups: {error.refusal.reason.replace('_', ' ')}"
    return found


def _batch_id(subject_ids: list[str], columns: dict[str, Column], groups: list[list[str]] | None) -> str:
    digest = xxhash.xxh3_128("\n".join(subject_ids).encode())
    for column, cells in columns.items():
        digest.update(column.encode())
        if isinstance(cells, np.ndarray):
            digest.update(np.ascontiguousarray(cells).data)
        else:
            digest.update(repr([len(record) for record in cells]).encode() + b"".join(cells))
    if groups is not None:
        digest.update(repr(groups).encode())
    return KnownId(f"load:{digest.hexdigest()}")


def _name(source: Path | Iterable[Any]) -> str:
    return str(source) if isinstance(source, Path) else "the stream"
