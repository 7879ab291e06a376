"""Signs: what one bit a number says of a row, and the measured law that turns a similarity into a limit.

Owns a probe's tables, and the laws. Never scans (`sign_kernel.py`).

Of a turned vector's numbers the signs alone keep 80 % of the correlation with a probe (as in RaBitQ: Gao and Long, SIGMOD 2024). They
are the highest bits of the upper halves that a scan has in memory, so that they are stored nowhere. Four signs choose one of
sixteen sums of four of the probe's numbers, rounded so that all together fit a byte. What passes is compared by its upper
halves; one margin serves both, from pairs of which neither step may lose more than the miss risk.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import sqrt
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from biodedup.gallery.codec import ErrorLaw, measured_laws
from biodedup.gallery.codes import STEP, quantise, turned
from biodedup.search.sign_kernel import PADDED, WIDE, SignedProbes
from biodedup.values import Float32

TABLES_MOST = 128
"""Of more, not even the rounded sums would fit a byte well."""
GROUP = 8
"""Tables that a plan over several columns takes or leaves together: 32 numbers."""
_SEED = 2_002
_NO_EVIDENCE = np.zeros((1, 0), np.float32)


class Signs:
    """Of a column's rows. sample: float32 (n, D), unit rows that its codec has turned; scanned: of D numbers, those whose upper
    halves are in memory."""

    def __init__(self, sample: Float32, scanned: int) -> None:
        self.tables = min(scanned // 4, TABLES_MOST)
        self._scanned = scanned
        self._sample = sample
        signs = self.of(sample)
        self._mean = signs.mean(axis=0)
        self._covariance = np.asarray(np.cov(signs.T).reshape(signs.shape[1], -1), np.float32)

    def of(self, vectors: Float32) -> Float32:
        """-1 or 1 for each of the numbers that count, float32 (n, 4 tables), as a column's upper halves have them."""
        return np.where(quantise(vectors)[0][:, : 4 * self.tables] >= 128, np.float32(1), np.float32(-1))

    @cached_property
    def laws(self) -> tuple[ErrorLaw, ErrorLaw]:
        """Of the estimate by signs and of the one by upper halves, for pairs of which neither may be lost."""
        rng = np.random.default_rng(_SEED)
        signs, halves = measured_laws((self.estimates, self._by_halves), self._sample, "sample", rng)
        return signs, halves

    def estimates(self, probes: Float32, vectors: Float32) -> Float32:
        """What the kernel makes of pairs, float32 (n, D) each -> float32 (n,): the cosine of the probe's numbers that count and
        a row's signs."""
        tables, steps, middles = tables_of([probes], [self.tables], [1.0])
        sums = np.empty(len(probes), np.float32)
        _sums(tables, np.ascontiguousarray(self.of(vectors) > 0), sums)
        return np.asarray((sums * steps - middles) / np.float32(sqrt(4 * self.tables)), np.float32)

    @cached_property
    def groups(self) -> GroupLaw:
        return GroupLaw(self, self._sample)

    def _by_halves(self, probes: Float32, vectors: Float32) -> Float32:
        codes, norms = quantise(vectors)
        seen = (codes[:, : self._scanned] >> 4).astype(np.float32) * 16 - 120
        return np.asarray(np.einsum("ij,ij->i", probes[:, : self._scanned], seen) / norms, np.float32)

    def strangers(self, probes: Float32) -> tuple[Float32, Float32]:
        """Mean and standard deviation of the estimates that the column's rows get, float32 (q,) each. probes: turned."""
        seen = np.ascontiguousarray(probes[:, : 4 * self.tables])
        size = np.float32(sqrt(4 * self.tables))
        variance = np.einsum("ij,ij->i", turned(seen, self._covariance), seen)
        return turned(seen, self._mean[None])[:, 0] / size, np.sqrt(np.maximum(variance, 1e-12)) / size

    def share_passing(self, cuts: Float32, probes: Float32) -> float:
        """Of strangers, on an average of the probes. cuts: estimates, float32 (q,)."""
        mean, sd = self.strangers(probes)
        return float(norm.sf((cuts - mean) / sd).mean())

    def probes(self, probes: Float32, cuts: Float32, codes: NDArray[np.int8], parameters: Float32) -> SignedProbes:
        """For the kernel. probes: turned; cuts: estimates that rows must reach; codes, parameters: of the upper halves' dot
        products, int8 (q, scanned), float32 (q, 2)."""
        tables, steps, middles = tables_of([probes], [self.tables], [1.0])
        limits = limits_of(cuts * np.float32(sqrt(4 * self.tables)), steps, middles)
        used = np.array([self.tables])
        return SignedProbes(*filled(tables, limits), used, paired([codes]), parameters[None], _NO_EVIDENCE)


