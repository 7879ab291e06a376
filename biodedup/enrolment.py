"""Decided enrolment: encounters are searched for, and then settled and committed in one transaction.

Owns what lies between a search and its durable answer, and the queue of those who wait to commit. Never compares, never judges.

    seek (no lock) -> wait for the lock -> search what came since -> decide -> stage -> commit -> answer

1. The commit compares a probe with every row that its search had not seen, those of the same batch included.
2. Whoever gets the lock commits for all who wait: one sync of the disk acknowledges them all, or none.
3. A mistake of one caller is answered to that one; the others of the batch are settled all the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain

from biodedup.deciding import Decider
from biodedup.errors import BiodedupError, CallerError, StorageUnavailable, UnknownSubject
from biodedup.gallery.answers import answered_before, digest_of, to_json
from biodedup.gallery.cases import Request
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.tail import Answer
from biodedup.gallery.transaction import Transaction, exists
from biodedup.match.pairs import record_candidates
from biodedup.memory import out_of_memory
from biodedup.probes import Preparer, Probe, check_models, require_subject
from biodedup.search.rescore import Found
from biodedup.searches import Searches, Seen
from biodedup.trace import tracing, untraced
from biodedup.values import Decision, Encounter


@dataclass(eq=False)
class _Waiting:
    """Probes of one caller that wait to be settled. replaces: updates, not new subjects."""

    probes: Sequence[Probe]
    digests: Sequence[bytes]
    seen: Seen
    replaces: bool
    answers: list[Decision | CallerError] = field(default_factory=list)
    error: BiodedupError | None = None
    done: bool = False


@dataclass(eq=False)
class Sought:
    """Encounters with the answers known so far. waiting: those that are to be settled, places: where they stand; None: nobody is."""

    answers: list[Decision | CallerError | None]
    places: tuple[int, ...] = ()
    waiting: _Waiting | None = None


class Enrolment:
    """Enrols and updates subjects of one gallery. new_id: fresh identifiers, for encounters that have none. Thread-safe."""

    def __init__(
        self,
        gallery: Gallery,
        preparer: Preparer,
        searches: Searches,
        decider: Decider,
        new_id: Callable[[], str],
    ) -> None:
        self._gallery = gallery
        self._preparer = preparer
        self._searches = searches
        self._decider = decider
        self._new_id = new_id
        self._waiting: list[_Waiting] = []
        self._waiting_lock = threading.Lock()

    # before the lock --------------------------------------------------------------------------------------------

    def seek(self, encounters: Sequence[Encounter], across: bool, *, replaces: bool = False) -> Sought:
        """Prepares encounters, and searches the gallery as it is."""
        answers: list[Decision | CallerError | None] = [None] * len(encounters)
        digests = [digest_of(encounter, "update" if replaces else "enroll") for encounter in encounters]
        for i, encounter in enumerate(encounters):
            try:
                require_subject(encounter)
                answers[i] = answered_before(self._gallery.answer, encounter, digests[i])
            except CallerError as error:
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
            return Sought(answers)
        mine = list(probes.values())
        seen = self._searches.seek(mine, across=across)
        return Sought(answers, tuple(probes), _Waiting(mine, [digests[i] for i in probes], seen, replaces))

    def ahead(self, batches: Iterator[list[Encounter]], across: bool) -> Iterator[tuple[list[Encounter], Sought]]:
        """Each batch with what was found; the next one is searched while the caller has this one."""
        if tracing() is not None:  # a trace tells one thing after the other
            yield from ((batch, self.seek(batch, across)) for batch in batches)
            return
        with ThreadPoolExecutor(1, "biodedup-ahead") as pool:
            before: tuple[list[Encounter], Future[Sought]] | None = None
            for batch in chain(batches, [None]):
                following = None if batch is None else (batch, pool.submit(self.seek, batch, across))
                if before is not None:
                    yield before[0], before[1].result()
                before = following

    # the commit -------------------------------------------------------------------------------------------------

    def commit(self, sought: Sought) -> list[Decision | CallerError]:
        """Settles and commits what was searched for. One answer for each encounter."""
        if sought.waiting is not None:
            self._commit(sought.waiting)
            for i, probe, answer in zip(sought.places, sought.waiting.probes, sought.waiting.answers, strict=True):
                sought.answers[i] = answer
                if (steps := tracing()) is not None and isinstance(answer, Decision):
                    record_candidates(steps, probe.templates, answer, self._gallery.templates_of)
        return [answer for answer in sought.answers if answer is not None]

    def _commit(self, mine: _Waiting) -> None:
        """Whoever gets the lock first settles and commits for all who wait."""
        with self._waiting_lock:
            self._waiting.append(mine)
        with self._gallery.lock:
            if not mine.done:
                with self._waiting_lock:
                    group, self._waiting = self._waiting, []
                try:
                    with untraced(), self._gallery.transaction() as transaction:  # probes of several callers
                        for one in group:
                            self._settle(transaction, one)
                except BaseException as error:
                    for one in group:
                        one.error = _for_waiting(error)
                    if not isinstance(error, BiodedupError):
                        raise
                finally:
                    for one in group:
                        one.done = True
        if mine.error is not None:
            raise mine.error

    def _settle(self, transaction: Transaction, one: _Waiting) -> None:
        for probe, found, digest in zip(one.probes, one.seen.found, one.digests, strict=True):
            try:
                answer = answered_before(transaction.answer, probe.encounter, digest)
                if answer is None:
                    decision = self.decide(transaction, probe, found, one.seen, replaces=one.replaces)
                    asked = Request(one.replaces, tuple(probe.encounter.groups), one.seen.across)
                    answer = self.record(transaction, probe, decision, digest, asked)
                one.answers.append(answer)
            except CallerError as error:
                one.answers.append(error)

    def decide(self, transaction: Transaction, probe: Probe, found: Found, seen: Seen, *, replaces: bool) -> Decision:
        """Decides inside the transaction, so that no row can slip in between the search and the commit."""
        now = transaction.snapshot()
        replaced = now.row_of(probe.subject_id)
        if replaced is not None and not replaces:
            raise exists(probe.subject_id)
        if replaced is None and replaces:
            raise UnknownSubject(f"subject {probe.subject_id!r} is not enrolled; enrol it, there is nothing to update")
        check_models(probe.templates, transaction.models)
        found = self._searches.completed(probe, found, seen, now)
        return self._decider.decide(probe, found, now, version=transaction.version, besides=replaced)

    def record(
        self, transaction: Transaction, probe: Probe, decision: Decision, digest: bytes, asked: Request
    ) -> Decision:
        """Stages a new decision, and what follows from it."""
        encounter_id = probe.encounter.encounter_id or self._new_id()
        decision = replace(decision, encounter_id=encounter_id)
        if decision.outcome == "unique":
            write(transaction, probe, encounter_id)
        elif decision.outcome == "review":
            transaction.hold(encounter_id, probe.templates.values(), asked)
        transaction.record(encounter_id, Answer(digest, decision.outcome, to_json(decision)))
        return decision


def write(transaction: Transaction, probe: Probe, encounter_id: str) -> None:
    """Stages a subject, or replaces who is enrolled."""
    if transaction.snapshot().row_of(probe.subject_id) is not None:
        transaction.remove(probe.subject_id)
    transaction.add(probe.subject_id, probe.templates, encounter_id, probe.encounter.groups)


def _for_waiting(error: BaseException) -> BiodedupError:
    """What those hear whose decisions were to be committed by another thread that failed."""
    if isinstance(error, BiodedupError):
        return type(error)(str(error))
    if isinstance(error, MemoryError):
        return out_of_memory(error)
    return StorageUnavailable(
        f"the commit was interrupted ({type(error).__name__}); nothing was acknowledged; send it again"
    )
