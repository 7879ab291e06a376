"""Takes nodes and old releases out of service, while every search stays complete: `biodedup cluster drain` and `biodedup cluster upgrade`.

Owns the order of the steps. The keepers of the front-ends (`shards/keeper.py`) move the replicas. A command only states the goal, waits
until no front-end asks an actor any more, and then ends the actor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from biodedup.cluster.gallery import ClusterGallery
from biodedup.cluster.key import ActorKey
from biodedup.cluster.opening import open_register
from biodedup.cluster.shards import wire
from biodedup.cluster.shards.ray_actors import RayShards, SeenActor, drained_nodes, joined, seen_actors, set_drained
from biodedup.common.described import Described
from biodedup.config import ClusterConfig, Config
from biodedup.errors import InvalidInput
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.indexing import IndexLimits
from biodedup.keys import KeySource

UNASKED_S = 10.0
"""Keepers ask their actors every second. An actor that was not asked for this time is used by no front-end."""
_STEP_S = 0.5
_ANSWER_S = 5.0

Told = Callable[[str, int, int], None]
"""Called with the name of the step, the number of finished items, and the number of all items."""


@dataclass(frozen=True)
class Drained(Described):
    """The result of `drain`. node, address: of the node; ended: the number of actors that were ended; asked: of actors that front-ends
    still ask."""

    node: str
    address: str
    ended: int
    asked: int


@dataclass(frozen=True)
class Upgraded(Described):
    """The result of `upgrade`. release: the new release; serving: the number of its actors that serve all segments; wanted: how many
    should; ended: actors of other releases that were ended; asked: actors of other releases that front-ends still ask."""

    release: str
    serving: int
    wanted: int
    ended: int
    asked: int


def drain(address: str | None, name: str, wait_s: float, told: Told) -> Drained:
    """Moves all replicas away from a node, and ends its actors once no front-end asks them any more.

    name: the beginning of the node's id, or its address; wait_s: the longest time to wait. Raises InvalidInput for an unknown node and for
    the last node that can hold replicas; StorageUnavailable.
    """
    with joined(address) as ray:
        node = node_of(ray.nodes(), name)
        others = [n for n in _with_processors(ray.nodes()) if n["NodeID"] not in {node["NodeID"], *drained_nodes()}]
        if not others:
            raise InvalidInput(f"no other node can hold the replicas of {name}; start one first")
        set_drained(node["NodeID"], True)
        ended, asked = _ended(ray, lambda seen: seen.place.node == node["NodeID"], wait_s, told)
        return Drained(node["NodeID"], node["NodeManagerAddress"], ended, asked)


def undrain(address: str | None, name: str) -> Drained:
    """Lets a drained node hold replicas again. Raises as `drain`."""
    with joined(address) as ray:
        node = node_of(ray.nodes(), name)
        set_drained(node["NodeID"], False)
        return Drained(node["NodeID"], node["NodeManagerAddress"], 0, 0)


def upgrade(url: str, cluster: ClusterConfig, wait_s: float, told: Told, keys: KeySource | None = None) -> Upgraded:
    """Starts replicas of this process's release, waits until they serve all segments, and ends the replicas of other releases once no
    front-end asks them any more.

    wait_s: the longest time to wait, for each of the two steps; keys: of an encrypted register. This process acts as a front-end and copies
    the segments. Raises NotAGallery, InvalidInput, StorageUnavailable.
    """
    with joined(cluster.ray_address) as ray, closing(_opened(url, cluster, keys)) as gallery:
        key = ActorKey.of(keys, gallery.key_file)
        with closing(RayShards(cluster, gallery.register_id, Config().threads, gallery.snapshot, key)) as shards:
            states = _waited(lambda: [replica["state"] for replica in shards.keeper.status()], wait_s, told)
            serving, ended, asked = states.count("serving"), 0, 0
            if states and serving == len(states):
                ended, asked = _ended(ray, _is_other_release, wait_s, told, gallery.register_id)
            return Upgraded(wire.release(), serving, cluster.replicas * cluster.shard_groups, ended, asked)


def _opened(url: str, cluster: ClusterConfig, keys: KeySource | None) -> ClusterGallery:
    config = Config()
    return open_register(
        url,
        cluster,
        storage=LocalStorage(keys),
        config=config.gallery,
        settings=config.to_dict(),
        gallery_id="",
        read_only=True,
        limits=IndexLimits(config.threads, config.search.miss_risk),
    )


def _is_other_release(seen: SeenActor) -> bool:
    return seen.release != wire.release()


def node_of(nodes: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """The living node whose id begins with a name, or whose address it is. Raises InvalidInput if that is not exactly one node."""
    alive = [node for node in nodes if node["Alive"]]
    means = [node for node in alive if name and (node["NodeID"].startswith(name) or node["NodeManagerAddress"] == name)]
    if len(means) != 1:
        known = ", ".join(f"{node['NodeID'][:12]} ({node['NodeManagerAddress']})" for node in alive)
        what = "several nodes" if means else "no living node"
        raise InvalidInput(f"{name!r} names {what} of {known}; write the beginning of one node's id")
    return means[0]


def _with_processors(nodes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [node for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) > 0]


def _waited(states: Callable[[], list[str]], wait_s: float, told: Told) -> list[str]:
    """Waits until all replicas serve, or the time is over; returns their states."""
    until = time.monotonic() + wait_s
    while True:
        now = states()
        told("opening", now.count("serving"), len(now))
        if (now and now.count("serving") == len(now)) or time.monotonic() >= until:
            return now
        time.sleep(_STEP_S)


def _ended(
    ray: Any, means: Callable[[SeenActor], bool], wait_s: float, told: Told, register_id: str | None = None
) -> tuple[int, int]:
    """Ends actors once no front-end asks them any more. Returns (the number that ended, the number still asked when the time is over)."""
    until, ended = time.monotonic() + wait_s, 0
    while True:
        seen = [actor for actor in seen_actors(ray, _ANSWER_S, register_id) if means(actor)]
        unasked = [actor for actor in seen if actor.about is not None and actor.about.get("idle_s", 0.0) >= UNASKED_S]
        for seen_actor in unasked:
            seen_actor.actor.end()
        ended, asked = ended + len(unasked), len(seen) - len(unasked)
        told("ending", ended, ended + asked)
        if not asked or time.monotonic() >= until:
            return ended, asked
        time.sleep(_STEP_S)
