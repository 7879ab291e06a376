"""Computes the ridge map of a print: its ridges, enhanced to even contrast without noise.

Owns the enhancement. Never decides whether a capture is good enough.

The method is contextual filtering in two passes. The first filter uses the picture's directions and a typical period. The second filter uses
directions and periods of the first map, which has less noise. Directions come from the structure tensor (Kass and Witkin, 1987; Bazen and
Gerez, 2002). The period of a wave with energy e and gradient energy g is 2 pi sqrt(e / g).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from biodedup.capture.fingers.oriented import OrientedFilter
from biodedup.values import Float32

PERIOD_PX = 6.0
"""Typical ridge period at RIDGE_DPI; 9 pixels at 500 dpi."""

_DERIVATIVE = np.array([[1, -8, 0, 8, -1]], np.float32) / 12
_COARSE = 4  # smooth fields are computed on a grid that is coarser by this factor
_MIRRORED_PX = 12


@dataclass(frozen=True, eq=False)
class RidgeMap:
    """Arrays (h, w) at RIDGE_DPI.

    ridges: float32, from 1 on a ridge (dark in the capture) to -1 in a valley. direction: float32, of the ridges, 0 to pi radians, x right
    and y down. period: float32, in pixels. inside: uint8, 1 where there are ridges. flat: float32, the picture with even contrast, dark is
    positive. coherence, filtered_coherence: float32, 0 to 1, of the directions in the picture and in the first map.
    """

    ridges: Float32 = field(repr=False)
    direction: Float32 = field(repr=False)
    period: Float32 = field(repr=False)
    inside: NDArray[np.uint8] = field(repr=False)
    flat: Float32 = field(repr=False)
    coherence: Float32 = field(repr=False)
    filtered_coherence: Float32 = field(repr=False)


def ridge_map(grey: NDArray[np.uint8]) -> RidgeMap:
    """The ridge map of a picture. Every value is finite; `inside` may be empty. grey: uint8 (h, w) at RIDGE_DPI, ridges dark."""
    edge = _MIRRORED_PX  # the picture is mirrored at its edge, so that ridges there keep their direction
    grey = np.asarray(cv2.copyMakeBorder(grey, edge, edge, edge, edge, cv2.BORDER_REFLECT_101), np.uint8)
    fine = cv2.GaussianBlur(grey.astype(np.float32), (0, 0), 0.8)
    flat = np.asarray(cv2.GaussianBlur(grey.astype(np.float32), (0, 0), 5.0) - fine, np.float32)
    power = _smooth(flat * flat, 7.0)
    strong = float(np.percentile(power[::_COARSE, ::_COARSE], 90))
    flat = np.clip(flat / np.sqrt(power + np.float32(0.02 * strong + 4)), -2.5, 2.5)

    direction, coherence, _ = directions(flat, 6.0)
    inside = _cleaned((power > 0.06 * strong + 6) & (coherence > 0.12))
    first = OrientedFilter(direction, np.full_like(flat, PERIOD_PX), inside)(flat)

    direction, filtered_coherence, frequency = directions(first, 4.0)
    period = np.clip(2 * np.pi / frequency, 4.6, 8.4)
    second = OrientedFilter(direction, period, inside)((flat + np.clip(2 * first, -1, 1)) / 2)

    inside = _cleaned((_smooth(first * first, 6.0) > 0.035) & (inside > 0))
    ridges = np.tanh(1.2 * second / np.sqrt(_smooth(second * second, 5.0) + np.float32(0.01))) * inside
    within = np.s_[edge:-edge, edge:-edge]
    maps = (ridges, direction, period, inside, flat, coherence, filtered_coherence)
    return RidgeMap(*(np.ascontiguousarray(a[within]) for a in maps))


def _smooth(values: Float32, sigma: float) -> Float32:
    """Gaussian blur on the coarse grid. float32 (h, w) in and out."""
    height, width = values.shape
    coarse = cv2.resize(values, _coarse_size(values), interpolation=cv2.INTER_AREA)
    blurred = cv2.GaussianBlur(coarse, (0, 0), sigma / _COARSE)
    return np.asarray(cv2.resize(blurred, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)


def _coarse_size(values: Float32) -> tuple[int, int]:
    return -(-values.shape[1] // _COARSE), -(-values.shape[0] // _COARSE)


def directions(image: Float32, sigma: float) -> tuple[Float32, Float32, Float32]:
    """(direction, coherence 0 to 1, frequency in radians per pixel) of the waves in an image."""
    height, width = image.shape
    dx = np.asarray(cv2.filter2D(image, -1, _DERIVATIVE), np.float32)
    dy = np.asarray(cv2.filter2D(image, -1, _DERIVATIVE.T.copy()), np.float32)
    xx, yy = dx * dx, dy * dy
    moments = cv2.resize(
        cv2.merge([xx - yy, dx * dy, xx + yy, image * image]), _coarse_size(image), interpolation=cv2.INTER_AREA
    )
    moments = np.asarray(cv2.GaussianBlur(moments, (0, 0), sigma / _COARSE), np.float32)
    gradient = moments[..., 2] + np.float32(1e-6)
    cosine, sine = (
        -moments[..., 0] / gradient,
        -2 * moments[..., 1] / gradient,
    )  # ridges are perpendicular to the gradient
    frequency = np.sqrt(gradient / (moments[..., 3] + np.float32(1e-6)))
    cosine, sine, coherence, frequency = (
        cv2.resize(field, (width, height), interpolation=cv2.INTER_LINEAR)
        for field in (cosine, sine, np.hypot(cosine, sine), frequency)
    )
    return (
        np.asarray(cv2.phase(cosine, sine) / 2, np.float32),
        np.asarray(coherence, np.float32),
        np.asarray(frequency, np.float32),
    )


def _cleaned(inside: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The mask without specks and holes, uint8 (h, w). Regions smaller than two fifths of the largest region are dropped."""
    height, width = inside.shape
    half = (-(-width // 2), -(-height // 2))
    region = cv2.resize(inside.astype(np.uint8), half, interpolation=cv2.INTER_NEAREST)
    small, large = (cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)) for side in (5, 9))
    region = cv2.morphologyEx(region, cv2.MORPH_OPEN, small)
    margin = 10
    region = cv2.copyMakeBorder(region, margin, margin, margin, margin, cv2.BORDER_CONSTANT)
    region = cv2.morphologyEx(cv2.morphologyEx(region, cv2.MORPH_CLOSE, large), cv2.MORPH_OPEN, large)
    region = np.asarray(region[margin:-margin, margin:-margin], np.uint8)
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(region)
    areas = statistics[:, cv2.CC_STAT_AREA].astype(np.float64)
    areas[0] = 0
    region = ((areas > 0.4 * areas.max()) & (areas > 0))[labels].astype(np.uint8)
    return np.asarray(cv2.resize(region, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8)
