"""The files of a segment: their names, their kinds, and how the manifest names them.

Owns these names. Never reads or writes a file.

Files of segment 12 (FORMAT.md): `12.subject`, `12.encounter`, two a column (`12.face` holds what a scan reads, `12.face.rest`
the low nibbles of its codes), and two that are derived and can be rebuilt: `12.subject.lookup`, `12.encounter.lookup`.
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

SUBJECT, ENCOUNTER, LOOKUP, REST = "subject", "encounter", ".lookup", ".rest"
DERIVED = (SUBJECT + LOOKUP, ENCOUNTER + LOOKUP)

_KINDS = (SUBJECT, ENCOUNTER, *DERIVED, *COLUMNS, *(column + REST for column in COLUMNS))
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")


def file_name(number: int, kind: str) -> str:
    """kind: `subject`, `encounter`, a column, or one of DERIVED."""
    return f"{number}.{kind}"


def number_of(name: str) -> int | None:
    """The number of the segment that a file belongs to, by its name, with or without NEW_SUFFIX; None for any other file."""
    number, _, kind = name.removesuffix(NEW_SUFFIX).partition(".")
    return int(number) if _NUMBER.fullmatch(number) and kind in _KINDS else None


def unused_number(storage: Storage, folder: Path, number: int) -> int:
    """The first one from `number` on of which no file is there."""
    taken = {number_of(name) for name in storage.list_names(folder) or ()}
    while number in taken:
        number += 1
    return number


@dataclass(frozen=True)
class SegmentEntry:
    """A segment as the manifest names it. files: kind -> digest."""

    number: int
    first_row: int
    end_row: int
    files: Mapping[str, str]

    def __post_init__(self) -> None:
        """Raises GalleryDamaged for values that no writer wrote: names of files are made of them."""
        whole = all(type(number) is int for number in (self.number, self.first_row, self.end_row))
        named = isinstance(self.files, Mapping) and all(type(digest) is str for digest in self.files.values())
        if not (whole and named and self.number >= 1 and 0 <= self.first_row <= self.end_row):
            raise GalleryDamaged("the manifest names a segment that cannot be; run `biodedup doctor`")
        lacking = {SUBJECT, SUBJECT + LOOKUP} - set(self.files)
        if ENCOUNTER in self.files:
            lacking |= {ENCOUNTER + LOOKUP} - set(self.files)
        if lacking or not set(self.files) <= set(_KINDS):
            raise GalleryDamaged(
                f"the manifest names other files of segment {self.number} than it has; run `biodedup doctor`"
            )
