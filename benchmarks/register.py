"""A made-up register: subjects with a face and ten fingers, and second encounters of them. Everything is drawn from a seed.

Vectors: directions of one law a modality (a common mean, and numbers that fall off), whose strangers have the mean and the deviation of
the shipped card; a second encounter's cosine is drawn from the card's mated law, in a direction of the same law.

Minutiae: a pool of generated prints (`biodedup.synthetic`, the default extractor) gives their density and flow. A finger is a print of the pool,
perhaps mirrored, warped by long waves, and with each minutia moved, turned or dropped, so that two fingers of one print are strangers.
A capture of a finger is that finger turned, shifted, slightly distorted, cropped to an ellipse, with minutiae lost and added. How far each
goes was chosen (2026-11) so that scores of strangers and of mates spread as the card's tables say; `laws` measures it again.

Fingers of one subject are independent, which real ones are not quite.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

import biodedup as bd
from biodedup.capture.minutiae.record import PIXELS_PER_CM, MinutiaeRecord, position_code, read_record
from biodedup.embed.cards import joint_id, load_card, minutiae_card
from biodedup.match.scores.calibration import Calibration
from biodedup.synthetic import Impression, draw_impression, draw_master

FINGERS = tuple(
    f"{hand}_{name}" for hand in ("right", "left") for name in ("thumb", "index", "middle", "ring", "little")
)
COLUMNS = ("face", *FINGERS)
FACE_CARD, FINGER_CARD, MINUTIAE_CARD = (
    load_card("sface"),
    load_card("finger256"),
    minutiae_card(bd.FingerConfig().minutiae),
)
MODELS = {
    column: FACE_CARD.model_id if column == "face" else joint_id(FINGER_CARD, MINUTIAE_CARD) for column in COLUMNS
}
DIMENSIONS = {"face": 128, **dict.fromkeys(FINGERS, 256)}
BLOCK = 1_024
"""Subjects whose vectors are drawn together."""
SIDE_PX, COUNT_MAX, HEAD_BYTES = 432, 80, 28
POOR_SHARE = 0.05
"""A poor capture has a cosine of the lowest mates, and half of its minutiae are lost."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Minutiae of generated prints around their cores: starts int64 (n + 1,); points float32 (m, 3): x, y in pixels at 500 dpi, the
    angle in turns / 256."""

    starts: NDArray[np.int64]
    points: NDArray[np.float32]


def make_pool(prints: int, seed: int) -> Pool:
    """Of each print the minutiae of one impression, upright."""
    rng, found = np.random.default_rng([seed, 1]), []
    with bd.Extractor() as extractor:
        while len(found) < prints:
            impression = draw_impression(rng, draw_master(rng))
            (template,) = extractor.extract([bd.Finger(impression.image)])
            if isinstance(template, bd.Refusal) or template.minutiae is None:
                continue
            strongest = read_record(template.minutiae).strongest(COUNT_MAX)
            if strongest.count >= 20:
                found.append(_upright(strongest, impression))
    return Pool(np.cumsum([0, *map(len, found)]), np.concatenate(found))


def _upright(minutiae: MinutiaeRecord, impression: Impression) -> NDArray[np.float32]:
    body = np.frombuffer(minutiae.body, np.uint8).reshape(-1, 6).astype(np.float32)
    x = (body[:, 0].astype(int) & 63) * 256 + body[:, 1] - impression.core[0]
    y = (body[:, 2].astype(int) & 63) * 256 + body[:, 3] - impression.core[1]
    cos, sin = np.cos(impression.angle), np.sin(impression.angle)  # clockwise as seen, y down
    upright = (x * cos + y * sin, y * cos - x * sin, body[:, 4] + impression.angle * (128 / np.pi))
    return np.stack(upright, 1).astype(np.float32)


def cached_pool(folder: Path, prints: int, seed: int) -> Pool:
    path = folder / f"pool-{prints}-{seed}.npz"
    if not path.exists():
        pool = make_pool(prints, seed)
        np.savez(path.with_suffix(".new.npz"), starts=pool.starts, points=pool.points)
        path.with_suffix(".new.npz").replace(path)
    stored = np.load(path)
    return Pool(stored["starts"], stored["points"])


@dataclass(frozen=True, eq=False)
class Register:
    """Any part of it can be drawn again: what a subject has depends on the seed and its number alone."""

    seed: int
    pool: Pool

    def subject_id(self, number: int) -> str:
        return f"{number * 2654435761 % 10**10:010d}{number % 10**6:06d}"

    def vectors(self, column: str, low: int, high: int) -> NDArray[np.float32]:
        """float32 (high - low, d) of subjects."""
        blocks = range(low // BLOCK, -(-high // BLOCK))
        drawn = np.concatenate([self._block(column, block) for block in blocks])
        return drawn[low - BLOCK * blocks.start : high - BLOCK * blocks.start]

    def _block(self, column: str, block: int) -> NDArray[np.float32]:
        return _directions(column, BLOCK, np.random.default_rng([self.seed, COLUMNS.index(column), block]))

    def second_vector(self, column: str, number: int, capture: int, poor: bool) -> NDArray[np.float32]:
        """Of another capture of a subject's finger or face."""
        rng = np.random.default_rng([self.seed, COLUMNS.index(column), number, capture])
        (first,) = self.vectors(column, number, number + 1)
        card = FACE_CARD if column == "face" else FINGER_CARD
        quantile = rng.uniform(0, POOR_SHARE) if poor else rng.uniform(0, 1)
        cosine = float(Calibration.from_card(card.calibration).mated_similarities(np.array([quantile]))[0])
        (other,) = _directions(column, 1, rng)
        other = other - (other @ first) * first
        second = cosine * first + np.sqrt(1 - cosine**2) * other / np.linalg.norm(other)
        return (second / np.linalg.norm(second)).astype(np.float32)

    def records(self, finger: str, low: int, high: int, capture: int = 0, poor: bool = False) -> list[Any]:
        """[offsets int64 (n + 1,), bytes uint8] of a capture of each subject's finger."""
        count = high - low
        room = HEAD_BYTES + 6 * COUNT_MAX + 2
        cells, sizes = np.zeros((count, room), np.uint8), np.zeros(count, np.int64)
        key = np.array([self.seed, FINGERS.index(finger), capture], np.int64)
        _draw(key, low, poor, position_code(finger), self.pool.starts, self.pool.points, cells, sizes)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        data = np.empty(int(offsets[-1]), np.uint8)
        _gather(cells, offsets, data)
        return [offsets, data]

    def record(self, finger: str, number: int, capture: int, poor: bool = False) -> bytes:
        return self.records(finger, number, number + 1, capture, poor)[1].tobytes()

    def batch(self, low: int, high: int, threads: int = 2) -> Any:
        """Subjects [low, high) as a pyarrow.RecordBatch, with all columns."""
        with ThreadPoolExecutor(threads) as pool:
            drawn = list(pool.map(lambda column: self._column(column, low, high), COLUMNS))
        fields = [("subject_id", pa.array([self.subject_id(i) for i in range(low, high)]), None)]
        for column, (vectors, records, quality) in zip(COLUMNS, drawn, strict=True):
            about = {"model_id": MODELS[column]}
            fields += [(column, vectors, about), (f"{column}_quality", quality, about)]
            fields += [(f"{column}_minutiae", records, about)] if records is not None else []
        schema = pa.schema([pa.field(name, array.type, metadata=about) for name, array, about in fields])
        return pa.RecordBatch.from_arrays([array for _, array, _ in fields], schema=schema)

    def _column(self, column: str, low: int, high: int) -> tuple[Any, Any, Any]:
        vectors = self.vectors(column, low, high)
        cells = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        quality = pa.array(np.random.default_rng([self.seed, 99, low]).uniform(0.5, 1, high - low).astype(np.float32))
        if column == "face":
            return cells, None, quality
        offsets, data = self.records(column, low, high)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data)]
        return cells, pa.LargeBinaryArray.from_buffers(pa.large_binary(), high - low, buffers), quality


