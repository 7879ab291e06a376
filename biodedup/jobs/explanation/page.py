"""Computes the drawings on the page of `explain`: the positions of bars, marks and lines.

Owns geometry and labels. Never extracts, compares or decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import atan2, cos, degrees, pi, sin
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from biodedup.capture.minutiae.record import read_record
from biodedup.jobs.shared.page import picture
from biodedup.match.prints.minutiae import matched
from biodedup.match.ranked import Comparison
from biodedup.values import Evidence, Refusal, Template

Image: TypeAlias = NDArray[np.uint8]
_FACE_PX, _FINGER_PX = 640, 900


@dataclass(frozen=True, eq=False)
class ShownCapture:
    """One capture on the page. image: an upright face, or a finger at 500 dpi; None if no picture is kept. checks: of the quality gate,
    (reason, quantity, measured value, limit, whether it failed). core, angle: position of the core and direction of the finger, as the
    finger network estimates them."""

    column: str
    source: str
    template: Template | None = None
    refusal: Refusal | None = None
    image: Image | None = field(default=None, repr=False)
    box: NDArray[np.float32] | None = field(default=None, repr=False)
    landmarks: NDArray[np.float64] | None = field(default=None, repr=False)
    aligned: Image | None = field(default=None, repr=False)
    core: tuple[float, float] | None = field(default=None, repr=False)
    angle: float = 0.0
    checks: tuple[tuple[str, str, float, float, bool], ...] = ()


def label(column: str) -> str:
    return "finger of unknown position" if column == "unknown" else column.replace("_", " ")


def title(part: Evidence) -> str:
    if part.column == part.candidate_column:
        return label(part.column)
    return f"{label(part.column)} with {label(part.candidate_column)}"


def waterfall(comparison: Comparison, duplicate_db: float, review_db: float) -> dict[str, Any]:
    """A waterfall chart in dB: the evidence of each capture, added one after the other; the penalty for tried labels; their sum; the score."""
    bars: list[dict[str, Any]] = []
    total = 0.0
    steps = [(title(part), part.llr_db) for part in comparison.evidence]
    if comparison.label_penalty_db:
        steps.append(("penalty for trying other labels", -comparison.label_penalty_db))
    for name, value in steps:
        bars.append({"name": name, "from": total, "to": total + value, "value": value, "kind": "step"})
        total += value
    bars.append({"name": "sum of the evidence", "from": 0.0, "to": total, "value": total, "kind": "sum"})
    score = comparison.score_db
    bars.append({"name": "score: rarity among impostors", "from": 0.0, "to": score, "value": score, "kind": "score"})
    ends = [end for bar in bars for end in (bar["from"], bar["to"])] + [duplicate_db, review_db]
    low, high = min(0.0, *ends), max(*ends, 10.0)
    low, high = (low - 0.04 * (high - low) if low < 0 else low), high + 0.08 * (high - low)
    scale = 560 / (high - low)
    for bar in bars:
        bar["x"] = round((min(bar["from"], bar["to"]) - low) * scale, 1)
        bar["width"] = round(max(abs(bar["to"] - bar["from"]) * scale, 1.5), 1)
        bar["end"] = round((bar["to"] - low) * scale, 1)
    step = next(s for s in (5, 10, 20, 50, 100) if (high - low) / s <= 10)
    ticks = [(db, round((db - low) * scale, 1)) for db in range(int(low // step + 1) * step, int(high) + 1, step)]
    lines = [("duplicate", duplicate_db)] + ([("review", review_db)] if review_db < duplicate_db else [])
    return {
        "bars": bars,
        "ticks": ticks,
        "lines": [(name, db, round((db - low) * scale, 1)) for name, db in lines],
        "zero": round(-low * scale, 1),
    }


def panel(shown: ShownCapture) -> dict[str, Any]:
    """The values of one capture for the template: picture, size, marks."""
    finger = shown.column != "face"
    size, src = (300, 300), None
    if shown.image is not None:
        size = (shown.image.shape[1], shown.image.shape[0])
        src = picture(shown.image, side_px_max=_FINGER_PX if finger else _FACE_PX)
    elif shown.template is not None and shown.template.minutiae is not None:
        record = read_record(shown.template.minutiae)
        size = (record.width, record.height)
    pose = None
    if shown.core is not None:
        (x, y), length = shown.core, 45.0
        pose = {"x": x, "y": y, "up_x": x + length * sin(shown.angle), "up_y": y - length * cos(shown.angle)}
    return {
        "shown": shown,
        "finger": finger,
        "width": size[0],
        "height": size[1],
        "src": src,
        "box": None if shown.box is None else shown.box.tolist(),
        "landmarks": [] if shown.landmarks is None else shown.landmarks.tolist(),
        "unit": max(size) / 250,  # line width in a picture of a face
        "aligned": None if shown.aligned is None else picture(shown.aligned),
        "pose": pose,
        "turned": degrees(shown.angle),
    }


def matched_minutiae(a: ShownCapture, b: ShownCapture, part: Evidence) -> dict[str, Any] | None:
    """The minutiae of two prints, and lines between matched minutiae, numbered from the top; None if minutiae were not compared."""
    records = [shown.template.minutiae if shown.template is not None else None for shown in (a, b)]
    if part.minutiae is None or records[0] is None or records[1] is None:
        return None
    pairs, motion = matched(records[0], records[1])
    points = [_points(record) for record in records if record is not None]
    order = np.argsort(points[0][pairs[:, 0], 1], kind="stable")
    numbers: list[dict[int, int]] = [{}, {}]
    lines = []
    for number, (i, k) in enumerate(pairs[order].tolist(), start=1):
        numbers[0][i], numbers[1][k] = number, number
        lines.append({"number": number, "hue": _hue(number), "from": points[0][i], "to": points[1][k]})
    return {
        "marks": [
            [
                {"x": x, "y": y, "dx": dx, "dy": dy, "number": number_of.get(i), "hue": _hue(number_of.get(i, 0))}
                for i, (x, y, dx, dy, _) in enumerate(of_print.tolist())
            ]
            for of_print, number_of in zip(points, numbers, strict=True)
        ],
        "qualities": [round(float(of_print[:, 4].mean())) if len(of_print) else 0 for of_print in points],
        "lines": lines,
        "turn": degrees(atan2(motion[1], motion[0])),
    }


def _points(record: bytes) -> NDArray[np.float64]:
    """The minutiae of a record, float64 (n, 5): x, y, direction as a vector of 11 pixels, quality."""
    rows = np.frombuffer(read_record(record).body, np.uint8).reshape(-1, 6)
    x, y = (((rows[:, at] & 63).astype(int) << 8) | rows[:, at + 1] for at in (0, 2))
    angle = rows[:, 4] * (2 * pi / 256)  # ISO/IEC 19794-2 counts anticlockwise
    return np.column_stack([x, y, 11 * np.cos(angle), -11 * np.sin(angle), rows[:, 5]]).astype(np.float64)


def _hue(number: int) -> int:
    """A hue in degrees. Steps of the golden angle give neighbouring numbers very different hues."""
    return round(number * 137.508) % 360
