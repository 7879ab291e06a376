"""From ranked evidence to an outcome, and what kind of resemblance it is.

Owns the rules. Never compares, never stores, never looks at a biometric sample.

A score that reaches a threshold says that two records are hardly strangers. It does not say that they are one person: twins share a
face, an operator's finger can lie on many records, and two people's captures can be filed as one. Where captures contradict one
another, the sum is not believed alone: the case goes to a person, with its kind.

Nor is a score believed whose calibration may be wrong by more than its margin: until a gallery has checked a model's card with people
of its own (match/calibrations.py), what is left of the score with the card as wrong as it may be, `sure_db`, must reach the duplicate
threshold, too; otherwise the case goes to a person, `uncalibrated`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import log10

from biodedup.match.ranked import Comparison
from biodedup.required import INCOMPLETE
from biodedup.values import Decision, Evidence, Kind, Outcome

SPEAKS_FOR_DB = 20.0
"""llr_db from which a capture speaks for one person: a hundred to one."""
SPEAKS_AGAINST_DB = -7.0
"""llr_db to which captures together speak against: five to one. Strangers' fingers reach it two at a time."""

BELIEVED: tuple[Kind, ...] = ("same_person", "swapped_fingers")
"""Kinds whose score is taken at its word."""


@dataclass(frozen=True)
class Judgement:
    """kinds: of each candidate, "" below the review threshold. reasons: what sent the case to a person, most serious first."""

    outcome: Outcome
    kinds: tuple[Kind, ...]
    reasons: tuple[str, ...]


def judge(
    candidates: Sequence[Comparison],
    duplicate_db: float,
    review_db: float,
    *,
    band_db: float,
    incomplete: bool = False,
    usable: bool = True,
    nothing_in_common: bool = False,
    trust_extrapolation: bool = True,
    waiting: Sequence[bool] = (),
) -> Judgement:
    """The outcome of a search.

    candidates: strongest first. band_db: where the review band of the policy begins; review_db lies below it where mates of these
    captures may score less. incomplete: part of the gallery was not seen. usable: the probe has a capture. nothing_in_common: nobody
    enrolled has a capture of the same kind. waiting: of each candidate, whether it is an open case: what resembles one waits, too. A
    search that could not see everything never says unique.
    """
    kinds = kinds_of(candidates, duplicate_db, review_db)
    if not usable:
        return Judgement("refused", kinds, ())
    reasons: dict[str, None] = {}
    duplicate = False
    for candidate, kind, waits in zip(candidates, kinds, waiting or [False] * len(candidates), strict=True):
        if not kind:
            continue
        if waits:
            reasons["open_case"] = None
        elif kind not in BELIEVED:
            reasons[kind] = None
        elif candidate.score_db < duplicate_db:
            reasons["between_thresholds" if candidate.score_db >= band_db else "little_evidence"] = None
        elif candidate.sure_db is not None and candidate.sure_db < duplicate_db:
            reasons["uncalibrated"] = None
        elif candidate.extrapolated and not trust_extrapolation:
            reasons["extrapolated"] = None
        else:
            duplicate = True
        if kind in BELIEVED and candidate.sure_db == 0.0:  # nothing but models without a calibration
            reasons["uncalibrated"] = None
    if incomplete:
        reasons["incomplete"] = None
    if nothing_in_common:
        reasons["nothing_in_common"] = None
    outcome: Outcome = "duplicate" if duplicate else "review" if reasons else "unique"
    return Judgement(outcome, kinds, tuple(sorted(reasons, key=_SERIOUS.index)))


