"""Divides a search between processes: sealed segments are searched by other processes, the newest rows in this one.

Owns the units that segments are searched in, and what a front-end does when no replica answers. Knows nothing of Ray.

1. A unit is exactly one shard of a search in one process (`search/shards/faiss.py`). Its cut-offs, and so its answers, are the same.
2. When all replicas of a unit fail, the shard raises, and the search is incomplete. When their queues are full, the search is refused.
3. A replica that is there but has not opened a unit yet, as after sealing, is told to. Until one has, this process searches the unit itself.
4. The rows since a search, which are few, are searched by this process: the register's lock is held meanwhile, and waits for no replica.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from biodedup.cluster.shards import wire
from biodedup.cluster.shards.asking import Asker, Replica
from biodedup.cluster.shards.placement import group_of
from biodedup.errors import StorageUnavailable
from biodedup.gallery.segments.reader import Segment
from biodedup.gallery.snapshot import Snapshot
from biodedup.search.multicolumn.plan import MultiColumnHits, MultiColumnQuery
from biodedup.search.native.scanner import Scanner
from biodedup.search.shards import faiss as engine
from biodedup.search.shards.base import QueueFull, Shard, ShardHits, ShardQuery
from biodedup.values import Float32

_log = logging.getLogger("biodedup.cluster")
_RETAKE_S = 30.0  # after which a replica is told again to open a unit


@dataclass(frozen=True)
class Unit:
    """Segments that are searched together. key: says which unit it is, whatever segments it has by now."""

    key: str
    segments: tuple[Segment, ...]

    @property
    def entries_text(self) -> str:
        return wire.entries_text([segment.entry for segment in self.segments])

    @property
    def scanned_bytes(self) -> int:
        """What scans read of it: what an actor needs memory for."""
        return sum(segment.scanned_bytes for segment in self.segments)


def units_of(snapshot: Snapshot) -> list[Unit]:
    """The sealed parts of each shard of a snapshot: a large or indexed segment, or all other ones together."""
    units = []
    for parts in engine.divided(snapshot):
        segments = tuple(part for part in parts if isinstance(part, Segment))
        with_tail = len(segments) < len(parts)
        if segments:
            units.append(Unit("small" if with_tail else str(segments[0].entry.number), segments))
    return units


class RemoteShards:
    """Makes the shards of snapshots. replicas_of: the replicas of a group, by its number. Thread-safe."""

    def __init__(
        self,
        replicas_of: Callable[[int], Sequence[Replica]],
        groups: int,
        deadline_s: float,
        shortage: Callable[[int], str] = lambda group: "",
    ) -> None:
        """shortage: says why a group lacks replicas, or ''."""
        self._replicas_of, self._shortage = replicas_of, shortage
        self._groups = groups
        self._asker = Asker(deadline_s)
        self._taken_at: dict[tuple[str, str], float] = {}
        self._lock = threading.Lock()

    def __call__(self, snapshot: Snapshot, scanner: Scanner) -> Sequence[Shard]:
        remote = [RemoteShard(self, snapshot, unit, scanner) for unit in units_of(snapshot)]
        tail = [part for part in snapshot.parts if not isinstance(part, Segment)]
        return [*remote, engine.shard_of(snapshot, tail, scanner)]

    def ask(self, unit: Unit, message: wire.Message) -> tuple[dict[str, Any], wire.Arrays] | None:
        """The answer of the first replica that gives one; None where some are there, and none has the unit yet. Raises QueueFull,
        StorageUnavailable."""
        group = group_of(unit.key, self._groups)
        replicas = self._replicas_of(group)
        said = self._asker.ask(replicas, message)
        for replica in said.outdated:
            self._tell(replica, unit)
        if said.answer is not None:
            return said.answer
        for failure in said.failures:
            _log.warning("a replica did not answer: %s", failure)
        if said.full:
            raise QueueFull(
                f"{said.full} replicas of {len(unit.segments)} segments have too much to do; try again later"
            )
        if said.outdated or said.starting:
            return None
        reason = "; ".join(said.failures) or self._shortage(group) or "there is none"
        raise StorageUnavailable(f"no replica of {len(unit.segments)} segments answers ({reason}); send it again")

    def _tell(self, replica: Replica, unit: Unit) -> None:
        text, now = unit.entries_text, time.monotonic()
        key = (replica.name, wire.generation_of(text))
        with self._lock:
            if now - self._taken_at.get(key, -_RETAKE_S) < _RETAKE_S:
                return
            self._taken_at = {known: at for known, at in self._taken_at.items() if now - at < _RETAKE_S}
            self._taken_at[key] = now
        replica.take(text)


class RemoteShard:
    """One unit, as a `Shard`."""

    def __init__(self, shards: RemoteShards, snapshot: Snapshot, unit: Unit, scanner: Scanner) -> None:
        self._shards, self._snapshot, self._unit, self._scanner = shards, snapshot, unit, scanner

    def search(self, probes: Float32, query: ShardQuery) -> ShardHits:
        if query.from_row:
            return self._here().search(probes, query)
        message = self._message("column", query.groups)
        wire.query_message(query, message)
        message.arrays["probe."] = probes
        answer = self._shards.ask(self._unit, message)
        if answer is None:
            return self._here().search(probes, query)
        return wire.hits_of(*answer, self._snapshot.version)

    def search_multicolumn(self, probes: Mapping[str, Float32], query: MultiColumnQuery) -> MultiColumnHits:
        if query.from_row:
            return self._here().search_multicolumn(probes, query)
        message = self._message("multicolumn", query.groups)
        wire.multicolumn_message(query, message)
        message.arrays.update({f"probe.{column}": vectors for column, vectors in probes.items()})
        answer = self._shards.ask(self._unit, message)
        return self._here().search_multicolumn(probes, query) if answer is None else wire.multicolumn_hits_of(*answer)

    def _message(self, kind: str, groups: frozenset[str] | None) -> wire.Message:
        segments, generation = self._unit.segments, wire.generation_of(self._unit.entries_text)
        message = wire.view_message(self._snapshot, generation, segments[0].first_row, segments[-1].end_row)
        message.about["kind"] = kind
        message.about["group_numbers"] = wire.group_numbers(self._snapshot, groups)
        return message

    def _here(self) -> Shard:
        return engine.shard_of(self._snapshot, self._unit.segments, self._scanner)
