"""The inner loop over signs: what the signs of rows' numbers say of them, and dot products with the few that this does not rule out.

Owns the arithmetic. Never knows what a sum, a limit or an evidence stands for (`signs.py`). Its oracles in numpy are in
tests/test_scan.py.

A block of 64 rows is taken out of its plane, of every column that counts. The signs of four numbers, or of two numbers which of four
classes each is in, are four bits, which choose one of sixteen entries of a probe's table (the byte shuffle of FAISS's fast-scan kernel:
André, Kermarrec and Le Scouarnec, VLDB 2015). Tables are made so that no sum of a quarter of them overflows a byte; thus 64 rows cost two
instructions a table and vector, half of what sums of 16 bits take. Rows whose sum reaches the probe's limit are collected, and
compared by their four-bit numbers while the block is still in the first-level cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from biodedup.gallery.codes import Codes
from biodedup.search.kernel import INSTRUCTIONS, make_row_dot, rebound, splat
from biodedup.values import Float32

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)

WIDE = 4 if INSTRUCTIONS == "avx2" else 8
"""Probes whose tables a block meets at the same time."""
QUARTERS = 4
"""Sums of a byte that are added up apart, and then averaged: the finer they are rounded."""
UNROLLED = 2
"""Tables of one turn of the innermost loop."""
CLASSES = ((0, 5), (5, 8), (8, 11), (11, 16))
"""Upper halves of each class, first and past the last."""
PADDED = 64
"""A row's bytes, and a probe's, are filled up to a multiple of this."""
_TOGETHER = 4  # blocks that a probe's tables meet while they are in the first-level cache
_LAID_OUT_FROM = 24  # pairs a block to compare; from so many on all its rows are laid out one after another

_CHUNK = 256
"""Members whose tables lie side by side, in the second-level cache."""

Int64 = NDArray[np.int64]


def _make_tile(instructions: str) -> Any:
    """An intrinsic for numba, tile(signs, tables, count, seeds, limits, masks), all integers or addresses:

    signs: uint8 *, (count, 64), 64-byte aligned, 0 to 15; tables: uint8 *, (WIDE, count, 16); count: a multiple of QUARTERS *
    UNROLLED; seeds: uint8 *, (64,); limits: uint8 *, (WIDE,); masks: uint64 *, (WIDE,): bit r is set where row r's mean reaches the
    limit. Of each quarter of the tables the sum over i of tables[i, signs[i, r]] is taken, of the first one with seeds[r]; then the
    mean, rounded up, of two means, rounded up.
    """
    lanes = 32 if instructions == "avx2" else 64
    name = "avx2.pshuf.b" if instructions == "avx2" else "avx512.pshuf.b.512"
    octets, wider, sixteen = (ir.VectorType(kind, n) for kind, n in ((_I8, lanes), (ir.IntType(16), lanes), (_I8, 16)))
    vectors = 64 // lanes

    def mean(builder: Any, one: Any, other: Any) -> Any:
        """Rounded up; an instruction of its own where the processor has one."""
        both = builder.add(builder.zext(one, wider), builder.zext(other, wider))
        more = builder.add(both, splat(builder, ir.Constant(ir.IntType(16), 1), lanes))
        return builder.trunc(builder.lshr(more, splat(builder, ir.Constant(ir.IntType(16), 1), lanes)), octets)

    def summed(
        builder: Any, signs: Any, tables: Any, count: Any, first: Any, end: Any, begin: list[Any]
    ) -> list[list[Any]]:
        """The sums over tables [first, end), which begin with what is given for each vector."""
        shuffle = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(octets, [octets] * 2), f"llvm.x86.{name}"
        )
        before = builder.block
        loop, after = builder.append_basic_block("table"), builder.append_basic_block("quarter")
        builder.branch(loop)
        builder.position_at_end(loop)
        number = builder.phi(_I64)
        sums = [[builder.phi(octets) for _ in range(vectors)] for _ in range(WIDE)]
        grown: list[list[Any]] = [list(mine) for mine in sums]
        for step in range(UNROLLED):
            at = builder.add(number, ir.Constant(_I64, step))
            rows = []
            for v in range(vectors):
                some = builder.load(
                    builder.gep(signs, [builder.add(builder.mul(at, ir.Constant(_I64, vectors)), ir.Constant(_I64, v))])
                )
                some.align = lanes
                rows.append(some)
            for p, mine in enumerate(grown):
                entry = builder.load(builder.gep(tables, [builder.add(builder.mul(count, ir.Constant(_I64, p)), at)]))
                entry.align = 16
                places = ir.Constant(ir.VectorType(_I32, lanes), [i % 16 for i in range(lanes)])
                entries = builder.shuffle_vector(entry, entry, places)
                grown[p] = [
                    builder.add(s, builder.call(shuffle, [entries, r])) for s, r in zip(mine, rows, strict=True)
                ]
        following = builder.add(number, ir.Constant(_I64, UNROLLED))
        number.add_incoming(first, before)
        number.add_incoming(following, loop)
        for mine, new in zip(sums, grown, strict=True):
            for phi, start, value in zip(mine, begin, new, strict=True):
                phi.add_incoming(start, before)
                phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, end), loop, after)
        builder.position_at_end(after)
        return grown

    @intrinsic
    def tile(_: Any, signs: Any, tables: Any, count: Any, seeds: Any, limits: Any, masks: Any) -> Any:
        signature = types.void(*[types.intp] * 6)

        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            signs, tables, seeds, limits, masks = (
                builder.inttoptr(args[at], kind.as_pointer())
                for at, kind in ((0, octets), (1, sixteen), (3, octets), (4, _I8), (5, _I64))
            )
            count = args[2]
            quarter = builder.udiv(count, ir.Constant(_I64, QUARTERS))
            edges = [builder.mul(quarter, ir.Constant(_I64, i)) for i in range(QUARTERS + 1)]
            begin = []
            for v in range(vectors):
                some = builder.load(builder.gep(seeds, [ir.Constant(_I64, v)]))
                some.align = 1
                begin.append(some)
            pairs: list[list[list[Any]]] = []
            for first in range(0, QUARTERS, 2):
                both = []
                for i in (first, first + 1):
                    both.append(summed(builder, signs, tables, count, edges[i], edges[i + 1], begin))
                    begin = [ir.Constant(octets, None)] * vectors
                pairs.append([[mean(builder, *v) for v in zip(*p, strict=True)] for p in zip(*both, strict=True)])
            for p, mine in enumerate(zip(*pairs, strict=True)):
                limit = splat(builder, builder.load(builder.gep(limits, [ir.Constant(_I64, p)])), lanes)
                mask: Any = ir.Constant(_I64, 0)
                for v, two in enumerate(zip(*mine, strict=True)):
                    near = builder.icmp_unsigned(">=", mean(builder, *two), limit)
                    reached = builder.bitcast(near, ir.IntType(lanes))
                    wide = reached if lanes == 64 else builder.zext(reached, _I64)
                    mask = builder.or_(mask, builder.shl(wide, ir.Constant(_I64, lanes * v)))
                builder.store(mask, builder.gep(masks, [ir.Constant(_I64, p)]))
            return context.get_dummy_value()

        return signature, generate

    return tile


def _u32_at_of(_: Any, address: Any) -> Any:
    """An intrinsic for numba: the uint32 at an address."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], ir.PointerType(_I32)))

    return types.uint32(types.int64), generate


