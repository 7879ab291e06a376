"""All access of the gallery to the file system: folders, files, the writer's lock and the SQLite connection.

Owns the interface `Storage`, and its implementation for a POSIX file system with the durability settings of SQLite. Never interprets
content, and never follows a symbolic link to a file that it writes. Tests pass in a double that fails the nth call.

1. A connection commits durably: rollback journal in PERSIST mode with synchronous=FULL. SQLite then syncs the journal, the database, and
   the journal's zeroed header. (SQLite before 3.51.3 can lose commits when a write-ahead log is reset; DELETE mode would also need a sync
   of the folder.)
2. One process writes. Its lock belongs to the open file, so that a killed writer leaves no lock behind.
3. A file other than the database is written once, under a temporary name, synced and renamed. It is never changed afterwards.
4. Only the owner can access new files (0600) and folders (0700), whatever the umask (private.py).
5. SQLite's rollback journal keeps old pages after a commit. `wipe` overwrites it when these pages hold erased content.
6. A child of a fork cannot use open locks, files and connections (handles.py).
7. If the gallery's folder holds `gallery.key`, all files and databases are encrypted (encryption/), and unencrypted ones are refused.
   Modules above this one do not depend on it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import sqlite3
import stat
import struct
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Protocol, cast

from biodedup.errors import GalleryBusy, GalleryDamaged, InvalidInput, KeyMismatch
from biodedup.gallery.files.encryption.keyring import Key, KeyFile, key_file, new_key_file, register_key
from biodedup.gallery.files.encryption.sealed_file import (
    BLOCK_BYTES,
    MAGIC,
    SMALL_BLOCK_BYTES,
    NotAuthentic,
    SealedMap,
    SealedWriter,
)
from biodedup.gallery.files.encryption.transform import Transform
from biodedup.gallery.files.handles import BUFFER_BYTES, Connection, FileLock, LocalFile, write_all
from biodedup.gallery.files.names import DATABASE_NAME, KEY_NAME, NEW_SUFFIX, SEGMENT_FOLDER, finished
from biodedup.gallery.files.private import (
    create_private,
    make_private_folder,
    refuse_link,
    refuse_no_file,
    replace_private,
)
from biodedup.keys import KEY_BYTES, KeySource

_WIPED_BYTES_KEPT = 1 << 18
"""A wiped journal up to this size keeps its space, so that the next commit needs no new disk blocks."""
MALFORMED = (
    AttributeError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""Python exceptions that malformed stored content can cause. Readers report them as GalleryDamaged."""
_BUSY_S = 10.0  # the longest time that a connection waits for another connection's lock
_READ_SINGLY = ".rest"  # suffix of files whose rows are read one by one (segments/layout.py)
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS}


class Lock(Protocol):
    def release(self) -> None: ...

    def is_held(self) -> bool:
        """Whether the lock file still exists. Without it, another process could take a lock with the same name."""


class NewFile(Protocol):
    """A file that is being written."""

    def write(self, data: bytes | memoryview) -> None: ...

    def finish(self) -> None:
        """Syncs and closes the file; its content is durable then."""

    def discard(self) -> None:
        """Closes and removes; never fails."""


class Storage(Protocol):
    """The file-system operations that a gallery uses."""

    def list_names(self, folder: Path) -> list[str] | None:
        """The names in a folder, sorted; None if the folder does not exist."""

    def make_folder(self, folder: Path) -> None: ...

    def lock(self, path: Path) -> Lock:
        """Takes the exclusive writer's lock. Raises GalleryBusy, which names the holder."""

    def unlock(self, folder: Path, *, new: bool) -> str | None:
        """Called before anything in a gallery is read. Returns the id of the register's key; None for a gallery in the clear. new: the
        gallery is being created; it gets a key file if this storage has a key. Raises KeyMismatch, GalleryDamaged."""

    def register_chain_key(self, folder: Path) -> bytes | None:
        """Of the hash chain in PostgreSQL; folder: has the register's key file. None for a register in the clear. Raises KeyMismatch,
        GalleryDamaged."""

    def share_key(self, source: Path, target: Path, *, lost: bool = False) -> None:
        """Called before a gallery is copied: gives the target the source's key file, if there is one. lost: the target has files under this
        key, and has lost its key file. Raises InvalidInput, KeyMismatch."""

    def share_transforms(self, source: Path, target: Path, needed: Collection[str] | None) -> None:
        """Called after a gallery was copied: adds the source's transform secrets to the target. Of its own secrets the target keeps those
        in `needed`, or all if it is None. Raises GalleryBusy if a needed secret was destroyed in the source meanwhile."""

    def transform(self, path: Path, transform_id: str) -> Transform:
        """The secret transform of embeddings in a gallery's file. Raises GalleryDamaged if its secret is missing, KeyMismatch."""

    def transform_ids(self, folder: Path) -> list[str]:
        """The transforms whose secrets a gallery has, newest last. Raises GalleryDamaged."""

    def add_transform(self, folder: Path) -> str:
        """Creates the secret of a new transform. Returns its id. Raises InvalidInput if the gallery is not encrypted, KeyMismatch."""

    def keep_transforms(self, folder: Path, transform_ids: Collection[str]) -> None:
        """Destroys the secrets of all other transforms. Raises KeyMismatch."""

    def connect(self, path: Path, *, read_only: bool) -> sqlite3.Connection: ...

    def create(self, path: Path) -> NewFile:
        """Opens a new file for writing. An existing file with the name is removed."""

    def map(self, path: Path) -> mmap.mmap:
        """The content of a file, memory-mapped, read-only. Raises ValueError if it is empty or not a regular file."""

    def forget(self, path: Path) -> None:
        """Tells the system that it need not cache a file. Never raises."""

    def replace(self, source: Path, target: Path) -> None:
        """Renames a file over another."""

    def claim(self, source: Path, target: Path) -> None:
        """Renames a file. Raises FileExistsError if the name is taken."""

    def wipe(self, path: Path) -> None:
        """Overwrites a file with zeros and syncs it; it may become shorter. Does nothing if the file is absent."""

    def sync_folder(self, folder: Path) -> None:
        """Makes the names in a folder durable."""

    def remove(self, path: Path) -> None:
        """Removes a file, if it exists."""


