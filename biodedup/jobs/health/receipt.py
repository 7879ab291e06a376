"""Writes signed receipts of decisions, and checks them without the gallery.

Owns the file of a receipt. `engine.receipt` says what it holds, `jobs.shared.signing` signs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biodedup.common.described import Described
from biodedup.engine.engine import Engine
from biodedup.errors import InvalidInput
from biodedup.gallery.files.private import replace_private
from biodedup.jobs.shared.signing import read_signed, sign_document

_TITLE, _FORMAT = "receipt", 1


@dataclass(frozen=True)
class ReceiptCheck(Described):
    """receipt: the fields of the file, as they were signed; problems: what is wrong with it, empty for nothing; notes: what the signature does
    not prove."""

    receipt: dict[str, Any]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def write_receipt(
    engine: Engine, encounter_id: str, key: Path, out: Path, *, clock: Callable[[], float] = time.time
) -> dict[str, Any]:
    """Signs the receipt of a decision, of a case as it stands now. key: an Ed25519 private key, PEM. Returns the document. Raises InvalidInput
    for an unknown encounter, and where `out` exists; StorageUnavailable."""
    if out.exists():
        raise InvalidInput(f"{out} exists, and a receipt is never replaced; name a new file")
    fields = {"format": _FORMAT, **engine.receipt(encounter_id).to_dict(), "issued_at": round(float(clock()), 3)}
    document = sign_document(_TITLE, fields, key)
    replace_private(out, json.dumps(document, indent=2).encode() + b"\n")
    return document


def verify_receipt(file: Path, public_key: Path | None = None) -> ReceiptCheck:
    """Checks the signature of a receipt, without the gallery. public_key: PEM, of the key that signed it; without it the signature proves only
    that the file is whole. Raises InvalidInput for what is no receipt."""
    document, wrong = read_signed(_TITLE, file, public_key)
    if document.get("format") != _FORMAT or not {"gallery_id", "encounter_id", "outcome", "chain"} <= document.keys():
        raise InvalidInput(f"{file} is no receipt of this format; name a file of `biodedup receipt`")
    notes = []
    if public_key is None and not wrong:
        notes.append(f"no public key was stated; the receipt is signed by {document['signed_by']}")
    if document["chain"] is None:
        notes.append("the receipt has no place in a hash chain")
    return ReceiptCheck(document, (wrong,) if wrong else (), tuple(notes))
