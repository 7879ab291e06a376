"""Aligns two prints and scores their agreement: from similar neighbourhoods to one rigid motion, paired minutiae, and a score.

Owns the kernels from two prepared prints (`local_structures.py`) to a score. Never reads records.

1. The most similar pairs of cylinders are candidates. Two candidates support each other if one rigid motion explains both, as in the
   relaxation of Cappelli, Ferrara and Maltoni (2010), but in one round. The strongest candidate and those that agree with it are one
   hypothesis, and are removed from the vote.
2. A hypothesis is a rotation and a shift, fitted by least squares. Minutiae pair up greedily, nearest first, and the motion is
   fitted again. For the hypotheses with the most pairs, each minutia is displaced as the pairs around it are, which models elastic
   distortion, and the pairs that are then still close count.
3. The score: similarity of the paired cylinders, times the share of the common area's minutiae that are paired, times the share of
   distances that are kept; the score is ten times its square root, so that the tail of impostor scores falls about exponentially. Two
   identical prints score ten times the square root of their number of minutiae. The score depends neither on the order of the two
   prints nor on that of the minutiae.
4. No kernel allocates or takes longer than a few milliseconds, for any input. Sums have a fixed order, and angles and rotations come
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

# Tuned on UareU and SFinGe's demonstration set, and not contradicted by FVC2002 DB1-4_B, 2026-11. None is critical.
_PAIRS = 48
"""Pairs of cylinders that vote."""
_HYPOTHESES = 4
_JUDGED = 2
"""Of the hypotheses, those that pair most."""
_VOTE_STEPS = 20
"""Two pairs agree if their minutiae turn alike up to this, in 1/256 turns, and if moving one with the other brings it near."""
_NEAR_PX = 20.0
"""Partners of a rigid motion: distorted prints of one finger are this far apart."""
_NEAR_STEPS = 16
_LOCAL_PX = 14.0
"""Partners once distortion is followed."""
_FIELD_PX = 60.0
"""How far a pair's displacement is felt."""
_STIFF = 0.5
"""Weight of no displacement, among the pairs around."""
_AREA_PX = 40.0
"""A print's area: all that is as near to one of its minutiae."""
_FEW = 8.0
"""Fewer minutiae than this in the common area say no more than so many."""
_EDGE_PX = 120.0
_EDGE_SLACK_PX = 4.0
"""Pairs up to _EDGE_PX apart keep their distance, but for this."""

_NEAR_MAX = 256
_NONE = -1.0
_STEPS = np.array([round(atan(i / 1024) * 128 / pi) for i in range(1025)], np.int64)


class Workspace(NamedTuple):
    """The working memory of one comparison; for one thread at a time."""

    similar: NDArray[np.int64]
    histogram: NDArray[np.int64]
    pairs: NDArray[np.int64]
    votes: NDArray[np.int64]
    agree: NDArray[np.bool_]
    used: NDArray[np.bool_]
    motions: NDArray[np.float64]
    promise: NDArray[np.float64]
    moved: NDArray[np.float64]
    near: NDArray[np.int64]
    near_cost: NDArray[np.float64]
    mates: NDArray[np.int64]
    mates_cost: NDArray[np.float64]
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
        promise=np.zeros(_HYPOTHESES, np.float64),
        moved=np.zeros((2, MINUTIAE_MAX), np.float64),
        near=np.zeros((_NEAR_MAX, 2), np.int64),
        near_cost=np.zeros(_NEAR_MAX, np.float64),
        mates=np.zeros((MINUTIAE_MAX, 2), np.int64),
        mates_cost=np.zeros(MINUTIAE_MAX, np.float64),
        shift=np.zeros((2, MINUTIAE_MAX), np.float64),
        taken=np.zeros((2, MINUTIAE_MAX), np.bool_),
    )


