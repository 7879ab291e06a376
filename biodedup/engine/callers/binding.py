"""Binds a gallery to the model cards that its decisions rest on: which digest of weights and calibration, and since when.

Owns when a card is noted, and whether a changed one needs two people. Never reads weights: their digest stands on the card.

1. A card is noted in the commit that first uses it, and again, as an event of its own in the hash chain, in the first commit after it changed.
2. Where the policy asks for two people for `model`, what changes the content of a gallery raises NotAllowed until two people accepted the
   changed cards. Searches go on: they change nothing.
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
    """A card that came into use. digest: of what decides on the card, the calibration included; weights: SHA-256, "" for code alone and
    for a model that runs elsewhere; at: seconds since 1970."""

    number: int
    model_id: str
    digest: str
    weights: str
    at: float


class ModelBinding:
    """The cards of one open gallery; a recorder of its commits. cards: at hand in this process. Called under the gallery's lock."""

    def __init__(self, gallery: Gallery, cards: Sequence[ModelCard], clock: Callable[[], float]) -> None:
        self._gallery, self._clock = gallery, clock
        self._cards = cards
        self._noted: set[str] = set()
        self._staged: set[str] = set()
        """model_ids whose cards are noted as they are here, on the disk and in the present commit."""
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
        """The cards that are not noted as they are here. used: model_ids, None for all that the gallery has noted."""
        newest = {row[1]: row[2] for row in transaction.caller_tables(noted=False).cards()}
        used = set(newest) if used is None else used
        return [card for card in self._cards if card.model_id in used and newest.get(card.model_id) != card.digest]

    def note(self, transaction: Transaction, cards: Sequence[ModelCard]) -> None:
        decided = [record.at for record in transaction.audited]  # the time of a decision that this commit holds
        at = (decided[0] if decided else self._clock()) if cards else 0.0
        for card in cards:
            row = (card.model_id, card.digest, card.sha256 or "", float(at))
            transaction.caller_tables().add_card(row)

    def _needs_two(self) -> bool:
        return "model" in self._gallery.policies[-1].policy.two_people
