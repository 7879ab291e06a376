"""The keys of a register and of its galleries: derivation, wrapping, and the key file `gallery.key`.

Owns the derivation of keys and the format of `gallery.key`. Never reads a template, and never writes a file.

Method: envelope encryption with three levels of keys (key wrapping, NIST SP 800-57):

| key | stored | purpose |
|---|---|---|
| register's key | outside of the gallery: a file, a variable, a KMS | wraps the gallery keys; its rotation only rewrites `gallery.key` |
| gallery key | `gallery.key`, wrapped | wraps the data keys; the database's key is derived from it |
| data key | the head of each file, wrapped | encrypts this one file |

A gallery of renewable templates also has transform secrets in `gallery.key`, each wrapped by the register's key. The transforms of stored
embeddings are derived from them (transform.py).

Keys are wrapped with AES-256-GCM (NIST SP 800-38D) and a random nonce, and derived with HKDF-SHA256 (RFC 5869) for a purpose. `key_id` is
derived from the key. It distinguishes a wrong key from a damaged file.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from biodedup.errors import GalleryDamaged, InvalidInput, KeyMismatch
from biodedup.gallery.files.names import KEY_NAME
from biodedup.keys import KEY_BYTES, KeySource, fetched

NONCE_BYTES, TAG_BYTES = 12, 16
WRAPPED_BYTES = NONCE_BYTES + KEY_BYTES + TAG_BYTES
_FORMAT, _FORMAT_WITH_TRANSFORMS = 1, 2
_KEY_FILE_BYTES_MAX = 8192
_ABOUT_GALLERY_KEY = b"biodedup gallery key 1\0"
_ABOUT_TRANSFORM = b"biodedup turn 1\0"


@dataclass(frozen=True)
class Key:
    """A key of 32 bytes, which wraps and derives other keys."""

    secret: bytes = field(repr=False)

    @cached_property
    def key_id(self) -> str:
        """16 hexadecimal digits that identify the key without revealing it."""
        return self.derived("key id")[:8].hex()

    def derived(self, purpose: str) -> bytes:
        """A key of 32 bytes for one purpose."""
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        return HKDF(SHA256(), KEY_BYTES, None, f"biodedup {purpose}".encode()).derive(self.secret)

    @cached_property
    def _wrapping(self) -> Any:
        return aead(self.derived("wrap"))

    def wrap(self, secret: bytes, about: bytes) -> bytes:
        """Encrypts a secret: returns nonce, ciphertext and tag. about: associated data, to which the secret is bound."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + bytes(self._wrapping.encrypt(nonce, secret, about))

    def unwrap(self, wrapped: bytes, about: bytes) -> bytes | None:
        """The secret; None if another key wrapped it, `about` differs, or it was changed."""
        from cryptography.exceptions import InvalidTag

        try:
            return bytes(self._wrapping.decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], about))
        except (InvalidTag, ValueError):
            return None


def aead(secret: bytes) -> Any:
    """AES-256-GCM with a key."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(secret)


def register_key(source: KeySource) -> Key:
    """Fetches the register's key. Raises InvalidInput (also if the extra `encryption` is not installed), StorageUnavailable."""
    try:
        import apsw  # noqa: F401
        import cryptography  # noqa: F401
    except ImportError as error:
        raise InvalidInput(f"keys need the package {error.name}; run `pip install 'biodedup[encryption]'`") from None
    return Key(fetched(source))


def new_key_file(register: Key) -> bytes:
    """The content of `gallery.key` for a new gallery."""
    return key_file(register, secrets.token_bytes(KEY_BYTES))


def key_file(register: Key, secret: bytes, transforms: Iterable[bytes] = ()) -> bytes:
    """The content of `gallery.key`: a gallery key and transform secrets, wrapped by a register's key."""
    table: dict[str, Any] = {
        "format": _FORMAT,
        "register_key_id": register.key_id,
        "gallery_key_id": Key(secret).key_id,
        "wrapped": register.wrap(secret, _ABOUT_GALLERY_KEY).hex(),
    }
    ids = {Key(transform).key_id: transform for transform in transforms}
    return _with_transforms(
        table, {name: register.wrap(transform, _ABOUT_TRANSFORM + name.encode()) for name, transform in ids.items()}
    )


