"""Computes the counters of a gallery from its rows, for `biodedup doctor --repair`.

Never reads the disk and never writes.

`row_count` is exact. The other counters are never lower than they were before: search results refer to `version`, and `next_segment` names
files.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from biodedup.gallery.catalogue.sqlite import State
from biodedup.gallery.segments.layout import SegmentEntry


@dataclass(frozen=True)
class CounterSources:
    """What the counters are computed from. entries: the segments; journal_rows: rows of the journal, ascending; versions: the version of
    each removal that a tombstone records; changes: the number of answers, job steps and verdicts, each of which may have made a version."""

    entries: Sequence[SegmentEntry]
    journal_rows: Sequence[int]
    versions: Sequence[int]
    changes: int


def recomputed(known: State | None, sources: CounterSources) -> State:
    """The counters that agree with the rows; `known` itself if it agrees. known: the stored counters, None if they are lost."""
    ends = [entry.end_row for entry in sources.entries] + [row + 1 for row in sources.journal_rows[-1:]]
    row_count = max(ends, default=0)
    least = max(sources.versions, default=0)
    if known is None:  # an upper bound: each row, removal and change makes at most one version
        most = row_count + len(sources.versions) + sources.changes
        known = State(version=most, commits=most)
    counted = replace(
        known,
        version=max(known.version, least),
        row_count=row_count,
        next_segment=max(known.next_segment, *(entry.number + 1 for entry in sources.entries), 1),
    )
    return counted if counted == known else replace(counted, commit_id=secrets.token_hex(8))
