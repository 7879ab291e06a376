"""Makes the input of the finger network: a coarse field of ridge directions, and minutiae, centred on the print.

Owns the layout of the network's two inputs. Never runs the network and never judges quality.

The network itself estimates the pose of the finger and rotates both inputs to it (`models/finger_network.py`).
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
    """The two inputs. directions: float32 (4, CELLS, CELLS): cosine and sine of twice the direction, share of ridges, 2 (PERIOD_PX / period
    - 1); all but the share are multiplied by the share. minutiae: float32 (MINUTIAE_MAX, 5): x, y in pixels from the centre, cosine, sine,
    1; padded with rows of zeros. centre: x, y of the field's centre in the ridge map."""

    directions: Float32 = field(repr=False)
    minutiae: Float32 = field(repr=False)
    centre: tuple[float, float]


def finger_input(ridges: RidgeMap, thin: NDArray[np.uint8] | None = None) -> FingerInput:
    """The inputs of a print; zeros outside the ridges. thin: its skeleton; None: it is computed."""
    rows, columns = np.nonzero(ridges.inside[::4, ::4])
    height, width = ridges.inside.shape
    x, y = (4 * round(float(v.mean())) if len(v) else side // 2 for v, side in ((columns, width), (rows, height)))
    half = CELLS * CELL_PX // 2
    top, bottom, left, right = max(half - y, 0), max(y + half - height, 0), max(half - x, 0), max(x + half - width, 0)
    within = np.s_[max(y - half, 0) : y + half, max(x - half, 0) : x + half]
    inside, angles = ridges.inside[within].astype(np.float32), 2 * ridges.direction[within]
    period = (PERIOD_PX / ridges.period[within] - 1) * 2
    layers = cv2.merge([np.cos(angles) * inside, np.sin(angles) * inside, inside, period * inside])
    framed = cv2.copyMakeBorder(layers, top, bottom, left, right, cv2.BORDER_CONSTANT)
    directions = cv2.resize(framed, (CELLS, CELLS), interpolation=cv2.INTER_AREA)
    points = skeleton_minutiae(ridges, thin)
    points[:, 0] -= x
    points[:, 1] -= y
    points = points[np.argsort(np.hypot(points[:, 0], points[:, 1]), kind="stable")][:MINUTIAE_MAX]
    minutiae = np.zeros((MINUTIAE_MAX, 5), np.float32)
    minutiae[: len(points)] = np.stack(
        [points[:, 0], points[:, 1], np.cos(points[:, 2]), np.sin(points[:, 2]), np.ones(len(points))], 1
    )
    return FingerInput(np.ascontiguousarray(np.asarray(directions, np.float32).transpose(2, 0, 1)), minutiae, (x, y))
