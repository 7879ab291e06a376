"""Runs the finger network: turns the inputs of prints into unit vectors, with ONNX Runtime.

Owns batching and normalisation. Never prepares inputs (`finger_input.py`), and never compares.
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
"""The output for the estimated pose, and the unit of its position (`models/finger_network.py`)."""


class FingerNetwork:
    """A network in memory. Thread-safe. Raises ModelCardError if card and weights do not fit."""

    def __init__(self, card: ModelCard, threads: int) -> None:
        self._session = open_session(card, threads)
        assert card.dimension is not None, "an embedding's card has a dimension"
        wanted = {"directions": [4, CELLS, CELLS], "minutiae": [MINUTIAE_MAX, 5]}
        inputs = {item.name: list(item.shape[1:]) for item in self._session.get_inputs()}
        if inputs != wanted:
            raise ModelCardError(f"{card.path.name}: the network takes {inputs}, wanted {wanted}")
        width = self._session.get_outputs()[0].shape[-1]
        if width != card.dimension:
            raise ModelCardError(
                f"{card.path.name}: the network gives {width} numbers, the card states {card.dimension}"
            )
        self._output = self._session.get_outputs()[0].name
        self._card = card

    def poses(self, prints: Sequence[FingerInput]) -> list[tuple[float, float, float] | None]:
        """The pose of each print: x and y of the core in pixels of its ridge map, and the rotation of the finger in radians, clockwise. None if the
        network has no such output. It runs the network again, for a trace."""
        if _POSE not in {output.name for output in self._session.get_outputs()}:
            return [None] * len(prints)
        poses: list[tuple[float, float, float] | None] = []
        for item in prints:
            inputs = {"directions": item.directions[None], "minutiae": item.minutiae[None]}
            x, y, cosine, sine = np.asarray(self._session.run([_POSE], inputs)[0], np.float64)[0].tolist()
            poses.append((item.centre[0] + _POSE_PX * x, item.centre[1] + _POSE_PX * y, atan2(sine, cosine)))
        return poses

    def embed(self, prints: Sequence[FingerInput]) -> Float32:
        """The embeddings, float32 (n, d), unit rows."""
        dimension = self._card.dimension
        assert dimension is not None
        out = np.empty((len(prints), dimension), np.float32)
        for start in range(0, len(prints), BATCH):
            block = prints[start : start + BATCH]
            inputs = {
                "directions": np.stack([item.directions for item in block]),
                "minutiae": np.stack([item.minutiae for item in block]),
            }
            out[start : start + len(block)] = self._session.run([self._output], inputs)[0]
        vectors = unit(out)
        return vectors if self._card.mean is None else unit(vectors - self._card.mean)
