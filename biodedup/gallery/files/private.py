"""Files and folders for their owner alone, and none that another program made.

Owns how a file is created, which permissions are too wide, and which names have our own form. Never deletes.

1. A file is created new, with mode 0600 whatever the umask. A name that is taken is given up first, so that neither a symbolic
   nor a hard link leads to a file of another's.
2. Files of others are recognised by name: a segment's are `<number>.<kind>` alone.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from biodedup.errors import NotAGallery

FILE_MODE, FOLDER_MODE = 0o600, 0o700
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def create_private(path: Path) -> int:
    """An open descriptor of a new, empty file, to be written. What had the name loses it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with suppress(FileNotFoundError):
        path.unlink()
    file = os.open(path, flags, FILE_MODE)
    os.fchmod(file, FILE_MODE)  # a umask may have taken the owner's own rights
    return file


def make_private_folder(folder: Path) -> None:
    """With the folders above it. One that is there stays as it is. Raises FileExistsError where it is a file."""
    if not folder.parent.exists():
        make_private_folder(folder.parent)
    folder.mkdir(FOLDER_MODE, exist_ok=True)


def refuse_link(path: Path) -> None:
    """Before something is written there. Raises NotAGallery for a symbolic link."""
    if path.is_symlink():
        raise NotAGallery(
            f"{path} is a symbolic link, and what it leads to may be another's; put the file or folder itself there"
        )


def is_open_to_others(path: Path) -> bool:
    """Whether group or others may do anything with it. A symbolic link is judged by itself."""
    about = path.lstat()
    return not stat.S_ISLNK(about.st_mode) and bool(about.st_mode & _OTHERS)


def close_to_others(path: Path) -> None:
    """Takes the rights of group and others."""
    mode = stat.S_IMODE(path.lstat().st_mode)
    if not path.is_symlink():
        path.chmod(mode & ~_OTHERS)
