"""The scan kernel: table look-ups exclude most rows, and high nibbles estimate the similarity of the other rows.

Owns the scan of rows for probes. Never makes tables or limits (`tables.py`). tests/search/test_scan.py has a reference in numpy.

A few blocks of 64 rows are looked up in the probes' tables (`table_tile.py`). Rows whose sum reaches the probe's limit are compared by their high
nibbles. For few probes the high nibbles are prefetched, and compared after the look-ups of the next blocks. Without tables each row is
compared with each probe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from biodedup.gallery.segments.part import ScannedRows
from biodedup.search.native.dot_kernel import (
    TOGETHER,
    make_pair_dots,
    make_row_dot,
    make_row_dots,
    prefetch,
    rebound,
)
from biodedup.search.native.table_tile import (
    BLOCKS,
    LISTED,
    MASKS,
    ROWS,
    SUMS_PER_ROW,
    TableKind,
    Tables,
    aligned,
    class_indices,
    f32_at,
    i32_at,
    i64_at,
    sign_indices,
    sign_survivors,
    store,
    survivors,
    tile_for,
    u8_at,
    u64_at,
)
from biodedup.values import Float32

_LINE = 64  # bytes of a cache line
_GATHERED = 1024  # pairs that are gathered before they are compared: their place stays in the cache
_AHEAD = 32  # pairs from a prefetch to the comparison: about as many lines as a core can wait for

Int64 = NDArray[np.int64]

_row_dot, _row_dots, _pair_dots = make_row_dot(), make_row_dots(), make_pair_dots()


# The kernels' arguments are numbers and addresses, as in C. For an array numba would pass seven values, and count references.


class StoredColumns(NamedTuple):
    """The stored rows. signs, outer, high, norms: addresses of int64 (columns,), which hold the addresses of the arrays of each column's
    `ScannedRows`. widths: address of int64 (columns,), the bytes of a row's high nibbles. members: address of int32 (columns, rows), the cells
    of the rows in each column, or 0 if row i is cell i."""

    columns: int
    signs: int
    outer: int
    high: int
    norms: int
    widths: int
    members: int
    rows: int


class Span(NamedTuple):
    """The rows that count: rows [first, last) whose bit is set in `live`, an address: bit r of block b is for row 64 b + r. If it is 0, all rows
    count."""

    live: int
    first: int
    last: int


class KernelProbes(NamedTuple):
    """The probes, as addresses of the fields of `ScanProbes`. octets_used: int32 (octets,), the octets of classes that tables use. index_rows,
    signs_most: the sum and the maximum of `used`. in_order: as in `ScanProbes`. half: half the length of a code. steps: length of an evidence table. bounds: float32 (2, q):
    a row whose dot product is below bounds[0] + its norm x bounds[1] does not reach the probe's cut-off."""

    kind: int
    octets_used: int
    octets: int
    used: int
    index_rows: int
    signs_most: int
    in_order: int
    codes: int
    half: int
    parameters: int
    evidence: int
    steps: int
    cuts: int
    bounds: int


class HitBuffers(NamedTuple):
    """Addresses of the output arrays for hits, int32, int64 and float32. room: their length."""

    which: int
    cells: int
    values: int
    room: int


class _Pairs(NamedTuple):
    """Addresses of the pairs of a probe and a row to compare (which, rows: int32), and of working memory (cells, dots: int32; totals: float32).
    The entries after the last pair must be valid pairs, too."""

    which: int
    rows: int
    cells: int
    dots: int
    totals: int


@numba.njit(nogil=True, cache=True, forceinline=True)
def _alive(span: Any, block: int) -> Any:
    """The rows of a block that count, a bit for each."""
    alive = u64_at(span.live + 8 * block) if span.live else ~np.uint64(0)
    low, high = 64 * block, 64 * block + 64
    if span.first > low:
        alive &= ~np.uint64(0) << np.uint64(span.first - low) if span.first < high else np.uint64(0)
    if span.last < high:
        alive &= ~np.uint64(0) >> np.uint64(high - span.last) if span.last > low else np.uint64(0)
    return alive


@numba.njit(nogil=True, cache=True, forceinline=True)
def _cell(stored: Any, column: int, row: Any) -> Any:
    """The cell of a row in a column."""
    if stored.members:
        return np.int64(i32_at(stored.members + 4 * (stored.rows * column + row)))
    return np.int64(row)


