"""Computes the counters of a gallery from its rows, for `doctor`.

Never reads the disk and never writes.

`row_count` is exact. The others must be at least as high as they ever were: searches refer to `version`, and files are named by
`next_segment`.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from biodedup.gallery.catalogue.sqlite import State
from biodedup.gallery.segments.layout import SegmentEntry


@dataclass(frozen=True)
class CounterSources:
    """What a gallery holds. journal_rows: rows of the journal, ascending; versions: of each removal that is still noted; changes:
    answers, steps of jobs and verdicts, each of which may have been a version of its own."""

    entries: Sequence[SegmentEntry]
    journal_rows: Sequence[int]
    versions: Sequence[int]
    changes: int


def recomputed(known: State | None, sources: CounterSources) -> State:
    """The counters that agree with what is held; `known` itself where it does. known: None where they are lost."""
    ends = [entry.end_row for entry in sources.entries] + [row + 1 for row in sources.journal_rows[-1:]]
    row_count = max(ends, default=0)
    least = max(sources.versions, default=0)
    if known is None:  # no content has had more versions than that
        most = row_count + len(sources.versions) + sources.changes
        known = State(version=most, commits=most)
    counted = replace(
        known,
        version=max(known.version, least),
        row_count=row_count,
        next_segment=max(known.next_segment, *(entry.number + 1 for entry in sources.entries), 1),
    )
    return counted if counted == known else replace(counted, commit_id=secrets.token_hex(8))
