"""The policy in force: the gallery's stored policy, or a policy that overrides it in this process.

Owns the choice between the two, and the storing of a new version. Never decides on encounters.

1. Opening a gallery with another policy than the stored one raises PolicyMismatch, unless override is set.
2. A new version applies from its commit on: in this process at once, in readers when they refresh.
"""

from __future__ import annotations

from collections.abc import Callable

from biodedup.config import Policy
from biodedup.errors import InvalidInput
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.policies import PolicyVersion, mismatch
from biodedup.gallery.transaction import Transaction
from biodedup.values import NOTE_LENGTH_MAX, check_id, check_text


class PolicyInForce:
    """The policy in force of one open gallery. Calling the object returns it. given: the policy with which the gallery was opened;
    override: use `given` in this process without storing it. Thread-safe."""

    def __init__(self, gallery: Gallery, given: Policy | None, *, override: bool) -> None:
        stored = gallery.policies[-1]
        if given is not None and given != stored.policy and not override:
            raise mismatch(gallery.name, stored, given)
        self._gallery = gallery
        self._overriding = given if override else None

    def __call__(self) -> Policy:
        return self._overriding or self._gallery.policies[-1].policy

    def store(
        self,
        policy: Policy,
        by: str,
        reason: str,
        clock: Callable[[], float],
        approve: Callable[[Transaction], None] = lambda transaction: None,
    ) -> PolicyVersion:
        """Stores the policy as the next version, or returns the present version if it is the same policy. Ends an override.

        approve: called in the transaction that stores it."""
        if not isinstance(policy, Policy):
            raise InvalidInput(f"the policy is a Policy, got {type(policy).__name__}; write Policy(fpir=1e-6)")
        check_id(by, "by")
        if not isinstance(reason, str) or not reason.strip():
            raise InvalidInput("the reason is empty, or not a str; state why the policy changes")
        check_text(reason, "the reason", NOTE_LENGTH_MAX)
        with self._gallery.transaction() as transaction:
            present = self._gallery.policies[-1]
            if present.policy != policy:
                approve(transaction)
                present = PolicyVersion(present.version + 1, policy, by, clock(), reason)
                transaction.set_policy(present)
        self._overriding = None
        return present
