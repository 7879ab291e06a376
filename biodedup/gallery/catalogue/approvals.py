"""Signatures of requests and approvals of calls that need two people, as rows of the table `approval_signature`.

Owns what is signed, and its check. Never decides who may approve.
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
"""number: twice that of the approval, and one more for the signature of the approver; method: `ed25519`, `hmac` or `sha256`; key: the public key,
or the id of the gallery's."""


def approval_content(gallery_id: str, row: Sequence[Any]) -> bytes:
    """What is signed. row: of the table `approval`; without an approver, that of the request."""
    number, action, digest, *rest = row
    return b"biodedup approval 1\0" + json.dumps([gallery_id, number, action, digest.hex(), *rest]).encode()


def signature_row(row: Sequence[Any], method: str, key: str, signature: bytes) -> tuple[Any, ...]:
    """row: as in `approval_content`."""
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
    """(whether it is wrong, or only to be noted; what) for requests and approvals. public_keys: of configured names."""
    known = {row[0]: row for row in signatures}
    for row in approvals:
        states = [(0, (*row[:6], None, None))] + ([(1, tuple(row))] if row[6] is not None else [])
        for which, state in states:
            what = f"approval {row[0]} ({row[1]}) by {row[6]}" if which else f"request {row[0]} ({row[1]}) of {row[4]}"
            signed = known.pop(2 * row[0] + which, None)
            if signed is None:
                yield False, f"{what} is not signed: it is older than signatures"
                continue
            _, _, by, method, key, signature = signed
            content, keys = approval_content(gallery_id, state), public_keys.get(by, ())
            if method == "ed25519":
                if keys and key not in keys:
                    yield True, f"{what} is signed by another key than the identities state for {by}"
                elif not _holds(key, signature, content):
                    yield True, f"the signature of {what} is wrong: it was forged, or the record was changed"
                continue
            if keys:
                yield False, f"{what} is signed by the gallery alone, though the identities state a key for {by}"
            if key not in ("", chain_hash.key_id):
                yield False, f"the signature of {what} is of key {key}, which is not at hand"
            elif (chain_hash if key else ChainHash(None)).of(content) != signature:
                yield True, f"the signature of {what} is wrong: it was forged, or the record was changed"
    for signed in known.values():
        yield True, f"a signature of {signed[2]} is of request {signed[1]}, which is not there"


def _holds(key: str, signature: bytes, content: bytes) -> bool:
    try:
        return is_signed(key, signature, content)
    except InvalidInput:
        return False
