"""A disk that fails at its nth call."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Callable

from biodedup.gallery.files.filesystem import LocalStorage


class Countdown:
    """Raises at the nth call. after: do what was asked first, and fail then, as a lost acknowledgement does. Calls that only
    read do not count then: a reader that gets no answer cannot tell it from a refusal.
    """

    def __init__(self, n: int, *, after: bool = False) -> None:
        self.left = n
        self.after = after

    def call(self, action: Callable[[], object], error: Exception, *, reads: bool = False) -> object:
        if reads and self.after:
            return action()
        self.left -= 1
        if self.left == 0 and not self.after:
            raise error
        result = action()
        if self.left == 0:
            raise error
        return result


class FailingConnection:
    """A connection whose statements count down."""

    def __init__(self, connection: sqlite3.Connection, countdown: Countdown) -> None:
        self._connection = connection
        self._countdown = countdown

    def execute(self, statement: str, *args: object) -> object:
        return self._countdown.call(
            lambda: self._connection.execute(statement, *args),
            sqlite3.OperationalError("disk I/O error"),
            reads=statement.lstrip().startswith("SELECT"),
        )

    def executemany(self, *args: object) -> object:
        return self._countdown.call(
            lambda: self._connection.executemany(*args), sqlite3.OperationalError("disk I/O error")
        )

    def backup(self, target: FailingConnection) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        self._countdown.call(lambda: self._connection.backup(target._connection), error)

    def __getattr__(self, name: str) -> object:
        return getattr(self._connection, name)


class FailingFile:
    """A file whose first two writes and whose sync count down. Later writes add nothing: no name leads to the file yet."""

    def __init__(self, file, countdown: Countdown) -> None:
        self._file = file
        self._countdown = countdown
        self._writes = 0
        self.discard = file.discard

    def write(self, data):
        self._writes += 1
        if self._writes > 2:
            return self._file.write(data)
        self._countdown.call(lambda: self._file.write(data), OSError(errno.ENOSPC, "no space left on device"))

    def finish(self):
        self._countdown.call(self._file.finish, OSError(errno.EIO, "input/output error"))


class FailingStorage(LocalStorage):
    """Every call to the disk counts down."""

    def __init__(self, countdown: Countdown) -> None:
        super().__init__()
        self._countdown = countdown

    def _call(self, name, *args):
        action = getattr(LocalStorage, name)
        return self._countdown.call(
            lambda: action(self, *args),
            OSError(errno.EIO, "input/output error"),
            reads=name in ("list_names", "map"),
        )

    def list_names(self, folder):
        return self._call("list_names", folder)

    def make_folder(self, folder):
        return self._call("make_folder", folder)

    def replace(self, source, target):
        return self._call("replace", source, target)

    def claim(self, source, target):
        return self._call("claim", source, target)

    def wipe(self, path):
        return self._call("wipe", path)

    def remove(self, path):
        return self._call("remove", path)

    def sync_folder(self, folder):
        return self._call("sync_folder", folder)

    def map(self, path):
        return self._call("map", path)

    def create(self, path):
        self._call("list_names", path.parent)  # opening fails before there is a file
        return FailingFile(LocalStorage.create(self, path), self._countdown)

    def connect(self, path, *, read_only):
        return FailingConnection(super().connect(path, read_only=read_only), self._countdown)
