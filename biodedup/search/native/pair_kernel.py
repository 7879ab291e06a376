"""The kernel that compares the members of an LSH bucket with each other: first by signs, then by high nibbles.

Owns this arithmetic. Never chooses buckets. tests/search/test_buckets.py has a reference in numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from biodedup.gallery.segments.part import ScannedRows
from biodedup.search.native.dot_kernel import PROBE_ALIGNMENT, make_row_dot
from biodedup.search.native.table_tile import (
    BLOCKS,
    LISTED,
    MASKS,
    ROWS,
    SUMS_PER_ROW,
    Tables,
    aligned,
    copy,
    f32_at,
    store,
    survivors,
)

_CHUNK = 256
"""Number of members whose tables fit into the second-level cache."""

_row_dot = make_row_dot()


@numba.njit(nogil=True, cache=True)
def _take_signs(rows: Any, signs: Any) -> None:
    """Writes the table indices of up to 64 rows, uint8 (tables, 64). rows: their high nibbles, uint32 (n, words)."""
    # multiplying by `gathers` brings four bits that lie eight apart together in the top byte
    lowest, gathers = np.uint32(0x01010101), np.uint32(0x01020408)
    for r in range(rows.shape[0]):
        for i in range(signs.shape[0]):
            shift = np.uint32(3 + 4 * (i & 1))
            signs[i, r] = np.uint8((((rows[r, i >> 1] >> shift) & lowest) * gathers) >> np.uint32(24))


@numba.njit(nogil=True, cache=True)
def _as_probe(row: Any, probe: Any) -> Any:
    """Turns a row into a probe in the layout of `make_row_dot`: from its high nibbles, uint32 (words,), twice their
    distances from the middle, int8 (2, octets). Returns their sum."""
    total: Any = 0
    for h in range(row.shape[0]):
        for t in range(4):
            lower = np.int64(row[h] >> np.uint32(8 * t) & np.uint32(15))
            upper = np.int64(row[h] >> np.uint32(8 * t + 4) & np.uint32(15))
            probe[0, 4 * h + t], probe[1, 4 * h + t] = np.int8(2 * lower - 15), np.int8(2 * upper - 15)
            total += 2 * (lower + upper) - 30
    return total


@numba.njit(nogil=True, cache=True)
def _tabulate(probe: Any, number: int, table: Any) -> tuple[Any, Any]:
    """Writes a probe's sign tables, uint8 (t, 16), t >= number, from the result of `_as_probe`. Returns step and
    middle, as `tables_of` does, in the probe's own units."""
    quarter = table.shape[0] // SUMS_PER_ROW
    largest: Any = 1
    middle: Any = 0
    total: Any = 0
    for i in range(number):
        if i % quarter == 0:
            total = 0
        for b in range(4):
            total += abs(np.int64(probe[i & 1, 4 * (i >> 1) + b]))
            middle += abs(np.int64(probe[i & 1, 4 * (i >> 1) + b]))
        largest = max(largest, total)
    step = np.float32(2 * largest) / np.float32(255 - 0.5 * quarter)
    for i in range(number):
        at, side = 4 * (i >> 1), i & 1
        a, b, c, d = probe[side, at], probe[side, at + 1], probe[side, at + 2], probe[side, at + 3]
        least = abs(np.int32(a)) + abs(np.int32(b)) + abs(np.int32(c)) + abs(np.int32(d)) - a - b - c - d
        for entry in range(16):
            more = (entry & 1) * a + (entry >> 1 & 1) * b + (entry >> 2 & 1) * c + (entry >> 3 & 1) * d
            table[i, entry] = np.uint8(np.rint(np.float32(least + 2 * more) / step))
    return step, np.float32(middle)


