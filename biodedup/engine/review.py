"""Cases at work: an encounter that is disputed becomes one, and a person's verdict moves it on.

Owns the order of the steps. What a verdict means is `gallery/cases.py`; how the subject is enrolled after it, `enrolment.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from biodedup.engine.decide import Decider
from biodedup.engine.enrol import Enrolment
from biodedup.engine.prepare import Preparer, Probe, check_models, in_memory, require_subject
from biodedup.engine.search import Searches, Seen
from biodedup.errors import CallerError, InvalidInput, UnknownSubject
from biodedup.gallery.answers import digest_of
from biodedup.gallery.cases import (
    Request,
    check_as_shown,
    closed,
    closes,
    different_rows,
    reconsidered,
    request_of,
    ruled,
    same_rows,
)
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.transaction import Transaction
from biodedup.search.searcher import Found
from biodedup.texts import KnownId
from biodedup.values import Case, Decision, Encounter, Ruling, Verdict


@dataclass(frozen=True, eq=False)
class Review:
    """The cases of one gallery. clock: the time in seconds, for verdicts. Thread-safe."""

    gallery: Gallery
    preparer: Preparer
    searches: Searches
    decider: Decider
    enrolment: Enrolment
    clock: Callable[[], float]

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
        """Opens a case for captures that look like somebody else's than the subject's."""
        require_subject(encounter)
        encounter = in_memory(encounter, self.preparer.config.capture)
        digest = digest_of(encounter)
        probe = self.preparer.probe(encounter)
        if not probe.templates:
            raise InvalidInput("no capture of the encounter can be used; a case needs one to judge")
        with self.gallery.transaction() as transaction:
            answer = self.enrolment.answered(transaction.answer, encounter, digest, transaction.snapshot())
            if answer is not None:
                return answer
            decision = self._disputed(transaction, probe)
            asked = Request(False, tuple(encounter.groups), False)
            return self.enrolment.record(transaction, probe, decision, digest, asked)

    def _disputed(self, transaction: Transaction, probe: Probe) -> Decision:
        """The decision `review`, with the subject alone as its candidate."""
        now = transaction.snapshot()
        own = now.rows_under(probe.subject_id)
        if not own:
            raise UnknownSubject(f"subject {probe.subject_id!r} is not enrolled; enrol it, there is nothing to dispute")
        check_models(probe.templates, transaction.models)
        decision = self.decider.decide(probe, Found(), now, version=transaction.version)
        return self.decider.disputed(replace(decision, reasons=()), probe, now, own)

    def adjudicate(self, judged: str | Case, ruling: Ruling, by: str, note: str, candidate: str | None) -> Decision:
        """Records a verdict. What it may enrol is compared first with all that is enrolled or waits by now; open cases that are linked
        with this one are decided again. judged: an encounter_id, or the case as a person saw it."""
        shown, encounter_id = (judged, judged.encounter_id) if isinstance(judged, Case) else (None, judged)
        case = self.case(encounter_id)
        wanted = ruled(case, ruling, candidate, by, 0.0, note)  # raises before anything is searched
        sought = self._sought([case] if any(not closes(verdict) for verdict in wanted) else [])
        if wanted:
            sought |= self._sought(self._open(self.gallery.case, case.linked))
        with self.gallery.transaction() as transaction:
            now = transaction.case(encounter_id)
            assert now is not None, "a case stays one"
            verdicts = ruled(now, ruling, candidate, by, self.clock(), note)
            if not verdicts:
                return now.decision
            if shown is not None and ruling != "recapture":
                check_as_shown(now, shown, candidate)
            transaction.judge(verdicts, different_rows(now, verdicts))
            if closes(verdicts[-1]):
                decision = closed(now, verdicts[-1])
            else:
                decision = self._decided_again(transaction, now, verdicts, sought)
            self._settle(transaction, now, decision, own=any(v.own for v in (*now.verdicts, *verdicts)))
            for other in self._open(transaction.case, now.linked):
                self._recheck(transaction, other, sought)
        return decision

    def _recheck(self, transaction: Transaction, case: Case, sought: dict[str, tuple[Probe, Seen]]) -> None:
        """A case that is linked with one that was decided: its candidates as they are by now. Where none is left it is settled."""
        try:
            decision = self._decided_again(transaction, case, (), sought)
        except CallerError:
            return  # it cannot be enrolled, which is told when a person decides it
        own = any(verdict.own for verdict in case.verdicts)
        if case.replaces and not own and not case.replacement:
            decision = replace(
                decision, outcome="review"
            )  # whether the captures are the subject's is for a person to say
        self._settle(transaction, case, decision, own=own)

    def _decided_again(
        self,
        transaction: Transaction,
        case: Case,
        verdicts: tuple[Verdict, ...],
        sought: dict[str, tuple[Probe, Seen]],
    ) -> Decision:
        if case.encounter_id not in sought:  # linked since; rare
            sought |= self._sought([case])
        probe, seen = sought[case.encounter_id]
        same = same_rows(case, verdicts)
        asked = replace(request_of(case), replaces=case.replaces or any(v.own for v in (*case.verdicts, *verdicts)))
        fresh = self.enrolment.decide(transaction, probe, seen.found[0], seen, asked, case, same=same)
        return reconsidered(case, verdicts, fresh)

    def _sought(self, cases: Iterable[Case]) -> dict[str, tuple[Probe, Seen]]:
        """encounter_id -> what a search of the gallery as it is finds for a case."""
        found = {}
        for case in cases:
            encounter = Encounter(
                KnownId(case.subject_id),
                case.decision.missing,
                encounter_id=KnownId(case.encounter_id),
                groups=tuple(map(KnownId, case.groups)),
            )
            probe = Probe(encounter, case.templates, case.decision.refusals)
            extra_k = len(case.decision.candidates) + len(case.judged) + 1  # and the case itself
            found[case.encounter_id] = probe, self.searches.seek([probe], across=case.across_positions, extra_k=extra_k)
        return found

    @staticmethod
    def _open(case_of: Callable[[str], Case | None], encounter_ids: Iterable[str]) -> list[Case]:
        cases = [case_of(encounter_id) for encounter_id in encounter_ids]
        return [case for case in cases if case is not None and not case.closed]

    def _settle(self, transaction: Transaction, case: Case, decision: Decision, *, own: bool) -> None:
        """Stages what follows from the decision on a case. own: its captures are the subject's, who is enrolled."""
        if decision.outcome == "unique":
            if case.replacement:
                transaction.remove(case.subject_id)
            transaction.release(case.encounter_id)
            if own or case.replaces:
                self.enrolment.thin_out(transaction, case.subject_id)
        elif decision.outcome != "review":
            transaction.withdraw(case.encounter_id)
        transaction.revise(case, decision)
