"""The immutable values of biodedup: captures and encounters going in, candidates and decisions coming out.

Owns their fields and their validation. Never reads a file, runs a model or opens a gallery.

1. A value validates itself when it is made; other code may trust it.
2. A `repr` never shows biometric data: pixels, vectors and minutiae stay out of logs and error texts.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from biodedup.advice import advice
from biodedup.common.arguments import check_fields
from biodedup.common.described import BIOMETRIC, Described, Tabular
from biodedup.devices import DeviceVerdict
from biodedup.errors import InvalidInput
from biodedup.texts import KnownId, id_problem, text_problem

FINGER_POSITIONS = (
    "right_thumb",
    "right_index",
    "right_middle",
    "right_ring",
    "right_little",
    "left_thumb",
    "left_index",
    "left_middle",
    "left_ring",
    "left_little",
    "unknown",
)
"""Ten positions in the order of ISO/IEC 19794-2 codes 1 to 10, and `unknown`."""

COLUMNS = ("face", *FINGER_POSITIONS)
"""The gallery's columns. A row (an encounter) has at most one template in each."""

BIT = {column: 1 << index for index, column in enumerate(COLUMNS)}
"""column -> its bit in masks of columns."""

LIVE = "living, by "
"""The start of a provenance that says what proved that a living person was captured."""

RULINGS = ("same", "different", "recapture")
"""The rulings on a case: one person, two people, or new captures are needed."""

_NOT_TO_RECAPTURE = ("superseded", "missing")
"""Reasons of refusals after which nothing is captured again."""

RESERVED_PREFIXES = ("batch:", "load:", "merge:", "stage:")
"""Prefixes of the encounter_ids that the library makes: for records without one, batches of templates, and the steps of a merge."""

REASON_LENGTH_MAX, NOTE_LENGTH_MAX = 1_000, 4_000
CAPTURES_MAX, GROUPS_MAX = 100, 100
"""Limits of one encounter."""

CaptureData: TypeAlias = str | os.PathLike[str] | bytes | NDArray[Any]
Modality: TypeAlias = Literal["face", "finger"]
Outcome: TypeAlias = Literal["unique", "duplicate", "review", "refused"]
Kind: TypeAlias = Literal[
    "", "same_person", "look_alike", "shared_finger", "swapped_fingers", "mixed_record", "another_person"
]
Ruling: TypeAlias = Literal["same", "different", "recapture"]
Float32: TypeAlias = NDArray[np.float32]
Column: TypeAlias = Float32 | Sequence[bytes]
"""A column of several subjects: embeddings, float32 (n, d), or minutiae records, empty for a subject without one."""


def _check_data(data: object) -> None:
    if not isinstance(data, (str, os.PathLike, bytes, np.ndarray)):
        raise InvalidInput(
            f"a capture is a path, bytes or a numpy array, got {type(data).__name__}; "
            "pass the image file's path or its content"
        )


def _check_position(position: str, allowed: Sequence[str]) -> None:
    if position not in allowed:
        raise InvalidInput(f"position {position!r} is not known; use one of {', '.join(allowed)}")


@dataclass(frozen=True, eq=False)
class Face(Described):
    """A face capture.

    data: the path of an image file (str or os.PathLike), the content of one (bytes), or its pixels: a uint8 or uint16 array (h, w) grey,
    (h, w, 3) RGB or (h, w, 4) RGBA.
    """

    data: CaptureData = field(repr=False, metadata=BIOMETRIC)
    device: DeviceVerdict | None = None
    """The signed verdict of the capture device, about the bytes of `data`."""

    def __post_init__(self) -> None:
        _check_data(self.data)
        if self.device is not None and not isinstance(self.device, DeviceVerdict):
            raise InvalidInput(f"device is a DeviceVerdict, got {type(self.device).__name__}")

    @property
    def column(self) -> str:
        return "face"


