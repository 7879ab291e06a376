"""Cases: encounters that a person must judge, and the verdicts on them.

Owns how a case is stored, which verdicts are valid, and the decision that follows from a verdict. Never searches and never commits.

1. A case is open while it has a pending row, which searches include. It lists candidates. A person judges each candidate, or all at once.
2. `same` closes a case as a duplicate, `recapture` as refused. `different` closes it when no candidate is left, neither in its list nor in
   a new search of all enrolled subjects and open cases. Otherwise the case stays open, with the candidates of that search.
   If the candidate is the subject that the encounter itself names (an *own* candidate), the meaning is reversed: `different` closes the
   case as refused, and `same` only removes the candidate.
3. The same verdict again changes nothing. Another verdict on the same candidate is a conflict.
4. A verdict binds rows: the row of the case, and the compared rows of the candidate. If the candidate gets a new row, it is judged again.
5. Two open cases are linked if one of them is a candidate of the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace

from biodedup.errors import EncounterConflict, GalleryDamaged, InvalidInput
from biodedup.gallery.answers import AnswerOf, StoredDecision, answered_before, from_json, parsed
from biodedup.gallery.catalogue.protocol import Catalogue
from biodedup.gallery.snapshot import Snapshot
from biodedup.values import Candidate, Case, Decision, Encounter, Refusal, Ruling, Verdict, strong

RECAPTURE = Refusal("encounter", "recapture", "the verdict on the case asks for new captures")
ANOTHER_PERSON = Refusal(
    "encounter", "another_person", "the verdict on the case is that the captures are not the subject's"
)


@dataclass(frozen=True)
class Request:
    """The request of an encounter in review. replaces: whether it updates an enrolled subject; across: whether all finger positions are
    compared with each other; reason: why it replaces all rows of the subject, "" if it adds a row."""

    replaces: bool
    groups: tuple[str, ...]
    across: bool
    reason: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


def request_of(case: Case) -> Request:
    """The request of a case."""
    return Request(case.replaces, case.groups, case.across_positions, case.replacement)


def similar_cases(decision: Decision) -> tuple[str, ...]:
    """The open cases among the candidates of a decision."""
    return tuple(dict.fromkeys(candidate.case for candidate in decision.candidates if candidate.case))


def current_answer(catalogue: Catalogue, encounter_id: str, first: StoredDecision) -> StoredDecision:
    """The present answer to an encounter. first: the first answer. Only the answer of a case can change."""
    if first.outcome != "review":
        return first
    stored = catalogue.case(encounter_id)
    return first if stored is None or stored[1] is None else StoredDecision.read(first.digest, stored[1])


def earlier_answer(
    answer_of: AnswerOf, encounter: Encounter, digest: bytes, snapshot: Callable[[], Snapshot]
) -> Decision | None:
    """The decision on an encounter that was sent before, or None. Its reasons include `removed` if the subject was removed since.

    snapshot: called after the answer was read, so that the snapshot includes the row of an answer that another thread has just given.
    """
    answer = answered_before(answer_of, encounter, digest)
    if answer is None or answer.outcome != "unique" or answer.subject_id is None:
        return answer
    return answer if snapshot().rows_under(answer.subject_id) else replace(answer, reasons=(*answer.reasons, "removed"))


def read_case(catalogue: Catalogue, snapshot: Snapshot, encounter_id: str) -> Case | None:
    """A case, open or closed; None for an encounter that never went to review."""
    answer = snapshot.answer(encounter_id)
    if answer is None or answer.outcome != "review":
        return None
    first = from_json(answer.text)
    if first.subject_id is None:
        raise GalleryDamaged("a case has no subject; run `biodedup doctor`")
    stored = catalogue.case(encounter_id)
    if stored is None:  # from a release that did not store requests
        request = Request(snapshot.row_of(first.subject_id) is not None, (), False)
    else:
        fields = json.loads(stored[0])
        request = Request(**(fields | {"groups": tuple(fields["groups"])}))
    decision = first if stored is None or stored[1] is None else from_json(stored[1])
    row = snapshot.pending_row_of.get(encounter_id)
    linked: tuple[str, ...] = ()
    if decision.outcome == "review":
        present = (_present_candidate(c, snapshot, own=c.subject_id == first.subject_id) for c in decision.candidates)
        decision = replace(decision, candidates=tuple(c for c in present if c is not None))
        linked = tuple(sorted(catalogue.linked(encounter_id) & snapshot.pending_row_of.keys()))
    return Case(
        encounter_id=encounter_id,
        subject_id=first.subject_id,
        opened_at=first.decided_at,
        decision=decision,
        verdicts=tuple(catalogue.verdicts(encounter_id)),
        replaces=request.replaces,
        across_positions=request.across,
        groups=request.groups,
        templates=catalogue.held(encounter_id) if row is None else snapshot.templates(row),
        row=row,
        linked=linked,
        replacement=request.reason,
        judged=frozenset() if row is None else frozenset(snapshot.different.get(row, ())),
    )


def _present_candidate(candidate: Candidate, snapshot: Snapshot, *, own: bool) -> Candidate | None:
    """The present state of a candidate: an open case may have been enrolled since. None if it was removed. own: see the module's rule 2."""
    if not candidate.rows:  # from an older format
        candidate = replace(candidate, rows=tuple(snapshot.rows_under(candidate.subject_id)))
    cases = [snapshot.pending.get(row, "") for row in candidate.rows if snapshot.is_present(row)]
    if not cases:  # removed: only an own candidate stays, because a person can still judge it
        return candidate if own and not candidate.case else None
    return candidate if cases[0] == candidate.case else replace(candidate, case=cases[0])


