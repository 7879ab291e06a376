"""Aligns two prints by their minutiae, pairs the minutiae, and scores the agreement.

Owns the kernels that take two prepared prints (`local_structures.py`) and give a score. Never reads records.

1. Votes: the most similar pairs of cylinders vote for each other if one rigid motion explains both pairs. (This is the relaxation of
   Cappelli, Ferrara and Maltoni, 2010, with a single round.) The pair with the most votes and the pairs that agree with it are a
   hypothesis. They are removed, and the next hypothesis is formed from the rest.
2. Alignment: a hypothesis is a rotation and a shift, fitted by least squares. Minutiae are paired greedily, nearest first, and the motion
   is fitted again. For the hypotheses with the closest pairs, each minutia is displaced like the pairs around it, which models elastic
   distortion. Then minutiae are paired again, within a shorter distance.
3. Score: the product of three factors: the sum of the paired cylinders' similarities, the paired share of the minutiae in the common area,
   and the share of distances between pairs that are preserved. The score is ten times the square root of the product, so that the tail of
   impostor scores falls about exponentially. Two identical prints score ten times the square root of their number of minutiae. The score
   depends neither on the order of the prints nor on the order of the minutiae.
4. A kernel never allocates memory, and never takes longer than a few milliseconds. Sums have a fixed order, and angles and rotations come
   from tables, so that every machine gives the same score.
"""

from __future__ import annotations

from math import atan, pi
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from biodedup.match.prints.local_structures import (
    COSINE,
    MINUTIAE_MAX,
    SIMILAR,
    SINE,
    UNIT,
    Prepared,
    prepare,
    similarities,
)

# tuned on UareU and SFinGe's demonstration set, and confirmed on FVC2002 DB1-4_B, 2026-11; no constant is critical
_PAIRS = 48
"""Number of cylinder pairs that vote."""
_HYPOTHESES = 4
_SCORED = 2
"""Number of hypotheses that are scored: those with the closest pairs."""
_VOTE_STEPS = 20
"""Two pairs agree if their rotations differ by at most this, in 1/256 turns, and if the motion of one pair also brings the other together."""
_NEAR_PX = 20.0
"""Greatest distance of paired minutiae after a rigid motion: two prints of a finger differ so much by distortion."""
_NEAR_STEPS = 16
"""Greatest difference of paired minutiae's directions, in 1/256 turns."""
_LOCAL_PX = 14.0
"""Greatest distance of paired minutiae after the distortion is modelled."""
_FIELD_PX = 60.0
"""Distance at which a pair's displacement has a quarter of its weight."""
_STIFFNESS = 0.5
"""Weight of a zero displacement, beside the pairs around a minutia."""
_AREA_PX = 40.0
"""A print's area: all points within this distance of one of its minutiae."""
_COMMON_MIN = 8.0
"""A common area with fewer minutiae is scored as if it had this many."""
_EDGE_PX = 120.0
_EDGE_SLACK_PX = 4.0
"""The distance of two pairs, up to _EDGE_PX, counts as preserved if it changes by at most this."""

_NEAR_MAX = 256
_NONE = -1.0
_STEPS = np.array([round(atan(i / 1024) * 128 / pi) for i in range(1025)], np.int64)


class Workspace(NamedTuple):
    """The working memory of a comparison. Only one thread may use it at a time."""

    similar: NDArray[np.int64]
    histogram: NDArray[np.int64]
    pairs: NDArray[np.int64]
    votes: NDArray[np.int64]
    agree: NDArray[np.bool_]
    used: NDArray[np.bool_]
    motions: NDArray[np.float64]
    closeness: NDArray[np.float64]
    moved: NDArray[np.float64]
    near: NDArray[np.int64]
    near_cost: NDArray[np.float64]
    paired: NDArray[np.int64]
    paired_cost: NDArray[np.float64]
    shift: NDArray[np.float64]
    taken: NDArray[np.bool_]


