"""Asks the replicas of a group a question, one after the other, until a replica answers.

Owns the order of the replicas, deadlines, hedged requests, and the interpretation of failures. Does not depend on Ray or on segments.

1. Each replica has `deadline_s` seconds to answer. A replica that has failed comes last in the order for a while.
2. Hedged requests (Dean and Barroso, "The Tail at Scale", 2013): if an answer takes longer than 95 % of the recent answers, the next
   replica is asked as well, and the first answer is used. At most one question in ten is hedged, so that hedging does not double the load
   of a slow cluster. A replica whose question was hedged comes last until it answers: a dead node that Ray has not noticed yet costs one
   or two hedges.
3. If the queues of all living replicas are full, the question is refused, and the caller tries again later.
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
SUSPECT_S = 10.0  # for this time a replica that failed comes last
_LATENCIES_MIN, _LATENCIES_MOST = 20, 200
_SIZES_MOST = 1_000
_HEDGE_S_MIN = 0.02  # for faster answers a second question costs more than it saves
_HEDGES_SHARE, _HEDGES_MOST = 0.1, 10.0


class ReplicaFailed(Exception):
    """A replica has ended, cannot be reached, or has missed its deadline."""


class Replica(Protocol):
    """One of the processes that hold a group of segments."""

    @property
    def name(self) -> str: ...

    @property
    def is_ready(self) -> bool:
        """Whether the replica has started."""

    @property
    def is_well(self) -> bool:
        """Whether the replica has answered the last request for its report."""

    def search(self, sent: wire.Sent) -> Future[wire.Sent]:
        """Sends a query. Raises QueueFull, ReplicaFailed. The future raises ReplicaFailed."""

    def take(self, entries_text: str) -> None:
        """Tells the replica to open a unit. Does not wait for it."""


@dataclass
class Answered:
    """The result of a question. answer: the first answer, or None; outdated: replicas that do not have the unit; starting: the number of
    replicas that are starting; full: of replicas with a full queue; failures: the errors of the other replicas."""

    answer: tuple[dict[str, Any], wire.Arrays] | None = None
    outdated: list[Replica] = field(default_factory=list)
    starting: int = 0
    full: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass
class _Asked:
    """A question that a replica has not answered yet."""

    replica: Replica
    started_at: float
    deadline: float


class Asker:
    """Asks replicas, and remembers their failures and latencies. Thread-safe."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._asked_count = itertools.count()
        self._suspect_until: dict[str, float] = {}
        self._latencies: dict[tuple[Any, ...], deque[float]] = {}
        self._hedges_left = _HEDGES_MOST
        self._lock = threading.Lock()

    def ask(self, replicas: Sequence[Replica], message: wire.Message) -> Answered:
        """Asks until a replica answers, or all have failed. Errors of replicas are in the result, not raised."""
        question = _Question(self, message, self._in_order(replicas), self._hedge_s(_size_of(message)))
        return question.run()

    def _in_order(self, replicas: Sequence[Replica]) -> list[Replica]:
        """Replicas in round-robin order; those that failed recently, or are not well, come last."""
        if not replicas:
            return []
        first, now = next(self._asked_count) % len(replicas), time.monotonic()
        rotated = [*replicas[first:], *replicas[:first]]
        return sorted(
            rotated, key=lambda replica: not replica.is_well or self._suspect_until.get(replica.name, 0.0) > now
        )

    def suspect(self, replica: Replica) -> None:
        """Records a failure of a replica: it comes last for `SUSPECT_S`."""
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
        """The seconds after which a question of this size is hedged."""
        with self._lock:
            self._hedges_left = min(self._hedges_left + _HEDGES_SHARE, _HEDGES_MOST)
            latencies = list(self._latencies.get(size, ()))
        if len(latencies) < _LATENCIES_MIN:
            return self._deadline_s
        return max(float(np.quantile(latencies, 0.95)), _HEDGE_S_MIN)

    def may_hedge(self) -> bool:
        """Whether the budget of hedged requests allows another one. Takes it from the budget."""
        with self._lock:
            if self._hedges_left < 1:
                return False
            self._hedges_left -= 1
        return True

    def note(self, message: wire.Message, seconds: float) -> None:
        """Records the latency of an answer."""
        with self._lock:
            if len(self._latencies) >= _SIZES_MOST:
                self._latencies.clear()  # most of them belong to units that no longer exist
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
            if done and self._left:  # a replica failed: the next one is asked at once, even if a hedged request runs
                self._start(self._left.popleft(), time.monotonic())
            now = time.monotonic()
            self._drop_late(now)
            if may_hedge and not done and self._asked and now >= hedge_at:
                hedged = True
                if self._asker.may_hedge():
                    for future, asked in self._asked.items():
                        self._asker.suspect_until_answered(asked.replica, future)
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
        """Whether this reply is the answer. Otherwise records the reason, or sends the arrays that the replica lacks."""
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
    """Groups questions that take about the same time: the same kind and unit, and a similar number of probes."""
    probes = max((len(array) for name, array in message.arrays.items() if name.startswith("probe.")), default=0)
    return message.about.get("kind"), message.about.get("generation"), probes.bit_length()
