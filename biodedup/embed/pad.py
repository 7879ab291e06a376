"""Runs a network for presentation attack detection: it tells living faces from photographs, screens and masks (ISO/IEC 30107).

Owns the session and the score as a card of kind `pad` states them. Never aligns. The package has no such network; the caller provides a card.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from biodedup.embed.cards import ModelCard
from biodedup.embed.network import open_session
from biodedup.errors import ModelCardError
from biodedup.values import Float32


class PadNetwork:
    """A network in memory. Thread-safe. Raises ModelCardError if card and weights do not fit."""

    def __init__(self, card: ModelCard, threads: int) -> None:
        self.card = card
        self._session = open_session(card, threads)
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4:
            raise ModelCardError(f"{card.path.name}: the network does not take a single batch of images (n, 3, h, w)")
        shape = inputs[0].shape
        sides = [side if isinstance(side, int) else 112 for side in shape[2:]]
        if shape[1] != 3:
            raise ModelCardError(f"{card.path.name}: the network takes {shape}, wanted (n, 3, h, w)")
        self._size = sides[1], sides[0]
        self._fixed = shape[0] if isinstance(shape[0], int) else 0
        self._input, self._output = inputs[0].name, self._session.get_outputs()[0].name

    def scores(self, images: NDArray[np.uint8]) -> Float32:
        """The liveness scores, float32 (n,); a higher score means a living face. images: aligned faces, uint8 (n, 112, 112, 3) RGB."""
        card = self.card
        resized = [cv2.resize(image, self._size, interpolation=cv2.INTER_AREA) for image in images]
        pixels = np.stack(resized).astype(np.float32)[..., :: 1 if card.channels == "rgb" else -1]
        inputs = np.ascontiguousarray(((pixels + card.offset) * card.scale).transpose(0, 3, 1, 2), np.float32)
        step = self._fixed or len(inputs)
        return np.concatenate([self._run(inputs[start : start + step], step) for start in range(0, len(inputs), step)])

    def _run(self, inputs: Float32, size: int) -> Float32:
        count = len(inputs)
        if count < size:
            inputs = np.concatenate([inputs, np.repeat(inputs[:1], size - count, axis=0)])
        output = np.asarray(self._session.run([self._output], {self._input: inputs})[0], np.float32)[:count]
        output = output.reshape(count, -1)
        if self.card.live is None:
            if output.shape[1] != 1:
                raise ModelCardError(
                    f"{self.card.path.name}: the network gives {output.shape[1]} numbers; state the class of living faces as [pad] live"
                )
            scores = output[:, 0]
        else:
            if not 0 <= self.card.live < output.shape[1]:
                raise ModelCardError(
                    f"{self.card.path.name}: live is {self.card.live}, the network has {output.shape[1]} classes"
                )
            odds = np.exp(output - output.max(axis=1, keepdims=True))
            scores = odds[:, self.card.live] / odds.sum(axis=1)
        if not np.isfinite(scores).all():
            scores = np.where(np.isfinite(scores), scores, -np.inf)  # NaN and infinity do not prove liveness
        return np.asarray(scores, np.float32)
