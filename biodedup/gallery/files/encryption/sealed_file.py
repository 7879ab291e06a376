"""An encrypted file ("sealed file"): its content is in blocks of AES-256-GCM, and each block can be read on its own.

Owns this container format. Never interprets the content, and never chooses a key.

Method: STREAM (Hoang, Reyhanitabar, Rogaway, Vizar, CRYPTO 2015). The nonce is the block's number and a byte that is 1 only in the last
block, so that no block can be moved, removed or added. Each file has its own random key, so that no nonce is used twice with a key.

| bytes | |
|---|---|
| 0-7 | `BIOSEAL1` |
| 8-11 | uint32: bytes of content in a block, little-endian |
| 12-27 | `key_id` of the key that wraps the data key, hexadecimal |
| 28-87 | the data key, wrapped: nonce, 32 bytes, tag; its associated data are bytes 0-27 and the file's name |
| 88-127 | zeros |
| 128- | blocks: content and tag (16 bytes); the last block may be shorter. Their associated data are bytes 0-127 |
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Protocol

import numpy as np

from biodedup.errors import EngineClosed
from biodedup.gallery.files.encryption.keyring import TAG_BYTES, WRAPPED_BYTES, Key, aead
from biodedup.keys import KEY_BYTES

MAGIC = b"BIOSEAL1"
HEAD_BYTES = 128
BLOCK_BYTES, SMALL_BLOCK_BYTES = 1 << 16, 1 << 12
"""The block size of a file that is read in order, and of a file whose rows are read one by one."""
_PREFIX = struct.Struct("<8sI16s")
_BLOCK_BYTES_MIN, _BLOCK_BYTES_MAX = 1 << 12, 1 << 20
_READ_BLOCKS = 64  # blocks that are read from the disk at a time


class Output(Protocol):
    """A file that is being written (`filesystem.NewFile`)."""

    def write(self, data: bytes | memoryview) -> None: ...

    def finish(self) -> None: ...

    def discard(self) -> None: ...


class NotAuthentic(ValueError):
    """The content fails the authentication: it was changed, or the key is another one."""


def key_id_of(head: bytes) -> str | None:
    """The id of the key that wraps the data key, from the first bytes of a file; None if the file is not encrypted."""
    if len(head) < _PREFIX.size or not head.startswith(MAGIC):
        return None
    return str(_PREFIX.unpack_from(head)[2].decode("ascii", "replace"))


class SealedWriter:
    """Encrypts the content and passes it on to a file. name: the file's name, to which the encryption is bound."""

    def __init__(self, file: Output, key: Key, name: str, block_bytes: int) -> None:
        self._file = file
        self._size = block_bytes
        secret = secrets.token_bytes(KEY_BYTES)
        prefix = _PREFIX.pack(MAGIC, block_bytes, key.key_id.encode())
        self._head = (prefix + key.wrap(secret, prefix + name.encode())).ljust(HEAD_BYTES, b"\0")
        self._aead = aead(secret)
        self._count = 0
        self._buffer = bytearray()
        file.write(self._head)

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data).cast("B")
        if self._buffer:  # a full block waits until more content arrives, because the last block is marked
            taken = rest[: self._size - len(self._buffer)]
            self._buffer += taken
            rest = rest[len(taken) :]
            if not len(rest):
                return
            self._seal(self._buffer, last=False)
            self._buffer = bytearray()
        while len(rest) > self._size:
            self._seal(rest[: self._size], last=False)
            rest = rest[self._size :]
        self._buffer += rest

    def finish(self) -> None:
        self._seal(self._buffer, last=True)
        self._file.finish()

    def discard(self) -> None:
        self._file.discard()

    def _seal(self, content: bytearray | memoryview, *, last: bool) -> None:
        self._file.write(self._aead.encrypt(_nonce(self._count, last), content, self._head))
        self._count += 1


