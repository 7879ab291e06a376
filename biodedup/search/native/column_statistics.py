"""Statistics of a column's rows, measured on a sample: how similar unrelated rows are to a probe, and how well signs
estimate.

Owns the distribution of similarities to unrelated rows, from which cut-offs follow before a scan, and the signs'
measured error. A column never changes, so each is measured once.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainccinv, ndtr  # scipy.stats takes a millisecond to say the same

from biodedup.gallery.files.codes import BLOCK_ROWS, dequantise, product
from biodedup.gallery.segments.part import Column
from biodedup.search.native.classes import Classes, ClassValues
from biodedup.search.native.estimator import mean_and_covariance
from biodedup.search.native.signs import Signs
from biodedup.values import Float32

_SAMPLE_ROWS = 16_384  # of a column, which stand for its non-mates
_LAW_ROWS = 4_096  # of the sample, from which pairs are made


@dataclass(frozen=True)
class Population:
    """The mean, float32 (D,), and covariance, float32 (D, D), of a sample of rows, as the column's codec rotates
    them."""

    mean: Float32
    covariance: Float32
    sample: Float32

    def similarity(self, probes: Float32) -> tuple[Float32, Float32]:
        """Mean and standard deviation of similarity to the column's rows, float32 (q,) each. probes: float32 (q, n),
        rotated, the first n numbers only."""
        size = probes.shape[1]
        variance = np.einsum("ij,ij->i", product(probes, self.covariance[:size, :size]), probes)
        return product(probes, self.mean[:size, None])[:, 0], np.sqrt(np.maximum(variance, 1e-12))

    def reached_by(self, probes: Float32, share: float, standard_errors: float = 4.0) -> Float32:
        """The similarity that a little more than this share of the rows reaches, float32 (q,).

        By the distribution of random directions on a sphere, whose tail is a little lighter than the normal one: at a
        share of 1e-6 and 128 numbers half as many rows reach a cut-off. If the real tail is heavier, more rows are
        compared than necessary. standard_errors: of the sample, that are taken off.
        """
        mean, sd = self.similarity(probes)
        dimension = max(float(1 / np.median(sd)) ** 2, 3.0)  # in which random directions would deviate as much
        z = float(np.sqrt(dimension * betainccinv(0.5, (dimension - 1) / 2, min(2 * share, 1.0))))
        z -= standard_errors * float(np.sqrt((1 + z * z / 2) / _SAMPLE_ROWS))
        return mean + sd * np.float32(z)

    def share_reaching(self, cuts: Float32, probes: Float32) -> float:
        """The largest share of rows that reaches a probe's cut-off."""
        mean, sd = self.similarity(probes)
        return float(ndtr(-((cuts - mean) / sd).min()))


_populations: WeakKeyDictionary[Column, Population] = WeakKeyDictionary()  # a column never changes


def _cells(column: Column) -> NDArray[np.int64]:
    """The cells of a sample."""
    starts = np.unique(np.linspace(0, column.count - 1, _SAMPLE_ROWS // BLOCK_ROWS).astype(np.int64) // BLOCK_ROWS)
    cells = (starts[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).reshape(-1)
    return cells[cells < column.count]


def population_of(column: Column) -> Population:
    if column not in _populations:
        sample = dequantise(*column.codes_at(_cells(column)))
        _populations[column] = Population(*mean_and_covariance(sample), sample[:_LAW_ROWS])
    return _populations[column]


def law_sample_of(column: Column) -> Float32:
    """`Population.sample`, without the moments of all the sample, which take longer."""
    if column in _populations:
        return _populations[column].sample
    return dequantise(*column.codes_at(_cells(column)[:_LAW_ROWS]))


_signs: WeakKeyDictionary[Column, Signs] = WeakKeyDictionary()
_values: WeakKeyDictionary[Column, ClassValues] = WeakKeyDictionary()
_classes: WeakKeyDictionary[Column, dict[int, Classes]] = WeakKeyDictionary()


def signs_of(column: Column) -> Signs:
    assert column.codec is not None, "only rotated vectors have signs"
    if column not in _signs:
        _signs[column] = Signs(law_sample_of(column), column.codec.scanned)
    return _signs[column]


def classes_of(column: Column, tables: int) -> Classes:
    """The classes of a column's rows, for probes with so many tables."""
    assert column.codec is not None, "only rotated vectors have classes"
    known = _classes.setdefault(column, {})
    if column not in _values:
        _values[column] = ClassValues(population_of(column).sample, column.codec.scanned)
    if tables not in known:
        known[tables] = Classes(_values[column], tables)
    return known[tables]
