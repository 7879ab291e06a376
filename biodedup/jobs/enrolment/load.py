"""`load`: adds existing templates from Parquet, Arrow or numpy files, or from a stream, to a gallery without a search.

Owns the reading in bounded memory. Never searches for duplicates, and never extracts templates.

1. Each batch is one durable, idempotent write, so that an interrupted load that is run again resumes.
2. A row that cannot be used is refused alone, and reported. A subject may lack a column (null, or an empty list).
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
from numpy.typing import NDArray

from biodedup.capture.pictures.containers import is_container
from biodedup.capture.reading import open_file
from biodedup.common.described import Described
from biodedup.config import Config
from biodedup.engine import Engine
from biodedup.engine.arrow.ids import ids_of
from biodedup.engine.arrow.templates import KNOWN, MINUTIAE, read_templates
from biodedup.errors import InvalidInput, StorageUnavailable
from biodedup.jobs.manifests.captures import RefusedRow
from biodedup.jobs.manifests.check import Checked
from biodedup.jobs.manifests.fields import GROUP_COLUMNS, Unusable, groups_of
from biodedup.jobs.manifests.options import DEFAULT_OPTIONS, TableOptions
from biodedup.jobs.manifests.tables import CSV_SUFFIXES, no_rows, refuse_other_kinds, values_of
from biodedup.jobs.manifests.text_form import detected, open_text
from biodedup.jobs.shared.progress import Progress, silent
from biodedup.values import COLUMNS, Refusal

BATCH_ROWS, BATCH_BYTES = 1 << 16, 1 << 28
"""The largest batch. A row with a face and ten fingers with minutiae has about 14 kB."""
ROWS_NAMED_MAX = 20
_BAD_ID = ("subject_id is not", "subject_id was")
_KNOWN = tuple(dict.fromkeys((*KNOWN, *GROUP_COLUMNS)))
_TEMPLATES = tuple(name for name in KNOWN if name.removesuffix(MINUTIAE) in COLUMNS)


@dataclass(frozen=True)
class LoadResult(Described):
    """The outcome of a load. added: number of subjects that were added; present: subjects that the gallery already had with the same templates;
    refused: number of refused rows.

    refused_rows: the positions in the source of the first 20 refused rows, from 0; refused_ids: their subject_ids, '' if unusable. reasons:
    reason -> number of rows.
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
    """Adds the subjects of a table to a gallery, without a search.

    The table has a string column `subject_id`, and a column `face` or columns of finger positions. Such a column holds either embeddings: lists
    of d floating-point numbers with unit length; or minutiae records (binary). A null means that the subject has no template there. Records in
    the column `unknown` are stored under the finger positions that they state, unless the row has a template there. An optional column `groups`
    holds lists of strings, or texts `a;b`.

    source: a Parquet file; an Arrow file or stream (`-` reads a stream from standard input); an iterable of pyarrow.RecordBatch; or a `.npy`
    file, float32 (n, d), which needs `ids` (`.npy`, or a text file with one id per line) and `column`. options: names of columns, and the
    encoding of `ids`. model_id: the model of the embeddings, one id for all or a mapping by column; optional if the gallery has a model for the
    column. A row that cannot be used is refused alone, also if its subject_id is enrolled with other templates.

    Raises InvalidInput, ModelMismatch, StorageUnavailable. Batches before the error stay in the gallery.
    """
    batches, total = _opened(source, ids, column, options)
    batches = _checked_batches(batches, source)
    added = present = position = 0
    reasons: Counter[str] = Counter()
    refused: list[tuple[int, str]] = []
    for batch in _rechunked(batches, batch_rows):
        rows = _prepared(batch, _name(source), options)
        loaded = engine.load_templates(rows.usable, model_id=model_id)
        added += loaded.added
        present += loaded.present
        why = rows.all_refusals(dict(loaded.refused))
        why |= {int(rows.kept[i]): "enrolled with other templates" for i in loaded.conflicting}
        reasons.update(why.values())
        for row in sorted(why)[: ROWS_NAMED_MAX - len(refused)]:
            refused.append((position + row, rows.name(row, why[row])))
        position += len(batch)
        progress("loading", position, max(total, position))
    if not position and isinstance(source, Path):
        raise no_rows(source)
    try:
        engine.maintain()
    except StorageUnavailable:
        pass  # all batches are durable; the next writer merges the segments
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
    """Checks the first batch of a source before a gallery is created for it. Returns the source that `load` then reads: a stream starts again at
    its first batch.

    The first batch is loaded into a temporary gallery, so that all rules of a new gallery are applied. Raises the errors of `load`.
    """
    batches = _checked_batches(_opened(source, ids, column, options)[0], source)
    first = next(batches, None)
    if (first is None or not len(first)) and isinstance(source, Path):
        raise no_rows(source)
    if first is not None:
        usable = _prepared(first, _name(source), options).usable
        whole = read_templates(usable)
        some = sorted({int(np.flatnonzero(whole.refusals == "")[cells.positions[0]]) for cells in whole.cells.values()})
        with tempfile.TemporaryDirectory() as folder, Engine.open(Path(folder) / "gallery", config) as engine:
            if some:
                engine.load_templates(usable.take(pa.array(some)), model_id=model_id)
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
    """Reads a whole source as `load` does, and reports the rows that `load` would refuse. Opens no gallery. Raises the errors of `load`."""
    accepted = accept_load(config, source, ids=ids, column=column, model_id=model_id, options=options)
    batches = _checked_batches(_opened(accepted, ids, column, options)[0], source)
    refused: list[RefusedRow] = []
    position = 0
    for batch in _rechunked(batches, BATCH_ROWS):
        rows = _prepared(batch, _name(source), options)
        refusals = read_templates(rows.usable, threads=config.threads).refusals
        why = rows.all_refusals({int(i): str(refusals[i]) for i in np.flatnonzero(refusals != "")})
        for row in sorted(why):
            refusal = Refusal("encounter", "invalid_input", why[row])
            refused.append(RefusedRow(position + row, rows.name(row, why[row]) or None, refusal))
        position += len(batch)
    return Checked(str(source), position, tuple(refused))


