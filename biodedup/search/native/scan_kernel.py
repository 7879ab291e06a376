"""The scan kernel: table look-ups rule most rows out, and high nibbles estimate the rest.

Owns the scan of rows for probes. Never knows what a sum, a limit or an evidence stands for (`tables.py`). Its oracle in
numpy is in tests/search/test_scan.py.

A few blocks of 64 rows are looked up in the probes' tables (`table_tile.py`). The high nibbles of rows whose sum
reaches the probe's limit are compared; for few probes they are prefetched, and compared when the next blocks have been
looked up. Without tables each row is compared with each probe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from biodedup.gallery.segments.part import ScannedRows
from biodedup.search.native.dot_kernel import ROW_ALIGNMENT, TOGETHER, make_row_dot, make_row_dots, prefetch, rebound
from biodedup.search.native.table_tile import (
    BLOCKS,
    ROWS,
    TableKind,
    aligned,
    class_indices,
    copy,
    f32_at,
    masks_apart,
    sign_indices,
    survivors,
    tile_for,
    u8_at,
)
from biodedup.values import Float32

_LINE = 64  # bytes of memory that are fetched at once
_FEW_PROBES = 48  # so few that most rows are compared with none of them
_AHEAD = 2 * BLOCKS  # so many blocks on, memory is prefetched

Int64 = NDArray[np.int64]

_row_dot, _row_dots = make_row_dot(), make_row_dots()


@numba.njit(nogil=True, cache=True)
def _alive(live: Any, block: int, first: int, last: int) -> Any:
    """The rows of a block that are live and within the span."""
    alive = live[block] if live.size else ~np.uint64(0)
    low, high = 64 * block, 64 * block + 64
    if first > low:
        alive &= ~np.uint64(0) << np.uint64(first - low) if first < high else np.uint64(0)
    if last < high:
        alive &= ~np.uint64(0) >> np.uint64(high - last) if last > low else np.uint64(0)
    return alive


@numba.njit(nogil=True, cache=True)
def _take_signs(plane: int, octets: int, cells: Any, taken: Any) -> None:
    """Reads the signs of up to 64 cells: taken, uint8 (octets used, 64). plane: the address of a column's signs."""
    for r in range(cells.shape[0]):
        cell = np.int64(cells[r])
        at = plane + 64 * octets * (cell >> 6) + (cell & 63)
        for j in range(taken.shape[0]):
            taken[j, r] = u8_at(at + 64 * j)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _add_values(
    some: Any, rows: Any, members: Any, high: int, norms: int, width: int, probes: Any, parameters: Any, evidence: Any,
    totals: Any, space: Any,
) -> None:  # fmt: skip
    """Adds what one column's high nibbles say of pairs of a probe and a row: a similarity, or its evidence."""
    at_probes, at_space, half = probes.ctypes.data, np.int64(space.ctypes.data), probes.shape[2]
    octets, last, mapped = -(-width // ROW_ALIGNMENT) * ROW_ALIGNMENT, evidence.shape[0] - 1, members.shape[0] > 0
    scale = np.float32(0.5 * last)
    for i in range(some.shape[0]):
        p, cell = np.int64(some[i]), np.int64(members[rows[i]] if mapped else rows[i])
        row = high + width * cell
        if octets != width:
            copy(row, at_space, width)
            row = at_space
        dot = np.float32(_row_dot(row, at_probes + 2 * half * p, octets, half))
        value = parameters[p, 0] * (dot - parameters[p, 1]) / f32_at(norms + 4 * cell)
        if last >= 0:
            place = np.int64(np.rint((value + np.float32(1)) * scale))
            value = evidence[min(max(place, 0), last)]
        totals[i] += value


@numba.njit(nogil=True, cache=True)
def _least_dots(parameters: Any, cuts: Any, norm_min: Any) -> Any:
    """The dot product that a row of the least norm needs to reach each cut; no row with a smaller one reaches it."""
    least = np.full(cuts.shape[0], -np.inf, np.float32)
    for p in range(cuts.shape[0]):
        if cuts[p] > 0 and parameters[p, 0] > 0:  # a part in a million below, for what floats lose
            least[p] = parameters[p, 1] + np.float32(1 - 1e-6) * cuts[p] * norm_min / parameters[p, 0] - np.float32(0.1)
    return least


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _compare_one(
    some: Any, rows: Any, high: int, norms: int, width: int, probes: Any, parameters: Any, cuts: Any, least: Any,
    out: Any, found: int, space: Any,
) -> int:  # fmt: skip
    """As `_compare`, for similarities in one column. Reads the norms of few rows."""
    which, cells, values = out
    at_probes, at_space, half = probes.ctypes.data, np.int64(space.ctypes.data), probes.shape[2]
    octets = -(-width // ROW_ALIGNMENT) * ROW_ALIGNMENT
    for i in range(some.shape[0]):
        p, cell = np.int64(some[i]), np.int64(rows[i])
        row = high + width * cell
        if octets != width:
            copy(row, at_space, width)
            row = at_space
        dot = np.float32(_row_dot(row, at_probes + 2 * half * p, octets, half))
        if dot >= least[p]:
            value = parameters[p, 0] * (dot - parameters[p, 1]) / f32_at(norms + 4 * cell)
            if value >= cuts[p]:
                which[found], cells[found], values[found] = p, cell, value
                found += 1
    return found


@numba.njit(nogil=True, cache=True)
def _compare(
    some: Any, rows: Any, high: Any, norms: Any, widths: Any, members: Any, probes: Any, parameters: Any,
    evidence: Any, cuts: Any, least: Any, out: Any, found: int, totals: Any, space: Any,
) -> int:  # fmt: skip
    """Compares pairs of a probe and a row by the high nibbles of all columns, and writes those that reach the cuts
    behind the first `found`. Returns how many there are then."""
    if widths.shape[0] == 1 and evidence.shape[1] == 0 and members.shape[1] == 0:
        return _compare_one(
            some, rows, high[0], norms[0], widths[0], probes[0], parameters[0], cuts, least, out, found, space
        )  # fmt: skip
    which, cells, values = out
    totals[: some.shape[0]] = 0
    for c in range(widths.shape[0]):
        _add_values(
            some, rows, members[c], high[c], norms[c], widths[c], probes[c], parameters[c], evidence[c], totals, space
        )
    for i in range(some.shape[0]):
        if totals[i] >= cuts[some[i]]:
            which[found], cells[found], values[found] = some[i], rows[i], totals[i]
            found += 1
    return found


@numba.njit(nogil=True, cache=True)
def _prefetch_rows(rows: Any, high: Any, norms: Any, widths: Any, members: Any) -> None:
    for i in range(rows.shape[0]):
        for c in range(widths.shape[0]):
            cell = np.int64(members[c, rows[i]] if members.shape[1] else rows[i])
            if widths.shape[0] > 1:
                prefetch(norms[c] + 4 * cell)
            for at in range(0, widths[c], _LINE):
                prefetch(high[c] + widths[c] * cell + at)


@numba.njit(nogil=True, cache=True)
def _take_block(
    signs: Any, outer: Any, widths: Any, used: Any, members: Any, block: int, kind: int, octets_used: Any, taken: Any,
    indices: int,
) -> None:  # fmt: skip
    """Writes the table indices of one block's rows, of all columns' tables one after another, each ROWS bytes long.
    indices: the address of the first one."""
    at = 64 * block
    for c in range(widths.shape[0]):
        octets = widths[c] >> 2
        if kind == TableKind.CLASSES:
            for i in range(octets_used.shape[0]):
                place = octets * at + 64 * octets_used[i]
                class_indices(signs[c] + place, outer[c] + place, indices + 4 * ROWS * octets_used[i])
                prefetch(signs[c] + place + _AHEAD * 64 * octets)
                prefetch(outer[c] + place + _AHEAD * 64 * octets)
            continue
        source, some = signs[c] + octets * at, (used[c] + 1) >> 1
        if members.shape[1]:
            _take_signs(signs[c], octets, members[c, at : min(at + 64, members.shape[1])], taken[:some])
            source = np.int64(taken.ctypes.data)
        for j in range(some):
            sign_indices(source + 64 * j, indices + 2 * ROWS * j)
            prefetch(signs[c] + octets * at + 64 * (j + _AHEAD * octets))
        indices += ROWS * used[c]


@numba.njit(nogil=True, cache=True)
def _scan(
    signs: Any, outer: Any, high: Any, norms: Any, norm_min: float, widths: Any, used: Any, members: Any, live: Any,
    span: Any, block: int, kind: int, octets_used: Any, places: Any, tables: Any, limits: Any, probes: Any,
    parameters: Any, evidence: Any, cuts: Any, out: Any,
) -> tuple[int, int, int]:  # fmt: skip
    first, last = span
    count, mapped = probes.shape[1], members.shape[1] > 0
    ahead = count <= _FEW_PROBES
    indices, taken = aligned(ROWS * (used.sum() + 1)).reshape(-1, ROWS), aligned(64 * used.max() + 64).reshape(-1, 64)
    masks, space, alive = masks_apart(), aligned(probes.shape[3]), np.zeros(BLOCKS, np.uint64)
    room = ROWS * count
    some, rows, totals = np.empty(2 * room, np.int32), np.empty(2 * room, np.int32), np.empty(2 * room, np.float32)
    found, passed, waiting, end, least = 0, 0, 0, -(-last // 64), _least_dots(parameters[0], cuts, norm_min)
    while block < end and found + 2 * room <= out[0].size:
        blocks = min(BLOCKS, end - block)
        alive[blocks:] = 0
        for b in range(blocks):
            alive[b] = _alive(live, block + b, first, last)
            if alive[b]:
                _take_block(
                    signs,
                    outer,
                    widths,
                    used,
                    members,
                    block + b,
                    kind,
                    octets_used,
                    taken,
                    int(indices.ctypes.data) + 64 * b,
                )
        for c in range(0 if ahead or mapped else widths.shape[0]):
            begin, octets = 64 * (block + blocks), 64 * min(BLOCKS, end - block - blocks) * widths[c]
            for at in range(0, octets, _LINE):  # most rows are compared with some probe
                prefetch(high[c] + widths[c] * begin + at)
        reached = survivors(indices, alive, places, tables, limits, 64 * block, masks, some[waiting:], rows[waiting:])
        passed += reached
        compared = waiting + reached
        if ahead:  # while these rows are fetched, those of the blocks before are compared
            _prefetch_rows(rows[waiting : waiting + reached], high, norms, widths, members)
            compared = waiting
        found = _compare(
            some[:compared], rows[:compared], high, norms, widths, members, probes, parameters, evidence, cuts, least,
            out, found, totals, space,
        )  # fmt: skip
        waiting += reached - compared
        for i in range(waiting):
            some[i], rows[i] = some[compared + i], rows[compared + i]
        block += blocks
    found = _compare(
        some[:waiting], rows[:waiting], high, norms, widths, members, probes, parameters, evidence, cuts, least,
        out, found, totals, space,
    )  # fmt: skip
    return found, block, passed


@numba.njit(nogil=True, cache=True)
def _collect(dots: Any, first: int, cell: int, norm: float, parameters: Any, cuts: Any, out: Any, found: int) -> int:
    """Writes the pairs of a row and the probes from `first` on that reach the cuts."""
    which, cells, values = out
    for i in range(dots.size):
        p = first + i
        value = parameters[0, p, 0] * (np.float32(dots[i]) - parameters[0, p, 1]) / norm
        if value >= cuts[p]:
            which[found], cells[found], values[found] = p, cell, value
            found += 1
    return found


@numba.njit(nogil=True, cache=True)
def _scan_all(
    high: Any, norms: Any, widths: Any, live: Any, span: Any, block: int, probes: Any, parameters: Any, cuts: Any,
    out: Any,
) -> tuple[int, int, int]:  # fmt: skip
    """As `_scan`, of one column without tables."""
    first, last = span
    which = out[0]
    count, half, end = probes.shape[1], probes.shape[3], -(-last // 64)
    octets, space = -(-widths[0] // ROW_ALIGNMENT) * ROW_ALIGNMENT, aligned(half)
    dots, at_probes, whole = np.empty(TOGETHER, np.int32), probes.ctypes.data, count // TOGETHER * TOGETHER
    at_dots, at_space, found, passed = dots.ctypes.data, np.int64(space.ctypes.data), 0, 0
    limits = np.empty((2, count), np.float32)  # a division takes longer than the comparison of a row
    limits[0], limits[1] = parameters[0, :, 1] - np.float32(0.1), cuts / parameters[0, :, 0]
    limits[1] -= np.abs(limits[1]) * np.float32(1e-6)  # what floats lose
    at_limits, apart = limits.ctypes.data, 4 * count
    while block < end and found + 64 * count <= which.size:
        alive = _alive(live, block, first, last)
        for r in range(64 if alive else 0):
            if not (alive >> np.uint64(r)) & np.uint64(1):
                continue
            cell = 64 * block + r
            norm, passed = f32_at(norms[0] + 4 * cell), passed + count
            row = high[0] + widths[0] * cell
            if octets != widths[0]:
                copy(row, at_space, widths[0])
                row = at_space
            for p in range(0, whole, TOGETHER):
                at = at_limits + 4 * p
                if _row_dots(row, at_probes + 2 * half * p, octets, half, at_dots, at, apart, norm):
                    found = _collect(dots, p, cell, norm, parameters, cuts, out, found)
            for p in range(whole, count):
                dots[0] = _row_dot(row, at_probes + 2 * half * p, octets, half)
                found = _collect(dots[:1], p, cell, norm, parameters, cuts, out, found)
        block += 1
    space[:1], limits[:, :1] = 0, 0  # else numba frees the arrays before they are read: it counts uses by name
    return found, block, passed


def make_scans(instructions: str) -> tuple[Any, Any]:
    """`_scan` and `_scan_all`, compiled for another processor."""
    dots = {"_row_dot": make_row_dot(instructions), "_row_dots": make_row_dots(instructions)}
    lookups = numba.njit(rebound(survivors, _tile=tile_for(instructions)), nogil=True)
    add_values = numba.njit(rebound(_add_values, **dots), nogil=True, error_model="numpy")
    compare_one = numba.njit(rebound(_compare_one, **dots), nogil=True, error_model="numpy")
    compare = numba.njit(rebound(_compare, _add_values=add_values, _compare_one=compare_one), nogil=True)
    return (
        numba.njit(rebound(_scan, survivors=lookups, _compare=compare), nogil=True),
        numba.njit(rebound(_scan_all, **dots), nogil=True),
    )


@dataclass(frozen=True)
class ScanProbes:
    """Probes as the kernel takes them, for one column or several.

    codes: int8 (columns, q, 2, octets), as `make_row_dot` wants them; parameters: float32 (columns, q, 2): a similarity
    is the first times (dot product - the second) over the row's norm. evidence: float32 (columns, n), what a similarity
    from -1 to 1 counts for, whose sum is compared with a cut; (columns, 0) for a single column whose similarity itself
    is.

    tables: uint8 (q, m, 16), m a multiple of SUMS_PER_ROW, or 0 where a single column's rows are all compared; places:
    int32 (q, m), which numbers each table looks at: of CLASSES table i the numbers 2 i and 2 i + 1 of a single column,
    of SIGNS those that `used` tables of each column look at, one after another; limits: uint8 (q,); used: of each
    column, how many of these there are. kind: of the tables.
    """

    codes: NDArray[np.int8]
    parameters: Float32
    evidence: Float32
    tables: NDArray[np.uint8]
    places: NDArray[np.int32]
    limits: NDArray[np.uint8]
    used: Int64
    kind: TableKind

    def __len__(self) -> int:
        return int(self.codes.shape[1])

    def pieces(self, most: int) -> Iterator[tuple[slice, ScanProbes]]:
        """Batches of at most `most` probes."""
        for low in range(0, len(self), most):
            some = slice(low, min(low + most, len(self)))
            codes, parameters = (
                np.ascontiguousarray(self.codes[:, some]),
                np.ascontiguousarray(self.parameters[:, some]),
            )
            tables, places, limits = self.tables[some], self.places[some], self.limits[some]
            yield some, replace(self, codes=codes, parameters=parameters, tables=tables, places=places, limits=limits)

    @property
    def room(self) -> int:
        """How many hits one call must have room for."""
        return 2 * ROWS * len(self)


def scan(
    columns: Sequence[ScannedRows],
    members: NDArray[np.int32] | None,
    live: NDArray[np.uint64],
    span: tuple[int, int],
    start: int,
    probes: ScanProbes,
    cuts: Float32,
    out: tuple[NDArray[np.int32], Int64, Float32],
) -> tuple[int, int, int]:
    """Finds the pairs of a probe and a row whose sum of table entries reaches the probe's limit and whose value, by
    high nibbles, reaches its cut-off.

    columns: what is stored of each; members: int32 (columns, n), the cells of n rows in each column, or None where rows
    and cells are the same; live: bit r of block b is set where row 64 b + r counts, or empty where all do; span:
    [first, last) rows that count; start: the block to begin with; cuts: float32 (q,). Writes probe, row and value of
    each pair into `out`, whose arrays have room for probes.room at least. Returns how many, the block to go on with,
    all done when it is ceil(last / 64), and how many pairs were compared.
    """
    signs, outer, high, norms = (
        np.array([array.ctypes.data for array in arrays], np.int64)
        for arrays in zip(*(column[:4] for column in columns), strict=True)
    )
    widths = np.array([column.high.shape[1] for column in columns], np.int64)
    compared = (probes.codes, probes.parameters)
    if not probes.tables.shape[1]:
        number, block, passed = _scan_all(high, norms, widths, live, span, start, *compared, cuts, out)
        return number, block, passed
    if members is None:
        members = np.zeros((len(columns), 0), np.int32)
    octets_used = np.unique(probes.places >> 2) if probes.kind == TableKind.CLASSES else np.zeros(0, np.int32)
    number, block, passed = _scan(
        signs, outer, high, norms, float(columns[0].norm_min), widths, probes.used, members, live, span, start,
        int(probes.kind), octets_used, probes.places, probes.tables, probes.limits, *compared, probes.evidence, cuts,
        out,
    )  # fmt: skip
    return number, block, passed
