"""`export --faiss` and `load --faiss`: writes a column of a gallery as plain FAISS index files with the ids of the rows, and loads such files.

Owns the names and tables of these files. Never searches.

An exported folder holds a file such as `face-12.faiss` for each sealed segment, and `ids.parquet` with `id` (int64, the row number, which FAISS
returns), `subject_id` and `file`. Removed rows and open cases are not exported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from biodedup.common.described import Described
from biodedup.engine import Engine
from biodedup.errors import InvalidInput
from biodedup.gallery.files import index_codec
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.private import make_private_folder
from biodedup.jobs.enrolment.load import BATCH_ROWS, LoadResult, load
from biodedup.jobs.shared.files import new_file
from biodedup.jobs.shared.output import write_table
from biodedup.jobs.shared.progress import Progress, silent
from biodedup.values import COLUMNS

IDS_NAME = "ids.parquet"


@dataclass(frozen=True)
class ExportedIndexes(Described):
    """The result of an export. files: names of the index files; rows: total number of rows; index: the index engine, such as
    `faiss:IVF256,PQ64x4fs`."""

    files: tuple[str, ...]
    rows: int
    index: str


def export_faiss(engine: Engine, folder: Path, *, column: str = "face", progress: Progress = silent) -> ExportedIndexes:
    """Writes the sealed rows of a column as plain FAISS files, which `faiss.read_index` reads, and `ids.parquet`.

    folder: a new or empty folder. Raises InvalidInput if the column has no FAISS index, StorageUnavailable.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InvalidInput(f"{folder} is not empty; name a new folder")
    files: list[str] = []
    tables, spec = [], engine.index(column)
    total = engine.info()["columns"].get(column, {}).get("subjects", 0)
    rows_written = 0
    with translated(f"writing {folder}"):
        for number, index, rows, subject_ids in engine.faiss_copies(column):
            if not files:
                make_private_folder(folder)
            name = f"{column}-{number}.faiss"
            with new_file(folder / name) as temporary:
                index_codec.to_bytes(index).tofile(temporary)  # FAISS's own writer does not report a full disk
            files.append(name)
            tables.append(pa.table({"id": rows, "subject_id": subject_ids, "file": [name] * len(rows)}))
            rows_written += len(rows)
            progress("exporting", rows_written, max(total, rows_written))
        if not files:
            raise InvalidInput(f"column {column} has no sealed rows; there is nothing to export")
        write_table(pa.concat_tables(tables), folder / IDS_NAME)
    return ExportedIndexes(tuple(files), rows_written, spec)


def load_faiss(
    engine: Engine,
    file: Path,
    ids: Path,
    *,
    column: str = "face",
    model_id: str | Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> LoadResult:
    """Adds the vectors of a FAISS index to a gallery without a search. Arguments as in `faiss_batches` and `load`."""
    return load(engine, faiss_batches(file, ids, column), model_id=model_id, progress=progress)


def faiss_batches(file: Path, ids: Path, column: str = "face") -> Iterator[Any]:
    """The vectors of a FAISS index as record batches, for `load`.

    file: written by `faiss.write_index`; ids: Parquet with `id` (int64, the ids of the index) and `subject_id`. The vectors are reconstructed
    from the index: if it uses product quantisation, they have its error. They are scaled to unit length. A vector without a subject_id is
    refused. Raises InvalidInput before the first batch.
    """
    if column not in COLUMNS:
        raise InvalidInput(f"column {column!r} is not known; use one of {', '.join(COLUMNS)}")
    if not file.is_file():
        raise InvalidInput(f"{file} does not exist; name a file that faiss.write_index wrote")
    index, numbers = index_codec.opened(file)
    names = _names_of(ids, numbers)

    def batches() -> Iterator[Any]:
        for low in range(0, len(numbers), BATCH_ROWS // 4):
            high = min(low + BATCH_ROWS // 4, len(numbers))
            vectors = index_codec.vectors_of(index, low, high)
            cells = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
            yield pa.record_batch({"subject_id": names[low:high], column: cells})

    return batches()


def _names_of(path: Path, numbers: np.ndarray[Any, Any]) -> Any:
    """The subject_id of each id of the index, an Arrow array of strings; null if the table does not have the id. numbers: ids, int64 (n,)."""
    try:
        table = pa.parquet.read_table(path)
    except FileNotFoundError:
        raise InvalidInput(f"{path} does not exist; name a Parquet file with `id` and `subject_id`") from None
    except (pa.ArrowException, OSError) as error:
        raise InvalidInput(
            f"{path} is not a Parquet file ({type(error).__name__}); write `id` and `subject_id` with pyarrow"
        ) from None
    lacking = {"id", "subject_id"} - set(table.schema.names)
    if lacking or not pa.types.is_integer(table.schema.field("id").type):
        raise InvalidInput(
            f"{path} has the columns {table.schema.names}; wanted `id`, the whole numbers that FAISS returns, and `subject_id`"
        )
    known = table.column("id").to_numpy()
    if len(np.unique(known)) != len(known):
        raise InvalidInput(f"{path} repeats an id; give each id one subject_id")
    order = np.argsort(known)
    nearest = np.minimum(np.searchsorted(known[order], numbers), max(len(known) - 1, 0))
    present = known[order][nearest] == numbers if len(known) else np.zeros(len(numbers), bool)
    wanted = pa.array(np.where(present, order[nearest] if len(known) else 0, 0), mask=~present)
    subject_ids = pa.compute.cast(table.column("subject_id"), pa.string()).combine_chunks()
    return subject_ids.take(wanted)
