"""Ed25519 signatures (RFC 8032): reads keys and verifies signatures.

Owns the text form of public keys: 64 hexadecimal digits. Never reads a file, and never interprets the signed content.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from biodedup.errors import InvalidInput

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_PUBLIC = re.compile("[0-9a-fA-F]{64}")
SMALL_ORDER = frozenset(
    bytes.fromhex(encoding)
    for encoding in (
        "00" * 32,
        "01" + "00" * 31,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)
"""Points of small order on edwards25519, without the sign bit. Anybody can make valid signatures for these public keys (RFC 8032, RFC 7748
section 6.1)."""


def check_public_text(public: object, whose: str) -> None:
    """Raises InvalidInput for a text that is not a secure public key. whose: for the message, for example `the key of device 'x'`."""
    if not isinstance(public, str) or not _PUBLIC.fullmatch(public):
        raise InvalidInput(f"{whose} is not an Ed25519 public key; write its 32 bytes as 64 hexadecimal digits")
    *low, high = bytes.fromhex(public)
    if bytes([*low, high & 0x7F]) in SMALL_ORDER:
        raise InvalidInput(
            f"{whose} is an insecure Ed25519 key, for which anybody can make signatures; write the key that was made for it"
        )


def require_cryptography() -> None:
    """Raises InvalidInput if the package `cryptography` is not installed."""
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise InvalidInput(
            "signatures need the package cryptography; run `pip install 'biodedup[encryption]'`"
        ) from None


def private_key(content: bytes, name: str) -> Ed25519PrivateKey:
    """The private key in a PEM file. content: of the file; name: of the file, for errors. Raises InvalidInput."""
    require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key: object = load_pem_private_key(content, None)
    except (TypeError, ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidInput(
            f"{name} holds no Ed25519 private key in PEM form without a passphrase; make one with `biodedup log key FILE`"
        )
    return key


def public_text(public: Ed25519PublicKey) -> str:
    """A public key as 64 hexadecimal digits."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return public.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def is_signed(public: str, signature: bytes, content: bytes) -> bool:
    """Whether a signature of some content is valid. public: the public key, hexadecimal. Raises InvalidInput for an invalid key."""
    require_cryptography()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    check_public_text(public, repr(public[:80]))
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
    try:
        key.verify(signature, content)
    except InvalidSignature:
        return False
    return True
