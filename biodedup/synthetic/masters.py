"""Generates master fingerprints: a direction field with singular points, and ridges along it.

Owns the constant properties of a finger. Never simulates a capture (`impressions.py`).

Directions follow the zero-pole model (Sherlock and Monro, "A model for interpreting fingerprint topology", 1993), with harmonics in the angle
around each singular point (after Vizcaya and Gerhardt, 1996). An arch, which has no singular points, is a bump in the directions. Ridges grow
from noise that is filtered by oriented Gabor filters until ridges cover it (Cappelli, Maio and Maltoni, "Synthetic fingerprint-image
generation", 2000). The shares of the classes are those of Wilson, Candela and Watson, 1993.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from biodedup.capture.fingers.oriented import RIDGE_DPI, OrientedFilter
from biodedup.values import Float32

Pattern = Literal["arch", "tented arch", "left loop", "right loop", "whorl"]
PATTERNS: dict[Pattern, float] = {
    "arch": 0.037,
    "tented arch": 0.029,
    "left loop": 0.338,
    "right loop": 0.317,
    "whorl": 0.279,
}

SIDE_PX = 330
"""24 mm at RIDGE_DPI: the whole first phalanx."""
TIP_PX = 145.2
"""Height of the ridges above the core: 11 mm at RIDGE_DPI."""
_TO_500 = 500 / RIDGE_DPI
_BEND_Y = -25.0
"""Position of an arch's bump, in pixels at 500 dpi above the core."""
_CORE_BEND, _DELTA_BEND = 0.08, 0.12  # radians, of the first harmonic


@dataclass(frozen=True, eq=False)
class Master:
    """A finger, upright. ridges: int8 (SIDE_PX, SIDE_PX) at RIDGE_DPI, 127 on a ridge and -127 in a valley. core: x, y of the upper core; of an
    arch, a point a little above its steepest ridges."""

    ridges: NDArray[np.int8] = field(repr=False)
    core: tuple[float, float]
    pattern: Pattern


def draw_master(rng: np.random.Generator, pattern: Pattern | None = None, tip_px: float = TIP_PX) -> Master:
    """A random finger. pattern: None draws a class by its natural share. tip_px: height of the ridges above the core, at RIDGE_DPI."""
    if pattern is None:
        shares = np.array(list(PATTERNS.values()))
        pattern = list(PATTERNS)[rng.choice(len(shares), p=shares / shares.sum())]
    core = SIDE_PX / 2 + rng.normal(0, 4), tip_px + rng.normal(0, 4)
    y, x = np.mgrid[0:SIDE_PX, 0:SIDE_PX].astype(np.float32)
    right, up = (x - core[0]) * _TO_500, (core[1] - y) * _TO_500  # 500-dpi pixels from the core
    direction = np.asarray(-_direction(rng, pattern, right, up), np.float32)  # y down
    period = float(np.clip(rng.normal(9.1, 0.95), 7.2, 11.6)) / _TO_500
    wider_below = 0.10 * np.clip(-up / 150, -1, 1) * rng.uniform(0.3, 1.2)
    periods = np.asarray((period * (1 + 0.05 * waves(rng, 5, SIDE_PX) + wider_below)).clip(4.5, 8.8), np.float32)
    return Master(_grown(rng, direction, periods), core, pattern)


def waves(rng: np.random.Generator, knots: int, side: int) -> Float32:
    """Smooth noise of unit variance at knots x knots points, float32 (side, side)."""
    noise = rng.standard_normal((knots, knots), np.float32)
    return np.asarray(cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC), np.float32)


def _direction(rng: np.random.Generator, pattern: Pattern, right: Float32, up: Float32) -> Float32:
    """Ridge directions, radians anticlockwise from right, up to multiples of pi."""

    def around(x: float, y: float, bend: float, steeper: float = 0.0) -> Float32:
        """The angle from a singular point to each pixel, with harmonics. steeper: additional slope of the ridges beside it, in radians."""
        angle = np.arctan2(up - y, right - x)
        bent = angle - steeper * np.cos(angle)
        for k in (1, 2, 3):
            bent += rng.normal(0, bend / k) * np.sin(k * angle) + rng.normal(0, bend / k) * (np.cos(k * angle) - 1)
        return np.asarray(bent, np.float32)

    def core(x: float, y: float, steeper: float = 0.0) -> Float32:
        return around(x, y, _CORE_BEND, steeper)

    def delta(x: float, y: float) -> Float32:
        return around(x, y, _DELTA_BEND)

    def upper_core() -> Float32:
        return core(0, 0, steeper=rng.normal(0.4, 0.18))

    if pattern == "arch":
        # steepest at one height, flatter above, and nearly as steep below
        steepest, width, skew = rng.uniform(0.5, 2.0), rng.uniform(50, 120), rng.normal(0, 0.15)
        upwards, downwards = rng.uniform(60, 150), rng.uniform(70, 260)
        reach = np.where(up > _BEND_Y, np.float32(upwards), np.float32(downwards))
        aside = right / np.where(right > 0, np.float32(width * np.exp(skew)), np.float32(width / np.exp(skew)))
        bump = np.exp((1 - aside**2 - ((up - _BEND_Y) / reach) ** 2) / 2)
        slope = -steepest * aside * bump
        field = np.arctan(slope)
    elif pattern == "tented arch":
        field = (upper_core() - delta(rng.normal(0, 8), -rng.uniform(45, 110))) / 2
    elif pattern == "whorl":
        height = rng.gamma(2.2, 16) + 6  # two cores; at a large distance they form a double loop
        cores = upper_core() + core(rng.normal(0, 0.35) * height, -height)
        right_delta = delta(rng.uniform(60, 160), -height / 2 - rng.uniform(70, 200))
        left_delta = delta(-rng.uniform(60, 160), -height / 2 - rng.uniform(70, 200))
        field = (cores - right_delta - left_delta) / 2
    else:
        side = 1 if pattern == "left loop" else -1
        field = (upper_core() - delta(side * rng.uniform(40, 140), -rng.uniform(80, 220))) / 2
    # above the core, ridges follow the round fingertip and descend at its sides
    above = 1 / (1 + np.exp(-(up + 20) / 40))
    field = field - above * np.arctan(right / rng.uniform(140, 260)) * rng.uniform(0.5, 1.0)
    return np.asarray(field + waves(rng, 4, SIDE_PX) * rng.uniform(0.03, 0.11), np.float32)


def _grown(rng: np.random.Generator, direction: Float32, period: Float32) -> NDArray[np.int8]:
    """Grows ridges from noise everywhere (many minutiae) or from scattered seeds (fewer minutiae)."""
    if rng.random() < 0.5:
        image = np.zeros((SIDE_PX, SIDE_PX), np.float32)
        at = rng.integers(0, SIDE_PX, (2, rng.integers(60, 900)))
        image[at[0], at[1]] = 1
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), 1.0) * 6, np.float32)
        passes = 26  # enough for the ridges of distant seeds to meet
    else:
        image = rng.standard_normal((SIDE_PX, SIDE_PX), np.float32) * np.float32(0.5)
        passes = int(rng.integers(7, 14))
    grow = OrientedFilter(direction, period)
    for _ in range(passes):
        image = np.clip(grow(image) * 3, -1, 1)
    return np.asarray(np.rint(image * 127), np.int8)
