"""`load`: ready templates from a Parquet file into a gallery, without a search.

Owns the reading of the file in bounded memory. Each batch is one durable, idempotent write named by its content, so that
a load that was interrupted goes on where it was when it is started again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
from numpy.typing import NDArray

from biodedup.engine import Engine
from biodedup.errors import InvalidInput
from biodedup.jobs.progress import Progress, silent
from biodedup.values import COLUMNS

ROWS_NAMED_MAX = 20


@dataclass(frozen=True)
class LoadResult:
    """added: subjects new to the gallery; present: found there from an earlier run; refused: rows that are no unit vectors.

    refused_rows: the first of these, by position in the file.
    """

    added: int
    present: int
    refused: int
    refused_rows: tuple[int, ...]


def load(engine: Engine, source: Path, *, batch_rows: int = 10_000, progress: Progress = silent) -> LoadResult:
    """Adds the subjects of a Parquet file: a string column `subject_id`, and `face` (or a finger position) as a list of
    d floating-point numbers, unit length. Rows with NaN or another length are refused one by one.

    Raises InvalidInput, SubjectExists (nothing of that batch is written), ModelMismatch, StorageUnavailable.
    """
    file = _opened(source)
    names = file.schema_arrow.names
    columns = [name for name in names if name in COLUMNS]
    if "subject_id" not in names or not columns:
        raise InvalidInput(
            f"{source} has the columns {names}; wanted subject_id, and at least one of {', '.join(COLUMNS)}"
        )
    added = present = refused = position = 0
    refused_rows: list[int] = []
    for batch in file.iter_batches(batch_size=batch_rows, columns=["subject_id", *columns]):
        ids = batch.column("subject_id").cast(pa.string()).to_pylist()
        vectors = {column: _matrix(batch.column(column), column, position) for column in columns}
        good = np.array([subject_id is not None for subject_id in ids])
        for rows in vectors.values():
            with np.errstate(invalid="ignore", over="ignore"):
                good &= np.abs(np.linalg.norm(rows, axis=1) - 1) < 0.01  # False for NaN too
        bad = np.flatnonzero(~good)
        refused += len(bad)
        refused_rows += (position + bad[: ROWS_NAMED_MAX - len(refused_rows)]).tolist()
        position += len(ids)
        kept = np.flatnonzero(good)
        if len(kept):
            kept_ids = [ids[i] for i in kept]
            kept_vectors = {column: rows[kept] for column, rows in vectors.items()}
            count = engine.add_templates(kept_ids, kept_vectors, encounter_id=_batch_id(kept_ids, kept_vectors))
            added += count
            present += len(kept) - count
        progress("loading", position, file.metadata.num_rows)
    return LoadResult(added, present, refused, tuple(refused_rows))


def _opened(source: Path) -> Any:
    try:
        return pa.parquet.ParquetFile(source)
    except FileNotFoundError:
        raise InvalidInput(f"{source} does not exist; name a Parquet file") from None
    except (pa.ArrowException, OSError) as error:
        raise InvalidInput(
            f"{source} is not a Parquet file ({type(error).__name__}); write it with pyarrow or pandas"
        ) from error


def _matrix(cells: Any, column: str, position: int) -> NDArray[np.float32]:
    """float32 (n, d) of a list column; rows that are null become NaN."""
    kind = cells.type
    if not (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind)):
        raise InvalidInput(f"column {column} is of type {kind}; wanted a list of float32")
    if not pa.types.is_floating(kind.value_type):
        raise InvalidInput(f"column {column} holds lists of {kind.value_type}; wanted lists of float32")
    lengths = set(pa.compute.list_value_length(cells).drop_null().unique().to_pylist())
    if len(lengths) > 1:
        raise InvalidInput(
            f"column {column} holds vectors of {sorted(lengths)} numbers (rows from {position}); one model has one dimension"
        )
    dimension = lengths.pop() if lengths else 1
    matrix = np.full((len(cells), dimension), np.nan, np.float32)
    present = np.flatnonzero(cells.is_valid().to_numpy(zero_copy_only=False))
    values = cells.flatten().to_numpy(zero_copy_only=False)
    if len(present):
        matrix[present] = values.reshape(len(present), dimension)
    return matrix


def _batch_id(subject_ids: list[str], vectors: dict[str, NDArray[np.float32]]) -> str:
    digest = hashlib.sha256("\n".join(subject_ids).encode())
    for column, rows in vectors.items():
        digest.update(column.encode() + rows.tobytes())
    return f"load:{digest.hexdigest()}"