@dataclass(frozen=True, eq=False)
class Finger(Described):
    """A finger capture: path, encoded bytes, or an array as for `Face`; or a minutiae record, as path or bytes.

    A record of ISO/IEC 19794-2:2005 or 2011 or ANSI/INCITS 378-2004 is recognised by its content; if position is `unknown`, the record's
    own position is used.
    dpi: dots per inch of the image; None takes the file's, or 500 if it states none.
    """

    data: CaptureData = field(repr=False, metadata=BIOMETRIC)
    position: str = "unknown"
    dpi: float | None = None

    def __post_init__(self) -> None:
        _check_data(self.data)
        check_fields(self)
        _check_position(self.position, FINGER_POSITIONS)
        if self.dpi is not None and not 72 <= self.dpi <= 4000:
            raise InvalidInput(f"dpi is {self.dpi}, wanted 72 to 4000; state the scanner's resolution")

    @property
    def column(self) -> str:
        return self.position


@dataclass(frozen=True)
class Missing(Described):
    """A capture that cannot be taken: amputated, bandaged, refused by the subject."""

    position: str
    reason: str

    def __post_init__(self) -> None:
        _check_position(self.position, COLUMNS)
        check_text(self.reason, "the reason why a capture is missing", REASON_LENGTH_MAX)

    @property
    def column(self) -> str:
        return self.position


Capture: TypeAlias = Face | Finger | Missing

_BESIDE_CAPTURES = {
    "Refusal": "pass it beside the captures, as declined=[refusal]",
    "Template": "pass it beside the captures, as templates={template.column: template}",
}
"""Type of a value that is no capture -> what to do with it."""


@dataclass(frozen=True, eq=False)
class Template(Described):
    """The embedding or the minutiae of one sample, or both, with the id of the model that made them.

    embedding: float32 (d,), unit length, or None. minutiae: a record as for `Finger`, or None.
    quality: the probability, 0..1, that a comparison with another capture of the same face or finger passes at FMR 1e-4. None if not
    measured.
    provenance: what was corrected of the capture's metadata, such as its resolution, and what proved that the person lives (LIVE), in words. A
    gallery does not keep it.
    """

    column: str
    model_id: str
    embedding: Float32 | None = field(default=None, repr=False, metadata=BIOMETRIC)
    minutiae: bytes | None = field(default=None, repr=False, metadata=BIOMETRIC)
    quality: float | None = None
    provenance: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_position(self.column, COLUMNS)
        check_fields(self)
        if self.embedding is None and self.minutiae is None:
            raise InvalidInput("a template needs an embedding or minutiae; it has neither")
        if self.minutiae is not None and self.column == "face":
            raise InvalidInput("a face template cannot hold minutiae; file them under a finger position")
        if self.quality is not None and not 0 <= self.quality <= 1:
            raise InvalidInput(
                f"quality of {self.column} is {self.quality:g}, wanted 0 to 1, the probability that a comparison with another capture "
                "passes; pass None for a quality of another scale"
            )
        if self.embedding is not None:
            rows = unit_rows(np.asarray(self.embedding)[None], what=f"the {self.column} embedding")
            object.__setattr__(self, "embedding", rows[0])

    @property
    def modality(self) -> Modality:
        return "face" if self.column == "face" else "finger"


