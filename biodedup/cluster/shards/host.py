"""Serves searches of sealed segments to other processes. `ray_actors.py` runs it as a Ray actor.

Owns the open segments of an actor, and the front-ends' views of them. Never decides and never writes to the segment store.

1. A unit (segments that are searched together) is served after its files were verified with the manifest's digests, and a self-test has
   found a row of each column.
2. A query names a generation, that is, an exact set of segments. A host that has other segments refuses the query.
3. A query contains the front-end's view (removed rows, groups, index engines), so that the answer belongs to the front-end's snapshot.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biodedup.cluster.cache import SegmentCache
from biodedup.cluster.shards import wire
from biodedup.cluster.store import SegmentStore
from biodedup.errors import BiodedupError, GalleryDamaged
from biodedup.gallery.catalogue.sqlite import ColumnModel
from biodedup.gallery.files.filesystem import Storage
from biodedup.gallery.files.private import make_private_folder
from biodedup.gallery.segments.reader import Segment, open_segment
from biodedup.gallery.snapshot import Snapshot
from biodedup.search.native.scanner import Scanner
from biodedup.search.shards import faiss as engine
from biodedup.search.shards.base import Shard, ShardQuery

_log = logging.getLogger("biodedup.cluster")
_IDLE_S = 600.0  # a generation without queries for this time is closed
_VIEWS_MOST = 32
_KEPT_MOST = 1_000
_SEARCHES = 4  # searches at the same time; each uses all threads of the scanner
_WAITING_MOST = 32  # searches in the queue; more are refused
_TIMED = 1_000  # the last searches, whose times the status shows
_SELF_SIMILARITY = 0.99  # at least the similarity of a stored vector with itself; eight bits per number preserve more


@dataclass
class _Unit:
    """The open segments of one generation. used_at: time of the last query, in seconds; views: the front-ends' snapshots of the
    segments."""

    segments: tuple[Segment, ...]
    used_at: float
    views: OrderedDict[tuple[Any, ...], Snapshot] = field(default_factory=OrderedDict)


class ShardHost:
    """Serves units of segments. Thread-safe."""

    def __init__(
        self,
        storage_of: Callable[[Path], Storage],
        folder: Path,
        segments: str,
        register_id: str,
        bytes_max: int,
        threads: int,
    ) -> None:
        """storage_of: returns the storage of this node's copies; it is called again if it raised, since a key server may be unreachable for
        a while; folder: of the copies; segments, bytes_max: `ClusterConfig.segments`, `ClusterConfig.cache_bytes_max`."""
        make_private_folder(folder)
        self._storage_of, self._folder = storage_of, folder / "segments"
        self._store, self._bytes_max = SegmentStore(segments, register_id), bytes_max
        self._copies: tuple[Storage, SegmentCache] | None = None
        self._scanner = Scanner(threads)
        self._units: dict[str, _Unit] = {}
        self._kept: OrderedDict[str, NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()
        self._taking = threading.Lock()
        self._slots = threading.Semaphore(_SEARCHES)
        self._present = 0
        """The number of searches that run or wait."""
        self._seconds: deque[float] = deque(maxlen=_TIMED)
        """From the arrival of a search to its answer."""
        self._asked_at = time.monotonic()

    def close(self) -> None:
        self._scanner.close()

    # segments ---------------------------------------------------------------------------------------------------

    def _opened_copies(self) -> tuple[Storage, SegmentCache]:
        if self._copies is None:
            storage = self._storage_of(self._folder.parent)
            storage.make_folder(self._folder)
            self._copies = storage, SegmentCache(storage, self._folder, self._store, self._bytes_max)
        return self._copies

    def take(self, entries_text: str) -> str:
        """Fetches, verifies, opens and tests a unit (given as `wire.entries_text`). Returns '' when it is served, or the problem."""
        generation = wire.generation_of(entries_text)
        with self._taking:
            if generation in self._units:
                return ""
            try:
                entries = wire.entries_of(entries_text)
                storage, cache = self._opened_copies()
                cache.fetch(entries)
                segments = tuple(open_segment(storage, self._folder, entry) for entry in entries)
                self._test(segments)
            except (BiodedupError, OSError) as error:
                _log.warning("segments are not served: %s", error)
                return str(error)
            with self._lock:
                now = time.monotonic()
                idle = [name for name, unit in self._units.items() if now - unit.used_at > _IDLE_S]
                for name in idle:
                    del self._units[name]  # a running search keeps its own reference to the files
                self._units[generation] = _Unit(segments, now)
        return ""

    def generations(self) -> list[str]:
        return sorted(self._units)

    def about(self, counts: bool = True) -> dict[str, Any]:
        """The host's report about itself. counts: whether this question counts as use (see `idle_s`)."""
        if counts:
            self._asked_at = time.monotonic()
        segments = {part.entry.number: part for unit in list(self._units.values()) for part in unit.segments}
        return {
            "release": wire.release(),
            "generations": self.generations(),
            "segments": sorted(segments),
            "scanned_bytes": sum(segment.scanned_bytes for segment in segments.values()),
            "process_id": os.getpid(),
            "searching": min(self._present, _SEARCHES),
            "waiting": max(self._present - _SEARCHES, 0),
            "p50_ms": self._quantile_ms(0.5),
            "p99_ms": self._quantile_ms(0.99),
            "idle_s": self.idle_s,
        }

    def _quantile_ms(self, share: float) -> float | None:
        with self._lock:
            seconds = list(self._seconds)
        return round(1000 * float(np.quantile(seconds, share)), 2) if seconds else None

    @property
    def idle_s(self) -> float:
        """Seconds since the last question of a front-end; 0 while a search runs."""
        return 0.0 if self._present else time.monotonic() - self._asked_at

    def _test(self, segments: tuple[Segment, ...]) -> None:
        """Searches for one stored row of each column. Raises GalleryDamaged if the search does not find it."""
        names = {name for segment in segments for name, column in segment.columns.items() if column.dimension}
        view = _view(segments, {}, None)
        (shard,) = _shards(view, self._scanner)
        for name in sorted(names):
            columns = [segment.columns[name] for segment in segments if name in segment.columns]
            column = next((column for column in columns if column.count), None)
            if column is None:
                continue
            stored = column.vectors_at(np.zeros(1, np.int64))
            probe = np.ascontiguousarray(stored / np.linalg.norm(stored), np.float32)
            hits = shard.search(probe, ShardQuery(name, 1, sum(c.count for c in columns), 1e-3))
            if not len(hits.similarity) or float(hits.similarity.max()) < _SELF_SIMILARITY:
                raise GalleryDamaged(f"column {name} does not find its own row; run `biodedup doctor`")

    # queries ----------------------------------------------------------------------------------------------------

    def search(self, sent: wire.Sent) -> wire.Sent:
        """Answers a query. The status of the answer is `done` (with the hits), `lacks` (with the digests of kept arrays that the front-end
        must send), `outdated` (the host does not have the generation), `busy` (the queue is full), or `failed` (with the reason)."""
        with self._lock:
            self._asked_at = time.monotonic()
            if self._present >= _SEARCHES + _WAITING_MOST:
                return wire.Message({"status": "busy"}).sent()
            self._present += 1
        started = time.perf_counter()
        try:
            with self._slots:
                return self._answer(sent)
        finally:
            with self._lock:
                self._present -= 1
                self._seconds.append(time.perf_counter() - started)

    def _answer(self, sent: wire.Sent) -> wire.Sent:
        try:
            about, arrays = wire.received(sent)
            with self._lock:
                for digest in about["kept"]:
                    if digest in arrays:
                        self._kept[digest] = arrays[digest]
                    if digest in self._kept:
                        self._kept.move_to_end(digest)
                while len(self._kept) > max(_KEPT_MOST, len(about["kept"])):
                    self._kept.popitem(last=False)
                kept = {digest: self._kept[digest] for digest in about["kept"] if digest in self._kept}
                unit = self._units.get(about["generation"])
                if unit is not None:
                    unit.used_at = time.monotonic()
            if unit is None:
                return wire.Message({"status": "outdated"}).sent()
            missing = [digest for digest in about["kept"] if digest not in kept]
            if missing:
                return wire.Message({"status": "lacks", "missing": missing}).sent()
            return self._search(unit, about, arrays, kept)
        except (BiodedupError, OSError) as error:
            return wire.Message({"status": "failed", "reason": str(error)}).sent()

    def _search(self, unit: _Unit, about: dict[str, Any], arrays: wire.Arrays, kept: wire.Arrays) -> wire.Sent:
        (shard,) = _shards(self._view_of(unit, about, kept), self._scanner)
        probes = {name.removeprefix("probe."): array for name, array in arrays.items() if name.startswith("probe.")}
        if about["kind"] == "multicolumn":
            return wire.hits_message(shard.search_multicolumn(probes, wire.multicolumn_of(about["query"], kept))).sent()
        return wire.hits_message(shard.search(probes[""], wire.query_of(about["query"], arrays, kept))).sent()

    def _view_of(self, unit: _Unit, about: dict[str, Any], kept: wire.Arrays) -> Snapshot:
        numbers, codecs = about["group_numbers"], [digest for *_, digest in about["indexing"]["codecs"]]
        groups = about["query"]["groups"]
        key = (about["tombstones"], about["indexing"]["settings"], *codecs, str(groups), str(numbers))
        with self._lock:
            known = unit.views.get(key)
            if known is None:
                known = unit.views[key] = _view(unit.segments, about, kept)
            unit.views.move_to_end(key)
            while len(unit.views) > _VIEWS_MOST:
                unit.views.popitem(last=False)
        return known


def _view(segments: tuple[Segment, ...], about: dict[str, Any], kept: wire.Arrays | None) -> Snapshot:
    """A front-end's snapshot of these segments. With kept = None: a snapshot of all rows, without codecs of index engines."""
    models = {
        name: ColumnModel("", column.dimension) for segment in segments for name, column in segment.columns.items()
    }
    if kept is None:
        return Snapshot(0, segments[-1].end_row, segments, np.zeros(0, np.int64), models, {})
    groups = frozenset(about["query"]["groups"] or ())
    return Snapshot(
        0,  # not the gallery's version, which changes without any change of these rows
        segments[-1].end_row,
        segments,
        kept[about["tombstones"]],
        models,
        {number: groups for number in about["group_numbers"] or ()},
        indexing=wire.indexing_of(about["indexing"], kept),
    )


def _shards(view: Snapshot, scanner: Scanner) -> Sequence[Shard]:
    """The shards of a unit: exactly one."""
    return [engine.shard_of(view, view.parts, scanner)]
