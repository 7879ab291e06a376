"""Compresses embeddings to eight-bit codes, and measures the error of similarities that are estimated from the high nibbles of the codes.

Owns the rotation, its training, and the measurement of the error. Never reads files. Each segment stores its codec, so that segments with
the same codec are merged without encoding again.

Method: random rotation before scalar quantisation, as in RaBitQ (Gao and Long, SIGMOD 2024). After a random rotation all components of a
vector have a similar size. So one step size suits all components, and the error of an estimate is approximately normal, for any model.

Differences from RaBitQ: for long vectors, a scan reads only the first principal axes, as many as make the search cheapest, and the rotation
is trained (principal component analysis). No mean is subtracted: the first principal axis covers it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import sqrt
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from biodedup.common.intervals import upper_bound
from biodedup.gallery.files.codes import BLOCK_ROWS, STEP, Codes, dequantise, product, quantise
from biodedup.gallery.files.encryption.transform import ColumnTransform
from biodedup.values import Float32

SCAN_WHOLE = 128
"""Up to this dimension a scan reads all components, and the rotation needs no training."""
TRAINING_ROWS_MIN, TRAINING_ROWS_MAX = 8_192, 32_768
LEVELS = tuple(round(0.1 * i, 1) for i in range(11))
"""The similarities at which the error is measured."""
_PAIRS, _LOWEST = (
    8_000,
    64,
)  # pairs at each similarity, half to fit and half to check; the number of lowest errors that are stored
_SEED = 20_261


@dataclass(frozen=True)
class ErrorLaw:
    """The distribution of the scan's estimate for pairs of a given similarity.

    similarity, mean, sd: mean and standard deviation of the estimates at each similarity, from one half of the pairs; checked: the number
    of pairs in the other half; lowest: the lowest estimates of the other half, in standard deviations from that mean, ascending; source:
    `sample` if the pairs are from the column, `isotropic` if the column had too few vectors.
    """

    similarity: tuple[float, ...]
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    checked: int
    lowest: tuple[float, ...]
    source: str

    @cache  # noqa: B019 - a gallery has few laws, and every search asks them
    def margin(self, miss_risk: float) -> tuple[float, bool]:
        """(z, measured): with at most the probability `miss_risk`, an estimate is more than z standard deviations below the mean.

        Measured: z is an order statistic of the held-out pairs, without an assumption about the distribution; the probability is below
        the risk with 95 % confidence (Clopper and Pearson, 1934). If there are too few pairs for this, z is that of the normal
        distribution.
        """
        allowed = -1
        while allowed + 1 < len(self.lowest) and self.risk_bound(allowed + 1) <= miss_risk:
            allowed += 1
        if allowed < 0:
            return float(-ndtri(miss_risk)), False
        return -self.lowest[allowed], True

    def bound(self, miss_risk: float) -> float | None:
        """An upper bound of the probability of a miss, with the margin for this risk; None if it was not measured."""
        z, measured = self.margin(miss_risk)
        return self.risk_bound(sum(value < -z for value in self.lowest)) if measured else None

    def risk_bound(self, misses: int) -> float:
        """The upper end of the one-sided 95 % interval for the probability of a miss. misses: how many were counted."""
        return float(upper_bound(misses, self.checked))

    def cut(self, similarity: Float32, z: float) -> Float32:
        """The cut-off for estimates: the mean estimate at this similarity, minus z standard deviations."""
        at = np.asarray(similarity, np.float64)
        mean = np.interp(at, self.similarity, self.mean) + self._outside(at)
        return (mean - z * np.interp(at, self.similarity, self.sd)).astype(np.float32)

    def similarity_at(self, cut: Float32, z: float) -> Float32:
        """The inverse of `cut`: the least similarity whose cut-off reaches this value."""
        grid = np.linspace(-1, 1, 2001, dtype=np.float32)
        reached = np.maximum.accumulate(self.cut(grid, z))
        found = np.interp(cut, reached, grid, left=-1, right=2)
        return np.asarray(found, np.float32)

    def share_reaching(self, cuts: Float32, mean: Float32, sd: Float32) -> NDArray[np.float64]:
        """The share of rows whose estimates reach the cut-offs, (q,), if the similarities are normal with this mean and standard
        deviation."""
        middle = np.asarray(self.cut(mean, 0), np.float64)
        slope = np.asarray(self.cut(mean + sd, 0), np.float64) - middle
        error = np.interp(mean, self.similarity, self.sd)
        return np.asarray(ndtr((middle - cuts) / np.sqrt(slope**2 + error**2)), np.float64)

    def _outside(self, at: NDArray[np.float64]) -> NDArray[np.float64]:
        """Linear extrapolation below the measured similarities."""
        slope = (self.mean[1] - self.mean[0]) / (self.similarity[1] - self.similarity[0])
        return np.minimum(at - self.similarity[0], 0) * slope


def law_from_card(card: dict[str, Any]) -> ErrorLaw:
    """The law from its `vars`. Raises ValueError, TypeError or KeyError for invalid values."""
    similarity, mean, sd, lowest = (tuple(card[name]) for name in ("similarity", "mean", "sd", "lowest"))
    numbers = np.array([*similarity, *mean, *sd, *lowest], np.float64)
    if not (
        type(card["checked"]) is int
        and len(lowest) <= card["checked"]
        and len(similarity) == len(mean) == len(sd) >= 2
        and np.diff(similarity).min() > 0
        and min(sd) > 0
        and np.isfinite(numbers).all()
    ):
        raise ValueError("the values of an error law are invalid")
    return ErrorLaw(similarity, mean, sd, card["checked"], lowest, card["source"])


@dataclass(frozen=True, eq=False)
class Codec:
    """Encodes the vectors of a column. rotation: float32 (D, d), orthonormal columns; scanned: the number of components that a scan reads.

    In a gallery of renewable templates, a file holds the rotation S of transformed vectors R x (encryption/transform.py). In memory,
    `rotation` is the product S R, which takes plain vectors, so that the transform adds no cost to a search.
    """

    rotation: Float32
    scanned: int
    law: ErrorLaw
    training_rows: int = 0
    """The number of vectors that the rotation was trained on; 0 for a random rotation."""
    transform: ColumnTransform | None = None
    of_transformed: Float32 | None = None
    """S, the rotation of transformed vectors; None without a transform."""

    @cached_property
    def codec_id(self) -> str:
        return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(self.rotation, "<f4").tobytes() + b"%d" % self.scanned)

    @property
    def dimension(self) -> int:
        """The dimension of the vectors, d."""
        return int(self.rotation.shape[1])

    @property
    def rest_bytes(self) -> int:
        """The number of bytes of a code that a scan does not read."""
        return int(self.rotation.shape[0]) - self.scanned // 2

    @property
    def provisional(self) -> bool:
        """Whether the rotation should be trained, but there were too few vectors."""
        return self.dimension > SCAN_WHOLE and not self.training_rows

    @property
    def stored_rotation(self) -> Float32:
        """The rotation that files hold: S with a transform, else `rotation`."""
        return self.rotation if self.of_transformed is None else self.of_transformed

    def card(self) -> dict[str, Any]:
        """The codec's entry in the `about` of a file, for JSON."""
        card: dict[str, Any] = {
            "id": self.codec_id,
            "scanned": self.scanned,
            "training_rows": self.training_rows,
            "law": vars(self.law),
        }
        return card if self.transform is None else card | {"turn": self.transform.transform_id}

    def in_the_clear(self) -> Codec:
        """The same codec without the transform, for a file whose reader has no secret, such as an export."""
        return replace(self, transform=None, of_transformed=None)

    @classmethod
    def from_card(cls, card: dict[str, Any], rotation: Float32, transform: ColumnTransform | None = None) -> Codec:
        measured = law_from_card(card["law"])
        scanned, counts = card["scanned"], (card["scanned"], card["training_rows"])
        if not (
            all(type(count) is int and count >= 0 for count in counts)
            and scanned % STEP == 0
            and STEP <= scanned <= len(rotation)
            and np.isfinite(rotation).all()
        ):
            raise ValueError("the values of a codec are invalid")
        codec = cls(np.array(rotation), scanned, measured, card["training_rows"])
        return codec if transform is None else _for_plain_vectors(codec, transform)

    def rotate(self, vectors: Float32) -> Float32:
        """float32 (n, D): the vectors that are quantised. Lengths and similarities do not change."""
        return np.asarray(vectors @ self.rotation.T, np.float32)

    def rotate_probes(self, probes: Float32) -> Float32:
        """As `rotate`, without BLAS, for the few probes of a search."""
        return product(probes, self._axes)

    @cached_property
    def _axes(self) -> Float32:
        return np.ascontiguousarray(self.rotation.T)

    def encode(self, vectors: Float32) -> tuple[Codes, Float32]:
        """Unit rows float32 (n, d) -> codes uint8 (n, D), norms float32 (n,)."""
        return quantise(self.rotate(vectors))

    def decode(self, codes: Codes, norms: Float32) -> Float32:
        """float32 (n, d), unit rows."""
        return np.asarray(dequantise(codes, norms) @ self.rotation, np.float32)