def _u8_at_of(_: Any, address: Any) -> Any:
    """An intrinsic for numba: the uint8 at an address."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], ir.PointerType(_I8)))

    return types.uint8(types.int64), generate


def _f32_at_of(_: Any, address: Any) -> Any:
    """An intrinsic for numba: the float32 at an address."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], ir.PointerType(ir.FloatType())))

    return types.float32(types.int64), generate


def _set_u64_of(_: Any, address: Any, value: Any) -> Any:
    """An intrinsic for numba: stores a uint64 at an address."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], ir.PointerType(_I64)))
        return context.get_dummy_value()

    return types.void(types.int64, types.uint64), generate


def _lowest_bit_of(_: Any, mask: Any) -> Any:
    """An intrinsic for numba: the place of the lowest bit of a uint64 that is set; the mask is not 0."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


_u32_at: Any = intrinsic(_u32_at_of)
_u8_at: Any = intrinsic(_u8_at_of)
_f32_at: Any = intrinsic(_f32_at_of)
_set_u64: Any = intrinsic(_set_u64_of)
_lowest_bit: Any = intrinsic(_lowest_bit_of)


@numba.njit(nogil=True, cache=True)
def _plain_tile(signs: int, tables: int, count: int, seeds: int, limits: int, masks: int) -> None:
    quarter = count // QUARTERS
    for p in range(WIDE):
        mask = np.uint64(0)
        for r in range(64):
            sums = np.zeros(QUARTERS, np.int64)
            sums[0] = _u8_at(seeds + r)
            for i in range(count):
                sums[i // quarter] += _u8_at(tables + 16 * (count * p + i) + _u8_at(signs + 64 * i + r))
            mean = (((sums[0] + sums[1] + 1) >> 1) + ((sums[2] + sums[3] + 1) >> 1) + 1) >> 1
            if mean >= _u8_at(limits + p):
                mask |= np.uint64(1) << np.uint64(r)
        _set_u64(masks + 8 * p, mask)


@numba.njit(nogil=True, cache=True)
def _take(plane: int, cells: Any, taken: Any) -> None:
    """Of 64 cells, or fewer, their four-bit numbers: taken uint32 (halves, 64). plane: its address."""
    halves = taken.shape[0]
    for h in range(halves):
        for r in range(cells.shape[0]):
            taken[h, r] = _u32_at(plane + 256 * (halves * (cells[r] >> 6) + h) + 4 * (cells[r] & 63))


@numba.njit(nogil=True, cache=True)
def _take_block(plane: int, taken: Any) -> None:
    for h in range(taken.shape[0]):
        for r in range(64):
            taken[h, r] = _u32_at(plane + 256 * h + 4 * r)


@numba.njit(nogil=True, cache=True)
def _sign(taken: Any, signs: Any) -> None:
    """signs uint8 (tables, 64): of four numbers in a row, whether they are positive, the first one in the lowest bit."""
    # the product with the second has four bits that lie eight apart side by side in its top byte
    lowest, gathers = np.uint32(0x01010101), np.uint32(0x01020408)
    for i in range(signs.shape[0]):
        shift = np.uint32(3 + 4 * (i & 1))
        for r in range(64):
            signs[i, r] = np.uint8((((taken[i >> 1, r] >> shift) & lowest) * gathers) >> np.uint32(24))


@numba.njit(nogil=True, cache=True)
def _class(taken: Any, classes: Any) -> None:
    """classes uint8 (tables, 64), tables a multiple of 4: of two numbers that share a byte, in which of four classes they are (CLASSES),
    the lower half's in the lower two bits. All four bytes of a word at once."""
    low, one, three, four = np.uint32(0x0F0F0F0F), np.uint32(0x01010101), np.uint32(3), np.uint32(4)
    above_4, above_10 = np.uint32(0x0B0B0B0B), np.uint32(0x05050505)  # added, they carry into the fifth bit
    both = np.empty(64, np.uint32)
    for i in range(0, classes.shape[0], 4):
        for r in range(64):
            word = taken[i >> 2, r]
            lower, upper = word & low, (word >> four) & low
            lower = ((lower + above_4 >> four) & one) + ((lower >> three) & one) + ((lower + above_10 >> four) & one)
            upper = ((upper + above_4 >> four) & one) + ((upper >> three) & one) + ((upper + above_10 >> four) & one)
            both[r] = lower | upper << np.uint32(2)
        for t in range(4):
            shift = np.uint32(8 * t)
            for r in range(64):
                classes[i + t, r] = np.uint8(both[r] >> shift & np.uint32(15))


@numba.njit(nogil=True, cache=True)
def _lay_out(taken: Any, rows: Any) -> None:
    for r in range(64):
        for h in range(taken.shape[0]):
            rows[r, h] = taken[h, r]


@numba.njit(nogil=True, cache=True)
def _lay_out_some(taken: Any, column: int, lanes: Any, rows: Any) -> None:
    for i in range(lanes.shape[0]):
        b, r = lanes[i] >> 6, lanes[i] & 63
        for h in range(rows.shape[1]):
            rows[i, h] = taken[b, column, h, r]


_row_dot = make_row_dot()


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _add_values(
    some: Any,
    lanes: Any,
    rows: Any,
    by_lane: bool,
    lengths: Any,
    probes: Any,
    parameters: Any,
    evidence: Any,
    totals: Any,
) -> None:
    """Of one column, what pairs of a probe and a row are worth by its four-bit numbers."""
    at_rows, at_probes = rows.ctypes.data, probes.ctypes.data
    octets, last = probes.shape[2], evidence.shape[0] - 1
    for i in range(some.shape[0]):
        p, lane = some[i], lanes[i]
        at_row = at_rows + octets * (lane if by_lane else i)
        dot = np.float32(_row_dot(at_row, at_probes + 2 * octets * p, octets))
        value = parameters[p, 0] * (dot - parameters[p, 1]) / lengths[lane]
        if last >= 0:
            place = np.int64(np.rint((value + np.float32(1)) * np.float32(0.5 * last)))
            value = evidence[min(max(place, 0), last)]
        totals[i] += value


@numba.njit(nogil=True, cache=True)
def aligned(octets: int) -> Any:
    """Zeros, uint8 (octets,), 64-byte aligned."""
    space = np.zeros(octets + 64, np.uint8)
    start = -space.ctypes.data % 64
    return space[start : start + octets]


def _tile_for(instructions: str) -> Any:
    return _plain_tile if instructions == "plain" else _make_tile(instructions)


_tile = _tile_for(INSTRUCTIONS)


@numba.njit(nogil=True, cache=True)
def _survivors(
    signs: Any, seeds: Any, alive: Any, tables: Any, limits: Any, count: int, masks: Any, which: Any, lanes: Any
) -> int:
    """Probes and rows of some blocks that reach the limits, by probe. Returns how many."""
    found = 0
    number = tables.shape[1]
    at_signs, at_tables, at_seeds = signs.ctypes.data, tables.ctypes.data, seeds.ctypes.data
    at_limits, at_masks = limits.ctypes.data, masks.ctypes.data
    for p in range(0, tables.shape[0], WIDE):
        for b in range(alive.shape[0]):
            at_table, at_limit = at_tables + 16 * number * p, at_limits + p
            _tile(at_signs + 64 * number * b, at_table, number, at_seeds + 64 * b, at_limit, at_masks)
            for i in range(min(WIDE, count - p)):
                mask = masks[i] & alive[b]
                while mask:
                    which[found], lanes[found] = p + i, 64 * b + np.int32(_lowest_bit(mask))
                    mask &= mask - np.uint64(1)
                    found += 1
    return found


@numba.njit(nogil=True, cache=True)
def _alive(live: Any, block: int, first: int, last: int) -> Any:
    """Which rows of a block count."""
    alive = live[block] if live.size else ~np.uint64(0)
    low, high = 64 * block, 64 * block + 64
    if first > low:
        alive &= ~np.uint64(0) << np.uint64(first - low) if first < high else np.uint64(0)
    if last < high:
        alive &= ~np.uint64(0) >> np.uint64(high - last) if last > low else np.uint64(0)
    return alive


@numba.njit(nogil=True, cache=True)
def _scan(
    planes: Any,
    norms: Any,
    halves: Any,
    used: Any,
    members: Any,
    live: Any,
    first: int,
    last: int,
    block: int,
    tables: Any,
    limits: Any,
    bits: int,
    seeding: Any,
    probes: Any,
    parameters: Any,
    evidence: Any,
    cuts: Any,
    which: Any,
    cells: Any,
    values: Any,
) -> tuple[int, int, int]:
    columns, count = probes.shape[:2]
    number, octets = tables.shape[1], probes.shape[3]
    mapped = members.shape[1] > 0
    taken = aligned(_TOGETHER * columns * 64 * octets).view(np.uint32).reshape(_TOGETHER, columns, octets // 4, 64)
    signs = aligned(_TOGETHER * 64 * number).reshape(_TOGETHER, number, 64)
    rows = aligned(_TOGETHER * 64 * octets).view(np.uint32).reshape(_TOGETHER * 64, octets // 4)
    lengths, seeds = np.ones((columns, _TOGETHER * 64), np.float32), np.zeros(_TOGETHER * 64, np.uint8)
    masks = aligned(192).view(np.uint64)[8 : 8 + WIDE]  # away from what another thread writes
    alive = np.empty(_TOGETHER, np.uint64)
    room = 64 * _TOGETHER * count
    some, lanes, totals = np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.float32)
    found, passed, end = 0, 0, -(-last // 64)
    while block < end:
        if found + room > which.size:
            return found, block, passed
        blocks = min(_TOGETHER, end - block)
        for b in range(blocks):
            alive[b] = _alive(live, block + b, first, last)
            begin = 0
            for c in range(columns if alive[b] else 0):
                mine, at = taken[b, c, : halves[c]], 64 * (block + b)
                if mapped:
                    _take(planes[c], members[c, at : min(at + 64, members.shape[1])], mine)
                else:
                    _take_block(planes[c] + 256 * halves[c] * (block + b), mine)
                if bits == 1:
                    _sign(mine, signs[b, begin : begin + used[c]])
                else:
                    _class(mine, signs[b, begin : begin + used[c]])
                begin += used[c]
                for r in range(64):
                    cell = at + r
                    if mapped:
                        cell = members[c, min(cell, members.shape[1] - 1)]
                    lengths[c, 64 * b + r] = _f32_at(norms[c] + 4 * np.int64(cell))
        if seeding[1] != 0:
            for r in range(64 * blocks):
                seeds[r] = np.uint8(min(max(seeding[0] + seeding[1] * lengths[0, r], np.float32(0)), seeding[2]))
        reached = _survivors(signs, seeds, alive[:blocks], tables, limits, count, masks, some, lanes)
        passed += reached
        laid_out = reached >= _LAID_OUT_FROM * blocks
        totals[:reached] = 0
        for c in range(columns):
            if laid_out:
                for b in range(blocks):
                    _lay_out(taken[b, c], rows[64 * b :])
            else:
                _lay_out_some(taken, c, lanes[:reached], rows)
            _add_values(
                some[:reached],
                lanes[:reached],
                rows,
                laid_out,
                lengths[c],
                probes[c],
                parameters[c],
                evidence[c],
                totals,
            )
        for i in range(reached):
            if totals[i] >= cuts[some[i]]:
                which[found], cells[found], values[found] = some[i], 64 * block + lanes[i], totals[i]
                found += 1
        block += blocks
    return found, block, passed


def make_scan(instructions: str) -> Any:
    """`_scan` for another processor."""
    survivors = numba.njit(rebound(_survivors, _tile=_tile_for(instructions)), nogil=True)
    add_values = numba.njit(rebound(_add_values, _row_dot=make_row_dot(instructions)), nogil=True, error_model="numpy")
    return numba.njit(rebound(_scan, _survivors=survivors, _add_values=add_values), nogil=True)


@dataclass(frozen=True)
class SignedProbes:
    """Probes as the kernel takes them, of one column or several.

    tables: uint8 (q', t, 16), of all columns' tables one after another, t a multiple of QUARTERS * UNROLLED; limits: uint8 (q',),
    where q' is q, the number of probes, rounded up to a multiple of WIDE; used: of each column, how many of the t are its own. bits: 1, where a
    table is of the signs of four numbers, or 2, of the classes of two; seeding: float32 (3,): a row's sums begin with seeding[0] +
    seeding[1] times the norm of its first column, cut off at 0 and seeding[2]. codes: int8 (columns, q, 2, octets), as
    `make_row_dot` wants them; parameters: float32 (columns, q, 2): a similarity is the first times (dot product - the second)
    over the row's norm. evidence: float32 (columns, n), what a similarity from -1 to 1 counts for, whose sum is compared with a cut;
    (columns, 0) for a single column whose similarity itself is.
    """

    tables: NDArray[np.uint8]
    limits: NDArray[np.uint8]
    used: Int64
    bits: int
    seeding: Float32
    codes: NDArray[np.int8]
    parameters: Float32
    evidence: Float32

    def __len__(self) -> int:
        return int(self.codes.shape[1])

    @property
    def room(self) -> int:
        """That a call may fill."""
        return 64 * _TOGETHER * len(self)


def scan(
    columns: Sequence[tuple[Codes, Float32]],
    members: NDArray[np.int32] | None,
    live: NDArray[np.uint64],
    span: tuple[int, int],
    start: int,
    probes: SignedProbes,
    cuts: Float32,
    found: tuple[NDArray[np.int32], Int64, Float32],
) -> tuple[int, int, int]:
    """Pairs of a probe and a row whose signs reach the probe's limit and whose value, by its four-bit numbers, reaches its cut.

    columns: of each its plane (b, d / 8, 256), as `codes.planes` lays it, and norms (64 b,); members: int32 (columns, n), the cells of
    n rows in each column, or None where row and cell are the same; live: bit r of block b is set where row 64 b + r counts, or
    empty where all do; span: [first, last) rows that count; start: the block to begin with; cuts: float32 (q,). Writes probe, row and
    value of each pair into `found`, whose arrays have room for probes.room at least. Returns how many, the block to go on with,
    all done when it is ceil(last / 64), and how many pairs the signs let through.
    """
    planes = np.array([plane.ctypes.data for plane, _ in columns], np.int64)
    norms = np.array([norms.ctypes.data for _, norms in columns], np.int64)
    halves = np.array([plane.shape[1] for plane, _ in columns], np.int64)
    if members is None:
        members = np.zeros((len(columns), 0), np.int32)
    number, block, passed = _scan(
        planes,
        norms,
        halves,
        probes.used,
        members,
        live,
        *span,
        start,
        probes.tables,
        probes.limits,
        probes.bits,
        probes.seeding,
        probes.codes,
        probes.parameters,
        probes.evidence,
        cuts,
        *found,
    )
    return number, block, passed


# rows with one another ---------------------------------------------------------------------------------------------


@numba.njit(nogil=True, cache=True)
def _take_members(planes: Any, numbers: Any, cells: Any, taken: Any) -> None:
    """As `_take`, of cells in several planes."""
    halves = taken.shape[0]
    for r in range(cells.shape[0]):
        at = planes[numbers[r]] + 256 * halves * (cells[r] >> 6) + 4 * (cells[r] & 63)
        for h in range(halves):
            taken[h, r] = _u32_at(at + 256 * h)


@numba.njit(nogil=True, cache=True)
def _as_probe(row: Any, probe: Any) -> Any:
    """Of a row's upper halves, uint32 (halves,): twice their distances from the middle, int8 (2, octets), as `make_row_dot` wants a
    probe. Returns their sum."""
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
    """A probe's tables of signs, uint8 (t, 16), t >= number, from what `_as_probe` made. Returns step and middle, as `tables_of` does, of
    the probe's own units."""
    quarter = table.shape[0] // QUARTERS
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
def _meet(
    planes: Any,
    norms: Any,
    halves: int,
    numbers: Any,
    cells: Any,
    used: int,
    sign_cut: float,
    cut: float,
) -> tuple[Any, Any, int]:
    count, blocks = cells.shape[0], -(-cells.shape[0] // 64)
    octets = -(-4 * halves // PADDED) * PADDED
    number = -(-used // (QUARTERS * UNROLLED)) * QUARTERS * UNROLLED
    taken = aligned(64 * octets).view(np.uint32).reshape(octets // 4, 64)
    rows = aligned(64 * blocks * octets).view(np.uint32).reshape(64 * blocks, octets // 4)
    signs = aligned(blocks * 64 * number).reshape(blocks, number, 64)
    lengths, seeds = np.ones(64 * blocks, np.float32), np.zeros(64 * _TOGETHER, np.uint8)
    tables = aligned(_CHUNK * number * 16).reshape(_CHUNK, number, 16)
    probes = aligned(_CHUNK * 2 * octets).view(np.int8).reshape(_CHUNK, 2, octets)
    limits, sums = np.empty(_CHUNK, np.uint8), np.empty(_CHUNK, np.float32)
    masks = aligned(192).view(np.uint64)[8 : 8 + WIDE]  # away from what another thread writes
    alive = np.empty(_TOGETHER, np.uint64)
    room = 64 * _TOGETHER * _CHUNK
    which, lanes = np.empty(room, np.int32), np.empty(room, np.int32)
    one, other = np.empty(64, np.int32), np.empty(64, np.int32)
    found, passed = 0, 0
    root = np.float32(np.sqrt(4 * used))
    for b in range(blocks):
        some = slice(64 * b, min(64 * b + 64, count))
        _take_members(planes, numbers[some], cells[some], taken[:halves])
        _sign(taken, signs[b, :used])
        for r in range(some.stop - some.start):
            lengths[64 * b + r] = _f32_at(norms[numbers[64 * b + r]] + 4 * np.int64(cells[64 * b + r]))
            for h in range(halves):
                rows[64 * b + r, h] = taken[h, r]
    at_rows, at_probes = rows.ctypes.data, probes.ctypes.data
    for start in range(0, count, _CHUNK):
        together = min(_CHUNK, count - start)
        for i in range(together):
            sums[i] = np.float32(7.5) * _as_probe(rows[start + i, :halves], probes[i])
            step, middle = _tabulate(probes[i], used, tables[i])
            # an upper half is worth sixteen, of which `probes` counts two
            least = sign_cut * root * lengths[start + i] / np.float32(8)
            limit = np.ceil((least + middle) / (QUARTERS * step) + np.float32(0.5 - 1e-3))
            limits[i] = np.uint8(min(max(limit, 0), 255))
        for b in range(start // 64, blocks, _TOGETHER):
            here = min(_TOGETHER, blocks - b)
            for i in range(here):
                left = count - 64 * (b + i)
                alive[i] = ~np.uint64(0) if left >= 64 else (np.uint64(1) << np.uint64(left)) - np.uint64(1)
            reached = _survivors(
                signs[b : b + here],
                seeds,
                alive[:here],
                tables[: -(-together // WIDE) * WIDE],
                limits,
                together,
                masks,
                which,
                lanes,
            )
            for i in range(reached):
                p, row = which[i], 64 * b + lanes[i]
                if row <= start + p:  # itself, or compared already
                    continue
                passed += 1
                dot = np.float32(_row_dot(at_rows + octets * row, at_probes + 2 * octets * p, octets))
                if np.float32(128) * (dot - sums[p]) / (lengths[start + p] * lengths[row]) >= np.float32(cut):
                    if found == one.size:
                        one, other = _grown(one, 2 * found), _grown(other, 2 * found)
                    one[found], other[found] = start + p, row
                    found += 1
    return one[:found], other[:found], passed


@numba.njit(nogil=True, cache=True)
def _grown(some: Any, size: int) -> Any:
    wider = np.empty(size, some.dtype)
    wider[: some.size] = some
    return wider


def meet(
    columns: Sequence[tuple[Codes, Float32]],
    numbers: NDArray[np.int32],
    cells: NDArray[np.int32],
    tables: int,
    sign_cut: float,
    cut: float,
) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
    """Pairs among some rows whose estimates by signs and by upper halves both reach their cuts. A row is probe and row in one: of both
    only the upper halves count.

    columns: planes and norms, all of the same halves; numbers, cells: int32 (n,), each row's column and its cell there; tables: of signs
    to look at. Returns (the earlier, the later) of each pair, their places among the rows, and how many pairs the signs let
    through.
    """
    planes = np.array([plane.ctypes.data for plane, _ in columns], np.int64)
    norms = np.array([norms.ctypes.data for _, norms in columns], np.int64)
    halves = columns[0][0].shape[1]
    one, other, passed = _meet(planes, norms, halves, numbers, cells, tables, sign_cut, cut)
    return one, other, passed