class GroupLaw:
    """What each GROUP tables of a column add up to: the dot product of a probe's numbers with a row's signs, of pairs.

    count: of groups. strangers: float64 (count + 1, 2), mean and variance of the sum of the first 0, 1, ... groups.
    """

    def __init__(self, signs: Signs, sample: Float32) -> None:
        self.count = -(-signs.tables // GROUP)
        rng = np.random.default_rng(_SEED)
        edges = np.arange(0, 4 * signs.tables, 4 * GROUP)

        def products(one: Float32, other: Float32) -> NDArray[np.float64]:
            return np.add.reduceat((one[:, : 4 * signs.tables] * signs.of(other)).astype(np.float64), edges, axis=1)

        which = rng.integers(0, len(sample), (2, 16_384))
        which = which[:, which[0] != which[1]]
        added = np.cumsum(products(sample[which[0]], sample[which[1]]), axis=1)
        self.strangers = np.array([(0.0, 0.0), *zip(added.mean(axis=0), added.var(axis=0), strict=True)])
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
        """Draws for pairs at these similarities, float64 (count, n)."""
        means = np.array([np.interp(similarity, self._levels, mean) for mean in np.array(self._means).T])
        roots = np.array(self._roots)[np.clip(np.rint(similarity * 10), 0, 10).astype(np.int64)]
        noise = rng.standard_normal((len(similarity), self.count))
        return np.asarray(means + np.einsum("nij,nj->in", roots, noise))


def tables_of(
    probes: Sequence[Float32], used: Sequence[int], weights: Sequence[float]
) -> tuple[NDArray[np.uint8], Float32, Float32]:
    """Tables of the first 4 `used` numbers of probes in each column, float32 (q, D) each, times the columns' weights.

    Returns uint8 (q, t, 16), and steps and middles, float32 (q,) each: the weighted dot product of a probe's numbers with a row's
    signs is the sum of the row's entries times the step, less the middle, but for rounding.
    """
    numbers = np.concatenate(
        [p[:, : 4 * n] * np.float32(w) for p, n, w in zip(probes, used, weights, strict=True)], axis=1
    )
    middles = np.abs(numbers).sum(axis=1, dtype=np.float32)
    count = numbers.shape[1] // 4
    steps = np.maximum(2 * middles / np.float32(255 - count / 2), 1e-12).astype(np.float32)
    tables = np.empty((len(numbers), count, 16), np.uint8)
    _fill(np.ascontiguousarray(numbers, np.float32), steps, tables)
    return tables, steps, middles


def limits_of(products: Float32, steps: Float32, middles: Float32) -> NDArray[np.uint8]:
    """The least sums of entries that stand for weighted dot products of at least these, float32 (q,)."""
    least = np.ceil((products + middles) / steps - 1e-3)  # sums are whole numbers, steps are not
    return np.asarray(np.clip(least, 0, 255), np.uint8)


def filled(tables: NDArray[np.uint8], limits: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """64-byte aligned, and filled up to a multiple of the kernel's width with probes that nothing reaches."""
    missing = -len(tables) % WIDE
    shape = (len(tables) + missing, *tables.shape[1:])
    room = np.zeros(int(np.prod(shape)) + 64, np.uint8)
    start = -room.ctypes.data % 64
    whole = room[start : start + int(np.prod(shape))].reshape(shape)
    whole[: len(tables)] = tables
    return whole, np.concatenate([limits, np.full(missing, 255, np.uint8)])


def paired(codes: Sequence[NDArray[np.int8]]) -> NDArray[np.int8]:
    """Probes of several columns, int8 (q, scanned) each, as `make_row_dot` wants them: int8 (columns, q, 2, octets)."""
    octets = max(-(-c.shape[1] // 2 // PADDED) * PADDED for c in codes)
    found = np.zeros((len(codes), len(codes[0]), 2, octets), np.int8)
    for mine, some in zip(found, codes, strict=True):
        halves = some.reshape(len(some), -1, 2, STEP // 2).transpose(0, 2, 1, 3)
        mine[:, :, : some.shape[1] // 2] = halves.reshape(len(some), 2, -1)
    return found


@numba.njit(nogil=True, cache=True)
def _fill(numbers: Any, steps: Any, tables: Any) -> None:
    for p in range(tables.shape[0]):
        for i in range(tables.shape[1]):
            four = numbers[p, 4 * i : 4 * i + 4]
            for entry in range(16):
                total = np.float32(0)
                for b in range(4):  # the absolute value is added, so that no entry is negative
                    total += abs(four[b]) + (four[b] if entry >> b & 1 else -four[b])
                tables[p, i, entry] = np.uint8(np.rint(total / steps[p]))


@numba.njit(nogil=True, cache=True)
def _sums(tables: Any, positive: Any, sums: Any) -> None:
    for i in range(tables.shape[0]):
        total = 0
        for t in range(tables.shape[1]):
            entry = 0
            for b in range(4):
                if positive[i, 4 * t + b]:
                    entry |= 1 << b
            total += tables[i, t, entry]
        sums[i] = total
