"""Comparing one probe with many candidates, capture by capture, and adding the evidence up.

Owns which captures are paired, and how their scores become one. Never searches and never decides.

1. Captures of one column are paired. A finger of unknown position is tried against every finger left over on the other
   side; the best of m tries counts, less 10 log10(m) dB, since m tries have m chances to look alike.
2. Across positions, when asked: other readings of the fingers' labels are tried as well (`labels.py`), and the better of right
   labels and the strongest other reading counts, each less its charge.
3. A finger's embedding and its minutiae add their llr_db, and the sum is calibrated again; with only one, that one counts.
4. A subject with several rows is one candidate (`encounters.py`).
5. Every number that leaves here has a unit: `score_db`, `llr_db`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from biodedup.errors import InvalidInput, ModelMismatch
from biodedup.match.calibration import Calibration
from biodedup.match.calibrations import SampleOf, WithMinutiae
from biodedup.match.encounters import Joint, of_all_rows
from biodedup.match.fusion import llr_reaching
from biodedup.match.labels import Pair, Readings, readings_of
from biodedup.match.minutiae import MinutiaeMatcher
from biodedup.match.ranked import Board, Fused, Law, Measured, Ranked, calibrated
from biodedup.values import BIT, Float32, Score, Template


class Candidates(Protocol):
    """Where the candidates' templates come from: a gallery's rows, or a few templates in hand. rows: int64 (n,)."""

    def presence(self, rows: NDArray[np.int64]) -> NDArray[np.uint16]:
        """The columns that each row has, as a mask."""

    def embeddings(self, rows: NDArray[np.int64], column: str) -> Float32:
        """float32 (n, d), for rows that have this column; d = 0 where the column holds no embeddings."""

    def minutiae(self, rows: NDArray[np.int64], column: str) -> dict[int, bytes]:
        """Records of those of the rows that have one."""

    def model_ids(self) -> Mapping[str, str]:
        """The model of each column."""


class InHand:
    """Candidates that are held as templates: one mapping column -> template for each row 0, 1, ..."""

    def __init__(self, *candidates: Mapping[str, Template]) -> None:
        self._candidates = candidates

    def presence(self, rows: NDArray[np.int64]) -> NDArray[np.uint16]:
        return np.array([sum(BIT[column] for column in self._candidates[row]) for row in rows.tolist()], np.uint16)

    def embeddings(self, rows: NDArray[np.int64], column: str) -> Float32:
        found = [self._candidates[row][column].embedding for row in rows.tolist()]
        vectors = [vector for vector in found if vector is not None]
        return np.array(vectors, np.float32) if len(vectors) == len(rows) else np.zeros((len(rows), 0), np.float32)

    def minutiae(self, rows: NDArray[np.int64], column: str) -> dict[int, bytes]:
        records = {row: self._candidates[row][column].minutiae for row in rows.tolist()}
        return {row: record for row, record in records.items() if record is not None}

    def model_ids(self) -> Mapping[str, str]:
        return {column: template.model_id for one in self._candidates for column, template in one.items()}


class _Held:
    """Candidates of one comparison; each column's embeddings are read once, whatever they are compared with."""

    def __init__(self, source: Candidates, rows: NDArray[np.int64]) -> None:
        self.model_ids = source.model_ids()
        self.rows = rows
        self._source = source
        self._read: dict[tuple[str, bytes], Float32] = {}

    def embeddings(self, ats: NDArray[np.int64], column: str) -> Float32:
        key = (column, ats.tobytes())
        if key not in self._read:
            self._read[key] = self._source.embeddings(self.rows[ats], column)
        return self._read[key]

    def minutiae(self, ats: NDArray[np.int64], column: str) -> tuple[NDArray[np.int64], list[bytes]]:
        """Which of these have a record, and the records."""
        records = self._source.minutiae(self.rows[ats], column)
        found = [records.get(row) for row in self.rows[ats].tolist()]
        return ats[[record is not None for record in found]], [record for record in found if record is not None]


def pairings(probe: Sequence[str], candidate: Sequence[str]) -> list[list[Pair]]:
    """What to compare: a list of groups; of each group the best pair counts."""
    groups = [[(column, column)] for column in probe if column in candidate]
    mine = [column for column in probe if column != "face" and column not in candidate]
    theirs = [column for column in candidate if column != "face" and column not in probe]
    if "unknown" in mine and theirs:
        groups.append([("unknown", column) for column in theirs])
    elif "unknown" in theirs and mine:
        groups.append([(column, "unknown") for column in mine])
    return groups


class CalibrationOf(Protocol):
    def __call__(self, model_id: str, sample_of: SampleOf | None = None, /) -> Calibration:
        """As `Calibrations.of`."""