@numba.njit(nogil=True, cache=True, forceinline=True)
def _write(out: Any, at: int, which: Any, cell: Any, value: Any) -> None:
    store(out.which + 4 * at, np.int32(which))
    store(out.cells + 8 * at, np.int64(cell))
    store(out.values + 4 * at, np.float32(value))


@numba.njit(nogil=True, cache=True, forceinline=True)
def _similarity(dot: Any, norm: Any, parameters: int) -> Any:
    """The estimate from a dot product. parameters: the address of the probe's two parameters."""
    return f32_at(parameters) * (np.float32(dot) - f32_at(parameters + 4)) / norm


@numba.njit(nogil=True, cache=True, forceinline=True)
def _may_reach(asked: Any, probes: int, p: Any, dot: Any, norm: Any) -> Any:
    """False if a row does not reach the cut-off of probe p. It is faster than `_similarity`, because it needs no division."""
    first = asked.bounds + 4 * p
    return np.float32(dot) >= f32_at(first) + f32_at(first + 4 * probes) * norm


@numba.njit(nogil=True, cache=True, forceinline=True)
def _prefetch_row(high: int, norms: int, width: int, cell: Any) -> None:
    prefetch(norms + 4 * cell)
    for at in range(0, width, _LINE):
        prefetch(high + width * cell + at)


@numba.njit(nogil=True, cache=True, forceinline=True)
def _compute_dots(stored: Any, asked: Any, pairs: Any, number: int, cells: Any, place: tuple[int, int]) -> None:
    """Computes the dot products of the first pairs, and of up to three more pairs. place: (column, number of probes)."""
    column, probes = place
    high, width = i64_at(stored.high + 8 * column), i64_at(stored.widths + 8 * column)
    norms, codes = i64_at(stored.norms + 8 * column), asked.codes + 2 * asked.half * probes * column
    for i in range(0, 4 * min(_AHEAD, number), 4):
        _prefetch_row(high, norms, width, np.int64(i32_at(cells + i)))
    for i in range(0, 4 * number, 4 * TOGETHER):
        for j in range(i + 4 * _AHEAD, i + 4 * (_AHEAD + TOGETHER), 4):
            _prefetch_row(high, norms, width, np.int64(i32_at(cells + j)))
        _pair_dots(pairs.which + i, cells + i, high, codes, width, asked.half, pairs.dots + i)


@numba.njit(nogil=True, cache=True, forceinline=True, error_model="numpy")
def _add_values(stored: Any, asked: Any, pairs: Any, number: int, place: tuple[int, int]) -> None:
    """Adds the similarity, or its evidence, by a column's high nibbles to the totals of the first pairs. place: as in `_compute_dots`."""
    column, probes = place
    for i in range(number + TOGETHER):
        row = np.int64(i32_at(pairs.rows + 4 * i))
        store(pairs.cells + 4 * i, np.int32(_cell(stored, column, row)))
    _compute_dots(stored, asked, pairs, number, pairs.cells, place)
    parameters, evidence = asked.parameters + 8 * probes * column, asked.evidence + 4 * asked.steps * column
    norms, last = i64_at(stored.norms + 8 * column), asked.steps - 1
    scale = np.float32(0.5 * last)
    for i in range(0, 4 * number, 4):
        p, cell = np.int64(i32_at(pairs.which + i)), np.int64(i32_at(pairs.cells + i))
        value = _similarity(i32_at(pairs.dots + i), f32_at(norms + 4 * cell), parameters + 8 * p)
        if last >= 0:
            step = np.int64(np.rint((value + np.float32(1)) * scale))
            value = f32_at(evidence + 4 * min(max(step, 0), last))
        store(pairs.totals + i, np.float32(f32_at(pairs.totals + i) + value))


@numba.njit(nogil=True, cache=True, forceinline=True, error_model="numpy")
def _compare_one(stored: Any, asked: Any, pairs: Any, number: int, out: Any, written: tuple[int, int]) -> Any:
    """As `_compare`, for similarities in a single column."""
    probes, found = written
    _compute_dots(stored, asked, pairs, number, pairs.rows, (0, probes))
    norms = i64_at(stored.norms)
    for i in range(0, 4 * number, 4):
        p, dot, cell = np.int64(i32_at(pairs.which + i)), i32_at(pairs.dots + i), np.int64(i32_at(pairs.rows + i))
        norm = f32_at(norms + 4 * cell)
        if _may_reach(asked, probes, p, dot, norm):
            value = _similarity(dot, norm, asked.parameters + 8 * p)
            if value >= f32_at(asked.cuts + 4 * p):
                _write(out, found, p, cell, value)
                found += 1
    return found


