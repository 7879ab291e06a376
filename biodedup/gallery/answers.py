"""The stored answer to an encounter: a digest of the request, and the answer itself.

Owns the encoding of both, the kinds of answers, and the rule for an encounter that is sent again. Never stores anything.

An answer is a decision, or the receipt of a loaded batch of templates. Job steps have their own table (`job_step`). Releases before 0.3.0
stored them as answers, which galleries may still hold.
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
"""Outcomes of stored answers that are not decisions: the receipt of a load; a job step (in galleries of releases before 0.3.0)."""


@dataclass(frozen=True)
class StoredDecision:
    """A stored answer. digest: of the request; text: the answer (JSON); outcome: of the decision, or LOADED or JOB_STEP."""

    digest: bytes
    outcome: str
    text: str

    @classmethod
    def read(cls, digest: bytes, text: str) -> StoredDecision:
        """An answer from a segment, which does not store the outcome. A decision has it in its text, a receipt has the digest of its batch,
        and a job step has neither. Raises GalleryDamaged for other content."""
        outcome = parsed(text).get("outcome", LOADED if digest else JOB_STEP)
        if type(outcome) is not str:
            raise GalleryDamaged("a stored answer has no outcome; run `biodedup doctor`")
        return cls(digest, outcome, text)

    @property
    def kind(self) -> Literal["decision", "load", "job"]:
        """The kind of the answer: a decision, the receipt of a load, or a job step."""
        if self.outcome == LOADED:
            return "load"
        return "job" if self.outcome == JOB_STEP else "decision"

    @cached_property
    def compressed(self) -> bytes:
        """The text as segments store it. It is computed when the answer is recorded, so that sealing is fast."""
        return zlib.compress(self.text.encode())


AnswerOf: TypeAlias = Callable[[str], StoredDecision | None]
"""encounter_id -> its stored answer, or None for an unknown encounter."""


ANSWER_BYTES_MAX = 1 << 26
"""The limit for the JSON of one answer. A decision has some kilobytes."""


def inflated(data: bytes) -> bytes:
    """The decompressed text of an answer. data: from a segment. Raises GalleryDamaged."""
    inflating = zlib.decompressobj()
    try:
        text = inflating.decompress(data, ANSWER_BYTES_MAX)
    except zlib.error:
        text = b""
    if not inflating.eof:
        raise GalleryDamaged(
            f"a stored answer is truncated, or longer than {ANSWER_BYTES_MAX:,} bytes; run `biodedup doctor`"
        )
    return text


def parsed(text: str) -> dict[str, Any]:
    """The fields of a stored JSON object. Raises GalleryDamaged for other content."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        fields = None
    if type(fields) is not dict:
        raise GalleryDamaged("a stored answer is not a JSON object; run `biodedup doctor`")
    return fields


def digest_of(encounter: Encounter, operation: str = "enroll") -> bytes:
    """The SHA-256 of a request: the operation, the id of the subject, and the content of every capture and template.

    The captures come from `capture.reading.held`, so that exactly the digested bytes are extracted.
    """
    if encounter.encounter_id is None:
        return b""  # an encounter without an id cannot be sent again
    digest = hashlib.sha256()

    def add(*parts: bytes) -> None:
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)

    add((encounter.subject_id or "").encode())
    if operation != "enroll" or encounter.groups:  # without groups, an enrolment keeps the digest of release 0.1.0
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
    # a path that could not be read; earlier releases digested the whole content of a file above the limit
    assert isinstance(data, Unread), "captures are held before they are digested"
    return b"unreadable", os.fsencode(data.path)


def to_json(decision: Decision) -> str:
    """A decision as one line of JSON, for `from_json`."""
    return json.dumps(decision, default=_fields, separators=(",", ":"))


def _fields(value: Any) -> dict[str, Any]:
    """As `to_dict`, without copying the values."""
    return {JSON_NAMES.get(name, name): field for name, field in vars(value).items()}


def from_json(text: str) -> Decision:
    """The decision from the JSON of `to_json`. Raises GalleryDamaged for other content."""
    try:
        return _decision(json.loads(text))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise GalleryDamaged(
            f"a stored answer is not a decision ({type(error).__name__}); run `biodedup doctor`"
        ) from error


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
    """A stored verdict. KnownId: its texts are not checked again, because the rules for new texts may be stricter."""
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
    """The stored decision of an encounter that is sent again, or None if it must be decided. digest: of the present request.

    A refusal is not final: with other content the encounter is decided again. After a refusal as incomplete it is decided again even with
    the same content, because the policy may have changed. Raises EncounterConflict for other content of an encounter that was decided.
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
    """Whether a batch was loaded before. Raises EncounterConflict for other content."""
    if stored is not None and stored.digest != digest:
        raise _conflict(encounter_id)
    return stored is not None


def _conflict(encounter_id: str) -> EncounterConflict:
    return EncounterConflict(
        f"encounter {encounter_id!r} was sent before with other content; send this content with another encounter_id"
    )
