"""Chooses which encounters of a subject are kept: the encounters of high quality, spread over time.

Owns the choice. Never removes a row.

1. The first row is kept, so that a sequence of updates cannot lead from one person to another. The newest row is kept. A row that is the
   only one with a template in some column is kept, so that no searchable column is lost. If only one row may be kept, it is the newest.
2. Of the other rows, the row of the lowest quality is removed first; among equal ones, the row nearest in time to a neighbour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from biodedup.gallery.answers import parsed
from biodedup.gallery.snapshot import Snapshot
from biodedup.values import COLUMNS

_QUALITY_STEP = 0.05  # qualities are compared in these steps; in the same step, time decides


def kept_rows(snapshot: Snapshot, rows: Sequence[int], most: int) -> list[int]:
    """The rows of a subject to keep, ascending: `most` rows, or more if every row is the only one with some column."""
    kept = sorted(rows)
    columns = dict(zip(kept, map(_columns, snapshot.presence(kept).tolist()), strict=True))
    quality = {row: _quality(snapshot, row, columns[row]) for row in kept}
    times = _times(snapshot, kept)
    while len(kept) > most:
        older = kept[1:-1] if most > 1 else kept[:-1]
        redundant = [row for row in older if columns[row] <= set().union(*(columns[o] for o in kept if o != row))]
        if not redundant:
            break
        kept.remove(min(redundant, key=lambda row: (quality[row] // _QUALITY_STEP, _gap(kept, times, row), row)))
    return kept


def _columns(presence: int) -> frozenset[str]:
    return frozenset(column for bit, column in enumerate(COLUMNS) if presence >> bit & 1)


def _quality(snapshot: Snapshot, row: int, columns: frozenset[str]) -> float:
    """The mean quality of a row's templates, 0 to 1; 0.5 stands for a quality that was not measured."""
    measured = [float(snapshot.quality([row], column)[0]) for column in sorted(columns)]
    return float(np.mean([0.5 if np.isnan(value) else value for value in measured]))


def _times(snapshot: Snapshot, rows: Sequence[int]) -> dict[int, float]:
    """row -> the time when its encounter was decided, in seconds since 1970; 0 for rows that were loaded without an encounter."""
    times: dict[int, float] = {}
    for row, encounter_id in zip(rows, snapshot.encounter_ids(rows), strict=True):
        answer = snapshot.answer(encounter_id) if encounter_id else None
        fields = {} if answer is None else parsed(answer.text)
        times[row] = float(fields.get("decided_at", 0.0))
    return times


def _gap(rows: Sequence[int], times: Mapping[int, float], row: int) -> float:
    """The distance in time to the nearest neighbour of a row, in seconds."""
    at = rows.index(row)
    neighbours = [rows[i] for i in (at - 1, at + 1) if 0 <= i < len(rows)]
    return min((abs(times[row] - times[other]) for other in neighbours), default=np.inf)
