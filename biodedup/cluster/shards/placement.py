"""Computes which nodes hold which groups of segments. Pure functions, which do not depend on actors.

Method: rendezvous hashing (Thaler and Ravishankar, 1998), limited by the capacity of the nodes. The input is the names and limits of the
nodes and the sizes of the groups. So all front-ends compute the same places without communication. When a node joins or leaves, only the
groups on it move, if all groups fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import xxhash


class Place(NamedTuple):
    """The place of a replica of a group. slot: distinguishes replicas of the same group that must share a node."""

    group: int
    node: str
    slot: int


def by_rendezvous(key: str, names: Collection[str]) -> list[str]:
    """The names in their order of preference for a key: highest random weight first."""
    return sorted(names, key=lambda name: (xxhash.xxh3_64_intdigest(f"{key}\0{name}".encode()), name), reverse=True)


def group_of(key: str, groups: int) -> int:
    """The group that a unit of segments belongs to."""
    return int(by_rendezvous(key, [str(number) for number in range(groups)])[0])


class Placed(NamedTuple):
    """places: for each group, the places of its replicas; left: node -> its remaining bytes."""

    places: Sequence[Sequence[Place]]
    left: Mapping[str, int]


def places_of(
    key: str,
    sizes: Sequence[int],
    room: Mapping[str, int],
    replicas: int,
    unwell: Sequence[Collection[str]],
) -> Placed:
    """The places of all replicas of all groups, as far as their bytes fit.

    key: of the register; sizes: bytes of each group; room: node -> its limit in bytes; unwell: for each group, nodes that are used only if
    the other nodes are not enough. Replicas of a group are on different nodes if there are enough nodes. Every group gets one replica
    before any group gets a second one; larger groups come first (first-fit decreasing). Sizes are compared by powers of two, so that a
    small growth of a group does not move other groups.
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
                node = min(fits, key=lambda node: used[node])  # the first of the least used nodes
                places[group].append(Place(group, node, used[node]))
                left[node] -= sizes[group]
    for group in order:  # unwell nodes keep their share of the room; substitutes get the remaining room
        used = Counter(place.node for place in places[group])
        others = [n for n in preferred[group] if left[n] >= sizes[group] and not used[n] and n not in unwell[group]]
        for i, place in enumerate(places[group]):
            if place.node in unwell[group] and others:
                places[group][i] = Place(group, others.pop(0), 0)
                left[places[group][i].node] -= sizes[group]
    return Placed(places, left)
