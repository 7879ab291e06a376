"""Impostor pairs of a gallery: scores between different subjects, with this gallery's cameras and scanners.

Owns the sample of subjects. All sampled subjects are taken for different people: in a small sample of a large gallery almost none are
enrolled twice, and a duplicate would be one pair in millions.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

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
) -> tuple[Mapping[str, Float64], Int64, Int64, NDArray[np.str_]]:
    """(scores, a, b, position) of pairs, float64, int64 and str (n,) each; scores: `similarity`, `minutiae`, NaN where there is none.

    models: the model_ids that count. minutiae: compare them, too. Raises InvalidInput where the gallery has no template of these.
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
            parts.append(_pairs(now, column, minutiae, rng))
        progress("comparing impostor pairs", len(columns), len(columns))
    similarity, records, a, b = (np.concatenate(values) for values in zip(*parts, strict=True))
    position = np.repeat(np.array(columns, np.str_), [len(part[0]) for part in parts])
    return {"similarity": similarity, "minutiae": records}, a, b, position


def _pairs(
    now: Snapshot, column: str, minutiae: bool, rng: np.random.Generator
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
        has = np.array([row in held for row in rows.tolist()], bool)
        with closing(CylinderMatcher()) as matcher:
            start = 0
            for number, row in enumerate(rows.tolist()):
                rest = np.flatnonzero(has[number + 1 :])
                if has[number] and len(rest):
                    others = [held[rows[number + 1 + i]] for i in rest.tolist()]
                    records[start + rest] = matcher.compare(held[row], others)
                start += len(rows) - 1 - number
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
