"""Impostor pairs of a gallery: scores between different subjects, with this gallery's cameras and scanners.

Owns the sample of subjects. All sampled subjects are taken for different people: in a small sample of a large gallery almost none are
enrolled twice, and a duplicate would be one pair in millions.
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

PEOPLE, PEOPLE_WITH_MINUTIAE = 2_000, 500
"""Drawn of each column: two million pairs of embeddings, 125,000 of minutiae, which take a hundred times as long."""
ROWS_A_PIECE = 16
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
    """(scores, a, b, position) of pairs, float64, int64 and str (n,) each; scores: `similarity`, `minutiae`, NaN where there is none.

    models: the model_ids that count. minutiae: compare them, too; executor: where. Raises InvalidInput where the gallery has no template of these.
    """
    rng = np.random.default_rng(seed)
    with closing(Gallery.open_to_read(gallery, LocalStorage(keys), Config().gallery)) as opened:
        now = opened.snapshot()
        columns = [column for column, model in now.models.items() if model.model_id in models]
        if not columns:
            known = sorted({model.model_id for model in now.models.values()})
            raise InvalidInput(
                f"{gallery.name} has no template of {' or '.join(sorted(models))}, but of {', '.join(known) or 'nothing'}; name one of these models"
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
    """(similarity, minutiae, a, b) of all pairs of the people drawn."""
    rows = _drawn(now, column, PEOPLE_WITH_MINUTIAE if minutiae else PEOPLE, rng)
    a, b = np.triu_indices(len(rows), 1)
    similarity, records = np.full((2, len(a)), np.nan)
    if now.models[column].dimension:
        vectors = now.embeddings(rows, column)
        similarity = (vectors @ vectors.T)[a, b].astype(np.float64)
    if minutiae:
        held = now.minutiae(rows, column)
        work = MinutiaeWork(tuple(held.get(row) for row in rows.tolist()))
        pieces = [(first, min(first + ROWS_A_PIECE, len(rows))) for first in range(0, len(rows), ROWS_A_PIECE)]
        records = np.concatenate([np.zeros(0), *in_order(executor, work, pieces)])
    return similarity, records, rows[a], rows[b]


def _drawn(now: Snapshot, column: str, count: int, rng: np.random.Generator) -> Int64:
    """Up to count rows that have this column, ascending."""
    found = [np.zeros(0, np.int64)]
    for part in now.parts:
        if column in part.columns:
            there = (part.presence(0, part.count) & BIT[column]) > 0
            mask = now.mask(part)
            (at,) = np.nonzero(there if mask is None else there & mask)
            found.append(part.rows(at))
    rows = np.concatenate(found)
    return np.sort(rng.choice(rows, min(count, len(rows)), replace=False))


@dataclass(frozen=True)
class MinutiaeWork(Work[tuple[int, int], Float64]):
    """Compares records with all behind them. A piece is (first, last): the records from first to before last. records: None for a person
    without minutiae. It is its own recipe: the records travel with it."""

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
        """The function returns the scores of each record's pairs, NaN where there is none."""
        with closing(CylinderMatcher()) as matcher:
            yield lambda piece: np.concatenate([self._scores(matcher, number) for number in range(*piece)])

    def _scores(self, matcher: CylinderMatcher, number: int) -> Float64:
        own, others = self.records[number], self.records[number + 1 :]
        scores = np.full(len(others), np.nan)
        present = [at for at, other in enumerate(others) if other is not None]
        if own is not None and present:
            scores[present] = matcher.compare(own, [other for other in others if other is not None])
        return scores
