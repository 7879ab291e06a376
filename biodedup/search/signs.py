"""Signs: 256 bits a row that say, for half the arithmetic, which pairs cannot be very similar.

Owns the hyperplanes, the bits of rows and probes, and the measured law that turns a similarity into a limit. For joins, whose
threshold is high: two unlike vectors lie on different sides of half of all hyperplanes, mates of angle a on those of a share a / pi
(Charikar, STOC 2002). Two sets of orthogonal hyperplanes, rather than independent ones, make the count vary less.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from biodedup.gallery.codec import ErrorLaw, measured_law
from biodedup.gallery.codes import BLOCK_ROWS, dequantise
from biodedup.gallery.part import PIECE_ROWS, Column
from biodedup.search.kernel import SIGN_WORDS, WIDE
from biodedup.values import Float32

BITS = 64 * SIGN_WORDS
_SEED = 2_002

Words = NDArray[np.uint64]


class Signs:
    """For vectors that a codec has turned. sample: float32 (n, D), unit rows of a column, on which the law is measured."""

    def __init__(self, sample: Float32) -> None:
        rng = np.random.default_rng(_SEED)
        dimension = sample.shape[1]
        sets = [np.linalg.qr(rng.standard_normal((dimension, dimension)))[0] for _ in range(-(-BITS // dimension))]
        self._normals = np.concatenate(sets, axis=1)[:, :BITS].astype(np.float32)
        self._sample = sample

    @cached_property
    def law(self) -> ErrorLaw:
        """Of 1 - 2 / BITS times the number of differing signs, as an estimate of similarity."""
        return measured_law(self._agreement, self._sample, "sample", np.random.default_rng(_SEED))

    def _agreement(self, one: Float32, other: Float32) -> Float32:
        differing = np.bitwise_count(self.of(one) ^ self.of(other)).sum(axis=1)
        return np.asarray(1 - 2 / BITS * differing, np.float32)

    def of(self, vectors: Float32) -> Words:
        """uint64 (n, SIGN_WORDS)."""
        bits = np.packbits(vectors @ self._normals >= 0, axis=1, bitorder="little")
        return bits.view("<u8")

    def limits(self, similarity: Float32, miss_risk: float) -> Words:
        """How many signs of a pair may differ, so that one of at least this similarity is lost with at most this probability."""
        cut = self.law.cut(similarity, self.law.margin(miss_risk)[0])
        return np.floor(np.clip((1 - cut) * BITS / 2, 0, BITS)).astype(np.uint64)

    def of_probes(self, probes: Float32, limits: Words) -> tuple[Words, Words]:
        """Signs and limits, filled up to a multiple of the kernel's width with probes that nothing is near to."""
        missing = -len(probes) % WIDE
        signs = np.concatenate([self.of(probes), np.zeros((missing, SIGN_WORDS), np.uint64)])
        return np.ascontiguousarray(signs), np.concatenate([limits, np.zeros(missing, np.uint64)])

    def of_column(self, column: Column) -> Words:
        """uint64 (b, SIGN_WORDS, 64), 64-byte aligned: 32 bytes a row, in memory."""
        blocks = -(-column.count // BLOCK_ROWS)
        room = np.zeros(8 * blocks * SIGN_WORDS * BLOCK_ROWS + 64, np.uint8)
        start = -room.ctypes.data % 64
        signs = room[start : start + 8 * blocks * SIGN_WORDS * BLOCK_ROWS].view("<u8")
        signs = signs.reshape(blocks, SIGN_WORDS, BLOCK_ROWS)
        for low in range(0, column.count, PIECE_ROWS):
            cells = np.arange(low, min(low + PIECE_ROWS, column.count))
            words = np.zeros((-(-len(cells) // BLOCK_ROWS) * BLOCK_ROWS, SIGN_WORDS), np.uint64)
            words[: len(cells)] = self.of(dequantise(*column.codes_at(cells)))
            at = low // BLOCK_ROWS
            signs[at : at + len(words) // BLOCK_ROWS] = words.reshape(-1, BLOCK_ROWS, SIGN_WORDS).transpose(0, 2, 1)
        return signs
