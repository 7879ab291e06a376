"""The hash chain over the commits of a gallery, and one digest of the present rows of each table.

Owns what is hashed, and in which form. Never reads a database: the catalogue (sqlite.py) hands rows in and stores what comes out.

The hash H is HMAC-SHA256 (RFC 2104) in an encrypted gallery, under a key that is derived from the gallery's, and SHA-256 in one in the clear,
where it finds accidents alone: anybody can compute it again. The hash R of a row is SHAKE128 (FIPS 202) to 2048 bits, over one block with
the key that H gives and the table, then the row: a sponge keyed by its first block, as KMAC (NIST SP 800-185).

1. The value of a link hashes the value of the link before it, the counters after the commit, and the digests of all tables.
2. The digest of a table is the number of its rows and the sum of their hashes R modulo 2^2048: AdHash (Bellare and Micciancio, EUROCRYPT
   1997). Wagner's generalised birthday attack (CRYPTO 2002) on a sum of that length takes about 2^90 steps, on one of 256 bits 2^32. A
   commit adds the rows that it put and subtracts those that it dropped, without reading the others.
3. A link that has a reason took the digests anew from the rows: they are not those that the link before left.
4. The lists of changed rows (`RowChange`) say which row is not as a commit left it. No link hashes them: they name what the digests find.
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
"""Tables that sealing empties. Changes of their rows are listed until then."""
CHAINED = (
    *("meta", "model", "group_set", "segment", "tombstone", *JOURNAL, "held", "review_case", "verdict"),
    *("pending", "judged", "link", "job_step", "policy", "index_codec"),
    *("alarm", "approval"),
    *("audit_span", "approval_signature", "card"),
    "budget",
)
"""Tables that the chain covers. Their places in this order stand in the chain: new ones come last."""
_LATER = frozenset(CHAINED[CHAINED.index("approval") + 1 :])
"""Tables that older links do not know: while they are empty, links are as without them."""
AUDIT_HEAD = "audit_head"
"""The row of `meta` with the head of the audit log (audit.py)."""
BEGUN, NEW_KEY, REPAIRED, COVERED = "begun", "new key", "repaired", "more tables"
"""Reasons of links that took the digests anew."""
NO_LINK = bytes(32)
"""What the first link has before it."""
_CHANGE = struct.Struct("<B8s")
_DROPPED = 0x80
_CODES = {table: code for code, table in enumerate(CHAINED)}
_SUM_BYTES, _START_BYTES = 256, 8
_SHAKE_BLOCK_BYTES = 168
_WAITING_MAX = 1024  # rows that are hashed at once
_MODULUS = 1 << 8 * _SUM_BYTES


@dataclass(frozen=True)
class Link:
    """A row of the table `chain`, in the order of its columns. state: the counters after the commit (JSON); key_id: of the key, empty for
    none; reason: empty for a commit; content: the hash of the digests of all tables."""

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
    """Of the rows of one table. total: the sum of their hashes modulo 2^2048."""

    rows: int = 0
    total: int = 0

    def plus(self, other: Digest) -> Digest:
        return Digest(self.rows + other.rows, (self.total + other.total) % _MODULUS)

    @property
    def values(self) -> tuple[int, bytes]:
        return self.rows, self.total.to_bytes(_SUM_BYTES, "big")


class ChainHash:
    """H and R, and what is computed with them. key: 32 bytes, None in a gallery in the clear."""

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
        """(the sum of the hashes of rows, the first bytes of each). packed: the values of each row, as `pack_row` packs them."""
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
        """With its value. previous: the value of the link before."""
        return replace(link, value=self.of(b"biodedup chain 1\0" + previous + pack_row(link.values[:-1])))


class Sum:
    """The digest of rows that are added one by one; they are hashed many at a time."""

    def __init__(self, chain_hash: ChainHash, table: str) -> None:
        self._hash, self._table = chain_hash, table
        self._rows = self._total = 0
        self._waiting: list[bytes] = []

    def add(self, packed: bytes) -> None:
        self._waiting.append(packed)
        if len(self._waiting) >= _WAITING_MAX:
            self.hash_waiting(1)

    def hash_waiting(self, sign: int) -> list[bytes]:
        """Returns the start of the hash of each. sign: -1 takes them away."""
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
    """What one transaction has put and dropped so far."""

    def __init__(self, chain_hash: ChainHash) -> None:
        self._hash = chain_hash
        self._sums: dict[str, Digest] = {}
        self._emptied: set[str] = set()
        self._waiting: list[bytes] = []
        self._waiting_in = ("", 1, True)
        """The table of the rows that wait to be hashed; 1, or -1 for dropped ones; whether they are listed."""
        self._journal, self._other = bytearray(), bytearray()

    @property
    def tables(self) -> set[str]:
        self._hash_waiting()
        return {*self._sums, *self._emptied}

    @property
    def lists(self) -> tuple[bytes, bytes]:
        """Packed lists of changed rows, as `changes_in` reads them: of the journal, and of the other tables."""
        self._hash_waiting()
        return bytes(self._journal), bytes(self._other)

    @property
    def emptied(self) -> bool:
        """Whether the journal was, so that earlier lists of its rows say nothing any more."""
        return self._emptied >= {*JOURNAL}

    def put(self, table: str, packed: bytes, *, listed: bool = True) -> None:
        self._note((table, 1, listed), packed)

    def drop(self, table: str, packed: bytes, *, listed: bool = True) -> None:
        self._note((table, -1, listed), packed)

    def empty(self, table: str) -> None:
        """Every row of the table is dropped. Only for a table whose rows this process has compared with its digest, or written."""
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
        self._hash_waiting()
        after = {table: digest for table, digest in digests.items() if table not in self._emptied}
        return {**after, **{table: after.get(table, Digest()).plus(changed) for table, changed in self._sums.items()}}


@dataclass(frozen=True)
class RowChange:
    """link: whose commit made it; start: the first 8 bytes of the row's hash; put: whether the row was put and not dropped."""

    link: int
    table: str
    start: bytes
    put: bool


def changes_in(link: int, packed: bytes) -> Iterator[RowChange]:
    """In their order."""
    for code, start in _CHANGE.iter_unpack(packed[: len(packed) // _CHANGE.size * _CHANGE.size]):
        if code & ~_DROPPED < len(CHAINED):
            yield RowChange(link, CHAINED[code & ~_DROPPED], start, not code & _DROPPED)


def is_chained(table: str, row: Sequence[Any]) -> bool:
    """Whether the digest of its table covers a row. The counters are in each link instead."""
    return table in _CODES and not (table == "meta" and row[0] == "state")


def is_listed(table: str, row: Sequence[Any]) -> bool:
    """Whether changes of a row are listed. The head of the audit log changes with most commits, budgets with most calls."""
    return table != "budget" and (table != "meta" or row[0] != AUDIT_HEAD)


def pack_row(values: Sequence[Any]) -> bytes:
    """Values with their types and lengths."""
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
