"""The signs of a column's rows, and how well a dot product with them estimates a similarity.

Owns the measured laws of sign estimates, for searches in several columns and for joins. Never scans.

Method: one bit a number after a random rotation, as in RaBitQ (Gao and Long, SIGMOD 2024). The signs of a rotated
vector keep 80 % of the correlation with a probe. Rows that pass are compared by their high nibbles. One margin serves
both steps; it comes from pairs of which neither step may lose more than the miss risk.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from biodedup.gallery.files.codec import measured_laws
from biodedup.gallery.files.codes import product, quantise
from biodedup.search.native.estimator import TableEstimator, mean_and_covariance
from biodedup.search.native.scan_kernel import ScanProbes
from biodedup.search.native.table_tile import ENTRIES, TableKind
from biodedup.search.native.tables import limits_of, products_at, rounding_variance, scales_of, tables_of
from biodedup.values import Float32

TABLES_MOST = 128
"""With more tables the rounded sums would not fit a byte well."""
GROUP = 4
"""Tables of one group, which a multi-column plan takes or leaves as a whole: 16 numbers."""
LEVELS = np.array([[entry >> b & 1 for b in range(TableKind.SIGNS)] for entry in range(ENTRIES)], np.float32) * 2 - 1
"""What the entries of a table stand for: the signs of four numbers."""
_GROUP_PAIRS = 4_000
"""At each similarity, from which the sums of groups of tables are measured."""
_SEED = 2_002


class Signs(TableEstimator):
    """The signs of a column's rows. The first tables look at the first numbers, four each."""

    def __init__(self, sample: Float32, scanned: int) -> None:
        self.tables = min(scanned // TableKind.SIGNS, TABLES_MOST)
        self.octets, self.scanned, self.sample = -(-self.tables // 2), scanned, sample
        self._size = np.float32(sqrt(self.count(self.tables)))

    def of(self, vectors: Float32) -> Float32:
        """The signs of vectors, float32 (n, m) of -1 and 1."""
        return self.of_codes(quantise(vectors)[0], self.tables)

    def of_codes(self, codes: NDArray[np.uint8], tables: int) -> Float32:
        """As `of`, from codes, of the first so many tables."""
        return np.where(codes[:, : self.count(tables)] >= 128, np.float32(1), np.float32(-1))

    def numbers(self, vectors: Float32, tables: int | None = None) -> Float32:
        """The numbers that the tables look at, float32 (n, m); tables: only the first so many."""
        return vectors[:, : self.count(self.tables if tables is None else tables)]

    def count(self, tables: int) -> int:
        """How many numbers the first so many tables look at."""
        return TableKind.SIGNS * tables

    @cached_property
    def groups(self) -> GroupLaw:
        return GroupLaw(self, self.sample)

    def estimates(self, probes: Float32, vectors: Float32) -> Float32:
        """float32 (n, D) each -> float32 (n,): about the cosine of the probe's numbers and the row's signs."""
        signs = (self.of(vectors) > 0).reshape(len(probes), -1, TableKind.SIGNS)
        entries = (signs << np.arange(TableKind.SIGNS)).sum(axis=2)
        return np.asarray(products_at(self._quads(probes), LEVELS, entries) / self._size, np.float32)

    def _quads(self, probes: Float32) -> Float32:
        return self.numbers(probes).reshape(len(probes), -1, TableKind.SIGNS)

    @cached_property
    def _moments(self) -> tuple[Float32, Float32]:
        return mean_and_covariance(self.of(self.sample))

    def unrelated(self, probes: Float32) -> tuple[Float32, Float32]:
        (mean, covariance), numbers = self._moments, self.numbers(probes)
        steps, _, padded = scales_of(self._quads(probes), LEVELS)
        variance = np.einsum("ij,ij->i", product(numbers, covariance), numbers) + rounding_variance(padded, steps)
        return np.asarray(product(numbers, mean[:, None])[:, 0] / self._size, np.float32), np.sqrt(
            variance
        ) / self._size

    def tabled(self, untabled: ScanProbes, probes: Float32, cuts: Float32) -> ScanProbes:
        tables, steps, middles = tables_of(self._quads(probes), LEVELS)
        places = np.minimum(np.arange(tables.shape[1], dtype=np.int32), self.tables - 1)  # padding counts nothing
        return replace(
            untabled,
            tables=tables,
            places=np.tile(places, (len(tables), 1)),
            limits=limits_of(cuts * self._size, steps, middles),
            used=np.array([self.tables]),
            kind=TableKind.SIGNS,
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
        edges = np.arange(0, TableKind.SIGNS * signs.tables, TableKind.SIGNS * GROUP)

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

        measured_laws((measured,), sample, "sample", rng, _GROUP_PAIRS)

    def mated(self, similarity: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
        """Random sums of each group for pairs at these similarities, float64 (count, n)."""
        sums = np.array([np.interp(similarity, self._levels, mean) for mean in np.array(self._means).T])
        noise, nearest = rng.standard_normal((len(similarity), self.count)), np.clip(np.rint(similarity * 10), 0, 10)
        for level, root in enumerate(self._roots):
            there = np.flatnonzero(nearest == level)
            sums[:, there] += root @ noise[there].T
        return sums
