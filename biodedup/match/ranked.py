"""Scores one probe against many candidates, as arrays: adds up the captures' evidence into one score a row, and ranks
the rows.

Owns the sums, their calibration and the ranking. Never measures a similarity and never decides.

Invariant: nothing here loops over rows; a `Comparison` is made only for rows that are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isnan
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from biodedup.match.labels import Pair
from biodedup.match.scores.calibration import SCORE_DB_MAX, Calibration
from biodedup.match.scores.calibrations import WithMinutiae
from biodedup.match.scores.fusion import bounded, llr_reaching, measured_db, score_db_of_steps, steps_of
from biodedup.values import Evidence

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]


@dataclass(frozen=True)
class Comparison:
    """One candidate's result.

    evidence: one entry for each capture that could be compared; label_penalty_db: taken off both sums, for the readings
    of the labels that were tried; interval_db: the 95 % interval of score_db, None if a card gives none. sure_db: what
    is left of score_db if calibrations that the gallery has not checked are as wrong as they may be; None: all of it.
    """

    row: int
    score_db: float
    llr_db: float
    extrapolated: bool
    evidence: tuple[Evidence, ...]
    label_penalty_db: float = 0.0
    interval_db: tuple[float, float] | None = None
    sure_db: float | None = None


@dataclass(frozen=True, eq=False)
class ScoreModel:
    """How the templates of one model score: by embedding or minutiae alone, and, if its card says how, by both. replay: the similarity from
    which two embeddings are taken for copies of one picture, None where that is unknown."""

    alone: Calibration
    with_minutiae: WithMinutiae | None
    replay: float | None = None

    def of(self, both: bool) -> Calibration:
        return self.with_minutiae.both if both and self.with_minutiae is not None else self.alone


@dataclass(frozen=True, eq=False)
class PairScores:
    """The scores of one pair of columns for every row, float64 (n,) each; NaN where rows cannot be compared. raw:
    similarity or minutiae, whichever the model's `alone` takes; summed_db: what its `both` takes."""

    model: ScoreModel
    similarity: Float64
    minutiae: Float64
    raw: Float64
    summed_db: Float64
    llr_db: Float64

    def taken(self, ats: Int64) -> PairScores:
        """The scores of these rows, in this order."""
        arrays = (self.similarity, self.minutiae, self.raw, self.summed_db, self.llr_db)
        return PairScores(self.model, *(array[ats] for array in arrays))

    def score_db(self, ats: Int64) -> Float64:
        """score_db of these rows. Most rows are ranked by sums alone and never need it."""
        found, summed_db = self.model.alone.score_db(self.raw[ats]), self.summed_db[ats]
        both = ~np.isnan(summed_db)
        if both.any():
            found[both] = self.model.of(True).score_db(summed_db[both])
        return found

    def low_db(self, ats: Int64) -> Float64:
        """The lower end of score_db, for rows that are compared in one way and have an interval."""
        summed_db = self.summed_db[ats]
        both = not np.isnan(summed_db).any()
        interval_db = self.model.of(both).interval_db(summed_db if both else self.raw[ats])
        assert interval_db is not None, "an unchecked calibration has an interval"
        return interval_db[0]


def calibrated(model: ScoreModel, similarity: Float64, minutiae: Float64, *, by_embedding: bool) -> PairScores:
    """Calibrates raw scores. similarity, minutiae: float64 (n,), NaN where absent; by_embedding: minutiae only add to
    the embedding."""
    raw = similarity if by_embedding else minutiae
    llr_db, summed_db = model.alone.llr_db(raw), np.full(len(raw), np.nan)
    if model.with_minutiae is not None:
        summed_db = llr_db + model.with_minutiae.minutiae.llr_db(minutiae)
        llr_db = np.where(np.isnan(summed_db), llr_db, model.with_minutiae.both.llr_db(summed_db))
    return PairScores(model, similarity, minutiae, raw, summed_db, llr_db)


