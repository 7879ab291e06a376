"""Finds artefacts that make the embeddings of different people's faces similar: noise, regular patterns, coarse compression, covered
features, and negatives.

Owns the measures and their limits. Never detects, aligns or embeds a face.

A measure alone refuses a face only at values that no real face reaches. At lower values the face's `quality` counts as well, because it
predicts whether the face matches its mate: the face is refused if its quality is below a limit that rises with the measure. All limits were
tuned on the even-numbered identities of LFW and on all of MEDS, ORL and Yale, damaged in 40 ways (`benchmarks/face_gate.py`), 2026-11.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import fft

from biodedup.values import Float32

ALWAYS = 1.0
"""A quality limit that no face reaches."""
DOUBTFUL, SUSPECT, STRIKING = 0.91, 0.96, 0.98
"""Quality limits for a face with weak, strong and very strong signs of an artefact."""

_NOISE_MASK = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
_NOISE, _NOISE_STRONG, _CHROMA_NOISE = 0.10, 0.35, 8.0
_PATTERN, _PATTERN_STRONG = 0.50, 0.65
_PATTERN_PX = (3, 22)
"""Period of a pattern in the aligned face, whose eyes are 35 pixels apart."""
_BLOCKS, _BLOCKS_COARSE = 3.0, 4.5
"""Faces of LFW, MEDS, ORL and Yale have at most 2.6. JPEGs of quality 5 have 2.8 to 5, of quality 2 at least 5."""
_MOUTH_FLAT, _MOUTH_PLAIN, _EYES_FLAT = 0.05, 0.09, 0.10
_EYES_BLACK, _EYES_DARK = 0.36, 0.50
"""Of 626 faces of LFW (even-numbered identities), MEDS, ORL and Yale without dark glasses, one face is below 0.4 and five are below 0.5, all
with a quality of 0.97 or more. Of faces with black glasses nine in ten are below 0.4, of faces with dark grey glasses a half (2026-11)."""
_MOUTH = slice(80, 104), slice(36, 77)
_EYES = (slice(44, 60), slice(28, 49)), (slice(44, 60), slice(64, 85))
_CHEEKS = (slice(68, 80), slice(26, 46)), (slice(68, 80), slice(66, 86))
_INNER = slice(16, -8), slice(16, -16)
"""The part of the aligned face without its surroundings."""
NEGATIVE_MARGIN_MIN = 0.02
"""The detector's confidence in a face minus its confidence in the negative: at least 0.04 in LFW, MEDS, ORL and Yale, below 0 for negatives."""


class Sign(NamedTuple):
    """A sign of an artefact. limit: the limit that `measured` passed. quality_min: a face of lower quality is refused for this sign."""

    reason: str
    detail: str
    measured: float
    limit: float
    quality_min: float


def signs(image: NDArray[np.uint8], blocks: float) -> Iterator[Sign]:
    """The signs of artefacts in an aligned face, the most certain first. image: uint8 (112, 112, 3) RGB. blocks: the `block_ratio`."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    contrast = max(float(grey[_INNER].std()), 8.0)
    mouth, eyes = details(grey, contrast)
    if mouth < _MOUTH_PLAIN:
        limit, quality_min = (_MOUTH_FLAT, ALWAYS) if mouth < _MOUTH_FLAT else (_MOUTH_PLAIN, DOUBTFUL)
        yield Sign("occluded", "detail around the mouth over contrast", mouth, limit, quality_min)
    if eyes < _EYES_FLAT:
        yield Sign("occluded", "detail around the eyes over contrast", eyes, _EYES_FLAT, ALWAYS)
    light = eyes_light(grey)
    if light < _EYES_DARK:
        limit, quality_min = (_EYES_BLACK, ALWAYS) if light < _EYES_BLACK else (_EYES_DARK, SUSPECT)
        yield Sign("occluded", "light of the eyes over that of the cheeks", light, limit, quality_min)
    noise = noise_level(grey[_INNER]) / contrast
    if noise >= _NOISE:
        limit, quality_min = (_NOISE_STRONG, SUSPECT) if noise >= _NOISE_STRONG else (_NOISE, DOUBTFUL)
        yield Sign("noisy", "noise over contrast", noise, limit, quality_min)
    inner = image[_INNER].astype(np.float32)
    chroma = noise_level(inner[..., 0] - inner[..., 1])
    if chroma >= _CHROMA_NOISE:
        yield Sign("noisy", "noise of colour, in grey levels", chroma, _CHROMA_NOISE, SUSPECT)
    regular = regularity(grey)
    if regular >= _PATTERN:
        limit, quality_min = (_PATTERN_STRONG, STRIKING) if regular >= _PATTERN_STRONG else (_PATTERN, SUSPECT)
        yield Sign("pattern", "rise of the autocorrelation at the pattern's period", regular, limit, quality_min)
    if blocks >= _BLOCKS:
        limit, quality_min = (_BLOCKS_COARSE, ALWAYS) if blocks >= _BLOCKS_COARSE else (_BLOCKS, SUSPECT)
        yield Sign("low_quality", "steps between blocks of 8 pixels over those within", blocks, limit, quality_min)


def noise_level(grey: Float32) -> float:
    """The standard deviation of noise, in grey levels (Immerkær, "Fast noise variance estimation", 1996)."""
    edges = cv2.filter2D(grey, cv2.CV_32F, _NOISE_MASK)[1:-1, 1:-1]
    return float(np.abs(edges).mean() * np.sqrt(np.pi / 2) / 6)


def details(grey: Float32, contrast: float) -> tuple[float, float]:
    """The mean deviation from the blurred face, divided by the face's contrast: around the mouth, and around the eye with the larger value."""
    fine = np.abs(grey - cv2.GaussianBlur(grey, (0, 0), 3.0))
    return float(fine[_MOUTH].mean()) / contrast, max(float(fine[eye].mean()) for eye in _EYES) / contrast


