"""SIMD table look-ups over the quantised signs and classes of rows. The scan kernel and the pair kernel share this arithmetic.

Owns the conversion of row bits to table indices, and the sums of table entries. `scan_kernel.py` and `pair_kernel.py` compare rows exactly.
`tables.py` gives the sums and limits their meaning.

Method: FAISS's fast scan (André, Kermarrec and Le Scouarnec, VLDB 2015). The signs of four numbers, or the classes of two numbers, are an
index into a probe's table of sixteen bytes. One byte shuffle looks up an index of 32 or 64 rows at once. A sum over a quarter of the
tables never overflows a byte. A table then costs two instructions, half of the cost with 16-bit sums. Each probe selects its own tables.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from itertools import pairwise
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from biodedup.search.native.dot_kernel import INSTRUCTIONS, splat

_I8, _I16, _I32, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)


class TableKind(IntEnum):
    """The index of a table: the signs of four numbers, or the classes of two numbers. The value is the count of numbers."""

    CLASSES = 2
    SIGNS = 4


ENTRIES = 16
"""The number of entries of a table."""
SUMS_PER_ROW = 4
"""The number of byte sums per row, each over a quarter of the tables. The sums are averaged at the end, so entries need less rounding."""
BLOCKS = 4
"""The number of blocks in a tile. A block has 64 rows."""
ROWS = 64 * BLOCKS


class _Tile:
    """Generates the code of `_make_tile` for one instruction set. lanes: bytes of a register; vectors: the number of registers that hold
    one byte of each row."""

    def __init__(self, instructions: str) -> None:
        self.lanes = 32 if instructions == "avx2" else 64
        self.vectors = ROWS // self.lanes
        self.octets, self._wider = (ir.VectorType(kind, self.lanes) for kind in (_I8, _I16))
        self.table = ir.VectorType(_I8, ENTRIES)
        self._shuffle = "llvm.x86.avx2.pshuf.b" if self.lanes == 32 else "llvm.x86.avx512.pshuf.b.512"

    def mean(self, builder: Any, one: Any, other: Any) -> Any:
        """Returns the mean, rounded up. This compiles to one instruction."""
        both = builder.add(builder.zext(one, self._wider), builder.zext(other, self._wider))
        more = builder.add(both, splat(builder, ir.Constant(_I16, 1), self.lanes))
        return builder.trunc(builder.lshr(more, splat(builder, ir.Constant(_I16, 1), self.lanes)), self.octets)

    def summed(self, builder: Any, addresses: tuple[Any, Any, Any], first: Any, end: Any) -> list[Any]:
        """Returns the sums over places [first, end), in `vectors` registers."""
        indices, places, tables = addresses

        def added(at: Any, sums: list[Any]) -> list[Any]:
            place = builder.zext(builder.load(builder.gep(places, [at])), _I64)
            rows = builder.gep(indices, [builder.mul(place, ir.Constant(_I64, self.vectors))])
            entry, grown = self._entry(builder, tables, at), []
            for v, total in enumerate(sums):
                some = builder.load(builder.gep(rows, [ir.Constant(_I64, v)]))
                some.align = self.lanes
                grown.append(builder.add(total, self._looked_up(builder, entry, some)))
            return grown

        return self._loop(builder, (first, end), self.vectors, added)

    def summed_signs(self, builder: Any, addresses: tuple[Any, Any], first: Any, end: Any) -> list[Any]:
        """Returns the sums over the tables of octets [first, end) for the 64 rows of a block, whose indices are taken from the signs."""
        signs, tables = addresses
        count = 64 // self.lanes

        def added(at: Any, sums: list[Any]) -> list[Any]:
            twice, grown = builder.add(at, at), []
            entries = [self._entry(builder, tables, builder.add(twice, ir.Constant(_I64, i))) for i in range(2)]
            for v, total in enumerate(sums):
                place = builder.add(builder.mul(at, ir.Constant(_I64, count)), ir.Constant(_I64, v))
                bits = builder.load(builder.gep(signs, [place]))
                bits.align = 1
                low, high = (_shifted(builder, bits, left, 15) for left in (0, -4))
                with_low = builder.add(total, self._looked_up(builder, entries[0], low))
                grown.append(builder.add(with_low, self._looked_up(builder, entries[1], high)))
            return grown

        return self._loop(builder, (first, end), count, added)

    def _entry(self, builder: Any, tables: Any, at: Any) -> Any:
        """Loads a table into each sixteen lanes of a register."""
        entry = builder.load(builder.gep(tables, [at]))
        entry.align = 1
        spread = ir.Constant(ir.VectorType(_I32, self.lanes), [i % ENTRIES for i in range(self.lanes)])
        return builder.shuffle_vector(entry, entry, spread)

    def _looked_up(self, builder: Any, entry: Any, indices: Any) -> Any:
        kind = ir.FunctionType(self.octets, [self.octets] * 2)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, self._shuffle), [entry, indices])

    def _loop(self, builder: Any, span: tuple[Any, Any], count: int, added: Callable[..., list[Any]]) -> list[Any]:
        """Generates a loop over a span, [first, end), that is not empty. Returns `count` sums, which start from zero. added(at, sums): the sums
        after one more step."""
        first, end = span
        before = builder.block
        loop, after = builder.append_basic_block("some"), builder.append_basic_block("sums")
        builder.branch(loop)
        builder.position_at_end(loop)
        at = builder.phi(_I64)
        sums = [builder.phi(self.octets) for _ in range(count)]
        grown = added(at, sums)
        following = builder.add(at, ir.Constant(_I64, 1))
        at.add_incoming(first, before)
        at.add_incoming(following, loop)
        for total, new in zip(sums, grown, strict=True):
            total.add_incoming(ir.Constant(self.octets, None), before)
            total.add_incoming(new, loop)
        builder.cbranch(builder.icmp_signed("<", following, end), loop, after)
        builder.position_at_end(after)
        return grown

    def means(
        self, builder: Any, summed: Callable[..., list[Any]], addresses: tuple[Any, ...], count: Any
    ) -> list[Any]:
        """Returns the mean of the four sums over the quarters of [0, count), one register for each that `summed` returns."""
        quarter = builder.udiv(count, ir.Constant(_I64, SUMS_PER_ROW))
        edges = [builder.mul(quarter, ir.Constant(_I64, i)) for i in range(SUMS_PER_ROW + 1)]
        sums = [summed(builder, addresses, *span) for span in pairwise(edges)]
        halves = [[self.mean(builder, *two) for two in zip(*sums[i : i + 2], strict=True)] for i in (0, 2)]
        return [self.mean(builder, *two) for two in zip(*halves, strict=True)]

    def reached(self, builder: Any, means: list[Any], limit: Any) -> list[Any]:
        """Returns a uint64 for each block. Bit r is set if the mean of row r is at least the limit."""
        least = splat(builder, builder.trunc(limit, _I8), self.lanes)
        masks: list[Any] = [ir.Constant(_I64, 0)] * BLOCKS
        for v, mean in enumerate(means):
            bits = builder.bitcast(builder.icmp_unsigned(">=", mean, least), ir.IntType(self.lanes))
            wide = bits if self.lanes == 64 else builder.zext(bits, _I64)
            block, shift = self.lanes * v // 64, self.lanes * v % 64
            masks[block] = builder.or_(masks[block], builder.shl(wide, ir.Constant(_I64, shift)))
        return masks


def _make_tile(instructions: str) -> Any:
    """Makes a numba intrinsic, tile(indices, places, tables, count, limit, masks). All arguments are integers or addresses.

    indices: uint8 *, (t, ROWS), 64-byte aligned, below ENTRIES; places: int32 *, (count,), the row of `indices` for each table; tables:
    uint8 *, (count, ENTRIES); count: a multiple of SUMS_PER_ROW; masks: uint64 *, (BLOCKS,), the output: bit r is set if the mean of row r
    of the block is at least the limit. Each quarter of the places has the sum over i of tables[i, indices[places[i], r]]. The four
    sums are averaged in pairs, then the two means are averaged; each mean is rounded up.
    """
    made = _Tile(instructions)

    @intrinsic
    def tile(_: Any, indices: Any, places: Any, tables: Any, count: Any, limit: Any, masks: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            kinds = (made.octets, _I32, made.table)
            addresses = tuple(builder.inttoptr(args[at], kind.as_pointer()) for at, kind in enumerate(kinds))
            means = made.means(builder, made.summed, addresses, args[3])
            to = builder.inttoptr(args[5], _I64.as_pointer())
            for b, mask in enumerate(made.reached(builder, means, args[4])):
                builder.store(mask, builder.gep(to, [ir.Constant(_I64, b)]))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), generate

    return tile


def _make_sign_block(instructions: str) -> Any:
    """Makes a numba intrinsic, sign_block(signs, tables, octets, limit) -> uint64: `tile` for one probe and one block of 64 rows, without
    writing the indices to memory first.

    signs: the address of uint8 (octets, 64); tables: of uint8 (2 octets, ENTRIES), table i for the i-th four signs; octets: a multiple of
    SUMS_PER_ROW. Bit r of the result is set if the mean of row r is at least the limit."""
    made = _Tile(instructions)

    @intrinsic
    def sign_block(_: Any, signs: Any, tables: Any, octets: Any, limit: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            addresses = tuple(
                builder.inttoptr(args[i], kind.as_pointer()) for i, kind in enumerate((made.octets, made.table))
            )
            return made.reached(builder, made.means(builder, made.summed_signs, addresses, args[2]), args[3])[0]

        return types.uint64(*[types.intp] * 4), generate

    return sign_block


def _load(kind: Any, found: Any) -> Any:
    """Makes a numba intrinsic: loads the value of this kind at an address. found: its type in numba."""

    def at(_: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return builder.load(builder.inttoptr(args[0], ir.PointerType(kind)))

        return found(types.int64), generate

    return intrinsic(at)


def _copy_of(_: Any, source: Any, target: Any, octets: Any) -> Any:
    """Numba intrinsic: copies bytes from one address to another."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        source, target = (builder.inttoptr(args[at], ir.PointerType(_I8)) for at in (0, 1))
        cgutils.raw_memcpy(builder, target, source, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


_WORDS, _ROWS_OF_BLOCK = ir.VectorType(_I16, 32), ir.VectorType(_I8, 64)


def _shifted(builder: Any, bits: Any, left: int, kept: int) -> Any:
    """Shifts each byte of a vector to the left, or to the right if `left` is negative, and keeps the bits of the mask `kept`. x86 only shifts
    16-bit words; the mask drops the bits from the neighbouring byte."""
    words = builder.bitcast(bits, ir.VectorType(_I16, bits.type.count * bits.type.element.width // 16))
    by = splat(builder, ir.Constant(_I16, abs(left)), words.type.count)
    moved = builder.shl(words, by) if left > 0 else builder.lshr(words, by)
    return builder.bitcast(
        builder.and_(moved, splat(builder, ir.Constant(_I16, 257 * kept), words.type.count)), bits.type
    )


def _store_indices(builder: Any, to: Any, table: int, found: Any) -> None:
    place = builder.inttoptr(builder.add(to, ir.Constant(_I64, ROWS * table)), _ROWS_OF_BLOCK.as_pointer())
    builder.store(builder.bitcast(found, _ROWS_OF_BLOCK), place).align = 64


def _octet(builder: Any, address: Any) -> Any:
    bits = builder.load(builder.inttoptr(address, _WORDS.as_pointer()))
    bits.align = 1
    return bits


def _sign_indices_of(_: Any, signs: Any, indices: Any) -> Any:
    """Numba intrinsic: writes the indices of 64 rows for the two tables of an octet (eight numbers). An index holds the signs of four
    numbers, the first sign in the lowest bit. Arguments are addresses. signs: uint8 *, (64,); indices: uint8 *, the output, ROWS bytes
    for each table."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        bits = _octet(builder, args[0])
        for table in range(2):
            _store_indices(builder, args[1], table, _shifted(builder, bits, -4 * table, 15))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _class_indices_of(_: Any, signs: Any, outer: Any, indices: Any) -> Any:
    """Numba intrinsic: `_sign_indices_of` for the four class tables of an octet. An index holds the signs of two numbers in bits 0 and 1,
    and their outer bits in bits 2 and 3. outer: uint8 *, (64,)."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        bits, wide = (_octet(builder, address) for address in args[:2])
        for table in range(4):
            low, high = _shifted(builder, bits, -2 * table, 3), _shifted(builder, wide, 2 - 2 * table, 12)
            _store_indices(builder, args[2], table, builder.or_(low, high))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


def _store_of(_: Any, address: Any, value: Any) -> Any:
    """Numba intrinsic: stores a number, in its own size, at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], ir.PointerType(args[1].type)))
        return context.get_dummy_value()

    return types.void(types.int64, value), generate


def _lowest_bit_of(_: Any, mask: Any) -> Any:
    """Numba intrinsic: returns the position of the lowest set bit of a uint64, which must not be 0."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


u8_at: Any = _load(_I8, types.uint8)
i32_at: Any = _load(_I32, types.int32)
i64_at: Any = _load(_I64, types.int64)
u64_at: Any = _load(_I64, types.uint64)
f32_at: Any = _load(ir.FloatType(), types.float32)
copy: Any = intrinsic(_copy_of)
sign_indices: Any = intrinsic(_sign_indices_of)
class_indices: Any = intrinsic(_class_indices_of)
store: Any = intrinsic(_store_of)
_lowest_bit: Any = intrinsic(_lowest_bit_of)


@numba.njit(nogil=True, cache=True)
def _plain_tile(indices: int, places: int, tables: int, count: int, limit: int, masks: int) -> None:
    quarter = count // SUMS_PER_ROW
    for b in range(BLOCKS):
        mask = np.uint64(0)
        for r in range(64):
            sums = np.zeros(SUMS_PER_ROW, np.int64)
            for i in range(count):
                entry = u8_at(indices + ROWS * np.int64(i32_at(places + 4 * i)) + 64 * b + r)
                sums[i // quarter] += u8_at(tables + ENTRIES * i + entry)
            if (((sums[0] + sums[1] + 1) >> 1) + ((sums[2] + sums[3] + 1) >> 1) + 1) >> 1 >= limit:
                mask |= np.uint64(1) << np.uint64(r)
        store(masks + 8 * b, mask)


@numba.njit(nogil=True, cache=True)
def _plain_sign_block(signs: int, tables: int, octets: int, limit: int) -> Any:
    quarter, mask = octets // SUMS_PER_ROW, np.uint64(0)
    for r in range(64):
        sums = np.zeros(SUMS_PER_ROW, np.int64)
        for j in range(octets):
            bits = np.int64(u8_at(signs + 64 * j + r))
            low, high = (
                u8_at(tables + 2 * ENTRIES * j + (bits & 15)),
                u8_at(tables + 2 * ENTRIES * j + ENTRIES + (bits >> 4)),
            )
            sums[j // quarter] += np.int64(low) + np.int64(high)
        if (((sums[0] + sums[1] + 1) >> 1) + ((sums[2] + sums[3] + 1) >> 1) + 1) >> 1 >= limit:
            mask |= np.uint64(1) << np.uint64(r)
    return mask


def _make_listed() -> Any:
    """Makes a numba intrinsic: `_plain_listed` in AVX-512 with VBMI2. No branch depends on a single row, because the processor predicts
    such a branch wrongly for each row that passes."""
    bits, words = ir.VectorType(ir.IntType(1), 64), ir.VectorType(_I32, 8)

    @intrinsic
    def listed(_: Any, mask: Any, first: Any, probe: Any, which: Any, rows: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            mask, first, probe, which, rows = args
            kind = ir.FunctionType(_ROWS_OF_BLOCK, [_ROWS_OF_BLOCK, _ROWS_OF_BLOCK, bits])
            compress = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.mask.compress.v64i8")
            numbers = ir.Constant(_ROWS_OF_BLOCK, list(range(64)))
            packed = builder.call(compress, [numbers, ir.Constant(_ROWS_OF_BLOCK, None), builder.bitcast(mask, bits)])
            base, whose = (splat(builder, builder.trunc(value, _I32), 8) for value in (first, probe))

            def write(part: int) -> None:
                some = ir.Constant(words, [8 * part + i for i in range(8)])
                numbers = builder.zext(builder.shuffle_vector(packed, packed, some), words)
                for to, value in ((rows, builder.add(base, numbers)), (which, whose)):
                    place = builder.inttoptr(builder.add(to, ir.Constant(_I64, 32 * part)), words.as_pointer())
                    builder.store(value, place).align = 4

            count = builder.ctpop(mask)
            write(0)
            with builder.if_then(builder.icmp_unsigned(">", count, ir.Constant(_I64, 8)), likely=False):
                for part in range(1, 8):
                    write(part)
            return count

        return types.int64(types.uint64, *[types.int64] * 4), generate

    return listed


@numba.njit(nogil=True, cache=True)
def _plain_listed(mask: Any, first: int, probe: int, which: int, rows: int) -> int:
    """Writes a (probe, row) pair for each set bit of a 64-bit mask, and returns the number of pairs.

    rows: address of the row numbers, int32; which: address of the probe numbers, int32; first: the row number of bit 0. The function may
    write to all LISTED places of both arrays, even if there are fewer pairs."""
    found = 0
    while mask:
        store(which + 4 * found, np.int32(probe))
        store(rows + 4 * found, np.int32(first + np.int64(_lowest_bit(mask))))
        mask &= mask - np.uint64(1)
        found += 1
    return found


LISTED = 64
"""The number of places that `survivors` may overwrite after the last pair. Each then holds a valid probe and a row of a searched block."""


def tile_for(instructions: str) -> dict[str, Any]:
    """Returns the functions that `survivors` and `sign_survivors` call, by name, for an instruction set."""
    return {
        "_tile": _plain_tile if instructions == "plain" else _make_tile(instructions),
        "_sign_block": _plain_sign_block if instructions == "plain" else _make_sign_block(instructions),
        "_listed": _make_listed() if instructions == "vnni" else _plain_listed,
    }


_tile, _sign_block, _listed = tile_for(INSTRUCTIONS).values()


@numba.njit(nogil=True, cache=True)
def aligned(octets: int) -> Any:
    """Returns zeros, uint8 (octets,), 64-byte aligned."""
    space = np.zeros(octets + 64, np.uint8)
    start = -space.ctypes.data % 64
    return space[start : start + octets]


class Tables(NamedTuple):
    """The look-up tables of probes. probes: the number of probes; per_probe: the number of tables of a probe, a multiple of SUMS_PER_ROW.
    Addresses: places: int32 (probes, per_probe), the row of the indices for each table; entries: uint8 (probes, per_probe, ENTRIES);
    limits: uint8 (probes,), the smallest mean of a row that passes."""

    probes: int
    per_probe: int
    places: int
    entries: int
    limits: int


MASKS = 2 * 64 + 2 * 8 * BLOCKS
"""The size in bytes of an allocation for the masks of `survivors`. Leave out the first 64 bytes, so that threads share no cache line."""


@numba.njit(nogil=True, cache=True)
def survivors(indices: int, masks: int, tables: Any, first: int, which: int, rows: int) -> int:
    """Writes the pairs of a probe and a row that reach the probe's limit, and returns the number of pairs.

    All arguments but tables and first are addresses. indices: uint8 (t, ROWS), of BLOCKS blocks; masks: uint64 (2, BLOCKS), where the first
    row is working memory, and a set bit of the second row selects a row to search; first: the number of the first row; which, rows: int32,
    the output, with room for ROWS pairs per probe and LISTED more.
    """
    found, alive = 0, masks + 8 * BLOCKS
    for p in range(tables.probes):
        at = tables.per_probe * p
        limit = np.int64(u8_at(tables.limits + p))
        _tile(indices, tables.places + 4 * at, tables.entries + ENTRIES * at, tables.per_probe, limit, masks)
        for b in range(BLOCKS):
            counts = u64_at(alive + 8 * b)
            if counts:
                mask, to = u64_at(masks + 8 * b) & counts, 4 * found
                found += _listed(mask, first + 64 * b, p, which + to, rows + to)
    return found


@numba.njit(nogil=True, cache=True)
def sign_survivors(signs: int, alive: Any, tables: Any, first: int, which: int, rows: int) -> int:
    """`survivors` for one probe, whose tables look at the signs of one block in order. signs: the address of uint8 (octets, 64). alive: a set
    bit selects a row to search."""
    mask = _sign_block(signs, tables.entries, tables.per_probe >> 1, np.int64(u8_at(tables.limits)))
    found: int = _listed(mask & alive, first, 0, which, rows)
    return found
