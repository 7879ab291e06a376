"""Review: opens cases for disputed encounters, and applies the verdicts of people to cases.

Owns the order of the steps. `gallery/cases.py` says what a verdict means; `enrol.py` decides again and enrols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from biodedup.engine.callers.audit import carried_out
from biodedup.engine.decide import Decider
from biodedup.engine.enrol import Enrolment
from biodedup.engine.log import EngineLog
from biodedup.engine.prepare import Preparer, Probe, check_models, in_memory, require_subject
from biodedup.engine.search import BatchedSearch, SearchSnapshot
from biodedup.errors import CallerError, InvalidInput, UnknownSubject
from biodedup.gallery.answers import digest_of
from biodedup.gallery.cases import (
    Request,
    check_as_shown,
    closes,
    closing_decision,
    different_rows,
    earlier_answer,
    new_verdicts,
    reconsidered,
    request_of,
    same_rows,
)
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.transaction import Transaction
from biodedup.search.searcher import CandidateSet
from biodedup.texts import KnownId
from biodedup.values import Case, Decision, Encounter, Ruling, Verdict


@dataclass(frozen=True, eq=False)
class Review:
    """The cases of one gallery. clock: the time in seconds, for verdicts. Thread-safe."""

    gallery: Gallery
    preparer: Preparer
    searches: BatchedSearch
    decider: Decider
    enrolment: Enrolment
    clock: Callable[[], float]
    log: EngineLog

    def open_cases(self) -> Iterator[Case]:
        """In the order of their encounter_ids."""
        for encounter_id in self.gallery.open_cases():
            case = self.gallery.case(encounter_id)
            if case is not None and not case.closed:
                yield case

    def case(self, encounter_id: str) -> Case:
        """Open or closed. Raises InvalidInput for an encounter that never went to review."""
        case = self.gallery.case(encounter_id)
        if case is None:
            raise InvalidInput(f"encounter {encounter_id!r} is no case: it is unknown, or was decided without review")
        return case

    def dispute(self, encounter: Encounter) -> Decision:
        """Opens a case for captures that may be of another person than their subject."""
        require_subject(encounter)
        encounter = in_memory(encounter, self.preparer.config.capture)
        digest = digest_of(encounter)
        probe = self.preparer.probe(encounter)
        if not probe.templates:
            raise InvalidInput("no capture of the encounter can be used; a case needs one to judge")
        with self.gallery.transaction() as transaction:
            answer = earlier_answer(transaction.answer, encounter, digest, transaction.snapshot)
            if answer is not None:
                return answer
            decision = self._disputed(transaction, probe)
            request = Request(False, tuple(encounter.groups), False)
            decision = self.enrolment.record(transaction, probe, decision, digest, request)
            carried_out(outcome=decision.outcome, at=decision.decided_at)
        self.log.decided("dispute", decision)
        return decision

    def _disputed(self, transaction: Transaction, probe: Probe) -> Decision:
        """The decision `review`, with the subject as its only candidate."""
        now = transaction.snapshot()
        own = now.rows_under(probe.subject_id)
        if not own:
            raise UnknownSubject(f"subject {probe.subject_id!r} is not enrolled; enrol it, there is nothing to dispute")
        check_models(probe.templates, transaction.models)
        decision = self.decider.decide(probe, CandidateSet(), now, version=transaction.version)
        return self.decider.disputed(replace(decision, reasons=()), probe, now, own)

    def adjudicate(
        self,
        judged: str | Case,
        ruling: Ruling,
        by: str,
        note: str,
        candidate: str | None,
        *,
        approve: Callable[[Transaction], None],
    ) -> Decision:
        """Records a verdict, and decides again on the case and on the open cases that are linked with it.

        Before a subject is enrolled, it is compared with everything that is enrolled or in an open case by now. judged: an encounter_id,
        or the case as a person saw it; approve: is called in the transaction of the verdict.
        """
        shown, encounter_id = (judged, judged.encounter_id) if isinstance(judged, Case) else (None, judged)
        case = self.case(encounter_id)
        wanted = new_verdicts(case, ruling, candidate, by, 0.0, note)  # raises before anything is searched
        searched = self._search_cases([case] if wanted and not any(map(closes, wanted)) else [])
        if wanted:
            searched |= self._search_cases(self._open(self.gallery.case, case.linked))
        with self.gallery.transaction() as transaction:
            now = transaction.case(encounter_id)
            assert now is not None, "a case is never deleted"
            verdicts = new_verdicts(now, ruling, candidate, by, self.clock(), note)
            if not verdicts:
                return now.decision
            if shown is not None and ruling != "recapture":
                check_as_shown(now, shown, candidate)
            approve(transaction)
            transaction.judge(verdicts, different_rows(now, verdicts))
            closing = next(filter(closes, verdicts), None)  # of all candidates, the subject itself may be any
            if closing is not None:
                decision = closing_decision(now, closing)
            else:
                decision = self._decide_again(transaction, now, verdicts, searched)
            self._settle(transaction, now, decision, own=any(v.own for v in (*now.verdicts, *verdicts)))
            carried_out(outcome=decision.outcome, subjects=(now.subject_id,), at=verdicts[0].at)
            linked = [self._recheck(transaction, other, searched) for other in self._open(transaction.case, now.linked)]
        self.log.judged(ruling, decision, sum(linked))
        return decision

    def _recheck(self, transaction: Transaction, case: Case, searched: dict[str, tuple[Probe, SearchSnapshot]]) -> bool:
        """Decides again on an open case that is linked with the judged one. Without a candidate left it is closed; whether it was."""
        try:
            decision = self._decide_again(transaction, case, (), searched)
        except CallerError:
            return False  # it cannot be enrolled; the error is raised when a person decides on it
        own = any(verdict.own for verdict in case.verdicts)
        # a person has to judge whether the captures are the subject's, and captures that could not be compared with anything
        unseen = not case.verdicts and "nothing_in_common" in decision.reasons
        if unseen or (case.replaces and not own and not case.replacement):
            decision = replace(decision, outcome="review")
        self._settle(transaction, case, decision, own=own)
        return decision.outcome != "review"

    def _decide_again(
        self,
        transaction: Transaction,
        case: Case,
        verdicts: tuple[Verdict, ...],
        searched: dict[str, tuple[Probe, SearchSnapshot]],
    ) -> Decision:
        if case.encounter_id not in searched:  # linked since; rare
            searched |= self._search_cases([case])
        probe, seen = searched[case.encounter_id]
        same = same_rows(case, verdicts)
        request = replace(request_of(case), replaces=case.replaces or any(v.own for v in (*case.verdicts, *verdicts)))
        fresh = self.enrolment.decide(transaction, probe, seen.found[0], seen, request, case, same=same)
        return reconsidered(case, verdicts, fresh)

    def _search_cases(self, cases: Iterable[Case]) -> dict[str, tuple[Probe, SearchSnapshot]]:
        """encounter_id -> the probe of a case, and a search of the newest snapshot for it."""
        searched = {}
        for case in cases:
            encounter = Encounter(
                KnownId(case.subject_id),
                case.decision.missing,
                encounter_id=KnownId(case.encounter_id),
                groups=tuple(map(KnownId, case.groups)),
            )
            probe = Probe(encounter, case.templates, case.decision.refusals)
            extra_k = sum(len(candidate.rows) for candidate in case.decision.candidates) + len(case.judged)
            extra_k += self.gallery.snapshot().count_under(case.subject_id)  # the case itself is one of them
            seen = self.searches.search([probe], across=case.across_positions, extra_k=extra_k)
            searched[case.encounter_id] = probe, seen
        return searched

    @staticmethod
    def _open(case_of: Callable[[str], Case | None], encounter_ids: Iterable[str]) -> list[Case]:
        cases = [case_of(encounter_id) for encounter_id in encounter_ids]
        return [case for case in cases if case is not None and not case.closed]

    def _settle(self, transaction: Transaction, case: Case, decision: Decision, *, own: bool) -> None:
        """Stages the effect of the decision on a case. own: a person judged that the captures are the enrolled subject's."""
        if decision.outcome == "unique":
            if case.replacement:
                transaction.remove(case.subject_id)
            transaction.enrol_case(case.encounter_id)
            if own or case.replaces:
                self.enrolment.thin_out(transaction, case.subject_id)
        elif decision.outcome != "review":
            transaction.remove_case(case.encounter_id)
        transaction.revise(case, decision)
