"""Chooses the candidates whose minutiae are compared, by the scores of their embeddings.

Owns the choice. Never compares minutiae itself and never decides.

A comparison of minutiae takes a thousand times as long as one of embeddings, so it is made only where it may change a decision. The
choice is a cascade: cheap evidence of all candidates first, expensive evidence of few. All minutiae are compared of

1. the first candidates by their embeddings: these are shown, whatever they score;
2. those that a mate may be. Mates are drawn from the calibrations, with captures that correlate; of those that reach `reach_db`, a share
   of `risk` at most has less evidence by embeddings than the candidates left out (95 % confidence). If a risk is too small to be
   confirmed by these draws, the limit is 10 log10(risk): a mate's evidence falls to x dB or below with a probability of at most
   10^(x/10) (Wald, Sequential tests of statistical hypotheses, 1945);
3. those whose score may reach `reach_db` by chance. Chernoff's bound (1952) limits the probability that the minutiae of impostors add so
   much; the candidates left out have together less than `risk`;
4. those with a finger that agrees although other captures do not: an operator's own finger, or a record of two people. The minutiae of
   all fingers are compared whose embedding is not too different for a mate, and if one speaks for its candidate, all of its minutiae
   are. The limit is FINGER_FROM_DB at FINGER_NEEDS_DB; where a finger needs more to matter, it rises so that as many are lost. Where a
   finger decides with less than FINGER_NEEDS_DB, all fingers are compared. This rule does not keep to the risk: it loses
   LONE_FINGER_LOSS of such fingers.

The bounds take the calibrations as right, and captures of impostors as independent, as the fusion does. Labels are read as the
embeddings have them, rows of one subject are bounded each by itself, and candidates are taken to have the records that the probe has.
With a risk below 0.001 all minutiae are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import log10, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from biodedup.common.intervals import upper_bound
from biodedup.match.candidates import RawScores
from biodedup.match.judgement import SPEAKS_FOR_DB
from biodedup.match.ranked import Bool, Float64, Fused, Int64, ScoreMatrix, ScoreModel
from biodedup.match.scores.calibration import Calibration
from biodedup.match.scores.calibrations import WithMinutiae
from biodedup.match.scores.fusion import STEP_DB, llr_reaching, mass_of

FINGER_FROM_DB, FINGER_NEEDS_DB = -5.0, 50.0
"""The llr_db by embedding from which a finger may reach FINGER_NEEDS_DB by embedding and minutiae. Of impostors 2.5 % lie above."""
LONE_FINGER_LOSS = 6e-3
"""The share of fingers that agree by embedding and minutiae and lie below FINGER_FROM_DB: of the 2,621 mated pairs that reach FINGER_NEEDS_DB,
14 (0.53 %), 10 of them below -13 dB, so that a lower limit hardly helps (skeleton-1, FVC2002 DB1-4_B and UareU, no print refused, 2026-11)."""
_NEEDED_DB = np.arange(FINGER_NEEDS_DB, 121.0, 2.0)
_STAGED_RISK = 1e-3
"""For a smaller risk all minutiae are compared."""
TILTS = np.array([0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.18, 0.22, 0.3])
"""Of Chernoff's bound, per dB: the exponents among which the least bound is taken. ln(10) / 10 gives Markov's."""
_GRID_STEP_DB = 0.5
_MATES, _SEED = 1 << 15, 2_011


@dataclass(frozen=True, eq=False)
class Probes:
    """which: int64 (n,), ascending, the number of the probe that each candidate is compared with. above: float64 (2, probes), `Stage.above`
    of each probe; minus infinity for none."""

    which: Int64
    above: Float64


@dataclass(frozen=True)
class Stage:
    """first: how many candidates have to be known in full, whatever they score; reach_db: the score from which all have to be; finger_db:
    the llr_db from which a finger alone matters, among several with 10 log10 of their number more; risk: of leaving out a candidate that
    reaches either. correlation: of how well the captures of a mate agree, as `SearchConfig.capture_correlation`. lone_db: by column the llr_db
    by embedding from which a finger that agrees alone is looked for, where that is more than rule 4 asks for. above: score_db and llr_db by
    embeddings of a row of an earlier search; only rows that have more are known in full by rule 1. None: all."""

    first: int
    reach_db: float
    risk: float
    finger_db: float = np.inf
    correlation: float = 0.3
    lone_db: Mapping[str, float] = field(default_factory=dict)
    above: tuple[float, float] | None = None

    def choose(
        self,
        measured: RawScores,
        matrix: ScoreMatrix,
        fused: Fused,
        subjects: Int64 | None,
        probes: Probes,
    ) -> tuple[Bool, Float64]:
        """(the rows to compare in full, score_db and llr_db by embeddings of each row's subject). matrix, fused: of embeddings; subjects:
        as in `Comparer.compare`, another one for each probe. This stage is that of all probes, but for `above`."""
        numbers = np.arange(len(matrix.rows)) if subjects is None else np.unique(subjects, return_inverse=True)[1]
        best = np.flatnonzero(~np.isnan(fused.score_db))  # one row of each subject
        by_embeddings = np.full((2, len(numbers)), np.nan)
        by_embeddings[:, numbers[best]] = fused.score_db[best], fused.llr_db[best]
        by_embeddings = by_embeddings[:, numbers]
        if self.risk < _STAGED_RISK:
            return np.ones(len(numbers), bool), by_embeddings
        score_db, llr_db = by_embeddings
        kept = np.zeros(len(numbers), bool)
        kept[self._first_of_each(matrix.rows, score_db, llr_db, best, probes)] = True
        waiting = fused.used & (measured.waiting if subjects is None else _of_subjects(measured.waiting, numbers))
        with np.errstate(invalid="ignore"):
            kept |= (llr_db >= self._mates_db(waiting, matrix, fused)) | (score_db >= self.reach_db)
        kept = _of_subjects(kept, numbers)
        kept |= self._may_reach(waiting, matrix, fused, kept, probes.which)
        own_db = matrix.llr_db if subjects is None else measured.llr_db(np.arange(len(numbers)))  # nothing borrowed
        kept |= _with_a_finger(measured, self._may_agree(waiting, matrix, fused, own_db) & ~kept[:, None])
        return _of_subjects(kept, numbers), by_embeddings

    def _first_of_each(self, rows: Int64, score_db: Float64, llr_db: Float64, best: Int64, probes: Probes) -> Int64:
        """The strongest candidates of each probe by their embeddings, as many as `first`, without those that `above` leaves out. best: one
        row of each subject."""
        order = best[np.lexsort((rows[best], -llr_db[best], -score_db[best], probes.which[best]))]
        of_probe = probes.which[order]
        first = order[np.arange(len(order)) - np.searchsorted(of_probe, of_probe) < self.first]
        least_score_db, least_llr_db = probes.above[:, probes.which[first]]
        equal = (score_db[first] == least_score_db) & (llr_db[first] > least_llr_db)
        return np.asarray(first[(score_db[first] > least_score_db) | equal])

    def _mates_db(self, waiting: Bool, matrix: ScoreMatrix, fused: Fused) -> Float64:
        """The llr_db by embeddings from which a candidate may be a mate, float64 (n,)."""
        least_db, models = np.full(len(waiting), np.inf), matrix.models
        known: dict[tuple[tuple[Calibration, WithMinutiae | None], ...], float] = {}
        for some, pairs, calibrations in matrix.alike(fused.used, waiting):
            unordered = [(models[p].alone, models[p].with_minutiae if waiting[some[0], p] else None) for p in pairs]
            captures = tuple(sorted(unordered, key=lambda capture: (id(capture[0]), id(capture[1]))))
            if captures not in known:
                by_embeddings, by_all = _mates(captures, self.correlation)
                reaching = by_embeddings[by_all >= llr_reaching(self.reach_db, calibrations)]
                known[captures] = _lowest(reaching, self.risk)
            least_db[some] = known[captures]
        return least_db

    def _may_agree(self, waiting: Bool, matrix: ScoreMatrix, fused: Fused, own_db: Float64) -> Bool:
        """The fingers that may be of the probe's person although other captures are not, bool (n, pairs). A candidate with a single capture
        has none: rule 2 judges it. own_db: of each row's own embeddings."""
        fingers = np.count_nonzero(fused.used & [column != "face" for column, _ in matrix.pairs], axis=1)
        needed_db = self.finger_db + 10 * np.log10(np.maximum(fingers, 1))[:, None]
        # what lifts the candidate, if all other captures add what impostors' add: the logarithm of a mean is hardly above the mean
        means_db = _log_means(waiting, matrix, fused.used, np.arange(len(waiting)))[:, :, 0] / TILTS[0]
        lifting_db = matrix.llr_reaching(self.reach_db, fused.used, waiting)[:, None]
        lifting_db = lifting_db - means_db.sum(axis=1, keepdims=True) + means_db
        needed_db = np.where(fused.used, np.minimum(lifting_db, needed_db), needed_db)
        several = np.count_nonzero(fused.used, axis=1) > 1
        from_db = np.full(own_db.shape, FINGER_FROM_DB)
        for number, model in enumerate(matrix.models):
            if model.with_minutiae is not None:
                from_db[:, number] = np.interp(
                    needed_db[:, number], _NEEDED_DB, _fingers_from_db(model.alone, model.with_minutiae)
                )
        rare_db = [self.lone_db.get(column, -np.inf) for column, _ in matrix.pairs]
        from_db = np.maximum(from_db, rare_db)
        with np.errstate(invalid="ignore"):
            all_db = np.where(needed_db < FINGER_NEEDS_DB, rare_db, from_db)
            return np.asarray(several[:, None] & ~(own_db < all_db))

    def _may_reach(self, waiting: Bool, matrix: ScoreMatrix, fused: Fused, kept: Bool, which: Int64) -> Bool:
        """The candidates, apart from those kept, that may reach reach_db by chance. waiting: bool (n, pairs), of the used pairs those with
        minutiae to compare; which: the probe of each candidate."""
        rest = np.flatnonzero(~kept & waiting.any(axis=1))
        log_chance = _log_means(waiting[rest], matrix, fused.used[rest], rest).sum(axis=1)
        log_chance -= TILTS * (fused.trial_penalty_db.sum(axis=1) + fused.label_penalty_db)[rest, None]
        least_db = matrix.llr_reaching(self.reach_db, fused.used[rest], waiting[rest]) - STEP_DB
        chance = np.exp(np.minimum((log_chance - TILTS * least_db[:, None]).min(axis=1), 0.0))
        order = np.lexsort((chance, which[rest]))
        may = np.zeros(len(kept), bool)
        for of_probe in np.split(order, np.flatnonzero(np.diff(which[rest][order])) + 1):
            may[rest[of_probe[np.cumsum(chance[of_probe]) > self.risk]]] = True
        return may


def _log_means(waiting: Bool, matrix: ScoreMatrix, used: Bool, ats: Int64) -> Float64:
    """`log_means_of` each pair that counts, float64 (k, pairs, tilts), of the rows ats; of a pair without minutiae to compare, its llr_db
    times the tilts. waiting, used: bool (k, pairs)."""
    llr_db = np.where(used, matrix.llr_db[ats], 0.0)
    log_means = TILTS * llr_db[..., None]
    for number, model in enumerate(matrix.models):
        adds = waiting[:, number] & used[:, number]
        if adds.any():
            log_means[adds, number] = log_means_of(model, llr_db[adds, number])
    return log_means


def _with_a_finger(measured: RawScores, cells: Bool) -> Bool:
    """The candidates that one of these fingers speaks for by embedding and minutiae, which are compared. cells: bool (n, pairs)."""
    cells = cells & measured.waiting
    measured.compare(cells)
    rows = np.flatnonzero(cells.any(axis=1))
    found = np.zeros(len(cells), bool)
    found[rows] = (cells[rows] & (measured.llr_db(rows) >= SPEAKS_FOR_DB)).any(axis=1)
    return found


def _of_subjects(values: Bool, numbers: Int64) -> Bool:
    """For each row whether the value of any row of its subject is true, bool as values. numbers: the subject of each row."""
    of_subject = np.zeros((int(numbers.max(initial=-1)) + 1, *values.shape[1:]), bool)
    np.logical_or.at(of_subject, numbers, values)
    return of_subject[numbers]


def _lowest(values: NDArray[np.float32], risk: float) -> float:
    """The value that at most this share lies below, with 95 % confidence: of mates' llr_db. Wald's bound if they are too few to tell."""
    bounds = upper_bound(np.arange(int(risk * len(values)) + 1), len(values)) if len(values) else np.ones(1)
    lost = int(np.searchsorted(bounds, risk, side="right")) - 1
    return float(np.partition(values, lost)[lost]) if lost >= 0 else 10 * log10(risk)


@lru_cache(maxsize=64)
def _mates(
    captures: tuple[tuple[Calibration, WithMinutiae | None], ...], correlation: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Sums of llr_db of drawn mates, float32 (_MATES,) each: by embeddings, and with the minutiae of the captures that have some. A
    mate's captures share how well they agree, as ranks on a normal scale."""
    rng = np.random.default_rng(_SEED)
    common = sqrt(correlation) * rng.standard_normal(_MATES)

    def drawn_db(calibration: Calibration) -> Float64:
        first, mass = mass_of(calibration, "mated")
        ranks = ndtr(common + sqrt(1 - correlation) * rng.standard_normal(_MATES))
        # masses are of values rounded up
        at = np.minimum(np.searchsorted(np.cumsum(mass), ranks), len(mass) - 1)
        return np.asarray((first - 1 + at) * STEP_DB, np.float64)

    by_embeddings, by_all = np.zeros((2, _MATES))
    for alone, adds in captures:
        llr_db = drawn_db(alone)
        by_embeddings += llr_db
        by_all += llr_db if adds is None else adds.both.llr_db(llr_db + drawn_db(adds.minutiae))
    return by_embeddings.astype(np.float32), by_all.astype(np.float32)


@lru_cache(maxsize=64)
def _fingers_from_db(alone: Calibration, adds: WithMinutiae) -> Float64:
    """For each of _NEEDED_DB the llr_db by embedding that as few of the mates' fingers lie below which reach it by embedding and minutiae, as
    below FINGER_FROM_DB of those which reach FINGER_NEEDS_DB. Embedding and minutiae of mates are taken as independent."""
    lost, limits = 0.0, list[float]()
    for needed_db in _NEEDED_DB.tolist():
        by_embedding, share = _reaching(alone, adds, needed_db)
        reaching = np.cumsum(share)
        if not limits:
            below = np.count_nonzero(by_embedding < FINGER_FROM_DB)
            lost = float(reaching[below - 1] / reaching[-1]) if below and reaching[-1] > 0 else 0.0
        limit = (
            by_embedding[np.searchsorted(reaching, lost * reaching[-1], side="right")] if reaching[-1] > 0 else -np.inf
        )
        limits.append(max(float(limit), FINGER_FROM_DB) if lost else FINGER_FROM_DB)
    return np.array(limits)


@lru_cache(maxsize=256)
def _reaching(alone: Calibration, adds: WithMinutiae, needed_db: float) -> tuple[Float64, Float64]:
    """(llr_db of an embedding, the share of mates' fingers that have it and reach needed_db by embedding and minutiae), float64 (n,) each.
    Embedding and minutiae are taken as independent."""
    (first, mass), (start, added) = mass_of(alone, "mated"), mass_of(adds.minutiae, "mated")
    by_embedding = (first + np.arange(len(mass))) * STEP_DB
    added_from = np.append(
        np.cumsum(added[::-1])[::-1], 0.0
    )  # the share with minutiae of so many steps above the first
    sums_db = np.arange(first + start, first + start + len(mass) + len(added)) * STEP_DB
    both_db = np.maximum.accumulate(adds.both.llr_db(sums_db))
    least = first + start + int(np.searchsorted(both_db, needed_db))
    steps = np.clip(least - (first + np.arange(len(mass))) - start, 0, len(added))
    return np.asarray(by_embedding, np.float64), np.asarray(mass * added_from[steps], np.float64)


def lone_fingers_missed(alone: Calibration, adds: WithMinutiae, needed_db: float, from_db: float) -> float:
    """The share of mates' fingers whose embedding has an llr_db below from_db, of those that reach needed_db by embedding and minutiae."""
    by_embedding, share = _reaching(alone, adds, needed_db)
    return float(share[by_embedding < from_db].sum() / max(share.sum(), 1e-300))


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
