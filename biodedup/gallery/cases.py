"""Cases: encounters that a person has to judge, and the verdicts on them.

Owns how a case is stored, which verdicts may follow one another, and the decision that a verdict leads to. Never searches and never
commits.

1. A case is open while it owns a pending row, which searches see. It lists candidates; each is ruled on by itself, or all at once.
2. `same` closes it as a duplicate, `recapture` as refused. `different` closes it once no candidate is left: not in its list, and not
   in a search of everything that is enrolled or waits by then. Until that it stays open, with the candidates of that search. Where the
   candidate is the very subject whose id the encounter has, `different` closes it as refused, and `same` is what `different` is of others.
3. The same ruling again changes nothing; another one on what was ruled already is a conflict.
4. A verdict is about rows: the case's own and those of the candidate that were compared. A subject that gets another row is asked
   about again.
5. Two open cases that resemble each other are linked: each has the other as a candidate, or is one of its candidates.
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
    """The request of an encounter in review. replaces: it updates an enrolled subject; reason: why it replaces all rows of the subject,
    "" where it adds one."""

    replaces: bool
    groups: tuple[str, ...]
    across: bool
    reason: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


def request_of(case: Case) -> Request:
    """What the encounter of a case asked for."""
    return Request(case.replaces, case.groups, case.across_positions, case.replacement)


def resembled(decision: Decision) -> tuple[str, ...]:
    """The open cases among the candidates of a decision."""
    return tuple(dict.fromkeys(candidate.case for candidate in decision.candidates if candidate.case))


def standing(catalogue: Catalogue, encounter_id: str, first: StoredDecision) -> StoredDecision:
    """The answer as it stands. first: the one that was given first; only of a case has it changed since."""
    if first.outcome != "review":
        return first
    stored = catalogue.case(encounter_id)
    return first if stored is None or stored[1] is None else StoredDecision.read(first.digest, stored[1])


def standing_answer(
    answer_of: AnswerOf, encounter: Encounter, digest: bytes, snapshot: Callable[[], Snapshot]
) -> Decision | None:
    """The answer that this encounter got before; it says `removed` where its subject has been removed since.

    snapshot: called after the answer was read, so that it holds the row of an answer that another thread has just given.
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
        raise GalleryDamaged("a case is of no subject; run `biodedup doctor`")
    stored = catalogue.case(encounter_id)
    if stored is None:  # of a release that did not note what was asked for
        request = Request(snapshot.row_of(first.subject_id) is not None, (), False)
    else:
        fields = json.loads(stored[0])
        request = Request(**(fields | {"groups": tuple(fields["groups"])}))
    decision = first if stored is None or stored[1] is None else from_json(stored[1])
    row = snapshot.pending_row_of.get(encounter_id)
    linked: tuple[str, ...] = ()
    if decision.outcome == "review":
        asked = (_as_it_stands(c, snapshot, own=c.subject_id == first.subject_id) for c in decision.candidates)
        decision = replace(decision, candidates=tuple(c for c in asked if c is not None))
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


def _as_it_stands(candidate: Candidate, snapshot: Snapshot, *, own: bool) -> Candidate | None:
    """A candidate of an open case by now: an open case may have been enrolled since; None for one that was removed."""
    if not candidate.rows:  # of an older format
        candidate = replace(candidate, rows=tuple(snapshot.rows_under(candidate.subject_id)))
    cases = [snapshot.pending.get(row, "") for row in candidate.rows if snapshot.is_present(row)]
    if not cases:  # whether captures are the subject's own can be told of a removed one, too
        return candidate if own and not candidate.case else None
    return candidate if cases[0] == candidate.case else replace(candidate, case=cases[0])


def judged_before(verdicts: Iterable[Verdict], snapshot: Snapshot) -> list[tuple[int, int]]:
    """Pairs of rows that verdicts of an older format, which name subjects, were given on: rows that are still there, of the case itself
    and of a candidate that was enrolled before the verdict. A candidate updated since is asked about again."""
    pairs = []
    for verdict in verdicts:
        if verdict.ruling != "different" or verdict.candidate is None or verdict.own:
            continue
        mine = [
            row
            for row in (snapshot.row_of(verdict.subject_id), snapshot.pending_row_of.get(verdict.encounter_id))
            if row is not None and snapshot.encounter_ids([row]) == [verdict.encounter_id]
        ]
        theirs = snapshot.row_of(verdict.candidate)
        if theirs is not None and _enrolled_at(snapshot, theirs) <= verdict.at:
            pairs += [(row, theirs) for row in mine]
    return pairs


def _enrolled_at(snapshot: Snapshot, row: int) -> float:
    """When the encounter of a row was decided; 0 where it was loaded without one."""
    (encounter_id,) = snapshot.encounter_ids([row])
    answer = snapshot.answer(encounter_id) if encounter_id else None
    return 0.0 if answer is None else float(parsed(answer.text).get("decided_at", 0.0))


def different_rows(case: Case, verdicts: Iterable[Verdict]) -> list[tuple[int, int]]:
    """Pairs of rows that these verdicts on a case say are of two people."""
    judged = {v.candidate for v in verdicts if v.ruling == "different" and not v.own}
    if case.row is None:
        return []
    return [(case.row, row) for c in case.decision.candidates if c.key in judged for row in c.rows]


