"""Replicas as Ray actors: starts them on different nodes, and calls them with a deadline.

Owns everything that knows of Ray. Nothing durable lives in Ray: an actor that is started again fetches its segments from the store.

1. Actors are detached and named, so that all front-ends share them, and they outlive each front-end. Ray starts one again that dies.
2. A call is never repeated by Ray (`max_task_retries=0`): the front-end asks the next replica.
3. The replicas of a group are placed on nodes by rendezvous hashing, on different ones where there are so many.
   Affinity is hard: Ray ignores a soft one for actors that reserve no CPU (measured with 2.60). An actor whose node is lost is placed anew
   when the next front-end opens.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biodedup.cluster.shards import wire
from biodedup.cluster.shards.host import ShardHost
from biodedup.cluster.shards.remote import NotReady, RemoteShards, ReplicaFailed, by_rendezvous, group_of, units_of
from biodedup.config import ClusterConfig
from biodedup.errors import InvalidInput, StorageUnavailable
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.snapshot import Snapshot

_NAMESPACE = "biodedup"
_START_S = 60.0  # for so long an opening front-end waits for actors; later ones are waited for by nobody
_SEARCHES = 4  # that an actor runs at the same time; each uses all threads of its scanner
_PENDING_MOST = 64  # calls of one front-end that wait for one actor; more are refused
_NICE = 5  # below Ray's own processes: a node whose heartbeats starve is declared dead


class ShardActor:
    """What Ray runs: a `ShardHost`. units: `wire.entries_text` of the units to serve from the start."""

    def __init__(
        self, cache: str | None, segments: str, register_id: str, bytes_max: int, threads: int, units: Sequence[str]
    ) -> None:
        os.nice(_NICE)
        folder = Path(cache) if cache else Path(tempfile.mkdtemp(prefix="biodedup-shard-"))
        self._host = ShardHost(LocalStorage(), folder, segments, register_id, bytes_max, threads)
        for unit in units:
            self._host.take(unit)  # what is not there any more is refused until a front-end names what is

    def search(self, sent: wire.Sent) -> wire.Sent:
        return self._host.search(sent)

    def take(self, entries_text: str) -> str:
        return self._host.take(entries_text)

    def generations(self) -> list[str]:
        return self._host.generations()

    def process_id(self) -> int:
        return os.getpid()


class RayReplica:
    """One actor, as a `Replica`."""

    def __init__(self, name: str, actor: Any) -> None:
        import ray

        self.name, self._actor, self._ray = name, actor, ray
        self._started: Any = self.call("generations", "load")

    def call(self, method: str, group: str, *given: object) -> Any:
        """A future. group: of Ray's concurrency groups, so that a search does not wait for a download."""
        return getattr(self._actor, method).options(concurrency_group=group).remote(*given)

    def wait_ready(self, timeout_s: float) -> bool:
        """Whether it has been started."""
        if self._started is None:
            return True
        done, _ = self._ray.wait([self._started], timeout=timeout_s)
        if done:
            self._started = None
        return bool(done)

    def search(self, sent: wire.Sent, deadline_s: float) -> wire.Sent:
        if not self.wait_ready(0):
            raise NotReady(self.name)
        try:
            version, text, arrays = self._ray.get(self.call("search", "search", sent), timeout=deadline_s)
            return version, text, arrays
        except self._ray.exceptions.GetTimeoutError:
            raise ReplicaFailed(f"no answer within {deadline_s:.1f} s") from None
        except self._ray.exceptions.RayError as error:
            raise ReplicaFailed(type(error).__name__) from error

    def take(self, entries_text: str) -> None:
        self.call("take", "load", entries_text)


class RayShards(RemoteShards):
    """The shards of a register, searched by Ray's actors. Close it."""

    def __init__(self, cluster: ClusterConfig, register_id: str, threads: int, snapshot: Snapshot) -> None:
        """snapshot: whose segments the actors open first."""
        ray = _imported()
        self._cluster, self._register_id, self._threads = cluster, register_id, threads
        self._is_owner = not ray.is_initialized()
        if self._is_owner:
            _connect(ray, cluster.ray_address or "auto")
        nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
        units = units_of(snapshot)
        self._replicas: dict[int, list[RayReplica]] = {}
        for group in range(cluster.shard_groups):
            texts = [unit.entries_text for unit in units if group_of(unit.key, cluster.shard_groups) == group]
            preferred = by_rendezvous(f"{register_id}/{group}", nodes)
            self._replicas[group] = [
                self._replica(ray, group, number, preferred[number % len(preferred)], texts)
                for number in range(cluster.replicas)
            ]
        super().__init__(self._replicas.__getitem__, cluster.shard_groups, cluster.shard_deadline_ms / 1000)
        self._wait()

    def _replica(self, ray: Any, group: int, number: int, node: str, texts: list[str]) -> RayReplica:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        name = f"{self._register_id}/w{wire.WIRE_VERSION}/{group}/{number}"
        cluster = self._cluster
        actor = (
            ray.remote(concurrency_groups={"search": _SEARCHES, "load": 1})(ShardActor)
            .options(
                name=name,
                namespace=_NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                max_restarts=-1,
                max_task_retries=0,
                num_cpus=0,
                max_pending_calls=_PENDING_MOST,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(
                None if cluster.cache is None else str(cluster.cache),
                cluster.segments,
                self._register_id,
                cluster.cache_bytes_max,
                self._threads,
                texts,
            )
        )
        return RayReplica(name, actor)

    def _wait(self) -> None:
        """For actors that are started; each has its own time."""
        waiting = [
            threading.Thread(target=replica.wait_ready, args=(_START_S,))
            for replicas in self._replicas.values()
            for replica in replicas
        ]
        for thread in waiting:
            thread.start()
        for thread in waiting:
            thread.join()

    def close(self) -> None:
        """Leaves Ray, if this process joined it by itself. The actors live on."""
        if self._is_owner:
            _imported().shutdown()


def _imported() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing of a register is reported to anybody
    try:
        import ray
    except ImportError as error:
        raise InvalidInput(
            f"ClusterConfig.ray_address needs {error.name}; pip install 'biodedup[cluster]', or leave it out"
        ) from error
    return ray


def _connect(ray: Any, address: str) -> None:
    try:
        ray.init(
            address=address,
            namespace=_NAMESPACE,
            log_to_driver=False,
            logging_level="warning",
            **({"include_dashboard": False, "object_store_memory": 256 << 20} if address == "local" else {}),
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise StorageUnavailable(
            f"the Ray cluster {address!r} cannot be joined ({error}); start it, or correct ClusterConfig.ray_address"
        ) from error
