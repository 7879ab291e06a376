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
from biodedup.search.sign_kernel import WIDE
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

    @cached_property
    def words(self) -> WordLaw:
        """Of each word's differing signs."""
        return WordLaw(self, self._sample)

    def seen(self, vectors: Float32) -> Words:
        """The signs of rows as a column has them, uint64 (n, WORDS)."""
        return self.of((quantise(vectors)[0] >> 4).astype(np.float32) * 2 - 15)

    def _agreement(self, one: Float32, other: Float32) -> Float32:
        differing = np.bitwise_count(self.of(one) ^ self.seen(other)).sum(axis=1)
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


class WordLaw:
    """In how many signs of each word pairs differ: normal, the words of a set of orthogonal hyperplanes against each other.

    strangers: float64 (WORDS + 1, 2), mean and variance in the first 0, 1, ... words, of pairs of the sample.
    """

    def __init__(self, signs: Signs, sample: Float32) -> None:
        rng = np.random.default_rng(_SEED)
        seen = signs.seen(sample)
        which = rng.integers(0, len(sample), (2, 16_384))
        which = which[:, which[0] != which[1]]
        added = np.cumsum(np.bitwise_count(signs.of(sample)[which[0]] ^ seen[which[1]]), axis=1)
        self.strangers = np.array([(0.0, 0.0), *zip(added.mean(axis=0), added.var(axis=0), strict=True)])
        self._levels = np.round(np.arange(0, 1.01, 0.1), 1)
        self._means: list[NDArray[np.float64]] = []
        self._roots: list[NDArray[np.float64]] = []

        def differing(one: Float32, other: Float32) -> Float32:
            counts = np.bitwise_count(signs.of(one) ^ signs.seen(other)).astype(np.float64)
            self._means.append(counts.mean(axis=0))
            values, axes = np.linalg.eigh(np.cov(counts.T))
            self._roots.append(axes * np.sqrt(np.maximum(values, 0)))
            return np.zeros(len(one), np.float32)

        measured_law(differing, sample, "sample", rng)

    def mated(self, similarity: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
        """Draws for pairs at these similarities, float64 (WORDS, n)."""
        means = np.array([np.interp(similarity, self._levels, mean) for mean in np.array(self._means).T])
        roots = np.array(self._roots)[np.clip(np.rint(similarity * 10), 0, 10).astype(np.int64)]
        noise = rng.standard_normal((len(similarity), WORDS))
        return np.asarray(np.rint(means + np.einsum("nij,nj->in", roots, noise)))


def aligned(words: int, rows: int) -> Words:
    """uint64 (words, rows), zeros, 64-byte aligned; rows: a multiple of 8."""
    room = np.zeros(words * rows + 8, np.uint64)
    start = -room.ctypes.data % 64 // 8
    return room[start : start + words * rows].reshape(words, rows)


def filled(signs: Words, limits: Words) -> tuple[Words, Words]:
    """Signs and limits, filled up to a multiple of the kernel's width with probes that nothing is near to."""
    missing = -len(signs) % WIDE
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
