"""Backs up a gallery while it is in use.

Owns the list of files that are copied, and their order. Never changes the source gallery.

1. A backup is a gallery: it can be opened, searched and verified. Segment files are immutable, so the next backup only copies new segments.
   The databases and logs of jobs are copied as well, so that jobs can continue with the copy.
2. A file gets its final name when it is complete and synced.
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
    """The result of a backup or a restoration. version: of the copied gallery; files_copied, files_kept: segment files and logs that were
    copied, or that the target had already; byte_count: bytes copied, including databases; left_out: damaged databases of jobs, which were
    not copied; the target keeps its earlier ones; databases: the number of copied databases, which are copied every time and not part of
    files_copied."""

    version: int
    files_copied: int
    files_kept: int
    byte_count: int
    left_out: tuple[str, ...] = ()
    databases: int = 0


def backup(storage: Storage, folder: Path, target: Path) -> Copied:
    """Copies a gallery, as of one commit, while other processes read and write it. A repeated backup only copies new segments.

    Raises InvalidInput if the target holds other files, GalleryDamaged if the source is damaged, StorageUnavailable. The target's earlier
    backup stays complete until the new one is.
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
            canaries = _canaries(
                storage, folder
            )  # opened first, so that the copied database has every row that they name
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
    """The secret transforms that the embeddings of a copy use."""
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
    """Raises InvalidInput or NotAGallery for a folder that cannot hold a backup of this gallery."""
    source, resolved = folder.resolve(), target.resolve()
    if resolved == source or (source / SEGMENT_FOLDER) in (resolved, *resolved.parents):
        raise InvalidInput(f"{target} is in the gallery itself; name an empty folder or an earlier backup")
    refuse_foreign(storage, target)
    if DATABASE_NAME in (storage.list_names(target) or ()):
        with connected(storage, target):
            pass  # raises if it is not a gallery's database


def copy_gallery(
    storage: Storage, source: Path, target: Path, *, check_kept: bool, aside: Path | None = None
) -> Copied:
    """Copies the databases, logs and segments of a gallery. check_kept: verify files that the target has already; aside: the folder for
    replaced files, None to remove them."""
    # The ledgers first: a ledger that is older than the gallery is safe, a newer one would hide missing encounters.
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
    # The logs after the database: a merge's log is written before the gallery records the merge.
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
    if aside is not None:  # a restoration is complete with the gallery's database, which comes last
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
    """An empty database, as the target of a copy."""
    storage.remove(path)
    storage.remove(path.with_name(f"{path.name}-journal"))
    connection = storage.connect(path, read_only=False)
    try:
        yield connection
    finally:
        connection.close()


def _copied_databases(storage: Storage, source: Path, target: Path) -> tuple[list[str], tuple[str, ...]]:
    """Copies the databases of jobs, each under its name with NEW_SUFFIX. Returns (the copied ones, the damaged ones)."""
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
            damaged.append(name)  # a backup of the gallery is useful without it
    return copied, tuple(damaged)


def _put_in_place(storage: Storage, target: Path, name: str, aside: Path | None) -> None:
    """Gives a copied database its final name. aside: the folder for the replaced file; None overwrites it."""
    for old in (f"{name}-journal", name):  # the journal first, so that SQLite cannot apply it to the new database
        if aside is not None and old in (storage.list_names(target) or ()):
            storage.replace(target / old, aside / old)
    storage.remove(target / f"{name}-journal")
    storage.replace(target / (name + NEW_SUFFIX), target / name)
    storage.sync_folder(target)
    storage.remove(target / f"{name}{NEW_SUFFIX}-journal")


def _copy_logs(storage: Storage, source: Path, target: Path) -> tuple[int, int, int]:
    """Copies the merge logs that the target does not have. Returns (files copied, files kept, bytes copied)."""
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
    """The file of canary probes; None if it is absent or damaged: a backup is useful without it."""
    if CANARIES_NAME not in (storage.list_names(folder) or ()):
        return None
    try:
        file = open_column_file(storage, folder / CANARIES_NAME)
    except (GalleryDamaged, ValueError, KeyError):
        return None
    return None if file.problems() else file


def copy_canaries(storage: Storage, folder: Path, target: Path) -> None:
    """Copies the file of canary probes, if there is one. The gallery must not change meanwhile."""
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
    """Verifies and copies a column file. Raises GalleryDamaged."""
    for problem in source.problems():
        raise source.damaged(problem)
    _write_file(storage, source.content(_COPY_BYTES), path)


def _write_file(storage: Storage, pieces: Iterable[bytes], path: Path) -> int:
    """Writes a file under a temporary name, syncs and renames it. Returns its size in bytes."""
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
