"""Reads and writes the bytes of finger minutiae records: ISO/IEC 19794-2:2005 and :2011, ANSI/INCITS 378-2004.

Owns the byte layouts. Never checks whether minutiae are plausible (`record.py` does).

All numbers are big-endian. A minutia is its type (2 bits), x (14), y (14), angle, and quality. The version of 2011 may leave out the quality.

| | record | view |
|---|---|---|
| 2005 | version " 20", length (4), device, size, resolution, views (1) | position, number and impression, quality, count |
| 378-2004 | as 2005, but length (2, or 6 with the first 2 zero), then owner and type of the product (4) | as 2005; angles in 2 degrees |
| 2011 | version "030", length (4), views (2), certified (1) | length, date, device, quality blocks, certificates if certified, position, number, resolution, impression, size, bytes per minutia, count |

After its minutiae a view has the length (2) of its extended data (ridge counts, cores and deltas), which are skipped. The extended data of
the last view may be shorter or longer than stated. Bytes after the record's stated length are ignored.

ANSI/INCITS 378-2009 has the version number of ISO/IEC 19794-2:2011, but another layout, which is not read. It is recognised by its product
identifier, which is at the position of the number of views.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from biodedup.errors import InvalidInput

MAGIC = b"FMR\0"
VIEWS_MAX = 176
"""The maximum in the standard of 2011: eleven positions with sixteen views each."""
VERSIONS = (2005, 2011)
QUALITY_MAX = 100
"""Larger numbers are codes: 254 not reported, 255 failed."""

_V2005, _V2011 = b" 20\0", (b"030\0", b" 30\0")
_VIEWS_2005 = struct.Struct(">HHHHHBx")  # device, width, height, resolution x, y, views
_VIEW_2005 = struct.Struct(">BBBB")  # position, number and impression, quality, count
_VIEWS_2011 = struct.Struct(">HB")  # views, certified
_VIEW_2011 = struct.Struct(">I9sBHHB")  # length, date, technology, vendor, device, quality blocks
_QUALITY_2011 = struct.Struct(">BHH")  # quality, vendor, algorithm
_IMAGE_2011 = struct.Struct(">BBHHBHHBB")  # position, number, resolution x, y, impression, width, height, sizes, count
_CERTIFICATE_BYTES = 3
_BYTE, _SHORT, _LONG = struct.Struct(">B"), struct.Struct(">H"), struct.Struct(">I")
_NO_DATE, _NO_EXTENSION = b"\xff" * 9, b"\0\0"


class RawView(NamedTuple):
    """A view as a record states it. quality: None if not stated. resolution: pixels per cm, (x, y). minutiae: uint8 (n, 6), with angles in
    360/256 degrees, anticlockwise, and quality 0 if not stated."""

    position_code: int
    number: int
    quality: int | None
    size: tuple[int, int]
    resolution: tuple[int, int]
    minutiae: NDArray[np.uint8]


class _Cursor:
    """Reads on from a place, never past the end."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.at = 0
        self.end = len(content)

    def bytes(self, count: int) -> bytes:
        if self.at + count > self.end:
            raise InvalidInput(
                f"a minutiae record has {self.end} bytes, wanted {self.at + count} or more; send it whole"
            )
        self.at += count
        return self._content[self.at - count : self.at]

    def fields(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.bytes(layout.size))

    def number(self, layout: struct.Struct) -> int:
        return self.fields(layout)[0]


def is_record(content: bytes) -> bool:
    """Whether the content begins as a minutiae record of one of these standards."""
    return content[: len(MAGIC)] == MAGIC


def raw_views(content: bytes) -> Iterator[RawView]:
    """The views, in their order. Raises InvalidInput if the stated lengths and counts do not fit the bytes."""
    cursor = _Cursor(content)
    magic, version = cursor.bytes(4), cursor.bytes(4)
    if magic != MAGIC or version not in (_V2005, *_V2011):
        raise InvalidInput(
            "this is no minutiae record of ISO/IEC 19794-2:2005 or 2011 or ANSI/INCITS 378-2004 (the compact formats of cards "
            "are not read); convert it, or extract it again"
        )
    is_ansi = version == _V2005 and _is_ansi(content)
    length = cursor.number(_SHORT if is_ansi else _LONG) or cursor.number(_LONG)
    if not cursor.at <= length <= len(content):
        raise InvalidInput(f"a minutiae record states {length} bytes and has {len(content)}; send it whole")
    cursor.end = length
    if is_ansi:
        cursor.bytes(4)
    if version != _V2005 and _is_ansi_2009(content, length):
        raise InvalidInput(
            "this is a minutiae record of ANSI/INCITS 378-2009, which is not read (2004 is); convert it to ISO/IEC 19794-2, "
            "or send the image"
        )
    yield from _views_2005(cursor, is_ansi) if version == _V2005 else _views_2011(cursor)


