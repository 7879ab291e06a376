"""Combines the rows (encounters) of one subject into one comparison.

Owns the borrowing of columns between a subject's rows, and the penalty for several rows. Never compares captures.

1. If a row lacks a column, it borrows the strongest pair among the m rows of its subject that have the column, minus 10 log10(m) dB. Rows
   with different finger positions are thus compared jointly.
2. The strongest of a subject's k different rows counts, minus 10 log10(k) dB, because k rows have k chances of a false match
   (Bonferroni's bound).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from biodedup.match.labels import Pair
from biodedup.match.ranked import Fused, PairScores

Int64 = NDArray[np.int64]


def presence_of_subjects(presence: NDArray[np.uint16], subjects: Int64) -> NDArray[np.uint16]:
    """The columns of all rows of each row's subject, as masks, uint16 (n,)."""
    _, which = np.unique(subjects, return_inverse=True)
    masks = np.zeros(which.max() + 1 if len(which) else 0, np.uint16)
    np.bitwise_or.at(masks, which, presence)
    return masks[which]


class SubjectScores:
    """Scores of rows, completed by borrowed columns. subjects: int64 (n,), the number of each row's subject.

    scores: pair of columns -> scores of every row. borrowed_db: float64 (n, pairs), the penalty of a borrowed pair.
    """

    def __init__(self, scores: Mapping[Pair, PairScores], subjects: Int64) -> None:
        self._subjects = subjects
        _, which, counts = np.unique(subjects, return_inverse=True, return_counts=True)
        self._several = np.flatnonzero(counts[which] > 1)
        self.borrowed_db = np.zeros((len(subjects), len(scores)))
        self._source = np.tile(np.arange(len(subjects)), (len(scores), 1)).T
        for number, pair_scores in enumerate(scores.values()):
            self._borrow(number, pair_scores.llr_db)
        self.scores = {
            pair: pair_scores.select(self._source[:, number])
            for number, (pair, pair_scores) in enumerate(scores.items())
        }

    def _borrow(self, number: int, llr_db: NDArray[np.float64]) -> None:
        rows = self._several
        has = rows[~np.isnan(llr_db[rows])]
        lacks = rows[np.isnan(llr_db[rows])]
        ordered = has[np.lexsort((has, -llr_db[has], self._subjects[has]))]  # by subject, its strongest row first
        owners, first, counts = np.unique(self._subjects[ordered], return_index=True, return_counts=True)
        lacks = lacks[np.isin(self._subjects[lacks], owners)]
        at = np.searchsorted(owners, self._subjects[lacks])
        self._source[lacks, number] = ordered[first[at]]
        self.borrowed_db[lacks, number] = 10 * np.log10(counts[at])

    def best_row_of_each(self, fused: Fused) -> Fused:
        """The strongest row of each subject, minus the penalty for several rows. The subject's other rows lose their score (NaN)."""
        rows = self._several[~np.isnan(fused.score_db[self._several])]
        used = np.where(fused.used[rows], self._source[rows], -1)
        different = np.unique(np.column_stack([self._subjects[rows], used]), axis=0)
        owners, counts = np.unique(different[:, 0], return_counts=True)
        label_penalty_db = np.zeros(len(fused.score_db))
        label_penalty_db[rows] = 10 * np.log10(counts[np.searchsorted(owners, self._subjects[rows])])
        fused = fused.penalised(label_penalty_db)
        ordered = rows[np.lexsort((rows, -fused.score_db[rows], -fused.llr_db[rows], self._subjects[rows]))]
        later = ordered[1:][np.diff(self._subjects[ordered]) == 0]
        score_db = fused.score_db.copy()
        score_db[later] = np.nan
        return replace(fused, score_db=score_db)
