"""The rows of a bulk load (a batch that is added without a search), in the form that the segment writer reads.

Owns the codes of the vectors while they are written. Never reads or writes the disk.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from biodedup.gallery.files.codec import Codec
from biodedup.gallery.files.codes import Codes
from biodedup.gallery.files.packed import Packed, empties, hashes
from biodedup.gallery.segments.new_cells import NewCells, presence_of
from biodedup.gallery.segments.part import PIECE_ROWS, Int64, ScannedRows, sorted_lookup
from biodedup.gallery.segments.stored_index import StoredIndex
from biodedup.gallery.segments.tail import TailAnswers
from biodedup.values import Float32


class NewRows:
    """Implements `Rows`. subject_ids: texts; cells: column -> its templates, at least one; group_sets: uint32 (n,)."""

    def __init__(self, subject_ids: Packed, cells: Mapping[str, NewCells], group_sets: NDArray[np.uint32]) -> None:
        self.first_row, self.count = 0, len(subject_ids)
        self.end_row = self.count
        self.columns = {name: NewColumn(some, self.count) for name, some in cells.items() if some.count}
        self.answers = TailAnswers({})
        self.repeated = np.zeros(0, np.uint64)
        self._subject_ids, self._group_sets = subject_ids, group_sets
        self._presence = presence_of(cells, self.count)

    @property
    def bits(self) -> Mapping[int, int]:
        counts = np.bincount(self._presence)
        return {bits: int(counts[bits]) for bits in np.flatnonzero(counts).tolist()}

    def rows(self, positions: Int64) -> Int64:
        return positions

    def presence(self, low: int, high: int) -> NDArray[np.uint16]:
        return self._presence[low:high]

    def group_sets(self, low: int, high: int) -> NDArray[np.uint32]:
        return self._group_sets[low:high]

    def subject_ids(self, low: int, high: int) -> Packed:
        return self._subject_ids.slice(low, high - low)

    def encounter_ids(self, low: int, high: int) -> Packed:
        return empties(min(high, self.count) - low)

    def lookup(self) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        return sorted_lookup(hashes(self._subject_ids))


class NewColumn:
    """A column of `NewRows`. Implements `Column`, as far as the writer needs it."""

    def __init__(self, cells: NewCells, row_count: int) -> None:
        self._cells = cells
        self.count = cells.count
        self.dimension = cells.dimension
        self.full = cells.count == row_count
        self.codec: Codec | None = None
        self.index: StoredIndex | None = None
        self.byte_counts = (0, 0)
        self._coded: tuple[Codec, Codes, Float32] | None = None

    def cell_range(self, low: int, high: int) -> tuple[int, int]:
        first, last = np.searchsorted(self._cells.positions, (low, high))
        return int(first), int(last)

    def positions(self, low: int, high: int) -> Int64:
        return self._cells.positions[low:high]

    def vectors(self, low: int, high: int) -> Float32:
        if self._cells.vectors is None:
            return np.zeros((min(high, self.count) - low, 0), np.float32)
        return self._cells.vectors[low:high]

    def coded(self, codec: Codec, low: int, high: int) -> tuple[Codes, Float32]:
        if self._coded is None or self._coded[0] is not codec:  # all cells: the writer reads them once for each array
            pieces = [codec.encode(self.vectors(at, at + PIECE_ROWS)) for at in range(0, self.count, PIECE_ROWS)]
            codes, norms = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
            self._coded = codec, codes, norms
        return self._coded[1][low:high], self._coded[2][low:high]

    def quality(self, low: int, high: int) -> Float32:
        return self._cells.quality[low:high]

    def minutiae(self, low: int, high: int) -> Packed:
        return self._cells.minutiae.slice(low, min(high, self.count) - low)

    # not used by the segment writer --------------------------------------------------------------------------------

    def cells_at(self, positions: Int64) -> Int64:
        raise NotImplementedError("new rows are read in order")

    def vectors_at(self, cells: Int64) -> Float32:
        raise NotImplementedError("new rows are read in order")

    def scanned(self, low: int, high: int) -> ScannedRows:
        raise NotImplementedError("new rows are not searched")

    def codes_at(self, cells: Int64) -> tuple[Codes, Float32]:
        raise NotImplementedError("new rows are not searched")

    def release(self, *, forget: bool) -> None:
        pass

    def minutiae_at(self, cells: Int64) -> list[bytes]:
        raise NotImplementedError("new rows are read in order")
