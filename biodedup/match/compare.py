"""Comparing one probe with many candidates, capture by capture, and adding the evidence up.

Owns which captures are paired, and how their scores become one. Never searches and never decides.

1. Captures of one column are paired. A finger of unknown position is tried against every finger left over on the other
   side; the best of m tries counts, less 10 log10(m) dB, since m tries have m chances to look alike.
2. Across positions, when asked: other readings of the fingers' labels are tried as well (`labels.py`), and the better of right
   labels and the strongest other reading counts, each less its charge.
3. A finger's embedding and its minutiae add their llr_db, and the sum is calibrated again; who has only one is compared by it.
4. Every number that leaves here has a unit: `score_db`, `llr_db`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log10
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from biodedup.errors import InvalidInput, ModelMismatch
from biodedup.match.calibration import SCORE_DB_MAX, Calibration
from biodedup.match.calibrations import WithMinutiae
from biodedup.match.fusion import fused_score_db, llr_reaching
from biodedup.match.labels import Pair, Readings, readings_of
from biodedup.match.minutiae import MinutiaeMatcher
from biodedup.values import Evidence, Float32, Score, Template


class Candidates(Protocol):
    """Where the candidates' templates come from: a gallery's rows, or a few templates in hand."""

    def columns(self, rows: Sequence[int]) -> list[tuple[str, ...]]:
        """The columns that each row has."""

    def embeddings(self, rows: Sequence[int], column: str) -> Float32:
        """float32 (n, d), for rows that have this column; d = 0 where the column holds no embeddings."""

    def minutiae(self, rows: Sequence[int], column: str) -> dict[int, bytes]:
        """Records of those of the rows that have one."""

    def model_ids(self) -> Mapping[str, str]:
        """The model of each column."""


class InHand:
    """Candidates that are held as templates: one mapping column -> template for each row 0, 1, ..."""

    def __init__(self, *candidates: Mapping[str, Template]) -> None:
        self._candidates = candidates

    def columns(self, rows: Sequence[int]) -> list[tuple[str, ...]]:
        return [tuple(self._candidates[row]) for row in rows]

    def embeddings(self, rows: Sequence[int], column: str) -> Float32:
        found = [self._candidates[row][column].embedding for row in rows]
        vectors = [vector for vector in found if vector is not None]
        return np.array(vectors, np.float32) if len(vectors) == len(rows) else np.zeros((len(rows), 0), np.float32)

    def minutiae(self, rows: Sequence[int], column: str) -> dict[int, bytes]:
        records = {row: self._candidates[row][column].minutiae for row in rows}
        return {row: record for row, record in records.items() if record is not None}

    def model_ids(self) -> Mapping[str, str]:
        return {column: template.model_id for one in self._candidates for column, template in one.items()}


@dataclass(frozen=True)
class Comparison:
    """One candidate's result. evidence: one entry a capture that could be compared; charge_db: what was taken off both sums,
    for readings of the labels that were tried."""

    row: int
    score_db: float
    llr_db: float
    extrapolated: bool
    evidence: tuple[Evidence, ...]
    charge_db: float = 0.0


@dataclass(frozen=True, eq=False)
class _Law:
    """How one model's templates score: by embedding or minutiae alone, and, where a card says how, by both."""

    alone: Calibration
    with_minutiae: WithMinutiae | None

    def of(self, part: Evidence) -> Calibration:
        if self.with_minutiae is not None and part.similarity is not None and part.minutiae is not None:
            return self.with_minutiae.both
        return self.alone


@dataclass(frozen=True, eq=False)
class _Measured:
    """A pair of columns, compared. similarity, minutiae, score_db, llr_db: float64 (n,), of every row; NaN where it cannot be
    compared so."""

    pair: Pair
    similarity: NDArray[np.float64]
    minutiae: NDArray[np.float64]
    score_db: NDArray[np.float64]
    llr_db: NDArray[np.float64]

    def compared(self, at: int) -> bool:
        return not np.isnan(self.llr_db[at])

    def evidence(self, at: int) -> Evidence:
        similarity, minutiae = (
            None if np.isnan(value[at]) else float(value[at]) for value in (self.similarity, self.minutiae)
        )
        return Evidence(
            *self.pair,
            score_db=float(self.score_db[at]),
            llr_db=float(self.llr_db[at]),
            similarity=similarity,
            minutiae=minutiae,
        )


