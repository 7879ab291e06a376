"""Reads templates of many subjects from one Arrow record batch, column by column, and states the reason for each refused row.

Owns the columns of such a batch (docs/reference/schemas.md, "Templates in Arrow") and the checks of its rows. Never uses a gallery, and
never stores.

1. An unusable row is refused with a reason, and the other rows are read. An unreadable column raises InvalidInput for the whole batch.
2. Cells are not Python objects: the vectors of a column are one array, and its minutiae records are two arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from biodedup.capture.minutiae.batch import standard_records
from biodedup.capture.minutiae.record import best_views, standard
from biodedup.common import quality as quality_scale
from biodedup.engine.arrow.ids import ids_of
from biodedup.errors import InvalidInput
from biodedup.gallery.files.packed import Packed, empties, from_whole, pack, to_arrays
from biodedup.gallery.segments.new_cells import NewCells
from biodedup.values import COLUMNS, Float32, check_groups, check_id

MINUTIAE, QUALITY = "_minutiae", "_quality"
"""Suffixes of the columns that accompany a column of vectors."""
EXPORTED = ("row", "state", "encounter_id", "presence", "again")
"""Columns of an export that do not describe templates. Only `state` is read: a row of an open case is refused."""
KNOWN = (
    "subject_id",
    "groups",
    *EXPORTED,
    *COLUMNS,
    *(f"{column}{suffix}" for column in COLUMNS for suffix in (MINUTIAE, QUALITY) if column + suffix != "face_minutiae"),
)  # fmt: skip
_UNIT_OFF = 0.01
"""The largest deviation of a vector's length from 1. The vector is then scaled to length 1."""

Refusals = NDArray[np.object_]


@dataclass(frozen=True, eq=False)
class ReadTemplates:
    """The templates of a batch. subject_ids: Arrow strings; refusals: object (n,), why each row is refused, '' for a usable row; cells:
    column -> templates of the usable rows, with the model_id '' if the batch states none; groups: the groups of each row, None if the batch
    has no such column."""

    subject_ids: Any
    refusals: Refusals
    cells: dict[str, NewCells]
    groups: list[tuple[str, ...]] | None


@dataclass(eq=False)
class _Column:
    """The content of one column. has: bool (n,), whether each row has a template; vectors, minutiae, quality: one for each row; refusals:
    object (n,), the reasons in this column only."""

    model_id: str
    has: NDArray[np.bool_]
    vectors: Float32 | None
    minutiae: Packed
    quality: Float32
    refusals: Refusals


def one_batch(table: Any) -> Any:
    """Returns a record batch of all rows of a batch or of a table."""
    if isinstance(table, pa.RecordBatch):
        return table
    chunks = table.combine_chunks().to_batches()
    return chunks[0] if chunks else pa.RecordBatch.from_pylist([], schema=table.schema)


def read_templates(batch: Any, *, threads: int = 1) -> ReadTemplates:
    """Reads a batch. batch: pyarrow.RecordBatch. threads: the number of reading threads. Raises InvalidInput for an unreadable column."""
    names = batch.schema.names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidInput(f"the batch has {', '.join(twice)} twice; leave one of them out")
    stray = [name for name in names if name not in KNOWN]
    present = [c for c in COLUMNS if {c, c + MINUTIAE} & {n for n in names if not _is_null(batch, n)}]
    if "subject_id" not in names or not present or stray:
        raise InvalidInput(
            f"the batch has the columns {names}; wanted subject_id, at least one of {', '.join(COLUMNS)}, and beside them only "
            "groups, COLUMN_minutiae and COLUMN_quality"
        )
    lonely = [c for c in COLUMNS if c not in present and c + QUALITY in names and not _is_null(batch, c + QUALITY)]
    if lonely:
        raise InvalidInput(f"the batch has {lonely[0]}{QUALITY} without {lonely[0]}; add the templates")
    subject_ids, refusals = _ids(batch.column("subject_id"))
    if "state" in names:
        waits = np.asarray(pc.fill_null(pc.equal(batch.column("state"), "waiting"), False).to_numpy(False), bool)
        refusals[waits & (refusals == "")] = "state is waiting: it is of a case, and not enrolled"
    groups = _groups(batch.column("groups"), refusals) if "groups" in names else None
    filed = _filed(batch, refusals)
    named = [
        name for name in COLUMNS if (name in present and not _holds_records(batch, name, "unknown")) or name in filed
    ]
    columns = dict(zip(named, _each(lambda name: _read(batch, name, filed.get(name)), named, threads), strict=True))
    for column in columns.values():
        _refuse(refusals, column.refusals != "", column.refusals)
    any_template = np.logical_or.reduce([np.zeros(len(batch), bool), *(column.has for column in columns.values())])
    _refuse(refusals, ~any_template, "no template")
    kept = refusals == ""
    cells = {name: _cells(column, kept) for name, column in columns.items()}
    return ReadTemplates(subject_ids, refusals, {name: some for name, some in cells.items() if some.count}, groups)


