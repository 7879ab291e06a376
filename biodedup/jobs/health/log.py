"""Verifies the hash chain of a gallery, and signs checkpoints of it that are kept outside.

Owns the form of a checkpoint and its signature (Ed25519, RFC 8032). `gallery.care.log` checks the chain.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biodedup.common.arguments import checked
from biodedup.common.described import Described
from biodedup.config import Config
from biodedup.errors import GalleryDamaged, InvalidInput
from biodedup.gallery.care.log import LogReport, Mark, verify_chain
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.files.private import refuse_no_file, replace_private

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

__all__ = ["Checkpoint", "LogReport", "log_checkpoint", "verify_log"]

_FORMAT, _BYTES_MAX = 1, 65_536
_FIELDS = {"format": int, "gallery_id": str, "number": int, "commit": int, "chain": str, "time": float, "key": str}
_ABOUT = b"biodedup checkpoint 1\0"


@dataclass(frozen=True)
class Checkpoint(Described):
    """chain: the value of the chain at a commit; time: seconds since 1970; key: the public key, hexadecimal."""

    gallery_id: str
    commit: int
    chain: str
    time: float
    key: str


@checked
def verify_log(
    gallery: Path, config: Config | None = None, *, checkpoint: Path | None = None, key: Path | None = None
) -> LogReport:
    """Checks the chain of a gallery, its rows and the heads of its files. checkpoint: an earlier one, which has to be in this chain; key: PEM of
    the key that signed it; without it the signature proves only that the file is whole. Raises InvalidInput, NotAGallery, KeyMismatch."""
    storage = LocalStorage(None if config is None else config.keys)
    if checkpoint is None:
        return verify_chain(storage, gallery)
    document, wrong = _read(checkpoint, None if key is None else _public(key))
    mark = Mark(document["gallery_id"], document["number"], document["commit"], document["chain"])
    found = verify_chain(storage, gallery, None if wrong else mark)
    notes = found.notes
    if key is None and not wrong:
        notes = (
            *notes,
            f"no key was stated; the checkpoint is signed by {document['key']}: compare it with the auditor's",
        )
    return replace(found, problems=(*([wrong] if wrong else []), *found.problems), notes=notes)


@checked
def log_checkpoint(
    gallery: Path, key: Path, to: Path, config: Config | None = None, *, clock: Callable[[], float] = time.time
) -> Checkpoint:
    """Verifies the chain, and signs its newest value. key: an Ed25519 private key, PEM. Raises InvalidInput where `to` exists, GalleryDamaged
    where the chain is not sound; then nothing is written."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    if to.exists():
        raise InvalidInput(f"{to} exists, and a checkpoint is never replaced; name a new file")
    private = _private(key)
    found = verify_chain(LocalStorage(None if config is None else config.keys), gallery)
    if found.problems or found.mark is None:
        raise GalleryDamaged(f"the log of {gallery} is not sound: {found.problems[0]}; nothing was signed")
    public = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
    mark, at = found.mark, round(float(clock()), 3)
    values = (_FORMAT, mark.gallery_id, mark.number, mark.commits, mark.value, at, public)
    document = dict(zip(_FIELDS, values, strict=True))
    document["signature"] = private.sign(_signed(document)).hex()
    replace_private(to, json.dumps(document, indent=2).encode() + b"\n")
    return Checkpoint(mark.gallery_id, mark.commits, mark.value, at, public)


def _signed(document: dict[str, Any]) -> bytes:
    return _ABOUT + json.dumps({name: document[name] for name in _FIELDS}, sort_keys=True).encode()


def _read(path: Path, trusted: Ed25519PublicKey | None) -> tuple[dict[str, Any], str]:
    """(the checkpoint, what is wrong with its signature). Raises InvalidInput."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        document = json.loads(_bytes(path))
        if document["format"] != _FORMAT or any(type(document[name]) is not kind for name, kind in _FIELDS.items()):
            raise ValueError
        signer = trusted or Ed25519PublicKey.from_public_bytes(bytes.fromhex(document["key"]))
        signature = bytes.fromhex(document["signature"])
    except (KeyError, TypeError, ValueError, RecursionError):
        raise InvalidInput(
            f"{path} is no checkpoint of this format; name a file of `biodedup log checkpoint`"
        ) from None
    try:
        signer.verify(signature, _signed(document))
    except InvalidSignature:
        return document, f"the signature of checkpoint {path} is not of this key, or the checkpoint was changed"
    return document, ""


def _bytes(path: Path) -> bytes:
    try:
        refuse_no_file(path)
        with path.open("rb") as file:
            return file.read(_BYTES_MAX)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}; check its name") from None


def _private(path: Path) -> Any:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_bytes(path), None)
    except (TypeError, ValueError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidInput(
            f"{path} holds no Ed25519 private key without a passphrase (PEM); make one: openssl genpkey -algorithm ed25519"
        )
    return key


def _public(path: Path) -> Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    data = _bytes(path)
    if b"PRIVATE KEY" in data:
        public: Ed25519PublicKey = _private(path).public_key()
        return public
    try:
        key = load_pem_public_key(data)
    except ValueError:
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidInput(f"{path} holds no Ed25519 public key (PEM); name the key that signed the checkpoint")
    return key