@dataclass(frozen=True)
class Refusal(Described):
    """A capture that was declined: the reason, the value measured, and the limit that it missed."""

    column: str
    reason: str
    detail: str = ""
    measured: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Encounter:
    """One visit of one subject, with captures, ready-made templates, or both.

    templates: column -> float32 (d,) unit vector, or a minutiae record (bytes), or `Template`.
    model_id: the model of the bare vectors in templates: one for all, or by column. Optional if the gallery's column has a model already.
    encounter_id: makes the call idempotent; None gives each call a new id.
    groups: labels (OSIA calls them galleries) that a search can be restricted to.
    declined: captures that were refused earlier, for example by a worker that extracts; they count as sent and unusable.
    """

    subject_id: str | None = None
    captures: Sequence[Capture] = ()
    templates: Mapping[str, Float32 | bytes | Template] = field(default_factory=dict, repr=False)
    encounter_id: str | None = None
    groups: Sequence[str] = ()
    declined: Sequence[Refusal] = ()
    model_id: str | Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.captures, (Face, Finger, Missing)):
            raise InvalidInput("captures is a sequence, got one capture; write captures=[capture]")
        if isinstance(self.declined, Refusal):
            raise InvalidInput("declined is a sequence, got one Refusal; write declined=[refusal]")
        object.__setattr__(self, "groups", check_groups(self.groups))
        check_fields(self)
        declined = tuple(islice(self.declined, CAPTURES_MAX + 1))
        if len(declined) > CAPTURES_MAX:
            raise InvalidInput(f"an encounter has at most {CAPTURES_MAX} declined captures; leave some out")
        for refusal in declined:
            if not isinstance(refusal, Refusal):
                raise InvalidInput(
                    f"declined holds Refusal, got {type(refusal).__name__}; leave out what was not refused"
                )
            _check_position(refusal.column, COLUMNS)
            check_text(refusal.reason, "the reason of a declined capture", REASON_LENGTH_MAX)
            check_text(refusal.detail, "the detail of a declined capture", NOTE_LENGTH_MAX)
        object.__setattr__(self, "declined", declined)
        if self.subject_id is not None:
            check_id(self.subject_id, "subject_id")
        if self.encounter_id is not None:
            check_encounter_id(self.encounter_id)
        check_model_ids(self.model_id)
        captures = tuple(islice(self.captures, CAPTURES_MAX + 1))
        if len(captures) > CAPTURES_MAX:
            raise InvalidInput(f"an encounter has at most {CAPTURES_MAX} captures; send the best ones")
        for capture in captures:
            if not isinstance(capture, (Face, Finger, Missing)):
                remedy = _BESIDE_CAPTURES.get(type(capture).__name__, "wrap it, as Face(path)")
                raise InvalidInput(f"captures hold Face, Finger or Missing, got {type(capture).__name__}; {remedy}")
        object.__setattr__(self, "captures", captures)
        for column in self.templates:
            _check_position(column, COLUMNS)


@dataclass(frozen=True)
class EnrolledEncounter(Described):
    """One row of the gallery: an encounter of an enrolled subject. row: its number, which never changes; encounter_id: "" if it was loaded
    without one; templates: column -> template."""

    row: int
    encounter_id: str
    groups: tuple[str, ...]
    templates: Mapping[str, Template] = field(repr=False)


@dataclass(frozen=True)
class Score(Described):
    """One comparison. score_db = -10 log10(FMR); llr_db = 10 log10 of the likelihood ratio mated : non-mated."""

    score_db: float
    llr_db: float
    similarity: float | None = None
    minutiae: float | None = None
    extrapolated: bool = False


@dataclass(frozen=True)
class Evidence(Described):
    """The evidence of one capture for or against one candidate. candidate_column differs from column for a finger of unknown position, and
    if a search across positions found a wrong label. replay: the two embeddings are so alike that the captures are probably copies of one
    picture, or of one template; the model's card has the limit."""

    column: str
    candidate_column: str
    score_db: float
    llr_db: float
    similarity: float | None = None
    minutiae: float | None = None
    replay: bool = False

    @property
    def swapped(self) -> bool:
        """Whether the two sides label this finger differently. A finger of unknown position has no label."""
        return self.column != self.candidate_column and "unknown" not in (self.column, self.candidate_column)


