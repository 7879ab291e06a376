"""Reads the pictures in records of ISO/IEC 19794-4 (finger images, FIR) and 19794-5 (face images, FAC), of 2005 and 2011, and of
ANSI/INCITS 381-2004.

Owns the byte layouts. Never decodes a picture.

1. The result for any bytes is a list of pictures or InvalidInput, in time proportional to the bytes.
2. Every stated length is checked against the number of bytes. Bytes after the record's stated length are ignored.

All numbers are big-endian. Layouts, in bytes:

| | record | picture |
|---|---|---|
| FIR 2005 | magic, version "010", length (6), device (2), level (2), count (1), unit (1), 4 x rate (2), depth (1), compression (1), 2 reserved | length (4), position, views, number, quality, impression, width (2), height (2), reserved, data |
| 381-2004 | as FIR 2005, with a product identifier (4) after the length | the same |
| FIR 2011 | magic, "020", length (4), count (2), certified, positions | length (4), 14 of date and device, quality blocks, certificates if certified, position, number, unit, 4 x rate (2), depth, compression, impression, width (2), height (2), data length (4), data, extended data |
| FAC 2005 | magic, "010", length (4), count (2) | length (4), points (2), 14 of the person, points (8 each), 2 types, width (2), height (2), 6 of the camera, data |
| FAC 2011 | magic, "030", length (4), count (2), certified, semantics (2) | length (4), 14 of date and device, quality blocks, points (2), 15 of the person, points (8 each), 2 types, width (2), height (2), 5 of the camera, data length (4), data |
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from biodedup.errors import InvalidInput
from biodedup.values import FINGER_POSITIONS

FIR, FAC = b"FIR\0", b"FAC\0"
PICTURES_MAX = 200
_CM = 2.54
_RAW, _PACKED = 0, 1
_FIR_2005 = struct.Struct(">HHBBHHHHBB2x")  # device, level, count, unit, scan x, y, image x, y, depth, compression
_VIEW_2005 = struct.Struct(">IBBBBBHHx")
_VIEW_2011 = struct.Struct(">I9sBHHB")
_IMAGE_2011 = struct.Struct(">BBBHHHHBBBHHI")
_FACE_2005, _FACE_2011 = struct.Struct(">H14x"), struct.Struct(">H15x")
_CAMERA_2005, _CAMERA_2011 = struct.Struct(">BBHHBBHH"), struct.Struct(">BBHHBHBB")
_SIGNATURES = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ", b"\x89PNG")
SLAPS = {13: "right four fingers", 14: "left four fingers", 15: "both thumbs"}


class Picture(NamedTuple):
    """A picture in a container. column: `face` or a finger's position; "" for several fingers or a palm, which `what` names. data: an encoded
    picture, a minutiae record, or pixels, uint8 (h, w) grey or (h, w, 3) RGB. dpi: the stated values for x and y. quality: the stated value,
    0 to 100."""

    column: str
    data: bytes | NDArray[np.uint8]
    dpi: tuple[float, float] | None = None
    quality: int | None = None
    what: str = ""


class Cursor:
    """Reads bytes from a position, never past the end."""

    def __init__(self, content: bytes, name: str, at: int = 0, end: int | None = None) -> None:
        self.content, self.name, self.at = content, name, at
        self.end = len(content) if end is None else end

    def bytes(self, count: int) -> bytes:
        if self.at + count > self.end:
            raise InvalidInput(f"{self.name} has {self.end} bytes, wanted {self.at + count} or more; send it whole")
        self.at += count
        return self.content[self.at - count : self.at]

    def fields(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.bytes(layout.size))

    def number(self, size: int) -> int:
        return int.from_bytes(self.bytes(size), "big")


def is_image_record(content: bytes) -> bool:
    """Whether the content begins as a record of finger or face images."""
    return content[:4] in (FIR, FAC)


def read_pictures(content: bytes) -> list[Picture]:
    """The pictures of a record, in its order. Raises InvalidInput for an invalid record."""
    finger = content[:4] == FIR
    name = "a finger image record" if finger else "a face image record"
    version = content[4:8].rstrip(b"\0")
    if finger and version == b"010":
        return _finger_2005(content, name)
    if finger and version == b"020":
        return _finger_2011(content, name)
    if not finger and version == b"010":
        return _face(content, name, 2005)
    if not finger and version in (b"030", b"020"):
        return _face(content, name, 2011)
    raise InvalidInput(f"{name} has version {version!r}; wanted ISO/IEC 19794 of 2005 or 2011; take out its pictures")


def raw_pixels(data: bytes, size: tuple[int, int], planes: int, name: str) -> NDArray[np.uint8]:
    """Uncompressed pixels as uint8 (h, w) or (h, w, planes). size: (width, height)."""
    width, height = size
    if not (width and height) or len(data) < width * height * planes:
        raise InvalidInput(f"{name} states {width} x {height} pixels and has {len(data)} bytes of them; send it whole")
    shape = (height, width) if planes == 1 else (height, width, planes)
    return np.frombuffer(data, np.uint8, width * height * planes).reshape(shape)


def finger_column(code: int) -> tuple[str, str]:
    """(position, "") for the code of a single finger, ("", description) for several fingers or a palm."""
    if code in (11, 12):
        return ("right_thumb", "left_thumb")[code - 11], ""  # plain impressions of thumbs
    if code < len(FINGER_POSITIONS):
        return FINGER_POSITIONS[code - 1], ""  # 0: the last one, unknown
    return "", SLAPS.get(code, f"position {code}, which is no single finger")


def _counted(count: int, name: str) -> int:
    if not 1 <= count <= PICTURES_MAX:
        raise InvalidInput(f"{name} has {count} pictures, wanted 1 to {PICTURES_MAX}; send one person's record")
    return count


def _end(content: bytes, at: int, length: int, name: str) -> int:
    if not at <= length <= len(content):
        raise InvalidInput(f"{name} states {length} bytes and has {len(content)}; send it whole")
    return length


def _finger(code: int, data: bytes, size: tuple[int, int], image: tuple[int, int, int, int, int], name: str) -> Picture:
    """image: unit, rate x, rate y, depth, compression."""
    unit, x, y, depth, compression = image
    column, what = finger_column(code)
    dpi = (x * (_CM if unit == 2 else 1.0), y * (_CM if unit == 2 else 1.0)) if x and y else None
    if compression > _PACKED:
        return Picture(column, data, dpi, what=what)
    if depth != 8:
        raise InvalidInput(f"{name} has pixels of {depth} bits, wanted 8; convert it")
    return Picture(column, raw_pixels(data, size, 1, name), dpi, what=what)


def _finger_2005(content: bytes, name: str) -> list[Picture]:
    """Tries the layout of ISO/IEC 19794-4, and then that of ANSI/INCITS 381-2004, which has four bytes more."""
    problem: InvalidInput | None = None
    for extra in (0, 4):
        try:
            return _fingers_2005(content, name, extra)
        except InvalidInput as error:
            problem = problem or error
    assert problem is not None, "both layouts failed"
    raise problem


def _fingers_2005(content: bytes, name: str, extra: int) -> list[Picture]:
    cursor = Cursor(content, name, 8)
    cursor.end = _end(content, 14, cursor.number(6), name)
    cursor.bytes(extra)
    _, _, fingers, unit, _, _, x, y, depth, compression = cursor.fields(_FIR_2005)
    if unit not in (1, 2):
        raise InvalidInput(f"{name} states resolutions in unit {unit}, wanted 1 (inch) or 2 (cm); convert it")
    pictures: list[Picture] = []
    for _ in range(_counted(fingers, name)):
        seen, views = 0, 1
        while seen < views and cursor.at < cursor.end:
            length, code, views, _, quality, _, width, height = cursor.fields(_VIEW_2005)
            if length < _VIEW_2005.size:
                raise InvalidInput(f"{name} has a picture of {length} bytes, its header included; send it whole")
            data = cursor.bytes(length - _VIEW_2005.size)
            picture = _finger(code, data, (width, height), (unit, x, y, depth, compression), name)
            pictures.append(picture._replace(quality=quality if quality <= 100 else None))
            seen += 1
    if cursor.at != cursor.end:
        raise InvalidInput(f"{name} states {cursor.end} bytes, its pictures take {cursor.at}; send it whole")
    return pictures


def _finger_2011(content: bytes, name: str) -> list[Picture]:
    cursor = Cursor(content, name, 8)
    cursor.end = _end(content, 16, cursor.number(4), name)
    count, certified = _counted(cursor.number(2), name), cursor.number(1)
    cursor.bytes(1)
    pictures = []
    for _ in range(count):
        start = cursor.at
        length, quality = _device_2011(cursor)
        if certified:
            cursor.bytes(3 * cursor.number(1))
        code, _, unit, _, _, x, y, depth, compression, _, width, height, size = cursor.fields(_IMAGE_2011)
        data = cursor.bytes(size)
        pictures.append(
            _finger(code, data, (width, height), (unit, x, y, depth, compression), name)._replace(quality=quality)
        )
        if not cursor.at <= start + length <= cursor.end:
            raise InvalidInput(
                f"a picture of {name} states {length} bytes and takes {cursor.at - start} or more; send it whole"
            )
        cursor.at = start + length  # extended data are skipped
    return pictures


def _device_2011(cursor: Cursor) -> tuple[int, int | None]:
    """(length of the representation, its first stated quality)."""
    length, _, _, _, _, blocks = cursor.fields(_VIEW_2011)
    stated = [cursor.bytes(5)[0] for _ in range(blocks)]
    return length, next((quality for quality in stated if quality <= 100), None)


def _face(content: bytes, name: str, year: int) -> list[Picture]:
    cursor = Cursor(content, name, 8)
    cursor.end = _end(content, 14, cursor.number(4), name)
    count = _counted(cursor.number(2), name)
    if year == 2011:
        cursor.bytes(3)
    pictures = []
    for _ in range(count):
        start = cursor.at
        length, quality = (cursor.number(4), None) if year == 2005 else _device_2011(cursor)
        (points,) = cursor.fields(_FACE_2005 if year == 2005 else _FACE_2011)
        cursor.bytes(8 * points)
        camera = cursor.fields(_CAMERA_2005 if year == 2005 else _CAMERA_2011)
        if not cursor.at <= start + length <= cursor.end:
            raise InvalidInput(
                f"a picture of {name} states {length} bytes and takes {cursor.at - start} or more; send it whole"
            )
        data = cursor.bytes(start + length - cursor.at)
        if year == 2011 and not data.startswith(_SIGNATURES):  # some writers omit the length of the data
            size = int.from_bytes(data[:4], "big")
            if size > len(data) - 4:
                raise InvalidInput(f"{name} states {size} bytes of picture and has {len(data) - 4}; send it whole")
            data = data[4 : 4 + size]
        if not data.startswith(_SIGNATURES):
            raise InvalidInput(
                f"{name} holds data of type {camera[1]} that is not JPEG, JPEG 2000 or PNG; take out its picture"
            )
        pictures.append(Picture("face", data, quality=quality))
    return pictures
