"""Supervises the replicas of a register: starts them, watches them, and moves them when nodes join or leave.

Owns the list of replicas that a front-end asks. Does not depend on Ray (`ray_actors.py` does). Each front-end has its own keeper. Keepers
need no agreement: all compute the same places (`placement.py`), and starting an actor that exists already returns the existing one.

1. A replica on a lost node is dropped at once, and a replica on the next node replaces it.
2. A replica that does not answer for `SILENT_S` gets a substitute on another node. It is used again when it answers.
3. A replica that moves is used until all of its successors have opened every segment of the group, so that no search is incomplete.
4. A replica of another release is ended, and a new one is started. Until then it counts as unwell.
5. A drained node holds no replica, unless there is no other node. Its replicas move as in 3.
6. A replica is started only where its bytes fit into the limit of the node. If a group fits on no node, it keeps its present replicas: a
   group that grows does not make searches incomplete.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from biodedup.cluster.shards.asking import Replica
from biodedup.cluster.shards.placement import Place, Placed, places_of

_log = logging.getLogger("biodedup.cluster")
SILENT_S = 10.0
RETRY_S = 30.0  # after this time a node that had another release is tried again
START_S = 120.0  # a replica that needs longer to start gets a substitute
_STEP_S = 1.0


class Lost(Exception):
    """An actor has ended for good. Another actor with the same name can be started."""


class GroupUnits(NamedTuple):
    """The present units of a group. texts: generation -> text of the unit (`wire.entries_text`); byte_count: bytes that scans of them
    read."""

    texts: Mapping[str, str]
    byte_count: int


class Actor(Replica, Protocol):
    """A replica that can be watched and ended."""

    is_well: bool
    """Whether the replica answers. The keeper sets it."""

    def about(self) -> Future[dict[str, Any]]:
        """The actor's report about itself (`ShardHost.about`). The future raises Lost, or another exception while the actor is
        unavailable."""

    def end(self) -> None:
        """Ends the actor for good."""


class Nodes(Protocol):
    """The machines that actors run on."""

    def alive(self) -> Mapping[str, int]:
        """Name of each node that may hold actors -> its limit in bytes. Raises OSError if this is unknown."""

    def drained(self) -> Collection[str]:
        """The nodes that an operator has drained."""

    def start(self, place: Place) -> Actor:
        """The actor of a place. Starts it if it does not exist. Raises OSError."""

    def note(self, shortages: Mapping[int, str]) -> None:
        """Publishes for `biodedup cluster status` which groups lack room, and why. Raises OSError."""


@dataclass
class Kept:
    """The keeper's record of a replica. well_at: when it last answered, or was started; about: its last report; asked: the pending
    report."""

    actor: Actor
    well_at: float
    is_failing: bool = False
    about: dict[str, Any] = field(default_factory=dict)
    asked: Future[dict[str, Any]] | None = None

    def is_unwell(self, now: float) -> bool:
        return now - self.well_at > (SILENT_S if self.about else START_S)

    def has(self, generations: Sequence[str]) -> bool:
        return not self.is_failing and set(generations) <= set(self.about.get("generations", ()))


class Keeper:
    """Keeps a number of replicas of each group. key: of the register; release: the release that actors must have; units: returns the
    present units of each group; replicas: the wanted number. Thread-safe."""

    def __init__(
        self,
        nodes: Nodes,
        key: str,
        release: str,
        units: Callable[[], Sequence[GroupUnits]],
        replicas: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nodes, self._key, self._release, self._units = nodes, key, release, units
        self._count, self._clock = replicas, clock
        self._kept: dict[Place, Kept] = {}
        self._other_release: dict[str, float] = {}
        """Node -> the time when an actor of another release was seen there."""
        self._told: dict[tuple[Place, str], float] = {}
        self._room: Mapping[str, int] = {}
        self._shortages: Mapping[int, str] = {}
        self._noted: Mapping[int, str] | None = None
        """The shortages that were published; None before the first time, which replaces those of an earlier front-end."""
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self) -> None:
        """Starts a thread that calls `step` every second."""
        self._thread = threading.Thread(target=self._watch, name="biodedup-keeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * _STEP_S)  # with a limit: it may wait for a cluster that has gone

    def _watch(self) -> None:
        while not self._ended.wait(_STEP_S):
            try:
                self.step()
            except Exception as error:  # the thread must not end: no other thread supervises the replicas
                _log.warning("replicas are not watched: %s: %s", type(error).__name__, error)

    def replicas_of(self, group: int) -> list[Actor]:
        with self._lock:
            return [kept.actor for place, kept in sorted(self._kept.items()) if place.group == group]

    def shortage(self, group: int) -> str:
        """The reason why a group has fewer replicas than wanted; '' if there is room for all."""
        return self._shortages.get(group, "")

    def step(self) -> None:
        """One round: reads the replicas' reports, starts missing replicas, drops replicas that are not needed any more."""
        now, units = self._clock(), self._units()
        try:
            self._room = self._nodes.alive()
            nodes = set(self._room)
        except OSError as error:
            _log.warning("the nodes are unknown: %s", error)
            nodes = {place.node for place in self._kept}
        for place in [place for place in self._kept if place.node not in nodes]:
            self._drop(place, "its node is lost")
        for place in list(self._kept):
            self._look_after(place, now)
        for kept in self._kept.values():
            kept.actor.is_well = not kept.is_failing and not kept.is_unwell(now)
        placed = self._placed(units, nodes, now)
        for group, wanted in enumerate(placed.places):
            for place in wanted:
                self._start(place, now)
            self._tell(group, units[group].texts, now)
            self._drop_needless(group, wanted, list(units[group].texts), now)
        self._note(units, placed)

    def _look_after(self, place: Place, now: float) -> None:
        """Reads a replica's report if it has arrived, and asks for the next one."""
        kept = self._kept[place]
        if kept.asked is not None and not kept.asked.done():
            return
        if kept.asked is not None:
            answered, kept.asked = kept.asked, None
            try:
                about = answered.result()
            except Lost:
                self._drop(place, "it is dead")
                return
            except Exception:  # the replica restarts, or cannot be reached
                kept.is_failing = True
            else:
                kept.about, kept.well_at, kept.is_failing = about, now, False
                if about["release"] != self._release:
                    _log.warning(
                        "a replica has another release: %s has %s, wanted %s",
                        kept.actor.name,
                        about["release"],
                        self._release,
                    )
                    self._other_release[place.node] = now
                    kept.actor.end()
                    self._drop(place, "it is of another release")
                    return
        kept.asked = kept.actor.about()

    def _placed(self, units: Sequence[GroupUnits], nodes: set[str], now: float) -> Placed:
        self._other_release = {node: at for node, at in self._other_release.items() if now - at < RETRY_S}
        refused = nodes & self._other_release.keys()
        unwell: list[set[str]] = [set() for _ in units]
        for place, kept in self._kept.items():
            if kept.is_unwell(now):
                unwell[place.group].add(place.node)
        usable = nodes - refused
        usable = usable.difference(self._nodes.drained()) or usable
        room = {node: self._room.get(node, 0) for node in usable}
        return places_of(self._key, [group.byte_count for group in units], room, self._count, unwell)

    def _note(self, units: Sequence[GroupUnits], placed: Placed) -> None:
        """Logs and publishes which groups lack room, if that has changed."""
        shortages = {}
        for group, places in enumerate(placed.places):
            if placed.left and len(places) < self._count:
                shortages[group] = _shortage(group, len(places), self._count, units[group].byte_count, placed.left)
        for group in shortages.keys() - self._shortages.keys():
            _log.warning("replicas lack room: %s", shortages[group])
        self._shortages = shortages
        if self._noted != shortages:
            try:
                self._nodes.note(shortages)
            except OSError as error:
                _log.warning("the list of replicas that lack room cannot be published: %s", error)
            else:
                self._noted = shortages

    def _start(self, place: Place, now: float) -> None:
        if place in self._kept:
            return
        try:
            actor = self._nodes.start(place)
        except OSError as error:
            _log.warning("no replica of group %d is started: %s", place.group, error)
            return
        with self._lock:
            self._kept[place] = Kept(actor, now, asked=actor.about())

    def _tell(self, group: int, texts: Mapping[str, str], now: float) -> None:
        """Tells the replicas of a group to open the units that they lack."""
        self._told = {told: at for told, at in self._told.items() if now - at < RETRY_S}
        for place, kept in self._kept.items():
            if place.group != group or not kept.about or kept.is_failing:
                continue
            for generation, text in texts.items():
                if generation not in kept.about["generations"] and (place, generation) not in self._told:
                    self._told[place, generation] = now
                    kept.actor.take(text)

    def _drop_needless(self, group: int, wanted: Sequence[Place], generations: Sequence[str], now: float) -> None:
        """Drops the replicas that have moved, once all of their successors serve. An unwell replica stays, because it may return."""
        successors = [self._kept.get(place) for place in wanted]
        if not wanted or not all(kept is not None and kept.has(generations) for kept in successors):
            return
        for place in [place for place in self._kept if place.group == group and place not in wanted]:
            if not self._kept[place].is_unwell(now):
                self._drop(place, "it has moved")

    def _drop(self, place: Place, reason: str) -> None:
        with self._lock:
            kept = self._kept.pop(place)
        self._told = {told: at for told, at in self._told.items() if told[0] != place}
        _log.info("a replica is not asked any more: %s: %s", kept.actor.name, reason)

    def status(self) -> list[dict[str, Any]]:
        """One entry for each replica: group, node, slot, state (`serving`, `opening`, `starting`, `failing`, `silent`), its units and
        lacking units, and parts of its report."""
        now, units = self._clock(), self._units()
        with self._lock:
            kept = sorted(self._kept.items())
        return [_described(place, one, units, now) for place, one in kept]


def _shortage(group: int, count: int, wanted: int, byte_count: int, left: Mapping[str, int]) -> str:
    return (
        f"group {group} has room for {count} replicas, wanted {wanted}: a replica takes {byte_count:,} bytes, and the {len(left)} nodes have "
        f"{', '.join(f'{n:,}' for n in sorted(left.values(), reverse=True)[:5])} bytes left; start another node, let nodes hold more "
        "(`biodedup cluster up shards --memory`, ClusterConfig.node_bytes_max), or make more groups (ClusterConfig.shard_groups)"
    )


def _described(place: Place, kept: Kept, units: Sequence[GroupUnits], now: float) -> dict[str, Any]:
    generations = list(units[place.group].texts)
    has = set(kept.about.get("generations", ()))
    if not kept.about:
        state = "starting"
    elif kept.is_failing:
        state = "failing"
    elif kept.is_unwell(now):
        state = "silent"
    else:
        state = "serving" if kept.has(generations) else "opening"
    lacks = sum(generation not in has for generation in generations)
    about = {name: kept.about.get(name) for name in ("release", "process_id", "searching", "waiting")}
    return {**place._asdict(), "state": state, "units": len(generations), "units_lacking": lacks, **about}
