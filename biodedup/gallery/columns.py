"""What a search reads: vectors and row states, in memory.

Owns append-only arrays that readers use while one writer appends. Never touches the disk.

1. A reader takes `count` rows from a snapshot and sees exactly these: appended rows lie behind them, and growth copies
   into a new array, leaving the old one to its readers.
2. Only the writer appends, rolls back or marks; the gallery's lock sees to that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from biodedup.values import Float32


class GrowingArray:
    """An array with spare capacity along its first axis."""

    def __init__(self, dtype: type[np.generic], width: int | None = None) -> None:
        shape = (1024,) if width is None else (1024, width)
        self._data: NDArray[Any] = np.zeros(shape, dtype)
        self.count = 0

    def append(self, values: NDArray[Any]) -> None:
        needed = self.count + len(values)
        if needed > len(self._data):
            grown = np.zeros((max(needed, 2 * len(self._data)), *self._data.shape[1:]), self._data.dtype)
            grown[: self.count] = self._data[: self.count]
            self._data = grown
        self._data[self.count : needed] = values
        self.count = needed

    def view(self, count: int | None = None) -> NDArray[Any]:
        return self._data[: self.count if count is None else count]


class VectorColumn:
    """The embeddings of one column. Cell i belongs to row `rows[i]`; rows ascend."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self._vectors = GrowingArray(np.float32, dimension)
        self._rows = GrowingArray(np.int64)

    def append(self, rows: NDArray[np.int64], vectors: Float32) -> None:
        self._vectors.append(vectors)
        self._rows.append(rows)

    def between(self, low: int, high: int) -> tuple[NDArray[np.int64], Float32]:
        """Rows int64 (n,) and vectors float32 (n, d) of the cells whose row lies in [low, high)."""
        rows = self._rows.view()
        first, last = np.searchsorted(rows, (low, high))
        return rows[first:last], self._vectors.view(len(rows))[first:last]

    def at(self, wanted: NDArray[np.int64]) -> tuple[NDArray[np.bool_], Float32]:
        """present bool (m,) and vectors float32 (m, d), zero where absent, for the wanted rows."""
        rows = self._rows.view()
        vectors = np.zeros((len(wanted), self.dimension), np.float32)
        if not len(rows):
            return np.zeros(len(wanted), bool), vectors
        cells = np.minimum(np.searchsorted(rows, wanted), len(rows) - 1)
        present = rows[cells] == wanted
        vectors[present] = self._vectors.view(len(rows))[cells[present]]
        return present, vectors

    def truncate(self, row_count: int) -> None:
        """Forgets the cells of rows from row_count on."""
        cells = int(np.searchsorted(self._rows.view(), row_count))
        self._rows.count = self._vectors.count = cells