class SealedMap(mmap.mmap):
    """The content of an encrypted file, in anonymous memory. `need` decrypts blocks into it. Thread-safe.

    The memory is excluded from core dumps. Its address range has the size of the content; only decrypted blocks use memory.
    """

    _sealed: _Sealed
    guard: threading.RLock

    @classmethod
    def of(cls, file: int, key: Key, name: str) -> SealedMap:
        """Opens the content of a file. file: an open descriptor, which the map closes. Raises NotAuthentic."""
        sealed = _Sealed(file, key, name)
        made = cls(-1, max(sealed.size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        made._sealed, made.guard = sealed, sealed.guard
        advice = ["MADV_DONTDUMP"]
        if sealed.block_bytes >= BLOCK_BYTES:  # not for files whose rows are read one by one: they use few pages
            advice.append("MADV_HUGEPAGE")
        for name in advice:
            with suppress(AttributeError, OSError):  # only hints, which not every kernel supports
                made.madvise(getattr(mmap, name))
        made.need(max(sealed.size - 1, 0), sealed.size)  # the last block authenticates the length
        return made

    @property
    def key_id(self) -> str:
        return self._sealed.key_id

    @property
    def content_size(self) -> int:
        return self._sealed.size

    def check_size(self) -> bool:
        """Whether the file still has its length. Raises EngineClosed."""
        return self._sealed.is_whole()

    def need(self, start: int, end: int) -> None:
        """Decrypts the blocks of these bytes. Raises NotAuthentic, and OSError for a failed disk operation."""
        with self.guard:
            self._sealed.fill(self, start, end)

    def release(self) -> None:
        """Releases the memory. Blocks are decrypted again when they are needed. The caller ensures that no view is in use."""
        with self.guard:
            self._sealed.forget()
            self.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        with self.guard:
            self._sealed.close()
        super().close()


class _Sealed:
    """The encrypted file of a `SealedMap`."""

    key_id: str
    size: int
    block_bytes: int

    def __init__(self, file: int, key: Key, name: str) -> None:
        self._file = file
        self.guard = threading.RLock()
        try:
            self._open(key, name)
        except BaseException:
            self.close()
            raise

    def _open(self, key: Key, name: str) -> None:
        self._bytes = os.fstat(self._file).st_size
        self._head = os.pread(self._file, HEAD_BYTES, 0)
        if len(self._head) < HEAD_BYTES or not self._head.startswith(MAGIC):
            raise NotAuthentic("it is not encrypted, but the gallery is")
        _, self.block_bytes, key_id = _PREFIX.unpack_from(self._head)
        self.key_id = key_id.decode("ascii", "replace")
        if not _BLOCK_BYTES_MIN <= self.block_bytes <= _BLOCK_BYTES_MAX:
            raise NotAuthentic("its head was changed")
        if self.key_id != key.key_id:
            raise NotAuthentic("it is encrypted with another key than the gallery's")
        at = _PREFIX.size
        secret = key.unwrap(self._head[at : at + WRAPPED_BYTES], self._head[:at] + name.encode())
        if secret is None or any(self._head[at + WRAPPED_BYTES :]):
            raise NotAuthentic("its head was changed, or belongs to another file")
        stride = self.block_bytes + TAG_BYTES
        count = -(-(self._bytes - HEAD_BYTES) // stride)
        self.size = self._bytes - HEAD_BYTES - count * TAG_BYTES
        if count < 1 or self.size < (count - 1) * self.block_bytes:
            raise NotAuthentic("it was truncated")
        self._aead = aead(secret)
        self._ready = np.zeros(count, bool)

    def is_whole(self) -> bool:
        with self.guard:  # so that the descriptor is not closed, and its number reused, meanwhile
            self._refuse_closed()
            return os.fstat(self._file).st_size >= self._bytes

    def _refuse_closed(self) -> None:
        if self._file < 0:
            raise EngineClosed("the gallery was closed while it was being read; open it again")

    def forget(self) -> None:
        self._ready[:] = False

    def fill(self, target: mmap.mmap, start: int, end: int) -> None:
        first, last = start // self.block_bytes, max(-(-end // self.block_bytes), 1)
        single = last - first == 1  # the usual case for files whose rows are read one by one
        if self._ready[first] if single else self._ready[first:last].all():
            return
        self._refuse_closed()
        out = memoryview(target)
        try:
            for low, high in [(first, last)] if single else _runs(~self._ready[first:last], first):
                self._decrypt(out, low, high)
        finally:
            out.release()

    def _decrypt(self, out: memoryview, low: int, high: int) -> None:
        stride, size = self.block_bytes + TAG_BYTES, self.block_bytes
        data = memoryview(_read(self._file, (high - low) * stride, HEAD_BYTES + low * stride))
        for block in range(low, high):
            piece = data[(block - low) * stride : (block - low + 1) * stride]
            at, last = block * size, block == len(self._ready) - 1
            self._open_block(block, piece, out[at : min(at + size, self.size)], last)
            self._ready[block] = True

    def _open_block(self, block: int, piece: memoryview, out: memoryview, last: bool) -> None:
        from cryptography.exceptions import InvalidTag

        try:
            if len(piece) != len(out) + TAG_BYTES:
                raise NotAuthentic("it was truncated while it was open")
            self._aead.decrypt_into(_nonce(block, last), piece, self._head, out)
        except InvalidTag:
            raise NotAuthentic(f"block {block} was changed, or belongs to another position or file") from None

    def close(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def __del__(self) -> None:
        self.close()


def _runs(wanted: Any, base: int) -> Iterator[tuple[int, int]]:
    """Runs [low, high) of wanted blocks, each of at most `_READ_BLOCKS` blocks."""
    at = np.flatnonzero(wanted) + base
    for run in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1):
        for low in range(int(run[0]), int(run[-1]) + 1, _READ_BLOCKS):
            yield low, min(low + _READ_BLOCKS, int(run[-1]) + 1)


def _read(file: int, count: int, at: int) -> bytes:
    pieces: list[bytes] = []
    while count and (piece := os.pread(file, count, at)):
        pieces.append(piece)
        count, at = count - len(piece), at + len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _nonce(block: int, last: bool) -> bytes:
    return block.to_bytes(11, "big") + bytes([last])
