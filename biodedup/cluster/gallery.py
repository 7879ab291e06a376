"""A gallery on several machines: many front-ends write one PostgreSQL catalogue, and each front-end searches its own copies of the
segments.

Owns how a front-end reads the commits of other front-ends: before each of its own commits, and by polling. Never compares templates and
never decides.

1. A transaction holds the writers' lock, and first reads the commits of other front-ends. A decision in the transaction includes these
   rows, so that enrolment is linearizable across processes.
2. A front-end stops if PostgreSQL does not have the newest commit that the front-end has seen.
3. The manifest names a file only after the file was read back from the segment store unchanged.
4. A front-end that writes refuses to search (StorageUnavailable) when it has not read the newest commits for `ClusterConfig.stale_ms_max`,
   because the missing rows may be mates. A read-only front-end keeps one version until `refresh`.
5. Only one front-end at a time merges and indexes segments: the holder of a lease. Each of its commits checks the fence of the lease.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from biodedup.cluster.cache import SegmentCache, copies_of
from biodedup.cluster.catalogue import Changes, PostgresCatalogue
from biodedup.cluster.scratch import remove_scratch
from biodedup.cluster.store import SegmentStore, stored_name
from biodedup.config import ClusterConfig, GalleryConfig
from biodedup.errors import BiodedupError, GalleryBusy, GalleryDamaged, InvalidInput, StorageUnavailable
from biodedup.gallery.catalogue.audit import AuditRecord
from biodedup.gallery.catalogue.sqlite import ColumnModel, paired
from biodedup.gallery.files import forks
from biodedup.gallery.files.filesystem import Storage
from biodedup.gallery.files.packed import hash_of
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.indexing import IndexLimits
from biodedup.gallery.loading import append_journal, read
from biodedup.gallery.segments.layout import SegmentEntry
from biodedup.gallery.segments.part import Part, Rows
from biodedup.gallery.segments.tail import Tail, TailPart
from biodedup.gallery.snapshot import Snapshot
from biodedup.gallery.transaction import Transaction

_log = logging.getLogger("biodedup.cluster")
_LEASE, _LEASE_S = "maintenance", 30.0
_REREAD_ROWS_MIN = (
    1024  # from so many new rows on, the whole journal is read again, which is faster than reading them one by one
)
_TRIES = 20  # attempts to fetch segments while other front-ends merge them


class _WriterLock:
    """Replaces the lock file of a gallery in a folder. It does nothing: each transaction takes a lock in PostgreSQL."""

    def release(self) -> None:
        pass

    def is_held(self) -> bool:
        return True


class _FrontEnd(forks.Process):
    """Checks that this process may use the front-end. stopped: the error that ended the front-end, or None."""

    stopped: GalleryDamaged | None = None

    def check(self) -> None:
        super().check()
        if self.stopped is not None:
            raise GalleryDamaged(str(self.stopped))


class ClusterGallery(Gallery):
    """The gallery of a register, as one front-end sees it. Thread-safe; any number of processes write."""

    _catalogue: PostgresCatalogue

    def __init__(
        self,
        storage: Storage,
        folder: Path,
        catalogue: PostgresCatalogue,
        config: GalleryConfig,
        limits: IndexLimits,
        cluster: ClusterConfig,
        holder: str,
        *,
        read_only: bool = False,
    ) -> None:
        """folder: for the local copies; holder: the name of this front-end in leases; the others: as in `Gallery`."""
        self._cluster = cluster
        self._store = SegmentStore(cluster.segments, catalogue.register_id)
        storage.make_folder(folder)
        storage.make_folder(folder / "segments")
        self._cache = SegmentCache(storage, folder / "segments", self._store, cluster.cache_bytes_max)
        self._stored: set[str] = set()
        """Files in the segment store that the manifest names, or that were uploaded for the next commit."""
        self._holder = holder
        self._one_maintains = threading.Lock()
        self._maintains: tuple[int, int] | None = None
        """(thread, fence) while this front-end holds the lease."""
        self._seen_at = time.monotonic()
        self._front_end = _FrontEnd()
        self._ended = threading.Event()
        self._recording = threading.Lock()
        super().__init__(storage, folder, catalogue, None if read_only else _WriterLock(), config, limits)
        self._process = self._front_end
        self._poller = None if read_only else threading.Thread(target=self._poll, name="biodedup-poll", daemon=True)
        if self._poller is not None:
            self._poller.start()

    def close(self) -> None:
        self._ended.set()
        if self._poller is not None and self.is_of_this_process:
            self._poller.join()
        super().close()
        if self.is_of_this_process and self._cluster.cache is None:
            remove_scratch(self.folder)

    @property
    def key_file(self) -> str:
        """`PostgresCatalogue.key_file`."""
        return self._catalogue.key_file

    def rekey_goes_on(self, *, renewable: bool) -> bool:
        raise InvalidInput(
            "a register does not support renewable templates; use a gallery in a folder, or leave renewable out"
        )

    def record_reading(self, records: Sequence[AuditRecord]) -> None:
        """In a commit of its own: any process may write to PostgreSQL. This front-end's version stays."""
        self._process.check()
        with self._recording, closing(self._catalogue.another()) as catalogue:
            catalogue.record_reading(records)

    def waiting_readings(self) -> None:
        return None

    # reading the commits of other front-ends --------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        found = super().snapshot()
        if not self.read_only and time.monotonic() - self._seen_at > self._cluster.stale_ms_max / 1000:
            self.refresh()
            found = super().snapshot()
        return found

    def refresh(self) -> None:
        """Reads the commits of all front-ends. Raises StorageUnavailable, GalleryDamaged."""
        self._process.check()
        with self.lock:
            if self._catalogue.in_transaction:
                return  # this thread writes, and holds the writers' lock: no other writer can have committed since
            if self._broken:
                self._recover()
                return
            for _ in range(_TRIES):
                absent = self._read_changes()
                if not absent:
                    return
                self._cache.fetch(absent)
        raise StorageUnavailable("other front-ends merge segments faster than this one can fetch them; try again later")

    def _read_changes(self) -> list[SegmentEntry]:
        """Reads the newest commits; returns the segments that must be fetched before, if there are any."""
        self._catalogue.begin_reading()
        try:
            return self._follow()
        finally:
            self._catalogue.rollback()

    def _poll(self) -> None:
        failing = False
        wait_s = min(self._cluster.poll_ms / 1000, _LEASE_S / 3)
        while not self._ended.wait(wait_s):
            try:
                absent = self._look()
                if absent:
                    self._cache.fetch(absent)  # without the lock; the next poll reads the commits
            except GalleryDamaged as error:
                _log.error("this front-end stops: %s", error)
                return
            except (BiodedupError, MemoryError) as error:
                if not failing:
                    _log.warning("the newest commits are unknown: %s", error)
                failing = True
            else:
                if failing:
                    _log.info("the newest commits are known again")
                failing = False

    def _look(self) -> list[SegmentEntry]:
        """Reads the newest commits; returns the segments that must be fetched before, if there are any."""
        # It waits, because busy readers could otherwise keep this thread from the lock for ever.
        if self._front_end.stopped is not None or not self.lock.acquire(timeout=_LEASE_S / 3):
            return []
        try:
            if self._broken:
                self._recover()
            self._renew_lease()
            if time.monotonic() - self._seen_at < self._cluster.poll_ms / 2000:
                return []
            return self._read_changes()
        finally:
            self.lock.release()

    def _check_other_writers(self) -> None:
        """Reads the commits of other front-ends, inside a transaction that holds the writers' lock. Raises GalleryBusy if the lease was
        lost."""
        for _ in range(_TRIES):
            absent = self._follow()
            if not absent:
                break
            self._catalogue.rollback()  # so that other writers do not wait while files are fetched
            self._cache.fetch(absent)
            self._catalogue.begin()
        else:
            raise StorageUnavailable(
                "other front-ends merge segments faster than this one can fetch them; send it again"
            )
        if self._maintains is not None and self._maintains[0] == threading.get_ident():
            if not self._catalogue.holds_lease(_LEASE, self._holder, self._maintains[1]):
                raise GalleryBusy(
                    "another front-end has taken over sealing and merging; nothing of this step was written"
                )

    def _follow(self) -> list[SegmentEntry]:
        """Reads the newest commits, inside a transaction; returns the segments if some of their files must be fetched before."""
        try:
            changes = self._catalogue.changes_since(self._state)
        except GalleryDamaged as error:
            self._front_end.stopped = error
            raise
        if changes is None:
            self._seen_at = time.monotonic()
            return []
        if "segment" in changes.put | changes.dropped:
            entries = self._catalogue.segments()
            if self._cache.absent(entries):
                return entries
            with self._catalogue.compared_with_chain():
                self._publish(read(self._catalogue, self.storage, self.folder, self._published.segments))
        else:
            self._read_rows(changes)
        self._seen_at = time.monotonic()
        return []

    def _read_rows(self, changes: Changes) -> None:
        """Reads the rows of other front-ends' commits, and publishes a snapshot with them."""
        catalogue, known, state = self._catalogue, self._published, self._catalogue.state()
        put, dropped = changes.put, changes.dropped
        if state.row_count - self._tail.end_row >= _REREAD_ROWS_MIN:
            with catalogue.compared_with_chain():
                self._publish(read(catalogue, self.storage, self.folder, known.segments))
            return
        since, pending, tombstones, different = self._state.commits, known.pending, known.tombstones, known.different
        models = catalogue.models() if "model" in put else known.models
        try:
            self._append_rows(self._tail, known.segments, models)
        except BaseException:
            self._tail.truncate(known.parts[-1].count)
            raise
        if self._tail.end_row != state.row_count:
            raise GalleryDamaged(
                f"the journal has {self._tail.end_row} rows, wanted {state.row_count}; restore it from a backup"
            )
        answers = catalogue.answers_since(since) if "encounter" in put else {}
        if "pending" in dropped:
            pending = catalogue.pending()
        elif "pending" in put:
            pending = {**pending, **catalogue.pending_since(since)}
        if "tombstone" in dropped:
            tombstones = np.array(catalogue.tombstones(), np.int64)
        elif "tombstone" in put:
            tombstones = np.union1d(tombstones, np.array(catalogue.tombstones_since(since), np.int64))
        if "judged" in put:
            different = paired(catalogue.judged_since(since), different)
        indexed = {"index_settings", "index_codec"} & (put | dropped)
        self._published = Snapshot(
            version=state.version,
            row_count=state.row_count,
            parts=(*known.segments, TailPart(self._tail, self._tail.count)),
            tombstones=tombstones,
            models=models,
            group_sets=catalogue.group_sets() if "group_set" in put else known.group_sets,
            pending=pending,
            extra_rows=state.extra_rows,
            different=different,
            steps=catalogue.job_steps() if "job_step" in put else known.steps,
            indexing=catalogue.index_settings() if indexed else known.indexing,
        )
        self._tail.answers.update(answers)  # after the rows: readers take an answer without a row for a removed one
        if "policy" in put:
            self._policies = tuple(catalogue.policies())
        self._state = replace(state, next_segment=max(state.next_segment, self._state.next_segment))

    def _append_rows(self, tail: Tail, segments: Sequence[Part], models: Mapping[str, ColumnModel]) -> None:
        """Appends to a tail the rows of the journal that follow it. models: column -> its model."""
        first, subjects = tail.count, self._catalogue.subjects_from(tail.end_row)
        if not subjects:
            return
        append_journal(tail, subjects, self._catalogue.cells_from(tail.end_row), models, self.folder)
        repeated = [
            position
            for position, (_, subject_id, _, _) in enumerate(subjects, first)
            if tail.positions_of[subject_id][0] < position
            or (segments and any(segment.find(subject_id, hash_of(subject_id)) for segment in segments))
        ]
        tail.mark_repeated(np.array(repeated, np.int64))

    # writing ----------------------------------------------------------------------------------------------------

    def _make_files_durable(self, transaction: Transaction) -> None:
        self._upload([part.entry for part in transaction.snapshot().segments])

    def _upload(self, entries: Sequence[SegmentEntry]) -> None:
        for entry in entries:
            for copy in copies_of([entry]):
                if copy.stored not in self._stored:
                    self._store.upload(self._segments / copy.name, copy.stored)
                    self._stored.add(copy.stored)
                    self._cache.keep([copy])

    def write_parts(
        self,
        parts: Sequence[Rows],
        keeps: Sequence[NDArray[np.bool_] | None],
        go_on: Callable[[], bool] = lambda: True,
    ) -> SegmentEntry:
        """As `Gallery.write_parts`; also uploads the files, so that the commit does not have to wait for it."""
        entry = super().write_parts(parts, keeps, go_on)
        try:
            self._upload([entry])
        except BaseException:
            self._remove_files(entry.number)
            raise
        return entry

    def _take_number(self) -> int:
        """Takes the number in a commit of its own, so that no two front-ends write segments with the same number."""
        with self.transaction() as transaction:
            number = transaction.take_number()
            transaction.manifest_changed = True
        return number

    def _is_durable(self, transaction: Transaction) -> bool:
        """False: the catalogue has already looked for the commit. If the result is unknown, the next transaction reads everything again."""
        self._catalogue.rollback()
        if self._catalogue.uncertain:
            self._broken, self._uncertain = True, transaction.state
        return False

    def _recover(self) -> None:
        """Reads the register again, after a commit whose result is unknown."""
        self._load()
        self._broken, self._uncertain = False, None
        _log.warning("read the register again after a failure, at version %d", self._published.version)

    def _wipe_if_erased(self) -> None:
        """Only resets the flags: PostgreSQL erases deleted rows when it vacuums, and the front-end has no file with them."""
        self._unwiped = self._catalogue.erased = False

    # sealing and merging ----------------------------------------------------------------------------------------

    @contextmanager
    def maintaining(self) -> Iterator[None]:
        """Holds the lease for maintenance inside the context. Raises GalleryBusy if another front-end has it."""
        with self._one_maintains:
            with self.lock:
                fence = self._catalogue.take_lease(_LEASE, self._holder, _LEASE_S)
            if fence is None:
                raise GalleryBusy("another front-end seals and merges; try again when it is done")
            self._maintains = threading.get_ident(), fence
            _log.debug("this front-end seals and merges (fence %d)", fence)
            try:
                self.refresh()
                yield
            finally:
                self._maintains = None
                with suppress(BiodedupError), self.lock:
                    self._catalogue.give_lease_back(_LEASE, self._holder)

    def seal(self) -> None:
        """Writes the present rows of the journal into a segment. Rows that other front-ends commit meanwhile stay in the journal."""
        with self.lock:
            self.refresh()
            before, commits = self._published, self._state.commits
            answers = dict(self._tail.answers)
            part = TailPart(self._tail, self._tail.count, answers)
        if not part.count and not answers:
            return
        began = time.perf_counter()
        entry = self.write_part(part, before.mask(before.parts[-1]))
        with self.transaction() as transaction:
            if transaction.tail.first_row != part.first_row or not transaction.tail.answers.keys() >= answers.keys():
                return  # another front-end has sealed these rows or answers meanwhile
            self._catalogue.trim_journal(part.end_row, commits)
            rest = Tail(part.end_row)
            segments = [*transaction.segments, part]
            self._append_rows(rest, segments, transaction.models)
            rest.answers = self._catalogue.answers_since(commits)
            entry = replace(entry, first_row=part.first_row, end_row=part.end_row)
            transaction.take_sealed(entry, before.tombstones[before.tombstones >= part.first_row], rest)
        self._log_sealed(part.count, len(answers), began)

    def _renew_lease(self) -> None:
        if self._maintains is not None:
            self._catalogue.take_lease(_LEASE, self._holder, _LEASE_S)

    def maintain(self) -> None:
        """Seals the journal and merges segments if this is due, and removes unused files from the segment store."""
        super().maintain()
        self.collect_garbage()

    def collect_garbage(self) -> list[str]:
        """Removes the files of the segment store that the manifest has not named for `ClusterConfig.garbage_grace_s`. Returns their
        names."""
        with self.maintaining(), self.lock:
            self._catalogue.begin()
            try:
                named = {
                    stored_name(entry.number, kind, digest)
                    for entry in self._catalogue.segments()
                    for kind, digest in entry.files.items()
                }
                retired = self._catalogue.retired()
            finally:
                self._catalogue.rollback()
            grace = self._cluster.garbage_grace_s
            ages = self._store.ages(time.time())
            old = [name for name, age in ages.items() if age > grace and retired.get(name, grace + 1) > grace]
            gone = sorted(set(old) - named)
            for name in gone:
                self._store.remove(name)
            self._stored.difference_update(gone)
            self._catalogue.forget_retired([name for name in retired if name in gone or name not in ages])
        return gone

    @property
    def name(self) -> str:
        return f"gallery {self._catalogue.gallery} in PostgreSQL"

    @property
    def register_id(self) -> str:
        """The name of the register's folder in the segment store."""
        return self._catalogue.register_id

    def refuse_backup(self) -> None:
        raise InvalidInput("a register in PostgreSQL is not a folder; copy it with `biodedup gallery export`")

    def problems(self) -> list[str]:
        """Problems of rows, of local copies that differ from the manifest, and of files that the store lacks."""
        with self._reading():
            found = self._catalogue.problems()
        for segment in self.snapshot().segments:
            for kind, file in segment.files.items():
                found += [f"segment {segment.entry.number}, {kind}: {text}" for text in file.problems()]
                with suppress(StorageUnavailable):
                    try:
                        self._store.size(stored_name(segment.entry.number, kind, file.digest))
                    except GalleryDamaged as error:
                        found.append(str(error))
        return found

    # opening ----------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        """Reads the whole register, and fetches the segments that have no local copy."""
        for _ in range(_TRIES):
            self._catalogue.begin_reading()
            try:
                if self._state.commit_id or self._state.commits:
                    self._catalogue.changes_since(self._state)
                entries = self._catalogue.segments()
                if not self._cache.absent(entries):
                    opened = self._published.segments if hasattr(self, "_published") else ()
                    with self._catalogue.compared_with_chain():
                        self._publish(read(self._catalogue, self.storage, self.folder, opened))
                    self._stored.update(copy.stored for copy in copies_of(entries))
                    self._seen_at = time.monotonic()
                    return
            except GalleryDamaged as error:
                self._front_end.stopped = error
                raise
            finally:
                self._catalogue.rollback()
            self._cache.fetch(entries)
        raise StorageUnavailable("other front-ends merge segments faster than this one can fetch them; try again later")

    def _sweep(self) -> None:
        self._cache.sweep([segment.entry for segment in self._published.segments])

    def copied_to(self, copy: object) -> Snapshot:
        self.refuse_backup()
        raise AssertionError("it always refuses")