def packed(version: int, views: Sequence[RawView]) -> bytes:
    """A record of one or more views. A record of 2005 has a single image size: the largest. Raises InvalidInput for a version other than
    2005 and 2011."""
    if version not in VERSIONS:
        raise InvalidInput(f"version is {version}; write one of {', '.join(map(str, VERSIONS))}")
    _checked_count(len(views))
    if version == 2005:
        width, height = (max(sides) for sides in zip(*(view.size for view in views), strict=True))
        body = _VIEWS_2005.pack(0, width, height, *views[0].resolution, len(views))
        for view in views:
            body += _VIEW_2005.pack(view.position_code, view.number << 4, view.quality or 0, len(view.minutiae))
            body += view.minutiae.tobytes() + _NO_EXTENSION
        return MAGIC + _V2005 + _LONG.pack(12 + len(body)) + body
    body = _VIEWS_2011.pack(len(views), 0)
    for view in views:
        blocks = b"" if view.quality is None else _QUALITY_2011.pack(view.quality, 0, 0)
        image = _IMAGE_2011.pack(
            view.position_code, view.number, *view.resolution, 0, *view.size, 6 << 4, len(view.minutiae)
        )
        rest = blocks + image + view.minutiae.tobytes() + _NO_EXTENSION
        body += _VIEW_2011.pack(_VIEW_2011.size + len(rest), _NO_DATE, 0, 0, 0, view.quality is not None) + rest
    return MAGIC + _V2011[0] + _LONG.pack(12 + len(body)) + body


def _is_ansi(content: bytes) -> bool:
    """Whether a record is of ANSI, which stores the length in two bytes instead of four. Read as the other standard's length, these bytes give
    a length that no record has."""
    high, low = _Cursor(content[8:]).fields(struct.Struct(">HH"))
    return high >= 26 or (high == 0 and low < 24)


def _is_ansi_2009(content: bytes, length: int) -> bool:
    """Whether these bytes cannot be the number of views, the certificate flag and the first view's length of ISO/IEC 19794-2:2011."""
    views, certified, first = _Cursor(content[12:]).fields(struct.Struct(">HBI"))
    fits = first == length - 15 if views == 1 else first <= length - 15
    return not (1 <= views <= VIEWS_MAX and certified <= 1 and fits and first >= _VIEW_2011.size)


def _views_2005(cursor: _Cursor, is_ansi: bool) -> Iterator[RawView]:
    _, width, height, x, y, views = cursor.fields(_VIEWS_2005)
    for view in range(_checked_count(views)):
        position, number, quality, count = cursor.fields(_VIEW_2005)
        minutiae = _minutiae(cursor, count, 6)
        if is_ansi:
            if (minutiae[:, 4] >= 180).any():
                raise InvalidInput("a record of ANSI/INCITS 378 has angles of 360 degrees or more; extract it again")
            minutiae[:, 4] = np.round(minutiae[:, 4] * (512 / 360)).astype(int) & 255
        if view < views - 1:
            cursor.bytes(cursor.number(_SHORT))
        yield RawView(position, number >> 4, _quality(quality), (width, height), (x, y), minutiae)


def _views_2011(cursor: _Cursor) -> Iterator[RawView]:
    views, certified = cursor.fields(_VIEWS_2011)
    for _ in range(_checked_count(views)):
        start = cursor.at
        length, _, _, _, _, blocks = cursor.fields(_VIEW_2011)
        qualities = [cursor.fields(_QUALITY_2011)[0] for _ in range(blocks)]
        if certified:
            cursor.bytes(cursor.number(_BYTE) * _CERTIFICATE_BYTES)
        position, number, x, y, _, width, height, sizes, count = cursor.fields(_IMAGE_2011)
        if sizes >> 4 not in (5, 6):
            raise InvalidInput(
                f"a minutiae record states {sizes >> 4} bytes per minutia, wanted 5 or 6; extract it again"
            )
        minutiae = _minutiae(cursor, count, sizes >> 4)
        if not cursor.at - start <= length <= cursor.end - start:
            raise InvalidInput(
                f"a view of a minutiae record states {length} bytes, takes {cursor.at - start} without its extended data, and "
                f"{cursor.end - start} are left; send it whole"
            )
        cursor.at = start + length
        stated = [quality for quality in map(_quality, qualities) if quality is not None]
        yield RawView(position, number, stated[0] if stated else None, (width, height), (x, y), minutiae)


def _checked_count(views: int) -> int:
    if not 1 <= views <= VIEWS_MAX:
        raise InvalidInput(f"a minutiae record has {views} views, wanted 1 to {VIEWS_MAX}; send one subject's record")
    return views


def _minutiae(cursor: _Cursor, count: int, size: int) -> NDArray[np.uint8]:
    given = np.frombuffer(cursor.bytes(count * size), np.uint8).reshape(count, size)
    minutiae = np.zeros((count, 6), np.uint8)
    minutiae[:, :size] = given
    minutiae[minutiae[:, 5] > QUALITY_MAX, 5] = 0
    return minutiae


def _quality(stated: int) -> int | None:
    return stated if stated <= QUALITY_MAX else None
