"""Defines the files of an exported gallery: their names, their columns, and `export.json`, which describes them.

Owns the format. Never opens a gallery. `docs/reference/schemas.md` lists the columns.

    export.json         the format; the gallery's id, version, settings and parts; rows, bytes and SHA-256 of each file
    rows.parquet        one row for each encounter that is enrolled or waits in a case: ids, groups, and for each column the vector, the
                        minutiae and the quality; the metadata of a column has its model_id
    decisions.parquet   all stored answers of the gallery, in order: decisions, and receipts of loads
    codecs.parquet      the rotations with which sealed vectors are quantised
    TABLE.parquet       the tables of the database: models, groups, cases, verdicts, policies and others

A row group of `rows.parquet` or `decisions.parquet` belongs to one part of the gallery.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from biodedup.errors import InvalidInput
from biodedup.gallery.care.rebuild import TABLES
from biodedup.gallery.catalogue.sqlite import ColumnModel, State, table_columns
from biodedup.jobs.shared.files import new_file, read_bounded, write_json
from biodedup.values import COLUMNS

FORMAT, FORMAT_VERSION = "biodedup-export", 1
ABOUT_NAME, ROWS_NAME, DECISIONS_NAME, CODECS_NAME = (
    "export.json",
    "rows.parquet",
    "decisions.parquet",
    "codecs.parquet",
)
GROUP_ROWS = 2_048
"""Rows of a row group. An export, and its loading, hold one row group in memory."""
ENROLLED, WAITING = "enrolled", "waiting"

FILE_OF = {
    "model": "models.parquet",
    "group_set": "groups.parquet",
    "pending": "open_cases.parquet",
    "review_case": "cases.parquet",
    "verdict": "verdicts.parquet",
    "judged": "judged_different.parquet",
    "link": "linked_cases.parquet",
    "job_step": "job_steps.parquet",
    "policy": "policies.parquet",
    "alarm": "alarms.parquet",
    "approval": "approvals.parquet",
}
"""Table of the database -> its file."""
assert set(FILE_OF) == set(TABLES)
NAMES = (ABOUT_NAME, ROWS_NAME, DECISIONS_NAME, CODECS_NAME, *FILE_OF.values())

DECISIONS = pa.schema(
    [
        ("encounter_id", pa.string()),
        ("kind", pa.string()),
        ("outcome", pa.string()),
        ("subject_id", pa.string()),
        ("decided_at", pa.float64()),
        ("digest", pa.binary()),
        ("answer", pa.string()),
    ]
)
CODECS = pa.schema(
    [
        ("codec_id", pa.string()),
        ("dimension", pa.int32()),
        ("card", pa.string()),
        ("rotation", pa.binary()),
    ]
)
_ABOUT_BYTES_MAX = 1 << 26
_ARROW_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bytes: pa.binary()}


def table_schema(table: str) -> Any:
    """The schema of the file of a database table."""
    return pa.schema([(name, _ARROW_TYPES[kind]) for name, kind in table_columns(table)])


def rows_schema(models: Mapping[str, ColumnModel]) -> Any:
    """The schema of `rows.parquet`. presence: bit c is set if the row has a template in COLUMNS[c]; again: the row, or another row
    of its subject in the same part, is not the subject's first row."""
    fields = [
        pa.field("row", pa.int64()),
        pa.field("state", pa.string()),
        pa.field("subject_id", pa.string()),
        pa.field("encounter_id", pa.string()),
        pa.field("groups", pa.list_(pa.string())),
        pa.field("presence", pa.uint16()),
        pa.field("again", pa.bool_()),
    ]
    for column in COLUMNS:
        if (model := models.get(column)) is None:
            continue
        about = {"model_id": model.model_id}
        if model.dimension is not None:
            fields.append(
                pa.field(column, pa.list_(pa.float32()), metadata=about | {"dimension": str(model.dimension)})
            )
        if column != "face":
            fields.append(pa.field(f"{column}_minutiae", pa.binary(), metadata=about))
        fields.append(pa.field(f"{column}_quality", pa.float32(), metadata=about))
    return pa.schema(fields)


@dataclass(frozen=True)
class ExportedPart:
    """A part of the gallery: a segment, or the journal. first_row, end_row: its range of row numbers; rows, decisions: how many the export has;
    sealed: it is a segment; codecs: column -> id of the codec of its vectors, for quantised columns."""

    first_row: int
    end_row: int
    rows: int
    decisions: int
    sealed: bool
    codecs: Mapping[str, str]


@dataclass(frozen=True)
class ExportedFile:
    """A file of the export: number of rows, size in bytes, and SHA-256."""

    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class About:
    """The content of `export.json`. settings: the settings with which the gallery was created, JSON; index: its index engines, JSON."""

    gallery_id: str
    settings: str
    state: State
    index: str
    parts: Sequence[ExportedPart]
    files: Mapping[str, ExportedFile]

    def write(self, folder: Path, written_by: str) -> None:
        """Writes `export.json`. Raises StorageUnavailable."""
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "written_by": written_by}
        write_json(head | asdict(self), folder / ABOUT_NAME)


def is_export(folder: Path) -> bool:
    """Whether a folder holds an exported gallery."""
    return (folder / ABOUT_NAME).is_file()


def read_about(folder: Path) -> About:
    """Reads `export.json`. Raises InvalidInput if the folder is not an export, or if a later release wrote it."""
    path = folder / ABOUT_NAME
    try:
        fields = json.loads(read_bounded(path, _ABOUT_BYTES_MAX))
        if fields["format"] != FORMAT:
            raise ValueError(fields["format"])
        if fields["format_version"] != FORMAT_VERSION:
            raise InvalidInput(
                f"{folder} is an export of format {fields['format_version']}, but this release reads {FORMAT_VERSION}; load it with the "
                f"release that wrote it, {fields['written_by']}, or a later release"
            )
        return About(
            str(fields["gallery_id"]),
            str(fields["settings"]),
            State(**fields["state"]),
            str(fields["index"]),
            tuple(ExportedPart(**part) for part in fields["parts"]),
            {str(name): ExportedFile(**file) for name, file in fields["files"].items()},
        )
    except FileNotFoundError:
        raise InvalidInput(f"{folder} holds no {ABOUT_NAME}; name a folder that `biodedup export --to` wrote") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, OSError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(
            f"{path} does not describe an export ({type(error).__name__}); export the gallery again"
        ) from None


@contextmanager
def new_table(path: Path, schema: Any) -> Iterator[pa.parquet.ParquetWriter]:
    """Yields the writer of a Parquet file with page checksums. The file gets its name when it is complete."""
    texts = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_list(field.type)]
    repeated = [name for name in texts if name in ("state", "kind", "outcome")]
    with (
        new_file(path) as temporary,
        pa.parquet.ParquetWriter(
            temporary, schema, compression="zstd", use_dictionary=repeated, write_page_checksum=True
        ) as writer,
    ):
        yield writer


def described(path: Path) -> ExportedFile:
    """The description of an existing file for `export.json`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ExportedFile(pa.parquet.read_metadata(path).num_rows, path.stat().st_size, digest)
