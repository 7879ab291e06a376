"""Open handles of a gallery on the local file system: the writer's lock, files that are being written, and SQLite connections.

Owns what happens to a handle in a child process of `os.fork`: none of them works there, and none changes anything of the parent's
(forks.py). Never decides which files are opened.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from biodedup.errors import GalleryBusy, NotAGallery
from biodedup.gallery.files import forks
from biodedup.gallery.files.private import create_private, refuse_link, refuse_no_file

BUFFER_BYTES = 1 << 20


class FileLock:
    """The writer's lock: an advisory lock on an open file, which contains the process id of the owner."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._process = forks.Process()
        self._file = -1
        while not self.is_held():  # again, if another process removed the file while it was opened here
            self.release()
            self._file = _open_lock(path)
            self._identity = _identity(os.fstat(self._file))
        forks.drop_in_child(self)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def is_held(self) -> bool:
        try:
            return self._file >= 0 and _identity(os.lstat(self._path)) == self._identity
        except FileNotFoundError:
            return False

    def release(self) -> None:
        if self._file >= 0 and self._process.is_this:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # closing is not enough: a forked child may still have its copy open
            os.close(self._file)
        self._file = -1

    def drop(self) -> None:
        """In a child: closes the child's copy. The parent keeps the lock."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


def _open_lock(path: Path) -> int:
    """Opens and locks a file. Raises GalleryBusy, which names the holder; NotAGallery if `FileLock` did not write the file."""
    refuse_link(path)
    refuse_no_file(path)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        about, content = os.fstat(file), os.pread(file, 64, 0)
        if about.st_nlink > 1 or len(content) > 32 or content.strip(b"0123456789\n"):
            raise NotAGallery(f"{path} is not a lock of this program; name another folder, or move that file away")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        holder = content.decode("ascii", "replace").strip() or "unknown"
        raise GalleryBusy(
            f"{path.parent} is held for writing by process {holder}; wait until it ends; reading works meanwhile: "
            "Engine.open(..., read_only=True), and commands such as identify and info"
        ) from None
    except BaseException:
        os.close(file)
        raise
    return file


def _identity(about: os.stat_result) -> tuple[int, int]:
    return about.st_dev, about.st_ino


class LocalFile:
    """A file that is being written. It has its own buffer, because a child of a fork would flush a buffer of Python's."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = create_private(path)
        self._buffer = bytearray()

    def write(self, data: bytes | memoryview) -> None:
        if len(data) < BUFFER_BYTES:
            self._buffer += data
            if len(self._buffer) >= BUFFER_BYTES:
                self._flush()
        else:
            self._flush()
            write_all(self._file, data)

    def finish(self) -> None:
        self._flush()
        os.fsync(self._file)
        self._close()

    def discard(self) -> None:
        with suppress(OSError):
            self._close()
        with suppress(OSError):  # the next writer removes files that no manifest names
            self._path.unlink(missing_ok=True)

    def _flush(self) -> None:
        write_all(self._file, self._buffer)
        self._buffer = bytearray()

    def _close(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def write_all(file: int, data: bytes | bytearray | memoryview) -> None:
    rest = memoryview(data).cast("B")
    while len(rest):
        rest = rest[os.write(file, rest) :]


class Connection(sqlite3.Connection):
    """An SQLite connection that raises in a child of a fork (forks.py)."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._process = forks.Process()
        forks.drop_in_child(self)

    def execute(self, *given: Any) -> sqlite3.Cursor:
        self._process.check()
        try:
            return super().execute(*given)
        except UnicodeDecodeError as error:  # Python cannot decode SQLite's message, which quotes damaged bytes
            raise sqlite3.DatabaseError("malformed database schema: a name is not UTF-8") from error

    def executemany(self, *given: Any) -> sqlite3.Cursor:
        self._process.check()
        return super().executemany(*given)

    def executescript(self, *given: Any) -> sqlite3.Cursor:
        self._process.check()
        return super().executescript(*given)

    def backup(self, *given: Any, **more: Any) -> None:
        self._process.check()
        super().backup(*given, **more)

    def close(self) -> None:
        if self._process.is_this:
            super().close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        return super().__exit__(kind, error, trace) if self._process.is_this else False

    def drop(self) -> None:
        forks.keep_for_ever(self)