@numba.njit(nogil=True, cache=True)
def _compare(stored: Any, asked: Any, pairs: Any, number: int, out: Any, written: tuple[int, int]) -> Any:
    """Compares the first pairs by the high nibbles of all columns, and writes the pairs that reach the cut-offs. written: (number of probes,
    number of hits in `out`). Returns the new number of hits."""
    if stored.columns == 1 and asked.steps == 0 and stored.members == 0:
        return _compare_one(stored, asked, pairs, number, out, written)
    probes, found = written
    for i in range(number):
        store(pairs.totals + 4 * i, np.float32(0))
    for c in range(stored.columns):
        _add_values(stored, asked, pairs, number, (c, probes))
    for i in range(0, 4 * number, 4):
        p, total = np.int64(i32_at(pairs.which + i)), f32_at(pairs.totals + i)
        if total >= f32_at(asked.cuts + 4 * p):
            _write(out, found, p, np.int64(i32_at(pairs.rows + i)), total)
            found += 1
    return found


@numba.njit(nogil=True, cache=True, forceinline=True)
def _take_signs(stored: Any, column: int, block: int, some: int, taken: int) -> None:
    """Gathers the signs of the rows of a block from their cells. some: number of octets. taken: uint8 *, (some, 64), the output."""
    octets, plane = i64_at(stored.widths + 8 * column) >> 2, i64_at(stored.signs + 8 * column)
    for r in range(min(64, stored.rows - 64 * block)):
        cell = _cell(stored, column, 64 * block + r)
        at = plane + 64 * octets * (cell >> 6) + (cell & 63)
        for j in range(some):
            store(taken + 64 * j + r, u8_at(at + 64 * j))


@numba.njit(nogil=True, cache=True, forceinline=True)
def _take_block(stored: Any, asked: Any, block: int, taken: int, indices: int) -> None:
    """Writes the table indices of a block's rows, for the tables of all columns in order, ROWS bytes for each table. indices: the address of
    the first."""
    for c in range(stored.columns):
        octets = i64_at(stored.widths + 8 * c) >> 2
        start = 64 * octets * block
        signs, outer = i64_at(stored.signs + 8 * c) + start, i64_at(stored.outer + 8 * c) + start
        if asked.kind == TableKind.CLASSES:
            for i in range(asked.octets):
                octet = np.int64(i32_at(asked.octets_used + 4 * i))
                class_indices(signs + 64 * octet, outer + 64 * octet, indices + 4 * ROWS * octet)
            continue
        used = i64_at(asked.used + 8 * c)
        some, source = (used + 1) >> 1, signs
        if stored.members:
            _take_signs(stored, c, block, some, taken)
            source = taken
        for j in range(some):
            sign_indices(source + 64 * j, indices + 2 * ROWS * j)
        indices += ROWS * used


