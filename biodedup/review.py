"""Cases at work: an encounter that is disputed becomes one, and a person's verdict moves it on.

Owns the order of the steps. What a verdict means is `gallery/cases.py`; how the subject is enrolled after it, `enrolment.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from biodedup.deciding import Decider
from biodedup.enrolment import Enrolment, write
from biodedup.errors import InvalidInput, UnknownSubject
from biodedup.gallery.answers import answered_before, digest_of
from biodedup.gallery.cases import Request, closed, closes, reconsidered, ruled
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.transaction import Transaction
from biodedup.match.compare import Comparer
from biodedup.match.judgement import BELIEVED
from biodedup.probes import Preparer, Probe, check_models, require_subject
from biodedup.search.rescore import Found, SnapshotRows
from biodedup.searches import Searches
from biodedup.texts import KnownId
from biodedup.values import Candidate, Case, Decision, Encounter, Kind, Ruling


@dataclass(frozen=True, eq=False)
class Review:
    """The cases of one gallery. clock: the time in seconds, for verdicts. Thread-safe."""

    gallery: Gallery
    preparer: Preparer
    comparer: Comparer
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
        digest = digest_of(encounter)
        probe = self.preparer.probe(encounter)
        if not probe.templates:
            raise InvalidInput("no capture of the encounter can be used; a case needs one to judge")
        with self.gallery.transaction() as transaction:
            answer = answered_before(transaction.answer, encounter, digest)
            if answer is not None:
                return answer
            decision = self._disputed(transaction, probe)
            asked = Request(False, tuple(encounter.groups), False)
            return self.enrolment.record(transaction, probe, decision, digest, asked)

    def _disputed(self, transaction: Transaction, probe: Probe) -> Decision:
        """The decision `review`, with the subject alone as its candidate."""
        now = transaction.snapshot()
        row = now.row_of(probe.subject_id)
        if row is None:
            raise UnknownSubject(f"subject {probe.subject_id!r} is not enrolled; enrol it, there is nothing to dispute")
        check_models(probe.templates, transaction.models)
        compared = self.comparer.compare(probe.templates, SnapshotRows(now), [row])
        decision = self.decider.decide(probe, Found(compared), now, version=transaction.version)
        (own,) = decision.candidates or (Candidate(probe.subject_id, 1, 0.0, False, ()),)
        kind: Kind = "another_person" if own.kind in ("", *BELIEVED) else own.kind
        return replace(
            decision,
            outcome="review",
            candidates=(replace(own, kind=kind),),
            compared=len(decision.candidates),
            reasons=tuple(dict.fromkeys(("another_person", kind))),
        )

    def adjudicate(self, encounter_id: str, ruling: Ruling, by: str, note: str, candidate: str | None) -> Decision:
        """Records a verdict. Where it may close the case by enrolling the subject, everybody enrolled by now is searched first."""
        case = self.case(encounter_id)
        wanted = ruled(case, ruling, candidate, by, 0.0, note)  # raises before anybody is searched for
        probe = Probe(
            Encounter(
                KnownId(case.subject_id),
                case.decision.missing,
                encounter_id=KnownId(encounter_id),
                groups=tuple(map(KnownId, case.groups)),
            ),
            case.templates,
            case.decision.refusals,
        )
        seen = None
        if any(verdict.ruling == "different" or not closes(verdict) for verdict in wanted):
            seen = self.searches.seek([probe], across=case.across_positions, besides=len(case.decision.candidates))
        with self.gallery.transaction() as transaction:
            now = transaction.case(encounter_id)
            assert now is not None, "a case stays one"
            verdicts = ruled(now, ruling, candidate, by, self.clock(), note)
            if not verdicts:
                return now.decision
            transaction.judge(verdicts)
            if closes(verdicts[-1]):
                decision = closed(now, verdicts[-1])
            else:
                assert seen is not None, "a verdict that does not close a case is searched for"
                own = any(v.own for v in (*now.verdicts, *verdicts))  # the subject is enrolled, and it is theirs
                replaces = own or case.replaces
                fresh = self.enrolment.decide(transaction, probe, seen.found[0], seen, replaces=replaces)
                decision = reconsidered(now, verdicts, fresh)
                if decision.outcome == "unique":
                    if own:
                        _complete(transaction, probe)
                    else:
                        write(transaction, probe, encounter_id)
            transaction.revise(now, decision)
        return decision


def _complete(transaction: Transaction, probe: Probe) -> None:
    """Gives an enrolled subject the templates of columns that it lacks. What it has stays: the verdict does not say which is better."""
    now = transaction.snapshot()
    row = now.row_of(probe.subject_id)
    assert row is not None, "`Enrolment.decide` has seen to it"
    enrolled = now.templates(row)
    if probe.templates.keys() <= enrolled.keys():
        return
    (encounter_id,), (groups,) = now.encounter_ids([row]), now.groups([row])
    transaction.remove(probe.subject_id)
    transaction.add(probe.subject_id, {**probe.templates, **enrolled}, encounter_id, groups)