def _directions(column: str, count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """float32 (count, d) unit rows of the column's law."""
    mean, weights = _law(column)
    drawn = rng.standard_normal((count, len(weights)), np.float32) * weights
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    drawn *= np.float32(np.sqrt(1 - mean))
    drawn[:, -1] += np.float32(np.sqrt(mean))  # the last number is next to nothing in the others
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def _law(column: str) -> tuple[float, NDArray[np.float32]]:
    """(mean cosine of strangers, deviations of the numbers, that make the card's spread)."""
    if column not in _LAWS:
        card = FACE_CARD if column == "face" else FINGER_CARD
        mean, sd = Calibration.from_card(card.calibration).nonmated_moments
        mean = max(mean, 0.0)
        wanted, numbers = ((1 - mean) / sd) ** 2, np.arange(DIMENSIONS[column])
        rates = np.linspace(0.0, 0.2, 2_001)[:, None]
        weights = np.exp(-rates * numbers)
        effective = (weights**2).sum(1) ** 2 / (weights**4).sum(1)  # isotropic vectors of so many numbers spread alike
        _LAWS[column] = mean, weights[int(np.argmin(np.abs(effective - wanted)))].astype(np.float32)
    return _LAWS[column]


_LAWS: dict[str, tuple[float, NDArray[np.float32]]] = {}


# minutiae -----------------------------------------------------------------------------------------------------------

_u64 = np.uint64
_ODD, _MIX_1, _MIX_2 = _u64(0x9E3779B97F4A7C15), _u64(0xBF58476D1CE4E5B9), _u64(0x94D049BB133111EB)


@numba.njit(cache=True, nogil=True)
def _uniform(state: Any) -> float:
    """0..1, from a counter (splitmix64, Steele 2014)."""
    state[0] += _ODD
    z = state[0]
    z = (z ^ (z >> _u64(30))) * _MIX_1
    z = (z ^ (z >> _u64(27))) * _MIX_2
    z = z ^ (z >> _u64(31))
    return float(z >> _u64(11)) / 9007199254740992.0


@numba.njit(cache=True, nogil=True)
def _normal(state: Any) -> float:
    """Nearly normal: a sum of four."""
    return (_uniform(state) + _uniform(state) + _uniform(state) + _uniform(state) - 2.0) * 1.7320508


@numba.njit(cache=True, nogil=True)
def _seeded(state: Any, a: int, b: int, c: int, d: int) -> None:
    state[0] = _u64(a)
    for part in (b, c, d):
        _uniform(state)
        state[0] = (state[0] ^ _u64(part + 1)) * _MIX_1
    _uniform(state)


@numba.njit(cache=True, nogil=True)
def _finger(state: Any, starts: Any, points: Any, out: Any) -> int:
    """A finger of its own from a print of the pool: minutiae x, y, angle, quality in out. Returns their number."""
    which = int(_uniform(state) * (len(starts) - 1))
    mirrored = _uniform(state) < 0.5
    wide, high = np.exp(0.08 * _normal(state)), np.exp(0.08 * _normal(state))
    waves = np.empty((4, 4))
    for w in range(4):
        waves[w, 0], waves[w, 1] = 6.2832 * _uniform(state), 6.2832 * _uniform(state)
        waves[w, 2], waves[w, 3] = 6.2832 / (90 + 90 * _uniform(state)), 6 + 8 * _uniform(state)
    count = 0
    for m in range(starts[which], starts[which + 1]):
        if _uniform(state) < 0.08:
            continue
        x, y, angle = points[m, 0], points[m, 1], points[m, 2]
        if mirrored:
            x, angle = -x, 128 - angle
        x, y = x * wide, y * high
        for w in range(4):
            along = np.cos(waves[w, 0]) * x + np.sin(waves[w, 0]) * y
            push = waves[w, 3] * np.sin(waves[w, 2] * along + waves[w, 1])
            if w % 2:
                x += push
            else:
                y += push
        out[count, 0], out[count, 1] = x + 7 * _normal(state), y + 7 * _normal(state)
        out[count, 2] = angle + 5 * _normal(state) + (128 if _uniform(state) < 0.05 else 0)
        out[count, 3] = 35 + 60 * _uniform(state)
        count += 1
    return count


@numba.njit(cache=True, nogil=True)
def _captured(state: Any, poor: bool, finger: Any, count: int, record: Any) -> int:
    """Writes the minutiae of one capture into a record; returns how many."""
    turn = 8.0 * _normal(state) * 0.01745
    cos, sin, stretch = np.cos(turn), np.sin(turn), np.exp(0.015 * _normal(state))
    shift_x, shift_y = SIDE_PX / 2 + 14 * _normal(state), SIDE_PX / 2 + 14 * _normal(state)
    middle_x, middle_y = 16 * _normal(state), 20 * _normal(state)
    half_x, half_y = 125 + 95 * _uniform(state), 140 + 100 * _uniform(state)
    phase, pull = 6.2832 * _uniform(state), 1.0 + 3.0 * _uniform(state)
    badness = _uniform(state) ** 2
    lost = 0.02 + 0.5 * badness + (0.35 if poor else 0.0)
    blur = 0.7 + 2.2 * badness + (0.8 if poor else 0.0)
    kept = 0
    added = int(count * (0.04 + 0.12 * _uniform(state)))
    for m in range(count + added):
        if m < count:
            x, y, angle, quality = finger[m, 0], finger[m, 1], finger[m, 2], finger[m, 3]
            if _uniform(state) < lost:
                continue
        else:
            x, y = middle_x + half_x * (2 * _uniform(state) - 1), middle_y + half_y * (2 * _uniform(state) - 1)
            angle, quality = 256 * _uniform(state), 5 + 45 * _uniform(state)
        if ((x - middle_x) / half_x) ** 2 + ((y - middle_y) / half_y) ** 2 > 1:
            continue
        x, y = x * stretch + pull * np.sin(y / 60 + phase), y * stretch + pull * np.sin(x / 60 + phase)
        x, y = x + blur * 1.3 * _normal(state), y + blur * 1.3 * _normal(state)
        angle += blur * 3.5 * _normal(state)
        px, py = int(x * cos + y * sin + shift_x), int(y * cos - x * sin + shift_y)
        if not (0 <= px < SIDE_PX and 0 <= py < SIDE_PX) or kept == COUNT_MAX:
            continue
        at = HEAD_BYTES + 6 * kept
        record[at], record[at + 1] = 0x40 | (px >> 8), px & 255
        record[at + 2], record[at + 3] = py >> 8, py & 255
        record[at + 4] = int(np.round(angle + turn * 40.744)) & 255
        record[at + 5] = max(1, min(100, int(quality + 8 * _normal(state))))
        kept += 1
    return kept


@numba.njit(cache=True, nogil=True)
def _draw(key: Any, low: int, poor: bool, code: int, starts: Any, points: Any, cells: Any, sizes: Any) -> None:
    state, finger = np.zeros(1, np.uint64), np.empty((COUNT_MAX, 4))
    for i in range(len(cells)):
        record = cells[i]
        _seeded(state, key[0], key[1], low + i, 0)
        count = _finger(state, starts, points, finger)
        _seeded(state, key[0], key[1], low + i, key[2] + 1)
        kept = _captured(state, poor, finger, count, record)
        size = HEAD_BYTES + 6 * kept + 2
        record[0], record[1], record[2], record[4], record[5], record[6] = 70, 77, 82, 32, 50, 48
        record[10], record[11] = size >> 8, size & 255
        record[14], record[15], record[16], record[17] = SIDE_PX >> 8, SIDE_PX & 255, SIDE_PX >> 8, SIDE_PX & 255
        record[19], record[21], record[22], record[24], record[26], record[27] = (
            PIXELS_PER_CM, PIXELS_PER_CM, 1, code, 70, kept,
        )  # fmt: skip
        sizes[i] = size


@numba.njit(cache=True, nogil=True)
def _gather(cells: Any, offsets: Any, data: Any) -> None:
    for i in range(len(cells)):
        data[offsets[i] : offsets[i + 1]] = cells[i, : offsets[i + 1] - offsets[i]]
