"""Chooses LSH buckets for the self-join of a large gallery: only rows that share a bucket are compared.

Owns the choice of buckets, and their miss risk. Never scans (`native/`), and never compares rows.

Method: spherical locality-sensitive filters (Becker, Ducas, Gama and Laarhoven, SODA 2016), a form of LSH (Indyk and
Motwani, STOC 1998). A bucket is a direction and its members: the rows whose similarity to the direction is above a threshold. Embeddings
are spread nearly evenly over their sphere, so that a few directions would lose mates. But two mates above the score threshold share a tenth
of the buckets that contain one of them, and two unrelated rows share hardly any bucket. With about ten thousand buckets nearly every pair
of mates shares a bucket, and only a few per cent of the unrelated pairs do.

Number of buckets: pairs are made from the column's vectors, at similarities of mates by the calibration. They go through every step of the
join. A half of them chooses the number, the other half confirms it.

Invariant: only the last comparison reads more than high nibbles. A scan with the directions as probes finds the members of the buckets.
Members are compared with each other by signs, and then by high nibbles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import log
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from biodedup.common.intervals import upper_bound
from biodedup.gallery.files.codec import Codec, measured_laws
from biodedup.gallery.files.codes import dequantise, quantise
from biodedup.gallery.segments.part import Column
from biodedup.match.scores.calibration import Calibration
from biodedup.search import costs
from biodedup.search.native.column_statistics import population_of, signs_of
from biodedup.search.native.signs import Signs
from biodedup.values import Float32

BUCKETS_PER_STEP, BUCKETS_MOST = 64, 1 << 16
"""Number of buckets in a step of a join, and greatest number of all buckets."""
ROWS_MIN = 1 << 18
"""With fewer rows, comparing all pairs is faster than choosing buckets."""
NEVER = 1 << 30
_TRIED = 4096  # buckets that are tried before their number is checked again
_THRESHOLDS = (2.5, 2.7, 2.9, 3.1, 3.3, 3.5, 3.7)
"""Tried thresholds of membership, in standard deviations above the mean similarity to a direction."""
_PAIRS = 40_000  # number of made mates; a half chooses the buckets, the other half confirms them
_SAMPLE = 8_192  # number of vectors from which they are made
_BATCH = 512
_SEED = 2_026
_WORTH = 0.8  # buckets are used if their cost is below this share of the cost of all pairs


@dataclass(frozen=True, eq=False)
class Buckets:
    """The buckets of a self-join.

    directions: float32 (n, d), unit rows. min_similarity: float32 (n,), the estimated similarity to the direction that members reach. signs:
    of the column. sign_cut, cut: estimates by signs and by high nibbles that a pair must reach.

    share: the share of all pairs that are compared. drawn: number of made mates that confirm the choice. missed: number of these that are
    missed.
    """

    codec: Codec = field(repr=False)
    directions: Float32 = field(repr=False)
    min_similarity: Float32 = field(repr=False)
    signs: Signs
    sign_cut: float
    cut: float
    share: float
    drawn: int
    missed: int

    def __len__(self) -> int:
        return len(self.directions)

    def steps(self, first: int, last: int) -> Iterator[tuple[slice, int]]:
        """(the buckets of each step, the progress after it as a number from first to last)."""
        for low in range(0, len(self), BUCKETS_PER_STEP):
            high = min(low + BUCKETS_PER_STEP, len(self))
            yield slice(low, high), first + (last - first) * high // len(self)

    @property
    def miss_bound(self) -> float:
        """The upper end of the one-sided 95 % interval (Clopper and Pearson, 1934)."""
        return float(upper_bound(self.missed, self.drawn))


def choose(
    column: Column, rows: int, calibration: Calibration, min_similarity: float, miss_risk: float
) -> Buckets | None:
    """The fastest buckets for a join of this number of rows of the column that lose at most a share of miss_risk of the mates of at least
    min_similarity, with 95 % confidence. None if this cannot be confirmed, or if comparing all pairs is faster."""
    codec = column.codec
    if codec is None or rows < ROWS_MIN or not calibration.mates_measured or miss_risk <= 0:
        return None
    rng = np.random.default_rng(_SEED)
    sampled = min(_SAMPLE, column.count // 2)
    cells = np.sort(rng.choice(column.count, min(BUCKETS_MOST + sampled, column.count), replace=False))
    vectors = column.vectors_at(cells)[rng.permutation(len(cells))]
    sample, directions = vectors[:sampled], vectors[sampled:]
    pairs = _mates(sample, calibration, min_similarity, rng)
    left, right = (codec.rotate(vectors) for vectors in pairs)
    signs = signs_of(column)

    def by_signs(a: Float32, b: Float32) -> Float32:
        return signs.estimates(from_high_nibbles(a), b)

    def by_nibbles(a: Float32, b: Float32) -> Float32:
        known = (from_high_nibbles(vectors)[:, : codec.scanned] for vectors in (a, b))
        return np.asarray(np.einsum("ij,ij->i", *known), np.float32)

    laws = measured_laws((by_signs, by_nibbles), codec.rotate(sample), "sample", rng)
    # the margin is for mates at min_similarity; far fewer of the more similar mates are lost
    z, _ = laws[0].margin(miss_risk)
    sign_cut, cut = (float(law.cut(np.array([min_similarity], np.float32), z)[0]) for law in laws)
    lost = (by_signs(left, right) < sign_cut) | (by_nibbles(left, right) < cut)
    trial = _Trial(column, directions, (left, right), lost)
    best = None
    cost_most, untried = _WORTH * rows / 2 * costs.BUCKET_PAIR_NS, list(range(len(_THRESHOLDS)))
    while untried and trial.tried < len(directions):
        trial.try_more(untried)
        for h in untried.copy():
            count, missed = _count(trial.first[h], trial.tried, miss_risk)
            cost = _cost(count or trial.at_least(h, miss_risk), _THRESHOLDS[h], rows)
            if count and cost < cost_most:
                best, cost_most = (h, count, missed), cost
            if count or cost >= cost_most:
                untried.remove(h)
    if best is None:
        return None
    h, count, missed = best
    reached = trial.mean[:count] + np.float32(_THRESHOLDS[h]) * trial.sd[:count]
    share = float(count * ndtr(-_THRESHOLDS[h]) ** 2)
    return Buckets(
        codec=codec,
        directions=directions[:count],
        min_similarity=reached,
        signs=signs,
        sign_cut=sign_cut,
        cut=cut,
        share=share,
        drawn=_PAIRS // 2,
        missed=missed,
    )


def from_high_nibbles(rotated: Float32) -> Float32:
    """Rotated vectors as reconstructed from their high nibbles, float32 (n, D)."""
    codes, norms = quantise(rotated)
    return dequantise(codes & np.uint8(240) | np.uint8(8), norms)


def _count(first: NDArray[np.int32], most: int, miss_risk: float) -> tuple[int, int]:
    """(sufficient number of buckets, number of confirming pairs that they miss); (0, 0) if all buckets are too few. first: the first bucket
    that each pair shares."""
    chosen, confirming = np.sort(first[::2]), first[1::2]
    missed = 0
    while upper_bound(missed + 1, len(chosen)) <= miss_risk:
        missed += 1
    for allowed in range(missed, -1, -1):
        count = -(-(int(chosen[-1 - allowed]) + 1) // BUCKETS_PER_STEP) * BUCKETS_PER_STEP
        if count <= most and upper_bound(int((confirming >= count).sum()), len(confirming)) <= miss_risk:
            return count, int((confirming >= count).sum())
    return 0, 0


def _cost(count: int, threshold: float, rows: int) -> float:
    """The cost of a join, in nanoseconds per row."""
    share = float(ndtr(-threshold))
    return count * (
        costs.BUCKET_DIRECTION_NS + share * costs.BUCKET_MEMBER_NS + share**2 * rows / 2 * costs.BUCKET_PAIR_NS
    )


class _Trial:
    """Finds, for pairs of vectors, the first bucket that contains both. pairs: rotated, float32 (n, D) each. lost: bool (n,), pairs that another
    step of the join loses. first: int32 (thresholds, n), the first common bucket of each pair, or NEVER."""

    def __init__(
        self, column: Column, directions: Float32, pairs: tuple[Float32, Float32], lost: NDArray[np.bool_]
    ) -> None:
        assert column.codec is not None, "only coded columns have buckets"
        scanned = column.codec.scanned
        rotated = np.ascontiguousarray(column.codec.rotate(directions)[:, :scanned])
        self.mean, self.sd = population_of(column).similarity(rotated)
        self.tried = 0
        self.first = np.full((len(_THRESHOLDS), len(lost)), NEVER, np.int32)
        self._directions = rotated
        self._pairs = [from_high_nibbles(vectors)[:, :scanned] for vectors in pairs]
        self._lost = lost

    def at_least(self, threshold: int, miss_risk: float) -> int:
        """A lower bound of the sufficient number of buckets. The share of pairs without a common bucket falls more and more slowly, so that
        extrapolating its first fall is a lower bound."""
        left = float((self.first[threshold, ~self._lost] == NEVER).mean())
        return int(self.tried * max(log(miss_risk) / log(max(min(left, 1 - 1e-6), miss_risk)), 1))

    def try_more(self, thresholds: list[int]) -> None:
        """Tries more buckets for the pairs without a common bucket at one of these thresholds."""
        tried = slice(self.tried, self.tried + _TRIED)
        waiting = np.flatnonzero((self.first[thresholds] == NEVER).any(axis=0) & ~self._lost)
        for low in range(0, len(waiting), _BATCH):
            batch = waiting[low : low + _BATCH]
            left, right = (pairs[batch] @ self._directions[tried].T for pairs in self._pairs)
            first = self.first[:, batch]
            thresholds_sd = np.array(_THRESHOLDS, np.float32)
            _try(left, right, self.mean[tried], 1 / self.sd[tried], thresholds_sd, tried=self.tried, first=first)
            self.first[:, batch] = first
        self.tried = min(self.tried + _TRIED, len(self._directions))


@numba.njit(nogil=True, cache=True)
def _try(left: Any, right: Any, mean: Any, scale: Any, thresholds: Any, tried: int, first: Any) -> None:
    for i in range(left.shape[0]):
        reached = 0
        for g in range(left.shape[1]):
            while reached < thresholds.shape[0] and first[reached, i] != NEVER:
                reached += 1
            both = (min(left[i, g], right[i, g]) - mean[g]) * scale[g]
            while reached < thresholds.shape[0] and both >= thresholds[reached]:
                first[reached, i] = tried + g
                reached += 1


def _mates(
    sample: Float32, calibration: Calibration, min_similarity: float, rng: np.random.Generator
) -> tuple[Float32, Float32]:
    """Pairs of unit rows with the similarities of mates of at least min_similarity. Each pair is a row of the sample, and a mixture of this
    row with another row."""
    similarity = calibration.mated_similarities(rng.random(_PAIRS), min_similarity=min_similarity).astype(np.float32)[
        :, None
    ]
    which = rng.integers(0, len(sample), (2, _PAIRS))
    left, right = sample[which[0]], sample[which[1]]
    right = right - np.einsum("ij,ij->i", left, right)[:, None] * left
    right /= np.maximum(np.linalg.norm(right, axis=1, keepdims=True), 1e-6)
    return left, np.asarray(similarity * left + np.sqrt(1 - similarity * similarity) * right, np.float32)
