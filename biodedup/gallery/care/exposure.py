"""Finds files of a gallery that other users of the machine can access, and removes these permissions.

Owns the list of a gallery's files. Never examines access-control lists, and never changes files of other programs.
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
"""The folder in which a restored gallery keeps the replaced files."""


def exposed(folder: Path) -> list[Path]:
    """The files and folders of a gallery that group or others have a permission for. Raises StorageUnavailable."""
    with translated(f"reading {folder}"):
        return [path for path in _own(folder) if is_open_to_others(path)]


def advice_on_exposure(folder: Path, open_ones: list[Path]) -> str:
    """A line that names the problem and the remedy. open_ones: from `exposed`, at least one."""
    return (
        f"gallery {folder}: {len(open_ones)} of its files and folders are open to other users, {open_ones[0].name} among them; "
        f"run `chmod -R go= {shlex.quote(str(folder))}`, or `biodedup doctor --repair`"
    )


def tighten(folder: Path) -> int:
    """Removes these permissions. Returns the number of changed files and folders. Raises StorageUnavailable."""
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
