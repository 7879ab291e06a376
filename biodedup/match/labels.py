"""Lists the ways in which finger labels may be wrong, and the penalty of each in dB.

Owns the readings and their penalties. Never compares captures.

A *reading* pairs fingers of the probe with fingers of the candidate, each finger at most once. Readings are grouped into classes by the
mistake that explains them: no mistake (the given labels are right); whole hands are exchanged (the labels name the other hand, or a slap
is numbered from the wrong end); two labels are exchanged; one label is wrong; any assignment of all fingers of the side with fewer fingers.

n readings give an impostor pair n chances of a false match. So each reading has a share of the total probability, the shares add up to 1,
and the reading's penalty is -10 log10 of its share. By the union bound (Bonferroni) the best score of an impostor pair after penalties
reaches x dB with a probability of at most 10^(-x/10), however the reading is chosen. Right labels are much more frequent than wrong labels:
their share is AS_LABELLED. The rest is divided equally among the other classes, and within a class among its readings.
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
"""The share of right labels. Their penalty is 1 dB; that of other readings is 7 dB plus 10 log10 of their number."""

_MIRRORED = {
    f"{hand}_{finger}": f"{other}_{finger}"
    for hand, other in (("right", "left"), ("left", "right"))
    for finger in ("thumb", "index", "middle", "ring", "little")
}
_REVERSED_SLAP = {"index": "little", "middle": "ring", "ring": "middle", "little": "index", "thumb": "thumb"}
_HANDS = (
    _MIRRORED,
    {
        column: f"{hand}_{_REVERSED_SLAP[finger]}"
        for column, other in _MIRRORED.items()
        for hand, finger in [other.split("_")]
    },
)


@dataclass(frozen=True, eq=False)
class Readings:
    """The readings of two sets of fingers, without the reading in which all labels are right.

    pairs: every finger of the probe with every finger of the candidate, in C order of `shape`. paired: bool (r, pairs), the pairs of each
    listed reading. label_penalties_db: float64 (r,), its penalty. assignment_db: the penalty of an assignment that is not listed, or None
    if all assignments are listed. as_labelled_db: the penalty of the given labels.
    """

    pairs: tuple[Pair, ...]
    shape: tuple[int, int]
    paired: NDArray[np.bool_]
    label_penalties_db: NDArray[np.float64]
    assignment_db: float | None
    as_labelled_db: float

    def strongest(self, llr_db: NDArray[np.float64]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """For each row the reading with the most evidence after its penalty: its pairs that were compared, bool (n, pairs), and its penalty,
        float64 (n,).

        llr_db: float64 (n, pairs), NaN where a pair was not compared.
        """
        known = np.nan_to_num(llr_db)
        chosen, penalties = np.zeros(known.shape, bool), np.zeros(len(known))
        most = np.full(len(known), -np.inf)
        if len(self.paired):
            sums = known @ self.paired.T - self.label_penalties_db
            best = sums.argmax(axis=1)
            most, chosen, penalties = sums.max(axis=1), self.paired[best], self.label_penalties_db[best]
        if self.assignment_db is not None:
            from scipy.optimize import linear_sum_assignment  # imported here: it is slow to import and seldom needed

            tables = known.reshape(-1, *self.shape)
            assigned = np.zeros(tables.shape, bool)
            for pairing, evidence in zip(assigned, tables, strict=True):
                pairing[linear_sum_assignment(evidence, maximize=True)] = True
            assignments = assigned.reshape(known.shape)
            better = np.where(assignments, known, 0.0).sum(axis=1) - self.assignment_db > most
            chosen = np.where(better[:, None], assignments, chosen)
            penalties = np.where(better, self.assignment_db, penalties)
        return chosen & ~np.isnan(llr_db), penalties


@lru_cache(maxsize=4096)
def readings_of(probe: tuple[str, ...], candidate: tuple[str, ...], labelled: bool) -> Readings | None:
    """The readings of a probe's and a candidate's fingers, or None if the given labels are the only reading.

    labelled: whether the given labels pair any captures, faces included.
    """
    pairs = tuple((a, b) for a in probe for b in candidate)
    common = frozenset((a, a) for a in probe if a in candidate)
    classes, seen = [], {common, frozenset[Pair]()}
    for readings in (_hands(probe, candidate), _exchanges(common), _single(probe, candidate, common)):
        new = [reading for reading in dict.fromkeys(readings) if reading not in seen]
        seen.update(new)
        if new:
            classes.append(new)
    fewer, more = sorted((len(probe), len(candidate)))
    # with one finger, or with two fingers that both sides have, the classes above contain every assignment
    with_assignments = fewer > 2 or (fewer == 2 and set(probe) != set(candidate))
    count = len(classes) + with_assignments
    if not count:
        return None
    right = AS_LABELLED if labelled else 0.0
    each_db = 10 * log10(count / (1 - right))
    listed = [reading for readings in classes for reading in readings]
    return Readings(
        pairs,
        (len(probe), len(candidate)),
        np.array([[pair in reading for pair in pairs] for reading in listed], bool).reshape(len(listed), len(pairs)),
        np.array([each_db + 10 * log10(len(readings)) for readings in classes for _ in readings]),
        each_db + 10 * log10(perm(more, fewer)) if with_assignments else None,
        -10 * log10(right) if right else 0.0,
    )


def _hands(probe: Collection[str], candidate: Collection[str]) -> Iterable[frozenset[Pair]]:
    """Readings in which at least two labels name the other hand."""
    for hands in _HANDS:
        moved = frozenset((a, hands[a]) for a in probe if a in hands and hands[a] in candidate)
        if len(moved) > 1:
            yield moved


def _exchanges(common: frozenset[Pair]) -> Iterable[frozenset[Pair]]:
    """Readings in which one side exchanged two labels that both sides have."""
    known = [a for a in FINGER_POSITIONS if a != "unknown" and (a, a) in common]
    for a, b in combinations(known, 2):
        yield common - {(a, a), (b, b)} | {(a, b), (b, a)}


def _single(probe: Collection[str], candidate: Collection[str], common: frozenset[Pair]) -> Iterable[frozenset[Pair]]:
    """Readings in which one label is wrong, and the right label was unused on its side."""
    for a in probe:
        for b in candidate:
            free = a not in candidate or b not in probe
            if a != b and free and "unknown" not in (a, b):
                yield common - {(a, a), (b, b)} | {(a, b)}
