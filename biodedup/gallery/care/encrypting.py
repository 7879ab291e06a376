"""Encrypts a gallery in the clear, decrypts an encrypted gallery, and rotates the register's key.

Owns the copy that is made, and the exchange of the two folders. Never changes the content of a gallery.

1. The copy is a complete gallery in the folder `.NAME.new` beside the old one. It is verified, and then exchanged with the old folder in
   one step (`renameat2` with RENAME_EXCHANGE). So the gallery is completely in the clear or completely encrypted at every moment.
2. After an interruption, the next run uses the complete files of the copy.
3. A rotation only rewrites `gallery.key`. The gallery's own key does not change.
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from biodedup.common.described import Described
from biodedup.errors import GalleryBusy, GalleryDamaged, InvalidInput, NotAGallery, StorageUnavailable
from biodedup.gallery.care.backup import copy_canaries, copy_gallery
from biodedup.gallery.care.log import verify_chain
from biodedup.gallery.care.removal import refuse_foreign, remove_gallery
from biodedup.gallery.care.verify import inspect
from biodedup.gallery.files.encryption.keyring import Key, key_file, register_key
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import LocalStorage, Storage, database_secret, key_file_lock, stored_key
from biodedup.gallery.files.names import (
    BACKLOG_NAME,
    DATABASE_NAME,
    KEY_NAME,
    LEDGER_NAME,
    LOCK_NAME,
    MERGES_FOLDER,
    NEW_SUFFIX,
    READERS_NAME,
    SEGMENT_FOLDER,
)
from biodedup.gallery.files.private import replace_private
from biodedup.keys import KeySource

_DATABASES = (DATABASE_NAME, BACKLOG_NAME, LEDGER_NAME, READERS_NAME)
_AT_CWD, _EXCHANGE = -100, 2
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


@dataclass(frozen=True)
class KeyStatus(Described):
    """The encryption of a gallery. register_key_id, gallery_key_id: ids of its keys, which do not reveal the keys; None in the clear."""

    encrypted: bool
    register_key_id: str | None
    gallery_key_id: str | None


def key_status(folder: Path) -> KeyStatus:
    """The status of a gallery. It needs no key. Raises GalleryDamaged, StorageUnavailable, NotAGallery if there is no gallery."""
    with translated(f"reading {folder}"):
        _refuse_absent(folder)
        stored = stored_key(folder)
    if stored is None:
        return KeyStatus(False, None, None)
    return KeyStatus(True, stored.register_key_id, stored.gallery_key_id)


def rotate(folder: Path, before: KeySource, after: KeySource) -> KeyStatus:
    """Wraps the gallery's key with another register's key. Processes that have the gallery open can continue. The old key does not open the
    gallery any more, but still opens earlier backups. Raises KeyMismatch, GalleryDamaged, StorageUnavailable."""
    with translated(f"rotating the key of {folder}"):
        _refuse_absent(folder)
        new, old = register_key(after), register_key(before)
        with key_file_lock(folder):
            stored = stored_key(folder)
            if stored is None:
                raise InvalidInput(f"{folder} is not encrypted; run `biodedup encrypt {folder}`")
            if stored.register_key_id != new.key_id:  # otherwise the rotation was done before
                secret, transforms = stored.opened(old).secret, stored.transform_secrets(old)
                replace_private(folder / KEY_NAME, key_file(new, secret, transforms.values()))
                LocalStorage().sync_folder(folder)
        stored = stored_key(folder)
        if stored is None or stored.register_key_id != new.key_id:
            raise GalleryBusy(f"another process rotated the key of {folder}; run `biodedup key status`")
        stored.opened(new)
    return key_status(folder)


def encrypt(folder: Path, keys: KeySource) -> KeyStatus:
    """Encrypts a gallery that is in the clear. It needs free disk space of the gallery's size, and no writer may run. If the gallery is
    encrypted already, it only removes the rest of an interrupted run. Raises KeyMismatch, GalleryBusy, GalleryDamaged, StorageUnavailable;
    then the gallery is unchanged."""
    return _converted(folder, keys, encrypts=True)


def decrypt(folder: Path, keys: KeySource) -> KeyStatus:
    """Decrypts an encrypted gallery. Conditions and errors are those of `encrypt`."""
    return _converted(folder, keys, encrypts=False)


class _ConvertingStorage(LocalStorage):
    """A storage over two folders, of which exactly one is encrypted. The copied databases have the source's encryption until `_rekey`."""

    def __init__(self, keys: KeySource, source: Path, target: Path, *, encrypts: bool) -> None:
        super().__init__(keys)
        self._source, self._target, self.encrypts = source, target, encrypts

    def unlock(self, folder: Path, *, new: bool) -> str | None:
        return super().unlock(folder, new=new) if (folder == self._target) == self.encrypts else None

    def key(self) -> Key:
        """The key of the encrypted folder."""
        key = self._key_in(self._target if self.encrypts else self._source)
        assert key is not None, "it was unlocked"
        return key

    def _key_of(self, path: Path) -> Key | None:
        in_target = self._target in path.parents
        return self.key() if in_target == self.encrypts else None

    def _database_key(self, path: Path) -> Key | None:
        return None if self.encrypts else self.key()


