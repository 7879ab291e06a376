"""Quantises vectors to eight-bit codes, and lays them out in a file: the high nibbles of all rows together, the low nibbles apart.

Owns quantisation and layout. Never rotates (`codec.py`) and never compares (`search/native/`).

A scan reads the high nibbles: half a byte a number, in blocks of 64 rows, in the order that the scan kernel needs. The low nibbles are
read for the few rows that are compared exactly. Nothing is stored twice.

`codes` here are uint8: the number plus 128, 1 to 255. `upper` is codes >> 4, `lower` is codes & 15.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from biodedup.values import Float32

BLOCK_ROWS = 64
"""Rows that lie together in the plane of upper halves."""
STEP = 8
"""The number of scanned dimensions is a multiple of this."""

Codes = NDArray[np.uint8]
_Function = TypeVar("_Function", bound=Callable[..., None])


def _compiled(function: _Function) -> _Function:
    """Machine code, made once for each kind of processor and then read from a cache."""
    return cast(_Function, numba.njit(cache=True, nogil=True)(function))


def quantise(vectors: Float32) -> tuple[Codes, Float32]:
    """Vectors float32 (n, d), no row zero -> codes uint8 (n, d) and norms float32 (n,): vector = (code - 128) / norm * length.

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


def plane_shape(count: int, scanned: int) -> tuple[int, int, int]:
    """The shape of the plane of upper halves. scanned: dimensions that it holds, the first ones."""
    return -(-count // BLOCK_ROWS), scanned // STEP, 4 * BLOCK_ROWS


def planes(pieces: Iterable[Codes], scanned: int) -> Iterator[Codes]:
    """Upper halves of successive codes uint8 (n, d), in whole blocks uint8 (b, scanned / 8, 256); the last is filled up with 0."""
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
    """uint8 (n, scanned / 2 + d - scanned): the lower halves, then whole codes of the dimensions that are not scanned."""
    rest = np.empty((len(codes), codes.shape[1] - scanned // 2), np.uint8)
    _rest(np.ascontiguousarray(codes), scanned, rest)
    return rest


def joined(plane: Codes, rest: Codes, cells: NDArray[np.int64], rest_from: int = 0) -> Codes:
    """The codes of some cells, uint8 (n, d). rest_from: the cell of the first row of rest."""
    scanned = plane.shape[1] * STEP
    codes = np.empty((len(cells), rest.shape[1] + scanned // 2), np.uint8)
    _join(plane, rest, cells, rest_from, codes)
    return codes


def uppers(plane: Codes, cells: NDArray[np.int64]) -> Codes:
    """The high nibbles of some cells, 0 to 15, uint8 (n, scanned)."""
    found = np.empty((len(cells), plane.shape[1] * STEP), np.uint8)
    _uppers(plane, cells, found)
    return found


def turned(vectors: Float32, rotation: Float32) -> Float32:
    """vectors @ rotation.T, for a few vectors before a scan. Not by BLAS, whose threads go on spinning beside the scan's."""
    found = np.zeros((len(vectors), len(rotation)), np.float32)
    _turn(np.ascontiguousarray(vectors, np.float32), np.ascontiguousarray(rotation.T, np.float32), found)
    return found


def _packed(codes: Codes, scanned: int) -> Codes:
    plane = np.zeros(plane_shape(len(codes), scanned), np.uint8)
    _pack(np.ascontiguousarray(codes), plane)
    return plane


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
def _turn(vectors: Any, axes: Any, found: Any) -> None:
    for i in range(vectors.shape[0]):
        for k in range(vectors.shape[1]):
            for j in range(axes.shape[1]):
                found[i, j] += vectors[i, k] * axes[k, j]


@_compiled
def _pack(codes: Any, plane: Any) -> None:
    for i in range(codes.shape[0]):
        block, lane = i // 64, i % 64 * 4
        for h in range(plane.shape[1]):
            for t in range(4):
                plane[block, h, lane + t] = (codes[i, 8 * h + t] >> 4) | (codes[i, 8 * h + 4 + t] & 0xF0)


@_compiled
def _rest(codes: Any, scanned: int, rest: Any) -> None:
    half = scanned // 2
    for i in range(codes.shape[0]):
        for j in range(half):
            rest[i, j] = (codes[i, 2 * j] & 15) | (codes[i, 2 * j + 1] << 4)
        for j in range(scanned, codes.shape[1]):
            rest[i, j - half] = codes[i, j]


@_compiled
def _uppers(plane: Any, cells: Any, found: Any) -> None:
    for i in range(cells.shape[0]):
        block, lane = cells[i] // 64, cells[i] % 64 * 4
        for h in range(plane.shape[1]):
            for t in range(4):
                pair = plane[block, h, lane + t]
                found[i, 8 * h + t] = pair & 15
                found[i, 8 * h + 4 + t] = pair >> 4


@_compiled
def _join(plane: Any, rest: Any, cells: Any, rest_from: int, codes: Any) -> None:
    scanned = 8 * plane.shape[1]
    half = scanned // 2
    for i in range(cells.shape[0]):
        block, lane, at = cells[i] // 64, cells[i] % 64 * 4, cells[i] - rest_from
        for h in range(plane.shape[1]):
            for t in range(4):
                pair = plane[block, h, lane + t]
                codes[i, 8 * h + t] = pair << 4
                codes[i, 8 * h + 4 + t] = pair & 0xF0
        for j in range(half):
            pair = rest[at, j]
            codes[i, 2 * j] |= pair & 15
            codes[i, 2 * j + 1] |= pair >> 4
        for j in range(half, rest.shape[1]):
            codes[i, j + half] = rest[at, j]
