"""One probe's comparisons with many candidates, as arrays: how captures' evidence becomes one score a row, and their order.

Owns the sums, their calibration, and the ranking. Never measures a similarity and never decides. Nothing here loops over rows:
a `Comparison` is made only of those that somebody looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from biodedup.match.calibration import SCORE_DB_MAX, Calibration
from biodedup.match.calibrations import WithMinutiae
from biodedup.match.fusion import fused_interval_db, fused_score_db
from biodedup.match.labels import Pair
from biodedup.values import Evidence

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]


@dataclass(frozen=True)
class Comparison:
    """One candidate's result. evidence: one entry a capture that could be compared; charge_db: what was taken off both sums,
    for readings of the labels that were tried; interval_db: of score_db, 95 %, None where a card does not say."""

    row: int
    score_db: float
    llr_db: float
    extrapolated: bool
    evidence: tuple[Evidence, ...]
    charge_db: float = 0.0
    interval_db: tuple[float, float] | None = None


@dataclass(frozen=True, eq=False)
class Law:
    """How one model's templates score: by embedding or minutiae alone, and, where a card says how, by both."""

    alone: Calibration
    with_minutiae: WithMinutiae | None

    def of(self, both: bool) -> Calibration:
        return self.with_minutiae.both if both and self.with_minutiae is not None else self.alone


@dataclass(frozen=True, eq=False)
class Measured:
    """A pair of columns, compared. similarity, minutiae, score_db, llr_db: float64 (n,), of every row; NaN where it cannot be
    compared so."""

    law: Law
    similarity: Float64
    minutiae: Float64
    score_db: Float64
    llr_db: Float64


def calibrated(law: Law, similarity: Float64, minutiae: Float64, *, by_embedding: bool) -> Measured:
    """What raw scores say. similarity, minutiae: float64 (n,), NaN where absent; by_embedding: minutiae only add to it."""
    score_db, llr_db = np.full((2, len(similarity)), np.nan)
    raw = similarity if by_embedding else minutiae
    both = ~np.isnan(similarity + minutiae) & (law.with_minutiae is not None)
    there = np.flatnonzero(~np.isnan(raw))
    llr_db[there] = law.alone.llr_db(raw[there])
    alone = there[~both[there]]
    score_db[alone] = law.alone.score_db(raw[alone])
    if law.with_minutiae is not None:
        there = np.flatnonzero(both)
        summed = llr_db[there] + law.with_minutiae.minutiae.llr_db(minutiae[there])
        score_db[there] = law.with_minutiae.both.score_db(summed)
        llr_db[there] = law.with_minutiae.both.llr_db(summed)
    return Measured(law, similarity, minutiae, score_db, llr_db)


@dataclass(frozen=True, eq=False)
class Fused:
    """Evidence of several captures as one score a row, float64 (n,) each; NaN where a row has none.

    used: bool (n, pairs), the pairs that count; tries_db: float64 (n, pairs), what is off the evidence of a pair that is the best
    of several; charge_db: what is off the sums, for readings of the labels.
    """

    used: Bool
    tries_db: Float64
    score_db: Float64
    llr_db: Float64
    extrapolated: Bool
    charge_db: Float64

    def charged(self, charge_db: Float64 | float) -> Fused:
        score_db, llr_db = np.maximum(self.score_db - charge_db, 0.0), self.llr_db - charge_db
        charge = np.broadcast_to(np.asarray(charge_db, np.float64), score_db.shape)
        return Fused(self.used, self.tries_db, score_db, llr_db, self.extrapolated, charge)

    def or_better(self, other: Fused, ats: Int64) -> Fused:
        """The stronger of both in each row; other: of the rows `ats` alone. By score; but where scores end before the evidence
        does, by evidence."""
        mine = _strength(self.score_db[ats], self.charge_db[ats])
        theirs = _strength(other.score_db, other.charge_db)
        better = np.isnan(mine) & ~np.isnan(theirs)
        with np.errstate(invalid="ignore"):
            better |= (theirs > mine) | ((theirs == mine) & (other.llr_db > self.llr_db[ats]))
        mixed: dict[str, Any] = {name: array.copy() for name, array in vars(self).items()}
        for name, array in vars(other).items():
            mixed[name][ats[better]] = array[better]
        return Fused(**mixed)


