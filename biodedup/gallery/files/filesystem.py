"""All access of the gallery to the file system: folders, files, the writer's lock and the SQLite connection.

Owns folders, files, the writer's lock and the SQLite connection with its durability settings. Never knows what is stored, and
never follows a symbolic link to a file that it writes. A test hands in a double that fails the nth call.

1. A connection commits durably: rollback journal in PERSIST mode with synchronous=FULL, which syncs the journal, the
   database and then the journal's zeroed header. (SQLite before 3.51.3 can lose commits when a write-ahead log is reset;
   DELETE mode needs a further sync of the folder for the same promise.)
2. One process writes. The lock belongs to the open file, so that a killed writer leaves none behind.
3. A file other than the database is written once, under another name, synced, renamed, and never changed again.
4. What is created is for its owner alone, whatever the umask: folders 0700, files 0600 (private.py).
5. The rollback journal keeps old pages after a commit. `wipe` overwrites it once they hold what was erased.
6. A child of a fork can use none of this (forks.py).
7. Where a gallery's folder holds `gallery.key`, every file is sealed and every database encrypted (encryption/), and what is not is
   refused. Nothing above this module knows whether it is so.
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
from types import TracebackType
from typing import Any, Literal, Protocol, cast

from biodedup.errors import GalleryBusy, GalleryDamaged, InvalidInput, KeyMismatch, NotAGallery
from biodedup.gallery.files import forks
from biodedup.gallery.files.encryption.keyring import Key, KeyFile, key_file, new_key_file, register_key
from biodedup.gallery.files.encryption.sealed_file import (
    BLOCK_BYTES,
    MAGIC,
    SMALL_BLOCK_BYTES,
    NotAuthentic,
    SealedMap,
    SealedWriter,
)
from biodedup.gallery.files.encryption.turning import Turn
from biodedup.gallery.files.names import DATABASE_NAME, KEY_NAME, NEW_SUFFIX, SEGMENT_FOLDER, finished
from biodedup.gallery.files.private import (
    create_private,
    make_private_folder,
    refuse_link,
    refuse_no_file,
    replace_private,
)
from biodedup.keys import KEY_BYTES, KeySource

_BUFFER_BYTES = 1 << 20
_WIPED_BYTES_KEPT = 1 << 18
"""A wiped journal keeps its space up to this size: the next commit then needs no new blocks of the disk."""
ODD_CONTENT = (
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
"""Exceptions of Python for stored content that no writer wrote; the reader reports them as GalleryDamaged."""
_BUSY_S = 10.0  # that a connection waits for another one's lock
_READ_SINGLY = ".rest"  # the end of the name of a file whose rows are read singly (segments/layout.py)
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS}


class Lock(Protocol):
    def release(self) -> None: ...

    def is_held(self) -> bool:
        """Whether its file is still there: without it, another process can hold a lock of the same name."""


class NewFile(Protocol):
    """A file in the making."""

    def write(self, data: bytes | memoryview) -> None: ...

    def finish(self) -> None:
        """Syncs and closes: what was written is on the disk."""

    def discard(self) -> None:
        """Closes and removes; never fails."""


class Storage(Protocol):
    """What the gallery needs of a file system."""

    def list_names(self, folder: Path) -> list[str] | None:
        """Names in a folder; None where the folder does not exist."""

    def make_folder(self, folder: Path) -> None: ...

    def lock(self, path: Path) -> Lock:
        """The exclusive writer's lock. Raises GalleryBusy, naming the holder."""

    def unlock(self, folder: Path, *, new: bool) -> str | None:
        """Called before anything in a gallery is read. Returns the id of the register's key; None for a gallery in the clear. new: a
        gallery is created, and gets a key if this storage has one. Raises KeyMismatch, GalleryDamaged."""

    def register_chain_key(self, folder: Path) -> bytes | None:
        """Of the hash chain in PostgreSQL; folder: has the register's key file. None for a register in the clear. Raises KeyMismatch,
        GalleryDamaged."""

    def share_key(self, source: Path, target: Path, *, lost: bool = False) -> None:
        """Before a gallery is copied: the target gets the source's key, or stays in the clear as the source. lost: the target had this
        key, and holds files of it. Raises InvalidInput, KeyMismatch."""

    def share_turns(self, source: Path, target: Path, needed: Collection[str] | None) -> None:
        """After a gallery was copied: the target knows the transforms of the source, and of its own the needed ones. None: all of its own.
        Raises GalleryBusy where the source has lost a needed one meanwhile."""

    def turn(self, path: Path, turn_id: str) -> Turn:
        """The transform that embeddings in a file of a gallery are turned by. Raises GalleryDamaged where its secret is not there,
        KeyMismatch."""

    def turn_ids(self, folder: Path) -> list[str]:
        """Of the transforms whose secrets a gallery has, the newest last. Raises GalleryDamaged."""

    def add_turn(self, folder: Path) -> str:
        """Makes the secret of a new transform, and returns its id. Raises InvalidInput where the gallery is not encrypted, KeyMismatch."""

    def keep_turns(self, folder: Path, turn_ids: Collection[str]) -> None:
        """Destroys the secrets of all other transforms. Raises KeyMismatch."""

    def connect(self, path: Path, *, read_only: bool) -> sqlite3.Connection: ...

    def create(self, path: Path) -> NewFile:
        """Opens a file for writing, emptied if it was there."""

    def map(self, path: Path) -> mmap.mmap:
        """The content of a file, read-only, in memory as far as it is touched. Raises ValueError where it is empty or no file."""

    def forget(self, path: Path) -> None:
        """The system need not keep a file in memory. Never raises."""

    def replace(self, source: Path, target: Path) -> None:
        """Renames a file over another."""

    def claim(self, source: Path, target: Path) -> None:
        """Renames a file. Raises FileExistsError where the name is taken."""

    def wipe(self, path: Path) -> None:
        """Overwrites a file by zeros, synced; it may become shorter. Does nothing where it is absent."""

    def sync_folder(self, folder: Path) -> None:
        """Makes the names in a folder durable."""

    def remove(self, path: Path) -> None:
        """Removes a file, if it is there."""


