"""Approvals: calls that need two people.

Owns the requests: the first call stores one and does nothing; the same call by another principal approves it and is carried out.

1. A request is about what the gallery holds when it is made: its digest covers the version of the policy that asks for two people, and the rows
   or candidates concerned, so that an approval never meets another state, or another policy, than the one that was asked about.
2. An approval is stored in the commit that carries the call out: both stand, or neither. Of a key, which is no row, it is stored just before.
3. Requests and approvals are signed: by Ed25519 with the caller's private key where the identities state its public one, otherwise by the
   hash of the chain (HMAC with the gallery's key). `log verify` checks the signatures.
4. A request ends after a week, with its approval, and with the next version of the policy. Requests and approvals are kept for ever. They hold ids and reasons, nothing biometric.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from biodedup.common.described import Described
from biodedup.common.signatures import private_key, public_text
from biodedup.engine.callers.audit import carried_out
from biodedup.engine.log import EngineLog
from biodedup.errors import ApprovalNeeded, NotAllowed
from biodedup.gallery.catalogue.approvals import approval_content
from biodedup.gallery.files.private import file_bytes
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.transaction import Transaction
from biodedup.principals import KEY_PREFIX, Principal, folded

Signer: TypeAlias = Callable[[bytes], tuple[str, bytes]]
"""Returns (the public key in hexadecimal, the signature) of some content."""
OPEN_S = 7 * 86_400.0
"""For so long a request can be approved."""


@dataclass(frozen=True)
class Approval(Described):
    """A request, and its approval once there is one. action: of `Policy.two_people`; facts: what is to be done; times in seconds."""

    number: int
    action: str
    facts: Mapping[str, Any]
    requested_by: str
    requested_at: float
    approved_by: str | None = None
    approved_at: float | None = None
    signed: str = ""
    """How its approval, or, without one, the request is signed: `ed25519`, `hmac`, or `sha256` in a gallery in the clear."""


Approve = Callable[[Transaction], None]
"""Stores an approval in the commit that carries the call out. Raises ApprovalNeeded where the request does not stand any more."""


def needs_none(transaction: Transaction) -> None:
    """The `Approve` of a change that needs no second person."""


def signer_of(principal: Principal, key: Path) -> Signer:
    """Signs with a private key, PEM, of a principal that states its public key. Raises InvalidInput, NotAllowed for another key."""
    private = private_key(file_bytes(key), str(key))
    public = public_text(private.public_key())
    if public not in principal.public_keys:
        raise NotAllowed(
            f"{key} is not the private key of {principal.name!r}: the identities do not state {KEY_PREFIX}{public}; add it, or name another file"
        )
    return lambda content: (public, private.sign(content))


class Approvals:
    """The requests of one gallery. clock: the time in seconds. Thread-safe."""

    def __init__(self, gallery: Gallery, clock: Callable[[], float], log: EngineLog) -> None:
        self._log = log
        self._gallery = gallery
        self._clock = clock

    def needed(self, action: str) -> bool:
        """Whether the gallery's own policy asks for two people, as it is now: an override of this process does not count."""
        if not self._gallery.read_only:
            self._gallery.refresh()
        return self._asked_for(action)

    def _asked_for(self, action: str) -> bool:
        return action in self._gallery.policies[-1].policy.two_people

    def require(
        self,
        action: str,
        caller: Principal | None,
        facts: Callable[[], Mapping[str, Any]],
        about: Callable[[Transaction], Any] = lambda transaction: None,
        sign: Signer | None = None,
    ) -> Approve:
        """Returns where the call may be carried out: what its transaction calls before it changes anything, and after all that can fail without
        undoing it. facts: JSON-ready; about: what else the request is bound to, read inside a transaction; sign: of the caller, None without a private key.

        Raises ApprovalNeeded where it was stored as a request, NotAllowed for a caller without a name or without its private key.
        """
        if not self.needed(action):
            return lambda transaction: self._still_free(action)
        if caller is None:
            raise NotAllowed(
                f"the gallery's policy asks for two people for {action!r}, and this call names no principal; call it by "
                "engine.as_principal(...), or --by NAME with settings that have [identities], once for each of two"
            )
        if caller.public_keys and sign is None:
            raise NotAllowed(
                f"{caller.name!r} is configured with a public key, and its private key was not given: what it asks for or approves is "
                "signed; pass as_principal(..., key=FILE), or --sign FILE"
            )

        def bound(transaction: Transaction) -> Any:
            return self._gallery.policies[-1].version, about(transaction)

        one = _Request(action, json.dumps(dict(facts()), sort_keys=True), caller, bound, sign)
        with self._gallery.transaction() as transaction:
            digest = one.digest(transaction)
            known = self._open_request(transaction, one, digest)
            by_another = known is not None and folded(known[4]) != folded(caller.name)
            if known is None:
                row = (action, digest, one.asked, caller.name, self._clock(), None, None)
                number = transaction.caller_tables().put_approval(None, row)
                self._put_signature(transaction, one, (number, *row))
                carried_out(outcome="ApprovalNeeded")
            else:
                number = known[0]
        if by_another:
            return lambda transaction: self._approve(transaction, one)
        if known is None:
            self._log.asked(action, number, approved=False)
        raise ApprovalNeeded(
            f"{action!r} needs two people; request {number} of {caller.name!r} is stored, and nothing was done; another principal "
            "with the same role approves it by the same call within a week",
            number,
        )

    def _still_free(self, action: str) -> None:
        """Inside the transaction: the policy may have changed since the call began."""
        if self._asked_for(action):
            raise ApprovalNeeded(f"the policy asks for two people for {action!r} since a moment ago; call again", 0)

    def _open_request(self, transaction: Transaction, one: _Request, digest: bytes) -> tuple[Any, ...] | None:
        """The newest request for this very call that was not approved and has not ended."""
        now = self._clock()
        rows = transaction.caller_tables(noted=False).approvals()
        known = [r for r in rows if r[1] == one.action and r[2] == digest and r[6] is None and r[5] > now - OPEN_S]
        return known[-1] if known else None

    def _approve(self, transaction: Transaction, one: _Request) -> None:
        """The request is found again: it may have been approved meanwhile, or be about another state."""
        known = self._open_request(transaction, one, one.bound_digest)
        if known is None or one.digest(transaction) != one.bound_digest:
            raise ApprovalNeeded(
                f"the request for {one.action!r} does not stand any more: it was approved by another call, or what it is about has "
                "changed; nothing was done; ask again",
                0,
            )
        row = (*known[:6], one.caller.name, self._clock())
        transaction.caller_tables().put_approval(known[0], row[1:])
        self._put_signature(transaction, one, row)
        transaction.when_durable.append(lambda: self._log.asked(one.action, known[0], approved=True))

    def _put_signature(self, transaction: Transaction, one: _Request, row: tuple[Any, ...]) -> None:
        """row: of table `approval`, as it is now."""
        catalogue = transaction.caller_tables()
        content = approval_content(self._gallery.gallery_id, row)
        if one.sign is not None:
            public, signature = one.sign(content)
            catalogue.put_approval_signature(row, "ed25519", public, signature)
        else:
            chain_hash = catalogue.audit_hash()
            method = "hmac" if chain_hash.key_id else "sha256"
            catalogue.put_approval_signature(row, method, chain_hash.key_id, chain_hash.of(content))

    def listed(self) -> list[Approval]:
        """Oldest first."""
        rows, signed = self._gallery.approvals()
        return [
            Approval(
                number=number,
                action=action,
                facts=json.loads(facts),
                requested_by=by,
                requested_at=at,
                approved_by=approved_by,
                approved_at=approved_at,
                signed=signed.get(number, ""),
            )
            for number, action, _, facts, by, at, approved_by, approved_at in rows
        ]


@dataclass(eq=False)
class _Request:
    """What a caller asks for. asked: its facts, JSON. bound_digest: as of the first transaction that looked for it."""

    action: str
    asked: str
    caller: Principal
    about: Callable[[Transaction], Any]
    sign: Signer | None
    bound_digest: bytes = b""

    def digest(self, transaction: Transaction) -> bytes:
        content = json.dumps([self.action, self.asked, self.about(transaction)])
        digest = hashlib.sha256(content.encode()).digest()
        self.bound_digest = self.bound_digest or digest
        return digest
