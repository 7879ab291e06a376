"""Computes dot products of eight-bit probes with four-bit stored rows, with the SIMD instructions of this processor.

Owns this arithmetic and the choice of instructions. Never reads galleries, and never converts a dot product to a similarity.
tests/search/test_scan.py tests the kernels that use it against numpy.

With VNNI, one instruction multiplies and adds 64 pairs of numbers. With AVX2, two instructions multiply and add 32 pairs, in 16-bit sums.
AVX-512 without VNNI is not faster than AVX2 here (`benchmarks/costs.py --instructions`).
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I8, _I16, _I32, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)


def available() -> list[str]:
    """Returns the instruction sets of this processor, fastest first. The last is `plain`."""
    features = llvmlite.binding.get_host_cpu_features()
    needed = {"vnni": ("avx512bw", "avx512vnni", "avx512vbmi2"), "avx2": ("avx2",), "plain": ()}
    return [name for name, all_of in needed.items() if all(features.get(feature) for feature in all_of)]


PROBE_ALIGNMENT = 64
"""In bytes. The factors of a probe are padded with zeros to a multiple of it."""
TOGETHER = 4
"""The number of dot products that are computed at once."""
INSTRUCTIONS = available()[0]
"""The instruction set in use on this processor: vnni (AVX-512 of Ice Lake, Zen 4 and later), avx2 or plain."""


class _Arithmetic:
    """The arithmetic of one instruction set. lanes: the number of 32-bit sums in a register, each over four products; partial: the type of
    partial sums, which are widened to int32 before they can overflow."""

    def __init__(self, instructions: str) -> None:
        self.lanes = 8 if instructions == "avx2" else 16
        self.octets, self.pairs, self.sums = (ir.VectorType(t, 32 * self.lanes // t.width) for t in (_I8, _I16, _I32))
        # a 16-bit sum adds two products per nibble, four in all, each at most 15 x 127
        self.partial = self.pairs if instructions == "avx2" else self.sums
        self._instructions = instructions

    def grown(self, builder: Any, total: Any, rows: Any, probe: Any) -> Any:
        """Returns total plus the products of rows (uint8) and probe (int8). total: of type `partial`."""
        if self._instructions == "vnni":
            fused = self._function(builder, "avx512.vpdpbusd.512", self.sums, [self.sums] * 3)
            return builder.call(fused, [total, builder.bitcast(rows, self.sums), builder.bitcast(probe, self.sums)])
        if self.partial is self.pairs:
            multiply = self._function(builder, "avx2.pmadd.ub.sw", self.pairs, [self.octets] * 2)
            products = builder.call(multiply, [rows, probe])
            return builder.add(total, products)
        wide = ir.VectorType(_I32, 4 * self.lanes)
        products = builder.mul(builder.zext(rows, wide), builder.sext(probe, wide))
        for part in range(4):
            which = ir.Constant(self.sums, [4 * lane + part for lane in range(self.lanes)])
            total = builder.add(total, builder.shuffle_vector(products, products, which))
        return total

    def widened(self, builder: Any, total: Any) -> Any:
        """Widens partial sums to int32, one for each lane."""
        if self.partial is self.sums:
            return total
        ones = ir.Constant(self.pairs, [1] * self.pairs.count)
        return builder.call(self._function(builder, "avx2.pmadd.wd", self.sums, [self.pairs] * 2), [total, ones])

    def nibbles(self, builder: Any, packed: Any) -> tuple[Any, Any]:
        """Returns the lower four bits and the upper four bits of each byte, as bytes."""
        words = builder.bitcast(packed, self.pairs)  # x86 has no shift of single bytes
        shifted = builder.bitcast(
            builder.lshr(words, splat(builder, ir.Constant(_I16, 4), self.pairs.count)), self.octets
        )
        low = splat(builder, ir.Constant(_I8, 15), self.octets.count)
        return builder.and_(packed, low), builder.and_(shifted, low)

    @staticmethod
    def _function(builder: Any, name: str, gives: Any, takes: list[Any]) -> Any:
        return cgutils.get_or_insert_function(builder.module, ir.FunctionType(gives, takes), f"llvm.x86.{name}")


def splat(builder: Any, value: Any, count: int) -> Any:
    """Returns a vector with `count` copies of a value."""
    empty = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    single = builder.insert_element(empty, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(single, empty, ir.Constant(ir.VectorType(_I32, count), [0] * count))


def _prefetch_of(_: Any, address: Any) -> Any:
    """Numba intrinsic: prefetches the memory at an address."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        place = ir.PointerType(_I8)
        how = [ir.Constant(_I32, value) for value in (0, 3, 1)]  # for reading, highest locality, data cache
        wanted = ir.FunctionType(ir.VoidType(), [place, _I32, _I32, _I32])
        prefetch = cgutils.get_or_insert_function(builder.module, wanted, "llvm.prefetch.p0i8")
        builder.call(prefetch, [builder.inttoptr(args[0], place), *how])
        return context.get_dummy_value()

    return types.void(types.int64), generate


