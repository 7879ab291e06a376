"""Searches for a finger under other finger positions, since labels may be wrong: chooses the columns to search and the rows to compare.

Owns these choices. Never scans and never compares.

Each of m fingers is looked for in each of n columns of fingers: m x n comparisons of the gallery's rows, in n passes,
since all fingers share the pass over a column. A list of the most similar rows for each finger and column would send
most rows to re-ranking for nothing, so their evidence is added up first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from biodedup.gallery.catalogue.sqlite import ColumnModel
from biodedup.values import BIT, Template

Int64 = NDArray[np.int64]


def comparable(own: str, theirs: str, *, across: bool) -> bool:
    """Whether captures of two columns are compared. Fingers of unknown position compare with every finger; across
    positions all fingers compare."""
    return own == theirs or ("face" not in (own, theirs) and (across or "unknown" in (own, theirs)))


def comparable_bits(probe: Mapping[str, Template], models: Mapping[str, ColumnModel], *, across: bool) -> int:
    """The gallery's columns that compare with this probe, as a presence mask."""
    if not across and "unknown" not in probe and "unknown" not in models:
        return sum(BIT[column] for column in probe if column in models)
    return sum(
        BIT[theirs]
        for theirs, model in models.items()
        if any(
            comparable(own, theirs, across=across) and (own == theirs or template.model_id == model.model_id)
            for own, template in probe.items()
        )
    )


def scanned_bits(
    probe: Mapping[str, Template], models: Mapping[str, ColumnModel], scanned: Collection[str], *, across: bool
) -> int:
    """The columns that alone are scanned for this probe, as a presence mask: those of `scanned` that one of its embeddings compares with. 0
    where there are none, or `scanned` is empty: all columns are."""
    return sum(
        BIT[theirs]
        for theirs in scanned
        if theirs in models
        and any(
            comparable(own, theirs, across=across)
            and template.embedding is not None
            and template.model_id == models[theirs].model_id
            for own, template in probe.items()
        )
    )


def strongest(lists: Iterable[tuple[Int64, NDArray[np.float64]]], most: int) -> Int64:
    """The rows with the most evidence, added up over all lists, ascending; and all rows with infinite evidence.

    lists: rows int64 (n,) and their llr_db float64 (n,). Evidence against a row does not count: another pair of fingers
    may still speak for it.
    """
    rows, llr_db = (np.concatenate(arrays) for arrays in zip(*lists, strict=True))
    unique, which = np.unique(rows, return_inverse=True)
    sums = np.bincount(which, np.maximum(llr_db, 0.0), len(unique))
    kept = np.isposinf(sums)
    kept[np.argsort(-sums, kind="stable")[:most]] = True
    return np.asarray(unique[kept])
