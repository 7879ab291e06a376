"""Reads the pixel layout of a TIFF, and decodes the layouts that Pillow decodes wrongly.

Owns the rules for photometric interpretation, bit depth, sample format and planes (TIFF revision 6.0, Adobe 1992). Never raises for the
content of the bytes. Only the first directory is read.

1. `Layout.unread` names a layout that neither this module nor Pillow decodes without loss.
2. `headers.py` has checked the file's sizes before.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, CIELAB = 0, 1, 2, 3, 5, 6, 8
_SAMPLES = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3, CIELAB: 3}
_NAMES = {4: "a transparency mask", 9: "ICC Lab colours", 10: "ITU Lab colours", 32803: "a colour filter array"}
_FORMATS = {2: "signed numbers", 3: "floating-point numbers", 5: "complex numbers", 6: "complex numbers"}
_DEPTHS = (1, 2, 4, 8, 12, 16)
_CODES = {1: "B", 3: "H", 4: "I", 5: "II", 13: "I", 16: "Q"}
_NUMBERS_MAX = 100_000
_PAGES_MAX = 100
_NO_PAGE, _SMALLER = 1 | 4, 2
"""Bits of tag 254 (a smaller copy, a mask), and the value of its predecessor, tag 255, for a smaller copy."""
_ROWS = 64
"""Rows that are unpacked at a time. A number of 12 bits takes 12 bytes while it is unpacked."""


@dataclass(frozen=True)
class Layout:
    """The tags that describe the pixels. starts, sizes: positions and sizes of strips or tiles, in bytes. block: (height, width) of a strip or
    tile. photometric_at: the position of the photometric interpretation in the file."""

    order: str
    size: tuple[int, int]
    bits: tuple[int, ...]
    photometric: int
    photometric_at: int | None
    samples: int
    planes: bool
    formats: tuple[int, ...]
    compression: int
    subsampling: tuple[int, ...]
    orientation: int
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    block: tuple[int, int]
    dpi: tuple[float, float] | None
    alpha: int = 0
    """The meaning of the number after the colours: 1 and 2 for transparency, multiplied into the colours or not; 0 for anything else."""
    pages: int = 1
    """Number of pictures in the file, smaller copies and masks left out."""

    @property
    def unread(self) -> str | None:
        """The name of a layout that cannot be decoded without loss, or None."""
        colours = _SAMPLES.get(self.photometric)
        if colours is None:
            return _NAMES.get(self.photometric, f"photometric interpretation {self.photometric}")
        odd = [number for number in self.formats if number not in (1, 4)]
        if odd:
            return f"{max(self.bits)}-bit {_FORMATS.get(odd[0], 'numbers of an unknown kind')}"
        if len(set(self.bits)) > 1 or self.bits[0] not in _DEPTHS:
            return f"{', '.join(map(str, sorted(set(self.bits))))} bits a number"
        if self.samples < colours:
            return f"{self.samples} numbers a pixel where {colours} make a colour"
        if self.planes and self.photometric in (YCBCR, CIELAB, CMYK):
            return "colours other than RGB in planes"
        if self.photometric == YCBCR and self.compression == 1 and self.subsampling != (1, 1):
            return "subsampled colours without compression"
        if self.bits[0] == 12 and self.compression != 1 and (self.samples > 1 or self.order == ">"):
            return "compressed numbers of 12 bits"
        return None

    @property
    def is_decoded_here(self) -> bool:
        """Whether `levels` decodes it: uncompressed numbers of more than 8 bits, which Pillow misinterprets."""
        deep = self.bits[0] > 8 and self.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB)
        return deep and self.compression == 1

    @property
    def inverted(self) -> bool:
        """Whether large numbers mean dark pixels in the result of Pillow for the file that `for_pillow` returns."""
        return self.bits[0] > 8 and self.photometric == WHITE_IS_ZERO

    def for_pillow(self, content: bytes) -> bytes:
        """The file for Pillow: with the photometric interpretation changed to black-is-zero if Pillow would not open or not invert it."""
        if not self.inverted or self.photometric_at is None:
            return content
        value = struct.pack(self.order + "H", BLACK_IS_ZERO)
        return content[: self.photometric_at] + value + content[self.photometric_at + 2 :]

    def levels(self, content: bytes) -> NDArray[np.uint8] | None:
        """The pixels, uint8 (h, w) or (h, w, 3), of a layout with `is_decoded_here`; None for a truncated file."""
        height, width = self.size
        bits, colours = self.bits[0], _SAMPLES[self.photometric]
        if min(*self.size, *self.block) < 1 or len(self.starts) != len(self.sizes):
            return None
        alpha = self.alpha in (1, 2) and self.samples > colours
        channels = colours + alpha
        out = np.zeros((height, width, channels), np.uint8)
        down, across = -(-height // self.block[0]), -(-width // self.block[1])
        if len(self.starts) < down * across * (self.samples if self.planes else 1):
            return None
        held = 1 if self.planes else self.samples
        for index, start in enumerate(self.starts[: down * across * (channels if self.planes else 1)]):
            plane, place = divmod(index, down * across)
            top, left = (place // across) * self.block[0], (place % across) * self.block[1]
            rows = min(self.block[0], height - top)
            stride = -(-self.block[1] * held * bits // 8)
            data = content[start : start + rows * stride]
            if len(data) < rows * stride:
                return None
            columns = min(self.block[1], width - left)
            for first, numbers in _unpacked(data, rows, self.block[1] * held, bits, self.order):
                block = numbers.reshape(len(numbers), self.block[1], held)[:, :columns]
                part = out[top + first : top + first + len(numbers), left : left + columns]
                if self.planes:
                    part[..., plane] = block[..., 0]
                else:
                    part[...] = block[..., :channels]
        if self.photometric == WHITE_IS_ZERO:
            out[..., :colours] = 255 - out[..., :colours]
        out = _on_white(out, multiplied=self.alpha == 1) if alpha else out
        return out[..., 0] if colours == 1 else out


def _on_white(levels: NDArray[np.uint8], *, multiplied: bool) -> NDArray[np.uint8]:
    """The colours of a picture on white. levels: uint8 (h, w, colours + 1), transparency last. multiplied: whether colours are multiplied by it."""
    clear = 255 - levels[..., -1:].astype(np.uint16)
    colours = levels[..., :-1].astype(np.uint16)
    colours = colours if multiplied else (colours * (255 - clear) + 127) // 255
    return np.asarray(np.minimum(colours + clear, 255).astype(np.uint8), np.uint8)


def read_layout(content: bytes) -> Layout | None:
    """The layout of the first picture, or None if its directory cannot be read."""
    try:
        first = _first_directory(content)
        tags, following = _tags(content, first)
        return replace(_layout(content, tags), pages=1 + _further_pages(content, first, following))
    except (struct.error, IndexError, ValueError, OverflowError, ZeroDivisionError):
        return None


def _unpacked(data: bytes, rows: int, columns: int, bits: int, order: str) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(first row, the highest 8 bits of the numbers, uint8 (n, columns)), some rows at a time. Each row begins at a new byte."""
    if bits == 16:
        yield 0, (np.frombuffer(data, order + "u2").reshape(rows, columns) >> 8).astype(np.uint8)
        return
    stored = np.frombuffer(data, np.uint8).reshape(rows, -1)
    for first in range(0, rows, _ROWS):
        each = np.unpackbits(stored[first : first + _ROWS], axis=1, count=columns * bits)
        yield first, np.packbits(each.reshape(len(each), columns, bits)[..., :8], axis=2)[..., 0]


