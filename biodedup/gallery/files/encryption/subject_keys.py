"""A key for the minutiae of each row, in a file outside the gallery, so that a row's minutiae can be erased from backups: crypto-erasure.

Owns the file of the keys, and the form of a sealed record. Never reads a gallery, and never says which rows are removed.

A record is sealed by AES-256-GCM under the key of a slot of the file, which the record names; one slot serves all columns of a row. The file is
a head of 32 bytes, and 32 bytes for each slot. A key is random, used for one row, and once for each column, which is its nonce.

1. Slots are on the disk when `allocate` returns, before a commit names them. Those of a commit that failed stay unused.
2. A removal first notes its slots (`doom`), is committed, and then has their keys overwritten (`destroy`). What a crash leaves between is
   done at the next opening: `doomed` says what was noted.
3. A record whose key was destroyed reads as empty: no minutiae.
4. Records from before the gallery had such keys are not sealed, and read as they are.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from biodedup.errors import EngineClosed, GalleryDamaged, InvalidInput, KeyMismatch
from biodedup.gallery.files.encryption.keyring import aead
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.private import create_private, make_private_folder

_MAGIC = b"BDSK"
"""Begins a sealed record. Records that are not sealed begin with `FMR`."""
_HEAD = struct.Struct("<4sq")
_FILE_HEAD = b"biodedup subject keys 1".ljust(32, b"\0")
_KEY_BYTES = 32
_NONE = bytes(_KEY_BYTES)
_PAIR = struct.Struct("<qq")


class SubjectKeys:
    """Of one gallery. folder: of the files of keys, made where it is absent. Thread-safe. Raises StorageUnavailable, GalleryDamaged."""

    def __init__(self, folder: Path, gallery_id: str, *, read_only: bool, new: bool) -> None:
        """new: the gallery has none yet."""
        self._path, self._doomed = folder / f"{gallery_id}.keys", folder / f"{gallery_id}.doomed"
        self._lock = threading.Lock()
        with translated(f"opening {self._path}"):
            if new and not self._path.exists():
                make_private_folder(folder)
                _write_new(self._path, _FILE_HEAD)
            if not self._path.exists():
                raise GalleryDamaged(
                    f"{self._path} is missing; restore it: without it no minutiae of this gallery can be read"
                )
            self._file = os.open(self._path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NOFOLLOW)
            if os.pread(self._file, len(_FILE_HEAD), 0) != _FILE_HEAD:
                os.close(self._file)
                raise GalleryDamaged(f"{self._path} is no file of subject keys; restore it")

    def allocate(self, count: int) -> range:
        """New slots. Other processes may do so at the same time, such as one that opened a restored backup."""
        with self._lock, translated(f"writing {self._path}"), _locked(self._file):
            size = os.fstat(self._file).st_size
            first = -(-size // _KEY_BYTES) - 1  # a slot that was written half is left alone
            _write_all(self._file, secrets.token_bytes(count * _KEY_BYTES), (first + 1) * _KEY_BYTES)
            os.fsync(self._file)
        return range(first, first + count)

    def seal(self, slot: int, column: int, record: bytes) -> bytes:
        """column: its index. One record a slot and column."""
        head = _HEAD.pack(_MAGIC, slot)
        return head + bytes(aead(self._key(slot)).encrypt(_nonce(column), record, head))

    def opened(self, column: int, records: Sequence[bytes]) -> list[bytes]:
        """Records as they were; b"" for those whose key was destroyed. Raises GalleryDamaged where one was changed, or is another column's."""
        return [self._opened(column, record) if record.startswith(_MAGIC) else record for record in records]

    def _opened(self, column: int, record: bytes) -> bytes:
        from cryptography.exceptions import InvalidTag

        head, slot = record[: _HEAD.size], slot_of(record)
        key = self._key(slot)
        if key == _NONE:
            return b""
        try:
            return bytes(aead(key).decrypt(_nonce(column), record[_HEAD.size :], head))
        except InvalidTag:
            raise GalleryDamaged(
                f"minutiae of slot {slot} do not open with the key in {self._path}: one of the two is damaged, or of another time"
            ) from None

    def _key(self, slot: int) -> bytes:
        if self._file < 0:
            raise EngineClosed("the gallery was closed; open it again")
        key = os.pread(self._file, _KEY_BYTES, (slot + 1) * _KEY_BYTES)
        if slot < 0 or len(key) < _KEY_BYTES:
            raise GalleryDamaged(
                f"{self._path} lacks the key of slot {slot}: it is older than the gallery; restore a newer copy"
            )
        return key

    def doom(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Notes which slots a commit is about to make needless. pairs: (row, slot)."""
        with self._lock, translated(f"writing {self._doomed}"):
            if not self._doomed.exists():
                _write_new(self._doomed, b"")
            file = os.open(self._doomed, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.write(file, b"".join(_PAIR.pack(*pair) for pair in pairs))
                os.fsync(file)
            finally:
                os.close(file)

    def doomed(self) -> list[tuple[int, int]]:
        """(row, slot) of what was noted and not forgotten."""
        with translated(f"reading {self._doomed}"):
            content = self._doomed.read_bytes() if self._doomed.exists() else b""
        return [*_PAIR.iter_unpack(content[: len(content) // _PAIR.size * _PAIR.size])]

    def forget_doomed(self) -> None:
        with translated(f"removing {self._doomed}"):
            self._doomed.unlink(missing_ok=True)

    def destroy(self, slots: Iterable[int]) -> None:
        """Overwrites keys."""
        with self._lock, translated(f"writing {self._path}"):
            for slot in slots:
                self._key(slot)  # never behind the end
                _write_all(self._file, _NONE, (slot + 1) * _KEY_BYTES)
            os.fsync(self._file)

    def close(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def refuse_keys_within(gallery: Path, folder: Path) -> None:
    """Raises InvalidInput where the folder of the keys is in the gallery itself."""
    if gallery.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise InvalidInput(
            f"subject_keys is {folder}, in the gallery itself, whose backups must not have them; name another folder"
        )


def unsealed(keys: SubjectKeys | None, column: int, records: Sequence[bytes]) -> list[bytes]:
    """As `SubjectKeys.opened`. Raises KeyMismatch where records are sealed, and there are no keys."""
    if keys is not None:
        return keys.opened(column, records)
    if any(record.startswith(_MAGIC) for record in records):
        raise KeyMismatch(
            "minutiae of this gallery are sealed by keys of its subjects; state where these are by Config(subject_keys=...)"
        )
    return list(records)


@contextmanager
def _locked(file: int) -> Iterator[None]:
    """Holds the lock of an open file against other openings of it."""
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def slot_of(record: bytes) -> int:
    """-1 for a record that is not sealed."""
    if not record.startswith(_MAGIC) or len(record) < _HEAD.size:
        return -1
    return int(_HEAD.unpack_from(record)[1])


def _nonce(column: int) -> bytes:
    return column.to_bytes(12, "big")


def _write_new(path: Path, content: bytes) -> None:
    file = create_private(path)
    try:
        _write_all(file, content, 0)
        os.fsync(file)
    finally:
        os.close(file)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_all(file: int, data: bytes, at: int) -> None:
    while data:
        written = os.pwrite(file, data, at)
        data, at = data[written:], at + written
