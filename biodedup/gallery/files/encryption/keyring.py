"""The keys of a register and of its galleries, and what they wrap.

Owns the derivation of keys and the key file `gallery.key`. Never reads a template, and never writes another file.

Three levels, an envelope each (NIST SP 800-57, key wrapping):

| key | lives | protects |
|---|---|---|
| register's key | outside: a file, a variable, a KMS | wraps the gallery keys; a rotation replaces it and rewrites `gallery.key` alone |
| gallery key | `gallery.key`, wrapped | wraps the data keys; the database's key is derived from it |
| data key | the head of each file, wrapped | encrypts this one file |

A gallery of renewable templates has turn secrets as well, in `gallery.key`, each wrapped by the register's key: stored embeddings are turned by
them (turning.py).

Wrapping is AES-256-GCM (NIST SP 800-38D) with a random nonce; derivation is HKDF-SHA256 (RFC 5869) with a purpose. `key_id` is derived
from a key, so that a wrong key is told from damage.
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
_FORMAT, _FORMAT_WITH_TURNS = 1, 2
_KEY_FILE_BYTES_MAX = 8192
_ABOUT_GALLERY_KEY = b"biodedup gallery key 1\0"
_ABOUT_TURN = b"biodedup turn 1\0"


@dataclass(frozen=True)
class Key:
    """One key, and what is derived from it."""

    secret: bytes = field(repr=False)

    @cached_property
    def key_id(self) -> str:
        """16 hexadecimal digits that name the key and tell nothing of it."""
        return self.derived("key id")[:8].hex()

    def derived(self, purpose: str) -> bytes:
        """32 bytes for one purpose."""
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        return HKDF(SHA256(), KEY_BYTES, None, f"biodedup {purpose}".encode()).derive(self.secret)

    @cached_property
    def _wrapping(self) -> Any:
        return aead(self.derived("wrap"))

    def wrap(self, secret: bytes, about: bytes) -> bytes:
        """The nonce, the encrypted secret and the tag. about: what the secret is bound to."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + bytes(self._wrapping.encrypt(nonce, secret, about))

    def unwrap(self, wrapped: bytes, about: bytes) -> bytes | None:
        """None where another key wrapped it, or it is bound to something else, or it was changed."""
        from cryptography.exceptions import InvalidTag

        try:
            return bytes(self._wrapping.decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], about))
        except (InvalidTag, ValueError):
            return None


def aead(secret: bytes) -> Any:
    """AES-256-GCM under a key."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(secret)


def register_key(source: KeySource) -> Key:
    """Fetches the register's key. Raises InvalidInput, also where the extra is not installed; StorageUnavailable."""
    try:
        import apsw  # noqa: F401
        import cryptography  # noqa: F401
    except ImportError as error:
        raise InvalidInput(f"keys need the package {error.name}; run `pip install 'biodedup[encryption]'`") from None
    return Key(fetched(source))


def new_key_file(register: Key) -> bytes:
    """The content of `gallery.key` for a new gallery."""
    return key_file(register, secrets.token_bytes(KEY_BYTES))


def key_file(register: Key, secret: bytes, turns: Iterable[bytes] = ()) -> bytes:
    """The content of `gallery.key`: a gallery key and turn secrets, wrapped by a register's key."""
    table: dict[str, Any] = {
        "format": _FORMAT,
        "register_key_id": register.key_id,
        "gallery_key_id": Key(secret).key_id,
        "wrapped": register.wrap(secret, _ABOUT_GALLERY_KEY).hex(),
    }
    ids = {Key(turn).key_id: turn for turn in turns}
    return _with_turns(table, {name: register.wrap(turn, _ABOUT_TURN + name.encode()) for name, turn in ids.items()})


def _with_turns(table: dict[str, Any], turns: Mapping[str, bytes]) -> bytes:
    if turns:
        table = table | {
            "format": _FORMAT_WITH_TURNS,
            "turns": {name: wrapped.hex() for name, wrapped in turns.items()},
        }
    return (json.dumps(table, indent=1) + "\n").encode()


@dataclass(frozen=True)
class KeyFile:
    """What `gallery.key` holds."""

    path: Path
    register_key_id: str
    gallery_key_id: str
    wrapped: bytes
    turns: Mapping[str, bytes] = field(default_factory=dict)
    """turn_id -> its wrapped secret."""

    @classmethod
    def parse(cls, path: Path, content: bytes) -> KeyFile:
        """Raises GalleryDamaged."""
        try:
            if len(content) > _KEY_FILE_BYTES_MAX:
                raise ValueError
            table = json.loads(content)
            wrapped, names = bytes.fromhex(table["wrapped"]), (table["register_key_id"], table["gallery_key_id"])
            turns = {name: bytes.fromhex(text) for name, text in table.get("turns", {}).items()}
            sound = table["format"] in (_FORMAT, _FORMAT_WITH_TURNS)
            sound = sound and all(len(secret) == WRAPPED_BYTES for secret in (wrapped, *turns.values()))
            if not sound or not all(type(name) is str and len(bytes.fromhex(name)) == 8 for name in (*names, *turns)):
                raise ValueError
        except (AttributeError, ValueError, KeyError, TypeError, RecursionError):
            raise _lost(path) from None
        return cls(path, *names, wrapped, turns)

    def opened(self, register: Key | None) -> Key:
        """The gallery key. Raises KeyMismatch without the register's key or with another one, GalleryDamaged."""
        folder = self.path.parent
        if register is None:
            raise KeyMismatch(
                f"{folder} is encrypted under key {self.register_key_id}, and no key was stated; nothing changed; state it by "
                "Config(keys=...), or `keys` in the settings file"
            )
        if register.key_id != self.register_key_id:
            raise KeyMismatch(
                f"{folder} is encrypted under key {self.register_key_id}, got key {register.key_id}; nothing changed; state the key "
                "that the gallery was encrypted with"
            )
        secret = register.unwrap(self.wrapped, _ABOUT_GALLERY_KEY)
        if secret is None or Key(secret).key_id != self.gallery_key_id:
            raise _lost(self.path)
        return Key(secret)

    def content(self, turns: Mapping[str, bytes]) -> bytes:
        """This file with other turn secrets, wrapped by the same register's key."""
        table = {
            "format": _FORMAT,
            "register_key_id": self.register_key_id,
            "gallery_key_id": self.gallery_key_id,
            "wrapped": self.wrapped.hex(),
        }
        return _with_turns(table, turns)

    def turn_secrets(self, register: Key) -> dict[str, bytes]:
        """turn_id -> its secret. Raises KeyMismatch where the register's key was rotated since, GalleryDamaged."""
        if self.turns and register.key_id != self.register_key_id:
            raise KeyMismatch(
                f"the key of {self.path.parent} was rotated to {self.register_key_id}, got key {register.key_id}; open the gallery again "
                "with the new key"
            )
        secrets_of = {}
        for name, wrapped in self.turns.items():
            secret = register.unwrap(wrapped, _ABOUT_TURN + name.encode())
            if secret is None or Key(secret).key_id != name:
                raise _lost(self.path)
            secrets_of[name] = secret
        return secrets_of


def _lost(path: Path) -> GalleryDamaged:
    return GalleryDamaged(f"{path} is damaged; restore {KEY_NAME} from a backup: nothing else opens the gallery")
