"""A gallery: its parts on disk and in memory, one writer, many readers.

Owns durability, visibility and versions, and when rows move from the journal to segments. Never compares templates and never
decides.

1. A `Transaction` stages changes; they become visible to others only after their commit is durable. A failure leaves
   the state before it, on disk and in memory.
2. A `Snapshot` is what a reader sees; it stays whole while the writer seals, merges and removes.
3. Files that a manifest names are never changed. They are written and synced before the commit that names them, and
   removed after the commit that does not; files that no manifest names are swept up by the next writer. Files that do not
   have our names are never removed.
4. A writer whose lock file was removed, or who finds another one's commit, stops: GalleryBusy. It removes nothing from then on.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from biodedup.config import GalleryConfig
from biodedup.errors import BiodedupError, GalleryBusy, GalleryDamaged, InvalidInput, NotAGallery
from biodedup.gallery.answers import StoredDecision
from biodedup.gallery.cases import judged_before, read_case, standing
from biodedup.gallery.catalogue.sqlite import (
    APPLICATION_ID,
    FORMAT_VERSION,
    READABLE,
    Catalogue,
    ColumnModel,
    State,
    paired,
)
from biodedup.gallery.catalogue.upgrade import OLD_FORMAT, upgrade
from biodedup.gallery.files import forks
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import NEW_SUFFIX, ODD_CONTENT, Lock, Storage
from biodedup.gallery.files.names import DATABASE_NAME, LOCK_NAME, NEW_NAME, SEGMENT_FOLDER, SENTINELS_NAME
from biodedup.gallery.files.packed import hashes, pack_text
from biodedup.gallery.files.private import refuse_link
from biodedup.gallery.policies import PolicyVersion
from biodedup.gallery.segments.compaction import due, grouped
from biodedup.gallery.segments.layout import SegmentEntry, file_name, number_of, unused_number
from biodedup.gallery.segments.part import Int64, Part, Rows
from biodedup.gallery.segments.reader import Segment, open_segment
from biodedup.gallery.segments.tail import Tail, TailPart
from biodedup.gallery.segments.writer import Abandoned, write_segment
from biodedup.gallery.snapshot import Snapshot
from biodedup.gallery.transaction import Transaction
from biodedup.values import Case, Column, Float32, Template, Verdict

_OWN_NAMES = {
    DATABASE_NAME,
    DATABASE_NAME + "-journal",
    NEW_NAME,
    NEW_NAME + "-journal",
    LOCK_NAME,
    SEGMENT_FOLDER,
    SENTINELS_NAME,
    SENTINELS_NAME + NEW_SUFFIX,
}

_FINISH_ROWS_MAX = 1_000_000  # closing waits for a merge of up to this many rows; a larger one is abandoned
_log = logging.getLogger("biodedup")


class Gallery:
    """Subjects, their templates and the answers given. Thread-safe; one process writes."""

    def __init__(
        self, storage: Storage, folder: Path, catalogue: Catalogue, lock: Lock | None, config: GalleryConfig
    ) -> None:
        self.folder = folder
        self.read_only = lock is None
        self.lock = threading.RLock()
        """Guards the connection and every change of what is published. Hold it to make several steps one."""
        self.storage = storage
        self._catalogue = catalogue
        self._lock_file = lock
        self._config = config
        self._broken = False
        self._uncertain: State | None = None
        """After a commit of which the disk did not say whether it took place: the state that it would have left."""
        self._unwiped = lock is not None
        self._process = forks.Process()
        forks.hold(self.lock)
        self._state = State()
        self._policies: tuple[PolicyVersion, ...] = ()
        self._merging = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._maintenance: threading.Thread | None = None
        self._opened: WeakSet[Segment] = WeakSet()
        self._published, self._tail = self._load()
        if lock is not None:
            self._sweep()
            if not catalogue.has_encounters():
                with self.transaction() as transaction:
                    transaction.adopt_cases()
            self._wake_if_due()

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
    ) -> Gallery:
        """Opens the gallery, creating it where the folder is absent or empty.

        settings, gallery_id: stored with a new gallery. Raises NotAGallery, GalleryBusy, GalleryDamaged, StorageUnavailable.
        """
        with translated(f"opening {folder}"):
            names = storage.list_names(folder)
            if names and DATABASE_NAME not in names:
                if set(names) - _OWN_NAMES:
                    raise NotAGallery(
                        f"{folder} holds {len(names)} other files and no {DATABASE_NAME}; name an empty folder or a gallery"
                    )
                if storage.list_names(folder / SEGMENT_FOLDER):
                    raise GalleryDamaged(f"{folder} holds segments and no {DATABASE_NAME}; restore it from a backup")
            if read_only:
                if not names or DATABASE_NAME not in names:
                    raise NotAGallery(f"{folder} holds no gallery; create one by opening it for writing")
                lock = None
            else:
                if names is None:
                    storage.make_folder(folder)
                refuse_link(folder / SEGMENT_FOLDER)
                lock = storage.lock(folder / LOCK_NAME)
            try:
                if not names or DATABASE_NAME not in names:
                    _create(storage, folder, gallery_id, json.dumps(settings))
                elif lock is not None:
                    _upgrade(storage, folder)
                catalogue = Catalogue(storage.connect(folder / DATABASE_NAME, read_only=read_only))
                try:
                    check_format(storage, catalogue, folder)
                    if lock is not None and not catalogue.is_current():
                        catalogue.begin()
                        catalogue.renew()
                        catalogue.commit()
                    return cls(storage, folder, catalogue, lock, config)
                except BaseException:
                    catalogue.close()
                    raise
            except BaseException:
                if lock is not None:
                    lock.release()
                raise

    @classmethod
    def open_to_read(cls, folder: Path, storage: Storage, config: GalleryConfig) -> Gallery:
        """A gallery that is there, while another process may write it. Raises as `open`."""
        return cls.open(folder, storage=storage, config=config, settings={}, gallery_id="", read_only=True)

    def close(self) -> None:
        """Waits for sealing and for small merges; a large merge is abandoned, and begun again another time. Files are released at once:
        a snapshot that is still held raises EngineClosed when it is next read. In a child of a fork it does nothing."""
        self._closing = True
        if not self._process.is_this:
            return
        self._wake.set()
        if self._maintenance is not None:
            self._maintenance.join()
        with self.lock:
            self._catalogue.close()
            if self._lock_file is not None:
                self._lock_file.release()
            for segment in list(self._opened):
                segment.close()

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
                self._published, self._tail = self._load()

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

    def verdicts(self) -> list[Verdict]:
        """All that were ever given, oldest first."""
        with self._reading():
            return list(self._catalogue.verdicts())

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
                raise _never_written(self.folder, error) from (None if isinstance(error, MemoryError) else error)
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
        if self.read_only:
            raise InvalidInput(f"{self.folder} was opened read_only; open it for writing to change it")
        with self.lock:
            if self._broken:
                self._recover()
            before, tail, tail_count = self._published, self._tail, self._tail.count
            transaction = Transaction(
                self._catalogue, self.storage, self._segments, self.gallery_id, self._state, before, tail
            )
            try:
                with translated("writing"):
                    self._catalogue.begin()
                    self._refuse_other_writer()
                    yield transaction
                    if transaction.changed:
                        self._catalogue.set_state(transaction.state)
                        self._catalogue.commit()
                    else:
                        self._catalogue.rollback()
            except BaseException:
                if not self._is_durable(transaction):
                    tail.truncate(tail_count)
                    if not self._broken:
                        for number in transaction.new_segments:
                            self._remove_files(number)
                    raise
            if transaction.changed:
                try:
                    self._adopt(transaction)
                except BaseException:  # memory ran out, and the commit is durable: what is there is read again
                    self._broken, self._uncertain = True, transaction.state
                    with suppress(BiodedupError, MemoryError):  # or else the next transaction does
                        self._recover()
                    raise
            self._wipe_if_erased()

    def _refuse_other_writer(self) -> None:
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
        """Overwrites what the rollback journal still holds of erased templates. Put off to the next time where the disk refuses:
        the commit itself is durable."""
        self._unwiped = self._unwiped or self._catalogue.erased
        if not self._unwiped or self._broken:
            return
        try:
            self._catalogue.begin()  # nobody else writes meanwhile
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
        published = transaction.snapshot()
        self._state, self._tail = transaction.state, transaction.tail
        self._tail.answers.update(transaction.answers)
        self._policies += tuple(transaction.policies)
        self._published = published
        self._opened.update(_segments_of(self._published))
        for segment in transaction.retired:
            self._remove_files(segment.entry.number)
        self._wake_if_due()

    def _is_durable(self, transaction: Transaction) -> bool:
        """After a failed transaction: rolls back, and asks the disk whether the commit took place all the same."""
        try:
            self._catalogue.rollback()
            return self._catalogue.state().commit_id == transaction.state.commit_id
        except (sqlite3.Error, GalleryDamaged, MemoryError):
            self._broken, self._uncertain = True, transaction.state
            return False

    def _recover(self) -> None:
        """After a commit, or the end of a reading, of which the disk would not say whether it took place: sees what is there.
        Raises StorageUnavailable while the disk still refuses."""
        with translated("connecting again after a failure"):
            self._catalogue.close()
            self._catalogue = Catalogue(self.storage.connect(self.folder / DATABASE_NAME, read_only=self.read_only))
        mine = self._state
        self._published, self._tail = self._load()
        ours = [state.commit_id for state in (mine, self._uncertain) if state is not None]
        if not self.read_only and self._state.commit_id not in ours:
            self._state = mine  # so that every later transaction is refused
        self._broken, self._uncertain, self._unwiped = False, None, True

    def write_rows(
        self, subject_ids: Sequence[str], columns: Mapping[str, Column], group_sets: NDArray[np.uint32]
    ) -> SegmentEntry:
        """Writes a segment of new rows, for `Transaction.attach`; until then nobody sees it."""
        tail = Tail(0)
        tail.append_columns(subject_ids, "", group_sets, columns)
        return self.write_part(TailPart(tail, tail.count), None)

    def write_part(self, part: Rows, keep: NDArray[np.bool_] | None) -> SegmentEntry:
        """As `write_rows`, of the rows of a part from anywhere. keep: which of them, bool (count,), None for all."""
        number = self._take_number()
        try:
            with translated("writing a segment"):
                self._refuse_lost_lock()
                others = self.snapshot().parts
                return write_segment(self.storage, self._segments, number, self.gallery_id, [part], [keep], others)
        except BaseException:
            self._remove_files(number)
            raise

    def discard_rows(self, entry: SegmentEntry) -> None:
        """Removes what `write_rows` wrote and nothing attached."""
        self._remove_files(entry.number)

    # sealing and merging ----------------------------------------------------------------------------------------

    def maintain(self) -> None:
        """Seals a full tail and merges what is due, now."""
        with self._merging:
            if self._tail_is_full():
                self.seal()
            while not self._broken and (segments := self._run_due()):
                self._merge(segments)

    def _tail_is_full(self) -> bool:
        return self._tail.count + len(self._tail.answers) >= self._config.seal_rows

    def _run_due(self) -> list[Segment]:
        """Neighbours that are to be merged; none where nothing is due."""
        snapshot = self.snapshot()
        segments = _segments_of(snapshot)
        dead = [len(_removed(snapshot, [segment])) for segment in segments]
        config = self._config
        run = due([s.count for s in segments], dead, config.seal_rows, config.merge_fan, config.segment_rows)
        return [] if run is None else segments[run]

    def seal(self) -> None:
        """Turns the journal into a segment."""
        with self.transaction() as transaction:
            transaction.seal()

    def compact(self) -> None:
        """Seals, and merges segments into as few as their largest size allows: removed subjects' templates are gone from
        the disk afterwards."""
        self.seal()
        with self._merging:
            snapshot = self.snapshot()
            segments = _segments_of(snapshot)
            for run in grouped([segment.count for segment in segments], self._config.segment_rows):
                if run.stop - run.start > 1 or len(_removed(snapshot, segments[run])):
                    self._merge(segments[run])

    def _merge(self, segments: list[Segment]) -> None:
        """Neighbours become one. Searches and enrolments go on; only the swap of the manifest takes the lock."""
        snapshot = self.snapshot()
        dropped = _removed(snapshot, segments)
        number = self._take_number()
        rows = sum(segment.count for segment in segments)

        def go_on() -> bool:
            self._refuse_lost_lock()
            return not self._closing or rows <= _FINISH_ROWS_MAX

        try:
            with translated("merging segments"):
                entry = write_segment(
                    self.storage,
                    self._segments,
                    number,
                    self.gallery_id,
                    segments,
                    [snapshot.mask(segment) for segment in segments],
                    snapshot.parts,
                    go_on,
                )
            with self.transaction() as transaction:
                transaction.swap(segments, entry, dropped)
        except BaseException:
            if not self._broken and all(s.entry.number != number for s in _segments_of(self.snapshot())):
                self._remove_files(number)
            raise

    def _wake_if_due(self) -> None:
        if self._closing or not self._config.background or not (self._tail_is_full() or self._run_due()):
            return
        if self._maintenance is None:
            self._maintenance = threading.Thread(
                target=self._maintain_on_call, name="biodedup-maintenance", daemon=True
            )
            self._maintenance.start()
        self._wake.set()

    def _maintain_on_call(self) -> None:
        while not self._closing:
            self._wake.wait()
            self._wake.clear()
            try:
                self.maintain()
            except Abandoned:
                return
            except (
                BiodedupError,
                MemoryError,
            ) as error:  # the journal goes on holding what could not be sealed; the next commit tries again
                _log.warning("sealing or merging was put off: %s", error)

    def _take_number(self) -> int:
        self._process.check()
        with self.lock, translated("choosing a segment's number"):
            number = unused_number(self.storage, self._segments, self._state.next_segment)
            self._state = replace(self._state, next_segment=number + 1)
            return number

    def _remove_files(self, number: int) -> None:
        """What stays behind is swept up by the next writer. Another writer may have taken the same number."""
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

    def _load(self) -> tuple[Snapshot, Tail]:
        try:
            with translated(f"reading {self.folder}"):
                self._catalogue.begin_reading()  # no writer can retire a file before it is open here
                try:
                    return self._read()
                finally:
                    self._catalogue.rollback()
        except ODD_CONTENT as error:  # what no page check sees
            raise _never_written(self.folder, error) from (None if isinstance(error, MemoryError) else error)

    def _read(self) -> tuple[Snapshot, Tail]:
        meta = self._catalogue.meta()
        self.gallery_id = meta["gallery_id"]
        state = self._catalogue.state()  # a number that a merge has taken, and not committed yet, stays taken
        self._state = replace(state, next_segment=max(state.next_segment, self._state.next_segment))
        models = self._catalogue.models()
        segments = [open_segment(self.storage, self._segments, entry) for entry in self._catalogue.segments()]
        self._opened.update(segments)
        tail = Tail(segments[-1].end_row if segments else 0)
        self._fill(tail, models)
        tail.mark_again(_again(tail, segments))
        for one, following in pairwise(segments):
            if one.end_row != following.first_row:
                raise GalleryDamaged(f"{self.folder}: rows {one.end_row} to {following.first_row} are in no segment")
        if tail.end_row != self._state.row_count:
            raise GalleryDamaged(
                f"{self.folder}: {tail.end_row} rows, wanted {self._state.row_count}; run `biodedup doctor`"
            )
        tombstones = np.array(self._catalogue.tombstones(), np.int64)
        if len(tombstones) and not 0 <= tombstones[0] <= tombstones[-1] < tail.end_row:
            raise GalleryDamaged(f"{self.folder}: rows are removed that were never given out; run `biodedup doctor`")
        for segment in segments:
            for name, column in segment.columns.items():
                if name not in models or models[name].dimension != column.dimension:
                    raise segment.files[name].damaged("its vectors are of another model than the gallery's")
        bare = tail.first_row + np.flatnonzero(tail.presence.view() == 0)
        if len(np.setdiff1d(bare, tombstones)):
            raise GalleryDamaged(f"{self.folder}: the journal lacks templates; run `biodedup doctor`")
        parts: tuple[Part, ...] = (*segments, TailPart(tail, tail.count))
        self._policies = tuple(self._catalogue.policies())
        snapshot = Snapshot(
            self._state.version,
            tail.end_row,
            parts,
            tombstones,
            models,
            self._catalogue.group_sets(),
            self._catalogue.pending(),
            self._state.extra_rows,
            self._catalogue.judged(),
            self._catalogue.job_steps(),
        )
        if not self._catalogue.has_encounters():  # and no writer has opened it
            return replace(snapshot, different=paired(judged_before(self._catalogue.verdicts(), snapshot))), tail
        return snapshot, tail

    def _fill(self, tail: Tail, models: Mapping[str, ColumnModel]) -> None:
        subjects = self._catalogue.subjects()
        if [row for row, *_ in subjects] != list(range(tail.first_row, tail.first_row + len(subjects))):
            raise GalleryDamaged(f"{self.folder}: the journal lacks rows; run `biodedup doctor`")
        cells: dict[str, tuple[list[int], list[bytes], list[bytes], list[float]]] = {}
        for cell in self._catalogue.cells():
            if not 0 <= cell.row - tail.first_row < len(subjects):
                raise GalleryDamaged(f"{self.folder}: templates without a subject; run `biodedup doctor`")
            if len(cell.vector or b"") != 4 * (models[cell.column].dimension or 0):
                raise GalleryDamaged(
                    f"{self.folder}: column {cell.column} holds vectors of another length; run `biodedup doctor`"
                )
            positions, vectors, minutiae, quality = cells.setdefault(cell.column, ([], [], [], []))
            positions.append(cell.row - tail.first_row)
            vectors.append(cell.vector or b"")
            minutiae.append(cell.minutiae or b"")
            quality.append(np.nan if cell.quality is None else cell.quality)
        loaded: dict[str, tuple[list[int], Float32 | None, list[bytes], list[float]]] = {}
        for name, (positions, vectors, minutiae, quality) in cells.items():
            dimension = models[name].dimension
            matrix = None if dimension is None else np.frombuffer(b"".join(vectors), "<f4").reshape(-1, dimension)
            if matrix is not None and not np.isfinite(matrix).all():
                raise GalleryDamaged(
                    f"{self.folder}: column {name} of the journal holds no numbers; run `biodedup doctor`"
                )
            loaded[name] = (positions, matrix, minutiae, quality)
        tail.load(
            [(subject_id, encounter_id, group_set) for _, subject_id, encounter_id, group_set in subjects], loaded
        )
        tail.answers.update(self._catalogue.answers())

    def _sweep(self) -> None:
        """Removes what a killed writer left: files that no manifest names. In a transaction, lest another writer name them."""
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


def _never_written(folder: Path, error: Exception) -> Exception:
    """The error for content that contradicts itself; those of the tree stay, and so does a lack of memory."""
    if isinstance(error, BiodedupError | MemoryError):
        return error
    return GalleryDamaged(
        f"{folder}: its tables hold what was never written ({type(error).__name__}); restore it from a backup"
    )


def _segments_of(snapshot: Snapshot) -> list[Segment]:
    return [part for part in snapshot.parts if isinstance(part, Segment)]


def _again(tail: Tail, segments: Sequence[Segment]) -> Int64:
    """The positions of a tail whose rows are not the first under their id."""
    if not tail.count:
        return np.zeros(0, np.int64)
    ids = pack_text(tail.subject_ids)
    known = hashes(ids)
    found = [np.unique(segment.find_all(ids, known)[0]) for segment in segments]
    found += [np.array([at for several in tail.positions_of.values() for at in several[1:]], np.int64)]
    return np.unique(np.concatenate(found))


def _removed(snapshot: Snapshot, segments: Sequence[Segment]) -> Int64:
    low, high = np.searchsorted(snapshot.tombstones, (segments[0].first_row, segments[-1].end_row))
    return snapshot.tombstones[low:high]


def _create(storage: Storage, folder: Path, gallery_id: str, settings: str) -> None:
    """Makes the database under another name, so that a file of its own name is never a half-made one."""
    storage.make_folder(folder / SEGMENT_FOLDER)
    storage.remove(folder / NEW_NAME)
    storage.remove(folder / f"{NEW_NAME}-journal")
    catalogue = Catalogue(storage.connect(folder / NEW_NAME, read_only=False))
    try:
        catalogue.begin()
        catalogue.create(gallery_id, settings)
        catalogue.commit()
    finally:
        catalogue.close()
    storage.replace(folder / NEW_NAME, folder / DATABASE_NAME)
    storage.sync_folder(folder)
    storage.remove(folder / f"{NEW_NAME}-journal")


def _upgrade(storage: Storage, folder: Path) -> None:
    """Turns a gallery of the old format into one of this; leaves every other alone."""
    old = storage.connect(folder / DATABASE_NAME, read_only=True)
    try:
        if Catalogue(old).identify()[:2] != (APPLICATION_ID, OLD_FORMAT):
            return
        storage.make_folder(folder / SEGMENT_FOLDER)
        storage.remove(folder / NEW_NAME)
        storage.remove(folder / f"{NEW_NAME}-journal")
        upgrade(storage, old, folder / NEW_NAME)
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_NOTADB:
            return  # `check_format` says what it is
        raise
    finally:
        old.close()
    storage.replace(folder / NEW_NAME, folder / DATABASE_NAME)
    storage.sync_folder(folder)
    storage.remove(folder / f"{NEW_NAME}-journal")


def _format_stored(catalogue: Catalogue) -> str | None:
    """What the settings say the format is; None where they are damaged, or another program's."""
    if not catalogue.has_own("meta"):
        return None
    try:
        return catalogue.meta().get("format")
    except (GalleryDamaged, sqlite3.DatabaseError, ValueError):
        return None


