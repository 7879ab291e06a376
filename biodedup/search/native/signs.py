"""Sign tables: a probe's look-up tables over quantised rows, and the measured error of the estimates that they give.

Owns a probe's tables, and the error laws that turn a similarity into a cut-off. Never scans (`sign_kernel.py`).

Method: one bit a number after a random rotation, as in RaBitQ (Gao and Long, SIGMOD 2024), looked up in tables as in
FAISS's fast scan (André, Kermarrec and Le Scouarnec, VLDB 2015). The signs of a rotated vector keep 80 % of the
correlation with a probe, four classes of its numbers keep 94 %. Both are read off the high nibbles that a scan has in
memory, so they are stored nowhere. Four or six signs, or two or three classes, index a table of sums: of a probe's
numbers times what the signs or classes stand for, rounded to a byte. Rows that pass are compared by their high nibbles.
One margin serves both steps; it comes from pairs of which neither step may lose more than the miss risk.

What a class stands for depends on how long a code is, since the largest number of every vector is scaled to 127. So a
row's sum starts from a seed that corrects for its length, exactly at a similarity of 0.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import sqrt
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from biodedup.gallery.files.codec import ErrorLaw, measured_laws
from biodedup.gallery.files.codes import STEP, quantise, rotate
from biodedup.search.native.sign_kernel import SignedProbes
from biodedup.search.native.sign_tile import (
    CLASSES,
    PROBES_PER_TILE,
    ROW_ALIGNMENT,
    SUMS_PER_ROW,
    TABLES_PER_STEP,
    TableKind,
    aligned,
    numbers_of,
    tables_most,
)
from biodedup.values import Float32

TABLES_MOST = 128
"""With more tables the rounded sums would not fit a byte well."""
GROUP = 4
"""Tables of one group, which a multi-column plan takes or leaves as a whole: 16 or 24 numbers."""
SIGN = np.array([-1, 1], np.float32)
"""What signs stand for."""
NOT_SEEDED = np.zeros(3, np.float32)
_SEED_SIMILARITY, _SEED_MIDDLE = 0.4, 28
_QUICK_PAIRS = 500
_SEED = 2_002
_NO_EVIDENCE = np.zeros((1, 0), np.float32)


class Signs:
    """The signs or classes of a column's rows. sample: float32 (n, D), unit rows that the codec has rotated; scanned:
    how many of the D numbers have their high nibbles in memory; kind: of the tables; tables: how many at most."""

    def __init__(
        self, sample: Float32, scanned: int, kind: TableKind = TableKind.FOUR_SIGNS, tables: int = TABLES_MOST
    ) -> None:
        self.kind = kind
        self.tables = min(tables_most(scanned, kind), tables)
        self.seeding, self._room, self._seed_sd = NOT_SEEDED, 0, 0.0
        self._scanned, self._sample = scanned, sample
        self._used = numbers_of(self.tables, scanned, kind).reshape(-1)
        self._size = np.float32(sqrt(self.count(self.tables)))
        self._levels = SIGN
        if kind < TableKind.FOUR_SIGNS:
            codes, norms = quantise(sample)
            seen, length = codes[:, self._used[self._used >= 0]], norms[:, None] / np.float32(sqrt(sample.shape[1]))
            outer = (seen < 16 * CLASSES[1][0]) | (seen >= 16 * CLASSES[3][0])
            far = np.abs(seen.astype(np.float32) - 128) / length
            low, high = far[~outer].mean(), far[outer].mean() if outer.any() else 2.0
            self._levels = np.array([-high, -low, low, high], np.float32)
            self._seed()
        values = self.of(sample)
        self._mean = values.mean(axis=0)
        self._covariance = np.asarray(np.cov(values.T).reshape(values.shape[1], -1), np.float32)

    def _seed(self) -> None:
        """Measures how the estimates of mates vary with the length of the row's code."""
        self._room = 2 * _SEED_MIDDLE
        norms = quantise(self._sample)[1]
        kept = np.einsum("ij,ij->i", self.of(self._sample), self.numbers(self._sample))
        if norms.std() < 1e-3:
            return
        slope = np.cov(kept, norms)[0, 1] / norms.var() * _SEED_SIMILARITY
        step = float(np.median(self._tables(self._sample[:256])[1]))
        self.seeding = np.array([_SEED_MIDDLE + slope / step * norms.mean(), -slope / step, self._room], np.float32)
        self._seed_sd = float(self._seeds(norms).std())

    def _seeds(self, norms: Float32) -> NDArray[np.uint8]:
        return np.asarray(np.clip(self.seeding[0] + self.seeding[1] * norms, 0, self.seeding[2]), np.uint8)

    def of(self, vectors: Float32) -> Float32:
        """What the signs or classes of vectors stand for, float32 (n, m), in the order of the tables; 0 where a table
        looks at fewer numbers than others."""
        return self.of_codes(quantise(vectors)[0])

    def of_codes(self, codes: NDArray[np.uint8], tables: int | None = None) -> Float32:
        """As `of`, from codes; tables: only the first so many."""
        used = self._of_tables(tables)
        edges = [8] if self.kind >= TableKind.FOUR_SIGNS else [first for first, _ in CLASSES[1:]]
        levels = self._levels[np.searchsorted(edges, codes[:, used] >> 4, side="right")]
        return np.where(used >= 0, levels, np.float32(0))

    def numbers(self, vectors: Float32, tables: int | None = None) -> Float32:
        """The numbers that the tables look at, float32 (n, m), in their order; tables: only the first so many."""
        used = self._of_tables(tables)
        return np.where(used >= 0, vectors[:, used], np.float32(0))

    def count(self, tables: int) -> int:
        """How many numbers the first so many tables look at."""
        return int(np.count_nonzero(self._of_tables(tables) >= 0))

    def _of_tables(self, tables: int | None) -> NDArray[np.int64]:
        return self._used if tables is None else self._used[: self.kind * tables]

    def _tables(self, probes: Float32) -> tuple[NDArray[np.uint8], Float32, Float32]:
        return tables_of([self.numbers(probes)], self._levels, self.kind, self._room)

    @cached_property
    def laws(self) -> tuple[ErrorLaw, ErrorLaw]:
        """The error laws of the estimate by signs and of the estimate by high nibbles, for pairs that neither step may
        lose."""
        rng = np.random.default_rng(_SEED)
        signs, nibbles = measured_laws((self.estimates, self._by_nibbles), self._sample, "sample", rng)
        return signs, nibbles

    @cached_property
    def quick_law(self) -> ErrorLaw:
        """A rough error law from few pairs, to foresee costs."""
        rng = np.random.default_rng(_SEED)
        return measured_laws((self.estimates,), self._sample, "sample", rng, _QUICK_PAIRS)[0]

    @cached_property
    def groups(self) -> GroupLaw:
        return GroupLaw(self, self._sample)

    def estimates(self, probes: Float32, vectors: Float32) -> Float32:
        """The kernel's estimates of pairs, float32 (n, D) each -> float32 (n,): about the cosine of the probe's numbers
        and what the row's signs or classes stand for."""
        numbers = self.numbers(probes)
        steps, middles, quarter = scales_of(numbers, self._levels, self.kind, self._room)
        codes, norms = quantise(vectors)
        upper = np.ascontiguousarray(codes[:, self._used] >> 4).reshape(len(probes), self.tables, -1)
        means = np.empty(len(probes), np.float32)
        numbers = numbers.reshape(upper.shape)
        _means(numbers, self._levels, steps, quarter, upper, self._seeds(norms), means)
        return np.asarray(products_of(means, steps, middles) / self._size, np.float32)

    def _by_nibbles(self, probes: Float32, vectors: Float32) -> Float32:
        codes, norms = quantise(vectors)
        seen = (codes[:, : self._scanned] >> 4).astype(np.float32) * 16 - 120
        return np.asarray(np.einsum("ij,ij->i", probes[:, : self._scanned], seen) / norms, np.float32)

    def unrelated(self, probes: Float32) -> tuple[Float32, Float32]:
        """Mean and standard deviation of the estimates of unrelated rows, float32 (q,) each. probes: rotated."""
        seen = self.numbers(probes)
        steps, _, quarter = scales_of(seen, self._levels, self.kind, self._room)
        variance = np.einsum("ij,ij->i", rotate(seen, self._covariance), seen)
        variance += rounding_variance(SUMS_PER_ROW * quarter, steps) + (self._seed_sd * steps) ** 2
        mean = rotate(seen, self._mean[None])[:, 0]
        return np.asarray(mean / self._size, np.float32), np.sqrt(variance) / self._size

    def share_passing(self, cuts: Float32, probes: Float32) -> float:
        """The share of unrelated rows that passes, averaged over the probes. cuts: estimates, float32 (q,)."""
        mean, sd = self.unrelated(probes)
        return float(ndtr((mean - cuts) / sd).mean())

    def probes(self, probes: Float32, cuts: Float32, codes: NDArray[np.int8], parameters: Float32) -> SignedProbes:
        """Probes as the kernel takes them. probes: rotated; cuts: estimates that rows must reach; codes, parameters:
        for the dot products with high nibbles, int8 (q, scanned), float32 (q, 2)."""
        tables, steps, middles = self._tables(probes)
        limits = limits_of(cuts * self._size, steps, middles)
        used = np.array([self.tables])
        return SignedProbes(
            *filled(tables, limits),
            used,
            self.kind,
            self.seeding,
            paired([codes]),
            parameters[None],
            _NO_EVIDENCE,
        )


