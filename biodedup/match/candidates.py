"""Compares templates of probes with those of many candidates: raw scores, by pair of columns.

Owns the reading of candidates' templates, and the list of minutiae that are compared already. Never calibrates, and never chooses
candidates.

1. Each column is read once for the candidates of all probes.
2. Minutiae that add to an embedding are compared on request only (`staged.py`). All other minutiae are compared at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from biodedup.common.vectors import dot_products
from biodedup.errors import ModelMismatch
from biodedup.match.labels import Pair
from biodedup.match.prints.minutiae import MinutiaeMatcher
from biodedup.match.ranked import Bool, Float64, Int64, PairScores, ScoreModel, calibrated
from biodedup.values import BIT, Float32, Template


class Candidates(Protocol):
    """The source of the candidates' templates: a gallery's rows, or a few templates in memory. rows: int64 (n,)."""

    def presence(self, rows: Int64) -> NDArray[np.uint16]:
        """The columns of each row, as a bit mask (`values.BIT`), uint16 (n,)."""

    def similarities(self, rows: Int64, column: str, probes: Float32, which: Int64) -> Float32 | None:
        """Cosines float32 (n, q) of each row with the q captures of its probe, or None if the column holds no embeddings. All rows have this
        column. probes: float32 (p, q, d), unit vectors. which: int64 (n,), the number of each row's probe. A cosine does not depend on the
        other rows and probes, not even in the last bit. Raises ModelMismatch."""

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

    def similarities(self, rows: Int64, column: str, probes: Float32, which: Int64) -> Float32 | None:
        distinct, at = np.unique(rows, return_inverse=True)
        embeddings = [self._candidates[row][column].embedding for row in distinct.tolist()]
        vectors = [vector for vector in embeddings if vector is not None]
        if not vectors or len(vectors) < len(distinct):
            return None
        return similarities_of(np.array(vectors, np.float32)[at], column, probes, which)

    def minutiae(self, rows: Int64, column: str) -> dict[int, bytes]:
        records = {row: self._candidates[row][column].minutiae for row in rows.tolist()}
        return {row: record for row, record in records.items() if record is not None}

    def model_ids(self) -> Mapping[str, str]:
        return {column: template.model_id for candidate in self._candidates for column, template in candidate.items()}


class JoinedCandidates:
    """The candidates of two sources. Rows below `count` are rows of the first source; row count + i is row i of the second."""

    def __init__(self, first: Candidates, second: Candidates, count: int) -> None:
        self._sources = (first, second)
        self._count = count

    def _parts(self, rows: Int64) -> Iterator[tuple[Candidates, Bool, Int64]]:
        """(source, mask of the rows that it has, their numbers in it)."""
        for number, source in enumerate(self._sources):
            mask = (rows >= self._count) == bool(number)
            if mask.any():
                yield source, mask, rows[mask] - number * self._count

    def presence(self, rows: Int64) -> NDArray[np.uint16]:
        presence = np.zeros(len(rows), np.uint16)
        for source, mask, numbers in self._parts(rows):
            presence[mask] = source.presence(numbers)
        return presence

    def similarities(self, rows: Int64, column: str, probes: Float32, which: Int64) -> Float32 | None:
        cosines = np.full((len(rows), probes.shape[1]), np.nan, np.float32)
        for source, mask, numbers in self._parts(rows):
            of_source = source.similarities(numbers, column, probes, which[mask])
            if of_source is None:
                return None
            cosines[mask] = of_source
        return cosines

    def minutiae(self, rows: Int64, column: str) -> dict[int, bytes]:
        records = dict[int, bytes]()
        for source, mask, numbers in self._parts(rows):
            of_source, pairs = source.minutiae(numbers, column), zip(rows[mask].tolist(), numbers.tolist(), strict=True)
            records.update({row: of_source[number] for row, number in pairs if number in of_source})
        return records

    def model_ids(self) -> Mapping[str, str]:
        first, second = self._sources
        return {**second.model_ids(), **first.model_ids()}


def similarities_of(vectors: Float32, column: str, probes: Float32, which: Int64) -> Float32:
    """Cosines float32 (n, q) of the unit rows (n, d) of a column with the captures of their probes, as in `Candidates`. Raises
    ModelMismatch."""
    check_dimension(vectors.shape[1], column, probes)
    return dot_products(vectors, probes, which)


def check_dimension(dimension: int, column: str, probes: Float32) -> None:
    """Raises ModelMismatch unless the probes (..., d) have as many dimensions as the column."""
    if probes.shape[-1] != dimension:
        raise ModelMismatch(
            f"the {column} probe has {probes.shape[-1]} numbers, the candidate's {dimension}; extract both with one model"
        )


class RawScores:
    """The raw scores of some probes with n candidates.

    probes: have captures in the same columns, of the same models and of the same kinds (embedding, minutiae, or both). which: int64 (n,),
    ascending, the probe of each candidate. wanted: pair of columns -> the indices of the candidates to compare, int64 (k,), ascending.
    waiting: bool (n, pairs), True where minutiae add to the embedding and are not compared yet. compared: int64 (probes,), the number of
    pairs of minutiae records that were compared so far.
    """

    def __init__(
        self,
        matcher: MinutiaeMatcher,
        probes: Sequence[Mapping[str, Template]],
        models: Mapping[str, ScoreModel],
        source: Candidates,
        candidates: tuple[Int64, Int64],
        wanted: Mapping[Pair, Int64],
    ) -> None:
        """candidates: (the rows of the candidates, which)."""
        self._rows, self._which = candidates
        self.pairs = tuple(wanted)
        self.compared = np.zeros(len(probes), np.int64)
        self._matcher, self._probes, self._models, self._source = matcher, probes, models, source
        self._similarity, self._minutiae = np.full((2, len(wanted), len(self._rows)), np.nan)
        self.waiting = np.zeros((len(wanted), len(self._rows)), bool).T
        self._first = probes[0]  # all probes have the same kinds of captures
        model_ids = source.model_ids()
        without_embedding = list[tuple[int, Int64]]()
        same_embeddings: dict[
            tuple[str, str, bytes], list[int]
        ] = {}  # pairs that compare the same candidates' embeddings
        for number, (pair, indices) in enumerate(wanted.items()):
            template = self._first[pair[0]]
            if pair[0] != pair[1] and model_ids.get(pair[1]) != template.model_id:
                continue
            if template.embedding is None:
                without_embedding.append((number, indices))
            else:
                same_embeddings.setdefault((pair[1], template.model_id, indices.tobytes()), []).append(number)
        self._compare(without_embedding)
        for (column, *_), numbers in same_embeddings.items():
            self._compare_embeddings(column, numbers, wanted[self.pairs[numbers[0]]])

    def _compare_embeddings(self, column: str, numbers: Sequence[int], indices: Int64) -> None:
        """Compares the embeddings of a column with those of the probes' columns in these pairs."""
        probe_columns = [self.pairs[number][0] for number in numbers]
        probes = np.array([[probe[name].embedding for name in probe_columns] for probe in self._probes], np.float32)
        similarity = self._source.similarities(self._rows[indices], column, probes, self._which[indices])
        if similarity is None:
            return
        for number, name, of_pair in zip(numbers, probe_columns, similarity.T, strict=True):
            self._similarity[number, indices] = of_pair
            adds = self._models[name].with_minutiae is not None
            self.waiting[indices, number] = adds and self._first[name].minutiae is not None

    def compare(self, cells: Bool) -> None:
        """Compares the waiting minutiae of these cells. cells: bool, (n, pairs) or (n, 1)."""
        wanted = self.waiting & cells
        numbers = np.flatnonzero(wanted.any(axis=0)).tolist()
        self._compare([(number, np.flatnonzero(wanted[:, number])) for number in numbers])
        self.waiting &= ~wanted

    def _compare(self, wanted: Sequence[tuple[int, Int64]]) -> None:
        """Compares minutiae in one call of the matcher. wanted: (number of the pair of columns, indices of the candidates)."""
        probes, records, which = list[bytes | None](), list[bytes](), [np.zeros(0, np.int64)]
        cells = list[tuple[int, Int64]]()
        for number, indices in wanted:
            probe_column, column = self.pairs[number]
            if self._first[probe_column].minutiae is None:
                continue
            record_of = self._source.minutiae(np.unique(self._rows[indices]), column)
            pairs = zip(indices.tolist(), self._rows[indices].tolist(), strict=True)
            with_record = np.array([index for index, row in pairs if row in record_of], np.int64)
            records += [record_of[row] for row in self._rows[with_record].tolist()]
            used, of_each = np.unique(self._which[with_record], return_inverse=True)
            which.append(len(probes) + of_each)
            probes += [self._probes[i][probe_column].minutiae for i in used.tolist()]
            cells.append((number, with_record))
        if not records:
            return
        known = [record for record in probes if record is not None]
        scores, start = self._matcher.compare_pairs(known, records, np.concatenate(which)), 0
        for number, with_record in cells:
            self._minutiae[number, with_record] = scores[start : start + len(with_record)]
            self.compared += np.bincount(self._which[with_record], minlength=len(self.compared))
            start += len(with_record)

    def scores(self, indices: Int64 | None = None) -> dict[Pair, PairScores]:
        """Calibrated scores by pair of columns, from the raw scores so far. indices: of these candidates; None: of all."""
        chosen = slice(None) if indices is None else indices
        return {
            pair: calibrated(
                self._models[pair[0]],
                self._similarity[number][chosen],
                self._minutiae[number][chosen],
                by_embedding=self._first[pair[0]].embedding is not None,
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
