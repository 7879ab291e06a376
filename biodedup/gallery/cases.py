"""Cases: encounters that went to review, and what people ruled on them.

Owns what a case is in the tables, which verdicts may follow one another, and the decision that a verdict leads to. Never
searches and never commits.

1. A case is open while its templates are held. It lists candidates; each is ruled on by itself, or all at once.
2. `same` closes it as a duplicate, `recapture` as refused. `different` closes it once nobody is left: not among its candidates,
   and not among all who are enrolled by then. Until that it stays open, with whoever came up. Where the candidate is the very subject
   whose id the encounter has, `different` closes it as refused, and `same` is what `different` is of others.
3. The same ruling again changes nothing; another one on what was ruled already is a conflict.
4. A pair judged different is so for ever, whichever side is the probe.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace

from biodedup.errors import EncounterConflict, GalleryDamaged, InvalidInput
from biodedup.gallery.answers import from_json
from biodedup.gallery.catalogue import Catalogue
from biodedup.gallery.snapshot import Snapshot
from biodedup.values import Candidate, Case, Decision, Refusal, Ruling, Verdict, strong

RECAPTURE = Refusal("encounter", "recapture", "whoever judged the case asks for new captures")
ANOTHER_PERSON = Refusal(
    "encounter", "another_person", "whoever judged the case says that the captures are not the subject's"
)


@dataclass(frozen=True)
class Request:
    """What an encounter in review asked for. replaces: to update an enrolled subject."""

    replaces: bool
    groups: tuple[str, ...]
    across: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


def is_review(answer: str) -> bool:
    """Whether an answer, as JSON, is that of a case."""
    return '"outcome":"review"' in answer  # quotes inside a value are escaped


def standing(catalogue: Catalogue, encounter_id: str, answer: str) -> str:
    """The decision as it stands, JSON. answer: the one that was given first."""
    stored = catalogue.case(encounter_id)
    return answer if stored is None or stored[1] is None else stored[1]


def read_case(catalogue: Catalogue, snapshot: Snapshot, encounter_id: str) -> Case | None:
    """A case, open or closed; None for an encounter that never went to review."""
    answer = snapshot.answer(encounter_id)
    if answer is None or not is_review(answer[1]):
        return None
    first = from_json(answer[1])
    if first.subject_id is None:
        raise GalleryDamaged("a case is of no subject; run `biodedup doctor`")
    stored = catalogue.case(encounter_id)
    if stored is None:  # of a release that did not note what was asked for
        request = Request(snapshot.row_of(first.subject_id) is not None, (), False)
    else:
        fields = json.loads(stored[0])
        request = Request(fields["replaces"], tuple(fields["groups"]), fields["across"])
    decision = first if stored is None or stored[1] is None else from_json(stored[1])
    if decision.outcome == "review":
        # whether captures are the subject's own can be told of a removed one, too
        asked = (
            c
            for c in decision.candidates
            if c.subject_id == first.subject_id or snapshot.row_of(c.subject_id) is not None
        )
        decision = replace(decision, candidates=tuple(asked))
    return Case(
        encounter_id,
        first.subject_id,
        first.decided_at,
        decision,
        tuple(catalogue.verdicts(encounter_id)),
        request.replaces,
        request.across,
        request.groups,
        catalogue.held(encounter_id),
    )


def pairs_of(
    verdicts: Iterable[Verdict], known: Mapping[str, tuple[str, ...]] | None = None
) -> Mapping[str, tuple[str, ...]]:
    """subject_id -> who was judged to be somebody else, in both directions; added to those known."""
    pairs = dict(known or {})
    for verdict in verdicts:
        if verdict.ruling == "different" and verdict.candidate is not None and not verdict.own:
            for one, other in ((verdict.subject_id, verdict.candidate), (verdict.candidate, verdict.subject_id)):
                if other not in pairs.get(one, ()):
                    pairs[one] = (
                        *pairs.get(one, ()),
                        other,
                    )  # most have one: a set would take four times as much memory
    return pairs


def ruled(case: Case, ruling: Ruling, candidate: str | None, by: str, at: float, note: str) -> tuple[Verdict, ...]:
    """The verdicts to record; none where this was ruled before.

    candidate: None means the only one, or with `different` all that are undecided; `same`, sent again without one, is about the same one
    as before. Raises EncounterConflict where something else was ruled, InvalidInput for somebody who is no candidate, and where it is
    not clear who is meant.
    """

    def verdict(candidate: str | None) -> Verdict:
        return Verdict(case.encounter_id, case.subject_id, candidate, ruling, by, at, note)

    verdict(candidate)  # validates
    if ruling == "recapture":
        candidate = None
    before = [
        v for v in case.verdicts if (v.ruling == ruling == "same" if candidate is None else v.candidate == candidate)
    ]
    standing = before[-1] if before else case.decision.adjudicated
    if standing is not None:
        if standing.ruling == ruling and (before or candidate is None):
            return ()
        raise EncounterConflict(
            f"encounter {case.encounter_id!r} was judged {standing.ruling} by {standing.by}; a verdict stands: enrol anew, with "
            "another encounter_id"
        )
    names = [c.subject_id for c in case.decision.candidates]
    if candidate is not None and candidate not in names:
        raise InvalidInput(
            f"subject {candidate!r} is no candidate of encounter {case.encounter_id!r}; its candidates are "
            f"{', '.join(names) or 'nobody'}"
        )
    if ruling == "recapture":
        return (verdict(None),)
    undecided = [c.subject_id for c in case.undecided]
    if ruling == "different":
        names_now = [candidate] if candidate is not None else undecided
        return tuple(map(verdict, names_now)) or (verdict(None),)
    if candidate is None and len(undecided) != 1:
        raise InvalidInput(
            f"encounter {case.encounter_id!r} has {len(undecided)} candidates; say whose double it is, one of "
            f"{', '.join(undecided or names) or 'nobody'}"
        )
    return (verdict(candidate or undecided[0]),)


def closes(verdict: Verdict) -> bool:
    """Whether nobody else need be looked at after this verdict."""
    return verdict.ruling == "recapture" or (verdict.ruling == "same") != verdict.own


def closed(case: Case, verdict: Verdict) -> Decision:
    """The decision after a verdict that closes a case."""
    if verdict.ruling == "same":
        return replace(case.decision, outcome="duplicate", adjudicated=verdict)
    refusals = (*case.decision.refusals, RECAPTURE if verdict.ruling == "recapture" else ANOTHER_PERSON)
    return replace(case.decision, outcome="refused", refusals=refusals, adjudicated=verdict)


def reconsidered(case: Case, verdicts: tuple[Verdict, ...], fresh: Decision) -> Decision:
    """The decision after a verdict that does not close a case by itself. fresh: made anew, with everybody enrolled by now but those
    judged different, and the subject itself.

    A person has looked, so that `unique` needs no more than that nobody is left and everybody was seen.
    """
    judged = {v.candidate for v in (*case.verdicts, *verdicts) if not closes(v)}
    now = {c.subject_id: c for c in (*fresh.candidates, *fresh.cleared)}
    known = {c.subject_id: c for c in (*case.decision.cleared, *case.decision.candidates)} | now
    cleared = _ranked(c for name, c in known.items() if name in judged)
    waiting = {c.subject_id: known[c.subject_id] for c in case.undecided} | {c.subject_id: c for c in strong(fresh)}
    left = _ranked(c for name, c in waiting.items() if name not in judged)
    if not left and not fresh.incomplete:
        return replace(fresh, outcome="unique", cleared=cleared, adjudicated=verdicts[-1])
    return replace(
        fresh,
        outcome="review",
        candidates=left or fresh.candidates,
        cleared=cleared,
        review_db=min(fresh.review_db, case.decision.review_db),  # whoever was to be judged still is
    )


def _ranked(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    ordered = sorted(candidates, key=lambda c: (-c.score_db, c.rank, c.subject_id))
    return tuple(replace(c, rank=rank) for rank, c in enumerate(ordered, start=1))