def needs_key(folder: Path) -> InvalidInput:
    """The error for renewable templates in a gallery in the clear."""
    return InvalidInput(
        f"renewable templates need an encrypted gallery; state its key (Config.keys), or run `biodedup encrypt {folder}`"
    )


class LocalStorage:
    """A POSIX file system. keys: the source of the register's key, which the constructor fetches."""

    _register: Key | None = None
    _known: Key | None = None
    """The gallery key that was unwrapped last. It stays valid when the register's key is rotated."""

    def __init__(self, keys: KeySource | None = None) -> None:
        self._transforms: dict[str, Transform] = {}
        """The transforms of all key files that were read. A reader needs a transform even after it was replaced."""
        if keys is not None:
            self._register = register_key(keys)

    def unlock(self, folder: Path, *, new: bool) -> str | None:
        key = self._key_in(folder)
        if key is None and self._register is not None:
            if not new and _is_encrypted(folder / DATABASE_NAME):
                raise GalleryDamaged(
                    f"{folder / KEY_NAME} is missing; copy it from a backup: the gallery cannot be opened without it"
                )
            if not new:
                raise KeyMismatch(
                    f"{folder} is not encrypted, got a key; leave the key out, or run `biodedup encrypt {folder}`"
                )
            replace_private(folder / KEY_NAME, new_key_file(self._register))
            self.sync_folder(folder)
        return None if self._register is None else self._register.key_id

    def register_chain_key(self, folder: Path) -> bytes | None:
        key = self._key_in(folder)
        return None if key is None else key.derived("chain of a register")

    def share_key(self, source: Path, target: Path, *, lost: bool = False) -> None:
        source_key, target_key = stored_key(source), stored_key(target)
        if source_key is None and target_key is None:
            return
        names = self.list_names(target) or ()
        has_plain_files = target_key is None and (DATABASE_NAME in names or self.list_names(target / SEGMENT_FOLDER))
        if source_key is not None and target_key is not None and target_key.gallery_key_id != source_key.gallery_key_id:
            raise InvalidInput(f"{target} is another gallery or its backup; name an empty folder")
        if source_key is None or (has_plain_files and not lost):
            raise KeyMismatch(f"{target} and {source} are not both encrypted; name an empty folder")
        with key_file_lock(target):  # the target keeps its transforms, so that its files stay readable
            self._put_key_file(target, source_key, _transforms_of_both(source_key, target_key))

    def share_transforms(self, source: Path, target: Path, needed: Collection[str] | None) -> None:
        if (source_key := stored_key(source)) is None:
            return
        with key_file_lock(target):
            target_key = stored_key(target)
            assert target_key is not None, "share_key has written it"
            if needed is None:
                self._put_key_file(target, target_key, _transforms_of_both(target_key, source_key))
                return
            transforms = _transforms_of_both(source_key, target_key)
            if not set(needed) <= transforms.keys():
                raise GalleryBusy(
                    f"the embeddings of {source} got a new transform while it was copied; run the backup again"
                )
            kept = {name: secret for name, secret in transforms.items() if name in {*source_key.transforms, *needed}}
            self._put_key_file(target, source_key, kept)

    def _put_key_file(self, folder: Path, stored: KeyFile, transforms: Mapping[str, bytes]) -> None:
        path, content = folder / KEY_NAME, stored.content(transforms)
        if not path.exists() or _read_whole(path) != content:
            replace_private(path, content)
            self.sync_folder(folder)

    def _key_in(self, folder: Path) -> Key | None:
        """The key of a gallery; None if it is in the clear. Raises KeyMismatch, GalleryDamaged."""
        stored = stored_key(folder)
        if stored is None:
            return None
        known = self._known
        if known is None or known.key_id != stored.gallery_key_id:
            self._known = known = stored.opened(self._register)
            self._learn_transforms(stored)
        return known

    def transform(self, path: Path, transform_id: str) -> Transform:
        if transform_id not in self._transforms:
            stored = stored_key(path.parent) or stored_key(path.parent.parent)
            if stored is not None:
                self._learn_transforms(stored)
        if transform_id not in self._transforms:
            raise GalleryDamaged(
                f"{KEY_NAME} lacks the transform {transform_id} of {path.name}; restore {KEY_NAME} from a backup of this gallery"
            )
        return self._transforms[transform_id]

    def _learn_transforms(self, stored: KeyFile) -> None:
        if self._register is not None and not stored.transforms.keys() <= self._transforms.keys():
            self._transforms |= {
                name: Transform(secret) for name, secret in stored.transform_secrets(self._register).items()
            }

    def transform_ids(self, folder: Path) -> list[str]:
        stored = stored_key(folder)
        return [] if stored is None else list(stored.transforms)

    def add_transform(self, folder: Path) -> str:
        transform = secrets.token_bytes(KEY_BYTES)
        self._change_transforms(folder, lambda before: [*before.values(), transform])
        return Key(transform).key_id

    def keep_transforms(self, folder: Path, transform_ids: Collection[str]) -> None:
        self._change_transforms(
            folder, lambda before: [secret for name, secret in before.items() if name in transform_ids]
        )

    def _change_transforms(self, folder: Path, change: Callable[[dict[str, bytes]], list[bytes]]) -> None:
        """Rewrites the key file with other transform secrets. change: id -> secret before, to the secrets afterwards."""
        with key_file_lock(folder):
            stored, register = stored_key(folder), self._register
            if stored is None or register is None:
                raise needs_key(folder)
            key, before = stored.opened(register), stored.transform_secrets(register)
            self._learn_transforms(stored)
            after = change(before)
            if {Key(secret).key_id for secret in after} != before.keys():
                replace_private(folder / KEY_NAME, key_file(register, key.secret, after))
                self.sync_folder(folder)
                self._transforms |= {Key(secret).key_id: Transform(secret) for secret in after}

    def _key_of(self, path: Path) -> Key | None:
        """The key for a file: that of the gallery it is in, else the register's key (for a file of a job)."""
        return self._key_in(path.parent) or self._key_in(path.parent.parent) or self._register

    def list_names(self, folder: Path) -> list[str] | None:
        try:
            return sorted(os.listdir(folder))
        except FileNotFoundError:
            return None

    def make_folder(self, folder: Path) -> None:
        make_private_folder(folder)
        self.sync_folder(folder.parent)

    def lock(self, path: Path) -> Lock:
        return FileLock(path)

    def connect(self, path: Path, *, read_only: bool) -> sqlite3.Connection:
        # A reader may have to roll back the transaction of a killed writer, so it opens the file for writing if it can.
        for name in (path.name, f"{path.name}-journal", f"{path.name}-wal"):
            refuse_no_file(path.with_name(name))
        mode = "rwc" if not read_only else "rw" if os.access(path, os.W_OK) and not path.is_symlink() else "ro"
        if not read_only:
            refuse_link(path)
            if not path.exists():  # an existing file is not opened here: closing it would release SQLite's locks
                os.close(create_private(path))
        uri = f"{path.absolute().as_uri()}?mode={mode}"
        connection = self._connected(uri, path)
        try:
            connection.execute(
                "PRAGMA trusted_schema=OFF"
            )  # the file may be foreign: its schema must not run functions
            connection.execute("PRAGMA cell_size_check=ON")
            connection.execute("PRAGMA temp_store=MEMORY")
            connection.execute("PRAGMA cache_size=-65536")  # KiB
            if read_only:
                connection.execute("PRAGMA query_only=ON")
            else:
                connection.execute("PRAGMA journal_mode=PERSIST")
                connection.execute("PRAGMA synchronous=FULL")
                connection.execute("PRAGMA secure_delete=ON")  # a removed subject's vectors are overwritten
        except BaseException as error:
            connection.close()
            if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_NOTADB and (path.parent / KEY_NAME).exists():
                raise GalleryDamaged(
                    f"{path} cannot be decrypted with the key in {KEY_NAME}: one of the two is damaged, or belongs to another gallery; "
                    "restore both from a backup"
                ) from error
            raise
        return connection

    def _connected(self, uri: str, path: Path) -> sqlite3.Connection:
        key = self._database_key(path)
        if key is None:
            return sqlite3.connect(
                uri, uri=True, isolation_level=None, check_same_thread=False, timeout=_BUSY_S, factory=Connection
            )
        from biodedup.gallery.files.encryption.database import EncryptedConnection

        connection = EncryptedConnection(uri, database_secret(key, path), _BUSY_S)
        connection.transforms = partial(self.transform, path)
        return cast(sqlite3.Connection, connection)

    def _database_key(self, path: Path) -> Key | None:
        return self._key_of(path)

    def create(self, path: Path) -> NewFile:
        key = self._key_of(path)
        file = LocalFile(path)
        if key is None:
            return file
        name = _bound_name(path)
        return SealedWriter(file, key, name, SMALL_BLOCK_BYTES if name.endswith(_READ_SINGLY) else BLOCK_BYTES)

    def map(self, path: Path) -> mmap.mmap:
        key = self._key_of(path)
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise ValueError(f"{path} is not a regular file")
            if key is not None:
                return _sealed_map(file, key, path)
            if os.pread(file, len(MAGIC), 0) == MAGIC:
                raise NotAuthentic("it is encrypted, but the gallery is not")
            return mmap.mmap(file, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(file)

    def forget(self, path: Path) -> None:
        with suppress(OSError):  # only a hint
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)

    def replace(self, source: Path, target: Path) -> None:
        source.replace(target)

    def claim(self, source: Path, target: Path) -> None:
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
            source.rename(target)
        else:
            source.unlink()

    def wipe(self, path: Path) -> None:
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return
        try:
            size = os.fstat(file).st_size
            for start in range(0, size, BUFFER_BYTES):
                write_all(file, bytes(min(BUFFER_BYTES, size - start)))
            if size:
                os.fsync(file)
            if size > _WIPED_BYTES_KEPT:
                os.ftruncate(file, 0)
                os.fsync(file)
        finally:
            os.close(file)

    def sync_folder(self, folder: Path) -> None:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)


