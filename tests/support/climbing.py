"""The hill-climbing attack: recovers an enrolled embedding from the answers of `verify` alone.

It takes the best way that the answers leave open:

1. A similarity in the evidence is a linear measurement of the enrolled vector: as many random probes as it has dimensions, and least squares.
2. A score in steps, or acceptance alone, is one bit about the side of a boundary: a point on the boundary by bisection, the boundary's
   normal by random directions (HopSkipJump, Chen et al., IEEE S&P 2020), and a move along it.

A call that is refused for its budget teaches nothing and counts as a call; the attacker waits `pause_s` after each call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

import biodedup as bd
from biodedup.errors import RetryableError
from tests.support.vectors import SFACE, unit

_DIRECTIONS, _BISECTIONS, _STEP = 400, 10, 0.5


class Exhausted(Exception):
    """The calls that the attacker may make are made."""


@dataclass
class Attacker:
    """verify: the call; calls_max: how many it may make; wait: called after each call, for a test to move the clock; start: the first probe, None for a stranger's. best: the vector that
    the attacker believes to be nearest."""

    verify: Callable[[bd.Encounter], bd.Verification]
    calls_max: int
    seed: int = 0
    dimension: int = 128
    wait: Callable[[], None] = lambda: None
    start: np.ndarray | None = None
    calls: int = 0
    answered: int = 0
    best: np.ndarray | None = None
    shown: list[float] = field(default_factory=list)

    def run(self) -> Attacker:
        """Attacks until the answer shows 60 dB, or the calls are made."""
        self._random = np.random.default_rng([self.seed, 0xC11B])
        try:
            first = self._ask(self._stranger() if self.start is None else self.start)
            if first.evidence and first.evidence[0].similarity is not None:
                self._measure()
            else:
                self._climb()
        except Exhausted:
            pass
        return self

    def _ask(self, vector: np.ndarray) -> bd.Verification:
        """Asks until it is answered."""
        while self.calls < self.calls_max:
            self.calls += 1
            try:
                answer = self.verify(bd.Encounter(templates={"face": vector}, model_id=SFACE))
            except RetryableError:
                self.wait()
                continue
            self.wait()
            self.answered += 1
            if not self.shown or answer.score_db > max(self.shown):
                self.best = vector
            self.shown.append(answer.score_db)
            return answer
        raise Exhausted

    def _stranger(self) -> np.ndarray:
        return unit(self._random.standard_normal(self.dimension))

    def _measure(self) -> None:
        probes = np.array([self._stranger() for _ in range(self.dimension + 16)])
        similarity = [self._ask(probe).evidence[0].similarity for probe in probes]
        self._ask(unit(np.linalg.lstsq(probes.astype(np.float64), np.array(similarity), rcond=None)[0]))

    def _level(self, vector: np.ndarray) -> float:
        answer = self._ask(vector)
        return answer.score_db + 0.5 * answer.accepted

    def _climb(self) -> None:
        lowest, low, high = np.inf, None, self.best
        level = -np.inf if high is None else self._level(high)
        while level <= lowest:  # strangers, until two of them get different answers
            vector = self._stranger()
            shown = self._level(vector)
            if shown < lowest:
                lowest, low = shown, vector
            if shown > level:
                level, high = shown, vector
        while level < 60:
            point = self._boundary(low, high, level)
            normal = self._normal(point, level)
            before = level
            for share in (0.3, 0.5, 0.7, 0.85, 0.95):
                moved = unit((1 - share) * point + share * normal)
                shown = self._level(moved)
                if shown > level:
                    low, level, high = point, shown, moved
            if level == before:  # the normal again, from another point of the boundary
                high = unit(point + 0.3 * normal)
                level = self._level(high)
                low = self._stranger()
                if level < before:
                    level, high = before, unit(point + 0.05 * normal)

    def _boundary(self, low: np.ndarray, high: np.ndarray, level: float) -> np.ndarray:
        """A point where the answers change to this level, between two vectors."""
        for _ in range(_BISECTIONS):
            middle = unit(low + high)
            if self._level(middle) >= level:
                high = middle
            else:
                low = middle
        return high

    def _normal(self, point: np.ndarray, level: float) -> np.ndarray:
        """The direction in which the answers reach this level; the mean is taken off, as most steps from a boundary lead below it."""
        directions = np.array([self._stranger() for _ in range(_DIRECTIONS)])
        sides = np.array([self._level(unit(point + _STEP * direction)) >= level for direction in directions], float)
        return unit((sides - sides.mean()) @ directions)