@dataclass(frozen=True, eq=False)
class Fused:
    """The evidence of several captures as one score a row, float64 (n,) each; NaN where a row has none.

    used: bool (n, pairs), the pairs that count; trial_penalty_db: float64 (n, pairs), taken off the evidence of a pair
    that is the best of several tried; label_penalty_db: taken off the sums, for the readings of the labels that were
    tried.
    """

    used: Bool
    trial_penalty_db: Float64
    score_db: Float64
    llr_db: Float64
    extrapolated: Bool
    label_penalty_db: Float64

    def penalised(self, label_penalty_db: Float64) -> Fused:
        """A copy with this taken off the sums, float64 (n,)."""
        score_db, llr_db = np.maximum(self.score_db - label_penalty_db, 0.0), self.llr_db - label_penalty_db
        return replace(
            self, score_db=score_db, llr_db=llr_db, label_penalty_db=self.label_penalty_db + label_penalty_db
        )

    def or_better(self, other: Fused, ats: Int64) -> Fused:
        """The stronger of both in each row, by score, and by evidence where the scores are capped. other: of the rows
        `ats` only."""
        ours = _strength(self.score_db[ats], self.label_penalty_db[ats])
        theirs = _strength(other.score_db, other.label_penalty_db)
        better = np.isnan(ours) & ~np.isnan(theirs)
        with np.errstate(invalid="ignore"):
            better |= (theirs > ours) | ((theirs == ours) & (other.llr_db > self.llr_db[ats]))
        mixed: dict[str, Any] = {name: array.copy() for name, array in vars(self).items()}
        for name, array in vars(other).items():
            mixed[name][ats[better]] = array[better]
        return Fused(**mixed)


