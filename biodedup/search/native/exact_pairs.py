"""Computes exact similarities of pairs of a probe and a row, and ranks them (re-ranking).

Owns the comparison by all eight bits, and the ranking. Never chooses pairs.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from biodedup.gallery.segments.part import Column, Int64
from biodedup.values import Float32


def compared(column: Column, cells: Int64, probes: Float32, which: NDArray[Any]) -> Float32:
    """The similarities of pairs, float32 (n,). cells: int64 (n,), ascending. probes: float32 (q, D), rotated. which: the probe of each pair,
    (n,)."""
    first = np.diff(cells, prepend=-1) > 0
    codes, norms = column.codes_at(cells[first])
    similarity = np.empty(len(cells), np.float32)
    _compare(codes, norms, np.cumsum(first) - 1, np.ascontiguousarray(probes), which, similarity)
    return similarity


def ranked(which: NDArray[Any], value: Float32, rows: Int64, count: int) -> tuple[Int64, Int64]:
    """(order by probe, then by descending value, then by row; rank of each item of this order within its probe)."""
    key = which.astype(np.uint64) << np.uint64(32) | _descending(value)
    order = np.argsort(key)  # a single key sorts several times as fast as three
    key = key[order]
    same = key[1:] == key[:-1]
    if same.any():
        tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
        order[tied] = order[tied][np.lexsort((rows[order[tied]], key[tied]))]
    starts = np.searchsorted(key, np.arange(count, dtype=np.uint64) << np.uint64(32))
    return order, np.arange(len(order)) - starts[which[order]]


def _descending(value: Float32) -> NDArray[np.uint64]:
    """Integers that sort in the reverse order of the values."""
    bits = (value + np.float32(0)).view(np.uint32)  # makes -0.0 and 0.0 equal
    return np.where(bits >> np.uint32(31), bits, ~bits & np.uint32(0x7FFFFFFF)).astype(np.uint64)


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "nsz"})
def _compare(codes: Any, norms: Any, at: Any, probes: Any, which: Any, similarity: Any) -> None:
    for i in range(at.shape[0]):
        row, probe = at[i], which[i]
        total = np.float32(0)
        for j in range(codes.shape[1]):
            total += (np.float32(codes[row, j]) - np.float32(128)) * probes[probe, j]
        similarity[i] = total / norms[row]
