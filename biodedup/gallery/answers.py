"""What the gallery stores under an encounter_id: a digest of what was sent, and the answer that was given.

Owns these two encodings, the kinds of answers, and the rule for an encounter that is sent again. Never stores them.

An answer is a decision, or the receipt of a batch of templates that was loaded. Steps of jobs have a table of their own (`job_step`);
releases before 0.3.0 stored them as answers, and galleries may still hold those.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np

from biodedup.capture.reading import Unread
from biodedup.common.described import JSON_NAMES
from biodedup.errors import EncounterConflict, GalleryDamaged
from biodedup.required import INCOMPLETE
from biodedup.texts import KnownId
from biodedup.values import (
    Candidate,
    CaptureData,
    Decision,
    Encounter,
    Evidence,
    Missing,
    Refusal,
    Template,
    Verdict,
)

_FIELD_OF = {name: field for field, name in JSON_NAMES.items()}

LOADED, JOB_STEP = "loaded", "merged"
"""Outcomes of stored answers that are no decisions: the receipt of a load; a step of a job, in galleries of releases before 0.3.0."""


@dataclass(frozen=True)
class StoredDecision:
    """What was sent (digest) and what was answered (text, JSON). outcome: of the decision, or LOADED or JOB_STEP."""

    digest: bytes
    outcome: str
    text: str

    @classmethod
    def read(cls, digest: bytes, text: str) -> StoredDecision:
        """From a segment, which does not keep the outcome: the text tells it. A decision has a field `outcome`, a receipt has the digest
        of its batch, a step of a job has neither. Raises GalleryDamaged for what was never written."""
        outcome = parsed(text).get("outcome", LOADED if digest else JOB_STEP)
        if type(outcome) is not str:
            raise GalleryDamaged("a stored answer has no outcome; run `biodedup doctor`")
        return cls(digest, outcome, text)

    @property
    def kind(self) -> Literal["decision", "load", "job"]:
        """What was answered: a decision, the receipt of a load, or a step of a job."""
        if self.outcome == LOADED:
            return "load"
        return "job" if self.outcome == JOB_STEP else "decision"

    @cached_property
    def compressed(self) -> bytes:
        """The text as segments hold it. Made when an answer is recorded, so that sealing has nothing left to do."""
        return zlib.compress(self.text.encode())


AnswerOf: TypeAlias = Callable[[str], StoredDecision | None]
"""encounter_id -> what is stored of it, or None for one never seen."""


ANSWER_BYTES_MAX = 1 << 26
"""Of one answer's JSON: a decision has some kilobytes."""


def inflated(data: bytes) -> bytes:
    """The text of an answer as segments hold it, compressed. Raises GalleryDamaged."""
    inflating = zlib.decompressobj()
    try:
        text = inflating.decompress(data, ANSWER_BYTES_MAX)
    except zlib.error:
        text = b""
    if not inflating.eof:
        raise GalleryDamaged("a stored answer is cut short, or longer than any; run `biodedup doctor`")
    return text


