"""Minutia Cylinder-Code: describes the neighbourhood of each minutia of a print as bits.

Source: Cappelli, Ferrara and Maltoni, "Minutia Cylinder-Code: a new representation and matching technique for fingerprint recognition",
2010, in the bit-based form. A cylinder has 8 x 8 x 6 cells, so that the cells of one direction are a 64-bit word; the other constants are
those of the paper. One simplification: a cell is set if a single neighbour would set it; the contributions of neighbours are not added.

Owns the reading of a record's body (rows of six bytes), the choice of the strongest minutiae, and their codes. Never aligns or scores
prints.

1. The result does not depend on the order of a record's rows.
2. All arithmetic is exact (integers, or floats that hold integers), so that every machine gives the same bits.
"""

from __future__ import annotations

from math import cos, erf, log, pi, sin, sqrt
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

MINUTIAE_MAX = 64
"""The number of minutiae that are kept, by quality. 48 to 96 are equally accurate (UareU, SFinGe and FVC2002 DB1-4_B, 2026-11)."""
READ_MAX = 255
"""The number of minutiae that are read: the most that a record of ISO/IEC 19794-2:2005 can hold."""
SECTIONS = 6
_SIDE = 8  # cells along a cylinder's base
_RADIUS = 70  # of a cylinder, in pixels
_SIGMA_PX, _SIGMA_RAD = 28 / 3, 2 * pi / 9
_SET_FROM = 0.005  # the least contribution that sets a cell
_REACH = 86  # the radius plus that of the largest disc that a neighbour sets, in pixels

UNIT = 4096
_CELL = 2 * _RADIUS * UNIT // _SIDE
COSINE, SINE = (np.array([round(UNIT * f(2 * pi * step / 256)) for step in range(256)], np.int64) for f in (cos, sin))
"""Cosine and sine of ISO's angles, in 1/256 turns, as multiples of 1 / UNIT. Rounded to integers, so that all machines agree."""


class Prepared(NamedTuple):
    """The memory of one prepared print. size: int64 (1,), the number of minutiae. row: int64 (READ_MAX,), the minutiae in ascending order,
    each as one number. x, y, angle: int64 (MINUTIAE_MAX,), in pixels and 1/256 turns. cells: uint64 (MINUTIAE_MAX, SECTIONS). norm: float64
    (MINUTIAE_MAX,), the square root of the number of set cells."""

    size: NDArray[np.int64]
    row: NDArray[np.int64]
    x: NDArray[np.int64]
    y: NDArray[np.int64]
    angle: NDArray[np.int64]
    cells: NDArray[np.uint64]
    norm: NDArray[np.float64]


def empty_print() -> Prepared:
    """The memory of a print, all zeros."""
    x, y, angle = np.zeros((3, MINUTIAE_MAX), np.int64)
    cells = np.zeros((MINUTIAE_MAX, SECTIONS), np.uint64)
    return Prepared(
        size=np.zeros(1, np.int64),
        row=np.zeros(READ_MAX, np.int64),
        x=x,
        y=y,
        angle=angle,
        cells=cells,
        norm=np.zeros(MINUTIAE_MAX, np.float64),
    )


def _disc_limits() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each relative angle of a neighbour: the three sections whose cells it can set, and the squared distance, in 1 / UNIT pixels, up to
    which it sets them; both int64 (256, 3)."""
    sections, limits = np.zeros((256, 3), np.int64), np.full((256, 3), -1, np.int64)
    for step in range(256):
        for near in range(3):
            section = (round(step * SECTIONS / 256) + near - 1) % SECTIONS
            apart = abs((2 * pi * step / 256 - 2 * pi * section / SECTIONS + pi) % (2 * pi) - pi)
            share = sum(s * erf((apart + s * pi / SECTIONS) / _SIGMA_RAD / sqrt(2)) / 2 for s in (1, -1))
            peak = share / (_SIGMA_PX * sqrt(2 * pi))
            sections[step, near] = section
            if peak > _SET_FROM:
                limits[step, near] = int(2 * _SIGMA_PX**2 * log(peak / _SET_FROM)) * UNIT**2
    return sections, limits


def _cell_bits() -> NDArray[np.uint64]:
    """The bit of each cell, uint64 (_SIDE, _SIDE); 0 if the cell's centre is outside the cylinder."""
    middle = (np.arange(_SIDE) - (_SIDE - 1) / 2) * _CELL
    inside = middle[:, None] ** 2 + middle**2 <= (_RADIUS * UNIT) ** 2
    return np.where(
        inside, np.uint64(1) << np.arange(_SIDE * _SIDE, dtype=np.uint64).reshape(_SIDE, _SIDE), np.uint64(0)
    )


_NEAR, _LIMITS = _disc_limits()
_BITS = _cell_bits()
_ROOTS = np.sqrt(np.arange(64 * SECTIONS + 1, dtype=np.float64))
SIMILAR = 1000
"""The similarity of two equal cylinders."""


