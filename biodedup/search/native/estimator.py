"""Base class of estimators of similarity by look-up tables over a row's signs or classes.

Owns the measured error distributions of the estimates, and the share of unrelated rows above a cut-off. Never scans (`scan_kernel.py`).

The two steps of a scan, tables and high nibbles, have the same margin. It is measured on pairs so that both steps together lose at most the
miss risk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import numpy as np
from scipy.special import ndtr

from biodedup.gallery.files.codec import ErrorLaw, measured_laws
from biodedup.gallery.files.codes import quantise
from biodedup.search.native.scan_kernel import ScanProbes
from biodedup.values import Float32

_QUICK_PAIRS, _SEED = 500, 2_003


def by_nibbles(scanned: int) -> Callable[[Float32, Float32], Float32]:
    """A function for the similarity of pairs by the row's high nibbles: (probes, rows), float32 (n, D) each -> float32 (n,)."""

    def estimates(probes: Float32, vectors: Float32) -> Float32:
        codes, norms = quantise(vectors)
        seen = (codes[:, :scanned] >> 4).astype(np.float32) * 16 - 120
        return np.asarray(np.einsum("ij,ij->i", probes[:, :scanned], seen) / norms, np.float32)

    return estimates


def mean_and_covariance(rows: Float32) -> tuple[Float32, Float32]:
    """The mean, (D,), and the covariance, (D, D), of rows, float32 (n, D). Ten times as fast as `np.cov`, because it computes in float32."""
    mean = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    apart = rows - mean
    return mean, np.asarray(apart.T @ apart / np.float32(max(len(rows) - 1, 1)), np.float32)


class TableEstimator(ABC):
    """An estimator by look-up tables. tables: number of a probe's tables. octets: bytes of a row that the tables read. scanned: number of the D
    numbers that a search reads, a multiple of 8. sample: float32 (n, D), unit rows, rotated by the codec."""

    tables: int
    octets: int
    scanned: int
    sample: Float32

    @abstractmethod
    def estimates(self, probes: Float32, vectors: Float32) -> Float32:
        """The kernel's estimates of pairs, float32 (n, D) each -> float32 (n,)."""

    @abstractmethod
    def unrelated(self, probes: Float32) -> tuple[Float32, Float32]:
        """Mean and standard deviation of the estimates of unrelated rows, float32 (q,) each."""

    @abstractmethod
    def tabled(self, untabled: ScanProbes, probes: Float32, cuts: Float32) -> ScanProbes:
        """The probes for the kernel, with tables. probes: rotated. cuts: the cut-offs of the estimates by tables, float32 (q,)."""

    @cached_property
    def error_distributions(self) -> tuple[ErrorLaw, ErrorLaw]:
        """(error distribution of the estimates by tables, of those by high nibbles), for pairs that neither step may lose."""
        rng = np.random.default_rng(_SEED)
        tables, nibbles = measured_laws((self.estimates, by_nibbles(self.scanned)), self.sample, "sample", rng)
        return tables, nibbles

    @cached_property
    def quick_error_distribution(self) -> ErrorLaw:
        """An approximate error distribution from few pairs, to predict costs."""
        rng = np.random.default_rng(_SEED)
        return measured_laws((self.estimates,), self.sample, "sample", rng, _QUICK_PAIRS)[0]

    def share_passing(self, cuts: Float32, probes: Float32) -> float:
        """The share of unrelated rows that reach the cut-offs, averaged over the probes. cuts: float32 (q,). probes: rotated."""
        mean, sd = self.unrelated(probes)
        return float(ndtr((mean - cuts) / sd).mean())
