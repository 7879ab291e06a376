"""Encrypts a batch file for the centre's key, chunk by chunk, and decrypts it.

Owns the derivation of a batch's key, nonces and associated data. Never signs, and never reads a file. Primitives are those of the library
`cryptography`; the constructions are the published ones:

* key agreement: X25519 (RFC 7748) of an ephemeral key with the centre's, and HKDF-SHA256 (RFC 5869) with both public keys as the salt, as
  in the X25519 recipient of age (C2SP, age-encryption.org/v1);
* chunks: STREAM (Hoang, Reyhanitabar, Rogaway, Vizar: Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance, CRYPTO 2015)
  over ChaCha20-Poly1305 (RFC 8439), with the nonce of age: 11 bytes of the chunk's number, big-endian, and a byte that is 1 only in the last
  chunk.

1. Each batch has its own ephemeral key, so that no nonce is used twice with a key.
2. A chunk is bound to the kit, its position, its header (kind, sequence, length), and to whether it is the last chunk: with any other of these,
   it does not open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from biodedup.jobs.kits.format.keys import CentreKey, CentrePublic

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

EPHEMERAL_BYTES = 32
TAG_BYTES = 16
_INFO = b"biodedup kit batch 2 encryption\0"


class Chunks:
    """Seals or opens the chunks of one batch, in their order. kit: fingerprint of the key that signs it."""

    def __init__(self, aead: ChaCha20Poly1305, kit: bytes) -> None:
        self._aead = aead
        self._kit = kit
        self._number = 0

    def seal(self, plain: bytes, header: bytes, *, last: bool) -> bytes:
        nonce, bound = self._next(header, last)
        return self._aead.encrypt(nonce, plain, bound)

    def open(self, sealed: bytes, header: bytes, *, last: bool) -> bytes | None:
        """The plain text; None if the chunk, its position or its header was changed."""
        from cryptography.exceptions import InvalidTag

        nonce, bound = self._next(header, last)
        try:
            return self._aead.decrypt(nonce, sealed, bound)
        except InvalidTag:
            return None

    def _next(self, header: bytes, last: bool) -> tuple[bytes, bytes]:
        """(nonce, associated data) of the next chunk."""
        place = self._number.to_bytes(11, "big") + bytes([last])
        self._number += 1
        return place, self._kit + place + header


def sealing(kit: bytes, centre: CentrePublic, ephemeral: X25519PrivateKey) -> Chunks:
    """The cipher that encrypts a batch for this centre. ephemeral: a private key for this batch only, which is not stored."""
    public = ephemeral.public_key().public_bytes_raw()
    return Chunks(_aead(ephemeral.exchange(centre.key), public, centre, kit), kit)


def opening(kit: bytes, centre: CentreKey, ephemeral: bytes) -> Chunks | None:
    """The cipher that decrypts a batch; None if the ephemeral key is not valid. ephemeral: the raw public key in the batch."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

    try:
        shared = centre.key.exchange(X25519PublicKey.from_public_bytes(ephemeral))
    except ValueError:  # a point of small order, for which anyone can compute the shared secret
        return None
    return Chunks(_aead(shared, ephemeral, centre.public, kit), kit)


def _aead(shared: bytes, ephemeral: bytes, centre: CentrePublic, kit: bytes) -> ChaCha20Poly1305:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    salt = ephemeral + centre.key.public_bytes_raw()
    return ChaCha20Poly1305(HKDF(SHA256(), 32, salt, _INFO + kit).derive(shared))
