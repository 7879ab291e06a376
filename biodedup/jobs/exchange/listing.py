"""`list --out`: the enrolled subjects as a table, without biometric data.

Owns its columns. Memory is bounded: the table is written batch by batch.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from biodedup.engine import Engine
from biodedup.gallery.files.faults import translated
from biodedup.jobs.shared.files import new_file
from biodedup.jobs.shared.output import check_table_name
from biodedup.jobs.shared.progress import Progress, silent
from biodedup.jobs.shared.spreadsheet import escaped_formulas

_BATCH = 8_192
SUBJECTS = pa.schema(
    [
        ("subject_id", pa.string()),
        ("rows", pa.int64()),
        ("row", pa.int64()),
        ("encounter_id", pa.string()),
        ("groups", pa.string()),
        ("columns", pa.string()),
    ]
)


def write_subjects(
    engine: Engine, result: Path, *, groups: Collection[str] | None = None, progress: Progress = silent
) -> int:
    """Writes a row for each enrolled subject, as Parquet or CSV by the name; with groups, for those that are in subject of them. Returns how
    many. row, encounter_id: the newest; groups, columns: `a;b`. Raises InvalidInput, StorageUnavailable."""
    check_table_name(result)
    subjects, done = engine.subjects(groups), 0
    with translated(f"writing {result}"), new_file(result) as temporary:
        with _writer(temporary) as writer:
            while batch := list(islice(subjects, _BATCH)):
                rows = [
                    {
                        "subject_id": subject.subject_id,
                        "rows": len(subject.rows),
                        "row": subject.rows[-1],
                        "encounter_id": subject.encounter_ids[-1] or None,
                        "groups": ";".join(subject.groups),
                        "columns": ";".join(subject.columns),
                    }
                    for subject in batch
                ]
                table = pa.Table.from_pylist(rows, SUBJECTS)
                writer.write_table(escaped_formulas(table) if result.suffix == ".csv" else table)
                done += len(batch)
                progress("listing", done, max(len(engine), done))
    return done


def _writer(path: Path) -> Any:
    if path.suffix == ".csv":
        return pa.csv.CSVWriter(path, SUBJECTS)
    return pa.parquet.ParquetWriter(path, SUBJECTS)