def _transforms_of_both(stored: KeyFile, other: KeyFile | None) -> dict[str, bytes]:
    """id -> wrapped transform secret, of two key files under the same register's key; those of `stored` come last."""
    more = other.transforms if other is not None and other.register_key_id == stored.register_key_id else {}
    return {**{name: secret for name, secret in more.items() if name not in stored.transforms}, **stored.transforms}


@contextmanager
def key_file_lock(folder: Path) -> Iterator[None]:
    """Held while `gallery.key` is read and replaced, so that concurrent changes do not overwrite each other."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def stored_key(folder: Path) -> KeyFile | None:
    """The key file of a gallery, with its wrapped keys; None if there is none. Raises GalleryDamaged."""
    path = folder / KEY_NAME
    try:
        content = _read_whole(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return KeyFile.parse(path, content)


def database_secret(key: Key, path: Path) -> bytes:
    """The key of a database, derived from the gallery's key."""
    return key.derived(f"database {_bound_name(path)}")


def whole(storage: Storage, path: Path) -> mmap.mmap:
    """The complete content of a file, decrypted. Raises as `Storage.map`, OSError, and GalleryDamaged if decryption fails."""
    content = storage.map(path)
    if isinstance(content, SealedMap):
        try:
            content.need(0, content.content_size)
        except NotAuthentic as error:
            raise GalleryDamaged(f"{path} is damaged: {error}; restore it from a backup") from None
    return content


