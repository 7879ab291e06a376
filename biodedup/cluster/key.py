"""The key of an encrypted register: which key file a front-end or an actor works with.

Owns where the key file is: a row of `meta` in PostgreSQL, and a copy beside each machine's segments, so that the files there are sealed and
opened as those of an encrypted folder are (gallery/files/encryption/). Never derives a key and never encrypts.

The key file holds the gallery's key, wrapped by the register's key (`Config.keys`), which is in neither place. Rows of PostgreSQL are not
encrypted by it: the journal's templates and the decisions are as safe as the server and its disks.
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
"""The row of `meta`; '' or absent in a register without encryption."""


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
    """Puts a register's key file into the folder that has `segments`, and unlocks it.

    key_id: of `new_key`; content: of the row. Raises KeyMismatch where the stated key is not the register's, or one of them has none;
    InvalidInput where the folder is that of another register; GalleryDamaged.
    """
    with key_file_lock(folder):  # front-ends of a machine may share it
        _put(folder, key_id, content)
    storage.unlock(folder, new=False)


def _put(folder: Path, key_id: str, content: str) -> None:
    there = stored_key(folder)
    if not content:
        if key_id:
            raise KeyMismatch(
                f"the register is not encrypted, got key {key_id}; leave keys out, or export it to a folder, run `biodedup encrypt`, and "
                "import that as a new register"
            )
        if there is not None:
            raise _of_another(folder)
        return
    known = KeyFile.parse(folder / KEY_NAME, content.encode())
    if known.turns:
        raise InvalidInput("renewable templates are for a gallery in a folder; run `biodedup key rekey --plain` before")
    if known.register_key_id != key_id:
        raise KeyMismatch(
            f"the register is encrypted under key {known.register_key_id}, got {f'key {key_id}' if key_id else 'no key'}; nothing changed; "
            "state its key by Config(keys=...), or `keys` in the settings file"
        )
    if there is not None and there.gallery_key_id != known.gallery_key_id:
        raise _of_another(folder)
    if there != known:
        replace_private(folder / KEY_NAME, content.encode())


def _of_another(folder: Path) -> InvalidInput:
    return InvalidInput(f"{folder} holds the copies of another register; name another folder by ClusterConfig.cache")


@dataclass(frozen=True)
class ActorKey:
    """What an actor needs to open an encrypted register on its node. provider: fields of a `KeyProvider`, which fetches the key there; the key
    itself does not travel."""

    provider: dict[str, Any]
    content: str

    @classmethod
    def of(cls, keys: KeySource | None, content: str) -> ActorKey | None:
        """None for a register without encryption. Raises InvalidInput for a function, which other machines do not have."""
        if keys is None:
            return None
        if not isinstance(keys, KeyProvider):
            raise InvalidInput("actors of Ray fetch the key on their nodes; state it by a KeyProvider, got a function")
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(keys).items()}
        return cls(plain, content)

    def sent(self) -> tuple[dict[str, Any], str]:
        return self.provider, self.content


def actor_storage(sent: tuple[dict[str, Any], str] | None, folder: Path) -> Storage:
    """The storage of an actor, whose folder is unlocked. sent: of `ActorKey.sent`. Raises as `place`, and as `KeyProvider`."""
    if sent is None:
        return LocalStorage()
    provider, content = sent
    file = provider["file"]
    storage = LocalStorage(KeyProvider(**{**provider, "file": None if file is None else Path(file)}))
    place(storage, folder, new_key(storage).key_id, content)
    return storage