def _with_transforms(table: dict[str, Any], transforms: Mapping[str, bytes]) -> bytes:
    if transforms:
        table = table | {
            "format": _FORMAT_WITH_TRANSFORMS,
            "turns": {name: wrapped.hex() for name, wrapped in transforms.items()},
        }
    return (json.dumps(table, indent=1) + "\n").encode()


@dataclass(frozen=True)
class KeyFile:
    """The content of `gallery.key`."""

    path: Path
    register_key_id: str
    gallery_key_id: str
    wrapped: bytes
    transforms: Mapping[str, bytes] = field(default_factory=dict)
    """transform_id -> its wrapped secret."""

    @classmethod
    def parse(cls, path: Path, content: bytes) -> KeyFile:
        """Reads the content of a key file. path: for errors. Raises GalleryDamaged."""
        try:
            if len(content) > _KEY_FILE_BYTES_MAX:
                raise ValueError
            table = json.loads(content)
            wrapped, names = bytes.fromhex(table["wrapped"]), (table["register_key_id"], table["gallery_key_id"])
            transforms = {name: bytes.fromhex(text) for name, text in table.get("turns", {}).items()}
            is_valid = table["format"] in (_FORMAT, _FORMAT_WITH_TRANSFORMS)
            is_valid = is_valid and all(len(secret) == WRAPPED_BYTES for secret in (wrapped, *transforms.values()))
            if not is_valid or not all(
                type(name) is str and len(bytes.fromhex(name)) == 8 for name in (*names, *transforms)
            ):
                raise ValueError
        except (AttributeError, ValueError, KeyError, TypeError, RecursionError):
            raise _lost(path) from None
        return cls(path, *names, wrapped, transforms)

    def opened(self, register: Key | None) -> Key:
        """The unwrapped gallery key. Raises KeyMismatch if the register's key is absent or another one, GalleryDamaged."""
        folder = self.path.parent
        if register is None:
            raise KeyMismatch(
                f"{folder} is encrypted with key {self.register_key_id}, got no key; nothing changed; state the key by Config(keys=...), or "
                "`keys` in the settings file"
            )
        if register.key_id != self.register_key_id:
            raise KeyMismatch(
                f"{folder} is encrypted with key {self.register_key_id}, got key {register.key_id}; nothing changed; state the key "
                "that the gallery was encrypted with"
            )
        secret = register.unwrap(self.wrapped, _ABOUT_GALLERY_KEY)
        if secret is None or Key(secret).key_id != self.gallery_key_id:
            raise _lost(self.path)
        return Key(secret)

    def content(self, transforms: Mapping[str, bytes]) -> bytes:
        """This file with other transform secrets, wrapped by the same register's key."""
        table = {
            "format": _FORMAT,
            "register_key_id": self.register_key_id,
            "gallery_key_id": self.gallery_key_id,
            "wrapped": self.wrapped.hex(),
        }
        return _with_transforms(table, transforms)

    def transform_secrets(self, register: Key) -> dict[str, bytes]:
        """transform_id -> its secret. Raises KeyMismatch if the register's key was rotated since, GalleryDamaged."""
        if self.transforms and register.key_id != self.register_key_id:
            raise KeyMismatch(
                f"the key of {self.path.parent} was rotated to {self.register_key_id}, got key {register.key_id}; open the gallery again "
                "with the new key"
            )
        secrets_of = {}
        for name, wrapped in self.transforms.items():
            secret = register.unwrap(wrapped, _ABOUT_TRANSFORM + name.encode())
            if secret is None or Key(secret).key_id != name:
                raise _lost(self.path)
            secrets_of[name] = secret
        return secrets_of


def _lost(path: Path) -> GalleryDamaged:
    return GalleryDamaged(
        f"{path} is damaged; restore {KEY_NAME} from a backup: the gallery cannot be opened without it"
    )
