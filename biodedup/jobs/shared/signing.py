"""Signs small JSON documents with Ed25519 (RFC 8032) and checks their signatures: checkpoints of the audit log, and receipts.

Owns the format of a signed document, and makes key pairs. Never interprets a document.

A signed document is a JSON object. Its field `signed_by` is the public key and `signature` the signature, both in hexadecimal. The signature
covers a title and all other fields as JSON with sorted keys. The title keeps one kind of document from being taken for another.
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
    """Makes a key pair. `out` gets the private key (PEM, mode 0600), and the same name with the suffix .pub gets the public key. Returns the
    public key in hexadecimal. Raises InvalidInput if one of the files exists, StorageUnavailable."""
    require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    public_path = out.with_suffix(".pub")
    for path in (out, public_path):
        if path.exists() or out.suffix == ".pub":
            raise InvalidInput(f"{path} exists, or is the name of the public key; name a new file, as auditor.key")
    private = Ed25519PrivateKey.generate()
    public = private.public_key()
    with translated(f"writing {out}"):
        for path, content in (
            (out, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())),
            (public_path, public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)),
        ):
            with open_private(path, exclusive=True) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
    return public_text(public)


def sign_document(title: str, document: dict[str, Any], key: Path) -> dict[str, Any]:
    """The document with the fields `signed_by` and `signature`. key: the file of the private key. Raises InvalidInput."""
    private = private_key(file_bytes(key), str(key))
    signed_by = public_text(private.public_key())
    signature = private.sign(_content(title, {**document, "signed_by": signed_by}))
    return {**document, "signed_by": signed_by, "signature": signature.hex()}


def read_signed(title: str, path: Path, public_key: Path | None) -> tuple[dict[str, Any], str]:
    """Reads a signed document and checks its signature. Returns (its fields, the problem of the signature, or '' if it is valid).

    public_key: PEM file of the expected signer; without it, the signature proves only that the document was not changed by accident. Raises
    InvalidInput if the file is not a signed document.
    """
    require_cryptography()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    trusted = None if public_key is None else _public(public_key)
    content = file_bytes(path)
    try:
        document = json.loads(content, object_pairs_hook=_each_name_once)
        signature, signed_by = bytes.fromhex(document.pop("signature")), document["signed_by"]
        signer = trusted or Ed25519PublicKey.from_public_bytes(bytes.fromhex(signed_by))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise InvalidInput(f"{path} is not a signed document; name a file that `biodedup {title}` wrote") from None
    try:
        signer.verify(signature, _content(title, document))
    except InvalidSignature:
        return document, f"the signature of {path} was made with another key, or the document was changed"
    return document, ""


def _each_name_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for an object that states a name twice: other programs might read the value that is not signed."""
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("a name is stated twice")
    return document


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
        raise InvalidInput(f"{path} holds no Ed25519 public key (PEM); name the signer's .pub file")
    return key
