"""Writes the results of jobs as whole files and folders, and reads untrusted files up to a size limit.

Owns the temporary name and the rename of a result. Never knows what a file holds; `gallery/files/private.py` owns the file modes.

1. A result gets its final name only after it is written and synced.
2. Only a regular file is read, and at most the stated size: so a pipe cannot hang a job, and a device or sparse file cannot fill the memory.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from biodedup.errors import InvalidInput
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.private import create_private, private_folder
from biodedup.texts import json_text


def open_regular(path: Path, *, follow: bool = True) -> BufferedReader:
    """Opens a file for reading. follow: symbolic links are followed. Raises OSError; InvalidInput if it is not a regular file."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    handle = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InvalidInput(f"{path} is not a regular file; name a file")
    return os.fdopen(handle, "rb")


def read_bounded(path: Path, bytes_max: int, *, follow: bool = True) -> bytes:
    """The content of a file. Raises OSError; InvalidInput if it is not a regular file, or is larger than bytes_max."""
    with open_regular(path, follow=follow) as file:
        content = file.read(bytes_max + 1)
    if len(content) > bytes_max:
        raise InvalidInput(f"{path} is larger than {bytes_max:,} bytes, the limit for such a file; name the right file")
    return content


def write_text(text: str, path: Path) -> None:
    """Writes or replaces a text file. Raises StorageUnavailable."""
    with translated(f"writing {path}"), new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(document: Any, path: Path) -> None:
    """Writes or replaces a JSON file. Raises StorageUnavailable."""
    write_text(json_text(document), path)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields an empty private file under a temporary name. On exit it is synced and renamed to `path`; after a failure it is removed."""
    temporary = path.with_name(f".{path.stem}.new{path.suffix}")
    os.close(create_private(temporary))
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path, names: Collection[str]) -> Iterator[Path]:
    """Yields an empty private folder under a temporary name. On exit it is synced and renamed to `path`; after a failure it is removed.

    names: the file names that it may hold; a temporary folder of an interrupted run with only such files is removed first. Raises InvalidInput
    if `path` exists and is not an empty folder, or if the temporary folder holds other files.
    """
    _refuse_taken(path)
    new = path.with_name(f".{path.name}.new")
    if new.is_symlink() or (new.is_dir() and {entry.name for entry in new.iterdir()} - set(names)):
        raise InvalidInput(f"{new} holds other files, and is needed for {path}; move it away")
    _remove_folder(new)
    private_folder(new)
    try:
        yield new
        sync_folder(new)
        _refuse_taken(path)
        new.replace(path)
        sync_folder(path.parent)
    except BaseException:
        _remove_folder(new)
        raise


def _refuse_taken(path: Path) -> None:
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise InvalidInput(f"{path} is not an empty folder; name a new one")


def _remove_folder(folder: Path) -> None:
    """Removes a folder that holds only files."""
    if folder.is_dir():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