def write_whole(storage: Storage, path: Path, content: bytes | memoryview) -> None:
    """Writes a file under a temporary name, syncs it, and renames it. Raises OSError."""
    new = path.with_name(path.name + NEW_SUFFIX)
    file = storage.create(new)
    try:
        file.write(content)
        file.finish()
    except BaseException:
        file.discard()
        raise
    storage.replace(new, path)


def _sealed_map(file: int, key: Key, path: Path) -> SealedMap:
    content = SealedMap.of(os.dup(file), key, _bound_name(path))
    if not content.content_size:
        raise ValueError(f"{path} is empty")
    return content


def _is_encrypted(database: Path) -> bool:
    """Whether a file is readable and does not begin as an unencrypted SQLite database."""
    try:
        return not _read_whole(database).startswith(b"SQLite format 3\0")
    except OSError:
        return False


def _bound_name(path: Path) -> str:
    """The name that a file's encryption is bound to: its final name, even while it is written under a temporary one."""
    return finished(path.name)


def _read_whole(path: Path) -> bytes:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        return os.read(file, 1 << 16) if stat.S_ISREG(os.fstat(file).st_mode) else b""
    finally:
        os.close(file)


def memory_bytes() -> int:
    """The memory of this machine, or the limit of its control group if that is lower."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        granted = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return physical
    return min(physical, int(granted)) if granted.isdecimal() else physical
