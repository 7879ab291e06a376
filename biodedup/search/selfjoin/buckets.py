"""LSH buckets for the self-join of a large gallery: only rows that share a bucket are compared.

Owns the choice of buckets, and what they may miss. Never scans (`native/`) and never reads a gallery's rows.

Method: spherical locality-sensitive filters (Becker, Ducas, Gama and Laarhoven, SODA 2016), a form of LSH (Indyk and
Motwani, STOC 1998). A bucket is a direction, and the rows whose similarity to it is above a threshold that a given
share of all rows reaches. Embeddings are spread nearly evenly over their sphere, so a search by one direction, or by
the nearest of some, loses hard mates. But two mates that score high enough to decide share a tenth of the buckets that
hold either, and two unrelated rows share hardly any: with some ten thousand buckets nearly every pair of mates shares
one, though only a few of a hundred unrelated pairs do.

How many buckets: pairs are made from the column's own vectors, at similarities like those of the calibration's mates,
and go through every step of the join; half of them choose the number, half confirm it.

Invariant: every step but the last comparison reads high nibbles alone. Directions are probes of a scan, which finds a
bucket's members; members are compared with each other by signs, then by high nibbles.
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
"""Buckets of one step of a join, and of all."""
ROWS_MIN = 1 << 18
"""Fewer rows are compared with each other sooner than buckets are chosen."""
NEVER = 1 << 30
_TRIED = 4096  # buckets, after which it is checked whether there are enough
_THRESHOLDS = (2.5, 2.7, 2.9, 3.1, 3.3, 3.5, 3.7)
"""Where a bucket begins, in standard deviations of similarity above its mean."""
_PAIRS = 40_000  # mates that are made: half choose the buckets, half confirm them
_SAMPLE = 8_192  # vectors that they are made from
_AT_ONCE = 512
_SEED = 2_026
_WORTH = 0.8  # buckets are used if they cost less than this share of comparing all pairs


@dataclass(frozen=True, eq=False)
class Buckets:
    """The buckets of a self-join.

    directions: float32 (n, d), unit rows; min_similarity: float32 (n,), the estimated similarity to the direction that
    members reach. signs: of the column; sign_cut, cut: estimates by signs and by high nibbles that a pair must reach.

    share: of all pairs, those that are compared. drawn: mates that were set aside to confirm the choice; missed: of
    these.
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
        """The buckets of each step, and how far from first to last the join is after it."""
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
    """Buckets for a join of so many rows like this column's, which lose no more than miss_risk of the mates of at least
    min_similarity, with 95 % confidence. None if this cannot be confirmed, or if comparing all pairs is cheaper."""
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
    # the margin is for mates at min_similarity; of more similar ones far fewer are lost
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
    """Rotated vectors as their high nibbles alone tell them, float32 (n, D)."""
    codes, norms = quantise(rotated)
    return dequantise(codes & np.uint8(240) | np.uint8(8), norms)


def _count(first: NDArray[np.int32], most: int, miss_risk: float) -> tuple[int, int]:
    """How many buckets are enough, and how many of the pairs set aside they miss; 0 if all buckets are too few. first:
    the first bucket that each pair shares."""
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
    """Nanoseconds a row of a join."""
    share = float(ndtr(-threshold))
    return count * (
        costs.BUCKET_DIRECTION_NS + share * costs.BUCKET_MEMBER_NS + share**2 * rows / 2 * costs.BUCKET_PAIR_NS
    )


class _Trial:
    """Tries pairs with one bucket after another. pairs: rotated, float32 (n, D) each; lost: those that another step
    loses anyway. first: int32 (thresholds, n), for each pair the first bucket that holds both, NEVER until it is
    found."""

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
        """How many buckets are needed at least. Pairs that share no bucket yet share one ever more seldom, so that the
        remainder declines ever more slowly."""
        left = float((self.first[threshold, ~self._lost] == NEVER).mean())
        return int(self.tried * max(log(miss_risk) / log(max(min(left, 1 - 1e-6), miss_risk)), 1))

    def try_more(self, thresholds: list[int]) -> None:
        """Tries more buckets with the pairs that do not share one yet at one of these thresholds."""
        some = slice(self.tried, self.tried + _TRIED)
        waiting = np.flatnonzero((self.first[thresholds] == NEVER).any(axis=0) & ~self._lost)
        for low in range(0, len(waiting), _AT_ONCE):
            some_pairs = waiting[low : low + _AT_ONCE]
            left, right = (pairs[some_pairs] @ self._directions[some].T for pairs in self._pairs)
            first = self.first[:, some_pairs]
            thresholds_sd = np.array(_THRESHOLDS, np.float32)
            _try(left, right, self.mean[some], 1 / self.sd[some], thresholds_sd, tried=self.tried, first=first)
            self.first[:, some_pairs] = first
        self.tried = min(self.tried + _TRIED, len(self._directions))


@numba.njit(nogil=True, cache=True)
def _try(left: Any, right: Any, mean: Any, scale: Any, thresholds: Any, tried: int, first: Any) -> None:
    for i in range(left.shape[0]):
        met = 0
        for g in range(left.shape[1]):
            while met < thresholds.shape[0] and first[met, i] != NEVER:
                met += 1
            both = (min(left[i, g], right[i, g]) - mean[g]) * scale[g]
            while met < thresholds.shape[0] and both >= thresholds[met]:
                first[met, i] = tried + g
                met += 1


def _mates(
    sample: Float32, calibration: Calibration, min_similarity: float, rng: np.random.Generator
) -> tuple[Float32, Float32]:
    """Pairs of unit rows, as similar as mates of at least min_similarity: a row of the sample, and the same row mixed
    with another."""
    similarity = calibration.mated_similarities(rng.random(_PAIRS), min_similarity=min_similarity).astype(np.float32)[
        :, None
    ]
    which = rng.integers(0, len(sample), (2, _PAIRS))
    left, right = sample[which[0]], sample[which[1]]
    right = right - np.einsum("ij,ij->i", left, right)[:, None] * left
    right /= np.maximum(np.linalg.norm(right, axis=1, keepdims=True), 1e-6)
    return left, np.asarray(similarity * left + np.sqrt(1 - similarity * similarity) * right, np.float32)
