"""The extractor: captures into templates, in order, a refusal in place of each that will not do.

Owns batching over captures and the loading of models on first use. Never searches, stores or compares.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np

from biodedup.capture.face import AlignedFace, FaceDetector
from biodedup.capture.finger import FingerReader
from biodedup.capture.formats import check_array, decode, read
from biodedup.capture.minutiae_layouts import is_record
from biodedup.config import Config
from biodedup.embed.cards import ModelCard, load_card, minutiae_card
from biodedup.embed.network import EmbeddingNetwork
from biodedup.errors import InvalidInput
from biodedup.values import Capture, Face, Finger, Missing, Refusal, Template

_log = logging.getLogger(__name__)


class Extractor:
    """Templates from captures. Thread-safe; models are loaded when a capture first needs them."""

    def __init__(self, config: Config | None = None) -> None:
        self.config = config = config or Config()
        self._face_card = load_card(config.face.model, config.face.model_folder)
        self._finger_card = minutiae_card(config.finger.minutiae, config.finger.model)
        self._finger_card.verify()
        self._lock = threading.Lock()
        self._network: EmbeddingNetwork | None = None
        self._detector: FaceDetector | None = None
        self._reader = FingerReader(config.finger, self._finger_card.model_id, self._finger_card.weights)

    @property
    def cards(self) -> tuple[ModelCard, ...]:
        """The cards of the models that make templates."""
        return self._face_card, self._finger_card

    @property
    def model_ids(self) -> dict[str, str]:
        """Modality -> model_id."""
        return {"face": self._face_card.model_id, "finger": self._finger_card.model_id}

    def extract(self, captures: Sequence[Capture]) -> list[Template | Refusal]:
        """A template or a refusal for each capture, in order. `Missing` gives a refusal of that name.

        Raises InvalidInput, before any work, for something that is no capture or an array that is no image.
        """
        for capture in captures:
            if not isinstance(capture, (Face, Finger, Missing)):
                raise InvalidInput(
                    f"extract takes Face, Finger or Missing, got {type(capture).__name__}; wrap it, as Face(path)"
                )
            if not isinstance(capture, Missing) and isinstance(capture.data, np.ndarray):
                check_array(capture.data)
        if any(isinstance(capture, Face) for capture in captures):
            self._load_face_models()
        if self.config.threads == 1 or len(captures) < 2:
            prepared = [self._prepare(capture) for capture in captures]
        else:
            with ThreadPoolExecutor(self.config.threads) as pool:
                prepared = list(pool.map(self._prepare, captures))
        faces = [item for item in prepared if isinstance(item, AlignedFace)]
        embedded = iter(self._embed(faces) if faces else ())
        return [next(embedded) if isinstance(item, AlignedFace) else item for item in prepared]

    def _prepare(self, capture: Capture) -> Template | Refusal | AlignedFace:
        """Everything that concerns one capture alone."""
        if isinstance(capture, Missing):
            return Refusal(capture.position, "missing", capture.reason)
        try:
            return self._read(capture)
        except MemoryError:
            raise  # says nothing of the capture, and may pass
        except Exception as error:  # ours or a library's defect: it costs one capture, not the batch
            # the type alone: a library's text may quote what it was given
            _log.error("a %s capture could not be processed: %s", capture.column, type(error).__name__)
            return Refusal(capture.column, "failed", type(error).__name__)

    def _read(self, capture: Face | Finger) -> Template | Refusal | AlignedFace:
        data = capture.data
        if isinstance(capture, Finger) and not isinstance(data, np.ndarray):
            content = read(data, capture.column, self.config.capture)
            if isinstance(content, Refusal):
                return content
            if is_record(content):
                return self._reader.take(content, capture.position)
            data = content
        pixels = decode(data, capture.column, self.config.capture)
        if isinstance(pixels, Refusal):
            return pixels
        if isinstance(capture, Finger):
            return self._reader.read(pixels, capture.position, capture.dpi)
        assert self._detector is not None, "loaded before the first face"
        return self._detector.align(pixels)

    def _embed(self, faces: Sequence[AlignedFace]) -> list[Template]:
        assert self._network is not None, "loaded before the first face"
        vectors = self._network.embed(np.stack([face.image for face in faces]))
        model_id = self._face_card.model_id
        return [
            Template("face", model_id, vector, quality=round(face.quality, 4))
            for vector, face in zip(vectors, faces, strict=True)
        ]

    def _load_face_models(self) -> None:
        with self._lock:
            if self._detector is None:
                cv2.setNumThreads(1)  # captures run side by side; OpenCV's own threads would take the cores from them
                card = load_card(self.config.face.detector)
                card.verify()
                assert card.weights is not None, "a detector has weights"
                self._network = EmbeddingNetwork(self._face_card, self.config.threads)
                self._detector = FaceDetector(self.config.face, card.weights)
