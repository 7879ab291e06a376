"""Defines the interface of a shard: a part of the gallery that is searched separately.

Owns the interface `Shard`, its query (`ShardQuery`) and its result (`ShardHits`). Never searches and never merges (`fan_out.py`).

A query asks for the k most similar rows of each probe, or for all rows of at least a similarity. It also states the number of rows of all
shards, so that a shard can predict the similarity that the k best rows reach.

Invariant: a shard returns every row above `complete_above`, except with a probability of `miss_risk`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from biodedup.errors import RetryableError
from biodedup.gallery.segments.part import Int64
from biodedup.search.multicolumn.plan import MultiColumnHits, MultiColumnQuery
from biodedup.values import Float32


@dataclass(frozen=True)
class ShardQuery:
    """The query to a shard.

    k: the number of most similar rows, 0 for all rows of at least min_similarity. total_rows: the rows of all shards. min_similarity: float32
    (q,), or None: the shard chooses a value that the k best rows reach. miss_risk: the accepted probability of missing a row; 0: none.
    floor_similarity: float32 (q,), of the k most similar rows only those of at least this similarity are wanted; None: all. groups: only rows
    in one of these groups; None: all rows. from_row, end_row: the range of rows. skip_covered: rows that this multi-column query covers are
    left out. skip_columns: rows with one of these columns, a presence mask, are left out.
    """

    column: str
    k: int
    total_rows: int
    miss_risk: float
    min_similarity: Float32 | None = field(default=None, compare=False)
    floor_similarity: Float32 | None = field(default=None, compare=False)
    groups: frozenset[str] | None = None
    from_row: int = 0
    end_row: int | None = None
    skip_covered: MultiColumnQuery | None = field(default=None, compare=False)
    skip_columns: int = 0

    def wanted(self, similarity: Float32) -> Float32:
        """The larger of these similarities and `floor_similarity`, float32 (q,)."""
        return similarity if self.floor_similarity is None else np.maximum(similarity, self.floor_similarity)


@dataclass(frozen=True)
class ShardHits:
    """The rows that a shard found, unordered. which, rows, similarity: probe number, row and exact similarity of each hit, (n,).

    complete_above: float32 (q,), the similarity above which no row is missing, except by the miss risk. compared: number of pairs that were
    compared exactly.
    """

    which: Int64
    rows: Int64
    similarity: Float32
    complete_above: Float32
    version: int
    rows_scanned: int
    compared: int = 0


class QueueFull(RetryableError):
    """A shard has too many waiting searches. The whole search is refused, because an incomplete search would have to be repeated."""


class Shard(Protocol):
    """A part of a gallery, in this process or in another. Its methods raise BiodedupError or OSError if it cannot search."""

    def search(self, probes: Float32, query: ShardQuery) -> ShardHits:
        """The hits in a column. probes: float32 (q, d), unit rows."""

    def search_multicolumn(self, probes: Mapping[str, Float32], query: MultiColumnQuery) -> MultiColumnHits:
        """The hits in several columns. probes: column -> float32 (q, d), unit rows."""
