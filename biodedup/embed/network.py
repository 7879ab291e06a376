"""Runs the face network: turns aligned faces into unit vectors, with ONNX Runtime.

Owns the session, batching and normalisation as the card states them. Never aligns and never compares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from biodedup.embed.cards import ModelCard
from biodedup.errors import ModelCardError
from biodedup.values import Float32

if TYPE_CHECKING:
    import onnxruntime

BATCH = 4
"""Images per call: the fastest of 1, 2, 4, 8, 16 for SFace, because its activations stay in the cache (a single core, 2026-11)."""


def open_session(card: ModelCard, threads: int) -> onnxruntime.InferenceSession:
    """The card's weights, checked and loaded. Raises ModelCardError."""
    content = card.verified_weights()
    import onnxruntime  # imported here: its threads would keep a forked child from exiting

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads do not occupy cores
    try:
        return onnxruntime.InferenceSession(content, sess_options=options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise ModelCardError(
            f"{card.path.name}: ONNX Runtime cannot load the weights ({error}); convert them"
        ) from error


class EmbeddingNetwork:
    """A network in memory. Thread-safe. Raises ModelCardError if card and weights do not fit."""

    def __init__(self, card: ModelCard, threads: int) -> None:
        self._session = open_session(card, threads)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1:
            raise ModelCardError(f"{card.path.name}: the network has {len(inputs)} inputs, wanted one image")
        shape = inputs[0].shape
        if list(shape[1:]) != [3, 112, 112]:
            raise ModelCardError(f"{card.path.name}: the network takes {shape}, wanted (n, 3, 112, 112)")
        if isinstance(outputs[0].shape[-1], int) and outputs[0].shape[-1] != card.dimension:
            raise ModelCardError(
                f"{card.path.name}: the network gives {outputs[0].shape[-1]} numbers, the card states {card.dimension}"
            )
        self._fixed = shape[0] if isinstance(shape[0], int) else 0  # some networks have a fixed batch size
        self._batch = self._fixed or BATCH
        self._input, self._output = inputs[0].name, outputs[0].name
        self._card = card

    def embed(self, images: NDArray[np.uint8]) -> Float32:
        """The embeddings, float32 (n, d), unit rows. images: uint8 (n, 112, 112, 3) RGB."""
        return self.embed_with_norms(images)[0]

    def embed_with_norms(self, images: NDArray[np.uint8]) -> tuple[Float32, Float32]:
        """(the embeddings, the lengths of the network's outputs, float32 (n,)). With a mirror image both outputs are added.

        The length grows with the quality of the picture (Meng et al., "MagFace", 2021; Terhörst et al., "QMagFace", 2023).
        """
        card = self._card
        outputs = self._run(images)
        vectors = unit(outputs)
        if card.mirror:
            mirrored = self._run(images[:, :, ::-1])
            vectors, outputs = unit(vectors + unit(mirrored)), outputs + mirrored
        norms = np.asarray(np.linalg.norm(outputs, axis=1), np.float32)
        return (vectors if card.mean is None else unit(vectors - card.mean)), norms

    def _run(self, images: NDArray[np.uint8]) -> Float32:
        card = self._card
        assert card.dimension is not None
        out = np.empty((len(images), card.dimension), np.float32)
        for start in range(0, len(images), self._batch):
            block = images[start : start + self._batch]
            if card.channels == "bgr":
                block = block[..., ::-1]
            pixels = (block.transpose(0, 3, 1, 2).astype(np.float32) + np.float32(card.offset)) * np.float32(card.scale)
            pixels = (
                np.concatenate([pixels, np.repeat(pixels[-1:], self._fixed - len(block), axis=0)])
                if self._fixed
                else pixels
            )
            out[start : start + len(block)] = self._session.run([self._output], {self._input: pixels})[0][: len(block)]
        return out


def unit(vectors: Float32) -> Float32:
    """The vectors scaled to unit length; a vector of zeros stays zero."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), np.float32)
