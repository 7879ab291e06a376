"""Which captures of an encounter count: the better one of each column, and whether all that the policy requires are there.

Owns the grammar of `Policy.required`, what counts toward it, and the rule that the better of two captures is kept. Never looks at a capture
and never decides.
"""

from __future__ import annotations

import re
from collections.abc import Collection, MutableMapping, Sequence

from biodedup.errors import InvalidInput
from biodedup.values import FINGER_POSITIONS, Missing, Refusal, Template

SENT = "sent"
"""The requirement that every capture that was sent can be used."""
INCOMPLETE = "incomplete"
"""The reason of a refusal for lack of captures."""
SUPERSEDED = "superseded"
"""The reason of a sound capture of which a better one was sent, too."""

_TEN = FINGER_POSITIONS[:-1]
_SINGLE = ("face", *_TEN)
_FINGERS = re.compile(r"([1-9]|10) fingers?")


def check_required(required: object) -> tuple[str, ...]:
    """The requirements, each once. Raises InvalidInput unless each is `sent`, `face`, a finger's position, or `N fingers`."""
    if isinstance(required, str) or not isinstance(required, Sequence):
        raise InvalidInput(f"required is a sequence of texts, got {required!r}; write required=('face', '2 fingers')")
    for one in required:
        if not isinstance(one, str) or not (one == SENT or one in _SINGLE or _FINGERS.fullmatch(one)):
            raise InvalidInput(
                f"required has {one!r}, wanted 'sent', 'face', 'N fingers' with N from 1 to 10, or a finger's position: "
                f"{', '.join(_TEN)}"
            )
    return tuple(dict.fromkeys(required))


def keep_better(templates: MutableMapping[str, Template], template: Template) -> Refusal | None:
    """Files a template under its column. Of two captures of one column the better quality is kept, the earlier one where they are equal;
    a quality that was not measured counts as zero. Returns the refusal of the other one."""
    kept = templates.get(template.column)
    if kept is None:
        templates[template.column] = template
        return None
    if (template.quality or 0.0) > (kept.quality or 0.0):
        templates[template.column], template = template, kept
    return superseded(template)


def superseded(template: Template) -> Refusal:
    """The refusal of a sound capture of which a better one was sent."""
    return Refusal(template.column, SUPERSEDED, "a better capture was kept", template.quality)


def shortfall(
    required: Sequence[str], usable: Collection[str], refusals: Sequence[Refusal], missing: Sequence[Missing]
) -> tuple[Refusal, ...]:
    """What an encounter lacks, each capture with its column and why; empty where it is complete.

    usable: columns with a template. A column that `missing` states is excused; the fingers that it states are taken off the ten that
    `N fingers` may ask for, so that nobody has to show more fingers than there are.
    """
    excused = {capture.position for capture in missing}
    declined = [one for one in refusals if one.reason != SUPERSEDED and one.column not in excused]
    found: list[Refusal] = []
    for one in required:
        if one == SENT:
            found += declined
        elif one in _SINGLE:
            if one not in usable and one not in excused:
                found += [refusal for refusal in declined if refusal.column == one] or [_not_sent(one)]
        else:
            there = sum(column in FINGER_POSITIONS for column in usable)
            left = sum(finger not in excused or finger in usable for finger in _TEN)
            wanted = min(int(one.split()[0]), left)
            if there < wanted:
                found += [refusal for refusal in declined if refusal.column in FINGER_POSITIONS]
                found.append(_too_few(there, wanted))
    return tuple(dict.fromkeys(found))


def _not_sent(column: str) -> Refusal:
    return Refusal(column, "not_sent", "the policy requires it; capture it, or state why it cannot be had")


def _too_few(there: int, wanted: int) -> Refusal:
    detail = "the policy requires more fingers; capture them, or state why they cannot be had"
    return Refusal("fingers", "too_few_fingers", detail, there, wanted)
