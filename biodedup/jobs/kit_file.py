"""The batch file of a field kit: records that are signed one by one, so that a file cut off yields its whole prefix.

Owns the bytes (`KIT.md` describes them): writing, reading, and the proof that each record is what the kit signed. Never decides
what becomes of a record.

1. Nothing of a file is parsed before its signature was checked.
2. Each signature covers everything before it: a record cannot be changed, moved, left out or carried to another file.
3. Only the last frame says that a file is whole. A file without it is *cut*; every record before the cut is sound.
4. The same records make the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from biodedup.errors import BatchDamaged, InvalidInput, StorageUnavailable, UnknownKit
from biodedup.jobs.kit_keys import FINGERPRINT_BYTES, SIGNATURE_BYTES, KitKey, PublicKey
from biodedup.values import Capture, Encounter, Face, Finger, Float32, Missing, Refusal, Template

MAGIC, VERSION = b"\x89BDKIT\n", 1
_PREAMBLE = struct.Struct(f"<{len(MAGIC)}sB{FINGERPRINT_BYTES}s")
_HEADER = struct.Struct("<cQI")  # kind, sequence, bytes of the payload
_CHECK = struct.Struct("<I")  # CRC-32 of the header: a damaged length is no cut
_HEAD_BYTES = _HEADER.size + _CHECK.size
_MANIFEST, _RECORD, _END = b"M", b"R", b"E"
_DOMAIN = b"biodedup kit batch 1\0"

_TEMPLATE = [("column", pa.string()), ("model_id", pa.string()), ("embedding", pa.list_(pa.float32())), ("minutiae", pa.binary()), ("quality", pa.float64())]  # fmt: skip
_REFUSAL = [("column", pa.string()), ("reason", pa.string()), ("detail", pa.string()), ("measured", pa.float64()), ("limit", pa.float64())]  # fmt: skip
_SCHEMA = pa.schema(
    [
        ("subject_id", pa.string()),
        ("encounter_id", pa.string()),
        ("captured_at", pa.float64()),
        ("packed_at", pa.float64()),
        ("groups", pa.list_(pa.string())),
        ("captures", pa.list_(pa.struct([("position", pa.string()), ("data", pa.binary()), ("dpi", pa.float64())]))),
        ("templates", pa.list_(pa.struct(_TEMPLATE))),
        ("missing", pa.list_(pa.struct([("position", pa.string()), ("reason", pa.string())]))),
        ("refusals", pa.list_(pa.struct(_REFUSAL))),
    ]
)


@dataclass(frozen=True, eq=False)
class Record:
    """One encounter on its way. sequence: the kit's number of it; captured_at, packed_at: seconds by the kit's clock, which may be
    wrong; refusals: what the kit's quality gate said of captures that are in it all the same."""

    encounter: Encounter
    sequence: int
    captured_at: float | None
    packed_at: float
    refusals: tuple[Refusal, ...] = ()


class BatchWriter:
    """Writes a batch file, from its manifest to its end, into an open file."""

    def __init__(self, file: BinaryIO, key: KitKey) -> None:
        self._file = file
        self._key = key
        self._count = 0
        preamble = _PREAMBLE.pack(MAGIC, VERSION, key.public.fingerprint)
        file.write(preamble)
        self.digest = hashlib.sha256(preamble).digest()
        self._add(_MANIFEST, 0, _json({"kit_id": key.public.kit_id}))

    def add(self, record: Record) -> None:
        self._count += 1
        self._add(_RECORD, record.sequence, encode(record))

    def finish(self, void: Iterable[int] = ()) -> None:
        """void: sequences that no batch will bring, because this file replaces the one that held them."""
        self._add(_END, 0, _json({"records": self._count, "void": sorted(void)}))

    def _add(self, kind: bytes, sequence: int, payload: bytes) -> None:
        head = _HEADER.pack(kind, sequence, len(payload))
        head += _CHECK.pack(zlib.crc32(head))
        self.digest = hashlib.sha256(self.digest + head + payload).digest()
        self._file.write(head + payload + self._key.sign(_DOMAIN + self.digest))


