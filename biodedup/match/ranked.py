"""Scores and ranks one probe's comparisons with many candidates, as arrays.

Owns the sums of evidence, their calibration, and the ranking. Never measures a similarity and never decides. No code here loops over
rows: a `Comparison` object is made only for the rows that a caller reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isnan
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from biodedup.match.calibration import SCORE_DB_MAX, Calibration
from biodedup.match.calibrations import WithMinutiae
from biodedup.match.fusion import bounded, measured_db, score_db_of_steps, steps_of
from biodedup.match.labels import Pair
from biodedup.values import Evidence

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]


@dataclass(frozen=True)
class Comparison:
    """One candidate's result. evidence: one entry for each capture that could be compared; label_penalty_db: the penalty on both sums for
    the readings that were tried; interval_db: of score_db, 95 %, None if a card has no interval. sure_db: score_db under the worst case
    of calibrations that the gallery has not checked; None: all are checked."""

    row: int
    score_db: float
    llr_db: float
    extrapolated: bool
    evidence: tuple[Evidence, ...]
    label_penalty_db: float = 0.0
    interval_db: tuple[float, float] | None = None
    sure_db: float | None = None


@dataclass(frozen=True, eq=False)
class Law:
    """The calibration of one model's templates: by embedding or minutiae alone, and by both if a card says how."""

    alone: Calibration
    with_minutiae: WithMinutiae | None

    def of(self, both: bool) -> Calibration:
        return self.with_minutiae.both if both and self.with_minutiae is not None else self.alone


@dataclass(frozen=True, eq=False)
class Measured:
    """The scores of one pair of columns, float64 (n,) each; NaN for rows that cannot be compared. raw: the input of the law's `alone`,
    similarity or minutiae; summed_db: the input of its `both`."""

    law: Law
    similarity: Float64
    minutiae: Float64
    raw: Float64
    summed_db: Float64
    llr_db: Float64

    def taken(self, ats: Int64) -> Measured:
        """The scores of these rows, in this order."""
        arrays = (self.similarity, self.minutiae, self.raw, self.summed_db, self.llr_db)
        return Measured(self.law, *(array[ats] for array in arrays))

    def score_db(self, ats: Int64) -> Float64:
        """score_db of these rows, computed on demand: most rows are ranked by their sums alone."""
        found, summed_db = self.law.alone.score_db(self.raw[ats]), self.summed_db[ats]
        both = ~np.isnan(summed_db)
        if both.any():
            found[both] = self.law.of(True).score_db(summed_db[both])
        return found

    def low_db(self, ats: Int64) -> Float64:
        """The lower end of score_db, of rows that are compared in one way and have an interval."""
        summed_db = self.summed_db[ats]
        both = not np.isnan(summed_db).any()
        interval_db = self.law.of(both).interval_db(summed_db if both else self.raw[ats])
        assert interval_db is not None, "what is unchecked has one"
        return interval_db[0]


def calibrated(law: Law, similarity: Float64, minutiae: Float64, *, by_embedding: bool) -> Measured:
    """Calibrates raw scores. similarity, minutiae: float64 (n,), NaN where absent; by_embedding: the embedding counts, and minutiae add to
    it."""
    raw = similarity if by_embedding else minutiae
    llr_db, summed_db = law.alone.llr_db(raw), np.full(len(raw), np.nan)
    if law.with_minutiae is not None:
        summed_db = llr_db + law.with_minutiae.minutiae.llr_db(minutiae)
        llr_db = np.where(np.isnan(summed_db), llr_db, law.with_minutiae.both.llr_db(summed_db))
    return Measured(law, similarity, minutiae, raw, summed_db, llr_db)


