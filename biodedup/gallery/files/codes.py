"""Scalar quantisation of vectors to eight bits a number, stored as high nibbles and low nibbles.

Owns quantisation and the memory layout of codes. Never chooses a rotation (`codec.py`) and never compares
(`search/native`).

A scan reads only the high nibbles: four bits a number, in blocks of 64 rows, interleaved as the kernels load them. The
low nibbles are read for the few rows that are compared exactly. No bit is stored twice.

Invariants: codes are uint8, the number plus 128, 1 to 255; a high nibble is code >> 4, a low nibble is code & 15. In
files the high nibbles are the array `plane`, the low ones the array `rest` (FORMAT.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from biodedup.values import Float32

BLOCK_ROWS = 64
"""Rows of one block of high nibbles."""
STEP = 8
"""The number of scanned dimensions is a multiple of this."""

Codes = NDArray[np.uint8]
_Function = TypeVar("_Function", bound=Callable[..., None])


def _compiled(function: _Function) -> _Function:
    """Compiles with numba; the machine code is cached on disk for each kind of processor."""
    return cast(_Function, numba.njit(cache=True, nogil=True)(function))


def quantise(vectors: Float32) -> tuple[Codes, Float32]:
    """Vectors float32 (n, d), no row zero -> codes uint8 (n, d) and norms float32 (n,): vector = (code - 128) / norm *
    length.

    The largest number of a vector becomes +-127. For d = 128 a cosine changes by a standard deviation of 0.0006
    (benchmarks/storage.py).
    """
    codes = np.empty(vectors.shape, np.uint8)
    norms = np.empty(len(vectors), np.float32)
    _quantise(np.ascontiguousarray(vectors, np.float32), codes, norms)
    return codes, norms


def dequantise(codes: Codes, norms: Float32) -> Float32:
    """float32 (n, d), unit rows."""
    vectors = np.empty(codes.shape, np.float32)
    _dequantise(np.ascontiguousarray(codes), np.ascontiguousarray(norms), vectors)
    return vectors


def high_nibbles_shape(count: int, scanned: int) -> tuple[int, int, int]:
    """The shape of the high nibbles of `count` rows. scanned: how many dimensions they hold, the first ones."""
    return -(-count // BLOCK_ROWS), scanned // STEP, 4 * BLOCK_ROWS


def pack_high_nibbles(pieces: Iterable[Codes], scanned: int) -> Iterator[Codes]:
    """High nibbles of successive codes uint8 (n, d), in whole blocks uint8 (b, scanned / 8, 256); the last is padded
    with 0."""
    held = np.zeros((0, 0), np.uint8)
    for piece in pieces:
        held = np.concatenate([held, piece]) if len(held) else piece
        whole = len(held) // BLOCK_ROWS * BLOCK_ROWS
        if whole:
            yield _packed(held[:whole], scanned)
            held = held[whole:]
    if len(held):
        yield _packed(held, scanned)


def low_nibbles(codes: Codes, scanned: int) -> Codes:
    """uint8 (n, scanned / 2 + d - scanned): the low nibbles, then whole codes of the dimensions that are not
    scanned."""
    low = np.empty((len(codes), codes.shape[1] - scanned // 2), np.uint8)
    _pack_low(np.ascontiguousarray(codes), scanned, low)
    return low


def join_nibbles(high: Codes, low: Codes, cells: NDArray[np.int64], low_from: int = 0) -> Codes:
    """The codes of some cells, uint8 (n, d). low_from: the cell of the first row of low."""
    scanned = high.shape[1] * STEP
    codes = np.empty((len(cells), low.shape[1] + scanned // 2), np.uint8)
    _join(high, low, cells, low_from, codes)
    return codes


def unpack_high_nibbles(high: Codes, cells: NDArray[np.int64]) -> Codes:
    """The high nibbles of some cells, 0 to 15, uint8 (n, scanned)."""
    unpacked = np.empty((len(cells), high.shape[1] * STEP), np.uint8)
    _unpack_high(high, cells, unpacked)
    return unpacked


def rotate(vectors: Float32, rotation: Float32) -> Float32:
    """vectors @ rotation.T, for a few vectors before a scan. Without BLAS, whose threads go on spinning beside the
    scan's."""
    rotated = np.zeros((len(vectors), len(rotation)), np.float32)
    _rotate(np.ascontiguousarray(vectors, np.float32), np.ascontiguousarray(rotation.T, np.float32), rotated)
    return rotated


