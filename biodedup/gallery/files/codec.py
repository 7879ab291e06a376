"""Compresses a column's vectors to eight-bit codes, and states how exact an estimate from their high nibbles is.

Owns the rotation, its training, and the measurement of the error. Never reads files. Every segment stores the codec that wrote it, so
that segments with one codec are merged without encoding a vector again.

Method: random rotation before scalar quantisation, as in RaBitQ (Gao and Long, SIGMOD 2024). After a random rotation no number of a
vector stands out: one step size suits all of them, and the errors of many numbers add up to a normal error, whatever the model.
Special here: of a vector with many numbers only the principal axes are scanned, as many as make a search cheapest; the rotation is then
trained. No mean is subtracted: it is the first of the principal axes.
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
from biodedup.gallery.files.encryption.turning import ColumnTurn
from biodedup.values import Float32

SCAN_WHOLE = 128
"""Vectors of up to this many numbers are scanned with all of them: their rotation needs no training."""
TRAINING_ROWS_MIN, TRAINING_ROWS_MAX = 8_192, 32_768
LEVELS = tuple(round(0.1 * i, 1) for i in range(11))
"""Similarities at which the error is measured."""
_PAIRS, _LOWEST = 8_000, 64  # pairs at each of them, half to fit and half to check; of these, how many are remembered
_SEED = 20_261


@dataclass(frozen=True)
class ErrorLaw:
    """What the scan's estimate is for pairs of a given similarity.

    similarity, mean, sd: of one half of the pairs. checked, lowest: how many pairs the other half has, and the lowest of their
    estimates, as standard deviations from the mean that the first half gave them, ascending. source: `sample` of the column, or
    `isotropic` where there were too few vectors.
    """

    similarity: tuple[float, ...]
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    checked: int
    lowest: tuple[float, ...]
    source: str

    @cache  # noqa: B019 - a gallery has a handful of laws, and asks them with every search
    def margin(self, miss_risk: float) -> tuple[float, bool]:
        """(z, measured): a pair's estimate is more than z deviations too low with at most this probability.

        Measured: z is an order statistic of the pairs that were set aside, so that no law is assumed; with 95 % confidence
        (Clopper and Pearson, 1934) the probability is below the risk. Where they are too few to say so, z is the normal law's.
        """
        allowed = -1
        while allowed + 1 < len(self.lowest) and self.risk_bound(allowed + 1) <= miss_risk:
            allowed += 1
        if allowed < 0:
            return float(-ndtri(miss_risk)), False
        return -self.lowest[allowed], True

    def bound(self, miss_risk: float) -> float | None:
        """Below what the probability of a miss is, with the margin for this risk; None where that was not measured."""
        z, measured = self.margin(miss_risk)
        return self.risk_bound(sum(value < -z for value in self.lowest)) if measured else None

    def risk_bound(self, misses: int) -> float:
        """The upper end of the one-sided 95 % interval for the probability of a miss, of which so many were counted."""
        return float(upper_bound(misses, self.checked))

    def cut(self, similarity: Float32, z: float) -> Float32:
        """The estimate that all but a normal tail of z of the pairs at this similarity reach."""
        at = np.asarray(similarity, np.float64)
        mean = np.interp(at, self.similarity, self.mean) + self._outside(at)
        return (mean - z * np.interp(at, self.similarity, self.sd)).astype(np.float32)

    def similarity_at(self, cut: Float32, z: float) -> Float32:
        """The least similarity of which all but a normal tail of z reaches a cut; the inverse of `cut`."""
        grid = np.linspace(-1, 1, 2001, dtype=np.float32)
        reached = np.maximum.accumulate(self.cut(grid, z))
        found = np.interp(cut, reached, grid, left=-1, right=2)
        return np.asarray(found, np.float32)

    def share_reaching(self, cuts: Float32, mean: Float32, sd: Float32) -> NDArray[np.float64]:
        """The share of rows whose estimates reach cuts, (q,), if their similarities are normal with this mean and deviation."""
        middle = np.asarray(self.cut(mean, 0), np.float64)
        slope = np.asarray(self.cut(mean + sd, 0), np.float64) - middle
        error = np.interp(mean, self.similarity, self.sd)
        return np.asarray(ndtr((middle - cuts) / np.sqrt(slope**2 + error**2)), np.float64)

    def _outside(self, at: NDArray[np.float64]) -> NDArray[np.float64]:
        """Below the measured similarities the line goes on."""
        slope = (self.mean[1] - self.mean[0]) / (self.similarity[1] - self.similarity[0])
        return np.minimum(at - self.similarity[0], 0) * slope


def law_from_card(card: dict[str, Any]) -> ErrorLaw:
    """The law that `vars` wrote. Raises ValueError, TypeError or KeyError for one that was never measured."""
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
        raise ValueError("a law that was never measured")
    return ErrorLaw(similarity, mean, sd, card["checked"], lowest, card["source"])


@dataclass(frozen=True, eq=False)
class Codec:
    """rotation: float32 (D, d), columns orthonormal; scanned: how many of the D numbers the scan reads.

    In a gallery of renewable templates, a file holds the rotation S of turned vectors R x (encryption/turning.py). In memory, `rotation` is
    S R: it takes vectors as they are, so that a turn costs a search nothing.
    """

    rotation: Float32
    scanned: int
    law: ErrorLaw
    training_rows: int = 0
    """Vectors that the rotation was trained on; 0 where it is random."""
    turn: ColumnTurn | None = None
    of_turned: Float32 | None = None
    """S; None without a turn."""

    @cached_property
    def codec_id(self) -> str:
        return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(self.rotation, "<f4").tobytes() + b"%d" % self.scanned)

    @property
    def dimension(self) -> int:
        """Of the vectors."""
        return int(self.rotation.shape[1])

    @property
    def rest_bytes(self) -> int:
        """Bytes of a code that the scan does not read."""
        return int(self.rotation.shape[0]) - self.scanned // 2

    @property
    def provisional(self) -> bool:
        """There were too few vectors to train it."""
        return self.dimension > SCAN_WHOLE and not self.training_rows

    @property
    def stored_rotation(self) -> Float32:
        """What a file holds."""
        return self.rotation if self.of_turned is None else self.of_turned

    def card(self) -> dict[str, Any]:
        """The codec's entry in the `about` of a file, JSON-ready."""
        card: dict[str, Any] = {
            "id": self.codec_id,
            "scanned": self.scanned,
            "training_rows": self.training_rows,
            "law": vars(self.law),
        }
        return card if self.turn is None else card | {"turn": self.turn.turn_id}

    def in_the_clear(self) -> Codec:
        """The same codec for a file whose reader has no secret, such as an export."""
        return replace(self, turn=None, of_turned=None)

    @classmethod
    def from_card(cls, card: dict[str, Any], rotation: Float32, turn: ColumnTurn | None = None) -> Codec:
        measured = law_from_card(card["law"])
        scanned, counts = card["scanned"], (card["scanned"], card["training_rows"])
        if not (
            all(type(count) is int and count >= 0 for count in counts)
            and scanned % STEP == 0
            and STEP <= scanned <= len(rotation)
            and np.isfinite(rotation).all()
        ):
            raise ValueError("a codec that was never made")
        codec = cls(np.array(rotation), scanned, measured, card["training_rows"])
        return codec if turn is None else _turned(codec, turn)

    def rotate(self, vectors: Float32) -> Float32:
        """float32 (n, D): what the codes stand for; lengths and similarities stay."""
        return np.asarray(vectors @ self.rotation.T, np.float32)

    def rotate_probes(self, probes: Float32) -> Float32:
        """As `rotate`, for a few probes before a scan, without BLAS."""
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
"""Of pairs, float32 (n, d) each -> float32 (n,)."""


