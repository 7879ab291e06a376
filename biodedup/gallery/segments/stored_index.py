"""The FAISS index of one column of a segment, in its own file.

Owns the format of this file. Never trains and never searches (`files/index_codec.py`).

FAISS cannot search its fast index types in a memory-mapped file. So an index is read into memory at the first search, and stays there while
its segment is open.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biodedup.gallery.files import index_codec
from biodedup.gallery.files.column_file import ColumnFile, Stream, write_column_file
from biodedup.gallery.files.filesystem import Storage

_PIECE_BYTES = 1 << 22


class StoredIndex:
    """The index file of an open segment. cells, dimension: of the column. Thread-safe."""

    def __init__(self, file: ColumnFile, codec_id: str, cells: int, dimension: int | None) -> None:
        if file.about.get("codec") != codec_id or file.about.get("cells") != cells:
            raise file.damaged("it is the index of another column or codec")
        self.codec_id = codec_id
        self._shape = (cells, dimension)
        self._file = file
        self._lock = threading.Lock()
        self._index: Any = None

    def loaded(self) -> Any:
        """The index, shared by all threads. It must not be changed. Raises GalleryDamaged."""
        with self._lock:
            if self._index is None:
                self._index = self.read()
            return self._index

    def read(self) -> Any:
        """A copy of the index, which the caller owns. Raises GalleryDamaged."""
        try:
            index = index_codec.read_index(self._read, self._file.shape("index")[0])
        except RuntimeError:
            raise self._file.damaged("FAISS cannot read its index") from None
        if (index.ntotal, index.d) != self._shape or not index.is_trained:
            raise self._file.damaged(f"its index has (rows, dimension) {(index.ntotal, index.d)}, wanted {self._shape}")
        self._file.release(forget=True)
        return index

    def _read(self, low: int, high: int) -> NDArray[np.uint8]:
        octets: NDArray[np.uint8] = self._file.read("index", low, high)
        return octets

    def close(self) -> None:
        """Releases the memory."""
        with self._lock:
            self._index = None

    @property
    def byte_count(self) -> int:
        return int(self._file.byte_count)


def write_index(
    storage: Storage,
    path: Path,
    about: dict[str, Any],
    index: Any,
    go_on: Callable[[], bool] = lambda: True,
    *,
    replaces: bool = False,
) -> str:
    """Writes an index file and syncs it. Returns the digest. about: gallery, segment, kind, codec, cells; go_on: raises to stop."""
    serialized = index_codec.to_bytes(index)

    def pieces() -> Iterator[NDArray[np.uint8]]:
        for low in range(0, len(serialized), _PIECE_BYTES):
            go_on()
            yield serialized[low : low + _PIECE_BYTES]

    stream = Stream("index", "|u1", (len(serialized),), pieces())
    return write_column_file(storage, path, about, [stream], replaces=replaces)
