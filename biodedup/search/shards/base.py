"""The interface of a shard: a part of the gallery that is searched on its own.

Owns the interface `Shard`, what a shard is asked (`ShardQuery`) and what it returns (`ShardHits`). Never searches and
never merges (`fan_out.py`).

A query asks for the k most similar rows of each probe, or for all rows of at least a similarity. It also says how many
rows all shards hold, so that a shard can foresee which similarity the k best rows reach.

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
    """What a shard is asked for.

    k: how many of the most similar rows, 0 for all; total_rows: rows of all shards; min_similarity: float32 (q,), rows
    of at least this similarity are wanted, or None: the shard chooses a value that the k best rows reach; miss_risk:
    the probability of missing a row that should be found, 0 for none; least: float32 (q,), of the k most similar rows
    only those of at least this similarity are wanted, None for all; groups: rows of one of these groups, None for
    all; from_row, end_row: the range of rows; skip_covered: rows that this multi-column query covers are left out; skip_columns: rows with one
    of these columns, a presence mask, are left out, too.
    """

    column: str
    k: int
    total_rows: int
    miss_risk: float
    min_similarity: Float32 | None = field(default=None, compare=False)
    least: Float32 | None = field(default=None, compare=False)
    groups: frozenset[str] | None = None
    from_row: int = 0
    end_row: int | None = None
    skip_covered: MultiColumnQuery | None = field(default=None, compare=False)
    skip_columns: int = 0

    def wanted(self, similarity: Float32) -> Float32:
        """These similarities, float32 (q,), but no lower than `least`."""
        return similarity if self.least is None else np.maximum(similarity, self.least)


@dataclass(frozen=True)
class ShardHits:
    """Rows that a shard found, in no order: probe number, row and exact similarity of each, (n,).

    complete_above: float32 (q,), the similarity above which no row is missing, but for the miss risk. compared: pairs
    that were compared exactly.
    """

    which: Int64
    rows: Int64
    similarity: Float32
    complete_above: Float32
    version: int
    rows_scanned: int
    compared: int = 0


class QueueFull(RetryableError):
    """A shard has too much to do. The whole search is refused, since an incomplete one would have to be done again."""


class Shard(Protocol):
    """A part of a gallery, in this process or elsewhere. Raises BiodedupError or OSError if it cannot search."""

    def search(self, probes: Float32, query: ShardQuery) -> ShardHits:
        """probes: float32 (q, d), unit rows."""

    def search_multicolumn(self, probes: Mapping[str, Float32], query: MultiColumnQuery) -> MultiColumnHits:
        """probes: for each column of the query float32 (q, d), unit rows."""
