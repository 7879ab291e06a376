"""The minutiae matcher once more, slowly: lists, plain loops, no scratch memory, no shortcuts.

Shares with the matcher its constants and nothing else. Sums are made in the same order, so that scores are equal to the last bit.
"""

from __future__ import annotations

from math import atan, cos, erf, hypot, inf, log, pi, sin, sqrt

import numpy as np

from biodedup.match.prints import alignment as constants

Minutia = tuple[int, int, int]  # x, y, angle
Motion = tuple[float, float, float, float]  # cosine, sine, shift


def score(a: bytes, b: bytes) -> np.float32:
    """Of two bodies, six bytes a minutia."""
    first, second = sorted(
        [strongest(a), strongest(b)], key=lambda rows: (len(rows), [(y, x, *r) for x, y, *r in rows])
    )
    first, second = ([(x, y, angle) for x, y, angle, _ in rows] for rows in (first, second))
    similar = similarities(first, second)
    settled = [settled_at(first, second, mates) for mates in hypotheses(first, second, similar)]
    motions = sorted((one for one in settled if one), key=lambda one: -one[0])[: constants._SCORED]
    best = max((judged(first, second, similar, motion) for _, motion in motions), default=0.0)
    return np.float32(best)


def strongest(body: bytes) -> list[tuple[int, int, int, int]]:
    rows = [body[i : i + 6] for i in range(0, len(body), 6)]
    found = [((r[0] & 63) * 256 + r[1], (r[2] & 63) * 256 + r[3], r[4], r[5]) for r in rows]
    found.sort(key=lambda row: (row[1], row[0], *row[2:]))
    n, sum_x, sum_y = len(found), sum(row[0] for row in found), sum(row[1] for row in found)
    order = sorted(
        range(n), key=lambda i: (-found[i][3], (n * found[i][0] - sum_x) ** 2 + (n * found[i][1] - sum_y) ** 2, -i)
    )
    return [found[i] for i in sorted(order[:64])]


def similarities(a: list[Minutia], b: list[Minutia]) -> list[list[int]]:
    of_a, of_b = cylinders(a), cylinders(b)
    return [
        [int(1000 * (1 - sqrt(len(c ^ d)) / (sqrt(len(c)) + sqrt(len(d))))) if c or d else 0 for d in of_b]
        for c in of_a
    ]


def cylinders(minutiae: list[Minutia]) -> list[set[tuple[int, int, int]]]:
    """The cells (column, row, section) that are set, for each minutia."""
    return [
        {cell for j, other in enumerate(minutiae) if j != i for cell in cells(one, other)}
        for i, one in enumerate(minutiae)
    ]


def cells(one: Minutia, other: Minutia) -> list[tuple[int, int, int]]:
    cosine, sine = turned(one[2])
    dx, dy = other[0] - one[0], other[1] - one[1]
    if dx * dx + dy * dy > 86**2:
        return []
    u, v = (dx * cosine - dy * sine) / 4096, (-dx * sine - dy * cosine) / 4096
    centres = [17.5 * (p + 0.5) - 70 for p in range(8)]
    return [
        (p, q, section)
        for section in range(6)
        for p, x in enumerate(centres)
        for q, y in enumerate(centres)
        if x * x + y * y <= 4900 and (x - u) ** 2 + (y - v) ** 2 <= disc(((other[2] - one[2]) & 255), section)
    ]


def disc(angle: int, section: int) -> float:
    """Squared radius within which a Gaussian of 28/3 pixels, times the section's share of one of 40 degrees, exceeds 0.005."""
    apart = abs((2 * pi * angle / 256 - 2 * pi * section / 6 + pi) % (2 * pi) - pi)
    sigma = 2 * pi / 9 * sqrt(2)
    peak = (erf((apart + pi / 6) / sigma) - erf((apart - pi / 6) / sigma)) / 2 / (28 / 3 * sqrt(2 * pi))
    return int(2 * (28 / 3) ** 2 * log(peak / 0.005)) if peak > 0.005 else -1


