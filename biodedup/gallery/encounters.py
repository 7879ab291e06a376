"""Chooses which encounters of a subject are kept: those of high quality, spread over time.

Owns the choice. Never removes a row.

1. The first row stays, so that no sequence of updates leads from one person to another and forgets the person who was enrolled. The
   newest stays, and every row that alone has a template in some column, so that no searchable column is lost. If only one row may be
   kept, it is the newest.
2. Of the others the one of the least quality goes; of equal ones the one that is nearest in time to a neighbour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from biodedup.gallery.answers import parsed
from biodedup.gallery.snapshot import Snapshot
from biodedup.values import COLUMNS

_QUALITY_STEP = 0.05  # qualities that differ by less count as equal, so that time decides


def kept_rows(snapshot: Snapshot, rows: Sequence[int], most: int) -> list[int]:
    """So many of a subject's rows, ascending; more where each has a column of its own."""
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
    """The mean over a row's templates, 0 to 1; of what was not measured, 0.5."""
    measured = [float(snapshot.quality([row], column)[0]) for column in sorted(columns)]
    return float(np.mean([0.5 if np.isnan(value) else value for value in measured]))


def _times(snapshot: Snapshot, rows: Sequence[int]) -> dict[int, float]:
    """When each row's encounter was decided, in seconds; rows that were loaded without one count in their order."""
    times: dict[int, float] = {}
    for row, encounter_id in zip(rows, snapshot.encounter_ids(rows), strict=True):
        answer = snapshot.answer(encounter_id) if encounter_id else None
        told = {} if answer is None else parsed(answer.text)
        times[row] = float(told.get("decided_at", 0.0))
    return times


def _gap(rows: Sequence[int], times: Mapping[int, float], row: int) -> float:
    """How far the nearest of its neighbours is in time."""
    at = rows.index(row)
    neighbours = [rows[i] for i in (at - 1, at + 1) if 0 <= i < len(rows)]
    return min((abs(times[row] - times[other]) for other in neighbours), default=np.inf)