class Board:
    """All pairs of columns of a probe with some rows. pairs -> what was measured; rows: int64 (n,)."""

    def __init__(self, rows: Int64, measured: Mapping[Pair, Measured]) -> None:
        self.rows = rows
        self.pairs = tuple(measured)
        self.number = {pair: i for i, pair in enumerate(self.pairs)}
        self._measured = tuple(measured.values())
        shape = (len(self._measured), len(self.rows))
        self.llr_db = np.array([one.llr_db for one in self._measured]).reshape(shape).T
        self._score_db = np.array([one.score_db for one in self._measured]).reshape(shape).T
        self._both = np.array(
            [
                ~np.isnan(one.similarity + one.minutiae) & (one.law.with_minutiae is not None)
                for one in self._measured
            ],
            bool,
        ).reshape(shape).T  # fmt: skip

    def fuse(self, used: Bool, tries_db: Float64 | None = None, ats: Int64 | None = None) -> Fused:
        """used: bool (n, pairs), of these rows (None: all)."""
        ats = np.arange(len(self.rows)) if ats is None else ats
        tries_db = np.zeros(used.shape) if tries_db is None else tries_db
        llr_db = (np.where(used, self.llr_db[ats], 0.0) - tries_db).sum(axis=1)
        score_db, extrapolated = np.full(len(ats), np.nan), np.zeros(len(ats), bool)
        kinds = used.astype(np.int8) + (used & self._both[ats])
        for some in _alike(kinds):
            pattern = kinds[some[0]]
            calibrations = self._calibrations(pattern)
            if len(calibrations) == 1:
                (pair,) = np.flatnonzero(pattern)
                score_db[some] = np.maximum(self._score_db[ats[some], pair] - tries_db[some, pair], 0.0)
                extrapolated[some] = score_db[some] > calibrations[0].measured_db
            elif calibrations:
                score_db[some], extrapolated[some] = fused_score_db(llr_db[some], calibrations)
        return Fused(used, tries_db, score_db, llr_db, extrapolated, np.zeros(len(ats)))

    def comparison(self, at: int, fused: Fused) -> Comparison:
        used, charge_db = fused.used[at], float(fused.charge_db[at])
        score_db, llr_db = float(fused.score_db[at]), float(fused.llr_db[at])
        evidence = tuple(
            self._evidence(int(pair), at, float(fused.tries_db[at, pair])) for pair in np.flatnonzero(used)
        )
        calibrations = self._calibrations(used.astype(np.int8) + (used & self._both[at]))
        interval, bounds = None, fused_interval_db(llr_db + charge_db, calibrations)
        if bounds is not None:
            low, high = (float(bound) - charge_db for bound in bounds)
            interval = (max(min(low, score_db), 0.0), max(high, score_db))
        return Comparison(
            int(self.rows[at]), score_db, llr_db, bool(fused.extrapolated[at]), evidence, charge_db, interval
        )

    def raw(self, column: str, fused: Fused) -> tuple[Float64, Float64]:
        """(similarity, minutiae) of the pair that counts of this column of the probe; NaN where none does."""
        similarity, minutiae = np.full((2, len(self.rows)), np.nan)
        for pair, one in enumerate(self._measured):
            if self.pairs[pair][0] == column:
                used = fused.used[:, pair]
                similarity[used], minutiae[used] = one.similarity[used], one.minutiae[used]
        return similarity, minutiae

    def _calibrations(self, pattern: NDArray[np.int8]) -> tuple[Calibration, ...]:
        return tuple(self._measured[pair].law.of(bool(pattern[pair] == 2)) for pair in np.flatnonzero(pattern))

    def _evidence(self, pair: int, at: int, tries_db: float) -> Evidence:
        one = self._measured[pair]
        similarity, minutiae = (
            None if np.isnan(value[at]) else float(value[at]) for value in (one.similarity, one.minutiae)
        )
        return Evidence(
            *self.pairs[pair],
            score_db=max(float(one.score_db[at]) - tries_db, 0.0) if tries_db else float(one.score_db[at]),
            llr_db=float(one.llr_db[at]) - tries_db,
            similarity=similarity,
            minutiae=minutiae,
        )


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
        order = np.lexsort((rows, -llr_db, -score_db))
        self.rows, self.score_db, self.llr_db = rows[order], score_db[order], llr_db[order]
        self._at, self._which = at[order], which[order]

    def with_others(self, others: Ranked) -> Ranked:
        """Two comparisons of disjoint rows as one."""
        return Ranked((*self._results, *others._results))

    def reaching(self, threshold_db: float) -> list[Comparison]:
        """Those that score so much."""
        return list(self[: int(np.count_nonzero(self.score_db >= threshold_db))])

    def extrapolated(self) -> Bool:
        """bool (n,), in this order."""
        return self._gathered(lambda board, fused: fused.extrapolated, bool)

    def raw(self, column: str) -> tuple[Float64, Float64]:
        """(similarity, minutiae), float64 (n,) each, in this order: what counts of the probe's column; NaN where nothing does."""
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
            return [self._at_rank(i) for i in range(*index.indices(len(self)))]
        return self._at_rank(range(len(self.rows))[index])

    def _at_rank(self, index: int) -> Comparison:
        board, fused = self._results[int(self._which[index])]
        return board.comparison(int(self._at[index]), fused)


def _alike(kinds: NDArray[np.int8]) -> list[Int64]:
    """Which rows are the same: of each sort of row where it is."""
    if kinds.shape[1] <= 39:  # three values a pair, in 63 bits
        _, which, counts = np.unique(kinds @ 3 ** np.arange(kinds.shape[1]), return_inverse=True, return_counts=True)
    else:
        _, which, counts = np.unique(kinds, axis=0, return_inverse=True, return_counts=True)
    return np.split(np.argsort(which.ravel(), kind="stable"), np.cumsum(counts)[:-1]) if len(counts) else []


def _strength(score_db: Float64, charge_db: Float64) -> Float64:
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(score_db + charge_db > SCORE_DB_MAX - 1e-6, np.inf, score_db))
