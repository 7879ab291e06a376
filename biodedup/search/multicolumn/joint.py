"""Compares every row of the journal with a probe in all of the probe's columns, and adds up the evidence.

Owns the exact comparison of rows that have no codes yet. Never reads the disk.

1. The llr_db of all columns that a row and the probe share are added up. The result has the k rows with the largest sums, and all rows that
   reach the floor.
2. It also has rows with a lone finger: a finger that reaches `lone_db` although the other captures disagree; at most k rows per probe.
3. Rows with fewer than two of the columns are left out. They are searched column by column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from biodedup.gallery.segments.part import Column, Int64, Part
from biodedup.gallery.snapshot import Snapshot
from biodedup.search.multicolumn.plan import MultiColumnQuery
from biodedup.search.native.scanner import Scanner
from biodedup.values import BIT, Float32

_PIECE_ROWS = 2_048
"""Rows in a thread's unit of work: some milliseconds."""


@dataclass(frozen=True)
class JointPlan:
    """The plan for the rows of the journal. rows: their number. lone_rows: expected number of impostors' rows that are candidates because of
    each finger alone. missed: of lone fingers that reach the duplicate threshold, the share whose rows are not candidates."""

    columns: tuple[str, ...]
    rows: int
    lone_rows: int
    missed: float


class JointHits(NamedTuple):
    """As `MultiColumnHits`, of a single part. scanned: number of compared rows."""

    which: Int64
    rows: Int64
    llr_db: Float32
    lone: NDArray[np.bool_]
    scanned: int


def search(
    scanner: Scanner, snapshot: Snapshot, part: Part, probes: Mapping[str, Float32], query: MultiColumnQuery
) -> JointHits:
    """The hits in a part of the journal. probes: column -> float32 (q, d), unit rows."""
    first, _ = part.position_range(query.from_row, part.end_row)
    presence = part.presence(first, part.count)
    compared = np.bitwise_count(presence & np.uint16(sum(BIT[column] for column in query.columns))) > 1
    mask = snapshot.mask(part, query.groups)
    if mask is not None:
        compared &= mask[first:]
    columns = {name: part.columns[name] for name in query.columns if name in part.columns}
    llr_db = np.zeros((len(next(iter(probes.values()))), len(compared)), np.float32)
    lone_db = np.full(llr_db.shape, -np.inf, np.float32)

    def work(low: int) -> None:
        piece = slice(low, low + _PIECE_ROWS)
        for name, column in columns.items():
            from_db = np.float32(query.lone_db.get(name, np.inf))
            positions, vectors = _cells(column, first + low, min(first + low + _PIECE_ROWS, part.count))
            table = query.llr_tables[name].llr_db
            sums_db, lone = llr_db[:, piece], lone_db[:, piece]
            _add(vectors, positions, probes[name], table, from_db, sums_db=sums_db, lone_db=lone)

    pieces = range(0, len(compared), _PIECE_ROWS)
    if len(pieces) > 1:
        scanner.run(work, pieces)
    elif pieces:
        work(0)
    llr_db[:, ~compared] = lone_db[:, ~compared] = -np.inf
    kept = _largest(llr_db, query.k) | (llr_db >= query.floor_llr_db)
    lone = _largest(lone_db, query.k)
    which, at = np.nonzero(kept | lone)
    return JointHits(which, part.rows(first + at), llr_db[which, at], lone[which, at], int(np.count_nonzero(compared)))


def _cells(column: Column, low: int, high: int) -> tuple[Int64, Float32]:
    """(positions, vectors) of a column's cells in rows [low, high) of the part. positions: of their rows, from low on."""
    first, last = column.cell_range(low, high)
    return column.positions(first, last) - low, column.vectors(first, last)


def _largest(values: Float32, k: int) -> NDArray[np.bool_]:
    """A mask of the k largest values of each row, and of values equal to the k-th; minus infinity is never set. values: float32 (q, n)."""
    count = values.shape[1]
    if not k or not count:
        return np.zeros(values.shape, bool)
    kth = np.partition(values, count - k, axis=1)[:, count - k, None] if k < count else -np.inf
    return (values >= kth) & (values > -np.inf)


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "nsz", "contract"})
def _add(vectors: Any, positions: Any, probes: Any, table: Any, from_db: Any, sums_db: Any, lone_db: Any) -> None:
    """Adds the llr_db of a column's cells to the sums of their rows, and writes llr_db of at least from_db into lone_db. sums_db, lone_db:
    float32 (q, n)."""
    last = table.shape[0] - 1
    half = np.float32(last) / np.float32(2)
    for i in range(vectors.shape[0]):
        for probe in range(probes.shape[0]):
            similarity = np.float32(0)
            for j in range(vectors.shape[1]):
                similarity += vectors[i, j] * probes[probe, j]
            at = int(np.rint((similarity + np.float32(1)) * half))
            llr_db = table[min(max(at, 0), last)]
            sums_db[probe, positions[i]] += llr_db
            if llr_db >= from_db:
                lone_db[probe, positions[i]] = max(lone_db[probe, positions[i]], llr_db)