def check_format(storage: Storage, catalogue: Catalogue, folder: Path) -> None:
    """Raises NotAGallery for another program's database or another version's, GalleryDamaged for one that was lost."""
    name = folder / DATABASE_NAME
    with_segments = storage.list_names(folder / SEGMENT_FOLDER) is not None
    try:
        application_id, format_version, tables = catalogue.identify()
        ours = application_id == APPLICATION_ID
        format_stored = _format_stored(catalogue) if tables and format_version != OLD_FORMAT else None
    except sqlite3.DatabaseError as error:
        if with_segments and getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_NOTADB:
            raise GalleryDamaged(f"{name} is damaged: {error}; restore it from a backup") from error
        raise
    if application_id == 0 and tables == 0:
        raise GalleryDamaged(f"{name} is empty: a gallery was lost here; restore it from a backup")
    if format_stored in [str(number) for number in READABLE] and (not ours or str(format_version) != format_stored):
        raise GalleryDamaged(f"{name} is damaged: its header; restore it from a backup")
    if not ours:
        raise NotAGallery(f"{name} is a database of another program; name an empty folder or a gallery")
    if format_version not in READABLE:
        raise NotAGallery(
            f"{folder} has format {format_version}, this version reads {FORMAT_VERSION}; "
            + ("open it for writing once" if format_version == OLD_FORMAT else "open it with the version that wrote it")
        )
    catalogue.check_schema()
