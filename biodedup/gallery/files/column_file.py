"""A column file: named arrays in one immutable, checksummed, memory-mapped file.

Owns this container format (FORMAT.md describes it byte by byte). Never interprets the arrays.

1. Every byte of a file is covered by a checksum. A block is verified when it is first read.
2. Headers and arrays are little-endian; the table of contents is JSON; nothing is pickled. An attacker can compute the checksums again, so
   sizes, offsets and counts are validated before they are used.
3. A read beyond the end of a mapped file would end the process (SIGBUS). So the size is checked before each read. A file that is truncated
   between this check and the read is not detected.
4. The manifest stores the digest of each file's content, so that one file cannot replace another.
5. A block of an encrypted file (encryption/sealed_file.py) is decrypted before its checksum is verified. Its arrays are in the memory of
   this process. Single rows are read as copies, so that this memory can be released.
"""

from __future__ import annotations

import json
import mmap
import re
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numba
import numpy as np
import xxhash
from numpy.typing import NDArray

from biodedup.errors import BiodedupError, EngineClosed, GalleryBusy, GalleryDamaged, KeyMismatch
from biodedup.gallery.files.encryption.sealed_file import NotAuthentic, SealedMap
from biodedup.gallery.files.encryption.transform import Transform
from biodedup.gallery.files.filesystem import MALFORMED, NewFile, Storage
from biodedup.gallery.files.names import NEW_SUFFIX

MAGIC = b"BIODEDUP"
VERSION, VERSION_OF_SMALL_BLOCKS = 1, 2
BLOCK_BYTES = 1 << 16
"""The bytes that a checksum covers. Files whose rows are read one by one have smaller blocks."""
_READ_OVER_BYTES = 1 << 16
"""A gap up to this size between two wanted rows is read as well: on a slow disk this takes no longer than a second request."""
_ADVISED_SECONDS = 60.0  # after this time the system may have dropped pages from its cache
_ASKED_BYTES = 1 << 17
"""The size of one MADV_WILLNEED request: Linux reads at most its read-ahead size for a request, 128 kB by default."""
_ALIGN_BYTES, _PAGE = 64, mmap.PAGESIZE
_HEADER_BYTES = 4096  # the header is padded to a multiple of this, so that the arrays begin on a page
_FIXED = struct.Struct(
    "<8sIIQQ"
)  # magic, version, header bytes, file bytes, checksum of the header with this field zero
_CHECKSUM_AT = _FIXED.size - 8
_HEADER_BYTES_MAX = 1 << 26
READ_ONCE = "index"
"""The name of an array that is read completely and then released: a FAISS index (segments/stored_index.py)."""
_DTYPE = re.compile(r"\|[iu]1|<[iu][248]|<f[48]")


