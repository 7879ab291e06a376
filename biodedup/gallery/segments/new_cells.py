"""The templates of a bulk load (a batch that is added without a search), as arrays: for each column its rows, vectors, minutiae and
qualities.

Owns these arrays. Never makes a Python object for each cell, and never reads or writes the disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from biodedup.gallery.files.packed import Packed, empties, to_arrays
from biodedup.gallery.segments.part import Int64
from biodedup.values import COLUMNS, Float32


@dataclass(frozen=True, eq=False)
class NewCells:
    """The templates of one column. positions: of the rows with a template, int64 (m,), ascending; vectors: float32 (m, d), unit rows, None
    in a column of minutiae only; minutiae: m records in the stored form, empty for a cell without one; quality: float32 (m,), on the scale
    of files, NaN if it was not measured."""

    model_id: str
    positions: Int64
    vectors: Float32 | None
    minutiae: Packed
    quality: Float32

    @property
    def count(self) -> int:
        return len(self.positions)

    @property
    def dimension(self) -> int | None:
        return None if self.vectors is None else int(self.vectors.shape[1])

    @property
    def has_minutiae(self) -> bool:
        return bool(self.count) and bool(to_arrays(self.minutiae)[0][-1])

    def digested(self, count: int) -> Iterator[bytes | memoryview]:
        """The input for a digest of `count` rows. For a column of only vectors, or only records, it is the input of releases before 0.3."""
        offsets, records = to_arrays(self.minutiae)
        plain = bool(np.isnan(self.quality).all())
        if self.vectors is None and plain:
            lengths = np.zeros(count, np.int64)
            lengths[self.positions] = np.diff(offsets)
            yield repr(lengths.tolist()).encode()
            yield records.data
            return
        if self.vectors is not None:
            yield np.ascontiguousarray(self.vectors).data
        if len(records) or self.count < count or not plain:
            for array in (self.positions, offsets, records, self.quality):
                yield np.ascontiguousarray(array).data

    def at(self, rows: Int64, count: int) -> NewCells:
        """The cells of some of `count` rows, ascending. The positions are renumbered: the first of these rows gets position 0."""
        if len(rows) == count:
            return self
        moved = np.full(count, -1)
        moved[rows] = np.arange(len(rows))
        chosen = np.flatnonzero(moved[self.positions] >= 0)
        return replace(
            self,
            positions=moved[self.positions[chosen]],
            vectors=None if self.vectors is None else self.vectors[chosen],
            minutiae=self.minutiae.take(pa.array(chosen)),
            quality=self.quality[chosen],
        )


def vectors_alone(model_id: str, vectors: Float32) -> NewCells:
    """A column in which every row has a vector, and no row has minutiae."""
    count = len(vectors)
    return NewCells(model_id, np.arange(count), vectors, empties(count), np.full(count, np.nan, np.float32))


def records_alone(model_id: str, records: Packed) -> NewCells:
    """A column of minutiae records: one for each row, empty for a row without one."""
    has = np.flatnonzero(np.diff(to_arrays(records)[0]) > 0)
    return NewCells(model_id, has, None, records.take(pa.array(has)), np.full(len(has), np.nan, np.float32))


def presence_of(cells: Mapping[str, NewCells], count: int) -> NDArray[np.uint16]:
    """The presence of each row, uint16 (count,): bit c is set if the row has a template in COLUMNS[c]."""
    presence = np.zeros(count, np.uint16)
    for name, some in cells.items():
        presence[some.positions] |= np.uint16(1 << COLUMNS.index(name))
    return presence
