"""A gallery: the durable store of subjects, templates and decisions, with one writing process and many readers.

Owns durability, visibility, versions and recovery after a failed commit. Never compares templates and never decides.
opening.py opens the database, loading.py reads it, transaction.py stages changes, maintenance.py seals and merges.

1. A `Transaction` stages changes; they become visible to others only after their commit is durable. A failure leaves
   the state before it, on disk and in memory.
2. A reader sees a `Snapshot`, which does not change while the writer seals, merges and removes.
3. Files that a manifest names are never changed. They are written and synced before the commit that names them, and
   removed after the commit that no longer names them. The next writer removes files that no manifest names, but only those with a
   segment file's name.
4. A writer stops with GalleryBusy when its lock file was removed or another process has committed. It removes nothing afterwards.
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
from biodedup.gallery.cases import read_case, standing
from biodedup.gallery.catalogue.audit import AuditCheck, AuditRecord, AuditSpan, record_of
from biodedup.gallery.catalogue.chain import Link
from biodedup.gallery.catalogue.protocol import Catalogue
from biodedup.gallery.catalogue.readings import Readings, Waiting
from biodedup.gallery.catalogue.sqlite import SqliteCatalogue, State
from biodedup.gallery.files import forks, index_codec
from biodedup.gallery.files.encryption.subject_keys import SubjectKeys
from biodedup.gallery.files.encryption.turning import Turn, turn_id_of
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import ODD_CONTENT, Lock, Storage, needs_key
from biodedup.gallery.files.index_codec import FaissCodec
from biodedup.gallery.files.names import DATABASE_NAME, KEY_NAME, LOCK_NAME, SEGMENT_FOLDER
from biodedup.gallery.files.packed import Packed
from biodedup.gallery.indexing import IndexLimits
from biodedup.gallery.loading import LoadedGallery, load, never_written, read
from biodedup.gallery.maintenance import Maintenance, turned_otherwise
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
    """Adds rows to commits: the audit log and the cards of models (engine/callers/). Both are called under the gallery's lock."""

    def stage(self, transaction: Transaction) -> None:
        """Before a commit that changes something."""

    def settle(self) -> None:
        """Once it is durable."""