@numba.njit(nogil=True, cache=True)
def _scan(stored: Any, asked: Any, tables: Any, span: Any, block: int, out: Any) -> tuple[int, int, int]:
    end, probes = -(-span.last // 64), tables.probes
    room = _GATHERED + ROWS * probes
    space = aligned(ROWS * (asked.index_rows + 1) + 64 * (asked.signs_most + 1) + 64 + MASKS)
    indices: Any = np.int64(space.ctypes.data)
    taken = indices + ROWS * (asked.index_rows + 1)
    masks = taken + 64 * (asked.signs_most + 1) + 64
    size = 4 * (room + LISTED)
    for_pairs = np.zeros(5 * size, np.uint8)
    first: Any = np.int64(for_pairs.ctypes.data)
    pairs = _Pairs(first, first + size, first + 2 * size, first + 3 * size, first + 4 * size)
    found, passed, alone = 0, 0, asked.in_order and not stored.members
    octets, signs = i64_at(stored.widths) >> 2, i64_at(stored.signs)
    while block < end and found + room <= out.room:
        gathered = 0
        while block < end and gathered < _GATHERED:
            to = 4 * gathered
            if alone:  # without a list of indices
                of_block, alive = signs + 64 * octets * block, _alive(span, block)
                gathered += sign_survivors(of_block, alive, tables, 64 * block, pairs.which + to, pairs.rows + to)
                block += 1
                continue
            blocks = min(BLOCKS, end - block)
            for b in range(BLOCKS):
                alive = _alive(span, block + b) if b < blocks else np.uint64(0)
                store(masks + 8 * (BLOCKS + b), alive)
                if alive:
                    _take_block(stored, asked, block + b, taken, indices + 64 * b)
            gathered += survivors(indices, masks, tables, 64 * block, pairs.which + to, pairs.rows + to)
            block += blocks
        passed += gathered
        found = _compare(stored, asked, pairs, gathered, out, (probes, found))
    space[:1], for_pairs[:1] = 0, 0  # else numba frees them before they are read: it counts uses by name
    return found, block, passed


@numba.njit(nogil=True, cache=True)
def _collect(asked: Any, dots: Any, probes: tuple[int, int], row: tuple[int, Any], out: Any, found: int) -> Any:
    """Writes the hits of a row with the probes [first, last). dots: int32 *. row: (its cell, its norm)."""
    for p in range(*probes):
        value = _similarity(i32_at(dots + 4 * (p - probes[0])), row[1], asked.parameters + 8 * p)
        if value >= f32_at(asked.cuts + 4 * p):
            _write(out, found, p, row[0], value)
            found += 1
    return found


@numba.njit(nogil=True, cache=True)
def _scan_all(stored: Any, asked: Any, tables: Any, span: Any, block: int, out: Any) -> tuple[int, int, int]:
    """As `_scan`, for a single column without tables."""
    end, probes, half = -(-span.last // 64), tables.probes, asked.half
    high, norms, width = i64_at(stored.high), i64_at(stored.norms), i64_at(stored.widths)
    dots, whole, apart = np.empty(TOGETHER, np.int32), probes // TOGETHER * TOGETHER, 4 * probes
    at_dots, found, passed = np.int64(dots.ctypes.data), 0, 0
    while block < end and found + 64 * probes <= out.room:
        alive = _alive(span, block)
        for r in range(64 if alive else 0):
            if not (alive >> np.uint64(r)) & np.uint64(1):
                continue
            cell = 64 * block + r
            norm, row, passed = f32_at(norms + 4 * cell), high + width * cell, passed + probes
            for p in range(0, whole, TOGETHER):
                at = asked.bounds + 4 * p
                if _row_dots(row, asked.codes + 2 * half * p, width, half, at_dots, at, apart, norm):
                    found = _collect(asked, at_dots, (p, p + TOGETHER), (cell, norm), out, found)
            for p in range(whole, probes):
                store(at_dots, np.int32(_row_dot(row, asked.codes + 2 * half * p, width, half)))
                found = _collect(asked, at_dots, (p, p + 1), (cell, norm), out, found)
        block += 1
    dots[:1] = 0  # else numba frees it before it is read: it counts uses by name
    return found, block, passed


def make_scans(instructions: str) -> tuple[Any, Any]:
    """`_scan` and `_scan_all`, compiled for another processor."""
    inline: dict[str, Any] = {"nogil": True, "forceinline": True}
    tile = tile_for(instructions)
    lookups, of_signs = (numba.njit(rebound(f, **tile), nogil=True) for f in (survivors, sign_survivors))
    compute_dots = numba.njit(rebound(_compute_dots, _pair_dots=make_pair_dots(instructions)), **inline)
    add_values = numba.njit(rebound(_add_values, _compute_dots=compute_dots), **inline, error_model="numpy")
    compare_one = numba.njit(rebound(_compare_one, _compute_dots=compute_dots), **inline, error_model="numpy")
    compare = numba.njit(rebound(_compare, _add_values=add_values, _compare_one=compare_one), nogil=True)
    dots = {"_row_dot": make_row_dot(instructions), "_row_dots": make_row_dots(instructions)}
    return (
        numba.njit(rebound(_scan, survivors=lookups, sign_survivors=of_signs, _compare=compare), nogil=True),
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

    @cached_property
    def _limits(self) -> tuple[Float32, Float32, NDArray[np.bool_]]:
        """First bounds, scales, and whether these are above 0, float32 (q,): of one column."""
        scale, offset = self.parameters[0].T
        above = scale > 0
        return np.where(above, offset - np.float32(0.1), np.float32(-np.inf)), np.where(above, scale, 1), above

    def bounds(self, cuts: Float32) -> Float32:
        """Of dot products that may reach the cuts of one column, float32 (2, q): as in `KernelProbes`."""
        first, scale, above = self._limits
        slope = np.where(above, cuts / scale, np.float32(0))
        return np.stack([first, slope - np.abs(slope) * np.float32(1e-6)]).astype(np.float32)  # what floats lose

    @cached_property
    def octets_used(self) -> NDArray[np.int32]:
        """The octets of classes that some table looks at."""
        return np.unique(self.places >> 2) if self.kind == TableKind.CLASSES else np.zeros(0, np.int32)

    @cached_property
    def in_order(self) -> bool:
        """Whether this is one probe whose tables look at whole octets of the signs of one column, one after another."""
        some = self.tables.shape[1]
        one = len(self) == len(self.used) == 1 and self.kind == TableKind.SIGNS and some % (2 * SUMS_PER_ROW) == 0
        return one and 0 < some and np.array_equal(self.places[0], np.arange(some))

    @cached_property
    def asked(self) -> KernelProbes:
        """For the kernels, without cuts."""
        return KernelProbes(
            kind=int(self.kind),
            octets_used=_address(self.octets_used),
            octets=len(self.octets_used),
            used=_address(self.used),
            index_rows=int(self.used.sum()),
            signs_most=int(self.used.max()),
            in_order=int(self.in_order),
            codes=_address(self.codes),
            half=self.codes.shape[3],
            parameters=_address(self.parameters),
            evidence=_address(self.evidence),
            steps=self.evidence.shape[1],
            cuts=0,
            bounds=0,
        )

    @cached_property
    def for_look_ups(self) -> Tables:
        """For the kernels."""
        arrays = (self.places, self.tables, self.limits)
        return Tables(len(self), self.tables.shape[1], *(_address(array) for array in arrays))

    @property
    def room(self) -> int:
        """How many hits one call must have room for."""
        return _GATHERED + ROWS * len(self)


def scan(
    columns: Sequence[ScannedRows],
    members: NDArray[np.int32] | None,
    live: NDArray[np.uint64],
    span: tuple[int, int],
    start: int,
    probes: ScanProbes,
    cuts: Float32,
    out: tuple[NDArray[np.int32], Int64, Float32],
    kernels: tuple[Any, Any] = (_scan, _scan_all),
) -> tuple[int, int, int]:
    """Finds the pairs of a probe and a row whose sum of table entries reaches the probe's limit and whose value, by
    high nibbles, reaches its cut-off.

    columns: what is stored of each; members: int32 (columns, n), the cells of n rows in each column, or None where rows
    and cells are the same; live: bit r of block b is set where row 64 b + r counts, or empty where all do; span:
    [first, last) rows that count; start: the block to begin with; cuts: float32 (q,). Writes probe, row and value of
    each pair into `out`, whose arrays have room for probes.room at least. kernels: those of another processor, from
    `make_scans`. Returns how many, the block to go on with, all done when it is ceil(last / 64), and how many pairs were
    compared.
    """
    assert len(out[0]) >= probes.room, "a call with less room would never go on"
    given = [
        np.array([array.ctypes.data for array in arrays], np.int64)
        for arrays in zip(*(c[:4] for c in columns), strict=True)
    ]
    given.append(np.array([column.high.shape[1] for column in columns], np.int64))
    rows = (0, 0) if members is None else (_address(members), members.shape[1])
    stored = StoredColumns(len(columns), *map(_address, given), *rows)
    bounds = probes.bounds(cuts)
    asked, tables = probes.asked._replace(cuts=_address(cuts), bounds=_address(bounds)), probes.for_look_ups
    where = Span(_address(live) if live.size else 0, *span)
    to = HitBuffers(_address(out[0]), _address(out[1]), _address(out[2]), len(out[0]))
    compiled = kernels[0] if tables.per_probe else kernels[1]
    number, block, passed = compiled(stored, asked, tables, where, start, to)
    return number, block, passed


def _address(array: NDArray[Any]) -> int:
    assert array.flags.c_contiguous, "kernels read arrays from their first byte on, without gaps"
    return int(array.ctypes.data)
