"""Searches its share of a register's sealed segments when another process asks. Starting it as an actor of Ray is `ray_actors.py`.

Owns the open segments of an actor, and the views of them that its front-ends ask about. Never decides and never writes to the store.

1. A unit is served once its files agree with the manifest's digests and a self-test has found its own rows.
2. A query names a generation: exactly these segments. A host that has other ones refuses.
3. A front-end's view (removed rows, groups, index engines) comes with its query, so that the answer is that of its own snapshot.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
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
_IDLE_S = 600.0  # a generation that was not asked for is closed
_VIEWS_MOST = 32
_KEPT_MOST = 1_000
_SEARCHES = 4  # at the same time; each uses all threads of the scanner
_WAITING_MOST = 32  # searches that wait for their turn; more are refused
_SELF_SIMILARITY = 0.99  # of a stored vector with itself; eight bits a number keep more


@dataclass
class _Unit:
    """The open segments of one generation. used_at: seconds; views: what front-ends see of it."""

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
        """storage_of: called for the storage of this node's copies, again where it raised: a key may be unreachable for a while; folder: of
        these copies; segments, bytes_max: `ClusterConfig.segments`, `ClusterConfig.cache_bytes_max`."""
        make_private_folder(folder)
        self._storage_of, self._folder = storage_of, folder / "segments"
        self._store, self._bytes_max = SegmentStore(segments, register_id), bytes_max
        self._copies: tuple[Storage, SegmentCache] | None = None
        self._scanner = Scanner(threads)
        self._units: dict[str, _Unit] = {}
        self._kept: OrderedDict[str, NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()
        self._taking = threading.Lock()
        self._turns = threading.Semaphore(_SEARCHES)
        self._present = 0
        """Searches that run or wait."""
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
        """Fetches, verifies, opens and tests a unit (`wire.entries_text`). Returns '' once it is served, or what is wrong."""
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
                    del self._units[name]  # a search that still reads its files keeps them open
                self._units[generation] = _Unit(segments, now)
        return ""

    def generations(self) -> list[str]:
        return sorted(self._units)

    def about(self, counts: bool = True) -> dict[str, Any]:
        """What front-ends ask to know how it is. counts: being asked keeps it from being idle."""
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
            "idle_s": self.idle_s,
        }

    @property
    def idle_s(self) -> float:
        """For how many seconds no front-end has asked anything."""
        return 0.0 if self._present else time.monotonic() - self._asked_at

    def _test(self, segments: tuple[Segment, ...]) -> None:
        """Searches for a row of each column. Raises GalleryDamaged where it is not found."""
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
        """Answers `done` with hits, `lacks` with the digests of kept arrays to send, `outdated`, `busy` when too many wait, or `failed` with
        the reason."""
        with self._lock:
            self._asked_at = time.monotonic()
            if self._present >= _SEARCHES + _WAITING_MOST:
                return wire.Message({"status": "busy"}).sent()
            self._present += 1
        try:
            with self._turns:
                return self._answer(sent)
        finally:
            with self._lock:
                self._present -= 1

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
    """A front-end's snapshot of these segments; all rows of them, without index engines' codecs, where `kept` is None."""
    models = {
        name: ColumnModel("", column.dimension) for segment in segments for name, column in segment.columns.items()
    }
    if kept is None:
        return Snapshot(0, segments[-1].end_row, segments, np.zeros(0, np.int64), models, {})
    groups = frozenset(about["query"]["groups"] or ())
    return Snapshot(
        0,  # versions come and go while nothing changes for these rows
        segments[-1].end_row,
        segments,
        kept[about["tombstones"]],
        models,
        {number: groups for number in about["group_numbers"] or ()},
        indexing=wire.indexing_of(about["indexing"], kept),
    )


def _shards(view: Snapshot, scanner: Scanner) -> Sequence[Shard]:
    """The one shard of a unit."""
    return [engine.shard_of(view, view.parts, scanner)]
