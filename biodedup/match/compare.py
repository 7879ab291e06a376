"""Compares probes with many candidates each, capture by capture, and adds up the evidence.

Owns the choice of the captures that are paired, and the fusion of their scores. Never searches and never decides.

1. Captures of one column are paired. A finger of unknown position is compared with every finger that has no partner on the other side.
   The best of m tries counts, minus 10 log10(m) dB, because m tries have m chances of a false match.
2. On request (across positions), other readings of the fingers' labels are tried (`labels.py`). The given labels and the strongest other
   reading each lose their penalty, and the better of the two counts.
3. The llr_db of a finger's embedding and of its minutiae are added, and the sum is calibrated again. If one of them is missing, the other
   counts alone.
4. A subject with several rows is one candidate (`encounters.py`).
5. Every returned number has a unit: `score_db`, `llr_db`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from copy import copy
from functools import cache
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from biodedup.errors import InvalidInput, ModelMismatch
from biodedup.match.candidates import Candidates, RawScores, TemplateCandidates
from biodedup.match.encounters import SubjectScores, presence_of_subjects
from biodedup.match.labels import Pair, Readings, readings_of
from biodedup.match.prints.minutiae import MinutiaeMatcher
from biodedup.match.ranked import Fused, PairScores, Ranked, Scored, ScoreMatrix, ScoreModel
from biodedup.match.scores.calibration import Calibration
from biodedup.match.scores.calibrations import SampleOf, WithMinutiae
from biodedup.match.scores.fusion import llr_reaching
from biodedup.match.staged import Probes, Stage
from biodedup.values import BIT, Score, Template

_BATCH_ROWS = 8192
"""Rows of a batch: about 10 MB with a face and ten fingers, ten times as much across positions."""


def pairings(probe: Sequence[str], candidate: Sequence[str]) -> list[list[Pair]]:
    """The pairs of columns to compare, in groups. The best pair of each group counts."""
    groups = [[(column, column)] for column in probe if column in candidate]
    of_probe = [column for column in probe if column != "face" and column not in candidate]
    of_candidate = [column for column in candidate if column != "face" and column not in probe]
    if "unknown" in of_probe and of_candidate:
        groups.append([("unknown", column) for column in of_candidate])
    elif "unknown" in of_candidate and of_probe:
        groups.append([(column, "unknown") for column in of_probe])
    return groups


class CalibrationOf(Protocol):
    def __call__(self, model_id: str, sample_of: SampleOf | None = None, /) -> Calibration:
        """As `Calibrations.of`."""


class WithMinutiaeOf(Protocol):
    def __call__(self, model_id: str, sample_of: SampleOf | None = None, /) -> WithMinutiae | None:
        """As `Calibrations.with_minutiae`."""


class Comparer:
    """Compares templates with calibrated scores. calibration_of, with_minutiae, replay_of: as `Calibrations.of`, `with_minutiae` and
    `replay_of`."""

    def __init__(
        self,
        calibration_of: CalibrationOf,
        matcher: MinutiaeMatcher,
        with_minutiae: WithMinutiaeOf = lambda model_id, sample_of=None: None,
        replay_of: Callable[[str], float | None] = lambda model_id: None,
    ) -> None:
        self._calibration_of = calibration_of
        self._with_minutiae_of = with_minutiae
        self._replay_of = replay_of
        self._matcher = matcher
        self._sample: tuple[()] | tuple[SampleOf] = ()
        self._known: dict[str, ScoreModel] | None = None
        """model_id -> its score model, once `calibrated_on` has fixed the subjects of the calibration; None before."""

    def calibrated_on(self, sample_of: SampleOf) -> Comparer:
        """The same comparer, with calibrations measured on these subjects."""
        comparer = copy(self)
        comparer._sample, comparer._known = (sample_of,), {}
        return comparer

    def compare(
        self,
        probe: Mapping[str, Template],
        source: Candidates,
        rows: Sequence[int] | NDArray[np.int64],
        *,
        across: bool = False,
        subjects: NDArray[np.int64] | None = None,
        stage: Stage | None = None,
    ) -> Ranked:
        """The comparisons of the probe with each row, strongest first, equal scores by row. Rows without a comparable capture are left out.

        across: also compare fingers with fingers of other labels. subjects: int64 (n,), the number of each row's subject. A subject gives
        one comparison, that of its strongest row. None: each row is a subject of its own. stage: chooses, by the evidence of the
        embeddings, the rows whose minutiae are compared (`staged.py`); all other rows are left out. None: all rows are compared in full.
        """
        (ranked,) = self.compare_each(
            [probe], source, [np.asarray(rows, np.int64)], across=across, subjects=[subjects], stages=[stage]
        )
        return ranked

    def compare_each(
        self,
        probes: Sequence[Mapping[str, Template]],
        source: Candidates,
        rows: Sequence[NDArray[np.int64]],
        *,
        across: bool = False,
        subjects: Sequence[NDArray[np.int64] | None],
        stages: Sequence[Stage | None],
    ) -> list[Ranked]:
        """As `compare`, for several probes. rows, subjects, stages: of each probe.

        Probes with the same kinds of captures are compared in one batch, so that a column is read once. The results are the same to the last
        bit.
        """
        results = [Ranked()] * len(probes)
        same_kinds: dict[Hashable, list[int]] = {}
        for number, (probe, of_probe, stage) in enumerate(zip(probes, rows, stages, strict=True)):
            if len(of_probe):
                same_kinds.setdefault((_kinds_of(probe), _without_above(stage)), []).append(number)
        for numbers in same_kinds.values():
            for piece in _pieces(numbers, [len(rows[number]) for number in numbers]):
                batch = _Batch(
                    [probes[n] for n in piece], [rows[n] for n in piece], [subjects[n] for n in piece], stages[piece[0]]
                )
                above = [stage.above if (stage := stages[n]) is not None else None for n in piece]
                for number, ranked in zip(piece, self._compare_batch(batch, source, above, across), strict=True):
                    results[number] = ranked
        return results

    def _compare_batch(
        self, batch: _Batch, source: Candidates, above: Sequence[tuple[float, float] | None], across: bool
    ) -> list[Ranked]:
        """The comparisons of each probe of the batch. above: `Stage.above` of each probe."""
        rows, which, subjects = batch.rows, batch.which, batch.subjects
        probe, stage = batch.probes[0], batch.stage
        pairing = _Pairing(probe, source.model_ids(), rows, source.presence(rows), subjects, across=across)
        raw_scores = RawScores(
            self._matcher, batch.probes, self.score_models(probe), source, (rows, which), pairing.wanted()
        )
        kept, by_embeddings = np.arange(len(rows)), None
        if stage is not None and raw_scores.waiting.any():
            above_db = np.array([(-np.inf, -np.inf) if pair is None else pair for pair in above]).T
            chosen, by_embeddings = stage.choose(
                raw_scores, *pairing.fuse(raw_scores.scores()), subjects, Probes(which, above_db)
            )
            kept = np.flatnonzero(chosen)
            by_embeddings = by_embeddings[:, kept]
        in_full = np.zeros((len(rows), 1), bool)
        in_full[kept] = True
        raw_scores.compare(in_full)
        matrix, fused = pairing.of(kept).fuse(raw_scores.scores(kept))
        ends = np.searchsorted(which[kept], np.arange(len(batch.probes) + 1)).tolist()
        spans = zip(pairwise(ends), raw_scores.compared.tolist(), strict=True)
        return [Ranked([Scored(matrix, fused, by_embeddings, count, start, end)]) for (start, end), count in spans]

    def score_models(self, probe: Mapping[str, Template]) -> dict[str, ScoreModel]:
        """The score model of each of the probe's columns."""
        # looked up once for all rows: the calibration of a model without a card is measured on the gallery
        models = {model_id: self.score_model(model_id) for model_id in {t.model_id for t in probe.values()}}
        return {column: models[template.model_id] for column, template in probe.items()}

    def score_model(self, model_id: str) -> ScoreModel:
        """The score model of a model_id."""
        known = self._known
        if known is not None and model_id in known:
            return known[model_id]
        calibration = self._calibration_of(model_id, *self._sample)
        model = ScoreModel(calibration, self._with_minutiae_of(model_id, *self._sample), self._replay_of(model_id))
        if known is not None:
            known[model_id] = model
        return model

    def score_db(self, probe: Template, values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """The score_db, float64 (n,), of raw scores of the probe's model."""
        return self.calibration(probe.model_id).score_db(values.astype(np.float64))

    def adds_minutiae(self, model_id: str) -> bool:
        """Whether minutiae add evidence to the embeddings of this model."""
        return self.score_model(model_id).with_minutiae is not None

    def has_minutiae_to_add(self, probe: Template) -> bool:
        """Whether the probe has minutiae that add to its embedding, so that a ranking by embeddings is not final."""
        return probe.embedding is not None and probe.minutiae is not None and self.adds_minutiae(probe.model_id)

    def calibration(self, model_id: str) -> Calibration:
        """The calibration of a model's embeddings or minutiae alone."""
        return self.score_model(model_id).alone

    def llr_reaching(self, score_db: float, model_ids: Sequence[str]) -> float:
        """The lowest sum of llr_db, over one capture of each of these models, that reaches score_db."""
        return llr_reaching(score_db, tuple(map(self.calibration, model_ids)))


class _Batch:
    """Probes with the same kinds of captures, and the rows to compare. rows: int64 (n,). which: int64 (n,), ascending, the probe of each row.
    subjects: int64 (n,), or None if each row is a subject of its own."""

    def __init__(
        self,
        probes: Sequence[Mapping[str, Template]],
        rows: Sequence[NDArray[np.int64]],
        subjects: Sequence[NDArray[np.int64] | None],
        stage: Stage | None,
    ) -> None:
        self.probes, self.stage = probes, stage
        self.rows = np.concatenate(rows)
        self.which = np.repeat(np.arange(len(rows)), [len(of_probe) for of_probe in rows])
        self.subjects: NDArray[np.int64] | None = None
        if any(of_probe is not None for of_probe in subjects):
            base, numbers = 0, list[NDArray[np.int64]]()  # subjects of different probes have different numbers
            for rows_of_probe, of_probe in zip(rows, subjects, strict=True):
                if of_probe is None:
                    numbers.append(base + np.arange(len(rows_of_probe)))
                else:
                    numbers.append(base + np.unique(of_probe, return_inverse=True)[1])
                base += len(rows_of_probe)
            self.subjects = np.concatenate(numbers)


class _Pairing:
    """The captures of a probe and of each row that are compared, and the fusion of their scores. presence: the columns of each row, as
    masks. subjects: int64 (n,), or None if each row is a subject of its own."""

    def __init__(
        self,
        probe: Mapping[str, Template],
        model_ids: Mapping[str, str],
        rows: NDArray[np.int64],
        presence: NDArray[np.uint16],
        subjects: NDArray[np.int64] | None,
        *,
        across: bool,
    ) -> None:
        self._probe, self._model_ids, self._across = probe, model_ids, across
        self._rows, self._presence, self._subjects = rows, presence, subjects
        of_subjects = presence if subjects is None else presence_of_subjects(presence, subjects)
        masks, which = np.unique(of_subjects, return_inverse=True)
        self._members = [
            (_columns_of(mask), np.flatnonzero(which == number)) for number, mask in enumerate(masks.tolist())
        ]
        self._groups = {columns: pairings(tuple(probe), columns) for columns, _ in self._members}
        self._readings = {
            columns: _readings(probe, model_ids, columns, bool(self._groups[columns]))
            for columns, _ in self._members
            if across
        }

    def of(self, indices: NDArray[np.int64]) -> _Pairing:
        """The same for a part of the rows, which must contain all rows of their subjects."""
        subjects = None if self._subjects is None else self._subjects[indices]
        rows, presence = self._rows[indices], self._presence[indices]
        return _Pairing(self._probe, self._model_ids, rows, presence, subjects, across=self._across)

    def wanted(self) -> dict[Pair, NDArray[np.int64]]:
        """Pair of columns -> the indices of the rows to compare, ascending. The order of the pairs does not depend on the rows, so that sums
        are equal to the last bit."""
        lists: dict[Pair, list[NDArray[np.int64]]] = {}
        for columns, indices in self._members:
            readings = self._readings.get(columns)
            of_groups = (pair for group in self._groups[columns] for pair in group)
            for pair in dict.fromkeys((*of_groups, *(readings.pairs if readings else ()))):
                lists.setdefault(pair, []).append(indices)
        place = {column: at for at, column in enumerate(self._probe)}
        pairs = sorted(lists, key=lambda pair: (place[pair[0]], BIT[pair[1]]))
        wanted = {pair: np.sort(np.concatenate(lists[pair])) for pair in pairs}
        if self._subjects is None:
            return wanted
        return {pair: indices[(self._presence[indices] & BIT[pair[1]]) != 0] for pair, indices in wanted.items()}

    def fuse(self, scores: Mapping[Pair, PairScores]) -> tuple[ScoreMatrix, Fused]:
        """Fuses the scores of each row. Of a subject's rows only the strongest keeps its score."""
        subject_scores = None if self._subjects is None else SubjectScores(scores, self._subjects)
        if subject_scores is None:
            matrix = ScoreMatrix(self._rows, scores)
        else:
            matrix = ScoreMatrix(self._rows, subject_scores.scores, subject_scores.borrowed_db)
        fused = matrix.fuse(
            *as_labelled(matrix, [(indices, self._groups[columns]) for columns, indices in self._members])
        )
        for columns, indices in self._members:
            readings = self._readings.get(columns)
            if readings is not None:
                fused = _across_positions(matrix, fused, indices, readings)
        return matrix, fused if subject_scores is None else subject_scores.best_row_of_each(fused)


def compare_templates(comparer: Comparer, a: Template, b: Template) -> Score:
    """The 1:1 score of two templates. Raises ModelMismatch, and InvalidInput for a face and a finger."""
    if a.modality != b.modality:
        raise InvalidInput(f"a {a.modality} does not compare with a {b.modality}; pass two templates of one modality")
    if a.model_id != b.model_id:
        raise ModelMismatch(f"one template is of {a.model_id}, the other of {b.model_id}; extract both with one model")
    # the caller asks for this pair whatever its labels are, so that both go into one column
    result = comparer.compare({"unknown": _relabelled(a)}, TemplateCandidates({"unknown": _relabelled(b)}), [0])[0]
    part = result.evidence[0]
    return Score(result.score_db, result.llr_db, part.similarity, part.minutiae, result.extrapolated)


def _relabelled(template: Template) -> Template:
    return Template("unknown", template.model_id, template.embedding, template.minutiae, template.quality)


def _readings(
    probe: Mapping[str, Template], models: Mapping[str, str], columns: Sequence[str], labelled: bool
) -> Readings | None:
    """The other readings of the probe's labels. labelled: whether the given labels pair any captures."""
    of_probe = tuple(column for column in probe if column != "face")
    probe_models = {probe[column].model_id for column in of_probe}
    of_candidate = tuple(column for column in columns if column != "face" and models.get(column) in probe_models)
    return readings_of(of_probe, of_candidate, labelled)


def _kinds_of(probe: Mapping[str, Template]) -> Hashable:
    """The columns, models and kinds of a probe's captures. Probes with equal kinds are compared in a batch."""
    return tuple(
        [
            (
                column,
                template.model_id,
                None if template.embedding is None else len(template.embedding),
                template.minutiae is None,
            )
            for column, template in probe.items()
        ]
    )


def _without_above(stage: Stage | None) -> Hashable:
    """A key for all fields of the stage except `above`."""
    if stage is None:
        return None
    lone_db = tuple(sorted(stage.lone_db.items()))
    return stage.first, stage.reach_db, stage.risk, stage.finger_db, stage.correlation, lone_db


def _pieces(numbers: Sequence[int], counts: Sequence[int]) -> Iterator[list[int]]:
    """The numbers in pieces of at most _BATCH_ROWS rows, or of a single number with more rows. counts: the rows of each number."""
    piece, total = list[int](), 0
    for number, count in zip(numbers, counts, strict=True):
        if piece and total + count > _BATCH_ROWS:
            yield piece
            piece, total = [], 0
        piece.append(number)
        total += count
    yield piece


@cache
def _columns_of(mask: int) -> tuple[str, ...]:
    return tuple(column for column, bit in BIT.items() if mask & bit)


def as_labelled(
    matrix: ScoreMatrix, members: Sequence[tuple[NDArray[np.int64], list[list[Pair]]]]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """(used, trial_penalty_db), the arguments of `ScoreMatrix.fuse`: the best pair of each group counts, minus a penalty for the number of
    pairs that were tried. members: (indices of rows, their groups of pairs)."""
    used = np.zeros(
        matrix.llr_db.shape, bool, order="F"
    )  # the memory order of the matrix's arrays, so that sums are fast
    trial_penalty_db = np.zeros(matrix.llr_db.shape, order="F")
    for indices, groups in members:
        for group in groups:
            pairs = np.array([matrix.number[pair] for pair in group])
            if len(group) == 1:
                used[indices, pairs[0]] = ~np.isnan(matrix.llr_db[indices, pairs[0]])
                continue
            llr_db = matrix.llr_db[np.ix_(indices, pairs)]
            tries = np.count_nonzero(~np.isnan(llr_db), axis=1)
            tried = np.flatnonzero(tries)
            best = pairs[np.nanargmax(llr_db[tried], axis=1)]
            used[indices[tried], best] = True
            trial_penalty_db[indices[tried], best] = 10 * np.log10(tries[tried])
    return used, trial_penalty_db


def _across_positions(matrix: ScoreMatrix, fused: Fused, indices: NDArray[np.int64], readings: Readings) -> Fused:
    """For these rows the better of the given labels and the strongest other reading, each after its penalty."""
    pairs = np.array([matrix.number[pair] for pair in readings.pairs])
    paired, label_penalties_db = readings.strongest(matrix.llr_db[np.ix_(indices, pairs)])
    used = np.zeros((len(indices), len(matrix.pairs)), bool)
    used[:, pairs] = paired
    for number, (column, _) in enumerate(matrix.pairs):
        if column == "face":
            used[:, number] = fused.used[indices, number]
    label_penalty_db = np.zeros(len(matrix.rows))
    label_penalty_db[indices] = readings.as_labelled_db
    other = matrix.fuse(used, indices=indices).penalised(label_penalties_db)
    return fused.penalised(label_penalty_db).or_better(other, indices)
