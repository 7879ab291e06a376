"""Chooses the columns and rows for a search across finger positions, which also finds fingers with wrong labels.

Owns these choices. Never scans and never compares.

Each of m fingers of the probe is compared with each of n columns of fingers: m x n comparisons per row, in n passes, because all fingers share
the pass over a column. The evidence of all lists is added up before rows are chosen for the comparison of all captures. Otherwise the lists
of single fingers would send most rows to it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from biodedup.gallery.catalogue.sqlite import ColumnModel
from biodedup.values import BIT, Template

Int64 = NDArray[np.int64]


def comparable(probe_column: str, column: str, *, across: bool) -> bool:
    """Whether captures of two columns are compared. A finger of unknown position is compared with every finger; across positions all fingers
    are compared."""
    both = (probe_column, column)
    return probe_column == column or ("face" not in both and (across or "unknown" in both))


def comparable_bits(probe: Mapping[str, Template], models: Mapping[str, ColumnModel], *, across: bool) -> int:
    """The gallery's columns that are comparable with this probe, as a presence mask."""
    if not across and "unknown" not in probe and "unknown" not in models:
        return sum(BIT[column] for column in probe if column in models)
    return sum(
        BIT[column]
        for column, model in models.items()
        if any(
            comparable(probe_column, column, across=across)
            and (probe_column == column or template.model_id == model.model_id)
            for probe_column, template in probe.items()
        )
    )


def scanned_bits(
    probe: Mapping[str, Template], models: Mapping[str, ColumnModel], scanned: Collection[str], *, across: bool
) -> int:
    """The columns of `scanned` that are comparable with the probe's embeddings, as a presence mask: only these are scanned. 0: all columns are
    scanned."""
    return sum(
        BIT[column]
        for column in scanned
        if column in models
        and any(
            comparable(probe_column, column, across=across)
            and template.embedding is not None
            and template.model_id == models[column].model_id
            for probe_column, template in probe.items()
        )
    )


def strongest(lists: Iterable[tuple[Int64, NDArray[np.float64]]], count: int) -> Int64:
    """The `count` rows with the most evidence, added up over all lists, and all rows with infinite evidence; ascending.

    lists: (rows int64 (n,), their llr_db float64 (n,)). Evidence against a row does not count, because another pair of fingers may be
    evidence for it.
    """
    rows, llr_db = (np.concatenate(arrays) for arrays in zip(*lists, strict=True))
    unique, which = np.unique(rows, return_inverse=True)
    sums = np.bincount(which, np.maximum(llr_db, 0.0), len(unique))
    kept = np.isposinf(sums)
    kept[np.argsort(-sums, kind="stable")[:count]] = True
    return np.asarray(unique[kept])
