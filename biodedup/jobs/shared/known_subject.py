"""Handles an encounter whose subject_id is already enrolled: it is verified 1:1 against the subject; if that fails, a case is opened.

Owns this rule for all jobs.
"""

from __future__ import annotations

from biodedup.engine import Engine
from biodedup.errors import CallerError
from biodedup.values import Decision, Encounter, Verification


def verify_or_dispute(engine: Engine, encounter: Encounter, subject_id: str) -> Verification | Decision | None:
    """The verification if it is accepted; otherwise the decision that opens a case; None if the encounter and the subject have no capture in
    common."""
    try:
        verified = engine.verify(encounter, subject_id)
        return verified if verified.accepted else engine.dispute(encounter)
    except CallerError:
        return None