class BatchReader:
    """Reads a batch file; iterate it once for its records, in the order of the file.

    Afterwards `whole` says whether the end was there, `void` what it told, and `digest` names what was read. `public` is the kit's key,
    None where the file is cut so early that it names none.

    Raises InvalidInput (no batch file, or of another version), UnknownKit, BatchDamaged (from iterating, too), StorageUnavailable.
    """

    def __init__(self, path: Path, trusted: Mapping[bytes, PublicKey]) -> None:
        self.path = path
        self.public: PublicKey | None = None
        self.whole = False
        self.void: tuple[int, ...] = ()
        self.count = 0
        self._last = "its start"
        try:
            self._file = path.open("rb")
        except FileNotFoundError:
            raise InvalidInput(f"{path} does not exist; name a kit's batch file") from None
        except IsADirectoryError:
            raise InvalidInput(f"{path} is a folder; name a kit's batch file") from None
        except OSError as error:
            raise StorageUnavailable(f"{path} cannot be read ({error.strerror}); mend that and try again") from error
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            preamble = self._read(_PREAMBLE.size)
            self.digest = hashlib.sha256(preamble).digest()
            if not (MAGIC.startswith(preamble) or preamble.startswith(MAGIC)):
                raise InvalidInput(f"{path} is not a batch file; name one that `biodedup kit pack` wrote")
            if len(preamble) > len(MAGIC) and preamble[len(MAGIC)] != VERSION:
                raise InvalidInput(
                    f"{path} is a batch file of version {preamble[len(MAGIC)]}, wanted {VERSION}; update biodedup here, or copy "
                    "the file from the kit again"
                )
            if len(preamble) == _PREAMBLE.size:
                fingerprint = preamble[-FINGERPRINT_BYTES:]
                self.public = trusted.get(fingerprint)
                if self.public is None:
                    raise UnknownKit(
                        f"{path} is signed by a key that is not trusted here, fingerprint {fingerprint.hex()[:16]}; nothing of it "
                        "was taken. Ask the team to read out the fingerprint of their key, and only if it is this one put their "
                        ".pub file into the trusted folder"
                    )
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> BatchReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Record]:
        if self.public is None:
            return
        for place, (kind, sequence, payload) in enumerate(self._frames()):
            if (kind == _MANIFEST) != (place == 0) or kind not in (_MANIFEST, _RECORD, _END):
                self._damaged(f"what comes after {self._last} is out of place")
            if kind == _RECORD:
                self.count += 1
                self._last = f"the record with sequence {sequence}"
                yield self._parsed(decode, payload, sequence)
            elif kind == _MANIFEST:
                if self._parsed(_kit_of, payload) != self.public.kit_id:
                    self._damaged(f"it names another kit than its key, which is of {self.public.kit_id}")
                self._last = "its manifest"
            else:
                self._last = "its end"
                count, self.void = self._parsed(_end_of, payload)
                if count != self.count:
                    self._damaged(f"its end tells of {count} records, {self.count} are there")
                if self._read(1):
                    self._damaged("something was added behind its end")
                self.whole = True
                return

    def _frames(self) -> Iterator[tuple[bytes, int, bytes]]:
        """(kind, sequence, payload) of each frame that is wholly there, its signature checked."""
        assert self.public is not None, "frames are read with a key"
        while len(head := self._read(_HEAD_BYTES)) == _HEAD_BYTES:
            kind, sequence, length = _HEADER.unpack_from(head)
            if _CHECK.unpack_from(head, _HEADER.size)[0] != zlib.crc32(head[: _HEADER.size]):
                self._damaged(f"what comes after {self._last} was changed")
            if self._file.tell() + length + SIGNATURE_BYTES > self._size:
                return
            payload, signature = self._read(length), self._read(SIGNATURE_BYTES)
            digest = hashlib.sha256(self.digest + head + payload).digest()
            if not self.public.signed(signature, _DOMAIN + digest):
                what = {_RECORD: f"the record with sequence {sequence}", _MANIFEST: "its manifest"}.get(kind, "its end")
                self._damaged(f"{what} (record {self.count + (kind == _RECORD)} of the file) was changed")
            self.digest = digest
            yield kind, sequence, payload

    def _read(self, count: int) -> bytes:
        try:
            return self._file.read(count)
        except OSError as error:
            raise StorageUnavailable(
                f"{self.path} cannot be read after {self._last} ({error.strerror}); copy it again, or try another reader"
            ) from error

    def _parsed(self, parse: Callable[..., Any], *content: Any) -> Any:
        """What was signed and cannot be understood is as bad as what was not signed."""
        try:
            return parse(*content)
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError) as error:
            self._damaged(f"{self._last} is signed and cannot be read ({type(error).__name__})")

    def _damaged(self, what: str) -> NoReturn:
        kit = "the kit" if self.public is None else f"kit {self.public.kit_id}"
        raise BatchDamaged(
            f"{self.path}: {what}: not what {kit} signed; nothing of this file was taken. Copy it from {kit} again"
        )


