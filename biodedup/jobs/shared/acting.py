"""The person who starts a job that changes a gallery: role, second person, and the record in the audit log.

Owns what a job checks before its first commit. Engines check their own calls (engine/callers/).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biodedup.config import Config
from biodedup.engine.callers.approvals import Approvals, Approve, signer_of
from biodedup.engine.callers.audit import AuditLog, Call, carried_out
from biodedup.engine.engine import Engine
from biodedup.engine.log import EngineLog
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.transaction import Transaction
from biodedup.principals import Principal


@dataclass(frozen=True)
class Actor:
    """by: the person, one of `Config.identities` where these are configured; sign: the file of its private key, PEM."""

    by: str = ""
    sign: Path | None = None

    def principal(self, config: Config, role: str) -> Principal | None:
        """None without identities. Raises NotAllowed."""
        if config.identities is None:
            return None
        principal = config.identity(self.by)
        principal.require(role)
        return principal

    def engine(self, engine: Engine) -> Engine:
        """The engine for this person; itself without identities."""
        return engine if engine.config.identities is None else engine.as_principal(self.by, key=self.sign)


NOBODY = Actor()


@contextmanager
def begun_by(
    actor: Actor,
    gallery: Gallery,
    config: Config,
    action: str,
    facts: Mapping[str, Any],
    *,
    role: str,
    kind: str,
    clock: Callable[[], float] = time.time,
) -> Iterator[Approve]:
    """Yields what the first transaction of a job calls: it stores the approval, and the record of the job in the audit log. action: of
    `Policy.two_people`; facts: what is to be done; kind: the name of the job in the audit log.

    Raises ApprovalNeeded, NotAllowed; then nothing was done, and the audit log has it where it records all calls.
    """
    audit = AuditLog(gallery, config.audited, clock)
    principal = actor.principal(config, role)
    try:
        with audit.made(Call(audit, kind, "" if principal is None else principal.name, "")):
            sign = None if principal is None or actor.sign is None else signer_of(principal, actor.sign)
            approve = Approvals(gallery, clock, EngineLog(config.log)).require(
                action, principal, lambda: facts, sign=sign
            )

            def begin(transaction: Transaction) -> None:
                approve(transaction)
                carried_out()

            yield begin
    finally:
        audit.close()