@dataclass(frozen=True)
class Candidate(Described):
    """An enrolled subject or open case that a search returned; rank 1 is the strongest.

    label_penalty_db: the penalty in score_db for the readings that were tried: of a subject's several rows, and of the finger labels in a
    search across positions.
    kind: the kind of resemblance, "" below the review threshold. `same_person`; `look_alike`: the face agrees and the fingers do not, as
    with twins; `shared_finger`: one finger agrees and nothing else does, perhaps an operator's own; `swapped_fingers`; `mixed_record`:
    some of the probe's captures are of this candidate and some of another; `another_person`: the candidate has the encounter's
    subject_id, and the captures did not verify as this subject's.
    interval_db: the 95 % interval of score_db; None if the calibration has none. rows: the gallery rows that were compared. case: the
    encounter_id if the candidate is an open case, "" for an enrolled subject.
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
        return f"Candidate({self.subject_id!r}, rank={self.rank}, {_in_db(self)}{kind}{of_case})"

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
        """(position in the probe, position enrolled) of each finger that looks labelled wrongly on one of the sides."""
        return tuple((part.column, part.candidate_column) for part in self.evidence if part.swapped)


@dataclass(frozen=True)
class Verdict(Described):
    """A person's ruling on a case. candidate: the subject_id, or the encounter_id of an open case, that it is about; None for the case as
    a whole; by: the person; at: the time in seconds."""

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
        """Whether it is about the encounter's own subject: `same`, the captures are this subject's; `different`, they are not."""
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
    """low_db, high_db: the 95 % interval of the score; evidence: the score of each capture."""
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


def _in_db(scored: Candidate | Link) -> str:
    return f"{scored.score_db:.1f} dB{' (extrapolated)' if scored.extrapolated else ''}"


def _counted(values: Sequence[Any], noun: str) -> str:
    return f"{len(values)} {noun}{'' if len(values) == 1 else 's'}"


@dataclass(frozen=True)
class Decision(Tabular):
    """The decision on one encounter, with its evidence, thresholds and gallery version.

    incomplete: part of the gallery could not be searched; such a decision is never `unique`.
    reasons: why the encounter is in review: a `Candidate.kind` other than `same_person`; `open_case`; `uncalibrated`;
    `between_thresholds`; `little_evidence` (mates with these captures may score below the policy's review threshold); `extrapolated` (if
    the policy does not trust that); `incomplete`; `nothing_in_common` (no enrolled subject has a capture to compare). Of a refused
    encounter, `incomplete`: captures that `Policy.required` asks for are missing or unusable, and refusals lists them. The text of each:
    `match/judgement.py`.
    attainable_db: 95 % of mates with these captures score less. expected_fnir: the share of mates below review_db. Both are None if nothing
    was comparable. compared: how many rows have a capture in common with the probe.
    cleared: subjects that would be candidates, had a person not ruled on them. adjudicated: the verdict that closed the case.
    replacement: the reason of an update that replaced all rows of its subject.
    doubtful: captures that were accepted though their quality is low: with the reason, the quality and what a good one has.
    gallery_size: subjects enrolled plus open cases; the thresholds are for this size.
    policy_digest: of the policy that decided, as `gallery.policies.policy_digest`; empty in decisions of earlier releases.
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
        best = "" if self.best is None else f", best={self.best.key!r} at {_in_db(self.best)}"
        reasons = f", reasons={'+'.join(self.reasons)}" if self.reasons else ""
        return (
            f"Decision({self.outcome}, subject_id={self.subject_id!r}, encounter_id={self.encounter_id!r}, "
            f"{_counted(self.candidates, 'candidate')}{best}{reasons})"
        )

    def _rows(self) -> list[dict[str, Any]]:
        return [_candidate_row(candidate) for candidate in self.candidates]

    @property
    def final(self) -> bool:
        """Whether the encounter_id keeps this answer. A refusal of captures is not final: repaired, the encounter may be sent again."""
        return self.outcome != "refused" or self.adjudicated is not None

    @property
    def best(self) -> Candidate | None:
        """The strongest candidate, or None."""
        return self.candidates[0] if self.candidates else None

    @property
    def replays(self) -> tuple[tuple[str, str], ...]:
        """(column, key of the candidate) of each capture that is probably a copy of a candidate's."""
        return tuple((part.column, c.key) for c in self.candidates for part in c.evidence if part.replay)

    @property
    def recaptures(self) -> dict[str, str]:
        """Column -> why its capture should be taken again and how, in words: of captures that were refused, and unless the decision is
        `duplicate`, of those that were accepted with a low quality."""
        doubtful = () if self.outcome == "duplicate" else self.doubtful
        return {
            part.column: advice(part.reason, part.detail, part.measured, part.limit)
            for part in (*doubtful, *self.refusals)
            if part.reason not in _NOT_TO_RECAPTURE
        }


