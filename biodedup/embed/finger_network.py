"""The finger network: prints into unit vectors, through ONNX Runtime.

Owns batching and normalisation. Never enhances (`capture.ridges`), never lays inputs out (`finger_input`), never compares.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from biodedup.embed.cards import ModelCard
from biodedup.embed.finger_input import CELLS, MINUTIAE_MAX, FingerInput
from biodedup.embed.network import open_session, unit
from biodedup.errors import ModelCardError
from biodedup.values import Float32

BATCH = 8


class FingerNetwork:
    """One network in memory. Thread-safe. Raises ModelCardError where card and weights disagree."""

    def __init__(self, card: ModelCard, threads: int) -> None:
        self._session = open_session(card, threads)
        assert card.dimension is not None, "an embedding's card has a dimension"
        wanted = {"directions": [4, CELLS, CELLS], "minutiae": [MINUTIAE_MAX, 5]}
        found = {given.name: list(given.shape[1:]) for given in self._session.get_inputs()}
        if found != wanted:
            raise ModelCardError(f"{card.path.name}: the network takes {found}, wanted {wanted}")
        width = self._session.get_outputs()[0].shape[-1]
        if width != card.dimension:
            raise ModelCardError(
                f"{card.path.name}: the network gives {width} numbers, the card states {card.dimension}"
            )
        self._output = self._session.get_outputs()[0].name
        self._card = card

    def embed(self, prints: Sequence[FingerInput]) -> Float32:
        """Returns float32 (n, d), unit rows."""
        dimension = self._card.dimension
        assert dimension is not None
        out = np.empty((len(prints), dimension), np.float32)
        for start in range(0, len(prints), BATCH):
            block = prints[start : start + BATCH]
            given = {
                "directions": np.stack([one.directions for one in block]),
                "minutiae": np.stack([one.minutiae for one in block]),
            }
            out[start : start + len(block)] = self._session.run([self._output], given)[0]
        vectors = unit(out)
        return vectors if self._card.mean is None else unit(vectors - self._card.mean)
