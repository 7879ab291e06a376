"""Signs: up to 256 bits a column of a row that say, for a fraction of the arithmetic, which pairs cannot be alike.

Owns the hyperplanes, the bits of rows and probes, and the measured law that turns a similarity into a limit. Two unlike
vectors lie on different sides of half of all hyperplanes, mates of angle a on those of a share a / pi (Charikar, STOC 2002).
Hyperplanes that are orthogonal to each other, rather than independent ones, make the count vary less: they are rows of Hadamard's
matrix with random signs (Ailon and Chazelle, STOC 2006), which costs additions only. A row's are taken from its upper halves,
which are in memory anyway; so they are stored nowhere, and made when a search first wants them.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import hadamard

from biodedup.gallery.codec import ErrorLaw, measured_law
from biodedup.gallery.codes import BLOCK_ROWS, STEP, Codes, quantise
from biodedup.gallery.part import PIECE_ROWS, Column, Int64
from biodedup.search.kernel import SIGN_PROBES
from biodedup.values import Float32

WORDS = 4
"""Words of 64 signs that a row has of one column, at most."""
BITS = 64 * WORDS
_SEED = 2_002

Words = NDArray[np.uint64]


class Signs:
    """Of vectors that a codec has turned. sample: float32 (n, D), unit rows of a column, on which the law is measured; scanned:
    of D numbers, those whose upper halves are in memory."""

    def __init__(self, sample: Float32, scanned: int) -> None:
        self._sample = sample
        self._scanned = scanned
        size = 1 << (scanned - 1).bit_length()
        rng = np.random.default_rng(_SEED)
        self._flips = rng.choice(np.array([-1, 1], np.int16), (-(-BITS // size), size))
        axes = np.concatenate([hadamard(size) * flips for flips in self._flips])
        self._normals = np.ascontiguousarray(axes[:BITS, :scanned].T, np.float32)

    @cached_property
    def law(self) -> ErrorLaw:
        """Of 1 - 2 / BITS times the number of differing signs, as an estimate of similarity."""
        return measured_law(self._agreement, self._sample, "sample", np.random.default_rng(_SEED))

    def _agreement(self, one: Float32, other: Float32) -> Float32:
        upper = (quantise(other)[0] >> 4).astype(np.float32) * 2 - 15
        differing = np.bitwise_count(self.of(one) ^ self.of(upper)).sum(axis=1)
        return np.asarray(1 - 2 / BITS * differing, np.float32)

    def of(self, vectors: Float32) -> Words:
        """uint64 (n, WORDS). vectors: float32 (n, D), of any length."""
        bits = np.packbits(vectors[:, : self._scanned] @ self._normals >= 0, axis=1, bitorder="little")
        return bits.view("<u8")

    def limits(self, similarity: Float32, miss_risk: float) -> Words:
        """How many signs of a pair may differ, so that one of at least this similarity is lost with at most this probability."""
        cut = self.law.cut(similarity, self.law.margin(miss_risk)[0])
        return np.floor(np.clip((1 - cut) * BITS / 2, 0, BITS)).astype(np.uint64)

    def of_column(self, column: Column, cells: Int64 | None = None) -> Words:
        """Of some cells, ascending, or of all: uint64 (WORDS, 64 b), each row 64-byte aligned, filled up with 0."""
        count = column.count if cells is None else len(cells)
        signs = aligned(WORDS, -(-count // BLOCK_ROWS) * BLOCK_ROWS)
        for low in range(0, count, PIECE_ROWS):
            high = min(low + PIECE_ROWS, count)
            some = np.arange(low, high) if cells is None else cells[low:high]
            base = int(some[0]) // BLOCK_ROWS * BLOCK_ROWS
            plane, _ = column.plane(base, int(some[-1]) + 1)
            _sign(plane, some - base, self._flips, signs[:, low:])
        return signs


def aligned(words: int, rows: int) -> Words:
    """uint64 (words, rows), zeros, 64-byte aligned; rows: a multiple of 8."""
    room = np.zeros(words * rows + 8, np.uint64)
    start = -room.ctypes.data % 64 // 8
    return room[start : start + words * rows].reshape(words, rows)


def filled(signs: Words, limits: Words) -> tuple[Words, Words]:
    """Signs and limits, filled up to a multiple of the kernel's width with probes that nothing is near to."""
    missing = -len(signs) % SIGN_PROBES
    more = np.zeros((missing, signs.shape[1]), np.uint64)
    return np.ascontiguousarray(np.concatenate([signs, more])), np.concatenate([limits, np.zeros(missing, np.uint64)])


@numba.njit(nogil=True, cache=True)
def _sign(plane: Codes, cells: Any, flips: Any, signs: Any) -> None:
    """64 rows at a time, side by side in the processor's vectors."""
    scanned = plane.shape[1] * 8
    sets, size = flips.shape
    numbers = np.zeros((scanned, 64), np.int16)
    turned = np.empty((size, 64), np.int16)
    for low in range(0, cells.shape[0], 64):
        high = min(low + 64, cells.shape[0])
        for i in range(low, high):
            block, lane = cells[i] // 64, cells[i] % 64 * 4
            for h in range(plane.shape[1]):
                for t in range(4):
                    pair = plane[block, h, lane + t]
                    numbers[8 * h + t, i - low] = 2 * np.int16(pair & 15) - 15
                    numbers[8 * h + 4 + t, i - low] = 2 * np.int16(pair >> 4) - 15
        for which in range(sets):
            for j in range(scanned):
                flip = flips[which, j]
                for lane in range(64):
                    turned[j, lane] = flip * numbers[j, lane]
            turned[scanned:] = 0
            reach = 1
            while reach < size:
                for start in range(0, size, 2 * reach):
                    for j in range(start, start + reach):
                        for lane in range(64):
                            one, other = turned[j, lane], turned[j + reach, lane]
                            turned[j, lane] = one + other
                            turned[j + reach, lane] = one - other
                reach *= 2
            for j in range(min(size, 64 * signs.shape[0] - which * size)):
                bit = which * size + j
                word, place = bit // 64, np.uint64(bit % 64)
                for lane in range(high - low):
                    signs[word, low + lane] |= np.uint64(turned[j, lane] >= 0) << place


assert STEP == 8 and BLOCK_ROWS == 64  # what `_sign` takes for granted