Estimate = Callable[[Float32, Float32], Float32]
"""Estimates the similarities of pairs: float32 (n, d), float32 (n, d) -> float32 (n,)."""


def make_codec(dimension: int, samples: Sequence[Float32], transform: ColumnTransform | None = None) -> Codec:
    """A codec for vectors of this dimension. samples: unit rows of the column, float32 (n, d), any number of them; transform: of the stored
    vectors."""
    vectors = np.concatenate([np.zeros((0, dimension), np.float32), *samples])[:TRAINING_ROWS_MAX]
    if transform is None:
        return _made(dimension, vectors, _SEED)
    # The random part of a trained rotation is secret as well: galleries have similar principal axes, which would reveal the transform.
    return _for_plain_vectors(_made(dimension, transform.apply(vectors), transform.seed), transform)


def _for_plain_vectors(codec: Codec, transform: ColumnTransform) -> Codec:
    """The codec for plain vectors, from a codec for transformed vectors."""
    rotation = np.asarray(codec.rotation @ transform.matrix(codec.dimension), np.float32)
    return replace(codec, rotation=rotation, transform=transform, of_transformed=codec.rotation)


def _made(dimension: int, vectors: Float32, seed: int) -> Codec:
    rng = np.random.default_rng(seed)
    measured, source = vectors, "sample"
    if len(vectors) < 1_000:
        measured = rng.standard_normal((4_096, dimension), np.float32)
        measured /= np.linalg.norm(measured, axis=1, keepdims=True)
        source = "isotropic"
    padded = -(-dimension // STEP) * STEP
    if dimension <= SCAN_WHOLE or len(vectors) < TRAINING_ROWS_MIN:
        rotation = _random_rotation(padded, rng)[:, :dimension]
        return Codec(rotation, padded, _law(rotation, padded, measured, source, rng))
    trained, measured = vectors[::2], vectors[1::2]  # the error on the training vectors would be too small
    _, axes = np.linalg.eigh(trained.T.astype(np.float64) @ trained)
    principal = np.zeros((padded, dimension))
    principal[:dimension] = axes.T[::-1]
    options = []
    for scanned in [*range(64, padded, 32), padded]:
        mixing = np.zeros((padded, padded))  # rotates the scanned axes among themselves, and the other axes
        mixing[:scanned, :scanned] = _random_rotation(scanned, rng)
        if scanned < padded:
            mixing[scanned:, scanned:] = _random_rotation(padded - scanned, rng)
        rotation = (mixing @ principal).astype(np.float32)
        law = _law(rotation, scanned, measured, source, rng, pairs=500)
        options.append((_cost(law, rotation, scanned, measured), scanned, rotation))
    _, scanned, rotation = min(options, key=lambda option: option[:2])
    return Codec(rotation, scanned, _law(rotation, scanned, measured, source, rng), len(trained))


def _random_rotation(size: int, rng: np.random.Generator) -> Float32:
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    return np.asarray(q * np.sign(np.diag(r)), np.float32)


_REFERENCE, _NEAREST, _KEPT = 0.5, 1e-5, 0.999
"""The search whose cost is minimised keeps 99.9 % of the mates at this similarity. If the nearest impostors (this share of all rows) are
less similar than that, their similarity is used instead."""
_RESCORING = 200_000  # the cost of an exact comparison of one row, in scanned components, by order of magnitude


def _cost(law: ErrorLaw, rotation: Float32, scanned: int, vectors: Float32) -> float:
    """The cost of a search for each row of the gallery: scanned components, and exact comparisons of non-mates that pass the cut-off."""
    half = len(vectors[:2_000]) // 2
    one, other = vectors[:half], vectors[half : 2 * half]
    similarity = one @ other.T
    reached = min(_REFERENCE, float(similarity.mean() + ndtri(1 - _NEAREST) * similarity.std()))
    cut = float(law.cut(np.array([reached], np.float32), float(ndtri(_KEPT)))[0])
    others = (one @ rotation[:scanned].T) @ (other @ rotation[:scanned].T).T
    return scanned + _RESCORING * float(ndtr((others.mean() - cut) / max(others.std(), 1e-6)))


def _law(
    rotation: Float32, scanned: int, vectors: Float32, source: str, rng: np.random.Generator, pairs: int = _PAIRS
) -> ErrorLaw:
    return measured_law(lambda one, other: estimates(rotation, scanned, one, other), vectors, source, rng, pairs)


def measured_law(
    estimate: Estimate, vectors: Float32, source: str, rng: np.random.Generator, pairs: int = _PAIRS
) -> ErrorLaw:
    """Measures an estimate on pairs of given similarities. A pair is a vector of the sample, and the same vector mixed with another one.

    vectors: unit rows float32 (m, d).
    """
    return measured_laws((estimate,), vectors, source, rng, pairs)[0]


def measured_laws(
    several: Sequence[Estimate], vectors: Float32, source: str, rng: np.random.Generator, pairs: int = _PAIRS
) -> tuple[ErrorLaw, ...]:
    """Measures several estimates that a pair must pass one after another. They share one margin, whose risk is that of all of them
    together."""
    means = [[0.0] * len(LEVELS) for _ in several]
    sds = [[0.0] * len(LEVELS) for _ in several]
    residuals = []
    for at, level in enumerate(LEVELS):
        which = rng.integers(0, len(vectors), (2, pairs))
        one, other = vectors[which[0]].astype(np.float64), vectors[which[1]].astype(np.float64)
        other = other - np.einsum("ij,ij->i", one, other)[:, None] * one
        length = np.linalg.norm(other, axis=1)
        one, other = one[length > 1e-3], other[length > 1e-3] / length[length > 1e-3, None]
        mates = (level * one + sqrt(max(1 - level**2, 0)) * other).astype(np.float32)
        if len(mates) < 4:  # vectors of dimension one, or all the same
            mates = one = np.repeat(vectors[:1].astype(np.float64), 4, axis=0)
        off = level - np.einsum("ij,ij->i", one, mates)
        lowest = np.full(len(mates) // 2, np.inf)
        for estimate, mean, sd in zip(several, means, sds, strict=True):
            errors = estimate(one.astype(np.float32), mates) + off
            mean[at] = round(float(errors[::2].mean()), 5)
            sd[at] = round(float(max(errors[::2].std(), 1e-4)), 5)
            lowest = np.minimum(lowest, (errors[1::2] - mean[at]) / sd[at])
        residuals.append(lowest)
    together = np.sort(np.concatenate(residuals))
    lowest_of_all = tuple(round(float(value), 3) for value in together[:_LOWEST])
    return tuple(
        ErrorLaw(LEVELS, tuple(mean), tuple(sd), len(together), lowest_of_all, source)
        for mean, sd in zip(means, sds, strict=True)
    )


def estimates(rotation: Float32, scanned: int, probes: Float32, vectors: Float32) -> Float32:
    """The scan's estimate of the similarity of pairs: probes and vectors float32 (n, d), unit rows -> float32 (n,)."""
    codes, norms = quantise(np.asarray(vectors @ rotation.T, np.float32))
    seen = (codes[:, :scanned] >> 4).astype(np.float32) * 16 - 120
    rotated = np.asarray(probes @ rotation[:scanned].T, np.float32)
    return np.asarray(np.einsum("ij,ij->i", rotated, seen) / norms, np.float32)


assert BLOCK_ROWS * STEP == 512  # 64 rows of 8 components, half a byte each: 256 bytes, four registers of 512 bits