@dataclass(frozen=True)
class Case(Tabular):
    """An encounter that went to review.

    decision: as it stands now; an open case lists no candidates that were removed since. replaces: the encounter is an update of an
    enrolled subject; replacement: the reason, if it replaces all rows of the subject. templates, row: the case's templates and gallery
    row, while it is open. judged: rows that a verdict says are of another person. linked: encounter_ids of open cases that resemble it.
    If the subject itself is the candidate, the question is whether the captures are the subject's.
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
        return f"Case({self.encounter_id!r}, subject_id={self.subject_id!r}, {state}, {_counted(self.verdicts, 'verdict')})"

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
        """Whether the candidate is the enrolled subject whose id the encounter has."""
        return candidate.subject_id == self.subject_id and not candidate.case

    def _is_decided(self, candidate: Candidate) -> bool:
        if self.is_own(candidate):  # a judged subject is not listed again, unless it must be judged again
            return False
        if candidate.rows:
            return self.judged.issuperset(candidate.rows)
        return candidate.key in {verdict.candidate for verdict in self.verdicts}


def strong(decision: Decision) -> tuple[Candidate, ...]:
    """The candidates that reach the review threshold or have a kind, such as `shared_finger`, that a person has to judge."""
    return tuple(
        candidate for candidate in decision.candidates if candidate.kind or candidate.score_db >= decision.review_db
    )


@dataclass(frozen=True)
class Verification(Described):
    """A 1:1 comparison of an encounter with an enrolled subject. accepted: score_db reaches threshold_db, and no capture contradicts
    another. kind: as in `Candidate`, "" below the threshold."""

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
        """The columns whose capture is probably a copy of an enrolled one."""
        return tuple(part.column for part in self.evidence if part.replay)

    def __repr__(self) -> str:
        word = "accepted" if self.accepted else "not accepted"
        kind = f", {self.kind}" if self.kind else ""
        return f"Verification({self.subject_id!r}, {word}, {self.score_db:.1f} dB of {self.threshold_db:.1f} dB{kind})"


@dataclass(frozen=True, eq=False)
class SearchResult(Tabular):
    """ids: object (q, k) of subject_id, '' pads; similarity: float32 (q, k), descending, -inf pads.

    Unpacks as `ids, similarity = result`. incomplete: part of the gallery could not be searched.
    """

    ids: NDArray[np.object_]
    similarity: Float32
    gallery_version: int
    incomplete: bool = False

    _columns: ClassVar[Mapping[str, str]] = {
        "probe": "int64",
        "rank": "int64",
        "subject_id": "string",
        "similarity": "float32",
    }

    def __repr__(self) -> str:
        count, k = self.ids.shape
        incomplete = ", incomplete" if self.incomplete else ""
        return f"SearchResult({count} probe{'' if count == 1 else 's'}, k={k}, gallery_version={self.gallery_version}{incomplete})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready. Padding is left out: each probe has a list of its subjects."""
        several: list[list[dict[str, Any]]] = [[] for _ in self.ids]
        for row in self._rows():
            several[row["probe"]].append({"subject_id": row["subject_id"], "similarity": row["similarity"]})
        return {"probes": several, "gallery_version": self.gallery_version, "incomplete": self.incomplete}

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {
                "probe": probe,
                "rank": rank,
                "subject_id": str(subject_id),
                "similarity": float(self.similarity[probe, rank - 1]),
            }
            for probe, ids in enumerate(self.ids)
            for rank, subject_id in enumerate(ids, 1)
            if subject_id
        ]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.ids, self.similarity))


