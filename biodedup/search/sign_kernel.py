"""The inner loop over signs: in how many bits probes and rows differ, of which only few enough leave it.

Owns the counting. Never knows what a bit or a limit stands for (`signs.py`). Its oracle in numpy is in tests/test_scan.py.

A row's words lie in planes, one of each word for all rows, so that any words of any columns can be counted together. A tile of 64
rows by 8 probes takes an exclusive or, a count of set bits and an addition for each word of eight rows, and is bound by these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from biodedup.search.kernel import AHEAD, prefetch, splat

_I8, _I64 = ir.IntType(8), ir.IntType(64)

WIDE = 8
"""Probes whose signs are compared with a row's at the same time."""


def _set_bits(builder: Any, words: Any) -> Any:
    kind = ir.VectorType(_I64, 8)
    count = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), "llvm.ctpop.v8i64")
    return builder.call(count, [words])


def _make_tile(probes_wide: int = WIDE) -> Any:
    """An intrinsic for numba, tile(planes, offset, words, probes, stride, limits, masks), all integers or addresses:

    planes: uint64 *, (words,), the addresses of the rows' words, each a plane of its own; offset: bytes into all of them, where
    the 64 rows begin, a multiple of 64; probes: uint64 *, (probes_wide, stride); limits, masks: uint64 *, (probes_wide,): bit r
    is set where row r differs from the probe in at most so many signs.
    """

    @intrinsic
    def tile(_: Any, planes: Any, offset: Any, words: Any, probes: Any, stride: Any, limits: Any, masks: Any) -> Any:
        signature = types.void(*[types.intp] * 7)

        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            planes, limits, masks = (builder.inttoptr(args[at], ir.PointerType(_I64)) for at in (0, 5, 6))
            offset, words, probes, stride = args[1:5]
            eight = ir.VectorType(_I64, 8)
            before = builder.block
            outer, inner, after, done = (builder.append_basic_block(n) for n in ("eight", "word", "within", "done"))
            builder.branch(outer)

            builder.position_at_end(outer)
            group = builder.phi(_I64)
            group.add_incoming(ir.Constant(_I64, 0), before)
            bits = [builder.phi(_I64) for _ in range(probes_wide)]
            for one in bits:
                one.add_incoming(ir.Constant(_I64, 0), before)
            builder.branch(inner)

            builder.position_at_end(inner)
            word = builder.phi(_I64)
            word.add_incoming(ir.Constant(_I64, 0), outer)
            totals = [builder.phi(eight) for _ in range(probes_wide)]
            at = builder.add(builder.load(builder.gep(planes, [word])), offset)
            rows = builder.load(
                builder.inttoptr(builder.add(at, builder.mul(group, ir.Constant(_I64, 64))), eight.as_pointer())
            )
            rows.align = 64
            grown = []
            for p, total in enumerate(totals):
                total.add_incoming(ir.Constant(eight, [0] * 8), outer)
                mine = builder.mul(builder.add(builder.mul(stride, ir.Constant(_I64, p)), word), ir.Constant(_I64, 8))
                signs = builder.load(builder.inttoptr(builder.add(probes, mine), ir.PointerType(_I64)))
                grown.append(builder.add(total, _set_bits(builder, builder.xor(rows, splat(builder, signs, 8)))))
                total.add_incoming(grown[-1], inner)
            following = builder.add(word, ir.Constant(_I64, 1))
            word.add_incoming(following, inner)
            builder.cbranch(builder.icmp_signed("<", following, words), inner, after)

            builder.position_at_end(after)
            ended = []
            for p, (one, total) in enumerate(zip(bits, grown, strict=True)):
                limit = splat(builder, builder.load(builder.gep(limits, [ir.Constant(_I64, p)])), 8)
                near = builder.zext(builder.bitcast(builder.icmp_unsigned("<=", total, limit), _I8), _I64)
                ended.append(builder.or_(one, builder.shl(near, builder.mul(group, ir.Constant(_I64, 8)))))
                one.add_incoming(ended[-1], after)
            next_group = builder.add(group, ir.Constant(_I64, 1))
            group.add_incoming(next_group, after)
            builder.cbranch(builder.icmp_signed("<", next_group, ir.Constant(_I64, 8)), outer, done)

            builder.position_at_end(done)
            for p, one in enumerate(ended):
                builder.store(one, builder.gep(masks, [ir.Constant(_I64, p)]))
            return context.get_dummy_value()

        return signature, generate

    return tile


