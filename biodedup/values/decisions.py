"""The result of a comparison with a gallery: scores, candidates, decisions, verdicts and cases.

Owns their fields and their validation. Never decides.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

from biodedup.advice import advice
from biodedup.common.described import Described, Tabular
from biodedup.errors import InvalidInput
from biodedup.values.checks import NOTE_LENGTH_MAX, check_id, check_text
from biodedup.values.encounters import Missing, Refusal, Template

RULINGS = ("same", "different", "recapture")
"""The rulings on a case: one person, two people, or new captures are needed."""

_NO_RECAPTURE = ("superseded", "missing")
"""Reasons of refusals that ask for no new capture."""

Outcome: TypeAlias = Literal["unique", "duplicate", "review", "refused"]
Kind: TypeAlias = Literal[
    "", "same_person", "look_alike", "shared_finger", "swapped_fingers", "mixed_record", "another_person"
]
Ruling: TypeAlias = Literal["same", "different", "recapture"]


@dataclass(frozen=True)
class Score(Described):
    """The result of one comparison. score_db: -10 log10(FMR). llr_db: 10 log10 of the likelihood ratio, mated to non-mated."""

    score_db: float
    llr_db: float
    similarity: float | None = None
    minutiae: float | None = None
    extrapolated: bool = False


@dataclass(frozen=True)
class Evidence(Described):
    """The evidence of one capture for or against one candidate.

    candidate_column: the candidate's column. It differs from `column` if the finger's position is unknown, or if a search across positions
    matched fingers with different labels. replay: the two embeddings are nearly equal, so that both probably come from one picture or one
    template. The limit is in the model's card.
    """

    column: str
    candidate_column: str
    score_db: float
    llr_db: float
    similarity: float | None = None
    minutiae: float | None = None
    replay: bool = False

    @property
    def swapped(self) -> bool:
        """Whether the probe and the candidate label this finger differently. A finger of unknown position has no label."""
        return self.column != self.candidate_column and "unknown" not in (self.column, self.candidate_column)


@dataclass(frozen=True)
class Candidate(Described):
    """An enrolled subject or open case that a search returned. Rank 1 is the strongest.

    label_penalty_db: subtracted from score_db because the search compared several rows of the subject, or tried several finger labels.
    kind: the kind of resemblance, "" below the review threshold:
      `same_person`;
      `look_alike`       the face agrees and the fingers disagree, as with twins;
      `shared_finger`    one finger agrees and all other captures disagree; it may be the operator's finger;
      `swapped_fingers`  the fingers agree under other labels;
      `mixed_record`     some of the probe's captures are of this candidate, others of another candidate;
      `another_person`   the candidate has the encounter's subject_id, but the captures do not match this subject.
    interval_db: the 95 % confidence interval of score_db, or None if the calibration has none. rows: the gallery rows that were compared.
    case: the encounter_id if the candidate is an open case, "" for an enrolled subject.
    """

    subject_id: str
    rank: int
    score_db: float
    extrapolated: bool
    evidence: tuple[Evidence, ...]
    label_penalty_db: float = 0.0
    kind: Kind = ""
    interval_db: tuple[float, float] | None = None
    rows: tuple[int, ...] = ()
    case: str = ""

    def __repr__(self) -> str:
        kind = f", {self.kind}" if self.kind else ""
        of_case = f", case={self.case!r}" if self.case else ""
        return f"Candidate({self.subject_id!r}, rank={self.rank}, {in_db(self.score_db, self.extrapolated)}{kind}{of_case})"

    @property
    def charge_db(self) -> float:
        """Deprecated: `label_penalty_db`."""
        warnings.warn("Candidate.charge_db is label_penalty_db now", DeprecationWarning, stacklevel=2)
        return self.label_penalty_db

    @property
    def key(self) -> str:
        """The name of the candidate in a verdict: the encounter_id of an open case, or the subject_id."""
        return self.case or self.subject_id

    @property
    def swaps(self) -> tuple[tuple[str, str], ...]:
        """(position in the probe, position enrolled) of each finger whose labels differ."""
        return tuple((part.column, part.candidate_column) for part in self.evidence if part.swapped)


@dataclass(frozen=True)
class Verdict(Described):
    """A person's ruling on a case.

    candidate: the subject_id, or the encounter_id of an open case, that the ruling is about; None: the whole case. by: the person.
    at: the time in seconds.
    """

    encounter_id: str
    subject_id: str
    candidate: str | None
    ruling: Ruling
    by: str
    at: float
    note: str = ""

    def __post_init__(self) -> None:
        if self.ruling not in RULINGS:
            raise InvalidInput(f"the ruling is {self.ruling!r}; use one of {', '.join(RULINGS)}")
        check_id(self.by, "by")
        check_text(self.note, "a note", NOTE_LENGTH_MAX)

    @property
    def own(self) -> bool:
        """Whether the ruling is about the encounter's own subject_id: `same` means that the captures are of this subject."""
        return self.candidate == self.subject_id