@dataclass(frozen=True)
class Link(Described):
    """Two subjects that score as one person. kind: as in `Candidate`; a person should judge every kind but `same_person` and
    `swapped_fingers`."""

    subject_ids: tuple[str, str]
    score_db: float
    extrapolated: bool
    evidence: tuple[Evidence, ...]
    kind: Kind = "same_person"

    def __repr__(self) -> str:
        return f"Link({self.subject_ids[0]!r}, {self.subject_ids[1]!r}, {_in_db(self)}, {self.kind})"


@dataclass(frozen=True)
class Cluster(Tabular):
    """Subjects connected by links. weakest_db: score of the weakest link that holds the cluster together. One false link can connect the
    records of two people.

    links_left_out: of a cluster with more than 1,000 links, how many are not in `links`, which has those that hold it together, the 100
    strongest and the 100 weakest. A link that was found from both sides may count twice."""

    subject_ids: tuple[str, ...]
    links: tuple[Link, ...]
    weakest_db: float
    links_left_out: int = 0

    _columns: ClassVar[Mapping[str, str]] = {
        "subject_a": "string",
        "subject_b": "string",
        "kind": "string",
        "score_db": "float64",
        "extrapolated": "bool",
    }

    def __repr__(self) -> str:
        names = ", ".join(map(repr, self.subject_ids[:3])) + (", ..." if len(self.subject_ids) > 3 else "")
        links = _counted(self.links, "link") + (f" and {self.links_left_out} left out" if self.links_left_out else "")
        return f"Cluster({_counted(self.subject_ids, 'subject')}: {names}; {links}, weakest {self.weakest_db:.1f} dB)"

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {
                "subject_a": link.subject_ids[0],
                "subject_b": link.subject_ids[1],
                "kind": link.kind,
                "score_db": link.score_db,
                "extrapolated": link.extrapolated,
            }
            for link in self.links
        ]


@dataclass(frozen=True)
class ListedSubject(Described):
    """An enrolled subject without its templates: its rows and their encounters ("" for one that was loaded without an encounter_id),
    its groups, and the columns in which it has a template."""

    subject_id: str
    rows: tuple[int, ...]
    encounter_ids: tuple[str, ...]
    groups: tuple[str, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Subject(Tabular):
    """Everything that a gallery holds of one id. encounters: its rows, oldest first, none where it is not enrolled; decisions: on its
    encounters, in their order, each as it stands now; open_cases: its encounters that wait for a verdict."""

    subject_id: str
    encounters: tuple[EnrolledEncounter, ...]
    decisions: tuple[Decision, ...] = ()
    open_cases: tuple[str, ...] = ()

    _columns: ClassVar[Mapping[str, str]] = {
        "row": "int64",
        "encounter_id": "string",
        "groups": "string",
        "columns": "string",
    }

    def __repr__(self) -> str:
        rows = _counted(self.encounters, "encounter") if self.enrolled else "not enrolled"
        waiting = f", {_counted(self.open_cases, 'open case')}" if self.open_cases else ""
        return f"Subject({self.subject_id!r}, {rows}, {_counted(self.decisions, 'decision')}{waiting})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without biometric data: of a template its model_id and quality."""
        more = {"enrolled": self.enrolled, "groups": list(self.groups)}
        return {"subject_id": self.subject_id, **more, **super().to_dict()}

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {
                "row": encounter.row,
                "encounter_id": encounter.encounter_id or None,
                "groups": ";".join(encounter.groups),
                "columns": ";".join(encounter.templates),
            }
            for encounter in self.encounters
        ]

    @property
    def enrolled(self) -> bool:
        return bool(self.encounters)

    @property
    def groups(self) -> tuple[str, ...]:
        """Of all rows."""
        return tuple(sorted({group for encounter in self.encounters for group in encounter.groups}))

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns in which it has a template."""
        held = {column for encounter in self.encounters for column in encounter.templates}
        return tuple(column for column in COLUMNS if column in held)


def check_id(value: object, name: str) -> None:
    """Raises InvalidInput unless value is a valid id: 1 to 256 visible characters in form NFC, without spaces around them.

    An invalid id is never repaired, since a register would not recognise it. A `KnownId` may be older than these rules, and passes.
    """
    if not isinstance(value, str):
        raise InvalidInput(f"{name} is a str, got {type(value).__name__}; convert it, as str(value)")
    if not isinstance(value, KnownId) and (problem := id_problem(value)) is not None:
        raise InvalidInput(f"{name} {problem}")


def check_encounter_id(value: object) -> None:
    """As `check_id`; also raises InvalidInput for an id with a prefix that the library reserves for its own."""
    check_id(value, "encounter_id")
    if isinstance(value, str) and not isinstance(value, KnownId) and value.startswith(RESERVED_PREFIXES):
        prefix = value[: value.index(":") + 1]
        raise InvalidInput(
            f"encounter_id {value!r} begins with {prefix!r}, which is reserved for ids that the library makes; put something before it"
        )


def check_text(value: object, name: str, length_max: int) -> None:
    """Raises InvalidInput unless value is text of at most length_max characters, without hidden characters except line ends and tabs."""
    if not isinstance(value, str):
        raise InvalidInput(f"{name} is a str, got {type(value).__name__}; convert it, as str(value)")
    if not isinstance(value, KnownId) and (problem := text_problem(value, length_max)) is not None:
        raise InvalidInput(f"{name} {problem}")


def check_model_ids(model_id: object) -> None:
    """Raises InvalidInput unless it is a model_id, a mapping column -> model_id, or None."""
    if isinstance(model_id, Mapping):
        for column, model_id_there in model_id.items():
            _check_position(column, COLUMNS)
            check_id(model_id_there, f"the model_id of {column}")
    elif model_id is not None:
        check_id(model_id, "model_id")


def model_of(column: str, model_id: str | Mapping[str, str] | None) -> str | None:
    """The model_id given for a column's bare vectors, or None."""
    return model_id.get(column) if isinstance(model_id, Mapping) else model_id


