"""The versions of a gallery's policy: content, author, date and reason.

Owns their form as text in the database. Never decides and never writes.

1. Versions are numbered from 1, the policy with which the gallery was created. A version is never changed or deleted.
2. A field that an older text does not have gets its default.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from biodedup.common.described import Described
from biodedup.common.tables import differences, flat, hints, made, plain, typed
from biodedup.config import Policy
from biodedup.errors import GalleryDamaged, InvalidInput, NotAGallery, PolicyMismatch

_STORED_NAMES = {"use_gallery_impostors": "own_strangers"}
"""Field -> its name in the database: the name of release 0.2. Stored texts and digests keep it."""
_OLD_NAMES = {"duplicate_fpir": "fpir", "own_strangers": "use_gallery_impostors"}
"""Name in a stored text -> field."""


@dataclass(frozen=True)
class PolicyVersion(Described):
    """One stored version of the policy. by, at: the person who stored it, and the time in seconds since 1970; "" and None for version 1;
    reason: why it was stored."""

    version: int
    policy: Policy
    by: str = ""
    at: float | None = None
    reason: str = ""


def to_text(policy: Policy) -> str:
    """The policy as one line of JSON, for `from_text`."""
    return json.dumps(_stored(policy))


@lru_cache(maxsize=64)
def policy_digest(policy: Policy) -> str:
    """The first 32 hexadecimal digits of the SHA-256 of the policy's fields, as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(_stored(policy), sort_keys=True).encode()).hexdigest()[:32]


def from_text(text: str, what: str) -> Policy:
    """The policy from its JSON text. what: the name of the text, for errors. Raises NotAGallery for a policy of a later release,
    GalleryDamaged for other content."""
    try:
        return _policy_of(json.loads(text), what)
    except (ValueError, InvalidInput) as error:
        if isinstance(error, NotAGallery):
            raise
        raise GalleryDamaged(f"{what} is not a policy; restore the gallery from a backup") from error


def from_settings(text: str) -> Policy:
    """The policy in the settings that a gallery was created with, JSON. Raises as `from_text`."""
    what = "the policy of the gallery's settings"
    try:
        fields = json.loads(text).get("policy") or {}
        return _policy_of(fields, what)
    except (ValueError, AttributeError) as error:
        if isinstance(error, NotAGallery):
            raise
        raise GalleryDamaged(f"{what} is damaged; restore the gallery from a backup") from error


def differences_in_words(changes: Mapping[str, tuple[Any, Any]], before: str, after: str) -> str:
    """Differences as text, for example `fpir is 1e-06 BEFORE, 0.001 AFTER`."""
    return "; ".join(
        f"{name} is {value_in_words(a)} {before}, {value_in_words(b)} {after}" for name, (a, b) in changes.items()
    )


def mismatch(where: str, stored: PolicyVersion, given: Policy) -> PolicyMismatch:
    """The error for a policy that differs from the gallery's."""
    return PolicyMismatch(
        f"{where} has its own policy (version {stored.version}), got another policy: "
        f"{differences_in_words(differences(stored.policy, given), 'in the gallery', 'as given')}. State no policy, to use the gallery's; "
        "store another one with `biodedup policy set`; or open it with override_policy=True, for this process only"
    )


def value_in_words(value: Any) -> str:
    """A value of a policy as text."""
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value in (None, ()) else ", ".join(value) if isinstance(value, tuple) else str(value)


def _stored(policy: Policy) -> dict[str, Any]:
    return {_STORED_NAMES.get(name, name): plain(value) for name, value in flat(policy).items()}


def _policy_of(fields: Any, what: str) -> Policy:
    if isinstance(fields, dict):
        fields = {_OLD_NAMES.get(name, name): value for name, value in fields.items()}
    if isinstance(fields, dict) and (unknown := fields.keys() - hints(Policy).keys()):
        raise NotAGallery(
            f"{what} has {sorted(unknown)[0]!r}, which this release does not know; use the release that stored it"
        )
    return made(Policy, typed(Policy, fields, what), what)