def _popcount_code(_: Any, word: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), generate


_popcount: Any = intrinsic(_popcount_code)


@numba.njit(nogil=True, cache=True)
def prepare(content: Any, start: int, count: int, print_: Any) -> None:
    """Reads a record's body into print_ and computes its cylinders. content: uint8; the body is `count` rows of six bytes from `start`."""
    _read(content, start, min(count, READ_MAX), print_)
    _describe(print_)


@numba.njit(nogil=True, cache=True)
def _read(content: Any, start: int, count: int, print_: Any) -> None:
    row = print_.row
    x_sum, y_sum = np.int64(0), np.int64(0)
    for i in range(count):
        at = start + 6 * i
        x = ((np.int64(content[at]) & 63) << 8) | np.int64(content[at + 1])
        y = ((np.int64(content[at + 2]) & 63) << 8) | np.int64(content[at + 3])
        x_sum += x
        y_sum += y
        value = (y << 30) | (x << 16) | (np.int64(content[at + 4]) << 8) | np.int64(content[at + 5])
        j = i
        while j > 0 and row[j - 1] > value:
            row[j] = row[j - 1]
            j -= 1
        row[j] = value
    left = count
    while left > MINUTIAE_MAX:  # drops the minutia of the lowest quality, of equal quality the farthest from the centre
        worst, worst_value = 0, np.int64(1) << 62
        for i in range(left):
            x, y = count * ((row[i] >> 16) & 0x3FFF) - x_sum, count * (row[i] >> 30) - y_sum
            value = ((row[i] & 255) << 46) - (x * x + y * y)
            if value < worst_value:
                worst, worst_value = i, value
        left -= 1
        for i in range(worst, left):
            row[i] = row[i + 1]
    print_.size[0] = left
    for i in range(left):
        print_.x[i] = (row[i] >> 16) & 0x3FFF
        print_.y[i] = row[i] >> 30
        print_.angle[i] = (row[i] >> 8) & 255


@numba.njit(nogil=True, cache=True)
def _describe(print_: Any) -> None:
    count, x, y, angle, cells = print_.size[0], print_.x, print_.y, print_.angle, print_.cells
    for i in range(count):
        for section in range(SECTIONS):
            cells[i, section] = np.uint64(0)
    for i in range(count):
        for j in range(i + 1, count):
            if y[j] - y[i] > _REACH:
                break  # minutiae are sorted by y
            dx, dy = x[j] - x[i], y[j] - y[i]
            if dx * dx + dy * dy <= _REACH * _REACH:
                _set_cells(dx, dy, angle[i], angle[j], cells, i)
                _set_cells(-dx, -dy, angle[j], angle[i], cells, j)
    for i in range(count):
        total = np.uint64(0)
        for section in range(SECTIONS):
            total += _popcount(cells[i, section])
        print_.norm[i] = _ROOTS[total]


@numba.njit(nogil=True, cache=True)
def _set_cells(dx: int, dy: int, own: int, other: int, cells: Any, i: int) -> None:
    """Sets the cells of cylinder i that a neighbour sets: discs around its position, in the sections near its relative angle."""
    cosine, sine = COSINE[own], SINE[own]
    # y points down and angles are anticlockwise; u and v are in 1 / UNIT pixels from the corner of the cylinder
    u = dx * cosine - dy * sine + _RADIUS * UNIT
    v = -dx * sine - dy * cosine + _RADIUS * UNIT
    rotated = (other - own) & 255
    # a disc is at most two cells wide, so that it reaches at most two rows and two columns of cells
    first_p = (u - _CELL // 2) // _CELL
    first_q = (v - _CELL // 2) // _CELL
    for p in range(max(first_p, 0), min(first_p + 2, _SIDE)):
        off_u = p * _CELL + _CELL // 2 - u
        for q in range(max(first_q, 0), min(first_q + 2, _SIDE)):
            off_v = q * _CELL + _CELL // 2 - v
            apart = off_u * off_u + off_v * off_v
            bit = _BITS[p, q]
            for near in range(3):
                if apart <= _LIMITS[rotated, near]:
                    cells[i, _NEAR[rotated, near]] |= bit


@numba.njit(nogil=True, cache=True)
def similarities(a: Any, b: Any, out: Any) -> None:
    """Writes the similarity, 0 to SIMILAR, of each cylinder of a with each cylinder of b into out, int64 (a's count, b's count)."""
    for i in range(a.size[0]):
        for k in range(b.size[0]):
            different = np.uint64(0)
            for section in range(SECTIONS):
                different += _popcount(a.cells[i, section] ^ b.cells[k, section])
            norms = a.norm[i] + b.norm[k]
            out[i, k] = int(SIMILAR * (1.0 - _ROOTS[different] / norms)) if norms > 0 else 0
