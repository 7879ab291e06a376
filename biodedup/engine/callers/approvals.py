"""Approvals: calls that need two people.

Owns the requests: the first call stores one and does nothing; the same call by another principal approves it and is carried out.

1. A request is about what the gallery holds when it is made: its digest covers the rows, the candidates or the policy version concerned, so that
   an approval never meets another state than the one that was asked about.
2. An approval is stored in the commit that carries the call out, or, of a replacement, a verdict or a policy, just before. If that fails,
   both people begin again.
3. A request ends after a week, and with its approval. Requests and approvals are kept for ever. They hold ids and reasons, nothing biometric.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from biodedup.common.described import Described
from biodedup.engine.log import EngineLog
from biodedup.errors import ApprovalNeeded, NotAllowed
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.snapshot import Snapshot
from biodedup.gallery.transaction import Transaction
from biodedup.principals import Principal, folded

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
        return action in self._gallery.policies[-1].policy.two_people

    def require(
        self,
        action: str,
        caller: Principal | None,
        facts: Callable[[], Mapping[str, Any]],
        about: Callable[[Snapshot], Any] = lambda snapshot: None,
        act: Callable[[Transaction], None] = lambda transaction: None,
    ) -> None:
        """Returns where the call may be carried out. facts: JSON-ready; about: what else the request is bound to, read inside the transaction;
        act: what is carried out, in the same transaction.

        Raises ApprovalNeeded where it was stored as a request, NotAllowed for a caller without a name.
        """
        if not self.needed(action):
            with self._gallery.transaction() as transaction:
                act(transaction)
            return
        if caller is None:
            raise NotAllowed(
                f"the gallery's policy asks for two people for {action!r}, and this call names no principal; call it by "
                "engine.as_principal(...), or --by NAME with settings that have [identities], once for each of two"
            )
        asked = json.dumps(dict(facts()), sort_keys=True)
        now = self._clock()
        approved = False
        with self._gallery.transaction() as transaction:
            bound = about(transaction.snapshot())
            digest = hashlib.sha256(json.dumps([action, asked, bound]).encode()).digest()
            rows = transaction.callers(noted=False).approvals()
            known = [
                row
                for row in rows
                if row[1] == action and row[2] == digest and row[6] is None and row[5] > now - OPEN_S
            ]
            if known and folded(known[-1][4]) != folded(caller.name):
                number, *request = known[-1][:6]
                transaction.callers().put_approval(number, (*request, caller.name, now))
                act(transaction)
                approved = True
            elif known:
                number = known[-1][0]
            else:
                number = transaction.callers().put_approval(None, (action, digest, asked, caller.name, now, None, None))
        if approved or not known:
            self._log.asked(action, number, approved=approved)
        if approved:
            return
        raise ApprovalNeeded(
            f"{action!r} needs two people; request {number} of {caller.name!r} is stored, and nothing was done; another principal "
            "with the same role approves it by the same call within a week",
            number,
        )

    def listed(self) -> list[Approval]:
        """Oldest first."""
        return [
            Approval(number, action, json.loads(facts), asked_by, asked_at, approved_by, approved_at)
            for number, action, _, facts, asked_by, asked_at, approved_by, approved_at in self._gallery.approvals()
        ]