def needs_key(folder: Path) -> InvalidInput:
    """The error of renewable templates in a gallery in the clear."""
    return InvalidInput(
        f"renewable templates need an encrypted gallery; state its key (Config.keys), or run `biodedup encrypt {folder}`"
    )


class FileLock:
    """An advisory lock on an open file, holding the process id of its owner."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._process = forks.Process()
        self._file = -1
        while not self.is_held():  # its file was removed by another process while it was opened here
            self.release()
            self._file = _open_lock(path)
            self._identity = _identity(os.fstat(self._file))
        forks.drop_in_child(self)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def is_held(self) -> bool:
        try:
            return self._file >= 0 and _identity(os.lstat(self._path)) == self._identity
        except FileNotFoundError:
            return False

    def release(self) -> None:
        if self._file >= 0 and self._process.is_this:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # a child that was just forked may not have closed its copy yet
            os.close(self._file)
        self._file = -1

    def drop(self) -> None:
        """In a child: the lock stays with the parent, whose file it is."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


def _open_lock(path: Path) -> int:
    """Locked. Raises GalleryBusy, naming the holder; NotAGallery where the file is not one that `FileLock` wrote."""
    refuse_link(path)
    refuse_no_file(path)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        about, content = os.fstat(file), os.pread(file, 64, 0)
        if about.st_nlink > 1 or len(content) > 32 or content.strip(b"0123456789\n"):
            raise NotAGallery(f"{path} is not a lock of this program; name another folder, or move that file away")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        holder = content.decode("ascii", "replace").strip() or "unknown"
        raise GalleryBusy(
            f"{path.parent} is held for writing by process {holder}; wait until it ends; what only reads works meanwhile: "
            "Engine.open(..., read_only=True), and commands such as identify and info"
        ) from None
    except BaseException:
        os.close(file)
        raise
    return file


def _identity(about: os.stat_result) -> tuple[int, int]:
    return about.st_dev, about.st_ino


class LocalFile:
    """A file in the making, on a POSIX file system. Its buffer is its own: a child of a fork would write out one of Python's."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = create_private(path)
        self._buffer = bytearray()

    def write(self, data: bytes | memoryview) -> None:
        if len(data) < _BUFFER_BYTES:
            self._buffer += data
            if len(self._buffer) >= _BUFFER_BYTES:
                self._flush()
        else:
            self._flush()
            _write_all(self._file, data)

    def finish(self) -> None:
        self._flush()
        os.fsync(self._file)
        self._close()

    def discard(self) -> None:
        with suppress(OSError):
            self._close()
        with suppress(OSError):  # the next writer removes what no manifest names
            self._path.unlink(missing_ok=True)

    def _flush(self) -> None:
        _write_all(self._file, self._buffer)
        self._buffer = bytearray()

    def _close(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def _write_all(file: int, data: bytes | bytearray | memoryview) -> None:
    rest = memoryview(data).cast("B")
    while len(rest):
        rest = rest[os.write(file, rest) :]


class Connection(sqlite3.Connection):
    """A connection that refuses to work in a child of a fork (forks.py)."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._process = forks.Process()
        forks.drop_in_child(self)

    def execute(self, *given: Any) -> sqlite3.Cursor:
        self._process.check()
        try:
            return super().execute(*given)
        except UnicodeDecodeError as error:  # of SQLite's own message, which quotes what is damaged
            raise sqlite3.DatabaseError("malformed database schema: a name is not UTF-8") from error

    def executemany(self, *given: Any) -> sqlite3.Cursor:
        self._process.check()
        return super().executemany(*given)

    def executescript(self, *given: Any) -> sqlite3.Cursor:
        self._process.check()
        return super().executescript(*given)

    def backup(self, *given: Any, **more: Any) -> None:
        self._process.check()
        super().backup(*given, **more)

    def close(self) -> None:
        if self._process.is_this:
            super().close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        return super().__exit__(kind, error, trace) if self._process.is_this else False

    def drop(self) -> None:
        forks.keep_for_ever(self)


