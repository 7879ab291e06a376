"""What the gallery remembers of an encounter: a digest of what was sent, and the decision that was answered.

Owns these two encodings. Never stores them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from biodedup.values import Candidate, CaptureData, Decision, Encounter, Evidence, Missing, Refusal, Template


def digest_of(encounter: Encounter, operation: str = "enroll") -> bytes:
    """SHA-256 of what was sent: the operation, the id of the subject, and the content of every capture and template."""
    if encounter.encounter_id is None:
        return b""  # nobody can send it again
    digest = hashlib.sha256()

    def add(*parts: bytes) -> None:
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)

    add(operation.encode(), (encounter.subject_id or "").encode(), *(group.encode() for group in encounter.groups))
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
        add(*_content(np.asarray(given, np.float32)))
    return digest.digest()


def _content(data: CaptureData) -> tuple[bytes, ...]:
    if isinstance(data, np.ndarray):
        return str((data.shape, data.dtype.str)).encode(), np.ascontiguousarray(data).tobytes()
    if isinstance(data, bytes):
        return (data,)
    try:
        return (Path(data).read_bytes(),)
    except OSError:
        return b"unreadable", str(data).encode()  # extraction will refuse it, with the reason


def to_json(decision: Decision) -> str:
    """One line of JSON, as `from_json` reads it."""
    return json.dumps(asdict(decision), separators=(",", ":"))


def from_json(text: str) -> Decision:
    """The decision that `to_json` wrote."""
    fields = json.loads(text)
    candidates = tuple(
        Candidate(**{**candidate, "evidence": tuple(Evidence(**part) for part in candidate["evidence"])})
        for candidate in fields["candidates"]
    )
    return Decision(
        **{
            **fields,
            "candidates": candidates,
            "refusals": tuple(Refusal(**refusal) for refusal in fields["refusals"]),
            "missing": tuple(Missing(**missing) for missing in fields["missing"]),
            "model_ids": tuple(fields["model_ids"]),
        }
    )