_CANDIDATE_COLUMNS = {
    "rank": "int64",
    "subject_id": "string",
    "case": "string",
    "kind": "string",
    "score_db": "float64",
    "extrapolated": "bool",
    "low_db": "float64",
    "high_db": "float64",
    "evidence": "string",
}


def _candidate_row(candidate: Candidate) -> dict[str, Any]:
    """low_db, high_db: the 95 % confidence interval of the score. evidence: the score of each capture."""
    low, high = candidate.interval_db or (None, None)
    return {
        "rank": candidate.rank,
        "subject_id": candidate.subject_id,
        "case": candidate.case or None,
        "kind": candidate.kind or None,
        "score_db": candidate.score_db,
        "extrapolated": candidate.extrapolated,
        "low_db": low,
        "high_db": high,
        "evidence": "; ".join(f"{part.column} {part.score_db:.1f} dB" for part in candidate.evidence),
    }


def in_db(score_db: float, extrapolated: bool) -> str:
    """A score as text."""
    return f"{score_db:.1f} dB{' (extrapolated)' if extrapolated else ''}"


def counted(values: Sequence[object], noun: str) -> str:
    """The number of values with its noun, as text: `2 links`."""
    return f"{len(values)} {noun}{'' if len(values) == 1 else 's'}"


@dataclass(frozen=True)
class Decision(Tabular):
    """The decision on one encounter, with its evidence, thresholds and gallery version.

    incomplete: part of the gallery could not be searched. Such a decision is never `unique`.
    reasons: why the encounter is in review:
      a `Candidate.kind` other than `same_person`;
      `open_case`            a candidate is an open case;
      `uncalibrated`         a model has no calibration;
      `between_thresholds`   the best score is between the two thresholds;
      `little_evidence`      mates with these captures may score below the policy's review threshold;
      `extrapolated`         the score is extrapolated, and the policy does not trust extrapolation;
      `incomplete`           part of the gallery could not be searched;
      `nothing_in_common`    no enrolled subject has a capture to compare.
    Of a refused encounter, `incomplete`: captures that `Policy.required` asks for are missing or unusable; `refusals` lists them.
    attainable_db: 95 % of mates with these captures score less. expected_fnir: the share of mates below review_db. Both are None if no row
    has a capture in common with the probe. compared: how many rows have one.
    cleared: subjects that are no candidates because a person ruled that they are different people. adjudicated: the verdict that closed
    the case. replacement: the reason of an update that replaced all rows of its subject.
    doubtful: accepted captures of low quality, each with the reason, its quality and the quality of a good capture.
    gallery_size: the number of enrolled subjects plus open cases. The thresholds are for this size.
    policy_digest: the digest of the policy that decided; empty in decisions of earlier releases.
    """

    outcome: Outcome
    subject_id: str | None
    encounter_id: str | None
    candidates: tuple[Candidate, ...]
    refusals: tuple[Refusal, ...]
    missing: tuple[Missing, ...]
    duplicate_db: float
    review_db: float
    gallery_size: int
    gallery_version: int
    model_ids: tuple[str, ...] = ()
    incomplete: bool = False
    decided_at: float = 0.0
    reasons: tuple[str, ...] = ()
    attainable_db: float | None = None
    expected_fnir: float | None = None
    compared: int | None = None
    cleared: tuple[Candidate, ...] = ()
    adjudicated: Verdict | None = None
    replacement: str = ""
    doubtful: tuple[Refusal, ...] = ()
    policy_digest: str = ""

    _columns: ClassVar[Mapping[str, str]] = _CANDIDATE_COLUMNS

    def __repr__(self) -> str:
        best = (
            ""
            if self.best is None
            else f", best={self.best.key!r} at {in_db(self.best.score_db, self.best.extrapolated)}"
        )
        reasons = f", reasons={'+'.join(self.reasons)}" if self.reasons else ""
        return (
            f"Decision({self.outcome}, subject_id={self.subject_id!r}, encounter_id={self.encounter_id!r}, "
            f"{counted(self.candidates, 'candidate')}{best}{reasons})"
        )

    def _rows(self) -> list[dict[str, Any]]:
        return [_candidate_row(candidate) for candidate in self.candidates]

    @property
    def final(self) -> bool:
        """Whether the decision is kept for this encounter_id. A refusal is not: the encounter may be sent again with better captures."""
        return self.outcome != "refused" or self.adjudicated is not None

    @property
    def best(self) -> Candidate | None:
        """The strongest candidate, or None."""
        return self.candidates[0] if self.candidates else None

    @property
    def replays(self) -> tuple[tuple[str, str], ...]:
        """(column, key of the candidate) of each capture that is probably a copy of the candidate's capture."""
        return tuple((part.column, c.key) for c in self.candidates for part in c.evidence if part.replay)

    @property
    def recaptures(self) -> dict[str, str]:
        """Column -> a sentence that says why its capture should be taken again, and how. It covers refused captures, and, unless the
        outcome is `duplicate`, accepted captures of low quality."""
        doubtful = () if self.outcome == "duplicate" else self.doubtful
        return {
            part.column: advice(part.reason, part.detail, part.measured, part.limit)
            for part in (*doubtful, *self.refusals)
            if part.reason not in _NO_RECAPTURE
        }