def _lowest_bit_of(_: Any, mask: Any) -> Any:
    """An intrinsic for numba: the place of the lowest bit of a uint64 that is set; the mask is not 0."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


_lowest_bit: Any = intrinsic(_lowest_bit_of)
_tile = _make_tile()


def _scan(
    planes: Any,
    live: Any,
    first: int,
    last: int,
    block: int,
    blocks: int,
    probes: Any,
    limits: Any,
    count: int,
    which: Any,
    cells: Any,
) -> tuple[int, int]:
    words = probes.shape[1]
    masks = np.empty(40, np.uint64)[8 : 8 + WIDE]  # away from what another thread writes
    at_planes, at_probes, at_limits, at_masks = (
        planes.ctypes.data,
        probes.ctypes.data,
        limits.ctypes.data,
        masks.ctypes.data,
    )
    found = 0
    while block < blocks:
        if found + 64 * count > which.size:
            return found, block
        alive = live[block] if live.size else ~np.uint64(0)
        for p in range(0, probes.shape[0] if alive else 0, WIDE):
            _tile(at_planes, 512 * block, words, at_probes + 8 * words * p, words, at_limits + 8 * p, at_masks)
            for i in range(WIDE):
                if p + i < count:
                    mask = masks[i] & alive
                    while mask:
                        cell = 64 * block + np.int64(_lowest_bit(mask))
                        mask &= mask - np.uint64(1)
                        if first <= cell < last:
                            which[found], cells[found] = p + i, cell
                            found += 1
        block += 1
    return found, block


_compiled = numba.njit(_scan, nogil=True, cache=True)


def scan(
    planes: Sequence[NDArray[np.uint64]],
    live: NDArray[np.uint64],
    cells: tuple[int, int],
    start: int,
    probes: NDArray[np.uint64],
    limits: NDArray[np.uint64],
    count: int,
    found: tuple[NDArray[np.int32], NDArray[np.int64]],
) -> tuple[int, int]:
    """Pairs of a probe and a row whose signs differ in at most `limits` places.

    planes: of each word uint64 (64 b,), 64-byte aligned; live, cells, start: as of `kernel.scan`; probes: uint64 (q', words), limits:
    uint64 (q',), where q' is `count`, the number of probes, rounded up to a multiple of WIDE. Writes probe and cell of
    each pair into `found`, whose arrays have room for at least 64 count. Returns how many, and the block to go on with.
    """
    first, last = cells
    number, block = _compiled(
        _addresses(planes), live, first, last, start, len(planes[0]) // 64, probes, limits, count, *found
    )
    return number, block


def _bits_of(_: Any, word: Any) -> Any:
    """An intrinsic for numba: how many bits of a uint64 are set."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), generate


_bits: Any = intrinsic(_bits_of)


@numba.njit(nogil=True, cache=True)
def _keep_near(planes: Any, probes: Any, limits: Any, which: Any, cells: Any) -> int:
    kept = 0
    for i in range(which.shape[0]):
        if i + AHEAD < which.shape[0]:
            for w in range(planes.shape[0]):
                prefetch(planes[w] + 8 * cells[i + AHEAD])
        p, cell = which[i], cells[i]
        total = np.uint64(0)
        for w in range(planes.shape[0]):
            total += _bits(_word_at(planes[w] + 8 * cell) ^ probes[p, w])
        if total <= limits[p]:
            which[kept], cells[kept] = p, cell
            kept += 1
    return kept


def _word_at_of(_: Any, address: Any) -> Any:
    """An intrinsic for numba: the uint64 at an address."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], ir.PointerType(_I64)))

    return types.uint64(types.int64), generate


_word_at: Any = intrinsic(_word_at_of)


def _addresses(planes: Sequence[NDArray[np.uint64]]) -> NDArray[np.int64]:
    return np.array([plane.ctypes.data for plane in planes], np.int64)


def keep_near(
    planes: Sequence[NDArray[np.uint64]],
    probes: NDArray[np.uint64],
    limits: NDArray[np.uint64],
    pairs: tuple[NDArray[np.int32], NDArray[np.int64]],
) -> int:
    """Of some pairs (probe, cell), those that differ in at most `limits` of all signs: moved to the front. Returns how many.

    planes: of each word uint64 (n,); probes: uint64 (q, words); limits: uint64 (q,).
    """
    return int(_keep_near(_addresses(planes), probes, limits, *pairs))


@numba.njit(nogil=True, cache=True)
def _distances(planes: Any, first: int, cells: Any, probes: Any, sums: Any) -> None:
    for p in range(probes.shape[0]):
        for cell in cells:
            some, total = np.uint64(0), np.uint64(0)
            for w in range(planes.shape[0]):
                total += _bits(_word_at(planes[w] + 8 * cell) ^ probes[p, w])
                if w == first - 1:
                    some = total
            sums[p, 0] += some
            sums[p, 1] += total
            sums[p, 2] += float(some) * float(some)
            sums[p, 3] += float(total) * float(total)


def distances(
    planes: Sequence[NDArray[np.uint64]], first: int, cells: NDArray[np.int64], probes: NDArray[np.uint64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """In how many signs probes differ from some cells: mean and standard deviation, float64 (q, 2) each, of the first words and
    of all."""
    sums = np.zeros((len(probes), 4))
    _distances(_addresses(planes), first, cells, probes, sums)
    mean = sums[:, :2] / len(cells)
    return mean, np.sqrt(np.maximum(sums[:, 2:] / len(cells) - mean**2, 0))