def _each(work: Callable[[str], _Column], names: list[str], threads: int) -> list[_Column]:
    if threads == 1 or len(names) == 1:
        return [work(name) for name in names]
    with ThreadPoolExecutor(threads, "biodedup-read") as pool:
        return list(pool.map(work, names))


def _refuse(refusals: Refusals, rows: NDArray[np.bool_], reason: str | Refusals) -> None:
    """Refuses these rows for a reason. A row that already has a reason keeps it."""
    rows = rows & (refusals == "")
    refusals[rows] = reason[rows] if isinstance(reason, np.ndarray) else reason


def _is_null(batch: Any, name: str) -> bool:
    return bool(pa.types.is_null(batch.column(name).type))


def is_binary(kind: Any) -> bool:
    """Whether an Arrow type holds byte strings."""
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _holds_records(batch: Any, name: str, *of: str) -> bool:
    """Whether the column `name` is in `of` and in the batch, and holds minutiae records without vectors."""
    return name in of and name in batch.schema.names and is_binary(batch.column(name).type)


def _ids(cells: Any) -> tuple[Any, Refusals]:
    """Returns (the subject_ids, an Arrow array of strings; object (n,): why each row is refused, '' for a usable row)."""
    subject_ids, problems = ids_of(cells, "subject_id")
    refusals = np.full(len(subject_ids), "", object)
    indices = subject_ids.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
    _, first = np.unique(indices, return_index=True)
    repeated = np.ones(len(indices), bool)
    repeated[first] = False
    refusals[repeated] = "subject_id is repeated"
    refusals[problems != ""] = problems[problems != ""]
    return subject_ids, refusals


def _groups(cells: Any, refusals: Refusals) -> list[tuple[str, ...]]:
    if not (pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type) or pa.types.is_null(cells.type)):
        raise InvalidInput(f"column groups is of type {cells.type}; wanted a list of strings")
    known: dict[tuple[Any, ...], tuple[str, ...] | None] = {(): ()}  # many rows have equal groups
    rows: list[tuple[str, ...]] = []
    for i, names in enumerate(cells.to_pylist()):
        key = tuple(names or ())
        if key not in known:
            try:
                known[key] = check_groups(key)
            except InvalidInput:
                known[key] = None
        groups = known[key]
        if groups is None:
            refusals[i] = refusals[i] or "groups: unusable id"
        rows.append(groups or ())
    return rows


# a column -----------------------------------------------------------------------------------------------------------


def _read(batch: Any, name: str, filed: Packed | None) -> _Column:
    """Reads a column with its minutiae and qualities. filed: for each row, the record of the column `unknown` that states this position."""
    count, names = len(batch), batch.schema.names
    refusals = np.full(count, "", object)
    fields = [n for n in (name, name + MINUTIAE) if n in names and not _is_null(batch, n)]
    records_only = not fields or fields == [name + MINUTIAE] or is_binary(batch.column(name).type)
    if records_only and name == "face":
        raise InvalidInput("column face holds minutiae records; wanted a list of float32")
    if records_only and len(fields) == 2:
        raise InvalidInput(f"{name} and {name}{MINUTIAE} both hold records; leave one of them out")
    vectors, has = None, np.zeros(count, bool)
    if not records_only:
        vectors, has = _vectors(batch.column(name), name, refusals)
    of_records = [n for n in fields if (n != name or records_only) and not (filed is not None and n == "unknown")]
    records, recorded = _records(batch.column(of_records[0]) if of_records else None, name, filed, count, refusals)
    if vectors is None:
        has = recorded
    else:
        _refuse(refusals, recorded & ~has, f"{name} has minutiae and no vector")
    quality = np.full(count, np.nan, np.float32)
    if name + QUALITY in names and not _is_null(batch, name + QUALITY):
        quality = _qualities(batch.column(name + QUALITY), name, has, refusals)
    return _Column(_model_of(batch, fields), has, vectors, records, quality, refusals)


def _cells(column: _Column, kept: NDArray[np.bool_]) -> NewCells:
    positions = np.flatnonzero(column.has & kept)
    whole = len(positions) == len(kept)
    return NewCells(
        column.model_id,
        positions,
        column.vectors if column.vectors is None or whole else column.vectors[positions],
        column.minutiae if whole else column.minutiae.take(pa.array(positions)),
        column.quality if whole else column.quality[positions],
    )


def _model_of(batch: Any, fields: list[str]) -> str:
    """Returns the model_id in the metadata of the columns, '' if there is none. Raises InvalidInput if they state two models."""
    stated = {(batch.schema.field(name).metadata or {}).get(b"model_id", b"") for name in fields} - {b""}
    if len(stated) > 1:
        raise InvalidInput(f"{' and '.join(fields)} state different models; one column is of one model")
    model_id = stated.pop().decode("utf-8", "replace") if stated else ""
    if model_id:
        check_id(model_id, f"the model_id of {fields[0]}")
    return model_id


