"""Chooses the candidates whose minutiae are compared, by what their embeddings say.

Owns the choice. Never compares minutiae itself and never decides.

A comparison of minutiae takes a thousand times as long as one of embeddings, so it is made only where it may change a decision. The
choice is a cascade: cheap evidence of all candidates first, expensive evidence of few. All minutiae are compared of

1. the first candidates by their embeddings: these are shown, whatever they score;
2. those that a mate may be: the sum of llr_db is above 10 log10(risk). A mate's sum falls to x dB or below with a probability of at
   most 10^(x/10) (Wald, Sequential tests of statistical hypotheses, 1945), so that at most this share of mates is left out;
3. those whose score may reach `reach_db` by chance. Chernoff's bound (1952) limits the probability that the minutiae of impostors add so
   much; the candidates left out have together less than `risk`;
4. those with a finger that agrees although the others do not, which may be an operator's own: of the FINGERS fingers that embed most
   alike the minutiae are compared, and if one still speaks for the candidate, all of its minutiae are.

The bounds take the calibrations as right, and captures of impostors as independent, as the fusion does. The reading of the labels and,
of several rows of a subject, each row by itself, are taken as the embeddings have them. With a risk of 0 all minutiae are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from biodedup.match.calibration import Calibration
from biodedup.match.candidates import Measured
from biodedup.match.fusion import STEP_DB
from biodedup.match.judgement import SPEAKS_FOR_DB
from biodedup.match.ranked import Bool, Float64, Fused, Int64, ScoreMatrix, ScoreModel

FINGERS = 20
"""Fingers of all candidates together, two for each of a probe's ten."""
TILTS = np.array([0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.18, 0.22, 0.3])
"""Of Chernoff's bound, per dB: the exponents among which the least bound is taken. ln(10) / 10 gives Markov's."""
_GRID_STEP_DB = 0.5


@dataclass(frozen=True)
class Stage:
    """first: how many candidates have to be known in full, whatever they score; reach_db: the score from which all have to be; risk: of
    leaving one out that reaches it."""

    first: int
    reach_db: float
    risk: float

    def choose(
        self, measured: Measured, matrix: ScoreMatrix, fused: Fused, subjects: Int64 | None
    ) -> tuple[Bool, Float64]:
        """(the rows to compare in full, score_db and llr_db by embeddings of each row's subject). matrix, fused: of embeddings; subjects:
        as in `Comparer.compare`."""
        numbers = np.arange(len(matrix.rows)) if subjects is None else np.unique(subjects, return_inverse=True)[1]
        best = np.flatnonzero(~np.isnan(fused.score_db))  # one row of each subject
        by_embeddings = np.full((2, len(numbers)), np.nan)
        by_embeddings[:, numbers[best]] = fused.score_db[best], fused.llr_db[best]
        by_embeddings = by_embeddings[:, numbers]
        if self.risk <= 0:
            return np.ones(len(numbers), bool), by_embeddings
        score_db, llr_db = by_embeddings
        kept = np.zeros(len(numbers), bool)
        order = best[np.lexsort((matrix.rows[best], -llr_db[best], -score_db[best]))]
        kept[order[: self.first]] = True
        with np.errstate(invalid="ignore"):
            kept |= (llr_db >= 10 * np.log10(self.risk)) | (score_db >= self.reach_db)
        kept = _of_subjects(kept, numbers)
        waiting = measured.waiting if subjects is None else _of_subjects(measured.waiting, numbers)
        kept |= self._may_reach(waiting & fused.used, matrix, fused, kept)
        if self.first:  # what is shown is judged by its kind, too
            kept |= _with_a_finger(measured, matrix, kept)
        return _of_subjects(kept, numbers), by_embeddings

    def _may_reach(self, waiting: Bool, matrix: ScoreMatrix, fused: Fused, kept: Bool) -> Bool:
        """The candidates, apart from those kept, that may reach reach_db by chance. waiting: bool (n, pairs), of the used pairs those with
        minutiae to compare."""
        used = fused.used
        rest = np.flatnonzero(~kept & waiting.any(axis=1))
        log_chance = -TILTS * (fused.trial_penalty_db.sum(axis=1) + fused.label_penalty_db)[rest, None]
        for number, model in enumerate(matrix.models):
            llr_db, adds = matrix.llr_db[rest, number], waiting[rest, number]
            if adds.any():
                log_chance[adds] += log_means_of(model, llr_db[adds])
            alone = used[rest, number] & ~adds
            log_chance[alone] += TILTS * llr_db[alone, None]
        least_db = matrix.llr_reaching(self.reach_db, used[rest], waiting[rest]) - STEP_DB
        chance = np.exp(np.minimum((log_chance - TILTS * least_db[:, None]).min(axis=1), 0.0))
        order = np.argsort(chance, kind="stable")
        may = np.zeros(len(kept), bool)
        may[rest[order[np.cumsum(chance[order]) > self.risk]]] = True
        return may