def workspace() -> Workspace:
    return Workspace(
        similar=np.zeros((MINUTIAE_MAX, MINUTIAE_MAX), np.int64),
        histogram=np.zeros(SIMILAR + 1, np.int64),
        pairs=np.zeros((_PAIRS, 2), np.int64),
        votes=np.zeros(_PAIRS, np.int64),
        agree=np.zeros((_PAIRS, _PAIRS), np.bool_),
        used=np.zeros(_PAIRS, np.bool_),
        motions=np.zeros((_HYPOTHESES, 4), np.float64),
        closeness=np.zeros(_HYPOTHESES, np.float64),
        moved=np.zeros((2, MINUTIAE_MAX), np.float64),
        near=np.zeros((_NEAR_MAX, 2), np.int64),
        near_cost=np.zeros(_NEAR_MAX, np.float64),
        paired=np.zeros((MINUTIAE_MAX, 2), np.int64),
        paired_cost=np.zeros(MINUTIAE_MAX, np.float64),
        shift=np.zeros((2, MINUTIAE_MAX), np.float64),
        taken=np.zeros((2, MINUTIAE_MAX), np.bool_),
    )


@numba.njit(nogil=True, cache=True)
def compare(content: Any, probes: Any, candidates: Any, prints: Any, work: Any, scores: Any) -> None:
    """Writes the scores of n pairs of record bodies, at least 0, into scores, float32 (n,). content: uint8. probes, candidates: int64 (n, 2),
    start and count of each body; equal probes must be adjacent, because each is prepared once. prints: memory of two prints. prints, work:
    for one thread."""
    probe, candidate = prints
    for i in range(probes.shape[0]):
        if i == 0 or probes[i, 0] != probes[i - 1, 0]:
            prepare(content, probes[i, 0], probes[i, 1], probe)
        prepare(content, candidates[i, 0], candidates[i, 1], candidate)
        if _first(probe, candidate):
            scores[i] = _score(probe, candidate, work)
        else:
            scores[i] = _score(candidate, probe, work)


