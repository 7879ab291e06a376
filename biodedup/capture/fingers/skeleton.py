"""Thins a ridge map, and finds the ends and forks of its skeleton for the finger embedding.

Owns the thinning and these points. Never makes the minutiae of templates (`ridge_minutiae.py` does).

Ends and forks are found by crossing numbers (Rutovitz, 1966). Short ridges and pairs of points that face each other are dropped (Xiao and
Raafat, 1991).
"""

from __future__ import annotations

import cv2
import numpy as np
from numba import njit
from numpy.typing import NDArray

from biodedup.capture.fingers.ridges import RidgeMap
from biodedup.values import Float32

_BORDER_PX = 8  # at the edge of the map all ridges end
_STEPS, _STEPS_MIN = 8, 6  # steps along a ridge to find its direction; a shorter branch is not a ridge
_FACING_PX = 6.0
_AROUND = np.array([[-1, -1, 0, 1, 1, 1, 0, -1], [0, 1, 1, 1, 0, -1, -1, -1]])  # y and x of the neighbours, clockwise


def thinned(ridges: RidgeMap) -> NDArray[np.uint8]:
    """The skeleton of the ridges, uint8 (h, w), 1 on the skeleton. The outermost pixels are 0."""
    dark = (ridges.ridges > 0) & (ridges.inside > 0)
    dark[[0, -1]] = False
    dark[:, [0, -1]] = False
    return skeleton_of(dark)


def skeleton_of(dark: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The skeleton of a mask, uint8 (h, w), 1 on the skeleton."""
    from skimage.morphology import skeletonize  # imported here: the import takes a second

    thin = np.zeros(dark.shape, np.uint8)
    rows, columns = np.flatnonzero(dark.any(axis=1)), np.flatnonzero(dark.any(axis=0))
    if len(rows):  # skeletonize passes over the whole image many times
        within = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        thin[within] = skeletonize(dark[within])  # type: ignore[no-untyped-call]
    return thin


def skeleton_minutiae(ridges: RidgeMap, thin: NDArray[np.uint8] | None = None) -> Float32:
    """Ends and forks, float32 (n, 3): x, y in pixels at RIDGE_DPI, direction in radians.

    The direction points into the ridge of an end, or into the valley between the branches of a fork. An end that touches the next ridge
    becomes a fork, and keeps its direction.
    """
    framed = cv2.copyMakeBorder(ridges.inside, 1, 1, 1, 1, cv2.BORDER_CONSTANT)
    depth = cv2.distanceTransform(framed, cv2.DIST_L2, 3)[1:-1, 1:-1]
    thin = thinned(ridges) if thin is None else thin
    points = np.empty((thin.size, 3), np.float32)
    points = points[: _trace(thin, np.asarray(depth > _BORDER_PX), _AROUND, points)]
    apart = np.hypot(points[:, None, 0] - points[None, :, 0], points[:, None, 1] - points[None, :, 1])
    np.fill_diagonal(apart, np.inf)
    turn = np.abs(np.angle(np.exp(1j * (points[:, None, 2] - points[None, :, 2]))))
    facing = ((apart < _FACING_PX) & (turn > 2.0)).any(axis=1)
    points, apart = points[~facing], apart[~facing][:, ~facing]
    return np.asarray(points[np.count_nonzero(apart < _FACING_PX, axis=1) < 2], np.float32)


@njit(cache=True, nogil=True)
def _trace(thin: NDArray[np.uint8], wanted: NDArray[np.bool_], around: NDArray[np.int64], points: Float32) -> int:
    """Fills points with ends and forks; returns their number."""
    count = 0
    angles = np.zeros(3)
    ys, xs = around
    for y in range(_BORDER_PX, thin.shape[0] - _BORDER_PX):
        for x in range(_BORDER_PX, thin.shape[1] - _BORDER_PX):
            if not thin[y, x] or not wanted[y, x]:
                continue
            branches = 0
            for k in range(8):
                branches += thin[y + ys[k], x + xs[k]] and not thin[y + ys[k - 1], x + xs[k - 1]]
            if branches != 1 and branches != 3:
                continue
            branch, whole = 0, True
            for k in range(8):
                if thin[y + ys[k], x + xs[k]] and not thin[y + ys[k - 1], x + xs[k - 1]]:
                    far_y, far_x, steps = _followed(thin, y, x, y + ys[k], x + xs[k], around)
                    whole = whole and steps >= (_STEPS_MIN if branches == 1 else _STEPS_MIN - 1)
                    angles[branch] = np.arctan2(far_y - y, far_x - x)
                    branch += 1
            if not whole:
                continue
            direction = angles[0]
            if branches == 3:
                smallest_turn = 7.0
                for i in range(3):
                    a, b = angles[i], angles[(i + 1) % 3]
                    turn = abs(np.arctan2(np.sin(a - b), np.cos(a - b)))
                    if turn < smallest_turn:
                        smallest_turn = turn
                        direction = np.arctan2(np.sin(a) + np.sin(b), np.cos(a) + np.cos(b))
            points[count, 0], points[count, 1], points[count, 2] = x, y, direction
            count += 1
    return count


@njit(cache=True, nogil=True)
def _followed(
    thin: NDArray[np.uint8], from_y: int, from_x: int, y: int, x: int, around: NDArray[np.int64]
) -> tuple[int, int, int]:
    """(y, x) of the pixel some steps along a ridge, and the number of steps before the ridge ends or forks."""
    ys, xs = around
    steps = 1
    while steps <= _STEPS:
        next_y, next_x, ways = -1, -1, 0
        for turn in range(8):
            k = 2 * turn if turn < 4 else 2 * turn - 7  # straight neighbours before diagonal ones
            to_y, to_x = y + ys[k], x + xs[k]
            if not thin[to_y, to_x] or max(abs(to_y - from_y), abs(to_x - from_x)) <= 1:
                continue  # no ridge pixel, or a neighbour of the previous pixel
            if ways == 0:
                next_y, next_x, ways = to_y, to_x, 1
            elif abs(to_y - next_y) + abs(to_x - next_x) > 1:
                ways += 1
        if ways != 1:
            break
        from_y, from_x, y, x = y, x, next_y, next_x
        steps += 1
    return y, x, steps
