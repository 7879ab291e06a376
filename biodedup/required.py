"""Checks whether an encounter has every required capture, and keeps the better of two captures of one finger or face.

Owns the grammar of `Policy.required`, and the rule for the better capture. Never reads a capture and never decides.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, MutableMapping, Sequence

from biodedup.common.quality import MEANING
from biodedup.errors import InvalidInput
from biodedup.values import FINGER_POSITIONS, Missing, Refusal, Template

SENT = "sent"
"""The requirement that every capture that was sent is usable."""
INCOMPLETE = "incomplete"
"""The reason of a decision `refused` because required captures are missing."""
SUPERSEDED = "superseded"
"""The reason of the refusal of a usable capture, if the encounter has a better capture of its column."""

QUALITY_GOOD = 0.9
"""`Template.quality` below which a decision advises another capture. One in a hundred faces of LFW is below it; their mated comparisons
fail twenty times as often as those of other faces."""

_TEN = FINGER_POSITIONS[:-1]
_SINGLE = ("face", *_TEN)
_FINGERS = re.compile(r"([1-9]|10) fingers?")


def check_required(required: object) -> tuple[str, ...]:
    """The requirements without repetitions. Raises InvalidInput unless each is `sent`, `face`, a finger's position, or `N fingers`."""
    if isinstance(required, str) or not isinstance(required, Sequence):
        raise InvalidInput(f"required is a sequence of texts, got {required!r}; write required=('face', '2 fingers')")
    for item in required:
        if not isinstance(item, str) or not (item == SENT or item in _SINGLE or _FINGERS.fullmatch(item)):
            raise InvalidInput(
                f"required has {item!r}, wanted 'sent', 'face', 'N fingers' with N from 1 to 10, or a finger's position: "
                f"{', '.join(_TEN)}"
            )
    return tuple(dict.fromkeys(required))


def keep_better(templates: MutableMapping[str, Template], template: Template) -> Refusal | None:
    """Adds a template to `templates` under its column. If the column has a template, the template of higher quality stays, of equal
    quality the earlier one; an unmeasured quality counts as zero. Returns the refusal of the template that is left out."""
    kept = templates.get(template.column)
    if kept is None:
        templates[template.column] = template
        return None
    if (template.quality or 0.0) > (kept.quality or 0.0):
        templates[template.column], template = template, kept
    return superseded(template)


def superseded(template: Template) -> Refusal:
    """The refusal of a usable capture, because a better capture of its column was sent."""
    return Refusal(template.column, SUPERSEDED, "a better capture was kept", template.quality)


def doubtful(templates: Iterable[Template]) -> tuple[Refusal, ...]:
    """The templates of low quality, below QUALITY_GOOD, described as refusals. They were accepted nevertheless."""
    return tuple(
        Refusal(template.column, "low_quality", MEANING, template.quality, QUALITY_GOOD)
        for template in templates
        if template.quality is not None and template.quality < QUALITY_GOOD
    )


def shortfall(
    required: Sequence[str], usable: Collection[str], refusals: Sequence[Refusal], missing: Sequence[Missing]
) -> tuple[Refusal, ...]:
    """The required captures that an encounter lacks, each with its column and reason; empty if it is complete.

    usable: columns with a template. A column in `missing` is excused. `N fingers` never asks for more fingers than ten minus those in
    `missing`.
    """
    excused = {capture.position for capture in missing}
    declined = [refusal for refusal in refusals if refusal.reason != SUPERSEDED and refusal.column not in excused]
    lacking: list[Refusal] = []
    for item in required:
        if item == SENT:
            lacking += declined
        elif item in _SINGLE:
            if item not in usable and item not in excused:
                lacking += [refusal for refusal in declined if refusal.column == item] or [_not_sent(item)]
        else:
            count = sum(column in FINGER_POSITIONS for column in usable)
            available = sum(finger not in excused or finger in usable for finger in _TEN)
            wanted = min(int(item.split()[0]), available)
            if count < wanted:
                lacking += [refusal for refusal in declined if refusal.column in FINGER_POSITIONS]
                lacking.append(_too_few(count, wanted))
    return tuple(dict.fromkeys(lacking))


def _not_sent(column: str) -> Refusal:
    return Refusal(column, "not_sent", "the policy requires it; capture it, or state why it cannot be had")


def _too_few(count: int, wanted: int) -> Refusal:
    detail = "the policy requires more fingers; capture them, or state why they cannot be had"
    return Refusal("fingers", "too_few_fingers", detail, count, wanted)