def turned(angle: int) -> tuple[int, int]:
    return round(4096 * cos(2 * pi * angle / 256)), round(4096 * sin(2 * pi * angle / 256))


def apart(angle: int, other: int) -> int:
    return min((angle - other) % 256, (other - angle) % 256)


def hypotheses(a: list[Minutia], b: list[Minutia], similar: list[list[int]]) -> list[list[tuple[int, int]]]:
    pairs = sorted(
        ((i, k) for i in range(len(a)) for k in range(len(b)) if similar[i][k]), key=lambda p: (-similar[p[0]][p[1]], p)
    )
    pairs = sorted(pairs[: constants._PAIRS])
    agree = [[t == u or agrees(a, b, t, u) for u in pairs] for t in pairs]
    votes = [sum(similar[i][k] for (i, k), yes in zip(pairs, row, strict=True) if yes) for row in agree]
    left, found = list(range(len(pairs))), []
    while left and len(found) < constants._HYPOTHESES:
        root = max(left, key=lambda t: (votes[t], -t))
        found.append([pair for pair, yes in zip(pairs, agree[root], strict=True) if yes])
        left = [t for t in left if not agree[root][t]]
    return found


def agrees(a: list[Minutia], b: list[Minutia], one: tuple[int, int], other: tuple[int, int]) -> bool:
    (i, k), (j, m) = one, other
    turn = b[k][2] - a[i][2]
    if i == j or k == m or apart(b[m][2] - a[j][2], turn) > constants._VOTE_STEPS:
        return False
    ax, ay, bx, by = a[j][0] - a[i][0], a[j][1] - a[i][1], b[m][0] - b[k][0], b[m][1] - b[k][1]
    length = sqrt(ax * ax + ay * ay)
    cosine, sine = turned(turn & 255)
    off_x, off_y = (ax * cosine + ay * sine) / 4096 - bx, (ay * cosine - ax * sine) / 4096 - by
    slack = 8 + 0.2 * length
    return abs(length - sqrt(bx * bx + by * by)) <= 5 + 0.06 * length and off_x * off_x + off_y * off_y <= slack * slack


def settled_at(a: list[Minutia], b: list[Minutia], mates: list[tuple[int, int]]) -> tuple[float, Motion] | None:
    """How much a hypothesis pairs, and its motion."""
    motion = fitted(a, b, mates)
    if motion is None:
        return None
    found = paired(a, b, moved_by(motion, a), direction(*motion[:2]), constants._NEAR_PX)
    motion = fitted(a, b, [pair for pair, _ in found])
    return None if motion is None else (nearness(found), motion)


def nearness(found: list[tuple[tuple[int, int], float]]) -> float:
    near = 0.0
    for _, cost in found:
        near += 2 - cost
    return near


def moved_by(motion: Motion, a: list[Minutia]) -> list[tuple[float, float]]:
    cosine, sine, shift_x, shift_y = motion
    return [(x * cosine + y * sine + shift_x, y * cosine - x * sine + shift_y) for x, y, _ in a]


def judged(a: list[Minutia], b: list[Minutia], similar: list[list[int]], motion: Motion) -> float:
    moved, turn = moved_by(motion, a), direction(*motion[:2])
    mates = [pair for pair, _ in paired(a, b, moved, turn, constants._NEAR_PX)]
    moved = [followed(a, b, moved, mates, i) for i in range(len(a))]
    found = paired(a, b, moved, turn, constants._LOCAL_PX)
    if len(found) < 2:
        return 0.0
    alike = sum(similar[i][k] for (i, k), _ in found)
    near = nearness(found)
    lengths = [
        (sqrt(sum((a[i][c] - a[j][c]) ** 2 for c in (0, 1))), sqrt(sum((b[k][c] - b[m][c]) ** 2 for c in (0, 1))))
        for t, ((i, k), _) in enumerate(found)
        for (j, m), _ in found[:t]
    ]
    short = [abs(one - other) <= constants._EDGE_SLACK_PX for one, other in lengths if one < constants._EDGE_PX]
    near_by = [[hypot(x - u, y - v) < constants._AREA_PX for x, y, _ in b] for u, v in moved]
    in_a, in_b = sum(map(any, near_by)), sum(map(any, zip(*near_by, strict=True)))
    share = near * near / (4.0 * max(float(in_a), constants._COMMON_MIN) * max(float(in_b), constants._COMMON_MIN))
    return 10.0 * sqrt(alike / 1000 * share * ((sum(short) + 1.0) / (len(short) + 3.0)))


