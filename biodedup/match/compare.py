"""Comparing one probe with many candidates, capture by capture, and adding the evidence up.

Owns which captures are paired, and how their scores become one. Never searches and never decides.

1. Captures of one column are paired. A finger of unknown position is tried against every finger left over on the other
   side; the best of m tries counts, less 10 log10(m) dB, since m tries have m chances to look alike.
2. Every number that leaves here has a unit: `score_db`, `llr_db`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log10
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from biodedup.errors import InvalidInput, ModelMismatch
from biodedup.match.calibration import Calibration
from biodedup.match.fusion import fused_score_db, llr_reaching
from biodedup.match.minutiae import MinutiaeMatcher
from biodedup.values import Evidence, Float32, Score, Template

Pair = tuple[str, str]  # (probe column, candidate column)


class Candidates(Protocol):
    """Where the candidates' templates come from: a gallery's rows, or a few templates in hand."""

    def columns(self, rows: Sequence[int]) -> list[tuple[str, ...]]:
        """The columns that each row has."""

    def embeddings(self, rows: Sequence[int], column: str) -> Float32:
        """float32 (n, d), for rows that have this column; d = 0 where the column holds no embeddings."""

    def minutiae(self, rows: Sequence[int], column: str) -> dict[int, bytes]:
        """Records of those of the rows that have one."""


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


@dataclass(frozen=True)
class Comparison:
    """One candidate's result. evidence: one entry a capture that could be compared."""

    row: int
    score_db: float
    llr_db: float
    extrapolated: bool
    evidence: tuple[Evidence, ...]


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
    """Compares templates with calibrated scores. calibration_of: model_id -> its calibration."""

    def __init__(self, calibration_of: Callable[[str], Calibration], matcher: MinutiaeMatcher) -> None:
        self._calibration_of = calibration_of
        self._matcher = matcher

    def compare(self, probe: Mapping[str, Template], source: Candidates, rows: Sequence[int]) -> list[Comparison]:
        """The probe against each row, strongest first, equal ones by row. Rows with nothing comparable are left out."""
        groups_of = {
            row: pairings(tuple(probe), columns) for row, columns in zip(rows, source.columns(rows), strict=True)
        }
        rows_of: dict[Pair, list[int]] = {}
        for row, groups in groups_of.items():
            for group in groups:
                for pair in group:
                    rows_of.setdefault(pair, []).append(row)
        found: dict[tuple[int, Pair], Evidence] = {}
        for pair, at in rows_of.items():
            for row, evidence in self._evidence(probe[pair[0]], pair, source, at).items():
                found[row, pair] = evidence
        results = []
        for row, groups in groups_of.items():
            parts = [part for group in groups if (part := _best(row, group, found)) is not None]
            if parts:
                results.append(self._fuse(row, parts, probe))
        results.sort(key=lambda result: (-result.score_db, -result.llr_db, result.row))
        return results

    def score_db(self, probe: Template, values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """score_db, float64 (n,), of raw scores of this probe's model."""
        return self._calibration_of(probe.model_id).score_db(values.astype(np.float64))

    def calibration(self, model_id: str) -> Calibration:
        return self._calibration_of(model_id)

    def llr_reaching(self, score_db: float, model_ids: Sequence[str]) -> float:
        """The least sum of llr_db over captures of these models that scores as much."""
        return llr_reaching(score_db, tuple(map(self._calibration_of, model_ids)))

    def _evidence(self, probe: Template, pair: Pair, source: Candidates, rows: list[int]) -> dict[int, Evidence]:
        calibration = self._calibration_of(probe.model_id)
        if probe.embedding is not None:
            vectors = source.embeddings(rows, pair[1])
            if vectors.shape[1] == 0:
                return {}
            if vectors.shape[1] != len(probe.embedding):
                raise ModelMismatch(
                    f"the {pair[0]} probe has {len(probe.embedding)} numbers, the candidate's {vectors.shape[1]}; "
                    "extract both with one model"
                )
            values = (vectors @ probe.embedding).astype(np.float64)
            compared = rows
        else:
            records = source.minutiae(rows, pair[1])
            compared = list(records)
            assert probe.minutiae is not None, "a template has an embedding or minutiae"
            values = self._matcher.compare(probe.minutiae, list(records.values())).astype(np.float64)
        score_db, llr_db = calibration.score_db(values), calibration.llr_db(values)
        is_vector = probe.embedding is not None
        return {
            row: Evidence(
                *pair,
                score_db=float(score_db[i]),
                llr_db=float(llr_db[i]),
                similarity=float(values[i]) if is_vector else None,
                minutiae=None if is_vector else float(values[i]),
            )
            for i, row in enumerate(compared)
        }

    def _fuse(self, row: int, parts: list[Evidence], probe: Mapping[str, Template]) -> Comparison:
        llr_db = sum(part.llr_db for part in parts)
        calibrations = [self._calibration_of(probe[part.column].model_id) for part in parts]
        if len(parts) == 1:
            score_db, extrapolated = parts[0].score_db, parts[0].score_db > calibrations[0].measured_db
        else:
            score_db, extrapolated = fused_score_db(llr_db, tuple(calibrations))
        return Comparison(row, score_db, llr_db, extrapolated, tuple(parts))


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


def _best(row: int, group: list[Pair], found: Mapping[tuple[int, Pair], Evidence]) -> Evidence | None:
    tried = [found[row, pair] for pair in group if (row, pair) in found]
    if not tried:
        return None
    best = max(tried, key=lambda part: part.llr_db)
    if len(tried) == 1:
        return best
    tries_db = 10 * log10(len(tried))
    return Evidence(
        best.column,
        best.candidate_column,
        max(best.score_db - tries_db, 0.0),
        best.llr_db - tries_db,
        best.similarity,
        best.minutiae,
    )
