"""Caps: a join of everybody with everybody that compares only those who lie in the same direction, somewhere.

Owns the choice of caps, and what they may miss. Never scans (`scan.py`) and never reads a gallery's rows.

A cap is a direction, and the rows that lie so near to it that a given share of all rows does. Embeddings are spread nearly evenly over
their sphere, so that a search by one direction, or by the nearest of some, loses hard mates. But of two mates that a join is asked for,
which score high enough to decide, a tenth of the caps that hold the one hold the other as well, and of two strangers hardly any: with
some ten thousand caps nearly every pair of mates meets in one, though only a few of a hundred pairs of strangers do. (Spherical
locality-sensitive filters: Becker, Ducas, Gama and Laarhoven, SODA 2016; here their number follows from pairs that are made from the
column's own vectors, at similarities as the calibration's mates have them, sent through every step of the join.)

Everything but the last comparison reads upper halves alone: the members of a cap are found by the scan (its directions are probes), and
members are compared with each other by signs, then by upper halves.
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

from biodedup.gallery.files.codec import Codec, measured_laws
from biodedup.gallery.files.codes import dequantise, quantise
from biodedup.gallery.segments.part import Column
from biodedup.intervals import upper_bound
from biodedup.match.calibration import Calibration
from biodedup.search.native.column_statistics import population_of, signs_of
from biodedup.search.native.sign_tile import FOUR
from biodedup.search.native.signs import Signs
from biodedup.values import Float32

CAPS, CAPS_MOST = 64, 1 << 16
"""Caps of one step of a join, and of all."""
ROWS_MIN = 1 << 18
"""Fewer rows are joined sooner than caps are chosen."""
NEVER = 1 << 30
_TRIED = 4096  # caps, before it is asked whether there are enough
_HEIGHTS = (2.5, 2.7, 2.9, 3.1, 3.3, 3.5, 3.7)
"""Where a cap begins, in standard deviations of similarity above its mean."""
_PAIRS = 40_000  # mates that are made to measure by, half to choose and half to confirm
_SAMPLE = 8_192  # vectors that they are made from
_AT_ONCE = 512
_SEED = 2_026
# Costs in nanoseconds of a thread, measured with AVX2: a row compared with a direction, a row taken out as a member, two members
# compared; and what a join without caps takes for a pair.
_DIRECTION, _MEMBER, _PAIR = 1.4, 1_500.0, 0.5
_WORTH = 0.8


@dataclass(frozen=True, eq=False)
class Caps:
    """directions: float32 (n, d), unit rows; least: float32 (n,), the estimated similarity that members reach. signs: of the
    column; sign_cut, cut: estimates by signs and by upper halves that a pair must reach.

    share: of all pairs, those that are compared. drawn: mates that were set aside to confirm by; missed: of them.
    """

    codec: Codec = field(repr=False)
    directions: Float32 = field(repr=False)
    least: Float32 = field(repr=False)
    signs: Signs
    sign_cut: float
    cut: float
    share: float
    drawn: int
    missed: int

    def __len__(self) -> int:
        return len(self.directions)

    def steps(self, first: int, last: int) -> Iterator[tuple[slice, int]]:
        """Caps that are joined at a time, and how far from first to last the join then is."""
        for low in range(0, len(self), CAPS):
            high = min(low + CAPS, len(self))
            yield slice(low, high), first + (last - first) * high // len(self)

    @property
    def miss_bound(self) -> float:
        """The upper end of the one-sided 95 % interval (Clopper and Pearson, 1934)."""
        return float(upper_bound(self.missed, self.drawn))


def choose(column: Column, rows: int, calibration: Calibration, least: float, miss_risk: float) -> Caps | None:
    """Caps for a join of so many rows that are like this column's, by which of mates of at least this similarity no more than the risk is
    lost, with 95 % confidence. None where this cannot be said, or is not worth the while."""
    codec = column.codec
    if codec is None or rows < ROWS_MIN or not calibration.mates_measured or miss_risk <= 0:
        return None
    rng = np.random.default_rng(_SEED)
    sampled = min(_SAMPLE, column.count // 2)
    cells = np.sort(rng.choice(column.count, min(CAPS_MOST + sampled, column.count), replace=False))
    vectors = column.vectors_at(cells)[rng.permutation(len(cells))]
    sample, directions = vectors[:sampled], vectors[sampled:]
    pairs = _mates(sample, calibration, least, rng)
    one, other = (codec.rotate(some) for some in pairs)
    signs = signs_of(column, FOUR)

    def by_signs(a: Float32, b: Float32) -> Float32:
        return signs.estimates(seen(a), b)

    def by_halves(a: Float32, b: Float32) -> Float32:
        known = (seen(some)[:, : codec.scanned] for some in (a, b))
        return np.asarray(np.einsum("ij,ij->i", *known), np.float32)

    laws = measured_laws((by_signs, by_halves), codec.rotate(sample), "sample", rng)
    # the margin is for mates at the least similarity; of all that are more similar far fewer are lost
    z, _ = laws[0].margin(miss_risk)
    sign_cut, cut = (float(law.cut(np.array([least], np.float32), z)[0]) for law in laws)
    lost = (by_signs(one, other) < sign_cut) | (by_halves(one, other) < cut)
    trial = _Trial(column, directions, (one, other), lost)
    best = None
    dearest, open_heights = _WORTH * rows / 2 * _PAIR, list(range(len(_HEIGHTS)))
    while open_heights and trial.tried < len(directions):
        trial.try_more(open_heights)
        for h in open_heights.copy():
            count, missed = _count(trial.first[h], trial.tried, miss_risk)
            cost = _cost(count or trial.at_least(h, miss_risk), _HEIGHTS[h], rows)
            if count and cost < dearest:
                best, dearest = (h, count, missed), cost
            if count or cost >= dearest:
                open_heights.remove(h)
    if best is None:
        return None
    h, count, missed = best
    least_of = trial.mean[:count] + np.float32(_HEIGHTS[h]) * trial.sd[:count]
    share = float(count * ndtr(-_HEIGHTS[h]) ** 2)
    return Caps(codec, directions[:count], least_of, signs, sign_cut, cut, share, _PAIRS // 2, missed)


def seen(turned: Float32) -> Float32:
    """What upper halves say of turned vectors, float32 (n, D)."""
    codes, norms = quantise(turned)
    return dequantise(codes & np.uint8(240) | np.uint8(8), norms)


def _count(first: NDArray[np.int32], most: int, miss_risk: float) -> tuple[int, int]:
    """How many caps it takes, and how many of the pairs set aside they miss; 0 where all are too few. first: the first cap that a
    pair shares."""
    chosen, confirming = np.sort(first[::2]), first[1::2]
    missed = 0
    while upper_bound(missed + 1, len(chosen)) <= miss_risk:
        missed += 1
    for allowed in range(missed, -1, -1):
        count = -(-(int(chosen[-1 - allowed]) + 1) // CAPS) * CAPS
        if count <= most and upper_bound(int((confirming >= count).sum()), len(confirming)) <= miss_risk:
            return count, int((confirming >= count).sum())
    return 0, 0


def _cost(count: int, height: float, rows: int) -> float:
    """Of a join, a row."""
    share = float(ndtr(-height))
    return count * (_DIRECTION + share * _MEMBER + share**2 * rows / 2 * _PAIR)


class _Trial:
    """Pairs tried with one cap after another. pairs: turned, float32 (n, D) each; lost: those that another step loses anyway. first:
    int32 (heights, n), of each pair the first cap that holds both, NEVER before it is found."""

    def __init__(
        self, column: Column, directions: Float32, pairs: tuple[Float32, Float32], lost: NDArray[np.bool_]
    ) -> None:
        assert column.codec is not None, "caps are of coded columns"
        scanned = column.codec.scanned
        turned = np.ascontiguousarray(column.codec.rotate(directions)[:, :scanned])
        self.mean, self.sd = population_of(column).similarity(turned)
        self.tried = 0
        self.first = np.full((len(_HEIGHTS), len(lost)), NEVER, np.int32)
        self._towards = turned
        self._pairs = [seen(some)[:, :scanned] for some in pairs]
        self._lost = lost

    def at_least(self, height: int, miss_risk: float) -> int:
        """How many caps it will take, or more. Of pairs that have not met, some meet seldom, so that fewer and fewer do: those that
        are left decline ever more slowly."""
        left = float((self.first[height, ~self._lost] == NEVER).mean())
        return int(self.tried * max(log(miss_risk) / log(max(min(left, 1 - 1e-6), miss_risk)), 1))

    def try_more(self, heights: list[int]) -> None:
        """Tries some more caps with the pairs that have not met yet at one of these heights."""
        some = slice(self.tried, self.tried + _TRIED)
        waiting = np.flatnonzero((self.first[heights] == NEVER).any(axis=0) & ~self._lost)
        for low in range(0, len(waiting), _AT_ONCE):
            mine = waiting[low : low + _AT_ONCE]
            one, other = (pairs[mine] @ self._towards[some].T for pairs in self._pairs)
            first = self.first[:, mine]
            _try(one, other, self.mean[some], 1 / self.sd[some], np.array(_HEIGHTS, np.float32), self.tried, first)
            self.first[:, mine] = first
        self.tried = min(self.tried + _TRIED, len(self._towards))


@numba.njit(nogil=True, cache=True)
def _try(one: Any, other: Any, mean: Any, scale: Any, heights: Any, tried: int, first: Any) -> None:
    for i in range(one.shape[0]):
        met = 0
        for g in range(one.shape[1]):
            while met < heights.shape[0] and first[met, i] != NEVER:
                met += 1
            both = (min(one[i, g], other[i, g]) - mean[g]) * scale[g]
            while met < heights.shape[0] and both >= heights[met]:
                first[met, i] = tried + g
                met += 1


def _mates(
    sample: Float32, calibration: Calibration, least: float, rng: np.random.Generator
) -> tuple[Float32, Float32]:
    """Pairs of unit rows, as similar as mates are that reach a similarity: one of the sample, and itself mixed with another."""
    similarity = calibration.mated_similarities(rng.random(_PAIRS), least=least).astype(np.float32)[:, None]
    which = rng.integers(0, len(sample), (2, _PAIRS))
    one, other = sample[which[0]], sample[which[1]]
    other = other - np.einsum("ij,ij->i", one, other)[:, None] * one
    other /= np.maximum(np.linalg.norm(other, axis=1, keepdims=True), 1e-6)
    return one, np.asarray(similarity * one + np.sqrt(1 - similarity * similarity) * other, np.float32)
