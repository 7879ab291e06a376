"""Copies a gallery while it is in use.

Owns what is copied, and in which order. Never changes the gallery that is copied.

1. A backup is a gallery: it can be opened, searched and inspected. Files are immutable, so that the next backup copies only segments
   that are new. What jobs keep beside the gallery is copied, too, so that they go on with the copy.
2. A file gets the name under which it is read when it is whole and synced.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from biodedup.common.described import Described
from biodedup.errors import GalleryDamaged, InvalidInput, KeyMismatch
from biodedup.gallery.care.removal import refuse_foreign
from biodedup.gallery.care.verify import (
    connected,
    read_manifest,
)
from biodedup.gallery.files.column_file import ColumnFile, open_column_file
from biodedup.gallery.files.encryption.sealed_file import NotAuthentic
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import Storage, whole
from biodedup.gallery.files.names import (
    BACKLOG_NAME,
    CANARIES_NAME,
    DATABASE_NAME,
    LEDGER_NAME,
    LOCK_NAME,
    MERGES_FOLDER,
    NEW_NAME,
    NEW_SUFFIX,
    READERS_NAME,
    SEGMENT_FOLDER,
)
from biodedup.gallery.segments.layout import file_name, number_of
from biodedup.values import COLUMNS

_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Copied(Described):
    """The result of a backup or a restoration. version: of the copied state; byte_count: bytes copied, those of databases included;
    left_out: damaged databases of jobs, which were not copied, so that the target keeps its earlier ones; databases: how many were copied, as
    each time, which files_copied does not count."""

    version: int
    files_copied: int
    files_kept: int
    byte_count: int
    left_out: tuple[str, ...] = ()
    databases: int = 0


def backup(storage: Storage, folder: Path, target: Path) -> Copied:
    """Copies a gallery, as of one version, while others read and write it; again, it copies only new segments.

    The copy is a gallery, with what jobs keep beside it. Raises InvalidInput where the target holds something else,
    GalleryDamaged where the source is damaged, StorageUnavailable; the target's earlier state is whole until the new one is.
    """
    with translated(f"backing up to {target}"):
        _refuse_target(storage, folder, target)
        if storage.list_names(target) is None:
            storage.make_folder(target)
        storage.share_key(folder, target)
        if storage.list_names(target / SEGMENT_FOLDER) is None:
            storage.make_folder(target / SEGMENT_FOLDER)
        lock = storage.lock(target / LOCK_NAME)
        try:
            canaries = _canaries(storage, folder)  # opened first: they name no row that the copied database has not
            copied = copy_gallery(storage, folder, target, check_kept=False)
            storage.share_key(folder, target)
            if canaries is not None:
                copy_file(storage, canaries, target / CANARIES_NAME)
                storage.sync_folder(target)
            storage.share_transforms(folder, target, _transform_ids(storage, target))
            return copied
        finally:
            lock.release()


def _transform_ids(storage: Storage, folder: Path) -> set[str]:
    """Of the transforms that the embeddings of a copy are stored with."""
    with connected(storage, folder) as catalogue:
        named, entries = catalogue.transform_ids(), catalogue.segments()
    paths = [
        folder / SEGMENT_FOLDER / file_name(e.number, kind) for e in entries for kind in e.files if kind in COLUMNS
    ]
    if CANARIES_NAME in (storage.list_names(folder) or ()):
        paths.append(folder / CANARIES_NAME)
    for path in paths:
        about = open_column_file(storage, path).about
        named |= {str(table["turn"]) for table in (about, about.get("codec") or {}) if "turn" in table}
    return named


def _refuse_target(storage: Storage, folder: Path, target: Path) -> None:
    """Raises InvalidInput or NotAGallery for a folder that is not for a backup of this gallery."""
    source, resolved = folder.resolve(), target.resolve()
    if resolved == source or (source / SEGMENT_FOLDER) in (resolved, *resolved.parents):
        raise InvalidInput(f"{target} is in the gallery itself; name an empty folder or an earlier backup")
    refuse_foreign(storage, target)
    if DATABASE_NAME in (storage.list_names(target) or ()):
        with connected(storage, target):
            pass  # it is a gallery's database


def copy_gallery(
    storage: Storage, source: Path, target: Path, *, check_kept: bool, aside: Path | None = None
) -> Copied:
    # Before the gallery: a ledger that knows of less than the gallery is safe, one that knows of more hides what is missing.
    ledgers, left_out = _copied_databases(storage, source, target)
    with _new_database(storage, target / NEW_NAME) as copy, connected(storage, source) as catalogue:
        manifest = read_manifest(storage, source, catalogue, copy)
    if manifest.problems:
        raise GalleryDamaged(f"{source}: {manifest.problems[0]}; run `biodedup doctor`")
    present = {name for name in storage.list_names(target / SEGMENT_FOLDER) or () if number_of(name) is not None}
    if DATABASE_NAME in (storage.list_names(target) or ()):
        with connected(storage, target) as catalogue:
            if catalogue.meta()["gallery_id"] != manifest.gallery_id:
                raise InvalidInput(f"{target} is another gallery or its backup; name an empty folder")
    # After the database was read: a merge's log is written before the gallery says that it has begun.
    copied, kept, byte_count = _copy_logs(storage, source / MERGES_FOLDER, target / MERGES_FOLDER)
    for file in manifest.files.values():
        path = target / SEGMENT_FOLDER / file.name
        if file.name in present and _is_same(storage, path, file, check_kept):
            kept += 1
            continue
        copy_file(storage, file, path)
        copied, byte_count = copied + 1, byte_count + file.byte_count
    storage.sync_folder(target / SEGMENT_FOLDER)
    databases = [DATABASE_NAME, *ledgers]
    if aside is not None:  # where nothing was, the gallery makes it whole: last
        databases.reverse()
    for name in databases:
        byte_count += (target / (name + NEW_SUFFIX)).stat().st_size
        _put_in_place(storage, target, name, aside)
    for name in sorted(present - {file.name for file in manifest.files.values()}):
        if aside is None:
            storage.remove(target / SEGMENT_FOLDER / name)
        else:
            storage.replace(target / SEGMENT_FOLDER / name, aside / name)
    return Copied(manifest.version, copied, kept, byte_count, left_out, len(databases))


@contextmanager
def _new_database(storage: Storage, path: Path) -> Iterator[sqlite3.Connection]:
    """An empty one, to be copied into."""
    storage.remove(path)
    storage.remove(path.with_name(f"{path.name}-journal"))
    connection = storage.connect(path, read_only=False)
    try:
        yield connection
    finally:
        connection.close()


def _copied_databases(storage: Storage, source: Path, target: Path) -> tuple[list[str], tuple[str, ...]]:
    """(those that were copied, each as of one moment and under its name with NEW_SUFFIX; those that are damaged)."""
    copied, damaged = [], []
    for name in (BACKLOG_NAME, LEDGER_NAME, READERS_NAME):
        if name not in (storage.list_names(source) or ()):
            continue
        try:
            with (
                _new_database(storage, target / (name + NEW_SUFFIX)) as copy,
                closing(storage.connect(source / name, read_only=True)) as original,
            ):
                original.backup(copy)
            copied.append(name)
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                raise
            damaged.append(name)  # bookkeeping: no reason to have no backup of the gallery
    return copied, tuple(damaged)


def _put_in_place(storage: Storage, target: Path, name: str, aside: Path | None) -> None:
    """Gives a copied database its name. aside: the folder for the file that had this name; None overwrites it."""
    for old in (f"{name}-journal", name):  # the journal first: it is not to be rolled back into another database
        if aside is not None and old in (storage.list_names(target) or ()):
            storage.replace(target / old, aside / old)
    storage.remove(target / f"{name}-journal")
    storage.replace(target / (name + NEW_SUFFIX), target / name)
    storage.sync_folder(target)
    storage.remove(target / f"{name}{NEW_SUFFIX}-journal")


def _copy_logs(storage: Storage, source: Path, target: Path) -> tuple[int, int, int]:
    """Copies the logs of merges that the target has not: (files copied, files kept, bytes copied)."""
    names = [name for name in storage.list_names(source) or () if not name.endswith(NEW_SUFFIX)]
    if names:
        storage.make_folder(target)
    present = set(storage.list_names(target) or ())
    copied = byte_count = 0
    for name in names:
        log, there = source / name, target / name
        if name in present and all(a == b for a, b in zip_longest(_pieces(storage, log), _pieces(storage, there))):
            continue
        copied, byte_count = copied + 1, byte_count + _write_file(storage, _pieces(storage, log), there)
    if names:
        storage.sync_folder(target)
    return copied, len(names) - copied, byte_count


def _pieces(storage: Storage, path: Path) -> Iterator[bytes]:
    try:
        mapped = whole(storage, path)
    except NotAuthentic as error:
        raise GalleryDamaged(f"{path} is damaged: {error}; move it away") from None
    except KeyMismatch:
        raise
    except ValueError:  # empty, or not a regular file
        return
    with mapped as content:
        for low in range(0, len(content), _COPY_BYTES):
            yield content[low : low + _COPY_BYTES]


def _canaries(storage: Storage, folder: Path) -> ColumnFile | None:
    """The gallery's canaries; None without any. Damaged ones are no reason to have no backup."""
    if CANARIES_NAME not in (storage.list_names(folder) or ()):
        return None
    try:
        file = open_column_file(storage, folder / CANARIES_NAME)
    except (GalleryDamaged, ValueError, KeyError):
        return None
    return None if file.problems() else file


