"""The records of the audit log: one a call, each with a hash of the record before it.

Owns the form of a record, the value that chains it, and the form of old records that are packed. Never says which calls are recorded, and never
reads a database.

1. The value of a record is H(the value before, its other columns); H as in chain.py: HMAC-SHA256 in an encrypted gallery.
2. The number and the value of the newest record are the head. It is a row of `meta`, which the hash chain of the commits covers: a log whose
   newest records are lost does not meet it.
3. Old records are packed many at a time, as one row of `audit_span`. The row keeps the values before and at the end, also once its records
   were moved to an archive file.
4. Records of one key stand together: the first record of another key packs those before it.
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
"""Records of a span; records that are not packed."""
_ARCHIVE_TITLE = "biodedup audit archive 1"
_SPAN_BYTES_MAX = 1 << 28
_NAMED_MAX = 20


@dataclass(frozen=True)
class AuditRecord(Described):
    """A call. number: from 1, without gaps; at: seconds since 1970; principal: "" for the program itself; call: the method, as `verify`;
    subject_id, encounter_id: "" where none is named; count: encounters, probes or subjects of the call; outcome: of a decision, `accepted` or
    `not accepted`, `done`, or the name of the error that was raised."""

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
        """In the order of the columns, without the chained value."""
        return (
            *(self.number, float(self.at), self.principal, self.purpose, self.call),
            *(self.subject_id, self.encounter_id, self.count, self.outcome),
        )


def record_of(values: Sequence[Any]) -> AuditRecord:
    """values: as `AuditRecord.values`."""
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
    """first: of the records that are not packed; number: of the newest one, 0 without any; value: its value; key_id: of the key it was
    made with."""

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
    """Packed records, as a row of `audit_span`. number, last: of the first and the last record; since, until: their times; before, value: the
    chained values before and at the end; digest: SHA-256 of the packed records; records: empty once they are in an archive file."""

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
    """The value of each record. before: the value of the record before them."""
    for record in records:
        before = chain_hash.of(b"biodedup audit 1\0" + before + pack_row(record.values))
        yield before


def pack_records(rows: Sequence[Sequence[Any]], before: bytes, key_id: str) -> AuditSpan:
    """rows: of the table `audit`, at least one."""
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
    """The records of a span. records: those of the span itself, or of its archive file. Raises GalleryDamaged where they are not its."""
    if hashlib.sha256(records).digest() == span.digest:
        try:
            inflate = zlib.decompressobj()
            text = inflate.decompress(records, _SPAN_BYTES_MAX).decode()
            read = [record_of(json.loads(line)) for line in text.split("\n")]
            if [record.number for record in read] == list(range(span.number, span.last + 1)):
                return read
        except (TypeError, ValueError, RecursionError, zlib.error):
            pass
    raise GalleryDamaged(f"audit records {span.number} to {span.last} are not those that were packed")


def chosen(
    spans: Iterable[AuditSpan], rows: Iterable[AuditRecord], since: float | None, until: float | None
) -> Iterator[AuditRecord]:
    """The records at or after `since` and before `until`, None for no limit. Spans that hold none, or are in an archive file, are not
    unpacked. Raises GalleryDamaged."""
    low, high = -inf if since is None else since, inf if until is None else until
    held = (span for span in spans if span.records and span.until >= low and span.since < high)
    packed = (record for span in held for record in records_of(span, span.records))
    return (record for record in chain(packed, rows) if low <= record.at < high)


def archive_of(spans: Iterable[AuditSpan]) -> bytes:
    """The content of an archive file: a line of JSON for each span."""
    lines = [json.dumps([b.hex() if isinstance(b, bytes) else b for b in span.values]) for span in spans]
    return "\n".join([_ARCHIVE_TITLE, *lines, ""]).encode()


def in_archive(content: bytes, spans: Iterable[AuditSpan]) -> Iterator[AuditRecord]:
    """The records of an archive file. spans: of the gallery; they tell whether the file is as it was written. Raises InvalidInput for what is
    no archive, GalleryDamaged."""
    known = {span.number: span for span in spans}
    title, *lines = content.decode("utf-8", "replace").splitlines() or [""]
    if title != _ARCHIVE_TITLE:
        raise InvalidInput("it is no archive of an audit log; name a file of `biodedup log archive`")
    for line in lines:
        try:
            number, *_, records = json.loads(line)
            span = known[number]
            packed = bytes.fromhex(records)
        except (KeyError, TypeError, ValueError, RecursionError):
            raise GalleryDamaged("the archive of the audit log was changed, or is of another gallery") from None
        yield from records_of(span, packed)


@dataclass
class AuditCheck:
    """Follows the records of an audit log, oldest first, and lists what is wrong. chain_hash: of the key at hand."""

    chain_hash: ChainHash
    records: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _next: int = 1
    _value: bytes = NO_LINK
    _archived: tuple[int, int] = (0, -1)
    """The records of the newest note on archive files, the first and the last one."""

    @classmethod
    def after(cls, spans: Sequence[AuditSpan], chain_hash: ChainHash) -> AuditCheck:
        """One that takes packed records as they are, and follows those behind them."""
        return cls(chain_hash, _next=spans[-1].last + 1, _value=spans[-1].value) if spans else cls(chain_hash)

    def span(self, span: AuditSpan) -> None:
        name = f"audit records {span.number} to {span.last}"
        if span.number != self._next or span.before != self._value:
            self.problems.append(
                f"{name} do not follow from the record before: records were dropped, changed or put back"
            )
        self._next, self._value = span.last + 1, span.value
        if not span.records:
            self._note_archived(span)
            return
        self.archived(span, span.records)

    def _note_archived(self, span: AuditSpan) -> None:
        """Spans that follow each other are one note."""
        if self._archived[1] == span.number - 1:
            self.notes.pop()
        else:
            self._archived = (span.number, 0)
        self._archived = (self._archived[0], span.last)
        name = "audit records {} to {}".format(*self._archived)
        self.notes.append(f"{name} are in archive files; check each by `biodedup log show --archive FILE`")

    def archived(self, span: AuditSpan, records: bytes) -> None:
        """The records of a span, from wherever they are kept."""
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
                self.problems.append(f"audit records {span.number} to {span.last} are not those that were written")
        else:
            self.notes.append(
                f"audit records {span.number} to {span.last} are of key {span.key_id}, which is not at hand"
            )

    def _note_readers(self, records: Iterable[AuditRecord]) -> None:
        for record in records:
            if record.call == BROKEN:
                self.notes.append(
                    f"audit record {record.number}: calls of readers that were taken in: {record.outcome}"
                )

    def rows(self, rows: Iterable[Sequence[Any]], head: AuditHead) -> None:
        """The records that are not packed, and the head."""
        wrong = []
        known = head.key_id in ("", self.chain_hash.key_id)
        chain_hash = self.chain_hash if head.key_id else ChainHash(None)
        for row in rows:
            record = record_of(row)
            self.records += 1
            self._note_readers([record])
            if record.number != self._next:
                lost = f"{self._next} to {record.number - 1}" if record.number - 1 > self._next else f"{self._next}"
                wrong.append(f"audit record {lost} is lost or was moved: it was dropped or reordered")
            elif known and next(chained(chain_hash, self._value, [record])) != row[-1]:
                wrong.append(
                    f"audit record {record.number} ({record.call}) is not as it was written: it was changed, forged or put back"
                )
            self._next, self._value = record.number + 1, row[-1]
        if not known:
            self.notes.append(f"audit records from {head.first} on are of key {head.key_id}, which is not at hand")
        if self._next <= head.number:
            wrong.append(f"audit records {self._next} to {head.number} are lost: the newest ones were dropped")
        elif self._next - 1 > head.number:
            wrong.append(f"audit records from {head.number + 1} on were never written, or the head was put back")
        elif self._value != head.value:
            wrong.append("the newest audit record is not the one of the head: the log was put back, or written anew")
        if len(wrong) > _NAMED_MAX:
            wrong = [*wrong[:_NAMED_MAX], f"audit log: {len(wrong) - _NAMED_MAX} more"]
        self.problems += wrong
