"""Rows that join_buckets in buckets: one step of a join by `buckets.py`.

Owns the path from some buckets to pairs of rows that are worth an exact comparison.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from biodedup.gallery.files.codec import Codec
from biodedup.gallery.segments.part import Int64, Part
from biodedup.gallery.snapshot import Snapshot
from biodedup.search.native import pair_kernel
from biodedup.search.native.scanner import Probes, Scanner, Unit
from biodedup.search.selfjoin.buckets import Buckets


def rows_outside(snapshot: Snapshot, column: str, buckets: Buckets, rows: Int64) -> Int64:
    """Rows of other parts than those that buckets divide. They have to be compared with everybody."""
    inside = np.zeros(len(rows), bool)
    for part in parts_with_codec(snapshot, column, buckets.codec):
        inside |= (rows >= part.first_row) & (rows < part.end_row)
    return rows[~inside]


def parts_with_codec(snapshot: Snapshot, column: str, codec: Codec) -> list[Part]:
    """Parts whose column is of a codec: buckets divide them together."""
    found = []
    for part in snapshot.parts:
        mine = part.columns[column].codec if column in part.columns else None
        if mine is not None and mine.codec_id == codec.codec_id:
            found.append(part)
    return found


def join_buckets(
    scanner: Scanner, snapshot: Snapshot, column: str, buckets: Buckets, some: slice
) -> tuple[Int64, Int64]:
    """Pairs of live rows that share one of some buckets, and may be as similar as the buckets are made for: (the lower, the higher row) of
    each, ascending; each once."""
    parts = parts_with_codec(snapshot, column, buckets.codec)
    columns = [part.columns[column] for part in parts]
    units = [
        Unit(c, i, 0, c.count, snapshot.live_bits(part, c))
        for i, (part, c) in enumerate(zip(parts, columns, strict=True))
    ]
    probes = Probes(buckets.codec, buckets.directions[some])
    hits = scanner.above(units, probes, buckets.least[some], most=sum(c.count for c in columns))
    # a single number to sort by, which takes a tenth of the time
    members = np.sort((hits.which.astype(np.int64) << 48) | (hits.number.astype(np.int64) << 32) | hits.cell)
    numbers, cells = (members >> 32 & 0xFFFF).astype(np.int32), (members & 0xFFFFFFFF).astype(np.int32)
    edges = np.searchsorted(members, np.arange(len(probes.codes) + 1) << 48)
    planes = [c.high_nibbles(0, c.count) for c in columns]
    pairs = [np.zeros((2, 0), np.int64)]

    def compare(bucket: tuple[int, int]) -> None:
        low, high = bucket
        one, other = pair_kernel.similar_pairs(
            planes, numbers[low:high], cells[low:high], buckets.signs.tables, buckets.sign_cut, buckets.cut
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
