"""Budgets: limits on the calls of a caller and on the calls about a subject, and lock-outs of callers that attack a subject by hill
climbing.

Owns the token buckets and the detection of hill climbing. Never compares with the gallery and never decides.

1. A bucket uses the generic cell rate algorithm (ITU-T I.371): it stores one time, at which the bucket is full again. A full bucket allows
   all calls of its period at once.
2. A call is counted in the gallery's database before it is answered. So other processes, and this one after a restart, count it as well. A
   reader cannot write, and counts in its own memory.
3. Hill climbing: the scores of a caller's failed verifications of one subject rise, with captures that resemble earlier ones. The captures
   are only in memory: the last few, for a limited number of pairs of caller and subject. The number of rises is in the database.
4. An answer that is withheld because a subject is exhausted or locked gives the caller information. A caller that receives `climbs_max`
   such answers in a day (without `climbs_max`, `STOPPED_AT`) is stopped for a day. This does not apply to callers without a name.
5. The hash chain covers the budgets in the database. They are compared with it at the first call of a process, and then at one call of
   `_TIDY_CALLS`.
6. If the clock is set back, a bucket is at most empty.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from biodedup.common.described import Described
from biodedup.config import Policy
from biodedup.engine.log import EngineLog
from biodedup.errors import BudgetExhausted, InvalidInput, LockedOut
from biodedup.gallery.gallery import Gallery
from biodedup.values import Float32, Template, Verification

HOUR_S, DAY_S = 3_600.0, 86_400.0
NEAR = 0.5
"""The cosine from which two captures count as similar. 1 in 100,000 pairs of different people's faces reaches it, and 9 in 10 pairs of
captures of one person (LFW, 2026-11)."""
_REMEMBERED, _PAIRS_MAX = 16, 4_096  # failed captures of a pair of caller and subject; pairs
NO_SUBJECTS: Mapping[str, int] = MappingProxyType({})
_TIDY_CALLS = 1_000  # after so many calls, budgets are compared with the hash chain, and expired budgets are deleted
CLIMBING, STOPPED = "climbing", "stopped"
STOPPED_AT = 5


@dataclass(frozen=True)
class Alarm(Described):
    """A lock-out. kind: `climbing` (from one subject) or `stopped` (from all calls; subject_id is empty); caller: "" for callers without a
    name; at: seconds since 1970."""

    number: int
    kind: str
    caller: str
    subject_id: str
    at: float


class _Counts(Protocol):
    """The storage of the counts: the database, or a reader's memory."""

    def budget(self, key: str) -> tuple[float, int] | None: ...

    def put_budget(self, key: str, until: float, climbs: int) -> None: ...

    def check_budgets(self) -> None: ...

    def forget_budgets(self, now: float) -> None: ...

    def drop_budget(self, key: str) -> None: ...

    def add_alarm(self, kind: str, caller: str, subject_id: str, raised_at: float) -> None: ...


