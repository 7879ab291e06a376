"""The input of an engine: captures, templates and encounters.

Owns their fields and their validation. Never reads a file and never runs a model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from biodedup.common.arguments import check_fields
from biodedup.common.described import BIOMETRIC, Described
from biodedup.devices import DeviceVerdict
from biodedup.errors import InvalidInput
from biodedup.values.checks import (
    CAPTURES_MAX,
    NOTE_LENGTH_MAX,
    REASON_LENGTH_MAX,
    Float32,
    check_encounter_id,
    check_groups,
    check_id,
    check_model_ids,
    check_text,
    unit_rows,
)
from biodedup.values.columns import COLUMNS, FINGER_POSITIONS, check_position

LIVE = "living, by "
"""Start of a text in `Template.provenance`. The rest of the text names the proof that the captured person is alive."""

CaptureData: TypeAlias = str | os.PathLike[str] | bytes | NDArray[Any]
Modality: TypeAlias = Literal["face", "finger"]
Column: TypeAlias = Float32 | Sequence[bytes]
"""A column of several subjects: embeddings, float32 (n, d), or minutiae records, empty for a subject without one."""


def _check_data(data: object) -> None:
    if not isinstance(data, (str, os.PathLike, bytes, np.ndarray)):
        raise InvalidInput(
            f"a capture is a path, bytes or a numpy array, got {type(data).__name__}; "
            "pass the image file's path or its content"
        )


@dataclass(frozen=True, eq=False)
class Face(Described):
    """A face capture.

    data: an image file's path (str or os.PathLike) or content (bytes); or pixels: a uint8 or uint16 array, (h, w) grey, (h, w, 3) RGB or
    (h, w, 4) RGBA.
    """

    data: CaptureData = field(repr=False, metadata=BIOMETRIC)
    device: DeviceVerdict | None = None
    """The capture device's signed verdict about the bytes of `data`."""

    def __post_init__(self) -> None:
        _check_data(self.data)
        if self.device is not None and not isinstance(self.device, DeviceVerdict):
            raise InvalidInput(f"device is a DeviceVerdict, got {type(self.device).__name__}")

    @property
    def column(self) -> str:
        return "face"


@dataclass(frozen=True, eq=False)
class Finger(Described):
    """A finger capture: an image as for `Face`, or a minutiae record, as path or bytes.

    A minutiae record of ISO/IEC 19794-2:2005 or 2011 or ANSI/INCITS 378-2004 is recognised by its content. If position is `unknown`, the
    position in the record counts.
    dpi: dots per inch of the image. None: the file's value, or 500 if the file states none.
    """

    data: CaptureData = field(repr=False, metadata=BIOMETRIC)
    position: str = "unknown"
    dpi: float | None = None

    def __post_init__(self) -> None:
        _check_data(self.data)
        check_fields(self)
        check_position(self.position, FINGER_POSITIONS)
        if self.dpi is not None and not 72 <= self.dpi <= 4000:
            raise InvalidInput(f"dpi is {self.dpi}, wanted 72 to 4000; state the scanner's resolution")

    @property
    def column(self) -> str:
        return self.position


@dataclass(frozen=True)
class Missing(Described):
    """A capture that cannot be taken: the finger is amputated or bandaged, or the subject declines."""

    position: str
    reason: str

    def __post_init__(self) -> None:
        check_position(self.position, COLUMNS)
        check_text(self.reason, "the reason why a capture is missing", REASON_LENGTH_MAX)

    @property
    def column(self) -> str:
        return self.position


Capture: TypeAlias = Face | Finger | Missing

_BESIDE_CAPTURES = {
    "Refusal": "pass it beside the captures, as declined=[refusal]",
    "Template": "pass it beside the captures, as templates={template.column: template}",
}
"""Type of a value that is not a capture -> advice for the error."""


@dataclass(frozen=True, eq=False)
class Template(Described):
    """The embedding or the minutiae of one sample, or both, with the id of the model that made them.

    embedding: float32 (d,), unit length, or None. minutiae: a record as for `Finger`, or None.
    quality: the probability, 0 to 1, that a comparison with another capture of the same face or finger passes at FMR 1e-4; None: not
    measured.
    provenance: sentences about corrected metadata, such as the resolution, and about the proof that the person is alive (LIVE). A gallery
    does not keep them.
    """

    column: str
    model_id: str
    embedding: Float32 | None = field(default=None, repr=False, metadata=BIOMETRIC)
    minutiae: bytes | None = field(default=None, repr=False, metadata=BIOMETRIC)
    quality: float | None = None
    provenance: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_position(self.column, COLUMNS)
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
    """A declined capture: the reason, the measured value, and the limit that it misses."""

    column: str
    reason: str
    detail: str = ""
    measured: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Encounter:
    """One visit of one subject, with captures, ready-made templates, or both.

    templates: column -> float32 (d,) unit vector, or a minutiae record (bytes), or `Template`.
    model_id: the model of the bare vectors in `templates`, for all columns or by column. Optional if the gallery's column has a model.
    encounter_id: makes the call idempotent. None: each call has a new id.
    groups: labels that a search can be restricted to. (OSIA calls them galleries.)
    declined: captures that were refused before, for example by another process that extracts templates. They count as sent and unusable.
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
        object.__setattr__(self, "declined", _checked_declined(self.declined))
        if self.subject_id is not None:
            check_id(self.subject_id, "subject_id")
        if self.encounter_id is not None:
            check_encounter_id(self.encounter_id)
        check_model_ids(self.model_id)
        object.__setattr__(self, "captures", _checked_captures(self.captures))
        for column in self.templates:
            check_position(column, COLUMNS)


def _checked_declined(given: Sequence[Refusal]) -> tuple[Refusal, ...]:
    declined = tuple(islice(given, CAPTURES_MAX + 1))
    if len(declined) > CAPTURES_MAX:
        raise InvalidInput(f"an encounter has at most {CAPTURES_MAX} declined captures; leave some out")
    for refusal in declined:
        if not isinstance(refusal, Refusal):
            raise InvalidInput(f"declined holds Refusal, got {type(refusal).__name__}; leave out everything else")
        check_position(refusal.column, COLUMNS)
        check_text(refusal.reason, "the reason of a declined capture", REASON_LENGTH_MAX)
        check_text(refusal.detail, "the detail of a declined capture", NOTE_LENGTH_MAX)
    return declined


def _checked_captures(given: Sequence[Capture]) -> tuple[Capture, ...]:
    captures = tuple(islice(given, CAPTURES_MAX + 1))
    if len(captures) > CAPTURES_MAX:
        raise InvalidInput(f"an encounter has at most {CAPTURES_MAX} captures; send the best ones")
    for capture in captures:
        if not isinstance(capture, (Face, Finger, Missing)):
            remedy = _BESIDE_CAPTURES.get(type(capture).__name__, "wrap it, as Face(path)")
            raise InvalidInput(f"captures hold Face, Finger or Missing, got {type(capture).__name__}; {remedy}")
    return captures


@dataclass(frozen=True)
class EnrolledEncounter(Described):
    """One row of the gallery: an encounter of an enrolled subject.

    row: its number, which never changes. encounter_id: "" if the row was loaded without an id. templates: column -> template.
    """

    row: int
    encounter_id: str
    groups: tuple[str, ...]
    templates: Mapping[str, Template] = field(repr=False)
