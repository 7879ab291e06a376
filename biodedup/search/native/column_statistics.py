"""Measures statistics of a column's rows on a sample: the similarity of unrelated rows to a probe, and the error of estimates.

Owns these statistics, from which cut-offs follow before a scan. Never scans. A column never changes, so that each is measured once.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainccinv, ndtr  # a millisecond faster than scipy.stats

from biodedup.gallery.files.codes import BLOCK_ROWS, dequantise, product
from biodedup.gallery.segments.part import Column
from biodedup.search.native.classes import Classes, ClassValues
from biodedup.search.native.estimator import mean_and_covariance
from biodedup.search.native.signs import Signs
from biodedup.values import Float32

_SAMPLE_ROWS = 16_384  # rows of a column that stand for its non-mates
_PAIR_ROWS = 4_096  # rows of the sample from which pairs are made


@dataclass(frozen=True)
class Population:
    """The mean, float32 (D,), and covariance, float32 (D, D), of a sample of rows, rotated by the column's codec. sample: float32 (n, D), a part
    of these rows."""

    mean: Float32
    covariance: Float32
    sample: Float32

    def similarity(self, probes: Float32) -> tuple[Float32, Float32]:
        """Mean and standard deviation of the similarity to the column's rows, float32 (q,) each. probes: float32 (q, n), the first n numbers of the
        rotated probes."""
        size = probes.shape[1]
        variance = np.einsum("ij,ij->i", product(probes, self.covariance[:size, :size]), probes)
        return product(probes, self.mean[:size, None])[:, 0], np.sqrt(np.maximum(variance, 1e-12))

    def reached_by(self, probes: Float32, share: float, standard_errors: float = 4.0) -> Float32:
        """The similarity that a little more than this share of the rows reaches, float32 (q,).

        It follows from the distribution of random directions on a sphere. Its tail is a little lighter than that of a normal distribution: at a
        share of 1e-6 and 128 numbers, half as many rows reach a cut-off. If the real tail is heavier, more rows than necessary are compared.
        standard_errors: this many standard errors of the sample are subtracted.
        """
        mean, sd = self.similarity(probes)
        dimension = max(
            float(1 / np.sort(sd)[len(sd) // 2]) ** 2, 3.0
        )  # dimension in which random directions have this deviation
        z = float(np.sqrt(dimension * betainccinv(0.5, (dimension - 1) / 2, min(2 * share, 1.0))))
        z -= standard_errors * float(np.sqrt((1 + z * z / 2) / _SAMPLE_ROWS))
        return mean + sd * np.float32(z)

    def share_reaching(self, cuts: Float32, probes: Float32) -> float:
        """The share of rows that reach the cut-off, of the probe with the largest share."""
        mean, sd = self.similarity(probes)
        return float(ndtr(-((cuts - mean) / sd).min()))


_populations: WeakKeyDictionary[Column, Population] = WeakKeyDictionary()  # a column never changes


def _cells(column: Column) -> NDArray[np.int64]:
    """The cells of a sample of the column."""
    starts = np.unique(np.linspace(0, column.count - 1, _SAMPLE_ROWS // BLOCK_ROWS).astype(np.int64) // BLOCK_ROWS)
    cells = (starts[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).reshape(-1)
    return cells[cells < column.count]


def population_of(column: Column) -> Population:
    """The statistics of a column's rows."""
    if column not in _populations:
        sample = dequantise(*column.codes_at(_cells(column)))
        _populations[column] = Population(*mean_and_covariance(sample), sample[:_PAIR_ROWS])
    return _populations[column]


def pair_sample_of(column: Column) -> Float32:
    """`Population.sample`, without the mean and covariance, which take longer."""
    if column in _populations:
        return _populations[column].sample
    return dequantise(*column.codes_at(_cells(column)[:_PAIR_ROWS]))


_signs: WeakKeyDictionary[Column, dict[float, Signs]] = WeakKeyDictionary()
_values: WeakKeyDictionary[Column, ClassValues] = WeakKeyDictionary()
_classes: WeakKeyDictionary[Column, dict[int, Classes]] = WeakKeyDictionary()


def signs_of(column: Column, share: float = 1.0) -> Signs:
    """The estimator by signs of a column's rows. share: of the signs that it reads, the leading ones."""
    assert column.codec is not None, "only rotated vectors have signs"
    known = _signs.setdefault(column, {})
    if share not in known:
        known[share] = Signs(pair_sample_of(column), column.codec.scanned, share)
    return known[share]


def classes_of(column: Column, tables: int) -> Classes:
    """The estimator by classes of a column's rows. tables: the number of a probe's tables."""
    assert column.codec is not None, "only rotated vectors have classes"
    known = _classes.setdefault(column, {})
    if column not in _values:
        _values[column] = ClassValues(population_of(column).sample, column.codec.scanned)
    if tables not in known:
        known[tables] = Classes(_values[column], tables)
    return known[tables]
