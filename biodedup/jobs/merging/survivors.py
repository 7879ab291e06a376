"""Chooses which record of a person survives a merge, and which templates it takes over from the others.

Owns the rules. Never removes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from biodedup.errors import InvalidInput
from biodedup.jobs.merging.model import AbsorbedRecord, Member
from biodedup.values import COLUMNS

_Key: TypeAlias = Callable[[Member], tuple[float, ...]]


def _newest(member: Member) -> tuple[float, ...]:
    return (1, 0) if member.enrolled_at is None else (0, -member.enrolled_at)


def _oldest(member: Member) -> tuple[float, ...]:
    return (1, 0) if member.enrolled_at is None else (0, member.enrolled_at)


RULES: dict[str, _Key] = {
    "most_captures": lambda member: (-member.captures,),
    "best_quality": lambda member: _worse(member.quality),
    "newest": _newest,
    "oldest": _oldest,
    "district": lambda member: (),
}
"""Sort keys; the record with the smallest one survives. A record that lacks what the rule compares sorts last."""


def check_rule(rule: str, prefer: Sequence[str], districts: Sequence[str]) -> None:
    """Raises InvalidInput for a rule or a district that is not known."""
    if rule not in RULES:
        raise InvalidInput(f"rule {rule!r} is not known; use one of {', '.join(RULES)}")
    unknown = [name for name in prefer if name not in districts]
    if unknown:
        raise InvalidInput(f"preferred district {unknown[0]!r} is none of these: {', '.join(districts)}")
    if rule == "district" and not prefer:
        raise InvalidInput("the rule `district` goes by an order of districts; name it, as --prefer NAME, best first")


def survivor(members: Sequence[Member], rule: str, prefer: Sequence[str] = ()) -> Member:
    """The record that survives by the rule. Ties go to the district that is first in `prefer`, then to the central register, then to the
    smaller subject_id."""
    rank = {name: place for place, name in enumerate(prefer)}
    key = RULES[rule]
    return min(
        members,
        key=lambda member: (*key(member), rank.get(member.district, len(rank)), not member.central, member.subject_id),
    )


def absorbed(members: Sequence[Member], survivor: Member) -> tuple[AbsorbedRecord, ...]:
    """All members but the survivor. In each column that the survivor lacks it takes over the template of the best quality; a quality that
    was not measured sorts last, and ties go to the smaller subject_id."""
    giver_of: dict[str, Member] = {}
    for column in COLUMNS:
        having = [member for member in members if column in member.templates]
        if having and column not in survivor.templates:
            giver_of[column] = min(having, key=lambda member: (_worse(member.templates[column]), member.subject_id))
    others = [member for member in members if member is not survivor]
    return tuple(
        AbsorbedRecord(member, survivor, tuple(column for column, giver in giver_of.items() if giver is member))
        for member in others
    )


def _worse(quality: float | None) -> tuple[float, ...]:
    return (1, 0) if quality is None else (0, -quality)