@dataclass(frozen=True, eq=False)
class Fused:
    """One score a row from the evidence of several captures, float64 (n,) each; NaN for a row without evidence.

    used: bool (n, pairs), the pairs that count; trial_penalty_db: float64 (n, pairs), the penalty on the evidence of a pair that is the
    best of several; label_penalty_db: the penalty on the sums, for the readings that were tried.
    """

    used: Bool
    trial_penalty_db: Float64
    score_db: Float64
    llr_db: Float64
    extrapolated: Bool
    label_penalty_db: Float64

    def penalised(self, label_penalty_db: Float64) -> Fused:
        """The same with a further penalty on the sums, float64 (n,)."""
        score_db, llr_db = np.maximum(self.score_db - label_penalty_db, 0.0), self.llr_db - label_penalty_db
        return replace(
            self, score_db=score_db, llr_db=llr_db, label_penalty_db=self.label_penalty_db + label_penalty_db
        )

    def or_better(self, other: Fused, ats: Int64) -> Fused:
        """The stronger of both in each row, by score, and by evidence where both scores are at their maximum. other: of the rows `ats`."""
        mine = _strength(self.score_db[ats], self.label_penalty_db[ats])
        theirs = _strength(other.score_db, other.label_penalty_db)
        better = np.isnan(mine) & ~np.isnan(theirs)
        with np.errstate(invalid="ignore"):
            better |= (theirs > mine) | ((theirs == mine) & (other.llr_db > self.llr_db[ats]))
        mixed: dict[str, Any] = {name: array.copy() for name, array in vars(self).items()}
        for name, array in vars(other).items():
            mixed[name][ats[better]] = array[better]
        return Fused(**mixed)


