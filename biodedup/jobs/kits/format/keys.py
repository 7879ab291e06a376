"""Key files: a kit's signing key, and the centre's key to which batches are encrypted.

Owns the key files: making, reading, passphrases. `trust.py` owns which keys the centre trusts. Never reads a batch file. A private key or a
passphrase never reaches a log or an error.

A kit has `NAME.key` (private), `NAME.pub`, which goes to the centre, and `NAME.state.json`, in which its sequence numbers continue. The
centre has `NAME.key` (private) and `NAME.pub`, which goes to every kit. A key file is JSON around a PEM (PKCS#8) that other tools read; with
a passphrase the PEM is encrypted (`BestAvailableEncryption` of the library `cryptography`: PBES2).
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
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.private import make_private_folder, open_private, replace_private
from biodedup.jobs.shared.files import read_bounded, write_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

SIGNATURE_BYTES = 64
FINGERPRINT_BYTES = 32
LIFETIME_DAYS = 730
"""After so many days a key expires, unless its maker or the centre said otherwise."""
PASSPHRASE_CHARACTERS_MIN = 10
_DAY_S = 86_400.0
_DAYS_MAX = 3_650
_KEY_FILE_BYTES_MAX = 16 << 10
_LATEST = 1e11  # seconds: beyond it there is no calendar
_KIT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ENCRYPTED = "-----BEGIN ENCRYPTED PRIVATE KEY-----"


@dataclass(frozen=True, eq=False)
class PublicKey:
    """The public half of a kit's key. made_at, expires_at: seconds, by the clock of the machine that made the key."""

    kit_id: str
    made_at: float
    fingerprint: bytes
    """SHA-256 of the raw key."""
    key: Ed25519PublicKey = field(repr=False)
    expires_at: float

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


@dataclass(frozen=True, eq=False)
class CentrePublic:
    """The public half of a centre's key: batches are encrypted to it. fingerprint: SHA-256 of the raw key."""

    fingerprint: bytes
    key: X25519PublicKey = field(repr=False)


@dataclass(frozen=True, eq=False)
class CentreKey:
    """A centre's private key, with its public half."""

    public: CentrePublic
    key: X25519PrivateKey = field(repr=False)


# making -----------------------------------------------------------------------------------------------------------


def make_keys(
    kit_id: str,
    out: Path,
    *,
    passphrase: str | None = None,
    days: int = LIFETIME_DAYS,
    clock: Callable[[], float] = time.time,
) -> PublicKey:
    """Makes `out` (NAME.key), NAME.pub and NAME.state.json. passphrase: encrypts NAME.key; None leaves it to the disk's encryption. days:
    until the key expires. Raises InvalidInput where one of the files exists, StorageUnavailable."""
    require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if not _KIT_ID.fullmatch(kit_id):
        raise InvalidInput(
            f"kit id {kit_id!r} is not usable; wanted 1 to 64 letters, digits, dots, hyphens, underscores"
        )
    if not 1 <= days <= _DAYS_MAX:
        raise InvalidInput(f"a key of {days} days was asked for; wanted 1 to {_DAYS_MAX:,}")
    state = state_of(out)
    _check_new(out, state)
    made, made_at = Ed25519PrivateKey.generate(), round(clock(), 3)
    about = {"kit_id": kit_id, "made_at": made_at, "expires_at": made_at + days * _DAY_S}
    _write_pair(out, about, made, passphrase)
    replace_private(state, json.dumps({"kit_id": kit_id, "next_sequence": 1, "records": {}}).encode())
    return _public(about, made.public_key())


def make_centre_key(
    out: Path, *, passphrase: str | None = None, clock: Callable[[], float] = time.time
) -> CentrePublic:
    """Makes the centre's `out` (NAME.key) and NAME.pub, which goes to every kit. Without NAME.key and its passphrase no batch can be read:
    keep a copy. Raises InvalidInput where one of the files exists, StorageUnavailable."""
    require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    _check_new(out)
    made = X25519PrivateKey.generate()
    _write_pair(out, {"centre": True, "made_at": round(clock(), 3)}, made, passphrase)
    return _centre(made.public_key())


def _check_new(out: Path, *others: Path) -> None:
    if out.suffix != ".key":
        raise InvalidInput(f"the private key cannot be named {out.name}; end the name with .key, such as kit.key")
    for path in (out, out.with_suffix(".pub"), *others):
        if path.exists():
            raise InvalidInput(f"{path} exists already; keys are never overwritten: name another file")


def _write_pair(out: Path, about: dict[str, Any], made: Any, passphrase: str | None) -> None:
    """The private key's file, mode 600, and the public one's."""
    from cryptography.hazmat.primitives import serialization as form

    if passphrase is not None and len(passphrase) < PASSPHRASE_CHARACTERS_MIN:
        raise InvalidInput(
            f"the passphrase has {len(passphrase)} characters, wanted at least {PASSPHRASE_CHARACTERS_MIN}; use several words"
        )
    hidden = form.NoEncryption() if passphrase is None else form.BestAvailableEncryption(passphrase.encode())
    private = made.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, hidden).decode()
    public = made.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo).decode()
    with translated(f"writing {out}"):
        make_private_folder(out.parent)
        with open_private(out, exclusive=True) as file:
            file.write(json.dumps(about | {"private_key": private}, indent=2).encode())
            file.flush()
            os.fsync(file.fileno())
    write_json(about | {"public_key": public}, out.with_suffix(".pub"))