def _packed(codes: Codes, scanned: int) -> Codes:
    high = np.zeros(high_nibbles_shape(len(codes), scanned), np.uint8)
    _pack_high(np.ascontiguousarray(codes), high)
    return high


@_compiled
def _quantise(vectors: Any, codes: Any, norms: Any) -> None:
    for i in range(vectors.shape[0]):
        peak = np.float32(0)
        for j in range(vectors.shape[1]):
            peak = max(peak, abs(vectors[i, j]))
        factor = np.float32(127) / peak
        total = 0
        for j in range(vectors.shape[1]):
            value = np.int32(np.rint(vectors[i, j] * factor))
            total += int(value * value)
            codes[i, j] = np.uint8(value + 128)
        norms[i] = np.float32(np.sqrt(total))


@_compiled
def _dequantise(codes: Any, norms: Any, vectors: Any) -> None:
    for i in range(codes.shape[0]):
        norm = norms[i]
        for j in range(codes.shape[1]):
            vectors[i, j] = (np.float32(codes[i, j]) - np.float32(128)) / norm


@_compiled
def _rotate(vectors: Any, axes: Any, rotated: Any) -> None:
    for i in range(vectors.shape[0]):
        for k in range(vectors.shape[1]):
            for j in range(axes.shape[1]):
                rotated[i, j] += vectors[i, k] * axes[k, j]


@_compiled
def _pack_high(codes: Any, high: Any) -> None:
    for i in range(codes.shape[0]):
        block, lane = i // 64, i % 64 * 4
        for h in range(high.shape[1]):
            for t in range(4):
                high[block, h, lane + t] = (codes[i, 8 * h + t] >> 4) | (codes[i, 8 * h + 4 + t] & 0xF0)


@_compiled
def _pack_low(codes: Any, scanned: int, low: Any) -> None:
    half = scanned // 2
    for i in range(codes.shape[0]):
        for j in range(half):
            low[i, j] = (codes[i, 2 * j] & 15) | (codes[i, 2 * j + 1] << 4)
        for j in range(scanned, codes.shape[1]):
            low[i, j - half] = codes[i, j]


@_compiled
def _unpack_high(high: Any, cells: Any, unpacked: Any) -> None:
    for i in range(cells.shape[0]):
        block, lane = cells[i] // 64, cells[i] % 64 * 4
        for h in range(high.shape[1]):
            for t in range(4):
                pair = high[block, h, lane + t]
                unpacked[i, 8 * h + t] = pair & 15
                unpacked[i, 8 * h + 4 + t] = pair >> 4


@_compiled
def _join(high: Any, low: Any, cells: Any, low_from: int, codes: Any) -> None:
    scanned = 8 * high.shape[1]
    half = scanned // 2
    for i in range(cells.shape[0]):
        block, lane, at = cells[i] // 64, cells[i] % 64 * 4, cells[i] - low_from
        for h in range(high.shape[1]):
            for t in range(4):
                pair = high[block, h, lane + t]
                codes[i, 8 * h + t] = pair << 4
                codes[i, 8 * h + 4 + t] = pair & 0xF0
        for j in range(half):
            pair = low[at, j]
            codes[i, 2 * j] |= pair & 15
            codes[i, 2 * j + 1] |= pair >> 4
        for j in range(half, low.shape[1]):
            codes[i, j + half] = low[at, j]