class LocalStorage:
    """A POSIX file system. keys: where the register's key comes from, which is fetched here."""

    _register: Key | None = None
    _known: Key | None = None
    """The gallery key that was unwrapped last. A rotation, which leaves it, disturbs no process that has it."""

    def __init__(self, keys: KeySource | None = None) -> None:
        self._turns: dict[str, Turn] = {}
        """Those of each key file that was read, so that a reader knows a transform that was replaced since."""
        if keys is not None:
            self._register = register_key(keys)

    def unlock(self, folder: Path, *, new: bool) -> str | None:
        key = self._key_in(folder)
        if key is None and self._register is not None:
            if not new and _is_encrypted(folder / DATABASE_NAME):
                raise GalleryDamaged(
                    f"{folder / KEY_NAME} is missing; copy it from a backup of this gallery: nothing else opens it"
                )
            if not new:
                raise KeyMismatch(
                    f"{folder} is not encrypted, and a key was stated; leave the key out, or run `biodedup encrypt {folder}`"
                )
            replace_private(folder / KEY_NAME, new_key_file(self._register))
            self.sync_folder(folder)
        return None if self._register is None else self._register.key_id

    def register_chain_key(self, folder: Path) -> bytes | None:
        key = self._key_in(folder)
        return None if key is None else key.derived("chain of a register")

    def share_key(self, source: Path, target: Path, *, lost: bool = False) -> None:
        mine, there = stored_key(source), stored_key(target)
        if mine is None and there is None:
            return
        names = self.list_names(target) or ()
        others = there is None and (DATABASE_NAME in names or self.list_names(target / SEGMENT_FOLDER))
        if mine is not None and there is not None and there.gallery_key_id != mine.gallery_key_id:
            raise InvalidInput(f"{target} is another gallery or its backup; name an empty folder")
        if mine is None or (others and not lost):
            raise KeyMismatch(f"{target} and {source} are not both encrypted; name an empty folder")
        with key_file_lock(target):  # what the target holds stays readable
            self._put_key_file(target, mine, _turns_beside(mine, there))

    def share_turns(self, source: Path, target: Path, needed: Collection[str] | None) -> None:
        if (mine := stored_key(source)) is None:
            return
        with key_file_lock(target):
            there = stored_key(target)
            assert there is not None, "it was shared before"
            if needed is None:
                self._put_key_file(target, there, _turns_beside(there, mine))
                return
            turns = _turns_beside(mine, there)
            if not set(needed) <= turns.keys():
                raise GalleryBusy(f"the embeddings of {source} were turned while it was copied; run the backup again")
            self._put_key_file(target, mine, {n: w for n, w in turns.items() if n in mine.turns or n in needed})

    def _put_key_file(self, folder: Path, stored: KeyFile, turns: Mapping[str, bytes]) -> None:
        there, content = folder / KEY_NAME, stored.content(turns)
        if not there.exists() or _read_whole(there) != content:
            replace_private(there, content)
            self.sync_folder(folder)

    def _key_in(self, folder: Path) -> Key | None:
        """The key of a gallery; None where it has none. Raises KeyMismatch, GalleryDamaged."""
        stored = stored_key(folder)
        if stored is None:
            return None
        known = self._known
        if known is None or known.key_id != stored.gallery_key_id:
            self._known = known = stored.opened(self._register)
            self._learn_turns(stored)
        return known

    def turn(self, path: Path, turn_id: str) -> Turn:
        if turn_id not in self._turns:
            stored = stored_key(path.parent) or stored_key(path.parent.parent)
            if stored is not None:
                self._learn_turns(stored)
        if turn_id not in self._turns:
            raise GalleryDamaged(
                f"{KEY_NAME} lacks the transform {turn_id} of {path.name}; restore {KEY_NAME} from a backup of this gallery"
            )
        return self._turns[turn_id]

    def _learn_turns(self, stored: KeyFile) -> None:
        if self._register is not None and not stored.turns.keys() <= self._turns.keys():
            self._turns |= {name: Turn(secret) for name, secret in stored.turn_secrets(self._register).items()}

    def turn_ids(self, folder: Path) -> list[str]:
        stored = stored_key(folder)
        return [] if stored is None else list(stored.turns)

    def add_turn(self, folder: Path) -> str:
        turn = secrets.token_bytes(KEY_BYTES)
        self._change_turns(folder, lambda before: [*before.values(), turn])
        return Key(turn).key_id

    def keep_turns(self, folder: Path, turn_ids: Collection[str]) -> None:
        self._change_turns(folder, lambda before: [secret for name, secret in before.items() if name in turn_ids])

    def _change_turns(self, folder: Path, change: Callable[[dict[str, bytes]], list[bytes]]) -> None:
        with key_file_lock(folder):
            stored, register = stored_key(folder), self._register
            if stored is None or register is None:
                raise needs_key(folder)
            key, before = stored.opened(register), stored.turn_secrets(register)
            self._learn_turns(stored)
            after = change(before)
            if {Key(secret).key_id for secret in after} != before.keys():
                replace_private(folder / KEY_NAME, key_file(register, key.secret, after))
                self.sync_folder(folder)
                self._turns |= {Key(secret).key_id: Turn(secret) for secret in after}

    def _key_of(self, path: Path) -> Key | None:
        """The key of a file in a gallery, or of one outside that a job writes."""
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
        # A reader may have to roll back what a killed writer left half-done, so it opens the file for writing if it can.
        for name in (path.name, f"{path.name}-journal", f"{path.name}-wal"):
            refuse_no_file(path.with_name(name))
        mode = "rwc" if not read_only else "rw" if os.access(path, os.W_OK) and not path.is_symlink() else "ro"
        if not read_only:
            refuse_link(path)
            if (
                not path.exists()
            ):  # never opened here if it does: closing it would release SQLite's locks of this process
                os.close(create_private(path))
        uri = f"{path.absolute().as_uri()}?mode={mode}"
        connection = self._connected(uri, path)
        try:
            connection.execute(
                "PRAGMA trusted_schema=OFF"
            )  # the file may be another's: its schema runs no functions here
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
                    f"{path} does not open with the key in {KEY_NAME}: one of the two is damaged, or another gallery's; restore both from a "
                    "backup"
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
        connection.turns = partial(self.turn, path)
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
                raise ValueError(f"{path} is no regular file")
            if key is not None:
                return _sealed_map(file, key, path)
            if os.pread(file, len(MAGIC), 0) == MAGIC:
                raise NotAuthentic("it is encrypted, but the gallery is not")
            return mmap.mmap(file, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(file)

    def forget(self, path: Path) -> None:
        with suppress(OSError):  # it was only a hint
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
            for start in range(0, size, _BUFFER_BYTES):
                _write_all(file, bytes(min(_BUFFER_BYTES, size - start)))
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


def _turns_beside(stored: KeyFile, other: KeyFile | None) -> dict[str, bytes]:
    """The turn secrets of two key files of one register's key; those of the first one last."""
    more = other.turns if other is not None and other.register_key_id == stored.register_key_id else {}
    return {**{name: secret for name, secret in more.items() if name not in stored.turns}, **stored.turns}


@contextmanager
def key_file_lock(folder: Path) -> Iterator[None]:
    """Held while `gallery.key` is read and replaced: a rotation and a new transform do not lose each other's change."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def stored_key(folder: Path) -> KeyFile | None:
    """The key file of a gallery, still locked; None where it has none. Raises GalleryDamaged."""
    path = folder / KEY_NAME
    try:
        content = _read_whole(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return KeyFile.parse(path, content)


def database_secret(key: Key, path: Path) -> bytes:
    """The key of a database, from the gallery's key."""
    return key.derived(f"database {_bound_name(path)}")


def whole(storage: Storage, path: Path) -> mmap.mmap:
    """The content of a file, all of it. Raises as `Storage.map`, OSError, and GalleryDamaged where the key does not prove it."""
    content = storage.map(path)
    if isinstance(content, SealedMap):
        try:
            content.need(0, content.content_size)
        except NotAuthentic as error:
            raise GalleryDamaged(f"{path} is damaged: {error}; restore it from a backup") from None
    return content


def write_whole(storage: Storage, path: Path, content: bytes | memoryview) -> None:
    """Writes a file whole: under another name, synced, renamed. Raises OSError."""
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
    """Whether it is no database of SQLite's own format."""
    try:
        return not _read_whole(database).startswith(b"SQLite format 3\0")
    except OSError:
        return False


def _bound_name(path: Path) -> str:
    """What a file's content is bound to: its name, also while it is written."""
    return finished(path.name)


def _read_whole(path: Path) -> bytes:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        return os.read(file, 1 << 16) if stat.S_ISREG(os.fstat(file).st_mode) else b""
    finally:
        os.close(file)


def memory_bytes() -> int:
    """Of this machine, or as much as its control group grants."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        granted = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return physical
    return min(physical, int(granted)) if granted.isdecimal() else physical
