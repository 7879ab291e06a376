"""The scan's inner loop: dot products of eight-bit probes with four-bit rows, of which only those above a cut leave it.

Owns the arithmetic. Never knows what a row or a similarity is. `scan` has an oracle in numpy in tests/test_scan.py.

A tile of 64 rows by 4 probes stays in registers; one instruction multiplies and adds 64 pairs of numbers (VNNI), two or three
where the processor has only AVX-512 or AVX2. All rows of a block, in all its four-bit numbers, are unpacked once into the
first-level cache and meet every probe of the batch there. What a probe's cut does not let through costs a comparison and is
forgotten: no heaps, no results to merge. FAISS's fast-scan kernel for 4-bit product quantisation (PQ64x4fs, as many probes)
reads half of these bytes in twice the time, with three times the error (benchmarks/speed.py).
"""

from __future__ import annotations

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
_LANES = 16  # rows whose sums share a vector of int32


def _instructions() -> str:
    features = llvmlite.binding.get_host_cpu_features()
    for name, needed in (("vnni", "avx512vnni"), ("avx512", "avx512bw"), ("avx2", "avx2")):
        if features.get(needed):
            return name
    return "plain"


INSTRUCTIONS = _instructions()
"""vnni, avx512, avx2 or plain: what this processor is asked for."""
WIDE = 4
"""Probes in a tile: as many as leave registers for the rows; with six, two threads are no faster than one."""


def _times(builder: Any, instructions: str, total: Any, rows: Any, probe: Any) -> Any:
    """total <16 x i32> + the sum over four neighbours of rows <64 x u8> times probe <64 x i8>."""
    module = builder.module
    if instructions == "vnni":
        vector = ir.VectorType(_I32, _LANES)
        fused = cgutils.get_or_insert_function(
            module, ir.FunctionType(vector, [vector] * 3), "llvm.x86.avx512.vpdpbusd.512"
        )
        return builder.call(fused, [total, builder.bitcast(rows, vector), builder.bitcast(probe, vector)])
    if instructions in ("avx512", "avx2"):
        return _times_in_pairs(builder, instructions, total, rows, probe)
    wide = ir.VectorType(_I32, 4 * _LANES)
    products = builder.mul(builder.zext(rows, wide), builder.sext(probe, wide))
    for part in range(4):
        which = ir.Constant(ir.VectorType(_I32, _LANES), [4 * lane + part for lane in range(_LANES)])
        total = builder.add(total, builder.shuffle_vector(products, products, which))
    return total