class Gallery:
    """Subjects, their templates and the answers given. Thread-safe; one process writes."""

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
        """Guards the connection and every change of what is published. Hold it to make several steps one."""
        self.turning = threading.Lock()
        """Held while embeddings are turned, until the secret of the old transform is destroyed: one thread does so."""
        self.storage = storage
        self._catalogue = catalogue
        self._lock_file = lock
        self.recorders: list[Recorder] = []
        self._broken = self._closed = False
        self._uncertain: State | None = None
        """The state of a commit whose result is unknown, because the disk failed; else None."""
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
            if config.renewable and self._published.turn is None:
                raise InvalidInput(
                    f"{folder} stores embeddings as they are, got renewable=True; run `biodedup key rekey`, or leave renewable out"
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
        """Opens the gallery, creating it where the folder is absent or empty.

        settings, gallery_id: stored with a new gallery; limits: of what indexes may miss and take; subject_keys: the folder of the keys that
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
        """A gallery that is there, while another process may write it. Raises as `open`."""
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
        if self.folder.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise InvalidInput(
                f"subject_keys is {folder}, in the gallery itself, whose backups must not have them; name another folder"
            )
        if not known and self.read_only:
            return None  # no writer has begun to seal
        return SubjectKeys(folder, self._catalogue.meta()["gallery_id"], read_only=self.read_only, new=not known)

    def _finish_erasure(self) -> None:
        """Notes that the gallery has keys of subjects, and destroys those of rows that a process removed and did not come to."""
        if self.keys is None:
            return
        if not self._catalogue.has_subject_keys():
            with self.transaction() as transaction:
                transaction.callers().set_subject_keys()
        if doomed := self.keys.doomed():
            kept = {*self._published.live_rows().tolist(), *self._published.pending}
            self.keys.destroy({slot for row, slot in doomed if row not in kept})
            self.keys.forget_doomed()

    @property
    def name(self) -> str:
        """What messages call it."""
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
        """Raises InvalidInput for a gallery that is no folder to be copied."""

    def problems(self) -> list[str] | None:
        """What a gallery that is no folder finds wrong with itself; None for a folder, which care/verify.py inspects."""
        return None

    def close(self) -> None:
        """Waits for sealing and for small merges; a large merge is abandoned, and begun again another time. Files are released at once:
        a snapshot that is still held raises EngineClosed when it is next read. In a child of a fork it does nothing."""
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
        """Raises EngineClosed in a process that was forked since the gallery was opened."""
        self._process.check()

    def snapshot(self) -> Snapshot:
        self._process.check()
        return self._published

    def refresh(self) -> None:
        """In a reader: sees what the writer has committed since."""
        self._process.check()
        if self.read_only:
            with self.lock:
                self._load()

    @property
    def policies(self) -> tuple[PolicyVersion, ...]:
        """Every version of the policy, the one in force last."""
        return self._policies

    def templates_of(self, subject_id: str) -> dict[str, Template] | None:
        """column -> the best template enrolled there; None where the subject is not enrolled."""
        return self.snapshot().best_templates(subject_id)

    def answer(self, encounter_id: str) -> StoredDecision | None:
        """As `Snapshot.answer`; of a case, the decision as it stands."""
        found = self.snapshot().answer(encounter_id)
        if found is None or found.outcome != "review":
            return found  # without waiting for the lock
        with self._reading():
            return standing(self._catalogue, encounter_id, found)

    def case(self, encounter_id: str) -> Case | None:
        """An encounter that went to review, open or closed."""
        with self._reading():
            return read_case(self._catalogue, self._published, encounter_id)

    def open_cases(self) -> list[str]:
        """The encounters in review, in the order of their ids."""
        waiting = self._published.pending.values()
        with self._reading():
            return sorted({*waiting, *self._catalogue.held_cases()})

    def chain_link(self, version: int) -> Link | None:
        """The link of the hash chain whose commit made a version of the content; None for one before the chain."""
        with self._reading():
            return self._catalogue.link_of(version)

    def closed_cases(self) -> dict[str, float]:
        """encounter_id of each closed case -> the time of its last verdict, or of its decision, in seconds."""
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
        """All that were ever given, oldest first."""
        with self._comparing():
            return list(self._catalogue.verdicts())

    def alarms(self) -> list[tuple[Any, ...]]:
        """Rows of table `alarm`, oldest first."""
        with self._comparing():
            return self._catalogue.alarms()

    def audit_log(self) -> tuple[list[AuditSpan], list[AuditRecord]]:
        """The packed records of the audit log, and those behind them, oldest first. Raises GalleryDamaged where records are lost."""
        with self._comparing():
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
        """Rows of table `card`, oldest first."""
        with self._comparing():
            return self._catalogue.cards()

    def approvals(self) -> tuple[list[tuple[Any, ...]], dict[int, str]]:
        """(rows of table `approval`, oldest first; its number -> the method of its newest signature)."""
        with self._comparing():
            signed = {row[1]: row[3] for row in self._catalogue.approval_signatures()}
            return self._catalogue.approvals(), signed

    def copied_to(self, copy: sqlite3.Connection) -> Snapshot:
        """Copies the database, and returns the snapshot of the same moment. A reader sees what the writer has committed since."""
        with self._reading():
            if self.read_only:
                self._see(read(self._catalogue, self.storage, self.folder))
            assert isinstance(self._catalogue, SqliteCatalogue), "only a gallery in a folder has a database file"
            self._catalogue.copy_to(copy)
            return self._published

    @contextmanager
    def _comparing(self) -> Iterator[None]:
        """As `_reading`; the tables that are read whole are compared with the newest link of the hash chain. Raises GalleryDamaged."""
        with self._reading(), self._catalogue.compared_with_chain():
            yield

    @contextmanager
    def _reading(self) -> Iterator[None]:
        self._process.check()
        with self.lock, translated(f"reading {self.folder}"):
            if self._broken:
                self._recover()
            try:
                self._catalogue.begin_reading()
                yield
            except ODD_CONTENT as error:
                raise never_written(self.folder, error) from (None if isinstance(error, MemoryError) else error)
            finally:
                try:
                    self._catalogue.rollback()
                except (sqlite3.Error, MemoryError):
                    self._broken = True  # what was read is sound; the next one connects anew

    # writing ----------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Holds the lock; commits at the end. Raises what the body raises, StorageUnavailable, and GalleryBusy where another
        process wrote; then nothing changed."""
        self._process.check()
        self._refuse_reader()
        with self.lock:
            if self._broken:
                self._recover()
            transaction = None
            try:
                with translated("writing"):
                    self._catalogue.begin()
                    self._meet_other_writers()
                    transaction = self._staged()
                    yield transaction
                    for recorder in self.recorders if transaction.changed else ():
                        recorder.stage(transaction)
                    changed, state = transaction.changed, transaction.state  # once durable, nothing is called unguarded
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
                except BaseException:  # memory ran out, and the commit is durable: what is there is read again
                    self._broken, self._uncertain = True, state
                    with suppress(BiodedupError, MemoryError):  # or else the next transaction does
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
        """Forgets a transaction that was not committed. None: it failed before anything was staged."""
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
        """Before the commit that names them. Files in the gallery's folder are durable when they are written."""

    def _meet_other_writers(self) -> None:
        """Inside a transaction, which no other process can enter. Raises GalleryBusy."""
        found = self._catalogue.state()
        if found.commit_id != self._state.commit_id or found.commits != self._state.commits:
            raise GalleryBusy(
                f"another process wrote to {self.folder}: commit {found.commits} is there, wanted {self._state.commits} of this "
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
        """Overwrites erased templates that the rollback journal still holds. If the disk fails, the next transaction tries again; the
        commit itself is durable."""
        self._unwiped = self._unwiped or self._catalogue.erased
        if not self._unwiped or self._broken:
            return
        try:
            self._catalogue.begin()  # no other process writes meanwhile
            self.storage.wipe(self.folder / f"{DATABASE_NAME}-journal")
            self._unwiped = self._catalogue.erased = False
        except (OSError, sqlite3.Error, MemoryError) as error:
            _log.warning("overwriting the journal was put off: %s", error)
        finally:
            try:
                self._catalogue.rollback()
            except (sqlite3.Error, MemoryError):
                self._broken = True

    def _adopt(self, transaction: Transaction) -> None:
        for recorder in self.recorders:
            recorder.settle()
        for tell in transaction.when_durable:
            tell()
        published = transaction.snapshot()
        self._state, self._tail = transaction.state, transaction.tail
        self._policies += tuple(transaction.policies)
        self._published = published
        _log.debug("committed version %d", published.version)
        self._tail.answers.update(transaction.answers)  # after the rows: an answer without its row reads as `removed`
        self._opened.update(published.segments)
        for segment in transaction.retired:
            self._remove_files(segment.entry.number)
        self.remove_index_files(transaction.retired_files)
        self._maintenance.wake_if_due()

    def _is_durable(self, transaction: Transaction) -> bool:
        """After a failed transaction: rolls back, and reads whether the commit is on the disk nevertheless."""
        try:
            self._catalogue.rollback()
            return self._catalogue.state().commit_id == transaction.state.commit_id
        except (sqlite3.Error, GalleryDamaged, MemoryError):
            self._broken, self._uncertain = True, transaction.state
            return False

    def _recover(self) -> None:
        """Connects again and loads what is on the disk, after a failure that left the result of a commit or of a read unknown. Raises
        StorageUnavailable while the disk still fails."""
        with translated("connecting again after a failure"):
            self._catalogue.close()
            database = self.folder / DATABASE_NAME
            self._catalogue = SqliteCatalogue(self.storage.connect(database, read_only=self.read_only))
        mine = self._state
        self._load()
        ours = [state.commit_id for state in (mine, self._uncertain) if state is not None]
        if not self.read_only and self._state.commit_id not in ours:
            self._state = mine  # so that every later transaction is refused
        self._broken, self._uncertain, self._unwiped = False, None, True
        _log.warning("connected again after a failure, at version %d", self._published.version)

    def write_rows(
        self, subject_ids: Packed, cells: Mapping[str, NewCells], group_sets: NDArray[np.uint32]
    ) -> SegmentEntry:
        """Writes a segment of new rows, for `Transaction.attach`. No reader sees it before that."""
        cells = sealed_cells(self.keys, cells, len(subject_ids))
        return self.write_part(NewRows(subject_ids, cells, group_sets), None)

    def write_part(self, part: Rows, keep: NDArray[np.bool_] | None) -> SegmentEntry:
        """As `write_rows`, of the rows of a part from anywhere. keep: which of them, bool (count,), None for all."""
        return self.write_parts([part], [keep])

    def write_parts(
        self,
        parts: Sequence[Rows],
        keeps: Sequence[NDArray[np.bool_] | None],
        go_on: Callable[[], bool] = lambda: True,
    ) -> SegmentEntry:
        """As `write_part`, of neighbouring parts. Raises Abandoned when go_on turns false."""
        number = self._take_number()

        def still() -> bool:
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
                entry = write_segment(*about, parts, keeps, now.parts, still, threads=threads, turn=now.turn)
                codecs = now.indexing.wanted_codecs()
                with index_codec.threads(self.limits.threads, sum(part.count for part in parts)):
                    return with_indexes(self.storage, folder, gallery_id, entry, codecs, still)
        except BaseException:
            self._remove_files(number)
            raise

    def discard_rows(self, entry: SegmentEntry) -> None:
        """Removes what `write_rows` wrote and no transaction attached."""
        self._remove_files(entry.number)

    # sealing and merging ----------------------------------------------------------------------------------------

    def maintaining(self) -> AbstractContextManager[None]:
        """Held while segments are sealed in the background, merged or indexed. One process writes a folder, so that nothing is to be done."""
        return nullcontext()

    def maintain(self) -> None:
        """Seals a full tail and merges what is due, now."""
        self._maintenance.run()

    def seal(self) -> None:
        """Turns the journal into a segment."""
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
        """Seals, and merges segments into as few as their largest size allows: removed subjects' templates are gone from
        the disk afterwards."""
        self.seal()
        self._maintenance.compact()

    @property
    def journal_count(self) -> int:
        """Rows and answers that are not sealed."""
        return self._tail.count + len(self._tail.answers)

    @property
    def is_broken(self) -> bool:
        """Whether the next transaction has to connect anew first."""
        return self._broken

    def reindex(
        self,
        specs: Mapping[str, IndexSpec],
        *,
        force: bool = False,
        report: Callable[[int, int], None] | None = None,
        approve: Callable[[Transaction], None] = lambda transaction: None,
    ) -> None:
        """As `Maintenance.reindex`."""
        self._maintenance.reindex(specs, force=force, report=report, approve=approve)

    def rewrite(self, changed: Callable[[Segment], Rows | None]) -> None:
        """As `Maintenance.rewrite`."""
        self._maintenance.rewrite(changed)

    def rekey(
        self,
        *,
        renewable: bool = True,
        report: Callable[[int, int], None] | None = None,
        approve: Callable[[Transaction], None] = lambda transaction: None,
    ) -> str:
        """Turns the stored embeddings by a new secret transform, or ends a change that was interrupted. Searches go on meanwhile.

        renewable: False stores them as they are. approve: is called in the transaction that begins the change. Returns the id of the transform,
        "" for none. Call `forget_turns` afterwards. Raises InvalidInput where the gallery is not encrypted, KeyMismatch, StorageUnavailable.
        """
        with translated(f"turning the embeddings of {self.name}"):
            self._refuse_reader()
            turn = self._next_turn() if renewable else None
            self._maintenance.rekey(turn, report, approve)
            return turn_id_of(turn)

    def rekey_goes_on(self, *, renewable: bool) -> bool:
        """Whether `rekey` begins no change, and only ends one that was interrupted. Raises InvalidInput of a reader, and where a gallery in the
        clear is asked for renewable templates."""
        self._refuse_reader()
        if renewable and KEY_NAME not in (self.storage.list_names(self.folder) or ()):
            raise needs_key(self.folder)
        now, known = turn_id_of(self.snapshot().turn), self.storage.turn_ids(self.folder)
        if not renewable or not now:
            return not renewable and not now
        return known[-1:] == [now] and (len(known) > 1 or bool(turned_otherwise(self.snapshot())))

    def _next_turn(self) -> Turn:
        """That of an interrupted change, or a new one. A secret that no embedding is stored with is left by a run that ended before its first
        commit."""
        now, known = turn_id_of(self.snapshot().turn), self.storage.turn_ids(self.folder)
        used = self._used_turns() | {now}
        spare = [now] if self.rekey_goes_on(renewable=True) else [turn_id for turn_id in known if turn_id not in used]
        turn_id = spare[-1] if spare else self.storage.add_turn(self.folder)
        return self.storage.turn(self.folder / DATABASE_NAME, turn_id)

    def _used_turns(self) -> set[str]:
        """Of all segments."""
        columns = (column for segment in self.snapshot().segments for column in segment.columns.values())
        return {column.turn_id or "" for column in columns}

    def forget_turns(self) -> None:
        """Destroys the secrets of transforms that no embedding is stored with any more."""
        snapshot = self.snapshot()
        if not turned_otherwise(snapshot):
            codecs = [codec for several in snapshot.indexing.codecs.values() for codec in several]
            needed = {turn_id_of(snapshot.turn), *(turn_id_of(codec.turn) for codec in codecs)}
            self.storage.keep_turns(self.folder, needed)

    def _refuse_other_index(self, config: GalleryConfig) -> None:
        """A gallery keeps the index engine that it was created with until it is asked for another one. Raises IndexMismatch."""
        if config.index is None:
            return
        asked, stored = parse_specs(config.index), self._published.indexing.specs
        if any(spec_of(asked, column) != spec_of(stored, column) for column in COLUMNS):
            raise IndexMismatch(
                f"{self.folder} is indexed by {_in_words(stored)}, got {_in_words(asked)}; leave `index` out, or change the gallery by "
                "`biodedup reindex`"
            )

    def write_index(
        self, segment: Segment, column: str, codec: FaissCodec, go_on: Callable[[], bool]
    ) -> tuple[str, str]:
        """Writes an index of a segment's column. Returns (kind, digest) of the file, for `Transaction.replace_index`."""
        kind = column + INDEX + codec.codec_id

        def still() -> bool:
            self._refuse_lost_lock()
            return go_on()

        try:
            with translated("writing an index"), index_codec.threads(self.limits.threads, segment.count):
                self._refuse_lost_lock()
                index = built(segment.columns[column], codec, still)
                which = (segment.entry.number, kind)
                digest = write_column_index(self.storage, self._segments, self.gallery_id, which, index, replaces=True)
                self.storage.sync_folder(self._segments)
                return kind, digest
        except BaseException:
            self.remove_index_files([file_name(segment.entry.number, kind)])
            raise

    def remove_index_files(self, names: Sequence[str]) -> None:
        """Removes index files that no manifest names. What cannot be removed is left to the next writer."""
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
        """Removes a segment's files. What cannot be removed is left to the next writer. Nothing is removed without the lock: another writer
        may have taken the same number."""
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
        """Sees what is on the disk."""
        self._see(load(self._catalogue, self.storage, self.folder))

    def _see(self, loaded: LoadedGallery) -> None:
        self.gallery_id, self._policies = loaded.gallery_id, loaded.policies
        # a number that a merge has taken, and not committed yet, stays taken
        next_segment = max(loaded.state.next_segment, self._state.next_segment)
        self._state = replace(loaded.state, next_segment=next_segment)
        self._published, self._tail = replace(loaded.snapshot, keys=self.keys), loaded.tail
        self._opened.update(loaded.snapshot.segments)

    def _sweep(self) -> None:
        """Removes files that no manifest names, which a killed writer left. In a transaction, so that no other writer can name them."""
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
