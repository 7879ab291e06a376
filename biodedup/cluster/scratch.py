"""Temporary folders for copies of segments, where no cache folder is configured.

Owns their creation and removal. Each folder is locked by the process that uses it. A process that is killed cannot remove its folder, so that
the next process of the same kind on the machine does it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from biodedup.gallery.files.private import create_private

_LOCK = "lock"
_NEW = "biodedup-new-"
_locks: dict[Path, int] = {}
"""Folder of this process -> the descriptor that holds its lock."""


def make_scratch(kind: str) -> Path:
    """A new private folder, locked by this process. Removes the folders of this kind whose processes have ended. kind: the beginning of its
    name. Raises OSError."""
    _remove_abandoned(kind)
    made = Path(tempfile.mkdtemp(prefix=_NEW))
    lock = create_private(made / _LOCK)
    fcntl.flock(lock, fcntl.LOCK_EX)
    folder = made.with_name(f"{kind}{made.name.removeprefix(_NEW)}")
    made.rename(folder)  # only now, locked, it has the name that others look for
    _locks[folder] = lock
    return folder


def remove_scratch(folder: Path) -> None:
    """Removes a folder that `make_scratch` made. Does nothing the second time."""
    lock = _locks.pop(folder, None)
    if lock is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(kind: str) -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{kind}*"):
        with suppress(OSError):  # another user's, or another process removes it
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            lock = os.open(folder / _LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)