def best_pairs(a: Prepared, b: Prepared) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The paired minutiae behind the score of two prints, int64 (k, 2), and the motion from a to b, float64 (4,): cosine, sine, shift to the
    right and down. It computes the score again, for a page or a trace of one comparison."""
    if not _first(a, b):
        pairs, (cosine, sine, x, y) = best_pairs(b, a)
        return pairs[:, ::-1], np.array([cosine, -sine, y * sine - x * cosine, -y * cosine - x * sine])
    work, best = workspace(), 0.0
    pairs, motion = np.zeros((0, 2), np.int64), np.array([1.0, 0.0, 0.0, 0.0])
    _score(a, b, work)
    # _score sets the closeness of the hypotheses that it scores to 0; a failed hypothesis has no direction, or too few pairs again
    for h in np.flatnonzero((work.closeness <= 0) & (np.hypot(work.motions[:, 0], work.motions[:, 1]) > 0.5)):
        score = _hypothesis_score(a, b, work.motions[h], work)
        if score > best:
            best, motion = score, work.motions[h].copy()
            pairs = work.paired[: np.count_nonzero(work.taken[0, : a.size[0]])].copy()
    return pairs, motion


@numba.njit(nogil=True, cache=True)
def _first(a: Any, b: Any) -> bool:
    """A fixed order of any two prints, so that the score is symmetric."""
    if a.size[0] != b.size[0]:
        return bool(a.size[0] < b.size[0])
    for i in range(a.size[0]):
        if a.row[i] != b.row[i]:
            return bool(a.row[i] < b.row[i])
    return True


@numba.njit(nogil=True, cache=True)
def _score(a: Any, b: Any, work: Any) -> float:
    similarities(a, b, work.similar)
    count = _most_similar(a.size[0], b.size[0], work)
    _vote(a, b, count, work)
    for h in range(_HYPOTHESES):
        work.closeness[h] = _refined(a, b, _next_hypothesis(count, work), work.motions[h], work)
    best = 0.0
    for _ in range(_SCORED):
        chosen = 0
        for h in range(1, _HYPOTHESES):
            if work.closeness[h] > work.closeness[chosen]:
                chosen = h
        if work.closeness[chosen] <= 0:
            break
        work.closeness[chosen] = 0.0
        best = max(best, _hypothesis_score(a, b, work.motions[chosen], work))
    return best


@numba.njit(nogil=True, cache=True)
def _most_similar(rows: int, columns: int, work: Any) -> int:
    """Finds the most similar pairs of cylinders, at most _PAIRS, equal similarities in order; returns their number."""
    similar, histogram = work.similar, work.histogram
    histogram[:] = 0
    for i in range(rows):
        for k in range(columns):
            histogram[similar[i, k]] += 1
    cut, above = SIMILAR, 0
    while cut > 1 and above + histogram[cut] < _PAIRS:
        above += histogram[cut]
        cut -= 1
    at_cut, count = _PAIRS - above, 0
    for i in range(rows):
        for k in range(columns):
            if similar[i, k] > cut or (similar[i, k] == cut and at_cut > 0):
                at_cut -= similar[i, k] == cut
                work.pairs[count, 0], work.pairs[count, 1] = i, k
                count += 1
    return count


@numba.njit(nogil=True, cache=True)
def _vote(a: Any, b: Any, count: int, work: Any) -> None:
    for t in range(count):
        i, k = work.pairs[t, 0], work.pairs[t, 1]
        turn = (b.angle[k] - a.angle[i]) & 255
        cosine, sine = COSINE[turn], SINE[turn]
        votes = work.similar[i, k]
        for u in range(count):
            j, m = work.pairs[u, 0], work.pairs[u, 1]
            work.agree[t, u] = t == u
            if j == i or m == k or abs(_signed(b.angle[m] - a.angle[j] - turn)) > _VOTE_STEPS:
                continue
            ax, ay, bx, by = a.x[j] - a.x[i], a.y[j] - a.y[i], b.x[m] - b.x[k], b.y[m] - b.y[k]
            length = np.sqrt(ax * ax + ay * ay)
            if abs(length - np.sqrt(bx * bx + by * by)) > 5 + 0.06 * length:
                continue
            off_x, off_y = (ax * cosine + ay * sine) / UNIT - bx, (ay * cosine - ax * sine) / UNIT - by
            slack = 8 + 0.2 * length
            if off_x * off_x + off_y * off_y <= slack * slack:
                work.agree[t, u] = True
                votes += work.similar[j, m]
        work.votes[t] = votes
        work.used[t] = False


@numba.njit(nogil=True, cache=True)
def _next_hypothesis(count: int, work: Any) -> int:
    """Writes the pair with the most votes and the pairs that agree with it into work.paired; returns their number, 0 if none is left."""
    root = -1
    for t in range(count):
        if not work.used[t] and (root < 0 or work.votes[t] > work.votes[root]):
            root = t
    pair_count = 0
    for u in range(count):
        if root >= 0 and work.agree[root, u]:
            work.used[u] = True
            work.paired[pair_count, 0], work.paired[pair_count, 1] = work.pairs[u, 0], work.pairs[u, 1]
            pair_count += 1
    return pair_count


@numba.njit(nogil=True, cache=True)
def _refined(a: Any, b: Any, pair_count: int, motion: Any, work: Any) -> float:
    """Fits the motion of a hypothesis, pairs minutiae by it and fits it again. Returns the closeness of the pairs, 0 for too few pairs."""
    if pair_count < 2 or not _fit(a, b, pair_count, motion, work):
        return 0.0
    _move(a, motion, work)
    pair_count = _pair(a, b, motion, _NEAR_PX, work)
    if pair_count < 2 or not _fit(a, b, pair_count, motion, work):
        return 0.0
    return _closeness(pair_count, work)


@numba.njit(nogil=True, cache=True)
def _closeness(pair_count: int, work: Any) -> float:
    """The sum over the pairs of 2 minus their cost."""
    total = 0.0
    for t in range(pair_count):
        total += 2.0 - work.paired_cost[t]
    return total


@numba.njit(nogil=True, cache=True)
def _hypothesis_score(a: Any, b: Any, motion: Any, work: Any) -> float:
    """The score of a hypothesis."""
    _move(a, motion, work)
    _distort(a, _pair(a, b, motion, _NEAR_PX, work), work)
    pair_count = _pair(a, b, motion, _LOCAL_PX, work)
    if pair_count < 2:
        return 0.0
    similarity, closeness = 0, _closeness(pair_count, work)
    for t in range(pair_count):
        similarity += work.similar[work.paired[t, 0], work.paired[t, 1]]
    kept, edges = 0, 0
    for t in range(pair_count):
        i, k = work.paired[t, 0], work.paired[t, 1]
        for u in range(t):
            j, m = work.paired[u, 0], work.paired[u, 1]
            ax, ay, bx, by = a.x[j] - a.x[i], a.y[j] - a.y[i], b.x[m] - b.x[k], b.y[m] - b.y[k]
            length = np.sqrt(ax * ax + ay * ay)
            if length < _EDGE_PX:
                edges += 1
                kept += abs(length - np.sqrt(bx * bx + by * by)) <= _EDGE_SLACK_PX
    in_a, in_b = _count_common(a, b, work)
    rigid = (kept + 1.0) / (edges + 3.0)
    share = closeness * closeness / (4.0 * max(float(in_a), _COMMON_MIN) * max(float(in_b), _COMMON_MIN))
    return 10.0 * float(np.sqrt(similarity / SIMILAR * share * rigid))


@numba.njit(nogil=True, cache=True)
def _fit(a: Any, b: Any, pair_count: int, motion: Any, work: Any) -> bool:
    """Fits the rotation and shift that bring the paired minutiae of a nearest to those of b. motion: float64 (4,). Returns False if the pairs
    do not determine a rotation."""
    ax, ay, bx, by = 0.0, 0.0, 0.0, 0.0
    for t in range(pair_count):
        i, k = work.paired[t, 0], work.paired[t, 1]
        ax += a.x[i]
        ay += a.y[i]
        bx += b.x[k]
        by += b.y[k]
    ax, ay, bx, by = ax / pair_count, ay / pair_count, bx / pair_count, by / pair_count
    along, across = 0.0, 0.0
    for t in range(pair_count):
        i, k = work.paired[t, 0], work.paired[t, 1]
        along += (a.x[i] - ax) * (b.x[k] - bx) + (a.y[i] - ay) * (b.y[k] - by)
        across += (a.y[i] - ay) * (b.x[k] - bx) - (a.x[i] - ax) * (b.y[k] - by)
    length = np.sqrt(along * along + across * across)
    if length < 1:
        return False
    cosine, sine = along / length, across / length
    motion[0], motion[1] = cosine, sine
    motion[2], motion[3] = bx - (ax * cosine + ay * sine), by - (ay * cosine - ax * sine)
    return True


@numba.njit(nogil=True, cache=True)
def _move(a: Any, motion: Any, work: Any) -> None:
    cosine, sine, shift_x, shift_y = motion[0], motion[1], motion[2], motion[3]
    for i in range(a.size[0]):
        work.moved[0, i] = a.x[i] * cosine + a.y[i] * sine + shift_x
        work.moved[1, i] = a.y[i] * cosine - a.x[i] * sine + shift_y


@numba.njit(nogil=True, cache=True)
def _distort(a: Any, pair_count: int, work: Any) -> None:
    """Displaces each minutia of a like the other pairs around it."""
    for i in range(a.size[0]):
        sum_x, sum_y, weights = 0.0, 0.0, _STIFFNESS
        for t in range(pair_count):
            j = work.paired[t, 0]
            if j != i:
                dx, dy = a.x[j] - a.x[i], a.y[j] - a.y[i]
                weight = _FIELD_PX * _FIELD_PX / (_FIELD_PX * _FIELD_PX + (dx * dx + dy * dy))
                weight *= weight
                sum_x += weight * work.shift[0, t]
                sum_y += weight * work.shift[1, t]
                weights += weight
        work.moved[0, i] += sum_x / weights
        work.moved[1, i] += sum_y / weights


@numba.njit(nogil=True, cache=True)
def _pair(a: Any, b: Any, motion: Any, within: float, work: Any) -> int:
    """Pairs the moved minutiae of a with minutiae of b within this distance, cheapest first. Writes the pairs, their cost (0 to 2) and their
    displacement into work; returns their number."""
    turn = _steps(motion[0], motion[1])
    moved, near, cost, taken = work.moved, work.near, work.near_cost, work.taken
    count, columns = 0, b.size[0]
    for i in range(a.size[0]):
        taken[0, i] = False
        k = _first_from(b, moved[1, i] - within)
        while k < columns and b.y[k] <= moved[1, i] + within:
            dx, dy = b.x[k] - moved[0, i], b.y[k] - moved[1, i]
            apart = dx * dx + dy * dy
            if apart <= within * within and count < _NEAR_MAX:
                rotated = abs(_signed(b.angle[k] - a.angle[i] - turn))
                if rotated <= _NEAR_STEPS:
                    near[count, 0], near[count, 1] = i, k
                    cost[count] = apart / (within * within) + rotated * rotated / (_NEAR_STEPS * _NEAR_STEPS)
                    count += 1
            k += 1
    for k in range(columns):
        taken[1, k] = False
    pair_count = 0
    while True:
        best = -1
        for t in range(count):
            if not taken[0, near[t, 0]] and not taken[1, near[t, 1]] and (best < 0 or cost[t] < cost[best]):
                best = t
        if best < 0:
            return pair_count
        i, k = near[best, 0], near[best, 1]
        taken[0, i] = taken[1, k] = True
        work.paired[pair_count, 0], work.paired[pair_count, 1] = i, k
        work.paired_cost[pair_count] = cost[best]
        work.shift[0, pair_count], work.shift[1, pair_count] = b.x[k] - moved[0, i], b.y[k] - moved[1, i]
        pair_count += 1


@numba.njit(nogil=True, cache=True)
def _count_common(a: Any, b: Any, work: Any) -> tuple[int, int]:
    """The number of minutiae of a in the area of b, and of b in the area of a."""
    moved, seen = work.moved, work.taken
    for k in range(b.size[0]):
        seen[1, k] = False
    in_a, in_b = 0, 0
    for i in range(a.size[0]):
        k, inside = _first_from(b, moved[1, i] - _AREA_PX), False
        while k < b.size[0] and b.y[k] <= moved[1, i] + _AREA_PX:
            dx, dy = b.x[k] - moved[0, i], b.y[k] - moved[1, i]
            if dx * dx + dy * dy < _AREA_PX * _AREA_PX:
                inside = seen[1, k] = True
            k += 1
        in_a += inside
    for k in range(b.size[0]):
        in_b += seen[1, k]
    return in_a, in_b


@numba.njit(nogil=True, cache=True)
def _first_from(b: Any, y: float) -> int:
    """The first minutia of b at y or below. Minutiae are sorted by y."""
    low, high = 0, b.size[0]
    while low < high:
        middle = (low + high) >> 1
        if b.y[middle] < y:
            low = middle + 1
        else:
            high = middle
    return low


@numba.njit(nogil=True, cache=True)
def _steps(cosine: float, sine: float) -> int:
    """The angle of a direction in 1/256 turns. It comes from a table, because libraries differ in the last digit of an arc tangent."""
    along, across = abs(cosine), abs(sine)
    if across <= along:
        steps = _STEPS[int(across / along * 1024 + 0.5)]
    else:
        steps = 64 - _STEPS[int(along / across * 1024 + 0.5)]
    if cosine < 0:
        steps = 128 - steps
    return int(steps if sine >= 0 else -steps)


@numba.njit(nogil=True, cache=True)
def _signed(steps: int) -> int:
    """A difference of angles, from -128 to 127."""
    return ((steps + 128) & 255) - 128
