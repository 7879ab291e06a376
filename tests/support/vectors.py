"""A synthetic population: random unit vectors, and second embeddings at an exact cosine."""

from __future__ import annotations

import numpy as np

from biodedup.embed.cards import load_card

DIMENSION = 128


SFACE = load_card("sface").model_id


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def people(count: int, seed: int = 0, dimension: int = DIMENSION) -> np.ndarray:
    """float32 (count, dimension): one random unit vector a person."""
    return unit(np.random.default_rng(seed).standard_normal((count, dimension)))


def again(vectors: np.ndarray, cosine: float, seed: int = 1) -> np.ndarray:
    """A second embedding of each person, at exactly this cosine to the first."""
    noise = np.random.default_rng(seed).standard_normal(vectors.shape)
    noise -= np.sum(noise * vectors, axis=-1, keepdims=True) * vectors
    return unit(cosine * vectors + np.sqrt(1 - cosine**2) * unit(noise))


def between(a: np.ndarray, b: np.ndarray, cosine: float = 0.5) -> np.ndarray:
    """A unit vector at this cosine to both of two orthogonal ones."""
    b = b - (b @ a) * a
    b /= np.linalg.norm(b)
    noise = again(a, 0.0, seed=7)
    noise -= (noise @ a) * a + (noise @ b) * b
    noise /= np.linalg.norm(noise)
    return (cosine * (a + b) + np.sqrt(1 - 2 * cosine**2) * noise).astype(np.float32)


def orthogonal(count: int) -> np.ndarray:
    return np.eye(128, dtype=np.float32)[:count]
