"""Finger labels that may be wrong: which finger of one side is which of the other, and what it costs to have looked.

Owns the readings of two sets of labels, and their prices. Never compares captures.

A *reading* pairs fingers of two sides, each at most once. Readings come in classes, each with the mistake that would explain it:
labels are right; whole hands are exchanged (the same fingers of the other hand, or a slap numbered from the wrong end); two labels are
exchanged; one label is wrong; anything, every finger of the side that has fewer paired with some finger of the other.

n readings have n chances that strangers look alike in one of them. So a reading is penalised -10 log10 of its share of all chances, and
all shares add up to 1: by the union bound (Bonferroni) strangers' best score after charges reaches x dB no more often than
10^(-x/10). Right labels are much more common than wrong ones, and get a share of AS_LABELLED; what is left is divided among
the other classes, and in a class among its readings. The same union bound lets any reading be picked, by whatever rule.
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
    """Readings of two sets of fingers, but for the one that all labels are right.

    pairs: every finger of the probe with every one of the candidate, in C order of `shape`. paired: bool (r, pairs), of each
    reading that is listed; label_penalties_db: float64 (r,), its charge. assignment_db: the charge of any assignment, None where those
    listed are all. as_labelled_db: the charge of right labels.
    """

    pairs: tuple[Pair, ...]
    shape: tuple[int, int]
    paired: NDArray[np.bool_]
    label_penalties_db: NDArray[np.float64]
    assignment_db: float | None
    as_labelled_db: float

    def strongest(self, llr_db: NDArray[np.float64]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Of each row the reading with the most evidence after its charge.

        llr_db: float64 (n, pairs), NaN where a pair could not be compared. Returns what it pairs, bool (n, pairs), without
        such pairs, and its charge, float64 (n,).
        """
        known = np.nan_to_num(llr_db)
        chosen, charges = np.zeros(known.shape, bool), np.zeros(len(known))
        most = np.full(len(known), -np.inf)
        if len(self.paired):
            sums = known @ self.paired.T - self.label_penalties_db
            best = sums.argmax(axis=1)
            most, chosen, charges = sums.max(axis=1), self.paired[best], self.label_penalties_db[best]
        if self.assignment_db is not None:
            from scipy.optimize import linear_sum_assignment  # long to import, and seldom needed

            squares = known.reshape(-1, *self.shape)
            assigned = np.zeros(squares.shape, bool)
            for one, evidence in zip(assigned, squares, strict=True):
                one[linear_sum_assignment(evidence, maximize=True)] = True
            anything = assigned.reshape(known.shape)
            better = np.where(anything, known, 0.0).sum(axis=1) - self.assignment_db > most
            chosen = np.where(better[:, None], anything, chosen)
            charges = np.where(better, self.assignment_db, charges)
        return chosen & ~np.isnan(llr_db), charges


@lru_cache(maxsize=4096)
def readings_of(mine: tuple[str, ...], theirs: tuple[str, ...], labelled: bool) -> Readings | None:
    """The readings of a probe's fingers, mine, and a candidate's; None where labels leave nothing to be tried.

    labelled: right labels pair something, be it faces.
    """
    pairs = tuple((a, b) for a in mine for b in theirs)
    common = frozenset((a, a) for a in mine if a in theirs)
    classes, seen = [], {common, frozenset[Pair]()}
    for some in (_hands(mine, theirs), _exchanges(common), _single(mine, theirs, common)):
        fresh = [one for one in dict.fromkeys(some) if one not in seen]
        seen.update(fresh)
        if fresh:
            classes.append(fresh)
    fewer, more = sorted((len(mine), len(theirs)))
    # of one finger, and of two that both sides have, the classes above hold every assignment
    anything = fewer > 2 or (fewer == 2 and set(mine) != set(theirs))
    count = len(classes) + anything
    if not count:
        return None
    right = AS_LABELLED if labelled else 0.0
    each_db = 10 * log10(count / (1 - right))
    listed = [one for some in classes for one in some]
    return Readings(
        pairs,
        (len(mine), len(theirs)),
        np.array([[pair in one for pair in pairs] for one in listed], bool).reshape(len(listed), len(pairs)),
        np.array([each_db + 10 * log10(len(some)) for some in classes for _ in some]),
        each_db + 10 * log10(perm(more, fewer)) if anything else None,
        -10 * log10(right) if right else 0.0,
    )


def _hands(mine: Collection[str], theirs: Collection[str]) -> Iterable[frozenset[Pair]]:
    """All labels are of the other hand: of two fingers or more."""
    for hands in _HANDS:
        moved = frozenset((a, hands[a]) for a in mine if a in hands and hands[a] in theirs)
        if len(moved) > 1:
            yield moved


def _exchanges(common: frozenset[Pair]) -> Iterable[frozenset[Pair]]:
    """Two labels that both sides have are exchanged on one of them."""
    known = [a for a in FINGER_POSITIONS if a != "unknown" and (a, a) in common]
    for a, b in combinations(known, 2):
        yield common - {(a, a), (b, b)} | {(a, b), (b, a)}


def _single(mine: Collection[str], theirs: Collection[str], common: frozenset[Pair]) -> Iterable[frozenset[Pair]]:
    """One label is wrong, and the right one was free on its side."""
    for a in mine:
        for b in theirs:
            free = a not in theirs or b not in mine
            if a != b and free and "unknown" not in (a, b):
                yield common - {(a, a), (b, b)} | {(a, b)}
