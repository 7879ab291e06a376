"""Writes and reads files of jobs: replaced whole, private where they hold biometrics, and bounded when they come from elsewhere.

Owns the modes (files 0600, folders 0700) and the way a file is replaced. Never knows what is in a file.

1. A private file never exists with a wider mode, not even for a moment: the mode is set when it is created.
2. Only a regular file of at most the stated size is read: a pipe cannot hang the job, a device or a sparse file cannot fill the memory.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from biodedup.errors import InvalidInput
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.private import create_private as create_new
from biodedup.texts import json_text

_MADE = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


def private_folder(path: Path) -> None:
    """Makes a folder of our own; one that is there is closed to others. Raises StorageUnavailable."""
    with translated(f"writing {path}"):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)


def create_private(path: Path, *, exclusive: bool = False) -> BinaryIO:
    """Opens a new or emptied file for writing. exclusive: raises FileExistsError where it is there."""
    handle = os.open(path, _MADE | (os.O_EXCL if exclusive else os.O_TRUNC), 0o600)
    os.fchmod(handle, 0o600)  # of a file that was there before
    return os.fdopen(handle, "wb")


def make_private(path: Path) -> None:
    """Makes an empty file where there is none; one that is there is closed to others. Raises OSError."""
    handle = os.open(path, _MADE, 0o600)
    os.fchmod(handle, 0o600)
    os.close(handle)


def replace_private(path: Path, content: bytes) -> None:
    """Writes a file whole: under another name, synced, renamed. Raises StorageUnavailable."""
    temporary = path.with_name(path.name + ".tmp")
    with translated(f"writing {path}"):
        with create_private(temporary) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


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
    """An empty file of its owner's alone, which gets its name when it is written and synced, and is removed after a failure."""
    temporary = path.with_name(f".{path.stem}.new{path.suffix}")
    os.close(create_new(temporary))
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