class WithMinutiaeOf(Protocol):
    def __call__(self, model_id: str, sample_of: SampleOf | None = None, /) -> WithMinutiae | None:
        """As `Calibrations.with_minutiae`."""


class Comparer:
    """Compares templates with calibrated scores. calibration_of: model_id -> its calibration; with_minutiae: how minutiae add to
    embeddings of a model."""

    def __init__(
        self,
        calibration_of: CalibrationOf,
        matcher: MinutiaeMatcher,
        with_minutiae: WithMinutiaeOf = lambda model_id, sample_of=None: None,
    ) -> None:
        self._calibration_of = calibration_of
        self._with_minutiae_of = with_minutiae
        self._matcher = matcher
        self._sample: tuple[()] | tuple[SampleOf] = ()

    def calibrated_on(self, sample_of: SampleOf) -> Comparer:
        """The same comparer, with calibrations that are measured on these subjects."""
        comparer = copy(self)
        comparer._sample = (sample_of,)
        return comparer

    def compare(
        self,
        probe: Mapping[str, Template],
        source: Candidates,
        rows: Sequence[int] | NDArray[np.int64],
        *,
        across: bool = False,
        subjects: NDArray[np.int64] | None = None,
    ) -> Ranked:
        """The probe against each row, strongest first, equal ones by row. Rows with nothing comparable are left out.

        across: fingers are compared with fingers of other labels, too. subjects: int64 (n,), rows with the same number are of one
        subject, which comes out as one comparison, of its strongest row; None: each row is a subject of its own.
        """
        held = _Held(source, np.asarray(rows, np.int64))
        own = source.presence(held.rows)
        masks, which = np.unique(own if subjects is None else of_all_rows(own, subjects), return_inverse=True)
        members = [(_columns_of(mask), np.flatnonzero(which == number)) for number, mask in enumerate(masks.tolist())]
        groups = {some: pairings(tuple(probe), some) for some, _ in members}
        readings = {some: _readings(probe, held.model_ids, some, bool(groups[some])) for some, _ in members if across}
        wanted: dict[Pair, list[NDArray[np.int64]]] = {}
        for some, ats in members:
            tried = readings.get(some)
            for pair in dict.fromkeys((*(p for group in groups[some] for p in group), *(tried.pairs if tried else ()))):
                wanted.setdefault(pair, []).append(ats)
        laws = self.laws(probe)
        measured = {}
        for pair, lists in wanted.items():
            ats = np.sort(np.concatenate(lists))
            ats = ats if subjects is None else ats[(own[ats] & BIT[pair[1]]) != 0]
            measured[pair] = self._measure(probe[pair[0]], laws[pair[0]], pair, held, ats)
        joint = None if subjects is None else Joint(measured, subjects)
        board = Board(held.rows, measured) if joint is None else Board(held.rows, joint.measured, joint.borrowed_db)
        fused = board.fuse(*as_labelled(board, [(ats, groups[some]) for some, ats in members]))
        for some, ats in members:
            reading = readings.get(some)
            if reading is not None:
                fused = _read_across(board, fused, ats, reading)
        return Ranked([(board, fused if joint is None else joint.best_of_each(fused))])

    def laws(self, probe: Mapping[str, Template]) -> dict[str, Law]:
        """How the templates in each of the probe's columns score."""
        # once for all rows: the calibration of a model without a card is measured on the gallery
        of = {
            model_id: Law(self.calibration(model_id), self._with_minutiae(model_id))
            for model_id in {one.model_id for one in probe.values()}
        }
        return {column: of[template.model_id] for column, template in probe.items()}

    def score_db(self, probe: Template, values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """score_db, float64 (n,), of raw scores of this probe's model."""
        return self.calibration(probe.model_id).score_db(values.astype(np.float64))

    def adds_minutiae(self, model_id: str) -> bool:
        """Whether minutiae add to the embeddings of this model."""
        return self._with_minutiae(model_id) is not None

    def has_more(self, probe: Template) -> bool:
        """Whether comparing says more than the embedding alone does, so that an order by embeddings is not final."""
        return probe.embedding is not None and probe.minutiae is not None and self.adds_minutiae(probe.model_id)

    def calibration(self, model_id: str) -> Calibration:
        """The calibration of a model's embeddings or minutiae alone."""
        return self._calibration_of(model_id, *self._sample)

    def _with_minutiae(self, model_id: str) -> WithMinutiae | None:
        return self._with_minutiae_of(model_id, *self._sample)

    def llr_reaching(self, score_db: float, model_ids: Sequence[str]) -> float:
        """The least sum of llr_db over captures of these models that scores as much."""
        return llr_reaching(score_db, tuple(map(self.calibration, model_ids)))

    def _measure(self, probe: Template, law: Law, pair: Pair, held: _Held, ats: NDArray[np.int64]) -> Measured:
        """ats: which of the rows have the candidate's column."""
        similarity, minutiae = np.full((2, len(held.rows)), np.nan)
        if pair[0] == pair[1] or held.model_ids.get(pair[1]) == probe.model_id:
            if probe.embedding is not None:
                vectors = held.embeddings(ats, pair[1])
                if vectors.shape[1] not in (0, len(probe.embedding)):
                    raise ModelMismatch(
                        f"the {pair[0]} probe has {len(probe.embedding)} numbers, the candidate's {vectors.shape[1]}; "
                        "extract both with one model"
                    )
                if vectors.shape[1]:
                    similarity[ats] = vectors @ probe.embedding
            if probe.minutiae is not None and (probe.embedding is None or law.with_minutiae is not None):
                there, records = held.minutiae(ats, pair[1])
                minutiae[there] = self._matcher.compare(probe.minutiae, records)
        return calibrated(law, similarity, minutiae, by_embedding=probe.embedding is not None)


def compare_templates(comparer: Comparer, a: Template, b: Template) -> Score:
    """1:1. Raises ModelMismatch, and InvalidInput for a face against a finger."""
    if a.modality != b.modality:
        raise InvalidInput(f"a {a.modality} does not compare with a {b.modality}; pass two templates of one modality")
    if a.model_id != b.model_id:
        raise ModelMismatch(f"one template is of {a.model_id}, the other of {b.model_id}; extract both with one model")
    # Whoever asks for this pair means it, whatever the labels: both go into one column.
    result = comparer.compare({"unknown": _relabelled(a)}, InHand({"unknown": _relabelled(b)}), [0])[0]
    part = result.evidence[0]
    return Score(result.score_db, result.llr_db, part.similarity, part.minutiae, result.extrapolated)


def _relabelled(template: Template) -> Template:
    return Template("unknown", template.model_id, template.embedding, template.minutiae, template.quality)


def _readings(
    probe: Mapping[str, Template], models: Mapping[str, str], columns: Sequence[str], labelled: bool
) -> Readings | None:
    """labelled: right labels pair something."""
    mine = tuple(column for column in probe if column != "face")
    known = {probe[column].model_id for column in mine}
    theirs = tuple(column for column in columns if column != "face" and models.get(column) in known)
    return readings_of(mine, theirs, labelled)


@cache
def _columns_of(mask: int) -> tuple[str, ...]:
    return tuple(column for column, bit in BIT.items() if mask & bit)


def as_labelled(
    board: Board, members: Sequence[tuple[NDArray[np.int64], list[list[Pair]]]]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """(used, trial_penalty_db) as `Board.fuse` takes them: of each group of pairs the best one counts, less the number of its rivals."""
    used = np.zeros(board.llr_db.shape, bool, order="F")  # as the board's arrays lie, so that they add up fast
    trial_penalty_db = np.zeros(board.llr_db.shape, order="F")
    for ats, groups in members:
        for group in groups:
            pairs = np.array([board.number[pair] for pair in group])
            if len(group) == 1:
                used[ats, pairs[0]] = ~np.isnan(board.llr_db[ats, pairs[0]])
                continue
            llr_db = board.llr_db[np.ix_(ats, pairs)]
            tries = np.count_nonzero(~np.isnan(llr_db), axis=1)
            there = np.flatnonzero(tries)
            best = pairs[np.nanargmax(llr_db[there], axis=1)]
            used[ats[there], best] = True
            trial_penalty_db[ats[there], best] = 10 * np.log10(tries[there])
    return used, trial_penalty_db


def _read_across(board: Board, fused: Fused, ats: NDArray[np.int64], readings: Readings) -> Fused:
    """Of these rows the better of right labels and the strongest other reading, each less its charge."""
    pairs = np.array([board.number[pair] for pair in readings.pairs])
    paired, label_penalties_db = readings.strongest(board.llr_db[np.ix_(ats, pairs)])
    used = np.zeros((len(ats), len(board.pairs)), bool)
    used[:, pairs] = paired
    for number, (column, _) in enumerate(board.pairs):
        if column == "face":
            used[:, number] = fused.used[ats, number]
    label_penalty_db = np.zeros(len(board.rows))
    label_penalty_db[ats] = readings.as_labelled_db
    other = board.fuse(used, ats=ats).penalised(label_penalties_db)
    return fused.penalised(label_penalty_db).or_better(other, ats)
