"""Makes Ed25519 key pairs (RFC 8032), and signs and checks small JSON documents with them: checkpoints and receipts.

Owns the form of a signed document. Never says what a document means.

A signed document is a JSON object. Its field `signed_by` is the public key and `signature` the signature, both in hexadecimal. What is signed
is a title, which keeps kinds of documents apart, and all other fields as JSON with sorted keys.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biodedup.common.signatures import private_key, public_text, require_cryptography
from biodedup.errors import InvalidInput
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.private import file_bytes, open_private

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


def make_signing_key(out: Path) -> str:
    """Makes a key pair: `out` holds the private key (PEM, for its owner alone), `out` with the ending .pub the public one. Returns the public key
    in hexadecimal. Raises InvalidInput where one of the files exists, StorageUnavailable."""
    require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    public_path = out.with_suffix(".pub")
    for path in (out, public_path):
        if path.exists() or out.suffix == ".pub":
            raise InvalidInput(f"{path} exists, or is the name of the public key; name a new file, as auditor.key")
    made = Ed25519PrivateKey.generate()
    public = made.public_key()
    with translated(f"writing {out}"):
        for path, content in (
            (out, made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())),
            (public_path, public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)),
        ):
            with open_private(path, exclusive=True) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
    return public_text(public)


def signed(title: str, document: dict[str, Any], key: Path) -> dict[str, Any]:
    """The document with its signature. key: the file of the private key. Raises InvalidInput."""
    private = private_key(file_bytes(key), str(key))
    signed_by = public_text(private.public_key())
    signature = private.sign(_content(title, {**document, "signed_by": signed_by}))
    return {**document, "signed_by": signed_by, "signature": signature.hex()}


def opened(title: str, path: Path, public_key: Path | None) -> tuple[dict[str, Any], str]:
    """(the fields of a signed document, what is wrong with its signature, empty for nothing). public_key: PEM; without it the signature proves
    only that the document is whole. Raises InvalidInput for what is no signed document."""
    require_cryptography()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    trusted = None if public_key is None else _public(public_key)
    content = file_bytes(path)
    try:
        document = json.loads(content)
        signature, signed_by = bytes.fromhex(document.pop("signature")), document["signed_by"]
        signer = trusted or Ed25519PublicKey.from_public_bytes(bytes.fromhex(signed_by))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise InvalidInput(f"{path} is no signed document; name a file of `biodedup {title}`") from None
    try:
        signer.verify(signature, _content(title, document))
    except InvalidSignature:
        return document, f"the signature of {path} is not of this key, or the document was changed"
    return document, ""


def _content(title: str, document: dict[str, Any]) -> bytes:
    return f"biodedup {title} 1\0".encode() + json.dumps(document, sort_keys=True).encode()


def _public(path: Path) -> Ed25519PublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    content = file_bytes(path)
    try:
        key: object = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidInput(f"{path} holds no Ed25519 public key (PEM); name the .pub file of the key that signed")
    return key
