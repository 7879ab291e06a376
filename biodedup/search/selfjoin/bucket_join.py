"""Finds the pairs of rows that share an LSH bucket and may be similar enough (bucket join).

Owns a step of a self-join: from some buckets to the pairs of rows for the exact comparison. Never chooses buckets (`buckets.py`), and never
compares exactly.
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
    """The rows that are in parts without buckets. They are compared with all rows."""
    covered = np.zeros(len(rows), bool)
    for part in parts_with_codec(snapshot, column, buckets.codec):
        covered |= (rows >= part.first_row) & (rows < part.end_row)
    return rows[~covered]


def parts_with_codec(snapshot: Snapshot, column: str, codec: Codec) -> list[Part]:
    """The parts whose column has this codec. A set of buckets covers all of them."""
    parts = []
    for part in snapshot.parts:
        of_part = part.columns[column].codec if column in part.columns else None
        if of_part is not None and of_part.codec_id == codec.codec_id:
            parts.append(part)
    return parts


def join_buckets(
    scanner: Scanner, snapshot: Snapshot, column: str, buckets: Buckets, step: slice
) -> tuple[Int64, Int64]:
    """(lower rows, higher rows) of the pairs of live rows that share a bucket and may be similar enough, ascending, each pair once. step: the
    buckets."""
    parts = parts_with_codec(snapshot, column, buckets.codec)
    columns = [part.columns[column] for part in parts]
    units = [
        Unit(c, i, 0, c.count, snapshot.live_bits(part, c))
        for i, (part, c) in enumerate(zip(parts, columns, strict=True))
    ]
    probes = Probes(buckets.codec, buckets.directions[step])
    most = sum(c.count for c in columns)
    hits = scanner.above(units, probes.untabled(), buckets.min_similarity[step], most=most)
    # a single sort key is ten times as fast as three
    members = np.sort((hits.which.astype(np.int64) << 48) | (hits.number.astype(np.int64) << 32) | hits.cell)
    numbers, cells = (members >> 32 & 0xFFFF).astype(np.int32), (members & 0xFFFFFFFF).astype(np.int32)
    edges = np.searchsorted(members, np.arange(len(probes.codes) + 1) << 48)
    stored = [c.scanned(0, c.count) for c in columns]
    pairs = [np.zeros((2, 0), np.int64)]

    def compare(bucket: tuple[int, int]) -> None:
        low, high = bucket
        earlier, later = pair_kernel.similar_pairs(
            stored, numbers[low:high], cells[low:high], buckets.signs.tables, buckets.sign_cut, buckets.cut
        )[:2]
        pairs.append(members[low:high][np.stack([earlier, later])] & 0xFFFF_FFFF_FFFF)

    scanner.run(compare, [(low, high) for low, high in pairwise(edges.tolist()) if high - low > 1])
    ends, inverse = np.unique(np.concatenate(pairs, axis=1), return_inverse=True)
    rows = np.empty(len(ends), np.int64)
    for number, (part, c) in enumerate(zip(parts, columns, strict=True)):
        of_part = ends >> 32 == number
        at = ends[of_part] & 0xFFFFFFFF
        rows[of_part] = part.rows(at if c.full else c.positions(0, c.count)[at])
    unique = np.unique(np.sort(rows[inverse].T.reshape(-1, 2), axis=1), axis=0)
    return unique[:, 0], unique[:, 1]
