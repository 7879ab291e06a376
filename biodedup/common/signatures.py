"""Ed25519 signatures (RFC 8032): reads keys, signs and checks.

Owns the form of public keys as text, 64 hexadecimal digits. Never reads a file, and never says what a signature means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from biodedup.errors import InvalidInput

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PUBLIC_DIGITS = 64


def require_cryptography() -> None:
    """Raises InvalidInput where the package is absent."""
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise InvalidInput(
            "signatures need the package cryptography; run `pip install 'biodedup[encryption]'`"
        ) from None


def private_key(content: bytes, name: str) -> Ed25519PrivateKey:
    """From PEM. name: of the file, for errors. Raises InvalidInput."""
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
            f"{name} holds no Ed25519 private key without a passphrase (PEM); make one: `biodedup log key FILE`"
        )
    return key


def public_text(public: Ed25519PublicKey) -> str:
    """In hexadecimal."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return public.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def is_signed(public: str, signature: bytes, content: bytes) -> bool:
    """Whether a signature of some content is of a public key, hexadecimal. Raises InvalidInput for what is no key."""
    require_cryptography()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
    except ValueError:
        raise InvalidInput(
            f"{public[:80]!r} is no Ed25519 public key; wanted {PUBLIC_DIGITS} hexadecimal digits"
        ) from None
    try:
        key.verify(signature, content)
    except InvalidSignature:
        return False
    return True