class Board:
    """The scores of all pairs of columns of a probe and some rows. rows: int64 (n,); borrowed_db: float64 (n, pairs), the penalty on a pair
    that was measured on another row of the same subject; None: no pair was."""

    def __init__(self, rows: Int64, measured: Mapping[Pair, Measured], borrowed_db: Float64 | None = None) -> None:
        self.rows = rows
        self._borrowed_db = borrowed_db
        self.pairs = tuple(measured)
        self.number = {pair: i for i, pair in enumerate(self.pairs)}
        self._measured = tuple(measured.values())
        shape = (len(self._measured), len(self.rows))
        self.llr_db = np.array([one.llr_db for one in self._measured]).reshape(shape).T
        self._both = ~np.isnan(np.array([one.summed_db for one in self._measured]).reshape(shape).T)

    def fuse(self, used: Bool, trial_penalty_db: Float64 | None = None, ats: Int64 | None = None) -> Fused:
        """used: bool (n, pairs), of these rows (None: all)."""
        llr_db, both = (self.llr_db, self._both) if ats is None else (self.llr_db[ats], self._both[ats])
        trial_penalty_db = np.zeros(used.shape) if trial_penalty_db is None else trial_penalty_db
        if self._borrowed_db is not None:
            trial_penalty_db = trial_penalty_db + np.where(
                used, self._borrowed_db if ats is None else self._borrowed_db[ats], 0.0
            )
        llr_db = (np.where(used, llr_db, 0.0) - trial_penalty_db).sum(axis=1)
        steps, (score_db, limit_db) = steps_of(llr_db), np.full((2, len(llr_db)), np.nan)
        for some, pairs, calibrations in self._alike(used, both):
            limit_db[some] = measured_db(calibrations)
            if len(pairs) == 1:
                mine = some if ats is None else ats[some]
                score_db[some] = self._measured[pairs[0]].score_db(mine) - trial_penalty_db[some, pairs[0]]
            else:
                score_db[some] = score_db_of_steps(steps[some], calibrations)
        score_db = np.maximum(score_db, 0.0)
        return Fused(used, trial_penalty_db, score_db, llr_db, score_db > limit_db, np.zeros(len(llr_db)))

    def comparisons(self, ats: Int64, fused: Fused) -> list[Comparison]:
        """The comparisons of these rows."""
        used, label_penalty_db = fused.used[ats], fused.label_penalty_db[ats]
        score_db, llr_db = fused.score_db[ats], fused.llr_db[ats]
        low_db, high_db = np.full((2, len(ats)), np.nan)
        steps = steps_of(llr_db + label_penalty_db)
        for some, _, calibrations in self._alike(used, self._both[ats]):
            if bounded(calibrations):
                low_db[some] = score_db_of_steps(steps[some], calibrations, "low")
                high_db[some] = score_db_of_steps(steps[some], calibrations, "high")
        low_db = np.maximum(np.minimum(low_db - label_penalty_db, score_db), 0.0)
        high_db = np.maximum(high_db - label_penalty_db, score_db)
        evidence: list[list[Evidence]] = [[] for _ in range(len(ats))]
        trial_penalty_db = fused.trial_penalty_db[ats]
        for pair, one, mine, tried_db in zip(self.pairs, self._measured, used.T, trial_penalty_db.T, strict=True):
            if mine.any():
                values = (
                    np.maximum(one.score_db(ats) - tried_db, 0.0),
                    one.llr_db[ats] - tried_db,
                    one.similarity[ats],
                    one.minutiae[ats],
                )
                lists = [value.tolist() for value in values]
                for i in np.flatnonzero(mine).tolist():
                    score, llr, *raw = [of_all[i] for of_all in lists]
                    evidence[i].append(Evidence(*pair, score, llr, *[None if isnan(x) else x for x in raw]))
        sure_db = self._sure_db(ats, fused)
        told = (self.rows[ats], score_db, llr_db, fused.extrapolated[ats], label_penalty_db, low_db, high_db, sure_db)
        return [
            Comparison(
                row,
                score,
                llr,
                beyond,
                tuple(parts),
                charge,
                None if isnan(low) else (low, high),
                None if isnan(sure) else min(sure, score),
            )
            for parts, row, score, llr, beyond, charge, low, high, sure in zip(
                evidence, *(values.tolist() for values in told), strict=True
            )
        ]

    def _sure_db(self, ats: Int64, fused: Fused) -> Float64:
        """score_db of these rows by the bound "sure"; NaN if all tables are checked. A model without a table of its own can lower it, and
        not raise it."""
        sure_db = np.full(len(ats), np.nan)
        llr_db, used = self.llr_db[ats] - fused.trial_penalty_db[ats], fused.used[ats]
        for some, pairs, calibrations in self._alike(used, self._both[ats]):
            if not any([one.unchecked for one in calibrations]):
                continue
            if len(pairs) == 1 and calibrations[0].mates_measured:  # by its raw score, as its score_db is
                only = self._measured[pairs[0]].low_db(ats[some])
                sure_db[some] = only - fused.trial_penalty_db[ats[some], pairs[0]]
            else:
                mine, has_table = llr_db[some][:, pairs], [one.mates_measured for one in calibrations]
                summed_db = np.where(has_table, mine, np.minimum(mine, 0.0)).sum(axis=1)
                laws = tuple([one for one in calibrations if one.mates_measured])
                sure_db[some] = score_db_of_steps(steps_of(summed_db), laws, "sure") if laws else 0.0
        return np.asarray(np.maximum(sure_db - fused.label_penalty_db[ats], 0.0))

    def raw(self, column: str, fused: Fused) -> tuple[Float64, Float64]:
        """(similarity, minutiae) of the pair that counts for this column of the probe; NaN without one."""
        similarity, minutiae = np.full((2, len(self.rows)), np.nan)
        for pair, one in enumerate(self._measured):
            if self.pairs[pair][0] == column:
                used = fused.used[:, pair]
                similarity[used], minutiae[used] = one.similarity[used], one.minutiae[used]
        return similarity, minutiae

    def _alike(self, used: Bool, both: Bool) -> Iterator[tuple[Int64, list[int], tuple[Calibration, ...]]]:
        """(rows, pairs, calibrations) of each group of rows with the same pairs; rows without evidence are left out."""
        kinds = used.astype(np.int8)
        kinds += used & both
        for some in _sorts(kinds):
            kind = kinds[some[0]].tolist()
            pairs = [pair for pair, value in enumerate(kind) if value]
            if pairs:
                yield some, pairs, tuple([self._measured[pair].law.of(kind[pair] == 2) for pair in pairs])


