"""`load`: ready templates from Parquet, Arrow or numpy files, or a stream, into a gallery, without a search.

Owns the reading in bounded memory. Each batch is one durable, idempotent write named by its content, so that a load that was
interrupted goes on where it was when it is started again.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
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
from biodedup.engine import Engine
from biodedup.errors import InvalidInput, StorageUnavailable
from biodedup.jobs.progress import Progress, silent
from biodedup.values import COLUMNS, Column

BATCH_ROWS = 1 << 16
ROWS_NAMED_MAX = 20


@dataclass(frozen=True)
class LoadResult:
    """added: subjects new to the gallery; present: found there with the same templates; refused: rows left out.

    refused_rows: the first of these, by position in the source. reasons: how many were refused for each reason.
    """

    added: int
    present: int
    refused: int
    refused_rows: tuple[int, ...]
    reasons: dict[str, int] = field(default_factory=dict)


def load(
    engine: Engine,
    source: Path | Iterable[Any],
    *,
    ids: Path | None = None,
    column: str = "face",
    model_id: str | Mapping[str, str] | None = None,
    batch_rows: int = BATCH_ROWS,
    progress: Progress = silent,
) -> LoadResult:
    """Adds the subjects of a table: a string column `subject_id`, `face` (or a finger position) as a list of d
    floating-point numbers, unit length, and optionally `groups`, a string or a list of strings.

    A binary column holds minutiae records of the finger that it is named by, null where a subject has none. Fingers of records
    in the column `unknown` are filed under the positions that the records state, unless the row has them already.

    source: a Parquet file, an Arrow file or stream (`-` reads a stream from standard input), an iterable of
    pyarrow.RecordBatch, or `vectors.npy`, float32 (n, d), which takes `ids` (`.npy`, or a text file with one id a line) and
    `column`. model_id: what made the vectors, one for all or by column; it can be left out where the gallery has a model there. Rows that cannot be used are refused one by one, those among them whose subject_id is enrolled with other
    templates.

    Raises InvalidInput, ModelMismatch, StorageUnavailable; batches before it are in the gallery.
    """
    batches, total = _opened(source, ids, column)
    batches = _read(batches, source)
    added = present = position = 0
    reasons: Counter[str] = Counter()
    refused_rows: list[int] = []
    for batch in _rechunked(batches, batch_rows):
        columns = [name for name in batch.schema.names if name in COLUMNS]
        if "subject_id" not in batch.schema.names or not columns:
            raise InvalidInput(
                f"{_name(source)} has the columns {batch.schema.names}; wanted subject_id, and at least one of "
                f"{', '.join(COLUMNS)}"
            )
        binary = {name for name in columns if name != "face" and _is_binary(batch.column(name).type)}
        vectors = {name: _matrix(batch.column(name), name, position) for name in columns if name not in binary}
        subject_ids = _strings(batch.column("subject_id"), "subject_id")
        refusals = _refusals(subject_ids, vectors)
        records = _records({name: batch.column(name).to_pylist() for name in columns if name in binary}, refusals)
        if not vectors:
            refusals[(refusals == "") & ~_any(records, len(batch))] = "no template"
        kept = np.flatnonzero(refusals == "")
        kept_ids = subject_ids.take(kept).to_pylist()
        kept_columns: dict[str, Column] = {
            **{name: rows if len(kept) == len(batch) else rows[kept] for name, rows in vectors.items()},
            **{name: [cells[i] for i in kept.tolist()] for name, cells in records.items()},
        }
        groups = None if "groups" not in batch.schema.names else _groups(batch.column("groups").take(pa.array(kept)))
        if len(kept):
            loaded = engine.load_templates(
                kept_ids,
                kept_columns,
                model_id=model_id,
                groups=groups,
                encounter_id=_batch_id(kept_ids, kept_columns, groups),
            )
            added += loaded.added
            present += loaded.present
            refusals[kept[list(loaded.conflicting)]] = "enrolled with other templates"
        bad = np.flatnonzero(refusals != "")
        reasons.update(refusals[bad].tolist())
        refused_rows += (position + bad[: ROWS_NAMED_MAX - len(refused_rows)]).tolist()
        position += len(batch)
        progress("loading", position, max(total, position))
    try:
        engine.tidy()
    except StorageUnavailable:
        pass  # everything is durable already; the next writer merges
    return LoadResult(added, present, reasons.total(), tuple(refused_rows), dict(sorted(reasons.items())))


def _opened(source: Path | Iterable[Any], ids: Path | None, column: str) -> tuple[Iterator[Any], int]:
    """(record batches, their rows in all or 0)."""
    if not isinstance(source, Path):
        return iter(source), 0
    try:
        if str(source) == "-":
            return iter(pa.ipc.open_stream(sys.stdin.buffer)), 0
        if source.suffix == ".npy":
            return _numpy_batches(source, ids, column)
        if source.suffix in (".arrow", ".feather", ".ipc", ".arrows"):
            return _arrow_batches(source)
        file = pa.parquet.ParquetFile(source, pre_buffer=False)  # its buffers would be kept to the end of the file
        wanted = [name for name in file.schema_arrow.names if name in ("subject_id", "groups", *COLUMNS)] or None
        return file.iter_batches(batch_size=BATCH_ROWS // 4, columns=wanted), file.metadata.num_rows
    except FileNotFoundError as error:
        raise InvalidInput(f"{error.filename or source} does not exist; name a Parquet, Arrow or npy file") from None
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


def _numpy_batches(source: Path, ids: Path | None, column: str) -> tuple[Iterator[Any], int]:
    if ids is None:
        raise InvalidInput(f"{source} holds vectors alone; name the file of their subject_ids, as ids")
    if column not in COLUMNS:
        raise InvalidInput(f"column {column!r} is not known; use one of {', '.join(COLUMNS)}")
    vectors = np.load(source, mmap_mode="r", allow_pickle=False)
    names = np.load(ids, mmap_mode="r", allow_pickle=False) if ids.suffix == ".npy" else None
    if names is None:
        names = np.array(ids.read_text().splitlines())
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
        raise InvalidInput(f"{source} has shape {vectors.shape}, dtype {vectors.dtype}; wanted float32 (n, d)")
    if names.shape != (len(vectors),):
        raise InvalidInput(f"{ids} has shape {names.shape} for {len(vectors)} vectors; pass one id each")

    def batches() -> Iterator[Any]:
        for low in range(0, len(vectors), BATCH_ROWS // 4):
            rows = np.ascontiguousarray(vectors[low : low + BATCH_ROWS // 4], np.float32)
            cells = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
            labels = pa.array(names[low : low + len(rows)].astype(str).tolist())
            yield pa.record_batch({"subject_id": labels, column: cells})

    return batches(), len(vectors)


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


def _refusals(subject_ids: Any, vectors: dict[str, NDArray[np.float32]]) -> NDArray[Any]:
    """object (n,): why each row is refused, '' where it is not."""
    reasons = np.full(len(subject_ids), "", object)
    encoded = subject_ids.dictionary_encode()
    indices = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    _, first = np.unique(indices, return_index=True)
    repeated = np.ones(len(indices), bool)
    repeated[first] = False
    reasons[repeated] = "subject_id is repeated"
    compute = pa.compute
    length = compute.utf8_length(subject_ids)
    usable = compute.and_(
        compute.utf8_is_printable(subject_ids),
        compute.and_(compute.greater(length, 0), compute.less_equal(length, 256)),
    )
    reasons[~usable.fill_null(False).to_numpy(zero_copy_only=False)] = "subject_id is not usable"
    for name, rows in vectors.items():
        with np.errstate(invalid="ignore", over="ignore"):
            unit = np.abs(np.sqrt(np.einsum("ij,ij->i", rows, rows)) - 1) < 0.01  # False for NaN too
        reasons[~unit] = f"{name} is not a unit vector"
    return reasons


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


def _matrix(cells: Any, column: str, position: int) -> NDArray[np.float32]:
    """float32 (n, d) of a list column; rows that are null become NaN."""
    kind = cells.type
    if not (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind)):
        raise InvalidInput(f"column {column} is of type {kind}; wanted a list of float32, or binary minutiae records")
    if not pa.types.is_floating(kind.value_type):
        raise InvalidInput(f"column {column} holds lists of {kind.value_type}; wanted lists of float32")
    lengths = set(pa.compute.list_value_length(cells).drop_null().unique().to_pylist())
    if len(lengths) > 1:
        raise InvalidInput(
            f"column {column} holds vectors of {sorted(lengths)} numbers (rows from {position}); one model has one dimension"
        )
    dimension = lengths.pop() if lengths else 1
    values = cells.flatten().to_numpy(zero_copy_only=False)
    if not cells.null_count:
        return np.asarray(values.reshape(len(cells), dimension), np.float32)
    matrix = np.full((len(cells), dimension), np.nan, np.float32)
    present = np.flatnonzero(cells.is_valid().to_numpy(zero_copy_only=False))
    matrix[present] = values.reshape(len(present), dimension)
    return matrix


def _strings(cells: Any, column: str) -> Any:
    kind = cells.type
    if pa.types.is_dictionary(kind):
        cells = cells.dictionary_decode()
    if not (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_dictionary(kind)
        or pa.types.is_integer(kind)
    ):
        raise InvalidInput(f"column {column} is of type {kind}; wanted strings")
    return cells.cast(pa.string())


def _groups(cells: Any) -> list[list[str]]:
    kind = cells.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [some or [] for some in cells.to_pylist()]
    return [[] if one is None else [one] for one in _strings(cells, "groups").to_pylist()]


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
    return f"load:{digest.hexdigest()}"


def _name(source: Path | Iterable[Any]) -> str:
    return str(source) if isinstance(source, Path) else "the stream"
