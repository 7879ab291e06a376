"""Lists the ways in which finger labels may be wrong, and the penalty of each in dB.

Owns the readings and their penalties. Never compares captures.

A *reading* pairs fingers of the two sides, each at most once. Readings are grouped into classes by the mistake that explains them:
labels are right; whole hands are exchanged (the same fingers of the other hand, or a slap numbered from the wrong end); two labels are
exchanged; one label is wrong; any assignment, in which every finger of the side with fewer is paired with some finger of the other.

n readings give an impostor pair n chances to look alike. So each reading has a share of the total probability, the shares add up to 1,
and its penalty is -10 log10 of its share. By the union bound (Bonferroni) the best score of an impostor pair after penalties reaches
x dB no more often than 10^(-x/10), whichever rule picks the reading. Right labels are much more common than wrong ones and have the share
AS_LABELLED. The rest is divided equally among the other classes, and in a class among its readings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import log10, perm

import numpy as np
from numpy.typing import NDArray

from biodedup.values import FINGER_POSITIONS

Pair = tuple[str, str]  # (probe column, candidate column)

AS_LABELLED = 0.8
"""The share of right labels: they are penalised 1 dB, the others 7 dB and their number."""

_MIRRORED = {
    f"{hand}_{finger}": f"{other}_{finger}"
    for hand, other in (("right", "left"), ("left", "right"))
    for finger in ("thumb", "index", "middle", "ring", "little")
}
_FROM_THE_OTHER_END = {"index": "little", "middle": "ring", "ring": "middle", "little": "index", "thumb": "thumb"}
_HANDS = (
    _MIRRORED,
    {
        column: f"{hand}_{_FROM_THE_OTHER_END[finger]}"
        for column, other in _MIRRORED.items()
        for hand, finger in [other.split("_")]
    },
)


@dataclass(frozen=True, eq=False)
class Readings:
    """The readings of two sets of fingers, except the one in which all labels are right.

    pairs: every finger of the probe with every finger of the candidate, in C order of `shape`. paired: bool (r, pairs), the pairs of each
    listed reading; label_penalties_db: float64 (r,), its penalty. assignment_db: the penalty of any other assignment, None if all are
    listed. as_labelled_db: the penalty of right labels.
    """

    pairs: tuple[Pair, ...]
    shape: tuple[int, int]
    paired: NDArray[np.bool_]
    label_penalties_db: NDArray[np.float64]
    assignment_db: float | None
    as_labelled_db: float

    def strongest(self, llr_db: NDArray[np.float64]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """For each row the reading with the most evidence after its penalty.

        llr_db: float64 (n, pairs), NaN where a pair could not be compared. Returns its pairs without those, bool (n, pairs), and its
        penalty, float64 (n,).
        """
        known = np.nan_to_num(llr_db)
        chosen, penalties = np.zeros(known.shape, bool), np.zeros(len(known))
        most = np.full(len(known), -np.inf)
        if len(self.paired):
            sums = known @ self.paired.T - self.label_penalties_db
            best = sums.argmax(axis=1)
            most, chosen, penalties = sums.max(axis=1), self.paired[best], self.label_penalties_db[best]
        if self.assignment_db is not None:
            from scipy.optimize import linear_sum_assignment  # long to import, and seldom needed

            squares = known.reshape(-1, *self.shape)
            assigned = np.zeros(squares.shape, bool)
            for pairing, evidence in zip(assigned, squares, strict=True):
                pairing[linear_sum_assignment(evidence, maximize=True)] = True
            anything = assigned.reshape(known.shape)
            better = np.where(anything, known, 0.0).sum(axis=1) - self.assignment_db > most
            chosen = np.where(better[:, None], anything, chosen)
            penalties = np.where(better, self.assignment_db, penalties)
        return chosen & ~np.isnan(llr_db), penalties


@lru_cache(maxsize=4096)
def readings_of(probe: tuple[str, ...], candidate: tuple[str, ...], labelled: bool) -> Readings | None:
    """The readings of a probe's and a candidate's fingers; None if the labels are the only reading.

    labelled: whether the given labels pair any captures, faces included.
    """
    pairs = tuple((a, b) for a in probe for b in candidate)
    common = frozenset((a, a) for a in probe if a in candidate)
    classes, seen = [], {common, frozenset[Pair]()}
    for some in (_hands(probe, candidate), _exchanges(common), _single(probe, candidate, common)):
        fresh = [reading for reading in dict.fromkeys(some) if reading not in seen]
        seen.update(fresh)
        if fresh:
            classes.append(fresh)
    fewer, more = sorted((len(probe), len(candidate)))
    # of one finger, and of two that both sides have, the classes above hold every assignment
    anything = fewer > 2 or (fewer == 2 and set(probe) != set(candidate))
    count = len(classes) + anything
    if not count:
        return None
    right = AS_LABELLED if labelled else 0.0
    each_db = 10 * log10(count / (1 - right))
    listed = [reading for some in classes for reading in some]
    return Readings(
        pairs,
        (len(probe), len(candidate)),
        np.array([[pair in reading for pair in pairs] for reading in listed], bool).reshape(len(listed), len(pairs)),
        np.array([each_db + 10 * log10(len(some)) for some in classes for _ in some]),
        each_db + 10 * log10(perm(more, fewer)) if anything else None,
        -10 * log10(right) if right else 0.0,
    )


def _hands(probe: Collection[str], candidate: Collection[str]) -> Iterable[frozenset[Pair]]:
    """All labels are of the other hand: of two fingers or more."""
    for hands in _HANDS:
        moved = frozenset((a, hands[a]) for a in probe if a in hands and hands[a] in candidate)
        if len(moved) > 1:
            yield moved


def _exchanges(common: frozenset[Pair]) -> Iterable[frozenset[Pair]]:
    """Two labels that both sides have are exchanged on one of them."""
    known = [a for a in FINGER_POSITIONS if a != "unknown" and (a, a) in common]
    for a, b in combinations(known, 2):
        yield common - {(a, a), (b, b)} | {(a, b), (b, a)}


def _single(probe: Collection[str], candidate: Collection[str], common: frozenset[Pair]) -> Iterable[frozenset[Pair]]:
    """One label is wrong, and the right one was free on its side."""
    for a in probe:
        for b in candidate:
            free = a not in candidate or b not in probe
            if a != b and free and "unknown" not in (a, b):
                yield common - {(a, a), (b, b)} | {(a, b)}
