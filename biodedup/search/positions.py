"""Searches across finger positions: which columns a capture is looked for in, and which of the rows found are worth comparing.

Owns these two choices. Never scans and never compares.

Of m fingers and n columns of fingers every one is looked for in every column: m x n comparisons of the gallery's rows, in n passes,
since all fingers share the pass over a column. A list of the most similar rows for each finger and column would hand most of
them to rescoring for nothing: their evidence is added up first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from biodedup.gallery.catalogue.sqlite import ColumnModel
from biodedup.values import BIT, Template

Int64 = NDArray[np.int64]


def comparable(mine: str, theirs: str, *, across: bool) -> bool:
    """Whether a capture of one column is compared with one of another: fingers of unknown position with every finger, and across
    positions all fingers."""
    return mine == theirs or ("face" not in (mine, theirs) and (across or "unknown" in (mine, theirs)))


def comparable_bits(probe: Mapping[str, Template], models: Mapping[str, ColumnModel], *, across: bool) -> int:
    """The gallery's columns that compare with this probe, as a presence mask."""
    return sum(
        BIT[theirs]
        for theirs, model in models.items()
        if any(
            comparable(mine, theirs, across=across) and (mine == theirs or template.model_id == model.model_id)
            for mine, template in probe.items()
        )
    )


def strongest(lists: Iterable[tuple[Int64, NDArray[np.float64]]], most: int) -> Int64:
    """The rows with the most evidence, added up over all lists, ascending; and all whose evidence is infinite.

    lists: rows int64 (n,) and their llr_db float64 (n,). Evidence against a row does not count: some other pair of fingers may
    still say who it is.
    """
    rows, llr_db = (np.concatenate(arrays) for arrays in zip(*lists, strict=True))
    found, which = np.unique(rows, return_inverse=True)
    sums = np.bincount(which, np.maximum(llr_db, 0.0), len(found))
    kept = np.isposinf(sums)
    kept[np.argsort(-sums, kind="stable")[:most]] = True
    return np.asarray(found[kept])
