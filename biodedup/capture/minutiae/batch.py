"""Checks many minutiae records at once, and converts them to the form that galleries store.

Owns the compiled check of the usual layout: ISO/IEC 19794-2:2005, a single view, 500 dpi. `record.py` owns the rules and checks any other
record, one at a time. Never compares.

Invariant: the result for each record is `standard(view_of(record, position))`. If that raises InvalidInput, the record is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from biodedup.capture.minutiae.layouts import QUALITY_MAX
from biodedup.capture.minutiae.record import (
    CROWD_MAX,
    CROWD_PX,
    MINUTIA_BYTES,
    PIXELS_PER_CM,
    SIDE_PX_MAX,
    position_code,
    standard,
    view_of,
)
from biodedup.errors import InvalidInput

_HEAD_BYTES, _TAIL_BYTES = 28, 2  # before and after the minutiae of a record with a single view
_HEAD = np.frombuffer(b"FMR\0 20\0", np.uint8)
_STANDARD, _OTHER = 0, 1  # results of the compiled check
_AS_STATED = -1  # position code of a column that does not name a finger: the record's own code stays
_Function = TypeVar("_Function", bound=Callable[..., Any])

Bytes = NDArray[np.uint8]
Offsets = NDArray[np.int64]


def _compiled(function: _Function) -> _Function:
    return cast(_Function, numba.njit(cache=True, nogil=True)(function))


def standard_records(offsets: Offsets, data: Bytes, position: str) -> tuple[Offsets, Bytes, NDArray[np.bool_]]:
    """Records in the form that galleries store. offsets: int64 (n + 1,) from 0. data: uint8, n records of a finger position.

    Returns new offsets, new data, and whether each record is invalid, bool (n,). An invalid record becomes empty.
    """
    count = len(offsets) - 1
    checked = np.array(data, np.uint8)
    kinds = np.zeros(count, np.uint8)
    code = _AS_STATED if position == "unknown" else position_code(position)
    _check(np.ascontiguousarray(offsets, np.int64), checked, _HEAD, code, kinds)
    others = np.flatnonzero(kinds == _OTHER)
    invalid = np.zeros(count, bool)
    if not len(others):
        return offsets, checked, invalid
    records = {int(i): _converted(data[offsets[i] : offsets[i + 1]].tobytes(), position) for i in others}
    invalid[others] = [records[i] is None for i in others.tolist()]
    lengths = np.diff(offsets)
    lengths[others] = [len(records[i] or b"") for i in others.tolist()]
    new_offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    new_data = np.empty(int(new_offsets[-1]), np.uint8)
    _copy_standard(offsets, checked, kinds, new_offsets, new_data)
    for i in others.tolist():
        new_data[new_offsets[i] : new_offsets[i + 1]] = np.frombuffer(records[i] or b"", np.uint8)
    return new_offsets, new_data, invalid


def _converted(content: bytes, position: str) -> bytes | None:
    try:
        return standard(view_of(content, position))
    except InvalidInput:
        return None


@_compiled
def _check(offsets: Any, data: Any, head: Any, code: int, kinds: Any) -> None:
    """Converts records in the usual layout to the standard form, in place. The kind of any other record becomes _OTHER."""
    for i in range(len(offsets) - 1):
        size = offsets[i + 1] - offsets[i]
        if size:
            record = data[offsets[i] : offsets[i + 1]]
            kinds[i] = _OTHER if not _is_usual(record, head) or _is_crowded(record) else _STANDARD
            if kinds[i] == _STANDARD:
                _normalise(record, code)


@_compiled
def _short(record: Any, at: int) -> int:
    return int(record[at]) << 8 | int(record[at + 1])


@_compiled
def _is_usual(record: Any, head: Any) -> bool:
    size = len(record)
    if size < _HEAD_BYTES + _TAIL_BYTES:
        return False
    for k in range(len(head)):
        if record[k] != head[k]:
            return False
    stated = _short(record, 8) << 16 | _short(record, 10)
    if stated != size or size != _HEAD_BYTES + MINUTIA_BYTES * int(record[27]) + _TAIL_BYTES or record[22] != 1:
        return False
    width, height = _short(record, 14), _short(record, 16)
    if not (0 < width <= SIDE_PX_MAX and 0 < height <= SIDE_PX_MAX):
        return False
    if abs(_short(record, 18) - PIXELS_PER_CM) > 1 or abs(_short(record, 20) - PIXELS_PER_CM) > 1:
        return False
    if record[24] > 10 or _short(record, size - _TAIL_BYTES) != 0:
        return False
    for at in range(_HEAD_BYTES, size - _TAIL_BYTES, MINUTIA_BYTES):
        if _short(record, at) & 0x3FFF >= width or _short(record, at + 2) & 0x3FFF >= height:
            return False
    return True


@_compiled
def _is_crowded(record: Any) -> bool:
    count = int(record[27])
    if count <= CROWD_MAX:
        return False
    x, y = np.empty(count, np.int32), np.empty(count, np.int32)
    for m in range(count):
        x[m] = _short(record, _HEAD_BYTES + MINUTIA_BYTES * m) & 0x3FFF
        y[m] = _short(record, _HEAD_BYTES + MINUTIA_BYTES * m + 2) & 0x3FFF
    for m in range(count):
        near = 0
        for other in range(count):
            near += abs(x[m] - x[other]) <= CROWD_PX and abs(y[m] - y[other]) <= CROWD_PX
        if near > CROWD_MAX:
            return True
    return False


@_compiled
def _normalise(record: Any, code: int) -> None:
    record[12] = record[13] = 0  # the device
    record[18] = record[20] = PIXELS_PER_CM >> 8
    record[19] = record[21] = PIXELS_PER_CM & 255
    record[23] = record[25] = 0  # reserved; the view's number and the impression
    if code != _AS_STATED:
        record[24] = code
    if record[26] > QUALITY_MAX:
        record[26] = 0
    for at in range(_HEAD_BYTES, len(record) - _TAIL_BYTES, MINUTIA_BYTES):
        if record[at] >= 0xC0:  # a reserved kind
            record[at] &= 0x3F
        record[at + 2] &= 0x3F
        if record[at + 5] > QUALITY_MAX:
            record[at + 5] = 0


@_compiled
def _copy_standard(offsets: Any, data: Any, kinds: Any, new_offsets: Any, new_data: Any) -> None:
    for i in range(len(offsets) - 1):
        if kinds[i] == _STANDARD:
            new_data[new_offsets[i] : new_offsets[i + 1]] = data[offsets[i] : offsets[i + 1]]
