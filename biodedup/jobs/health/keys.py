"""Makes a register's key, and turns galleries into encrypted ones and back.

Owns the file of a new key. `gallery/care/encrypting.py` does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from biodedup.common.arguments import checked
from biodedup.config import Config
from biodedup.errors import InvalidInput
from biodedup.gallery.care import encrypting
from biodedup.gallery.care.encrypting import KeyStatus, key_status
from biodedup.gallery.files.encryption.keyring import Key
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.files.private import make_private_folder, open_private
from biodedup.gallery.gallery import Gallery
from biodedup.jobs.shared.acting import Actor, authorised_job
from biodedup.keys import KeySource, fetched, new_key

__all__ = ["KeyStatus", "decrypt", "encrypt", "key_status", "make_register_key", "rotate_key"]


@checked
def rotate_key(
    folder: Path,
    before: KeySource,
    after: KeySource,
    config: Config | None = None,
    *,
    by: str = "",
    sign: Path | None = None,
) -> KeyStatus:
    """Wraps the gallery's key by another register's key, at once; processes that have the gallery open go on. The old key opens it no more, but
    opens backups that were made before. config: says who may do it; by: the person; sign: the file of its private key. Where the policy
    asks for two people, no other process may write meanwhile. Raises KeyMismatch, GalleryDamaged, NotAllowed, ApprovalNeeded,
    StorageUnavailable."""
    new = fetched(after)  # once: the key that is approved is the one that is taken
    new_id = Key(new).key_id
    if key_status(folder).register_key_id not in (None, new_id):  # otherwise a run that was repeated, or a mistake
        _approved(folder, before, config, Actor(by, sign), {"rotate": new_id})
    return encrypting.rotate(folder, before, lambda: new)


@checked
def encrypt(
    folder: Path, keys: KeySource, config: Config | None = None, *, by: str = "", sign: Path | None = None
) -> KeyStatus:
    """Turns a gallery in the clear into an encrypted one. Needs free space of its size, and no writer. Done already, it only removes what
    an interrupted run left. config, by, sign: as in `rotate_key`. Raises KeyMismatch, GalleryBusy, GalleryDamaged, NotAllowed,
    ApprovalNeeded, StorageUnavailable; then the gallery is as it was."""
    if key_status(folder).encrypted:
        return encrypting.encrypt(folder, keys)
    key = fetched(keys)  # once, as in `rotate_key`
    _approved(folder, None, config, Actor(by, sign), {"encrypt": Key(key).key_id})
    return encrypting.encrypt(folder, lambda: key)


@checked
def decrypt(
    folder: Path, keys: KeySource, config: Config | None = None, *, by: str = "", sign: Path | None = None
) -> KeyStatus:
    """Turns an encrypted gallery into one in the clear, as `encrypt`."""
    if (status := key_status(folder)).encrypted:
        _approved(folder, keys, config, Actor(by, sign), {"decrypt": status.register_key_id})
    return encrypting.decrypt(folder, keys)


def _approved(
    folder: Path, keys: KeySource | None, config: Config | None, actor: Actor, facts: Mapping[str, Any]
) -> None:
    """Returns once the key may be changed. Raises NotAllowed, ApprovalNeeded, GalleryBusy."""
    config = config or Config()
    actor.principal(config, "administer")
    storage = LocalStorage(keys)
    with closing(Gallery.open_to_read(folder, storage, config.gallery)) as gallery:
        if "key" not in gallery.policies[-1].policy.two_people:
            return
    with closing(Gallery.open(folder, storage=storage, config=config.gallery, settings={}, gallery_id="")) as gallery:
        with authorised_job(actor, gallery, config, "key", facts, role="administer", kind="key") as begin:
            with gallery.transaction() as transaction:
                begin(transaction)


@checked
def make_register_key(file: Path) -> str:
    """Writes a new key, 32 random bytes in hexadecimal, and returns its id. Raises InvalidInput where the file exists,
    StorageUnavailable."""
    key = new_key()
    if file.exists():
        raise InvalidInput(f"{file} exists, and a key is never replaced; name a new file")
    with translated(f"writing {file}"):
        make_private_folder(file.parent)
        with open_private(file, exclusive=True) as opened:
            opened.write(key.hex().encode() + b"\n")
    return Key(key).key_id
