"""Reads the pictures in ANSI/NIST-ITL files (.an2, .eft, .nist) in the traditional encoding: records of types 4, 10, 13, 14 and 15. If the
file has no picture of a finger, it reads the minutiae of type 9.

Owns the layout of the file. Never decodes a picture.

1. The result for any bytes is a list of pictures or InvalidInput, in time proportional to the bytes.
2. Minutiae of another extractor are ignored if there is a picture of a finger, because minutiae of different models are not comparable.
3. Records of other types are skipped by their length. A record whose length does not fit is an error.

A file is a sequence of records: type 1 first, which lists the types of the others (field 1.003). Tagged records are `TYPE.FIELD:value`,
separated by GS (0x1d), ended by FS (0x1c); field 999 is binary and lasts to the end. Types 3 to 8 are binary and begin with their length
(ANSI/NIST-ITL 1-2011, NIST SP 500-290).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping

from biodedup.capture.minutiae.itl import view_of_fields
from biodedup.capture.minutiae.record import standard
from biodedup.capture.pictures.records import Picture, finger_column, raw_pixels
from biodedup.errors import InvalidInput

_NAME = "an ANSI/NIST-ITL file"
_FS, _GS, _RS, _US = b"\x1c", b"\x1d", b"\x1e", b"\x1f"
_BEGIN = re.compile(rb"1\.0{0,2}1:\d{1,8}\x1d")
_TAG = re.compile(rb"(\d{1,2})\.(\d{1,9}):")
_RECORDS_MAX, _FIELDS_MAX = 1000, 2000
_BINARY_TYPES = range(3, 9)
_TYPE_4 = struct.Struct(">IBB6sBHHB")
_MM_PER_INCH, _CM_PER_INCH = 25.4, 2.54
_RAW_CODES = ("NONE", "0", "")
_SPACES = {"RGB": 3, "SRGB": 3, "GRAY": 1, "GREY": 1, "": 1}
_MINUTIAE, _FINGERS, _FACE, _PALM = 9, (13, 14), 10, 15
_FACE_KINDS = ("", "FACE")
PALM = "a palm"
"""`Picture.what` of a palm."""


def is_itl(content: bytes) -> bool:
    """Whether the content begins as an ANSI/NIST-ITL file."""
    return _BEGIN.match(content[:24]) is not None


def read_itl(content: bytes) -> list[Picture]:
    """The pictures of faces and friction ridges, in the file's order. If there is no picture of a finger: also the minutiae, as records of
    ISO/IEC 19794-2. Raises InvalidInput."""
    pictures: list[Picture] = []
    minutiae: list[Mapping[int, bytes]] = []
    native: tuple[float, float] | None = None
    at = 0
    for number, kind in enumerate([1, *_types(content)]):
        if kind in _BINARY_TYPES:
            length = int.from_bytes(content[at : at + 4], "big")
        else:
            length = _tagged_length(content, at, kind)
        if length < 5 or at + length > len(content):
            raise InvalidInput(
                f"{_NAME}: record {number} of type {kind} states {length} bytes, {len(content) - at} are left; send it whole"
            )
        record = content[at : at + length]
        at += length
        if kind == 4:
            pictures.append(_type_4(record, native))
        elif kind == _MINUTIAE:
            minutiae.append(_fields(record, kind))
        elif kind in (1, _FACE, *_FINGERS, _PALM):
            fields = _fields(record, kind)
            if kind == 1:
                native = _native(fields)
            elif (picture := _tagged(kind, fields)) is not None:
                pictures.append(picture)
    if all(picture.column == "face" for picture in pictures):
        pictures += [_of_minutiae(fields) for fields in minutiae]
    if not pictures:
        raise InvalidInput(
            f"{_NAME} holds no picture of a face or a finger (types 4, 10, 13, 14), and no minutiae (type 9); send one that does"
        )
    return pictures


def _types(content: bytes) -> list[int]:
    """The types of the records after the first, from field 1.003."""
    fields = _fields(content[: _tagged_length(content, 0, 1)], 1)
    entries = [entry.split(_US) for entry in fields.get(3, b"").split(_RS)]
    kinds = [int(entry[0]) for entry in entries[1:] if entry[0].strip().isdigit()]
    if len(kinds) != len(entries) - 1 or len(kinds) > _RECORDS_MAX:
        raise InvalidInput(f"{_NAME} does not list its records in field 1.003, at most {_RECORDS_MAX}; write it again")
    return kinds


def _tagged_length(content: bytes, at: int, kind: int) -> int:
    match = re.compile(rb"(\d{1,2})\.0{0,2}1:(\d{1,10})\x1d").match(content, at)
    if match is None or int(match[1]) != kind:
        raise InvalidInput(f"{_NAME}: no record of type {kind} at byte {at}, which field 1.003 lists; send it whole")
    return int(match[2])


def _fields(record: bytes, kind: int) -> dict[int, bytes]:
    """Field -> value, without the separator at its end."""
    fields: dict[int, bytes] = {}
    at = 0
    for _ in range(_FIELDS_MAX):
        tag = _TAG.match(record, at)
        if tag is None or int(tag[1]) != kind:
            break
        if int(tag[2]) == 999:
            end = len(record) - record.endswith(_FS)
            fields[999] = record[tag.end() : end]
            break
        ends = [end for end in (record.find(_GS, tag.end()), record.find(_FS, tag.end())) if end >= 0]
        end = min(ends, default=len(record))
        fields[int(tag[2])] = record[tag.end() : end]
        at = end + 1
    return fields


def _text(fields: Mapping[int, bytes], number: int) -> str:
    """The first item of a field, in capitals."""
    value = fields.get(number, b"")
    return re.split(b"[\x1e\x1f]", value)[0].decode("ascii", "replace").strip().upper()


def _int(fields: Mapping[int, bytes], number: int) -> int:
    text = _text(fields, number)
    return int(text) if text.isascii() and text.isdigit() and len(text) < 8 else 0


def _native(fields: Mapping[int, bytes]) -> tuple[float, float] | None:
    """The native scanning resolution in dpi, from field 1.011, which is in pixels per millimetre."""
    try:
        dpi = float(_text(fields, 11)) * _MM_PER_INCH
    except ValueError:
        return None
    return (dpi, dpi) if 0 < dpi < 1e5 else None


def _type_4(record: bytes, native: tuple[float, float] | None) -> Picture:
    if len(record) < _TYPE_4.size:
        raise InvalidInput(f"{_NAME}: a record of type 4 has {len(record)} bytes, wanted {_TYPE_4.size} or more")
    _, _, _, positions, resolution, width, height, compression = _TYPE_4.unpack_from(record)
    column, what = finger_column(positions[0] if positions[0] != 255 else 0)
    dpi = native if resolution == 1 and native is not None else (500.0, 500.0)
    data = record[_TYPE_4.size :]
    if compression == 0:
        return Picture(column, raw_pixels(data, (width, height), 1, _NAME), dpi, what=what)
    return Picture(column, data, dpi, what=what)


def _of_minutiae(fields: Mapping[int, bytes]) -> Picture:
    view = view_of_fields(fields)
    return Picture(view.position, standard(view), quality=view.quality)


def _tagged(kind: int, fields: Mapping[int, bytes]) -> Picture | None:
    """A picture of type 10, 13, 14 or 15; None for a tattoo, a scar, an iris, or a record without data."""
    data = fields.get(999)
    if not data or (kind == _FACE and _text(fields, 3) not in _FACE_KINDS):
        return None
    column, what = ("face", "") if kind == _FACE else finger_column(_int(fields, 13))
    if kind == _PALM:
        column, what = "", PALM
    x, y = _int(fields, 9), _int(fields, 10)
    factor = _CM_PER_INCH if _text(fields, 8) == "2" else 1.0
    dpi = (x * factor, y * factor) if x and y and _text(fields, 8) in ("1", "2") else None
    if _text(fields, 11) not in _RAW_CODES:
        return Picture(column, data, dpi, what=what)
    depth = _text(fields, 12)
    if kind == _FACE and depth not in _SPACES:
        raise InvalidInput(
            f"{_NAME}: colours in space {depth!r} that are not compressed, wanted SRGB or GRAY; convert them"
        )
    planes = _SPACES[depth] if kind == _FACE else (3 if depth == "24" else 1)
    if kind != _FACE and depth not in ("8", "24", ""):
        raise InvalidInput(f"{_NAME}: a picture of {depth} bits a pixel that is not compressed, wanted 8; convert it")
    return Picture(column, raw_pixels(data, (_int(fields, 6), _int(fields, 7)), planes, _NAME), dpi, what=what)