prefetch: Any = intrinsic(_prefetch_of)


def make_row_dot(instructions: str = INSTRUCTIONS) -> Any:
    """Makes a numba intrinsic, row_dot(row, probe, width, half) -> int64: the dot product of one row with one probe.

    row: uint8 *, (width,), two numbers per byte; width: bytes, a multiple of four. probe: int8 *, (2, half): the factors of the lower
    nibbles, then the factors of the upper nibbles, with zeros from `width` on. half: a multiple of PROBE_ALIGNMENT, at least width.
    """
    arithmetic = _Arithmetic(instructions)

    @intrinsic
    def row_dot(_: Any, row: Any, probe: Any, width: Any, half: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            row, probe, width, half = args
            sums = _sums(builder, arithmetic, [row], [probe], (width, half))
            return builder.sext(builder.extract_element(_added_up(builder, sums), ir.Constant(_I32, 0)), _I64)

        return types.int64(*[types.intp] * 4), generate

    return row_dot


def make_row_dots(instructions: str = INSTRUCTIONS) -> Any:
    """Makes a numba intrinsic, row_dots(row, probe, width, half, dots, limits, apart, norm) -> int64: `row_dot` for TOGETHER consecutive
    probes.

    dots: int32 *, (TOGETHER,), the output. limits: float32 *, (TOGETHER,), the first limits; the second limits, (TOGETHER,), are `apart`
    bytes later. Bit i of the result is set if dots[i] >= first limit i + norm * second limit i."""
    arithmetic = _Arithmetic(instructions)

    @intrinsic
    def row_dots(
        _: Any, row: Any, probe: Any, width: Any, half: Any, dots: Any, limits: Any, apart: Any, norm: Any
    ) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            row, probe, width, half, dots, limits, apart, norm = args
            stride = builder.add(half, half)
            starts = [builder.add(probe, builder.mul(stride, ir.Constant(_I64, p))) for p in range(TOGETHER)]
            found = _added_up(builder, _sums(builder, arithmetic, [row] * TOGETHER, starts, (width, half)))
            builder.store(found, builder.inttoptr(dots, found.type.as_pointer())).align = 4
            floats = ir.VectorType(ir.FloatType(), TOGETHER)
            first, slope = (
                builder.load(builder.inttoptr(at, floats.as_pointer())) for at in (limits, builder.add(limits, apart))
            )
            first.align = slope.align = 4
            least = builder.fadd(first, builder.fmul(slope, splat(builder, norm, TOGETHER)))
            reached = builder.fcmp_ordered(">=", builder.sitofp(found, floats), least)
            return builder.zext(builder.bitcast(reached, ir.IntType(TOGETHER)), _I64)

        return types.int64(*[types.intp] * 7, types.float32), generate

    return row_dots


def make_pair_dots(instructions: str = INSTRUCTIONS) -> Any:
    """Makes a numba intrinsic, pair_dots(which, cells, rows, probes, width, half, dots): `row_dot` for TOGETHER pairs of a probe and a row.

    which, cells: int32 *, (TOGETHER,), the indices of the probes and of the rows. rows: the address of row 0; a row takes `width` bytes.
    probes: the address of probe 0; a probe takes 2 * half bytes. dots: int32 *, (TOGETHER,), the output."""
    arithmetic = _Arithmetic(instructions)

    @intrinsic
    def pair_dots(_: Any, which: Any, cells: Any, rows: Any, probes: Any, width: Any, half: Any, dots: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            which, cells, rows, probes, width, half, dots = args

            def places(numbers: Any, first: Any, apart: Any) -> list[Any]:
                at = builder.inttoptr(numbers, _I32.as_pointer())
                each = [builder.load(builder.gep(at, [ir.Constant(_I64, i)])) for i in range(TOGETHER)]
                return [builder.add(first, builder.mul(builder.sext(number, _I64), apart)) for number in each]

            of_rows, of_probes = places(cells, rows, width), places(which, probes, builder.add(half, half))
            found = _added_up(builder, _sums(builder, arithmetic, of_rows, of_probes, (width, half)))
            builder.store(found, builder.inttoptr(dots, found.type.as_pointer())).align = 4
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7), generate

    return pair_dots


def _added_up(builder: Any, vectors: list[Any]) -> Any:
    """Adds up the numbers of each vector, and returns the sums in one vector. vectors: one, or four."""

    def added(a: Any, b: Any, left: list[int], right: list[int]) -> Any:
        masks = (ir.Constant(ir.VectorType(_I32, len(places)), places) for places in (left, right))
        return builder.add(*(builder.shuffle_vector(a, b, mask) for mask in masks))

    count, lanes = len(vectors), vectors[0].type.count
    # adds neighbours within each four numbers of two vectors; one instruction (PHADDD)
    pairs = [4 * four + other for four in range(lanes // 4) for other in (0, 2, lanes, lanes + 2)]
    while len(vectors) > 1:
        each = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [added(a, b, pairs, [place + 1 for place in pairs]) for a, b in each]
    (total,) = vectors
    while lanes > count:
        lanes //= 2
        total = added(total, total, list(range(lanes)), list(range(lanes, 2 * lanes)))
    return total


def _sums(
    builder: Any, arithmetic: _Arithmetic, rows: list[Any], probes: list[Any], sizes: tuple[Any, Any]
) -> list[Any]:
    """Generates the loop over the bytes of rows. Returns a vector for each pair of a row and a probe. Its numbers add up to the dot
    product. sizes: (width, half). The loop never reads beyond the end of a row, because the file may end there."""
    width, half = sizes
    lanes = arithmetic.lanes
    before = builder.block
    loop, after = builder.append_basic_block("some"), builder.append_basic_block("sum")
    builder.branch(loop)
    builder.position_at_end(loop)
    at = builder.phi(_I64)
    totals = [builder.phi(arithmetic.sums) for _ in probes]
    words = builder.trunc(builder.lshr(builder.sub(width, at), ir.Constant(_I64, 2)), _I32)
    order = ir.Constant(arithmetic.sums, list(range(lanes)))
    within = builder.icmp_unsigned("<", order, splat(builder, words, lanes))

    def factors(start: Any) -> Any:
        loaded = builder.load(builder.inttoptr(builder.add(start, at), arithmetic.octets.as_pointer()))
        loaded.align = 1
        return loaded

    def some(row: Any) -> Any:
        """Loads the next bytes of a row, with zeros beyond its end."""
        pointer = arithmetic.sums.as_pointer()
        kinds = [pointer, _I32, ir.VectorType(ir.IntType(1), lanes), arithmetic.sums]
        name = f"llvm.masked.load.v{lanes}i32.p0v{lanes}i32"
        load = cgutils.get_or_insert_function(builder.module, ir.FunctionType(arithmetic.sums, kinds), name)
        place = builder.inttoptr(builder.add(row, at), pointer)
        loaded = builder.call(load, [place, ir.Constant(_I32, 1), within, ir.Constant(arithmetic.sums, None)])
        return arithmetic.nibbles(builder, builder.bitcast(loaded, arithmetic.octets))

    grown, nibbles = [], {row: some(row) for row in dict.fromkeys(rows)}
    for row, probe, total in zip(rows, probes, totals, strict=True):
        partial: Any = ir.Constant(arithmetic.partial, None)
        for nibble, start in zip(nibbles[row], (probe, builder.add(probe, half)), strict=True):
            partial = arithmetic.grown(builder, partial, nibble, factors(start))
        grown.append(builder.add(total, arithmetic.widened(builder, partial)))
    following = builder.add(at, ir.Constant(_I64, 4 * lanes))
    at.add_incoming(ir.Constant(_I64, 0), before)
    at.add_incoming(following, loop)
    for total, more in zip(totals, grown, strict=True):
        total.add_incoming(ir.Constant(arithmetic.sums, None), before)
        total.add_incoming(more, loop)
    builder.cbranch(builder.icmp_signed("<", following, width), loop, after)
    builder.position_at_end(after)
    return grown


def rebound(function: Any, **names: Any) -> Any:
    """Returns the Python function of a compiled function, with other values for these global names.

    Variants are not closures, because numba's cache key contains the pickled cells of a closure. The pickle of a compiled function differs
    between processes, so each process would compile a closure again.
    """
    python = function.py_func
    return FunctionType(python.__code__, {**python.__globals__, **names}, python.__name__)
