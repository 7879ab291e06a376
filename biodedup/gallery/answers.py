"""What the gallery remembers of an encounter: a digest of what was sent, and the decision that was answered.

Owns these two encodings, and what sending an encounter again means. Never stores them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from biodedup.capture.reading import Unread
from biodedup.errors import EncounterConflict, GalleryDamaged
from biodedup.required import INCOMPLETE
from biodedup.texts import KnownId
from biodedup.values import (
    JSON_NAMES,
    Candidate,
    CaptureData,
    Column,
    Decision,
    Encounter,
    Evidence,
    Missing,
    Refusal,
    Template,
    Verdict,
)

_FIELD_OF = {name: field for field, name in JSON_NAMES.items()}


def digest_of(encounter: Encounter, operation: str = "enroll") -> bytes:
    """SHA-256 of what was sent: the operation, the id of the subject, and the content of every capture and template.

    The captures are as `capture.reading.held` gives them: what is digested is what is extracted.
    """
    if encounter.encounter_id is None:
        return b""  # nobody can send it again
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


def answered_before(
    answer_of: Callable[[str], tuple[bytes, str] | None], encounter: Encounter, digest: bytes
) -> Decision | None:
    """The answer that this encounter got, or None where it is to be decided. digest: of what is sent now.

    A refusal of captures is not final: with other content the encounter is decided anew, and after a refusal as incomplete with the same
    content, too, since the policy may ask for less by now. Raises EncounterConflict for other content of an encounter that was decided.
    """
    if encounter.encounter_id is None:
        return None
    stored = answer_of(encounter.encounter_id)
    if stored is None:
        return None
    fields = json.loads(stored[1])
    refused = fields.get("outcome") == "refused" and fields.get("adjudicated") is None
    if refused and (stored[0] != digest or INCOMPLETE in fields.get("reasons", ())):
        return None
    if stored[0] != digest:
        raise _conflict(encounter.encounter_id)
    return from_json(stored[1])


def batch_answered_before(stored: tuple[bytes, str] | None, encounter_id: str, digest: bytes) -> bool:
    """Whether this batch was written before. Raises EncounterConflict for other content."""
    if stored is not None and stored[0] != digest:
        raise _conflict(encounter_id)
    return stored is not None


def _conflict(encounter_id: str) -> EncounterConflict:
    return EncounterConflict(
        f"encounter {encounter_id!r} was sent before with other content; give this one an id of its own"
    )


def digest_of_batch(
    ids: Sequence[str], columns: Mapping[str, tuple[str, Column]], groups: Sequence[tuple[str, ...]]
) -> bytes:
    """SHA-256 of a batch of templates. columns: column -> (model_id, embeddings or records)."""
    digest = hashlib.sha256("\n".join(ids).encode())
    for column, (_, cells) in sorted(columns.items(), key=lambda item: item[0]):
        digest.update(column.encode())
        if isinstance(cells, np.ndarray):
            digest.update(cells.data)
        else:
            digest.update(repr([len(record) for record in cells]).encode() + b"".join(cells))
    if any(groups):
        digest.update(json.dumps(groups).encode())
    return digest.digest()
