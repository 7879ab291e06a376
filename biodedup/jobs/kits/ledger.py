"""The centre's ledger of field kits: which sequences and batches came, and which file brought a record first.

Owns `kits.sqlite3` in the gallery's folder, mode 600. Never holds biometric data. It is bookkeeping: the gallery's journal is authoritative.
If the ledger is lost nothing is enrolled twice; the record of what came when begins anew, and with it the counts of a day and of void
sequences.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from biodedup.errors import GalleryDamaged
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.files.names import LEDGER_NAME
from biodedup.gallery.files.private import make_private
from biodedup.jobs.kits.format.batch_file import gaps
from biodedup.keys import KeySource

_TABLES = """
CREATE TABLE IF NOT EXISTS runs (run INTEGER PRIMARY KEY, batches TEXT, received_at REAL, finished INTEGER);
CREATE TABLE IF NOT EXISTS batches (digest TEXT PRIMARY KEY, kit_id TEXT, key TEXT, name TEXT, run INTEGER, received_at REAL);
CREATE TABLE IF NOT EXISTS sequences (key TEXT, sequence INTEGER, kit_id TEXT, encounter_id TEXT, PRIMARY KEY (key, sequence))
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS takers (encounter_id TEXT PRIMARY KEY, run INTEGER, file INTEGER, place INTEGER, kit_id TEXT,
    sequence INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS contents (encounter_id TEXT, digest BLOB, name TEXT, PRIMARY KEY (encounter_id, digest)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS refused (run INTEGER, file INTEGER, place INTEGER, outcome TEXT, PRIMARY KEY (run, file, place))
    WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Taker:
    """Where a record was taken from first. file: which of the run's files; place: its position in that."""

    run: int
    file: int
    place: int
    kit_id: str
    sequence: int


class Ledger:
    """One open ledger. Raises GalleryDamaged, StorageUnavailable."""

    def __init__(self, gallery: Path, keys: KeySource | None = None) -> None:
        self._path = gallery / LEDGER_NAME
        with self._writing():
            make_private(self._path)
            self._sql = LocalStorage(keys).connect(self._path, read_only=False)
            self._sql.executescript(_TABLES)

    def close(self) -> None:
        self._sql.close()

    def run(self, digests: Sequence[str], now: float) -> tuple[int, float]:
        """(run, received_at): the run over these very batches that was interrupted, or a new one."""
        name = " ".join(digests)
        with self._writing():
            found = self._sql.execute(
                "SELECT run, received_at FROM runs WHERE batches = ? AND NOT finished", (name,)
            ).fetchone()
            if found is None:
                run = self._sql.execute("INSERT INTO runs VALUES (NULL, ?, ?, 0)", (name, now)).lastrowid
                found = run, now
        return int(found[0]), float(found[1])

    def finish(self, run: int) -> None:
        with self._writing():
            self._sql.execute("UPDATE runs SET finished = 1 WHERE run = ?", (run,))

    def first_received(self, digest: str, kit_id: str, key: str, name: str, run: int, now: float) -> float | None:
        """When an earlier run had this batch, or None."""
        with self._writing():
            self._sql.execute("INSERT OR IGNORE INTO batches VALUES (?, ?, ?, ?, ?, ?)", (digest, kit_id, key, name, run, now))  # fmt: skip
            first, received_at = self._sql.execute("SELECT run, received_at FROM batches WHERE digest = ?", (digest,)).fetchone()  # fmt: skip
        return None if first == run else float(received_at)

    def take(self, takers: Mapping[str, Taker]) -> None:
        """Encounter_id -> from where it is about to be taken; what stood there before is replaced."""
        rows = [(name, t.run, t.file, t.place, t.kit_id, t.sequence) for name, t in takers.items()]
        self._many("INSERT OR REPLACE INTO takers VALUES (?, ?, ?, ?, ?, ?)", rows)

    def names_of(self, wanted: Sequence[tuple[str, bytes, str]]) -> dict[tuple[str, bytes], str]:
        """Of each (the kit's encounter_id, digest of the content, id bound to its key): the id under which that content came first."""
        self._many("INSERT OR IGNORE INTO contents VALUES (?, ?, ?)", wanted)
        query = "SELECT name FROM contents WHERE encounter_id = ? AND digest = ?"
        with self._writing():
            return {(own, digest): self._sql.execute(query, (own, digest)).fetchone()[0] for own, digest, _ in wanted}

    def taken_since(self, prefix: str, since: float) -> int:
        """How many encounters whose ids begin so were taken by runs after a moment, in seconds."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        query = "SELECT count(*) FROM takers JOIN runs USING (run) WHERE encounter_id >= ? AND encounter_id < ? AND received_at > ?"
        with self._writing():
            return int(self._sql.execute(query, (prefix, end, since)).fetchone()[0])

    def void_with(self, key: str, void: Iterable[int]) -> int:
        """How many sequences of a key are void, once these are, too."""
        known = dict(self._rows("SELECT sequence, encounter_id FROM sequences WHERE key = ?", key))
        return len({n for n, name in known.items() if not name} | (set(void) - known.keys()))

    def taker(self, encounter_id: str) -> Taker | None:
        with self._writing():
            row = self._sql.execute(
                "SELECT run, file, place, kit_id, sequence FROM takers WHERE encounter_id = ?", (encounter_id,)
            ).fetchone()
        return None if row is None else Taker(*row)

    def note_refused(self, run: int, file: int, place: int, outcome: str) -> None:
        """Of a record whose captures were refused, what was told of it: repaired captures may come in a later file of the run."""
        self._many("INSERT OR REPLACE INTO refused VALUES (?, ?, ?, ?)", [(run, file, place, outcome)])

    def refused(self, run: int, file: int, place: int) -> str | None:
        with self._writing():
            found = self._sql.execute(
                "SELECT outcome FROM refused WHERE run = ? AND file = ? AND place = ?", (run, file, place)
            ).fetchone()
        return None if found is None else str(found[0])

    def arrived(self, key: str, kit_id: str, sequences: Mapping[int, str], void: Iterable[int]) -> dict[int, str]:
        """Notes sequences (-> encounter_id) and those that never will come; returns the encounters that had these numbers before,
        where they are others."""
        self._many("INSERT OR IGNORE INTO sequences VALUES (?, ?, ?, ?)", [(key, n, kit_id, name) for n, name in sequences.items()])  # fmt: skip
        # an arrival counts more than the note that it will not come
        self._many("UPDATE sequences SET encounter_id = ? WHERE key = ? AND sequence = ? AND encounter_id = ''", [(name, key, n) for n, name in sequences.items()])  # fmt: skip
        self._many("INSERT OR IGNORE INTO sequences VALUES (?, ?, ?, '')", [(key, n, kit_id) for n in void])
        stored = dict(self._rows("SELECT sequence, encounter_id FROM sequences WHERE key = ?", key))
        return {n: stored[n] for n, name in sequences.items() if stored[n] != name}

    def absent(self, key: str) -> list[tuple[int, int]]:
        """(first, last) of sequences below the highest that came, which neither came nor were voided."""
        return gaps([n for n, _ in self._rows("SELECT sequence, encounter_id FROM sequences WHERE key = ? ORDER BY sequence", key)])  # fmt: skip

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with translated(f"writing {self._path}"):
            try:
                yield
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF not in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                    raise
                raise GalleryDamaged(
                    f"{self._path} is damaged; it is bookkeeping alone: move it away and start again"
                ) from error

    def _rows(self, query: str, *values: object) -> list[tuple[int, str]]:
        with self._writing():
            return self._sql.execute(query, values).fetchall()

    def _many(self, statement: str, rows: Iterable[tuple[object, ...]]) -> None:
        with self._writing():
            self._sql.execute("BEGIN")
            try:
                self._sql.executemany(statement, rows)
                self._sql.execute("COMMIT")
            except sqlite3.Error:
                self._sql.execute("ROLLBACK")
                raise