@numba.njit(nogil=True, cache=True)
def compare(content: Any, probes: Any, candidates: Any, rooms: Any, work: Any, scores: Any) -> None:
    """Scores float32 (n,), at least 0, of n pairs of bodies. content: uint8; probes, candidates: int64 (n, 2), start and count of each
    body; equal probes lie together, since each is prepared once. rooms: two prints; rooms, work: for one thread."""
    probe, candidate = rooms
    for i in range(probes.shape[0]):
        if i == 0 or probes[i, 0] != probes[i - 1, 0]:
            prepare(content, probes[i, 0], probes[i, 1], probe)
        prepare(content, candidates[i, 0], candidates[i, 1], candidate)
        if _first(probe, candidate):
            scores[i] = _score(probe, candidate, work)
        else:
            scores[i] = _score(candidate, probe, work)


def best_pairs(a: Prepared, b: Prepared) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """What the score of two prints rests on: the minutiae that are paired, int64 (k, 2), and the motion that takes a to b, float64 (4,):
    cosine, sine, shift to the right and down. Scores them anew: for a page or a trace of one pair."""
    if not _first(a, b):
        pairs, (cosine, sine, x, y) = best_pairs(b, a)
        return pairs[:, ::-1], np.array([cosine, -sine, y * sine - x * cosine, -y * cosine - x * sine])
    work, best = workspace(), 0.0
    pairs, motion = np.zeros((0, 2), np.int64), np.array([1.0, 0.0, 0.0, 0.0])
    _score(a, b, work)
    # hypotheses with promise left were not judged; those that came to nothing have no direction, or pair too little again
    for h in np.flatnonzero((work.promise <= 0) & (np.hypot(work.motions[:, 0], work.motions[:, 1]) > 0.5)):
        score = _judge(a, b, work.motions[h], work)
        if score > best:
            best, motion = score, work.motions[h].copy()
            pairs = work.mates[: np.count_nonzero(work.taken[0, : a.size[0]])].copy()
    return pairs, motion


@numba.njit(nogil=True, cache=True)
def _first(a: Any, b: Any) -> bool:
    """One order for any two prints, so that the score is symmetric."""
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
        work.promise[h] = _settle(a, b, _next_hypothesis(count, work), work.motions[h], work)
    best = 0.0
    for _ in range(_JUDGED):
        chosen = 0
        for h in range(1, _HYPOTHESES):
            if work.promise[h] > work.promise[chosen]:
                chosen = h
        if work.promise[chosen] <= 0:
            break
        work.promise[chosen] = 0.0
        best = max(best, _judge(a, b, work.motions[chosen], work))
    return best


@numba.njit(nogil=True, cache=True)
def _most_similar(rows: int, columns: int, work: Any) -> int:
    """The pairs of cylinders that are most similar, _PAIRS at most; equal ones in order."""
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
    """The strongest pair left and those that agree with it, as mates; how many, 0 if none is left."""
    root = -1
    for t in range(count):
        if not work.used[t] and (root < 0 or work.votes[t] > work.votes[root]):
            root = t
    mates = 0
    for u in range(count):
        if root >= 0 and work.agree[root, u]:
            work.used[u] = True
            work.mates[mates, 0], work.mates[mates, 1] = work.pairs[u, 0], work.pairs[u, 1]
            mates += 1
    return mates


@numba.njit(nogil=True, cache=True)
def _settle(a: Any, b: Any, mates: int, motion: Any, work: Any) -> float:
    """The motion of a hypothesis, fitted to all that it pairs; how much that is, 0 if too little."""
    if mates < 2 or not _fit(a, b, mates, motion, work):
        return 0.0
    _move(a, motion, work)
    mates = _pair(a, b, motion, _NEAR_PX, work)
    if mates < 2 or not _fit(a, b, mates, motion, work):
        return 0.0
    return _nearness(mates, work)


@numba.njit(nogil=True, cache=True)
def _nearness(mates: int, work: Any) -> float:
    near = 0.0
    for t in range(mates):
        near += 2.0 - work.mates_cost[t]
    return near


