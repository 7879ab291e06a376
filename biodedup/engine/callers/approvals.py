"""Approvals: calls that need two people.

Owns the requests. The first call stores a request and does nothing else. The same call by another principal approves the request, and is
carried out.

1. A request is bound to the state of the gallery: its digest covers the version of the policy and the affected rows or candidates. So an
   approval never applies to another state, or another policy, than the request.
2. An approval is stored in the commit that carries the call out, so that both are durable, or neither. The approval of a change of a key,
   which is not in the database, is stored just before the change.
3. Requests and approvals are signed: with Ed25519 and the caller's private key if the identities state a public key; otherwise with the
   hash of the chain (HMAC with the gallery's key). `biodedup log verify` verifies the signatures.
4. A request ends with its approval, after a week, or with the next version of the policy. Requests and approvals are never deleted. They
   contain ids and reasons, and no biometric data.
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
"""content -> (the public key in hexadecimal, the signature)."""
OPEN_S = 7 * 86_400.0
"""The time during which a request can be approved, in seconds."""


@dataclass(frozen=True)
class Approval(Described):
    """A request, and its approval if there is one. action: of `Policy.two_people`; facts: the details of the call; times: in seconds since
    1970."""

    number: int
    action: str
    facts: Mapping[str, Any]
    requested_by: str
    requested_at: float
    approved_by: str | None = None
    approved_at: float | None = None
    signed: str = ""
    """The method of the newest signature: `ed25519`, `hmac`, or `sha256` (in a gallery in the clear)."""


Approve = Callable[[Transaction], None]
"""Stores an approval in the commit that carries the call out. Raises ApprovalNeeded if the request is not valid any more."""


def needs_none(transaction: Transaction) -> None:
    """An `Approve` for a change that needs no second person: it does nothing."""


def signer_of(principal: Principal, key: Path) -> Signer:
    """A signer with a principal's private key. key: a PEM file. Raises InvalidInput, and NotAllowed if the principal's public keys do not
    include it."""
    private = private_key(file_bytes(key), str(key))
    public = public_text(private.public_key())
    if public not in principal.public_keys:
        raise NotAllowed(
            f"{key} is not the private key of {principal.name!r}: the identities do not state {KEY_PREFIX}{public}; add it, or name another file"
        )
    return lambda content: (public, private.sign(content))


class Approvals:
    """The requests of one gallery. clock: returns the time in seconds since 1970. Thread-safe."""

    def __init__(self, gallery: Gallery, clock: Callable[[], float], log: EngineLog) -> None:
        self._log = log
        self._gallery = gallery
        self._clock = clock

    def needed(self, action: str) -> bool:
        """Whether the gallery's newest stored policy asks for two people. A policy that overrides it in this process does not count."""
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
        """Returns if the call may be carried out. Its transaction calls the returned function before it changes anything, after all checks.

        facts: details of the call, for JSON; about: returns further state to which the request is bound, read inside a transaction; sign:
        the caller's signer, None without a private key. Raises ApprovalNeeded if the call was stored as a request, NotAllowed for a caller
        without a name or without its private key.
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

        request = _Request(action, json.dumps(dict(facts()), sort_keys=True), caller, bound, sign)
        with self._gallery.transaction() as transaction:
            digest = request.digest(transaction)
            known = self._open_request(transaction, request, digest)
            by_another = known is not None and folded(known[4]) != folded(caller.name)
            if known is None:
                row = (action, digest, request.asked, caller.name, self._clock(), None, None)
                number = transaction.caller_tables().put_approval(None, row)
                self._put_signature(transaction, request, (number, *row))
                carried_out(outcome="ApprovalNeeded")
            else:
                number = known[0]
        if by_another:
            return lambda transaction: self._approve(transaction, request)
        if known is None:
            self._log.asked(action, number, approved=False)
        raise ApprovalNeeded(
            f"{action!r} needs two people; request {number} of {caller.name!r} is stored, and nothing was done; another principal "
            "with the same role approves it by the same call within a week",
            number,
        )

    def _still_free(self, action: str) -> None:
        """Raises ApprovalNeeded if the policy has changed since the call began. Called inside the transaction."""
        if self._asked_for(action):
            raise ApprovalNeeded(f"the policy has changed, and now asks for two people for {action!r}; call again", 0)

    def _open_request(self, transaction: Transaction, request: _Request, digest: bytes) -> tuple[Any, ...] | None:
        """The newest valid request for exactly this call: not approved yet, and not ended."""
        now = self._clock()
        rows = transaction.caller_tables(noted=False).approvals()
        known = [r for r in rows if r[1] == request.action and r[2] == digest and r[6] is None and r[5] > now - OPEN_S]
        return known[-1] if known else None

    def _approve(self, transaction: Transaction, request: _Request) -> None:
        """Approves a request. Raises ApprovalNeeded if it was approved meanwhile, or the state of the gallery has changed."""
        known = self._open_request(transaction, request, request.bound_digest)
        if known is None or request.digest(transaction) != request.bound_digest:
            raise ApprovalNeeded(
                f"the request for {request.action!r} is not valid any more: another call has approved it, or the gallery has changed; "
                "nothing was done; call again",
                0,
            )
        row = (*known[:6], request.caller.name, self._clock())
        transaction.caller_tables().put_approval(known[0], row[1:])
        self._put_signature(transaction, request, row)
        transaction.when_durable.append(lambda: self._log.asked(request.action, known[0], approved=True))

    def _put_signature(self, transaction: Transaction, request: _Request, row: tuple[Any, ...]) -> None:
        """Signs a row of table `approval` in its present state."""
        catalogue = transaction.caller_tables()
        content = approval_content(self._gallery.gallery_id, row)
        if request.sign is not None:
            public, signature = request.sign(content)
            catalogue.put_approval_signature(row, "ed25519", public, signature)
        else:
            chain_hash = catalogue.audit_hash()
            method = "hmac" if chain_hash.key_id else "sha256"
            catalogue.put_approval_signature(row, method, chain_hash.key_id, chain_hash.of(content))

    def listed(self) -> list[Approval]:
        """All requests, oldest first."""
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
    """A call that needs two people. asked: its facts (JSON); about: returns the state to which it is bound; bound_digest: the digest in its
    first transaction."""

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
