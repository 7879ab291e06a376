"""Extracts minutiae for matching from the ridge map of a print: position, direction, kind and reliability.

Owns the cleaning of the thinned map, the rules for false minutiae, and the reliability. Never enhances or judges a print.

1. The map is scaled up to 500 dpi before it is thinned, because close ridges touch at RIDGE_DPI. Pixels are of 500 dpi in this module.
2. The crossing number (Rutovitz, 1966) of a skeleton pixel tells an ending or a fork. Spurs and islands are erased from the skeleton first.
3. False minutiae are removed (Xiao and Raafat, 1991; Zhao and Tang, 2007): pairs that face each other at less than a ridge period, as at
   broken ridges, bridges and lakes.
4. The position is refined along the minutia's direction to the change of sign of the ridge map.
5. The reliability is the probability that the minutia is real. It is a logistic regression on generated fingers, whose minutiae are known
   (`models/fit_one_pass.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numba import njit
from numpy.typing import NDArray

from biodedup.capture.fingers.ridges import RidgeMap
from biodedup.capture.fingers.skeleton import skeleton_of
from biodedup.capture.minutiae.record import MinutiaeRecord
from biodedup.values import Float32

# tuned on the tuning half of FVC2002 DB2-4_B and UareU (benchmarks/extractors.py), 2026-11
_BORDER_PX = 8
"""Minimum distance of a minutia from the edge of the map, where all ridges end."""
_SPUR_PX, _ISLAND_PX = 5, 8
"""Greatest lengths of a spur and of an island."""
_STEPS = 12
"""Steps along the skeleton to find a direction."""
_FACING_PX = 7.0
"""Greatest distance of two minutiae that face each other and are false."""
_POINTS_MAX = 1024
_FEATURES = 14
MINUTIAE_MAX = 150
_DARK = 0.02
"""Map value from which a pixel is a ridge: cubic interpolation leaves small values beside ridges."""
_WEIGHTS = np.array(
    [0.443, 0.799, 0.322, 0.46, 0.508, 3.256, 3.163, -0.949, -0.413, -0.029, -1.417, 4.102, -1.468, 0.287, -6.207],
    np.float32,
)
_AROUND = np.array([[-1, -1, 0, 1, 1, 1, 0, -1], [0, 1, 1, 1, 0, -1, -1, -1]])  # y and x of the neighbours, clockwise


@dataclass(frozen=True, eq=False)
class RidgeMinutiae:
    """Minutiae. points: float32 (n, 3), x, y, direction in radians (x right, y down). The direction points into the ridge of an ending, or into
    the valley between the two branches of a fork. ending: bool (n,), False for a fork. reliability: float32 (n,), 0 to 1, descending."""

    points: Float32 = field(repr=False)
    ending: NDArray[np.bool_] = field(repr=False)
    reliability: Float32 = field(repr=False)
    features: Float32 = field(repr=False)


def ridge_minutiae(ridges: RidgeMap, shape: tuple[int, ...]) -> RidgeMinutiae:
    """The minutiae of a ridge map. shape: height and width of the picture at 500 dpi."""
    height, width = shape[:2]
    framed = cv2.copyMakeBorder(ridges.inside, 1, 1, 1, 1, cv2.BORDER_CONSTANT)
    depth = np.asarray(cv2.distanceTransform(framed, cv2.DIST_L2, 3)[1:-1, 1:-1], np.float32)
    fine = np.asarray(cv2.resize(ridges.ridges, (width, height), interpolation=cv2.INTER_CUBIC), np.float32)
    dark = fine > _DARK
    dark[[0, -1]] = False
    dark[:, [0, -1]] = False
    thin = skeleton_of(dark)
    points, features = np.empty((_POINTS_MAX, 4), np.float32), np.zeros((_POINTS_MAX, _FEATURES), np.float32)
    scale = np.array([ridges.ridges.shape[1] / width, ridges.ridges.shape[0] / height])
    _erase(thin, _AROUND)
    points = points[: _collect(thin, depth, ridges.direction, scale, _AROUND, points)]
    points = points[~_facing(points, _FACING_PX)]
    features = features[: len(points)]
    _refine(points, fine)
    maps = (ridges.ridges, ridges.flat, ridges.coherence, ridges.period, ridges.direction)
    _describe(points, scale, depth, *maps, features)
    reliability = _reliability(features)
    order = np.argsort(-reliability, kind="stable")
    points = points[order]
    return RidgeMinutiae(points[:, :3], points[:, 3] > 0, reliability[order], features[order])


def _reliability(features: Float32) -> Float32:
    """The probability that minutiae with these features are real."""
    return np.asarray(1 / (1 + np.exp(-(features @ _WEIGHTS[:-1] + _WEIGHTS[-1]))), np.float32)


def record_of(minutiae: RidgeMinutiae, shape: tuple[int, ...]) -> MinutiaeRecord:
    """A record of the most reliable minutiae, at most MINUTIAE_MAX. shape: height and width of the picture at 500 dpi."""
    count = min(len(minutiae.points), MINUTIAE_MAX)
    x, y, direction = minutiae.points[:count].T
    words = np.empty((count, 3), ">u2")
    kind = np.where(minutiae.ending[:count], 1, 2) << 14
    words[:, 0] = kind | np.clip(np.rint(x), 0, shape[1] - 1).astype(int)
    words[:, 1] = np.clip(np.rint(y), 0, shape[0] - 1).astype(int)
    angle = np.rint(direction * (-256 / (2 * np.pi))).astype(int) & 255  # ISO's angles are anticlockwise
    words[:, 2] = angle << 8 | np.clip(np.rint(100 * minutiae.reliability[:count]), 1, 100).astype(int)
    return MinutiaeRecord(shape[1], shape[0], words.tobytes())


@njit(cache=True, nogil=True)
def _branches(thin: Any, y: int, x: int, around: Any) -> int:
    """The crossing number of a skeleton pixel: 1 at an end, 2 along a ridge, 3 at a fork."""
    ys, xs = around
    branches = 0
    for k in range(8):
        branches += thin[y + ys[k], x + xs[k]] > 0 and thin[y + ys[k - 1], x + xs[k - 1]] == 0
    return branches


@njit(cache=True, nogil=True)
def _erase(thin: Any, around: Any) -> None:
    """Erases islands (short ridges) and spurs (short branches that end), in place."""
    path = np.empty((_ISLAND_PX + 1, 2), np.int64)
    ys, xs = around
    for y in range(1, thin.shape[0] - 1):
        for x in range(1, thin.shape[1] - 1):
            if thin[y, x] == 0:
                continue
            branches = _branches(thin, y, x, around)
            if branches == 0:
                thin[y, x] = 0
                continue
            if branches != 1:
                continue
            at_y, at_x, last_y, last_x, length, kind = y, x, -9, -9, 0, 2
            while length <= _ISLAND_PX:
                path[length, 0], path[length, 1] = at_y, at_x
                length += 1
                if length > _ISLAND_PX:
                    break
                next_y, next_x = -1, -1
                for turn in range(8):
                    k = 2 * turn if turn < 4 else 2 * turn - 7  # straight neighbours before diagonal ones
                    to_y, to_x = at_y + ys[k], at_x + xs[k]
                    if thin[to_y, to_x] == 0 or (abs(to_y - last_y) <= 1 and abs(to_x - last_x) <= 1):
                        continue
                    next_y, next_x = to_y, to_x
                    break
                if next_y < 0:
                    kind = 1  # the ridge ends
                    break
                if next_y < 1 or next_x < 1 or next_y >= thin.shape[0] - 1 or next_x >= thin.shape[1] - 1:
                    break
                last_y, last_x, at_y, at_x = at_y, at_x, next_y, next_x
                if _branches(thin, at_y, at_x, around) >= 3:
                    kind = 3
                    break
            if (kind == 1 and length <= _ISLAND_PX) or (kind == 3 and length <= _SPUR_PX):
                for i in range(length):
                    thin[path[i, 0], path[i, 1]] = 0


@njit(cache=True, nogil=True)
def _collect(thin: Any, depth: Any, direction: Any, scale: Any, around: Any, points: Any) -> int:
    """Fills points with x, y, direction, kind (1 ending, -1 fork); returns their number."""
    count = 0
    ys, xs = around
    angles = np.zeros(3)
    for y in range(1, thin.shape[0] - 1):
        for x in range(1, thin.shape[1] - 1):
            if thin[y, x] == 0 or count == points.shape[0]:
                continue
            at_y, at_x = int(y * scale[1]), int(x * scale[0])  # in the map
            if depth[at_y, at_x] <= _BORDER_PX * scale[0]:
                continue
            branches = _branches(thin, y, x, around)
            if branches != 1 and branches != 3:
                continue
            branch = 0
            for k in range(8):
                if thin[y + ys[k], x + xs[k]] and not thin[y + ys[k - 1], x + xs[k - 1]]:
                    far_y, far_x = _followed(thin, y, x, y + ys[k], x + xs[k], around)
                    angles[branch] = np.arctan2(far_y - y, far_x - x)
                    branch += 1
            turn = angles[0]
            if branches == 3:
                smallest = 7.0
                for i in range(3):
                    a, b = angles[i], angles[(i + 1) % 3]
                    apart = abs(np.arctan2(np.sin(a - b), np.cos(a - b)))
                    if apart < smallest:
                        smallest = apart
                        turn = np.arctan2(np.sin(a) + np.sin(b), np.cos(a) + np.cos(b))
            along = direction[
                at_y, at_x
            ]  # the direction field is smoother than the skeleton, which only gives the sense
            if np.cos(along - turn) < 0:
                along += np.pi
            points[count, 0], points[count, 1], points[count, 2] = x, y, along
            points[count, 3] = 1 if branches == 1 else -1
            count += 1
    return count


@njit(cache=True, nogil=True)
def _followed(thin: Any, from_y: int, from_x: int, y: int, x: int, around: Any) -> tuple[int, int]:
    """The pixel some steps along a ridge."""
    ys, xs = around
    for _ in range(_STEPS - 1):
        next_y, next_x, ways = -1, -1, 0
        for turn in range(8):
            k = 2 * turn if turn < 4 else 2 * turn - 7
            to_y, to_x = y + ys[k], x + xs[k]
            if to_y < 0 or to_x < 0 or to_y >= thin.shape[0] or to_x >= thin.shape[1]:
                continue
            if not thin[to_y, to_x] or max(abs(to_y - from_y), abs(to_x - from_x)) <= 1:
                continue  # no ridge pixel, or a neighbour of the previous pixel
            if ways == 0:
                next_y, next_x, ways = to_y, to_x, 1
            elif abs(to_y - next_y) + abs(to_x - next_x) > 1:
                ways += 1
        if ways != 1:
            break
        from_y, from_x, y, x = y, x, next_y, next_x
    return y, x


@njit(cache=True, nogil=True)
def _facing(points: Any, within: float) -> Any:
    """Whether each point belongs to a close pair of opposite directions. Closest pairs first; a point belongs to at most one pair."""
    n = points.shape[0]
    gone = np.zeros(n, np.bool_)
    while True:
        best, at_i, at_j = within * within, -1, -1
        for i in range(n):
            if gone[i]:
                continue
            for j in range(i + 1, n):
                if points[j, 1] - points[i, 1] > within:
                    break
                if gone[j]:
                    continue
                dx, dy = points[j, 0] - points[i, 0], points[j, 1] - points[i, 1]
                apart = dx * dx + dy * dy
                if apart < best and np.cos(points[i, 2] - points[j, 2]) < -0.4:
                    best, at_i, at_j = apart, i, j
        if at_i < 0:
            return gone
        gone[at_i] = gone[at_j] = True


@njit(cache=True, nogil=True)
def _value(image: Any, x: float, y: float) -> float:
    """The image at a point, by bilinear interpolation, clamped to the image."""
    height, width = image.shape
    x, y = min(max(x, 0.0), width - 1.001), min(max(y, 0.0), height - 1.001)
    i, j = int(y), int(x)
    v, u = y - i, x - j
    top = image[i, j] * (1 - u) + image[i, j + 1] * u
    return float(top * (1 - v) + (image[i + 1, j] * (1 - u) + image[i + 1, j + 1] * u) * v)


@njit(cache=True, nogil=True)
def _refine(points: Any, ridges: Any) -> None:
    """Moves each point along its direction to the nearest change of sign of the map."""
    for i in range(points.shape[0]):
        x, y, kind = points[i, 0], points[i, 1], points[i, 3]
        c, s = np.cos(points[i, 2]), np.sin(points[i, 2])
        best, last = 9.0, 0.0
        for step in range(-8, 9):
            t = step * 0.75
            value = kind * _value(ridges, x + t * c, y + t * s)
            if step > -8 and last <= 0 < value:
                at = t - 0.75 * value / (value - last)
                if abs(at) < abs(best):
                    best = at
            last = value
        if abs(best) < 6:
            points[i, 0], points[i, 1] = x + best * c, y + best * s


@njit(cache=True, nogil=True)
def _describe(
    points: Any,
    scale: Any,
    depth: Any,
    ridges: Any,
    flat: Any,
    coherence: Any,
    period: Any,
    direction: Any,
    features: Any,
) -> None:
    """Fills the features of each point, in pixels of the map: darkness ahead and lightness behind, in the map and in the picture; coherence,
    depth, close points, kind, period; agreement of map and picture, contrast, and the change of direction around the point."""
    for i in range(points.shape[0]):
        x, y, kind = points[i, 0] * scale[0], points[i, 1] * scale[1], points[i, 3]
        c, s = np.cos(points[i, 2]), np.sin(points[i, 2])
        f = features[i]
        for t in range(2, 8):
            f[0] += kind * _value(ridges, x + t * c, y + t * s) / 6
            f[1] -= kind * _value(ridges, x - t * c, y - t * s) / 6
            f[2] += kind * _value(flat, x + t * c, y + t * s) / 6
            f[3] -= kind * _value(flat, x - t * c, y - t * s) / 6
        at_y, at_x = min(max(int(y + 0.5), 0), ridges.shape[0] - 1), min(max(int(x + 0.5), 0), ridges.shape[1] - 1)
        f[4], f[5] = coherence[at_y, at_x], min(depth[at_y, at_x], 24.0) / 24
        f[6], f[7], f[8] = _neighbours(points, i, scale[0])
        f[9], f[10] = kind, abs(period[at_y, at_x] - 6.0) / 2
        f[11], f[12] = _agreement(ridges, flat, at_y, at_x)
        for k in range(4):
            u, v = x + 8 * np.cos(k * np.pi / 2), y + 8 * np.sin(k * np.pi / 2)
            iu, iv = min(max(int(u), 0), ridges.shape[1] - 1), min(max(int(v), 0), ridges.shape[0] - 1)
            f[13] += 1 - np.cos(2 * (direction[iv, iu] - points[i, 2]))


@njit(cache=True, nogil=True)
def _neighbours(points: Any, i: int, scale: float) -> tuple[float, float, float]:
    """(distance to the nearest other point, number of close points, distance to the nearest point that faces this point), all scaled."""
    nearest, near, facing = 20.0, 0, 20.0
    for j in range(points.shape[0]):
        if j == i:
            continue
        dx, dy = points[j, 0] - points[i, 0], points[j, 1] - points[i, 1]
        apart = scale * np.sqrt(dx * dx + dy * dy)
        nearest = min(nearest, apart)
        near += apart < 16
        if np.cos(points[j, 2] - points[i, 2]) < -0.4:
            facing = min(facing, apart)
    return nearest / 20, near / 4.0, facing / 20


@njit(cache=True, nogil=True)
def _agreement(ridges: Any, flat: Any, at_y: int, at_x: int) -> tuple[float, float]:
    """(correlation of map and picture, contrast of the picture) within six pixels."""
    both, xx, yy = 0.0, 1e-6, 1e-6
    low_y, high_y = max(at_y - 6, 0), min(at_y + 7, ridges.shape[0])
    low_x, high_x = max(at_x - 6, 0), min(at_x + 7, ridges.shape[1])
    for v in range(low_y, high_y):
        for u in range(low_x, high_x):
            a, b = ridges[v, u], flat[v, u]
            both += a * b
            xx += a * a
            yy += b * b
    return both / np.sqrt(xx * yy), np.sqrt(yy / max((high_y - low_y) * (high_x - low_x), 1))
