"""Removes the files of a gallery, and no other files.

Owns the list of names in a gallery's folder that belong to this program, including the databases of jobs. Never follows a symbolic link,
and never removes a folder that is not empty.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from biodedup.errors import InvalidInput
from biodedup.gallery.files.filesystem import Storage
from biodedup.gallery.files.names import (
    BACKLOG_NAME,
    CANARIES_NAME,
    DATABASE_NAME,
    KEY_NAME,
    LEDGER_NAME,
    LOCK_NAME,
    MERGES_FOLDER,
    NEW_NAME,
    NEW_SUFFIX,
    READERS_NAME,
    SEGMENT_FOLDER,
)
from biodedup.gallery.files.private import refuse_link
from biodedup.gallery.segments.layout import number_of

_DATABASES = [
    name + suffix for name in (DATABASE_NAME, BACKLOG_NAME, LEDGER_NAME, READERS_NAME) for suffix in ("", NEW_SUFFIX)
]
_WORKING = {
    NEW_NAME,
    KEY_NAME,
    KEY_NAME + ".tmp",
    *(name + end for name in _DATABASES for end in ("", "-journal")),
    CANARIES_NAME,
    CANARIES_NAME + NEW_SUFFIX,
}
OWN_NAMES = {*_WORKING, LOCK_NAME, SEGMENT_FOLDER, MERGES_FOLDER}
"""The names that the folder of a gallery or a backup may hold before it has a database."""


def refuse_foreign(storage: Storage, target: Path) -> None:
    """Called before a gallery is copied to a folder. Raises InvalidInput if the folder has no database and holds foreign files, NotAGallery
    for a symbolic link."""
    for name in (SEGMENT_FOLDER, MERGES_FOLDER):
        refuse_link(target / name)
    names = storage.list_names(target) or ()
    if DATABASE_NAME in names:
        return
    others = [name for name in names if name not in OWN_NAMES]
    if SEGMENT_FOLDER in names:
        others += [name for name in storage.list_names(target / SEGMENT_FOLDER) or () if number_of(name) is None]
    if others:
        raise InvalidInput(f"{target} holds {len(others)} other files; name an empty folder or an earlier backup")


def remove_gallery(storage: Storage, folder: Path) -> None:
    """Removes the files of a gallery, and its folder if no foreign files are left in it."""
    for path in (folder, folder / SEGMENT_FOLDER):
        refuse_link(path)
    segments = folder / SEGMENT_FOLDER
    for name in storage.list_names(segments) or ():
        if number_of(name) is not None:
            storage.remove(segments / name)
    for name in storage.list_names(folder) or ():
        if name in _WORKING or name == LOCK_NAME:
            storage.remove(folder / name)
    for path in (segments, folder):
        with suppress(OSError):
            path.rmdir()
