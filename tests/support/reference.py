"""A gallery in plain numpy that searches by comparing everything with everything. Slow and obvious: the oracle of searches.

Owns rows as a list, and the comparison of found rows with it (`check_top_k`). Never stores, indexes or approximates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class Row:
    subject_id: str
    vectors: dict[str, np.ndarray]
    groups: frozenset[str] = frozenset()
    pending: bool = False
    removed: bool = False


class Reference:
    """Row numbers are those of a gallery that got the same rows in the same order."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(
        self, subject_id: str, vectors: Mapping[str, np.ndarray], groups: Collection[str] = (), *, pending: bool = False
    ) -> None:
        """pending: of an open case; searches of subjects do not see it."""
        self.rows.append(Row(subject_id, dict(vectors), frozenset(groups), pending))

    def remove(self, subject_id: str) -> None:
        for row in self.rows:
            row.removed |= row.subject_id == subject_id

    def stored(self, embeddings: Callable[[list[int], str], np.ndarray], cosine_min: float = 0.999) -> None:
        """Takes the vectors as a gallery stores them, in eight bits a number, if they are near the true ones."""
        for column in {column for row in self.rows for column in row.vectors}:
            having = [i for i, row in enumerate(self.rows) if column in row.vectors and not row.removed]
            for i, vector in zip(having, embeddings(having, column), strict=True):
                assert vector @ self.rows[i].vectors[column] > cosine_min, f"row {i}: another vector is stored"
                self.rows[i].vectors[column] = vector

    def in_scope(self, *, groups: Collection[str] | None = None, from_row: int = 0, pending: bool = True) -> np.ndarray:
        """bool (n,): rows that a search sees. groups: those that belong to one of them; pending: open cases count."""
        seen = [
            not row.removed and (pending or not row.pending) and (groups is None or bool(row.groups & set(groups)))
            for row in self.rows
        ]
        return np.array(seen, bool) & (np.arange(len(self.rows)) >= from_row)

    def similarities(self, column: str, probes: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """float64 (q, n): cosines; NaN where a row is not seen or lacks the column."""
        found = np.full((len(probes), len(self.rows)), np.nan)
        having = [i for i, row in enumerate(self.rows) if seen[i] and column in row.vectors]
        if having:
            vectors = np.array([self.rows[i].vectors[column] for i in having], np.float64)
            found[:, having] = probes.astype(np.float64) @ vectors.T
        return found

    def evidence(
        self,
        probes: Mapping[str, np.ndarray],
        llr_db_of: Mapping[str, Callable[[np.ndarray], np.ndarray]],
        seen: np.ndarray,
    ) -> np.ndarray:
        """float64 (q, n): the sum of llr_db over the columns that probe and row share; NaN where they share none."""
        each = [llr_db_of[column](self.similarities(column, probes[column], seen)) for column in probes]
        return np.where(np.isnan(each).all(axis=0), np.nan, np.nansum(each, axis=0))

    def names(self, rows: Sequence[int]) -> list[str]:
        return [self.rows[row].subject_id if row >= 0 else "" for row in rows]


def top_k(values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows int64 (q, k), values float64 (q, k)), the largest first, the lower row first where equal; -1 and -inf pad."""
    q, n = values.shape
    rows, best = np.full((q, k), -1), np.full((q, k), -np.inf)
    for i in range(q):
        order = np.lexsort((np.arange(n), -values[i]))[
            : min(k, np.count_nonzero(~np.isnan(values[i])))
        ]  # NaN comes last
        rows[i, : len(order)], best[i, : len(order)] = order, values[i, order]
    return rows, best


def check_top_k(
    rows: np.ndarray, values: np.ndarray, exact: np.ndarray, *, atol: float = 2e-5, misses: int = 0
) -> None:
    """That rows int64 (q, k) are the k best of each probe by exact, float (q, n), NaN where a row does not count.

    Rows whose exact values differ by less than atol may change places. misses: so many of all places may go to a lesser row.
    """
    lost = 0
    for mine, told, true in zip(rows, values, exact, strict=True):
        count = np.count_nonzero(mine >= 0)
        assert (mine[count:] == -1).all() and (told[count:] == -np.inf).all(), "pads come last"
        mine, told = mine[:count], told[:count]
        assert len(set(mine.tolist())) == count, "a row is found twice"
        assert not np.isnan(true[mine]).any(), "a row is found that does not count"
        assert np.allclose(told, true[mine], rtol=0, atol=atol), "a value is not the row's"
        assert (np.diff(told) <= 0).all(), "not in descending order"
        best = np.sort(true[~np.isnan(true)])[::-1][: rows.shape[1]]
        assert count == len(best), f"{count} rows are found of {len(best)}"
        if count:
            better = np.flatnonzero(true > best[-1] + atol)
            lost += max(len(np.setdiff1d(better, mine)), np.count_nonzero(true[mine] < best[-1] - atol))
    assert lost <= misses, f"{lost} of the best are not found"
