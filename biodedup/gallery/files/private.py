"""Creates files and folders that only their owner can access.

Owns the modes (files 0600, folders 0700), the creation and replacement of private files, and the check of permissions. Never interprets the
content of a file.

1. A private file has mode 0600 from its creation on, whatever the umask.
2. A file is always created new: an existing file with the name is unlinked first, so that a symbolic or hard link cannot redirect the write
   to another program's file.
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
    """An open descriptor for writing a new, empty file. An existing file with the name is unlinked first; with `exclusive` it raises
    FileExistsError instead."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    if not exclusive:
        path.unlink(missing_ok=True)
    file = os.open(path, flags, FILE_MODE)
    os.fchmod(file, FILE_MODE)  # because a umask may remove the owner's own permissions
    return file


def open_private(path: Path, *, exclusive: bool = False) -> BinaryIO:
    """As `create_private`, as a buffered file object."""
    return os.fdopen(create_private(path, exclusive=exclusive), "wb")


def make_private(path: Path) -> None:
    """Creates an empty file if there is none, and sets its mode to 0600. Raises OSError."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    os.fchmod(file, FILE_MODE)
    os.close(file)


def replace_private(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, syncs it, and renames it. Raises StorageUnavailable."""
    temporary = path.with_name(path.name + ".tmp")
    with translated(f"writing {path}"):
        with open_private(temporary) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def private_folder(path: Path) -> None:
    """Creates a folder if there is none, and sets its mode to 0700. Raises StorageUnavailable."""
    with translated(f"writing {path}"):
        path.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
        path.chmod(FOLDER_MODE)


def make_private_folder(folder: Path) -> None:
    """Creates a folder and its parents. An existing folder is not changed. Raises NotAGallery if the path is a file, StorageUnavailable."""
    with translated(f"making {folder}"):
        if not folder.parent.exists():
            make_private_folder(folder.parent)
        folder.mkdir(FOLDER_MODE, exist_ok=True)


def refuse_link(path: Path) -> None:
    """Called before a file is written. Raises NotAGallery for a symbolic link."""
    if path.is_symlink():
        raise NotAGallery(
            f"{path} is a symbolic link, which may lead to another program's files; put the file or folder itself there"
        )


def refuse_no_file(path: Path) -> None:
    """Called before a file is opened. Raises NotAGallery for a pipe, on which `open` waits for ever, for a device, and for a folder."""
    with suppress(OSError):  # the caller's `open` reports this error
        if not stat.S_ISREG(path.stat().st_mode):
            raise NotAGallery(f"{path} is not a regular file; name another folder, or move it away")


def is_open_to_others(path: Path) -> bool:
    """Whether group or others have any permission. Symbolic links are not followed, and give False."""
    about = path.lstat()
    return not stat.S_ISLNK(about.st_mode) and bool(about.st_mode & _OTHERS)


def close_to_others(path: Path) -> None:
    """Removes all permissions of group and others."""
    mode = stat.S_IMODE(path.lstat().st_mode)
    if not path.is_symlink():
        path.chmod(mode & ~_OTHERS)


def file_bytes(path: Path, most: int | None = 1 << 20) -> bytes:
    """The content of a key file or a document, at most `most` bytes. Raises InvalidInput."""
    try:
        refuse_no_file(path)
        with path.open("rb") as file:
            return file.read(-1 if most is None else most)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}; check its name") from None
