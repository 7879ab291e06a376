"""Creates files and folders that only their owner can read.

Owns the modes (files 0600, folders 0700), how a private file is created and replaced, and which permissions are too wide. Never knows
what is in a file.

1. A private file has mode 0600 from its creation on, whatever the umask.
2. A file is created new: what had its name is unlinked first, so that no symbolic or hard link leads to another program's file.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from biodedup.errors import InvalidInput, NotAGallery
from biodedup.gallery.files.faults import translated

FILE_MODE, FOLDER_MODE = 0o600, 0o700
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def create_private(path: Path, *, exclusive: bool = False) -> int:
    """An open descriptor of a new, empty file, to be written. A file that had the name is unlinked first; with exclusive it raises
    FileExistsError instead."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    if not exclusive:
        path.unlink(missing_ok=True)
    file = os.open(path, flags, FILE_MODE)
    os.fchmod(file, FILE_MODE)  # a umask may have taken the owner's own rights
    return file


def open_private(path: Path, *, exclusive: bool = False) -> BinaryIO:
    """As `create_private`, buffered."""
    return os.fdopen(create_private(path, exclusive=exclusive), "wb")


def make_private(path: Path) -> None:
    """Makes an empty file where there is none; one that is there is closed to others. Raises OSError."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    os.fchmod(file, FILE_MODE)
    os.close(file)


def replace_private(path: Path, content: bytes) -> None:
    """Writes a file whole: under another name, synced, renamed. Raises StorageUnavailable."""
    temporary = path.with_name(path.name + ".tmp")
    with translated(f"writing {path}"):
        with open_private(temporary) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def private_folder(path: Path) -> None:
    """Makes a folder of a job's own; one that is there is closed to others. Raises StorageUnavailable."""
    with translated(f"writing {path}"):
        path.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
        path.chmod(FOLDER_MODE)


def make_private_folder(folder: Path) -> None:
    """Makes a folder, and those above it. An existing folder stays as it is. Raises NotAGallery where it is a file, StorageUnavailable."""
    with translated(f"making {folder}"):
        if not folder.parent.exists():
            make_private_folder(folder.parent)
        folder.mkdir(FOLDER_MODE, exist_ok=True)


def refuse_link(path: Path) -> None:
    """Before something is written there. Raises NotAGallery for a symbolic link."""
    if path.is_symlink():
        raise NotAGallery(
            f"{path} is a symbolic link, which may lead to another program's files; put the file or folder itself there"
        )


def refuse_no_file(path: Path) -> None:
    """Before it is opened: a pipe would wait for ever, and a device has no end. Raises NotAGallery for what is there and no file."""
    with suppress(OSError):  # the call that opens the path reports what cannot be looked at
        if not stat.S_ISREG(path.stat().st_mode):
            raise NotAGallery(f"{path} is no regular file; name another folder, or move it away")


def is_open_to_others(path: Path) -> bool:
    """Whether group or others may do anything with it. A symbolic link is judged by itself."""
    about = path.lstat()
    return not stat.S_ISLNK(about.st_mode) and bool(about.st_mode & _OTHERS)


def close_to_others(path: Path) -> None:
    """Takes the rights of group and others."""
    mode = stat.S_IMODE(path.lstat().st_mode)
    if not path.is_symlink():
        path.chmod(mode & ~_OTHERS)


def file_bytes(path: Path, most: int | None = 1 << 20) -> bytes:
    """Of a key or a document, at most so many. Raises InvalidInput."""
    try:
        refuse_no_file(path)
        with path.open("rb") as file:
            return file.read(-1 if most is None else most)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}; check its name") from None