@numba.njit(nogil=True, cache=True)
def _similar_pairs(
    high: Any, norms: Any, width: int, numbers: Any, cells: Any, used: int, sign_cut: float, cut: float
) -> tuple[Any, Any, int]:
    count, blocks = cells.shape[0], -(-cells.shape[0] // 64)
    words, octets = width // 4, -(-width // PROBE_ALIGNMENT) * PROBE_ALIGNMENT
    number, groups = -(-used // SUMS_PER_ROW) * SUMS_PER_ROW, -(-blocks // BLOCKS)
    rows = aligned(64 * blocks * octets).view(np.uint32).reshape(64 * blocks, octets // 4)
    signs = aligned(groups * ROWS * number).reshape(groups, number, ROWS)
    lengths = np.ones(64 * blocks, np.float32)
    tables = aligned(_CHUNK * number * 16).reshape(_CHUNK, number, 16)
    probes = aligned(_CHUNK * 2 * octets).view(np.int8).reshape(_CHUNK, 2, octets)
    limits, sums = np.empty(_CHUNK, np.uint8), np.empty(_CHUNK, np.float32)
    masks, places = aligned(MASKS), np.empty((_CHUNK, number), np.int32)
    at_masks: Any = np.int64(masks.ctypes.data) + 64
    places[:] = np.arange(number)
    room = ROWS * _CHUNK + LISTED
    which, others = np.empty(room, np.int32), np.empty(room, np.int32)
    earlier, later = np.empty(64, np.int32), np.empty(64, np.int32)
    found, passed = 0, 0
    root = np.float32(np.sqrt(4 * used))
    at_rows, at_probes = rows.ctypes.data, probes.ctypes.data
    for r in range(count):
        cell = np.int64(cells[r])
        copy(high[numbers[r]] + width * cell, at_rows + octets * r, width)
        lengths[r] = f32_at(norms[numbers[r]] + 4 * cell)
    for b in range(blocks):
        lane = 64 * (b % BLOCKS)
        _take_signs(rows[64 * b : min(64 * b + 64, count)], signs[b // BLOCKS, :used, lane : lane + 64])
    for start in range(0, count, _CHUNK):
        together = min(_CHUNK, count - start)
        for i in range(together):
            sums[i] = np.float32(7.5) * _as_probe(rows[start + i, :words], probes[i])
            step, middle = _tabulate(probes[i], used, tables[i])
            # a high nibble is worth sixteen, of which `probes` counts two
            least = sign_cut * root * lengths[start + i] / np.float32(8)
            limit = np.ceil((least + middle) / (SUMS_PER_ROW * step) + np.float32(0.5 - 1e-3))
            limits[i] = np.uint8(min(max(limit, 0), 255))
        asked = Tables(together, number, places.ctypes.data, tables.ctypes.data, limits.ctypes.data)
        for g in range(start // ROWS, groups):
            for i in range(BLOCKS):
                left = max(count - ROWS * g - 64 * i, 0)
                alive = ~np.uint64(0) if left >= 64 else (np.uint64(1) << np.uint64(left)) - np.uint64(1)
                store(at_masks + 8 * (BLOCKS + i), alive)
            indices = signs.ctypes.data + ROWS * number * g
            reached = survivors(indices, at_masks, asked, ROWS * g, which.ctypes.data, others.ctypes.data)
            for i in range(reached):
                p, row = which[i], others[i]
                if row <= start + p:  # itself, or compared already
                    continue
                passed += 1
                dot = np.float32(_row_dot(at_rows + octets * row, at_probes + 2 * octets * p, octets, octets))
                if np.float32(128) * (dot - sums[p]) / (lengths[start + p] * lengths[row]) >= np.float32(cut):
                    if found == earlier.size:
                        earlier, later = _grown(earlier, 2 * found), _grown(later, 2 * found)
                    earlier[found], later[found] = start + p, row
                    found += 1
    masks[:1], places[:1], tables[:1], limits[:1] = 0, 0, 0, 0  # else numba frees them before they are read by address
    rows[:1], probes[:1], signs[:1], which[:1], others[:1] = 0, 0, 0, 0, 0
    return earlier[:found], later[:found], passed


@numba.njit(nogil=True, cache=True)
def _grown(array: Any, size: int) -> Any:
    wider = np.empty(size, array.dtype)
    wider[: array.size] = array
    return wider


def similar_pairs(
    columns: Sequence[ScannedRows],
    numbers: NDArray[np.int32],
    cells: NDArray[np.int32],
    tables: int,
    sign_cut: float,
    cut: float,
) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
    """Finds the pairs among some rows whose estimates by signs and by high nibbles both reach their cut-offs. Each row
    serves as a probe too; only the high nibbles of both count.

    columns: what is stored of all their rows, all of the same width; numbers, cells: int32 (n,), each row's column and its cell
    there; tables: of signs to look at. Returns (the earlier, the later) of each pair, as places among the rows, and how
    many pairs passed the signs.
    """
    _, high, norms = (
        np.array([array.ctypes.data for array in arrays], np.int64)
        for arrays in zip(*((c.signs, c.high, c.norms) for c in columns), strict=True)
    )
    width = columns[0].high.shape[1]
    earlier, later, passed = _similar_pairs(high, norms, width, numbers, cells, tables, sign_cut, cut)
    return earlier, later, passed
