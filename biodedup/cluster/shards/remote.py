"""Divides a search between processes: replicas search the sealed segments, this process searches the newest rows.

Owns the division into units (segments that are searched together), and the behaviour when no replica answers. Does not depend on Ray.

1. A unit is exactly one shard of a search in a single process (`search/shards/faiss.py`), with the same cut-offs, so the answers are the
   same.
2. If all replicas of a unit fail, the shard raises, and the search is incomplete. If their queues are full, the search is refused.
3. A replica that has not opened a unit yet (for example after sealing) is told to open it. Until one has, this process searches the unit.
4. At a commit, this process searches the few rows that were added after the search. The commit holds the register's lock, and does not wait
   for a replica.
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
_RETAKE_S = 30.0  # after this time a replica is told again to open a unit


@dataclass(frozen=True)
class Unit:
    """Segments that are searched together. key: identifies the unit, even when its segments change."""

    key: str
    segments: tuple[Segment, ...]

    @property
    def entries_text(self) -> str:
        return wire.entries_text([segment.entry for segment in self.segments])

    @property
    def scanned_bytes(self) -> int:
        """The bytes that scans read of it. An actor needs memory for them."""
        return sum(segment.scanned_bytes for segment in self.segments)


def units_of(snapshot: Snapshot) -> list[Unit]:
    """The units of a snapshot, one for each shard: each large or indexed segment alone, and all other segments together."""
    units = []
    for parts in engine.divided(snapshot):
        segments = tuple(part for part in parts if isinstance(part, Segment))
        with_tail = len(segments) < len(parts)
        if segments:
            units.append(Unit("small" if with_tail else str(segments[0].entry.number), segments))
    return units


class RemoteShards:
    """Makes the shards of a snapshot. replicas_of: group number -> its replicas. Thread-safe."""

    def __init__(
        self,
        replicas_of: Callable[[int], Sequence[Replica]],
        groups: int,
        deadline_s: float,
        shortage: Callable[[int], str] = lambda group: "",
    ) -> None:
        """groups: the number of groups; deadline_s: for one replica; shortage: group -> the reason why it lacks replicas, or ''."""
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
        """The first answer of a replica; None if replicas exist, but none has opened the unit yet. Raises QueueFull, StorageUnavailable."""
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
            raise QueueFull(f"{said.full} replicas of {len(unit.segments)} segments have full queues; try again later")
        if said.outdated or said.starting:
            return None
        reason = "; ".join(said.failures) or self._shortage(group) or "there is none"
        raise StorageUnavailable(f"no replica of {len(unit.segments)} segments answers ({reason}); send it again")

    def _tell(self, replica: Replica, unit: Unit) -> None:
        """Tells a replica to open a unit, unless it was told a moment ago."""
        text, now = unit.entries_text, time.monotonic()
        key = (replica.name, wire.generation_of(text))
        with self._lock:
            if now - self._taken_at.get(key, -_RETAKE_S) < _RETAKE_S:
                return
            self._taken_at = {known: at for known, at in self._taken_at.items() if now - at < _RETAKE_S}
            self._taken_at[key] = now
        replica.take(text)


class RemoteShard:
    """A `Shard` whose rows are those of a unit."""

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