def same_rows(case: Case, verdicts: Iterable[Verdict]) -> frozenset[int]:
    """Rows of the subject whose id the encounter has that a person judged to be of the same person as the case; verdicts: new ones."""
    are_theirs = any(v.own and v.ruling == "same" for v in verdicts)
    judged = [*case.decision.cleared, *(case.decision.candidates if are_theirs else ())]
    return frozenset(row for candidate in judged if case.is_own(candidate) for row in candidate.rows)


def ruled(case: Case, ruling: Ruling, candidate: str | None, by: str, at: float, note: str) -> tuple[Verdict, ...]:
    """The verdicts to record; none where this was ruled before.

    candidate: the subject_id of an enrolled candidate, or the encounter_id of one that is an open case itself. None means the only
    one, or with `different` all that are undecided; `same`, sent again without one, is about the same one as before. Raises
    EncounterConflict where something else was ruled, InvalidInput for what is no candidate, and where it is not clear which is meant.
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
    standing = before[-1] if before else case.decision.adjudicated
    if standing is not None:
        if standing.ruling == ruling and (before or candidate is None):
            return ()
        raise EncounterConflict(
            f"encounter {case.encounter_id!r} was judged {standing.ruling} by {standing.by}; a verdict stands: enrol anew, with "
            "another encounter_id"
        )
    names = [c.key for c in case.decision.candidates]
    if candidate is not None and candidate not in names:
        raise InvalidInput(
            f"subject {candidate!r} is no candidate of encounter {case.encounter_id!r}; its candidates are "
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
            f"encounter {case.encounter_id!r} has {len(undecided)} candidates; name the one that it is a duplicate of: "
            f"{', '.join(undecided or names) or 'none is left'}"
        )
    _refuse_ambiguous(case, [candidate or undecided[0]])
    return (verdict(candidate or undecided[0]),)


def _refuse_ambiguous(case: Case, names: Iterable[str]) -> None:
    """Raises InvalidInput for the name of an open case that is the id of a subject, too: what is ruled would be about both."""
    subjects = {case.subject_id, *(c.subject_id for c in case.decision.candidates if not c.case)}
    for candidate in case.decision.candidates:
        if candidate.case in subjects and candidate.case in names:
            raise InvalidInput(
                f"{candidate.case!r} is a subject and an open case, both of which encounter {case.encounter_id!r} is about; "
                f"decide the case {candidate.case!r} first"
            )


def check_as_shown(case: Case, shown: Case, candidate: str | None) -> None:
    """Raises EncounterConflict where what a verdict is about has changed since the case was shown. candidate: as of `ruled`."""

    def rows_of(judged: Case) -> dict[str, frozenset[int]]:
        return {c.key: frozenset(c.rows) for c in judged.undecided if candidate in (None, c.key)}

    if rows_of(case) != rows_of(shown):
        which = "its candidates have" if candidate is None else f"candidate {candidate!r} has"
        raise EncounterConflict(
            f"encounter {case.encounter_id!r}: {which} changed since the case was shown; look at the case again"
        )


def closes(verdict: Verdict) -> bool:
    """Whether this verdict closes the case by itself, so that no other candidate is to be judged."""
    return verdict.ruling == "recapture" or (verdict.ruling == "same") != verdict.own


def closed(case: Case, verdict: Verdict) -> Decision:
    """The decision after a verdict that closes a case."""
    if verdict.ruling == "same":
        return replace(case.decision, outcome="duplicate", adjudicated=verdict)
    refusals = (*case.decision.refusals, RECAPTURE if verdict.ruling == "recapture" else ANOTHER_PERSON)
    return replace(case.decision, outcome="refused", refusals=refusals, adjudicated=verdict)


def reconsidered(case: Case, verdicts: tuple[Verdict, ...], fresh: Decision) -> Decision:
    """The decision after a verdict that does not close a case by itself. fresh: made anew, of all rows by now but those that were
    judged different; the subject itself is one of its candidates where the captures have to be judged (again) to be theirs.

    A person has looked, so that `unique` needs no more than that no candidate is left and everything was seen.
    """
    judged = {v.candidate for v in (*case.verdicts, *verdicts) if not closes(v)}
    now = {c.key: c for c in (*fresh.candidates, *fresh.cleared)}
    known = {c.key: c for c in (*case.decision.cleared, *case.decision.candidates)} | now
    just = {v.candidate for v in verdicts}
    waiting = {c.key: known[c.key] for c in case.undecided if c.key not in just}
    waiting |= {c.key: c for c in strong(fresh)}
    by_rows = {c.key for c in fresh.cleared}
    cleared = _ranked(c for key, c in known.items() if key in judged | by_rows and key not in waiting)
    left = _ranked(waiting.values())
    if not left and not fresh.incomplete:
        return replace(fresh, outcome="unique", cleared=cleared, adjudicated=verdicts[-1] if verdicts else None)
    return replace(
        fresh,
        outcome="review",
        candidates=left or fresh.candidates,
        cleared=cleared,
        review_db=min(fresh.review_db, case.decision.review_db),  # what was to be judged still is
    )


def _ranked(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    ordered = sorted(candidates, key=lambda c: (-c.score_db, c.rank, c.subject_id))
    return tuple(replace(c, rank=rank) for rank, c in enumerate(ordered, start=1))
