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
from biodedup.jobs.manifests.tables import values_of
from biodedup.jobs.manifests.text_form import detected, open_text
from biodedup.jobs.shared.progress import Progress, silent
from biodedup.values import COLUMNS, Refusal

BATCH_ROWS, BATCH_BYTES = 1 << 16, 1 << 28
"""Of a batch at most; a face and ten fingers with minutiae are some 14 kB a row."""
ROWS_NAMED_MAX = 20
_BAD_ID = ("subject_id is not", "subject_id was")
_KNOWN = tuple(dict.fromkeys((*KNOWN, *GROUP_COLUMNS)))
_TEMPLATES = tuple(name for name in KNOWN if name.removesuffix(MINUTIAE) in COLUMNS)


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
    """Reads a whole source as `load` does, and says which rows it would refuse. Touches no gallery. Raises what `load` raises."""
    accepted = accept_load(config, source, ids=ids, column=column, model_id=model_id, options=options)
    batches = _read(_opened(accepted, ids, column, options)[0], source)
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
    """A batch of the source as an engine takes it. usable: without the rows whose groups are unsound; kept: the index of each of its rows;
    refusals: of the other rows; subject_ids: of all rows, Arrow strings."""

    usable: Any
    kept: NDArray[np.int64]
    refusals: dict[int, str]
    subject_ids: Any

    def all_refusals(self, of_usable: Mapping[int, str]) -> dict[int, str]:
        """With those of the usable rows, by the rows of the source."""
        return self.refusals | {int(self.kept[i]): reason for i, reason in of_usable.items()}

    def name(self, row: int, reason: str) -> str:
        """The subject of a row, '' where it has no usable id."""
        return "" if reason.startswith(_BAD_ID) else self.subject_ids[row].as_py() or ""


def _prepared(batch: Any, source: str, options: TableOptions) -> _Rows:
    """Columns by their own names, and groups as lists. Raises InvalidInput where the columns are none that can be loaded."""
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
        if "subject_id" in names and set(names) & set(_TEMPLATES):  # else that is what is wrong
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
        if is_container(_beginning(source)):
            raise InvalidInput(
                f"{source} is a record or file of captures (ISO/IEC 19794, ANSI/NIST-ITL), and `load` takes tables of templates; name it in "
                "the column `finger` of a manifest for `enroll-batch`, or take its templates with bd.Encounter"
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
    """Batches of exactly `rows` but the last, or of fewer where these would have more than BATCH_BYTES: a power of two, by the size of the
    source's first rows."""
    held: list[Any] = []
    count, settled = 0, False
    for batch in batches:
        if not settled and len(batch):
            fitting, settled = BATCH_BYTES * len(batch) // max(batch.nbytes, 1), True
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


def _name(source: Path | Iterable[Any]) -> str:
    return str(source) if isinstance(source, Path) else "the stream"
