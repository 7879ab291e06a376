"""Compares a probe's templates with those of many candidates: raw scores, by pair of columns.

Owns the reading of candidates' templates, and the list of minutiae that are compared already. Never calibrates, and never chooses
candidates.

1. Each column's embeddings are read once, and compared in one matrix product.
2. Minutiae that add to an embedding are compared on request only (`staged.py`). All other minutiae are compared at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from biodedup.errors import ModelMismatch
from biodedup.match.labels import Pair
from biodedup.match.prints.minutiae import MinutiaeMatcher
from biodedup.match.ranked import Bool, Float64, Int64, PairScores, ScoreModel, calibrated
from biodedup.values import BIT, Float32, Template


class Candidates(Protocol):
    """The source of the candidates' templates: a gallery's rows, or a few templates in memory. rows: int64 (n,)."""

    def presence(self, rows: Int64) -> NDArray[np.uint16]:
        """The columns of each row, as a bit mask (`values.BIT`), uint16 (n,)."""

    def similarities(self, rows: Int64, column: str, probes: Float32) -> Float32 | None:
        """Cosines float32 (n, q) of rows that have this column, or None if the column holds no embeddings. probes: float32 (q, d), unit
        rows. Raises ModelMismatch."""

    def minutiae(self, rows: Int64, column: str) -> dict[int, bytes]:
        """Row -> minutiae record, for the rows that have a record."""

    def model_ids(self) -> Mapping[str, str]:
        """The model of each column."""


class TemplateCandidates:
    """Candidates in memory: a mapping column -> template for each of the rows 0, 1, ..."""

    def __init__(self, *candidates: Mapping[str, Template]) -> None:
        self._candidates = candidates

    def presence(self, rows: Int64) -> NDArray[np.uint16]:
        return np.array([sum(BIT[column] for column in self._candidates[row]) for row in rows.tolist()], np.uint16)

    def similarities(self, rows: Int64, column: str, probes: Float32) -> Float32 | None:
        embeddings = [self._candidates[row][column].embedding for row in rows.tolist()]
        vectors = [vector for vector in embeddings if vector is not None]
        if not vectors or len(vectors) < len(rows):
            return None
        return similarities_of(np.array(vectors, np.float32), column, probes)

    def minutiae(self, rows: Int64, column: str) -> dict[int, bytes]:
        records = {row: self._candidates[row][column].minutiae for row in rows.tolist()}
        return {row: record for row, record in records.items() if record is not None}

    def model_ids(self) -> Mapping[str, str]:
        return {column: template.model_id for candidate in self._candidates for column, template in candidate.items()}


def similarities_of(vectors: Float32, column: str, probes: Float32) -> Float32:
    """Cosines float32 (n, q) of unit rows (n, d) of a column with those of probes (q, d). Raises ModelMismatch."""
    check_dimension(vectors.shape[1], column, probes)
    return np.asarray(np.einsum("nd,qd->nq", vectors, probes), np.float32)


def check_dimension(dimension: int, column: str, probes: Float32) -> None:
    """Raises ModelMismatch unless the probes (q, d) have as many dimensions as the column."""
    if probes.shape[1] != dimension:
        raise ModelMismatch(
            f"the {column} probe has {probes.shape[1]} numbers, the candidate's {dimension}; extract both with one model"
        )


class RawScores:
    """The raw scores of one probe with n candidates.

    wanted: pair of columns -> the indices of the candidates to compare, int64 (k,), ascending. waiting: bool (n, pairs), True where
    minutiae add to the embedding and are not compared yet. compared: the number of minutiae records compared so far.
    """

    def __init__(
        self,
        matcher: MinutiaeMatcher,
        probe: Mapping[str, Template],
        models: Mapping[str, ScoreModel],
        source: Candidates,
        rows: Int64,
        wanted: Mapping[Pair, Int64],
    ) -> None:
        self.pairs = tuple(wanted)
        self.compared = 0
        self._matcher, self._probe, self._models = matcher, probe, models
        self._source, self._rows = source, rows
        self._similarity, self._minutiae = np.full((2, len(wanted), len(rows)), np.nan)
        self.waiting = np.zeros((len(wanted), len(rows)), bool).T
        model_ids = source.model_ids()
        without_embedding = list[tuple[int, Int64]]()
        same_product: dict[tuple[str, str, bytes], list[int]] = {}  # pairs that compare the same candidates' embeddings
        for number, (pair, indices) in enumerate(wanted.items()):
            template = probe[pair[0]]
            if pair[0] != pair[1] and model_ids.get(pair[1]) != template.model_id:
                continue
            if template.embedding is None:
                without_embedding.append((number, indices))
            else:
                same_product.setdefault((pair[1], template.model_id, indices.tobytes()), []).append(number)
        self._compare(without_embedding)
        for (column, *_), numbers in same_product.items():
            self._compare_embeddings(column, numbers, wanted[self.pairs[numbers[0]]])

    def _compare_embeddings(self, column: str, numbers: Sequence[int], indices: Int64) -> None:
        templates = [self._probe[self.pairs[number][0]] for number in numbers]
        probes = np.array([template.embedding for template in templates], np.float32)
        similarity = self._source.similarities(self._rows[indices], column, probes)
        if similarity is None:
            return
        for number, template, of_probe in zip(numbers, templates, similarity.T, strict=True):
            self._similarity[number, indices] = of_probe
            adds = self._models[self.pairs[number][0]].with_minutiae is not None
            self.waiting[indices, number] = adds and template.minutiae is not None

    def compare(self, cells: Bool) -> None:
        """Compares the waiting minutiae of these cells. cells: bool, (n, pairs) or (n, 1)."""
        wanted = self.waiting & cells
        numbers = np.flatnonzero(wanted.any(axis=0)).tolist()
        self._compare([(number, np.flatnonzero(wanted[:, number])) for number in numbers])
        self.waiting &= ~wanted

    def _compare(self, wanted: Sequence[tuple[int, Int64]]) -> None:
        """Compares minutiae in one call of the matcher. wanted: (number of the pair of columns, indices of the candidates)."""
        probes, records, which = list[bytes](), list[bytes](), list[int]()
        cells = list[tuple[int, list[int]]]()
        for number, indices in wanted:
            probe_column, column = self.pairs[number]
            probe = self._probe[probe_column].minutiae
            if probe is None:
                continue
            record_of = self._source.minutiae(self._rows[indices], column)
            with_record = [
                index
                for index, row in zip(indices.tolist(), self._rows[indices].tolist(), strict=True)
                if row in record_of
            ]
            records += [record_of[row] for row in self._rows[with_record].tolist()]
            which += [len(probes)] * len(with_record)
            probes.append(probe)
            cells.append((number, with_record))
        if not records:
            return
        scores, start = self._matcher.compare_pairs(probes, records, np.array(which, np.int64)), 0
        for number, with_record in cells:
            self._minutiae[number, with_record] = scores[start : start + len(with_record)]
            start += len(with_record)
        self.compared += len(records)

    def scores(self, indices: Int64 | None = None) -> dict[Pair, PairScores]:
        """Calibrated scores by pair of columns, from the raw scores so far. indices: of these candidates; None: of all."""
        chosen = slice(None) if indices is None else indices
        return {
            pair: calibrated(
                self._models[pair[0]],
                self._similarity[number][chosen],
                self._minutiae[number][chosen],
                by_embedding=self._probe[pair[0]].embedding is not None,
            )
            for number, pair in enumerate(self.pairs)
        }

    def llr_db(self, indices: Int64) -> Float64:
        """The evidence of each pair of columns from the raw scores so far, float64 (k, pairs); NaN where nothing is compared."""
        return (
            np.array([scores.llr_db for scores in self.scores(indices).values()])
            .reshape(len(self.pairs), len(indices))
            .T
        )
