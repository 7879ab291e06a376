"""Calls of processes that only read a gallery in a folder, until its writer takes them into the audit log.

Owns the database `readers.sqlite3` beside the gallery's: readers append to it, since only the writer may write the gallery's. Never says which
calls are recorded.

1. A record is durable when `append` returns. Its value is H(the value before, its other columns), as in the audit log (audit.py).
2. The writer takes records in a commit of the gallery. A row of `meta`, which the hash chain covers, keeps the number and the value of the
   newest one that was taken, so that each is taken once, whatever crashes.
3. Records that do not follow from that row were dropped, changed or put back. The writer takes them nevertheless, with a record that says so.
4. What no writer has taken yet can be cut off at its end by somebody who writes the folder, as nothing outside this file knows of it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from biodedup.errors import GalleryDamaged
from biodedup.gallery.catalogue.audit import AUDIT_COLUMNS, AuditRecord, chained, record_of
from biodedup.gallery.catalogue.chain import NO_LINK, ChainHash
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import Storage
from biodedup.gallery.files.names import READERS_NAME

TAKEN = "readers_taken"
"""The row of `meta` with the newest record that was taken."""
_HEAD = "key INTEGER PRIMARY KEY, number INTEGER, value BLOB, key_id TEXT"


@dataclass(frozen=True)
class Place:
    """A record in the order of readers' records. number: 0 before the first; value: its chained value; key_id: of the key it was made with."""

    number: int = 0
    value: bytes = NO_LINK
    key_id: str = ""

    def to_json(self) -> str:
        return json.dumps([self.number, self.value.hex(), self.key_id])

    @classmethod
    def from_json(cls, text: str | None) -> Place:
        """None: nothing was ever taken. Raises GalleryDamaged."""
        if text is None:
            return cls()
        try:
            number, value, key_id = json.loads(text)
            if type(number) is int and type(key_id) is str:
                return cls(number, bytes.fromhex(value), key_id)
        except (TypeError, ValueError, RecursionError):
            pass
        raise GalleryDamaged(
            "the place of readers' records is damaged; run `biodedup log verify`, and restore a backup"
        )


@dataclass(frozen=True)
class Waiting:
    """Records that no writer has taken. last: the place of the newest one; problem: why they do not follow, "" where they do."""

    records: tuple[AuditRecord, ...]
    last: Place
    problem: str


class Readings:
    """One gallery's. taken: returns the place that the gallery's database keeps. Callers hold the gallery's lock."""

    def __init__(self, storage: Storage, folder: Path, taken: Callable[[], Place], *, read_only: bool = False) -> None:
        """read_only: nothing is appended or forgotten."""
        self._read_only = read_only
        self._storage, self._path, self._taken = storage, folder / READERS_NAME, taken
        self._connection: sqlite3.Connection | None = None

    def append(self, records: Sequence[AuditRecord]) -> None:
        """Raises StorageUnavailable, GalleryBusy, GalleryDamaged."""
        with translated(f"recording calls in {self._path}"):
            connection = self._connected()
            connection.execute("BEGIN IMMEDIATE")
            try:
                connection.execute(f"CREATE TABLE IF NOT EXISTS call ({AUDIT_COLUMNS['audit']})")
                connection.execute(f"CREATE TABLE IF NOT EXISTS head ({_HEAD})")
                chain_hash = _hash_of(connection)
                # a file that is new, or was put back, goes on behind what was taken
                before = max(self._head(connection), self._taken(), key=lambda place: place.number)
                numbered = [replace(record, number=n) for n, record in enumerate(records, before.number + 1)]
                values = list(chained(chain_hash, before.value, numbered))
                marks = ",".join("?" * 10)
                rows = [(*record.values, value) for record, value in zip(numbered, values, strict=True)]
                connection.executemany(f"REPLACE INTO call VALUES ({marks})", rows)
                head = (1, numbered[-1].number, values[-1], chain_hash.key_id)
                connection.execute("REPLACE INTO head VALUES (?,?,?,?)", head)
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise

    def waiting(self) -> Waiting | None:
        """None for nothing. Raises GalleryDamaged, StorageUnavailable."""
        if not self._path.exists():
            return None
        taken = self._taken()
        with translated(f"reading {self._path}"):
            connection = self._connected()
            try:
                rows = connection.execute(
                    "SELECT * FROM call WHERE number > ? ORDER BY number", (taken.number,)
                ).fetchall()
                head = self._head(connection)
            except sqlite3.OperationalError as error:
                if "no such table" in str(error):
                    return None  # a reader is about to make it
                raise
        if not rows and head.number <= taken.number:
            return None
        last = head
        if rows and rows[-1][0] >= head.number:
            last = Place(rows[-1][0], rows[-1][-1], head.key_id)
        problem = _problem(rows, taken, head, _hash_of(connection))
        return Waiting(tuple(record_of(row) for row in rows), last, problem)

    def forget(self, number: int) -> None:
        """Records up to one were taken. Raises nothing: they are forgotten the next time."""
        with suppress(sqlite3.Error):
            self._connected().execute("DELETE FROM call WHERE number <= ?", (number,))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = self._storage.connect(self._path, read_only=self._read_only)
        return self._connection

    @staticmethod
    def _head(connection: sqlite3.Connection) -> Place:
        found = connection.execute("SELECT number, value, key_id FROM head").fetchone()
        return Place(*found) if found else Place()


def _hash_of(connection: sqlite3.Connection) -> ChainHash:
    return ChainHash(getattr(connection, "chain_key", None))


def _problem(rows: Sequence[tuple[Any, ...]], taken: Place, head: Place, chain_hash: ChainHash) -> str:
    """rows: behind the newest one that was taken, in their order."""
    number, value = taken.number, taken.value
    foreign = head.key_id != chain_hash.key_id  # written before the gallery was encrypted, or decrypted
    for row in rows:
        record = record_of(row)
        if record.number != number + 1:
            return f"records {number + 1} to {record.number - 1} are lost"
        if not foreign and next(chained(chain_hash, value, [record])) != row[-1]:
            return f"record {record.number} was changed, forged or put back"
        number, value = record.number, row[-1]
    if number < head.number:
        return f"records {number + 1} to {head.number} are lost"
    return (
        "" if (number, value) == (head.number, head.value) else "the newest record is not the one that was written last"
    )
