"""Replicas as Ray actors: starts them on nodes, and calls them.

Owns all calls to Ray that concern actors and nodes. Ray holds no durable state: an actor that restarts fetches its segments from the store.

1. Actors are detached, and named by their place and release. So all front-ends share them, and they outlive the front-ends. Ray restarts an
   actor that dies. An actor ends itself when no front-end has asked it for ten minutes.
2. Ray never repeats a call (`max_task_retries=0`); the front-end asks the next replica instead.
3. The affinity of an actor to its node is hard, because Ray ignores a soft affinity of actors that reserve no CPU (measured with 2.60).
   Each front-end starts replacements for the actors of a lost node on other nodes (`keeper.py`).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from biodedup.cluster.key import ActorKey, actor_storage
from biodedup.cluster.scratch import make_scratch, remove_scratch
from biodedup.cluster.shards import wire
from biodedup.cluster.shards.asking import ReplicaFailed
from biodedup.cluster.shards.host import ShardHost
from biodedup.cluster.shards.keeper import Actor, GroupUnits, Keeper, Lost
from biodedup.cluster.shards.placement import Place, group_of
from biodedup.cluster.shards.remote import RemoteShards, units_of
from biodedup.config import ClusterConfig
from biodedup.errors import BiodedupError, InvalidInput, StorageUnavailable
from biodedup.gallery.snapshot import Snapshot
from biodedup.search.shards.base import QueueFull

_NAMESPACE = "biodedup"
_DRAINED = "drained/"  # prefix of the keys of drained nodes, in the key-value store of Ray's GCS
_SHORT = "short/"  # prefix of the keys of groups that lack room
_UNSTATED_BYTES = 1 << 62  # the limit of a node that states no memory
_START_S = 60.0  # the longest time that a new front-end waits for its actors
_STEP_S = 0.2  # the time between two looks while it waits
_THREADS = 40  # threads for searches in an actor: running, waiting (`ShardHost`) and refused searches
_PENDING_MOST = 64  # calls of one front-end to one actor that wait; more are refused
_NICE = 5  # a lower priority than Ray's own processes, so that their heartbeats are sent in time
_IDLE_S = 600.0


class ShardActor:
    """The class of the Ray actors. It passes calls to a `ShardHost`."""

    def __init__(
        self,
        cache: str | None,
        segments: str,
        register_id: str,
        bytes_max: int,
        threads: int,
        key: tuple[dict[str, Any], str] | None,
    ) -> None:
        """cache: the folder of the local copies, None for a temporary one; key: from `ActorKey.sent`; the others: as in `ShardHost`."""
        os.nice(_NICE)
        self._scratch = None if cache else make_scratch("biodedup-shard-")
        folder = self._scratch or Path(str(cache))
        self._host = ShardHost(partial(actor_storage, key), folder, segments, register_id, bytes_max, threads)
        self._watching = threading.Thread(target=self._end_when_idle, args=(_imported(),), daemon=True)
        self._watching.start()

    def _end_when_idle(self, ray: Any) -> None:
        itself = ray.get_runtime_context().current_actor
        while self._host.idle_s < _IDLE_S:
            time.sleep(_IDLE_S / 10)
        if self._scratch is not None:
            remove_scratch(self._scratch)
        ray.kill(itself, no_restart=True)

    def search(self, sent: wire.Sent) -> wire.Sent:
        return self._host.search(sent)

    def take(self, entries_text: str) -> str:
        return self._host.take(entries_text)

    def about(self, counts: bool = True) -> dict[str, Any]:
        return self._host.about(counts)


class RayActor:
    """The keeper's handle of a Ray actor (see `keeper.Actor`)."""

    def __init__(self, ray: Any, name: str, actor: Any) -> None:
        self.name, self._actor, self._ray = name, actor, ray
        self.is_ready, self.is_well = False, True

    def search(self, sent: wire.Sent) -> Future[wire.Sent]:
        return self._call("search", _as_sent, ReplicaFailed, sent)

    def about(self, counts: bool = True) -> Future[dict[str, Any]]:
        """The actor's report. counts: see `ShardHost.about`."""
        try:
            return self._call("about", self._noted, Lost, counts)
        except (QueueFull, ReplicaFailed) as error:
            failed: Future[dict[str, Any]] = Future()
            failed.set_exception(error)
            return failed

    def _noted(self, about: dict[str, Any]) -> dict[str, Any]:
        self.is_ready = True
        return about

    def take(self, entries_text: str) -> None:
        with suppress(self._ray.exceptions.RayError):  # the keeper repeats it
            self._actor.take.options(concurrency_group="load").remote(entries_text)

    def end(self) -> None:
        self._ray.kill(self._actor, no_restart=True)

    def _call(self, method: str, read: Callable[[Any], Any], died: type[Exception], *given: object) -> Future[Any]:
        """Calls a method of the actor. method: also the name of its concurrency group, so that no search waits for a download; read:
        converts the answer; died: the exception class for an actor that has ended."""
        errors = self._ray.exceptions
        try:
            sent = getattr(self._actor, method).options(concurrency_group=method).remote(*given).future()
        except errors.PendingCallsLimitExceeded:
            raise QueueFull(
                f"{self.name} has {_PENDING_MOST} unanswered calls of this front-end; try again later"
            ) from None
        except errors.RayError as error:
            raise ReplicaFailed(type(error).__name__) from error
        answer: Future[Any] = Future()

        def take(done: Future[Any]) -> None:
            try:
                answer.set_result(read(done.result()))
            except errors.ActorUnavailableError as error:
                answer.set_exception(ReplicaFailed(type(error).__name__))
            except errors.ActorDiedError as error:
                answer.set_exception(died(type(error).__name__))
            except BaseException as error:
                answer.set_exception(ReplicaFailed(type(error).__name__))

        sent.add_done_callback(take)
        return answer


