"""Records the model cards that a gallery's decisions depend on: the digests of weights and calibration, and the time of first use.

Owns the time when a card is recorded, and the rule that a changed card may need two people. Never reads weights: their digest is on the
card.

1. A card is recorded in the commit that first uses it, and again in the first commit after it changed.
2. If the policy asks for two people for `model`, commits that change the content of the gallery raise NotAllowed until two people have
   accepted the changed cards. Searches are still allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from biodedup.common.described import Described
from biodedup.embed.cards import ModelCard
from biodedup.errors import NotAllowed
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.transaction import Transaction


@dataclass(frozen=True)
class BoundModel(Described):
    """A card that was used. digest: of all fields of the card that influence decisions, including the calibration; weights: their SHA-256,
    "" for a model without weights and for a model that runs elsewhere; at: seconds since 1970."""

    number: int
    model_id: str
    digest: str
    weights: str
    at: float


class ModelBinding:
    """Records the cards of one open gallery. Implements `Recorder`. cards: the cards of this process. Called with the gallery's lock
    held."""

    def __init__(self, gallery: Gallery, cards: Sequence[ModelCard], clock: Callable[[], float]) -> None:
        self._gallery, self._clock = gallery, clock
        self._cards = cards
        self._noted: set[str] = set()
        self._staged: set[str] = set()
        """model_ids whose present cards are recorded: durably (_noted), and by the present commit (_staged)."""
        gallery.recorders.append(self)

    def stage(self, transaction: Transaction) -> None:
        if not transaction.content_changed:
            return
        used = {part for model in transaction.models.values() for part in model.model_id.split("+")}
        if not used - self._noted:
            return
        changed = self.changed(transaction, used)
        known = {row[1] for row in transaction.caller_tables(noted=False).cards()}
        if (again := [card.model_id for card in changed if card.model_id in known]) and self._needs_two():
            raise NotAllowed(
                f"the card of model {again[0]} has changed, and the gallery's policy asks for two people for that; both call "
                "Engine.accept_models, or run `biodedup accept-models --by NAME`; nothing was written"
            )
        self.note(transaction, changed)
        self._staged = used

    def settle(self) -> None:
        self._noted |= self._staged
        self._staged = set()

    def changed(self, transaction: Transaction, used: set[str] | None = None) -> list[ModelCard]:
        """The present cards that differ from the recorded ones. used: model_ids, None for all recorded ones."""
        newest = {row[1]: row[2] for row in transaction.caller_tables(noted=False).cards()}
        used = set(newest) if used is None else used
        return [card for card in self._cards if card.model_id in used and newest.get(card.model_id) != card.digest]

    def note(self, transaction: Transaction, cards: Sequence[ModelCard]) -> None:
        decided = [record.at for record in transaction.audited]  # times of the decisions in this commit
        at = (decided[0] if decided else self._clock()) if cards else 0.0
        for card in cards:
            row = (card.model_id, card.digest, card.sha256 or "", float(at))
            transaction.caller_tables().add_card(row)

    def _needs_two(self) -> bool:
        return "model" in self._gallery.policies[-1].policy.two_people
