"""A gallery: the durable store of subjects, templates and decisions, with one writing process and many readers.

Owns durability, visibility, versions, and recovery after a failed commit. Never compares templates and never decides. opening.py opens the
database, loading.py reads it, transaction.py stages changes, maintenance.py seals the journal and merges segments.

1. Changes are staged in a `Transaction`. They become visible only after their commit is durable. After a failure, the state on disk and in
   memory is that before the transaction.
2. A reader uses a `Snapshot`, which does not change while the writer works.
3. Files that the manifest names are never changed. They are written and synced before the commit that names them, and removed after the
   commit that no longer names them. The next writer removes segment files that the manifest does not name, and no other files.
4. A writer stops with GalleryBusy if its lock file was removed, or if another process has committed. Afterwards it removes no files.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from biodedup.config import GalleryConfig
from biodedup.errors import BiodedupError, GalleryBusy, GalleryDamaged, IndexMismatch, InvalidInput, KeyMismatch
from biodedup.gallery.answers import StoredDecision, parsed
from biodedup.gallery.cases import current_answer, read_case
from biodedup.gallery.catalogue.audit import AuditCheck, AuditRecord, AuditSpan, record_of
from biodedup.gallery.catalogue.chain import Link
from biodedup.gallery.catalogue.protocol import Catalogue
from biodedup.gallery.catalogue.readings import Readings, Waiting
from biodedup.gallery.catalogue.sqlite import SqliteCatalogue, State
from biodedup.gallery.files import forks, index_codec
from biodedup.gallery.files.encryption.subject_keys import SubjectKeys, refuse_keys_within
from biodedup.gallery.files.encryption.transform import Transform, transform_id_of
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import MALFORMED, Lock, Storage, needs_key
from biodedup.gallery.files.index_codec import FaissCodec
from biodedup.gallery.files.names import DATABASE_NAME, KEY_NAME, LOCK_NAME, SEGMENT_FOLDER
from biodedup.gallery.files.packed import Packed
from biodedup.gallery.indexing import IndexLimits
from biodedup.gallery.loading import LoadedGallery, load, malformed_error, read
from biodedup.gallery.maintenance import Maintenance, segments_to_rekey
from biodedup.gallery.opening import open_catalogue, prepare_folder
from biodedup.gallery.policies import PolicyVersion
from biodedup.gallery.segments.indexing import built, with_indexes, write_column_index
from biodedup.gallery.segments.layout import INDEX, SegmentEntry, file_name, number_of, unused_number
from biodedup.gallery.segments.new_cells import NewCells
from biodedup.gallery.segments.new_rows import NewRows
from biodedup.gallery.segments.part import Rows
from biodedup.gallery.segments.reader import Segment
from biodedup.gallery.segments.writer import write_segment
from biodedup.gallery.snapshot import Snapshot
from biodedup.gallery.transaction import Transaction, sealed_cells
from biodedup.index_spec import NATIVE, IndexSpec, parse_specs, spec_of
from biodedup.values import COLUMNS, Case, Template, Verdict

_log = logging.getLogger("biodedup.gallery")
_LIMITS = IndexLimits()


class Recorder(Protocol):
    """Adds rows to commits: the audit log and the model cards in use (engine/callers/). Both methods are called with the gallery's lock
    held."""

    def stage(self, transaction: Transaction) -> None:
        """Called before a commit that changes something."""

    def settle(self) -> None:
        """Called when that commit is durable."""


class Gallery:
    """The subjects of a gallery, their templates, and the answers to encounters. Thread-safe; one process writes."""

    def __init__(
        self,
        storage: Storage,
        folder: Path,
        catalogue: Catalogue,
        lock: Lock | None,
        config: GalleryConfig,
        limits: IndexLimits,
        subject_keys: Path | None = None,
    ) -> None:
        self.folder = folder
        self.limits = limits
        self.read_only = lock is None
        self.lock = threading.RLock()
        """Guards the connection and the published snapshot. Hold it to make several steps atomic."""
        self.rekeying = threading.Lock()
        """Held by the one thread that rekeys embeddings, until it has destroyed the secret of the old transform."""
        self.storage = storage
        self._catalogue = catalogue
        self._lock_file = lock
        self.recorders: list[Recorder] = []
        self._broken = self._closed = False
        self._uncertain: State | None = None
        """The state of a commit whose result is unknown because the disk failed; otherwise None."""
        self._unwiped = lock is not None
        self._process = forks.Process()
        forks.hold(self.lock)
        self._state = State()
        self._policies: tuple[PolicyVersion, ...] = ()
        self._maintenance = Maintenance(self, config)
        self._opened: WeakSet[Segment] = WeakSet()
        self._readings = Readings(storage, folder, lambda: self._catalogue.readers_taken())
        self.keys = self._opened_keys(subject_keys)
        self._load()
        if lock is not None:
            self._sweep()
            self._finish_erasure()
            if not catalogue.has_encounters():
                with self.transaction() as transaction:
                    transaction.adopt_cases()
            self._refuse_other_index(config)
            if config.renewable and self._published.transform is None:
                raise InvalidInput(
                    f"{folder} stores embeddings without a secret transform, got renewable=True; run `biodedup key rekey`, or leave "
                    "renewable out"
                )
        self._log_opened()
        if lock is not None:
            self._maintenance.wake_if_due()

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        storage: Storage,
        config: GalleryConfig,
        settings: dict[str, Any],
        gallery_id: str,
        read_only: bool = False,
        limits: IndexLimits = _LIMITS,
        subject_keys: Path | None = None,
    ) -> Gallery:
        """Opens the gallery. Creates it if the folder is absent or empty.

        settings, gallery_id: stored with a new gallery; limits: threads and miss risk of indexes; subject_keys: the folder of the keys that
        minutiae are sealed by. Raises NotAGallery, IndexMismatch, KeyMismatch, GalleryBusy, GalleryDamaged, StorageUnavailable.
        """
        with translated(f"opening {folder}"):
            lock = prepare_folder(storage, folder, read_only=read_only)
            try:
                stored = json.dumps(settings)
                catalogue = open_catalogue(storage, folder, read_only=read_only, gallery_id=gallery_id, settings=stored)
                try:
                    return cls(storage, folder, catalogue, lock, config, limits, subject_keys)
                except BaseException:
                    catalogue.close()
                    raise
            except BaseException:
                if lock is not None:
                    lock.release()
                raise

    @classmethod
    def open_to_read(
        cls, folder: Path, storage: Storage, config: GalleryConfig, subject_keys: Path | None = None
    ) -> Gallery:
        """Opens an existing gallery for reading. Another process may write it meanwhile. Raises as `open`."""
        return cls.open(
            folder,
            storage=storage,
            config=config,
            settings={},
            gallery_id="",
            read_only=True,
            subject_keys=subject_keys,
        )

    def _opened_keys(self, folder: Path | None) -> SubjectKeys | None:
        """Of subjects. Raises KeyMismatch, InvalidInput, GalleryDamaged."""
        known = self._catalogue.has_subject_keys()
        if folder is None:
            if known:
                raise KeyMismatch(
                    f"minutiae of {self.name} are sealed by keys of its subjects; state their folder by Config(subject_keys=...)"
                )
            return None
        refuse_keys_within(self.folder, folder)
        if not known and self.read_only:
            return None  # no writer has begun to seal
        return SubjectKeys(folder, self._catalogue.meta()["gallery_id"], read_only=self.read_only, new=not known)

    def _finish_erasure(self) -> None:
        """Notes that the gallery has keys of subjects, and destroys those of rows that a process removed and did not come to."""
        if self.keys is None:
            return
        if not self._catalogue.has_subject_keys():
            with self.transaction() as transaction:
                transaction.caller_tables().set_subject_keys()
        if doomed := self.keys.doomed():
            kept = {*self._published.live_rows().tolist(), *self._published.pending}
            self.keys.destroy({slot for row, slot in doomed if row not in kept})
            self.keys.forget_doomed()

    @property
    def name(self) -> str:
        """The name of the gallery in messages."""
        return str(self.folder)

    def _log_opened(self) -> None:
        now, unsealed = self._published, self.journal_count
        _log.info(
            "opened %s for %s: %d subjects, %d segments, %d entries in the journal, version %d",
            self.name,
            "reading" if self.read_only else "writing",
            now.live_count,
            len(now.segments),
            unsealed,
            now.version,
        )

    def refuse_backup(self) -> None:
        """Raises InvalidInput if the gallery is not a folder. ClusterGallery overrides it."""

    def problems(self) -> list[str] | None:
        """The problems of a gallery that is not a folder; None for a folder, which care/verify.py inspects."""
        return None

    def close(self) -> None:
        """Waits for sealing and for small merges. A large merge is abandoned, and starts again later. Files are closed at once: a snapshot
        that is still in use raises EngineClosed at its next read. In a child of a fork it does nothing."""
        self._maintenance.stop()
        if not self._process.is_this:
            return
        self._maintenance.join()
        with self.lock:
            self._readings.close()
            if self.keys is not None:
                self.keys.close()
            self._catalogue.close()
            if self._lock_file is not None:
                self._lock_file.release()
            for segment in list(self._opened):
                segment.close()
        if not self._closed:
            self._closed = True
            _log.info("closed %s at version %d", self.name, self._published.version)

    # reading ----------------------------------------------------------------------------------------------------

    @property
    def is_of_this_process(self) -> bool:
        """False in a child of a fork."""
        return self._process.is_this

    def check_process(self) -> None:
        """Raises EngineClosed in a child of a fork."""
        self._process.check()

    def snapshot(self) -> Snapshot:
        self._process.check()
        return self._published

    def refresh(self) -> None:
        """In a reader: loads the newest commit of the writer. In a writer it does nothing."""
        self._process.check()
        if self.read_only:
            with self.lock:
                self._load()

    @property
    def policies(self) -> tuple[PolicyVersion, ...]:
        """All versions of the policy, the version in force last."""
        return self._policies

    def templates_of(self, subject_id: str) -> dict[str, Template] | None:
        """column -> the best enrolled template of a subject; None if the subject is not enrolled."""
        return self.snapshot().best_templates(subject_id)

    def answer(self, encounter_id: str) -> StoredDecision | None:
        """As `Snapshot.answer`; for a case, its present decision."""
        found = self.snapshot().answer(encounter_id)
        if found is None or found.outcome != "review":
            return found  # the lock is not needed
        with self._reading():
            return current_answer(self._catalogue, encounter_id, found)

    def case(self, encounter_id: str) -> Case | None:
        """The case of an encounter that went to review, open or closed; None for other encounters."""
        with self._reading():
            return read_case(self._catalogue, self._published, encounter_id)

    def open_cases(self) -> list[str]:
        """The encounters in review, ordered by id."""
        waiting = self._published.pending.values()
        with self._reading():
            return sorted({*waiting, *self._catalogue.held_cases()})

    def chain_link(self, version: int) -> Link | None:
        """The link of the hash chain whose commit made a version of the content. None for a version before the chain began."""
        with self._reading():
            return self._catalogue.link_of(version)

    def closed_cases(self) -> dict[str, float]:
        """encounter_id of each closed case -> the time of its last verdict, or of its decision, in seconds since 1970."""
        waiting = set(self._published.pending.values())
        with self._reading():
            waiting |= set(self._catalogue.held_cases())
            found = {name: text for name, text in self._catalogue.cases() if text is not None and name not in waiting}
            closed = {name: parsed(text) for name, text in found.items()}
            judged = [(verdict.encounter_id, verdict.at) for verdict in self._catalogue.verdicts()]
        times = {name: float(table["decided_at"]) for name, table in closed.items() if table.get("outcome") != "review"}
        for name, at in judged:
            if name in times:
                times[name] = max(times[name], at)
        return times

    def verdicts(self) -> list[Verdict]:
        """All verdicts, oldest first."""
        with self._reading_verified():
            return list(self._catalogue.verdicts())

    def alarms(self) -> list[tuple[Any, ...]]:
        """The rows of table `alarm`, oldest first."""
        with self._reading_verified():
            return self._catalogue.alarms()

    def audit_log(self) -> tuple[list[AuditSpan], list[AuditRecord]]:
        """(the packed records of the audit log, the records after them), oldest first. Raises GalleryDamaged if records are missing."""
        with self._reading_verified():
            spans, rows = list(self._catalogue.audit_spans()), list(self._catalogue.audit_rows())
            check = AuditCheck.after(spans, self._catalogue.audit_hash())
            check.rows(rows, self._catalogue.audit_head())
            if check.problems:
                raise GalleryDamaged(f"{check.problems[0]}; run `biodedup log verify`, and restore a backup")
            return spans, [record_of(row) for row in rows]

    def record_reading(self, records: Sequence[AuditRecord]) -> None:
        """Notes calls of a process that only reads; the writer takes them into the audit log. Durable when it returns. Raises
        StorageUnavailable, GalleryBusy."""
        self._process.check()
        with self.lock:
            self._readings.append(records)

    def waiting_readings(self) -> Waiting | None:
        """Calls of readers that are not in the audit log yet. None for nothing. Raises StorageUnavailable, GalleryDamaged."""
        with self.lock:
            return self._readings.waiting()

    def forget_readings(self, number: int) -> None:
        """Those up to a number are in the audit log."""
        self._readings.forget(number)

    def cards(self) -> list[tuple[Any, ...]]:
        """The rows of table `card`, oldest first."""
        with self._reading_verified():
            return self._catalogue.cards()

    def approvals(self) -> tuple[list[tuple[Any, ...]], dict[int, str]]:
        """(rows of table `approval`, oldest first; number of the approval -> the method of its newest signature)."""
        with self._reading_verified():
            signed = {row[1]: row[3] for row in self._catalogue.approval_signatures()}
            return self._catalogue.approvals(), signed

    def copied_to(self, copy: sqlite3.Connection) -> Snapshot:
        """Copies the database, and returns the snapshot of the same commit. A reader loads the newest commit first."""
        with self._reading():
            if self.read_only:
                self._publish(read(self._catalogue, self.storage, self.folder))
            assert isinstance(self._catalogue, SqliteCatalogue), "only a gallery in a folder has a database file"
            self._catalogue.copy_to(copy)
            return self._published

    @contextmanager
    def _reading_verified(self) -> Iterator[None]:
        """As `_reading`, and compares the tables that are read completely with the newest link of the hash chain. Raises GalleryDamaged."""
        with self._reading(), self._catalogue.compared_with_chain():
            yield

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """A read transaction, with the lock held. Recovers first if the last write failed."""
        self._process.check()
        with self.lock, translated(f"reading {self.folder}"):
            if self._broken:
                self._recover()
            try:
                self._catalogue.begin_reading()
                yield
            except MALFORMED as error:
                raise malformed_error(self.folder, error) from (None if isinstance(error, MemoryError) else error)
            finally:
                try:
                    self._catalogue.rollback()
                except (sqlite3.Error, MemoryError):
                    self._broken = True  # the read was valid; the next transaction opens a new connection

    # writing ----------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """A write transaction: holds the lock, and commits at the end. Raises the body's exception, StorageUnavailable, and GalleryBusy if
        another process has written. After an exception nothing has changed."""
        self._process.check()
        self._refuse_reader()
        with self.lock:
            if self._broken:
                self._recover()
            transaction = None
            try:
                with translated("writing"):
                    self._catalogue.begin()
                    self._check_other_writers()
                    transaction = self._staged()
                    yield transaction
                    for recorder in self.recorders if transaction.changed else ():
                        recorder.stage(transaction)
                    changed, state = (
                        transaction.changed,
                        transaction.state,
                    )  # read here: after the commit, an error would be misread
                    if changed:
                        self._make_files_durable(transaction)
                        self._catalogue.set_state(state)
                        self._catalogue.commit()
                    else:
                        self._catalogue.rollback()
            except BaseException:
                if transaction is None or not self._is_durable(transaction):
                    self._undo(transaction)
                    raise
            if changed:
                try:
                    self._adopt(transaction)
                except BaseException:  # for example out of memory: the commit is durable, so the gallery is read again
                    self._broken, self._uncertain = True, state
                    with suppress(BiodedupError, MemoryError):  # then the next transaction recovers
                        self._recover()
                    raise
            self._wipe_if_erased()

    def _refuse_reader(self) -> None:
        if self.read_only:
            raise InvalidInput(f"{self.folder} was opened read_only; open it for writing to change it")

    def _staged(self) -> Transaction:
        before, tail = self._published, self._tail
        return Transaction(
            catalogue=self._catalogue,
            storage=self.storage,
            folder=self._segments,
            gallery_id=self.gallery_id,
            state=self._state,
            before=before,
            tail=tail,
        )

    def _undo(self, transaction: Transaction | None) -> None:
        """Discards a transaction that was not committed. None: it failed before changes were staged."""
        if transaction is None:
            try:
                self._catalogue.rollback()
            except (sqlite3.Error, MemoryError):
                self._broken = True
        self._tail.truncate(self._published.parts[-1].count)
        if transaction is not None and not self._broken:
            for number in transaction.new_segments:
                self._remove_files(number)

    def _make_files_durable(self, transaction: Transaction) -> None:
        """Called before the commit that names new files. In a folder they are durable already."""

    def _check_other_writers(self) -> None:
        """Raises GalleryBusy if another process has committed since. Called inside a transaction, which excludes other processes."""
        found = self._catalogue.state()
        if found.commit_id != self._state.commit_id or found.commits != self._state.commits:
            raise GalleryBusy(
                f"another process wrote to {self.folder}: got commit {found.commits}, wanted commit {self._state.commits} of this "
                "process; close this engine and open the gallery again. Nothing of this call was written"
            )
        self._refuse_lost_lock()

    def _refuse_lost_lock(self) -> None:
        if not self._holds_lock():
            raise GalleryBusy(
                f"{self.folder / LOCK_NAME} was removed or replaced, so that another process may write; close this engine and "
                "open the gallery again. Nothing of this call was written"
            )

    def _holds_lock(self) -> bool:
        return self._lock_file is not None and self._lock_file.is_held()

    def _wipe_if_erased(self) -> None:
        """Overwrites SQLite's rollback journal if it may still hold erased templates. If the disk fails, the next transaction tries again;
        the commit itself is durable."""
        self._unwiped = self._unwiped or self._catalogue.erased
        if not self._unwiped or self._broken:
            return
        try:
            self._catalogue.begin()  # so that no other process writes
            self.storage.wipe(self.folder / f"{DATABASE_NAME}-journal")
            self._unwiped = self._catalogue.erased = False
        except (OSError, sqlite3.Error, MemoryError) as error:
            _log.warning("overwriting the journal was postponed: %s", error)
        finally:
            try:
                self._catalogue.rollback()
            except (sqlite3.Error, MemoryError):
                self._broken = True

    def _adopt(self, transaction: Transaction) -> None:
        """Publishes a transaction whose commit is durable, and removes the files that it has retired."""
        for recorder in self.recorders:
            recorder.settle()
        for tell in transaction.when_durable:
            tell()
        published = transaction.snapshot()
        self._state, self._tail = transaction.state, transaction.tail
        self._policies += tuple(transaction.policies)
        self._published = published
        _log.debug("committed version %d", published.version)
        self._tail.answers.update(
            transaction.answers
        )  # after the rows: readers take an answer without a row for a removed one
        self._opened.update(published.segments)
        for segment in transaction.retired:
            self._remove_files(segment.entry.number)
        self.remove_index_files(transaction.retired_files)
        self._maintenance.wake_if_due()

    def _is_durable(self, transaction: Transaction) -> bool:
        """After a failed transaction: rolls back, and checks whether the commit is durable nevertheless."""
        try:
            self._catalogue.rollback()
            return self._catalogue.state().commit_id == transaction.state.commit_id
        except (sqlite3.Error, GalleryDamaged, MemoryError):
            self._broken, self._uncertain = True, transaction.state
            return False

    def _recover(self) -> None:
        """Opens a new connection and reads the gallery again, after a failure that left the result of a commit or a read unknown. Raises
        StorageUnavailable while the disk still fails."""
        with translated("connecting again after a failure"):
            self._catalogue.close()
            database = self.folder / DATABASE_NAME
            self._catalogue = SqliteCatalogue(self.storage.connect(database, read_only=self.read_only))
        before = self._state
        self._load()
        own_commits = [state.commit_id for state in (before, self._uncertain) if state is not None]
        if not self.read_only and self._state.commit_id not in own_commits:
            self._state = before  # another process has written: every later transaction is refused
        self._broken, self._uncertain, self._unwiped = False, None, True
        _log.warning("connected again after a failure, at version %d", self._published.version)

    def write_rows(
        self, subject_ids: Packed, cells: Mapping[str, NewCells], group_sets: NDArray[np.uint32]
    ) -> SegmentEntry:
        """Writes a segment of new rows. It becomes visible with `Transaction.attach`."""
        cells = sealed_cells(self.keys, cells, len(subject_ids))
        return self.write_part(NewRows(subject_ids, cells, group_sets), None)

    def write_part(self, part: Rows, keep: NDArray[np.bool_] | None) -> SegmentEntry:
        """As `write_rows`, for the rows of any part. keep: the rows to write, bool (count,), None for all."""
        return self.write_parts([part], [keep])

    def write_parts(
        self,
        parts: Sequence[Rows],
        keeps: Sequence[NDArray[np.bool_] | None],
        go_on: Callable[[], bool] = lambda: True,
    ) -> SegmentEntry:
        """As `write_part`, for several neighbouring parts. Raises Abandoned when `go_on` returns False."""
        number = self._take_number()

        def continues() -> bool:
            self._refuse_lost_lock()
            return go_on()

        try:
            with translated("writing a segment"):
                self._refuse_lost_lock()
                now = self.snapshot()
                folder, gallery_id = self._segments, self.gallery_id
                about = (self.storage, folder, number, gallery_id)
                side_by_side = all(isinstance(part, NewRows | Segment) for part in parts)
                threads = self.limits.threads if side_by_side else 1
                entry = write_segment(
                    *about, parts, keeps, now.parts, continues, threads=threads, transform=now.transform
                )
                codecs = now.indexing.wanted_codecs()
                with index_codec.threads(self.limits.threads, sum(part.count for part in parts)):
                    return with_indexes(self.storage, folder, gallery_id, entry, codecs, continues)
        except BaseException:
            self._remove_files(number)
            raise

    def discard_rows(self, entry: SegmentEntry) -> None:
        """Removes the files of `write_rows`, if no transaction has attached them."""
        self._remove_files(entry.number)

    # sealing and merging ----------------------------------------------------------------------------------------

    def maintaining(self) -> AbstractContextManager[None]:
        """Held while segments are sealed in the background, merged or indexed. It does nothing for a folder, which only one process
        writes."""
        return nullcontext()

    def maintain(self) -> None:
        """Seals a full journal, and merges the segments that are due, now."""
        self._maintenance.run()

    def seal(self) -> None:
        """Seals the journal: writes its rows into a new segment."""
        began = time.perf_counter()
        with self.transaction() as transaction:
            rows, answers = self._tail.count, len(self._tail.answers)
            transaction.seal()
        self._log_sealed(rows, answers, began)

    @staticmethod
    def _log_sealed(rows: int, answers: int, began: float) -> None:
        if rows or answers:
            took_s = time.perf_counter() - began
            _log.info("sealed %d rows and %d decisions of the journal in %.2f s", rows, answers, took_s)

    def compact(self) -> None:
        """Seals the journal, and merges segments into as few as the largest size allows. Afterwards the disk holds no templates of removed
        subjects."""
        self.seal()
        self._maintenance.compact()

    @property
    def journal_count(self) -> int:
        """The number of rows and answers that are not sealed."""
        return self._tail.count + len(self._tail.answers)

    @property
    def is_broken(self) -> bool:
        """Whether the next transaction must open a new connection first."""
        return self._broken

    def reindex(
        self,
        specs: Mapping[str, IndexSpec],
        *,
        force: bool = False,
        report: Callable[[int, int], None] | None = None,
        approve: Callable[[Transaction], None] = lambda transaction: None,
    ) -> None:
        """See `Maintenance.reindex`."""
        self._maintenance.reindex(specs, force=force, report=report, approve=approve)

    def rewrite(self, changed: Callable[[Segment], Rows | None]) -> None:
        """See `Maintenance.rewrite`."""
        self._maintenance.rewrite(changed)

    def rekey(
        self,
        *,
        renewable: bool = True,
        report: Callable[[int, int], None] | None = None,
        approve: Callable[[Transaction], None] = lambda transaction: None,
    ) -> str:
        """Stores all embeddings with a new secret transform, or completes an interrupted change. Searches continue meanwhile.

        renewable: False stores embeddings without a transform; approve: called in the transaction that begins the change. Returns the id of
        the transform, "" for none. Call `forget_transforms` afterwards. Raises InvalidInput if the gallery is not encrypted, KeyMismatch,
        StorageUnavailable.
        """
        with translated(f"rekeying the embeddings of {self.name}"):
            self._refuse_reader()
            transform = self._next_transform() if renewable else None
            self._maintenance.rekey(transform, report, approve)
            return transform_id_of(transform)

    def rekey_goes_on(self, *, renewable: bool) -> bool:
        """Whether `rekey` would only complete an interrupted change, instead of beginning one. Raises InvalidInput for a reader, and for
        renewable templates in a gallery in the clear."""
        self._refuse_reader()
        if renewable and KEY_NAME not in (self.storage.list_names(self.folder) or ()):
            raise needs_key(self.folder)
        now, known = transform_id_of(self.snapshot().transform), self.storage.transform_ids(self.folder)
        if not renewable or not now:
            return not renewable and not now
        return known[-1:] == [now] and (len(known) > 1 or bool(segments_to_rekey(self.snapshot())))

    def _next_transform(self) -> Transform:
        """The transform of an interrupted change, or a new one. A secret that no embedding uses comes from a run that was interrupted
        before its first commit; it is used now."""
        now, known = transform_id_of(self.snapshot().transform), self.storage.transform_ids(self.folder)
        used = self._used_transforms() | {now}
        spare = (
            [now]
            if self.rekey_goes_on(renewable=True)
            else [transform_id for transform_id in known if transform_id not in used]
        )
        transform_id = spare[-1] if spare else self.storage.add_transform(self.folder)
        return self.storage.transform(self.folder / DATABASE_NAME, transform_id)

    def _used_transforms(self) -> set[str]:
        """The transforms of all segments."""
        columns = (column for segment in self.snapshot().segments for column in segment.columns.values())
        return {column.transform_id or "" for column in columns}

    def forget_transforms(self) -> None:
        """Destroys the secrets of transforms that no stored embedding uses any more."""
        snapshot = self.snapshot()
        if not segments_to_rekey(snapshot):
            codecs = [codec for several in snapshot.indexing.codecs.values() for codec in several]
            needed = {transform_id_of(snapshot.transform), *(transform_id_of(codec.transform) for codec in codecs)}
            self.storage.keep_transforms(self.folder, needed)

    def _refuse_other_index(self, config: GalleryConfig) -> None:
        """Raises IndexMismatch if the configuration names another index engine than the gallery's. `reindex` changes the engine."""
        if config.index is None:
            return
        asked, stored = parse_specs(config.index), self._published.indexing.specs
        if any(spec_of(asked, column) != spec_of(stored, column) for column in COLUMNS):
            raise IndexMismatch(
                f"{self.folder} has the index {_in_words(stored)}, got {_in_words(asked)}; leave `index` out, or change the gallery with "
                "`biodedup reindex`"
            )

    def write_index(
        self, segment: Segment, column: str, codec: FaissCodec, go_on: Callable[[], bool]
    ) -> tuple[str, str]:
        """Writes the index of a segment's column. Returns (kind, digest) of the file, for `Transaction.replace_index`."""
        kind = column + INDEX + codec.codec_id

        def continues() -> bool:
            self._refuse_lost_lock()
            return go_on()

        try:
            with translated("writing an index"), index_codec.threads(self.limits.threads, segment.count):
                self._refuse_lost_lock()
                index = built(segment.columns[column], codec, continues)
                which = (segment.entry.number, kind)
                digest = write_column_index(self.storage, self._segments, self.gallery_id, which, index, replaces=True)
                self.storage.sync_folder(self._segments)
                return kind, digest
        except BaseException:
            self.remove_index_files([file_name(segment.entry.number, kind)])
            raise

    def remove_index_files(self, names: Sequence[str]) -> None:
        """Removes index files that the manifest does not name. If that fails, the next writer removes them."""
        with suppress(OSError, sqlite3.Error):
            for name in names:
                if self._holds_lock():
                    self.storage.remove(self._segments / name)

    def _take_number(self) -> int:
        self._process.check()
        with self.lock, translated("choosing a segment's number"):
            number = unused_number(self.storage, self._segments, self._state.next_segment)
            self._state = replace(self._state, next_segment=number + 1)
            return number

    def _remove_files(self, number: int) -> None:
        """Removes a segment's files. If that fails, the next writer removes them. Without the lock nothing is removed, because another
        writer may use the same number."""
        try:
            for name in self.storage.list_names(self._segments) or ():
                if number_of(name) == number and self._holds_lock():
                    self.storage.remove(self._segments / name)
        except (OSError, sqlite3.Error):
            pass

    # opening ----------------------------------------------------------------------------------------------------

    @property
    def _segments(self) -> Path:
        return self.folder / SEGMENT_FOLDER

    def _load(self) -> None:
        """Reads the gallery from the disk."""
        self._publish(load(self._catalogue, self.storage, self.folder))

    def _publish(self, loaded: LoadedGallery) -> None:
        self.gallery_id, self._policies = loaded.gallery_id, loaded.policies
        # the maximum: a running merge may have taken a higher number without having committed it
        next_segment = max(loaded.state.next_segment, self._state.next_segment)
        self._state = replace(loaded.state, next_segment=next_segment)
        self._published, self._tail = replace(loaded.snapshot, keys=self.keys), loaded.tail
        self._opened.update(loaded.snapshot.segments)

    def _sweep(self) -> None:
        """Removes segment files that the manifest does not name, left by a killed writer. In a transaction, so that no other writer can use
        them."""
        with translated(f"sweeping {self.folder}"):
            self._catalogue.begin()
            try:
                entries = self._catalogue.segments()
                named = {file_name(entry.number, kind) for entry in entries for kind in entry.files}
                for name in self.storage.list_names(self._segments) or ():
                    if number_of(name) is not None and name not in named:
                        self.storage.remove(self._segments / name)
            finally:
                self._catalogue.rollback()
        self._wipe_if_erased()


def _in_words(specs: Mapping[str, IndexSpec]) -> str:
    return ", ".join(f"{column}: {spec}" for column, spec in specs.items()) or NATIVE
