"""Scalar quantisation of vectors to eight bits per component, stored as high nibbles, low nibbles and two bit planes.

Owns quantisation and the memory layout of codes. Never chooses a rotation (`codec.py`) and never compares (`search/native`).

A search reads in three stages. It reads two bits of each component of all rows: the sign bit and the outer bit. They are stored in blocks
of 64 rows. It reads the high nibbles (four bits per component) of the rows whose two bits are similar to the probe. It reads the low
nibbles of the few rows that are compared exactly. Nibbles are stored row by row.

Invariants: a code is uint8, the component plus 128, from 1 to 255. The high nibble is code >> 4, the low nibble is code & 15. The sign bit
is code >= 128. The outer bit is set if the component is larger in size than 0.98 times the root mean square of the row's scanned
components. Sign and outer bit are the optimal two-bit quantiser of a normal variable (Max, 1960). In files these are the arrays `high`,
`rest`, `sign` and `outer` (FORMAT.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from biodedup.values import Float32

BLOCK_ROWS = 64
"""The number of rows in a block of bits."""
STEP = 8
"""The number of scanned dimensions is a multiple of this."""

Codes = NDArray[np.uint8]
_Function = TypeVar("_Function", bound=Callable[..., None])


def _compiled(function: _Function) -> _Function:
    """Compiles a function with numba. The machine code is cached on disk for each kind of processor."""
    return cast(_Function, numba.njit(cache=True, nogil=True)(function))


def quantise(vectors: Float32) -> tuple[Codes, Float32]:
    """Vectors float32 (n, d) without zero rows -> codes uint8 (n, d), norms float32 (n,): vector = (code - 128) / norm * length.

    The largest component of each vector becomes +-127. For d = 128 a cosine changes by 0.0006 (standard deviation, benchmarks/storage.py).
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


def blocks_of(count: int) -> int:
    """The number of blocks for `count` rows."""
    return -(-count // BLOCK_ROWS)


def high_nibbles(codes: Codes, scanned: int) -> Codes:
    """uint8 (n, scanned / 2): the low half of byte 4 h + t is the high nibble of component 8 h + t, its high half that of component 8 h + 4
    + t. scanned: the number of leading components, a multiple of STEP."""
    high = np.empty((len(codes), scanned // 2), np.uint8)
    _split_high(codes, high)
    return high


def low_nibbles(codes: Codes, scanned: int) -> Codes:
    """uint8 (n, scanned / 2 + d - scanned): the low nibbles, then the whole codes of components that are not scanned."""
    low = np.empty((len(codes), codes.shape[1] - scanned // 2), np.uint8)
    _split_low(codes, scanned, low)
    return low


def sign_bits(codes: Codes, scanned: int) -> Codes:
    """uint8 (n, scanned / 8): bit i of byte j is set if component 8 j + i is not negative."""
    return np.packbits(codes[:, :scanned] >= 128, axis=1, bitorder="little")


def outer_bits(codes: Codes, scanned: int) -> Codes:
    """As `sign_bits`, for the outer bits."""
    outer = np.empty((len(codes), scanned), np.bool_)
    _find_outer(codes, outer)
    return np.packbits(outer, axis=1, bitorder="little")


def bit_blocks(pieces: Iterable[Codes]) -> Iterator[Codes]:
    """The bits of successive rows, uint8 (n, bytes), as whole blocks uint8 (b, bytes, 64): row 64 b + r is [b, :, r]. The last block is
    padded with 0."""
    held: Codes | None = None
    for piece in pieces:
        held = piece if held is None else np.concatenate([held, piece])
        whole = len(held) // BLOCK_ROWS * BLOCK_ROWS
        yield _blocks(held[:whole])
        held = held[whole:]
    if held is not None:
        yield _blocks(np.pad(held, ((0, -len(held) % BLOCK_ROWS), (0, 0))))


def _blocks(bits: Codes) -> Codes:
    return np.ascontiguousarray(bits.reshape(-1, BLOCK_ROWS, bits.shape[1]).transpose(0, 2, 1))


def join_nibbles(high: Codes, low: Codes) -> Codes:
    """The codes uint8 (n, d), from `high_nibbles` and `low_nibbles`."""
    codes = np.empty((len(high), low.shape[1] + high.shape[1]), np.uint8)
    _join(high, low, codes)
    return codes


def product(vectors: Float32, matrix: Float32) -> Float32:
    """vectors @ matrix, for a few vectors. Without BLAS, whose threads would continue to spin beside the scan's threads."""
    found = np.zeros((len(vectors), matrix.shape[1]), np.float32)
    _multiply(np.ascontiguousarray(vectors, np.float32), np.ascontiguousarray(matrix, np.float32), found)
    return found


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
def _multiply(vectors: Any, matrix: Any, found: Any) -> None:
    for i in range(vectors.shape[0]):
        for k in range(vectors.shape[1]):
            for j in range(matrix.shape[1]):
                found[i, j] += vectors[i, k] * matrix[k, j]


@_compiled
def _find_outer(codes: Any, outer: Any) -> None:
    scanned = outer.shape[1]
    for i in range(codes.shape[0]):
        total = np.int64(0)
        for j in range(scanned):
            number = np.int64(codes[i, j]) - 128
            total += number * number
        for j in range(scanned):  # 0.98 squared is 9,604 parts in ten thousand
            number = np.int64(codes[i, j]) - 128
            outer[i, j] = 10_000 * scanned * number * number > 9_604 * total


@_compiled
def _split_high(codes: Any, high: Any) -> None:
    for i in range(codes.shape[0]):
        for h in range(0, high.shape[1], 4):
            for t in range(4):
                high[i, h + t] = (codes[i, 2 * h + t] >> 4) | (codes[i, 2 * h + 4 + t] & 0xF0)


@_compiled
def _split_low(codes: Any, scanned: int, low: Any) -> None:
    half = scanned // 2
    for i in range(codes.shape[0]):
        for j in range(half):
            low[i, j] = (codes[i, 2 * j] & 15) | (codes[i, 2 * j + 1] << 4)
        for j in range(scanned, codes.shape[1]):
            low[i, j - half] = codes[i, j]


@_compiled
def _join(high: Any, low: Any, codes: Any) -> None:
    half = high.shape[1]
    for i in range(high.shape[0]):
        for h in range(0, half, 4):
            for t in range(4):
                codes[i, 2 * h + t] = high[i, h + t] << 4
                codes[i, 2 * h + 4 + t] = high[i, h + t] & 0xF0
        for j in range(half):
            codes[i, 2 * j] |= low[i, j] & 15
            codes[i, 2 * j + 1] |= low[i, j] >> 4
        for j in range(half, low.shape[1]):
            codes[i, j + half] = low[i, j]
