"""The hash chain over the commits of a gallery, and one digest of the present rows of each table.

Owns which values are hashed, and their encoding. Never reads a database: the catalogue (sqlite.py) passes rows in and stores the results.

H, the hash of links, is HMAC-SHA256 (RFC 2104) in an encrypted gallery, with a key that is derived from the gallery's key. In a gallery in
the clear it is SHA-256, which detects accidents only: an attacker can compute it again. R, the hash of a row, is SHAKE128 (FIPS 202) with
2048 bits of output. Its input is one block with a key (computed by H) and the table's name, then the row: a sponge keyed by its first
block, as in KMAC (NIST SP 800-185).

1. The value of a link is H of the previous link's value, the counters after the commit, and the digests of all tables.
2. The digest of a table is the number of its rows and the sum of their hashes R modulo 2^2048: AdHash (Bellare and Micciancio, EUROCRYPT
   1997). Wagner's generalised birthday attack (CRYPTO 2002) takes about 2^90 steps on a sum of 2048 bits, and 2^32 on one of 256 bits. A
   commit adds the hashes of inserted rows and subtracts those of deleted rows. It reads no other row.
3. A link with a reason computed the digests from all rows again, instead of from the previous link's digests.
4. The lists of changed rows (`RowChange`) identify the row that differs from the last commit. No link covers them: a digest detects the
   difference, and the lists only name it.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

CHAIN_COLUMNS = {
    "chain": "number INTEGER PRIMARY KEY, commits INTEGER, state TEXT, key_id TEXT, reason TEXT, content BLOB, value BLOB",
    "digest": "name TEXT PRIMARY KEY, rows INTEGER, sum BLOB",
    "row_change": "number INTEGER PRIMARY KEY, link INTEGER, journal INTEGER, changes BLOB",
}
JOURNAL = ("subject", "cell", "encounter")
"""Tables that sealing empties. The lists of their changed rows are kept until then."""
CHAINED = (
    *("meta", "model", "group_set", "segment", "tombstone", *JOURNAL, "held", "review_case", "verdict"),
    *("pending", "judged", "link", "job_step", "policy", "index_codec"),
    *("alarm", "approval"),
    *("audit_span", "approval_signature", "card"),
    "budget",
)
"""Tables that the chain covers. The chain stores their positions in this order, so new tables are added at the end."""
_LATER = frozenset(CHAINED[CHAINED.index("approval") + 1 :])
"""Tables that older releases did not have. A link covers them only when they hold rows, so that older links stay valid."""
AUDIT_HEAD = "audit_head"
"""The row of `meta` with the head of the audit log (audit.py)."""
BEGUN, NEW_KEY, REPAIRED, COVERED = "begun", "new key", "repaired", "more tables"
"""Reasons of links that computed the digests again: the chain was started, the key was replaced, the gallery was repaired, the chain covers
more tables."""
NO_LINK = bytes(32)
"""The previous value of the first link."""
_CHANGE = struct.Struct("<B8s")
_DROPPED = 0x80
_CODES = {table: code for code, table in enumerate(CHAINED)}
_SUM_BYTES, _START_BYTES = 256, 8
_SHAKE_BLOCK_BYTES = 168
_WAITING_MAX = 1024  # rows that are hashed in one batch
_MODULUS = 1 << 8 * _SUM_BYTES


@dataclass(frozen=True)
class Link:
    """A row of the table `chain`, in the order of its columns. state: the counters after the commit (JSON); key_id: the id of the key,
    empty without a key; reason: empty for an ordinary commit; content: H of the digests of all tables."""

    number: int
    commits: int
    state: str
    key_id: str
    reason: str
    content: bytes
    value: bytes = b""

    @property
    def values(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())


@dataclass(frozen=True)
class Digest:
    """The digest of one table. rows: their number; total: the sum of their hashes modulo 2^2048."""

    rows: int = 0
    total: int = 0

    def plus(self, other: Digest) -> Digest:
        return Digest(self.rows + other.rows, (self.total + other.total) % _MODULUS)

    @property
    def values(self) -> tuple[int, bytes]:
        return self.rows, self.total.to_bytes(_SUM_BYTES, "big")


class ChainHash:
    """The hashes H (`of`) and R (`rows`). key: 32 bytes, None in a gallery in the clear."""

    def __init__(self, key: bytes | None) -> None:
        self._empty: Any = hashlib.sha256() if key is None else hmac.new(key, digestmod="sha256")
        self.key_id = "" if key is None else self.of(b"biodedup chain key id")[:8].hex()
        self._of_table: dict[str, Any] = {}
        for table in CHAINED:
            prefix = self.of(b"biodedup row key 1") + b"biodedup row 1\0" + table.encode()
            self._of_table[table] = hashlib.shake_128(prefix.ljust(_SHAKE_BLOCK_BYTES, b"\0"))

    def of(self, data: bytes) -> bytes:
        state = self._empty.copy()
        state.update(data)
        return bytes(state.digest())

    def rows(self, table: str, packed: Iterable[bytes]) -> tuple[int, list[bytes]]:
        """(the sum of the hashes R, the first bytes of each hash). packed: the values of each row, as `pack_row` returns them."""
        empty, total, starts = self._of_table[table], 0, []
        for values in packed:
            state = empty.copy()
            state.update(values)
            value = state.digest(_SUM_BYTES)
            total += int.from_bytes(value, "big")
            starts.append(value[:_START_BYTES])
        return total, starts

    def content(self, digests: Mapping[str, Digest]) -> bytes:
        tables = [table for table in CHAINED if table not in _LATER or digests.get(table, Digest()) != Digest()]
        parts = [value for table in tables for value in (table, *digests.get(table, Digest()).values)]
        return self.of(b"biodedup tables 1\0" + pack_row(parts))

    def completed(self, link: Link, previous: bytes) -> Link:
        """The link with its value. previous: the value of the previous link."""
        return replace(link, value=self.of(b"biodedup chain 1\0" + previous + pack_row(link.values[:-1])))


class Sum:
    """Computes the digest of rows that are added one by one. They are hashed in batches."""

    def __init__(self, chain_hash: ChainHash, table: str) -> None:
        self._hash, self._table = chain_hash, table
        self._rows = self._total = 0
        self._waiting: list[bytes] = []

    def add(self, packed: bytes) -> None:
        self._waiting.append(packed)
        if len(self._waiting) >= _WAITING_MAX:
            self.hash_waiting(1)

    def hash_waiting(self, sign: int) -> list[bytes]:
        """Hashes the rows of the batch; returns the first bytes of each hash. sign: 1 adds the rows, -1 subtracts them."""
        total, starts = self._hash.rows(self._table, self._waiting)
        self._rows += sign * len(starts)
        self._total += sign * total
        self._waiting.clear()
        return starts

    @property
    def digest(self) -> Digest:
        self.hash_waiting(1)
        return Digest(self._rows, self._total % _MODULUS)


class Changes:
    """The rows that one transaction has inserted and deleted so far."""

    def __init__(self, chain_hash: ChainHash) -> None:
        self._hash = chain_hash
        self._sums: dict[str, Digest] = {}
        self._emptied: set[str] = set()
        self._waiting: list[bytes] = []
        self._waiting_in = ("", 1, True)
        """Of the batch: the table, the sign (-1 for deleted rows), whether the rows are listed."""
        self._journal, self._other = bytearray(), bytearray()

    @property
    def tables(self) -> set[str]:
        self._hash_waiting()
        return {*self._sums, *self._emptied}

    @property
    def lists(self) -> tuple[bytes, bytes]:
        """(changed rows of the journal, changed rows of the other tables), packed as `changes_in` reads them."""
        self._hash_waiting()
        return bytes(self._journal), bytes(self._other)

    @property
    def emptied(self) -> bool:
        """Whether the journal was emptied. Then earlier lists of its rows are obsolete."""
        return self._emptied >= {*JOURNAL}

    def put(self, table: str, packed: bytes, *, listed: bool = True) -> None:
        self._note((table, 1, listed), packed)

    def drop(self, table: str, packed: bytes, *, listed: bool = True) -> None:
        self._note((table, -1, listed), packed)

    def empty(self, table: str) -> None:
        """Records that all rows of the table are deleted. Only for a table that this process has compared with its digest, or written."""
        self._hash_waiting()
        self._sums.pop(table, None)
        self._emptied.add(table)
        if self.emptied:
            self._journal.clear()

    def _note(self, where: tuple[str, int, bool], packed: bytes) -> None:
        if where != self._waiting_in or len(self._waiting) >= _WAITING_MAX:
            self._hash_waiting()
            self._waiting_in = where
        self._waiting.append(packed)

    def _hash_waiting(self) -> None:
        if not self._waiting:
            return
        table, sign, listed = self._waiting_in
        total, starts = self._hash.rows(table, self._waiting)
        self._waiting.clear()
        added = Digest(sign * len(starts), sign * total)
        self._sums[table] = self._sums.get(table, Digest()).plus(added)
        if not listed:
            return
        code = bytes([_CODES[table] | (0 if sign > 0 else _DROPPED)])
        changes = self._journal if table in JOURNAL else self._other
        changes += code + code.join(starts)

    def applied_to(self, digests: Mapping[str, Digest]) -> dict[str, Digest]:
        """The digests after this transaction. digests: before it."""
        self._hash_waiting()
        after = {table: digest for table, digest in digests.items() if table not in self._emptied}
        return {**after, **{table: after.get(table, Digest()).plus(changed) for table, changed in self._sums.items()}}


@dataclass(frozen=True)
class RowChange:
    """A row that a commit changed. link: of that commit; start: the first 8 bytes of the row's hash; put: True for an inserted row, False
    for a deleted one."""

    link: int
    table: str
    start: bytes
    put: bool


def changes_in(link: int, packed: bytes) -> Iterator[RowChange]:
    """The changes of one packed list, in its order. link: of the commit that wrote the list."""
    for code, start in _CHANGE.iter_unpack(packed[: len(packed) // _CHANGE.size * _CHANGE.size]):
        if code & ~_DROPPED < len(CHAINED):
            yield RowChange(link, CHAINED[code & ~_DROPPED], start, not code & _DROPPED)


def is_chained(table: str, row: Sequence[Any]) -> bool:
    """Whether the digest of its table covers this row. The counters (`state` in `meta`) are part of each link instead."""
    return table in _CODES and not (table == "meta" and row[0] == "state")


def is_listed(table: str, row: Sequence[Any]) -> bool:
    """Whether the lists of changed rows include this row. They omit the head of the audit log, which most commits change, and budgets, which
    most calls change."""
    return table != "budget" and (table != "meta" or row[0] != AUDIT_HEAD)


def pack_row(values: Sequence[Any]) -> bytes:
    """The values of a row as bytes, each with its type and length."""
    parts = []
    for value in values:
        if isinstance(value, (bytes, str)):
            data = value.encode() if isinstance(value, str) else value
            parts.append(struct.pack("<cq", b"s" if isinstance(value, str) else b"b", len(data)) + data)
        elif isinstance(value, float):
            parts.append(struct.pack("<cd", b"f", value))
        else:
            parts.append(b"n" if value is None else struct.pack("<cq", b"i", value))
    return b"".join(parts)
