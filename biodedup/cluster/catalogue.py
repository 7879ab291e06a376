"""The catalogue of a register in PostgreSQL: the same tables and the same checksummed rows as in SQLite.

Owns the schema, all SQL statements, the connection, and the lock that allows only one front-end to write. Never decides and never searches.
Each gallery has its own schema, `biodedup_NAME`. Besides the tables of `CatalogueTables` it has:

| table | a row is |
|---|---|
| commit_log | one commit: its number, its id, and the tables in which it inserted or deleted rows |
| lease | one task that only one front-end at a time may do: its holder, its fence (grows with each new holder), its expiry |
| retired | one file of the segment store that the manifest does not name any more, and since when |

1. A writer first takes `pg_advisory_xact_lock`, in a READ COMMITTED transaction, and reads in later statements. A REPEATABLE READ
   transaction would read the state before the lock was granted.
2. The number of a commit is a primary key. So two transactions can never commit the same number, even without the lock.
3. If the reply to a commit is lost, the commit is looked up in `commit_log` under the lock. The lock shows that the transaction has ended.
4. Each commit adds its link to the hash chain in the same transaction, under the lock, by the same code as in SQLite (chain_writer.py).
5. Nothing depends on session state (session locks, search_path), so that a connection pooler can be used.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, cast

import psycopg
import xxhash
from psycopg.pq import TransactionStatus

from biodedup.cluster.key import KEY_SETTING
from biodedup.cluster.store import stored_name
from biodedup.errors import BiodedupError, GalleryBusy, GalleryDamaged, InvalidInput, NotAGallery, StorageUnavailable
from biodedup.gallery.answers import StoredDecision
from biodedup.gallery.catalogue.audit import AuditRecord
from biodedup.gallery.catalogue.chain import CHAINED, COVERED, is_chained, pack_row
from biodedup.gallery.catalogue.chain_writer import ChainWriter
from biodedup.gallery.catalogue.sqlite import (
    ADDED,
    ADDED_SETTINGS,
    FORMAT_VERSION,
    INDEXED,
    REPLACED,
    STRIDE,
    CatalogueTables,
    JournalCell,
    State,
    has_types_of,
    row_checksum,
    table_columns,
)
from biodedup.gallery.index_settings import IndexSettings
from biodedup.gallery.segments.layout import SegmentEntry
from biodedup.values import COLUMNS

CLUSTER_FORMAT = 1
"""The format of the schema in PostgreSQL. The rows have the format of galleries in folders (FORMAT_VERSION)."""
_TYPES = {"TEXT": 'text COLLATE "C"', "INTEGER": "bigint", "REAL": "double precision", "BLOB": "bytea"}
_BY_COMMIT = ("encounter", "tombstone", "pending", "judged")
"""Tables with an index on the commit's number: other front-ends read their rows of the newest commits."""
_ORDERED = {"encounter": "commits, ordinal"}
"""Tables whose rows are read in the order of insertion. The sequence `ordinal` alone is not that order, because transactions overlap."""
_COMMIT_COLUMN = {"chain": "written"}
"""The column with the number of the commit that inserted a row, where it is not `commits`."""
_COPY_ROWS_MIN = 64  # at least so many rows are written with COPY
_PIECE_ROWS = 1_000  # subjects whose templates are deleted at once: the server returns them, for the hash chain
_UNSENT_MOST = 1_000  # so many rows are buffered before they are sent
_STATEMENT_VALUES = 48  # psycopg caches its parsing of statements with up to 50 values
_SETTLE_S = 5.0  # the longest time to look for a commit whose reply was lost
_LOG_COMMITS = 1_000_000  # the number of commits that `commit_log` keeps


@dataclass(frozen=True)
class Limits:
    """Time limits. connect_s: to connect; lock_ms: to wait for the writers' lock; idle_ms: the server ends a transaction that is idle for
    longer, so that a stopped process does not hold the lock."""

    connect_s: int = 5
    lock_ms: int = 10_000
    idle_ms: int = 60_000