@numba.njit(nogil=True, cache=True)
def _judge(a: Any, b: Any, motion: Any, work: Any) -> float:
    """The score of a hypothesis."""
    _move(a, motion, work)
    _distort(a, _pair(a, b, motion, _NEAR_PX, work), work)
    mates = _pair(a, b, motion, _LOCAL_PX, work)
    if mates < 2:
        return 0.0
    alike, near = 0, _nearness(mates, work)
    for t in range(mates):
        alike += work.similar[work.mates[t, 0], work.mates[t, 1]]
    kept, edges = 0, 0
    for t in range(mates):
        i, k = work.mates[t, 0], work.mates[t, 1]
        for u in range(t):
            j, m = work.mates[u, 0], work.mates[u, 1]
            ax, ay, bx, by = a.x[j] - a.x[i], a.y[j] - a.y[i], b.x[m] - b.x[k], b.y[m] - b.y[k]
            length = np.sqrt(ax * ax + ay * ay)
            if length < _EDGE_PX:
                edges += 1
                kept += abs(length - np.sqrt(bx * bx + by * by)) <= _EDGE_SLACK_PX
    in_a, in_b = _common(a, b, work)
    rigid = (kept + 1.0) / (edges + 3.0)
    share = near * near / (4.0 * max(float(in_a), _FEW) * max(float(in_b), _FEW))
    return 10.0 * float(np.sqrt(alike / SIMILAR * share * rigid))


@numba.njit(nogil=True, cache=True)
def _fit(a: Any, b: Any, mates: int, motion: Any, work: Any) -> bool:
    """The rotation and shift that bring a's mates nearest to b's. motion: float64 (4,). False where they do not tell a rotation."""
    ax, ay, bx, by = 0.0, 0.0, 0.0, 0.0
    for t in range(mates):
        i, k = work.mates[t, 0], work.mates[t, 1]
        ax += a.x[i]
        ay += a.y[i]
        bx += b.x[k]
        by += b.y[k]
    ax, ay, bx, by = ax / mates, ay / mates, bx / mates, by / mates
    along, across = 0.0, 0.0
    for t in range(mates):
        i, k = work.mates[t, 0], work.mates[t, 1]
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
def _distort(a: Any, mates: int, work: Any) -> None:
    """Moves each minutia of a as the other pairs around it are displaced."""
    for i in range(a.size[0]):
        sum_x, sum_y, weights = 0.0, 0.0, _STIFF
        for t in range(mates):
            j = work.mates[t, 0]
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
    """Pairs moved minutiae of a with those of b within some pixels, cheapest first: work.mates, their cost 0..2, their shift."""
    turn = _steps(motion[0], motion[1])
    moved, near, cost, taken = work.moved, work.near, work.near_cost, work.taken
    count, columns = 0, b.size[0]
    for i in range(a.size[0]):
        taken[0, i] = False
        k = _from(b, moved[1, i] - within)
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
    mates = 0
    while True:
        best = -1
        for t in range(count):
            if not taken[0, near[t, 0]] and not taken[1, near[t, 1]] and (best < 0 or cost[t] < cost[best]):
                best = t
        if best < 0:
            return mates
        i, k = near[best, 0], near[best, 1]
        taken[0, i] = taken[1, k] = True
        work.mates[mates, 0], work.mates[mates, 1] = i, k
        work.mates_cost[mates] = cost[best]
        work.shift[0, mates], work.shift[1, mates] = b.x[k] - moved[0, i], b.y[k] - moved[1, i]
        mates += 1


@numba.njit(nogil=True, cache=True)
def _common(a: Any, b: Any, work: Any) -> tuple[int, int]:
    """How many minutiae of a lie in b's area, and how many of b in a's."""
    moved, seen = work.moved, work.taken
    for k in range(b.size[0]):
        seen[1, k] = False
    in_a, in_b = 0, 0
    for i in range(a.size[0]):
        k, found = _from(b, moved[1, i] - _AREA_PX), False
        while k < b.size[0] and b.y[k] <= moved[1, i] + _AREA_PX:
            dx, dy = b.x[k] - moved[0, i], b.y[k] - moved[1, i]
            if dx * dx + dy * dy < _AREA_PX * _AREA_PX:
                found = seen[1, k] = True
            k += 1
        in_a += found
    for k in range(b.size[0]):
        in_b += seen[1, k]
    return in_a, in_b


@numba.njit(nogil=True, cache=True)
def _from(b: Any, y: float) -> int:
    """The first minutia of b that lies at y or below; they are in order."""
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
    """The angle of a direction in 1/256 turns, from a table: libraries differ in the last digit of an arc tangent."""
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
    """An angle's difference as -128 to 127."""
    return ((steps + 128) & 255) - 128
