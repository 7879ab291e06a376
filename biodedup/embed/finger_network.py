"""The finger network: turns prints into unit vectors, with ONNX Runtime.

Owns batching and normalisation. Never enhances (`capture/fingers/ridges.py`), prepares inputs (`finger_input.py`) or compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import atan2

import numpy as np

from biodedup.embed.cards import ModelCard
from biodedup.embed.finger_input import CELLS, MINUTIAE_MAX, FingerInput
from biodedup.embed.network import open_session, unit
from biodedup.errors import ModelCardError
from biodedup.values import Float32

BATCH = 8
_POSE, _POSE_PX = "pose", 50.0
"""The output that says where the network takes the core to be, and its unit: `models/finger_network.py`."""


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

    def poses(self, prints: Sequence[FingerInput]) -> list[tuple[float, float, float] | None]:
        """Of each print: x and y of the core, in pixels of its ridge map, and the angle in radians by which the finger is turned,
        clockwise as seen. None from a network that does not say. For a trace: it runs the network again."""
        if _POSE not in {output.name for output in self._session.get_outputs()}:
            return [None] * len(prints)
        found: list[tuple[float, float, float] | None] = []
        for one in prints:
            given = {"directions": one.directions[None], "minutiae": one.minutiae[None]}
            x, y, cosine, sine = np.asarray(self._session.run([_POSE], given)[0], np.float64)[0].tolist()
            found.append((one.centre[0] + _POSE_PX * x, one.centre[1] + _POSE_PX * y, atan2(sine, cosine)))
        return found

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
