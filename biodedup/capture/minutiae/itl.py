"""Reads the minutiae of a type 9 record of ANSI/NIST-ITL: the INCITS block (fields 9.126 to 9.150) and the legacy fields 9.005 to 9.012.

Owns the meaning of these fields. Never splits a file into records (`pictures/itl.py`), and never checks whether minutiae are plausible
(`record.py`).

1. The result for any fields is a view, or InvalidInput, in time proportional to the bytes.
2. Other blocks (the extended feature set, fields of vendors) are not read; the error names them.

| | INCITS block (M1) | legacy |
|---|---|---|
| coordinates | pixels of the scale in 9.130 to 9.132, from the top left | 0.01 mm, from the bottom left: `XXXXYYYY` |
| angle | units of 2 degrees, as in ANSI/INCITS 378 | degrees, `TTT`, in the opposite direction (away from the ridge) |
| quality | 0 to 100 | on another scale; it is ignored |

Sources: ANSI/NIST-ITL 1-2011 (NIST SP 500-290), section 8.9; for the direction of legacy angles, `an2k2fmr` of NIST's BiomDI.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from biodedup.capture.minutiae.layouts import QUALITY_MAX, RawView
from biodedup.capture.minutiae.record import COUNT_MAX, MinutiaeView, checked_view
from biodedup.errors import InvalidInput

_NAME = "a type 9 record of an ANSI/NIST-ITL file"
_LEGACY, _M1 = 12, 137
_LEGACY_PER_CM = 1000
_TYPES_M1, _TYPES_LEGACY = {"0": 0, "1": 1, "2": 2}, {"A": 1, "B": 2}
_BLOCKS = (
    (range(13, 31), "IAFIS features"),
    (range(31, 126), "features of a vendor"),
    (range(151, 176), "minutiae outside of the INCITS block"),
    (range(176, 226), "features of a vendor"),
    (range(300, 400), "the extended feature set"),
)
_SEPARATORS = (b"\x1e", b"\x1f")


def view_of_fields(fields: Mapping[int, bytes]) -> MinutiaeView:
    """The view in a record's fields. fields: number -> value. Raises InvalidInput."""
    if _M1 in fields:
        return checked_view(_from_m1(fields))
    if _LEGACY in fields:
        return checked_view(_from_legacy(fields))
    held = sorted({name for number in fields for numbers, name in _BLOCKS if number in numbers})
    raise InvalidInput(
        f"{_NAME} holds {' and '.join(held) or 'no minutiae'}; the INCITS block (9.126 to 9.150) and the legacy fields (9.005 to 9.012) are "
        "read: write it with one of these, or send ISO/IEC 19794-2"
    )


def _from_m1(fields: Mapping[int, bytes]) -> RawView:
    unit = {"1": 1 / 2.54, "2": 1.0}.get(_first(fields, 130))
    if unit is None:
        raise InvalidInput(
            f"{_NAME} states no scale: 9.130 is {_first(fields, 130)!r:.20}, wanted 1 or 2; write it again"
        )
    rows = _rows(fields, _M1, 6)
    x, y = ([_number(row[column], 0x3FFF) for row in rows] for column in (1, 2))
    angles = [_number(row[3], 179) * 2 for row in rows]
    kinds = [_TYPES_M1.get(row[4].strip(), 0) for row in rows]
    qualities = [min(_number(row[5], 255), 255) for row in rows]
    stated = _number(_first(fields, 135) or "255", 255)
    return RawView(
        _number(_first(fields, 134) or "0", 255),
        0,
        stated if stated <= QUALITY_MAX else None,
        (_number(_first(fields, 128), 0xFFFF), _number(_first(fields, 129), 0xFFFF)),
        (round(_number(_first(fields, 131), 99_999) * unit), round(_number(_first(fields, 132), 99_999) * unit)),
        _packed(x, y, angles, kinds, [quality if quality <= QUALITY_MAX else 0 for quality in qualities]),
    )


def _from_legacy(fields: Mapping[int, bytes]) -> RawView:
    rows = _rows(fields, _LEGACY, 4)
    texts = [row[1].strip() for row in rows]
    if not all(len(text) == 11 and text.isascii() and text.isdigit() for text in texts):
        raise InvalidInput(f"{_NAME}: a minutia of 9.012 has no eleven digits, XXXXYYYYTTT; write it again")
    x, up = ([int(text[start : start + 4]) for text in texts] for start in (0, 4))
    top = max(up, default=0)
    angles = [_number(text[8:], 360) + 180 for text in texts]
    kinds = [_TYPES_LEGACY.get(row[3].strip().upper(), 0) for row in rows]
    packed = _packed(x, [top - value for value in up], angles, kinds, [0] * len(rows))
    position = _number(_first(fields, 6) or "0", 255)
    size, resolution = (max(x, default=0) + 1, top + 1), (_LEGACY_PER_CM, _LEGACY_PER_CM)
    return RawView(position, 0, None, size, resolution, packed)


def _rows(fields: Mapping[int, bytes], number: int, items_min: int) -> list[list[str]]:
    """The subfields of a field, each as a list of its items."""
    record_separator, unit_separator = _SEPARATORS
    rows = [
        [item.decode("ascii", "replace") for item in row.split(unit_separator)]
        for row in fields[number].split(record_separator)
        if row.strip()
    ]
    if len(rows) > COUNT_MAX or any(len(row) < items_min for row in rows):
        raise InvalidInput(
            f"{_NAME}: field 9.{number:03} has {len(rows)} minutiae, of {min(map(len, rows), default=0)} items or more; wanted at most "
            f"{COUNT_MAX}, of {items_min} items; write it again"
        )
    return rows


def _first(fields: Mapping[int, bytes], number: int) -> str:
    """The first item of a field; "" if the field is absent."""
    value = fields.get(number, b"")
    for separator in _SEPARATORS:
        value = value.split(separator)[0]
    return value.decode("ascii", "replace").strip()


def _number(text: str, maximum: int) -> int:
    """Raises InvalidInput unless the text is a number from 0 to maximum."""
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 8 and int(text) <= maximum):
        raise InvalidInput(f"{_NAME} has {text!r:.20} where a number from 0 to {maximum} belongs; write it again")
    return int(text)


def _packed(
    x: Sequence[int], y: Sequence[int], degrees: Sequence[int], kinds: Sequence[int], qualities: Sequence[int]
) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """The minutiae in the layout of ISO/IEC 19794-2, uint8 (n, 6)."""
    words = np.array([x, y], np.uint16).reshape(2, -1)
    words[0] |= np.array(kinds, np.uint16) << 14
    angles = np.round(np.array(degrees, float) * (256 / 360)).astype(np.int64) & 255
    return np.column_stack(
        [words[0] >> 8, words[0] & 255, words[1] >> 8, words[1] & 255, angles, np.array(qualities)]
    ).astype(np.uint8)
