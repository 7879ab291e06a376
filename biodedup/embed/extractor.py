"""Turns captures into templates or refusals, in order.

Owns batching over captures, and the loading of models on first use. With `Config.isolation` it passes captures to worker processes
(`isolation.py`). Never searches, stores or compares.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from biodedup.capture.faces.face import AlignedFace, FaceDetector
from biodedup.capture.fingers.finger import FingerReader
from biodedup.capture.fingers.one_pass import one_pass
from biodedup.capture.fingers.oriented import RIDGE_DPI
from biodedup.capture.fingers.resampling import DPI
from biodedup.capture.minutiae.layouts import is_record
from biodedup.capture.pictures.containers import chosen, is_container
from biodedup.capture.pictures.formats import Pixels, check_array, decode
from biodedup.capture.pictures.records import Picture
from biodedup.capture.pictures.resolution import settled
from biodedup.capture.reading import read
from biodedup.common.arguments import checked_methods
from biodedup.config import Config
from biodedup.devices import DeviceVerdict
from biodedup.embed.cards import ModelCard, joint_id, load_card, minutiae_card
from biodedup.embed.finger_input import FingerInput, finger_input
from biodedup.embed.finger_network import FingerNetwork
from biodedup.embed.isolation import IsolatedWorkers
from biodedup.embed.network import EmbeddingNetwork
from biodedup.embed.pad import PadNetwork
from biodedup.errors import InvalidInput, ModelCardError
from biodedup.trace import Trace, mapped, tracing
from biodedup.values import LIVE, Capture, CaptureData, Face, Finger, Missing, Refusal, Template

Prepared: TypeAlias = Template | Refusal | AlignedFace | tuple[Template, FingerInput | None]
"""A capture before the embedding networks run. The template of a finger has no embedding yet; its network input is None if no finger network is
configured."""

_log = logging.getLogger("biodedup.embed")


@checked_methods
class Extractor:
    """Makes templates from captures. Thread-safe. The first capture of a kind loads the models, or starts the processes.

    With `Config.isolation`, close it or use it as a context manager.
    """

    def __init__(self, config: Config | None = None) -> None:
        self.config = config = config or Config()
        self._face_card = load_card(config.face.model, config.face.model_folder)
        self._minutiae_card = minutiae_card(config.finger.minutiae, config.finger.minutiae_model)
        self._minutiae_card.verify()
        self._pad_card = None if config.face.pad is None else _pad_card(config.face.pad)
        self._pad: PadNetwork | None = None
        self._finger_card = None if config.finger.model is None else load_card(config.finger.model)
        self._lock = threading.Lock()
        self._network: EmbeddingNetwork | None = None
        self._finger_network: FingerNetwork | None = None
        self._detector: FaceDetector | None = None
        self._finger_ready = False
        of_minutiae = None if self._minutiae_card.weights is None else self._minutiae_card.verified_weights
        self._reader = FingerReader(config.finger, of_minutiae)
        self._isolated = None if config.isolation is None else IsolatedWorkers(config, config.threads)

    def __enter__(self) -> Extractor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker processes, if there are any."""
        if self._isolated is not None:
            self._isolated.close()

    @property
    def cards(self) -> tuple[ModelCard, ...]:
        """The cards of the models that make templates."""
        fingers = [] if self._finger_card is None else [self._finger_card]
        return self._face_card, *fingers, self._minutiae_card

    @property
    def model_ids(self) -> dict[str, str]:
        """Modality -> model_id."""
        finger = self._minutiae_card.model_id
        if self._finger_card is not None:
            finger = joint_id(self._finger_card, self._minutiae_card)
        return {"face": self._face_card.model_id, "finger": finger}

    def extract(self, captures: Sequence[Capture]) -> list[Template | Refusal]:
        """A template or a refusal for each capture, in order. `Missing` gives a refusal of that name.

        Raises InvalidInput, before any work, for an item that is not a capture or an array that is not an image; ModelCardError if a card
        has no weights; RetryableError if worker processes are configured and cannot be kept running.
        """
        for capture in captures:
            if not isinstance(capture, (Face, Finger, Missing)):
                raise InvalidInput(
                    f"extract takes Face, Finger or Missing, got {type(capture).__name__}; wrap it, as Face(path)"
                )
            if not isinstance(capture, Missing) and isinstance(capture.data, np.ndarray):
                check_array(capture.data)
        if self._isolated is not None:
            return self._isolated.extract(captures)
        if any(isinstance(capture, Face) for capture in captures):
            _check_runs(self._face_card)
            self._load_face_models()
        if any(isinstance(capture, Finger) for capture in captures):
            if self._finger_card is not None:
                _check_runs(self._finger_card)
            self._load_finger_network()
        if self.config.threads == 1 or len(captures) < 2:
            prepared = mapped(map, self._prepare, captures)
        else:
            with ThreadPoolExecutor(self.config.threads) as pool:
                prepared = mapped(pool.map, self._prepare, captures)
        return self._embed(prepared)

    def load(self, capture: Face | Finger) -> None:
        """Loads the models for captures of this kind, and compiles code that this machine has not compiled yet. It is called before a capture's
        time limit starts."""
        if isinstance(capture, Face):
            self._load_face_models()
        elif not self._finger_ready:
            self._load_finger_network()
            y, x = np.mgrid[0:160, 0:160]
            grey = np.asarray(128 + 95 * np.cos(np.hypot(x - 60, y + 40) * (2 * np.pi / 9)), np.uint8)
            self._reader.read(Pixels(grey), "unknown", DPI)
            print_ = one_pass(grey)
            finger_input(print_.ridges, print_.thin)
            self._finger_ready = True

    def _prepare(self, capture: Capture) -> Prepared:
        """The steps that concern a single capture."""
        if isinstance(capture, Missing):
            return Refusal(capture.position, "missing", capture.reason)
        try:
            return self._read(capture)
        except MemoryError:
            raise  # not a fault of the capture
        except Exception as error:  # a defect costs a single capture, not the batch
            if isinstance(error, cv2.error) and error.code == cv2.Error.StsNoMem:
                raise MemoryError from None
            # only the type: the text of a library's error may quote its input
            _log.error("a %s capture could not be processed: %s", capture.column, type(error).__name__)
            return Refusal(capture.column, "failed", type(error).__name__)

    def _read(self, capture: Face | Finger) -> Prepared:
        data: CaptureData = capture.data
        proofs: tuple[str, ...] = ()
        if isinstance(data, np.ndarray) and isinstance(capture, Face) and capture.device is not None:
            return Refusal(
                "face", "untrusted_device", "the verdict is about a file's bytes, but the capture is an array"
            )
        stated: tuple[float, float] | None = None
        if not isinstance(data, np.ndarray):
            content = read(data, capture.column, self.config.capture)
            if isinstance(content, Refusal):
                return content
            if isinstance(capture, Finger) and is_record(content):
                return self._reader.take(content, capture.position)
            if isinstance(capture, Face) and capture.device is not None:
                verdict = self._device_verdict(capture.device, content)
                if isinstance(verdict, Refusal):
                    return verdict
                proofs = (verdict,)
            picture = chosen(content, capture.column) if is_container(content) else Picture(capture.column, content)
            if isinstance(picture, Refusal):
                return picture
            data, stated = picture.data, picture.dpi
            if isinstance(data, bytes) and isinstance(capture, Finger) and is_record(data):
                return self._reader.take(data, capture.position)
            if isinstance(capture, Finger) and capture.position == "unknown":
                capture = replace(capture, position=picture.column)
        pixels = decode(data, capture.column, self.config.capture)
        if isinstance(pixels, Refusal):
            return pixels
        if stated is not None:
            pixels = replace(pixels, stated=stated, dpi=stated[0])
        if (steps := tracing()) is not None:
            steps.add("pixels", capture.column, image=pixels.rgb_or_grey, dpi=pixels.dpi)
        if isinstance(capture, Finger):
            return self._finger(pixels, capture)
        assert self._detector is not None, "loaded before the first face"
        aligned = self._detector.align(pixels)
        if isinstance(aligned, AlignedFace) and proofs:
            return replace(aligned, provenance=aligned.provenance + proofs)
        return aligned

    def _finger(self, pixels: Pixels, capture: Finger) -> Prepared:
        """A finger's template without its embedding, and its network input; or a refusal."""
        with_resolution = pixels if capture.dpi is not None else settled(pixels, capture.column)
        if isinstance(with_resolution, Refusal):
            return with_resolution
        sample = self._reader.read(with_resolution, capture.position, capture.dpi)
        if isinstance(sample, Refusal):
            return sample
        network_input = None if self._finger_network is None else finger_input(sample.print.ridges, sample.print.thin)
        fields = (None, sample.minutiae, sample.quality, with_resolution.provenance + sample.provenance)
        return Template(sample.position, self.model_ids["finger"], *fields), network_input

    def _device_verdict(self, verdict: DeviceVerdict, content: bytes) -> Refusal | str:
        """A refusal, or the provenance for an accepted verdict."""
        problem = verdict.problem(content, self.config.capture.devices or {})
        if problem:
            return Refusal("face", "untrusted_device", problem)
        if not verdict.live:
            return Refusal("face", "presentation_attack", "by the verdict of the capture device", verdict.score)
        return f"{LIVE}device {verdict.device_id}"

    def _embed(self, prepared: Sequence[Prepared]) -> list[Template | Refusal]:
        """Runs the embedding networks, in batches."""
        faces = [item for item in prepared if isinstance(item, AlignedFace)]
        prints = [item[1] for item in prepared if isinstance(item, tuple) and item[1] is not None]
        embedded = iter(self._faces(faces))
        finger_vectors = iter(self._finger_network.embed(prints) if prints and self._finger_network else ())
        results: list[Template | Refusal] = []
        for item in prepared:
            if isinstance(item, AlignedFace):
                results.append(next(embedded))
            elif isinstance(item, tuple):
                template, network_input = item
                results.append(template if network_input is None else replace(template, embedding=next(finger_vectors)))
            else:
                results.append(item)
        if (steps := tracing()) is not None:
            self._record(steps, prepared, results)
        return results

    def _faces(self, faces: Sequence[AlignedFace]) -> list[Template | Refusal]:
        """Embeds aligned faces, and refuses faces of too low quality and presentation attacks."""
        if not faces:
            return []
        assert self._network is not None and self._detector is not None, "loaded before the first face"
        results: list[Template | Refusal] = []
        images = np.stack([face.image for face in faces])
        vectors, norms = self._network.embed_with_norms(images)
        attacks = self._attacks(images)
        for face, vector, norm, (attack, proof) in zip(faces, vectors, norms.tolist(), attacks, strict=True):
            quality = self._face_card.quality_of(norm)
            refusal = self._detector.template_refusal(face, quality) or attack
            quality = None if quality is None else round(quality, 4)
            proofs = face.provenance + proof
            template = Template("face", self._face_card.model_id, vector, quality=quality, provenance=proofs)
            results.append(refusal or template)
        return results

    def _attacks(self, images: NDArray[np.uint8]) -> list[tuple[Refusal | None, tuple[str, ...]]]:
        """For each aligned face, (the refusal of an attack or None, the provenance of a living face)."""
        if self._pad is None:
            return [(None, ())] * len(images)
        card, results = self._pad.card, list[tuple[Refusal | None, tuple[str, ...]]]()
        assert card.limit is not None, "a pad card has a limit"
        for score in self._pad.scores(images).tolist():
            if score >= card.limit:
                results.append((None, (f"{LIVE}{card.model_id}",)))
            else:
                results.append((Refusal("face", "presentation_attack", card.model_id, round(score, 4), card.limit), ()))
        return results

    def _record(self, steps: Trace, prepared: Sequence[Prepared], results: Sequence[Template | Refusal]) -> None:
        """Records the networks' results in the trace, and the pose of each finger, in pixels at 500 dpi."""
        for i, (item, result) in enumerate(zip(prepared, results, strict=True)):
            if isinstance(item, tuple) and item[1] is not None and self._finger_network is not None:
                (pose,) = self._finger_network.poses([item[1]])
                if pose is not None:
                    core = (pose[0] * DPI / RIDGE_DPI, pose[1] * DPI / RIDGE_DPI)
                    steps.add("pose", result.column, i, core=core, angle=pose[2])
            steps.add("refusal" if isinstance(result, Refusal) else "template", result.column, i, result=result)

    def _load_finger_network(self) -> None:
        with self._lock:
            if self._finger_network is None and self._finger_card is not None:
                cv2.setNumThreads(1)
                self._finger_network = FingerNetwork(self._finger_card, self.config.threads)

    def _load_face_models(self) -> None:
        with self._lock:
            if self._detector is None:
                cv2.setNumThreads(1)  # captures run in parallel; OpenCV's threads would compete with them
                card = load_card(self.config.face.detector)
                if self._pad_card is not None:
                    self._pad = PadNetwork(self._pad_card, self.config.threads)
                self._network = EmbeddingNetwork(self._face_card, self.config.threads)
                self._detector = FaceDetector(self.config.face, card.verified_weights())


def _pad_card(name: str) -> ModelCard:
    card = load_card(name)
    if card.kind != "pad":
        raise ModelCardError(f"{card.path.name} is a card of kind {card.kind!r}, wanted `pad`")
    return card


def _check_runs(card: ModelCard) -> None:
    if card.weights is None:
        raise ModelCardError(
            f"{card.path.name} has no weights: {card.model_id} runs elsewhere; send its embeddings, or name a card with weights"
        )