def eyes_light(grey: Float32) -> float:
    """The grey level of the light parts around an eye (lids, white), divided by that of the cheek below it; the larger value of both eyes. It
    is low behind dark glasses, but not on dark skin or in a face with one side in shadow."""
    pairs = zip(_EYES, _CHEEKS, strict=True)
    return max(float(np.percentile(grey[eye], 80)) / max(float(np.median(grey[cheek])), 1.0) for eye, cheek in pairs)


def regularity(grey: Float32) -> float:
    """The strength of a regular pattern, 0 to 2: the greatest rise of the face's autocorrelation to a local maximum, from the value at half
    its lag. The local mean and the local contrast are removed first."""
    fine = grey - cv2.GaussianBlur(grey, (0, 0), 3.0)
    level = fine / np.sqrt(cv2.GaussianBlur(fine * fine, (0, 0), 6.0) + 4)
    correlation = _correlated(np.asarray(level * _WINDOW, np.float32)) * _UNBIASED
    correlation /= max(float(correlation[_SIDE, _SIDE]), 1e-6)
    y, x = np.nonzero((correlation == cv2.dilate(correlation, np.ones((3, 3)))) & _LAGS)
    at_half = correlation[_SIDE + np.round((y - _SIDE) / 2).astype(int), _SIDE + np.round((x - _SIDE) / 2).astype(int)]
    return float((correlation[y, x] - at_half).max(initial=0.0))


def block_ratio(grey: NDArray[np.uint8]) -> float:
    """The mean step of grey levels at the edges of 8-pixel blocks divided by the mean step elsewhere (geometric mean of both axes). The edges
    are those with the largest steps."""
    ratios = []
    for axis in (0, 1):
        steps = np.abs(np.diff(grey.astype(np.int16), axis=axis)).mean(axis=1 - axis)
        if len(steps) < 16:
            return 1.0
        steps = steps[: len(steps) // 8 * 8].reshape(-1, 8).mean(axis=0)
        edge = float(steps.max())
        ratios.append((edge + 0.25) / ((float(steps.sum()) - edge) / 7 + 0.25))
    return float(np.sqrt(ratios[0] * ratios[1]))


def _correlated(values: Float32) -> Float32:
    """The autocorrelation for lags below `_SIDE` on both axes, with lag 0 in the middle. The transform is padded by more than these lags, so
    that the correlation is not circular."""
    size = (len(values) + 2 * _SIDE,) * 2
    spectrum = fft.rfft2(values, size)
    whole = fft.fftshift(fft.irfft2(spectrum.real**2 + spectrum.imag**2, size))
    reach = slice(size[0] // 2 - _SIDE, size[0] // 2 + _SIDE)
    return np.asarray(whole[reach, reach], np.float32)


_SIDE = 24
_WINDOW = np.outer(np.hanning(112), np.hanning(112)).astype(np.float32)
_UNBIASED = _correlated(_WINDOW)
_UNBIASED = np.asarray(_UNBIASED.max() / np.maximum(_UNBIASED, 0.1 * _UNBIASED.max()), np.float32)
_LAG = np.hypot(*np.mgrid[-_SIDE:_SIDE, -_SIDE:_SIDE])
_LAGS = (_LAG >= _PATTERN_PX[0]) & (_LAG <= _PATTERN_PX[1])
