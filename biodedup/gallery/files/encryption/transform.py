"""The secret orthogonal transform of stored embeddings (renewable templates, ISO/IEC 24745).

Owns its derivation from a secret. Never stores a secret (keyring.py does), and never reads or writes a file.

Method: an embedding x is stored as R x, where R is an orthogonal matrix, so that cosines do not change. R is uniform on the orthogonal
group: the Q factor of the QR decomposition of a Gaussian matrix, with the signs of the other factor's diagonal (Mezzadri, "How to generate
random matrices from the classical compact groups", 2007). The Gaussian matrix comes from the key stream of AES-256 in counter mode, so that
R does not depend on the random generator of a library. Each column of a gallery has its own transform.

Files and keys on the disk use the word `turn` for a transform (FORMAT.md).
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from biodedup.errors import InvalidInput
from biodedup.gallery.files.encryption.keyring import Key
from biodedup.values import Float32

_DIMENSION_MAX = 1_024
Float64 = NDArray[np.float64]


class Transform:
    """The transforms of a gallery. secret: 32 bytes."""

    def __init__(self, secret: bytes) -> None:
        self._key = Key(secret)
        self._columns: dict[str, ColumnTransform] = {}

    @property
    def transform_id(self) -> str:
        """16 hexadecimal digits that identify the secret without revealing it."""
        return self._key.key_id

    def of(self, column: str) -> ColumnTransform:
        """The transform of one column."""
        if column not in self._columns:
            self._columns[column] = ColumnTransform(self.transform_id, self._key.derived(f"turn {column}"))
        return self._columns[column]


class ColumnTransform:
    """The transform of one column, for vectors of any dimension."""

    def __init__(self, transform_id: str, secret: bytes) -> None:
        self.transform_id = transform_id
        self._key = Key(secret)
        self._matrices: dict[int, Float64] = {}

    @cached_property
    def seed(self) -> int:
        """The seed of random matrices that are stored beside transformed vectors. With a public seed they would reveal the vectors."""
        return int.from_bytes(self._key.derived("seed"), "little")

    def matrix(self, dimension: int) -> Float64:
        """R, float64 (d, d). Raises InvalidInput for a dimension above 1,024."""
        if dimension not in self._matrices:
            self._matrices[dimension] = _orthogonal(self._key.derived(f"matrix {dimension}"), dimension)
        return self._matrices[dimension]

    def apply(self, vectors: Float32) -> Float32:
        """float32 (n, d) -> R x of each row."""
        return np.asarray(vectors @ self.matrix(vectors.shape[1]).T, np.float32)

    def invert(self, vectors: Float32) -> Float32:
        """The inverse of `apply`."""
        return np.asarray(vectors @ self.matrix(vectors.shape[1]), np.float32)


def transform_id_of(transform: ColumnTransform | Transform | None) -> str:
    """The id of a transform; "" for None: embeddings are stored without a transform."""
    return "" if transform is None else transform.transform_id


def _orthogonal(secret: bytes, size: int) -> Float64:
    if size > _DIMENSION_MAX:
        raise InvalidInput(f"embeddings have dimension {size}; renewable templates have at most {_DIMENSION_MAX}")
    q, r = np.linalg.qr(_normal(secret, size * size).reshape(size, size))
    return np.asarray(q * np.where(np.diag(r) < 0, -1.0, 1.0))


def _normal(secret: bytes, count: int) -> Float64:
    """Standard normal numbers, by the Box-Muller method (1958)."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import CTR

    half = -(-count // 2)
    stream = Cipher(AES(secret), CTR(bytes(16))).encryptor().update(bytes(16 * half))
    uniform = ((np.frombuffer(stream, "<u8") >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[:half])), 2 * np.pi * uniform[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
