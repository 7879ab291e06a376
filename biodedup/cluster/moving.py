"""Copies a gallery from a folder into PostgreSQL and the segment store, and back.

Owns the order of the steps. Rows keep their numbers, and segment files are copied byte for byte, so that both galleries give the same
answers.

1. Files are copied and verified first; then all rows are written in one commit. An interrupted import leaves no gallery, and an interrupted
   export no database. Both can be repeated.
2. The source is only read. An import holds the folder's writer lock, so that the source does not change. An export reads one commit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from biodedup.cluster.cache import SegmentCache, copies_of
from biodedup.cluster.catalogue import PostgresCatalogue
from biodedup.cluster.key import KEY_SETTING, chain_key_of, new_key, place
from biodedup.cluster.opening import connect
from biodedup.cluster.store import SegmentStore
from biodedup.common.described import Described
from biodedup.config import ClusterConfig
from biodedup.errors import GalleryDamaged, InvalidInput, NotAGallery
from biodedup.gallery.catalogue.sqlite import COLUMNS_OF, CatalogueTables, SqliteCatalogue
from biodedup.gallery.files.column_file import open_column_file
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import LocalStorage, Storage, stored_key
from biodedup.gallery.files.names import DATABASE_NAME, LOCK_NAME, NEW_NAME, SEGMENT_FOLDER
from biodedup.gallery.opening import check_format, prepare_folder
from biodedup.gallery.segments.layout import SegmentEntry

_OWN_SETTINGS = {"format", "cluster_format", "register_id", "state", "chain", KEY_SETTING}
"""Rows of `meta` that are not copied: each kind of gallery writes its own."""


@dataclass(frozen=True)
class Moved(Described):
    """What was copied. version: of the gallery; rows: row numbers that were ever assigned; segments, files, byte_count: in the segment
    store."""

    version: int
    rows: int
    segments: int
    files: int
    byte_count: int


def import_gallery(folder: Path, url: str, cluster: ClusterConfig, storage: Storage | None = None) -> Moved:
    """Copies the gallery in a folder to a new register. Raises NotAGallery, GalleryBusy, GalleryDamaged, InvalidInput if the register
    exists already, StorageUnavailable."""
    storage = storage or LocalStorage()
    target = connect(url, cluster)
    store = SegmentStore(cluster.segments, target.register_id)
    with translated(f"importing {folder}"), closing(target), _source(storage, folder) as source:
        key_file = _key_file_of(folder)
        entries, state = source.segments(), source.state()
        byte_count = sum(_upload(storage, folder / SEGMENT_FOLDER, entry, store) for entry in entries)

        def fill() -> None:
            meta = source.meta()
            target.lay_tables(meta["gallery_id"], meta["config"])
            target.put_key_file(key_file)
            with source.compared_with_chain():
                _copy_rows(source, target)
            target.set_state(state)

        target.take_key(chain_key_of(storage, key_file))
        target.lay(fill, after=state.commits - 1)
    return Moved(state.version, state.row_count, len(entries), sum(len(e.files) for e in entries), byte_count)


def export_gallery(url: str, folder: Path, cluster: ClusterConfig, storage: Storage | None = None) -> Moved:
    """Copies a register, as of one commit, to a gallery in an absent or empty folder. Raises NotAGallery, GalleryDamaged, InvalidInput,
    StorageUnavailable."""
    storage = storage or LocalStorage()
    with translated(f"exporting to {folder}"), closing(connect(url, cluster)) as source:
        source.open("", "", create=False)
        store = SegmentStore(cluster.segments, source.register_id)
        if storage.list_names(folder):
            raise InvalidInput(f"{folder} is not empty; name another folder")
        key = new_key(storage)
        storage.make_folder(folder)
        place(storage, folder, key.key_id, source.key_file)
        source.take_key(storage.register_chain_key(folder))
        lock = prepare_folder(storage, folder, read_only=False)
        assert lock is not None, "it is to be written"
        try:
            storage.make_folder(folder / SEGMENT_FOLDER)
            source.begin_reading()
            entries, state, meta = source.segments(), source.state(), source.meta()
            SegmentCache(storage, folder / SEGMENT_FOLDER, store, 1 << 62).fetch(entries)
            storage.sync_folder(folder / SEGMENT_FOLDER)
            with closing(SqliteCatalogue(storage.connect(folder / NEW_NAME, read_only=False))) as target:
                target.begin()
                target.lay_tables(meta["gallery_id"], meta["config"])
                with source.compared_with_chain():
                    _copy_rows(source, target)
                target.set_state(state)
                target.commit()
            storage.replace(folder / NEW_NAME, folder / DATABASE_NAME)
            storage.sync_folder(folder)
            storage.remove(folder / f"{NEW_NAME}-journal")
        finally:
            source.rollback()
            lock.release()
    byte_count = sum(store.size(copy.stored) for copy in copies_of(entries))
    return Moved(state.version, state.row_count, len(entries), sum(len(e.files) for e in entries), byte_count)


def _key_file_of(folder: Path) -> str:
    """The content of a gallery's key file; "" if it is not encrypted. Raises InvalidInput if its templates are renewable."""
    stored = stored_key(folder)
    if stored is not None and stored.transforms:
        raise InvalidInput(
            f"the templates of {folder} are renewable, which a register does not support; run `biodedup key rekey --plain` first"
        )
    return "" if stored is None else stored.content({}).decode()


@contextmanager
def _source(storage: Storage, folder: Path) -> Iterator[SqliteCatalogue]:
    """The database of a gallery in a folder, with the writer lock held."""
    if DATABASE_NAME not in (storage.list_names(folder) or ()):
        raise NotAGallery(f"{folder} holds no gallery; name another folder")
    lock = storage.lock(folder / LOCK_NAME)
    try:
        with closing(SqliteCatalogue(storage.connect(folder / DATABASE_NAME, read_only=True))) as source:
            check_format(storage, source, folder)
            if not source.is_current() or not source.has_encounters():
                raise InvalidInput(
                    f"{folder} has an older format; open it for writing once, as `biodedup compact` does"
                )
            if source.has_subject_keys():
                raise InvalidInput(
                    f"minutiae of {folder} are sealed by keys of its subjects, which a register cannot have"
                )
            source.begin_reading()
            yield source
            source.rollback()
    finally:
        lock.release()


def _upload(storage: Storage, folder: Path, entry: SegmentEntry, store: SegmentStore) -> int:
    byte_count = 0
    for copy in copies_of([entry]):
        file = open_column_file(storage, folder / copy.name)
        try:
            problems = file.problems() if file.digest == copy.digest else ["it is not the file that the manifest names"]
            byte_count += file.byte_count
        finally:
            file.close()
        if problems:
            raise GalleryDamaged(f"{folder / copy.name}: {problems[0]}; run `biodedup doctor`")
        store.upload(folder / copy.name, copy.stored)
    return byte_count


def _copy_rows(source: SqliteCatalogue | PostgresCatalogue, target: CatalogueTables) -> None:
    for table in COLUMNS_OF:
        rows = source.rows_of(table)
        target.put(table, (row for row in rows if table != "meta" or row[0] not in _OWN_SETTINGS))
