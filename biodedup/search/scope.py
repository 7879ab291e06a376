"""Describes the rows that a search may return: from a row number on, and in groups of subjects.

Owns the count of these rows, and the query to a shard. Never searches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from biodedup.gallery.segments.part import Part
from biodedup.gallery.snapshot import Snapshot
from biodedup.search.shards.base import ShardQuery


@dataclass(frozen=True)
class Scope:
    """The rows of a search. from_row: the first row. groups: only rows in one of these groups; None: all rows. across: whether fingers are also
    compared with fingers of other labels. extra_k: number of additional rows to find, because so many rows may be removed from the result."""

    snapshot: Snapshot
    from_row: int = 0
    groups: frozenset[str] | None = None
    across: bool = False
    extra_k: int = 0

    @property
    def count(self) -> int:
        """The number of rows in scope, of all groups."""
        return sum(part.count - part.position_range(part.first_row, self.from_row)[1] for part in self._parts())

    def query(self, column: str, k: int, miss_risk: float) -> ShardQuery:
        return ShardQuery(column, k, self._total_rows(column), miss_risk, groups=self.groups, from_row=self.from_row)

    def _total_rows(self, column: str) -> int:
        """The number of rows in scope that have this column and are in one of the groups."""
        total = 0
        for part in self._parts():
            cells = part.columns.get(column)
            if cells is not None:
                low, high = cells.cell_range(*part.position_range(self.from_row, part.end_row))
                mask = None if self.groups is None else self.snapshot.mask(part, self.groups)
                total += high - low if mask is None else min(int(np.count_nonzero(mask)), high - low)
        return total

    def rows_with(self, bits: int, *, without: int) -> NDArray[np.int64]:
        """The rows that have a template in one of the columns `bits`, and no template in the columns `without`."""
        rows = [np.zeros(0, np.int64)]
        for part in self._parts():
            if not bits or not any(has & bits and not has & without for has in part.bits):
                continue
            low, _ = part.position_range(self.from_row, part.end_row)
            presence = part.presence(low, part.count)
            wanted = ((presence & bits) != 0) & ((presence & without) == 0)
            mask = self.snapshot.mask(part, self.groups)
            if mask is not None:
                wanted &= mask[low:]
            rows.append(part.rows(low + np.flatnonzero(wanted)))
        return np.concatenate(rows)

    def _parts(self) -> Iterator[Part]:
        return (part for part in self.snapshot.parts if part.end_row > self.from_row and part.count)
