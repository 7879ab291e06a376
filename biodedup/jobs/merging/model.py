"""Defines the types of a merge of registers: records, clusters of records of one person, the record that survives, and shared ids.

Owns no rule and no file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from biodedup.jobs.merging.registers import Register, SharedId
from biodedup.values import Link


@dataclass(frozen=True)
class Member:
    """A record in a cluster. subject_id: id in the merged register; original_id: id in its own register; order: row in its own register.

    enrolled_at: time of its decision, in seconds since 1970; None if it was not recorded, as in a bulk load. quality: mean quality of its
    templates, 0 to 1; None if it was not measured. central: it belongs to the central register. templates: column -> quality of its template,
    0 to 1 or None.
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
class AbsorbedRecord:
    """A record that is merged into the survivor. gives: the columns in which the survivor takes over its template."""

    member: Member
    survivor: Member
    gives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """The settings of a merge. Links with a score of at least joined_db are listed; links of at least threshold_db form clusters."""

    threshold_db: float
    joined_db: float
    verify_db: float
    rule: str
    prefer: tuple[str, ...]
    min_db: float | None
    across_positions: bool


@dataclass(frozen=True)
class Group:
    """A cluster of records of one person. absorbed: all members except the survivor; applies: trusted links alone connect all members, so that the
    merge may be applied without a person's judgement."""

    number: int
    members: tuple[Member, ...]
    links: tuple[Link, ...]
    weakest_db: float
    survivor: Member
    absorbed: tuple[AbsorbedRecord, ...]
    applies: bool

    @cached_property
    def gives(self) -> dict[str, tuple[str, ...]]:
        """subject_id -> columns in which the survivor takes over the template of this record."""
        return {self.survivor.subject_id: ()} | {record.member.subject_id: record.gives for record in self.absorbed}

    @property
    def strongest_db(self) -> float:
        return self.links[0].score_db

    @cached_property
    def links_of(self) -> Counter[str]:
        return Counter(name for link in self.links for name in link.subject_ids)

    @cached_property
    def to_survivor_db(self) -> dict[str, float]:
        """subject_id -> score of the link with the survivor, for members that have one."""
        survivor = self.survivor.subject_id
        with_survivor = [link for link in self.links if survivor in link.subject_ids]
        return {a if b == survivor else b: link.score_db for link in with_survivor for a, b in [link.subject_ids]}


@dataclass(frozen=True)
class Checked:
    """A subject whose id several districts use. against: index of the first district with that id; None for the subject of that district."""

    shared: SharedId
    against: int | None
    score_db: float | None
    verdict: str | None


@dataclass(frozen=True, eq=False)
class Findings:
    """All results of one merge. links: each pair once, the highest scores first. district_of: subject_id of a link -> its district. left_out:
    number of links of large clusters that are not in `links`."""

    registers: Sequence[Register]
    links: Sequence[Link]
    groups: Sequence[Group]
    checked: Sequence[Checked]
    district_of: Mapping[str, str]
    settings: Settings
    left_out: int = 0

    @cached_property
    def strong(self) -> list[Link]:
        return [link for link in self.links if link.score_db >= self.settings.threshold_db]

    @property
    def for_review(self) -> Sequence[Link]:
        return self.links[len(self.strong) :]
