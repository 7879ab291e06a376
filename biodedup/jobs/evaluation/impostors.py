"""Compares a sample of a gallery's subjects with each other: these impostor scores show how the gallery's cameras and scanners behave.

Owns the sample. It assumes that all sampled subjects are different people: in a small sample of a large gallery hardly anyone is enrolled
twice, and one duplicate is one pair in millions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from biodedup.common.executors import LOCAL, Deferred, Executor, Pending, Work, in_order
from biodedup.config import Config
from biodedup.errors import InvalidInput
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.snapshot import Snapshot
from biodedup.jobs.shared.progress import Progress, silent
from biodedup.keys import KeySource
from biodedup.match.prints.minutiae import CylinderMatcher
from biodedup.values import BIT

SUBJECTS, SUBJECTS_WITH_MINUTIAE = 2_000, 500
"""Sample size in each column: two million pairs of embeddings, or 125,000 pairs of minutiae, each of which takes a hundred times as long."""
PIECE_ROWS = 16
Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]


def impostor_pairs(
    gallery: Path,
    models: frozenset[str],
    *,
    minutiae: bool,
    seed: int,
    progress: Progress = silent,
    keys: KeySource | None = None,
    executor: Executor = LOCAL,
) -> tuple[Mapping[str, Float64], Int64, Int64, NDArray[np.str_]]:
    """Compares sampled subjects in each column. Returns (scores, a, b, position) of all pairs.

    scores: `similarity` and `minutiae`, float64 (n,), NaN if not compared; a, b: rows, int64 (n,); position: column, str (n,).
    models: only columns of these model_ids are compared. minutiae: minutiae are compared, too; executor: where this is done. Raises InvalidInput
    if the gallery has no template of these models.
    """
    rng = np.random.default_rng(seed)
    with closing(Gallery.open_to_read(gallery, LocalStorage(keys), Config().gallery)) as opened:
        now = opened.snapshot()
        columns = [column for column, model in now.models.items() if model.model_id in models]
        if not columns:
            known = sorted({model.model_id for model in now.models.values()})
            raise InvalidInput(
                f"{gallery.name} has no template of {' or '.join(sorted(models))}; it has templates of {', '.join(known) or 'no model'}. Name one of "
                "its models"
            )
        parts = []
        for number, column in enumerate(columns):
            progress("comparing impostor pairs", number, len(columns))
            parts.append(_pairs(now, column, minutiae, rng, executor))
        progress("comparing impostor pairs", len(columns), len(columns))
    similarity, records, a, b = (np.concatenate(values) for values in zip(*parts, strict=True))
    position = np.repeat(np.array(columns, np.str_), [len(part[0]) for part in parts])
    return {"similarity": similarity, "minutiae": records}, a, b, position


def _pairs(
    now: Snapshot, column: str, minutiae: bool, rng: np.random.Generator, executor: Executor
) -> tuple[Float64, Float64, Int64, Int64]:
    """(similarity, minutiae, a, b) of all pairs of the sampled rows of one column."""
    rows = _sample(now, column, SUBJECTS_WITH_MINUTIAE if minutiae else SUBJECTS, rng)
    a, b = np.triu_indices(len(rows), 1)
    similarity, records = np.full((2, len(a)), np.nan)
    if now.models[column].dimension:
        vectors = now.embeddings(rows, column)
        similarity = (vectors @ vectors.T)[a, b].astype(np.float64)
    if minutiae:
        held = now.minutiae(rows, column)
        work = MinutiaeWork(tuple(held.get(row) for row in rows.tolist()))
        pieces = [(first, min(first + PIECE_ROWS, len(rows))) for first in range(0, len(rows), PIECE_ROWS)]
        records = np.concatenate([np.zeros(0), *in_order(executor, work, pieces)])
    return similarity, records, rows[a], rows[b]


def _sample(now: Snapshot, column: str, count: int, rng: np.random.Generator) -> Int64:
    """A random sample of at most `count` rows that have this column, ascending."""
    candidates = [np.zeros(0, np.int64)]
    for part in now.parts:
        if column in part.columns:
            present = (part.presence(0, part.count) & BIT[column]) > 0
            mask = now.mask(part)
            (indices,) = np.nonzero(present if mask is None else present & mask)
            candidates.append(part.rows(indices))
    rows = np.concatenate(candidates)
    return np.sort(rng.choice(rows, min(count, len(rows)), replace=False))


@dataclass(frozen=True)
class MinutiaeWork(Work[tuple[int, int], Float64]):
    """Compares each record with all later records. A piece (first, end) is the records from first up to, not including, end.

    records: None for a subject without minutiae. The object is its own `Recipe`: the records are sent to the other process.
    """

    records: tuple[bytes | None, ...]
    threads: int = 1

    def begin(self, piece: tuple[int, int]) -> Pending[Float64]:
        def compare(piece: tuple[int, int]) -> Float64:
            with self.opened() as opened:
                return opened(piece)

        return Deferred(compare, piece)

    def recipe(self) -> MinutiaeWork:
        return self

    @contextmanager
    def opened(self) -> Iterator[Callable[[tuple[int, int]], Float64]]:
        """Yields a function that returns the scores of a piece's pairs, NaN if a record is missing."""
        with closing(CylinderMatcher()) as matcher:
            yield lambda piece: np.concatenate([self._scores(matcher, number) for number in range(*piece)])

    def _scores(self, matcher: CylinderMatcher, number: int) -> Float64:
        record, others = self.records[number], self.records[number + 1 :]
        scores = np.full(len(others), np.nan)
        present = [i for i, other in enumerate(others) if other is not None]
        if record is not None and present:
            scores[present] = matcher.compare(record, [other for other in others if other is not None])
        return scores
