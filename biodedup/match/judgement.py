"""The decision rules: they turn scored candidates into an outcome, and name the kind of each resemblance.

Owns the rules. Never compares, stores or reads a biometric sample.

A score above a threshold says that two records are very unlikely to be an impostor pair. It does not prove that they are one person: twins
share a face, an operator's finger can be on many records, and captures of two people can be filed as one record. If captures contradict
each other, the encounter goes to review, with the kind of the contradiction.

The calibration may be wrong as well. Until the gallery has checked a model's card on its own subjects (match/scores/calibrations.py), the
score in the worst case of the card, `worst_case_db`, must reach the duplicate threshold, too. Otherwise the encounter goes to review, with
the reason `uncalibrated`.
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
"""llr_db at or above which a capture is evidence for one person: a hundred to one."""
SPEAKS_AGAINST_DB = -7.0
"""llr_db at or below which captures together are evidence for two people: one to five. Two fingers of an impostor together reach it."""

TRUSTED_KINDS: tuple[Kind, ...] = ("same_person", "swapped_fingers")
"""Kinds of resemblance without a contradiction: the score alone decides."""


@dataclass(frozen=True)
class Judgement:
    """An outcome. kinds: the kind of each candidate, "" below the review threshold. reasons: why the encounter goes to review, the most
    serious first."""

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

    candidates: strongest first. band_db: the policy's review threshold. review_db: the review threshold of this search; it is lower if mates
    with these captures may score less. incomplete: part of the gallery was not searched; such a search never gives `unique`. usable:
    whether the probe has a template. nothing_in_common: no enrolled subject has a comparable capture. waiting: for each candidate, whether
    it is an open case; an encounter that resembles an open case goes to review.
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
        elif kind not in TRUSTED_KINDS:
            reasons[kind] = None
        elif candidate.score_db < duplicate_db:
            reasons["between_thresholds" if candidate.score_db >= band_db else "little_evidence"] = None
        elif candidate.worst_case_db is not None and candidate.worst_case_db < duplicate_db:
            reasons["uncalibrated"] = None
        elif candidate.extrapolated and not trust_extrapolation:
            reasons["extrapolated"] = None
        else:
            duplicate = True
        if kind in TRUSTED_KINDS and candidate.worst_case_db == 0.0:  # no model has a calibration
            reasons["uncalibrated"] = None
    if incomplete:
        reasons["incomplete"] = None
    if nothing_in_common:
        reasons["nothing_in_common"] = None
    outcome: Outcome = "duplicate" if duplicate else "review" if reasons else "unique"
    return Judgement(outcome, kinds, tuple(sorted(reasons, key=_SERIOUS.index)))


REASONS = {
    "another_person": "the subject is enrolled, and these captures do not match its own",
    "replay_suspected": "a capture is probably a copy of an enrolled capture: the same picture or template was sent again",
    "open_case": "another case is open that resembles this one",
    "mixed_record": "captures of two subjects seem to be filed as one record",
    "shared_finger": "one finger agrees and no other capture does; is it the operator's finger?",
    "look_alike": "the face agrees and the fingers do not; twins?",
    "uncalibrated": "the calibration of these scores is not checked yet with people of this gallery, and may be off by more than the "
    "margin; a model without a calibration is never checked",
    "extrapolated": "the score lies beyond the measured pairs, which the policy does not trust",
    "incomplete": "part of the gallery was not compared",
    "between_thresholds": "the score lies between the thresholds",
    "little_evidence": "with so few captures a mate may score as low as an impostor",
    "removed": "the subject was enrolled, and has been removed since",
    "nothing_in_common": "no enrolled subject has a capture to compare with these",
}
"""Reason in `Decision.reasons` -> its text, the most serious first."""
_SERIOUS = tuple(REASONS)
LACKS_CAPTURES = "captures are missing or unusable; repair the encounter and send it again under the same encounter_id"
"""The text of the reason `incomplete` for a refused encounter."""


def texts_of(decision: Decision) -> tuple[str, ...]:
    """The reasons of a decision as texts."""
    if decision.outcome == "refused" and INCOMPLETE in decision.reasons:
        return (LACKS_CAPTURES,)
    return tuple(REASONS[reason] for reason in decision.reasons)


def kinds_of(candidates: Sequence[Comparison], duplicate_db: float, review_db: float) -> tuple[Kind, ...]:
    """The kind of resemblance of each candidate, "" below the review threshold.

    `shared_finger`: one finger agrees and all other captures disagree; also if the sum is below both thresholds, provided that the finger
    alone reaches duplicate_db. `look_alike`: the face agrees and the fingers together disagree, as twins' do. `mixed_record`: two
    candidates reach the review threshold, each by captures that are evidence against the other. `swapped_fingers`: finger labels differ.
    """
    kinds: list[Kind] = []
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
        kinds.append(kind)
    evidence = {
        i: _for_and_against(candidate.evidence)
        for i, candidate in enumerate(candidates)
        if candidate.score_db >= review_db
    }
    for (i, (for_i, against_i)), (j, (for_j, against_j)) in combinations(evidence.items(), 2):
        if for_i & against_j and for_j & against_i:
            kinds[i] = kinds[j] = "mixed_record"
    return tuple(kinds)


def _one_finger_against_all(evidence: Sequence[Evidence], from_db: float) -> bool:
    if len(evidence) < 2 or not any([part.llr_db >= from_db and part.column != "face" for part in evidence]):
        return False  # the usual case, decided first because the code below is slow
    fingers = [part for part in evidence if part.column != "face"]
    from_db += 10 * log10(len(fingers))  # Bonferroni: each finger could have agreed by chance
    best = max(fingers, key=lambda part: part.llr_db)
    rest_db = sum(part.llr_db for part in evidence if part is not best)
    return min(best.score_db, best.llr_db) >= from_db and rest_db <= SPEAKS_AGAINST_DB


def _face_against_fingers(evidence: Sequence[Evidence]) -> bool:
    faces_db = [part.llr_db for part in evidence if part.column == "face"]
    fingers_db = [part.llr_db for part in evidence if part.column != "face"]
    return bool(fingers_db) and sum(faces_db) >= SPEAKS_FOR_DB and sum(fingers_db) <= SPEAKS_AGAINST_DB


def _for_and_against(evidence: Sequence[Evidence]) -> tuple[set[str], set[str]]:
    """(captures of the probe that are evidence for a candidate, captures that are evidence against it)."""
    return (
        {part.column for part in evidence if part.llr_db >= SPEAKS_FOR_DB},
        {part.column for part in evidence if part.llr_db <= SPEAKS_AGAINST_DB},
    )
