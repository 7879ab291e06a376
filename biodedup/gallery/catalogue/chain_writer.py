"""Adds one link to the hash chain of a gallery for each commit, and verifies the rows that are read against the newest link.

Owns the rows of the tables `chain`, `digest` and `row_change`. chain.py defines what is hashed, and how. Never begins or ends a
transaction.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from biodedup.errors import GalleryDamaged
from biodedup.gallery.catalogue.chain import (
    BEGUN,
    CHAIN_COLUMNS,
    CHAINED,
    NEW_KEY,
    NO_LINK,
    ChainHash,
    Changes,
    Digest,
    Link,
    Sum,
    is_chained,
    is_listed,
    pack_row,
)

if TYPE_CHECKING:
    from biodedup.gallery.catalogue.sqlite import State

_KNOWN_NONE: tuple[bytes, dict[str, Digest]] = (b"", {})


class ChainTables(Protocol):
    """The methods of the catalogue that the writer calls."""

    def exists(self, table: str) -> bool: ...

    def meta(self) -> dict[str, str]: ...

    def state(self) -> State: ...

    def put(self, table: str, rows: Iterable[Sequence[Any]]) -> None: ...

    def rows_of(self, table: str) -> Iterator[tuple[Any, ...]]: ...

    def last_links(self) -> list[Link]: ...

    def digests(self) -> dict[str, Digest]: ...

    def forget_journal_changes(self) -> None: ...


class ChainWriter:
    """The hash chain, as one database connection sees and extends it. key: see `ChainHash`."""

    def __init__(self, tables: ChainTables, key: bytes | None) -> None:
        self.hash = ChainHash(key)
        self.anew = ""
        """If not empty, the next commits compute the digests from all rows. The text is their reason (BEGUN, NEW_KEY, REPAIRED)."""
        self._tables = tables
        self._known = _KNOWN_NONE
        """(the value of the newest link that this connection wrote or verified, the digests of the tables at that link)."""
        self._read: dict[str, Digest] | None = None
        self.begin()

    def begin(self) -> None:
        self.changes, self.state = Changes(self.hash), None

    state: State | None
    """The counters that this transaction has set; None if it has set none."""

    def exists(self) -> bool:
        """Whether the gallery has a chain. Raises GalleryDamaged if its tables are lost."""
        there = [self._tables.exists(table) for table in CHAIN_COLUMNS]
        if not all(there) and (any(there) or "chain" in self._tables.meta()):
            raise GalleryDamaged("the tables of the hash chain are lost; restore the database from a backup")
        return all(there)

    def put(self, table: str, row: Sequence[Any], packed: bytes) -> None:
        if is_chained(table, row):
            self.changes.put(table, packed, listed=is_listed(table, row))

    def drop(self, table: str, row: Sequence[Any], *, listed: bool = True) -> None:
        if is_chained(table, row):
            self.changes.drop(table, pack_row(row), listed=listed and is_listed(table, row))

    # reading ------------------------------------------------------------------------------------------------------

    @contextmanager
    def comparing(self) -> Iterator[None]:
        """Inside the context, compares each table that is read completely with the newest link. The caller has begun a transaction. Raises
        GalleryDamaged."""
        last = self._newest() if self.exists() else None
        if last is None or last.key_id != self.hash.key_id:
            yield  # an older format, or a gallery that was just encrypted: the next commit computes the digests
            return
        digests, self._read = self._digests_at(last), {}
        if json.loads(last.state) != list(vars(self._tables.state()).values()):
            raise _damaged("the counters are")
        try:
            yield
            for table, read in self._read.items():
                if read != digests.get(table, Digest()):
                    raise _damaged(f"the {read.rows} rows of table {table} are")
        finally:
            self._read = None

    def reading(self, table: str) -> Sum | None:
        """The `Sum` for the rows of a table that is read completely; None outside of `comparing`."""
        return None if self._read is None or table not in CHAINED else Sum(self.hash, table)

    def was_read(self, table: str, rows: Sum) -> None:
        """Records the digest of a table that was read completely."""
        if self._read is not None:
            self._read[table] = rows.digest

    # writing ------------------------------------------------------------------------------------------------------

    def extend(self) -> None:
        """Adds a link, if the transaction changed something. Called before the commit. Raises GalleryDamaged."""
        changes = self.changes
        if not (changes.tables or self.state or self.anew):
            return
        if self._known is _KNOWN_NONE and not self.exists():
            return  # an older format: the next writer that opens the gallery starts the chain
        last = self._newest()
        reason = self.anew or (BEGUN if last is None else "" if last.key_id == self.hash.key_id else NEW_KEY)
        before = {} if last is None or reason else self._digests_at(last)
        if reason:
            changes = self._present()
            self._tables.forget_journal_changes()
        elif changes.emptied:
            self._tables.forget_journal_changes()
        after = changes.applied_to(before)
        changed = CHAINED if reason else sorted(changes.tables)
        state = self.state or self._tables.state()
        number, previous = (1, NO_LINK) if last is None else (last.number + 1, last.value)
        counters = json.dumps(list(vars(state).values()), separators=(",", ":"))
        link = Link(number, state.commits, counters, self.hash.key_id, reason, self.hash.content(after))
        link = self.hash.completed(link, previous)
        self._tables.put("digest", [(table, *after.get(table, Digest()).values) for table in changed])
        journal, other = changes.lists
        lists = [(2 * number, number, 0, other), (2 * number + 1, number, 1, journal)]
        self._tables.put("row_change", [row for row in lists if row[-1]])
        self._tables.put("chain", [link.values])
        self._known = (link.value, after)

    def _newest(self) -> Link | None:
        links = self._tables.last_links()
        if not links:
            return None
        last, previous = links[0], links[1].value if len(links) > 1 else NO_LINK
        unknown = self._known[0] != last.value and last.key_id == self.hash.key_id
        if unknown and self.hash.completed(last, previous) != last:
            raise _damaged("the values of the newest link of the hash chain are")
        return last

    def _digests_at(self, last: Link) -> dict[str, Digest]:
        """The digests of the tables at the newest link. They are verified, so that tables from an older backup are not extended."""
        if self._known[0] != last.value:
            digests = self._tables.digests()
            if self.hash.content(digests) != last.content:
                raise _damaged("the digests of the tables are")
            self._known = (last.value, digests)
        return self._known[1]

    def _present(self) -> Changes:
        """All present rows of all tables, as insertions."""
        present = Changes(self.hash)
        for table in CHAINED:
            if self._tables.exists(table):
                for row in self._tables.rows_of(table):
                    if is_chained(table, row):
                        present.put(table, pack_row(row))
        return present


def _damaged(what: str) -> GalleryDamaged:
    return GalleryDamaged(f"{what} not as the last commit wrote them; run `biodedup log verify`, and restore a backup")