def _as_sent(answer: Sequence[Any]) -> wire.Sent:
    version, text, arrays = answer
    return version, text, arrays


class RayNodes:
    """The nodes of a Ray cluster (see `keeper.Nodes`)."""

    def __init__(
        self, ray: Any, cluster: ClusterConfig, register_id: str, threads: int, key: ActorKey | None = None
    ) -> None:
        self._ray, self._cluster, self._register_id, self._threads = ray, cluster, register_id, threads
        self._key = None if key is None else key.sent()
        self._drained: Collection[str] = ()

    def alive(self) -> dict[str, int]:
        """See `keeper.Nodes`. Nodes that were started without processors (the head's, those of front-ends) hold no actors and are left
        out."""
        try:
            nodes = [n for n in self._ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) > 0]
        except self._ray.exceptions.RayError as error:
            raise OSError(f"Ray cannot list its nodes: {type(error).__name__}") from error
        return {node["NodeID"]: room_of(node, self._cluster.node_bytes_max) for node in nodes}

    def drained(self) -> Collection[str]:
        """The drained nodes; while Ray's GCS cannot be reached, the last known ones."""
        with suppress(Exception):  # Ray's errors here have no common class
            self._drained = drained_nodes()
        return self._drained

    def note(self, shortages: Mapping[int, str]) -> None:
        prefix = f"{_SHORT}{self._register_id}/"
        try:
            known = {name.removeprefix(prefix) for name in _marks(prefix)}
            for group, text in shortages.items():
                _mark(f"{prefix}{group}", text)
            for group_text in known - {str(group) for group in shortages}:
                _mark(f"{prefix}{group_text}", None)
        except Exception as error:  # Ray's errors here have no common class
            raise OSError(f"Ray's GCS cannot store the note: {type(error).__name__}") from error

    def start(self, place: Place) -> Actor:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        cluster, ray = self._cluster, self._ray
        name = f"{self._register_id}/{wire.release()}/{place.group}/{place.node}/{place.slot}"
        cache = None if cluster.cache is None else str(cluster.cache)
        given = cache, cluster.segments, self._register_id, cluster.cache_bytes_max, self._threads, self._key
        try:
            actor = (
                ray.remote(concurrency_groups={"search": _THREADS, "load": 1, "about": 1})(ShardActor)
                .options(
                    name=name,
                    namespace=_NAMESPACE,
                    lifetime="detached",
                    get_if_exists=True,
                    max_restarts=-1,
                    max_task_retries=0,
                    num_cpus=0,
                    max_pending_calls=_PENDING_MOST,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(place.node, soft=False),
                )
                .remote(*given)
            )
        except (ray.exceptions.RayError, ValueError) as error:
            raise OSError(f"{name}: {type(error).__name__}: {error}") from error
        return RayActor(ray, name, actor)


class RayShards(RemoteShards):
    """The shards of a register, searched by Ray actors. Must be closed."""

    def __init__(
        self,
        cluster: ClusterConfig,
        register_id: str,
        threads: int,
        snapshot: Callable[[], Snapshot],
        key: ActorKey | None = None,
    ) -> None:
        """snapshot: returns the newest snapshot, whose segments the actors open; key: of an encrypted register."""
        ray = _imported()
        self._is_owner = not ray.is_initialized()
        if self._is_owner:
            _connect(ray, cluster.ray_address or "auto")
        self._snapshot, self._groups_count = snapshot, cluster.shard_groups
        self._units = [GroupUnits({}, 0)] * cluster.shard_groups
        nodes = RayNodes(ray, cluster, register_id, threads, key)
        self.keeper = Keeper(nodes, register_id, wire.release(), self._units_now, cluster.replicas)
        deadline_s = cluster.shard_deadline_ms / 1000
        super().__init__(self.keeper.replicas_of, cluster.shard_groups, deadline_s, self.keeper.shortage)
        self._wait()
        self.keeper.watch()

    def _units_now(self) -> list[GroupUnits]:
        """The present units of each group; while the newest snapshot cannot be read, the last known ones."""
        try:
            snapshot = self._snapshot()
        except BiodedupError:
            return self._units
        texts: list[dict[str, str]] = [{} for _ in range(self._groups_count)]
        counts = [0] * self._groups_count
        for unit in units_of(snapshot):
            group, text = group_of(unit.key, self._groups_count), unit.entries_text
            texts[group][wire.generation_of(text)] = text
            counts[group] += unit.scanned_bytes
        self._units = [GroupUnits(*group) for group in zip(texts, counts, strict=True)]
        return self._units

    def _wait(self) -> None:
        """Waits until the actors serve, at most `_START_S`."""
        until = time.monotonic() + _START_S
        self.keeper.step()
        while time.monotonic() < until and any(
            replica["state"] in ("starting", "opening") for replica in self.keeper.status()
        ):
            time.sleep(_STEP_S)
            self.keeper.step()

    def close(self) -> None:
        """Stops the keeper, and leaves the Ray cluster if this object has joined it. The actors keep running."""
        self.keeper.close()
        if self._is_owner:
            _imported().shutdown()