class GroupLaw:
    """The distribution of what each group of tables adds up to: the dot product of a probe's numbers with a row's
    signs.

    count: of groups. unrelated: float64 (count + 1, 2), for unrelated pairs mean and variance of the sum of the first
    0, 1, ... groups.
    """

    def __init__(self, signs: Signs, sample: Float32) -> None:
        self.count = -(-signs.tables // GROUP)
        rng = np.random.default_rng(_SEED)
        edges = np.arange(0, signs.kind * signs.tables, signs.kind * GROUP)

        def products(one: Float32, other: Float32) -> NDArray[np.float64]:
            return np.add.reduceat((signs.numbers(one) * signs.of(other)).astype(np.float64), edges, axis=1)

        which = rng.integers(0, len(sample), (2, 16_384))
        which = which[:, which[0] != which[1]]
        added = np.cumsum(products(sample[which[0]], sample[which[1]]), axis=1)
        self.unrelated = np.array([(0.0, 0.0), *zip(added.mean(axis=0), added.var(axis=0), strict=True)])
        self._levels = np.round(np.arange(0, 1.01, 0.1), 1)
        self._means: list[NDArray[np.float64]] = []
        self._roots: list[NDArray[np.float64]] = []

        def measured(one: Float32, other: Float32) -> Float32:
            found = products(one, other)
            self._means.append(found.mean(axis=0))
            values, axes = np.linalg.eigh(np.cov(found.T).reshape(self.count, -1))
            self._roots.append(axes * np.sqrt(np.maximum(values, 0)))
            return np.zeros(len(one), np.float32)

        measured_laws((measured,), sample, "sample", rng)

    def mated(self, similarity: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
        """Random sums of each group for pairs at these similarities, float64 (count, n)."""
        means = np.array([np.interp(similarity, self._levels, mean) for mean in np.array(self._means).T])
        roots = np.array(self._roots)[np.clip(np.rint(similarity * 10), 0, 10).astype(np.int64)]
        noise = rng.standard_normal((len(similarity), self.count))
        return np.asarray(means + np.einsum("nij,nj->in", roots, noise))


def tables_of(
    numbers: Sequence[Float32], levels: Float32, kind: TableKind = TableKind.FOUR_SIGNS, room: int = 0
) -> tuple[NDArray[np.uint8], Float32, Float32]:
    """Tables of probes' numbers, float32 (q, m) of each column, in the order of its tables; levels: what each of the 2
    or 4 classes of a row's number stands for; kind: of the tables; room: the largest seed of the first sum, half of it
    on average.

    Returns uint8 (q, t, len(levels) ** kind), t padded to a multiple of SUMS_PER_ROW * TABLES_PER_STEP, and steps and
    middles, float32 (q,) each, for `products_of`.
    """
    together = np.ascontiguousarray(np.concatenate(numbers, axis=1), np.float32)
    steps, middles, quarter = scales_of(together, levels, kind, room)
    tables = np.zeros((len(together), SUMS_PER_ROW * quarter, len(levels) ** kind), np.uint8)
    _fill(together.reshape(len(together), -1, kind), np.ascontiguousarray(levels), steps, tables)
    return tables, steps, middles


def scales_of(numbers: Float32, levels: Float32, kind: TableKind, room: int) -> tuple[Float32, Float32, int]:
    """Of probes' tables: steps, middles, and how many tables one of SUMS_PER_ROW sums covers."""
    count = numbers.shape[1] // kind
    quarter = -(-count // (SUMS_PER_ROW * TABLES_PER_STEP)) * TABLES_PER_STEP
    most = np.zeros((len(numbers), SUMS_PER_ROW * quarter), np.float32)
    most[:, :count] = np.abs(numbers).reshape(len(numbers), count, -1).sum(axis=2) * levels[-1]
    largest = 2 * most.reshape(len(numbers), SUMS_PER_ROW, quarter).sum(axis=2).max(axis=1)
    steps = np.maximum(largest / np.float32(255 - room - quarter / 2), 1e-12).astype(np.float32)
    return steps, most.sum(axis=1) + steps * np.float32(room / 2), quarter


# What rounding up adds on average: a quarter to each mean of two sums, and again to the mean of both.
_ROUNDED_UP = np.float32(0.5)


def rounding_variance(tables: int, steps: Float32) -> Float32:
    """The variance of dot products due to the rounding of entries and of means."""
    return np.asarray((tables / 12 + SUMS_PER_ROW**2 / 6) * steps**2, np.float32)


def products_of(means: Float32, steps: Float32, middles: Float32) -> Float32:
    """The dot products that means of the sums stand for."""
    return np.asarray((means - _ROUNDED_UP) * SUMS_PER_ROW * steps - middles, np.float32)


def limits_of(products: Float32, steps: Float32, middles: Float32) -> NDArray[np.uint8]:
    """The lowest means of the sums that stand for dot products of at least these, float32 (q,)."""
    least = np.ceil((products + middles) / (SUMS_PER_ROW * steps) + _ROUNDED_UP - 1e-3)
    return np.asarray(np.clip(least, 0, 255), np.uint8)


def filled(tables: NDArray[np.uint8], limits: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """64-byte aligned, and padded to a multiple of PROBES_PER_TILE with probes that no row reaches."""
    missing = -len(tables) % PROBES_PER_TILE
    shape = (len(tables) + missing, *tables.shape[1:])
    whole = aligned(int(np.prod(shape))).reshape(shape)
    whole[: len(tables)] = tables
    return whole, np.concatenate([limits, np.full(missing, 255, np.uint8)])


def paired(codes: Sequence[NDArray[np.int8]]) -> NDArray[np.int8]:
    """Probes of several columns, int8 (q, scanned) each, in the layout of `make_row_dot`: int8 (columns, q, 2,
    octets)."""
    octets = max(-(-c.shape[1] // 2 // ROW_ALIGNMENT) * ROW_ALIGNMENT for c in codes)
    found = np.zeros((len(codes), len(codes[0]), 2, octets), np.int8)
    for laid_out, some in zip(found, codes, strict=True):
        halves = some.reshape(len(some), -1, 2, STEP // 2).transpose(0, 2, 1, 3)
        laid_out[:, :, : some.shape[1] // 2] = halves.reshape(len(some), 2, -1)
    return found


@numba.njit(nogil=True, cache=True)
def _entry(numbers: Any, levels: Any, step: float, entry: int) -> Any:
    """One entry of a table: the sum for rows whose numbers are in these classes."""
    shift = 1 if levels.shape[0] == 2 else 2
    total = np.float32(0)
    for b in range(numbers.shape[0]):  # the largest possible value is added, so that no entry is negative
        level = levels[entry >> (shift * b) & levels.shape[0] - 1]
        total += abs(numbers[b]) * levels[-1] + numbers[b] * level
    return np.uint8(np.rint(total / step))


@numba.njit(nogil=True, cache=True)
def _fill(numbers: Any, levels: Any, steps: Any, tables: Any) -> None:
    """Fills every `_entry` of every table, from the entries with one number less."""
    totals = np.empty(tables.shape[2], np.float32)
    for p in range(numbers.shape[0]):
        for i in range(numbers.shape[1]):
            totals[0], size = np.float32(0), 1
            for b in range(numbers.shape[2]):
                most = abs(numbers[p, i, b]) * levels[-1]
                for d in range(levels.shape[0] - 1, -1, -1):
                    value = most + numbers[p, i, b] * levels[d]
                    for entry in range(size):
                        totals[d * size + entry] = totals[entry] + value
                size *= levels.shape[0]
            for entry in range(size):
                tables[p, i, entry] = np.uint8(np.rint(totals[entry] / steps[p]))


@numba.njit(nogil=True, cache=True)
def _means(numbers: Any, levels: Any, steps: Any, quarter: int, upper: Any, seeds: Any, means: Any) -> None:
    """The value of pairs that the kernel compares with limits. upper: uint8 (n, tables, numbers), the high nibbles, 0
    to 15."""
    each = upper.shape[2]
    for i in range(upper.shape[0]):
        sums = np.zeros(4, np.int64)
        sums[0] = seeds[i]
        for t in range(upper.shape[1]):
            entry = np.int64(0)
            for b in range(each):
                number = np.int64(upper[i, t, b])
                if levels.shape[0] == 2:
                    entry |= np.int64(number >> 3) << b
                else:
                    entry |= (np.int64(number > 4) + np.int64(number > 7) + np.int64(number > 10)) << 2 * b
            sums[t // quarter] += _entry(numbers[i, t], levels, steps[i], int(entry))
        means[i] = (((sums[0] + sums[1] + 1) >> 1) + ((sums[2] + sums[3] + 1) >> 1) + 1) >> 1


assert CLASSES == ((0, 5), (5, 8), (8, 11), (11, 16)) and SUMS_PER_ROW == 4  # which `_means` relies on
