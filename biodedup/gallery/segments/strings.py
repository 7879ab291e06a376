"""Strings in a column file, and the look-up that finds a string by its hash.

Owns the validation of both. Never writes.
"""

from __future__ import annotations

from functools import cached_property
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from biodedup.gallery.files import packed
from biodedup.gallery.files.column_file import ColumnFile
from biodedup.gallery.files.packed import Packed
from biodedup.gallery.segments.part import Int64


class StoredStrings:
    """Byte strings in two arrays of a file, offsets and bytes. text: the strings must be UTF-8."""

    def __init__(self, file: ColumnFile, name: str, count: int, *, text: bool = False) -> None:
        self._file = file
        self._offset, self._bytes = f"{name}.offset", f"{name}.bytes"
        self._text = text
        file.expect(self._offset, "<i8", (count + 1,))
        self._size = file.shape(self._bytes)[0] if self._bytes in file else 0
        file.expect(self._bytes, "|u1", (self._size,))

    def slice(self, low: int, high: int) -> Packed:
        offsets = self._file.read(self._offset, low, high + 1)
        if not (len(offsets) and 0 <= offsets[0] and offsets[-1] <= self._size and (np.diff(offsets) >= 0).all()):
            raise self._file.damaged(f"positions outside of its array {self._bytes}")
        strings = packed.from_arrays(offsets, self._file.read(self._bytes, int(offsets[0]), int(offsets[-1])))
        if self._text and not packed.is_text(strings):
            raise self._file.damaged(f"its array {self._bytes} is not UTF-8")
        return strings

    def take(self, indices: Int64) -> Packed:
        ends = self._file.take(self._offset, np.concatenate([indices, indices + 1])).reshape(2, -1)
        self._file.check_spans(self._bytes, ends[0], ends[1])
        return self._whole.take(indices)

    def texts(self, indices: Int64) -> list[str]:
        if len(indices) > 64:
            some = self.take(indices)
            if not packed.is_text(some):
                raise self._file.damaged(f"its array {self._bytes} is not UTF-8")
            return packed.text(some)
        # faster than Arrow for a few strings
        starts, ends = self._file.take(self._offset, np.concatenate([indices, indices + 1])).reshape(2, -1)
        self._file.check_spans(self._bytes, starts, ends)
        content = self._file.unchecked(self._bytes)
        try:
            return [
                content[start:end].tobytes().decode() for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
            ]
        except UnicodeDecodeError:
            raise self._file.damaged(f"its array {self._bytes} is not UTF-8") from None

    @cached_property
    def _whole(self) -> Packed:
        offsets = self._file.unchecked(self._offset)
        if not 0 <= offsets[0] <= offsets[-1] <= self._size:
            raise self._file.damaged(f"positions outside of its array {self._bytes}")
        return packed.from_whole(offsets, self._file.unchecked(self._bytes))


def find_string(file: ColumnFile, strings: StoredStrings, wanted: str, target: np.uint64) -> list[int]:
    """The indices of a string. target: its hash. Method: interpolation search. Hashes are uniformly distributed, so the position of a hash
    differs from its expected position by a few square roots of their number."""
    count = file.shape("hash")[0]
    guess, reach = int(target) * count >> 64, 8 * isqrt(count) + 64
    low, high = max(guess - reach, 0), min(guess + reach, count)
    near = file.read("hash", low, high)
    first = int(near.searchsorted(target))
    if (first == 0 and low > 0) or (first == len(near) and high < count):
        low, near = 0, file.read("hash")
        first = int(near.searchsorted(target))
    if first == len(near) or near[first] != target:
        return []
    last = int(near.searchsorted(target, "right"))
    if last == len(near) and low + last < count:  # equal hashes at the window's end
        last = int(file.read("hash").searchsorted(target, "right")) - low
    indices = file.read("position", low + first, low + last).astype(np.int64)
    names = strings.texts(indices)
    return [i for i, name in zip(indices.tolist(), names, strict=True) if name == wanted]


def check_lookup(file: ColumnFile, count: int) -> None:
    """Raises GalleryDamaged if a look-up does not have two arrays of `count` elements."""
    file.expect("hash", "<u8", (count,))
    file.expect("position", "<u4", (count,))


def read_lookup(file: ColumnFile, count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """(hashes, positions) of a whole look-up, validated: it names each position once. Raises GalleryDamaged."""
    hashes, positions = file.read("hash"), file.read("position")
    if len(positions) and int(positions.max()) >= count:
        raise file.damaged("it refers to rows outside of its segment")
    named = np.zeros(count, bool)
    named[positions] = True
    if not named.all():
        raise file.damaged("it names a row twice")
    return hashes, positions
