"""Reads candidates' templates and compares them with those of probes: raw scores, by pair of columns.

Owns what is read of candidates, and which minutiae have been compared. Never calibrates and never chooses.

1. Each column is read once for the candidates of all probes.
2. Minutiae that add to an embedding wait until they are asked for (`staged.py`). Other minutiae are compared at once.
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
        """The columns of each row, as a bit mask (`values.BIT`)."""

    def similarities(self, rows: Int64, column: str, probes: Float32, which: Int64) -> Float32 | None:
        """Cosines float32 (n, q) of each row with the q captures of its probe; None if the column holds no embeddings. All rows have this
        column. probes: float32 (p, q, d), unit vectors; which: int64 (n,), the number of each row's probe. A cosine is the same to the
        last bit in any company. Raises ModelMismatch."""

    def minutiae(self, rows: Int64, column: str) -> dict[int, bytes]:
        """row -> minutiae record, of the rows that have one."""

    def model_ids(self) -> Mapping[str, str]:
        """The model of each column."""


class TemplateCandidates:
    """Candidates that are held as templates: one mapping column -> template for each row 0, 1, ..."""

    def __init__(self, *candidates: Mapping[str, Template]) -> None:
        self._candidates = candidates

    def presence(self, rows: Int64) -> NDArray[np.uint16]:
        return np.array([sum(BIT[column] for column in self._candidates[row]) for row in rows.tolist()], np.uint16)

    def similarities(self, rows: Int64, column: str, probes: Float32, which: Int64) -> Float32 | None:
        held, at = np.unique(rows, return_inverse=True)
        found = [self._candidates[row][column].embedding for row in held.tolist()]
        vectors = [vector for vector in found if vector is not None]
        if not vectors or len(vectors) < len(held):
            return None
        return similarities_of(np.array(vectors, np.float32)[at], column, probes, which)

    def minutiae(self, rows: Int64, column: str) -> dict[int, bytes]:
        records = {row: self._candidates[row][column].minutiae for row in rows.tolist()}
        return {row: record for row, record in records.items() if record is not None}

    def model_ids(self) -> Mapping[str, str]:
        return {column: template.model_id for candidate in self._candidates for column, template in candidate.items()}


class JoinedCandidates:
    """The candidates of two sources. Rows below `count` are of the first; rows from it on are of the second, less count."""

    def __init__(self, first: Candidates, second: Candidates, count: int) -> None:
        self._sources = (first, second)
        self._count = count

    def _parts(self, rows: Int64) -> Iterator[tuple[Candidates, Bool, Int64]]:
        """(source, which rows are of it, its rows)."""
        for number, source in enumerate(self._sources):
            own = (rows >= self._count) == bool(number)
            if own.any():
                yield source, own, rows[own] - number * self._count

    def presence(self, rows: Int64) -> NDArray[np.uint16]:
        found = np.zeros(len(rows), np.uint16)
        for source, own, some in self._parts(rows):
            found[own] = source.presence(some)
        return found

    def similarities(self, rows: Int64, column: str, probes: Float32, which: Int64) -> Float32 | None:
        found = np.full((len(rows), probes.shape[1]), np.nan, np.float32)
        for source, own, some in self._parts(rows):
            similarity = source.similarities(some, column, probes, which[own])
            if similarity is None:
                return None
            found[own] = similarity
        return found

    def minutiae(self, rows: Int64, column: str) -> dict[int, bytes]:
        records = dict[int, bytes]()
        for source, own, some in self._parts(rows):
            of_source, numbers = source.minutiae(some, column), zip(rows[own].tolist(), some.tolist(), strict=True)
            records.update({row: of_source[number] for row, number in numbers if number in of_source})
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
    """Raises ModelMismatch for probes (..., d) that have another number of dimensions than the column."""
    if probes.shape[-1] != dimension:
        raise ModelMismatch(
            f"the {column} probe has {probes.shape[-1]} numbers, the candidate's {dimension}; extract both with one model"
        )


class RawScores:
    """The raw scores of some probes with n candidates.

    probes: with captures in the same columns, of the same models and of the same kinds (embedding, minutiae, or both). which: int64 (n,),
    ascending, the probe that each candidate is compared with. wanted: the pairs of columns to compare, and for each the candidates that
    have its column, int64 (k,), ascending. waiting: bool (n, pairs), where minutiae would add to the embedding and are not compared yet.
    compared: int64 (probes,), how many pairs of minutiae records were compared so far.
    """

    def __init__(
        self,
        matcher: MinutiaeMatcher,
        probes: Sequence[Mapping[str, Template]],
        models: Mapping[str, ScoreModel],
        source: Candidates,
        held: tuple[Int64, Int64],
        wanted: Mapping[Pair, Int64],
    ) -> None:
        """held: (the rows of the candidates, which)."""
        self._rows, self._which = held
        self.pairs = tuple(wanted)
        self.compared = np.zeros(len(probes), np.int64)
        self._matcher, self._probes, self._models, self._source = matcher, probes, models, source
        self._similarity, self._minutiae = np.full((2, len(wanted), len(self._rows)), np.nan)
        self.waiting = np.zeros((len(wanted), len(self._rows)), bool).T
        self._first = probes[0]  # its captures are of the same kinds as those of all
        model_ids = source.model_ids()
        minutiae_only = list[tuple[int, Int64]]()
        shared: dict[tuple[str, str, bytes], list[int]] = {}  # pairs that read the same embeddings
        for number, (pair, ats) in enumerate(wanted.items()):
            template = self._first[pair[0]]
            if pair[0] != pair[1] and model_ids.get(pair[1]) != template.model_id:
                continue
            if template.embedding is None:
                minutiae_only.append((number, ats))
            else:
                shared.setdefault((pair[1], template.model_id, ats.tobytes()), []).append(number)
        self._compare(minutiae_only)
        for (column, *_), numbers in shared.items():
            self._embeddings(column, numbers, wanted[self.pairs[numbers[0]]])

    def _embeddings(self, column: str, numbers: Sequence[int], ats: Int64) -> None:
        """Compares the embeddings of a column with those of the probes' columns in these pairs."""
        own = [self.pairs[number][0] for number in numbers]
        probes = np.array([[probe[name].embedding for name in own] for probe in self._probes], np.float32)
        similarity = self._source.similarities(self._rows[ats], column, probes, self._which[ats])
        if similarity is None:
            return
        for number, name, of_pair in zip(numbers, own, similarity.T, strict=True):
            self._similarity[number, ats] = of_pair
            adds = self._models[name].with_minutiae is not None
            self.waiting[ats, number] = adds and self._first[name].minutiae is not None

    def compare(self, cells: Bool) -> None:
        """Compares the minutiae that wait in these cells. cells: bool, (n, pairs) or (n, 1)."""
        wanted = self.waiting & cells
        numbers = np.flatnonzero(wanted.any(axis=0)).tolist()
        self._compare([(number, np.flatnonzero(wanted[:, number])) for number in numbers])
        self.waiting &= ~wanted

    def _compare(self, wanted: Sequence[tuple[int, Int64]]) -> None:
        """Compares the minutiae of these pairs of columns with these candidates, all in one call. wanted: (number of the pair, candidates)."""
        probes, records, which = list[bytes | None](), list[bytes](), [np.zeros(0, np.int64)]
        cells = list[tuple[int, Int64]]()
        for number, ats in wanted:
            own, column = self.pairs[number]
            if self._first[own].minutiae is None:
                continue
            record_of = self._source.minutiae(np.unique(self._rows[ats]), column)
            told = zip(ats.tolist(), self._rows[ats].tolist(), strict=True)
            has = np.array([at for at, row in told if row in record_of], np.int64)
            records += [record_of[row] for row in self._rows[has].tolist()]
            used, of_each = np.unique(self._which[has], return_inverse=True)
            which.append(len(probes) + of_each)
            probes += [self._probes[i][own].minutiae for i in used.tolist()]
            cells.append((number, has))
        if not records:
            return
        known = [record for record in probes if record is not None]
        scores, low = self._matcher.compare_pairs(known, records, np.concatenate(which)), 0
        for number, has in cells:
            self._minutiae[number, has] = scores[low : low + len(has)]
            self.compared += np.bincount(self._which[has], minlength=len(self.compared))
            low += len(has)

    def scores(self, ats: Int64 | None = None) -> dict[Pair, PairScores]:
        """By what has been compared so far; of these candidates, None for all."""
        chosen = slice(None) if ats is None else ats
        return {
            pair: calibrated(
                self._models[pair[0]],
                self._similarity[number][chosen],
                self._minutiae[number][chosen],
                by_embedding=self._first[pair[0]].embedding is not None,
            )
            for number, pair in enumerate(self.pairs)
        }

    def llr_db(self, ats: Int64) -> Float64:
        """The evidence of each pair of columns by what has been compared so far, float64 (k, pairs); NaN where there is none."""
        return np.array([scores.llr_db for scores in self.scores(ats).values()]).reshape(len(self.pairs), len(ats)).T