class Ranked(Sequence[Comparison]):
    """Comparisons, strongest first, equal ones by row. rows: int64 (n,); score_db, llr_db: float64 (n,), in this order."""

    def __init__(self, results: Iterable[tuple[Board, Fused]] = ()) -> None:
        self._results = tuple(results)
        parts = [(np.flatnonzero(~np.isnan(fused.score_db)), number) for number, (_, fused) in enumerate(self._results)]
        at = np.concatenate([np.zeros(0, np.int64), *(ats for ats, _ in parts)])
        which = np.concatenate([np.zeros(0, np.int64), *(np.full(len(ats), number) for ats, number in parts)])
        empty = [np.zeros(0)]
        rows = np.concatenate([np.zeros(0, np.int64), *(self._results[n][0].rows[ats] for ats, n in parts)])
        score_db = np.concatenate(empty + [self._results[n][1].score_db[ats] for ats, n in parts])
        llr_db = np.concatenate(empty + [self._results[n][1].llr_db[ats] for ats, n in parts])
        keys = (-llr_db, -score_db)
        order = np.lexsort(keys if (rows[1:] > rows[:-1]).all() else (rows, *keys))
        self.rows, self.score_db, self.llr_db = rows[order], score_db[order], llr_db[order]
        self._at, self._which = at[order], which[order]

    def with_others(self, others: Ranked) -> Ranked:
        """The rankings of two disjoint sets of rows as one."""
        return Ranked((*self._results, *others._results))

    def without(self, rows: Int64) -> Ranked:
        """The comparisons of all other rows."""
        kept = []
        for board, fused in self._results:
            gone = np.isin(board.rows, rows)
            kept.append((board, replace(fused, score_db=np.where(gone, np.nan, fused.score_db))))
        return Ranked(kept)

    def reaching(self, threshold_db: float) -> list[Comparison]:
        """The comparisons that reach threshold_db."""
        return list(self[: int(np.count_nonzero(self.score_db >= threshold_db))])

    def extrapolated(self) -> Bool:
        """bool (n,), in this order."""
        return self._gathered(lambda board, fused: fused.extrapolated, bool)

    def raw(self, column: str) -> tuple[Float64, Float64]:
        """(similarity, minutiae), float64 (n,) each, in this order: the raw scores that count for the probe's column, NaN without one."""
        return (
            self._gathered(lambda board, fused: board.raw(column, fused)[0], float),
            self._gathered(lambda board, fused: board.raw(column, fused)[1], float),
        )

    def _gathered(self, values_of: Callable[[Board, Fused], NDArray[Any]], kind: type) -> NDArray[Any]:
        found: NDArray[Any] = np.zeros(len(self.rows), kind)
        for number, (board, fused) in enumerate(self._results):
            mine = self._which == number
            found[mine] = values_of(board, fused)[self._at[mine]]
        return found

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Comparison: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Comparison]: ...
    def __getitem__(self, index: int | slice) -> Comparison | Sequence[Comparison]:
        if isinstance(index, slice):
            return self.at(range(*index.indices(len(self))))
        return self.at([range(len(self))[index]])[0]

    def __iter__(self) -> Iterator[Comparison]:
        return iter(self[:])

    def at(self, ranks: Sequence[int]) -> list[Comparison]:
        """The comparisons at these ranks, made together."""
        wanted = np.array(ranks, np.int64)
        found: dict[int, Comparison] = {}
        for number, (board, fused) in enumerate(self._results):
            mine = wanted[self._which[wanted] == number]
            found.update(zip(mine.tolist(), board.comparisons(self._at[mine], fused), strict=True))
        return [found[rank] for rank in ranks]


def _sorts(kinds: NDArray[np.int8]) -> list[Int64]:
    """The indices of each group of equal rows, ascending."""
    if not len(kinds):
        return []
    if kinds.shape[1] <= 9:  # three values a pair, in 15 bits, which are sorted fastest
        sort = kinds.astype(np.int16) @ 3 ** np.arange(kinds.shape[1], dtype=np.int16)
    else:
        _, sort = np.unique(kinds, axis=0, return_inverse=True)
        sort = sort.ravel()
    order = np.argsort(sort, kind="stable")
    ends = [0, *(np.flatnonzero(np.diff(sort[order])) + 1).tolist(), len(order)]
    return [order[start:end] for start, end in pairwise(ends)]


def _strength(score_db: Float64, label_penalty_db: Float64) -> Float64:
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(score_db + label_penalty_db > SCORE_DB_MAX - 1e-6, np.inf, score_db))
