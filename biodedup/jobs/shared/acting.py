"""Authorises the person who starts a job that changes a gallery: checks the role, asks for a second person, and writes the audit record.

Owns the checks that a job makes before its first commit. Never checks the calls of an `Engine`: `engine/callers/` does.
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
    """The person who starts a job. by: the name, which `Config.identities` must list if it is set; sign: the file of the person's private key
    (PEM)."""

    by: str = ""
    sign: Path | None = None

    def principal(self, config: Config, role: str) -> Principal | None:
        """The person, who must have the role; None if the config has no identities. Raises NotAllowed."""
        if config.identities is None:
            return None
        principal = config.identity(self.by)
        principal.require(role)
        return principal

    def engine(self, engine: Engine) -> Engine:
        """The engine, acting for this person; the same engine if the config has no identities."""
        return engine if engine.config.identities is None else engine.as_principal(self.by, key=self.sign)


NOBODY = Actor()


@contextmanager
def authorised_job(
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
    """Authorises a job. Yields a function that the first transaction of the job calls: it stores the approval and the audit record.

    action: an action of `Policy.two_people`; facts: what the job will do, for the person who approves; kind: the job's name in the audit log.
    Raises ApprovalNeeded, NotAllowed. Then nothing is changed, and the refused call is in the audit log if the log records all calls.
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
