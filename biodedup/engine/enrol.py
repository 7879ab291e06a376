"""Searches for encounters, then decides on them and commits the decisions in one transaction.

Owns the steps between a search and its durable answer, and the queue of calls that wait to commit. Never compares and never judges.

    without the lock:  prepare -> search
    with the lock:     search the newer rows -> decide -> verify an update -> stage -> commit -> answer

1. Under the lock, a probe is compared with every row that is newer than its search, including the rows of its own batch.
2. Group commit: the thread that gets the lock commits for all calls that wait. One sync of the disk acknowledges all calls, or none.
3. A caller's mistake raises an error in that caller's call only. The other encounters of the group are still decided.
4. An update is verified against the enrolled rows and adds a row. Only an update with a reason replaces the enrolled rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TypeAlias

from biodedup.common.memory import out_of_memory
from biodedup.engine.callers.audit import Call, current_call
from biodedup.engine.decide import Decider
from biodedup.engine.log import EngineLog
from biodedup.engine.prepare import Preparer, Probe, check_models, in_memory, require_subject
from biodedup.engine.search import BatchedSearch, SearchSnapshot
from biodedup.errors import (
    NOT_TAKEN,
    BiodedupError,
    CallerError,
    CaptureUnavailable,
    StorageUnavailable,
    UnknownSubject,
)
from biodedup.gallery.answers import StoredDecision, digest_of, to_json
from biodedup.gallery.cases import Request, earlier_answer, similar_cases
from biodedup.gallery.encounters import kept_rows
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.transaction import Transaction, exists
from biodedup.match.pairs import record_candidates
from biodedup.match.ranked import Ranked
from biodedup.required import shortfall
from biodedup.search.searcher import CandidateSet
from biodedup.trace import tracing, untraced
from biodedup.values import Case, Decision, Encounter

Answer: TypeAlias = Decision | CallerError | CaptureUnavailable


@dataclass(eq=False)
class _Waiting:
    """The searched probes of one call that waits for the commit. replaces: whether the probes update subjects; reason: why all rows are
    replaced, or ""."""

    probes: Sequence[Probe]
    digests: Sequence[bytes]
    seen: SearchSnapshot
    replaces: bool
    reason: str
    answers: list[Decision | CallerError] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)
    """The indices of the probes whose answers the commit recorded."""
    call: Call | None = None
    approve: Callable[[Transaction], None] | None = None
    """Called in the transaction, if a replacement needs two people."""
    error: BiodedupError | None = None
    done: bool = False

    @property
    def operation(self) -> str:
        return "enroll" if not self.replaces else "replace" if self.reason else "update"


@dataclass(eq=False)
class PreparedBatch:
    """A batch of encounters after its search. answers: one for each encounter, None until it is known; waiting: the undecided probes, None
    if there are none; places: the index in the batch of each undecided probe; fresh: the indices of the encounters whose decision is new
    and committed."""

    answers: list[Answer | None]
    places: tuple[int, ...] = ()
    waiting: _Waiting | None = None
    fresh: frozenset[int] = frozenset()


class Enrolment:
    """Enrols and updates subjects of one gallery. new_id: makes ids for encounters without an id; encounters_max: the largest number of
    rows of a subject. Thread-safe."""

    def __init__(
        self,
        gallery: Gallery,
        preparer: Preparer,
        searches: BatchedSearch,
        decider: Decider,
        new_id: Callable[[], str],
        encounters_max: int,
        *,
        log: EngineLog,
    ) -> None:
        self._log = log
        self._gallery = gallery
        self._preparer = preparer
        self._searches = searches
        self._decider = decider
        self._new_id = new_id
        self._encounters_max = encounters_max
        self._waiting: list[_Waiting] = []
        self._waiting_lock = threading.Lock()

    # before the lock --------------------------------------------------------------------------------------------

    def search(
        self, encounters: Sequence[Encounter], across: bool, *, replaces: bool = False, reason: str = ""
    ) -> PreparedBatch:
        """Prepares encounters, and searches the newest snapshot with their probes."""
        answers: list[Answer | None] = [None] * len(encounters)
        operation = "enroll" if not replaces else f"replace: {reason}" if reason else "update"
        encounters, digests = list(encounters), [b""] * len(encounters)
        for i, encounter in enumerate(encounters):
            try:
                require_subject(encounter)
                encounters[i] = in_memory(encounter, self._preparer.config.capture)
                digests[i] = digest_of(encounters[i], operation)
                answers[i] = earlier_answer(self._gallery.answer, encounter, digests[i], self._gallery.snapshot)
            except NOT_TAKEN as error:
                answers[i] = error
        todo = [i for i, answer in enumerate(answers) if answer is None]
        probes: dict[int, Probe] = {}
        for i, probe in zip(todo, self._preparer.probes([encounters[i] for i in todo]), strict=True):
            if isinstance(probe, CallerError):
                answers[i] = probe
                continue
            try:
                check_models(probe.templates, self._gallery.snapshot().models)
                probes[i] = probe
            except CallerError as error:
                answers[i] = error
        if not probes:
            return PreparedBatch(answers)
        searched = list(probes.values())
        before = self._gallery.snapshot()
        extra_k = max(
            before.count_under(probe.subject_id) for probe in searched
        )  # a subject's own rows cannot be candidates
        seen = self._searches.search(searched, across=across, extra_k=extra_k)
        waiting = _Waiting(searched, [digests[i] for i in probes], seen, replaces, reason)
        return PreparedBatch(answers, tuple(probes), waiting)

    def ahead(
        self, batches: Iterator[list[Encounter]], across: bool
    ) -> Iterator[tuple[list[Encounter], PreparedBatch]]:
        """Yields each batch with its search results. The next batch is searched while the caller handles the present batch."""
        if tracing() is not None:  # a trace needs its steps in order
            yield from ((batch, self.search(batch, across)) for batch in batches)
            return
        with ThreadPoolExecutor(1, "biodedup-ahead") as pool:
            before: tuple[list[Encounter], Future[PreparedBatch]] | None = None
            for batch in chain(batches, [None]):
                following = None if batch is None else (batch, pool.submit(self.search, batch, across))
                if before is not None:
                    yield before[0], before[1].result()
                before = following

    # the commit -------------------------------------------------------------------------------------------------

    def commit(self, prepared: PreparedBatch, approve: Callable[[Transaction], None] | None = None) -> list[Answer]:
        """Decides on searched encounters and commits the decisions. Returns one answer for each encounter. approve: called in the
        transaction of a replacement."""
        if prepared.waiting is not None:
            waiting = prepared.waiting
            waiting.call, waiting.approve = current_call(), approve
            self._commit(waiting)
            prepared.fresh = frozenset(prepared.places[i] for i in waiting.fresh)
            each = zip(prepared.places, waiting.probes, waiting.seen.found, waiting.answers, strict=True)
            for i, probe, found, answer in each:
                prepared.answers[i] = answer
                if isinstance(answer, Decision):
                    self._log.decided(waiting.operation, answer)
                if (steps := tracing()) is not None and isinstance(answer, Decision):
                    record_candidates(steps, probe.templates, answer, found.comparisons, self._gallery.templates_of)
        return [answer for answer in prepared.answers if answer is not None]

    def _commit(self, call: _Waiting) -> None:
        """Group commit: the call that gets the lock first decides and commits for all calls that wait."""
        with self._waiting_lock:
            self._waiting.append(call)
        with self._gallery.lock:
            if not call.done:
                group: list[_Waiting] = []
                try:
                    with untraced(), self._gallery.transaction() as transaction:  # the probes belong to several callers
                        group = self._all_waiting()  # taken last: more calls arrive while other front-ends write
                        for waiting in group:
                            self._decide_all(transaction, waiting)
                except BaseException as error:
                    group = group or self._all_waiting()
                    for waiting in group:
                        waiting.error = _for_waiting(error)
                    if not isinstance(error, BiodedupError):
                        raise
                finally:
                    for waiting in group:
                        waiting.done = True
        if call.error is not None:
            raise call.error

    def _all_waiting(self) -> list[_Waiting]:
        """Returns the calls that wait, and empties the queue."""
        with self._waiting_lock:
            group, self._waiting = self._waiting, []
        return group

    def _decide_all(self, transaction: Transaction, call: _Waiting) -> None:
        added = self._searches.compared_with_added(call.probes, call.seen, transaction.snapshot())
        each = zip(call.probes, call.seen.found, call.digests, added, strict=True)
        for i, (probe, found, digest, of_added) in enumerate(each):
            try:
                answer = earlier_answer(transaction.answer, probe.encounter, digest, transaction.snapshot)
                if answer is None:
                    request = Request(call.replaces, tuple(probe.encounter.groups), call.seen.across, call.reason)
                    required = self._decider.policy().required
                    decision = self.decide(
                        transaction, probe, found, call.seen, request, required=required, added=of_added
                    )
                    if call.approve is not None:
                        call.approve(transaction)
                    answer = self.record(transaction, probe, decision, digest, request)
                    call.fresh.append(i)
                    if call.call is not None:
                        call.call.carried_out(transaction, call.operation, answer)
                call.answers.append(answer)
            except CallerError as error:
                call.answers.append(error)

    def decide(
        self,
        transaction: Transaction,
        probe: Probe,
        found: CandidateSet,
        seen: SearchSnapshot,
        request: Request,
        case: Case | None = None,
        *,
        required: Sequence[str] = (),
        same: Collection[int] = (),
        added: Ranked | None = None,
    ) -> Decision:
        """Decides on a probe inside the transaction, so that no row can be added between the search and the commit.

        case: the open case that is decided again, if any. required: as in `Policy`. same: rows that a person judged to be of the same
        person as the case. If the subject still has one of these rows, an update needs no verification. added: the result of
        `BatchedSearch.compared_with_added`.
        """
        now = transaction.snapshot()
        subject_rows = now.rows_under(probe.subject_id)
        if subject_rows and not request.replaces:
            raise exists(probe.subject_id)
        if not subject_rows and request.replaces:
            raise UnknownSubject(f"subject {probe.subject_id!r} is not enrolled; enrol it, there is nothing to update")
        check_models(probe.templates, transaction.models)
        keeps = now.best_templates(probe.subject_id) if request.replaces and not request.reason and required else None
        usable = probe.templates.keys() | (keeps or {}).keys()  # an update keeps columns without a new capture
        if lacks := shortfall(required, usable, probe.refusals, probe.missing):
            return self._decider.incomplete(probe, lacks, now, version=transaction.version)
        own = subject_rows + now.pending_under(probe.subject_id)  # every row under the same subject_id
        different = now.different.get(case.row, ()) if case is not None and case.row is not None else ()
        found = self._searches.search_since(probe, found, seen, now, {*own, *different}, added)
        decider = self._decider.with_comparer(seen.searcher.comparer)
        decision = decider.decide(probe, found, now, version=transaction.version, own=own, different=different)
        if request.reason:
            decision = replace(decision, replacement=request.reason)
        # a replacement applies to the rows at the time of the request, not to a later enrolment under the same id
        enrolled_anew = case is not None and case.row is not None and min(subject_rows, default=-1) > case.row
        if not request.replaces or (request.reason and not enrolled_anew) or not set(same).isdisjoint(subject_rows):
            return decision
        return decider.confirmed(decision, probe, now, subject_rows)

    def record(
        self, transaction: Transaction, probe: Probe, decision: Decision, digest: bytes, request: Request
    ) -> Decision:
        """Stages a new decision and its effect: `unique` adds a row, `review` opens a case."""
        encounter_id = probe.encounter.encounter_id or self._new_id()
        decision = replace(decision, encounter_id=encounter_id)
        if decision.outcome == "unique":
            if request.reason:
                transaction.remove(probe.subject_id)
            if request.replaces and not request.reason:
                transaction.add_encounter(probe.subject_id, probe.templates, encounter_id, request.groups)
                self.thin_out(transaction, probe.subject_id)
            else:
                transaction.add(probe.subject_id, probe.templates, encounter_id, request.groups)
        elif decision.outcome == "review":
            transaction.open_case(probe.subject_id, probe.templates, encounter_id, request, similar_cases(decision))
        transaction.record(encounter_id, StoredDecision(digest, decision.outcome, to_json(decision)))
        return decision

    def thin_out(self, transaction: Transaction, subject_id: str) -> None:
        """Stages the removal of redundant rows of a subject that has more than encounters_max rows (`kept_rows`)."""
        now = transaction.snapshot()
        rows = now.rows_under(subject_id)
        if len(rows) > self._encounters_max:
            kept = kept_rows(now, rows, self._encounters_max)
            transaction.remove_rows(sorted(set(rows) - set(kept)))


def _for_waiting(error: BaseException) -> BiodedupError:
    """Returns the error for the other calls of a group whose commit failed."""
    if isinstance(error, BiodedupError):
        return type(error)(str(error))
    if isinstance(error, MemoryError):
        return out_of_memory(error)
    return StorageUnavailable(
        f"the commit was interrupted ({type(error).__name__}); nothing was acknowledged; send it again"
    )
