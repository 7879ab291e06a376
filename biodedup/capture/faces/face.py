"""Turns face captures into aligned faces: detects faces, chooses one, aligns it and checks its quality.

Owns the detector and the quality gate for faces. Never decodes files and never embeds.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from biodedup.capture.faces.artefacts import NEGATIVE_MARGIN_MIN, block_ratio, signs
from biodedup.capture.pictures.formats import Pixels
from biodedup.capture.pictures.resolution import squared
from biodedup.common import quality as quality_scale
from biodedup.config import FaceConfig
from biodedup.errors import ModelCardError
from biodedup.trace import tracing
from biodedup.values import Float32, Refusal

SIDE_PX = 112
_POINTS = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float64
)
"""Positions of the eyes, the nose and the corners of the mouth, image left first, as ArcFace-style models expect them (Deng et al., 2019)."""

_CENTRAL_SHARE = 0.4
"""Distance from the centre, as a share of the image, at which a face counts exp(-1) of its area."""
_SIDE_PX_LARGE = 640
"""Longer side of the picture for the second detection, if the first finds no face."""
_CLOSE_SHARE = 0.3
"""A smaller face, as a share of the image's longer side, is detected again in a close-up."""
_BORDER_SHARE = 0.5
"""Empty margin for the third detection, as a share of the longer side."""

_CONFIDENCE_UPRIGHT = 0.92
"""Detector confidence that no rotated face reaches: at most 0.91 in LFW, MEDS, ORL and Yale rotated by quarter turns (100 to 155 images
of each set, 2026-11). Nearly all upright faces reach it."""

_CONFIDENCE_ROTATED = 0.88
"""Minimum confidence to rotate a picture. Without it, blurred faces, which the gate refuses, would be detected in any orientation."""

_QUALITY_UNKNOWN = 0.965
"""Quality of faces of a model whose card has no table of quality. Only negatives, and signs that no real face shows, are then refused."""
_NEGATIVE_QUALITY = 0.97
"""No negative reaches this quality (negatives of LFW and MEDS, 2026-11), so that better faces are not checked."""
_CANVAS_PX = 128

_STRIDES = (8, 16, 32)
_OUTPUTS = [f"{part}_{stride}" for stride in _STRIDES for part in ("cls", "obj", "bbox", "kps")]
_CONFIDENCES = [name for name in _OUTPUTS if name[:3] in ("cls", "obj")]
_POSITIONS = [0, 1, *range(4, 14)]  # columns of a detected face that are positions, not extents
_OVERLAP_MAX = 0.3
"""Two boxes with a larger intersection over union are the same face."""
_FACES_MAX = 50


@dataclass(frozen=True, eq=False)
class AlignedFace:
    """An aligned face. image: uint8 (112, 112, 3) RGB. landmarks: float64 (5, 2), in pixels of the upright capture. confidence: the
    detector's, 0 to 1. blocks: `artefacts.block_ratio`. provenance: sentences about corrected metadata of the file."""

    image: NDArray[np.uint8] = field(repr=False)
    confidence: float
    landmarks: NDArray[np.float64] = field(repr=False)
    blocks: float = 1.0
    provenance: tuple[str, ...] = ()


