"""The records of the audit log: one record for each call, chained by hashes.

Owns the columns of a record, its hash value, and the packed form of old records. Never decides which calls are recorded, and never reads a
database.

1. The value of a record is H(the previous record's value, the other columns). H is that of chain.py: HMAC-SHA256 in an encrypted gallery.
2. The head is the number and the value of the newest record. It is a row of `meta`, which the hash chain of the commits covers. So a log
   that has lost its newest records disagrees with the head.
3. Old records are packed into spans. A span is one row of `audit_span`. It keeps the values before its first record and of its last record,
   even after its records were moved to an archive file.
4. The unpacked records have one key: when the key changes, all older records are packed first.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import inf
from typing import Any

from biodedup.common.described import Described
from biodedup.errors import GalleryDamaged, InvalidInput
from biodedup.gallery.catalogue.chain import NO_LINK, ChainHash, pack_row

AUDIT_COLUMNS = {
    "audit": "number INTEGER PRIMARY KEY, at REAL, principal TEXT, purpose TEXT, call TEXT, subject_id TEXT, encounter_id TEXT, "
    "count INTEGER, outcome TEXT, value BLOB",
    "audit_span": "number INTEGER PRIMARY KEY, last INTEGER, since REAL, until REAL, key_id TEXT, before BLOB, value BLOB, digest BLOB, "
    "records BLOB",
}
BROKEN = "readers"
"""The call of a record that says that calls of readers do not follow from each other (readings.py)."""
SPAN_ROWS, UNPACKED_MAX = 2_000, 4_000
"""Records in a span; the number of unpacked records at which a span is packed."""
_ARCHIVE_TITLE = "biodedup audit archive 1"
_SPAN_BYTES_MAX = 1 << 28
_NAMED_MAX = 20


@dataclass(frozen=True)
class AuditRecord(Described):
    """One call. number: from 1, without gaps; at: seconds since 1970; principal: the caller, "" for the program itself; call: the name of
    the method, for example `verify`; subject_id, encounter_id: "" if the call names none; count: the number of encounters, probes or
    subjects; outcome: the outcome of the decision, `accepted` or `not accepted`, `done`, or the name of the error that was raised."""

    at: float
    principal: str
    purpose: str
    call: str
    subject_id: str = ""
    encounter_id: str = ""
    count: int = 1
    outcome: str = "done"
    number: int = 0

    @property
    def values(self) -> tuple[Any, ...]:
        """All columns but the hash value, in order."""
        return (
            *(self.number, float(self.at), self.principal, self.purpose, self.call),
            *(self.subject_id, self.encounter_id, self.count, self.outcome),
        )


def record_of(values: Sequence[Any]) -> AuditRecord:
    """The record with these values, in the order of `AuditRecord.values`."""
    number, at, principal, purpose, call, subject_id, encounter_id, count, outcome = values[:9]
    return AuditRecord(
        at=at,
        principal=principal,
        purpose=purpose,
        call=call,
        subject_id=subject_id,
        encounter_id=encounter_id,
        count=count,
        outcome=outcome,
        number=number,
    )


@dataclass(frozen=True)
class AuditHead:
    """The head of the log. first: the number of the first unpacked record; number: of the newest record, 0 if there is none; value: the
    newest record's value; key_id: of the key that computed it."""

    first: int = 1
    number: int = 0
    value: bytes = NO_LINK
    key_id: str = ""

    def to_json(self) -> str:
        return json.dumps([self.first, self.number, self.value.hex(), self.key_id])

    @classmethod
    def from_json(cls, text: str) -> AuditHead:
        """Raises GalleryDamaged."""
        try:
            first, number, value, key_id = json.loads(text)
            if type(first) is int and type(number) is int and type(key_id) is str and 1 <= first <= number:
                return cls(first, number, bytes.fromhex(value), key_id)
        except (TypeError, ValueError, RecursionError):
            pass
        raise GalleryDamaged("the head of the audit log is damaged; run `biodedup log verify`, and restore a backup")


