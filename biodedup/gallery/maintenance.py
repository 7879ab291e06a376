"""Seals a full journal, merges neighbouring segments and indexes them, on request or in a background thread.

Owns the time when this happens, and the thread. Searches and enrolments continue meanwhile; only the change of the manifest takes the
gallery's lock. Never decides which segments are merged (segments/compaction.py) or how they are indexed (indexing.py), and never writes a
file itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from biodedup.config import GalleryConfig
from biodedup.errors import BiodedupError, GalleryBusy, InvalidInput
from biodedup.gallery.files.encryption.transform import Transform, transform_id_of
from biodedup.gallery.files.index_codec import MATED_SIMILARITY, FaissCodec
from biodedup.gallery.indexing import Indexed, Indexing
from biodedup.gallery.segments.compaction import due, grouped
from biodedup.gallery.segments.layout import SegmentEntry
from biodedup.gallery.segments.part import Int64, Rows
from biodedup.gallery.segments.reader import Segment
from biodedup.gallery.segments.writer import Abandoned
from biodedup.gallery.snapshot import Snapshot
from biodedup.gallery.transaction import Transaction
from biodedup.index_spec import IndexSpec

_FINISH_ROWS_MAX = 1_000_000  # closing waits for a merge of at most so many rows; a larger merge is abandoned
_log = logging.getLogger("biodedup.gallery")


class Maintained(Indexed, Protocol):
    """The methods of a gallery that maintenance calls (gallery.py)."""

    @property
    def journal_count(self) -> int: ...

    @property
    def is_broken(self) -> bool: ...

    def seal(self) -> None: ...

    def maintaining(self) -> AbstractContextManager[None]: ...

    def write_parts(
        self, parts: Sequence[Rows], keeps: Sequence[NDArray[np.bool_] | None], go_on: Callable[[], bool]
    ) -> SegmentEntry: ...

    def discard_rows(self, entry: SegmentEntry) -> None: ...


class Maintenance:
    """Sealing and merging of one gallery. Thread-safe."""

    def __init__(self, gallery: Maintained, config: GalleryConfig) -> None:
        self._gallery = gallery
        self._config = config
        self._indexing = Indexing(gallery)
        self._merging = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Seals a full journal, merges the segments that are due, and indexes segments, now."""
        with self._merging, self._gallery.maintaining():
            if self._tail_is_full():
                self._gallery.seal()
            while not self._gallery.is_broken and (segments := self._run_due()):
                self.merge(segments)
            self._index()

    def compact(self) -> None:
        """Merges segments into as few as the largest size allows, and rewrites segments that hold removed rows."""
        with self._merging, self._gallery.maintaining():
            snapshot = self._gallery.snapshot()
            segments = snapshot.segments
            for run in grouped([segment.count for segment in segments], self._config.segment_rows):
                if run.stop - run.start > 1 or len(_removed(snapshot, segments[run])):
                    self.merge(segments[run])
            self._index()

    def reindex(
        self,
        specs: Mapping[str, IndexSpec],
        *,
        force: bool,
        report: Callable[[int, int], None] | None = None,
        approve: Callable[[Transaction], None] = lambda transaction: None,
    ) -> None:
        """Indexes every segment with these engines. A codec that misses more than the miss risk is refused before anything changes.

        force: accept such a codec; approve: called in the transaction that stores the engines. Raises InvalidInput, StorageUnavailable.
        After an interruption the next call, or the background thread, continues.
        """
        with self._merging, self._gallery.maintaining():
            settings = replace(self._gallery.snapshot().indexing, specs=specs)
            codecs = []
            for column, model in self._gallery.snapshot().models.items():
                if model.dimension is not None and settings.wanted(column) is None:
                    codec = self._indexing.codec_for(column, settings.spec(column))
                    if codec is not None:
                        codecs.append((column, codec))
            for column, codec in codecs + [(c, known) for c, known in settings.wanted_codecs().items()]:
                if not force and not codec.keeps(self._gallery.limits.miss_risk):
                    raise _loses(column, codec, self._gallery.limits.miss_risk)
            with self._gallery.transaction() as transaction:
                approve(transaction)
                transaction.set_index(specs, forced=force)
                for column, codec in codecs:
                    transaction.add_codec(column, codec)
            engines = ", ".join(f"{column} {spec}" for column, spec in specs.items()) or "native"
            _log.info("index engines were set: %s", engines)
            self._index(report)

    def rekey(
        self,
        transform: Transform | None,
        report: Callable[[int, int], None] | None = None,
        approve: Callable[[Transaction], None] = lambda transaction: None,
    ) -> None:
        """Stores all embeddings with another secret transform: new embeddings at once, stored ones segment by segment. Searches continue.

        transform: None for no transform; the gallery's present transform continues an interrupted change; approve: called in the
        transaction that begins the change. After an interruption, segments with the old and the new transform are searched together. Raises
        StorageUnavailable.
        """
        with self._merging, self._gallery.maintaining():
            if transform_id_of(self._gallery.snapshot().transform) != transform_id_of(transform):
                with self._gallery.transaction() as transaction:
                    approve(transaction)
                    transaction.set_transform(transform)
                _log.info("embeddings are stored with another transform from now on")
            total = len(self._gallery.snapshot().segments)
            while left := segments_to_rekey(self._gallery.snapshot()):
                if report is not None:
                    report(max(total - len(left), 0), total)
                self.merge(left[:1])
            self._index()
            if report is not None:
                report(total, total)

    def _index(self, report: Callable[[int, int], None] | None = None) -> None:
        def go_on() -> bool:
            if self._closing:
                raise Abandoned("the engine was closed while segments were indexed; they are indexed later")
            return True

        if not self._gallery.is_broken:
            self._indexing.run(go_on, report)

    def rewrite(self, changed: Callable[[Segment], Rows | None]) -> None:
        """Rewrites segments, without removed rows. changed: segment -> its new rows, None to leave it."""
        with self._merging, self._gallery.maintaining():
            for segment in self._gallery.snapshot().segments:
                if (rows := changed(segment)) is not None:
                    self.merge([segment], [rows])
            self._index()

    def merge(self, segments: Sequence[Segment], written: Sequence[Rows] | None = None) -> None:
        """Writes neighbouring segments as one segment, and changes the manifest. written: the rows to write instead of the segments' own;
        None for the segments themselves."""
        began, snapshot = time.perf_counter(), self._gallery.snapshot()
        dropped = _removed(snapshot, segments)
        rows = sum(segment.count for segment in segments)

        def go_on() -> bool:
            return not self._closing or rows <= _FINISH_ROWS_MAX

        entry = self._gallery.write_parts(written or segments, [snapshot.mask(segment) for segment in segments], go_on)
        try:
            with self._gallery.transaction() as transaction:
                transaction.swap(segments, entry, dropped)
        except BaseException:
            published = {segment.entry.number for segment in self._gallery.snapshot().segments}
            if not self._gallery.is_broken and entry.number not in published:
                self._gallery.discard_rows(entry)
            raise
        _log.info(
            "merged %d segments of %d rows into one, without %d removed rows, in %.2f s",
            len(segments),
            rows,
            len(dropped),
            time.perf_counter() - began,
        )

    def wake_if_due(self) -> None:
        """Wakes the background thread, if something must be sealed, merged or indexed."""
        if self._closing or not self._config.background or not self._is_due():
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run_on_call, name="biodedup-maintenance", daemon=True)
            self._thread.start()
        self._wake.set()

    def stop(self) -> None:
        """Starts no further work, and abandons a large merge."""
        self._closing = True

    def join(self) -> None:
        """Waits for the background thread. Called after `stop`."""
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _run_on_call(self) -> None:
        while not self._closing:
            self._wake.wait()
            self._wake.clear()
            try:
                self.run()
            except Abandoned:
                return
            except GalleryBusy as error:
                _log.debug("sealing or merging is left to another process: %s", error)
            except (BiodedupError, MemoryError) as error:
                # the rows are still in the journal; the next commit tries again
                _log.warning("sealing or merging was postponed: %s", error)

    def _is_due(self) -> bool:
        return self._tail_is_full() or bool(self._run_due()) or self._indexing.is_due()

    def _tail_is_full(self) -> bool:
        return self._gallery.journal_count >= self._config.seal_rows

    def _run_due(self) -> list[Segment]:
        """The neighbouring segments that must be merged; empty if none are due."""
        snapshot = self._gallery.snapshot()
        segments, config = snapshot.segments, self._config
        dead = [len(_removed(snapshot, [segment])) for segment in segments]
        run = due([s.count for s in segments], dead, config.seal_rows, config.merge_fan, config.segment_rows)
        return [] if run is None else segments[run]


def segments_to_rekey(snapshot: Snapshot) -> list[Segment]:
    """The segments whose embeddings have another secret transform than the gallery's."""
    wanted = transform_id_of(snapshot.transform)
    return [s for s in snapshot.segments if any(c.transform_id not in (None, wanted) for c in s.columns.values())]


def _loses(column: str, codec: FaissCodec, miss_risk: float) -> InvalidInput:
    return InvalidInput(
        f"index {codec.spec} misses a mate with cosine {MATED_SIMILARITY} or more in column {column} with a probability of up to "
        f"{codec.lost_bound:.2g}, wanted at most {miss_risk:g}: it reads too few lists; raise nprobe, or force it"
    )


def _removed(snapshot: Snapshot, segments: Sequence[Segment]) -> Int64:
    low, high = np.searchsorted(snapshot.tombstones, (segments[0].first_row, segments[-1].end_row))
    return snapshot.tombstones[low:high]