def pairs_of_old_verdicts(verdicts: Iterable[Verdict], snapshot: Snapshot) -> list[tuple[int, int]]:
    """The pairs of rows for verdicts of an older format, which name only subjects. A pair is a row of the case and the newest row of the
    candidate, if that row was enrolled before the verdict. A candidate that was updated since is judged again."""
    pairs = []
    for verdict in verdicts:
        if verdict.ruling != "different" or verdict.candidate is None or verdict.own:
            continue
        case_rows = [
            row
            for row in (snapshot.row_of(verdict.subject_id), snapshot.pending_row_of.get(verdict.encounter_id))
            if row is not None and snapshot.encounter_ids([row]) == [verdict.encounter_id]
        ]
        candidate_row = snapshot.row_of(verdict.candidate)
        if candidate_row is not None and _enrolled_at(snapshot, candidate_row) <= verdict.at:
            pairs += [(row, candidate_row) for row in case_rows]
    return pairs


def _enrolled_at(snapshot: Snapshot, row: int) -> float:
    """The time when the encounter of a row was decided, in seconds since 1970; 0 if it was loaded without an encounter."""
    (encounter_id,) = snapshot.encounter_ids([row])
    answer = snapshot.answer(encounter_id) if encounter_id else None
    return 0.0 if answer is None else float(parsed(answer.text).get("decided_at", 0.0))


def different_rows(case: Case, verdicts: Iterable[Verdict]) -> list[tuple[int, int]]:
    """The pairs of rows that belong to two people by these verdicts on a case."""
    judged = {v.candidate for v in verdicts if v.ruling == "different" and not v.own}
    if case.row is None:
        return []
    return [(case.row, row) for c in case.decision.candidates if c.key in judged for row in c.rows]


def same_rows(case: Case, verdicts: Iterable[Verdict]) -> frozenset[int]:
    """The rows of the encounter's own subject that a person has judged to be of the same person as the case. verdicts: the new verdicts."""
    is_own_judged = any(v.own and v.ruling == "same" for v in verdicts)
    judged = [*case.decision.cleared, *(case.decision.candidates if is_own_judged else ())]
    return frozenset(row for candidate in judged if case.is_own(candidate) for row in candidate.rows)


def new_verdicts(
    case: Case, ruling: Ruling, candidate: str | None, by: str, at: float, note: str
) -> tuple[Verdict, ...]:
    """The verdicts to record; empty if the same verdict was given before.

    candidate: the subject_id of an enrolled candidate, or the encounter_id of a candidate that is an open case. None means the only
    candidate; with `different`, all undecided candidates; with `same` sent again, the candidate of the first time. Raises EncounterConflict
    after another verdict, InvalidInput for an unknown candidate, and if it is not clear which candidate is meant.
    """

    def verdict(candidate: str | None) -> Verdict:
        return Verdict(
            encounter_id=case.encounter_id,
            subject_id=case.subject_id,
            candidate=candidate,
            ruling=ruling,
            by=by,
            at=at,
            note=note,
        )

    verdict(candidate)  # validates
    if ruling == "recapture":
        candidate = None
    undecided = [c.key for c in case.undecided]
    before = [
        v
        for v in case.verdicts
        if (
            v.ruling == ruling == "same"
            if candidate is None
            else v.candidate == candidate and candidate not in undecided
        )
    ]
    earlier = before[-1] if before else case.decision.adjudicated
    if earlier is not None:
        if earlier.ruling == ruling and (before or candidate is None):
            return ()
        raise EncounterConflict(
            f"encounter {case.encounter_id!r} was judged {earlier.ruling} by {earlier.by}; a verdict is final; enrol again with "
            "another encounter_id"
        )
    names = [c.key for c in case.decision.candidates]
    if candidate is not None and candidate not in names:
        raise InvalidInput(
            f"subject {candidate!r} is not a candidate of encounter {case.encounter_id!r}; its candidates are "
            f"{', '.join(names) or 'none'}"
        )
    if ruling == "recapture":
        return (verdict(None),)
    if ruling == "different":
        names_now = [candidate] if candidate is not None else undecided
        _refuse_ambiguous(case, names_now)
        return tuple(map(verdict, names_now)) or (verdict(None),)
    if candidate is None and len(undecided) != 1:
        raise InvalidInput(
            f"encounter {case.encounter_id!r} has {len(undecided)} candidates; name the candidate that it is a duplicate of: "
            f"{', '.join(undecided or names) or 'none is left'}"
        )
    _refuse_ambiguous(case, [candidate or undecided[0]])
    return (verdict(candidate or undecided[0]),)