def copy_canaries(storage: Storage, folder: Path, target: Path) -> None:
    """Copies the canaries of a gallery that no one changes, if there are any."""
    canaries = _canaries(storage, folder)
    if canaries is not None:
        copy_file(storage, canaries, target / CANARIES_NAME)


def _is_same(storage: Storage, path: Path, file: ColumnFile, check: bool) -> bool:
    try:
        there = open_column_file(storage, path)
    except GalleryDamaged:
        return False
    if there.digest == file.digest:
        return not (check and there.problems())
    if not check:
        raise InvalidInput(f"{path.parent.parent} holds a backup of another history; name an empty folder")
    return False


def copy_file(storage: Storage, source: ColumnFile, path: Path) -> None:
    for problem in source.problems():
        raise source.damaged(problem)
    _write_file(storage, source.content(_COPY_BYTES), path)


def _write_file(storage: Storage, pieces: Iterable[bytes], path: Path) -> int:
    """Returns how many bytes it has."""
    byte_count = 0
    new = path.with_name(path.name + NEW_SUFFIX)
    file = storage.create(new)
    try:
        for piece in pieces:
            file.write(piece)
            byte_count += len(piece)
        file.finish()
    except BaseException:
        file.discard()
        raise
    storage.replace(new, path)
    return byte_count
