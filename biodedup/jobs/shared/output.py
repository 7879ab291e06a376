"""Writes result tables: Parquet or CSV, replaced whole and never half-written.

In CSV a cell that a spreadsheet would run as a formula gets an apostrophe before it (`spreadsheet.py`); our readers remove it again. Parquet
keeps every text as it is.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from biodedup.errors import InvalidInput
from biodedup.gallery.files.faults import translated
from biodedup.jobs.shared.files import new_file
from biodedup.jobs.shared.spreadsheet import disarmed


def check_table_name(path: Path) -> None:
    """Before hours of work: raises InvalidInput for a name that `write_table` could not write."""
    if path.suffix not in (".parquet", ".csv"):
        raise InvalidInput(f"the result is named {path.name}; end it with .parquet or .csv")


def write_table(table: pa.Table, path: Path) -> None:
    """As Parquet or CSV, by the name. Raises StorageUnavailable."""
    check_table_name(path)
    with translated(f"writing {path}"), new_file(path) as temporary:
        if path.suffix == ".csv":
            pa.csv.write_csv(disarmed(table), temporary)
        else:
            pa.parquet.write_table(table, temporary)