def _kind(content: bytes) -> tuple[str, bool]:
    """(byte order, whether positions have 64 bits)."""
    order = "<" if content[:2] == b"II" else ">"
    return order, struct.unpack_from(order + "H", content, 2)[0] == 43


def _first_directory(content: bytes) -> int:
    order, big = _kind(content)
    return int(struct.unpack_from(order + ("Q" if big else "I"), content, 8 if big else 4)[0])


def _further_pages(content: bytes, first: int, at: int) -> int:
    """The number of pictures from the directory at `at`, smaller copies and masks left out; at most `_PAGES_MAX`. first: the position of the
    first directory."""
    pages, seen = 0, {0, first}
    while at not in seen and len(seen) <= _PAGES_MAX:
        seen.add(at)
        try:
            tags, at = _tags(content, at)
        except (struct.error, OverflowError):
            break  # the first picture is sound
        pages += not (_one(tags, 254, 0) & _NO_PAGE or _one(tags, 255, 1) == _SMALLER) and 256 in tags
    return pages


def _one(tags: Mapping[int, tuple[int, tuple[int, ...]]], tag: int, default: int) -> int:
    numbers = tags[tag][1] if tag in tags else ()
    return numbers[0] if numbers else default


def _tags(content: bytes, at: int) -> tuple[dict[int, tuple[int, tuple[int, ...]]], int]:
    """(tag -> (position of its numbers, its numbers), the position of the next directory or 0)."""
    order, big = _kind(content)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), content, at)
    at += 8 if big else 2
    entry, room = struct.Struct(order + ("HHQ" if big else "HHI")), 8 if big else 4
    tags = {}
    for _ in range(min(count, 1000)):
        tag, kind, length = entry.unpack_from(content, at)
        where, code = at + entry.size, _CODES.get(kind)
        at = where + room
        if code is None or length > _NUMBERS_MAX or tag in tags:
            continue
        numbers = struct.Struct(order + code * length)
        if numbers.size > room:
            where = struct.unpack_from(order + ("Q" if big else "I"), content, where)[0]
        tags[tag] = where, numbers.unpack_from(content, where)
    following = struct.unpack_from(order + ("Q" if big else "I"), content, at)[0] if count <= 1000 else 0
    return tags, int(following)


def _layout(content: bytes, tags: dict[int, tuple[int, tuple[int, ...]]]) -> Layout:
    def all_of(tag: int, default: tuple[int, ...]) -> tuple[int, ...]:
        return (tags[tag][1] if tag in tags else ()) or default

    def first(tag: int, default: int) -> int:
        return all_of(tag, (default,))[0]

    width, height, samples = first(256, 0), first(257, 0), first(277, 1)
    tiled = 324 in tags
    photometric = first(262, WHITE_IS_ZERO)
    return Layout(
        order="<" if content[:2] == b"II" else ">",
        size=(height, width),
        bits=all_of(258, (1,)),
        photometric=YCBCR if first(259, 1) == 6 else photometric,
        photometric_at=tags[262][0] if 262 in tags else None,
        samples=samples,
        planes=first(284, 1) == 2 and samples > 1,
        formats=all_of(339, (1,)),
        compression=first(259, 1),
        subsampling=all_of(530, (2, 2)),
        orientation=first(274, 1),
        starts=all_of(324 if tiled else 273, ()),
        sizes=all_of(325 if tiled else 279, ()),
        block=(first(323, 0), first(322, 0)) if tiled else (min(first(278, height), height), width),
        alpha=first(338, 0),
        dpi=_dpi(all_of(282, ()), all_of(283, ()), first(296, 2)),
    )


def _dpi(x: tuple[int, ...], y: tuple[int, ...], unit: int) -> tuple[float, float] | None:
    if len(x) < 2 or len(y) < 2 or unit not in (2, 3) or not (x[1] and y[1]):
        return None
    factor = 2.54 if unit == 3 else 1.0
    return factor * x[0] / x[1], factor * y[0] / y[1]
