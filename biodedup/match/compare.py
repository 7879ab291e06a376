"""Compares probes with many candidates each, capture by capture, and adds up the evidence.

Owns which captures are paired, and how their scores become one. Never searches and never decides.

1. Captures of one column are paired. A finger of unknown position is tried against every finger left over on the other
   side; the best of m tries counts, less 10 log10(m) dB, since m tries have m chances to look alike.
2. Across positions, when asked: other readings of the fingers' labels are tried as well (`labels.py`), and the better of right
   labels and the strongest other reading counts, each less its penalty.
3. A finger's embedding and its minutiae add their llr_db, and the sum is calibrated again; with only one, that one counts.
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
from biodedup.match.encounters import Joint, of_all_rows
from biodedup.match.labels import Pair, Readings, readings_of
from biodedup.match.prints.minutiae import MinutiaeMatcher
from biodedup.match.ranked import Fused, PairScores, Ranked, Scored, ScoreMatrix, ScoreModel
from biodedup.match.scores.calibration import Calibration
from biodedup.match.scores.calibrations import SampleOf, WithMinutiae
from biodedup.match.scores.fusion import llr_reaching
from biodedup.match.staged import Probes, Stage
from biodedup.values import BIT, Score, Template

_ROWS_TOGETHER = 8192
"""Rows that are compared together: some 10 MB with a face and ten fingers, ten times as much across positions."""


def pairings(probe: Sequence[str], candidate: Sequence[str]) -> list[list[Pair]]:
    """The pairs of columns to compare, in groups; of each group the best pair counts."""
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
    """Compares templates with calibrated scores. calibration_of: model_id -> its calibration; with_minutiae: how minutiae add to
    embeddings of a model; replay_of: as `Calibrations.replay_of`."""

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
        """model_id -> how its templates score, once the subjects are settled that this is measured on."""

    def calibrated_on(self, sample_of: SampleOf) -> Comparer:
        """The same comparer, with calibrations that are measured on these subjects."""
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
        """The probe compared with each row, strongest first, equal ones by row. Rows without a comparable capture are left out.

        across: also compare fingers with fingers of other labels. subjects: int64 (n,), rows with the same number belong to one
        subject, which gives one comparison, that of its strongest row; None: each row is a subject of its own. stage: which rows'
        minutiae are compared (`staged.py`), by the evidence of the embeddings; the other rows are left out, too. None: all rows'.
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
        """As `compare`, for several probes: rows, subjects and stages are of each. Probes with the same kinds of captures are compared
        together, so that a column is read once and hardly anything is done probe by probe; the results are the same to the last bit."""
        results = [Ranked()] * len(probes)
        alike: dict[Hashable, list[int]] = {}
        for number, (probe, of_probe, stage) in enumerate(zip(probes, rows, stages, strict=True)):
            if len(of_probe):
                alike.setdefault((_kinds_of(probe), _without_above(stage)), []).append(number)
        for numbers in alike.values():
            for some in _pieces(numbers, [len(rows[number]) for number in numbers]):
                together = _Together(
                    [probes[n] for n in some], [rows[n] for n in some], [subjects[n] for n in some], stages[some[0]]
                )
                above = [stage.above if (stage := stages[n]) is not None else None for n in some]
                for number, ranked in zip(some, self._compare_alike(together, source, above, across), strict=True):
                    results[number] = ranked
        return results

    def _compare_alike(
        self, together: _Together, source: Candidates, above: Sequence[tuple[float, float] | None], across: bool
    ) -> list[Ranked]:
        held, which, subjects = together.held, together.which, together.subjects
        probe, stage = together.probes[0], together.stage
        paired = _Paired(probe, source.model_ids(), held, source.presence(held), subjects, across=across)
        measured = RawScores(
            self._matcher, together.probes, self.score_models(probe), source, (held, which), paired.wanted()
        )
        kept, by_embeddings = np.arange(len(held)), None
        if stage is not None and measured.waiting.any():
            least = np.array([(-np.inf, -np.inf) if pair is None else pair for pair in above]).T
            chosen, by_embeddings = stage.choose(
                measured, *paired.fuse(measured.scores()), subjects, Probes(which, least)
            )
            kept = np.flatnonzero(chosen)
            by_embeddings = by_embeddings[:, kept]
        whole = np.zeros((len(held), 1), bool)
        whole[kept] = True
        measured.compare(whole)
        matrix, fused = paired.of(kept).fuse(measured.scores(kept))
        ends = np.searchsorted(which[kept], np.arange(len(together.probes) + 1)).tolist()
        spans = zip(pairwise(ends), measured.compared.tolist(), strict=True)
        return [Ranked([Scored(matrix, fused, by_embeddings, count, low, high)]) for (low, high), count in spans]

    def score_models(self, probe: Mapping[str, Template]) -> dict[str, ScoreModel]:
        """How the templates in each of the probe's columns score."""
        # once for all rows: the calibration of a model without a card comes from the gallery
        of = {model_id: self.score_model(model_id) for model_id in {one.model_id for one in probe.values()}}
        return {column: of[template.model_id] for column, template in probe.items()}

    def score_model(self, model_id: str) -> ScoreModel:
        """How templates of one model score."""
        known = self._known
        if known is not None and model_id in known:
            return known[model_id]
        calibration = self._calibration_of(model_id, *self._sample)
        model = ScoreModel(calibration, self._with_minutiae_of(model_id, *self._sample), self._replay_of(model_id))
        if known is not None:
            known[model_id] = model
        return model

    def score_db(self, probe: Template, values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """score_db, float64 (n,), of raw scores of the probe's model."""
        return self.calibration(probe.model_id).score_db(values.astype(np.float64))

    def adds_minutiae(self, model_id: str) -> bool:
        """Whether minutiae add to the embeddings of this model."""
        return self.score_model(model_id).with_minutiae is not None

    def has_more(self, probe: Template) -> bool:
        """Whether minutiae add to the probe's embedding, so that a ranking by embeddings is not final."""
        return probe.embedding is not None and probe.minutiae is not None and self.adds_minutiae(probe.model_id)

    def calibration(self, model_id: str) -> Calibration:
        """The calibration of a model's embeddings or minutiae alone."""
        return self.score_model(model_id).alone

    def llr_reaching(self, score_db: float, model_ids: Sequence[str]) -> float:
        """The least sum of llr_db, over one capture of each of these models, that reaches score_db."""
        return llr_reaching(score_db, tuple(map(self.calibration, model_ids)))


class _Together:
    """Probes with the same kinds of captures, and the rows that each is compared with: held, int64 (n,), the rows; which, int64 (n,),
    ascending, the probe of each; subjects, int64 (n,), None if each row is a subject of its own."""

    def __init__(
        self,
        probes: Sequence[Mapping[str, Template]],
        rows: Sequence[NDArray[np.int64]],
        subjects: Sequence[NDArray[np.int64] | None],
        stage: Stage | None,
    ) -> None:
        self.probes, self.stage = probes, stage
        self.held = np.concatenate(rows)
        self.which = np.repeat(np.arange(len(rows)), [len(some) for some in rows])
        self.subjects: NDArray[np.int64] | None = None
        if any(some is not None for some in subjects):
            base, numbers = 0, list[NDArray[np.int64]]()  # no two probes share the number of a subject
            for some, of_probe in zip(rows, subjects, strict=True):
                own = np.arange(len(some)) if of_probe is None else np.unique(of_probe, return_inverse=True)[1]
                numbers.append(base + own)
                base += len(some)
            self.subjects = np.concatenate(numbers)


class _Paired:
    """Which captures of a probe and of each row are compared, and how their scores become one. own: the columns of each row, as masks;
    subjects: int64 (n,), None if each row is a subject of its own."""

    def __init__(
        self,
        probe: Mapping[str, Template],
        model_ids: Mapping[str, str],
        rows: NDArray[np.int64],
        own: NDArray[np.uint16],
        subjects: NDArray[np.int64] | None,
        *,
        across: bool,
    ) -> None:
        self._probe, self._model_ids, self._across = probe, model_ids, across
        self._rows, self._own, self._subjects = rows, own, subjects
        masks, which = np.unique(own if subjects is None else of_all_rows(own, subjects), return_inverse=True)
        self._members = [
            (_columns_of(mask), np.flatnonzero(which == number)) for number, mask in enumerate(masks.tolist())
        ]
        self._groups = {some: pairings(tuple(probe), some) for some, _ in self._members}
        self._readings = {
            some: _readings(probe, model_ids, some, bool(self._groups[some])) for some, _ in self._members if across
        }

    def of(self, ats: NDArray[np.int64]) -> _Paired:
        """The same of some rows, with all rows of their subjects."""
        subjects = None if self._subjects is None else self._subjects[ats]
        return _Paired(self._probe, self._model_ids, self._rows[ats], self._own[ats], subjects, across=self._across)

    def wanted(self) -> dict[Pair, NDArray[np.int64]]:
        """The pairs of columns to compare, and for each the rows that have its column, ascending. In one order whatever the rows are, so
        that sums are equal to the last bit."""
        lists: dict[Pair, list[NDArray[np.int64]]] = {}
        for some, ats in self._members:
            tried = self._readings.get(some)
            of_groups = (pair for group in self._groups[some] for pair in group)
            for pair in dict.fromkeys((*of_groups, *(tried.pairs if tried else ()))):
                lists.setdefault(pair, []).append(ats)
        place = {column: at for at, column in enumerate(self._probe)}
        pairs = sorted(lists, key=lambda pair: (place[pair[0]], BIT[pair[1]]))
        wanted = {pair: np.sort(np.concatenate(lists[pair])) for pair in pairs}
        if self._subjects is None:
            return wanted
        return {pair: ats[(self._own[ats] & BIT[pair[1]]) != 0] for pair, ats in wanted.items()}

    def fuse(self, scores: Mapping[Pair, PairScores]) -> tuple[ScoreMatrix, Fused]:
        """The scores of these rows as one. Of a subject's rows only the strongest keeps its score."""
        joint = None if self._subjects is None else Joint(scores, self._subjects)
        if joint is None:
            matrix = ScoreMatrix(self._rows, scores)
        else:
            matrix = ScoreMatrix(self._rows, joint.scores, joint.borrowed_db)
        fused = matrix.fuse(*as_labelled(matrix, [(ats, self._groups[some]) for some, ats in self._members]))
        for some, ats in self._members:
            reading = self._readings.get(some)
            if reading is not None:
                fused = _read_across(matrix, fused, ats, reading)
        return matrix, fused if joint is None else joint.best_of_each(fused)


def compare_templates(comparer: Comparer, a: Template, b: Template) -> Score:
    """1:1. Raises ModelMismatch, and InvalidInput for a face against a finger."""
    if a.modality != b.modality:
        raise InvalidInput(f"a {a.modality} does not compare with a {b.modality}; pass two templates of one modality")
    if a.model_id != b.model_id:
        raise ModelMismatch(f"one template is of {a.model_id}, the other of {b.model_id}; extract both with one model")
    # The caller asks for this pair, whatever the labels say: both go into one column.
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
    known = {probe[column].model_id for column in of_probe}
    of_candidate = tuple(column for column in columns if column != "face" and models.get(column) in known)
    return readings_of(of_probe, of_candidate, labelled)


def _kinds_of(probe: Mapping[str, Template]) -> Hashable:
    """What the captures of a probe are; probes of equal kinds are compared together."""
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
    if stage is None:
        return None
    lone_db = tuple(sorted(stage.lone_db.items()))
    return stage.first, stage.reach_db, stage.risk, stage.finger_db, stage.correlation, lone_db


def _pieces(numbers: Sequence[int], counts: Sequence[int]) -> Iterator[list[int]]:
    """Numbers in pieces with at most _ROWS_TOGETHER rows, or a single number with more. counts: the rows of each."""
    piece, total = list[int](), 0
    for number, count in zip(numbers, counts, strict=True):
        if piece and total + count > _ROWS_TOGETHER:
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
    """(used, trial_penalty_db) as `ScoreMatrix.fuse` takes them: of each group of pairs the best one counts, less the number of its rivals."""
    used = np.zeros(matrix.llr_db.shape, bool, order="F")  # as the matrix's arrays lie, so that they add up fast
    trial_penalty_db = np.zeros(matrix.llr_db.shape, order="F")
    for ats, groups in members:
        for group in groups:
            pairs = np.array([matrix.number[pair] for pair in group])
            if len(group) == 1:
                used[ats, pairs[0]] = ~np.isnan(matrix.llr_db[ats, pairs[0]])
                continue
            llr_db = matrix.llr_db[np.ix_(ats, pairs)]
            tries = np.count_nonzero(~np.isnan(llr_db), axis=1)
            there = np.flatnonzero(tries)
            best = pairs[np.nanargmax(llr_db[there], axis=1)]
            used[ats[there], best] = True
            trial_penalty_db[ats[there], best] = 10 * np.log10(tries[there])
    return used, trial_penalty_db


def _read_across(matrix: ScoreMatrix, fused: Fused, ats: NDArray[np.int64], readings: Readings) -> Fused:
    """Of these rows the better of right labels and the strongest other reading, each less its penalty."""
    pairs = np.array([matrix.number[pair] for pair in readings.pairs])
    paired, label_penalties_db = readings.strongest(matrix.llr_db[np.ix_(ats, pairs)])
    used = np.zeros((len(ats), len(matrix.pairs)), bool)
    used[:, pairs] = paired
    for number, (column, _) in enumerate(matrix.pairs):
        if column == "face":
            used[:, number] = fused.used[ats, number]
    label_penalty_db = np.zeros(len(matrix.rows))
    label_penalty_db[ats] = readings.as_labelled_db
    other = matrix.fuse(used, ats=ats).penalised(label_penalties_db)
    return fused.penalised(label_penalty_db).or_better(other, ats)
