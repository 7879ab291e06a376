"""The versions of a gallery's policy: the text of each, its author, its date and its reason.

Owns their form as text in the database. Never decides and never writes.

1. Versions are numbered from 1, the policy that the gallery was created with. None is ever changed or dropped.
2. A field that the text does not have (it is older than the field) gets its default.
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
    """A policy as a gallery keeps it. by, at: the person who stored it, and the time in seconds; "" and None of the first version, which came with the
    gallery. reason: why."""

    version: int
    policy: Policy
    by: str = ""
    at: float | None = None
    reason: str = ""


def to_text(policy: Policy) -> str:
    """One line of JSON, as `from_text` reads it."""
    return json.dumps(_stored(policy))


@lru_cache(maxsize=64)
def policy_digest(policy: Policy) -> str:
    """32 hexadecimal digits of SHA-256 of its fields, as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(_stored(policy), sort_keys=True).encode()).hexdigest()[:32]


def from_text(text: str, what: str) -> Policy:
    """what: holds the text, for errors. Raises NotAGallery for a policy of a later release, GalleryDamaged for what is none."""
    try:
        return _policy_of(json.loads(text), what)
    except (ValueError, InvalidInput) as error:
        if isinstance(error, NotAGallery):
            raise
        raise GalleryDamaged(f"{what} is no policy; restore the gallery from a backup") from error


def from_settings(text: str) -> Policy:
    """The policy in the settings that a gallery was created with, JSON. Raises as `from_text`."""
    what = "the policy of the gallery's settings"
    try:
        fields = json.loads(text).get("policy") or {}
        return _policy_of(fields, what)
    except (ValueError, AttributeError) as error:
        if isinstance(error, NotAGallery):
            raise
        raise GalleryDamaged(f"{what} is none; restore the gallery from a backup") from error


def told(changes: Mapping[str, tuple[Any, Any]], before: str, after: str) -> str:
    """Differences in words, as `fpir is 1e-06 BEFORE, 0.001 AFTER`."""
    return "; ".join(f"{name} is {shown(a)} {before}, {shown(b)} {after}" for name, (a, b) in changes.items())


def mismatch(where: str, stored: PolicyVersion, given: Policy) -> PolicyMismatch:
    """The error for a policy that is not the gallery's."""
    return PolicyMismatch(
        f"{where} decides by its own policy (version {stored.version}), and another one was given: "
        f"{told(differences(stored.policy, given), 'in the gallery', 'as given')}. Give none, so that the gallery's counts; store another "
        "one with `biodedup policy set`; or open it with override_policy=True, for this process alone"
    )


def shown(value: Any) -> str:
    """A value of a policy in words."""
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
            f"{what} has {sorted(unknown)[0]!r}, which this version does not know; use the one that stored it"
        )
    return made(Policy, typed(Policy, fields, what), what)