def check_groups(groups: object) -> tuple[str, ...]:
    """The groups, sorted, each once. Raises InvalidInput unless it is a sequence of at most 100 valid ids."""
    if isinstance(groups, str) or not isinstance(groups, Sequence | Set):
        raise InvalidInput(f"groups is a sequence of str, got {type(groups).__name__}; write groups=[name]")
    if len(groups) > GROUPS_MAX and not all(isinstance(group, KnownId) for group in groups):
        raise InvalidInput(f"{len(groups):,} groups were named; wanted at most {GROUPS_MAX}")
    for group in groups:
        check_id(group, "a group")
    return tuple(sorted(set(groups)))


def unit_rows(vectors: NDArray[Any], *, what: str = "vectors") -> Float32:
    """vectors: (n, d) floating. Returns float32 (n, d), C-order, rows scaled to exactly unit length.

    Raises InvalidInput for another shape or dtype, for NaN or infinity, and for rows whose length is not within 1 % of 1, which are
    probably raw network output.
    """
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or vectors.shape[1] == 0 or not np.issubdtype(vectors.dtype, np.floating):
        raise InvalidInput(f"{what}: shape {vectors.shape}, dtype {vectors.dtype}; wanted float32 (n, d)")
    rows = np.ascontiguousarray(vectors, dtype=np.float32)
    norms = np.linalg.norm(rows, axis=1)
    bad = np.flatnonzero(~np.isfinite(norms))
    if bad.size:
        raise InvalidInput(f"{what}: row {bad[0]} holds NaN or infinity ({bad.size} such rows); drop or repair them")
    bad = np.flatnonzero(np.abs(norms - 1) > 0.01)
    if bad.size:
        raise InvalidInput(
            f"{what}: row {bad[0]} has length {norms[bad[0]]:.4g}, wanted 1 ({bad.size} such rows); "
            "divide each row by its norm"
        )
    return np.asarray(rows / norms[:, None], np.float32)