def parsed(text: str) -> dict[str, Any]:
    """The fields of a JSON object that the gallery stored. Raises GalleryDamaged for anything else."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        fields = None
    if type(fields) is not dict:
        raise GalleryDamaged("a stored answer is no JSON object; run `biodedup doctor`")
    return fields


def digest_of(encounter: Encounter, operation: str = "enroll") -> bytes:
    """SHA-256 of what was sent: the operation, the id of the subject, and the content of every capture and template.

    The captures are as `capture.reading.held` gives them: what is digested is what is extracted.
    """
    if encounter.encounter_id is None:
        return b""  # without an id it cannot be sent again
    digest = hashlib.sha256()

    def add(*parts: bytes) -> None:
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)

    add((encounter.subject_id or "").encode())
    if (
        operation != "enroll" or encounter.groups
    ):  # an enrolment without groups has the digest that release 0.1.0 gave it
        add(operation.encode(), *(group.encode() for group in encounter.groups))
    for capture in encounter.captures:
        add(type(capture).__name__.encode(), capture.column.encode())
        if isinstance(capture, Missing):
            add(capture.reason.encode())
        else:
            add(*_content(capture.data))
            add(str(getattr(capture, "dpi", None)).encode())
            if (verdict := getattr(capture, "device", None)) is not None:
                add(verdict.content, verdict.signature)
    for column in sorted(encounter.templates):
        given = encounter.templates[column]
        add(column.encode())
        if isinstance(given, Template):
            add(given.model_id.encode(), given.minutiae or b"")
            given = given.embedding if given.embedding is not None else np.zeros(0, np.float32)
        add(*_content(given if isinstance(given, bytes) else np.asarray(given, np.float32)))
    return digest.digest()


def _content(data: CaptureData) -> tuple[bytes, ...]:
    if isinstance(data, np.ndarray):
        return str((data.shape, data.dtype.str)).encode(), np.ascontiguousarray(data).tobytes()
    if isinstance(data, bytes):
        return (data,)
    # a path that gave no bytes; releases before digested a file above the limit whole
    assert isinstance(data, Unread), "captures are held before they are digested"
    return b"unreadable", os.fsencode(data.path)


def to_json(decision: Decision) -> str:
    """One line of JSON, as `from_json` reads it."""
    return json.dumps(decision, default=_fields, separators=(",", ":"))


def _fields(value: Any) -> dict[str, Any]:
    """As `to_dict`, without copying what the fields hold."""
    return {JSON_NAMES.get(name, name): field for name, field in vars(value).items()}


def from_json(text: str) -> Decision:
    """The decision that `to_json` wrote. Raises GalleryDamaged for anything else."""
    try:
        return _decision(json.loads(text))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise GalleryDamaged(f"an answer is no decision ({type(error).__name__}); run `biodedup doctor`") from error


def _decision(fields: Mapping[str, Any]) -> Decision:
    verdict = fields.get("adjudicated")
    return Decision(
        **{
            **fields,
            "candidates": _candidates(fields["candidates"]),
            "cleared": _candidates(fields.get("cleared", ())),
            "adjudicated": None if verdict is None else _verdict(verdict),
            "refusals": tuple(Refusal(**refusal) for refusal in fields["refusals"]),
            "missing": tuple(Missing(m["position"], KnownId(m["reason"])) for m in fields["missing"]),
            "doubtful": tuple(Refusal(**part) for part in fields.get("doubtful", ())),
            "model_ids": tuple(fields["model_ids"]),
            "reasons": tuple(fields.get("reasons", ())),
        }
    )


def _verdict(fields: dict[str, Any]) -> Verdict:
    """As a gallery holds it: what was taken once is read for ever, whatever is asked of new ones."""
    return Verdict(**{**fields, "by": KnownId(fields["by"]), "note": KnownId(fields.get("note", ""))})


def _candidates(fields: Iterable[Mapping[str, Any]]) -> tuple[Candidate, ...]:
    return tuple(map(_candidate, fields))


def _candidate(fields: Mapping[str, Any]) -> Candidate:
    interval = fields.get("interval_db")
    decoded = {
        "evidence": tuple(Evidence(**part) for part in fields["evidence"]),
        "rows": tuple(fields.get("rows", ())),
        "interval_db": None if interval is None else tuple(interval),
    }
    return Candidate(**{_FIELD_OF.get(name, name): value for name, value in {**fields, **decoded}.items()})


def answered_before(answer_of: AnswerOf, encounter: Encounter, digest: bytes) -> Decision | None:
    """The answer that this encounter got, or None where it is to be decided. digest: of what is sent now.

    A refusal of captures is not final: with other content the encounter is decided anew, and after a refusal as incomplete with the same
    content, too, since the policy may ask for less by now. Raises EncounterConflict for other content of an encounter that was decided.
    """
    if encounter.encounter_id is None:
        return None
    stored = answer_of(encounter.encounter_id)
    if stored is None:
        return None
    if stored.outcome == "refused":
        fields = parsed(stored.text)
        if fields.get("adjudicated") is None and (stored.digest != digest or INCOMPLETE in fields.get("reasons", ())):
            return None
    if stored.digest != digest or stored.kind != "decision":
        raise _conflict(encounter.encounter_id)
    return from_json(stored.text)


def batch_answered_before(stored: StoredDecision | None, encounter_id: str, digest: bytes) -> bool:
    """Whether this batch was written before. Raises EncounterConflict for other content."""
    if stored is not None and stored.digest != digest:
        raise _conflict(encounter_id)
    return stored is not None


def _conflict(encounter_id: str) -> EncounterConflict:
    return EncounterConflict(
        f"encounter {encounter_id!r} was sent before with other content; give this one an id of its own"
    )
