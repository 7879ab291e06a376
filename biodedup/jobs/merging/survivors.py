"""Which of the records of one person stays, and what it gets from the others.

Owns the rules and the facts about a record that they go by. Never removes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from biodedup.errors import InvalidInput
from biodedup.values import COLUMNS


@dataclass(frozen=True)
class Member:
    """A record in a cluster. subject_id: in the merged register; original_id, order (its row): in its own one.

    enrolled_at: seconds, when its encounter was decided; None where that was not recorded, as of what was loaded in bulk.
    quality: 0 to 1, the mean over its templates; None where it was not measured. central: of the register that others join.
    templates: column -> quality of its template, 0 to 1 or None.
    """

    subject_id: str
    district: str
    original_id: str
    captures: int
    order: int
    encounter_id: str = ""
    enrolled_at: float | None = None
    quality: float | None = None
    central: bool = False
    templates: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Folded:
    """A record that does not stay. gives: columns in which the one that stays has its template from now on."""

    member: Member
    stays: Member
    gives: tuple[str, ...] = ()


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
"""The smallest key stays. A record without the fact that a rule asks for comes last."""


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
    """The record that stays, by the rule. What ties goes by the order in `prefer`, then to the central register, then to the
    smaller subject_id."""
    rank = {name: place for place, name in enumerate(prefer)}
    key = RULES[rule]
    return min(
        members,
        key=lambda member: (*key(member), rank.get(member.district, len(rank)), not member.central, member.subject_id),
    )


def folded(members: Sequence[Member], stays: Member) -> list[Folded]:
    """All but the one that stays. In each column that it lacks it gets the template of best quality; one that was not measured comes
    last, and what ties goes to the smaller subject_id."""
    giver_of: dict[str, Member] = {}
    for column in COLUMNS:
        having = [member for member in members if column in member.templates]
        if having and column not in stays.templates:
            giver_of[column] = min(having, key=lambda member: (_worse(member.templates[column]), member.subject_id))
    others = [member for member in members if member is not stays]
    return [Folded(one, stays, tuple(column for column, giver in giver_of.items() if giver is one)) for one in others]


def _worse(quality: float | None) -> tuple[float, ...]:
    return (1, 0) if quality is None else (0, -quality)
