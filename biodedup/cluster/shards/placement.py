"""Says which nodes hold which groups of segments. Pure functions: knows nothing of actors.

Places follow from the names of the nodes alone, so that all front-ends find the same ones without asking each other. A node that goes or
comes changes only the groups that it had or gets (rendezvous hashing: Thaler and Ravishankar, 1998).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import xxhash


class Place(NamedTuple):
    """Where a replica of a group is. slot: tells apart replicas of a group that have to share a node."""

    group: int
    node: str
    slot: int


def by_rendezvous(key: str, names: Collection[str]) -> list[str]:
    """The names in the order in which they are preferred for a key: highest random weight first."""
    return sorted(names, key=lambda name: (xxhash.xxh3_64_intdigest(f"{key}\0{name}".encode()), name), reverse=True)


def group_of(key: str, groups: int) -> int:
    """The group that a unit of segments belongs to."""
    return int(by_rendezvous(key, [str(number) for number in range(groups)])[0])


def places_of(
    key: str, group: int, nodes: Collection[str], replicas: int, unwell: Collection[str] = ()
) -> Sequence[Place]:
    """The places of a group's replicas: on different nodes where there are so many. key: of the register; unwell: nodes that are taken
    only where the others do not suffice."""
    preferred = by_rendezvous(f"{key}/{group}", nodes)
    preferred.sort(key=lambda node: node in unwell)  # stable
    count = len(preferred)
    return [Place(group, preferred[i % count], i // count) for i in range(replicas if count else 0)]