@dataclass(frozen=True)
class Case(Tabular):
    """An encounter that went to review.

    decision: the present decision; in an open case without candidates that were removed since. replaces: whether the encounter updates
    an enrolled subject. replacement: the reason, if the update replaces all rows of the subject. templates, row: the case's templates and
    gallery row while it is open. judged: rows that a verdict says are of another person. linked: encounter_ids of open cases that resemble
    it. If a candidate has the case's own subject_id, the question is whether the captures are of this subject.
    """

    encounter_id: str
    subject_id: str
    opened_at: float
    decision: Decision
    verdicts: tuple[Verdict, ...] = ()
    replaces: bool = False
    across_positions: bool = False
    groups: tuple[str, ...] = ()
    templates: Mapping[str, Template] = field(default_factory=dict, repr=False)
    row: int | None = None
    linked: tuple[str, ...] = ()
    replacement: str = ""
    judged: frozenset[int] = field(default=frozenset(), repr=False)

    _columns: ClassVar[Mapping[str, str]] = {**_CANDIDATE_COLUMNS, "to_be_judged": "bool"}

    def __repr__(self) -> str:
        state = f"closed as {self.decision.outcome}" if self.closed else f"{len(self.undecided)} to be judged"
        return (
            f"Case({self.encounter_id!r}, subject_id={self.subject_id!r}, {state}, {counted(self.verdicts, 'verdict')})"
        )

    def _rows(self) -> list[dict[str, Any]]:
        waiting = {candidate.key for candidate in self.undecided}
        return [_candidate_row(c) | {"to_be_judged": c.key in waiting} for c in self.decision.candidates]

    @property
    def closed(self) -> bool:
        return self.decision.outcome != "review"

    @property
    def undecided(self) -> tuple[Candidate, ...]:
        """Candidates that a person has to rule on before the subject can be enrolled."""
        return () if self.closed else tuple(c for c in strong(self.decision) if not self._is_decided(c))

    def is_own(self, candidate: Candidate) -> bool:
        """Whether the candidate has the encounter's own subject_id."""
        return candidate.subject_id == self.subject_id and not candidate.case

    def _is_decided(self, candidate: Candidate) -> bool:
        if self.is_own(candidate):  # once judged, it is a candidate only if it must be judged again
            return False
        if candidate.rows:
            return self.judged.issuperset(candidate.rows)
        return candidate.key in {verdict.candidate for verdict in self.verdicts}


def strong(decision: Decision) -> tuple[Candidate, ...]:
    """The candidates that a person has to judge: their score reaches the review threshold, or they have a kind such as `shared_finger`."""
    return tuple(
        candidate for candidate in decision.candidates if candidate.kind or candidate.score_db >= decision.review_db
    )


@dataclass(frozen=True)
class Verification(Described):
    """A 1:1 comparison of an encounter with an enrolled subject.

    accepted: score_db reaches threshold_db, and the captures do not contradict each other. kind: as in `Candidate`, "" below the threshold.
    """

    subject_id: str
    accepted: bool
    score_db: float
    threshold_db: float
    extrapolated: bool
    evidence: tuple[Evidence, ...]
    refusals: tuple[Refusal, ...]
    kind: Kind = ""

    @property
    def replays(self) -> tuple[str, ...]:
        """The columns whose capture is probably a copy of an enrolled capture."""
        return tuple(part.column for part in self.evidence if part.replay)

    def __repr__(self) -> str:
        word = "accepted" if self.accepted else "not accepted"
        kind = f", {self.kind}" if self.kind else ""
        return f"Verification({self.subject_id!r}, {word}, {self.score_db:.1f} dB of {self.threshold_db:.1f} dB{kind})"
