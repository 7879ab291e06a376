"""Removes the frame around a print: even regions at the picture's edge that end at a straight step, such as padding and the rim of a sensor.

Owns the measures of a frame. Never judges the print.

The step at a frame has much more contrast than ridges. Without removal, the measures that compare a place with the strongest contrast of the
picture find no ridges, and the step counts as a wave. A print's own background also is even, but its border is curved and soft.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from biodedup.values import Float32

_SIDE_PX_MAX = 800
"""A larger picture is searched at a fraction of its size."""
_BOX_PX, _DEVIATION_MAX = 9, 6.0
"""A place is even if its grey levels deviate less within this box. Ridges deviate by 15 and more."""
_SHARE_MIN = 0.003
_REACH_PX, _RING_PX = 5, 8
"""From the even region to the step, and the width of the ring beyond it, which is about a ridge period."""
_LEVEL_PX, _COARSER = 6.0, 4
_STEP_MIN, _LINE_PX_MIN, _LINES_MIN = 45.0, 60.0, 0.5
"""A frame has the median step, and straight lines of this length as a share of its border. The backgrounds of FVC2002 DB1-4_B (every fourth
print) have either a step of at most 81 with at most 0.41 of lines, or a smaller step (2026-11)."""
_BEND_PX = 2.5
"""A line deviates at most by this from straight."""


def unframed(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture with the grey levels of the print's surroundings in place of its frame; the picture itself if it has no frame. uint8 (h, w)."""
    factor = -(-max(grey.shape) // _SIDE_PX_MAX)
    size = -(-grey.shape[1] // factor), -(-grey.shape[0] // factor)
    small = grey if factor == 1 else np.asarray(cv2.resize(grey, size, interpolation=cv2.INTER_AREA), np.uint8)
    frame = _frame(small)
    if not frame.any() or frame.all():
        return grey
    filled = _surroundings(small.astype(np.float32), frame)
    if factor > 1:
        whole = grey.shape[::-1]
        frame = cv2.resize(frame.astype(np.uint8), whole, interpolation=cv2.INTER_NEAREST) > 0
        filled = np.asarray(cv2.resize(filled, whole, interpolation=cv2.INTER_LINEAR), np.float32)
    return np.where(frame, filled.astype(np.uint8), grey)


def _frame(grey: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether each pixel belongs to a frame or to its step, bool (h, w)."""
    frame = np.zeros(grey.shape, bool)
    box = (_BOX_PX, _BOX_PX)
    variance = cv2.sqrBoxFilter(grey, cv2.CV_32F, box) - np.square(cv2.boxFilter(grey, cv2.CV_32F, box))
    even = (variance < _DEVIATION_MAX**2).astype(np.uint8)
    # Grana's algorithm takes half the time of the default
    _, labels, statistics, _ = cv2.connectedComponentsWithStatsWithAlgorithm(even, 8, cv2.CV_32S, cv2.CCL_GRANA)
    edge = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    for label in edge[(edge > 0) & (statistics[edge, cv2.CC_STAT_AREA] >= _SHARE_MIN * grey.size)]:
        region = (labels == label).astype(np.uint8)
        if not _ends_straight(region):
            continue
        grown = np.asarray(cv2.dilate(region, _disc(_REACH_PX)), np.uint8)
        if _step(grey.astype(np.float32), region, grown) >= _STEP_MIN:
            frame |= grown > 0
    return frame


def _step(grey: Float32, region: NDArray[np.uint8], grown: NDArray[np.uint8]) -> float:
    """The median difference between the region's level and the local mean in a ring around the grown region; 0 if there is no ring."""
    ring = cv2.dilate(grown, _disc(_RING_PX)) > grown
    if not ring.any():
        return 0.0
    level = float(grey[region > 0].mean())
    return float(np.median(np.abs(_local_mean(grey, ring)[ring] - level)))


def _ends_straight(region: NDArray[np.uint8]) -> bool:
    """Whether the region's border, apart from the picture's edge, consists of long straight lines."""
    last = np.array(region.shape[::-1]) - 2
    total = straight = 0.0
    for contour in cv2.findContours(region, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]:
        corners = cv2.approxPolyDP(contour, _BEND_PX, True)[:, 0]
        following = np.roll(corners, -1, axis=0)
        at_edge = ((np.maximum(corners, following) <= 1) | (np.minimum(corners, following) >= last)).any(axis=1)
        lengths = np.hypot(*(following - corners).T)[~at_edge]
        total += float(lengths.sum())
        straight += float(lengths[lengths >= _LINE_PX_MIN].sum())
    return straight > 0 and straight >= _LINES_MIN * total


def _surroundings(grey: Float32, frame: NDArray[np.bool_]) -> Float32:
    """The local mean outside the frame, continued from the nearest pixel into the frame. float32 (h, w)."""
    mean = _local_mean(grey, ~frame)
    _, nearest = cv2.distanceTransformWithLabels(
        frame.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    levels = np.zeros(int(nearest.max()) + 1, np.float32)
    levels[nearest[~frame]] = mean[~frame]
    return np.asarray(levels[nearest], np.float32)


def _local_mean(grey: Float32, where: NDArray[np.bool_]) -> Float32:
    """The mean around each pixel over the pixels of `where`. It is smooth, so that a quarter of the size is enough."""
    weight, whole = where.astype(np.float32), grey.shape[::-1]
    size = -(-whole[0] // _COARSER), -(-whole[1] // _COARSER)
    small = (cv2.resize(values, size, interpolation=cv2.INTER_AREA) for values in (grey * weight, weight))
    total, count = (cv2.GaussianBlur(values, (0, 0), _LEVEL_PX / _COARSER) for values in small)
    return np.asarray(cv2.resize(total / np.maximum(count, 1e-3), whole, interpolation=cv2.INTER_LINEAR), np.float32)


def _disc(radius: int) -> NDArray[np.uint8]:
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1,) * 2), np.uint8)
