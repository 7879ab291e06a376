"""Renders a master fingerprint as a scanner would capture it: rotated, shifted, distorted, cropped, scratched and noisy.

Owns the variation between captures of a finger. Never changes the finger (`masters.py`).

The steps follow Cappelli, Maio and Maltoni, "Synthetic fingerprint-image generation", 2000, and "Synthetic fingerprint-database
generation", 2002. Their strengths were chosen so that pictures and minutiae vary as much as those of FVC2002 and UareU (2026-11).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import cos, exp, pi, sin

import cv2
import numpy as np
from numpy.typing import NDArray

from biodedup.capture.fingers.oriented import RIDGE_DPI
from biodedup.synthetic.masters import TIP_PX, Master, waves
from biodedup.values import Float32

SIDE_MM = 21.9
_PAPER, _INK = 200.0, 150.0


@dataclass(frozen=True, eq=False)
class Impression:
    """A synthetic capture. image: uint8 (side, side), ridges dark. core: x, y of the master's core in pixels, perhaps outside the image. angle:
    the rotation of the finger in radians, clockwise. at: float32 (2, side, side), the position in the master (x, y) that each pixel shows.
    touched: float32 (side, side), about 1 where the finger touches the scanner and 0 elsewhere."""

    image: NDArray[np.uint8] = field(repr=False)
    core: tuple[float, float]
    angle: float
    at: Float32 = field(repr=False)
    touched: Float32 = field(repr=False)


def draw_impression(rng: np.random.Generator, master: Master, dpi: float = 500.0) -> Impression:
    """A capture of a finger, SIDE_MM wide and high."""
    side = round(SIDE_MM / 25.4 * dpi)
    grain = dpi / RIDGE_DPI  # lengths in pixels below are at RIDGE_DPI
    badness = rng.beta(1.3, 2.5)
    angle = float(np.radians(rng.normal(0, 12) if rng.random() < 0.7 else rng.uniform(-45, 45)))

    # the contact area, in pixels right of and below the core; sometimes it shows a tip or a joint
    width, height = rng.uniform(70, 112), rng.uniform(80, 135)
    reach = 1.5 if rng.random() < 0.2 else 1.0
    touch_x = float(np.clip(rng.normal(0, 25 * reach), -75, 75))
    touch_y = float(np.clip(rng.normal(2, 34 * reach), -100, 95))
    if (longer := master.core[1] - TIP_PX) > 20:  # some prints of a long tip show nothing else
        touch_y -= rng.uniform(0, 1) * longer
    shift_x, shift_y = rng.normal(0, 5, 2).tolist()
    core_x = side / grain / 2 + shift_x - (cos(angle) * touch_x - sin(angle) * touch_y)
    core_y = side / grain / 2 + shift_y - (sin(angle) * touch_x + cos(angle) * touch_y)

    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / np.float32(grain)
    stretch = exp(rng.normal(0, 0.02))
    right = (cos(angle) * (x - core_x) + sin(angle) * (y - core_y)) / stretch
    below = (cos(angle) * (y - core_y) - sin(angle) * (x - core_x)) / stretch
    drag = rng.uniform(0.8, 4.0)
    at_x = right + master.core[0] + waves(rng, int(rng.integers(3, 6)), side) * drag
    at_y = below + master.core[1] + waves(rng, int(rng.integers(3, 6)), side) * drag
    ridges = cv2.remap(
        master.ridges.astype(np.float32) / 127,
        at_x.astype(np.float32),
        at_y.astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT_101,
    )
    ink = _inked(rng, np.asarray(ridges, np.float32), badness, grain)
    _marked(rng, ink, badness, grain)
    roundness = rng.uniform(2, 3.2)
    away = np.abs((right - touch_x) / width) ** roundness + np.abs((below - touch_y) / height) ** roundness
    away += waves(rng, 7, side) * 0.12
    bare = 1 + np.exp(np.clip((away - 1) * rng.uniform(12, 40), -50, 50))
    ink /= bare
    at, touched = np.stack([at_x, at_y]).astype(np.float32), np.asarray(1 / bare, np.float32)
    return Impression(_scanned(rng, ink, badness, grain), (core_x * grain, core_y * grain), angle, at, touched)


def _noise(rng: np.random.Generator, side: int, sigma: float) -> Float32:
    """Blurred noise of unit variance, float32 (side, side)."""
    noise = cv2.GaussianBlur(rng.standard_normal((side, side), np.float32), (0, 0), sigma)
    return np.asarray(noise, np.float32) * np.float32(2 * pi**0.5 * sigma)


def _inked(rng: np.random.Generator, ridges: Float32, badness: float, grain: float) -> Float32:
    """The darkness of each point, 0 to 1. With light pressure ridges are thin and broken; with strong pressure valleys fill."""
    side = len(ridges)
    pressure = waves(rng, 5, side) * (0.15 + 0.35 * badness) + rng.normal(0, 0.22)
    ink = 1 / (1 + np.exp(-rng.uniform(2, 6) * (ridges - pressure)))
    dryness = rng.uniform(0, 1.3) * badness + waves(rng, 5, side) * 0.5 * badness
    ink /= 1 + np.exp(-4 * (_noise(rng, side, 1.2 * grain) * 0.94 + 1.6 - 1.6 * dryness))
    if rng.random() < 0.7:
        smudges = _noise(rng, side, 3 * grain) * 0.94 > 2.3 - 1.2 * badness
        ink = np.maximum(ink, smudges * rng.uniform(0.3, 1))
    return np.asarray(ink, np.float32)


def _marked(rng: np.random.Generator, ink: Float32, badness: float, grain: float) -> None:
    """Adds scratches, creases and blots, in place."""
    side = len(ink)

    def line(colour: float, length: float, angle: float, thickness: float) -> None:
        x, y = rng.uniform(0.14 * side, 0.86 * side, 2)
        bend = rng.normal(0, 0.08, 2) * length
        t = np.linspace(-0.5, 0.5, 9)
        along = np.stack([cos(angle) * t, sin(angle) * t], 1) * length * grain
        across = np.stack([-sin(angle) * np.ones(9), cos(angle) * np.ones(9)], 1)
        sway = (bend[0] * (4 * t**2) + bend[1] * t)[:, None] * grain
        points = np.rint((np.array([x, y]) + along + across * sway) * 8).astype(np.int32)
        cv2.polylines(ink, [points], False, colour, max(1, round(thickness * grain)), cv2.LINE_AA, 3)

    for _ in range(rng.poisson(1.5 + 3 * badness)):
        line(0.0 if rng.random() < 0.85 else 0.8, rng.uniform(20, 130), rng.uniform(0, pi), rng.uniform(0.7, 3))
    if rng.random() < 0.3:  # skin folds, some in groups, run across the finger
        tilt = rng.normal(0, 0.25)
        for _ in range(rng.poisson(3) + 1):
            line(0.0, rng.uniform(30, 160), tilt + rng.normal(0, 0.12), rng.uniform(1, 4))
    for _ in range(rng.poisson(0.4 + 1.2 * badness)):
        x, y = rng.uniform(0.14 * side, 0.86 * side, 2)
        axes = (round(rng.uniform(3, 16) * grain), round(rng.uniform(3, 16) * grain))
        cv2.ellipse(ink, (round(x), round(y)), axes, rng.uniform(0, 180), 0, 360, rng.uniform(0, 1), -1)


def _scanned(rng: np.random.Generator, ink: Float32, badness: float, grain: float) -> NDArray[np.uint8]:
    """The picture with the scanner's contrast, illumination, blur, noise and window, uint8 (side, side)."""
    side = len(ink)
    paper = _PAPER + waves(rng, 4, side) * rng.uniform(2, 12)
    picture = paper - _INK * rng.uniform(0.35, 1) * ink
    picture = np.asarray(cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.4, 1.0) * grain), np.float32)
    picture += rng.standard_normal((side, side), np.float32) * np.float32(rng.uniform(2, 10 + 25 * badness))
    if rng.random() < 0.15:  # the noise of a line sensor differs between rows
        picture += rng.standard_normal((side, 1), np.float32) * np.float32(rng.uniform(1, 8))
    if rng.random() < 0.5:
        _framed(rng, picture, grain)
    return np.asarray(np.clip(picture, 0, 255), np.uint8)


def _framed(rng: np.random.Generator, picture: Float32, grain: float) -> None:
    """Crops to a window smaller than the finger, sometimes with a border, in place."""
    side = len(picture)
    width, height = rng.uniform(150, 280) * grain, rng.uniform(165, 290) * grain
    left, top = (side - width) / 2 + rng.normal(0, 8) * grain, (side - height) / 2 + rng.normal(0, 8) * grain
    rows = slice(max(0, round(top)), min(side, round(top + height)))
    columns = slice(max(0, round(left)), min(side, round(left + width)))
    inside = picture[rows, columns].copy()
    picture[:] = rng.choice([_PAPER, _PAPER, 255.0, 128.0, 0.0])
    picture[rows, columns] = inside
    if rng.random() < 0.25:
        corners = (columns.start, rows.start), (columns.stop - 1, rows.stop - 1)
        cv2.rectangle(
            picture, *corners, float(rng.choice([0.0, 60.0, 255.0])), max(1, round(rng.uniform(1, 3) * grain))
        )
