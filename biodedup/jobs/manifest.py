"""Labelled captures on disk: a folder per subject, or a manifest.

Owns what such a source may look like, and the mark by which a job knows that files changed. Never opens an image.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from biodedup.errors import InvalidInput
from biodedup.values import Capture, Face, Finger

IMAGE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jp2", ".j2k", ".bmp", ".tif", ".tiff", ".wsq", ".pgm", ".ppm", ".webp", ".gif")
)
RESERVED = ("subject_id", "path", "position", "dpi", "encounter_id")
"""Columns of a manifest that have a meaning; whatever else it holds describes the subject or the capture."""


@dataclass(frozen=True)
class Row:
    """One capture of a manifest. besides: its further columns, as they are there."""

    subject_id: str
    capture: Face | Finger
    encounter_id: str | None = None
    besides: dict[str, Any] = field(default_factory=dict)


def images_of(folder: Path) -> Iterator[Path]:
    """Every image below a folder, relative to it, in a fixed order."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(parent, name).relative_to(folder)


def no_images(folder: Path) -> InvalidInput:
    return InvalidInput(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); name another folder")


def label_of(relative: Path) -> str | None:
    """The first-level folder that an image is filed under."""
    return relative.parts[0] if len(relative.parts) > 1 else None


def read_table(source: Path) -> pa.Table:
    """A CSV or Parquet file. Raises InvalidInput."""
    try:
        return pa.parquet.read_table(source) if source.suffix == ".parquet" else pa.csv.read_csv(source)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{source} is not a readable manifest ({error}); pass CSV or Parquet") from error


def rows_of(table: pa.Table, manifest: Path) -> list[Row]:
    """A manifest has the columns subject_id and path (relative to the manifest), and may have position (`face`, or a finger's
    position), dpi, encounter_id, and any others. Raises InvalidInput."""
    absent = {"subject_id", "path"} - set(table.column_names)
    if absent:
        raise InvalidInput(f"{manifest} lacks the columns {sorted(absent)}; it has {table.column_names}")
    rows = []
    for row in table.to_pylist():
        path = manifest.parent / str(row["path"])
        position = row.get("position") or "face"
        capture = Face(path) if position == "face" else Finger(path, position, row.get("dpi"))
        encounter_id = row.get("encounter_id")
        besides = {name: value for name, value in row.items() if name not in RESERVED}
        rows.append(Row(str(row["subject_id"]), capture, None if encounter_id is None else str(encounter_id), besides))
    return rows


def mark_of(name: str, captures: Sequence[Capture]) -> str:
    """Changes when the size or time of a file does, so that a resumed job knows what is done already."""
    digest = hashlib.sha256(name.encode())
    for capture in captures:
        assert isinstance(capture, (Face, Finger)) and isinstance(capture.data, Path), "units are made of files"
        digest.update(f"\0{capture.column}\0{getattr(capture, 'dpi', None)}\0{capture.data}".encode())
        try:
            status = capture.data.stat()
            digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}".encode())
        except OSError:
            digest.update(b"\0absent")
    return digest.hexdigest()
