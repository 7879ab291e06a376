"""The hash chain over the commits of a gallery, and one digest of the present rows of each table.

Owns what is hashed, and in which form. Never reads a database: the catalogue (sqlite.py) hands rows in and stores what comes out.

The hash H is HMAC-SHA256 (RFC 2104) in an encrypted gallery, under a key that is derived from the gallery's, and SHA-256 in one in the clear,
where it finds accidents alone: anybody can compute it again.

1. A link of the chain hashes the link before it, the counters after the commit, which rows it put and dropped, and the digests of all tables.
2. The digest of a table is the sum of the hashes of its rows modulo 2^256, and their number: the additive multiset hash of Clarke, Devadas,
   van Dijk, Gassend and Suh (ASIACRYPT 2003). A commit adds what it put and subtracts what it dropped, without reading the others.
3. A link that has a reason took the digests anew from the rows: they are not those that the link before left.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

CHAIN_COLUMNS = {
    "chain": "number INTEGER PRIMARY KEY, commits INTEGER, state TEXT, key_id TEXT, reason TEXT, changes BLOB, content BLOB, "
    "previous BLOB, value BLOB",
    "digest": "name TEXT PRIMARY KEY, rows INTEGER, sum BLOB",
}
CHAINED = (
    *(
        "meta",
        "model",
        "group_set",
        "segment",
        "tombstone",
        "subject",
        "cell",
        "encounter",
        "held",
        "review_case",
        "verdict",
    ),
    *("pending", "judged", "link", "job_step", "policy", "index_codec"),
)
"""Tables that the chain covers. Their places in this order stand in the chain: new ones come last."""
BEGUN, NEW_KEY, REPAIRED, PRUNED = "begun", "new key", "repaired", "pruned"
"""Reasons of links that took the digests anew."""
NO_LINK = bytes(32)
"""What the first link has before it."""
_CHANGE = struct.Struct("<B8s")
_DROPPED = 0x80
_CODES = {table: code for code, table in enumerate(CHAINED)}
_MODULUS = 1 << 256


@dataclass(frozen=True)
class Link:
    """A row of the table `chain`, in the order of its columns. state: the counters (JSON) after the commit; key_id: of the key, empty for
    none; reason: empty for a commit; changes: packed (`changes_in`); content: the digest of all tables; previous: the value before."""

    number: int
    commits: int
    state: str
    key_id: str
    reason: str
    changes: bytes
    content: bytes
    previous: bytes
    value: bytes = b""

    @property
    def values(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())


@dataclass(frozen=True)
class Digest:
    """Of the rows of one table. total: the sum of their hashes modulo 2^256."""

    rows: int = 0
    total: int = 0

    def plus(self, rows: int, total: int) -> Digest:
        return Digest(self.rows + rows, (self.total + total) % _MODULUS)

    @property
    def values(self) -> tuple[int, bytes]:
        return self.rows, self.total.to_bytes(32, "big")


class ChainHash:
    """H, and what is computed with it. key: 32 bytes, None in a gallery in the clear."""

    def __init__(self, key: bytes | None) -> None:
        self._key = key
        self.key_id = "" if key is None else hmac.digest(key, b"biodedup chain key id", "sha256")[:8].hex()

    def of(self, data: bytes) -> bytes:
        return hashlib.sha256(data).digest() if self._key is None else hmac.digest(self._key, data, "sha256")

    def row(self, table: str, packed: bytes) -> bytes:
        """packed: the row's values as `pack_row` packs them."""
        return self.of(b"biodedup row 1\0" + table.encode() + b"\0" + packed)

    def content(self, digests: Mapping[str, Digest]) -> bytes:
        parts = [value for table in CHAINED for value in (table, *digests.get(table, Digest()).values)]
        return self.of(b"biodedup tables 1\0" + pack_row(parts))

    def completed(self, link: Link) -> Link:
        """With its value."""
        return replace(link, value=self.of(b"biodedup chain 1\0" + pack_row(link.values[:-1])))


class Changes:
    """What one transaction has put and dropped so far."""

    def __init__(self, chain_hash: ChainHash) -> None:
        self._hash = chain_hash
        self.packed = bytearray()
        self.by_table: dict[str, Digest] = {}

    def put(self, table: str, packed: bytes) -> None:
        self._note(table, packed, 0, 1)

    def drop(self, table: str, packed: bytes) -> None:
        self._note(table, packed, _DROPPED, -1)

    def _note(self, table: str, packed: bytes, flag: int, sign: int) -> None:
        value = self._hash.row(table, packed)
        self.packed += _CHANGE.pack(_CODES[table] | flag, value[:8])
        self.by_table[table] = self.by_table.get(table, Digest()).plus(sign, sign * int.from_bytes(value, "big"))

    def applied_to(self, digests: Mapping[str, Digest]) -> dict[str, Digest]:
        changed = {t: digests.get(t, Digest()).plus(d.rows, d.total) for t, d in self.by_table.items()}
        return {**digests, **changed}


def changes_in(packed: bytes) -> Iterator[tuple[str, bytes, bool]]:
    """(table, the first 8 bytes of the row's hash, whether it was put and not dropped), in their order. Raises ValueError."""
    if len(packed) % _CHANGE.size:
        raise ValueError("a link of the chain lists half a row")
    for code, short in _CHANGE.iter_unpack(packed):
        if code & ~_DROPPED >= len(CHAINED):
            raise ValueError("a link of the chain names a table that this version does not know")
        yield CHAINED[code & ~_DROPPED], short, not code & _DROPPED


def is_chained(table: str, row: Sequence[Any]) -> bool:
    """Whether the digest of its table covers a row. The counters are in each link instead."""
    return table in _CODES and not (table == "meta" and row[0] == "state")


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
