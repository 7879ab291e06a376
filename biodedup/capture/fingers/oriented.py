"""Filters each pixel of a fingerprint by a Gabor filter with the direction and ridge period at this pixel.

Owns the filter bank and its kernel. The enhancement of captures and the growth of synthetic ridges use it. Never estimates directions or
periods.

Source: Hong, Wan and Jain, "Fingerprint image enhancement: algorithm and performance evaluation", 1998.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import cv2
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from biodedup.values import Float32

RIDGE_DPI = 1000.0 / 3
"""Resolution of ridge maps: two thirds of 500 dpi. A ridge period is 6 pixels, so that a filter of 15 pixels covers two and a half periods."""

DIRECTIONS = 64
PERIODS_PX = np.linspace(4.4, 8.9, 10)  # at RIDGE_DPI: 6.6 to 13.4 pixels at 500 dpi

_REACH = 7
_SIDE, _ROW = 2 * _REACH + 1, 2 * _REACH + 2  # a row is padded to 16 pixels, which fill whole registers
_ACROSS, _ALONG = 0.5, 0.6  # standard deviations of the envelope, in periods


@cache
def _bank() -> Float32:
    """The filters, float32 (periods, DIRECTIONS, 15, 16). A filter has mean 0 and gives 1 on its own wave; the last column is padding."""
    y, x = np.mgrid[-_REACH : _REACH + 1, -_REACH : _REACH + 1].astype(np.float64)
    bank = np.zeros((len(PERIODS_PX), DIRECTIONS, _SIDE, _ROW), np.float32)
    for p, period in enumerate(PERIODS_PX):
        for d in range(DIRECTIONS):
            angle = d * np.pi / DIRECTIONS
            across, along = y * np.cos(angle) - x * np.sin(angle), x * np.cos(angle) + y * np.sin(angle)
            envelope = np.exp(-((across / (_ACROSS * period)) ** 2 + (along / (_ALONG * period)) ** 2) / 2)
            wave = np.cos(2 * np.pi * across / period)
            kernel = envelope * wave
            kernel -= envelope * (kernel.sum() / envelope.sum())
            bank[p, d, :, :_SIDE] = kernel / np.abs(kernel * wave).sum()
    return bank


class OrientedFilter:
    """The filter of each pixel of a picture. direction: of the ridges, in radians, x right and y down. period: in pixels. Both are float32
    (h, w). where: bool or uint8 (h, w), the pixels to compute; all other pixels become 0. None: all pixels are computed."""

    def __init__(self, direction: Float32, period: Float32, where: NDArray[np.uint8] | None = None) -> None:
        step = PERIODS_PX[1] - PERIODS_PX[0]
        direction_number = np.rint(direction * (DIRECTIONS / np.pi)).astype(np.int32) % DIRECTIONS
        period_number = np.clip(np.rint((period - PERIODS_PX[0]) / step), 0, len(PERIODS_PX) - 1).astype(np.int32)
        wanted = True if where is None else where.astype(bool)
        self._filter = np.where(wanted, period_number * DIRECTIONS + direction_number, -1).astype(np.int32)

    def __call__(self, image: Float32) -> Float32:
        """image: float32 (h, w). Returns float32 (h, w)."""
        padded = cv2.copyMakeBorder(image, _REACH, _REACH, _REACH, _REACH + 1, cv2.BORDER_REFLECT_101)
        out = np.empty(image.shape, np.float32)
        _filter(np.ascontiguousarray(padded, np.float32), self._filter, _bank().reshape(-1, _SIDE, _ROW), out)
        return out


def _weighted_of(_: Any, image: Any, stride: Any, weights: Any) -> Any:
    """An intrinsic for numba, weighted(image, stride, weights) -> float32: the weighted sum of 15 x 16 pixels with SIMD instructions.

    image: float32 *, rows `stride` pixels apart. weights: float32 *, (15, 16). The order of the sums is fixed, and multiplications and
    additions are not fused, so that every processor gives the same number.
    """

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        single, index = ir.FloatType(), ir.IntType(64)
        eight = ir.VectorType(single, 8)
        image, weights = (builder.inttoptr(args[at], ir.PointerType(single)) for at in (0, 2))

        def octet(base: Any, place: Any) -> Any:
            return builder.load(builder.bitcast(builder.gep(base, [place]), ir.PointerType(eight)), align=4)

        totals: list[Any] = [ir.Constant(eight, [0.0] * 8)] * 4
        row: Any = ir.Constant(index, 0)
        for j in range(_SIDE):
            for half in (0, 8):
                pixels = octet(image, builder.add(row, ir.Constant(index, half)))
                product = builder.fmul(pixels, octet(weights, ir.Constant(index, j * _ROW + half)))
                lane = 2 * (j % 2) + half // 8
                totals[lane] = builder.fadd(totals[lane], product)
            row = builder.add(row, args[1])
        total = builder.fadd(builder.fadd(totals[0], totals[2]), builder.fadd(totals[1], totals[3]))
        for width in (4, 2, 1):
            halves = [
                builder.shuffle_vector(
                    total, total, ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(at, at + width)))
                )
                for at in (0, width)
            ]
            total = builder.fadd(*halves)
        return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

    return types.float32(types.intp, types.intp, types.intp), generate


_weighted: Any = intrinsic(_weighted_of)


@njit(cache=True, nogil=True)
def _filter(padded: Float32, chosen: NDArray[np.int32], bank: Float32, out: Float32) -> None:
    for y in range(chosen.shape[0]):
        for x in range(chosen.shape[1]):
            k = chosen[y, x]
            if k < 0:
                out[y, x] = 0
            else:
                image = padded.ctypes.data + 4 * (y * padded.shape[1] + x)
                out[y, x] = _weighted(image, padded.shape[1], bank.ctypes.data + 4 * k * _SIDE * _ROW)