REASONS = {
    "another_person": "the subject is enrolled, and these captures do not verify as theirs",
    "open_case": "another case is open that resembles this one",
    "mixed_record": "captures of two subjects seem to be filed as one",
    "shared_finger": "one finger agrees and nothing else does; is it an operator's own?",
    "look_alike": "the face agrees and the fingers do not; twins?",
    "uncalibrated": "the calibration of these scores is not checked yet with people of this gallery, and may be off by more than the "
    "margin; a model without a calibration is never checked",
    "extrapolated": "the score lies beyond the measured pairs, which the policy does not trust",
    "incomplete": "part of the gallery was not compared",
    "between_thresholds": "the score lies between the thresholds",
    "little_evidence": "with so few captures a mate may score no more than strangers do",
    "removed": "the subject was enrolled, and has been removed since",
    "nothing_in_common": "nobody enrolled has a capture to compare with these",
}
"""What `Decision.reasons` say, most serious first."""
_SERIOUS = tuple(REASONS)
LACKS_CAPTURES = (
    "captures are missing or cannot be used; send the encounter again, repaired, under the same encounter_id"
)
"""What `incomplete` says of a refused encounter."""


def texts_of(decision: Decision) -> tuple[str, ...]:
    """The reasons of a decision, in words."""
    if decision.outcome == "refused" and INCOMPLETE in decision.reasons:
        return (LACKS_CAPTURES,)
    return tuple(REASONS[reason] for reason in decision.reasons)


def kinds_of(candidates: Sequence[Comparison], duplicate_db: float, review_db: float) -> tuple[Kind, ...]:
    """What kind of resemblance each candidate shows; "" where it is none to speak of.

    `shared_finger`: one finger is the same, and all else says no; told from duplicate_db of that finger on, even if the sum is below
    all thresholds. `look_alike`: the face says yes and the fingers together no, as twins' do. `mixed_record`: two
    candidates reach the review threshold, each by captures that the other's contradict. `swapped_fingers`: labels differ.
    """
    found: list[Kind] = []
    for candidate in candidates:
        kind: Kind = ""
        if _one_finger_against_all(
            candidate.evidence, duplicate_db if candidate.score_db < review_db else SPEAKS_FOR_DB
        ):
            kind = "shared_finger"
        elif candidate.score_db >= review_db:
            kind = "same_person"
            if _face_against_fingers(candidate.evidence):
                kind = "look_alike"
            elif any(part.swapped for part in candidate.evidence):
                kind = "swapped_fingers"
        found.append(kind)
    spoken = {
        i: _for_and_against(candidate.evidence)
        for i, candidate in enumerate(candidates)
        if candidate.score_db >= review_db
    }
    for (i, (for_i, against_i)), (j, (for_j, against_j)) in combinations(spoken.items(), 2):
        if for_i & against_j and for_j & against_i:  # each by captures that speak against the other
            found[i] = found[j] = "mixed_record"
    return tuple(found)


def _one_finger_against_all(evidence: Sequence[Evidence], from_db: float) -> bool:
    if len(evidence) < 2 or not any([part.llr_db >= from_db and part.column != "face" for part in evidence]):
        return False  # nearly always; the rest is slow
    fingers = [part for part in evidence if part.column != "face"]
    from_db += 10 * log10(len(fingers))  # so many had the chance
    best = max(fingers, key=lambda part: part.llr_db)
    rest_db = sum(part.llr_db for part in evidence if part is not best)
    return min(best.score_db, best.llr_db) >= from_db and rest_db <= SPEAKS_AGAINST_DB


def _face_against_fingers(evidence: Sequence[Evidence]) -> bool:
    faces_db = [part.llr_db for part in evidence if part.column == "face"]
    fingers_db = [part.llr_db for part in evidence if part.column != "face"]
    return bool(fingers_db) and sum(faces_db) >= SPEAKS_FOR_DB and sum(fingers_db) <= SPEAKS_AGAINST_DB


def _for_and_against(evidence: Sequence[Evidence]) -> tuple[set[str], set[str]]:
    """The probe's captures that speak for a candidate, and those that speak against it."""
    return (
        {part.column for part in evidence if part.llr_db >= SPEAKS_FOR_DB},
        {part.column for part in evidence if part.llr_db <= SPEAKS_AGAINST_DB},
    )
