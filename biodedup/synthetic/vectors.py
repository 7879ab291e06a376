"""Generates synthetic embeddings: a population of unit vectors, and mates at given cosines.

The same seed gives the same vectors.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from biodedup.values import Float32

DIMENSION = 128


def population(count: int, seed: int = 0) -> Float32:
    """Unit rows, float32 (count, 128). Their pairwise cosines have the standard deviation of real faces, 0.092.

    Isotropic vectors of 128 numbers would have 1/sqrt(128) = 0.088. A slowly falling spectrum gives the difference.
    """
    spectrum = np.linspace(1.25, 0.75, DIMENSION)
    vectors = np.random.default_rng(seed).standard_normal((count, DIMENSION), np.float32) * spectrum.astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def mates_of(vectors: Float32, cosines: NDArray[np.float64], seed: int = 1) -> Float32:
    """A second embedding of each row at the given cosine, in a random direction. float32 (n, d)."""
    noise = np.random.default_rng(seed).standard_normal(vectors.shape)
    noise -= np.sum(noise * vectors, axis=1, keepdims=True) * vectors
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    mates = cosines[:, None] * vectors + np.sqrt(1 - cosines**2)[:, None] * noise
    return mates.astype(np.float32)