@dataclass(frozen=True)
class AuditSpan:
    """Packed records, as a row of `audit_span`. number, last: the numbers of the first and the last record; since, until: the earliest and
    the latest time; before, value: the hash values before the first record and of the last one; digest: SHA-256 of the packed records;
    records: empty once they are in an archive file."""

    number: int
    last: int
    since: float
    until: float
    key_id: str
    before: bytes
    value: bytes
    digest: bytes
    records: bytes

    @property
    def values(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())


def chained(chain_hash: ChainHash, before: bytes, records: Iterable[AuditRecord]) -> Iterator[bytes]:
    """The hash value of each record. before: the value of the record before the first."""
    for record in records:
        before = chain_hash.of(b"biodedup audit 1\0" + before + pack_row(record.values))
        yield before


def pack_records(rows: Sequence[Sequence[Any]], before: bytes, key_id: str) -> AuditSpan:
    """Packs rows of the table `audit`, at least one. before: the value of the record before the first."""
    text = "\n".join(json.dumps(row[:-1], separators=(",", ":")) for row in rows)
    records = zlib.compress(text.encode(), 6)
    return AuditSpan(
        number=rows[0][0],
        last=rows[-1][0],
        since=float(min(row[1] for row in rows)),
        until=float(max(row[1] for row in rows)),
        key_id=key_id,
        before=before,
        value=rows[-1][-1],
        digest=hashlib.sha256(records).digest(),
        records=records,
    )


def records_of(span: AuditSpan, records: bytes) -> list[AuditRecord]:
    """The records of a span, unpacked. records: the packed bytes, from the span itself or from its archive file. Raises GalleryDamaged if
    they do not have the span's digest."""
    if hashlib.sha256(records).digest() == span.digest:
        try:
            inflate = zlib.decompressobj()
            text = inflate.decompress(records, _SPAN_BYTES_MAX).decode()
            read = [record_of(json.loads(line)) for line in text.split("\n")]
            if [record.number for record in read] == list(range(span.number, span.last + 1)):
                return read
        except (TypeError, ValueError, RecursionError, zlib.error):
            pass
    raise GalleryDamaged(
        f"audit records {span.number} to {span.last} do not have the digest of the records that were packed"
    )


def chosen(
    spans: Iterable[AuditSpan], rows: Iterable[AuditRecord], since: float | None, until: float | None
) -> Iterator[AuditRecord]:
    """The records with since <= time < until; None is no limit. Only spans that hold such records are unpacked; archived spans are left
    out. Raises GalleryDamaged."""
    low, high = -inf if since is None else since, inf if until is None else until
    held = (span for span in spans if span.records and span.until >= low and span.since < high)
    packed = (record for span in held for record in records_of(span, span.records))
    return (record for record in chain(packed, rows) if low <= record.at < high)


def archive_of(spans: Iterable[AuditSpan]) -> bytes:
    """The content of an archive file: a title, then one line of JSON for each span."""
    lines = [json.dumps([b.hex() if isinstance(b, bytes) else b for b in span.values]) for span in spans]
    return "\n".join([_ARCHIVE_TITLE, *lines, ""]).encode()


def in_archive(content: bytes, spans: Iterable[AuditSpan]) -> Iterator[AuditRecord]:
    """The records of an archive file, verified with the digests of the gallery's spans. Raises InvalidInput for a file that is not an
    archive, GalleryDamaged for one that was changed."""
    known = {span.number: span for span in spans}
    title, *lines = content.decode("utf-8", "replace").splitlines() or [""]
    if title != _ARCHIVE_TITLE:
        raise InvalidInput("it is not an archive of an audit log; name a file that `biodedup log archive` wrote")
    for line in lines:
        try:
            number, *_, records = json.loads(line)
            span = known[number]
            packed = bytes.fromhex(records)
        except (KeyError, TypeError, ValueError, RecursionError):
            raise GalleryDamaged("the archive of the audit log was changed, or belongs to another gallery") from None
        yield from records_of(span, packed)


