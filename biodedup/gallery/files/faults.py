"""Converts errors of SQLite and of the file system into errors of this library.

Owns the mapping of error codes to exceptions and remedies. Never retries.
"""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from biodedup.errors import GalleryDamaged, NotAGallery, StorageUnavailable
from biodedup.gallery.files.names import DATABASE_NAME

_DISK_TROUBLE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_READONLY,
}  # primary result codes after which the same call may succeed; other codes mean damage

_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Inside the context, converts errors. doing: what the program does, for the message. Raises StorageUnavailable, NotAGallery,
    GalleryDamaged."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_IOERR) & 0xFF in _DISK_TROUBLE:
            raise _unavailable(error, doing) from error
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
        raise _unavailable(error, doing) from error


def _unavailable(error: Exception, doing: str) -> StorageUnavailable:
    """The retryable error for a failed disk operation, with a remedy."""
    number = getattr(error, "errno", None)
    if number in _FULL or getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
        remedy = "free the disk and send it again"
    elif number == errno.ENOENT:
        remedy = "check the path and send it again"
    elif number == errno.EROFS:
        remedy = "name a folder that can be written"
    else:
        remedy = "check the disk and send it again"
    return StorageUnavailable(f"{doing} failed: {error}; nothing was acknowledged; {remedy}")