class FaceDetector:
    """Detects and aligns faces with YuNet (Wu et al., 2023) on ONNX Runtime. Thread-safe."""

    def __init__(self, config: FaceConfig, weights: Path | bytes) -> None:
        """weights: the file, or its content."""
        self._config = config
        import onnxruntime  # imported here: its threads would keep a forked child from exiting

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # an image takes 2 ms; captures run in parallel instead
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(weights, sess_options=options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        absent = set(_OUTPUTS) - {output.name for output in self._session.get_outputs()}
        if absent:
            raise ModelCardError(
                f"the detector's network has no outputs {sorted(absent)}: it is not YuNet; name the card of YuNet in FaceConfig"
            )

    def align(self, pixels: Pixels) -> AlignedFace | Refusal:
        """The capture's aligned face, or a refusal. If the file states that its pixels are not square, the picture is tried with and without
        correction: the detector is more confident of a face with the right proportions."""
        plain = self._align(pixels)
        squared_pixels = squared(pixels)
        if squared_pixels is None:
            return plain
        corrected = self._align(squared_pixels)
        if isinstance(corrected, Refusal) or (
            isinstance(plain, AlignedFace) and plain.confidence >= corrected.confidence
        ):
            return plain
        return replace(corrected, provenance=squared_pixels.provenance)

    def template_refusal(self, face: AlignedFace, quality: float | None) -> Refusal | None:
        """The second part of the quality gate: the refusal after the embedding, or None. quality: the template's, None if the model's card has no
        table of quality."""
        known = _QUALITY_UNKNOWN if quality is None else quality
        for sign in signs(face.image, face.blocks):
            if known < sign.quality_min:
                return Refusal("face", sign.reason, sign.detail, round(sign.measured, 3), sign.limit)
        if known < _NEGATIVE_QUALITY:
            margin = self.negative_margin(face.image)
            if margin < NEGATIVE_MARGIN_MIN:
                detail = "detector confidence minus that in the negative"
                return Refusal("face", "negative", detail, round(margin, 3), NEGATIVE_MARGIN_MIN)
        if quality is not None and quality < self._config.quality_min:
            return Refusal("face", "low_quality", quality_scale.MEANING, round(quality, 3), self._config.quality_min)
        return None

    def negative_margin(self, image: NDArray[np.uint8]) -> float:
        """The detector's confidence in an aligned face minus its confidence in the negative. image: uint8 (112, 112, 3) RGB."""
        canvas = np.full((2, _CANVAS_PX, _CANVAS_PX, 3), 127, np.float32)
        pad = (_CANVAS_PX - SIDE_PX) // 2
        canvas[0, pad:-pad, pad:-pad] = image[:, :, ::-1]
        canvas[1, pad:-pad, pad:-pad] = 255 - image[:, :, ::-1]
        face, negative = (self._confidence_at(picture) for picture in canvas)
        return face - negative

    def _confidence_at(self, canvas: Float32) -> float:
        """The greatest confidence anywhere in the canvas. canvas: as for `_run`."""
        outputs = self._session.run(_CONFIDENCES, {self._input: canvas.transpose(2, 0, 1)[None].copy()})
        return max(
            float(np.sqrt(np.clip(is_face, 0, 1) * np.clip(is_object, 0, 1)).max())
            for is_face, is_object in zip(outputs[::2], outputs[1::2], strict=True)
        )

    def _align(self, pixels: Pixels) -> AlignedFace | Refusal:
        rgb, faces = self._upright(pixels.rgb)
        if (steps := tracing()) is not None:
            steps.add("faces", "face", image=rgb, found=faces)
        if not len(faces):
            return Refusal("face", "no_face", "detector confidence", 0.0, self._config.confidence_min)
        chosen, rival_share = choose(faces, rgb.shape[:2])
        if rival_share > self._config.several_share_max:
            return Refusal(
                "face",
                "several_faces",
                "prominence of the second face",
                round(rival_share, 3),
                self._config.several_share_max,
            )
        face = self._refined(rgb, faces[chosen])
        landmarks = face[4:14].reshape(5, 2).astype(np.float64)
        transform = similarity_transform(landmarks, _POINTS)
        image = cv2.warpAffine(rgb, transform, (SIDE_PX, SIDE_PX), flags=_interpolation(transform))
        grey = cv2.cvtColor(_surroundings(rgb, landmarks), cv2.COLOR_RGB2GRAY)
        blocks = block_ratio(np.asarray(grey, np.uint8))
        aligned = AlignedFace(np.asarray(image, np.uint8), float(face[14]), landmarks, blocks)
        if steps is not None:
            steps.add("face", "face", image=rgb, box=face[:4], landmarks=landmarks, aligned=aligned.image)
        return judge(aligned, rgb.shape[:2], self._config) or aligned

    def _upright(self, rgb: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], Float32]:
        """The picture, rotated by quarter turns until its face is upright, and its faces.

        The detector also finds rotated faces, but with wrong landmarks, so that their templates would not match their mates. Its confidence
        is highest for the upright face.
        """
        best, faces = rgb, self._detect(rgb)
        for turns in (2, 1, 3):
            if _confidence(faces, best.shape) >= _CONFIDENCE_UPRIGHT:
                break
            rotated = np.ascontiguousarray(np.rot90(rgb, turns))
            rotated_faces = self._detect(rotated)
            if _confidence(rotated_faces, rotated.shape) > max(_confidence(faces, best.shape), _CONFIDENCE_ROTATED):
                best, faces = rotated, rotated_faces
        return best, faces

    def _detect(self, rgb: NDArray[np.uint8]) -> Float32:
        """The faces, float32 (n, 15): box x, y, width, height; five landmarks x, y; confidence. In pixels of rgb."""
        for side, border in (
            (self._config.detector_side_px, 0.0),
            (_SIDE_PX_LARGE, 0.0),
            (self._config.detector_side_px, _BORDER_SHARE),
        ):
            faces = self._detect_at(rgb, side, border)
            if len(faces):
                return faces
        return faces

    def _refined(self, rgb: NDArray[np.uint8], face: Float32) -> Float32:
        """The face, detected again in a close-up if it is small, because landmarks are only as exact as the detector's pixels."""
        side = float(max(face[2], face[3]))
        if side >= _CLOSE_SHARE * max(rgb.shape[:2]):
            return face
        centre = face[:2] + face[2:4] / 2
        left, top = (max(int(edge), 0) for edge in centre - 1.2 * side)
        right, bottom = (int(edge) for edge in centre + 1.2 * side)
        again = self._detect_at(np.ascontiguousarray(rgb[top:bottom, left:right]), self._config.detector_side_px, 0.0)
        if not len(again):
            return face
        again[:, [0, 4, 6, 8, 10, 12]] += left
        again[:, [1, 5, 7, 9, 11, 13]] += top
        distance = np.linalg.norm(again[:, :2] + again[:, 2:4] / 2 - centre, axis=1)
        nearest = again[int(np.argmin(distance))]
        return nearest if float(distance.min()) < side / 2 else face

    def _detect_at(self, rgb: NDArray[np.uint8], side: int, border: float) -> Float32:
        """As `_detect`, at one scale. border: an empty margin, as a share of the longer side, for faces that fill the image."""
        height, width = rgb.shape[:2]
        factor = side / (max(height, width) * (1 + 2 * border))
        size = max(round(width * factor), 1), max(round(height * factor), 1)
        small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
        pad = (side - max(size)) // 2 if border else 0
        canvas = np.zeros((-(-side // _STRIDES[-1]) * _STRIDES[-1],) * 2 + (3,), np.float32)
        canvas[: size[1] + 2 * pad, : size[0] + 2 * pad] = 127 if pad else 0
        canvas[pad : pad + size[1], pad : pad + size[0]] = small[:, :, ::-1]  # YuNet takes BGR, 0 to 255
        faces = self._run(canvas)
        faces[:, _POSITIONS] -= pad
        faces[:, 0:14:2] *= width / size[0]
        faces[:, 1:14:2] *= height / size[1]
        return faces

    def _run(self, canvas: Float32) -> Float32:
        """canvas: float32 (h, w, 3) BGR, sides multiples of 32. Returns faces as `_detect`, the most confident first."""
        outputs = self._session.run(_OUTPUTS, {self._input: np.ascontiguousarray(canvas.transpose(2, 0, 1))[None]})
        by_stride = []
        for i, stride in enumerate(_STRIDES):
            is_face, is_object, box, points = (np.asarray(part)[0] for part in outputs[4 * i : 4 * i + 4])
            # confidence: the geometric mean of the face score and the object score; boxes are in units of the stride
            confidence = np.sqrt(np.clip(is_face, 0, 1) * np.clip(is_object, 0, 1))[:, 0]
            at = np.flatnonzero(confidence >= self._config.detector_confidence_min)
            cell = np.stack([at % (canvas.shape[1] // stride), at // (canvas.shape[1] // stride)], axis=1)
            extent = np.exp(box[at, 2:])
            corner = cell + box[at, :2] - extent / 2
            landmarks = np.tile(cell, 5) + points[at]
            by_stride.append(np.hstack([stride * np.hstack([corner, extent, landmarks]), confidence[at, None]]))
        faces = np.concatenate(by_stride).astype(np.float32)
        kept = cv2.dnn.NMSBoxes(faces[:, :4].tolist(), faces[:, 14].tolist(), 0.0, _OVERLAP_MAX, top_k=_FACES_MAX)
        return faces[np.asarray(kept, np.int64).ravel()]


def choose(faces: Float32, shape: tuple[int, ...]) -> tuple[int, float]:
    """(index of the most prominent face, prominence of the second face as a share of the first).

    Prominence is the area of the box, weighted by its distance from the image's centre.
    """
    height, width = shape[:2]
    centres = faces[:, :2] + faces[:, 2:4] / 2
    distance = np.linalg.norm((centres - (width / 2, height / 2)) / (width, height), axis=1)
    prominence = faces[:, 2] * faces[:, 3] * np.exp(-((distance / _CENTRAL_SHARE) ** 2))
    order = np.argsort(-prominence, kind="stable")
    share = float(prominence[order[1]] / prominence[order[0]]) if len(order) > 1 else 0.0
    return int(order[0]), share


def _confidence(faces: Float32, shape: tuple[int, ...]) -> float:
    """The confidence of the most prominent face; 0 without a face."""
    return float(faces[choose(faces, shape)[0], 14]) if len(faces) else 0.0


def similarity_transform(source: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rotation, scale and shift (2, 3) that maps source points (n, 2) to target points (n, 2), by least squares (Umeyama, 1991)."""
    mean_source, mean_target = source.mean(axis=0), target.mean(axis=0)
    centred = source - mean_source
    u, singular, vt = np.linalg.svd((target - mean_target).T @ centred)
    sign = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt)) or 1.0])
    rotation = (u * sign) @ vt
    scale = float(singular @ sign) / max(float((centred**2).sum()), 1e-9)
    linear = scale * rotation
    return np.column_stack([linear, mean_target - linear @ mean_source])


def judge(face: AlignedFace, shape: tuple[int, ...], config: FaceConfig) -> Refusal | None:
    """The first part of the quality gate: the refusal for the first limit that the face misses, or None."""
    height, width = shape[:2]
    eyes = face.landmarks[:2]
    if (eyes < 0).any() or (eyes >= (width, height)).any():
        outside = float(max(-eyes.min(), (eyes - (width, height)).max()))
        return Refusal("face", "eyes_out_of_frame", "pixels outside the image", round(outside, 1), 0.0)
    eye_distance = float(np.linalg.norm(eyes[1] - eyes[0]))
    yaw, roll = angles_deg(face.landmarks)
    grey = cv2.cvtColor(face.image, cv2.COLOR_RGB2GRAY)[16:-8, 16:-16]
    brightness = float(grey.mean())
    sharpness = float(cv2.Laplacian(grey, cv2.CV_32F).std()) / max(float(grey.std()), 8.0)
    checks = (
        ("turned_away", "degrees of yaw", yaw, config.yaw_deg_max, yaw > config.yaw_deg_max),
        ("turned_away", "degrees of roll", roll, config.roll_deg_max, roll > config.roll_deg_max),
        (
            "too_small",
            "pixels between the eyes",
            eye_distance,
            config.eye_distance_px_min,
            eye_distance < config.eye_distance_px_min,
        ),
        ("too_dark", "mean grey level", brightness, config.brightness_min, brightness < config.brightness_min),
        ("too_bright", "mean grey level", brightness, config.brightness_max, brightness > config.brightness_max),
        ("blurred", "Laplacian over contrast", sharpness, config.sharpness_min, sharpness < config.sharpness_min),
        (
            "no_face",
            "detector confidence",
            face.confidence,
            config.confidence_min,
            face.confidence < config.confidence_min,
        ),
    )
    if (steps := tracing()) is not None:
        steps.add("quality", "face", checks=checks)
    for reason, detail, measured, limit, missed in checks:
        if missed:
            return Refusal("face", reason, detail, round(measured, 3), limit)
    return None


def _surroundings(rgb: NDArray[np.uint8], landmarks: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The capture's pixels around the landmarks, uint8 (h, w, 3); at least one pixel."""
    margin = 0.6 * float(np.linalg.norm(landmarks[1] - landmarks[0]))
    left, top = np.clip(landmarks.min(axis=0) - margin, 0, (rgb.shape[1] - 1, rgb.shape[0] - 1)).astype(int)
    right, bottom = np.ceil(landmarks.max(axis=0) + margin).astype(int)
    return np.ascontiguousarray(rgb[top : max(bottom, top + 1), left : max(right, left + 1)])


def angles_deg(landmarks: NDArray[np.float64]) -> tuple[float, float]:
    """(yaw, roll), absolute, in degrees, from the five landmarks.

    Roll is the slope of the line between the eyes. Yaw assumes that the nose is 0.6 eye distances in front of the line between the eyes:
    yaw = atan(offset of the nose from the middle of the eyes / 0.6), the offset in eye distances.
    """
    left, right, nose = landmarks[:3]
    across = right - left
    distance = max(float(np.linalg.norm(across)), 1e-6)
    offset = abs(float((nose - (left + right) / 2) @ across)) / distance**2
    yaw = float(np.degrees(np.arctan2(offset, 0.6)))
    roll = float(np.degrees(np.arctan2(abs(across[1]), across[0])))
    return yaw, roll


def _interpolation(transform: NDArray[np.float64]) -> int:
    """INTER_AREA if the picture shrinks by more than two, because that needs averaging; otherwise linear interpolation."""
    scale = float(np.hypot(transform[0, 0], transform[1, 0]))
    return cv2.INTER_AREA if scale < 0.5 else cv2.INTER_LINEAR
