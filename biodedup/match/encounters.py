"""Combines the rows (encounters) of one subject into one comparison.

Owns which rows lend columns to one another, and the penalty for having several rows. Never measures a similarity.

1. Each row is one reading of the subject. A column that the row lacks is borrowed from the subject's other rows: of the m rows that
   have it the strongest, less 10 log10(m) dB. Rows of different finger positions are thus compared jointly.
2. The strongest of k different readings counts, less 10 log10(k) dB: k readings have k chances to look alike (Bonferroni's bound).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from biodedup.match.labels import Pair
from biodedup.match.ranked import Fused, PairScores

Int64 = NDArray[np.int64]


def of_all_rows(presence: NDArray[np.uint16], subjects: Int64) -> NDArray[np.uint16]:
    """For each row the columns of all rows of its subject, as masks, uint16 (n,)."""
    _, which = np.unique(subjects, return_inverse=True)
    together = np.zeros(which.max() + 1 if len(which) else 0, np.uint16)
    np.bitwise_or.at(together, which, presence)
    return together[which]


class Joint:
    """Scores of rows, completed by borrowed columns. subjects: int64 (n,), the number of each row's subject.

    scores: by pair of columns, of every row; borrowed_db: float64 (n, pairs), what is off a borrowed pair's evidence.
    """

    def __init__(self, scores: Mapping[Pair, PairScores], subjects: Int64) -> None:
        self._subjects = subjects
        _, which, counts = np.unique(subjects, return_inverse=True, return_counts=True)
        self._several = np.flatnonzero(counts[which] > 1)
        self.borrowed_db = np.zeros((len(subjects), len(scores)))
        self._source = np.tile(np.arange(len(subjects)), (len(scores), 1)).T
        for number, one in enumerate(scores.values()):
            self._borrow(number, one.llr_db)
        self.scores = {pair: one.taken(self._source[:, at]) for at, (pair, one) in enumerate(scores.items())}

    def _borrow(self, number: int, llr_db: NDArray[np.float64]) -> None:
        some = self._several
        has = some[~np.isnan(llr_db[some])]
        lacks = some[np.isnan(llr_db[some])]
        ordered = has[np.lexsort((has, -llr_db[has], self._subjects[has]))]  # of each subject the strongest first
        owners, first, offers = np.unique(self._subjects[ordered], return_index=True, return_counts=True)
        lacks = lacks[np.isin(self._subjects[lacks], owners)]
        at = np.searchsorted(owners, self._subjects[lacks])
        self._source[lacks, number] = ordered[first[at]]
        self.borrowed_db[lacks, number] = 10 * np.log10(offers[at])

    def best_of_each(self, fused: Fused) -> Fused:
        """The strongest row of each subject, less the penalty for its readings; its other rows lose their score."""
        some = self._several[~np.isnan(fused.score_db[self._several])]
        used = np.where(fused.used[some], self._source[some], -1)
        readings = np.unique(np.column_stack([self._subjects[some], used]), axis=0)
        owners, counts = np.unique(readings[:, 0], return_counts=True)
        label_penalty_db = np.zeros(len(fused.score_db))
        label_penalty_db[some] = 10 * np.log10(counts[np.searchsorted(owners, self._subjects[some])])
        fused = fused.penalised(label_penalty_db)
        ordered = some[np.lexsort((some, -fused.score_db[some], -fused.llr_db[some], self._subjects[some]))]
        later = ordered[1:][np.diff(self._subjects[ordered]) == 0]
        score_db = fused.score_db.copy()
        score_db[later] = np.nan
        return replace(fused, score_db=score_db)