@dataclass(frozen=True)
class Changes:
    """What was committed since a state. put, dropped: names of the tables in which rows were inserted, or deleted."""

    put: frozenset[str]
    dropped: frozenset[str]


class PostgresCatalogue(CatalogueTables):
    """The tables of one gallery, over one connection. A lost connection is opened again. Callers hold the gallery's lock.

    conninfo: a connection string of libpq; gallery: the name of the gallery: letters, digits and `_`.
    """

    def __init__(self, conninfo: str, gallery: str, limits: Limits = Limits()) -> None:
        self.gallery = gallery
        self._conninfo = conninfo
        self._schema = f"biodedup_{gallery}"
        self._limits = limits
        self._lock_key = xxhash.xxh3_64_intdigest(self._schema.encode()) - (1 << 63)
        self.take_key(None)
        self.key_file = ""
        """The content of an encrypted gallery's key file (key.py)."""
        self.register_id = secrets.token_hex(8)
        """The name of the register's folder in the segment store. Random for a new register; `open` reads that of an existing one."""
        self._connection: psycopg.Connection[tuple[Any, ...]] | None = None
        self._begun: State | None = None
        self._intended: State | None = None
        self._put: set[str] = set()
        self._dropped: set[str] = set()
        self._unsent: dict[str, dict[Any, Sequence[Any]]] = {}
        """Table -> rows that are not sent yet, by key in tables of REPLACED, else by position."""
        self.erased = False
        self.uncertain = False
        """Whether the result of the last commit is unknown, because the server could not be asked."""

    # the connection ---------------------------------------------------------------------------------------------

    def _connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        known = self._connection
        if known is not None and not known.closed and known.info.transaction_status == TransactionStatus.IDLE:
            return known
        self._drop_connection()
        with _translated("connecting to PostgreSQL"):
            self._connection = psycopg.connect(
                self._conninfo,
                autocommit=True,
                connect_timeout=self._limits.connect_s,
                application_name="biodedup",
                prepare_threshold=None,  # a prepared statement would be state of a session
            )
        return self._connection

    def _drop_connection(self) -> None:
        if self._connection is not None:
            with suppress(psycopg.Error):
                self._connection.close()
        self._connection = None

    def _living(self) -> psycopg.Connection[tuple[Any, ...]]:
        if self._connection is None or self._connection.closed:
            raise StorageUnavailable("the connection to PostgreSQL was lost; nothing was acknowledged; send it again")
        return self._connection

    def take_key(self, chain_key: bytes | None) -> None:
        """Of the hash chain; None in a register that is not encrypted."""
        self._chain_key = chain_key
        self.chain = ChainWriter(self, chain_key)

    def another(self) -> PostgresCatalogue:
        """The same register, over a connection of its own."""
        other = PostgresCatalogue(self._conninfo, self.gallery, self._limits)
        other.take_key(self._chain_key)
        return other

    def record_reading(self, records: Sequence[AuditRecord]) -> None:
        """Commits calls of a process that only reads."""
        self.begin()
        try:
            self.add_audit(records)
            state = self.state()
            self.set_state(replace(state, commits=state.commits + 1, commit_id=secrets.token_hex(8)))
            self.commit()
        finally:
            self.rollback()

    def _run(self, statement: str, values: Sequence[Any] | None = None) -> psycopg.Cursor[tuple[Any, ...]]:
        self._send()
        with _translated("PostgreSQL"):
            return self._living().execute(statement, values)

    def _later(self, table: str, rows: Sequence[Sequence[Any]]) -> None:
        """Buffers rows that this transaction inserts. They are sent before the next statement that reads, many rows in a statement, so that
        a commit takes few round trips."""
        unsent = self._unsent.setdefault(table, {})
        for row in rows:
            unsent[row[0] if table in REPLACED else len(unsent)] = row
        if sum(map(len, self._unsent.values())) >= _UNSENT_MOST:
            self._send()

    def _send(self) -> None:
        unsent, self._unsent = self._unsent, {}
        if not unsent:
            return
        before: dict[str, psycopg.Cursor[tuple[Any, ...]]] = {}
        with _translated("PostgreSQL"), self._living().cursor() as cursor:
            with self._living().pipeline():
                for table, of_table in unsent.items():
                    if names := [name for name in of_table if table in REPLACED and is_chained(table, (name,))]:
                        query = f'SELECT {_names(table)} FROM {self._table(table)} WHERE "{table_columns(table)[0][0]}" = ANY(%s)'
                        before[table] = self._living().cursor().execute(query, (names,))
                    self._insert(cursor, table, list(of_table.values()))
            dropped = {table: replaced.fetchall() for table, replaced in before.items()}
        for table, of_table in unsent.items():
            self._note_dropped(table, dropped.get(table, ()))
            self._note_put(table, of_table.values())

    def _insert(self, cursor: psycopg.Cursor[tuple[Any, ...]], table: str, rows: Sequence[Sequence[Any]]) -> None:
        together = max(_STATEMENT_VALUES // len(rows[0]), 1)
        for low in range(0, len(rows), together):
            some = rows[low : low + together]
            cursor.execute(self._insertion(table, len(some), len(some[0])), list(chain.from_iterable(some)))

    def _note_put(self, table: str, rows: Iterable[Sequence[Any]]) -> None:
        """For the hash chain. rows: with their checksums and the number of the commit."""
        if table in CHAINED:
            for *row, _, _ in rows:
                self.chain.put(table, row, pack_row(row))

    def _note_dropped(self, table: str, rows: Iterable[Sequence[Any]], *, listed: bool = True) -> None:
        """For the hash chain."""
        for row in rows:
            self.chain.drop(table, row, listed=listed)

    def _insertion(self, table: str, rows: int, width: int) -> str:
        """The statement that inserts `rows` rows of `width` values each, including checksum and commit number."""
        marks = ", ".join(["(" + ", ".join(["%s"] * width) + ")"] * rows)
        statement = f"INSERT INTO {self._table(table)} VALUES {marks}"
        if table not in REPLACED:
            return statement
        first, *others = [column for column, _ in table_columns(table)]
        changed = ", ".join(
            f'"{column}" = excluded."{column}"' for column in (*others, "checksum", _commit_column(table))
        )
        return f'{statement} ON CONFLICT ("{first}") DO UPDATE SET {changed}'

    def _table(self, table: str) -> str:
        return f'"{self._schema}"."{table}"'

    # transactions -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        self._connect()
        self._put, self._dropped, self._intended, self.uncertain = set(), set(), None, False
        self._unsent = {}
        self.chain.begin()
        limits = self._limits
        self._run(
            f"BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = {limits.lock_ms}; "
            f"SET LOCAL idle_in_transaction_session_timeout = {limits.idle_ms}; "
            f"SELECT pg_advisory_xact_lock({self._lock_key})"
        )
        self._begun = self.state()

    def begin_reading(self) -> None:
        self._connect()
        self._begun = None
        self._run("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")

    def commit(self) -> None:
        """Returns when the commit is durable. Raises StorageUnavailable if it failed, or if its result is unknown (then `uncertain` is
        set); GalleryDamaged if the hash chain is not as the last commit left it."""
        self._send()  # all rows are noted for the chain
        self.chain.extend()
        self._send()
        try:
            done = self._run("COMMIT").statusmessage
        except BaseException as error:
            self._drop_connection()
            self._settle(error)
            return
        if done != "COMMIT":
            raise StorageUnavailable("PostgreSQL rolled the transaction back; nothing was acknowledged; send it again")

    def _settle(self, error: BaseException) -> None:
        """Looks for a commit whose reply was lost. Returns if it is durable; otherwise raises the error."""
        assert self._intended is not None, "a commit has a state"
        self.uncertain = True
        until = time.monotonic() + _SETTLE_S
        while isinstance(error, BiodedupError):
            try:
                stands = self._stands(self._intended.commit_id)
            except (GalleryBusy, StorageUnavailable):
                if time.monotonic() > until:
                    raise error from None
                time.sleep(0.05)
                continue
            self.uncertain = False
            if stands:
                return
            break
        raise error

    def _stands(self, commit_id: str) -> bool:
        """Whether a commit is in the log. Takes the writers' lock first, so that the transaction of the lost connection has ended."""
        self._connect()
        try:
            self._run(
                f"BEGIN; SET LOCAL lock_timeout = {self._limits.lock_ms}; SELECT pg_advisory_xact_lock({self._lock_key})"
            )
            query = f"SELECT count(*) FROM {self._table('commit_log')} WHERE commit_id = %s"
            return bool(_only(self._run(query, (commit_id,)).fetchall()))
        finally:
            self.rollback()

    @property
    def in_transaction(self) -> bool:
        known = self._connection
        return known is not None and not known.closed and known.info.transaction_status != TransactionStatus.IDLE

    def rollback(self) -> None:
        """Never raises. If the rollback fails, the connection is closed, and the server rolls back."""
        self._unsent = {}
        known = self._connection
        if known is None or known.closed:
            return
        if known.info.transaction_status != TransactionStatus.IDLE:
            try:
                known.execute("ROLLBACK")
            except psycopg.Error:
                self._drop_connection()

    def close(self) -> None:
        self._drop_connection()

    # the schema -------------------------------------------------------------------------------------------------

    def open(self, gallery_id: str, settings: str, *, create: bool, new: tuple[str, bytes | None] = ("", None)) -> None:
        """Checks the server's durability settings and the format of the schema. create: create the gallery if it is absent; new: the key file
        and the key of the hash chain, for a new gallery. Raises NotAGallery, InvalidInput, StorageUnavailable."""
        self._connect()
        self._check_durable()
        if not self._exists():
            if not create:
                raise NotAGallery(f"the database has no gallery {self.gallery!r}; check the URL")
            self.take_key(new[1])
            self._lay(lambda: self._create_with(gallery_id, settings, new[0]))
        settings_stored = self.meta()
        found = settings_stored.get("cluster_format")
        if found != str(CLUSTER_FORMAT):
            raise NotAGallery(f"the gallery in PostgreSQL has format {found}, this version reads {CLUSTER_FORMAT}")
        self.register_id = settings_stored["register_id"]
        self.key_file = settings_stored.get(KEY_SETTING, "")

    def _create_with(self, gallery_id: str, settings: str, key_file: str) -> None:
        self.create(gallery_id, settings)
        self.put_key_file(key_file)

    def put_key_file(self, content: str) -> None:
        """Stores the key file of a new gallery; "" for a gallery without encryption."""
        if content:
            self.put("meta", [(KEY_SETTING, content)])

    def _lay(self, fill: Callable[[], None], after: int = -1) -> bool:
        """Creates the schema and calls `fill` to insert its rows, in one commit. Returns False if another front-end has created it
        meanwhile."""
        self._connect()
        try:
            self._run(
                f"BEGIN; SET LOCAL lock_timeout = {self._limits.lock_ms}; SELECT pg_advisory_xact_lock({self._lock_key})"
            )
            if self._exists():
                self.rollback()
                return False
            self._begun, self._put, self._dropped = State(commits=after), set(), set()
            self.chain.begin()
            fill()
            self.commit()
            return True
        except BaseException:
            self.rollback()
            raise

    def lay(self, fill: Callable[[], None], *, after: int) -> None:
        """Creates a gallery in one commit. fill: calls `lay_tables`, inserts rows and sets the state; after: the number of the commit
        before. Raises InvalidInput if the gallery exists."""
        self._connect()
        self._check_durable()
        if self._exists() or not self._lay(fill, after):
            raise InvalidInput(f"the database has a gallery {self.gallery!r}; name another one")

    def _exists(self) -> bool:
        query = "SELECT count(*) FROM information_schema.tables WHERE table_schema = %s AND table_name = 'meta'"
        return bool(_only(self._run(query, (self._schema,)).fetchall()))

    def _check_durable(self) -> None:
        for setting in ("fsync", "synchronous_commit"):
            if _only(self._run(f"SHOW {setting}").fetchall()) == "off":
                raise InvalidInput(
                    f"PostgreSQL has {setting} = off: a power failure can undo commits that it has acknowledged; set {setting} to on"
                )

    def lay_tables(self, gallery_id: str, config: str) -> None:
        self._run(f'CREATE SCHEMA "{self._schema}"')
        for table in self.tables:
            self._create(table)
        self._run(
            f"CREATE TABLE {self._table('commit_log')} (commits bigint PRIMARY KEY, commit_id text NOT NULL UNIQUE, "
            "put text NOT NULL, dropped text NOT NULL)"
        )
        self._run(
            f"CREATE TABLE {self._table('lease')} (name text PRIMARY KEY, holder text NOT NULL, fence bigint NOT NULL, "
            "expires timestamptz NOT NULL)"
        )
        self._run(f"CREATE TABLE {self._table('retired')} (name text PRIMARY KEY, since timestamptz NOT NULL)")
        settings = {"gallery_id": gallery_id, "config": config, "format": str(FORMAT_VERSION)}
        settings |= {"cluster_format": str(CLUSTER_FORMAT), "register_id": self.register_id} | dict.fromkeys(
            ADDED_SETTINGS, "1"
        )
        self.put("meta", sorted(settings.items()))

    def _create(self, table: str) -> None:
        columns = (column.split() for column in self.tables[table].split(", "))
        kinds = ", ".join(" ".join([f'"{name}"', _TYPES[kind], *more]) for name, kind, *more in columns)
        ordinal = ", ordinal bigint GENERATED BY DEFAULT AS IDENTITY" if table in _ORDERED else ""
        commits = f"{_commit_column(table)} bigint NOT NULL"
        self._run(f"CREATE TABLE {self._table(table)} ({kinds}, checksum bigint NOT NULL, {commits}{ordinal})")
        for column in (*INDEXED.get(table, ()), *(["commits"] if table in _BY_COMMIT else [])):
            self._run(f"CREATE INDEX ON {self._table(table)} ({column})")

    def exists(self, table: str) -> bool:
        return table in self._there()

    def _there(self) -> set[str]:
        """The names of the tables that the schema has."""
        query = "SELECT table_name FROM information_schema.tables WHERE table_schema = %s"
        return {name for (name,) in self._run(query, (self._schema,)).fetchall()}

    def renew(self) -> None:
        """Lays the tables that a register of an older release lacks, in a commit of its own. Raises GalleryDamaged where one was there."""
        self._connect()
        if self.tables.keys() <= self._there() and ADDED_SETTINGS <= self.meta().keys():
            return
        self.begin()
        try:
            there, settings, state = self._there(), self.meta(), self.state()
            for table in sorted(self.tables.keys() - there):
                if ADDED.get(table) in (None, *settings):
                    raise GalleryDamaged(f"table {table} is lost; restore the database from a backup")
                self._create(table)
            if "chain" in settings and ADDED["budget"] not in settings:
                self.chain.anew = COVERED
            self.put("meta", [(name, "1") for name in sorted(ADDED_SETTINGS - settings.keys())])
            self.set_state(replace(state, commits=state.commits + 1, commit_id=secrets.token_hex(8)))
            self.commit()
            self.chain.anew = ""
        finally:
            self.rollback()

    # commits of other front-ends --------------------------------------------------------------------------------

    def set_state(self, state: State) -> None:
        """Sets the counters, and inserts the commit into the log. Raises GalleryBusy if it would not follow the newest commit."""
        assert self._begun is not None, "only a writer sets the state"
        if state.commits != self._begun.commits + 1:
            raise GalleryBusy(
                "another front-end has committed meanwhile; nothing of this call was written; send it again"
            )
        super().set_state(state)
        self._intended = state
        values = (state.commits, state.commit_id, " ".join(sorted(self._put)), " ".join(sorted(self._dropped)))
        self._later("commit_log", [values])
        self._send()

    def changes_since(self, known: State) -> Changes | None:
        """The changes since a state that this front-end has seen; None if there are none. Raises GalleryDamaged if the server does not have
        that state: it was restored from a backup, or failed over to a standby that lacks commits."""
        query = f"SELECT commits, commit_id, put, dropped FROM {self._table('commit_log')} WHERE commits >= %s ORDER BY commits"
        found = self._run(query, (known.commits,)).fetchall()
        if not found or found[0][:2] != (known.commits, known.commit_id):
            raise GalleryDamaged(
                f"PostgreSQL does not have commit {known.commits} as this front-end saw it: it was restored to an older state, or is another one; "
                "stop all front-ends, find out what was lost, and open the gallery again"
            )
        later = found[1:]
        if not later:
            return None
        put, dropped = (frozenset(name for row in later for name in row[at].split()) for at in (2, 3))
        return Changes(put, dropped)

    def set_index(self, settings: IndexSettings) -> None:
        super().set_index(settings)
        self._put.add("index_settings")  # not "meta": every commit changes rows of `meta`

    def subjects_from(self, row: int) -> list[tuple[int, str, str, int]]:
        """As `subjects`, for rows from `row` on."""
        return cast("list[tuple[int, str, str, int]]", list(self._all("subject", "row", "row >= ?", (row,))))

    def cells_from(self, row: int) -> Iterator[JournalCell]:
        """As `cells`, for rows from `row` on."""
        for key, vector, minutiae, quality in self._all("cell", "key", "key >= ?", (row * STRIDE,)):
            yield JournalCell(key // STRIDE, COLUMNS[key % STRIDE], vector, minutiae, quality)

    def answers_since(self, commits: int) -> dict[str, StoredDecision]:
        """As `answers`, for later commits only."""
        rows = self._all("encounter", None, "commits > ?", (commits,))
        return {key: StoredDecision(digest, outcome, answer) for key, digest, outcome, answer in rows}

    def tombstones_since(self, commits: int) -> list[int]:
        """As `tombstones`, for later commits only."""
        return sorted(row for row, _ in self._all("tombstone", None, "commits > ?", (commits,)))

    def pending_since(self, commits: int) -> dict[int, str]:
        """As `pending`, for later commits only."""
        return {row: encounter_id for row, encounter_id in self._all("pending", "row", "commits > ?", (commits,))}

    def judged_since(self, commits: int) -> list[tuple[int, int]]:
        """The pairs (row, other) that later commits inserted."""
        return [(row, other) for _, row, other in self._all("judged", "number", "commits > ?", (commits,))]

    # leases and files ---------------------------------------------------------------------------------------------

    def take_lease(self, name: str, holder: str, seconds: float) -> int | None:
        """Takes or renews a lease for some seconds. Returns its fence; None if another holder has it."""
        self._connect()
        table = self._table("lease")
        found = self._run(
            f"INSERT INTO {table} VALUES (%s, %s, 1, clock_timestamp() + make_interval(secs => %s)) "
            f"ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, expires = excluded.expires, "
            f"fence = {table}.fence + CASE WHEN {table}.holder = excluded.holder THEN 0 ELSE 1 END "
            f"WHERE {table}.holder = excluded.holder OR {table}.expires < clock_timestamp() RETURNING fence",
            (name, holder, seconds),
        ).fetchall()
        return int(found[0][0]) if found else None

    def give_lease_back(self, name: str, holder: str) -> None:
        self._connect()
        self._run(
            f"UPDATE {self._table('lease')} SET expires = '-infinity' WHERE name = %s AND holder = %s", (name, holder)
        )

    def holds_lease(self, name: str, holder: str, fence: int) -> bool:
        """Whether the holder still has the lease. It locks the row, so that no front-end can take the lease before the transaction ends."""
        query = f"SELECT fence FROM {self._table('lease')} WHERE name = %s AND holder = %s AND expires > clock_timestamp() FOR UPDATE"
        return [row[0] for row in self._run(query, (name, holder)).fetchall()] == [fence]

    def retire(self, names: Iterable[str]) -> None:
        """Records that the manifest does not name these files of the segment store any more."""
        statement = f"INSERT INTO {self._table('retired')} VALUES (%s, now()) ON CONFLICT (name) DO UPDATE SET since = excluded.since"
        for name in names:
            self._run(statement, (name,))

    def retired(self) -> dict[str, float]:
        """File of the segment store that the manifest does not name -> seconds since then."""
        query = f"SELECT name, extract(epoch FROM clock_timestamp() - since)::float8 FROM {self._table('retired')}"
        return {name: age for name, age in self._run(query).fetchall()}

    def forget_retired(self, names: Sequence[str]) -> None:
        self._connect()
        self._run(f"DELETE FROM {self._table('retired')} WHERE name = ANY(%s)", (list(names),))

    def clear_journal(self) -> None:
        super().clear_journal()
        self.forget_journal_changes()
        self._trim_log()

    def trim_journal(self, end_row: int, commits: int) -> None:
        """Deletes the rows before one, and the answers up to a commit, which a segment holds now. These are all that these commits put into the
        journal, so that their lists of changes go, too."""
        query = f"SELECT coalesce(min(row), %s) FROM {self._table('subject')}"
        first = int(_only(self._run(query, (end_row,)).fetchall()))
        pieces = [
            (low * STRIDE, min(low + _PIECE_ROWS, end_row) * STRIDE) for low in range(first, end_row, _PIECE_ROWS)
        ]
        self._delete("cell WHERE key >= ? AND key < ?", pieces, listed=False)
        self._delete("subject WHERE row < ?", [(end_row,)], listed=False)
        self._delete("encounter WHERE commits <= ?", [(commits,)], listed=False)
        self._delete("row_change WHERE journal = 1 AND commits <= ?", [(commits,)])
        self._trim_log()

    def _trim_log(self) -> None:
        assert self._begun is not None, "only a writer deletes"
        oldest = self._begun.commits - _LOG_COMMITS
        self._run(f"DELETE FROM {self._table('commit_log')} WHERE commits < %s", (oldest,))

    # rows with checksums ----------------------------------------------------------------------------------------

    def put(self, table: str, rows: Iterable[Sequence[Any]]) -> None:
        assert self._begun is not None, "rows are put in a writer's transaction"
        number = self._begun.commits + 1
        complete = [(*row, row_checksum(row), number) for row in rows]
        if not complete:
            return
        self._put.add(table)
        if len(complete) >= _COPY_ROWS_MIN and table not in REPLACED:
            self._copy(table, complete)
        else:
            self._later(table, complete)

    def _copy(self, table: str, rows: Sequence[Sequence[Any]]) -> None:
        statement = f"COPY {self._table(table)} ({_names(table)}, checksum, {_commit_column(table)}) FROM STDIN"
        self._send()
        with (
            _translated("PostgreSQL"),
            self._living().cursor() as cursor,
            cursor.copy(statement) as copy,
        ):
            for row in rows:
                copy.write_row(row)
        self._note_put(table, rows)

    def _all(
        self, table: str, order: str | None = None, where: str = "", which: tuple[Any, ...] = ()
    ) -> Iterator[tuple[Any, ...]]:
        query = f"SELECT {_names(table)}, checksum FROM {self._table(table)}"
        query += f" WHERE {where.replace('?', '%s')}" if where else ""
        order = order or _ORDERED.get(table)
        query += f" ORDER BY {order}" if order else ""
        rows = None if where else self.chain.reading(table)
        for *values, checksum in self._run(query, which or None).fetchall():
            if not has_types_of(table, values) or row_checksum(values) != checksum:
                raise GalleryDamaged(f"a row of table {table} is damaged; restore the database from a backup")
            if rows is not None and is_chained(table, values):
                rows.add(pack_row(values))
            yield tuple(values)
        if rows is not None:
            self.chain.was_read(table, rows)

    def rows_of(self, table: str) -> Iterator[tuple[Any, ...]]:
        """All rows of a table without their checksums, ordered by key or by insertion."""
        return self._all(table, _ORDERED.get(table) or f'"{table_columns(table)[0][0]}"')

    def _delete(self, which: str, values: Iterable[tuple[Any, ...]] = ((),), *, listed: bool = True) -> None:
        """listed: whether the hash chain lists the rows as dropped."""
        table, _, condition = which.partition(" WHERE ")
        statement = f"DELETE FROM {self._table(table)}" + (
            f" WHERE {condition.replace('?', '%s')}" if condition else ""
        )
        removed = 0
        for some in values:
            if table not in CHAINED:
                removed += self._run(statement, some or None).rowcount
                continue
            rows = self._run(f"{statement} RETURNING {_names(table)}", some or None).fetchall()
            self._note_dropped(table, rows, listed=listed)
            removed += len(rows)
        if removed:
            self._dropped.add(table)

    def drop_segments(self, numbers: Iterable[int]) -> None:
        numbers = list(numbers)
        gone = [entry for entry in self.segments() if entry.number in numbers]
        super().drop_segments(numbers)
        self.retire(stored_name(entry.number, kind, entry.files[kind]) for entry in gone for kind in entry.files)

    def add_segment(self, entry: SegmentEntry) -> None:
        super().add_segment(entry)
        names = [stored_name(entry.number, kind, entry.files[kind]) for kind in entry.files]
        self._run(f"DELETE FROM {self._table('retired')} WHERE name = ANY(%s)", (names,))

    def _last_number(self, table: str) -> int:
        return int(_only(self._run(f"SELECT coalesce(max(number), 0) FROM {self._table(table)}").fetchall()))

    def _keys(self, table: str) -> list[str]:
        return [key for (key,) in self._run(f"SELECT key FROM {self._table(table)} ORDER BY key").fetchall()]

    def database_problems(self) -> list[str]:
        return []  # PostgreSQL checks its own pages (data checksums, amcheck)

    def _table_problems(self, table: str) -> list[str]:
        try:
            for _ in self._all(table):
                pass
        except GalleryDamaged as error:
            return [str(error)]
        return []


def _names(table: str) -> str:
    return ", ".join(f'"{name}"' for name, _ in table_columns(table))


def _commit_column(table: str) -> str:
    return _COMMIT_COLUMN.get(table, "commits")


def _only(rows: Sequence[Sequence[Any]]) -> Any:
    ((value,),) = rows
    return value


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    """Converts errors of psycopg into errors of this library. The server's texts may contain ids, but no biometric data."""
    try:
        yield
    except psycopg.errors.LockNotAvailable as error:
        raise GalleryBusy(
            "other front-ends hold the writers' lock for too long; nothing was acknowledged; send it again"
        ) from error
    except (
        psycopg.errors.UniqueViolation,
        psycopg.errors.SerializationFailure,
        psycopg.errors.DeadlockDetected,
    ) as error:
        raise GalleryBusy(
            "another front-end has committed meanwhile; nothing was acknowledged; send it again"
        ) from error
    except psycopg.Error as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise StorageUnavailable(
            f"{doing}: {first}; nothing was acknowledged; check the server and send it again"
        ) from error
