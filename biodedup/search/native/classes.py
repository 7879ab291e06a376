"""Estimates similarities from two bits (a class) of each of a row's numbers, by look-up tables for the largest numbers of a probe.

Owns the choice of a probe's numbers, the value that a class stands for, and the measured error of the estimates. Never scans
(`scan_kernel.py`).

Method: a four-level quantiser (Max, 1960) after a random rotation. A number's class is its sign, and whether its size is large (an outer
number). A table is for a pair of numbers. A probe has tables for the pairs in which its numbers are largest: a half of the pairs has 84 % of
a normal vector's energy. So 32 tables of a probe of 128 numbers keep 87 % of the correlation, and 48 keep 92 %. Rows that pass are compared by
their high nibbles. Both steps have the same margin, which is measured on pairs so that both steps together lose at most the miss risk.
"""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from biodedup.gallery.files.codes import outer_bits, product, quantise, sign_bits
from biodedup.search.native.estimator import TableEstimator, mean_and_covariance
from biodedup.search.native.scan_kernel import ScanProbes
from biodedup.search.native.table_tile import ENTRIES, SUMS_PER_ROW, TableKind
from biodedup.search.native.tables import limits_of, products_at, rounding_variance, scales_of, tables_of
from biodedup.values import Float32

_PAIR = int(TableKind.CLASSES)


class ClassValues:
    """The values that the classes of a column's rows stand for. sample: float32 (n, D), unit rows, rotated by the codec. scanned: number of the D
    numbers that a search reads, a multiple of 8. levels: float32 (ENTRIES, 2), the values for each entry of a table. mean, covariance: of the
    rows' values, float32 (scanned,) and (scanned, scanned)."""

    def __init__(self, sample: Float32, scanned: int) -> None:
        self.sample, self.scanned, self.root = sample, scanned, np.float32(sqrt(scanned))
        outer, positive = self.bits(sample)
        size = np.abs(sample[:, :scanned]) * self.root / np.linalg.norm(sample[:, :scanned], axis=1, keepdims=True)
        low, high = size[~outer].mean(), size[outer].mean() if outer.any() else 1.5
        signs, outside = (np.array([[e >> s & 1, e >> s + 1 & 1] for e in range(ENTRIES)]) for s in (0, 2))
        self.levels = ((2 * signs - 1) * np.where(outside, high, low)).astype(np.float32)
        self.mean, self.covariance = mean_and_covariance(
            (np.where(positive, 1, -1) * np.where(outer, high, low)).astype(np.float32)
        )

    def bits(self, vectors: Float32) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """(outer bits, signs) of vectors, bool (n, scanned) each."""
        codes = quantise(vectors)[0]
        outer, positive = (
            np.unpackbits(bits(codes, self.scanned), axis=1, bitorder="little").view(np.bool_)
            for bits in (outer_bits, sign_bits)
        )
        return outer, positive


class Classes(TableEstimator):
    """The classes of a column's rows. tables: the number of a probe's tables."""

    def __init__(self, values: ClassValues, tables: int) -> None:
        self.tables, self.scanned, self.sample = min(tables, values.scanned // _PAIR), values.scanned, values.sample
        self.octets = 2 * values.scanned // 8
        self._values = values

    def _chosen(self, probes: Float32) -> tuple[NDArray[np.int32], Float32, Float32]:
        """(the number pairs of probes' tables, int32 (q, tables); their numbers, float32 (q, tables, 2); the scale of estimates, float32 (q,)). The
        pairs with the most energy are dealt out to the four sums in turn."""
        pairs = probes[:, : self.scanned].reshape(len(probes), -1, _PAIR)
        energy = np.einsum("qtb,qtb->qt", pairs, pairs)
        places = np.argsort(-energy, axis=1, kind="stable")[:, : self.tables]
        dealt = np.concatenate([np.arange(first, self.tables, SUMS_PER_ROW) for first in range(SUMS_PER_ROW)])
        places = places[:, dealt]
        numbers = np.take_along_axis(pairs, places[:, :, None], axis=1)
        scale = self._values.root * np.maximum(np.einsum("qtb,qtb->q", numbers, numbers), np.float32(1e-9))
        return np.asarray(places, np.int32), numbers, np.asarray(scale, np.float32)

    def estimates(self, probes: Float32, vectors: Float32) -> Float32:
        """The estimates of pairs, float32 (n,): the dot product of the probe's chosen numbers with the values of the row's classes, divided by the
        scale. probes, vectors: float32 (n, D)."""
        places, numbers, scale = self._chosen(probes)
        outer, positive = (bits.reshape(len(vectors), -1, _PAIR) for bits in self._values.bits(vectors))
        entries = positive[..., 0] + 2 * positive[..., 1] + 4 * outer[..., 0] + 8 * outer[..., 1]
        entries = np.take_along_axis(entries, places, axis=1)
        return np.asarray(products_at(numbers, self._values.levels, entries) / scale, np.float32)

    def unrelated(self, probes: Float32) -> tuple[Float32, Float32]:
        """Mean and standard deviation of the estimates of unrelated rows, float32 (q,) each."""
        places, numbers, scale = self._chosen(probes)
        chosen = np.zeros((len(probes), self.scanned // _PAIR, _PAIR), np.float32)
        np.put_along_axis(chosen, places[:, :, None], numbers, axis=1)
        flat = chosen.reshape(len(probes), -1)
        steps, _, padded = scales_of(numbers, self._values.levels)
        mean = np.asarray(product(flat, self._values.mean[:, None])[:, 0] / scale, np.float32)
        variance = np.einsum("ij,ij->i", product(flat, self._values.covariance), flat)
        return mean, np.sqrt(variance + rounding_variance(padded, steps)) / scale

    def tabled(self, untabled: ScanProbes, probes: Float32, cuts: Float32) -> ScanProbes:
        """The probes for the kernel, with tables. probes: rotated. cuts: the cut-offs of the estimates, float32 (q,)."""
        places, numbers, scale = self._chosen(probes)
        tables, steps, middles = tables_of(numbers, self._values.levels)
        padded = np.zeros(tables.shape[:2], np.int32)  # padding adds nothing
        padded[:, : self.tables] = places
        limits, used = limits_of(cuts * scale, steps, middles), np.array([self.scanned // _PAIR])
        return replace(untabled, tables=tables, places=padded, limits=limits, used=used, kind=TableKind.CLASSES)