def _vectors(cells: Any, name: str, refusals: Refusals) -> tuple[Float32, NDArray[np.bool_]]:
    """Returns (the vectors, float32 (n, d), unit rows, zeros for a row without a vector; bool (n,): whether each row has a vector)."""
    kind = cells.type
    if not (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind)):
        raise InvalidInput(f"column {name} is of type {kind}; wanted a list of float32, or binary minutiae records")
    if not pa.types.is_floating(kind.value_type):
        raise InvalidInput(f"column {name} holds lists of {kind.value_type}; wanted lists of float32")
    lengths = pc.fill_null(pc.list_value_length(cells), 0).to_numpy(zero_copy_only=False)
    kinds, counts = np.unique(lengths[lengths > 0], return_counts=True)
    if len(kinds) > 1 and 2 * counts.max() <= counts.sum():
        raise InvalidInput(f"column {name} holds vectors of {kinds.tolist()} numbers; one model has one dimension")
    if not len(kinds):
        return np.zeros((len(cells), 1), np.float32), np.zeros(len(cells), bool)
    dimension = int(kinds[np.argmax(counts)])
    has = lengths == dimension
    _refuse(refusals, (lengths > 0) & ~has, f"{name} has another number of numbers than {dimension}")
    some = cells if has.all() and not cells.null_count else cells.filter(pa.array(has))
    rows = np.asarray(some.flatten().to_numpy(zero_copy_only=False).reshape(-1, dimension), np.float32)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        norms = np.linalg.norm(rows, axis=1)
        unit = np.abs(norms - 1) <= _UNIT_OFF  # False for NaN, too
        rows = rows / norms[:, None]
    at = np.flatnonzero(has)
    reasons = np.where(norms == 0, f"{name} is a vector of zeros", f"{name} is not a unit vector").astype(object)
    odd = np.zeros(len(cells), bool)
    odd[at[~unit]] = True
    if odd.any():
        spread = np.full(len(cells), "", object)
        spread[at] = reasons
        _refuse(refusals, odd, spread)
    if len(rows) == len(cells):
        return rows, has
    matrix = np.zeros((len(cells), dimension), np.float32)
    matrix[at] = rows
    return matrix, has


def _records(
    cells: Any | None, name: str, filed: Packed | None, count: int, refusals: Refusals
) -> tuple[Packed, NDArray[np.bool_]]:
    """Returns (a record for each row, in the gallery's format, empty for none; bool (n,): whether each row has a record)."""
    if cells is not None and not is_binary(cells.type):
        raise InvalidInput(f"column {name}{MINUTIAE} is of type {cells.type}; wanted binary minutiae records")
    records, has = empties(count), np.zeros(count, bool)
    if cells is not None:
        given = pc.fill_null(cells.cast(pa.large_binary()), b"")
        offsets, data, bad = standard_records(*to_arrays(given), name)
        _refuse(refusals, bad, f"{name} is not a sound minutiae record")
        records, has = from_whole(offsets, data), np.diff(offsets) > 0
    if filed is not None:
        records = pc.if_else(pa.array(has), records, filed)
        has = has | (np.diff(to_arrays(filed)[0]) > 0)
    return records, has


def _qualities(cells: Any, name: str, has: NDArray[np.bool_], refusals: Refusals) -> Float32:
    """Returns the qualities, float32 (n,), on the scale of the gallery's files; NaN for none."""
    if not (pa.types.is_floating(cells.type) or pa.types.is_integer(cells.type)):
        raise InvalidInput(f"column {name}{QUALITY} is of type {cells.type}; wanted float32")
    values = pc.fill_null(cells.cast(pa.float32()), np.nan).to_numpy(zero_copy_only=False)
    top = 1.0 if name == "face" else quality_scale.SCORE_MAX
    _refuse(refusals, np.isinf(values), f"{name}{QUALITY} is not a finite number")
    _refuse(refusals, np.isfinite(values) & ~((values >= 0) & (values <= top)), f"{name}{QUALITY} is not from 0 to 1")
    _refuse(refusals, ~np.isnan(values) & ~has, f"{name}{QUALITY} is stated without a template")
    return quality_scale.each_of_table(name, values)


def _filed(batch: Any, refusals: Refusals) -> dict[str, Packed]:
    """Sorts the records of the binary column `unknown` by the positions that they state. Returns position -> a record for each row. The
    records are read one by one, because a record may hold several fingers."""
    if not _holds_records(batch, "unknown", "unknown"):
        return {}
    filed: dict[str, list[bytes]] = {}
    for i, content in enumerate(batch.column("unknown").to_pylist()):
        if not content or refusals[i]:
            continue
        try:
            views = best_views(content).values()
        except InvalidInput:
            refusals[i] = "unknown is not a sound minutiae record"
            continue
        for view in views:
            filed.setdefault(view.position, [b""] * len(batch))[i] = standard(view)
    return {name: pack(records) for name, records in filed.items()}
