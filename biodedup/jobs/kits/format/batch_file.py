"""Writes and reads the batch file of a field kit: records that are signed one by one, and encrypted for the centre.

Owns the bytes (`KIT.md` describes them), and the proof that each record is as the kit signed it. Never decides about a record, and never checks
the rights of a kit.

1. No content is parsed before its signature is checked, and no length is used before it is compared with a limit.
2. Each signature covers everything before it: a record cannot be changed, moved, left out or copied to another file.
3. Only the last frame states that a file is complete. A file without it is *cut*; all complete records before the cut are valid.
4. The same records have the same digest and signatures. Their encryption differs, because each file has its own key.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import pyarrow as pa

from biodedup.errors import BatchDamaged, InvalidInput, StorageUnavailable, UnknownKit
from biodedup.jobs.kits.format.cipher import EPHEMERAL_BYTES, TAG_BYTES, Chunks, opening, sealing
from biodedup.jobs.kits.format.keys import (
    FINGERPRINT_BYTES,
    SIGNATURE_BYTES,
    CentreKey,
    CentrePublic,
    KitKey,
    PublicKey,
)
from biodedup.jobs.kits.format.record import RECORD_BYTES_MAX, Record, checked_sequence, decode, encode
from biodedup.jobs.shared.files import open_regular

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

MAGIC, UNENCRYPTED, VERSION = b"\x89BDKIT\n", 1, 2
RECORDS_MAX = 100_000
"""The largest number of records in a file; a team captures so many in months."""
_PREAMBLE = struct.Struct(f"<{len(MAGIC)}sB{FINGERPRINT_BYTES}s")
_TO_CENTRE = FINGERPRINT_BYTES + EPHEMERAL_BYTES  # after the preamble of an encrypted file
_HEADER = struct.Struct("<cQI")  # kind, sequence, length of the payload in bytes
_CHECK = struct.Struct("<I")  # CRC-32 of the header, so that a damaged length is not taken for a cut
_HEAD_BYTES = _HEADER.size + _CHECK.size
_MANIFEST, _RECORD, _END = b"M", b"R", b"E"
_BYTES_MAX = {_MANIFEST: 4 << 10, _RECORD: RECORD_BYTES_MAX, _END: 4 << 20}


def _domain(version: int) -> bytes:
    return b"biodedup kit batch %d\0" % version


class BatchWriter:
    """Writes a batch file, from its manifest to its end, into an open file.

    centre: the public key for which it is encrypted; None writes version 1, which is not encrypted. ephemeral: the private key of this batch
    only; None makes a new one.
    """

    def __init__(
        self, file: BinaryIO, key: KitKey, centre: CentrePublic | None = None, ephemeral: X25519PrivateKey | None = None
    ) -> None:
        self._file = file
        self._key = key
        self._count = 0
        self._chunks: Chunks | None = None
        fingerprint = key.public.fingerprint
        self._version = UNENCRYPTED if centre is None else VERSION
        start = _PREAMBLE.pack(MAGIC, self._version, fingerprint) + (b"" if centre is None else centre.fingerprint)
        file.write(start)
        if centre is not None:
            from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

            ephemeral = ephemeral or X25519PrivateKey.generate()
            file.write(ephemeral.public_key().public_bytes_raw())
            self._chunks = sealing(fingerprint, centre, ephemeral)
        self.digest = hashlib.sha256(start).digest()
        self._add(_MANIFEST, 0, _json({"kit_id": key.public.kit_id}))

    def add(self, record: Record) -> None:
        """Writes a record. Raises InvalidInput if it is larger than readers accept."""
        self.add_encoded(record.sequence, encode(record))

    def add_encoded(self, sequence: int, payload: bytes) -> None:
        if len(payload) > RECORD_BYTES_MAX:
            raise InvalidInput(f"a record has {len(payload):,} bytes, wanted at most {RECORD_BYTES_MAX:,}")
        self._count += 1
        self._add(_RECORD, sequence, payload)

    def finish(self, void: Iterable[int] = ()) -> None:
        """Writes the end. void: sequence numbers that no batch has any more, because this file replaces the file that had them."""
        self._add(_END, 0, _json({"records": self._count, "void": sorted(void)}))

    def _add(self, kind: bytes, sequence: int, payload: bytes) -> None:
        head = _HEADER.pack(kind, sequence, len(payload))
        head += _CHECK.pack(zlib.crc32(head))
        self.digest = hashlib.sha256(self.digest + head + payload).digest()
        signed = payload + self._key.sign(_domain(self._version) + self.digest)
        if self._chunks is not None:
            signed = self._chunks.seal(signed, head, last=kind == _END)
        self._file.write(head + signed)


class BatchReader:
    """Reads a batch file. Iterate over it once, for its records in order.

    After the iteration, `whole` tells whether the file is complete, `void` has its void sequences, and `digest` is the digest of the content that
    was read. `public` is the kit's key; None if the file is cut before it names the key. centre: the private keys that open encrypted files.
    allow_unencrypted: files of version 1 are read. records_max: a file with more records is refused.

    Raises InvalidInput (not a batch file, or not allowed), UnknownKit, BatchDamaged (also during the iteration), StorageUnavailable.
    """

    def __init__(
        self,
        path: Path,
        trusted: Mapping[bytes, PublicKey],
        centre: Sequence[CentreKey] = (),
        *,
        allow_unencrypted: bool = False,
        records_max: int = RECORDS_MAX,
    ) -> None:
        self.path = path
        self.public: PublicKey | None = None
        self.whole = False
        self.void: tuple[int, ...] = ()
        self.count = 0
        self.records_max = records_max
        self._last = "its start"
        self._chunks: Chunks | None = None
        self._file = _opened(path)
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            self._version = self._start(trusted, centre, allow_unencrypted)
        except BaseException:
            self._file.close()
            raise

    def _start(self, trusted: Mapping[bytes, PublicKey], centre: Sequence[CentreKey], allow_unencrypted: bool) -> int:
        """Reads the part before the frames. Returns the version."""
        start = self._read(_PREAMBLE.size)
        if not (MAGIC.startswith(start) or start.startswith(MAGIC)):
            raise InvalidInput(f"{self.path} is not a batch file; name one that `biodedup kit pack` wrote")
        version = start[len(MAGIC)] if len(start) > len(MAGIC) else VERSION
        if version not in (UNENCRYPTED, VERSION):
            raise InvalidInput(
                f"{self.path} is a batch file of version {version}, wanted {VERSION}; update biodedup here, or copy the file from "
                "the kit again"
            )
        if version == UNENCRYPTED and not allow_unencrypted:
            raise InvalidInput(
                f"{self.path} is not encrypted (version 1); nothing of it was taken. Pack it again with the centre's key, or allow it "
                "with --allow-unencrypted"
            )
        rest = self._read(_TO_CENTRE) if version == VERSION and len(start) == _PREAMBLE.size else b""
        self.digest = hashlib.sha256(start + rest[:FINGERPRINT_BYTES]).digest()
        whole = len(start) == _PREAMBLE.size and (version == UNENCRYPTED or len(rest) == _TO_CENTRE)
        if whole:
            fingerprint = start[-FINGERPRINT_BYTES:]
            public = trusted.get(fingerprint)
            if public is None:
                raise UnknownKit(
                    f"{self.path} is signed by a key that is not trusted here, fingerprint {fingerprint.hex()[:16]}; nothing of it "
                    "was taken. Ask the team to read out the fingerprint of their key, and only if it is this one put their "
                    ".pub file into the trusted folder"
                )
            if version == VERSION:
                self._chunks = self._opening(fingerprint, rest, centre)
            self.public = public
        return version

    def _opening(self, kit: bytes, rest: bytes, centre: Sequence[CentreKey]) -> Chunks:
        wanted = rest[:FINGERPRINT_BYTES]
        key = next((known for known in centre if known.public.fingerprint == wanted), None)
        if key is None:
            raise InvalidInput(
                f"{self.path} is encrypted to a centre's key that was not given, fingerprint {wanted.hex()[:16]}; nothing of it was "
                "taken. Name that key with --centre-key, or pack again for this centre"
            )
        chunks = opening(kit, key, rest[FINGERPRINT_BYTES:])
        return chunks or self._damaged("its key agreement is forged")

    def __enter__(self) -> BatchReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Record]:
        if self.public is None:
            return
        for kind, sequence, payload in self._frames():
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
                    self._damaged(f"its end states {count} records, but it has {self.count}")
                if self._read(1):
                    self._damaged("something was added after its end")
                self.whole = True
                return

    def _frames(self) -> Iterator[tuple[bytes, int, bytes]]:
        """(kind, sequence, payload) of each complete frame, after its signature is checked."""
        assert self.public is not None, "frames are read with a key"
        first = True
        while len(head := self._read(_HEAD_BYTES)) == _HEAD_BYTES:
            kind, sequence, length = self._checked(head, first)
            on_disk = length + SIGNATURE_BYTES + (TAG_BYTES if self._chunks else 0)
            if self._file.tell() + on_disk > self._size:
                return
            content = self._read(on_disk)
            signed = self._chunks.open(content, head, last=kind == _END) if self._chunks else content
            if signed is None:
                self._changed(kind, sequence)
            payload, signature = signed[:length], signed[length:]
            digest = hashlib.sha256(self.digest + head + payload).digest()
            if not self.public.signed(signature, _domain(self._version) + digest):
                self._changed(kind, sequence)
            self.digest = digest
            yield kind, sequence, payload
            first = False

    def _checked(self, head: bytes, first: bool) -> tuple[bytes, int, int]:
        """(kind, sequence, length) of a frame's header, after the checks that it is valid at this place. The payload is read later."""
        kind, sequence, length = _HEADER.unpack_from(head)
        if _CHECK.unpack_from(head, _HEADER.size)[0] != zlib.crc32(head[: _HEADER.size]):
            self._damaged(f"the part after {self._last} was changed")
        if (kind == _MANIFEST) != first or kind not in _BYTES_MAX:
            self._damaged(f"the part after {self._last} is out of place")
        if length > _BYTES_MAX[kind]:
            self._damaged(f"the part after {self._last} has {length:,} bytes, wanted at most {_BYTES_MAX[kind]:,}")
        if kind == _RECORD and self.count >= self.records_max:
            raise InvalidInput(
                f"{self.path} has more than {self.records_max:,} records, which is all that a batch of this key may bring; nothing of "
                "it was taken. Pack smaller batches, or raise the limit with `biodedup kit trust`"
            )
        return kind, sequence, length

    def _read(self, count: int) -> bytes:
        try:
            return self._file.read(count)
        except OSError as error:
            raise StorageUnavailable(
                f"{self.path} cannot be read after {self._last} ({error.strerror}); copy it again, or try another reader"
            ) from error

    def _parsed(self, parse: Callable[..., Any], *content: Any) -> Any:
        """Parses signed content. Content that is signed but not readable counts as damage."""
        try:
            return parse(*content)
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError, struct.error, RecursionError) as error:  # fmt: skip
            self._damaged(f"{self._last} is signed and cannot be read ({type(error).__name__})")

    def _changed(self, kind: bytes, sequence: int) -> NoReturn:
        what = {_RECORD: f"the record with sequence {sequence}", _MANIFEST: "its manifest"}.get(kind, "its end")
        self._damaged(f"{what} (record {self.count + (kind == _RECORD)} of the file) was changed")

    def _damaged(self, damage: str) -> NoReturn:
        kit = "the kit" if self.public is None else f"kit {self.public.kit_id}"
        raise BatchDamaged(
            f"{self.path}: {damage}: not what {kit} signed; nothing of this file was taken. Copy it from {kit} again"
        )


def _opened(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except FileNotFoundError:
        raise InvalidInput(f"{path} does not exist; name a kit's batch file") from None
    except OSError as error:
        raise StorageUnavailable(f"{path} cannot be read ({error.strerror}); correct this and try again") from error


def _json(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def _kit_of(payload: bytes) -> str:
    return str(json.loads(payload)["kit_id"])


def _end_of(payload: bytes) -> tuple[int, tuple[int, ...]]:
    fields = json.loads(payload)
    return int(fields["records"]), tuple(checked_sequence(number) for number in fields["void"])


def gaps(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """(first, last) of each range of whole numbers from 1 that is missing in a sorted list."""
    return [(a + 1, b - 1) for a, b in pairwise([0, *numbers]) if b > a + 1]
