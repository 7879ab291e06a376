"""Finds the files of a gallery that other users of the machine can access, and takes these rights away.

Owns the list of a gallery's files. Never judges access-control lists, and never touches other programs' files.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from biodedup.gallery.care.removal import OWN_NAMES
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.names import MERGES_FOLDER, SEGMENT_FOLDER
from biodedup.gallery.files.private import close_to_others, is_open_to_others

ASIDE_FOLDER = "damaged"
"""Where a restored gallery keeps what it replaced."""


def exposed(folder: Path) -> list[Path]:
    """Files and folders of a gallery that its group or others have a right to. Raises StorageUnavailable."""
    with translated(f"reading {folder}"):
        return [path for path in _own(folder) if is_open_to_others(path)]


def told(folder: Path, open_ones: list[Path]) -> str:
    """What a person can do about it."""
    return (
        f"gallery {folder}: {len(open_ones)} of its files and folders are open to other users, {open_ones[0].name} among them; "
        f"run `chmod -R go= {shlex.quote(str(folder))}`, or `biodedup doctor --repair`"
    )


def tighten(folder: Path) -> int:
    """Takes these rights, and returns of how many files and folders. Raises StorageUnavailable."""
    open_ones = exposed(folder)
    with translated(f"changing permissions in {folder}"):
        for path in open_ones:
            close_to_others(path)
    return len(open_ones)


def _own(folder: Path) -> Iterator[Path]:
    yield folder
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name not in (*OWN_NAMES, ASIDE_FOLDER):
            continue
        yield path
        if name in (SEGMENT_FOLDER, MERGES_FOLDER, ASIDE_FOLDER) and path.is_dir() and not path.is_symlink():
            yield from (path / inner for inner in sorted(os.listdir(path)))