def encode(record: Record) -> bytes:
    """One row as an Arrow IPC stream, the same for the same record. Captures are bytes."""
    encounter = record.encounter
    row = {
        "subject_id": encounter.subject_id,
        "encounter_id": encounter.encounter_id,
        "captured_at": record.captured_at,
        "packed_at": record.packed_at,
        "groups": list(encounter.groups),
        "captures": [
            {"position": capture.column, "data": _content(capture), "dpi": getattr(capture, "dpi", None)}
            for capture in encounter.captures
            if not isinstance(capture, Missing)
        ],
        "templates": [_template_row(column, given) for column, given in sorted(encounter.templates.items())],
        "missing": [{"position": c.position, "reason": c.reason} for c in encounter.captures if isinstance(c, Missing)],
        "refusals": [vars(refusal) for refusal in record.refusals],
    }
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, _SCHEMA) as stream:
        stream.write_batch(pa.RecordBatch.from_pylist([row], schema=_SCHEMA))
    return bytes(sink.getvalue().to_pybytes())


def decode(payload: bytes, sequence: int) -> Record:
    """Raises what Arrow raises, and InvalidInput."""
    with pa.ipc.open_stream(payload) as stream:
        if stream.schema != _SCHEMA:
            raise InvalidInput(f"a record has the columns {stream.schema.names}; wanted {_SCHEMA.names}")
        table = stream.read_all()
    table.validate(full=True)
    (row,) = table.to_pylist()
    captures: list[Capture] = [
        Face(c["data"]) if c["position"] == "face" else Finger(c["data"], c["position"], c["dpi"])
        for c in row["captures"]
    ]
    captures += [Missing(**missing) for missing in row["missing"]]
    templates = {given["column"]: _template_of(given) for given in row["templates"]}
    encounter = Encounter(row["subject_id"], captures, templates, row["encounter_id"], row["groups"])
    refusals = tuple(Refusal(**refusal) for refusal in row["refusals"])
    return Record(encounter, _sequence(sequence), row["captured_at"], row["packed_at"], refusals)


def _content(capture: Capture) -> bytes:
    assert isinstance(capture, Face | Finger) and isinstance(capture.data, bytes), (
        "files are read before they are packed"
    )
    return capture.data


def _template_row(column: str, given: Float32 | bytes | Template) -> dict[str, Any]:
    """A bare vector or record has no model_id: the centre takes it to be of the column's model, as the engine does."""
    if isinstance(given, Template):
        vector = None if given.embedding is None else given.embedding.tolist()
        return {"column": column, "model_id": given.model_id, "embedding": vector, "minutiae": given.minutiae, "quality": given.quality}  # fmt: skip
    return {"column": column, "minutiae": given} if isinstance(given, bytes) else {"column": column, "embedding": given.tolist()}  # fmt: skip


def _template_of(row: dict[str, Any]) -> Float32 | bytes | Template:
    vector = None if row["embedding"] is None else np.array(row["embedding"], np.float32)
    if row["model_id"] is not None:
        return Template(row["column"], row["model_id"], vector, row["minutiae"], row["quality"])
    if vector is not None:
        return vector
    if not isinstance(row["minutiae"], bytes):
        raise InvalidInput(f"the {row['column']} template is empty; it needs an embedding or minutiae")
    return row["minutiae"]


def _json(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def _kit_of(payload: bytes) -> str:
    return str(json.loads(payload)["kit_id"])


def _end_of(payload: bytes) -> tuple[int, tuple[int, ...]]:
    fields = json.loads(payload)
    return int(fields["records"]), tuple(_sequence(number) for number in fields["void"])


def _sequence(number: int) -> int:
    if not (isinstance(number, int) and 1 <= number < 1 << 63):
        raise InvalidInput(f"a sequence is {number!r}, wanted a whole number from 1")
    return number


def gaps(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """(first, last) of each run of whole numbers from 1 that is missing below the largest of some sorted ones."""
    return [(a + 1, b - 1) for a, b in pairwise([0, *numbers]) if b > a + 1]
