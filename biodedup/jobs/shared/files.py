"""Writes the results of jobs as whole files, and reads files from elsewhere up to a size.

Owns the way a result gets its name. Never knows what is in a file; gallery/files/private.py owns the modes.

1. A result has its name only when it is written and synced.
2. Only a regular file of at most the stated size is read: a pipe does not hang, a device or a sparse file does not fill the memory.
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
    """Opens a file for reading. follow: also through a symbolic link. Raises OSError; InvalidInput for what is no regular file."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    handle = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InvalidInput(f"{path} is not a regular file; name a file")
    return os.fdopen(handle, "rb")


def read_bounded(path: Path, bytes_max: int, *, follow: bool = True) -> bytes:
    """The content of a file. Raises OSError; InvalidInput for what is no regular file, or is larger."""
    with open_regular(path, follow=follow) as file:
        content = file.read(bytes_max + 1)
    if len(content) > bytes_max:
        raise InvalidInput(f"{path} is larger than {bytes_max:,} bytes, which no such file is; name the right one")
    return content


def write_text(text: str, path: Path) -> None:
    """Raises StorageUnavailable."""
    with translated(f"writing {path}"), new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(document: Any, path: Path) -> None:
    """Raises StorageUnavailable."""
    write_text(json_text(document), path)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """An empty private file. It gets its name at the end, when it is written and synced; after a failure it is removed."""
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
    """A private folder. It gets its name at the end, when it is synced; after a failure it is removed. names: of the files that it may
    hold, so that what an interrupted run left can be removed. Raises InvalidInput where the name is taken by more than an empty
    folder, or the interim name by files of others."""
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
    """A folder of files."""
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
