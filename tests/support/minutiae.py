"""Minutiae as numbers, moved and written as records."""

from __future__ import annotations

import numpy as np

from biodedup.capture.minutiae.record import MinutiaeRecord, write_record

SIDE = 800


def strewn(count: int, seed: int = 0, spread: int = 300) -> np.ndarray:
    """float64 (count, 4): x, y, angle in turns / 256, quality; at least 9 pixels apart where there is room, as on a finger."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((count, 4))
    for i in range(count):
        for _ in range(20):
            point = rng.uniform(0, spread, 2)
            if not i or np.hypot(*(rows[:i, :2] - point).T).min() >= 9:
                break
        rows[i] = (*point, rng.uniform(0, 256), rng.integers(1, 100))
    return rows


def moved(rows: np.ndarray, degrees: float = 0.0, shift: tuple[float, float] = (0, 0)) -> np.ndarray:
    """Turned anticlockwise around the middle of 300 x 300 pixels, then shifted."""
    turn = np.radians(degrees)
    x, y = rows[:, 0] - 150, rows[:, 1] - 150  # y points down
    return np.column_stack(
        [
            x * np.cos(turn) + y * np.sin(turn) + 150 + shift[0],
            y * np.cos(turn) - x * np.sin(turn) + 150 + shift[1],
            rows[:, 2] + degrees * 256 / 360,
            rows[:, 3],
        ]
    )


def record(rows: np.ndarray) -> bytes:
    x, y = (np.clip(np.round(rows[:, c] + 200), 0, SIDE - 1).astype(int) for c in (0, 1))
    angle, quality = np.round(rows[:, 2]).astype(int) & 255, rows[:, 3].astype(int)
    body = np.stack([0x40 | (x >> 8), x & 255, y >> 8, y & 255, angle, quality], axis=1).astype(np.uint8).tobytes()
    return write_record(MinutiaeRecord(SIDE, SIDE, body), 0, 50)
