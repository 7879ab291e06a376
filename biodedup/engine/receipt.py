"""The receipt of a decision: the outcome, the policy, the models, the number of rows, and the position in the gallery's hash chain.

Owns the fields of a receipt. It contains no biometric data. Never signs (`jobs.write_receipt` does).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from biodedup.common.described import Described
from biodedup.embed.cards import ModelCard
from biodedup.errors import InvalidInput
from biodedup.gallery.answers import from_json
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.policies import policy_digest


@dataclass(frozen=True)
class Receipt(Described):
    """The receipt of one decision. rows_examined: the number of rows with a capture in common with the encounter; sent: SHA-256 of the
    request, which the sender can compute again; decision: SHA-256 of the stored decision; policy: the digest of the policy in force;
    policy_version: the version of the gallery's policy with this digest, None if there is none (the process has overridden the policy, or
    it is from an older release); model_digests: model_id -> SHA-256 of the weights on the present card, None without a card; commit, link,
    chain: the position of the decision in the hash chain, and the value of the link (hexadecimal). They are None for a decision before the
    chain began."""

    gallery_id: str
    encounter_id: str
    subject_id: str | None
    outcome: str
    reasons: tuple[str, ...]
    decided_at: float
    gallery_version: int
    gallery_size: int
    rows_examined: int | None
    incomplete: bool
    duplicate_db: float
    review_db: float
    policy: str
    policy_version: int | None
    model_digests: dict[str, str | None]
    sent: str
    decision: str
    adjudicated: dict[str, Any] | None
    commit: int | None
    link: int | None
    chain: str | None


def receipt_of(gallery: Gallery, encounter_id: str, cards: Sequence[ModelCard]) -> Receipt:
    """The receipt of the present decision on an encounter. Raises InvalidInput if the gallery has no decision on it."""
    stored = gallery.answer(encounter_id)
    if stored is None or stored.kind != "decision":
        raise InvalidInput(f"the gallery has no decision on encounter {encounter_id!r}; check its id")
    decision = from_json(stored.text)
    versions = {policy_digest(version.policy): version.version for version in gallery.policies}
    digests = {card.model_id: card.sha256 for card in cards}
    link = gallery.chain_link(decision.gallery_version)
    verdict = decision.adjudicated
    return Receipt(
        gallery_id=gallery.gallery_id,
        encounter_id=encounter_id,
        subject_id=decision.subject_id,
        outcome=decision.outcome,
        reasons=decision.reasons,
        decided_at=decision.decided_at,
        gallery_version=decision.gallery_version,
        gallery_size=decision.gallery_size,
        rows_examined=decision.compared,
        incomplete=decision.incomplete,
        duplicate_db=decision.duplicate_db,
        review_db=decision.review_db,
        policy=decision.policy_digest,
        policy_version=versions.get(decision.policy_digest),
        model_digests={model_id: digests.get(model_id) for model_id in decision.model_ids},
        sent=stored.digest.hex(),
        decision=hashlib.sha256(stored.text.encode()).hexdigest(),
        adjudicated=None if verdict is None else {"ruling": verdict.ruling, "by": verdict.by, "at": verdict.at},
        commit=None if link is None else link.commits,
        link=None if link is None else link.number,
        chain=None if link is None else link.value.hex(),
    )