@dataclass(frozen=True, eq=False)
class _Rows:
    """A batch of the source, prepared for the engine. usable: the batch without rows whose groups are refused; kept: int64, the index in the
    batch of each usable row; refusals: index -> reason, for the other rows; subject_ids: Arrow strings, for all rows."""

    usable: Any
    kept: NDArray[np.int64]
    refusals: dict[int, str]
    subject_ids: Any

    def all_refusals(self, of_usable: Mapping[int, str]) -> dict[int, str]:
        """All refusals by index in the batch. of_usable: the refusals by index in `usable`."""
        return self.refusals | {int(self.kept[i]): reason for i, reason in of_usable.items()}

    def name(self, row: int, reason: str) -> str:
        """The subject_id of a row, '' if it is unusable."""
        return "" if reason.startswith(_BAD_ID) else self.subject_ids[row].as_py() or ""


def _prepared(batch: Any, source: str, options: TableOptions) -> _Rows:
    """Renames the columns to the library's names, and parses the groups. Raises InvalidInput if the columns cannot be loaded."""
    batch = batch.rename_columns(options.names(batch.schema.names, source, _KNOWN))
    columns = [n for n in batch.schema.names if n in _TEMPLATES and not pa.types.is_null(batch.column(n).type)]
    if "subject_id" not in batch.schema.names or not columns:
        raise InvalidInput(
            f"{source} has the columns {batch.schema.names}; wanted subject_id, and at least one of {', '.join(COLUMNS)}"
        )
    options.check_columns(batch.schema.names, _KNOWN, source, carried=False)
    batch = batch.select([name for name in batch.schema.names if name in _KNOWN])
    texts, _ = ids_of(batch.column("subject_id"), "subject_id")
    grouped = {name: batch.column(name) for name in GROUP_COLUMNS if name in batch.schema.names}
    refusals = np.full(len(batch), "", object)
    if grouped:
        groups = pa.array(_groups(grouped, refusals), pa.list_(pa.string()))
        batch = batch.select([name for name in batch.schema.names if name not in GROUP_COLUMNS])
        batch = batch.append_column("groups", groups)
    kept = np.flatnonzero(refusals == "")
    usable = batch if len(kept) == len(batch) else batch.take(pa.array(kept))
    return _Rows(usable, kept, {int(i): refusals[i] for i in np.flatnonzero(refusals != "")}, texts)


