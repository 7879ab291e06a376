"""Chooses which neighbouring segments to merge.

Owns the policy, as functions of sizes. Never reads or writes.

Method: size-tiered compaction of a log-structured merge-tree (O'Neil et al., "The log-structured merge-tree", 1996). Difference: only
neighbours are merged, so that rows keep their order. When the `fan` youngest neighbours are all of the same tier or below, they are merged
into one segment of the next tier. So a row is rewritten about log_fan(rows / seal_rows) times, and a gallery of n rows has at most fan *
log_fan(n / seal_rows) segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

DEAD_SHARE_MAX = 0.25  # a segment with a higher share of removed rows is rewritten


def due(counts: Sequence[int], dead: Sequence[int], seal_rows: int, fan: int, rows_max: int) -> slice | None:
    """The neighbouring segments to merge next, or None. counts: rows of each segment, oldest first; dead: removed rows of each segment;
    seal_rows: rows of a newly sealed segment; rows_max: the largest size of a merged segment."""
    tiers = [int(log(max(count, 1) / seal_rows, fan)) if count > seal_rows else 0 for count in counts]
    for tier in sorted(set(tiers)):
        start = len(tiers)
        while start and tiers[start - 1] <= tier and 2 * counts[start - 1] <= rows_max:
            start -= 1
        if len(tiers) - start >= fan:
            first = grouped(counts[start:], rows_max)[0]
            return slice(start + first.start, start + first.stop)
    for i, (count, removed) in enumerate(zip(counts, dead, strict=True)):
        if removed > DEAD_SHARE_MAX * count:
            return slice(i, i + 1)
    return None


def grouped(counts: Sequence[int], rows_max: int) -> list[slice]:
    """Divides neighbouring segments into groups of at most rows_max rows. A larger segment forms its own group."""
    groups, start, total = [], 0, 0
    for i, count in enumerate(counts):
        if total and total + count > rows_max:
            groups.append(slice(start, i))
            start, total = i, 0
        total += count
    return [*groups, slice(start, len(counts))] if counts else []
