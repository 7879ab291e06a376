"""An encrypted SQLite database, with the part of the `sqlite3` interface that this program uses.

Owns the conversion of calls and errors to those of `sqlite3`. Never chooses a key, and never depends on the tables.

The library is SQLite3 Multiple Ciphers, through `apsw-sqlite3mc`. Its cipher `chacha20` encrypts every page with ChaCha20 and authenticates
it with Poly1305 (RFC 8439), together with the page's number. It also encrypts the rollback journal.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal

import apsw

from biodedup.gallery.files import forks
from biodedup.gallery.files.encryption.keyring import Key
from biodedup.gallery.files.encryption.transform import Transform

CIPHER = "chacha20"
_OPERATIONAL = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_ERROR,
}


class EncryptedConnection:
    """A connection that raises in a child of a fork, as `handles.Connection` does."""

    def __init__(self, uri: str, secret: bytes, timeout_s: float) -> None:
        """secret: 32 bytes. It is not checked here: with a wrong key, the first statement that reads raises SQLITE_NOTADB."""
        self._process = forks.Process()
        self.chain_key = Key(secret).derived("chain")
        """The key of the hash chain over the commits (catalogue/chain.py)."""
        self.transforms: Callable[[str], Transform] | None = None
        """transform_id -> the secret transform of stored embeddings. `LocalStorage` sets it."""
        with _translated():
            flags = apsw.SQLITE_OPEN_URI | apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
            self._connection = apsw.Connection(uri, flags=flags)
            self._connection.set_busy_timeout(round(timeout_s * 1000))
            self._connection.pragma("cipher", CIPHER)
            self._connection.pragma("key", f"raw:{secret.hex()}")
        forks.drop_in_child(self)

    @property
    def in_transaction(self) -> bool:
        return self._connection.in_transaction

    def execute(self, statement: str, values: Any = ()) -> EncryptedCursor:
        self._process.check()
        with _translated():
            return EncryptedCursor(self._connection, self._connection.execute(statement, values))

    def executemany(self, statement: str, rows: Iterable[Any]) -> EncryptedCursor:
        self._process.check()
        with _translated():
            return EncryptedCursor(self._connection, self._connection.executemany(statement, rows))

    def executescript(self, script: str) -> EncryptedCursor:
        return self.execute(script)

    def backup(self, target: EncryptedConnection) -> None:
        self._process.check()
        with _translated(), target._connection.backup("main", self._connection, "main") as copying:
            while not copying.done:
                copying.step()

    def close(self) -> None:
        if self._process.is_this:
            with _translated():
                self._connection.close()

    def __enter__(self) -> EncryptedConnection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        if self._process.is_this and self.in_transaction:
            self.execute("COMMIT" if error is None else "ROLLBACK")
        return False

    def drop(self) -> None:
        forks.keep_for_ever(self)
        forks.keep_for_ever(self._connection)


def rekey(path: str, before: bytes | None, after: bytes | None) -> None:
    """Encrypts a database in place with another key. before, after: 32 bytes; None for a database in the clear. Raises
    sqlite3.DatabaseError."""
    with _translated():
        connection = apsw.Connection(path)
        try:
            connection.pragma("cipher", CIPHER)
            if before is not None:
                connection.pragma("key", f"raw:{before.hex()}")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
            connection.pragma("secure_delete", "ON")
            connection.pragma("temp_store", "MEMORY")
            connection.pragma("rekey", "" if after is None else f"raw:{after.hex()}")
        finally:
            connection.close()


class EncryptedCursor:
    """The result rows of a statement."""

    def __init__(self, connection: apsw.Connection, cursor: apsw.Cursor) -> None:
        self._cursor = cursor
        self.lastrowid = connection.last_insert_rowid()

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        with _translated():
            yield from self._cursor

    def fetchone(self) -> tuple[Any, ...] | None:
        with _translated():
            return next(self._cursor, None)

    def fetchall(self) -> list[tuple[Any, ...]]:
        with _translated():
            return list(self._cursor)


@contextmanager
def _translated() -> Iterator[None]:
    """Converts errors of apsw into those of `sqlite3`, with the same code."""
    try:
        yield
    except apsw.Error as error:
        code = getattr(error, "extendedresult", None) or getattr(error, "result", None) or sqlite3.SQLITE_ERROR
        primary = code & 0xFF
        kind: type[sqlite3.DatabaseError] = sqlite3.DatabaseError
        if primary in _OPERATIONAL:
            kind = sqlite3.OperationalError
        elif primary == sqlite3.SQLITE_CONSTRAINT:
            kind = sqlite3.IntegrityError
        translated = kind(str(error))
        translated.sqlite_errorcode = code
        raise translated from error
