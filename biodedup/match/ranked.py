"""Adds up the evidence of a probe's captures into one score for each candidate row, and ranks the rows.

Owns the sums, their calibration and the ranking, all as arrays. Never computes a raw score and never decides.

Invariant: no code loops over rows. A `Comparison` is made only for the rows that a caller reads.
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

    evidence: one entry for each compared capture. label_penalty_db: subtracted from score_db and llr_db for the readings of the labels
    that were tried. interval_db: the 95 % confidence interval of score_db, or None if a card has none. worst_case_db: the score in the
    worst case of the calibrations that the gallery has not checked; None if all are checked.
    """

    row: int
    score_db: float
    llr_db: float
    extrapolated: bool
    evidence: tuple[Evidence, ...]
    label_penalty_db: float = 0.0
    interval_db: tuple[float, float] | None = None
    worst_case_db: float | None = None


@dataclass(frozen=True, eq=False)
class ScoreModel:
    """The calibrations of one model's templates. alone: of the embedding or of the minutiae. with_minutiae: of both together, or None if
    the card has none. replay: the similarity from which two embeddings count as copies of one picture, or None."""

    alone: Calibration
    with_minutiae: WithMinutiae | None
    replay: float | None = None

    def of(self, both: bool) -> Calibration:
        """The calibration of embedding and minutiae together (both), or of one of them alone."""
        return self.with_minutiae.both if both and self.with_minutiae is not None else self.alone


@dataclass(frozen=True, eq=False)
class PairScores:
    """The scores of one pair of columns for every row, float64 (n,) each; NaN where rows are not comparable.

    raw: the similarity or the minutiae score, the input of the model's `alone`. summed_db: the input of its `both`.
    """

    model: ScoreModel
    similarity: Float64
    minutiae: Float64
    raw: Float64
    summed_db: Float64
    llr_db: Float64

    def select(self, indices: Int64) -> PairScores:
        """The scores of the rows at these indices, in this order."""
        arrays = (self.similarity, self.minutiae, self.raw, self.summed_db, self.llr_db)
        return PairScores(self.model, *(array[indices] for array in arrays))

    def score_db(self, indices: Int64) -> Float64:
        """score_db of these rows. It is computed on request, because most rows are ranked by sums alone."""
        score_db, summed_db = self.model.alone.score_db(self.raw[indices]), self.summed_db[indices]
        both = ~np.isnan(summed_db)
        if both.any():
            score_db[both] = self.model.of(True).score_db(summed_db[both])
        return score_db

    def low_db(self, indices: Int64) -> Float64:
        """The lower end of score_db's interval. The rows must all have minutiae, or all have none."""
        summed_db = self.summed_db[indices]
        both = not np.isnan(summed_db).any()
        interval_db = self.model.of(both).interval_db(summed_db if both else self.raw[indices])
        assert interval_db is not None, "an unchecked calibration has an interval"
        return interval_db[0]


def calibrated(model: ScoreModel, similarity: Float64, minutiae: Float64, *, by_embedding: bool) -> PairScores:
    """Calibrates raw scores. similarity, minutiae: float64 (n,), NaN where absent. by_embedding: whether the probe has an embedding, to
    which minutiae only add."""
    raw = similarity if by_embedding else minutiae
    llr_db, summed_db = model.alone.llr_db(raw), np.full(len(raw), np.nan)
    if model.with_minutiae is not None:
        summed_db = llr_db + model.with_minutiae.minutiae.llr_db(minutiae)
        llr_db = np.where(np.isnan(summed_db), llr_db, model.with_minutiae.both.llr_db(summed_db))
    return PairScores(model, similarity, minutiae, raw, summed_db, llr_db)


@dataclass(frozen=True, eq=False)
class Fused:
    """The fused score of each row, float64 (n,) each; NaN for a row without evidence.

    used: bool (n, pairs), the pairs that count. trial_penalty_db: float64 (n, pairs), subtracted from the evidence of a pair that is the
    best of several tries. label_penalty_db: subtracted from the sums, for the readings of the labels that were tried.
    """

    used: Bool
    trial_penalty_db: Float64
    score_db: Float64
    llr_db: Float64
    extrapolated: Bool
    label_penalty_db: Float64

    def penalised(self, label_penalty_db: Float64) -> Fused:
        """A copy with this penalty, float64 (n,), subtracted from the sums."""
        score_db, llr_db = np.maximum(self.score_db - label_penalty_db, 0.0), self.llr_db - label_penalty_db
        return replace(
            self, score_db=score_db, llr_db=llr_db, label_penalty_db=self.label_penalty_db + label_penalty_db
        )

    def or_better(self, other: Fused, indices: Int64) -> Fused:
        """The stronger of self and `other` in each row: by score, or by evidence if the scores are capped. other: of the rows `indices`."""
        ours = _strength(self.score_db[indices], self.label_penalty_db[indices])
        theirs = _strength(other.score_db, other.label_penalty_db)
        better = np.isnan(ours) & ~np.isnan(theirs)
        with np.errstate(invalid="ignore"):
            better |= (theirs > ours) | ((theirs == ours) & (other.llr_db > self.llr_db[indices]))
        mixed: dict[str, Any] = {name: array.copy() for name, array in vars(self).items()}
        for name, array in vars(other).items():
            mixed[name][indices[better]] = array[better]
        return Fused(**mixed)


