"""An encounter whose subject_id is enrolled already: a second visit of that person, or a case.

Owns the rule for all jobs: verify it 1:1 against the subject, and dispute it where the verification fails.
"""

from __future__ import annotations

from biodedup.engine import Engine
from biodedup.errors import CallerError
from biodedup.values import Decision, Encounter, Verification


def verify_or_dispute(engine: Engine, encounter: Encounter, subject_id: str) -> Verification | Decision | None:
    """The verification where it is accepted; else the decision on the case that was opened; None where the two cannot be compared."""
    try:
        verified = engine.verify(encounter, subject_id)
        return verified if verified.accepted else engine.dispute(encounter)
    except CallerError:
        return None
