"""Budgets: how many calls a caller may make, and how many may be made about one subject; lock-outs of callers that approach a subject.

Owns the token buckets and the detection of climbing. Never compares with the gallery and never decides.

1. A bucket is the generic cell rate algorithm (ITU-T I.371): one time a bucket, at which it is full again. It holds as many calls as its
   period allows, so that a full bucket allows all of them at once.
2. A call is counted in the gallery's database before it is answered, so that other processes and a restart count it as well. A reader, which
   cannot write, counts in memory, for itself.
3. Climbing: the score of failed verifications of one subject by one caller rises, each with captures like an earlier one's. The captures are
   kept in memory alone, the last few of a limited number of pairs; the number of rises is kept in the database.
4. Whether an exhausted subject is among the answers of a search tells its caller something. A caller that meets exhausted or locked subjects
   `climbs_max` times in a day is stopped for a day (without `climbs_max`, after `STOPPED_AT`). Callers without a name are not.
5. The hash chain covers what the database keeps of them. It is compared at the first call of a process, and then at one of `_TIDY_CALLS`.
6. A clock that was set back never empties a bucket further than empty.
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
"""Cosine from which two captures count as alike. Strangers' faces exceed it in 1 of 100,000 pairs, captures of one person fall short of it in
one of ten (LFW, 2026-11)."""
_REMEMBERED, _PAIRS_MAX = 16, 4_096  # failed captures of a pair of caller and subject; pairs
NO_SUBJECTS: Mapping[str, int] = MappingProxyType({})
_TIDY_CALLS = (
    1_000  # after so many calls what is there is compared with the hash chain, and what counts no more is dropped
)
CLIMBING, STOPPED = "climbing", "stopped"
STOPPED_AT = 5


@dataclass(frozen=True)
class Alarm(Described):
    """A lock-out. kind: `climbing`, from one subject; `stopped`, from all calls, subject_id is empty; caller: "" for callers without a name; at: the time in seconds."""

    number: int
    kind: str
    caller: str
    subject_id: str
    at: float


class _Counts(Protocol):
    """Where calls are counted: the database, or a reader's memory."""

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
    """The last failed captures of one caller and subject, and the best score of those that resemble one another."""

    def __init__(self) -> None:
        self.captures: list[tuple[dict[str, Float32], float]] = []

    def rises(self, vectors: dict[str, Float32], score_db: float) -> bool:
        """Whether this capture resembles earlier ones and scores above all of them; it is remembered."""
        alike = [score for known, score in self.captures if _alike(known, vectors)]
        self.captures = [*self.captures, (vectors, score_db)][-_REMEMBERED:]
        return bool(alike) and score_db > max(alike)


def _alike(a: Mapping[str, Float32], b: Mapping[str, Float32]) -> bool:
    return any(len(a[name]) == len(b[name]) and float(a[name] @ b[name]) >= NEAR for name in a.keys() & b.keys())


class Budgets:
    """Counts the calls on one gallery. policy: in force; clock: the time in seconds. Thread-safe."""

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
        """Whether the policy counts answers about subjects at all."""
        policy = self._policy()
        return policy.subject_calls_per_day is not None or bool(policy.climbs_max)

    def name(self, caller: str, subjects: Mapping[str, int]) -> None:
        """Counts the answers, so many about each of these enrolled subjects, that a search is about to give. All or nothing.

        Raises BudgetExhausted and LockedOut, which do not say of which subject."""
        try:
            self.take(caller, 0, subjects)
        except (BudgetExhausted, LockedOut) as error:
            if caller:  # all callers without a name would be stopped together
                self._met(caller)
            raise BudgetExhausted(
                "a subject that this answer names was the subject of as many calls as the policy allows; the answer is withheld; "
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

    def take(self, caller: str, calls: int = 1, subjects: Mapping[str, int] = NO_SUBJECTS) -> None:
        """Counts calls of a caller, "" for one without a name, and so many answers about each of these enrolled subjects; all or nothing.

        Raises BudgetExhausted, LockedOut, and InvalidInput for more calls at once than a full bucket holds."""
        policy = self._policy()
        stops = self.of_subjects
        buckets = []
        if caller and policy.caller_calls_per_hour is not None:
            buckets.append((("caller", caller), policy.caller_calls_per_hour, HOUR_S, calls))
        if policy.subject_calls_per_day is not None:
            buckets += [(("subject", name), policy.subject_calls_per_day, DAY_S, n) for name, n in subjects.items()]
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
        """Notes a verification; locks the caller out from the subject once failed ones have risen too often."""
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
        """Ends a lock-out; from all calls where subject_id is empty."""
        with self._counting(write=True) as counts:
            counts.drop_budget(_key("climb", caller, subject_id) if subject_id else _key("stopped", caller))
        with self._lock:
            self._failed.pop((caller, subject_id), None)

    def alarms(self) -> list[Alarm]:
        """Oldest first; a reader's own at the end."""
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
        """When the bucket is full again after these calls. Raises BudgetExhausted."""
        if calls > limit and which[0] == "subject":
            raise _exhausted(which, limit, period_s)
        if calls > limit:
            raise InvalidInput(
                f"{calls} probes in one call, {which[1]!r} may make {limit:g} an hour; send fewer at once"
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
    told = f"caller {name!r} has made" if kind == "caller" else f"of subject {name!r} were made"
    wanted = f"{limit:g} an hour" if kind == "caller" else f"{limit:g} a day, of all callers"
    return BudgetExhausted(
        f"{told} as many calls as the policy allows: {wanted}; nothing was done; send it again in {wait_s:.0f} s",
        wait_s,
    )


def _refuse_stopped(known: tuple[float, int] | None, most: int, now: float) -> None:
    if known is not None and known[1] >= most and known[0] > now:
        wait_s = known[0] - now
        raise LockedOut(
            f"stopped: {known[1]} answers named subjects of as many calls as the policy allows, {most} such answers are allowed a day; nothing "
            f"was done; a supervisor may end it (`Engine.end_lockout(caller, '')`), or try again in {wait_s:.0f} s",
            wait_s,
        )


def _refuse_locked(known: tuple[float, int] | None, climbs_max: int, now: float) -> None:
    if known is not None and known[1] >= climbs_max and known[0] > now:
        wait_s = known[0] - now
        raise LockedOut(
            f"locked out from this subject: {known[1]} failed verifications with like captures came nearer each time, "
            f"{climbs_max} are allowed a day; nothing was done; a supervisor may end it (`Engine.end_lockout`), or try again in {wait_s:.0f} s",
            wait_s,
        )
