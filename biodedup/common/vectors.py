"""Cosines of unit vectors, the same to the last bit whatever else is compared.

Owns nothing. Never uses BLAS, whose last bits depend on the number of vectors in a call.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


def dot_products(vectors: Float32, probes: Float32, which: NDArray[np.int64]) -> Float32:
    """float32 (n, q), of each vector with the q vectors of its probe. vectors: float32 (n, d); probes: float32 (p, q, d); which: int64 (n,),
    the number of each vector's probe."""
    products = np.zeros((len(vectors), probes.shape[1]), np.float32)
    for number, out in enumerate(products.T):
        of_probes = probes[:, number]
        each = np.broadcast_to(of_probes[0], vectors.shape) if len(of_probes) == 1 else of_probes[which]
        np.einsum("nd,nd->n", vectors, each, out=out)
    return products
