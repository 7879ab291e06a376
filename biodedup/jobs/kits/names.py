"""Makes the ids under which the centre stores encounters of field kits.

Owns the reserved prefix and the form of these ids. Never looks anything up.

An id is bound to the kit's key: it is `kit:`, 32 digits of the key's fingerprint, and the kit's encounter_id. So no kit can use an id of another
kit, or an id that the centre assigns.
"""

from __future__ import annotations

from biodedup.jobs.kits.format.record import ID_CHARACTERS_MAX

PREFIX = "kit:"
_DIGITS = 32


def bound_id(fingerprint: bytes, encounter_id: str) -> str:
    """The id of a kit's encounter at the centre. fingerprint: of the key that signed the encounter."""
    return f"{prefix_of(fingerprint)}{encounter_id}"


def prefix_of(fingerprint: bytes) -> str:
    """The prefix of all ids of a key."""
    return f"{PREFIX}{fingerprint.hex()[:_DIGITS]}:"


def unusable_id(encounter_id: str) -> str:
    """The reason why a kit may not use this encounter_id; '' if it may."""
    if encounter_id.lower().startswith(PREFIX):
        return f"encounter_id {encounter_id[:60]!r} begins with {PREFIX!r}, which is reserved; give it another"
    if len(encounter_id) > ID_CHARACTERS_MAX:
        return f"an encounter_id has {len(encounter_id)} characters, wanted at most {ID_CHARACTERS_MAX}; shorten it"
    return ""