class ScoreMatrix:
    """The scores of probes with some rows, by pair of columns. rows: int64 (n,); borrowed_db: float64 (n, pairs),
    taken off the evidence of a pair that was measured on another row of the same subject; None: no pair was."""

    def __init__(self, rows: Int64, scores: Mapping[Pair, PairScores], borrowed_db: Float64 | None = None) -> None:
        self.rows = rows
        self._borrowed_db = borrowed_db
        self.pairs = tuple(scores)
        self.number = {pair: i for i, pair in enumerate(self.pairs)}
        self._scores = tuple(scores.values())
        shape = (len(self._scores), len(self.rows))
        self.llr_db = np.array([scores.llr_db for scores in self._scores]).reshape(shape).T
        self._both = ~np.isnan(np.array([scores.summed_db for scores in self._scores]).reshape(shape).T)

    def fuse(self, used: Bool, trial_penalty_db: Float64 | None = None, ats: Int64 | None = None) -> Fused:
        """Adds up the evidence of the used pairs. used: bool (n, pairs); ats: of these rows, None for all."""
        llr_db, both = (self.llr_db, self._both) if ats is None else (self.llr_db[ats], self._both[ats])
        trial_penalty_db = np.zeros(used.shape) if trial_penalty_db is None else trial_penalty_db
        if self._borrowed_db is not None:
            trial_penalty_db = trial_penalty_db + np.where(
                used, self._borrowed_db if ats is None else self._borrowed_db[ats], 0.0
            )
        parts_db = np.where(used, llr_db, 0.0) - trial_penalty_db
        llr_db = np.zeros(len(used))
        for part_db in parts_db.T:  # in this order for any number of rows, so that sums are equal to the last bit
            llr_db += part_db
        steps, (score_db, limit_db) = steps_of(llr_db), np.full((2, len(llr_db)), np.nan)
        for some, pairs, calibrations in self.alike(used, both):
            limit_db[some] = measured_db(calibrations)
            if len(pairs) == 1:
                rows = some if ats is None else ats[some]
                score_db[some] = self._scores[pairs[0]].score_db(rows) - trial_penalty_db[some, pairs[0]]
            else:
                score_db[some] = score_db_of_steps(steps[some], calibrations)
        score_db = np.maximum(score_db, 0.0)
        return Fused(used, trial_penalty_db, score_db, llr_db, score_db > limit_db, np.zeros(len(llr_db)))

    @property
    def models(self) -> tuple[ScoreModel, ...]:
        """How each pair of columns scores."""
        return tuple([scores.model for scores in self._scores])

    def llr_reaching(self, score_db: float, used: Bool, both: Bool) -> Float64:
        """The least sum of llr_db that reaches score_db, float64 (n,), for rows with these pairs; infinite for rows without. used, both:
        bool (n, pairs), the pairs that count, and those that are compared by embedding and minutiae."""
        least_db = np.full(len(used), np.inf)
        for some, _, calibrations in self.alike(used, both):
            least_db[some] = llr_reaching(score_db, calibrations)
        return least_db

    def comparisons(self, ats: Int64, fused: Fused) -> list[Comparison]:
        """The comparisons of these rows."""
        used, label_penalty_db = fused.used[ats], fused.label_penalty_db[ats]
        score_db, llr_db = fused.score_db[ats], fused.llr_db[ats]
        low_db, high_db = np.full((2, len(ats)), np.nan)
        steps = steps_of(llr_db + label_penalty_db)
        for some, _, calibrations in self.alike(used, self._both[ats]):
            if bounded(calibrations):
                low_db[some] = score_db_of_steps(steps[some], calibrations, "low")
                high_db[some] = score_db_of_steps(steps[some], calibrations, "high")
        low_db = np.maximum(np.minimum(low_db - label_penalty_db, score_db), 0.0)
        high_db = np.maximum(high_db - label_penalty_db, score_db)
        evidence: list[list[Evidence]] = [[] for _ in range(len(ats))]
        trial_penalty_db = fused.trial_penalty_db[ats]
        for pair, scores, counts, penalty_db in zip(self.pairs, self._scores, used.T, trial_penalty_db.T, strict=True):
            if counts.any():
                values = (
                    np.maximum(scores.score_db(ats) - penalty_db, 0.0),
                    scores.llr_db[ats] - penalty_db,
                    scores.similarity[ats],
                    scores.minutiae[ats],
                )
                lists, replay = [value.tolist() for value in values], scores.model.replay
                for i in np.flatnonzero(counts).tolist():
                    score, llr, *raw = [of_all[i] for of_all in lists]
                    similarity, minutiae = (None if isnan(x) else x for x in raw)
                    copied = similarity is not None and replay is not None and similarity >= replay
                    evidence[i].append(Evidence(*pair, score, llr, similarity, minutiae, copied))
        sure_db = self._sure_db(ats, fused)
        told = (self.rows[ats], score_db, llr_db, fused.extrapolated[ats], label_penalty_db, low_db, high_db, sure_db)
        return [
            Comparison(
                row=row,
                score_db=score,
                llr_db=llr,
                extrapolated=beyond,
                evidence=tuple(parts),
                label_penalty_db=label_penalty,
                interval_db=None if isnan(low) else (low, high),
                sure_db=None if isnan(sure) else min(sure, score),
            )
            for parts, row, score, llr, beyond, label_penalty, low, high, sure in zip(
                evidence, *(values.tolist() for values in told), strict=True
            )
        ]

    def _sure_db(self, ats: Int64, fused: Fused) -> Float64:
        """The scores of these rows by the "sure" bounds; NaN where all tables are checked. A model without a table of
        its own counts only against a candidate here."""
        sure_db = np.full(len(ats), np.nan)
        llr_db, used = self.llr_db[ats] - fused.trial_penalty_db[ats], fused.used[ats]
        for some, pairs, calibrations in self.alike(used, self._both[ats]):
            if not any([calibration.unchecked for calibration in calibrations]):
                continue
            if len(pairs) == 1 and calibrations[0].mates_measured:  # by its raw score, as its score_db is
                only = self._scores[pairs[0]].low_db(ats[some])
                sure_db[some] = only - fused.trial_penalty_db[ats[some], pairs[0]]
            else:
                of_pairs, has_table = (
                    llr_db[some][:, pairs],
                    [calibration.mates_measured for calibration in calibrations],
                )
                summed_db = np.where(has_table, of_pairs, np.minimum(of_pairs, 0.0)).sum(axis=1)
                tables = tuple([calibration for calibration in calibrations if calibration.mates_measured])
                sure_db[some] = score_db_of_steps(steps_of(summed_db), tables, "sure") if tables else 0.0
        return np.asarray(np.maximum(sure_db - fused.label_penalty_db[ats], 0.0))

    def strongest_finger_db(self, fused: Fused) -> Float64:
        """The llr_db of each row's strongest finger, less 10 log10 of their number (Bonferroni), float64 (n,); minus infinity without a
        finger."""
        fingers = fused.used & np.array([column != "face" for column, _ in self.pairs], bool)
        parts_db = np.where(fingers, self.llr_db - fused.trial_penalty_db, -np.inf)
        tries = np.maximum(np.count_nonzero(fingers, axis=1), 1)
        return np.asarray(parts_db.max(axis=1, initial=-np.inf) - 10 * np.log10(tries))

    def raw(self, column: str, fused: Fused) -> tuple[Float64, Float64]:
        """(similarity, minutiae) of the pair that counts for this column of the probe; NaN if none does."""
        similarity, minutiae = np.full((2, len(self.rows)), np.nan)
        for pair, scores in enumerate(self._scores):
            if self.pairs[pair][0] == column:
                used = fused.used[:, pair]
                similarity[used], minutiae[used] = scores.similarity[used], scores.minutiae[used]
        return similarity, minutiae

    def alike(self, used: Bool, both: Bool) -> Iterator[tuple[Int64, list[int], tuple[Calibration, ...]]]:
        """Groups rows with the same pairs: (which rows, pairs, their calibrations) of each group; rows without evidence
        are left out."""
        kinds = used.astype(np.int8)
        kinds += used & both
        for some in _sorts(kinds):
            kind = kinds[some[0]].tolist()
            pairs = [pair for pair, value in enumerate(kind) if value]
            if pairs:
                yield some, pairs, tuple([self._scores[pair].model.of(kind[pair] == 2) for pair in pairs])