def make_codec(dimension: int, samples: Sequence[Float32], turn: ColumnTurn | None = None) -> Codec:
    """A codec for vectors of this dimension; samples: unit rows of the column, float32 (n, d), any number of them; turn: of the gallery's
    stored vectors."""
    vectors = np.concatenate([np.zeros((0, dimension), np.float32), *samples])[:TRAINING_ROWS_MAX]
    if turn is None:
        return _made(dimension, vectors, _SEED)
    # of a trained rotation the random part is secret, too: principal axes are nearly the same in every gallery, so that they undo a turn
    return _turned(_made(dimension, turn.turned(vectors), turn.seed), turn)


def _turned(codec: Codec, turn: ColumnTurn) -> Codec:
    """A codec of turned vectors, for vectors as they are."""
    rotation = np.asarray(codec.rotation @ turn.matrix(codec.dimension), np.float32)
    return replace(codec, rotation=rotation, turn=turn, of_turned=codec.rotation)


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
    trained, measured = vectors[::2], vectors[1::2]  # what axes say of the vectors that they were made of flatters them
    _, axes = np.linalg.eigh(trained.T.astype(np.float64) @ trained)
    principal = np.zeros((padded, dimension))
    principal[:dimension] = axes.T[::-1]
    options = []
    for scanned in [*range(64, padded, 32), padded]:
        turn = np.zeros((padded, padded))  # within the scanned axes, and within the others
        turn[:scanned, :scanned] = _random_rotation(scanned, rng)
        if scanned < padded:
            turn[scanned:, scanned:] = _random_rotation(padded - scanned, rng)
        rotation = (turn @ principal).astype(np.float32)
        law = _law(rotation, scanned, measured, source, rng, pairs=500)
        options.append((_cost(law, rotation, scanned, measured), scanned, rotation))
    _, scanned, rotation = min(options, key=lambda option: option[:2])
    return Codec(rotation, scanned, _law(rotation, scanned, measured, source, rng), len(trained))


def _random_rotation(size: int, rng: np.random.Generator) -> Float32:
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    return np.asarray(q * np.sign(np.diag(r)), np.float32)


_REFERENCE, _NEAREST, _KEPT = 0.5, 1e-5, 0.999
"""The search whose cost decides: all but a thousandth of the mates at this similarity; and this share of all rows, the nearest
impostors, where these are less alike than that, as they are in many dimensions."""
_RESCORING = 200_000  # what the exact comparison of one row costs, in scanned numbers, to an order of magnitude


def _cost(law: ErrorLaw, rotation: Float32, scanned: int, vectors: Float32) -> float:
    """Of a search, a row of the gallery: numbers scanned, and exact comparisons of the non-mates that survive."""
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
    """Measures an estimate on pairs at given similarities: one vector of a sample, and itself mixed with another one.

    vectors: unit rows float32 (m, d).
    """
    return measured_laws((estimate,), vectors, source, rng, pairs)[0]


def measured_laws(
    several: Sequence[Estimate], vectors: Float32, source: str, rng: np.random.Generator, pairs: int = _PAIRS
) -> tuple[ErrorLaw, ...]:
    """Of several estimates that a pair has to pass one after another: their margins are the same, and lose so many pairs in all."""
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
        if len(mates) < 4:  # vectors of one number, or all the same
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


assert BLOCK_ROWS * STEP == 512  # 64 rows of 8 numbers, half a byte each: 256 bytes, four registers
