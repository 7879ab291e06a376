"""Principals: the callers of an engine by name, with their roles.

Owns the names of the roles and the check of a principal. Never authenticates: the service that uses the engine does.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection
from dataclasses import dataclass

from biodedup.common.arguments import check_fields
from biodedup.common.signatures import check_public_text
from biodedup.errors import InvalidInput, NotAllowed
from biodedup.values import check_id

ROLES = ("enrol", "search", "verify", "review", "supervise", "administer", "audit")
"""Role -> the calls that it allows.
  enrol        enrol and update subjects, open disputes
  search       1:N searches
  verify       1:1 verifications
  review       see cases, give verdicts
  supervise    remove subjects, replace all rows of a subject
  administer   policy, index, loading, maintenance, export of templates
  audit        read decisions, policies, alarms and requests, with all scores
"""


KEY_PREFIX = "ed25519:"
USER_PREFIX = "os:"
"""Of callers without a name in the audit log: the operating system's user of the process."""


def folded(name: str) -> str:
    """The name without differences of case, width and spaces. Two names with one folded form name one person."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


@dataclass(frozen=True)
class Principal:
    """A caller. name: a valid id, as a subject_id. roles: of ROLES; no role includes another role. public_keys: Ed25519, 64 hexadecimal
    digits each. A principal with public keys signs its approvals with one of the private keys."""

    name: str
    roles: Collection[str] = ()
    public_keys: Collection[str] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        check_id(self.name, "the name of a principal")
        if folded(self.name).startswith(USER_PREFIX):
            raise InvalidInput(
                f"the name of a principal is {self.name!r}, and {USER_PREFIX!r} begins the names of callers without one; name it otherwise"
            )
        if unknown := sorted(set(self.roles) - set(ROLES)):
            raise InvalidInput(f"role {unknown[0]!r} is not known; use one of {', '.join(ROLES)}")
        for key in self.public_keys:
            check_public_text(key, repr(key[:80]))
        object.__setattr__(self, "public_keys", tuple(key.lower() for key in self.public_keys))
        object.__setattr__(self, "roles", tuple(role for role in ROLES if role in set(self.roles)))

    @classmethod
    def of(cls, name: str, words: Collection[str]) -> Principal:
        """The principal of a setting's words: roles, and public keys as `ed25519:HEX`. Raises InvalidInput."""
        keys = [word.removeprefix(KEY_PREFIX) for word in words if word.startswith(KEY_PREFIX)]
        return cls(name, [word for word in words if not word.startswith(KEY_PREFIX)], keys)

    def require(self, *roles: str) -> None:
        """Raises NotAllowed unless the principal has one of these roles."""
        if not set(roles).intersection(self.roles):
            raise NotAllowed(
                f"{self.name!r} has the roles {', '.join(self.roles) or 'none'}, this call needs {' or '.join(roles)}; "
                "ask an administrator for the role"
            )
