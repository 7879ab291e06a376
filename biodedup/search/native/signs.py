"""Estimates similarities by the signs of a row's numbers, for searches in several columns and for joins.

Owns the look-up tables of signs and the measured error of the estimates. Never scans.

Method: a bit per number after a random rotation, as in RaBitQ (Gao and Long, SIGMOD 2024). The signs of a rotated vector keep 80 % of the
correlation with a probe. Rows that pass are compared by their high nibbles. Both steps have the same margin, which is measured on pairs so that
both steps together lose at most the miss risk.
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
from biodedup.search.native.table_tile import ENTRIES, SUMS_PER_ROW, TableKind
from biodedup.search.native.tables import limits_of, products_at, rounding_variance, scales_of, tables_of
from biodedup.values import Float32

TABLES_MAX = 128
"""With more tables, rounded sums would lose too much precision in a byte."""
GROUP = 4
"""Number of tables in a group, for 16 numbers. A multi-column plan uses whole groups."""
LEVELS = np.array([[entry >> b & 1 for b in range(TableKind.SIGNS)] for entry in range(ENTRIES)], np.float32) * 2 - 1
"""The signs of four numbers for each entry of a table."""
_GROUP_PAIRS = 4_000
"""Number of pairs at each similarity on which the sums of groups are measured."""
_SEED = 2_002


class Signs(TableEstimator):
    """The signs of a column's rows. Table i is for the numbers 4 i to 4 i + 3. share: of the tables; with fewer tables only the leading signs are
    read."""

    def __init__(self, sample: Float32, scanned: int, share: float = 1.0) -> None:
        most = min(scanned // TableKind.SIGNS, TABLES_MAX)
        self.tables = (
            max(int(share * most) // SUMS_PER_ROW * SUMS_PER_ROW, min(SUMS_PER_ROW, most)) if share < 1 else most
        )
        self.octets, self.scanned, self.sample = -(-self.tables // 2), scanned, sample
        self._size, self._partial = np.float32(sqrt(self.count(most))), self.tables < most

    def of(self, vectors: Float32) -> Float32:
        """The signs of vectors, float32 (n, m) of -1 and 1."""
        return self.of_codes(quantise(vectors)[0], self.tables)

    def of_codes(self, codes: NDArray[np.uint8], tables: int) -> Float32:
        """The signs from codes, for the first `tables` tables."""
        return np.where(codes[:, : self.count(tables)] >= 128, np.float32(1), np.float32(-1))

    def numbers(self, vectors: Float32, tables: int | None = None) -> Float32:
        """The numbers of the tables, float32 (n, m). tables: only of the first tables; None: of all."""
        return vectors[:, : self.count(self.tables if tables is None else tables)]

    def count(self, tables: int) -> int:
        """The number of numbers of the first `tables` tables."""
        return TableKind.SIGNS * tables

    @cached_property
    def groups(self) -> GroupSums:
        return GroupSums(self, self.sample)

    def estimates(self, probes: Float32, vectors: Float32) -> Float32:
        """The estimates of pairs, float32 (n,): approximately the cosine of the probe's numbers and the row's signs. probes, vectors: float32
        (n, D). Leading signs alone are scaled by the probe's share in them, so that they stand for all."""
        signs = (self.of(vectors) > 0).reshape(len(probes), -1, TableKind.SIGNS)
        entries = (signs << np.arange(TableKind.SIGNS)).sum(axis=2)
        return np.asarray(products_at(self._quads(probes), LEVELS, entries) / self._scale(probes), np.float32)

    def _scale(self, probes: Float32) -> Float32:
        """What dot products are divided by, float32 (q,)."""
        numbers = self.numbers(probes)
        energy = np.einsum("ij,ij->i", numbers, numbers) if self._partial else np.ones(len(probes), np.float32)
        return np.asarray(self._size * np.maximum(energy, np.float32(1e-9)), np.float32)

    def _quads(self, probes: Float32) -> Float32:
        return self.numbers(probes).reshape(len(probes), -1, TableKind.SIGNS)

    @cached_property
    def _moments(self) -> tuple[Float32, Float32]:
        return mean_and_covariance(self.of(self.sample))

    def unrelated(self, probes: Float32) -> tuple[Float32, Float32]:
        (mean, covariance), numbers = self._moments, self.numbers(probes)
        steps, _, padded = scales_of(self._quads(probes), LEVELS)
        variance = np.einsum("ij,ij->i", product(numbers, covariance), numbers) + rounding_variance(padded, steps)
        scale = self._scale(probes)
        return np.asarray(product(numbers, mean[:, None])[:, 0] / scale, np.float32), np.sqrt(variance) / scale

    def tabled(self, untabled: ScanProbes, probes: Float32, cuts: Float32) -> ScanProbes:
        tables, steps, middles = tables_of(self._quads(probes), LEVELS)
        places = np.minimum(np.arange(tables.shape[1], dtype=np.int32), self.tables - 1)  # padding adds nothing
        return replace(
            untabled,
            tables=tables,
            places=np.tile(places, (len(tables), 1)),
            limits=limits_of(cuts * self._scale(probes), steps, middles),
            used=np.array([self.tables]),
            kind=TableKind.SIGNS,
        )


class GroupSums:
    """The distribution of the sum of each group of tables: the dot product of a probe's numbers with a row's signs.

    count: number of groups. unrelated: float64 (count + 1, 2), mean and variance, over unrelated pairs, of the sum of the first 0, 1, ...
    groups.
    """

    def __init__(self, signs: Signs, sample: Float32) -> None:
        self.count = -(-signs.tables // GROUP)
        rng = np.random.default_rng(_SEED)
        edges = np.arange(0, TableKind.SIGNS * signs.tables, TableKind.SIGNS * GROUP)

        def products(probes: Float32, rows: Float32) -> NDArray[np.float64]:
            return np.add.reduceat((signs.numbers(probes) * signs.of(rows)).astype(np.float64), edges, axis=1)

        which = rng.integers(0, len(sample), (2, 16_384))
        which = which[:, which[0] != which[1]]
        added = np.cumsum(products(sample[which[0]], sample[which[1]]), axis=1)
        self.unrelated = np.array([(0.0, 0.0), *zip(added.mean(axis=0), added.var(axis=0), strict=True)])
        self._levels = np.round(np.arange(0, 1.01, 0.1), 1)
        self._means: list[NDArray[np.float64]] = []
        self._roots: list[NDArray[np.float64]] = []

        def measure(probes: Float32, rows: Float32) -> Float32:
            sums = products(probes, rows)
            self._means.append(sums.mean(axis=0))
            values, axes = np.linalg.eigh(np.cov(sums.T).reshape(self.count, -1))
            self._roots.append(axes * np.sqrt(np.maximum(values, 0)))
            return np.zeros(len(probes), np.float32)

        measured_laws((measure,), sample, "sample", rng, _GROUP_PAIRS)

    def mated(self, similarity: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
        """Random sums of each group for mated pairs at these similarities, float64 (count, n)."""
        sums = np.array([np.interp(similarity, self._levels, mean) for mean in np.array(self._means).T])
        noise, nearest = rng.standard_normal((len(similarity), self.count)), np.clip(np.rint(similarity * 10), 0, 10)
        for level, root in enumerate(self._roots):
            at_level = np.flatnonzero(nearest == level)
            sums[:, at_level] += root @ noise[at_level].T
        return sums
