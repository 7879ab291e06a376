"""Collects the pairs of a step of a self-join in bounded memory, also if many records are similar to each other (a crowd).

Owns the choice of the pairs of a crowd that are kept (`clusters.kept_links`). Never computes a score. The pairs of a row with many pairs are
stored as four numbers each and thinned; the kept pairs are compared once more at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from math import log10

import numpy as np
from numpy.typing import NDArray

from biodedup.match.judgement import TRUSTED_KINDS, kinds_of
from biodedup.match.ranked import Comparison, Ranked
from biodedup.search.clusters import kept_links

RowPair = tuple[int, Comparison]
"""A row, and its comparison with another row."""

ROW_PAIRS_MAX = 64
"""Greatest number of pairs of a row that does not belong to a crowd."""
_THINNED_AT = 1 << 14


@dataclass(frozen=True)
class FoundPairs:
    """pairs: pairs of rows that reach the threshold, each once. left_out: a row -> the number of pairs of its crowd that are left out."""

    pairs: list[RowPair]
    left_out: Mapping[int, int] = field(default_factory=dict)


class PairCollector:
    """The pairs of a step. compare: compares a row with other rows again. siblings: row -> the rows of its subject. kinds: whether pairs may have
    different kinds, as pairs of rows with several captures."""

    def __init__(
        self,
        compare: Callable[[int, NDArray[np.int64]], Ranked],
        siblings: Callable[[int], Collection[int]],
        threshold_db: float,
        *,
        kinds: bool,
    ) -> None:
        self._compare, self._siblings = compare, siblings
        self._threshold_db, self._kinds = threshold_db, kinds
        self._few: list[RowPair] = []
        self._many: list[NDArray[np.float64]] = []
        self._held = 0
        self._thinned_at = _THINNED_AT
        self._left_out: dict[int, int] = {}

    def add(self, row: int, compared: Ranked) -> None:
        """Adds a row's pairs."""
        count = int(np.count_nonzero(compared.score_db >= self._threshold_db))
        if count <= ROW_PAIRS_MAX:
            self._few += [(row, comparison) for comparison in compared.reaching(self._threshold_db)]
            return
        scores = compared.score_db[:count] - 10 * log10(
            len(self._siblings(row))
        )  # the penalty for the rows of the subject, as in a comparison
        classes = compared.extrapolated()[:count].astype(np.float64)
        if self._kinds:
            kinds = [kinds_of([pair], self._threshold_db, self._threshold_db)[0] for pair in compared[:count]]
            classes += [2.0 * (kind in TRUSTED_KINDS) for kind in kinds]
        held = np.stack([np.full(count, float(row)), compared.rows[:count], scores, classes])
        self._many.append(held[:, scores >= self._threshold_db])
        self._held += count
        if self._held >= self._thinned_at:
            self._thin()

    def found(self) -> FoundPairs:
        """All pairs, of crowds the kept pairs. A pair that was found from both sides counts once, with its higher score."""
        pairs: dict[tuple[int, int], RowPair] = {}

        def keep(row: int, comparison: Comparison) -> None:
            key = min(row, comparison.row), max(row, comparison.row)
            if key not in pairs or self._score_db(row, comparison) > self._score_db(*pairs[key]):
                pairs[key] = row, comparison

        for row, comparison in self._few:
            keep(row, comparison)
        if self._many:
            row_of, other = self._thin()[:2].astype(np.int64)
            order = np.argsort(row_of, kind="stable")
            rows, starts = np.unique(row_of[order], return_index=True)
            for row, others in zip(rows.tolist(), np.split(other[order], starts[1:]), strict=True):
                for comparison in self._compare(row, np.sort(others)).reaching(self._threshold_db):
                    keep(row, comparison)
        return FoundPairs(list(pairs.values()), self._left_out)

    def _score_db(self, row: int, comparison: Comparison) -> float:
        """The score of a pair, less the penalty for the rows of the probe's subject, each of which is tried."""
        return comparison.score_db - 10 * log10(len(self._siblings(row)))

    def _thin(self) -> NDArray[np.float64]:
        """Drops pairs of crowds; returns (row, other row, score, class) of the kept pairs, float64 (4, n)."""
        held = np.concatenate(self._many, axis=1)
        ends = np.sort(held[:2].astype(np.int64), axis=0)
        order = np.lexsort((-held[2], held[3], ends[1], ends[0]))
        keys = np.stack([*ends, held[3].astype(np.int64)])[:, order]
        unique = order[(np.diff(keys, axis=1, prepend=-1) != 0).any(axis=0)]  # a pair may be found from both sides
        held, ends = held[:, unique], ends[:, unique]
        keep, component = kept_links(ends.T, held[2], held[3].astype(np.int64))
        dropped = np.bincount(component[~keep], minlength=1)
        named: dict[int, int] = {}
        for number, row in zip(component[keep].tolist(), ends[0, keep].tolist(), strict=True):
            named.setdefault(number, row)
        for number in np.flatnonzero(dropped).tolist():
            row = named[number]
            self._left_out[row] = self._left_out.get(row, 0) + int(dropped[number])
        held = held[:, keep]
        self._many, self._held = [held], held.shape[1]
        self._thinned_at = max(2 * self._held, _THINNED_AT)
        return held