@dataclass(frozen=True, eq=False)
class Scored:
    """Some rows with their scores. by_embeddings: float64 (2, n), score_db and llr_db of each row's subject before minutiae added to
    embeddings; None: none did. compared: how many pairs of minutiae records were compared. low, high: the rows [low, high) are these;
    the others are of other probes."""

    matrix: ScoreMatrix
    fused: Fused
    by_embeddings: Float64 | None = None
    compared: int = 0
    low: int = 0
    high: int | None = None

    def ranked(self) -> Int64:
        """The rows that have a score, ascending."""
        return self.low + np.flatnonzero(~np.isnan(self.fused.score_db[self.low : self.high]))


class Ranked(Sequence[Comparison]):
    """The comparisons of a probe, strongest first, equal ones by row. rows: int64 (n,); score_db, llr_db: float64 (n,), in this
    order; by_embeddings: as in `Scored`. compared: pairs of minutiae records that were compared."""

    def __init__(self, results: Iterable[Scored] = ()) -> None:
        self._results = tuple(results)
        self.compared = sum(result.compared for result in self._results)
        parts = [(result.ranked(), n) for n, result in enumerate(self._results)]
        at = np.concatenate([np.zeros(0, np.int64), *(ats for ats, _ in parts)])
        which = np.concatenate([np.zeros(0, np.int64), *(np.full(len(ats), number) for ats, number in parts)])
        empty = [np.zeros(0)]
        rows = np.concatenate([np.zeros(0, np.int64), *(self._results[n].matrix.rows[ats] for ats, n in parts)])
        score_db = np.concatenate(empty + [self._results[n].fused.score_db[ats] for ats, n in parts])
        llr_db = np.concatenate(empty + [self._results[n].fused.llr_db[ats] for ats, n in parts])
        before = [_before(self._results[n], ats) for ats, n in parts]
        keys = (-llr_db, -score_db)
        order = np.lexsort(keys if (rows[1:] > rows[:-1]).all() else (rows, *keys))
        self.rows, self.score_db, self.llr_db = rows[order], score_db[order], llr_db[order]
        self.by_embeddings = np.concatenate([np.zeros((2, 0)), *before], axis=1)[:, order]
        self._at, self._which = at[order], which[order]

    def with_others(self, others: Ranked) -> Ranked:
        """Merges the comparisons of two disjoint sets of rows."""
        return Ranked((*self._results, *others._results))

    def without(self, rows: Int64) -> Ranked:
        """The comparisons of all rows but these."""
        kept = []
        for result in self._results:
            score_db = np.where(np.isin(result.matrix.rows, rows), np.nan, result.fused.score_db)
            kept.append(replace(result, fused=replace(result.fused, score_db=score_db)))
        return Ranked(kept)

    def reaching(self, threshold_db: float) -> list[Comparison]:
        """The comparisons that score at least threshold_db."""
        return list(self[: int(np.count_nonzero(self.score_db >= threshold_db))])

    def extrapolated(self) -> Bool:
        """bool (n,), in this order."""
        return self._gathered(lambda matrix, fused: fused.extrapolated, bool)

    def resembling(self, score_db: float, finger_db: float) -> Bool:
        """bool (n,), in this order: which score at least score_db, or have a finger with an llr_db of at least finger_db, and 10
        log10 of the number of fingers more."""
        strongest_db = self._gathered(lambda matrix, fused: matrix.strongest_finger_db(fused), float)
        return np.asarray((self.score_db >= score_db) | (strongest_db >= finger_db))

    def raw(self, column: str) -> tuple[Float64, Float64]:
        """(similarity, minutiae), float64 (n,) each, in this order: of the pair that counts for the probe's column; NaN
        if none does."""
        return (
            self._gathered(lambda matrix, fused: matrix.raw(column, fused)[0], float),
            self._gathered(lambda matrix, fused: matrix.raw(column, fused)[1], float),
        )

    def _gathered(self, values_of: Callable[[ScoreMatrix, Fused], NDArray[Any]], kind: type) -> NDArray[Any]:
        values: NDArray[Any] = np.zeros(len(self.rows), kind)
        for number, result in enumerate(self._results):
            of_result = self._which == number
            values[of_result] = values_of(result.matrix, result.fused)[self._at[of_result]]
        return values

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
        """The comparisons at these ranks."""
        wanted = np.array(ranks, np.int64)
        by_rank: dict[int, Comparison] = {}
        for number, result in enumerate(self._results):
            of_result = wanted[self._which[wanted] == number]
            comparisons = result.matrix.comparisons(self._at[of_result], result.fused)
            by_rank.update(zip(of_result.tolist(), comparisons, strict=True))
        return [by_rank[rank] for rank in ranks]


def _sorts(kinds: NDArray[np.int8]) -> list[Int64]:
    """Groups equal rows of the matrix: the places of each group, ascending."""
    if not len(kinds):
        return []
    if kinds.shape[1] <= 39:  # three values a pair, in 63 bits; 15 bits are sorted fastest
        sort = kinds.astype(np.int64) @ 3 ** np.arange(kinds.shape[1])
        sort = sort.astype(np.int16) if kinds.shape[1] <= 9 else sort
    else:
        _, sort = np.unique(kinds, axis=0, return_inverse=True)
        sort = sort.ravel()
    order = np.argsort(sort, kind="stable")
    ends = [0, *(np.flatnonzero(np.diff(sort[order])) + 1).tolist(), len(order)]
    return [order[start:end] for start, end in pairwise(ends)]


def _before(result: Scored, ats: Int64) -> Float64:
    if result.by_embeddings is not None:
        return result.by_embeddings[:, ats]
    return np.array([result.fused.score_db[ats], result.fused.llr_db[ats]])


def _strength(score_db: Float64, label_penalty_db: Float64) -> Float64:
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(score_db + label_penalty_db > SCORE_DB_MAX - 1e-6, np.inf, score_db))
