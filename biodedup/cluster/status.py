"""Reports the state of a register's replicas on Ray: `biodedup cluster status`.

Owns the report, which it computes from the manifest and from the actors' answers. Read-only: it starts, moves and ends no actor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from biodedup.cluster.opening import connect
from biodedup.cluster.shards.placement import Place
from biodedup.cluster.shards.ray_actors import drained_nodes, joined, observed, room_of, shortages_of
from biodedup.common.described import Described
from biodedup.config import ClusterConfig

_ANSWER_S = 5.0


@dataclass(frozen=True)
class ReplicaStatus(Described):
    """One actor. state: `serving`, `opening` (it lacks segments that another replica of its group has) or `silent` (it does not answer);
    segments: the number of the manifest's segments that it has open; lacking: that it still has to open; old: open segments that are not in
    the manifest any more; searching, waiting: numbers of searches; scanned_bytes: bytes that a scan of its segments reads; p50_ms, p99_ms:
    quantiles of its last thousand searches, in milliseconds, from arrival to answer; None before the first."""

    group: int
    node: str
    slot: int
    release: str
    state: str
    segments: int = 0
    lacking: int = 0
    old: int = 0
    searching: int = 0
    waiting: int = 0
    process_id: int | None = None
    scanned_bytes: int = 0
    p50_ms: float | None = None
    p99_ms: float | None = None


@dataclass(frozen=True)
class NodeStatus(Described):
    """A node of the Ray cluster. replicas: the number of this register's replicas; is_drained: whether it shall hold no replicas (`biodedup
    cluster drain`); scanned_bytes: bytes that scans of these replicas read; bytes_max: the limit of the node."""

    node: str
    address: str
    is_alive: bool
    replicas: int
    is_drained: bool = False
    scanned_bytes: int = 0
    bytes_max: int = 0


@dataclass(frozen=True)
class ClusterStatus(Described):
    """A register and its replicas. version, rows, segments: of the manifest; unserved: numbers of the segments that no replica has, so that
    each front-end searches them itself; replicas_wanted: for each group; shortages: the front-ends' reasons why a group has fewer."""

    version: int
    rows: int
    segments: int
    unserved: tuple[int, ...]
    replicas_wanted: int
    nodes: tuple[NodeStatus, ...]
    replicas: tuple[ReplicaStatus, ...]
    shortages: tuple[str, ...] = ()


def cluster_status(url: str, cluster: ClusterConfig) -> ClusterStatus:
    """The status of a register. Raises NotAGallery, InvalidInput, StorageUnavailable."""
    with joined(cluster.ray_address) as ray, closing(connect(url, cluster)) as catalogue:
        catalogue.open("", "", create=False)
        catalogue.begin_reading()
        try:
            numbers, state = {entry.number for entry in catalogue.segments()}, catalogue.state()
        finally:
            catalogue.rollback()
        seen = observed(ray, catalogue.register_id, _ANSWER_S)
        drained, shortages = drained_nodes(), shortages_of(catalogue.register_id)
        nodes = sorted(ray.nodes(), key=lambda node: str(node["NodeID"]))
    replicas = replicas_of(numbers, seen)
    served = {number for *_, about in seen if about is not None for number in about["segments"]}
    return ClusterStatus(
        version=state.version,
        rows=state.row_count,
        segments=len(numbers),
        unserved=tuple(sorted(numbers - served)),
        replicas_wanted=cluster.replicas,
        nodes=tuple(_node_status(node, replicas, drained, cluster.node_bytes_max) for node in nodes),
        replicas=tuple(replicas),
        shortages=tuple(shortages),
    )


def _node_status(
    node: Mapping[str, Any], replicas: Sequence[ReplicaStatus], drained: Collection[str], bytes_max: int | None
) -> NodeStatus:
    name = str(node["NodeID"])
    here = [replica for replica in replicas if replica.node == name]
    holds_any = node["Alive"] and node["Resources"].get("CPU", 0) > 0
    return NodeStatus(
        node=name,
        address=str(node["NodeManagerAddress"]),
        is_alive=bool(node["Alive"]),
        replicas=len(here),
        is_drained=name in drained,
        scanned_bytes=sum(replica.scanned_bytes for replica in here),
        bytes_max=room_of(node, bytes_max) if holds_any else 0,
    )


def replicas_of(
    numbers: Collection[int], seen: Sequence[tuple[Place, str, dict[str, Any] | None]]
) -> list[ReplicaStatus]:
    """The status of each actor. numbers: of the manifest's segments; seen: the result of `ray_actors.observed`."""
    manifest = set(numbers)
    groups: dict[tuple[int, str], set[int]] = {}
    for place, release, about in seen:
        if about is not None:
            groups.setdefault((place.group, release), set()).update(manifest & set(about["segments"]))
    replicas = []
    for place, release, about in seen:
        if about is None:
            replicas.append(ReplicaStatus(*place, release, "silent"))
            continue
        has = set(about["segments"])
        lacking = len(groups[place.group, release] - has)
        counts = len(has & manifest), lacking, len(has - manifest), about["searching"], about["waiting"]
        state = "opening" if lacking else "serving"
        # actors of older releases do not send all of these
        held, times = int(about.get("scanned_bytes", 0)), (about.get("p50_ms"), about.get("p99_ms"))
        replicas.append(ReplicaStatus(*place, release, state, *counts, about["process_id"], held, *times))
    return replicas