@dataclass
class AuditCheck:
    """Verifies the records of an audit log, oldest first, and lists the problems. chain_hash: with the gallery's present key."""

    chain_hash: ChainHash
    records: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _next: int = 1
    _value: bytes = NO_LINK
    _archived: tuple[int, int] = (0, -1)
    """The (first, last) record of the newest note about archive files."""

    @classmethod
    def after(cls, spans: Sequence[AuditSpan], chain_hash: ChainHash) -> AuditCheck:
        """A check that trusts the packed records, and verifies the records after them."""
        return cls(chain_hash, _next=spans[-1].last + 1, _value=spans[-1].value) if spans else cls(chain_hash)

    def span(self, span: AuditSpan) -> None:
        """Verifies the next span."""
        name = f"audit records {span.number} to {span.last}"
        if span.number != self._next or span.before != self._value:
            self.problems.append(
                f"{name} do not follow the record before: records were deleted, changed or restored from an older copy"
            )
        self._next, self._value = span.last + 1, span.value
        if not span.records:
            self._note_archived(span)
            return
        self.archived(span, span.records)

    def _note_archived(self, span: AuditSpan) -> None:
        """Notes an archived span. Consecutive spans share one note."""
        if self._archived[1] == span.number - 1:
            self.notes.pop()
        else:
            self._archived = (span.number, 0)
        self._archived = (self._archived[0], span.last)
        name = "audit records {} to {}".format(*self._archived)
        self.notes.append(f"{name} are in archive files; verify each with `biodedup log show --archive FILE`")

    def archived(self, span: AuditSpan, records: bytes) -> None:
        """Verifies the packed records of a span, from the gallery or from an archive file."""
        try:
            read = records_of(span, records)
        except GalleryDamaged as error:
            self.problems.append(str(error))
            return
        self.records += len(read)
        self._note_readers(read)
        if span.key_id in ("", self.chain_hash.key_id):
            *_, value = chained(self.chain_hash if span.key_id else ChainHash(None), span.before, read)
            if value != span.value:
                self.problems.append(f"audit records {span.number} to {span.last} were changed after they were written")
        else:
            self.notes.append(
                f"audit records {span.number} to {span.last} were made with key {span.key_id}, which is not available"
            )

    def _note_readers(self, records: Iterable[AuditRecord]) -> None:
        for record in records:
            if record.call == BROKEN:
                self.notes.append(
                    f"audit record {record.number}: calls of readers that were taken in: {record.outcome}"
                )

    def rows(self, rows: Iterable[Sequence[Any]], head: AuditHead) -> None:
        """Verifies the unpacked records and the head."""
        found = []
        known = head.key_id in ("", self.chain_hash.key_id)
        chain_hash = self.chain_hash if head.key_id else ChainHash(None)
        for row in rows:
            record = record_of(row)
            self.records += 1
            self._note_readers([record])
            if record.number != self._next:
                lost = f"{self._next} to {record.number - 1}" if record.number - 1 > self._next else f"{self._next}"
                found.append(f"audit record {lost} is missing: it was deleted or reordered")
            elif known and next(chained(chain_hash, self._value, [record])) != row[-1]:
                found.append(
                    f"audit record {record.number} ({record.call}) has a wrong hash: it was changed, forged or restored from an older copy"
                )
            self._next, self._value = record.number + 1, row[-1]
        if not known:
            self.notes.append(
                f"audit records from {head.first} on were made with key {head.key_id}, which is not available"
            )
        if self._next <= head.number:
            found.append(f"audit records {self._next} to {head.number} are missing: the newest records were deleted")
        elif self._next - 1 > head.number:
            found.append(
                f"audit records from {head.number + 1} on are beyond the head: they were forged, or the head was restored from an older copy"
            )
        elif self._value != head.value:
            found.append(
                "the newest audit record does not have the head's value: the log was restored from an older copy, or rewritten"
            )
        if len(found) > _NAMED_MAX:
            found = [*found[:_NAMED_MAX], f"audit log: {len(found) - _NAMED_MAX} more problems"]
        self.problems += found
