"""Asks the replicas of a group one question, until one of them answers.

Owns the order in which replicas are asked, deadlines, hedged requests and what failures mean. Knows nothing of Ray or of segments.

1. Each replica gets `deadline_s`. One that fails is asked last for a while.
2. When an answer takes longer than 95 of 100 answers of late, the next replica is asked, too, and the first answer counts (hedged requests:
   Dean and Barroso, The Tail at Scale, 2013). At most one question in ten is hedged, so that a slow cluster is not asked twice as much.
   The slow one is asked last until it answers, hedged or not: a dead node, of which Ray knows nothing yet, costs a hedge or two.
3. When the queues of all replicas that are alive are full, the question is refused, and the caller tries again later.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from biodedup.cluster.shards import wire
from biodedup.errors import StorageUnavailable
from biodedup.search.shards.base import QueueFull

_log = logging.getLogger("biodedup.cluster")
SUSPECT_S = 10.0  # for so long a replica that failed is asked last
_LATENCIES_MIN, _LATENCIES_MOST = 20, 200
_SIZES_MOST = 1_000
_HEDGE_S_MIN = 0.02  # below, a second question costs more than it saves
_HEDGES_SHARE, _HEDGES_MOST = 0.1, 10.0


class ReplicaFailed(Exception):
    """A replica is dead, unreachable or past its deadline."""


class Replica(Protocol):
    """One of the processes that hold a group of segments."""

    @property
    def name(self) -> str: ...

    @property
    def is_ready(self) -> bool:
        """Whether it has been started."""

    @property
    def is_well(self) -> bool:
        """Whether it answered when it was last asked how it is."""

    def search(self, sent: wire.Sent) -> Future[wire.Sent]:
        """Raises QueueFull, ReplicaFailed. The future raises ReplicaFailed."""

    def take(self, entries_text: str) -> None:
        """Tells it to open a unit, and does not wait."""


@dataclass
class Answered:
    """answer: of the first replica that gave one. outdated: replicas that do not have the unit; starting: replicas that are being started;
    full: replicas that refused; failures: what the others said."""

    answer: tuple[dict[str, Any], wire.Arrays] | None = None
    outdated: list[Replica] = field(default_factory=list)
    starting: int = 0
    full: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass
class _Asked:
    replica: Replica
    started_at: float
    deadline: float


class Asker:
    """Asks replicas. Thread-safe."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._turn = itertools.count()
        self._suspect_until: dict[str, float] = {}
        self._latencies: dict[tuple[Any, ...], deque[float]] = {}
        self._hedges_left = _HEDGES_MOST
        self._lock = threading.Lock()

    def ask(self, replicas: Sequence[Replica], message: wire.Message) -> Answered:
        """Raises nothing that a replica does."""
        question = _Question(self, message, self._in_order(replicas), self._hedge_s(_size_of(message)))
        return question.run()

    def _in_order(self, replicas: Sequence[Replica]) -> list[Replica]:
        """Replicas in turn; those that failed of late, or are not well, come last."""
        if not replicas:
            return []
        first, now = next(self._turn) % len(replicas), time.monotonic()
        turned = [*replicas[first:], *replicas[:first]]
        return sorted(turned, key=lambda one: not one.is_well or self._suspect_until.get(one.name, 0.0) > now)

    def suspect(self, replica: Replica) -> None:
        now = time.monotonic()
        with self._lock:
            self._suspect_until = {name: until for name, until in self._suspect_until.items() if until > now}
            self._suspect_until[replica.name] = now + SUSPECT_S

    def suspect_until_answered(self, replica: Replica, answer: Future[wire.Sent]) -> None:
        """answer: what it has not answered in the usual time."""
        self.suspect(replica)
        answer.add_done_callback(lambda done: None if done.exception() else self._trust(replica))

    def _trust(self, replica: Replica) -> None:
        with self._lock:
            self._suspect_until.pop(replica.name, None)

    @property
    def deadline_s(self) -> float:
        return self._deadline_s

    # hedging ----------------------------------------------------------------------------------------------------

    def _hedge_s(self, size: tuple[Any, ...]) -> float:
        """After how many seconds a question of this size is hedged."""
        with self._lock:
            self._hedges_left = min(self._hedges_left + _HEDGES_SHARE, _HEDGES_MOST)
            latencies = list(self._latencies.get(size, ()))
        if len(latencies) < _LATENCIES_MIN:
            return self._deadline_s
        return max(float(np.quantile(latencies, 0.95)), _HEDGE_S_MIN)

    def may_hedge(self) -> bool:
        with self._lock:
            if self._hedges_left < 1:
                return False
            self._hedges_left -= 1
        return True

    def note(self, message: wire.Message, seconds: float) -> None:
        with self._lock:
            if len(self._latencies) >= _SIZES_MOST:
                self._latencies.clear()  # units come and go
            self._latencies.setdefault(_size_of(message), deque(maxlen=_LATENCIES_MOST)).append(seconds)