class ScoreMatrix:
    """The scores of probes with some rows, by pair of columns. rows: int64 (n,). borrowed_db: float64 (n, pairs), subtracted from the
    evidence of a pair that is borrowed from another row of the same subject; None: no pair is borrowed."""

    def __init__(self, rows: Int64, scores: Mapping[Pair, PairScores], borrowed_db: Float64 | None = None) -> None:
        self.rows = rows
        self._borrowed_db = borrowed_db
        self.pairs = tuple(scores)
        self.number = {pair: i for i, pair in enumerate(self.pairs)}
        self._scores = tuple(scores.values())
        shape = (len(self._scores), len(self.rows))
        self.llr_db = np.array([scores.llr_db for scores in self._scores]).reshape(shape).T
        self._both = ~np.isnan(np.array([scores.summed_db for scores in self._scores]).reshape(shape).T)

    def fuse(self, used: Bool, trial_penalty_db: Float64 | None = None, indices: Int64 | None = None) -> Fused:
        """Adds up the evidence of the used pairs. used: bool (n, pairs). indices: of these rows; None: of all rows."""
        llr_db, both = (self.llr_db, self._both) if indices is None else (self.llr_db[indices], self._both[indices])
        trial_penalty_db = np.zeros(used.shape) if trial_penalty_db is None else trial_penalty_db
        if self._borrowed_db is not None:
            trial_penalty_db = trial_penalty_db + np.where(
                used, self._borrowed_db if indices is None else self._borrowed_db[indices], 0.0
            )
        parts_db = np.where(used, llr_db, 0.0) - trial_penalty_db
        llr_db = np.zeros(len(used))
        for part_db in parts_db.T:  # a fixed order, so that sums are equal to the last bit for any number of rows
            llr_db += part_db
        steps, (score_db, limit_db) = steps_of(llr_db), np.full((2, len(llr_db)), np.nan)
        for members, pairs, calibrations in self.groups(used, both):
            limit_db[members] = measured_db(calibrations)
            if len(pairs) == 1:
                rows = members if indices is None else indices[members]
                score_db[members] = self._scores[pairs[0]].score_db(rows) - trial_penalty_db[members, pairs[0]]
            else:
                score_db[members] = score_db_of_steps(steps[members], calibrations)
        score_db = np.maximum(score_db, 0.0)
        return Fused(used, trial_penalty_db, score_db, llr_db, score_db > limit_db, np.zeros(len(llr_db)))

    @property
    def models(self) -> tuple[ScoreModel, ...]:
        """The score model of each pair of columns."""
        return tuple([scores.model for scores in self._scores])

    def llr_reaching(self, score_db: float, used: Bool, both: Bool) -> Float64:
        """The lowest sum of llr_db that reaches score_db, float64 (n,); infinite for rows without pairs. used: bool (n, pairs), the pairs
        that count. both: bool (n, pairs), the pairs that are compared by embedding and minutiae."""
        lowest_db = np.full(len(used), np.inf)
        for members, _, calibrations in self.groups(used, both):
            lowest_db[members] = llr_reaching(score_db, calibrations)
        return lowest_db

    def comparisons(self, indices: Int64, fused: Fused) -> list[Comparison]:
        """The comparisons of the rows at these indices."""
        score_db, llr_db = fused.score_db[indices], fused.llr_db[indices]
        label_penalty_db = fused.label_penalty_db[indices]
        low_db, high_db = self._interval_db(indices, fused)
        evidence = self._evidence(indices, fused)
        worst_case_db = self._worst_case_db(indices, fused)
        per_row = (
            self.rows[indices],
            score_db,
            llr_db,
            fused.extrapolated[indices],
            label_penalty_db,
            low_db,
            high_db,
            worst_case_db,
        )
        return [
            Comparison(
                row=row,
                score_db=score,
                llr_db=llr,
                extrapolated=beyond,
                evidence=tuple(parts),
                label_penalty_db=label_penalty,
                interval_db=None if isnan(low) else (low, high),
                worst_case_db=None if isnan(sure) else min(sure, score),
            )
            for parts, row, score, llr, beyond, label_penalty, low, high, sure in zip(
                evidence, *(values.tolist() for values in per_row), strict=True
            )
        ]

    def _interval_db(self, indices: Int64, fused: Fused) -> tuple[Float64, Float64]:
        """(low, high) of the score of these rows; NaN if a calibration has no interval."""
        score_db, penalty_db = fused.score_db[indices], fused.label_penalty_db[indices]
        low_db, high_db = np.full((2, len(indices)), np.nan)
        steps = steps_of(fused.llr_db[indices] + penalty_db)
        for members, _, calibrations in self.groups(fused.used[indices], self._both[indices]):
            if bounded(calibrations):
                low_db[members] = score_db_of_steps(steps[members], calibrations, "low")
                high_db[members] = score_db_of_steps(steps[members], calibrations, "high")
        return np.maximum(np.minimum(low_db - penalty_db, score_db), 0.0), np.maximum(high_db - penalty_db, score_db)

    def _evidence(self, indices: Int64, fused: Fused) -> list[list[Evidence]]:
        """The evidence of each capture, by row."""
        evidence: list[list[Evidence]] = [[] for _ in range(len(indices))]
        used, penalties_db = fused.used[indices].T, fused.trial_penalty_db[indices].T
        for pair, scores, counts, penalty_db in zip(self.pairs, self._scores, used, penalties_db, strict=True):
            if not counts.any():
                continue
            arrays = (
                np.maximum(scores.score_db(indices) - penalty_db, 0.0),
                scores.llr_db[indices] - penalty_db,
                scores.similarity[indices],
                scores.minutiae[indices],
            )
            lists, replay = [array.tolist() for array in arrays], scores.model.replay
            for i in np.flatnonzero(counts).tolist():
                score, llr, *raw = [values[i] for values in lists]
                similarity, minutiae = (None if isnan(x) else x for x in raw)
                copied = similarity is not None and replay is not None and similarity >= replay
                evidence[i].append(Evidence(*pair, score, llr, similarity, minutiae, copied))
        return evidence

    def _worst_case_db(self, indices: Int64, fused: Fused) -> Float64:
        """The scores of these rows by the bound "worst_case"; NaN if all calibrations are checked. Captures of a model without measured
        mates count here only if they are evidence against the candidate."""
        worst_case_db = np.full(len(indices), np.nan)
        llr_db, used = self.llr_db[indices] - fused.trial_penalty_db[indices], fused.used[indices]
        for members, pairs, calibrations in self.groups(used, self._both[indices]):
            if not any([calibration.unchecked for calibration in calibrations]):
                continue
            if len(pairs) == 1 and calibrations[0].mates_measured:  # from the raw score, as score_db
                low_db = self._scores[pairs[0]].low_db(indices[members])
                worst_case_db[members] = low_db - fused.trial_penalty_db[indices[members], pairs[0]]
            else:
                of_pairs = llr_db[members][:, pairs]
                has_mates = [calibration.mates_measured for calibration in calibrations]
                summed_db = np.where(has_mates, of_pairs, np.minimum(of_pairs, 0.0)).sum(axis=1)
                tables = tuple([calibration for calibration in calibrations if calibration.mates_measured])
                worst_case_db[members] = score_db_of_steps(steps_of(summed_db), tables, "worst_case") if tables else 0.0
        return np.asarray(np.maximum(worst_case_db - fused.label_penalty_db[indices], 0.0))

    def strongest_finger_db(self, fused: Fused) -> Float64:
        """The llr_db of each row's strongest finger, minus 10 log10 of the number of fingers (Bonferroni), float64 (n,); minus infinity
        for a row without a finger."""
        fingers = fused.used & np.array([column != "face" for column, _ in self.pairs], bool)
        parts_db = np.where(fingers, self.llr_db - fused.trial_penalty_db, -np.inf)
        tries = np.maximum(np.count_nonzero(fingers, axis=1), 1)
        return np.asarray(parts_db.max(axis=1, initial=-np.inf) - 10 * np.log10(tries))

    def raw(self, column: str, fused: Fused) -> tuple[Float64, Float64]:
        """(similarity, minutiae) of the pair that counts for this column of the probe; NaN if no pair counts."""
        similarity, minutiae = np.full((2, len(self.rows)), np.nan)
        for pair, scores in enumerate(self._scores):
            if self.pairs[pair][0] == column:
                used = fused.used[:, pair]
                similarity[used], minutiae[used] = scores.similarity[used], scores.minutiae[used]
        return similarity, minutiae

    def groups(self, used: Bool, both: Bool) -> Iterator[tuple[Int64, list[int], tuple[Calibration, ...]]]:
        """Groups rows by their used pairs: (indices of the rows, pairs, calibrations of the pairs) for each group. Rows without a used pair
        are left out."""
        kinds = used.astype(np.int8)
        kinds += used & both
        for members in _equal_rows(kinds):
            kind = kinds[members[0]].tolist()
            pairs = [pair for pair, value in enumerate(kind) if value]
            if pairs:
                yield members, pairs, tuple([self._scores[pair].model.of(kind[pair] == 2) for pair in pairs])


