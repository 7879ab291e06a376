"""Rows that meet in caps: one step of a join by `caps.py`.

Owns the path from some caps to pairs of rows that are worth an exact comparison.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from biodedup.gallery.files.codec import Codec
from biodedup.gallery.segments.part import Int64, Part
from biodedup.gallery.snapshot import Snapshot
from biodedup.search.native import pair_kernel as member_kernel
from biodedup.search.native.scanner import Probes, Scanner, Unit
from biodedup.search.selfjoin.buckets import Caps


def rows_outside(snapshot: Snapshot, column: str, caps: Caps, rows: Int64) -> Int64:
    """Rows of other parts than those that caps divide. They have to be compared with everybody."""
    inside = np.zeros(len(rows), bool)
    for part in divided(snapshot, column, caps.codec):
        inside |= (rows >= part.first_row) & (rows < part.end_row)
    return rows[~inside]


def divided(snapshot: Snapshot, column: str, codec: Codec) -> list[Part]:
    """Parts whose column is of a codec: caps divide them together."""
    found = []
    for part in snapshot.parts:
        mine = part.columns[column].codec if column in part.columns else None
        if mine is not None and mine.codec_id == codec.codec_id:
            found.append(part)
    return found


def meet(scanner: Scanner, snapshot: Snapshot, column: str, caps: Caps, some: slice) -> tuple[Int64, Int64]:
    """Pairs of live rows that share one of some caps, and may be as similar as the caps are made for: (the lower, the higher row) of
    each, ascending; each once."""
    parts = divided(snapshot, column, caps.codec)
    columns = [part.columns[column] for part in parts]
    units = [
        Unit(c, i, 0, c.count, snapshot.live_bits(part, c))
        for i, (part, c) in enumerate(zip(parts, columns, strict=True))
    ]
    probes = Probes(caps.codec, caps.directions[some])
    hits = scanner.above(units, probes, caps.least[some], most=sum(c.count for c in columns))
    # a single number to sort by, which takes a tenth of the time
    members = np.sort((hits.which.astype(np.int64) << 48) | (hits.number.astype(np.int64) << 32) | hits.cell)
    numbers, cells = (members >> 32 & 0xFFFF).astype(np.int32), (members & 0xFFFFFFFF).astype(np.int32)
    edges = np.searchsorted(members, np.arange(len(probes.codes) + 1) << 48)
    planes = [c.high_nibbles(0, c.count) for c in columns]
    pairs = [np.zeros((2, 0), np.int64)]

    def compare(cap: tuple[int, int]) -> None:
        low, high = cap
        one, other = member_kernel.meet(
            planes, numbers[low:high], cells[low:high], caps.signs.tables, caps.sign_cut, caps.cut
        )[:2]
        pairs.append(members[low:high][np.stack([one, other])] & 0xFFFF_FFFF_FFFF)

    scanner.run(compare, [(low, high) for low, high in pairwise(edges.tolist()) if high - low > 1])
    ends, inverse = np.unique(np.concatenate(pairs, axis=1), return_inverse=True)
    rows = np.empty(len(ends), np.int64)
    for number, (part, c) in enumerate(zip(parts, columns, strict=True)):
        mine = ends >> 32 == number
        at = ends[mine] & 0xFFFFFFFF
        rows[mine] = part.rows(at if c.full else c.positions(0, c.count)[at])
    found = np.unique(np.sort(rows[inverse].T.reshape(-1, 2), axis=1), axis=0)
    return found[:, 0], found[:, 1]