def _refuse_ambiguous(case: Case, names: Iterable[str]) -> None:
    """Raises InvalidInput if a name is both the encounter_id of an open case and the id of a subject of this case."""
    subjects = {case.subject_id, *(c.subject_id for c in case.decision.candidates if not c.case)}
    for candidate in case.decision.candidates:
        if candidate.case in subjects and candidate.case in names:
            raise InvalidInput(
                f"{candidate.case!r} names a subject and an open case, both in encounter {case.encounter_id!r}; "
                f"decide the case {candidate.case!r} first"
            )


def check_as_shown(case: Case, shown: Case, candidate: str | None) -> None:
    """Raises EncounterConflict if the judged candidates have changed since the case was shown. candidate: as in `new_verdicts`."""

    def rows_of(judged: Case) -> dict[str, frozenset[int]]:
        return {c.key: frozenset(c.rows) for c in judged.undecided if candidate in (None, c.key)}

    if rows_of(case) != rows_of(shown):
        which = "its candidates have" if candidate is None else f"candidate {candidate!r} has"
        raise EncounterConflict(
            f"encounter {case.encounter_id!r}: {which} changed since the case was shown; look at the case again"
        )


def closes(verdict: Verdict) -> bool:
    """Whether this verdict closes the case, whatever other candidates there are."""
    return verdict.ruling == "recapture" or (verdict.ruling == "same") != verdict.own


def closing_decision(case: Case, verdict: Verdict) -> Decision:
    """The decision after a verdict that closes a case."""
    if verdict.ruling == "same":
        return replace(case.decision, outcome="duplicate", adjudicated=verdict)
    refusals = (*case.decision.refusals, RECAPTURE if verdict.ruling == "recapture" else ANOTHER_PERSON)
    return replace(case.decision, outcome="refused", refusals=refusals, adjudicated=verdict)


def reconsidered(case: Case, verdicts: tuple[Verdict, ...], fresh: Decision) -> Decision:
    """The decision after a verdict that does not close the case by itself.

    fresh: a new decision, on all present rows but those that were judged different. The own subject is among its candidates if it must be
    judged (again). Since a person has looked, the outcome is `unique` if no candidate is left and the search was complete.
    """
    judged = {v.candidate for v in (*case.verdicts, *verdicts) if not closes(v)}
    present = {c.key: c for c in (*fresh.candidates, *fresh.cleared)}
    known = {c.key: c for c in (*case.decision.cleared, *case.decision.candidates)} | present
    just_judged = {v.candidate for v in verdicts}
    undecided = {c.key: known[c.key] for c in case.undecided if c.key not in just_judged}
    undecided |= {c.key: c for c in strong(fresh)}
    cleared_by_rows = {c.key for c in fresh.cleared}
    cleared = _ranked(c for key, c in known.items() if key in judged | cleared_by_rows and key not in undecided)
    left = _ranked(undecided.values())
    if not left and not fresh.incomplete:
        return replace(fresh, outcome="unique", cleared=cleared, adjudicated=verdicts[-1] if verdicts else None)
    return replace(
        fresh,
        outcome="review",
        candidates=left or fresh.candidates,
        cleared=cleared,
        review_db=min(fresh.review_db, case.decision.review_db),  # so that earlier candidates stay in review
    )


def _ranked(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    ordered = sorted(candidates, key=lambda c: (-c.score_db, c.rank, c.subject_id))
    return tuple(replace(c, rank=rank) for rank, c in enumerate(ordered, start=1))
