"""Spoils a portrait in the ways that make strangers alike. All take and give uint8 (h, w, 3) RGB."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping

import cv2
import numpy as np
from PIL import Image


def noisy(image: np.ndarray, deviation: float) -> np.ndarray:
    return np.clip(image + np.random.default_rng(1).normal(0, deviation, image.shape), 0, 255).astype(np.uint8)


def dithered(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).convert("1").convert("RGB"))


def lined(image: np.ndarray) -> np.ndarray:
    """Wavy lines of a watermark, nine pixels apart."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    lines = np.sin((y + 6 * np.sin(x / 9)) * 2 * np.pi / 9) > 0.4
    return np.where(lines[..., None], (image * 0.7 + 76).astype(np.uint8), image)


def compressed(image: np.ndarray, quality: int) -> np.ndarray:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=quality)
    return np.asarray(Image.open(out))


def covered(image: np.ndarray, landmarks: np.ndarray, shade: int = 15, *, masked: bool = True) -> np.ndarray:
    """Glasses of this grey level, and a mask. landmarks: (5, 2), eyes, nose, corners of the mouth."""
    out = np.ascontiguousarray(image).copy()
    eyes, nose, mouth = landmarks[:2], landmarks[2], landmarks[3:].mean(axis=0)
    apart = float(np.linalg.norm(eyes[1] - eyes[0]))
    for eye in eyes:
        cv2.ellipse(
            out, tuple(int(v) for v in eye), (int(0.42 * apart), int(0.34 * apart)), 0, 0, 360, (shade,) * 3, -1
        )
    if not masked:
        return out
    across, down = np.array([apart, 0]), np.array([0, apart])
    mask = [nose - 0.7 * across, nose, nose + 0.7 * across]
    mask += [mouth + 0.5 * across + 0.7 * down, mouth - 0.5 * across + 0.7 * down]
    cv2.fillPoly(out, [np.round(mask).astype(np.int32)], (150, 190, 215))
    return out


WAYS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "negative": lambda image: 255 - image,
    "noise 45": lambda image: noisy(image, 45),
    "noise 60": lambda image: noisy(image, 60),
    "1 bit": dithered,
    "wavy lines": lined,
    "JPEG quality 2": lambda image: compressed(image, 2),
}