@contextmanager
def joined(address: str | None) -> Iterator[Any]:
    """The module `ray`, connected to a cluster. A connection that exists already is used and stays open."""
    ray = _imported()
    is_owner = not ray.is_initialized()
    if is_owner:
        _connect(ray, address or "auto")
    try:
        yield ray
    finally:
        if is_owner:
            ray.shutdown()


def observed(ray: Any, register_id: str, timeout_s: float) -> list[tuple[Place, str, dict[str, Any] | None]]:
    """(place, release, report) of each actor of a register, from all front-ends. The report (`ShardHost.about`) is None if the actor does
    not answer in time. Starts no actor."""
    answers = [(seen.place, seen.release, seen.about) for seen in seen_actors(ray, timeout_s, register_id)]
    return sorted(answers, key=lambda answer: answer[:2])


@dataclass(frozen=True, eq=False)
class SeenActor:
    """An actor that `seen_actors` has found. about: its report, or None if it did not answer."""

    actor: RayActor
    place: Place
    release: str
    about: dict[str, Any] | None


def seen_actors(ray: Any, timeout_s: float, register_id: str | None = None) -> list[SeenActor]:
    """The actors of a register, or of all registers. The questions do not count as use (`ShardHost.idle_s`)."""
    asked = []
    for known in ray.util.list_named_actors(all_namespaces=True):
        parts = known["name"].split("/")
        if known["namespace"] != _NAMESPACE or len(parts) != 6 or register_id not in (None, parts[0]):
            continue
        with suppress(ValueError, ray.exceptions.RayError):  # the actor has just ended
            actor = RayActor(ray, known["name"], ray.get_actor(known["name"], namespace=_NAMESPACE))
            asked.append((actor, parts, actor.about(counts=False)))
    wait([about for *_, about in asked], timeout_s)
    seen = []
    for actor, (_, version, wire_version, group, node, slot), about in asked:
        told = about.result() if about.done() and about.exception() is None else None
        seen.append(SeenActor(actor, Place(int(group), node, int(slot)), f"{version}/{wire_version}", told))
    return seen


def room_of(node: Mapping[str, Any], bytes_max: int | None) -> int:
    """The number of bytes that a node may hold. node: an element of `ray.nodes()`; bytes_max: `ClusterConfig.node_bytes_max`."""
    stated = int(node["Resources"].get("memory", _UNSTATED_BYTES))
    return stated if bytes_max is None else min(stated, bytes_max)


def drained_nodes() -> list[str]:
    """The drained nodes, which shall hold no replicas. All front-ends of a Ray cluster share the list."""
    return [name.removeprefix(_DRAINED) for name in _marks(_DRAINED)]


def set_drained(node: str, is_drained: bool) -> None:
    _mark(f"{_DRAINED}{node}", "1" if is_drained else None)


def shortages_of(register_id: str) -> list[str]:
    """The shortages that front-ends have published (`RayNodes.note`)."""
    return [text for _, text in sorted(_marks(f"{_SHORT}{register_id}/").items())]


def _marks(prefix: str) -> dict[str, str]:
    """Name -> text, of all names with a prefix in the key-value store of Ray's GCS. The GCS may lose its state, and these texts with it."""
    from ray.experimental import internal_kv

    namespace = _NAMESPACE.encode()
    keys = internal_kv._internal_kv_list(prefix.encode(), namespace=namespace)
    found = {key.decode(): internal_kv._internal_kv_get(key, namespace=namespace) for key in keys}
    return {name: text.decode() for name, text in found.items() if text is not None}


def _mark(name: str, text: str | None) -> None:
    """Stores a text in the key-value store of Ray's GCS; None deletes it."""
    from ray.experimental import internal_kv

    key, namespace = name.encode(), _NAMESPACE.encode()
    if text is None:
        internal_kv._internal_kv_del(key, namespace=namespace)
    else:
        internal_kv._internal_kv_put(key, text.encode(), overwrite=True, namespace=namespace)


def _imported() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage reports from a register
    try:
        import ray
    except ImportError as error:
        raise InvalidInput(
            f"ClusterConfig.ray_address needs {error.name}; run `pip install 'biodedup[cluster]'`, or leave ray_address out"
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
            f"the Ray cluster {address!r} cannot be joined ({error}); start it, or correct the address"
        ) from error
