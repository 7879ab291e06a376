"""The scan kernel for a few probes: dot products of eight-bit probes with four-bit rows; rows below the cut-off are
dropped.

Owns the arithmetic, and the choice of instructions for this processor. Never knows what a row or a similarity is. The
oracle of `scan`, in numpy, is in tests/search/test_scan.py.

Some rows by 4 probes stay in registers. One instruction multiplies and adds 64 pairs of numbers (VNNI); with only
AVX-512 or AVX2, two instructions do 64 or 32 pairs, in sums of 16 bits. A row below the cut-off costs one comparison:
there are no heaps, and no results to merge. `sign_kernel.py` serves many probes, and uses these products for the rows
that it cannot rule out.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from biodedup.values import Float32

_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def _instructions() -> str:
    features = llvmlite.binding.get_host_cpu_features()
    for name, *needed in (
        ("vbmi", "avx512vbmi", "avx512vnni"),
        ("vnni", "avx512vnni"),
        ("avx512", "avx512bw"),
        ("avx2", "avx2"),
    ):
        if all(features.get(feature) for feature in needed):
            return name
    return "plain"


INSTRUCTIONS = _instructions()
"""The instructions used on this processor: vbmi, vnni, avx512, avx2 or plain."""
PROBES_PER_TILE = 4
"""Probes of one tile, so that registers are left for the rows; with six, two threads are no faster than one."""
_PREFETCHED = 3
"""How many blocks ahead memory is prefetched."""


class _Arithmetic:
    """How one kind of processor multiplies. lanes: rows of a vector; groups: vectors of rows of a tile for several
    probes; partial: the type of a sum, which is widened to int32 after `steps_most` steps of four numbers."""

    def __init__(self, instructions: str) -> None:
        self.lanes = 8 if instructions == "avx2" else 16
        self.groups = 2 if instructions == "avx2" else 1 if instructions == "plain" else 4
        self.octets, self.pairs, self.sums = (ir.VectorType(t, 32 * self.lanes // t.width) for t in (_I8, _I16, _I32))
        # two products of 15 x 127 at most, eight times, stay within int16
        self.partial, self.steps_most = (self.pairs, 8) if instructions in ("avx512", "avx2") else (self.sums, 1 << 30)
        self._instructions = instructions

    def grown(self, builder: Any, total: Any, rows: Any, probe: Any) -> Any:
        """total, of type `partial`, plus the products of rows <u8> and probe <i8>."""
        if self._instructions in ("vbmi", "vnni"):
            fused = self._function(builder, "avx512.vpdpbusd.512", self.sums, [self.sums] * 3)
            return builder.call(fused, [total, builder.bitcast(rows, self.sums), builder.bitcast(probe, self.sums)])
        if self.partial is self.pairs:
            name = "avx512.pmaddubs.w.512" if self._instructions == "avx512" else "avx2.pmadd.ub.sw"
            products = builder.call(self._function(builder, name, self.pairs, [self.octets] * 2), [rows, probe])
            return builder.add(total, products)
        wide = ir.VectorType(_I32, 4 * self.lanes)
        products = builder.mul(builder.zext(rows, wide), builder.sext(probe, wide))
        for part in range(4):
            which = ir.Constant(self.sums, [4 * lane + part for lane in range(self.lanes)])
            total = builder.add(total, builder.shuffle_vector(products, products, which))
        return total

    def widened(self, builder: Any, total: Any) -> Any:
        """Sums <i32>, one a row."""
        if self.partial is self.sums:
            return total
        name = "avx512.pmaddw.d.512" if self._instructions == "avx512" else "avx2.pmadd.wd"
        ones = ir.Constant(self.pairs, [1] * self.pairs.count)
        return builder.call(self._function(builder, name, self.sums, [self.pairs] * 2), [total, ones])

    def nibbles(self, builder: Any, packed: Any) -> tuple[Any, Any]:
        """The lower and the upper four bits of each byte, as bytes."""
        words = builder.bitcast(packed, self.pairs)  # no processor shifts single bytes
        shifted = builder.bitcast(
            builder.lshr(words, splat(builder, ir.Constant(_I16, 4), self.pairs.count)), self.octets
        )
        low = splat(builder, ir.Constant(_I8, 15), self.octets.count)
        return builder.and_(packed, low), builder.and_(shifted, low)

    @staticmethod
    def _function(builder: Any, name: str, gives: Any, takes: list[Any]) -> Any:
        return cgutils.get_or_insert_function(builder.module, ir.FunctionType(gives, takes), f"llvm.x86.{name}")


def splat(builder: Any, value: Any, count: int) -> Any:
    """A vector of `count` times this value."""
    empty = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    single = builder.insert_element(empty, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(single, empty, ir.Constant(ir.VectorType(_I32, count), [0] * count))


def make_tile(probes_wide: int, instructions: str = INSTRUCTIONS) -> Any:
    """An intrinsic for numba, tile(rows, probes, stride, words, norms, offsets, slopes, masks), all integers or
    addresses:

    rows: uint8 *, (words, 64, 4), as `codes.pack_high_nibbles` lays them out; probes: int8 *, (probes_wide, stride);
    norms: float32 *, (64,); offsets, slopes: float32 *, (probes_wide,); masks: uint64 *, (probes_wide,): bit r is set
    where dot >= offset + slope * norm of row r.
    """
    arithmetic = _Arithmetic(instructions)
    vectors = 64 // arithmetic.lanes
    together = arithmetic.groups if probes_wide > 1 else vectors

    @intrinsic
    def tile(
        _: Any, rows: Any, probes: Any, stride: Any, words: Any, norms: Any, offsets: Any, slopes: Any, masks: Any
    ) -> Any:
        signature = types.void(*[types.intp] * 8)

        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            stride, words = args[2:4]
            rows, probes, norms, offsets, slopes, masks = (
                builder.inttoptr(args[at], ir.PointerType(kind))
                for at, kind in ((0, _I8), (1, _I8), (4, _F32), (5, _F32), (6, _F32), (7, _I64))
            )
            bits: list[Any] = [ir.Constant(_I64, 0)] * probes_wide
            for first in range(0, vectors, together):
                span = range(first, first + together)
                loop = _Loop(builder, arithmetic, probes_wide, span)
                totals = loop.totals(rows, probes, stride, words)
                _compare(builder, arithmetic.lanes, totals, span, norms, offsets, slopes, bits)
            for p, mask in enumerate(bits):
                builder.store(mask, builder.gep(masks, [ir.Constant(_I64, p)]))
            return context.get_dummy_value()

        return signature, generate

    return tile


class _Loop:
    """The loop over a row's numbers, for some probes and vectors of rows."""

    def __init__(self, builder: Any, arithmetic: _Arithmetic, probes_wide: int, span: range) -> None:
        self._builder, self._arithmetic, self._span, self._wide = builder, arithmetic, span, probes_wide

    def totals(self, rows: Any, probes: Any, stride: Any, words: Any) -> list[list[Any]]:
        """int32 sums for each probe and vector of rows."""
        builder, arithmetic = self._builder, self._arithmetic
        rows = builder.bitcast(rows, arithmetic.octets.as_pointer())
        quads = [
            builder.bitcast(builder.gep(probes, [builder.mul(stride, ir.Constant(_I64, p))]), _I32.as_pointer())
            for p in range(self._wide)
        ]
        before = builder.block
        outer, inner, widen, after = (builder.append_basic_block(n) for n in ("some", "word", "widen", "compare"))
        builder.branch(outer)
        builder.position_at_end(outer)
        start = builder.phi(_I64)
        totals = self._phis(arithmetic.sums)
        end = builder.add(start, ir.Constant(_I64, arithmetic.steps_most // 2))
        end = builder.select(builder.icmp_signed("<", end, words), end, words)
        builder.branch(inner)

        builder.position_at_end(inner)
        word = builder.phi(_I64)
        partial = self._phis(arithmetic.partial)
        grown = self._grown(partial, rows, quads, word)
        following = builder.add(word, ir.Constant(_I64, 1))
        word.add_incoming(start, outer)
        word.add_incoming(following, inner)
        self._feed(partial, [[ir.Constant(arithmetic.partial, None)] * len(self._span)] * self._wide, outer)
        self._feed(partial, grown, inner)
        builder.cbranch(builder.icmp_signed("<", following, end), inner, widen)

        builder.position_at_end(widen)
        ended = [
            [builder.add(total, arithmetic.widened(builder, some)) for total, some in zip(*both, strict=True)]
            for both in zip(totals, grown, strict=True)
        ]
        start.add_incoming(ir.Constant(_I64, 0), before)
        start.add_incoming(end, widen)
        self._feed(totals, [[ir.Constant(arithmetic.sums, None)] * len(self._span)] * self._wide, before)
        self._feed(totals, ended, widen)
        builder.cbranch(builder.icmp_signed("<", end, words), outer, after)
        builder.position_at_end(after)
        return ended

    def _phis(self, kind: Any) -> list[list[Any]]:
        return [[self._builder.phi(kind) for _ in self._span] for _ in range(self._wide)]

    @staticmethod
    def _feed(phis: list[list[Any]], values: list[list[Any]], block: Any) -> None:
        for some, given in zip(phis, values, strict=True):
            for phi, value in zip(some, given, strict=True):
                phi.add_incoming(value, block)

    def _grown(self, totals: list[list[Any]], rows: Any, quads: list[Any], word: Any) -> list[list[Any]]:
        """Adds the two steps of one word of each row."""
        builder, arithmetic = self._builder, self._arithmetic
        vectors = 64 // arithmetic.lanes
        both: list[list[Any]] = [[], []]
        for group in self._span:
            at = builder.add(builder.mul(word, ir.Constant(_I64, vectors)), ir.Constant(_I64, group))
            packed = builder.load(builder.gep(rows, [at]))
            packed.align = 1
            for step, some in enumerate(arithmetic.nibbles(builder, packed)):
                both[step].append(some)
        for step in range(2):
            following = []
            for p, row in enumerate(totals):
                at = builder.add(builder.mul(word, ir.Constant(_I64, 2)), ir.Constant(_I64, step))
                quad = builder.load(builder.gep(quads[p], [at]))
                quad.align = 4
                probe = builder.bitcast(splat(builder, quad, arithmetic.lanes), arithmetic.octets)
                following.append([arithmetic.grown(builder, t, r, probe) for t, r in zip(row, both[step], strict=True)])
            totals = following
        return totals


def _compare(
    builder: Any,
    lanes: int,
    totals: list[list[Any]],
    span: range,
    norms: Any,
    offsets: Any,
    slopes: Any,
    bits: list[Any],
) -> None:
    floats = ir.VectorType(_F32, lanes)
    lengths = builder.bitcast(norms, floats.as_pointer())
    known = []
    for group in span:
        length = builder.load(builder.gep(lengths, [ir.Constant(_I64, group)]))
        length.align = 4
        known.append(length)
    for p, row in enumerate(totals):
        offset, slope = (
            splat(builder, builder.load(builder.gep(values, [ir.Constant(_I64, p)])), lanes)
            for values in (offsets, slopes)
        )
        for group, length, total in zip(span, known, row, strict=True):
            least = builder.fadd(offset, builder.fmul(slope, length))
            passed = builder.fcmp_ordered(">=", builder.sitofp(total, floats), least)
            mask = builder.zext(builder.bitcast(passed, ir.IntType(lanes)), _I64)
            bits[p] = builder.or_(bits[p], builder.shl(mask, ir.Constant(_I64, lanes * group)))


def _prefetch_of(_: Any, address: Any) -> Any:
    """An intrinsic for numba: prefetches the memory at an address."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        place = ir.PointerType(_I8)
        how = [ir.Constant(_I32, value) for value in (0, 3, 1)]  # to read, again and again, data
        wanted = ir.FunctionType(ir.VoidType(), [place, _I32, _I32, _I32])
        prefetch = cgutils.get_or_insert_function(builder.module, wanted, "llvm.prefetch.p0i8")
        builder.call(prefetch, [builder.inttoptr(args[0], place), *how])
        return context.get_dummy_value()

    return types.void(types.int64), generate


prefetch: Any = intrinsic(_prefetch_of)


def make_row_dot(instructions: str = INSTRUCTIONS) -> Any:
    """An intrinsic for numba, row_dot(row, probe, octets) -> int64: the dot product of one row with one probe.

    row: uint8 *, (octets,), two numbers a byte; probe: int8 *, (2, octets): the factors of the lower nibbles, then
    those of the upper ones. octets: a multiple of 64, padded with 0.
    """
    arithmetic = _Arithmetic(instructions)

    @intrinsic
    def row_dot(_: Any, row: Any, probe: Any, octets: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            kind = arithmetic.octets.as_pointer()
            row, probe = (builder.inttoptr(args[at], kind) for at in (0, 1))
            steps = builder.udiv(args[2], ir.Constant(_I64, 4 * arithmetic.lanes))
            before = builder.block
            loop, after = builder.append_basic_block("some"), builder.append_basic_block("sum")
            builder.branch(loop)
            builder.position_at_end(loop)
            step, total = builder.phi(_I64), builder.phi(arithmetic.sums)
            packed = builder.load(builder.gep(row, [step]))
            packed.align = 1
            partial: Any = ir.Constant(arithmetic.partial, None)
            for nibble, at in zip(arithmetic.nibbles(builder, packed), (step, builder.add(step, steps)), strict=True):
                factors = builder.load(builder.gep(probe, [at]))
                factors.align = 1
                partial = arithmetic.grown(builder, partial, nibble, factors)
            grown = builder.add(total, arithmetic.widened(builder, partial))
            following = builder.add(step, ir.Constant(_I64, 1))
            step.add_incoming(ir.Constant(_I64, 0), before)
            step.add_incoming(following, loop)
            total.add_incoming(ir.Constant(arithmetic.sums, None), before)
            total.add_incoming(grown, loop)
            builder.cbranch(builder.icmp_signed("<", following, steps), loop, after)
            builder.position_at_end(after)
            name = f"llvm.vector.reduce.add.v{arithmetic.lanes}i32"
            added = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_I32, [arithmetic.sums]), name)
            return builder.sext(builder.call(added, [grown]), _I64)

        return types.int64(types.intp, types.intp, types.intp), generate

    return row_dot


@numba.njit(nogil=True, cache=True)
def _dot(nibbles: Any, cell: int, probes: Any, p: int) -> int:
    block, lane, total = cell // 64, cell % 64 * 4, 0
    for h in range(nibbles.shape[1]):
        for t in range(4):
            pair = nibbles[block, h, lane + t]
            total += int(pair & 15) * int(probes[p, 8 * h + t]) + int(pair >> 4) * int(probes[p, 8 * h + 4 + t])
    return total


_tile_one, _tile_wide = make_tile(1), make_tile(PROBES_PER_TILE)


@numba.njit(nogil=True, cache=True)
def _scan(
    nibbles: Any,
    norms: Any,
    live: Any,
    first: int,
    last: int,
    block: int,
    count: int,
    probes: Any,
    offsets: Any,
    slopes: Any,
    which: Any,
    cells: Any,
    dots: Any,
) -> tuple[int, int]:
    words, width = nibbles.shape[1:]
    stride = probes.shape[1]
    wide = 1 if count == 1 else PROBES_PER_TILE
    masks = np.empty(32, np.uint64)[8 : 8 + PROBES_PER_TILE]  # away from what another thread writes
    at_probes, at_norms, at_masks = probes.ctypes.data, norms.ctypes.data, masks.ctypes.data
    at_offsets, at_slopes = offsets.ctypes.data, slopes.ctypes.data
    found = 0
    while block < nibbles.shape[0]:
        if found + 64 * count > which.size:
            return found, block
        alive = live[block] if live.size else ~np.uint64(0)
        if alive == 0:
            block += 1
            continue
        at_nibbles = nibbles.ctypes.data + words * width * block
        if block + _PREFETCHED < nibbles.shape[0]:
            for line in range(words * width // 64):
                prefetch(at_nibbles + words * width * _PREFETCHED + 64 * line)
        for p in range(0, count, wide):
            at_probe, at_offset, at_slope = at_probes + p * stride, at_offsets + 4 * p, at_slopes + 4 * p
            at_norm = at_norms + 256 * block
            if wide > 1:
                _tile_wide(at_nibbles, at_probe, stride, words, at_norm, at_offset, at_slope, at_masks)
            else:
                _tile_one(at_nibbles, at_probe, stride, words, at_norm, at_offset, at_slope, at_masks)
            for i in range(min(wide, count - p)):
                mask = masks[i] & alive
                if mask:
                    for r in range(64):
                        cell = 64 * block + r
                        if (mask >> np.uint64(r)) & np.uint64(1) and first <= cell < last:
                            which[found], cells[found] = p + i, cell
                            dots[found] = _dot(nibbles, cell, probes, p + i)
                            found += 1
        block += 1
    return found, block


def filled(
    probes: NDArray[np.int8], offsets: Float32, slopes: Float32
) -> tuple[int, NDArray[np.int8], Float32, Float32]:
    """How many probes there are, and the arrays padded to whole tiles. They are made outside the kernel, which only
    knows their addresses: numba frees an array once only its address is still in use, and other threads would write
    there."""
    missing = -len(probes) % PROBES_PER_TILE if len(probes) > 1 else 0  # a single probe has its own tile
    if missing:
        probes = np.pad(probes, ((0, missing), (0, 0)))
        offsets, slopes = np.pad(offsets, (0, missing)), np.pad(slopes, (0, missing))
    return len(probes) - missing, probes, offsets, slopes


def rebound(function: Any, **names: Any) -> Any:
    """A compiled function's Python function, with other globals of these names.

    Variants are made in this way, not as closures: numba keys its cache by what a closure's cells pickle to. For
    compiled functions this differs between processes, so that each process would compile anew.
    """
    python = function.py_func
    return FunctionType(python.__code__, {**python.__globals__, **names}, python.__name__)


def make_scan(instructions: str) -> Any:
    """`_scan`, compiled for another processor."""
    tiles = {"_tile_one": make_tile(1, instructions), "_tile_wide": make_tile(PROBES_PER_TILE, instructions)}
    return numba.njit(rebound(_scan, **tiles), nogil=True)


def scan(
    nibbles: NDArray[np.uint8],
    norms: Float32,
    live: NDArray[np.uint64],
    cells: tuple[int, int],
    start: int,
    probes: NDArray[np.int8],
    offsets: Float32,
    slopes: Float32,
    out: tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]],
) -> tuple[int, int]:
    """Finds the pairs of a probe and a row with dot >= offset + slope * norm, where dot sums probe times high nibble (0
    to 15).

    nibbles: (b, d / 8, 256), as in `codes.pack_high_nibbles`; norms: (64 b,); live: bit r of block b is set where the
    row counts, or empty where all do; cells: [first, last) of the nibbles; start: the block to begin with; probes: int8
    (q, d); offsets, slopes: float32 (q,). Writes probe, cell and dot of each pair into `out`, whose arrays have room
    for at least 64 q. Returns how many, and the block to go on with when the room is spent; all is done when that is b.
    """
    first, last = cells
    number, block = _scan(nibbles, norms, live, first, last, start, *filled(probes, offsets, slopes), *out)
    return number, block
