"""A gallery: subjects on disk (SQLite, the truth) and in memory (columns, derived).

Owns durability, visibility and versions. Never compares templates and never decides.

1. `Transaction` stages rows; they become visible to others only after their commit is durable. A failure leaves the
   state before it, on disk and in memory.
2. A `Snapshot` names the version and the rows that a search may see.
3. Removal is a tombstone in memory and erases the templates on disk.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biodedup.errors import (
    GalleryDamaged,
    InvalidInput,
    ModelMismatch,
    NotAGallery,
    StorageUnavailable,
    SubjectExists,
    UnknownSubject,
)
from biodedup.gallery.catalogue import APPLICATION_ID, FORMAT_VERSION, Catalogue, ColumnModel
from biodedup.gallery.columns import GrowingArray, VectorColumn
from biodedup.gallery.storage import Lock, Storage, unavailable
from biodedup.values import COLUMNS, Float32, Template

DATABASE_NAME = "gallery.sqlite3"
LOCK_NAME = "writer.lock"
_NEW_NAME = DATABASE_NAME + ".new"  # a gallery in the making: it gets its name when it is whole
_OWN_NAMES = {DATABASE_NAME, DATABASE_NAME + "-journal", _NEW_NAME, _NEW_NAME + "-journal", LOCK_NAME}

_DISK_TROUBLE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_READONLY,
}  # primary result codes after which the same call may succeed; others speak of damage


@dataclass(frozen=True)
class Snapshot:
    """What a search may see: rows below row_count, as of version."""

    version: int
    row_count: int


class Gallery:
    """Subjects, their templates and the answers given. Thread-safe; one process writes."""

    def __init__(self, catalogue: Catalogue, lock: Lock | None, folder: Path) -> None:
        self.folder = folder
        self.read_only = lock is None
        self._catalogue = catalogue
        self._lock_file = lock
        self._broken = False
        self._lock = threading.RLock()  # guards the connection and every change of what is in memory
        self._subject_ids: list[str] = []
        self._presence = GrowingArray(np.uint16)  # bit c: the row has a template in COLUMNS[c]; 0: removed
        self._columns: dict[str, VectorColumn] = {}
        try:
            with _translated(f"reading {folder}"):
                meta = catalogue.meta()
                self.gallery_id = meta["gallery_id"]
                self.config: dict[str, Any] = json.loads(meta["config"])
                self.models = catalogue.models()
                self._load()
                self._published = Snapshot(int(meta["version"]), self._presence.count)
        except (KeyError, ValueError, IndexError, TypeError, OverflowError) as error:  # what no page check sees
            raise GalleryDamaged(
                f"{folder}: its tables hold what was never written ({type(error).__name__}); restore it from a backup"
            ) from error
        self.live_count = int(np.count_nonzero(self._presence.view()))

    @classmethod
    def open(
        cls, folder: Path, *, storage: Storage, config: dict[str, Any], gallery_id: str, read_only: bool = False
    ) -> Gallery:
        """Opens the gallery, creating it where the folder is absent or empty.

        config, gallery_id: stored with a new gallery. Raises NotAGallery, GalleryBusy, GalleryDamaged, StorageUnavailable.
        """
        with _translated(f"opening {folder}"):
            names = storage.list_names(folder)
            if names and DATABASE_NAME not in names and set(names) - _OWN_NAMES:
                raise NotAGallery(
                    f"{folder} holds {len(names)} other files and no {DATABASE_NAME}; name an empty folder or a gallery"
                )
            if read_only:
                if not names or DATABASE_NAME not in names:
                    raise NotAGallery(f"{folder} holds no gallery; create one by opening it for writing")
                lock = None
            else:
                if names is None:
                    storage.make_folder(folder)
                lock = storage.lock(folder / LOCK_NAME)
            try:
                if not names or DATABASE_NAME not in names:
                    _create(storage, folder, {"gallery_id": gallery_id, "version": "0", "config": json.dumps(config)})
                catalogue = Catalogue(storage.connect(folder / DATABASE_NAME, read_only=read_only))
                try:
                    _check(catalogue, folder)
                    return cls(catalogue, lock, folder)
                except BaseException:
                    catalogue.close()
                    raise
            except BaseException:
                if lock is not None:
                    lock.release()
                raise

    def close(self) -> None:
        with self._lock:
            self._catalogue.close()
            if self._lock_file is not None:
                self._lock_file.release()

    # what a search reads ----------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        return self._published

    @property
    def staged(self) -> Snapshot:
        """All rows, those of the open transaction included. For the holder of the transaction only."""
        return Snapshot(self._published.version, self._presence.count)

    def presence(self, low: int, high: int) -> NDArray[np.uint16]:
        """uint16 (high - low,): bit c is set where the row has a template in COLUMNS[c]; 0 for a removed row."""
        return self._presence.view(high)[low:]

    def column(self, name: str) -> VectorColumn | None:
        """The embeddings of a column; None where no subject has one."""
        return self._columns.get(name)

    def subject_id(self, row: int) -> str:
        return self._subject_ids[row]

    def minutiae(self, rows: Sequence[int], column: str) -> dict[int, bytes]:
        """Minutiae records of those of the rows that have one in this column."""
        with self._lock, _translated("reading minutiae"):
            return self._catalogue.minutiae(rows, column)

    # look-ups ---------------------------------------------------------------------------------------------------

    def row_of(self, subject_id: str) -> int | None:
        with self._lock, _translated("looking a subject up"):
            return self._catalogue.row_of(subject_id)

    def templates(self, subject_id: str) -> tuple[int, dict[str, Template]]:
        """(row, column -> template). Raises UnknownSubject."""
        with self._lock, _translated("reading templates"):
            row = self._catalogue.row_of(subject_id)
            if row is None:
                raise UnknownSubject(f"subject {subject_id!r} is not enrolled; enrol it first, or check the id")
            return row, self._catalogue.templates(row, self.models)

    def row_templates(self, row: int) -> dict[str, Template]:
        with self._lock, _translated("reading templates"):
            return self._catalogue.templates(row, self.models)

    def subject_ids(self) -> list[str]:
        """The enrolled, in order of enrolment."""
        snapshot = self.snapshot()
        live = np.flatnonzero(self.presence(0, snapshot.row_count))
        return [self._subject_ids[row] for row in live]

    def answer(self, encounter_id: str) -> tuple[bytes, str] | None:
        """(digest of what was sent, answer as JSON), or None for an encounter never seen."""
        with self._lock, _translated("looking an encounter up"):
            return self._catalogue.answer(encounter_id)

    def outcomes(self) -> dict[str, int]:
        with self._lock, _translated("counting outcomes"):
            return self._catalogue.outcomes()

    def problems(self) -> list[str]:
        """What a full check of the stored data finds wrong; empty when sound."""
        with self._lock, _translated("checking"):
            return self._catalogue.integrity_problems()

    # writing ----------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """The one writer. On leaving, the commit is durable and then visible; on an exception, nothing happened."""
        if self.read_only:
            raise InvalidInput(f"{self.folder} was opened read_only; open it for writing to change it")
        with self._lock:
            if self._broken:
                raise StorageUnavailable(
                    f"{self.folder}: an earlier commit failed half-way; close the engine and open it again"
                )
            before, live_before, models_before = self._published, self.live_count, dict(self.models)
            transaction = Transaction(self, self._catalogue, before.version + 1)
            try:
                with _translated("writing"):
                    self._catalogue.begin()
                    yield transaction
                    if transaction.changed:
                        self._catalogue.set_meta("version", str(transaction.version))
                        self._catalogue.commit()
                    else:
                        self._catalogue.rollback()
            except BaseException:
                if not self._is_durable(transaction.version):
                    self._forget_from(before.row_count)
                    self.live_count, self.models = live_before, models_before
                    raise
            for row in transaction.removed:
                self._presence.view()[row] = 0
            if transaction.changed:
                self._published = Snapshot(transaction.version, self._presence.count)

    def _is_durable(self, version: int) -> bool:
        """After a failed transaction: rolls back, and asks the disk whether the commit took place all the same."""
        try:
            self._catalogue.rollback()
            return int(self._catalogue.meta()["version"]) == version
        except sqlite3.Error:
            self._broken = True
            return False

    def _forget_from(self, row_count: int) -> None:
        del self._subject_ids[row_count:]
        self._presence.count = row_count
        for column in self._columns.values():
            column.truncate(row_count)

    def _append(self, subject_ids: Sequence[str], presence: NDArray[np.uint16]) -> None:
        self._subject_ids.extend(subject_ids)
        self._presence.append(presence)
        self.live_count += len(subject_ids)

    def _append_vectors(self, column: str, rows: NDArray[np.int64], vectors: Float32) -> None:
        if column not in self._columns:
            self._columns[column] = VectorColumn(vectors.shape[1])
        self._columns[column].append(rows, vectors)

    def _load(self) -> None:
        row_count = self._catalogue.row_count()
        self._subject_ids = [""] * row_count
        presence = np.zeros(row_count, np.uint16)
        for row, subject_id in self._catalogue.subjects():
            self._subject_ids[row] = subject_id
        cells = np.array(list(self._catalogue.presence()), np.int64).reshape(-1, 2)
        if len(cells) and cells[-1, 0] >= row_count:
            raise GalleryDamaged(f"{self.folder}: templates without a subject; run `biodedup doctor`")
        np.bitwise_or.at(presence, cells[:, 0], (1 << cells[:, 1]).astype(np.uint16))
        self._presence.append(presence)
        for name, model in self.models.items():
            if model.dimension is not None:
                self._load_column(name, model.dimension)

    def _load_column(self, name: str, dimension: int) -> None:
        column = self._columns[name] = VectorColumn(dimension)
        cells = self._catalogue.vectors(name)
        while batch := [cell for _, cell in zip(range(16384), cells, strict=False)]:
            rows = np.array([row for row, _ in batch], np.int64)
            joined = b"".join(vector for _, vector in batch)
            if len(joined) != 4 * dimension * len(batch):
                raise GalleryDamaged(
                    f"{self.folder}: column {name} holds vectors of another length; run `biodedup doctor`"
                )
            column.append(rows, np.frombuffer(joined, np.float32).reshape(len(batch), dimension))


class Transaction:
    """Changes that become durable and visible together."""

    def __init__(self, gallery: Gallery, catalogue: Catalogue, version: int) -> None:
        self.version = version
        self.changed = False
        self.removed: list[int] = []
        self._gallery = gallery
        self._catalogue = catalogue

    def add(self, subject_id: str, templates: Mapping[str, Template], encounter_id: str | None = None) -> int:
        """Stages one subject and returns its row. Raises SubjectExists, ModelMismatch."""
        self._refuse_enrolled([subject_id])
        for template in templates.values():
            dimension = None if template.embedding is None else len(template.embedding)
            self._settle_model(template.column, ColumnModel(template.model_id, dimension))
        row = self._gallery.staged.row_count
        self._catalogue.add_subjects([(row, subject_id, encounter_id)], self.version)
        self._catalogue.add_cells((row, template) for template in templates.values())
        bits = sum(1 << COLUMNS.index(column) for column in templates)
        self._gallery._append([subject_id], np.array([bits], np.uint16))
        for column, template in templates.items():
            if template.embedding is not None:
                self._gallery._append_vectors(column, np.array([row]), template.embedding[None])
        self.changed = True
        return row

    def add_many(self, subject_ids: Sequence[str], columns: Mapping[str, tuple[str, Float32]]) -> None:
        """Stages subjects with one embedding a column: column -> (model_id, vectors float32 (n, d), unit rows)."""
        self._refuse_enrolled(subject_ids)
        for column, (model_id, vectors) in columns.items():
            self._settle_model(column, ColumnModel(model_id, vectors.shape[1]))
        first = self._gallery.staged.row_count
        rows = np.arange(first, first + len(subject_ids))
        row_list = rows.tolist()
        self._catalogue.add_subjects(
            ((row, subject_id, None) for row, subject_id in zip(row_list, subject_ids, strict=True)), self.version
        )
        for column, (_, vectors) in columns.items():
            self._catalogue.add_vectors(row_list, column, vectors)
        bits = sum(1 << COLUMNS.index(column) for column in columns)
        self._gallery._append(subject_ids, np.full(len(subject_ids), bits, np.uint16))
        for column, (_, vectors) in columns.items():
            self._gallery._append_vectors(column, rows, vectors)
        self.changed = True

    def remove(self, subject_id: str) -> None:
        """Removes a subject. Raises UnknownSubject."""
        row = self._catalogue.row_of(subject_id)
        if row is None:
            raise UnknownSubject(f"subject {subject_id!r} is not enrolled; there is nothing to remove")
        self._catalogue.remove(row, self.version)
        self.removed.append(row)
        self._gallery.live_count -= 1
        self.changed = True

    def record(self, encounter_id: str, subject_id: str | None, digest: bytes, outcome: str, answer: str) -> None:
        """Stores what was sent and answered, so that a resent encounter gets the same answer."""
        self._catalogue.add_encounter(encounter_id, subject_id, digest, outcome, answer, self.version)
        self.changed = True

    def hold(self, encounter_id: str, templates: Iterable[Template]) -> None:
        """Keeps the templates of an encounter in review."""
        self._catalogue.hold(encounter_id, templates)
        self.changed = True

    def _refuse_enrolled(self, subject_ids: Sequence[str]) -> None:
        for subject_id in subject_ids:
            if self._catalogue.row_of(subject_id) is not None:
                raise SubjectExists(
                    f"subject {subject_id!r} is enrolled already; verify against it, or remove it before enrolling again"
                )

    def _settle_model(self, column: str, model: ColumnModel) -> None:
        known = self._gallery.models.get(column)
        if known is None:
            self._catalogue.add_model(column, model)
            self._gallery.models[column] = model
        elif known != model:
            raise mismatch(column, known, model)


def mismatch(column: str, known: ColumnModel, got: ColumnModel) -> ModelMismatch:
    """The error for a template that the column cannot hold."""
    return ModelMismatch(
        f"column {column} holds templates of {known.model_id} (dimension {known.dimension}), got {got.model_id} "
        f"(dimension {got.dimension}); extract again with the gallery's model, or use another gallery"
    )


def _create(storage: Storage, folder: Path, meta: dict[str, str]) -> None:
    """Makes the database under another name, so that a file of its own name is never a half-made one."""
    storage.remove(folder / _NEW_NAME)
    storage.remove(folder / f"{_NEW_NAME}-journal")
    catalogue = Catalogue(storage.connect(folder / _NEW_NAME, read_only=False))
    try:
        catalogue.begin()
        catalogue.create(meta)
        catalogue.commit()
    finally:
        catalogue.close()
    storage.replace(folder / _NEW_NAME, folder / DATABASE_NAME)
    storage.remove(folder / f"{_NEW_NAME}-journal")


def _check(catalogue: Catalogue, folder: Path) -> None:
    application_id, format_version, tables = catalogue.identify()
    if application_id == 0 and tables == 0:
        raise GalleryDamaged(f"{folder / DATABASE_NAME} is empty: a gallery was lost here; restore it from a backup")
    if application_id != APPLICATION_ID:
        raise NotAGallery(
            f"{folder / DATABASE_NAME} is a database of another program; name an empty folder or a gallery"
        )
    if format_version != FORMAT_VERSION:
        raise NotAGallery(
            f"{folder} has format {format_version}, this version reads {FORMAT_VERSION}; open it with the version that wrote it"
        )


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    """Turns what SQLite and the file system raise into the error tree."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_IOERR) & 0xFF in _DISK_TROUBLE:
            raise unavailable(error, doing) from error
        if error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
            raise NotAGallery(
                f"{doing}: {DATABASE_NAME} is not a gallery's database; name an empty folder or a gallery"
            ) from error
        raise GalleryDamaged(f"{doing}: {error}; run `biodedup doctor`, restore from a backup") from error
    except (NotADirectoryError, FileExistsError) as error:
        raise NotAGallery(f"{doing}: it is a file; name a folder") from error
    except PermissionError as error:
        raise StorageUnavailable(f"{doing}: permission denied; give this process access to the folder") from error
    except OSError as error:
        raise unavailable(error, doing) from error