class _Held:
    """Candidates of one comparison; each column's embeddings are read once, whatever they are compared with."""

    def __init__(self, source: Candidates, rows: Sequence[int]) -> None:
        self.count = len(rows)
        self.model_ids = source.model_ids()
        self._source, self._rows = source, rows
        self._read: dict[tuple[str, bytes], Float32] = {}

    def embeddings(self, ats: NDArray[np.int64], column: str) -> Float32:
        key = (column, ats.tobytes())
        if key not in self._read:
            self._read[key] = self._source.embeddings([self._rows[at] for at in ats.tolist()], column)
        return self._read[key]

    def minutiae(self, ats: NDArray[np.int64], column: str) -> tuple[NDArray[np.int64], list[bytes]]:
        """Which of these have a record, and the records."""
        records = self._source.minutiae([self._rows[at] for at in ats.tolist()], column)
        there = [at for at in ats.tolist() if self._rows[at] in records]
        return np.array(there, np.int64), [records[self._rows[at]] for at in there]


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


class Comparer:
    """Compares templates with calibrated scores. calibration_of: model_id -> its calibration; with_minutiae: how minutiae add to
    embeddings of a model."""

    def __init__(
        self,
        calibration_of: Callable[[str], Calibration],
        matcher: MinutiaeMatcher,
        with_minutiae: Callable[[str], WithMinutiae | None] = lambda model_id: None,
    ) -> None:
        self._calibration_of = calibration_of
        self._with_minutiae = with_minutiae
        self._matcher = matcher

    def compare(
        self, probe: Mapping[str, Template], source: Candidates, rows: Sequence[int], *, across: bool = False
    ) -> list[Comparison]:
        """The probe against each row, strongest first, equal ones by row. Rows with nothing comparable are left out.

        across: fingers are compared with fingers of other labels, too.
        """
        columns = source.columns(rows)
        members: dict[tuple[str, ...], list[int]] = {}
        for at, some in enumerate(columns):
            members.setdefault(some, []).append(at)
        groups = {some: pairings(tuple(probe), some) for some in members}
        models = source.model_ids()
        readings = {some: _readings(probe, models, some, bool(groups[some])) for some in members if across}
        wanted: dict[Pair, list[int]] = {}
        for some, at_these in members.items():
            tried = readings.get(some)
            for pair in dict.fromkeys((*(p for group in groups[some] for p in group), *(tried.pairs if tried else ()))):
                wanted.setdefault(pair, []).extend(at_these)
        # once for all rows: the calibration of a model without a card is measured on the gallery
        laws = {
            model_id: _Law(self._calibration_of(model_id), self._with_minutiae(model_id))
            for model_id in {one.model_id for one in probe.values()}
        }
        of = {column: laws[template.model_id] for column, template in probe.items()}
        held = _Held(source, rows)
        measured = {
            pair: self._measure(probe[pair[0]], of[pair[0]], pair, held, np.sort(ats)) for pair, ats in wanted.items()
        }
        results: dict[int, Comparison] = {}
        for at, (row, some) in enumerate(zip(rows, columns, strict=True)):
            parts = [part for group in groups[some] if (part := _best(at, group, measured)) is not None]
            if parts:
                results[at] = _fused(row, parts, of)
        for some, tried in readings.items():
            if tried is not None:
                _read_across(rows, members[some], tried, measured, of, results)
        return sorted(results.values(), key=lambda result: (-result.score_db, -result.llr_db, result.row))

    def score_db(self, probe: Template, values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """score_db, float64 (n,), of raw scores of this probe's model."""
        return self._calibration_of(probe.model_id).score_db(values.astype(np.float64))

    def adds_minutiae(self, model_id: str) -> bool:
        """Whether minutiae add to the embeddings of this model."""
        return self._with_minutiae(model_id) is not None

    def has_more(self, probe: Template) -> bool:
        """Whether comparing says more than the embedding alone does, so that an order by embeddings is not final."""
        return probe.embedding is not None and probe.minutiae is not None and self.adds_minutiae(probe.model_id)

    def calibration(self, model_id: str) -> Calibration:
        return self._calibration_of(model_id)

    def llr_reaching(self, score_db: float, model_ids: Sequence[str]) -> float:
        """The least sum of llr_db over captures of these models that scores as much."""
        return llr_reaching(score_db, tuple(map(self._calibration_of, model_ids)))

    def _measure(self, probe: Template, law: _Law, pair: Pair, held: _Held, ats: NDArray[np.int64]) -> _Measured:
        """ats: which of the rows have the candidate's column."""
        similarity, minutiae, score_db, llr_db = np.full((4, held.count), np.nan)
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
        alone = similarity if probe.embedding is not None else minutiae
        there = np.flatnonzero(~np.isnan(alone))
        score_db[there], llr_db[there] = law.alone.score_db(alone[there]), law.alone.llr_db(alone[there])
        if law.with_minutiae is not None:
            there = np.flatnonzero(~np.isnan(similarity + minutiae))
            summed = llr_db[there] + law.with_minutiae.minutiae.llr_db(minutiae[there])
            score_db[there] = law.with_minutiae.both.score_db(summed)
            llr_db[there] = law.with_minutiae.both.llr_db(summed)
        return _Measured(pair, similarity, minutiae, score_db, llr_db)


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


def _best(at: int, group: list[Pair], measured: Mapping[Pair, _Measured]) -> Evidence | None:
    tried = [measured[pair].evidence(at) for pair in group if measured[pair].compared(at)]
    if not tried:
        return None
    best = max(tried, key=lambda part: part.llr_db)
    if len(tried) == 1:
        return best
    tries_db = 10 * log10(len(tried))
    return replace(best, score_db=max(best.score_db - tries_db, 0.0), llr_db=best.llr_db - tries_db)


def _read_across(
    rows: Sequence[int],
    members: Sequence[int],
    readings: Readings,
    measured: Mapping[Pair, _Measured],
    laws: Mapping[str, _Law],
    results: dict[int, Comparison],
) -> None:
    """Replaces the results of these rows by the better of right labels and the strongest other reading."""
    llr_db = np.stack([measured[pair].llr_db[members] for pair in readings.pairs], axis=1)
    for at, paired, charge_db in zip(members, *readings.strongest(llr_db), strict=True):
        labelled = results.get(at)
        as_labelled = None if labelled is None else _charged(labelled, readings.as_labelled_db)
        besides = [] if labelled is None else [part for part in labelled.evidence if part.column == "face"]
        parts = besides + [measured[readings.pairs[i]].evidence(at) for i in np.flatnonzero(paired)]
        other = _charged(_fused(rows[at], parts, laws), float(charge_db)) if parts else None
        best = max((one for one in (as_labelled, other) if one is not None), key=_strength, default=None)
        if best is not None:
            results[at] = best


def _fused(row: int, parts: list[Evidence], of: Mapping[str, _Law]) -> Comparison:
    """of: the law of each of the probe's columns."""
    llr_db = sum(part.llr_db for part in parts)
    calibrations = tuple(of[part.column].of(part) for part in parts)
    if len(parts) == 1:
        score_db, extrapolated = parts[0].score_db, parts[0].score_db > calibrations[0].measured_db
    else:
        score_db, extrapolated = fused_score_db(llr_db, calibrations)
    return Comparison(row, score_db, llr_db, extrapolated, tuple(parts))


def _charged(result: Comparison, charge_db: float) -> Comparison:
    return replace(
        result,
        score_db=max(result.score_db - charge_db, 0.0),
        llr_db=result.llr_db - charge_db,
        charge_db=charge_db,
    )


def _strength(result: Comparison) -> tuple[float, float]:
    """By score; but where scores end before the evidence does, by evidence."""
    full = result.score_db + result.charge_db > SCORE_DB_MAX - 1e-6
    return (np.inf if full else result.score_db, result.llr_db)
