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


def splat(builder: Any, value: Any, count: int) -> Any:
    """A vector of `count` times this value."""
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
        probe = builder.bitcast(splat(builder, quad, _LANES), octets)
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
            splat(builder, builder.load(builder.gep(values, [ir.Constant(_I64, p)])), _LANES)
            for values in (offsets, slopes)
        )
        for group, length, total in zip(span, known, row, strict=True):
            least = builder.fadd(offset, builder.fmul(slope, length))
            passed = builder.fcmp_ordered(">=", builder.sitofp(total, floats), least)
            mask = builder.zext(builder.bitcast(passed, _I16), _I64)
            bits[p] = builder.or_(bits[p], builder.shl(mask, ir.Constant(_I64, _LANES * group)))


AHEAD = 24
"""Pairs whose memory is asked for beforehand."""


def _prefetch_of(_: Any, address: Any) -> Any:
    """An intrinsic for numba: the memory at an address is wanted soon."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        place = ir.PointerType(_I8)
        how = [ir.Constant(_I32, value) for value in (0, 3, 1)]  # to read, again and again, data
        wanted = ir.FunctionType(ir.VoidType(), [place, _I32, _I32, _I32])
        prefetch = cgutils.get_or_insert_function(builder.module, wanted, "llvm.prefetch.p0i8")
        builder.call(prefetch, [builder.inttoptr(args[0], place), *how])
        return context.get_dummy_value()

    return types.void(types.int64), generate


prefetch: Any = intrinsic(_prefetch_of)


_CHUNK = 16  # halves of a row that fit a vector


def _chunk_dot_of(_: Any, rows: Any, probe: Any) -> Any:
    """An intrinsic for numba, all addresses: the dot product of one row's next 16 x 8 numbers, four bytes of every 256 from rows on,
    and int8 * probe."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        quads = ir.VectorType(_I32, _CHUNK)
        octets = ir.VectorType(_I8, 4 * _CHUNK)
        row: Any = ir.Constant(quads, ir.Undefined)
        for h in range(_CHUNK):
            at = builder.inttoptr(builder.add(args[0], ir.Constant(_I64, 256 * h)), ir.PointerType(_I32))
            row = builder.insert_element(row, builder.load(at), ir.Constant(_I32, h))
        both = builder.load(builder.inttoptr(args[1], ir.VectorType(_I32, 2 * _CHUNK).as_pointer()))
        both.align = 4
        total = ir.Constant(quads, [0] * _CHUNK)
        for upper, shift in ((0, 0), (1, 4)):
            places = ir.Constant(quads, [2 * h + upper for h in range(_CHUNK)])
            probe = builder.bitcast(builder.shuffle_vector(both, both, places), octets)
            bits = builder.lshr(row, ir.Constant(quads, [shift] * _CHUNK))
            halves = builder.and_(bits, ir.Constant(quads, [0x0F0F0F0F] * _CHUNK))
            total = _times(builder, INSTRUCTIONS, total, builder.bitcast(halves, octets), probe)
        added = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_I32, [quads]), "llvm.vector.reduce.add.v16i32"
        )
        return builder.sext(builder.call(added, [total]), _I64)

    return types.int64(types.intp, types.intp), generate


_chunk_dot: Any = intrinsic(_chunk_dot_of)


@numba.njit(nogil=True, cache=True)
def _dot(plane: Any, cell: Any, probes: Any, p: Any) -> int:
    halves = plane.shape[1]
    block, lane = cell // 64, cell % 64 * 4
    at_rows = plane.ctypes.data + 256 * halves * block + lane
    at_probe = probes.ctypes.data + probes.shape[1] * p
    total = 0
    whole = halves // _CHUNK * _CHUNK
    for h in range(0, whole, _CHUNK):
        total += _chunk_dot(at_rows + 256 * h, at_probe + 8 * h)
    for h in range(whole, halves):
        for t in range(4):
            pair = plane[block, h, lane + t]
            total += int(pair & 15) * int(probes[p, 8 * h + t])
            total += int(pair >> 4) * int(probes[p, 8 * h + 4 + t])
    return total


@numba.njit(nogil=True, cache=True)
def _dots(plane: Any, which: Any, cells: Any, probes: Any, found: Any) -> None:
    halves = plane.shape[1]
    for i in range(which.shape[0]):
        if i + AHEAD < which.shape[0]:
            ahead = cells[i + AHEAD]
            at = plane.ctypes.data + 256 * halves * (ahead // 64) + ahead % 64 * 4
            for h in range(halves):
                prefetch(at + 256 * h)
        found[i] = _dot(plane, cells[i], probes, which[i])


def dots(
    plane: NDArray[np.uint8], which: NDArray[np.int32], cells: NDArray[np.int64], probes: NDArray[np.int8]
) -> NDArray[np.int32]:
    """The dot products that `scan` compares, of some pairs: int32 (n,)."""
    found = np.empty(len(which), np.int32)
    _dots(plane, which, cells, probes, found)
    return found


@numba.njit(nogil=True, cache=True)
def _keep_reaching(
    plane: Any, norms: Any, which: Any, cells: Any, probes: Any, offsets: Any, slopes: Any, found: Any
) -> int:
    kept = 0
    for i in range(which.shape[0]):
        p, cell = which[i], cells[i]
        total = _dot(plane, cell, probes, p)
        if total >= offsets[p] + slopes[p] * norms[cell]:
            which[kept], cells[kept], found[kept] = p, cell, total
            kept += 1
    return kept


def keep_reaching(
    plane: NDArray[np.uint8],
    norms: Float32,
    probes: NDArray[np.int8],
    offsets: Float32,
    slopes: Float32,
    pairs: tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]],
) -> int:
    """Of some pairs (probe, cell, room for the dot product), those that `scan` would find: moved to the front. Returns how many."""
    which, cells, found = pairs
    return int(_keep_reaching(plane, norms, which, cells, probes, offsets, slopes, found))


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
