"""Signatures of requests and approvals, for calls that need two people.

Owns the rows of the table `approval_signature`: which bytes are signed, and how a signature is verified. Never decides who may approve.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from biodedup.common.signatures import is_signed
from biodedup.errors import InvalidInput
from biodedup.gallery.catalogue.chain import ChainHash

SIGNATURE_COLUMNS = {
    "approval_signature": "number INTEGER PRIMARY KEY, approval INTEGER, signed_by TEXT, method TEXT, key TEXT, signature BLOB",
}
"""number: 2 n for the request of approval n, 2 n + 1 for the approval itself; method: `ed25519`, `hmac` or `sha256`; key: the public key,
or the id of the gallery's key."""


def approval_content(gallery_id: str, row: Sequence[Any]) -> bytes:
    """The bytes that are signed. row: of the table `approval`; without an approver it is the request."""
    number, action, digest, *rest = row
    return b"biodedup approval 1\0" + json.dumps([gallery_id, number, action, digest.hex(), *rest]).encode()


def signature_row(row: Sequence[Any], method: str, key: str, signature: bytes) -> tuple[Any, ...]:
    """The row of `approval_signature` for a signature. row: as in `approval_content`."""
    number, approver = row[0], row[6]
    return (
        2 * number + (approver is not None),
        number,
        row[4] if approver is None else approver,
        method,
        key,
        signature,
    )


def wrong_signatures(
    gallery_id: str,
    approvals: Iterable[Sequence[Any]],
    signatures: Iterable[Sequence[Any]],
    chain_hash: ChainHash,
    public_keys: Mapping[str, Collection[str]],
) -> Iterator[tuple[bool, str]]:
    """Verifies all signatures. Yields (True, problem) for a wrong signature and (False, note) for one that cannot be verified.

    public_keys: name -> the public keys of that person, from the configured identities.
    """
    known = {row[0]: row for row in signatures}
    for row in approvals:
        states = [(0, (*row[:6], None, None))] + ([(1, tuple(row))] if row[6] is not None else [])
        for which, state in states:
            what = f"approval {row[0]} ({row[1]}) by {row[6]}" if which else f"request {row[0]} ({row[1]}) of {row[4]}"
            signed = known.pop(2 * row[0] + which, None)
            if signed is None:
                yield False, f"{what} is not signed: it was made by a release without signatures"
                continue
            _, _, by, method, key, signature = signed
            content, keys = approval_content(gallery_id, state), public_keys.get(by, ())
            if method == "ed25519":
                if keys and key not in keys:
                    yield True, f"{what} is signed with a key that the configured identities do not list for {by}"
                elif not _is_valid(key, signature, content):
                    yield True, f"the signature of {what} is wrong: it was forged, or the record was changed"
                continue
            if keys:
                yield (
                    False,
                    f"{what} is signed with the gallery's key only, though the configured identities list a key for {by}",
                )
            if key not in ("", chain_hash.key_id):
                yield False, f"the signature of {what} was made with key {key}, which is not available"
            elif (chain_hash if key else ChainHash(None)).of(content) != signature:
                yield True, f"the signature of {what} is wrong: it was forged, or the record was changed"
    for signed in known.values():
        yield True, f"a signature of {signed[2]} belongs to request {signed[1]}, which does not exist"


def _is_valid(key: str, signature: bytes, content: bytes) -> bool:
    try:
        return is_signed(key, signature, content)
    except InvalidInput:
        return False
