"""Pictures: a finger of ridges, and JPEG content of any image."""

from __future__ import annotations

import cv2
import numpy as np


def finger(
    seed: int, *, size: int = 320, shift: tuple[int, int] = (0, 0), degrees: float = 0.0, noise_seed: int = 0
) -> np.ndarray:
    """uint8 (size, size): one finger a seed; shift, rotation and noise make its impressions."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size].astype(np.float64)
    centre = size / 2 + rng.uniform(-20, 20, 2)
    dx, dy = x - centre[0], y - centre[1]
    phase = 2 * np.pi * np.hypot(dx, np.where(dy > 0, dy * rng.uniform(0.2, 0.5), dy)) / 9.0
    for _ in range(28):  # a dislocation ends or forks a ridge
        px, py = centre + rng.uniform(-0.36, 0.36, 2) * size
        phase += rng.choice((-1, 1)) * np.arctan2(y - py, x - px)
    image = 128 - 95 * np.cos(phase)
    inside = (dx / (0.42 * size)) ** 2 + (dy / (0.46 * size)) ** 2 < 1
    image = np.where(inside, image, 245.0)
    image += np.random.default_rng(1000 * seed + noise_seed).normal(0, 8, image.shape)
    matrix = cv2.getRotationMatrix2D((size / 2, size / 2), degrees, 1.0)
    matrix[:, 2] += shift
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    return cv2.warpAffine(pixels, matrix, (size, size), flags=cv2.INTER_CUBIC, borderValue=245)


def jpeg(image: np.ndarray, quality: int = 92) -> bytes:
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