def _opened(
    source: Path | Iterable[Any], ids: Path | None, column: str, options: TableOptions
) -> tuple[Iterator[Any], int]:
    """Opens a source. Returns (record batches, the total number of rows, or 0 if unknown)."""
    if not isinstance(source, Path):
        return iter(source), 0
    if source.is_dir():
        raise InvalidInput(
            f"{source} is a folder that `biodedup export` did not write; name an exported folder, or a file"
        )
    try:
        if str(source) == "-":
            return iter(pa.ipc.open_stream(sys.stdin.buffer)), 0
        if source.suffix == ".npy":
            return _numpy_batches(source, ids, column, options)
        if source.suffix in (".arrow", ".feather", ".ipc", ".arrows"):
            return _arrow_batches(source)
        file = pa.parquet.ParquetFile(
            source, pre_buffer=False
        )  # pre-buffering keeps the buffers until the file is closed
        written = file.schema_arrow.names
        names = options.names(written, source, _KNOWN)
        if "subject_id" in names and set(names) & set(_TEMPLATES):  # otherwise `_prepared` reports the missing columns
            options.check_columns(names, _KNOWN, source, carried=False)
        wanted = [in_file for in_file, name in zip(written, names, strict=True) if name in _KNOWN] or None
        return file.iter_batches(batch_size=BATCH_ROWS // 4, columns=wanted), file.metadata.num_rows
    except FileNotFoundError as error:
        raise InvalidInput(
            f"{error.filename or source} does not exist; name a Parquet, Arrow or npy file, or an exported folder"
        ) from None
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        if isinstance(error, InvalidInput):
            raise
        if is_container(_beginning(source)):
            raise InvalidInput(
                f"{source} is a record or file of captures (ISO/IEC 19794, ANSI/NIST-ITL), but `load` reads tables of templates; name it in "
                "the column `finger` of a manifest for `enroll-batch`, or extract its templates with bd.Encounter"
            ) from None
        refuse_other_kinds(source)
        if source.suffix.lower() in CSV_SUFFIXES:
            raise InvalidInput(
                f"{source} is a CSV table, but `load` reads templates from a Parquet, Arrow or npy file; a CSV table of captures is for "
                "`biodedup enroll-batch`, or for `biodedup dedup`"
            ) from None
        raise InvalidInput(
            f"{source} is not a Parquet, Arrow or npy file ({type(error).__name__}); write it with pyarrow, pandas or numpy"
        ) from error


def _beginning(source: Path) -> bytes:
    try:
        with open_file(source) as file:
            return file.read(64)
    except OSError:
        return b""


def _checked_batches(batches: Iterator[Any], source: Path | Iterable[Any]) -> Iterator[Any]:
    """The batches. Raises InvalidInput if the source is cut short."""
    try:
        yield from batches
    except (pa.ArrowException, OSError, EOFError) as error:
        raise InvalidInput(
            f"{_name(source)} is cut short ({type(error).__name__}); earlier batches are in the gallery, load the whole source again"
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
        raise InvalidInput(f"{source} holds only vectors; name the file of their subject_ids with ids")
    if column not in COLUMNS:
        raise InvalidInput(f"column {column!r} is not known; use one of {', '.join(COLUMNS)}")
    vectors = np.load(source, mmap_mode="r", allow_pickle=False)
    names = _loaded_ids(ids) if ids.suffix == ".npy" else _ids_of_text(ids, options)
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
        raise InvalidInput(f"{source} has shape {vectors.shape}, dtype {vectors.dtype}; wanted float32 (n, d)")
    if len(names) != len(vectors):
        raise InvalidInput(f"{ids} has shape ({len(names)},) for {len(vectors)} vectors; pass one id for each vector")

    def batches() -> Iterator[Any]:
        for low in range(0, len(vectors), BATCH_ROWS // 4):
            rows = np.ascontiguousarray(vectors[low : low + BATCH_ROWS // 4], np.float32)
            cells = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
            labels = names[low : low + len(rows)]
            yield pa.record_batch({options.columns.get("subject_id", "subject_id"): labels, column: cells})

    return batches(), len(vectors)


def _loaded_ids(path: Path) -> Any:
    """The ids of a `.npy` file as an Arrow array of strings. Bytes that are not UTF-8 become U+FFFD, and `load` refuses these rows."""
    names = np.load(path, allow_pickle=False)
    if names.ndim != 1 or names.dtype.kind not in "USiu":
        raise InvalidInput(f"{path} has shape {names.shape}, dtype {names.dtype}; wanted (n,) strings or whole numbers")
    if names.dtype.kind == "S":
        return pa.array([name.decode("utf-8", "replace") for name in names.tolist()], pa.string())
    return pa.array(names.astype(str).tolist(), pa.string())


def _ids_of_text(path: Path, options: TableOptions) -> Any:
    """The ids of a text file with one id per line. Bytes that cannot be decoded become U+FFFD, and `load` refuses these rows."""
    with open_text(path, options.encoding or detected(path)[0]) as file:
        lines = file.read().removeprefix("\ufeff").split("\n")
    if not lines[-1].strip():
        lines.pop()
    return pa.array([line.removesuffix("\r") for line in lines], pa.string())


def _rechunked(batches: Iterator[Any], rows: int) -> Iterator[Any]:
    """Batches of exactly `rows` rows, except the last. If such a batch would exceed BATCH_BYTES, estimated from the first rows, all batches
    have a smaller power of two of rows."""
    held: list[Any] = []
    count, measured = 0, False
    for batch in batches:
        if not measured and len(batch):
            fitting, measured = BATCH_BYTES * len(batch) // max(batch.nbytes, 1), True
            rows = min(rows, 1 << max(fitting, 1).bit_length() - 1)
        while count + len(batch) >= rows:
            head = batch.slice(0, rows - count)
            yield pa.Table.from_batches([*held, head]).combine_chunks().to_batches()[0]
            batch, held, count = batch.slice(rows - count), [], 0
        if len(batch):
            held.append(batch)
            count += len(batch)
    if held:
        yield pa.Table.from_batches(held).combine_chunks().to_batches()[0]


def _groups(columns: dict[str, Any], refusals: NDArray[Any]) -> list[list[str]]:
    """The groups of each row. A row whose groups cannot be used gets a reason in `refusals`, an object array (n,)."""
    known: dict[str, list[str]] = {}  # a cache: most rows have the same groups as others
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


def _name(source: Path | Iterable[Any]) -> str:
    return str(source) if isinstance(source, Path) else "the stream"