def fitted(a: list[Minutia], b: list[Minutia], mates: list[tuple[int, int]]) -> Motion | None:
    a, b, n = [a[i] for i, _ in mates], [b[k] for _, k in mates], len(mates)
    if n < 2:
        return None
    ax, ay, bx, by = (
        sum(p[0] for p in a) / n,
        sum(p[1] for p in a) / n,
        sum(p[0] for p in b) / n,
        sum(p[1] for p in b) / n,
    )
    along = across = 0.0
    for (px, py, _), (qx, qy, _) in zip(a, b, strict=True):
        along += (px - ax) * (qx - bx) + (py - ay) * (qy - by)
        across += (py - ay) * (qx - bx) - (px - ax) * (qy - by)
    length = sqrt(along * along + across * across)
    if length < 1:
        return None
    cosine, sine = along / length, across / length
    return cosine, sine, bx - (ax * cosine + ay * sine), by - (ay * cosine - ax * sine)


def direction(cosine: float, sine: float) -> int:
    """In 1/256 turns; the tangent, or its inverse, is rounded to 1/1024 first."""
    if abs(sine) > abs(cosine):
        return 64 - direction(sine, cosine)
    steps = round(atan(int(abs(sine / cosine) * 1024 + 0.5) / 1024) * 128 / pi)
    steps = steps if sine >= 0 else -steps
    return steps if cosine >= 0 else 128 - steps


def paired(
    a: list[Minutia], b: list[Minutia], moved: list[tuple[float, float]], turn: int, within: float
) -> list[tuple[tuple[int, int], float]]:
    near = []
    for i, (x, y) in enumerate(moved):
        for k in range(len(b)):
            dx, dy = b[k][0] - x, b[k][1] - y
            distance, angle = dx * dx + dy * dy, apart(b[k][2] - a[i][2], turn)
            if abs(dy) <= within and distance <= within * within and angle <= constants._NEAR_STEPS:
                cost = distance / (within * within) + angle * angle / (constants._NEAR_STEPS * constants._NEAR_STEPS)
                near.append(((i, k), cost))
    near = near[: constants._NEAR_MAX]
    found: list[tuple[tuple[int, int], float]] = []
    for (i, k), cost in sorted(near, key=lambda pair: pair[1]):  # equal ones stay in order
        if all(i != j and k != m for (j, m), _ in found):
            found.append(((i, k), cost))
    return found


def followed(
    a: list[Minutia], b: list[Minutia], moved: list[tuple[float, float]], mates: list[tuple[int, int]], i: int
) -> tuple[float, float]:
    sum_x, sum_y, weights = 0.0, 0.0, constants._STIFFNESS
    for j, k in mates:
        if j != i:
            dx, dy = a[j][0] - a[i][0], a[j][1] - a[i][1]
            weight = constants._FIELD_PX**2 / (constants._FIELD_PX**2 + (dx * dx + dy * dy))
            weight *= weight
            sum_x += weight * (b[k][0] - moved[j][0])
            sum_y += weight * (b[k][1] - moved[j][1])
            weights += weight
    assert weights < inf
    return moved[i][0] + sum_x / weights, moved[i][1] + sum_y / weights
