"""Chooses which record of a person survives a merge of registers, and which templates it takes over from the other records.

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
"""rule -> sort key of a record. The record with the smallest key survives; a record without the compared value sorts last."""


def check_rule(rule: str, prefer: Sequence[str], districts: Sequence[str]) -> None:
    """Raises InvalidInput for an unknown rule or district."""
    if rule not in RULES:
        raise InvalidInput(f"rule {rule!r} is not known; use one of {', '.join(RULES)}")
    unknown = [name for name in prefer if name not in districts]
    if unknown:
        raise InvalidInput(f"preferred district {unknown[0]!r} is not known; the districts are {', '.join(districts)}")
    if rule == "district" and not prefer:
        raise InvalidInput("the rule `district` needs an order of districts; name them with --prefer NAME, best first")


def survivor(members: Sequence[Member], rule: str, prefer: Sequence[str] = ()) -> Member:
    """The record that survives by the rule. Ties are broken by the order of `prefer`, then for the central register, then for the smaller
    subject_id."""
    rank = {name: place for place, name in enumerate(prefer)}
    key = RULES[rule]
    return min(
        members,
        key=lambda member: (*key(member), rank.get(member.district, len(rank)), not member.central, member.subject_id),
    )


def absorbed(members: Sequence[Member], survivor: Member) -> tuple[AbsorbedRecord, ...]:
    """All members except the survivor, with the templates that the survivor takes over: in each column that it lacks, the template of the best
    quality. An unknown quality sorts last, and ties go to the smaller subject_id."""
    giver_of: dict[str, Member] = {}
    for column in COLUMNS:
        candidates = [member for member in members if column in member.templates]
        if candidates and column not in survivor.templates:
            giver_of[column] = min(candidates, key=lambda member: (_worse(member.templates[column]), member.subject_id))
    others = [member for member in members if member is not survivor]
    return tuple(
        AbsorbedRecord(member, survivor, tuple(column for column, giver in giver_of.items() if giver is member))
        for member in others
    )


def _worse(quality: float | None) -> tuple[float, ...]:
    return (1, 0) if quality is None else (0, -quality)