@dataclass(frozen=True)
class Stream:
    """An array to be written, in pieces along its first axis. dtype: numpy's name with the byte order, for example `<f4`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Iterable[NDArray[Any]]

    @property
    def byte_count(self) -> int:
        return np.dtype(self.dtype).itemsize * prod(self.shape)


def write_column_file(
    storage: Storage,
    path: Path,
    about: dict[str, Any],
    streams: Sequence[Stream],
    block_bytes: int = BLOCK_BYTES,
    *,
    replaces: bool = False,
) -> str:
    """Writes a file and syncs it (the caller syncs the folder). Returns the file's digest.

    about: metadata, for JSON; replaces: replace an existing file; otherwise raises GalleryBusy if the name is taken.
    """
    arrays, offset = {}, 0
    for stream in streams:
        offset += -offset % _ALIGN_BYTES
        arrays[stream.name] = {"dtype": stream.dtype, "shape": list(stream.shape), "offset": offset}
        offset += stream.byte_count
    header = _header(about, arrays, offset, block_bytes)
    new = path.with_name(path.name + NEW_SUFFIX)
    file = storage.create(new)
    try:
        file.write(header)
        body = _Body(file, block_bytes)
        for stream in streams:
            body.write(bytes(-body.count % _ALIGN_BYTES))
            start = body.count
            for piece in stream.pieces:
                body.write(np.ascontiguousarray(piece, dtype=stream.dtype).reshape(-1).view(np.uint8).data)
            if body.count - start != stream.byte_count:
                raise GalleryDamaged(
                    f"{stream.name} of {path.name} has {body.count - start} bytes, wanted {stream.byte_count}: its source is damaged; "
                    "run `biodedup doctor`"
                )
        table = body.table()
        file.write(table)
        file.write(xxhash.xxh3_64_intdigest(table).to_bytes(8, "little"))
        file.finish()
    except BaseException:
        file.discard()
        raise
    if replaces:
        storage.replace(new, path)
        return _digest(header, table)
    try:
        storage.claim(new, path)
    except FileExistsError:
        raise GalleryBusy(
            f"{path.name} exists already: another process writes segments here; try again, or close this engine and open the "
            "gallery again"
        ) from None
    return _digest(header, table)


def _header(about: dict[str, Any], arrays: dict[str, Any], body_bytes: int, block_bytes: int) -> bytes:
    small = block_bytes != BLOCK_BYTES
    table = {"about": about, **({"block_bytes": block_bytes} if small else {}), "arrays": arrays}
    contents = json.dumps(table, separators=(",", ":")).encode()
    size = _FIXED.size + len(contents)
    size += -size % _HEADER_BYTES
    file_bytes = size + body_bytes + 8 * -(-body_bytes // block_bytes) + 8
    header = bytearray(size)
    version = VERSION_OF_SMALL_BLOCKS if small else VERSION
    _FIXED.pack_into(header, 0, MAGIC, version, size, file_bytes, 0)
    header[_FIXED.size : _FIXED.size + len(contents)] = contents
    struct.pack_into("<Q", header, _CHECKSUM_AT, xxhash.xxh3_64_intdigest(header))
    return bytes(header)


def _digest(header: bytes, table: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(header + table)


class _Body:
    """Writes the arrays, and computes the checksum of every block."""

    def __init__(self, file: NewFile, block_bytes: int) -> None:
        self.count = 0
        self._block_bytes = block_bytes
        self._file = file
        self._checksums: list[int] = []
        self._partial = xxhash.xxh3_64()

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        rest = memoryview(data)
        while len(rest):
            filled = self.count % self._block_bytes
            piece = rest[: self._block_bytes - filled]
            self._partial.update(piece)
            self.count += len(piece)
            if filled + len(piece) == self._block_bytes:
                self._checksums.append(self._partial.intdigest())
                self._partial.reset()
            rest = rest[len(piece) :]

    def table(self) -> bytes:
        if self.count % self._block_bytes:
            self._checksums.append(self._partial.intdigest())
        return np.array(self._checksums, "<u8").tobytes()


_int: Any = numba.types.intc
_uint: Any = numba.types.uintp
_madvise: Any = numba.types.ExternalFunction("madvise", _int(_uint, _uint, _int))


def _advise_each(address: int, starts: Any, sizes: Any, advice: int) -> None:
    """Calls madvise for many spans, without the GIL. mmap.madvise holds the GIL for microseconds per span when the disk is read."""
    for i in range(starts.shape[0]):
        for at in range(0, sizes[i], _ASKED_BYTES):
            _madvise(address + starts[i] + at, min(_ASKED_BYTES, sizes[i] - at), advice)


def _touch_each(content: Any, starts: Any, size: int) -> int:
    """Reads one byte of each page, without the GIL, until all pages are in memory. A checksum would wait for the disk with the GIL held."""
    total = 0
    for i in range(starts.shape[0]):
        for at in range(starts[i], min(starts[i] + size, content.shape[0]), _PAGE):
            total += content[at]
    return total


_advise: Any = numba.njit(_advise_each, nogil=True, cache=True)
_touch: Any = numba.njit(_touch_each, nogil=True, cache=True)


_CLOSED = "the gallery was closed while it was being read; open it again"


def _closed_map() -> mmap.mmap:
    content = mmap.mmap(-1, 1)
    content.close()
    return content


class _Closed(dict[str, NDArray[Any]]):
    """Replaces the arrays of a closed file: every look-up raises EngineClosed."""

    def __missing__(self, name: str) -> NDArray[Any]:
        raise EngineClosed(_CLOSED)


class ColumnFile:
    """An open column file. Thread-safe. For damaged content it raises GalleryDamaged, which names the file and the array."""

    def __init__(
        self, content: mmap.mmap, name: str, forget: Callable[[], None], transforms: Callable[[str], Transform]
    ) -> None:
        """content: the mapped file; name: for errors; forget: tells the system to drop the file from its cache; transforms: id -> the
        secret transform of stored embeddings."""
        self.name = name
        self.transforms = transforms
        self._forget = forget
        self._content = content
        self._sealed = content if isinstance(content, SealedMap) else None
        self._octets = np.frombuffer(content, np.uint8)
        self._address = self._octets.ctypes.data
        self._decrypt(0, min(_HEADER_BYTES, len(content)))
        try:
            magic, version, header_bytes, file_bytes, checksum = _FIXED.unpack_from(content)
        except struct.error:
            raise self.damaged("it is shorter than a header") from None
        if magic != MAGIC or version not in (VERSION, VERSION_OF_SMALL_BLOCKS):
            raise self.damaged(f"magic {magic!r}, format {version}, wanted {MAGIC!r} and {VERSION_OF_SMALL_BLOCKS}")
        if file_bytes != len(content):
            raise self.damaged(f"{len(content)} bytes, wanted {file_bytes}")
        if not _FIXED.size <= header_bytes <= min(_HEADER_BYTES_MAX, file_bytes - 8):
            raise self.damaged(f"a header of {header_bytes} bytes")
        self._decrypt(0, header_bytes)
        header = bytearray(content[:header_bytes])
        header[_CHECKSUM_AT : _FIXED.size] = bytes(8)
        if xxhash.xxh3_64_intdigest(header) != checksum:
            raise self.damaged("its header")
        try:
            contents = json.loads(header[_FIXED.size :].rstrip(b"\0"))
            self.about: dict[str, Any] = contents["about"]
            self._block_bytes: int = contents.get("block_bytes", BLOCK_BYTES)
            arrays: dict[str, Any] = dict(contents["arrays"])
        except MALFORMED:
            raise self.damaged("its table of contents") from None
        self._start = header_bytes
        if type(self.about) is not dict or self._block_bytes not in {1 << n for n in range(9, 17)}:
            raise self.damaged("its table of contents")
        self._singly = self._block_bytes < BLOCK_BYTES
        if self._singly and self._sealed is None:
            content.madvise(mmap.MADV_RANDOM)  # without it, read-ahead reads sixteen times as much as is needed
        blocks = -(-(file_bytes - header_bytes - 8) // (self._block_bytes + 8))
        self._decrypt(file_bytes - 8 - 8 * blocks, file_bytes)
        table = content[file_bytes - 8 - 8 * blocks : file_bytes - 8]
        if xxhash.xxh3_64_intdigest(table) != int.from_bytes(content[file_bytes - 8 :], "little"):
            raise self.damaged("its table of checksums")
        self.digest = _digest(bytes(content[:header_bytes]), table)
        self.byte_count = file_bytes
        self._checksums = np.frombuffer(table, "<u8")
        self._end = file_bytes - 8 - 8 * blocks
        if blocks != -(-(self._end - header_bytes) // self._block_bytes):
            raise self.damaged("its table of checksums")
        self._checked = np.zeros(blocks, bool)
        self._advised = np.full(len(self._checked), -np.inf)
        self._arrays: dict[str, NDArray[Any]] = {}
        self._offsets: dict[str, int] = {}
        for key, spec in arrays.items():
            dtype, shape, offset = self._specified(key, spec)
            self._offsets[key] = offset
            self._arrays[key] = np.frombuffer(content, dtype, prod(shape), header_bytes + offset).reshape(shape)
        self._copied = self._sealed is not None and (self._singly or READ_ONCE in self._arrays)

    def _decrypt(self, start: int, end: int) -> None:
        """Decrypts the bytes [start, end) of an encrypted file; does nothing for another file. Raises GalleryDamaged."""
        if (sealed := self._sealed) is not None:
            try:
                sealed.need(start, end)
            except NotAuthentic as error:
                raise self.damaged(str(error)) from None

    def _specified(self, name: str, spec: Any) -> tuple[str, tuple[int, ...], int]:
        """(dtype, shape, offset) of an array, validated: the array lies within the file."""
        try:
            dtype, shape, offset = spec["dtype"], tuple(spec["shape"]), spec["offset"]
            are_counts = all(type(number) is int and number >= 0 for number in (*shape, offset))
            if are_counts and 1 <= len(shape) <= 3 and _DTYPE.fullmatch(dtype) and offset % _ALIGN_BYTES == 0:
                if offset + np.dtype(dtype).itemsize * prod(shape) <= self._end - self._start:
                    return dtype, shape, offset
        except MALFORMED:
            pass
        raise self.damaged(f"the type, shape or position of its array {name!r:.40}")

    def expect(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Raises GalleryDamaged if an array is absent, or has another type or shape."""
        if isinstance(self._arrays, _Closed):
            raise EngineClosed(_CLOSED)
        array = self._arrays.get(name)
        if array is None or array.dtype.str != dtype or array.shape != shape:
            raise self.damaged(f"its array {name}, wanted {dtype} {shape}")

    def check_size(self) -> None:
        """Raises GalleryDamaged if the file was truncated since it was opened."""
        sealed = self._sealed
        if self._content.size() < self.byte_count if sealed is None else not sealed.check_size():
            raise self.damaged("it was truncated while it was open")

    def _check_inside(self, name: str, indices: NDArray[Any]) -> None:
        self.check_size()
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self._arrays[name]):
            raise self.damaged(
                f"its array {name} has {len(self._arrays[name])} elements, and another file refers to one beyond them"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    @property
    def names(self) -> list[str]:
        """The names of the arrays."""
        return list(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._arrays[name].shape

    def size_of(self, name: str) -> int:
        """The size of an array, in bytes."""
        return self._arrays[name].nbytes

    def read(self, name: str, low: int = 0, high: int | None = None) -> NDArray[Any]:
        """The verified elements [low, high) along the first axis: a view of the map, or a copy if `release` may free the memory."""
        if self._copied and (sealed := self._sealed) is not None:
            with sealed.guard:
                return self._read(name, low, high).copy()
        return self._read(name, low, high)

    def _read(self, name: str, low: int, high: int | None) -> NDArray[Any]:
        self.check_size()
        array = self._arrays[name]
        part = array[low:high]
        if len(part):
            start = self._offsets[name] + low * array.strides[0]
            first, last = start // self._block_bytes, (start + part.nbytes - 1) // self._block_bytes
            if self._singly or not self._checked[first : last + 1].all():
                self._check(np.arange(first, last + 1))
            elif self._sealed is None and part.nbytes >= _READ_OVER_BYTES and self._advise_again(first, last):
                at = (self._start + start) // _PAGE * _PAGE
                _advise(
                    self._address,
                    np.array([at]),
                    np.array([self._start + start + part.nbytes - at]),
                    mmap.MADV_WILLNEED,
                )
        return part

    def _advise_again(self, first: int, last: int) -> bool:
        """Whether to advise the system to read these blocks at once, instead of page by page. At most once a minute for the same blocks:
        the system then looks at every page, even if it is in memory, which takes some 25 ms for a scan of ten million rows."""
        now = time.monotonic()
        due = bool(self._advised[first : last + 1].min() <= now - _ADVISED_SECONDS)
        if due:
            self._advised[first : last + 1] = now
        return due

    def take(self, name: str, indices: NDArray[Any]) -> NDArray[Any]:
        """A verified copy of some elements along the first axis. With ascending indices the disk is read in order."""
        if self._copied and (sealed := self._sealed) is not None:
            with sealed.guard:
                return self._take(name, indices)
        return self._take(name, indices)

    def _take(self, name: str, indices: NDArray[Any]) -> NDArray[Any]:
        array = self._arrays[name]
        self._check_inside(name, indices)
        if len(indices):
            starts = self._offsets[name] + np.asarray(indices, np.int64) * array.strides[0]
            self._check_at(starts, starts + array.strides[0])
        taken: NDArray[Any] = array[indices]
        return taken

    def check_rows(self, name: str, indices: NDArray[np.int64]) -> None:
        """Verifies some elements along the first axis, before `unchecked` reads them. The disk gets one request for all of them."""
        self._check_inside(name, indices)
        if len(indices):
            array = self._arrays[name]
            starts = self._offsets[name] + indices * array.strides[0]
            self._check_at(starts, starts + array.strides[0])

    def _check_at(self, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        first, last = starts // self._block_bytes, (ends - 1) // self._block_bytes
        if self._singly or not (self._checked[first].all() and self._checked[last].all()):
            self._check(np.unique(np.concatenate([first, last[last != first]])))

    def check_spans(self, name: str, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        """Verifies the spans [start, end) of a one-dimensional array of bytes, before `unchecked` reads them."""
        self.check_size()
        if not ((starts >= 0) & (starts <= ends) & (ends <= len(self._arrays[name]))).all():
            raise self.damaged(f"positions outside of its array {name}")
        some = ends > starts
        first = (self._offsets[name] + starts[some]) // self._block_bytes
        last = (self._offsets[name] + ends[some] - 1) // self._block_bytes
        if not self._singly and (last - first < 2).all() and self._checked[first].all() and self._checked[last].all():
            return
        blocks = [first, last]
        while (first := first + 1)[inner := first < last].size:  # strings longer than a block
            first, last = first[inner], last[inner]
            blocks.append(first)
        self._check(np.unique(np.concatenate(blocks)))

    def unchecked(self, name: str) -> NDArray[Any]:
        """A whole array as it is mapped, not verified. The caller verifies the elements that it reads, with `check_rows` or
        `check_spans`."""
        return self._arrays[name]

    def release(self, *, forget: bool) -> None:
        """Releases the memory of the rows that were read. forget: also drop them from the system's cache. Decrypted content is released
        only with `forget`, because it is in no cache but this memory."""
        with suppress(ValueError):  # the file was closed meanwhile
            if (sealed := self._sealed) is None:
                self._content.madvise(mmap.MADV_DONTNEED)
            elif self._copied and forget:
                with sealed.guard:
                    sealed.release()
                    self._checked[:] = False
        if forget:
            self._forget()

    def close(self) -> None:
        """Closes the file at once. Arrays that were read stay valid, and keep the map until they are deleted. A later read raises
        EngineClosed. Closing again does nothing."""
        self._arrays = _Closed()
        self._octets = np.zeros(0, np.uint8)
        content, self._content = self._content, _closed_map()
        with suppress(BufferError):  # an array still uses the map, which is closed with it
            content.close()

    def content(self, piece_bytes: int) -> Iterator[bytes]:
        """The whole file in pieces, not verified."""
        for start in range(0, self.byte_count, piece_bytes):
            self.check_size()
            if (sealed := self._sealed) is None:
                yield self._content[start : start + piece_bytes]
                continue
            with sealed.guard:
                self._decrypt(start, min(start + piece_bytes, self.byte_count))
                piece = self._content[start : start + piece_bytes]
            yield piece

    def problems(self) -> list[str]:
        """Verifies every block. Returns an empty list, or one line that names the damaged blocks."""
        try:
            self.check_size()
        except GalleryDamaged as error:
            return [str(error)]
        wrong = list(self._damaged_of(np.arange(len(self._checksums))))
        if not wrong:
            return []
        inside = dict.fromkeys(name for block in wrong for name in self._arrays_in(block))
        shown = ", ".join(map(str, wrong[:10])) + (", ..." if len(wrong) > 10 else "")
        return [f"{len(wrong)} of {len(self._checksums)} blocks are damaged: {shown}, in {', '.join(inside)}"]

    def _check(self, blocks: NDArray[np.int64]) -> None:
        todo = blocks[~self._checked[blocks]]
        wanted = blocks if self._singly else todo
        if len(wanted) > 1:  # so that the disk reads all of them at the same time
            gap = _READ_OVER_BYTES // self._block_bytes if self._singly else 0
            breaks = np.flatnonzero(np.diff(wanted) > 1 + gap)
            starts = self._start + wanted[np.concatenate([[0], breaks + 1])] * self._block_bytes
            ends = self._start + (wanted[np.concatenate([breaks, [-1]])] + 1) * self._block_bytes
            starts = starts // _PAGE * _PAGE
            ends = np.minimum(ends, self.byte_count)
            if self._sealed is None:
                _advise(self._address, starts, ends - starts, mmap.MADV_WILLNEED)
        if self._sealed is None:
            _touch(self._octets, self._start + todo * self._block_bytes, self._block_bytes)
        if (block := next(self._damaged_of(todo), None)) is not None:
            raise self.damaged(f"block {block}, in {', '.join(self._arrays_in(block))}")
        self._checked[todo] = True

    def _arrays_in(self, block: int) -> list[str]:
        start, end = block * self._block_bytes, (block + 1) * self._block_bytes
        ends = {name: self._offsets[name] + array.nbytes for name, array in self._arrays.items()}
        return [name for name, offset in self._offsets.items() if offset < end and ends[name] > start]

    def _damaged_of(self, blocks: NDArray[np.int64]) -> Iterator[int]:
        """The damaged ones of some blocks. The loop only computes checksums, because it holds the GIL."""
        try:
            content, digest = memoryview(self._content)[: self._end], xxhash.xxh3_64_intdigest
        except ValueError:
            raise EngineClosed(_CLOSED) from None
        starts = self._start + blocks * self._block_bytes
        ends = starts + self._block_bytes
        expected = self._checksums[blocks]
        for block, start, end, checksum in zip(
            *(some.tolist() for some in (blocks, starts, ends, expected)), strict=True
        ):
            if not self._is_authentic(start, min(end, self._end)) or digest(content[start:end]) != checksum:
                yield block

    def _is_authentic(self, start: int, end: int) -> bool:
        """Decrypts the bytes [start, end) of an encrypted file. False if they were changed. True for an unencrypted file."""
        try:
            if (sealed := self._sealed) is not None:
                sealed.need(start, end)
        except NotAuthentic:
            return False
        return True

    def damaged(self, what: str) -> GalleryDamaged:
        """An error that names this file."""
        return GalleryDamaged(f"segment file {self.name} is damaged: {what}; run `biodedup doctor`")


def open_column_file(storage: Storage, path: Path) -> ColumnFile:
    """Opens a column file. Raises GalleryDamaged if it is absent or damaged, OSError for a failed disk operation."""
    try:
        content = storage.map(path)
    except FileNotFoundError:
        raise GalleryDamaged(f"segment file {path.name} is missing; run `biodedup doctor`") from None
    except NotAuthentic as error:
        raise GalleryDamaged(f"segment file {path.name} is damaged: {error}; run `biodedup doctor`") from None
    except KeyMismatch:
        raise
    except ValueError:  # an empty file, a pipe or a folder cannot be mapped
        raise GalleryDamaged(
            f"segment file {path.name} is damaged: it is empty, or not a regular file; run `biodedup doctor`"
        ) from None
    try:
        return ColumnFile(content, path.name, partial(storage.forget, path), partial(storage.transform, path))
    except MALFORMED as error:
        if isinstance(error, BiodedupError):
            raise
        raise GalleryDamaged(
            f"segment file {path.name} is damaged: {type(error).__name__}; run `biodedup doctor`"
        ) from error
