"""The key file of an encrypted register: stores it, and gives it to front-ends and actors.

Owns the two places of the key file: a row of `meta` in PostgreSQL, and a copy beside each machine's segments. With the copy, segment files
are encrypted and decrypted as in a folder (gallery/files/encryption/). Never derives a key and never encrypts.

The key file holds the gallery's key, wrapped by the register's key (`Config.keys`). The register's key is in neither place. It does not
encrypt rows of PostgreSQL: templates in the journal and decisions are only as safe as the server and its disks.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from biodedup.errors import InvalidInput, KeyMismatch
from biodedup.gallery.files.encryption.keyring import KeyFile
from biodedup.gallery.files.filesystem import LocalStorage, Storage, key_file_lock, stored_key
from biodedup.gallery.files.names import KEY_NAME
from biodedup.gallery.files.private import replace_private
from biodedup.keys import KeyProvider, KeySource

KEY_SETTING = "key_file"
"""The row of `meta` with the key file; empty or absent in a register without encryption."""


@dataclass(frozen=True)
class NewKey:
    """For a new register. key_id: of the register's key that a storage has; content: of a key file; chain_key: of the hash chain. Two empty
    texts and None without a key."""

    key_id: str = ""
    content: str = ""
    chain_key: bytes | None = field(default=None, repr=False)


def new_key(storage: Storage) -> NewKey:
    with tempfile.TemporaryDirectory(prefix="biodedup-key-") as scratch:
        folder = Path(scratch)
        key_id = storage.unlock(folder, new=True)
        if not key_id:
            return NewKey()
        return NewKey(key_id, (folder / KEY_NAME).read_text(), storage.register_chain_key(folder))


def chain_key_of(storage: Storage, content: str) -> bytes | None:
    """Of the hash chain of a register with this key file; None for "". Raises KeyMismatch, GalleryDamaged."""
    if not content:
        return None
    with tempfile.TemporaryDirectory(prefix="biodedup-key-") as scratch:
        folder = Path(scratch)
        replace_private(folder / KEY_NAME, content.encode())
        return storage.register_chain_key(folder)


def place(storage: Storage, folder: Path, key_id: str, content: str) -> None:
    """Writes a register's key file into the folder of its local copies, and unlocks the folder.

    key_id: from `new_key`, "" without a key; content: the register's key file, "" without encryption. Raises KeyMismatch if the key is not
    the register's, or only one of the two is empty; InvalidInput if the folder belongs to another register; GalleryDamaged.
    """
    with key_file_lock(folder):  # front-ends on one machine may share the folder
        _put(folder, key_id, content)
    storage.unlock(folder, new=False)


def _put(folder: Path, key_id: str, content: str) -> None:
    there = stored_key(folder)
    if not content:
        if key_id:
            raise KeyMismatch(
                f"the register is not encrypted, got key {key_id}; leave keys out, or export the register to a folder, run `biodedup encrypt`, "
                "and import the folder as a new register"
            )
        if there is not None:
            raise _of_another(folder)
        return
    known = KeyFile.parse(folder / KEY_NAME, content.encode())
    if known.transforms:
        raise InvalidInput(
            "a register does not support renewable templates; run `biodedup key rekey --plain` before the import"
        )
    if known.register_key_id != key_id:
        raise KeyMismatch(
            f"the register is encrypted with key {known.register_key_id}, got {f'key {key_id}' if key_id else 'no key'}; nothing changed; "
            "state its key by Config(keys=...), or `keys` in the settings file"
        )
    if there is not None and there.gallery_key_id != known.gallery_key_id:
        raise _of_another(folder)
    if there != known:
        replace_private(folder / KEY_NAME, content.encode())


def _of_another(folder: Path) -> InvalidInput:
    return InvalidInput(f"{folder} holds the copies of another register; name another folder in ClusterConfig.cache")


@dataclass(frozen=True)
class ActorKey:
    """What an actor needs to open an encrypted register on its node. provider: the fields of a `KeyProvider`, which fetches the key on that
    node: the key itself is not sent; content: the key file."""

    provider: dict[str, Any]
    content: str

    @classmethod
    def of(cls, keys: KeySource | None, content: str) -> ActorKey | None:
        """The `ActorKey`, or None without keys. Raises InvalidInput if `keys` is a function, which cannot be sent to other machines."""
        if keys is None:
            return None
        if not isinstance(keys, KeyProvider):
            raise InvalidInput("keys is a function, wanted a KeyProvider; Ray actors fetch the key on their own nodes")
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(keys).items()}
        return cls(plain, content)

    def sent(self) -> tuple[dict[str, Any], str]:
        """As plain values for a message."""
        return self.provider, self.content


def actor_storage(sent: tuple[dict[str, Any], str] | None, folder: Path) -> Storage:
    """The storage of an actor, with its folder unlocked. sent: from `ActorKey.sent`. Raises as `place`, and as `KeyProvider`."""
    if sent is None:
        return LocalStorage()
    provider, content = sent
    file = provider["file"]
    storage = LocalStorage(KeyProvider(**{**provider, "file": None if file is None else Path(file)}))
    place(storage, folder, new_key(storage).key_id, content)
    return storage
