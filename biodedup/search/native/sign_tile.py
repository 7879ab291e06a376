"""SIMD table look-ups over quantised rows: the inner arithmetic that both sign kernels share.

Owns how a block of rows is read from its high nibbles, the classes of its numbers, and the sums of table entries. Never
compares rows exactly (`sign_kernel.py`, `pair_kernel.py`), and never knows what a sum or a limit stands for
(`signs.py`).

Method: FAISS's fast scan (André, Kermarrec and Le Scouarnec, VLDB 2015). The signs of four or six numbers, or the
classes of two or three numbers, are an index of four or six bits into a probe's table of sixteen or sixty-four bytes. A
byte shuffle looks up one index of every row of a block at once; with AVX-512 VBMI a byte permutation does so for
sixty-four entries, which takes no longer. Tables are made so that no sum over a quarter of them overflows a byte: 64
rows cost two instructions a table, half of what 16-bit sums take.
"""

from __future__ import annotations

from enum import IntEnum
from functools import reduce
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from biodedup.gallery.files.codes import STEP
from biodedup.search.native.scan_kernel import INSTRUCTIONS, splat

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)


class TableKind(IntEnum):
    """What indexes a table: the signs of four or six numbers, or the classes of two or three. The value is how many
    numbers."""

    TWO_CLASSES = 2
    THREE_CLASSES = 3
    FOUR_SIGNS = 4
    SIX_SIGNS = 6


SIGN_TABLES, CLASS_TABLES = (
    (TableKind.SIX_SIGNS, TableKind.THREE_CLASSES)
    if INSTRUCTIONS == "vbmi"
    else (TableKind.FOUR_SIGNS, TableKind.TWO_CLASSES)
)
"""The kinds of sign tables and of class tables that suit this processor."""
CLASSES = ((0, 5), (5, 8), (8, 11), (11, 16))
"""The high nibbles of each class: the first, and one past the last."""
_LOWEST, _LOWER, _UPPER = 0x11111111, 0x07070707, 0x38383838  # the lowest bit of each nibble; three bits of each byte
PROBES_PER_TILE = 4
"""Probes whose tables are looked up at the same time."""
BLOCKS_PER_TILE = 1 if INSTRUCTIONS == "avx2" else 4
"""Blocks of rows of one tile: with 32 registers 16 sums stay in registers, and each load serves four of them."""
SUMS_PER_ROW = 4
"""Byte sums of one row, each over a quarter of the tables, which are averaged at the end: entries are rounded less."""
TABLES_PER_STEP = 2 if INSTRUCTIONS == "avx2" else 1
"""Tables of one step of the innermost loop."""
ROW_ALIGNMENT = 64
"""The bytes of a row, and of a probe, are padded to a multiple of this."""
BLOCKS_PER_PASS = 4
"""Blocks that are looked up while they are in the first-level cache."""


