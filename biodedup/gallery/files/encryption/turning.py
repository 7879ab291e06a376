"""The secret orthogonal transform of stored embeddings (renewable templates, ISO/IEC 24745).

Owns its derivation from a secret. Never keeps a secret on the disk (keyring.py), and never touches a file.

Method: an embedding x is stored as R x. R is drawn uniformly from the orthogonal group: the Q of the QR decomposition of a normal matrix, with
the signs of R's diagonal (Mezzadri, "How to generate random matrices from the classical compact groups", 2007). The matrix is made from the
key stream of AES-256 in counter mode, so that no library's generator matters. Cosines stay. Each column of a gallery has a transform of its
own.
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


class Turn:
    """The transforms of a gallery. secret: 32 bytes."""

    def __init__(self, secret: bytes) -> None:
        self._key = Key(secret)
        self._columns: dict[str, ColumnTurn] = {}

    @property
    def turn_id(self) -> str:
        """16 hexadecimal digits that name the secret and tell nothing of it."""
        return self._key.key_id

    def of(self, column: str) -> ColumnTurn:
        """The transform of one column."""
        if column not in self._columns:
            self._columns[column] = ColumnTurn(self.turn_id, self._key.derived(f"turn {column}"))
        return self._columns[column]


class ColumnTurn:
    """The transform of one column, for vectors of any dimension."""

    def __init__(self, turn_id: str, secret: bytes) -> None:
        self.turn_id = turn_id
        self._key = Key(secret)
        self._matrices: dict[int, Float64] = {}

    @cached_property
    def seed(self) -> int:
        """For random choices that are stored beside turned vectors, and would tell of them if they were known."""
        return int.from_bytes(self._key.derived("seed"), "little")

    def matrix(self, dimension: int) -> Float64:
        """R, float64 (d, d). Raises InvalidInput for more than 1,024 numbers."""
        if dimension not in self._matrices:
            self._matrices[dimension] = _orthogonal(self._key.derived(f"matrix {dimension}"), dimension)
        return self._matrices[dimension]

    def turned(self, vectors: Float32) -> Float32:
        """float32 (n, d) -> R x of each row."""
        return np.asarray(vectors @ self.matrix(vectors.shape[1]).T, np.float32)

    def back(self, vectors: Float32) -> Float32:
        """The inverse of `turned`."""
        return np.asarray(vectors @ self.matrix(vectors.shape[1]), np.float32)


def turn_id_of(turn: ColumnTurn | Turn | None) -> str:
    """ "" where embeddings are not turned."""
    return "" if turn is None else turn.turn_id


def _orthogonal(secret: bytes, size: int) -> Float64:
    if size > _DIMENSION_MAX:
        raise InvalidInput(f"embeddings have {size} numbers; renewable templates have at most {_DIMENSION_MAX}")
    q, r = np.linalg.qr(_normal(secret, size * size).reshape(size, size))
    return np.asarray(q * np.where(np.diag(r) < 0, -1.0, 1.0))


def _normal(secret: bytes, count: int) -> Float64:
    """Normal numbers, by the method of Box and Muller (1958)."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import CTR

    half = -(-count // 2)
    stream = Cipher(AES(secret), CTR(bytes(16))).encryptor().update(bytes(16 * half))
    uniform = ((np.frombuffer(stream, "<u8") >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[:half])), 2 * np.pi * uniform[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