class _Question:
    """One question to the replicas of a group."""

    def __init__(self, asker: Asker, message: wire.Message, order: Sequence[Replica], hedge_s: float) -> None:
        self._asker, self._message, self._hedge_s = asker, message, hedge_s
        self._left = deque(order)
        self._asked: dict[Future[wire.Sent], _Asked] = {}
        self._said = Answered()

    def run(self) -> Answered:
        hedged = False
        while self._left or self._asked:
            now = time.monotonic()
            if self._left and not self._asked:
                self._start(self._left.popleft(), now)
                continue
            until = min(asked.deadline for asked in self._asked.values())
            hedge_at = min(asked.started_at for asked in self._asked.values()) + self._hedge_s
            may_hedge = bool(self._left) and not hedged
            done, _ = wait(
                self._asked, max(min(until, hedge_at if may_hedge else until) - now, 0), return_when=FIRST_COMPLETED
            )
            for future in done:
                if self._is_answer(future, self._asked.pop(future)):
                    return self._said
            if (
                done and self._left
            ):  # it gave no answer: the next one is asked now, whether or not a hedge is on its way
                self._start(self._left.popleft(), time.monotonic())
            now = time.monotonic()
            self._drop_late(now)
            if may_hedge and not done and self._asked and now >= hedge_at:
                hedged = True
                for future, asked in self._asked.items():
                    self._asker.suspect_until_answered(asked.replica, future)
                if self._asker.may_hedge():
                    self._start(self._left.popleft(), now)
        return self._said

    def _start(self, replica: Replica, now: float, missing: Sequence[str] = (), deadline: float | None = None) -> None:
        if not replica.is_ready:
            self._said.starting += 1
            return
        try:
            future = replica.search(self._message.sent(missing))
        except QueueFull:
            self._said.full += 1
        except ReplicaFailed as error:
            self._failed(replica, str(error))
        else:
            self._asked[future] = _Asked(replica, now, deadline or now + self._asker.deadline_s)

    def _is_answer(self, future: Future[wire.Sent], asked: _Asked) -> bool:
        """Whether this replica has answered; if not, notes why, and sends what it lacks."""
        try:
            about, arrays = wire.received(future.result())
        except (ReplicaFailed, StorageUnavailable) as error:
            self._failed(asked.replica, str(error))
            return False
        status = str(about["status"])
        if status == "done":
            self._asker.note(self._message, time.monotonic() - asked.started_at)
            self._said.answer = about, arrays
        elif status == "lacks":
            self._start(asked.replica, asked.started_at, about["missing"], asked.deadline)
        elif status == "outdated":
            self._said.outdated.append(asked.replica)
        elif status == "busy":
            self._said.full += 1
        else:
            self._said.failures.append(f"{asked.replica.name}: {about.get('reason', status)}")
        return status == "done"

    def _drop_late(self, now: float) -> None:
        for future, asked in list(self._asked.items()):
            if asked.deadline <= now:
                del self._asked[future]
                self._failed(asked.replica, f"no answer within {self._asker.deadline_s:.1f} s")

    def _failed(self, replica: Replica, reason: str) -> None:
        self._said.failures.append(f"{replica.name}: {reason}")
        self._asker.suspect(replica)


def _size_of(message: wire.Message) -> tuple[Any, ...]:
    """Questions of one size take about the same time: of one kind, and of about as many probes."""
    probes = max((len(array) for name, array in message.arrays.items() if name.startswith("probe.")), default=0)
    return message.about.get("kind"), message.about.get("generation"), probes.bit_length()