class _InMemory:
    """The counts of a reader."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[float, int]] = {}
        self.alarms: list[tuple[int, str, str, str, float]] = []

    def budget(self, key: str) -> tuple[float, int] | None:
        return self.rows.get(key)

    def put_budget(self, key: str, until: float, climbs: int) -> None:
        self.rows[key] = until, climbs

    def check_budgets(self) -> None:
        pass

    def forget_budgets(self, now: float) -> None:
        self.rows = {key: row for key, row in self.rows.items() if row[0] > now}

    def drop_budget(self, key: str) -> None:
        self.rows.pop(key, None)

    def add_alarm(self, kind: str, caller: str, subject_id: str, raised_at: float) -> None:
        self.alarms.append((len(self.alarms) + 1, kind, caller, subject_id, raised_at))


class _Failed:
    """The last failed captures of one caller and subject, with their scores."""

    def __init__(self) -> None:
        self.captures: list[tuple[dict[str, Float32], float]] = []

    def rises(self, vectors: dict[str, Float32], score_db: float) -> bool:
        """Whether this capture resembles earlier captures and scores higher than all of these. The capture is stored."""
        alike = [score for known, score in self.captures if _alike(known, vectors)]
        self.captures = [*self.captures, (vectors, score_db)][-_REMEMBERED:]
        return bool(alike) and score_db > max(alike)


def _alike(a: Mapping[str, Float32], b: Mapping[str, Float32]) -> bool:
    return any(len(a[name]) == len(b[name]) and float(a[name] @ b[name]) >= NEAR for name in a.keys() & b.keys())


class Budgets:
    """Counts the calls on one gallery. policy: returns the policy in force; clock: returns the time in seconds since 1970. Thread-safe."""

    def __init__(
        self, gallery: Gallery, policy: Callable[[], Policy], clock: Callable[[], float], log: EngineLog
    ) -> None:
        self._log = log
        self._gallery = gallery
        self._policy = policy
        self._clock = clock
        self._own = _InMemory()
        self._failed: OrderedDict[tuple[str, str], _Failed] = OrderedDict()
        self._lock = threading.Lock()
        self._calls = 0

    @property
    def of_subjects(self) -> bool:
        """Whether the policy limits answers about subjects."""
        policy = self._policy()
        return policy.subject_calls_per_day is not None or bool(policy.climbs_max)

    def name(self, caller: str, subjects: Mapping[str, int], cases: Mapping[str, int] = NO_SUBJECTS) -> None:
        """Counts the answers that a search is about to give. subjects: subject_id -> number of answers; cases: encounter_id of an open case ->
        number of answers. It counts all of them or none.

        Raises BudgetExhausted and LockedOut, which do not name the subject."""
        try:
            self.take(caller, 0, subjects, cases)
        except (BudgetExhausted, LockedOut) as error:
            if caller:  # not without a name, because that would stop all nameless callers together
                self._met(caller)
            raise BudgetExhausted(
                "the answer is withheld, because the policy's limit of calls about a subject in it is reached; "
                f"send it again in {error.retry_after_s:.0f} s",
                error.retry_after_s,
            ) from None

    def _met(self, caller: str) -> None:
        """Counts an answer that was withheld."""
        key, now, most = _key("stopped", caller), self._clock(), self._policy().climbs_max or STOPPED_AT
        with self._counting(write=True) as counts:
            until, before = counts.budget(key) or (0.0, 0)
            met = before + 1 if until > now else 1
            counts.put_budget(key, now + DAY_S, met)
            if met == most:
                counts.add_alarm(STOPPED, caller, "", now)
        if met == most:
            self._log.locked_out(caller, "")

    def take(
        self,
        caller: str,
        calls: int = 1,
        subjects: Mapping[str, int] = NO_SUBJECTS,
        cases: Mapping[str, int] = NO_SUBJECTS,
    ) -> None:
        """Counts calls of a caller, and answers about enrolled subjects and open cases. It counts all of them or none. caller: "" without a
        name; subjects, cases: as in `name`.

        Raises BudgetExhausted, LockedOut, and InvalidInput for more calls at once than a full bucket allows."""
        policy = self._policy()
        stops = self.of_subjects
        buckets = []
        if caller and policy.caller_calls_per_hour is not None:
            buckets.append((("caller", caller), policy.caller_calls_per_hour, HOUR_S, calls))
        if policy.subject_calls_per_day is not None:
            for kind, counted in (("subject", subjects), ("case", cases)):
                buckets += [((kind, name), policy.subject_calls_per_day, DAY_S, n) for name, n in counted.items()]
        locks = [_key("climb", caller, name) for name in subjects] if policy.climbs_max else []
        if not buckets and not locks and not stops:
            return
        now = self._clock()
        with self._counting(write=bool(buckets)) as counts:
            if self._calls % _TIDY_CALLS == 0:
                counts.check_budgets()
                counts.forget_budgets(now)
            self._calls += 1
            if stops:
                _refuse_stopped(counts.budget(_key("stopped", caller)), policy.climbs_max or STOPPED_AT, now)
            for key in locks:
                _refuse_locked(counts.budget(key), policy.climbs_max, now)
            full_at = [self._full_at(counts, *bucket, now) for bucket in buckets]
            for (which, *_), at in zip(buckets, full_at, strict=True):
                counts.put_budget(_key(*which), at, 0)

    def verified(self, caller: str, templates: Mapping[str, Template], result: Verification) -> None:
        """Records a verification. Locks the caller out from the subject if the scores of failed verifications have risen too often."""
        policy = self._policy()
        if not policy.climbs_max or result.accepted:
            return
        vectors = {name: t.embedding for name, t in templates.items() if t.embedding is not None}
        with self._lock:
            failed = self._failed.setdefault((caller, result.subject_id), _Failed())
            self._failed.move_to_end((caller, result.subject_id))
            while len(self._failed) > _PAIRS_MAX:
                self._failed.popitem(last=False)
            rises = failed.rises(vectors, result.score_db)
        if not rises:
            return
        key, now = _key("climb", caller, result.subject_id), self._clock()
        with self._counting(write=True) as counts:
            until, before = counts.budget(key) or (0.0, 0)
            climbs = before + 1 if until > now else 1
            counts.put_budget(key, now + DAY_S, climbs)
            if climbs == policy.climbs_max:
                counts.add_alarm(CLIMBING, caller, result.subject_id, now)
        if climbs == policy.climbs_max:
            self._log.locked_out(caller, result.subject_id)

    def release(self, caller: str, subject_id: str) -> None:
        """Ends a lock-out. subject_id: "" for a lock-out from all calls."""
        with self._counting(write=True) as counts:
            counts.drop_budget(_key("climb", caller, subject_id) if subject_id else _key("stopped", caller))
        with self._lock:
            self._failed.pop((caller, subject_id), None)

    def alarms(self) -> list[Alarm]:
        """All alarms, oldest first. Those of a reader's memory come last."""
        return [Alarm(*row) for row in (*self._gallery.alarms(), *self._own.alarms)]

    @contextmanager
    def _counting(self, *, write: bool) -> Iterator[_Counts]:
        if self._gallery.read_only:
            with self._lock:
                yield self._own
            return
        with self._gallery.transaction() as transaction:
            yield transaction.caller_tables(noted=write)

    @staticmethod
    def _full_at(
        counts: _Counts, which: tuple[str, str], limit: float, period_s: float, calls: int, now: float
    ) -> float:
        """The time at which the bucket is full again after these calls. Raises BudgetExhausted."""
        if calls > limit and which[0] != "caller":
            raise _exhausted(which, limit, period_s)
        if calls > limit:
            raise InvalidInput(
                f"got {calls} probes in one call, {which[1]!r} may send {limit:g} an hour; send fewer in a call"
            )
        known = counts.budget(_key(*which))
        before = now if known is None else min(max(known[0], now), now + period_s)
        full_at = before + calls * period_s / limit
        wait_s = full_at - (now + period_s)
        if wait_s > 1e-6 * period_s:
            raise _exhausted(which, limit, wait_s)
        return full_at


