"""Chooses the candidates whose minutiae are compared, by the scores of their embeddings.

Owns this choice. Never decides.

A comparison of minutiae takes a thousand times as long as a comparison of embeddings. So the choice is a cascade: the cheap evidence of all
candidates first, then the expensive evidence of the candidates for which it may change the decision. All minutiae are compared for

1. the first candidates by their embeddings, because a decision shows them whatever they score;
2. candidates that may be mates. Mates are drawn at random from the calibrations, with correlated captures. Of the drawn mates that reach
   `reach_db`, at most a share of `risk` has less evidence by embeddings than the limit (95 % confidence). If the risk is too small for the
   number of draws, the limit is 10 log10(risk): a mate's evidence falls to x dB or below with a probability of at most 10^(x/10) (Wald,
   Sequential tests of statistical hypotheses, 1945);
3. impostors that may reach `reach_db` by chance. Chernoff's bound (1952) limits the probability that an impostor's minutiae add so much
   evidence. The bounds of all candidates that are left out sum to at most `risk`;
4. candidates with a finger that agrees although the other captures disagree: the finger of an operator, or a record of two people. First
   the minutiae of each finger are compared whose embedding has an llr_db above a limit. If a finger then is evidence for its candidate,
   all minutiae of the candidate are compared. The limit is FINGER_FROM_DB for a finger that needs FINGER_NEEDS_DB to matter. For a finger
   that needs more, the limit is higher, so that the same share is lost. For a finger that needs less, there is no limit. This rule does
   not depend on the risk: it loses LONE_FINGER_LOSS of such fingers.

The bounds assume that the calibrations are right and that captures of impostors are independent, as the fusion does. They assume the
labels as read for the embeddings, treat each row of a subject separately, and assume that candidates have the minutiae that the probe has.
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
"""The llr_db by embedding from which a finger may reach FINGER_NEEDS_DB by embedding and minutiae. 2.5 % of impostors are above it."""
LONE_FINGER_LOSS = 6e-3
"""The share of fingers that agree by embedding and minutiae, but are below FINGER_FROM_DB: 14 of the 2,621 mated pairs that reach
FINGER_NEEDS_DB (0.53 %). 10 of the 14 are below -13 dB, so that a lower limit would hardly help (skeleton-1, FVC2002 DB1-4_B and UareU,
no print refused, 2026-11)."""
_NEEDED_DB = np.arange(FINGER_NEEDS_DB, 121.0, 2.0)
_STAGED_RISK = 1e-3
"""With a smaller risk all minutiae are compared."""
TILTS = np.array([0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.18, 0.22, 0.3])
"""Tried exponents of Chernoff's bound, per dB. The lowest bound counts. The exponent ln(10) / 10 gives Markov's bound."""
_GRID_STEP_DB = 0.5
_MATES, _SEED = 1 << 15, 2_011


@dataclass(frozen=True, eq=False)
class Probes:
    """The probes of a batch. which: int64 (n,), ascending, the number of each candidate's probe. above: float64 (2, probes), `Stage.above` of
    each probe; minus infinity for None."""

    which: Int64
    above: Float64


@dataclass(frozen=True)
class Stage:
    """The settings of the choice.

    first: the number of candidates of rule 1. reach_db: the score of rules 2 and 3. finger_db: the llr_db from which a single finger matters
    (rule 4); among several fingers it is higher by 10 log10 of their number. risk: the risk of leaving out a candidate that reaches
    reach_db. correlation: the correlation between a mate's captures, as `SearchConfig.capture_correlation`. lone_db: column -> a higher limit
    for rule 4. above: score_db and llr_db by embeddings of a row of an earlier search; rule 1 chooses only rows that have more. None: rule 1
    has no limit.
    """

    first: int
    reach_db: float
    risk: float
    finger_db: float = np.inf
    correlation: float = 0.3
    lone_db: Mapping[str, float] = field(default_factory=dict)
    above: tuple[float, float] | None = None

    def choose(
        self,
        raw_scores: RawScores,
        matrix: ScoreMatrix,
        fused: Fused,
        subjects: Int64 | None,
        probes: Probes,
    ) -> tuple[Bool, Float64]:
        """(the rows to compare in full, bool (n,); score_db and llr_db by embeddings of each row's subject, float64 (2, n)). matrix, fused:
        the scores of embeddings. subjects: as in `Comparer.compare`; different probes have different subjects. All probes have this stage,
        except for `above`."""
        numbers = np.arange(len(matrix.rows)) if subjects is None else np.unique(subjects, return_inverse=True)[1]
        best = np.flatnonzero(~np.isnan(fused.score_db))  # a single row of each subject
        by_embeddings = np.full((2, len(numbers)), np.nan)
        by_embeddings[:, numbers[best]] = fused.score_db[best], fused.llr_db[best]
        by_embeddings = by_embeddings[:, numbers]
        if self.risk < _STAGED_RISK:
            return np.ones(len(numbers), bool), by_embeddings
        score_db, llr_db = by_embeddings
        kept = np.zeros(len(numbers), bool)
        kept[self._first_of_each(matrix.rows, score_db, llr_db, best, probes)] = True
        waiting = fused.used & (raw_scores.waiting if subjects is None else _of_subjects(raw_scores.waiting, numbers))
        with np.errstate(invalid="ignore"):
            kept |= (llr_db >= self._mates_db(waiting, matrix, fused)) | (score_db >= self.reach_db)
        kept = _of_subjects(kept, numbers)
        kept |= self._may_reach(waiting, matrix, fused, kept, probes.which)
        # without columns that are borrowed from other rows of the subject
        row_db = matrix.llr_db if subjects is None else raw_scores.llr_db(np.arange(len(numbers)))
        kept |= _with_matching_finger(raw_scores, self._may_agree(waiting, matrix, fused, row_db) & ~kept[:, None])
        return _of_subjects(kept, numbers), by_embeddings

    def _first_of_each(self, rows: Int64, score_db: Float64, llr_db: Float64, best: Int64, probes: Probes) -> Int64:
        """The `first` strongest candidates of each probe by their embeddings (rule 1), if they have more evidence than `above`. best: a single
        row of each subject."""
        order = best[np.lexsort((rows[best], -llr_db[best], -score_db[best], probes.which[best]))]
        of_probe = probes.which[order]
        first = order[np.arange(len(order)) - np.searchsorted(of_probe, of_probe) < self.first]
        above_score_db, above_llr_db = probes.above[:, probes.which[first]]
        equal = (score_db[first] == above_score_db) & (llr_db[first] > above_llr_db)
        return np.asarray(first[(score_db[first] > above_score_db) | equal])

    def _mates_db(self, waiting: Bool, matrix: ScoreMatrix, fused: Fused) -> Float64:
        """The llr_db by embeddings from which a candidate may be a mate, float64 (n,)."""
        limit_db, models = np.full(len(waiting), np.inf), matrix.models
        limits: dict[tuple[tuple[Calibration, WithMinutiae | None], ...], float] = {}
        for members, pairs, calibrations in matrix.groups(fused.used, waiting):
            unordered = [(models[p].alone, models[p].with_minutiae if waiting[members[0], p] else None) for p in pairs]
            captures = tuple(sorted(unordered, key=lambda capture: (id(capture[0]), id(capture[1]))))
            if captures not in limits:
                by_embeddings, by_all = _drawn_mates(captures, self.correlation)
                reaching = by_embeddings[by_all >= llr_reaching(self.reach_db, calibrations)]
                limits[captures] = _lower_limit(reaching, self.risk)
            limit_db[members] = limits[captures]
        return limit_db

    def _may_agree(self, waiting: Bool, matrix: ScoreMatrix, fused: Fused, row_db: Float64) -> Bool:
        """The fingers that may be of the probe's person although the other captures are not (rule 4), bool (n, pairs). A candidate with a single
        capture has none, because rule 2 covers it. row_db: llr_db of each row's own embeddings, float64 (n, pairs)."""
        fingers = np.count_nonzero(fused.used & [column != "face" for column, _ in matrix.pairs], axis=1)
        needed_db = self.finger_db + 10 * np.log10(np.maximum(fingers, 1))[:, None]
        # the evidence that a finger needs to lift the candidate to reach_db, if all other captures add what an impostor's add on average
        means_db = _log_means(waiting, matrix, fused.used, np.arange(len(waiting)))[:, :, 0] / TILTS[0]
        lifting_db = matrix.llr_reaching(self.reach_db, fused.used, waiting)[:, None]
        lifting_db = lifting_db - means_db.sum(axis=1, keepdims=True) + means_db
        needed_db = np.where(fused.used, np.minimum(lifting_db, needed_db), needed_db)
        several = np.count_nonzero(fused.used, axis=1) > 1
        from_db = np.full(row_db.shape, FINGER_FROM_DB)
        for number, model in enumerate(matrix.models):
            if model.with_minutiae is not None:
                from_db[:, number] = np.interp(
                    needed_db[:, number], _NEEDED_DB, _fingers_from_db(model.alone, model.with_minutiae)
                )
        lone_db = [self.lone_db.get(column, -np.inf) for column, _ in matrix.pairs]
        from_db = np.maximum(from_db, lone_db)
        with np.errstate(invalid="ignore"):
            limit_db = np.where(needed_db < FINGER_NEEDS_DB, lone_db, from_db)
            return np.asarray(several[:, None] & ~(row_db < limit_db))

    def _may_reach(self, waiting: Bool, matrix: ScoreMatrix, fused: Fused, kept: Bool, which: Int64) -> Bool:
        """The candidates that are not kept yet and may reach reach_db by chance (rule 3). waiting: bool (n, pairs), the used pairs with
        minutiae to compare. which: the probe of each candidate."""
        rest = np.flatnonzero(~kept & waiting.any(axis=1))
        log_chance = _log_means(waiting[rest], matrix, fused.used[rest], rest).sum(axis=1)
        log_chance -= TILTS * (fused.trial_penalty_db.sum(axis=1) + fused.label_penalty_db)[rest, None]
        needed_db = matrix.llr_reaching(self.reach_db, fused.used[rest], waiting[rest]) - STEP_DB
        chance = np.exp(np.minimum((log_chance - TILTS * needed_db[:, None]).min(axis=1), 0.0))
        order = np.lexsort((chance, which[rest]))
        may = np.zeros(len(kept), bool)
        for of_probe in np.split(order, np.flatnonzero(np.diff(which[rest][order])) + 1):
            may[rest[of_probe[np.cumsum(chance[of_probe]) > self.risk]]] = True
        return may


def _log_means(waiting: Bool, matrix: ScoreMatrix, used: Bool, indices: Int64) -> Float64:
    """`log_means_of` the used pairs of the rows `indices`, float64 (k, pairs, tilts). A pair without minutiae to compare has its llr_db times
    the tilts. waiting, used: bool (k, pairs)."""
    llr_db = np.where(used, matrix.llr_db[indices], 0.0)
    log_means = TILTS * llr_db[..., None]
    for number, model in enumerate(matrix.models):
        adds = waiting[:, number] & used[:, number]
        if adds.any():
            log_means[adds, number] = log_means_of(model, llr_db[adds, number])
    return log_means


def _with_matching_finger(raw_scores: RawScores, cells: Bool) -> Bool:
    """Compares the minutiae of these fingers. Returns the candidates for which one of them is evidence. cells: bool (n, pairs)."""
    cells = cells & raw_scores.waiting
    raw_scores.compare(cells)
    rows = np.flatnonzero(cells.any(axis=1))
    matching = np.zeros(len(cells), bool)
    matching[rows] = (cells[rows] & (raw_scores.llr_db(rows) >= SPEAKS_FOR_DB)).any(axis=1)
    return matching


def _of_subjects(values: Bool, numbers: Int64) -> Bool:
    """Whether the value is true in any row of the row's subject; same shape as values. numbers: the subject of each row."""
    of_subject = np.zeros((int(numbers.max(initial=-1)) + 1, *values.shape[1:]), bool)
    np.logical_or.at(of_subject, numbers, values)
    return of_subject[numbers]


def _lower_limit(values: NDArray[np.float32], risk: float) -> float:
    """The llr_db below which at most a share of `risk` of mates lie, with 95 % confidence. values: drawn mates. Wald's bound if the draws are
    too few."""
    bounds = upper_bound(np.arange(int(risk * len(values)) + 1), len(values)) if len(values) else np.ones(1)
    lost = int(np.searchsorted(bounds, risk, side="right")) - 1
    return float(np.partition(values, lost)[lost]) if lost >= 0 else 10 * log10(risk)


@lru_cache(maxsize=64)
def _drawn_mates(
    captures: tuple[tuple[Calibration, WithMinutiae | None], ...], correlation: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Sums of llr_db of randomly drawn mates, float32 (_MATES,) each: by embeddings, and with minutiae. captures: the calibrations of each
    capture. The ranks of a mate's captures are correlated on a normal scale (Gaussian copula)."""
    rng = np.random.default_rng(_SEED)
    common = sqrt(correlation) * rng.standard_normal(_MATES)

    def drawn_db(calibration: Calibration) -> Float64:
        first, mass = mass_of(calibration, "mated")
        ranks = ndtr(common + sqrt(1 - correlation) * rng.standard_normal(_MATES))
        # the mass at a step is that of the values up to one step below it
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
    """For each of _NEEDED_DB the limit of rule 4: of mates' fingers that reach it, the share with an embedding below the limit is the same as
    the share below FINGER_FROM_DB of the fingers that reach FINGER_NEEDS_DB. Embedding and minutiae of mates are assumed to be
    independent."""
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
    """(llr_db by embedding, share of mates' fingers that have this llr_db and reach needed_db by embedding and minutiae), float64 (n,) each.
    Embedding and minutiae of mates are assumed to be independent."""
    (first, mass), (start, added) = mass_of(alone, "mated"), mass_of(adds.minutiae, "mated")
    by_embedding = (first + np.arange(len(mass))) * STEP_DB
    added_from = np.append(np.cumsum(added[::-1])[::-1], 0.0)  # share with minutiae at or above a step
    sums_db = np.arange(first + start, first + start + len(mass) + len(added)) * STEP_DB
    both_db = np.maximum.accumulate(adds.both.llr_db(sums_db))
    needed = first + start + int(np.searchsorted(both_db, needed_db))
    steps = np.clip(needed - (first + np.arange(len(mass))) - start, 0, len(added))
    return np.asarray(by_embedding, np.float64), np.asarray(mass * added_from[steps], np.float64)


def lone_fingers_missed(alone: Calibration, adds: WithMinutiae, needed_db: float, from_db: float) -> float:
    """Of mates' fingers that reach needed_db by embedding and minutiae, the share with an llr_db by embedding below from_db."""
    by_embedding, share = _reaching(alone, adds, needed_db)
    return float(share[by_embedding < from_db].sum() / max(share.sum(), 1e-300))


def log_means_of(model: ScoreModel, llr_db: Float64) -> Float64:
    """The natural logarithm of the mean of exp(tilt x), float64 (n, tilts), rounded up. x is the llr_db by embedding and minutiae of an impostor
    whose embedding has this llr_db."""
    assert model.with_minutiae is not None, "the model's card has no calibration with minutiae"
    first, table = _table(model.with_minutiae.minutiae, model.with_minutiae.both)
    at = np.ceil((llr_db - first) / _GRID_STEP_DB).astype(np.int64)
    return np.asarray(table[np.clip(at, 0, len(table) - 1)])


@lru_cache(maxsize=64)
def _table(minutiae: Calibration, both: Calibration) -> tuple[float, Float64]:
    """(first llr_db by embedding, the logarithms for it and for each _GRID_STEP_DB above it, up to the end of `both`)."""
    start, mass = minutiae.nonmated_llr_pmf(STEP_DB)
    steps = np.flatnonzero(mass > 0)
    added_db, share = (start + steps) * STEP_DB, mass[steps] / mass[steps].sum()
    first = float(both.score[0] - added_db[-1])
    grid = np.arange(first, float(both.score[-1] - added_db[0]) + _GRID_STEP_DB, _GRID_STEP_DB)
    sums_db = both.llr_db(grid[:, None] + added_db)
    means = np.stack([np.exp(tilt * sums_db) @ share for tilt in TILTS.tolist()], axis=1)
    return first, np.log(means)