@dataclass(frozen=True, eq=False)
class Scored:
    """Rows with their scores. by_embeddings: float64 (2, n), score_db and llr_db of each row's subject without the minutiae that add to
    embeddings; None: no minutiae were added. compared: the number of pairs of minutiae records that were compared. low, high: the rows
    [low, high) of the arrays count; the others are of other probes."""

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
    """The comparisons of a probe, strongest first, equal scores by row. rows: int64 (n,). score_db, llr_db: float64 (n,), in the order of
    the ranking. by_embeddings, compared: as in `Scored`."""

    def __init__(self, results: Iterable[Scored] = ()) -> None:
        self._results = tuple(results)
        self.compared = sum(result.compared for result in self._results)
        parts = [(result.ranked(), n) for n, result in enumerate(self._results)]
        at = np.concatenate([np.zeros(0, np.int64), *(indices for indices, _ in parts)])
        which = np.concatenate([np.zeros(0, np.int64), *(np.full(len(indices), number) for indices, number in parts)])
        empty = [np.zeros(0)]
        rows = np.concatenate([np.zeros(0, np.int64), *(self._results[n].matrix.rows[indices] for indices, n in parts)])
        score_db = np.concatenate(empty + [self._results[n].fused.score_db[indices] for indices, n in parts])
        llr_db = np.concatenate(empty + [self._results[n].fused.llr_db[indices] for indices, n in parts])
        by_embeddings = [_by_embeddings(self._results[n], indices) for indices, n in parts]
        keys = (-llr_db, -score_db)
        order = np.lexsort(keys if (rows[1:] > rows[:-1]).all() else (rows, *keys))
        self.rows, self.score_db, self.llr_db = rows[order], score_db[order], llr_db[order]
        self.by_embeddings = np.concatenate([np.zeros((2, 0)), *by_embeddings], axis=1)[:, order]
        self._at, self._which = at[order], which[order]

    def with_others(self, others: Ranked) -> Ranked:
        """Merges the comparisons of two disjoint sets of rows."""
        return Ranked((*self._results, *others._results))

    def without(self, rows: Int64) -> Ranked:
        """The comparisons of all other rows."""
        kept = []
        for result in self._results:
            score_db = np.where(np.isin(result.matrix.rows, rows), np.nan, result.fused.score_db)
            kept.append(replace(result, fused=replace(result.fused, score_db=score_db)))
        return Ranked(kept)

    def reaching(self, threshold_db: float) -> list[Comparison]:
        """The comparisons that score at least threshold_db."""
        return list(self[: int(np.count_nonzero(self.score_db >= threshold_db))])

    def extrapolated(self) -> Bool:
        """Whether each score is extrapolated, bool (n,), in the order of the ranking."""
        return self._gathered(lambda matrix, fused: fused.extrapolated, bool)

    def resembling(self, score_db: float, finger_db: float) -> Bool:
        """Whether each row resembles the probe, bool (n,), in the order of the ranking: it scores at least score_db, or has a finger with an
        llr_db of at least finger_db plus 10 log10 of the number of fingers."""
        strongest_db = self._gathered(lambda matrix, fused: matrix.strongest_finger_db(fused), float)
        return np.asarray((self.score_db >= score_db) | (strongest_db >= finger_db))

    def raw(self, column: str) -> tuple[Float64, Float64]:
        """(similarity, minutiae), float64 (n,) each, in the order of the ranking: of the pair that counts for the probe's column; NaN if no
        pair counts."""
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


def _equal_rows(kinds: NDArray[np.int8]) -> list[Int64]:
    """The indices of the rows of each group of equal rows, ascending."""
    if not len(kinds):
        return []
    if kinds.shape[1] <= 39:  # a number of base 3 for each row fits into 63 bits; 15 bits sort fastest
        numbers = kinds.astype(np.int64) @ 3 ** np.arange(kinds.shape[1])
        numbers = numbers.astype(np.int16) if kinds.shape[1] <= 9 else numbers
    else:
        _, numbers = np.unique(kinds, axis=0, return_inverse=True)
        numbers = numbers.ravel()
    order = np.argsort(numbers, kind="stable")
    ends = [0, *(np.flatnonzero(np.diff(numbers[order])) + 1).tolist(), len(order)]
    return [order[start:end] for start, end in pairwise(ends)]


def _by_embeddings(result: Scored, indices: Int64) -> Float64:
    if result.by_embeddings is not None:
        return result.by_embeddings[:, indices]
    return np.array([result.fused.score_db[indices], result.fused.llr_db[indices]])


def _strength(score_db: Float64, label_penalty_db: Float64) -> Float64:
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(score_db + label_penalty_db > SCORE_DB_MAX - 1e-6, np.inf, score_db))
