"""Keeps the centre's ledger of field kits: the sequences and batches that arrived, and the file that brought each record first.

Owns `kits.sqlite3` in the gallery's folder, mode 0600. Never holds biometric data. The gallery's journal is authoritative: if the ledger is lost,
no record is enrolled twice, but the counts of arrivals, of a day's encounters and of void sequences start again.
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
    """The place from which a record was first enrolled. file: number of the file in the run; place: position of the record in the file."""

    run: int
    file: int
    place: int
    kit_id: str
    sequence: int


class Ledger:
    """An open ledger. All methods raise GalleryDamaged, StorageUnavailable."""

    def __init__(self, gallery: Path, keys: KeySource | None = None) -> None:
        self._path = gallery / LEDGER_NAME
        with self._writing():
            make_private(self._path)
            self._sql = LocalStorage(keys).connect(self._path, read_only=False)
            self._sql.executescript(_TABLES)

    def close(self) -> None:
        self._sql.close()

    def run(self, digests: Sequence[str], now: float) -> tuple[int, float]:
        """(run, received_at) of the interrupted run with exactly these batches, or of a new run."""
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
        """The time at which an earlier run received this batch; None if this run is the first."""
        with self._writing():
            self._sql.execute("INSERT OR IGNORE INTO batches VALUES (?, ?, ?, ?, ?, ?)", (digest, kit_id, key, name, run, now))  # fmt: skip
            first, received_at = self._sql.execute("SELECT run, received_at FROM batches WHERE digest = ?", (digest,)).fetchone()  # fmt: skip
        return None if first == run else float(received_at)

    def take(self, takers: Mapping[str, Taker]) -> None:
        """Stores the places from which encounters are about to be enrolled, by encounter_id. Replaces earlier entries."""
        rows = [(name, t.run, t.file, t.place, t.kit_id, t.sequence) for name, t in takers.items()]
        self._many("INSERT OR REPLACE INTO takers VALUES (?, ?, ?, ?, ?, ?)", rows)

    def names_of(self, wanted: Sequence[tuple[str, bytes, str]]) -> dict[tuple[str, bytes], str]:
        """(kit's encounter_id, digest of the content) -> the id under which this content first arrived. wanted: (kit's encounter_id, digest of the
        content, id bound to the key)."""
        self._many("INSERT OR IGNORE INTO contents VALUES (?, ?, ?)", wanted)
        query = "SELECT name FROM contents WHERE encounter_id = ? AND digest = ?"
        with self._writing():
            return {(own, digest): self._sql.execute(query, (own, digest)).fetchone()[0] for own, digest, _ in wanted}

    def taken_since(self, prefix: str, since: float) -> int:
        """The number of encounters with this prefix of their ids that runs enrolled since a time, in seconds since 1970."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        query = "SELECT count(*) FROM takers JOIN runs USING (run) WHERE encounter_id >= ? AND encounter_id < ? AND received_at > ?"
        with self._writing():
            return int(self._sql.execute(query, (prefix, end, since)).fetchone()[0])

    def void_with(self, key: str, void: Iterable[int]) -> int:
        """The number of void sequences of a key, if these sequences become void, too."""
        known = dict(self._rows("SELECT sequence, encounter_id FROM sequences WHERE key = ?", key))
        return len({n for n, name in known.items() if not name} | (set(void) - known.keys()))

    def taker(self, encounter_id: str) -> Taker | None:
        with self._writing():
            row = self._sql.execute(
                "SELECT run, file, place, kit_id, sequence FROM takers WHERE encounter_id = ?", (encounter_id,)
            ).fetchone()
        return None if row is None else Taker(*row)

    def note_refused(self, run: int, file: int, place: int, outcome: str) -> None:
        """Stores the outcome of a record whose captures were refused, since a later file of the run may bring new captures of it."""
        self._many("INSERT OR REPLACE INTO refused VALUES (?, ?, ?, ?)", [(run, file, place, outcome)])

    def refused(self, run: int, file: int, place: int) -> str | None:
        with self._writing():
            found = self._sql.execute(
                "SELECT outcome FROM refused WHERE run = ? AND file = ? AND place = ?", (run, file, place)
            ).fetchone()
        return None if found is None else str(found[0])

    def arrived(self, key: str, kit_id: str, sequences: Mapping[int, str], void: Iterable[int]) -> dict[int, str]:
        """Stores arrived sequences (-> encounter_id) and void sequences. Returns sequence -> earlier encounter_id, for sequences that arrived
        before with another encounter."""
        self._many("INSERT OR IGNORE INTO sequences VALUES (?, ?, ?, ?)", [(key, n, kit_id, name) for n, name in sequences.items()])  # fmt: skip
        # a record that arrives replaces the note that its sequence is void
        self._many("UPDATE sequences SET encounter_id = ? WHERE key = ? AND sequence = ? AND encounter_id = ''", [(name, key, n) for n, name in sequences.items()])  # fmt: skip
        self._many("INSERT OR IGNORE INTO sequences VALUES (?, ?, ?, '')", [(key, n, kit_id) for n in void])
        stored = dict(self._rows("SELECT sequence, encounter_id FROM sequences WHERE key = ?", key))
        return {n: stored[n] for n, name in sequences.items() if stored[n] != name}

    def absent(self, key: str) -> list[tuple[int, int]]:
        """(first, last) of each range of sequences below the highest that neither arrived nor are void."""
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
                    f"{self._path} is damaged; it is only bookkeeping: move it away and start again"
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