def _converted(folder: Path, keys: KeySource, *, encrypts: bool) -> KeyStatus:
    """Makes an encrypted or decrypted copy of a gallery, and exchanges it with the gallery."""
    folder = Path(os.path.abspath(folder))
    new = folder.with_name(f".{folder.name}{NEW_SUFFIX}")
    doing = f"{'encrypting' if encrypts else 'decrypting'} {folder}"
    with translated(doing):
        _refuse_absent(folder)
        storage = _ConvertingStorage(keys, folder, new, encrypts=encrypts)
        if (stored_key(folder) is not None) == encrypts:
            LocalStorage(keys if encrypts else None).unlock(folder, new=False)
            _remove(storage, new)
            return key_status(folder)
        storage.unlock(folder, new=False)
        lock = storage.lock(folder / LOCK_NAME)
        try:
            refuse_foreign(storage, new)
            _refuse_renewable(folder)
            _refuse_wrong_log(storage, folder)
            storage.make_folder(new)
            other = storage.lock(new / LOCK_NAME)
            try:
                _copy(storage, folder, new, keys if encrypts else None)
                _exchange(folder, new)
                storage.sync_folder(folder.parent)
            finally:
                other.release()
        finally:
            lock.release()
        _remove(storage, new)
    return key_status(folder)


def _refuse_renewable(folder: Path) -> None:
    """Raises InvalidInput for a gallery with renewable templates: their secrets are in `gallery.key`, which a gallery in the clear
    lacks."""
    stored = stored_key(folder)
    if stored is not None and stored.transforms:
        raise InvalidInput(f"{folder} has renewable templates; nothing changed; run `biodedup key rekey --plain` first")


def _refuse_wrong_log(storage: Storage, folder: Path) -> None:
    """Raises GalleryDamaged if the hash chain has problems. The copy computes its digests again, which would hide them."""
    report = verify_chain(storage, folder)
    if report.links and report.problems:
        raise GalleryDamaged(
            f"the log of {folder} is damaged: {report.problems[0]}; nothing changed; run `biodedup log verify`, and restore a backup"
        )


def _copy(storage: _ConvertingStorage, folder: Path, new: Path, keys: KeySource | None) -> None:
    for name in _DATABASES:  # remove those of an interrupted run
        for end in ("", "-journal"):
            storage.remove(new / (name + end))
            storage.remove(new / (name + NEW_SUFFIX + end))
    storage.unlock(new, new=True)
    storage.make_folder(new / SEGMENT_FOLDER)
    copy_gallery(storage, folder, new, check_kept=True)
    copy_canaries(storage, folder, new)
    _rekey(storage, new)
    if problems := inspect(LocalStorage(keys), new):
        raise GalleryDamaged(f"the copy in {new} is damaged: {problems[0]}; nothing changed; run `biodedup doctor`")
    for path in (new / SEGMENT_FOLDER, new):
        storage.sync_folder(path)


def _rekey(storage: _ConvertingStorage, new: Path) -> None:
    from biodedup.gallery.files.encryption.database import rekey

    for name in _DATABASES:
        path = new / name
        if path.exists():
            secret = database_secret(storage.key(), path)
            rekey(str(path), *((None, secret) if storage.encrypts else (secret, None)))
            storage.remove(path.with_name(f"{name}-journal"))


def _exchange(one: Path, other: Path) -> None:
    """Exchanges the names of two folders in one step. Raises StorageUnavailable if the file system cannot do this."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_CWD, os.fsencode(one), _AT_CWD, os.fsencode(other), _EXCHANGE) == 0:
        return
    number = ctypes.get_errno()
    if number not in _NO_EXCHANGE:
        raise OSError(number, os.strerror(number), str(one))
    raise StorageUnavailable(
        f"the file system of {one} cannot exchange two folders; move the gallery to a local disk, encrypt it there and move it back"
    )


def _remove(storage: _ConvertingStorage, old: Path) -> None:
    """Removes the copy that is no longer needed."""
    if storage.list_names(old) is None:
        return
    logs = old / MERGES_FOLDER
    for name in storage.list_names(logs) or ():
        storage.remove(logs / name)
    with suppress(OSError):
        logs.rmdir()
    remove_gallery(storage, old)


def _refuse_absent(folder: Path) -> None:
    if not (folder / DATABASE_NAME).is_file():
        raise NotAGallery(f"{folder} holds no gallery; name the folder of a gallery")
