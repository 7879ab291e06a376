"""The files of a segment: their names, their kinds, and their entry in the manifest.

Owns these names. Never reads or writes a file.

The files of segment 12 (FORMAT.md): `12.subject`, `12.encounter`, and two files for each column: `12.face` with the data that a scan reads,
and `12.face.rest` with the low nibbles of the codes. Derived files can be rebuilt from the others: `12.subject.lookup`,
`12.encounter.lookup`, and `12.face.index.0123456789abcdef`, a FAISS index of the column with the id of its codec.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from biodedup.errors import GalleryDamaged
from biodedup.gallery.files.filesystem import Storage
from biodedup.gallery.files.names import NEW_SUFFIX
from biodedup.values import COLUMNS

SUBJECT, ENCOUNTER, LOOKUP, REST, INDEX = "subject", "encounter", ".lookup", ".rest", ".index."

_LOOKUPS = (SUBJECT + LOOKUP, ENCOUNTER + LOOKUP)
_KINDS = (SUBJECT, ENCOUNTER, *_LOOKUPS, *COLUMNS, *(column + REST for column in COLUMNS))
_CODEC_ID = re.compile(r"[0-9a-f]{16}")
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")


def file_name(number: int, kind: str) -> str:
    """The name of a segment's file. kind: `subject`, `encounter`, a column, or a derived kind."""
    return f"{number}.{kind}"


def is_derived(kind: str) -> bool:
    """Whether a file of this kind can be rebuilt from the others."""
    return kind in _LOOKUPS or index_of(kind) is not None


def index_of(kind: str) -> tuple[str, str] | None:
    """(column, codec id) of the kind of a FAISS index; None for another kind."""
    column, _, codec_id = kind.partition(INDEX)
    return (column, codec_id) if column in COLUMNS and _CODEC_ID.fullmatch(codec_id) else None


def _is_kind(kind: str) -> bool:
    return kind in _KINDS or index_of(kind) is not None


def number_of(name: str) -> int | None:
    """The number of the segment in a file's name, with or without NEW_SUFFIX; None for any other file."""
    number, _, kind = name.removesuffix(NEW_SUFFIX).partition(".")
    return int(number) if _NUMBER.fullmatch(number) and _is_kind(kind) else None


def unused_number(storage: Storage, folder: Path, number: int) -> int:
    """The first number from `number` on without a file in the folder."""
    taken = {number_of(name) for name in storage.list_names(folder) or ()}
    while number in taken:
        number += 1
    return number


@dataclass(frozen=True)
class SegmentEntry:
    """The entry of a segment in the manifest. files: kind -> digest."""

    number: int
    first_row: int
    end_row: int
    files: Mapping[str, str]

    def __post_init__(self) -> None:
        """Raises GalleryDamaged for invalid values. File names are made from them, so they must not be trusted."""
        are_counts = all(type(number) is int for number in (self.number, self.first_row, self.end_row))
        are_files = isinstance(self.files, Mapping) and all(type(digest) is str for digest in self.files.values())
        if not (are_counts and are_files and self.number >= 1 and 0 <= self.first_row <= self.end_row):
            raise GalleryDamaged("the entry of a segment in the manifest is invalid; run `biodedup doctor`")
        lacking = {SUBJECT, SUBJECT + LOOKUP} - set(self.files)
        if ENCOUNTER in self.files:
            lacking |= {ENCOUNTER + LOOKUP} - set(self.files)
        if lacking or not all(map(_is_kind, self.files)):
            raise GalleryDamaged(
                f"the manifest names missing or unknown files for segment {self.number}; run `biodedup doctor`"
            )
