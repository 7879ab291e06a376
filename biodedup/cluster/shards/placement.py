"""Says which nodes hold which groups of segments. Pure functions: knows nothing of actors.

Places follow from the names and the room of the nodes and from the sizes of the groups, so that all front-ends find the same ones without asking
each other. A node that goes or comes changes only the groups that it had or gets (rendezvous hashing: Thaler and Ravishankar, 1998), as long
as all of them fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
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


class Placed(NamedTuple):
    """places: of the replicas of each group; left: bytes that each node has left."""

    places: Sequence[Sequence[Place]]
    left: Mapping[str, int]


def places_of(
    key: str,
    sizes: Sequence[int],
    room: Mapping[str, int],
    replicas: int,
    unwell: Sequence[Collection[str]],
) -> Placed:
    """The places of all replicas of all groups, where their bytes fit.

    key: of the register; sizes: bytes of each group; room: bytes that each node may hold; unwell: for each group, nodes that are taken only where
    the others do not suffice. Replicas of a group are on different nodes where there are so many nodes. Each group gets one replica before
    any gets a second one, larger groups first (first fit decreasing, by powers of two, so that a group that grows a little displaces none).
    """
    groups = range(len(sizes))
    left, places = dict(room), [list[Place]() for _ in groups]
    preferred = [by_rendezvous(f"{key}/{group}", room) for group in groups]
    order = sorted(groups, key=lambda group: (-sizes[group].bit_length(), group))
    shared_by = -(-replicas // max(len(room), 1))
    for _ in range(replicas):
        for group in order:
            used = Counter(place.node for place in places[group])
            fits = [n for n in preferred[group] if left[n] >= sizes[group] and used[n] < shared_by]
            if fits:
                node = min(fits, key=lambda node: used[node])  # the first one of them
                places[group].append(Place(group, node, used[node]))
                left[node] -= sizes[group]
    for group in order:  # the places of unwell nodes stay theirs: substitutes get what is left
        used = Counter(place.node for place in places[group])
        others = [n for n in preferred[group] if left[n] >= sizes[group] and not used[n] and n not in unwell[group]]
        for i, place in enumerate(places[group]):
            if place.node in unwell[group] and others:
                places[group][i] = Place(group, others.pop(0), 0)
                left[places[group][i].node] -= sizes[group]
    return Placed(places, left)
