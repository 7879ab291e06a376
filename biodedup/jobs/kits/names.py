"""The id under which the centre stores an encounter of a field kit.

Owns the reserved prefix and the form of these ids. Never looks anything up.

The kit's own encounter_id is bound to its key: `kit:` and 32 digits of the key's fingerprint precede it. So no kit can take an id of another
kit, or one that the centre assigns itself.
"""

from __future__ import annotations

from biodedup.jobs.kits.format.record import ID_CHARACTERS_MAX

PREFIX = "kit:"
_DIGITS = 32


def bound_id(fingerprint: bytes, encounter_id: str) -> str:
    """fingerprint: of the key that signed the encounter."""
    return f"{prefix_of(fingerprint)}{encounter_id}"


def prefix_of(fingerprint: bytes) -> str:
    """What all ids of a key begin with."""
    return f"{PREFIX}{fingerprint.hex()[:_DIGITS]}:"


def unusable_id(encounter_id: str) -> str:
    """Why a kit may not use this id for an encounter; empty where it may."""
    if encounter_id.lower().startswith(PREFIX):
        return f"encounter_id {encounter_id[:60]!r} begins with {PREFIX!r}, which is reserved; give it another"
    if len(encounter_id) > ID_CHARACTERS_MAX:
        return f"an encounter_id has {len(encounter_id)} characters, wanted at most {ID_CHARACTERS_MAX}; shorten it"
    return ""