# reading ----------------------------------------------------------------------------------------------------------


def state_of(key: Path) -> Path:
    return key.with_suffix(".state.json")


def needs_passphrase(path: Path) -> bool:
    """Whether the private key in this file is encrypted. Raises InvalidInput where it is no key file."""
    return str(_fields(path, "private_key", "name a .key file")["private_key"]).startswith(_ENCRYPTED)


def load_key(path: Path, passphrase: str | None = None) -> KitKey:
    """A kit's private key. Raises InvalidInput."""
    require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    remedy = "make one with `biodedup kit keys`"
    fields = _kit_fields(path, "private_key", remedy)
    key = _private(path, fields, passphrase)
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidInput(f"{path} holds no Ed25519 private key; restore it, or {remedy}")
    return KitKey(_public(fields, key.public_key()), state_of(path), key)


def load_public(path: Path) -> PublicKey:
    """The public half of a kit's key. Raises InvalidInput."""
    require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    remedy = "copy the kit's .pub file again"
    fields = _kit_fields(path, "public_key", remedy)
    key = _public_of(fields)
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidInput(f"{path} holds no Ed25519 public key; {remedy}")
    return _public(fields, key)


def load_centre_key(path: Path, passphrase: str | None = None) -> CentreKey:
    """The centre's private key. Raises InvalidInput."""
    require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    remedy = "restore the centre's key, or make one with `biodedup kit centre-key`"
    key = _private(path, _fields(path, "private_key", remedy), passphrase)
    if not isinstance(key, X25519PrivateKey):
        raise InvalidInput(f"{path} holds no X25519 private key of a centre; {remedy}")
    return CentreKey(_centre(key.public_key()), key)


def load_centre_public(path: Path) -> CentrePublic:
    """The public half of the centre's key, as kits have it. Raises InvalidInput."""
    require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

    remedy = "copy the .pub file that the centre made with `biodedup kit centre-key`"
    key = _public_of(_fields(path, "public_key", remedy))
    if not isinstance(key, X25519PublicKey):
        raise InvalidInput(f"{path} holds no X25519 public key of a centre; {remedy}")
    return _centre(key)


def require_cryptography() -> None:
    """Raises InvalidInput where the library that signs is not installed."""
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise InvalidInput(
            "field kits need the library `cryptography`, which is not installed; pip install 'biodedup[kit]'"
        ) from None


def _private(path: Path, fields: dict[str, Any], passphrase: str | None) -> object:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    encrypted = fields["private_key"].startswith(_ENCRYPTED)
    if encrypted and passphrase is None:
        raise InvalidInput(f"{path} is encrypted, and no passphrase was given; give its passphrase")
    try:
        return load_pem_private_key(
            fields["private_key"].encode(), passphrase.encode() if encrypted and passphrase else None
        )
    except Exception:  # its text may quote what it was given
        if encrypted:
            raise InvalidInput(f"{path} does not open with this passphrase; give the right one") from None
        return None


def _public_of(fields: dict[str, Any]) -> object:
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        return load_pem_public_key(fields["public_key"].encode())
    except Exception:
        return None


def _public(about: dict[str, Any], key: Ed25519PublicKey) -> PublicKey:
    made_at = float(about["made_at"])
    expires_at = float(about.get("expires_at", made_at + LIFETIME_DAYS * _DAY_S))
    expires_at = min(expires_at, made_at + _DAYS_MAX * _DAY_S)  # the kit's own word
    return PublicKey(about["kit_id"], made_at, hashlib.sha256(key.public_bytes_raw()).digest(), key, expires_at)


def _centre(key: X25519PublicKey) -> CentrePublic:
    return CentrePublic(hashlib.sha256(key.public_bytes_raw()).digest(), key)


def _fields(path: Path, wanted: str, remedy: str) -> dict[str, Any]:
    try:
        fields = json.loads(read_bounded(path, _KEY_FILE_BYTES_MAX))
        times = [fields["made_at"], fields.get("expires_at", 0)]
        sound = isinstance(fields[wanted], str) and all(
            isinstance(at, int | float) and 0 <= at <= _LATEST for at in times
        )
    except FileNotFoundError:
        raise InvalidInput(f"{path} does not exist; {remedy}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise InvalidInput(f"{path} is not a key file (made_at, {wanted}); {remedy}")
    return dict(fields)


def _kit_fields(path: Path, wanted: str, remedy: str) -> dict[str, Any]:
    fields = _fields(path, wanted, remedy)
    if not (isinstance(fields.get("kit_id"), str) and _KIT_ID.fullmatch(fields["kit_id"])):
        raise InvalidInput(f"{path} is not a key file of a kit (kit_id, made_at, {wanted}); {remedy}")
    return fields