def _key(*parts: str) -> str:
    return json.dumps(parts)


def _exhausted(which: tuple[str, str], limit: float, wait_s: float) -> BudgetExhausted:
    kind, name = which
    limited = f"the calls of {name!r}" if kind == "caller" else f"the calls about {kind} {name!r}"
    wanted = f"{limit:g} an hour" if kind == "caller" else f"{limit:g} a day, of all callers"
    return BudgetExhausted(
        f"{limited} have reached the policy's limit of {wanted}; nothing was done; send it again in {wait_s:.0f} s",
        wait_s,
    )


def _refuse_stopped(known: tuple[float, int] | None, most: int, now: float) -> None:
    if known is not None and known[1] >= most and known[0] > now:
        wait_s = known[0] - now
        raise LockedOut(
            f"stopped: {known[1]} answers were withheld because of a subject's limit, and {most} a day are allowed; nothing "
            f"was done; a supervisor may end it (`Engine.end_lockout(caller, '')`), or try again in {wait_s:.0f} s",
            wait_s,
        )


def _refuse_locked(known: tuple[float, int] | None, climbs_max: int, now: float) -> None:
    if known is not None and known[1] >= climbs_max and known[0] > now:
        wait_s = known[0] - now
        raise LockedOut(
            f"locked out from this subject: the scores of {known[1]} failed verifications with similar captures have risen, and "
            f"{climbs_max} a day are allowed; nothing was done; a supervisor may end it (`Engine.end_lockout`), or try again in {wait_s:.0f} s",
            wait_s,
        )
