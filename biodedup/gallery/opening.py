"""Opens the folder and the database of a gallery: creates them, checks their format, and converts older formats.

Owns these checks and the order of the steps. Never reads rows.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from biodedup.errors import GalleryDamaged, NotAGallery
from biodedup.gallery.catalogue.sqlite import (
    APPLICATION_ID,
    FORMAT_VERSION,
    READABLE,
    SqliteCatalogue,
)
from biodedup.gallery.catalogue.upgrade import OLD_FORMAT, upgrade
from biodedup.gallery.files.encryption.transform import Transform
from biodedup.gallery.files.filesystem import Lock, Storage
from biodedup.gallery.files.names import (
    CANARIES_NAME,
    DATABASE_NAME,
    KEY_NAME,
    LOCK_NAME,
    NEW_NAME,
    NEW_SUFFIX,
    SEGMENT_FOLDER,
)
from biodedup.gallery.files.private import refuse_link

_OWN_NAMES = {
    DATABASE_NAME,
    DATABASE_NAME + "-journal",
    NEW_NAME,
    NEW_NAME + "-journal",
    LOCK_NAME,
    KEY_NAME,
    KEY_NAME + ".tmp",
    SEGMENT_FOLDER,
    CANARIES_NAME,
    CANARIES_NAME + NEW_SUFFIX,
}


def prepare_folder(storage: Storage, folder: Path, *, read_only: bool) -> Lock | None:
    """Checks the content of the folder, creates it if it is absent, and returns the writer's lock; None with read_only. Raises NotAGallery,
    GalleryDamaged, GalleryBusy."""
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
            raise NotAGallery(
                f"{folder} holds no gallery; name another folder, or create one with `biodedup enroll`, `biodedup load` or Engine.open"
            )
        storage.unlock(folder, new=False)
        return None
    if names is None:
        storage.make_folder(folder)
    elif DATABASE_NAME in names:
        storage.unlock(folder, new=False)  # before the lock file is made, so that a wrong key changes nothing
    refuse_link(folder / SEGMENT_FOLDER)
    lock = storage.lock(folder / LOCK_NAME)
    try:
        storage.unlock(folder, new=DATABASE_NAME not in (storage.list_names(folder) or ()))
    except BaseException:
        lock.release()
        raise
    return lock


def open_catalogue(
    storage: Storage, folder: Path, *, read_only: bool, gallery_id: str, settings: str
) -> SqliteCatalogue:
    """Connects to the database. A writer creates it if it is absent, and upgrades the tables of older formats. gallery_id, settings (JSON):
    stored with a new gallery."""
    if DATABASE_NAME not in (storage.list_names(folder) or ()):
        _create(storage, folder, gallery_id, settings)
    elif not read_only:
        _upgrade(storage, folder)
    catalogue = SqliteCatalogue(storage.connect(folder / DATABASE_NAME, read_only=read_only))
    try:
        check_format(storage, catalogue, folder)
        if not read_only and not catalogue.is_current():
            catalogue.begin()
            catalogue.renew()
            catalogue.commit()
    except BaseException:
        catalogue.close()
        raise
    return catalogue


def _create(storage: Storage, folder: Path, gallery_id: str, settings: str) -> None:
    """Creates the database under a temporary name, so that a file with the final name is always complete."""
    storage.make_folder(folder / SEGMENT_FOLDER)
    storage.remove(folder / NEW_NAME)
    storage.remove(folder / f"{NEW_NAME}-journal")
    catalogue = SqliteCatalogue(storage.connect(folder / NEW_NAME, read_only=False))
    try:
        catalogue.begin()
        catalogue.create(gallery_id, settings)
        if (transform := new_transform(storage, folder, settings)) is not None:
            catalogue.set_transform(transform.transform_id)
        catalogue.commit()
    finally:
        catalogue.close()
    storage.replace(folder / NEW_NAME, folder / DATABASE_NAME)
    storage.sync_folder(folder)
    storage.remove(folder / f"{NEW_NAME}-journal")


def new_transform(storage: Storage, folder: Path, settings: str) -> Transform | None:
    """The secret transform for the embeddings of a new gallery; None if its settings (JSON) do not ask for one, or it is in the clear."""
    asked = json.loads(settings).get("gallery", {}).get("renewable")
    if not asked or KEY_NAME not in (storage.list_names(folder) or ()):
        return None
    return storage.transform(folder / DATABASE_NAME, storage.add_transform(folder))


def _upgrade(storage: Storage, folder: Path) -> None:
    """Converts a gallery of format 1 to the present format. Does nothing for other formats."""
    old = storage.connect(folder / DATABASE_NAME, read_only=True)
    try:
        if SqliteCatalogue(old).identify()[:2] != (APPLICATION_ID, OLD_FORMAT):
            return
        storage.make_folder(folder / SEGMENT_FOLDER)
        storage.remove(folder / NEW_NAME)
        storage.remove(folder / f"{NEW_NAME}-journal")
        upgrade(storage, old, folder / NEW_NAME)
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_NOTADB:
            return  # `check_format` reports it
        raise
    finally:
        old.close()
    storage.replace(folder / NEW_NAME, folder / DATABASE_NAME)
    storage.sync_folder(folder)
    storage.remove(folder / f"{NEW_NAME}-journal")


def _format_stored(catalogue: SqliteCatalogue) -> str | None:
    """The format in the settings; None if they are damaged, or the database belongs to another program."""
    if not catalogue.has_own("meta"):
        return None
    try:
        return catalogue.meta().get("format")
    except (GalleryDamaged, sqlite3.DatabaseError, ValueError):
        return None


def check_format(storage: Storage, catalogue: SqliteCatalogue, folder: Path) -> None:
    """Raises NotAGallery for the database of another program or an unknown format, GalleryDamaged for an empty or damaged one."""
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
        raise GalleryDamaged(f"{name} is empty: its content was lost; restore it from a backup")
    if format_stored in [str(number) for number in READABLE] and (not ours or str(format_version) != format_stored):
        raise GalleryDamaged(f"{name} is damaged: its header is wrong; restore it from a backup")
    if not ours:
        raise NotAGallery(f"{name} is a database of another program; name an empty folder or a gallery")
    if format_version not in READABLE:
        raise NotAGallery(
            f"{folder} has format {format_version}, this version reads {FORMAT_VERSION}; "
            + ("open it for writing once" if format_version == OLD_FORMAT else "open it with the version that wrote it")
        )
    catalogue.check_schema()