def _with_a_finger(measured: Measured, matrix: ScoreMatrix, kept: Bool) -> Bool:
    """The candidates that one finger speaks for, by embedding and minutiae, among the fingers that embed most alike."""
    several = np.count_nonzero(~np.isnan(matrix.llr_db), axis=1) > 1  # a single capture contradicts no other
    at, number = np.nonzero(measured.waiting & several[:, None])
    llr_db = measured.llr_db()[at, number]
    if len(at) > FINGERS:
        top = np.flatnonzero(llr_db >= np.partition(llr_db, -FINGERS)[-FINGERS])
        top = top[np.argsort(-llr_db[top], kind="stable")[:FINGERS]]
        at, number = at[top], number[top]
    cells = np.zeros(measured.waiting.shape, bool)
    cells[at, number] = ~kept[at]
    measured.compare(cells)
    with np.errstate(invalid="ignore"):
        return np.asarray((cells & (measured.llr_db() >= SPEAKS_FOR_DB)).any(axis=1))


def _of_subjects(values: Bool, numbers: Int64) -> Bool:
    """For each row whether the value of any row of its subject is true, bool as values. numbers: the subject of each row."""
    of_subject = np.zeros((int(numbers.max(initial=-1)) + 1, *values.shape[1:]), bool)
    np.logical_or.at(of_subject, numbers, values)
    return of_subject[numbers]


def log_means_of(model: ScoreModel, llr_db: Float64) -> Float64:
    """The natural logarithm of the mean of exp(tilt x), float64 (n, tilts), where x is the llr_db of embedding and minutiae together, of an
    impostor whose embedding has this llr_db. Rounded up."""
    assert model.with_minutiae is not None, "only these add minutiae"
    first, table = _table(model.with_minutiae.minutiae, model.with_minutiae.both)
    at = np.ceil((llr_db - first) / _GRID_STEP_DB).astype(np.int64)
    return np.asarray(table[np.clip(at, 0, len(table) - 1)])


@lru_cache(maxsize=64)
def _table(minutiae: Calibration, both: Calibration) -> tuple[float, Float64]:
    """(first llr_db of an embedding, the logarithms for it and for each _GRID_STEP_DB more up to where `both` ends)."""
    start, mass = minutiae.nonmated_llr_pmf(STEP_DB)
    there = np.flatnonzero(mass > 0)
    added_db, share = (start + there) * STEP_DB, mass[there] / mass[there].sum()
    first = float(both.score[0] - added_db[-1])
    grid = np.arange(first, float(both.score[-1] - added_db[0]) + _GRID_STEP_DB, _GRID_STEP_DB)
    sums_db = both.llr_db(grid[:, None] + added_db)
    means = np.stack([np.exp(tilt * sums_db) @ share for tilt in TILTS.tolist()], axis=1)
    return first, np.log(means)
