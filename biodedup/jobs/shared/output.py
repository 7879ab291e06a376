"""Writes result tables as Parquet or CSV. A table is replaced as a whole, never half-written.

CSV cells are protected against formula injection (`spreadsheet.py`). Parquet keeps every text unchanged.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from biodedup.errors import InvalidInput
from biodedup.gallery.files.faults import translated
from biodedup.jobs.shared.files import new_file
from biodedup.jobs.shared.spreadsheet import escaped_formulas


def check_table_name(path: Path) -> None:
    """Raises InvalidInput for a file name that `write_table` cannot write. A job calls it first, before hours of work."""
    if path.suffix not in (".parquet", ".csv"):
        raise InvalidInput(f"the result cannot be named {path.name}; end the name with .parquet or .csv")


def write_table(table: pa.Table, path: Path) -> None:
    """Writes or replaces a table. The suffix of `path` selects Parquet or CSV. Raises InvalidInput for another suffix, StorageUnavailable."""
    check_table_name(path)
    with translated(f"writing {path}"), new_file(path) as temporary:
        if path.suffix == ".csv":
            pa.csv.write_csv(escaped_formulas(table), temporary)
        else:
            pa.parquet.write_table(table, temporary)
