"""The seam through which the gallery reaches the disk.

Owns folders, files, the writer's lock and the SQLite connection with its durability settings. Never knows what is stored.
A test hands in a double that fails the nth call.

1. A connection commits durably: rollback journal in PERSIST mode with synchronous=FULL, which syncs the journal, the
   database and then the journal's zeroed header. (SQLite before 3.51.3 can lose commits when a write-ahead log is reset;
   DELETE mode needs a further sync of the folder for the same promise.)
2. One process writes. The lock belongs to the open file, so that a killed writer leaves none behind.
3. A file other than the database is written once, under another name, synced, renamed, and never changed again.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from biodedup.errors import GalleryBusy, StorageUnavailable

NEW_SUFFIX = ".new"
"""Of a file in the making."""


class Lock(Protocol):
    def release(self) -> None: ...


class NewFile(Protocol):
    """A file in the making."""

    def write(self, data: bytes | memoryview) -> None: ...

    def finish(self) -> None:
        """Syncs and closes: what was written is on the disk."""

    def discard(self) -> None:
        """Closes and removes; never fails."""


class Storage(Protocol):
    """What the gallery needs of a file system."""

    def list_names(self, folder: Path) -> list[str] | None:
        """Names in a folder; None where the folder does not exist."""

    def make_folder(self, folder: Path) -> None: ...

    def lock(self, path: Path) -> Lock:
        """The exclusive writer's lock. Raises GalleryBusy, naming the holder."""

    def connect(self, path: Path, *, read_only: bool) -> sqlite3.Connection: ...

    def create(self, path: Path) -> NewFile:
        """Opens a file for writing, emptied if it was there."""

    def map(self, path: Path) -> mmap.mmap:
        """The content of a file, read-only, in memory as far as it is touched."""

    def forget(self, path: Path) -> None:
        """The system need not keep a file in memory. Never raises."""

    def replace(self, source: Path, target: Path) -> None:
        """Renames a file over another."""

    def sync_folder(self, folder: Path) -> None:
        """Makes the names in a folder durable."""

    def remove(self, path: Path) -> None:
        """Removes a file, if it is there."""


class FileLock:
    """An advisory lock on an open file, holding the process id of its owner."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._file, 64, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._file)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise GalleryBusy(
                f"{path.parent} is held for writing by process {holder}; wait until it ends, or open read_only"
            ) from None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        os.close(self._file)


class LocalFile:
    """A file in the making, on a POSIX file system."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb", buffering=1 << 20)

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)

    def finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        try:
            self._file.close()
        except OSError:
            pass  # a full disk refuses the rest of the buffer again; it is not wanted any more
        try:
            self._path.unlink(missing_ok=True)
        except OSError:
            pass  # the next writer removes what no manifest names


class LocalStorage:
    """A POSIX file system."""

    def list_names(self, folder: Path) -> list[str] | None:
        try:
            return sorted(os.listdir(folder))
        except FileNotFoundError:
            return None

    def make_folder(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.sync_folder(folder.parent)

    def lock(self, path: Path) -> Lock:
        return FileLock(path)

    def connect(self, path: Path, *, read_only: bool) -> sqlite3.Connection:
        # A reader may have to roll back what a killed writer left half-done, so it opens the file for writing if it can.
        mode = "rwc" if not read_only else "rw" if os.access(path, os.W_OK) else "ro"
        uri = f"{path.absolute().as_uri()}?mode={mode}"
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=10.0)
        connection.execute("PRAGMA temp_store=MEMORY")
        connection.execute("PRAGMA cache_size=-65536")  # KiB
        if read_only:
            connection.execute("PRAGMA query_only=ON")
        else:
            connection.execute("PRAGMA journal_mode=PERSIST")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA secure_delete=ON")  # a removed subject's vectors are overwritten
        return connection

    def create(self, path: Path) -> NewFile:
        return LocalFile(path)

    def map(self, path: Path) -> mmap.mmap:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def forget(self, path: Path) -> None:
        with suppress(OSError), path.open("rb") as file:  # it was only a hint
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def replace(self, source: Path, target: Path) -> None:
        source.replace(target)

    def sync_folder(self, folder: Path) -> None:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)


def memory_bytes() -> int:
    """Of this machine, or as much as its control group grants."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        granted = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return physical
    return min(physical, int(granted)) if granted.isdecimal() else physical


def unavailable(error: Exception, doing: str) -> StorageUnavailable:
    """The retryable error for a disk that refused."""
    return StorageUnavailable(f"{doing} failed: {error}; nothing was acknowledged; free the disk and send it again")
