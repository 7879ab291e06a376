"""The input of the finger network: a coarse field of ridge directions, and minutiae, centred on the print.

Owns the layout of the network's two inputs. Never runs the network and never judges quality.

The network estimates the finger's pose itself, and rotates both inputs into it: `models/finger_network.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from biodedup.capture.fingers.ridges import PERIOD_PX, RidgeMap
from biodedup.capture.fingers.skeleton import skeleton_minutiae
from biodedup.values import Float32

CELLS, CELL_PX = 36, 8
"""A field of 288 pixels at RIDGE_DPI: 22 mm."""
MINUTIAE_MAX = 96


@dataclass(frozen=True, eq=False)
class FingerInput:
    """directions: float32 (4, CELLS, CELLS): cosine and sine of twice the direction, share of ridges, 2 (PERIOD_PX / period - 1), the
    others times that share. minutiae: float32 (MINUTIAE_MAX, 5): x, y in pixels from the centre, cosine, sine, 1; rows of zeros
    fill up. centre: x, y of the field's centre in the ridge map."""

    directions: Float32 = field(repr=False)
    minutiae: Float32 = field(repr=False)
    centre: tuple[float, float]


def finger_input(ridges: RidgeMap, thin: NDArray[np.uint8] | None = None) -> FingerInput:
    """The inputs of one print; zeros where nothing is inside. thin: its skeleton, where it is known."""
    rows, columns = np.nonzero(ridges.inside[::4, ::4])
    height, width = ridges.inside.shape
    x, y = (4 * round(float(v.mean())) if len(v) else side // 2 for v, side in ((columns, width), (rows, height)))
    half = CELLS * CELL_PX // 2
    top, bottom, left, right = max(half - y, 0), max(y + half - height, 0), max(half - x, 0), max(x + half - width, 0)
    within = np.s_[max(y - half, 0) : y + half, max(x - half, 0) : x + half]
    inside, turns = ridges.inside[within].astype(np.float32), 2 * ridges.direction[within]
    period = (PERIOD_PX / ridges.period[within] - 1) * 2
    layers = cv2.merge([np.cos(turns) * inside, np.sin(turns) * inside, inside, period * inside])
    framed = cv2.copyMakeBorder(layers, top, bottom, left, right, cv2.BORDER_CONSTANT)
    directions = cv2.resize(framed, (CELLS, CELLS), interpolation=cv2.INTER_AREA)
    found = skeleton_minutiae(ridges, thin)
    found[:, 0] -= x
    found[:, 1] -= y
    found = found[np.argsort(np.hypot(found[:, 0], found[:, 1]), kind="stable")][:MINUTIAE_MAX]
    minutiae = np.zeros((MINUTIAE_MAX, 5), np.float32)
    minutiae[: len(found)] = np.stack(
        [found[:, 0], found[:, 1], np.cos(found[:, 2]), np.sin(found[:, 2]), np.ones(len(found))], 1
    )
    return FingerInput(np.ascontiguousarray(np.asarray(directions, np.float32).transpose(2, 0, 1)), minutiae, (x, y))
