"""Makes a probe's look-up tables for a scan: their entries, the limits of their sums, and the error of rounding.

Owns the conversion of a probe's numbers to tables of bytes, and the meaning of sums of entries. Never scans (`scan_kernel.py`), and never
chooses the numbers of a table (`signs.py`, `classes.py`).

Method: as in FAISS's fast scan (André, Kermarrec and Le Scouarnec, VLDB 2015), an entry is the dot product of a probe's numbers with the values
that a row's bits stand for, rounded to a byte.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from biodedup.search.native.table_tile import ENTRIES, SUMS_PER_ROW
from biodedup.values import Float32

_ROUNDED_UP = np.float32(0.5)
"""The mean effect of rounding up: a quarter for each mean of two sums, and a quarter for the mean of both."""


def tables_of(numbers: Float32, levels: Float32) -> tuple[NDArray[np.uint8], Float32, Float32]:
    """The tables of probes. numbers: float32 (q, m, b), the b numbers of each of the m tables. levels: float32 (ENTRIES, b), the values of a
    row's numbers for each entry, symmetric about 0.

    Returns uint8 (q, t, ENTRIES), t padded to a multiple of SUMS_PER_ROW, and steps and middles, float32 (q,) each, for
    `limits_of`.
    """
    steps, middles, padded = scales_of(numbers, levels)
    values = numbers @ levels.T
    values -= values.min(axis=2, keepdims=True)  # no entry is negative
    tables = np.zeros((len(numbers), padded, ENTRIES), np.uint8)
    tables[:, : numbers.shape[1]] = np.rint(values / steps[:, None, None])
    return tables, steps, middles


def scales_of(numbers: Float32, levels: Float32) -> tuple[Float32, Float32, int]:
    """(steps, middles, number of tables with padding) of probes' tables."""
    padded = -(-numbers.shape[1] // SUMS_PER_ROW) * SUMS_PER_ROW
    largest_entries = np.zeros((len(numbers), padded), np.float32)
    largest_entries[:, : numbers.shape[1]] = np.abs(numbers).sum(axis=2) * levels.max()
    largest = 2 * largest_entries.reshape(len(numbers), SUMS_PER_ROW, -1).sum(axis=2).max(axis=1)
    steps = np.maximum(largest / np.float32(255 - padded / SUMS_PER_ROW / 2), 1e-12).astype(np.float32)
    return steps, largest_entries.sum(axis=1), padded


def products_at(numbers: Float32, levels: Float32, entries: NDArray[np.integer]) -> Float32:
    """The dot products that the kernel's sums stand for, float32 (n,), for pairs of a probe and a row. Only the entries that the rows look up are
    computed. numbers: float32 (n, m, b). entries: (n, m), below ENTRIES."""
    steps, middles, padded = scales_of(numbers, levels)
    values = np.einsum("nmb,nmb->nm", numbers, levels[entries]) + np.abs(numbers).sum(axis=2) * levels.max()
    rounded = np.zeros((len(numbers), padded), np.int32)
    rounded[:, : numbers.shape[1]] = np.rint(values / steps[:, None])
    sums = rounded.reshape(len(numbers), SUMS_PER_ROW, -1).sum(axis=2)
    halves = (sums[:, ::2] + sums[:, 1::2] + 1) >> 1
    means = ((halves[:, 0] + halves[:, 1] + 1) >> 1).astype(np.float32)
    return np.asarray((means - _ROUNDED_UP) * SUMS_PER_ROW * steps - middles, np.float32)


def rounding_variance(tables: int, steps: Float32) -> Float32:
    """The variance of dot products from the rounding of entries and of means."""
    return np.asarray((tables / 12 + SUMS_PER_ROW**2 / 6) * steps**2, np.float32)


def limits_of(products: Float32, steps: Float32, middles: Float32) -> NDArray[np.uint8]:
    """The limits of the kernel: the lowest means of sums for dot products of at least these, uint8 (q,). products: float32 (q,)."""
    limits = np.ceil((products + middles) / (SUMS_PER_ROW * steps) + _ROUNDED_UP - 1e-3)
    return np.asarray(np.clip(limits, 0, 255), np.uint8)


assert SUMS_PER_ROW == 4  # products_at needs it
