"""The scan kernel for batches of probes: table look-ups rule most rows out, and high nibbles estimate the rest.

Owns the scan of rows for probes. Never knows what a sum, a limit or an evidence stands for (`signs.py`). Its oracles in
numpy are in tests/search/test_scan.py.

A block of 64 rows is read from the high nibbles of every column in use, and looked up in the probes' tables
(`sign_tile.py`). Rows whose sum reaches the probe's limit are compared by their high nibbles while the block is still
in the first-level cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from biodedup.gallery.files.codes import Codes
from biodedup.search.native.scan_kernel import make_row_dot, prefetch, rebound
from biodedup.search.native.sign_tile import (
    BLOCKS_PER_PASS,
    TableKind,
    aligned,
    classed_for,
    classify,
    copy,
    f32_at,
    masks_apart,
    sign,
    survivors,
    tiles_for,
    u32_at,
)
from biodedup.values import Float32

_PREFETCH_PROBES = 32  # after so many probes, some more memory is prefetched
_LAY_OUT_PAIRS = 24  # from so many pairs a block on, all its rows are laid out one after another

Int64 = NDArray[np.int64]


@numba.njit(nogil=True, cache=True)
def _take(nibbles: int, cells: Any, taken: Any) -> None:
    """Reads the high nibbles of up to 64 cells: taken, uint32 (words, 64). nibbles: the address of the column's."""
    words = taken.shape[0]
    for h in range(words):
        for r in range(cells.shape[0]):
            taken[h, r] = u32_at(nibbles + 256 * (words * (cells[r] >> 6) + h) + 4 * (cells[r] & 63))


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
    """Adds what one column's high nibbles say of pairs of a probe and a row: a similarity, or its evidence."""
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
def _scan(
    nibbles: Any,
    norms: Any,
    words: Any,
    used: Any,
    members: Any,
    live: Any,
    first: int,
    last: int,
    block: int,
    tables: Any,
    limits: Any,
    kind: int,
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
    taken = (
        aligned(BLOCKS_PER_PASS * columns * 64 * octets)
        .view(np.uint32)
        .reshape(BLOCKS_PER_PASS, columns, octets // 4, 64)
    )
    signs = aligned(BLOCKS_PER_PASS * 64 * number).reshape(BLOCKS_PER_PASS, number, 64)
    rows = aligned(BLOCKS_PER_PASS * 64 * octets).view(np.uint32).reshape(BLOCKS_PER_PASS * 64, octets // 4)
    lengths, seeds = np.ones((columns, BLOCKS_PER_PASS * 64), np.float32), np.zeros(BLOCKS_PER_PASS * 64, np.uint8)
    masks = masks_apart()
    alive = np.empty(BLOCKS_PER_PASS, np.uint64)
    room = 64 * BLOCKS_PER_PASS * count
    some, lanes, totals = np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.float32)
    found, passed, end = 0, 0, -(-last // 64)
    while block < end:
        if found + room > which.size:
            return found, block, passed
        blocks = min(BLOCKS_PER_PASS, end - block)
        alive[blocks:] = 0
        for b in range(blocks):
            alive[b] = _alive(live, block + b, first, last)
            begin = 0
            for c in range(columns if alive[b] else 0):
                row_words, at = taken[b, c, : words[c]], 64 * (block + b)
                if mapped:
                    _take(nibbles[c], members[c, at : min(at + 64, members.shape[1])], row_words)
                else:
                    copy(nibbles[c] + 256 * words[c] * (block + b), row_words.ctypes.data, 256 * words[c])
                if kind == TableKind.FOUR_SIGNS:
                    sign(row_words, signs[b, begin : begin + used[c]])
                else:
                    classify(row_words, kind, signs[b, begin : begin + used[c]])
                begin += used[c]
                if mapped:
                    for r in range(64):
                        cell = members[c, min(at + r, members.shape[1] - 1)]
                        lengths[c, 64 * b + r] = f32_at(norms[c] + 4 * np.int64(cell))
                else:
                    copy(norms[c] + 4 * at, lengths[c, 64 * b :].ctypes.data, 256)
        if seeding[1] != 0:
            for r in range(64 * blocks):
                seeds[r] = np.uint8(min(max(seeding[0] + seeding[1] * lengths[0, r], np.float32(0)), seeding[2]))
        reached, next_blocks = 0, 0 if mapped else min(BLOCKS_PER_PASS, end - block - blocks)
        for p in range(0, count, _PREFETCH_PROBES):
            for c in range(columns):  # prefetch the next blocks in shares, so that look-ups do not wait for them
                octets_next = 256 * words[c] * next_blocks
                share = -(-octets_next * _PREFETCH_PROBES // (64 * count)) * 64
                begin = p // _PREFETCH_PROBES * share
                for at in range(begin, min(begin + share, octets_next), 64):
                    prefetch(nibbles[c] + 256 * words[c] * (block + blocks) + at)
            apart = slice(p, p + _PREFETCH_PROBES)
            number_of = min(count - p, _PREFETCH_PROBES)
            more = survivors(
                signs, seeds, alive, tables[apart], limits[apart], number_of, masks, some[reached:], lanes[reached:]
            )
            some[reached : reached + more] += np.int32(p)
            reached += more
        passed += reached
        laid_out = reached >= _LAY_OUT_PAIRS * blocks
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
    """`_scan`, compiled for another processor."""
    classes = numba.njit(rebound(classify, **classed_for(instructions)), nogil=True)
    lookups = numba.njit(rebound(survivors, **tiles_for(instructions)), nogil=True)
    add_values = numba.njit(rebound(_add_values, _row_dot=make_row_dot(instructions)), nogil=True, error_model="numpy")
    return numba.njit(rebound(_scan, survivors=lookups, classify=classes, _add_values=add_values), nogil=True)


@dataclass(frozen=True)
class SignedProbes:
    """Probes as the kernel takes them, for one column or several.

    tables: uint8 (q', t, 16 or 64), of all columns' tables one after another, t a multiple of SUMS_PER_ROW *
    TABLES_PER_STEP; limits: uint8 (q',), where q' is q, the number of probes, rounded up to a multiple of
    PROBES_PER_TILE; used: of each column, how many of the t are its own. kind: of the tables; seeding: float32 (3,): a
    row's sums begin with seeding[0] + seeding[1] times the norm of its first column, cut off at 0 and seeding[2].
    codes: int8 (columns, q, 2, octets), as `make_row_dot` wants them; parameters: float32 (columns, q, 2): a similarity
    is the first times (dot product - the second) over the row's norm. evidence: float32 (columns, n), what a similarity
    from -1 to 1 counts for, whose sum is compared with a cut; (columns, 0) for a single column whose similarity itself
    is.
    """

    tables: NDArray[np.uint8]
    limits: NDArray[np.uint8]
    used: Int64
    kind: TableKind
    seeding: Float32
    codes: NDArray[np.int8]
    parameters: Float32
    evidence: Float32

    def __len__(self) -> int:
        return int(self.codes.shape[1])

    def pieces(self, most: int) -> Iterator[tuple[slice, SignedProbes]]:
        """Batches of at most `most` probes, a multiple of PROBES_PER_TILE."""
        for low in range(0, len(self), most):
            some = slice(low, min(low + most, len(self)))
            codes, parameters = (
                np.ascontiguousarray(self.codes[:, some]),
                np.ascontiguousarray(self.parameters[:, some]),
            )
            tables, limits = self.tables[low : low + most], self.limits[low : low + most]
            yield some, replace(self, tables=tables, limits=limits, codes=codes, parameters=parameters)

    @property
    def room(self) -> int:
        """How many hits one call may write."""
        return 64 * BLOCKS_PER_PASS * len(self)


def scan(
    columns: Sequence[tuple[Codes, Float32]],
    members: NDArray[np.int32] | None,
    live: NDArray[np.uint64],
    span: tuple[int, int],
    start: int,
    probes: SignedProbes,
    cuts: Float32,
    out: tuple[NDArray[np.int32], Int64, Float32],
) -> tuple[int, int, int]:
    """Finds the pairs of a probe and a row whose signs reach the probe's limit and whose value, by high nibbles,
    reaches its cut-off.

    columns: of each its high nibbles (b, d / 8, 256), as in `codes.pack_high_nibbles`, and norms (64 b,); members:
    int32 (columns, n), the cells of n rows in each column, or None where rows and cells are the same; live: bit r of
    block b is set where row 64 b + r counts, or empty where all do; span: [first, last) rows that count; start: the
    block to begin with; cuts: float32 (q,). Writes probe, row and value of each pair into `out`, whose arrays have room
    for probes.room at least. Returns how many, the block to go on with, all done when it is ceil(last / 64), and how
    many pairs the signs let through.
    """
    nibbles = np.array([n.ctypes.data for n, _ in columns], np.int64)
    norms = np.array([norms.ctypes.data for _, norms in columns], np.int64)
    words = np.array([n.shape[1] for n, _ in columns], np.int64)
    if members is None:
        members = np.zeros((len(columns), 0), np.int32)
    number, block, passed = _scan(
        nibbles,
        norms,
        words,
        probes.used,
        members,
        live,
        *span,
        start,
        probes.tables,
        probes.limits,
        int(probes.kind),
        probes.seeding,
        probes.codes,
        probes.parameters,
        probes.evidence,
        cuts,
        *out,
    )
    return number, block, passed