def _times_in_pairs(builder: Any, instructions: str, total: Any, rows: Any, probe: Any) -> Any:
    """As sums of two in int16, which four-bit rows cannot overflow (2 x 15 x 128), then sums of four in int32."""
    bits = 512 if instructions == "avx512" else 256
    names = ("avx512.pmaddubs.w.512", "avx512.pmaddw.d.512") if bits == 512 else ("avx2.pmadd.ub.sw", "avx2.pmadd.wd")
    octets, pairs, sums = (ir.VectorType(t, bits // t.width) for t in (_I8, _I16, _I32))
    first, second = (
        cgutils.get_or_insert_function(builder.module, ir.FunctionType(out, [given] * 2), f"llvm.x86.{name}")
        for name, given, out in zip(names, (octets, pairs), (pairs, sums), strict=True)
    )
    ones = ir.Constant(pairs, [1] * (bits // 16))
    parts = []
    for low in range(0, 512, bits):
        which = ir.Constant(ir.VectorType(_I32, bits // 8), list(range(low // 8, (low + bits) // 8)))
        some, mine = (builder.shuffle_vector(v, v, which) for v in (rows, probe))
        parts.append(builder.call(second, [builder.call(first, [some, mine]), ones]))
    if len(parts) == 1:
        return builder.add(total, parts[0])
    together = ir.Constant(ir.VectorType(_I32, _LANES), list(range(_LANES)))
    return builder.add(total, builder.shuffle_vector(parts[0], parts[1], together))


def _splat(builder: Any, value: Any, count: int) -> Any:
    empty = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    one = builder.insert_element(empty, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, empty, ir.Constant(ir.VectorType(_I32, count), [0] * count))


def make_tile(probes_wide: int, instructions: str = INSTRUCTIONS) -> Any:
    """An intrinsic for numba, tile(rows, probes, stride, steps, norms, offsets, slopes, masks), all integers or addresses:

    rows: uint8 *, (steps, 64, 4); probes: int8 *, (probes_wide, stride); norms: float32 *, (64,); offsets, slopes: float32 *,
    (probes_wide,); masks: uint64 *, (probes_wide,): bit r is set where dot >= offset + slope * norm of row r.
    """
    groups = 4 if instructions in ("vnni", "avx512") else 1  # of 16 rows, whose sums have registers at the same time

    @intrinsic
    def tile(
        _: Any, rows: Any, probes: Any, stride: Any, steps: Any, norms: Any, offsets: Any, slopes: Any, masks: Any
    ) -> Any:
        signature = types.void(*[types.intp] * 8)

        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            stride, steps = args[2:4]
            rows, probes, norms, offsets, slopes, masks = (
                builder.inttoptr(args[at], ir.PointerType(kind))
                for at, kind in ((0, _I8), (1, _I8), (4, _F32), (5, _F32), (6, _F32), (7, _I64))
            )
            bits: list[Any] = [ir.Constant(_I64, 0)] * probes_wide
            for first in range(0, 4, groups):
                span = range(first, first + groups)
                totals = _totals(builder, instructions, probes_wide, span, rows, probes, stride, steps)
                _compare(builder, totals, span, norms, offsets, slopes, bits)
            for p, mask in enumerate(bits):
                builder.store(mask, builder.gep(masks, [ir.Constant(_I64, p)]))
            return context.get_dummy_value()

        return signature, generate

    return tile


def _totals(
    builder: Any, instructions: str, wide: int, span: range, rows: Any, probes: Any, stride: Any, steps: Any
) -> list[list[Any]]:
    """The loop over steps. Returns <16 x i32> for each probe and group of rows."""
    sums = ir.VectorType(_I32, _LANES)
    octets = ir.VectorType(_I8, 4 * _LANES)
    fours = builder.bitcast(rows, octets.as_pointer())
    quads = [
        builder.bitcast(builder.gep(probes, [builder.mul(stride, ir.Constant(_I64, p))]), _I32.as_pointer())
        for p in range(wide)
    ]
    before = builder.block
    loop, after = builder.append_basic_block("steps"), builder.append_basic_block("compare")
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(_I64)
    totals = [[builder.phi(sums) for _ in span] for _ in range(wide)]
    loaded = []
    for group in span:
        at = builder.add(builder.mul(step, ir.Constant(_I64, 4)), ir.Constant(_I64, group))
        some = builder.load(builder.gep(fours, [at]))
        some.align = 64
        loaded.append(some)
    grown = []
    for p in range(wide):
        quad = builder.load(builder.gep(quads[p], [step]))
        quad.align = 4
        probe = builder.bitcast(_splat(builder, quad, _LANES), octets)
        grown.append(
            [_times(builder, instructions, total, some, probe) for total, some in zip(totals[p], loaded, strict=True)]
        )
    following = builder.add(step, ir.Constant(_I64, 1))
    step.add_incoming(ir.Constant(_I64, 0), before)
    step.add_incoming(following, loop)
    for row, new_row in zip(totals, grown, strict=True):
        for total, new in zip(row, new_row, strict=True):
            total.add_incoming(ir.Constant(sums, [0] * _LANES), before)
            total.add_incoming(new, loop)
    builder.cbranch(builder.icmp_signed("<", following, steps), loop, after)
    builder.position_at_end(after)
    return grown


def _compare(
    builder: Any, totals: list[list[Any]], span: range, norms: Any, offsets: Any, slopes: Any, bits: list[Any]
) -> None:
    floats = ir.VectorType(_F32, _LANES)
    lengths = builder.bitcast(norms, floats.as_pointer())
    known = []
    for group in span:
        length = builder.load(builder.gep(lengths, [ir.Constant(_I64, group)]))
        length.align = 4
        known.append(length)
    for p, row in enumerate(totals):
        offset, slope = (
            _splat(builder, builder.load(builder.gep(values, [ir.Constant(_I64, p)])), _LANES)
            for values in (offsets, slopes)
        )
        for group, length, total in zip(span, known, row, strict=True):
            least = builder.fadd(offset, builder.fmul(slope, length))
            passed = builder.fcmp_ordered(">=", builder.sitofp(total, floats), least)
            mask = builder.zext(builder.bitcast(passed, _I16), _I64)
            bits[p] = builder.or_(bits[p], builder.shl(mask, ir.Constant(_I64, _LANES * group)))


SIGN_WORDS = 4
"""Words of 64 signs that stand for a row in a first pass."""


def _set_bits_of(_: Any, word: Any) -> Any:
    """An intrinsic for numba: how many bits of a uint64 are set."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), generate


_set_bits: Any = intrinsic(_set_bits_of)


def _least_distance_of(_: Any, rows: Any, probes: Any, limits: Any, masks: Any) -> Any:
    """An intrinsic for numba, all addresses: rows uint64 *, (SIGN_WORDS, 64); probes uint64 *, (WIDE, SIGN_WORDS); limits
    uint64 *, (WIDE,); masks uint64 *, (WIDE,): not 0 where some of the 64 rows differ from the probe in at most so many signs.

    Only the least of the distances is compared: which row it was is asked again for the few blocks that have one.
    """
    signature = types.void(*[types.intp] * 4)

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        rows, probes, limits, masks = (builder.inttoptr(arg, ir.PointerType(_I64)) for arg in args)
        eight = ir.VectorType(_I64, 8)
        count = cgutils.get_or_insert_function(builder.module, ir.FunctionType(eight, [eight]), "llvm.ctpop.v8i64")
        loaded = builder.bitcast(rows, eight.as_pointer())
        words = [[_word(builder, probes, SIGN_WORDS * p + w) for w in range(SIGN_WORDS)] for p in range(WIDE)]
        least: list[Any] = [None] * WIDE
        for group in range(8):
            some = []
            for w in range(SIGN_WORDS):
                one = builder.load(builder.gep(loaded, [ir.Constant(_I64, 8 * w + group)]))
                one.align = 64
                some.append(one)
            for p in range(WIDE):
                total = None
                for one, word in zip(some, words[p], strict=True):
                    differing = builder.call(count, [builder.xor(one, word)])
                    total = differing if total is None else builder.add(total, differing)
                if least[p] is None:
                    least[p] = total
                else:
                    least[p] = builder.select(builder.icmp_unsigned("<", total, least[p]), total, least[p])
        for p in range(WIDE):
            near = builder.icmp_unsigned("<=", least[p], _word(builder, limits, p))
            mask = builder.zext(builder.bitcast(near, _I8), _I64)
            builder.store(mask, builder.gep(masks, [ir.Constant(_I64, p)]))
        return context.get_dummy_value()

    return signature, generate


_least_distance: Any = intrinsic(_least_distance_of)


def _word(builder: Any, words: Any, index: int) -> Any:
    return _splat(builder, builder.load(builder.gep(words, [ir.Constant(_I64, index)])), 8)


def _sign_scan(
    signs: Any,
    plane: Any,
    norms: Any,
    live: Any,
    first: int,
    last: int,
    block: int,
    probe_signs: Any,
    limits: Any,
    probes: Any,
    offsets: Any,
    slopes: Any,
    which: Any,
    cells: Any,
    dots: Any,
) -> tuple[int, int]:
    count = probes.shape[0]
    halves = plane.shape[1]
    masks = np.empty(32, np.uint64)[8 : 8 + WIDE]  # away from what another thread writes
    at_signs, at_probes, at_limits, at_masks = (
        signs.ctypes.data,
        probe_signs.ctypes.data,
        limits.ctypes.data,
        masks.ctypes.data,
    )
    found = 0
    while block < plane.shape[0]:
        if found + 64 * count > which.size:
            return found, block
        alive = live[block] if live.size else ~np.uint64(0)
        for p in range(0, probe_signs.shape[0], WIDE):
            _least_distance(
                at_signs + 512 * SIGN_WORDS * block, at_probes + 8 * SIGN_WORDS * p, at_limits + 8 * p, at_masks
            )
            for i in range(WIDE):
                if masks[i] and p + i < count:
                    for r in range(64):
                        distance = np.uint64(0)
                        for w in range(SIGN_WORDS):
                            distance += _set_bits(signs[block, w, r] ^ probe_signs[p + i, w])
                        cell = 64 * block + r
                        if distance > limits[p + i] or not first <= cell < last:
                            continue
                        if not (alive >> np.uint64(r)) & np.uint64(1):
                            continue
                        dot = 0
                        for h in range(halves):
                            for t in range(4):
                                pair = plane[block, h, 4 * r + t]
                                dot += int(pair & 15) * int(probes[p + i, 8 * h + t])
                                dot += int(pair >> 4) * int(probes[p + i, 8 * h + 4 + t])
                        if dot >= offsets[p + i] + slopes[p + i] * norms[cell]:
                            which[found], cells[found], dots[found] = p + i, cell, dot
                            found += 1
        block += 1
    return found, block


_signs_compiled = numba.njit(_sign_scan, nogil=True, cache=True)


def scan_signs(
    signs: NDArray[np.uint64],
    plane: NDArray[np.uint8],
    norms: Float32,
    live: NDArray[np.uint64],
    cells: tuple[int, int],
    start: int,
    probe_signs: NDArray[np.uint64],
    limits: NDArray[np.uint64],
    probes: NDArray[np.int8],
    offsets: Float32,
    slopes: Float32,
    found: tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]],
) -> tuple[int, int]:
    """As `scan`, of those pairs alone whose signs differ in at most `limits` places.

    signs: uint64 (b, SIGN_WORDS, 64), 64-byte aligned; probe_signs: uint64 (q', SIGN_WORDS), limits: uint64 (q',), where q' is
    q rounded up to a multiple of WIDE.
    """
    first, last = cells
    number, block = _signs_compiled(
        signs, plane, norms, live, first, last, start, probe_signs, limits, probes, offsets, slopes, *found
    )
    return number, block


def make_scan(instructions: str = INSTRUCTIONS, *, cache: bool = False) -> Any:
    """`scan` for a processor; see there."""
    tile_one, tile_wide = make_tile(1, instructions), make_tile(WIDE, instructions)

    def scan(
        plane: Any,
        norms: Any,
        live: Any,
        first: int,
        last: int,
        block: int,
        probes: Any,
        offsets: Any,
        slopes: Any,
        which: Any,
        cells: Any,
        dots: Any,
    ) -> tuple[int, int]:
        width = plane.shape[2]
        halves = plane.shape[1]
        steps = 2 * halves
        stride = probes.shape[1]
        count = probes.shape[0]
        space = np.empty(steps * width + 64, np.uint8)
        base = -space.ctypes.data % 64
        rows = space[base : base + steps * width]
        masks = np.empty(32, np.uint64)[8 : 8 + WIDE]  # away from what another thread writes
        at_rows, at_probes, at_norms = rows.ctypes.data, probes.ctypes.data, norms.ctypes.data
        at_offsets, at_slopes, at_masks = offsets.ctypes.data, slopes.ctypes.data, masks.ctypes.data
        found = 0
        while block < plane.shape[0]:
            if found + 64 * count > which.size:
                return found, block
            alive = live[block] if live.size else ~np.uint64(0)
            if alive == 0:
                block += 1
                continue
            for h in range(halves):
                for j in range(width):
                    pair = plane[block, h, j]
                    rows[2 * h * width + j] = pair & 15
                    rows[(2 * h + 1) * width + j] = pair >> 4
            p = 0
            while p < count:
                wide = WIDE if count - p >= WIDE else 1
                if wide > 1:
                    tile_wide(
                        at_rows,
                        at_probes + p * stride,
                        stride,
                        steps,
                        at_norms + 256 * block,
                        at_offsets + 4 * p,
                        at_slopes + 4 * p,
                        at_masks,
                    )
                else:
                    tile_one(
                        at_rows,
                        at_probes + p * stride,
                        stride,
                        steps,
                        at_norms + 256 * block,
                        at_offsets + 4 * p,
                        at_slopes + 4 * p,
                        at_masks,
                    )
                for i in range(wide):
                    mask = masks[i] & alive
                    if mask:
                        for r in range(64):
                            cell = 64 * block + r
                            if (mask >> np.uint64(r)) & np.uint64(1) and first <= cell < last:
                                dot = 0
                                for s in range(steps):
                                    for t in range(4):
                                        dot += int(rows[s * width + 4 * r + t]) * int(probes[p + i, 4 * s + t])
                                which[found], cells[found], dots[found] = p + i, cell, dot
                                found += 1
                p += wide
            block += 1
        return found, block

    return numba.njit(scan, nogil=True, cache=cache)


_scan = make_scan(cache=True)


def scan(
    plane: NDArray[np.uint8],
    norms: Float32,
    live: NDArray[np.uint64],
    cells: tuple[int, int],
    start: int,
    probes: NDArray[np.int8],
    offsets: Float32,
    slopes: Float32,
    found: tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]],
) -> tuple[int, int]:
    """Pairs of a probe and a row with dot >= offset + slope * norm, where dot is the sum of probe times upper half (0 to 15).

    plane: (b, d / 8, 256), as `codes.planes` lays it; norms: (64 b,); live: bit r of block b is set where the row counts, or
    empty where all do; cells: [first, last) of the plane; start: the block to begin with; probes: int8 (q, d); offsets,
    slopes: float32 (q,). Writes probe, cell and dot of each pair into `found`, whose arrays have room for at least 64 q.
    Returns how many, and the block to go on with when the room is spent; all is done when that is b.
    """
    first, last = cells
    number, block = _scan(plane, norms, live, first, last, start, probes, offsets, slopes, *found)
    return number, block
