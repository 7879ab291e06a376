"""Keys of field kits: who may sign a batch file, and whom the centre trusts.

Owns the two key files and the trusted folder. Never reads a batch file. A private key never leaves its file but in memory, and
never reaches a log or an error.

A kit has `NAME.key` (private, mode 600), `NAME.pub`, which goes to the centre, and `NAME.state.json`, in which its sequence
numbers continue. Both key files are JSON around a PEM that other tools read, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biodedup.errors import InvalidInput
from biodedup.gallery.gallery import translated
from biodedup.gallery.private import make_private_folder
from biodedup.jobs.results import write_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE_BYTES = 64
FINGERPRINT_BYTES = 32
_KIT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, eq=False)
class PublicKey:
    """What the centre knows of a kit. made_at: seconds, by the clock of the machine that made the key."""

    kit_id: str
    made_at: float
    fingerprint: bytes
    """SHA-256 of the raw key."""
    key: Ed25519PublicKey = field(repr=False)

    def signed(self, signature: bytes, content: bytes) -> bool:
        from cryptography.exceptions import InvalidSignature

        try:
            self.key.verify(signature, content)
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True, eq=False)
class KitKey:
    """A kit's private key, with its public half."""

    public: PublicKey
    state: Path
    """The file in which the kit's sequence numbers continue."""
    key: Ed25519PrivateKey = field(repr=False)

    def sign(self, content: bytes) -> bytes:
        """64 bytes, the same for the same content."""
        return self.key.sign(content)


def make_keys(kit_id: str, out: Path, *, clock: Callable[[], float] = time.time) -> PublicKey:
    """Makes `out` (NAME.key), NAME.pub and NAME.state.json. Raises InvalidInput where one of them exists, StorageUnavailable."""
    require_cryptography()
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if not _KIT_ID.fullmatch(kit_id):
        raise InvalidInput(
            f"kit id {kit_id!r} is not usable; wanted 1 to 64 letters, digits, dots, hyphens, underscores"
        )
    if out.suffix != ".key":
        raise InvalidInput(f"the private key is named {out.name}; end it with .key, as kit.key")
    public_path, state = out.with_suffix(".pub"), state_of(out)
    for path in (out, public_path, state):
        if path.exists():
            raise InvalidInput(f"{path} exists already; keys are never overwritten: name another file")
    made = Ed25519PrivateKey.generate()
    made_at = round(clock(), 3)
    private = made.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()).decode()
    public = made.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo).decode()
    with translated(f"writing {out}"):
        make_private_folder(out.parent)
        with os.fdopen(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"kit_id": kit_id, "made_at": made_at, "private_key": private}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
    write_json({"kit_id": kit_id, "made_at": made_at, "public_key": public}, public_path)
    write_json({"kit_id": kit_id, "next_sequence": 1, "records": {}}, state)
    return _public(kit_id, made_at, made.public_key())


def state_of(key: Path) -> Path:
    return key.with_suffix(".state.json")


def load_key(path: Path) -> KitKey:
    """A kit's private key. Raises InvalidInput."""
    require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    fields = _fields(path, "private_key", "make one with `biodedup kit keys`")
    try:
        key = load_pem_private_key(fields["private_key"].encode(), None)
    except Exception:  # its text may quote what it was given
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidInput(f"{path} holds no Ed25519 private key; restore it, or make another with `biodedup kit keys`")
    return KitKey(_public(fields["kit_id"], fields["made_at"], key.public_key()), state_of(path), key)


def load_trusted(source: Path) -> dict[bytes, PublicKey]:
    """Fingerprint -> key, of a folder's `*.pub` files, or of one such file. A kit may have several keys, old and new.

    Raises InvalidInput.
    """
    require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    paths = sorted(source.glob("*.pub")) if source.is_dir() else [source]
    trusted = {}
    for path in paths:
        fields = _fields(path, "public_key", "copy the kit's .pub file again")
        try:
            key = load_pem_public_key(fields["public_key"].encode())
        except Exception:
            key = None
        if not isinstance(key, Ed25519PublicKey):
            raise InvalidInput(f"{path} holds no Ed25519 public key; copy the kit's .pub file again")
        public = _public(fields["kit_id"], fields["made_at"], key)
        trusted[public.fingerprint] = public
    if not trusted:
        raise InvalidInput(f"{source} holds no .pub files; copy there the .pub file of every kit that may send batches")
    return trusted


def require_cryptography() -> None:
    """Raises InvalidInput where the library that signs is not installed."""
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise InvalidInput(
            "field kits need the library `cryptography`, which is not installed; pip install 'biodedup[kit]'"
        ) from None


def _public(kit_id: str, made_at: float, key: Ed25519PublicKey) -> PublicKey:
    return PublicKey(kit_id, made_at, hashlib.sha256(key.public_bytes_raw()).digest(), key)


def _fields(path: Path, wanted: str, remedy: str) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text())
        sound = isinstance(fields[wanted], str) and isinstance(fields["made_at"], int | float)
        sound = sound and isinstance(fields["kit_id"], str) and bool(_KIT_ID.fullmatch(fields["kit_id"]))
    except FileNotFoundError:
        raise InvalidInput(f"{path} does not exist; {remedy}") from None
    except (OSError, ValueError, TypeError, KeyError):
        sound = False
    if not sound:
        raise InvalidInput(f"{path} is not a key file of a kit (kit_id, made_at, {wanted}); {remedy}")
    return dict(fields)