def _make_tile(instructions: str, entries: int) -> Any:
    """An intrinsic for numba, tile(signs, tables, count, seeds, limits, masks), all integers or addresses:

    signs: uint8 *, (BLOCKS_PER_TILE, count, 64), 64-byte aligned, below `entries`, which is 16 or, with VBMI, 64;
    tables: uint8 *, (PROBES_PER_TILE, count, entries), aligned to as many bytes; count: a multiple of SUMS_PER_ROW *
    TABLES_PER_STEP; seeds: uint8 *, (BLOCKS_PER_TILE, 64); limits: uint8 *, (PROBES_PER_TILE,); masks: uint64 *,
    (PROBES_PER_TILE, BLOCKS_PER_TILE): bit r is set where the mean of row r of a block reaches the limit. Of each
    quarter of the tables the sum over i of tables[i, signs[i, r]] is taken, of the first one with seeds[r]; then the
    mean, rounded up, of two means, rounded up.
    """
    lanes = 32 if instructions == "avx2" else 64
    name = "avx2.pshuf.b" if lanes == 32 else "avx512.pshuf.b.512" if entries == 16 else "avx512.permvar.qi.512"
    octets, wider, table = (
        ir.VectorType(kind, n) for kind, n in ((_I8, lanes), (ir.IntType(16), lanes), (_I8, entries))
    )
    parts = 64 // lanes
    vectors = BLOCKS_PER_TILE * parts

    def mean(builder: Any, one: Any, other: Any) -> Any:
        """The mean, rounded up: one instruction if the processor has it."""
        both = builder.add(builder.zext(one, wider), builder.zext(other, wider))
        more = builder.add(both, splat(builder, ir.Constant(ir.IntType(16), 1), lanes))
        return builder.trunc(builder.lshr(more, splat(builder, ir.Constant(ir.IntType(16), 1), lanes)), octets)

    def summed(
        builder: Any, signs: Any, tables: Any, count: Any, first: Any, end: Any, begin: list[Any]
    ) -> list[list[Any]]:
        """The sums over tables [first, end), starting from `begin` for each vector."""
        shuffle = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(octets, [octets] * 2), f"llvm.x86.{name}"
        )
        before = builder.block
        loop, after = builder.append_basic_block("table"), builder.append_basic_block("quarter")
        builder.branch(loop)
        builder.position_at_end(loop)
        number = builder.phi(_I64)
        sums = [[builder.phi(octets) for _ in range(vectors)] for _ in range(PROBES_PER_TILE)]
        grown: list[list[Any]] = [list(of_probe) for of_probe in sums]
        for step in range(TABLES_PER_STEP):
            at = builder.add(number, ir.Constant(_I64, step))
            rows = []
            for v in range(vectors):
                block = builder.add(builder.mul(count, ir.Constant(_I64, v // parts)), at)
                place = builder.add(builder.mul(block, ir.Constant(_I64, parts)), ir.Constant(_I64, v % parts))
                some = builder.load(builder.gep(signs, [place]))
                some.align = lanes
                rows.append(some)
            for p, of_probe in enumerate(grown):
                entry = builder.load(builder.gep(tables, [builder.add(builder.mul(count, ir.Constant(_I64, p)), at)]))
                entry.align = entries
                if entries < lanes:
                    places = ir.Constant(ir.VectorType(_I32, lanes), [i % entries for i in range(lanes)])
                    entry = builder.shuffle_vector(entry, entry, places)
                grown[p] = [
                    builder.add(s, builder.call(shuffle, [entry, r])) for s, r in zip(of_probe, rows, strict=True)
                ]
        following = builder.add(number, ir.Constant(_I64, TABLES_PER_STEP))
        number.add_incoming(first, before)
        number.add_incoming(following, loop)
        for of_probe, new in zip(sums, grown, strict=True):
            for phi, start, value in zip(of_probe, begin, new, strict=True):
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
                for at, kind in ((0, octets), (1, table), (3, octets), (4, _I8), (5, _I64))
            )
            count = args[2]
            quarter = builder.udiv(count, ir.Constant(_I64, SUMS_PER_ROW))
            edges = [builder.mul(quarter, ir.Constant(_I64, i)) for i in range(SUMS_PER_ROW + 1)]
            begin = []
            for v in range(vectors):
                some = builder.load(builder.gep(seeds, [ir.Constant(_I64, v)]))
                some.align = 1
                begin.append(some)
            pairs: list[list[list[Any]]] = []
            for first in range(0, SUMS_PER_ROW, 2):
                both = []
                for i in (first, first + 1):
                    both.append(summed(builder, signs, tables, count, edges[i], edges[i + 1], begin))
                    begin = [ir.Constant(octets, None)] * vectors
                pairs.append([[mean(builder, *v) for v in zip(*p, strict=True)] for p in zip(*both, strict=True)])
            for p, of_probe in enumerate(zip(*pairs, strict=True)):
                limit = splat(builder, builder.load(builder.gep(limits, [ir.Constant(_I64, p)])), lanes)
                masked: list[Any] = [ir.Constant(_I64, 0)] * BLOCKS_PER_TILE
                for v, two in enumerate(zip(*of_probe, strict=True)):
                    near = builder.icmp_unsigned(">=", mean(builder, *two), limit)
                    reached = builder.bitcast(near, ir.IntType(lanes))
                    wide = reached if lanes == 64 else builder.zext(reached, _I64)
                    shifted = builder.shl(wide, ir.Constant(_I64, lanes * (v % parts)))
                    masked[v // parts] = builder.or_(masked[v // parts], shifted)
                for b, mask in enumerate(masked):
                    builder.store(mask, builder.gep(masks, [ir.Constant(_I64, BLOCKS_PER_TILE * p + b)]))
            return context.get_dummy_value()

        return signature, generate

    return tile


def u32_at_of(_: Any, address: Any) -> Any:
    """An intrinsic for numba: the uint32 at an address."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], ir.PointerType(_I32)))

    return types.uint32(types.int64), generate


def _u8_at_of(_: Any, address: Any) -> Any:
    """An intrinsic for numba: the uint8 at an address."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], ir.PointerType(_I8)))

    return types.uint8(types.int64), generate


def f32_at_of(_: Any, address: Any) -> Any:
    """An intrinsic for numba: the float32 at an address."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], ir.PointerType(ir.FloatType())))

    return types.float32(types.int64), generate


def _set_u8_of(_: Any, address: Any, value: Any) -> Any:
    """An intrinsic for numba: stores a uint8 at an address."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], ir.PointerType(_I8)))
        return context.get_dummy_value()

    return types.void(types.int64, types.uint8), generate


def _copy_of(_: Any, source: Any, target: Any, octets: Any) -> Any:
    """An intrinsic for numba: copies bytes from one address to another."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        source, target = (builder.inttoptr(args[at], ir.PointerType(_I8)) for at in (0, 1))
        cgutils.raw_memcpy(builder, target, source, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


def _set_u64_of(_: Any, address: Any, value: Any) -> Any:
    """An intrinsic for numba: stores a uint64 at an address."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], ir.PointerType(_I64)))
        return context.get_dummy_value()

    return types.void(types.int64, types.uint64), generate


def _alive_masks_of(_: Any, masks: Any, alive: Any) -> Any:
    """An intrinsic for numba: clears the rows that are not alive, uint64 (BLOCKS_PER_TILE,) at the second address, in a
    tile's masks, (PROBES_PER_TILE, BLOCKS_PER_TILE) at the first. Returns which masks have rows left, the first mask in
    the lowest bit; so the many empty masks cost nothing."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        number = PROBES_PER_TILE * BLOCKS_PER_TILE
        every, each = ir.VectorType(_I64, number), ir.VectorType(_I64, BLOCKS_PER_TILE)
        place, living = builder.inttoptr(args[0], every.as_pointer()), builder.inttoptr(args[1], each.as_pointer())
        found, rows = builder.load(place), builder.load(living)
        found.align = rows.align = 8
        again = ir.Constant(ir.VectorType(_I32, number), [i % BLOCKS_PER_TILE for i in range(number)])
        left = builder.and_(found, builder.shuffle_vector(rows, rows, again))
        builder.store(left, place).align = 8
        some = builder.icmp_unsigned("!=", left, ir.Constant(every, None))
        return builder.zext(builder.bitcast(some, ir.IntType(number)), _I64)

    return types.uint64(types.int64, types.int64), generate


def _lowest_bit_of(_: Any, mask: Any) -> Any:
    """An intrinsic for numba: the place of the lowest bit of a uint64 that is set; the mask is not 0."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


u32_at: Any = intrinsic(u32_at_of)
_u8_at: Any = intrinsic(_u8_at_of)
f32_at: Any = intrinsic(f32_at_of)
_set_u8: Any = intrinsic(_set_u8_of)
_set_u64: Any = intrinsic(_set_u64_of)
copy: Any = intrinsic(_copy_of)
_alive_masks: Any = intrinsic(_alive_masks_of)
_lowest_bit: Any = intrinsic(_lowest_bit_of)


@numba.njit(nogil=True, cache=True)
def _plain(signs: int, tables: int, entries: int, count: int, seeds: int, limits: int, masks: int) -> None:
    quarter = count // SUMS_PER_ROW
    for p in range(PROBES_PER_TILE):
        for b in range(BLOCKS_PER_TILE):
            mask = np.uint64(0)
            for r in range(64):
                sums = np.zeros(SUMS_PER_ROW, np.int64)
                sums[0] = _u8_at(seeds + 64 * b + r)
                for i in range(count):
                    entry = _u8_at(signs + 64 * (count * b + i) + r)
                    sums[i // quarter] += _u8_at(tables + entries * (count * p + i) + entry)
                mean = (((sums[0] + sums[1] + 1) >> 1) + ((sums[2] + sums[3] + 1) >> 1) + 1) >> 1
                if mean >= _u8_at(limits + p):
                    mask |= np.uint64(1) << np.uint64(r)
            _set_u64(masks + 8 * (BLOCKS_PER_TILE * p + b), mask)


@numba.njit(nogil=True, cache=True)
def _plain_16(signs: int, tables: int, count: int, seeds: int, limits: int, masks: int) -> None:
    _plain(signs, tables, 16, count, seeds, limits, masks)


@numba.njit(nogil=True, cache=True)
def _plain_64(signs: int, tables: int, count: int, seeds: int, limits: int, masks: int) -> None:
    _plain(signs, tables, 64, count, seeds, limits, masks)


@numba.njit(nogil=True, cache=True)
def sign(taken: Any, signs: Any) -> None:
    """Writes the table indices of 64 rows. signs: uint8 (tables, 64): which of four neighbouring numbers are positive,
    the first one in the lowest bit. taken: the rows' high nibbles, uint32 (words, 64)."""
    # multiplying by `gathers` brings four bits that lie eight apart together in the top byte
    lowest, gathers = np.uint32(0x01010101), np.uint32(0x01020408)
    for i in range(signs.shape[0]):
        shift = np.uint32(3 + 4 * (i & 1))
        for r in range(64):
            signs[i, r] = np.uint8((((taken[i >> 1, r] >> shift) & lowest) * gathers) >> np.uint32(24))


@numba.njit(nogil=True, cache=True)
def _class(numbers: Any) -> Any:
    """The class (CLASSES) of each of the four numbers of a uint32, one number a byte."""
    one, three, four = np.uint32(0x01010101), np.uint32(3), np.uint32(4)
    above_4, above_10 = np.uint32(0x0B0B0B0B), np.uint32(0x05050505)  # added, they carry into the fifth bit
    first, last = (numbers + above_4) >> four & one, (numbers + above_10) >> four & one
    return first + (numbers >> three & one) + last


@numba.njit(nogil=True, cache=True)
def _plain_three(half: int, third: int, shift: int, classes: int) -> None:
    low, two, four = np.uint32(0x0F0F0F0F), np.uint32(2), np.uint32(4)
    for r in range(64):
        word = u32_at(half + 4 * r)
        some = _class(word & low) | _class(word >> four & low) << two
        if third:
            some |= _class(u32_at(third + 4 * r) >> np.uint32(shift) & low) << four
        for t in range(4):
            _set_u8(classes + 64 * t + r, np.uint8(some >> np.uint32(8 * t)))


@numba.njit(nogil=True, cache=True)
def _plain_two(half: int, classes: int) -> None:
    _plain_three(half, 0, 0, classes)


@numba.njit(nogil=True, cache=True)
def _plain_six(half: int, signs: int) -> None:
    for r in range(64):
        word = (u32_at(half + 4 * r) >> np.uint32(3)) & np.uint32(_LOWEST)
        word |= (u32_at(half + 256 + 4 * r) >> np.uint32(2)) & np.uint32(2 * _LOWEST)
        word |= (u32_at(half + 512 + 4 * r) >> np.uint32(1)) & np.uint32(4 * _LOWEST)
        word = (word & np.uint32(_LOWER)) | ((word >> np.uint32(1)) & np.uint32(_UPPER))
        for t in range(4):
            _set_u8(signs + 64 * t + r, np.uint8(word >> np.uint32(8 * t)))


@numba.njit(nogil=True, cache=True)
def _signs_left(taken: Any, half: int, signs: Any) -> None:
    """As `_plain_six`, for the last one or two words of a row."""
    both = half + 1 < taken.shape[0]
    for r in range(64):
        word = (taken[half, r] >> np.uint32(3)) & np.uint32(_LOWEST)
        if both:
            word |= (taken[half + 1, r] >> np.uint32(2)) & np.uint32(2 * _LOWEST)
        word = (word & np.uint32(_LOWER)) | ((word >> np.uint32(1)) & np.uint32(_UPPER))
        for t in range(4):
            signs[t, r] = np.uint8(word >> np.uint32(8 * t))


def _make_classed(instructions: str, kind: TableKind) -> Any:
    """An intrinsic for numba: classed(half, classes) for TWO_CLASSES and SIX_SIGNS, classed(half, third, shift,
    classes) for THREE_CLASSES. All arguments are integers or addresses:

    half, third: uint32 *, (64,), of 64 rows eight four-bit numbers each, or (3, 64) for SIX_SIGNS; shift: 0 or 4,
    whether the lower or the upper ones of the third count; classes: uint8 *, (4, 64), 64-byte aligned: of byte t the
    class of its lower number, of its upper one, and of byte t of the third, two bits each, the first in the lowest
    ones; for SIX_SIGNS the signs of the lower numbers of byte t in three words, then those of the upper ones.
    """
    lanes = 32 if instructions == "avx2" else 64
    octets, words = ir.VectorType(_I8, lanes), ir.VectorType(_I32, lanes // 4)
    classes = [number for number, (first, end) in enumerate(CLASSES) for _ in range(first, end)]
    name = "llvm.x86.avx2.pshuf.b" if lanes == 32 else "llvm.x86.avx512.pshuf.b.512"

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        shuffle = cgutils.get_or_insert_function(builder.module, ir.FunctionType(octets, [octets] * 2), name)
        half, third = (builder.inttoptr(args[at], words.as_pointer()) for at in (0, 1))

        def looked_up(word: Any, shift: Any, place: int) -> Any:
            shifted = builder.lshr(word, splat(builder, shift, lanes // 4))
            number = builder.and_(builder.bitcast(shifted, octets), splat(builder, ir.Constant(_I8, 15), lanes))
            return builder.call(shuffle, [ir.Constant(octets, [c << place for c in classes] * (lanes // 16)), number])

        def word(start: Any, v: int) -> Any:
            loaded = builder.load(builder.gep(start, [ir.Constant(_I64, v)]))
            loaded.align = 4
            return loaded

        def bits(some: Any, shift: int, mask: int) -> Any:
            shifted = builder.lshr(some, splat(builder, ir.Constant(_I32, shift), lanes // 4))
            return builder.and_(shifted, splat(builder, ir.Constant(_I32, mask), lanes // 4))

        pieces, vectors = [], 256 // lanes
        for v in range(vectors):
            if kind == TableKind.SIX_SIGNS:
                signs = [bits(word(half, v + vectors * h), 3 - h, _LOWEST << h) for h in range(3)]
                some = reduce(builder.or_, signs)
                pieces.append(builder.or_(bits(some, 0, _LOWER), bits(some, 1, _UPPER)))
                continue
            found = [looked_up(word(half, v), ir.Constant(_I32, shift), shift // 2) for shift in (0, 4)]
            if kind == TableKind.THREE_CLASSES:
                found.append(looked_up(word(third, v), builder.trunc(args[2], _I32), 4))
            pieces.append(builder.bitcast(reduce(builder.or_, found), words))
        while len(pieces) > 1:
            both = ir.Constant(ir.VectorType(_I32, 2 * pieces[0].type.count), list(range(2 * pieces[0].type.count)))
            pieces = [builder.shuffle_vector(*two, both) for two in zip(pieces[::2], pieces[1::2], strict=True)]
        whole = builder.bitcast(pieces[0], ir.VectorType(_I32, 64))
        to = builder.inttoptr(args[-1], ir.VectorType(_I8, 64).as_pointer())
        for t in range(4):
            shifted = builder.lshr(whole, splat(builder, ir.Constant(_I32, 8 * t), 64))
            stored = builder.store(
                builder.trunc(shifted, ir.VectorType(_I8, 64)), builder.gep(to, [ir.Constant(_I64, t)])
            )
            stored.align = 64
        return context.get_dummy_value()

    @intrinsic
    def two(_: Any, half: Any, classes: Any) -> Any:
        return types.void(*[types.intp] * 2), generate

    @intrinsic
    def three(_: Any, half: Any, third: Any, shift: Any, classes: Any) -> Any:
        return types.void(*[types.intp] * 4), generate

    return three if kind == TableKind.THREE_CLASSES else two


def classed_for(instructions: str) -> dict[str, Any]:
    """The functions that `classify` calls, for another processor."""
    if instructions == "plain":
        return {"_two": _plain_two, "_three": _plain_three, "_six": _plain_six}
    return {
        f"_{name}": _make_classed(instructions, kind)
        for name, kind in (
            ("two", TableKind.TWO_CLASSES),
            ("three", TableKind.THREE_CLASSES),
            ("six", TableKind.SIX_SIGNS),
        )
    }


_two, _three, _six = classed_for(INSTRUCTIONS).values()


@numba.njit(nogil=True, cache=True)
def classify(taken: Any, kind: int, classes: Any) -> None:
    """Writes the table indices of 64 rows. classes: uint8 (tables, 64), 64-byte aligned, tables a multiple of 4: the
    classes of two or three numbers, the first one's in the lowest two bits, or the signs of six; which numbers:
    `numbers_of`. taken: the rows' high nibbles, uint32 (words, 64)."""
    at_taken, at_classes = taken.ctypes.data, classes.ctypes.data
    for i in range(0, classes.shape[0], 4):
        if kind == TableKind.SIX_SIGNS:
            half = 3 * (i >> 2)
            if half + 2 < taken.shape[0]:
                _six(at_taken + 256 * half, at_classes + 64 * i)
            else:
                _signs_left(taken, half, classes[i : i + 4])
            continue
        half = i >> 2 if kind == TableKind.TWO_CLASSES else 3 * (i >> 3) + (i >> 2 & 1)
        third = 3 * (i >> 3) + 2
        if kind == TableKind.TWO_CLASSES or third >= taken.shape[0]:
            _two(at_taken + 256 * half, at_classes + 64 * i)
        else:
            _three(at_taken + 256 * half, at_taken + 256 * third, i & 4, at_classes + 64 * i)


def tables_most(scanned: int, kind: TableKind) -> int:
    """How many tables cover so many numbers, a multiple of STEP."""
    words = scanned // STEP
    threes, left = divmod(words, 3)
    return {
        TableKind.FOUR_SIGNS: 2 * words,
        TableKind.SIX_SIGNS: 4 * (threes + (left > 0)),
        TableKind.TWO_CLASSES: 4 * words,
        TableKind.THREE_CLASSES: 8 * threes + 4 * left,
    }[kind]


def numbers_of(tables: int, scanned: int, kind: TableKind) -> NDArray[np.int64]:
    """The numbers that each table looks at, (tables, kind), -1 where there is none. FOUR_SIGNS: four neighbours;
    TWO_CLASSES: two that share a byte; THREE_CLASSES: such two and one of a byte in a third word, which two other words
    share; SIX_SIGNS: the numbers in the same byte of three words."""
    if kind == TableKind.FOUR_SIGNS:
        return np.arange(TableKind.FOUR_SIGNS * tables).reshape(-1, TableKind.FOUR_SIGNS)
    group = np.arange(tables) >> 2
    if kind == TableKind.SIX_SIGNS:
        lower = STEP * (3 * group[:, None] + np.arange(3)) + np.arange(tables)[:, None] % 4
        lower = np.where(lower < scanned, lower, -1)
        return np.concatenate([lower, np.where(lower >= 0, lower + STEP // 2, -1)], axis=1)
    half = group if kind == TableKind.TWO_CLASSES else 3 * (group >> 1) + (group & 1)
    first = STEP * half + np.arange(tables) % 4
    numbers = [first, first + STEP // 2]
    if kind == TableKind.THREE_CLASSES:
        third = STEP * (3 * (group >> 1) + 2)
        numbers.append(np.where(third < scanned, third + np.arange(tables) % 4 + STEP // 2 * (group & 1), -1))
    return np.stack(numbers, axis=1)


@numba.njit(nogil=True, cache=True)
def aligned(octets: int) -> Any:
    """Zeros, uint8 (octets,), 64-byte aligned."""
    space = np.zeros(octets + 64, np.uint8)
    start = -space.ctypes.data % 64
    return space[start : start + octets]


@numba.njit(nogil=True, cache=True)
def masks_apart() -> Any:
    """Room for a tile's masks, in cache lines that no other thread writes."""
    return aligned(64 + 8 * PROBES_PER_TILE * BLOCKS_PER_TILE + 64).view(np.uint64)[
        8 : 8 + PROBES_PER_TILE * BLOCKS_PER_TILE
    ]


def tiles_for(instructions: str) -> dict[str, Any]:
    """The functions that `survivors` calls, for another processor."""
    of_16 = _plain_16 if instructions == "plain" else _make_tile(instructions, 16)
    return {"_tile_16": of_16, "_tile_64": _make_tile(instructions, 64) if instructions == "vbmi" else _plain_64}


_tile_16, _tile_64 = tiles_for(INSTRUCTIONS).values()


@numba.njit(nogil=True, cache=True)
def survivors(
    signs: Any, seeds: Any, alive: Any, tables: Any, limits: Any, count: int, masks: Any, which: Any, lanes: Any
) -> int:
    """Writes the pairs of a probe and a row that reach the limits into `which` and `lanes`, and returns how many.

    Of B = BLOCKS_PER_PASS blocks. signs: uint8 (B, t, 64); seeds: uint8 (64 B,); alive: uint64 (B,); tables: uint8 (q,
    t, 16 or 64), q a multiple of PROBES_PER_TILE.
    """
    found = 0
    number, entries = tables.shape[1], tables.shape[2]
    at_signs, at_tables, at_seeds = signs.ctypes.data, tables.ctypes.data, seeds.ctypes.data
    at_limits, at_masks, at_alive = limits.ctypes.data, masks.ctypes.data, alive.ctypes.data
    for p in range(0, tables.shape[0], PROBES_PER_TILE):
        for b in range(0, BLOCKS_PER_PASS, BLOCKS_PER_TILE):
            living = np.uint64(0)
            for d in range(BLOCKS_PER_TILE):
                living |= alive[b + d]
            if living == 0:
                continue
            at_sign, at_table = at_signs + 64 * number * b, at_tables + entries * number * p
            at_seed, at_limit = at_seeds + 64 * b, at_limits + p
            if entries == 16:
                _tile_16(at_sign, at_table, number, at_seed, at_limit, at_masks)
            else:
                _tile_64(at_sign, at_table, number, at_seed, at_limit, at_masks)
            reached = _alive_masks(at_masks, at_alive + 8 * b)
            while reached:
                at = np.int64(_lowest_bit(reached))
                reached &= reached - np.uint64(1)
                if p + at // BLOCKS_PER_TILE >= count:
                    break
                mask = masks[at]
                while mask:
                    which[found], lanes[found] = (
                        p + at // BLOCKS_PER_TILE,
                        64 * (b + at % BLOCKS_PER_TILE) + np.int32(_lowest_bit(mask)),
                    )
                    mask &= mask - np.uint64(1)
                    found += 1
    return found
