"""Checks minutiae records and converts them to the form that galleries store: a single view at 500 dpi, ISO/IEC 19794-2:2005.

Owns the checks of a record, and the conversion from each standard. Never extracts or compares, and never parses bytes (`layouts.py`).

1. The result for any bytes is a valid record or InvalidInput, in bounded time.
2. Coordinates are pixels at 500 dpi. Angles are in 360/256 degrees, anticlockwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from biodedup.capture.minutiae.layouts import QUALITY_MAX, RawView, packed, raw_views
from biodedup.errors import InvalidInput
from biodedup.values import FINGER_POSITIONS

MINUTIA_BYTES = 6
COUNT_MAX = 255
PIXELS_PER_CM = 197
"""500 dpi."""
RESOLUTIONS = range(98, 1576)
"""Pixels per cm of scanners: 250 to 4,000 dpi."""
SIDE_PX_MAX = 0x3FFF
"""A coordinate has 14 bits."""

OUTSIDE_PX_MAX, OUTSIDE_SHARE_MAX = 16, 0.25
"""A minutia up to OUTSIDE_PX_MAX outside the image is moved to the edge; a minutia farther outside is dropped. If the share of both is above
OUTSIDE_SHARE_MAX, the record is refused, because its size or its coordinates are wrong."""

CROWD_PX, CROWD_MAX = 32, 40
"""A record with more than CROWD_MAX minutiae within CROWD_PX of a minutia is refused. Real fingers have at most 16 (FVC2002 DB1-4_B, UareU,
SFinGe and SOCOFing, 2026-11). BOZORTH3 takes 25 s to compare 150 minutiae at the same point."""


@dataclass(frozen=True)
class MinutiaeRecord:
    """Minutiae in an image. body: six bytes per minutia, in the layout of the standard. moved, dropped: the numbers of minutiae outside the
    image that were moved to its edge, or dropped."""

    width: int
    height: int
    body: bytes = field(repr=False)
    moved: int = 0
    dropped: int = 0

    @property
    def count(self) -> int:
        return len(self.body) // MINUTIA_BYTES

    @property
    def provenance(self) -> tuple[str, ...]:
        """Sentences about corrections."""
        if not (self.moved or self.dropped):
            return ()
        return (f"minutiae outside of the image: {self.moved} moved to its edge, {self.dropped} dropped",)

    def strongest(self, count: int) -> MinutiaeRecord:
        """The minutiae of the highest quality, at most `count`, in their order."""
        if self.count <= count:
            return self
        rows = np.frombuffer(self.body, np.uint8).reshape(-1, MINUTIA_BYTES)
        kept = np.sort(np.argsort(-rows[:, 5].astype(int), kind="stable")[:count])
        return MinutiaeRecord(self.width, self.height, rows[kept].tobytes())


class MinutiaeView(NamedTuple):
    """A view of a record. position: as in FINGER_POSITIONS. number: of the view, from 0. quality: 0 to 100, or None if not stated."""

    position: str
    number: int
    record: MinutiaeRecord
    quality: int | None


def write_record(record: MinutiaeRecord, position_code: int, quality: int | None, *, version: int = 2005) -> bytes:
    """The record as bytes. position_code: ISO code, 0 (unknown) to 10. quality: 0 to 100. version: 2005 or 2011.

    Raises InvalidInput for a value that such a record cannot hold.
    """
    return packed(version, [_raw(record, position_code, quality)])


def write_views(views: Sequence[MinutiaeView], *, version: int = 2005) -> bytes:
    """A record of several views. The views of a finger are numbered in their order. Raises InvalidInput."""
    counts: Counter[str] = Counter()
    raws = []
    for view in views:
        raw = _raw(view.record, position_code(view.position), view.quality)
        raws.append(raw._replace(number=counts[view.position]))
        counts[view.position] += 1
    if max(counts.values(), default=0) > 16:
        raise InvalidInput(f"{max(counts.values())} views of one finger, a record holds 16; write several records")
    return packed(version, raws)


def read_views(content: bytes) -> list[MinutiaeView]:
    """Every view of a record of ISO/IEC 19794-2:2005 or 2011 or ANSI/INCITS 378-2004, scaled to 500 dpi.

    Raises InvalidInput unless the whole record is valid.
    """
    return [checked_view(raw) for raw in raw_views(content)]


def checked_view(raw: RawView) -> MinutiaeView:
    """A checked view, converted to 500 dpi. Raises InvalidInput."""
    return MinutiaeView(_position(raw.position_code), raw.number, _record(raw), raw.quality)


def read_record(content: bytes) -> MinutiaeRecord:
    """The first view of a record. Raises InvalidInput unless the whole record is valid."""
    return read_views(content)[0].record


def best_views(content: bytes) -> dict[str, MinutiaeView]:
    """Position -> the view of the highest stated quality, the first of equal views. Raises InvalidInput."""
    best: dict[str, MinutiaeView] = {}
    for view in read_views(content):
        known = best.get(view.position)
        if known is None or (view.quality or 0) > (known.quality or 0):
            best[view.position] = view
    return best


def view_of(content: bytes, position: str) -> MinutiaeView:
    """The best view of a finger position. If the record holds a single finger, it is this finger, also under another position.

    A position of `unknown` takes the record's position. Raises InvalidInput if the record holds several fingers, but not this position.
    """
    best = best_views(content)
    if position in best:
        return best[position]
    if len(best) > 1:
        raise InvalidInput(f"a minutiae record holds {', '.join(best)}, wanted {position}; file its fingers one by one")
    (view,) = best.values()
    return view if position == "unknown" else view._replace(position=position)


def standard(view: MinutiaeView) -> bytes:
    """The view as a separate record, as galleries store it."""
    return write_views([view])


def position_code(position: str) -> int:
    """The code of a finger position in ISO/IEC 19794-2: 0 for `unknown`, otherwise 1 to 10."""
    return (FINGER_POSITIONS.index(position) + 1) % len(FINGER_POSITIONS)


def _raw(record: MinutiaeRecord, position_code: int, quality: int | None) -> RawView:
    if record.count > COUNT_MAX:
        raise InvalidInput(f"{record.count} minutiae, a record holds {COUNT_MAX}; pass record.strongest({COUNT_MAX})")
    if not (0 < record.width <= SIDE_PX_MAX and 0 < record.height <= SIDE_PX_MAX):
        raise InvalidInput(
            f"{record.width} x {record.height} pixels, a record holds 1 to {SIDE_PX_MAX}; crop the image"
        )
    if not (0 <= position_code < len(FINGER_POSITIONS) and (quality is None or 0 <= quality <= QUALITY_MAX)):
        raise InvalidInput(
            f"position code {position_code}, quality {quality}; pass 0 to 10, and 0 to {QUALITY_MAX} or None"
        )
    minutiae = np.frombuffer(record.body, np.uint8).reshape(-1, MINUTIA_BYTES)
    size, resolution = (record.width, record.height), (PIXELS_PER_CM, PIXELS_PER_CM)
    return RawView(position_code, 0, quality, size, resolution, minutiae)


def _position(code: int) -> str:
    if code >= len(FINGER_POSITIONS):
        raise InvalidInput(
            f"a minutiae record has position code {code}, wanted 0 to 10, one finger; extract them one by one"
        )
    return FINGER_POSITIONS[code - 1]  # code 0: the last one, unknown


def _record(raw: RawView) -> MinutiaeRecord:
    """The checked minutiae of a view, converted to 500 dpi."""
    (width, height), (x_per_cm, y_per_cm) = raw.size, raw.resolution
    if not (width and height):
        raise InvalidInput(f"a minutiae record states an image of {width} x {height} pixels; extract it again")
    if x_per_cm not in RESOLUTIONS or y_per_cm not in RESOLUTIONS:
        raise InvalidInput(
            f"a minutiae record states {x_per_cm} x {y_per_cm} pixels per cm, wanted {RESOLUTIONS[0]} to {RESOLUTIONS[-1]}; "
            "state the scanner's resolution"
        )
    minutiae = raw.minutiae
    points = minutiae[:, :4].copy().view(">u2").astype(np.int32) & 0x3FFF
    minutiae, points, moved, dropped = _inside(minutiae, points, (width, height))
    kinds = minutiae[:, 0] & 0xC0
    if (
        max(abs(PIXELS_PER_CM - x_per_cm), abs(PIXELS_PER_CM - y_per_cm)) > 1
    ):  # as for images: a difference below 1 % is ignored
        scale = np.array([PIXELS_PER_CM / x_per_cm, PIXELS_PER_CM / y_per_cm])
        width, height = (int(side) for side in np.ceil(np.multiply((width, height), scale)))
        points = np.minimum((points * scale).round().astype(np.int32), (width - 1, height - 1))
        if x_per_cm != y_per_cm:
            turn = minutiae[:, 4] * (2 * np.pi / 256)
            turn = np.arctan2(np.sin(turn) * scale[1], np.cos(turn) * scale[0])
            minutiae[:, 4] = np.round(turn * (256 / (2 * np.pi))).astype(int) & 255
    if max(width, height) > SIDE_PX_MAX:
        raise InvalidInput(
            f"a minutiae record states {width} x {height} pixels at 500 dpi, wanted at most {SIDE_PX_MAX}; is its resolution right?"
        )
    crowd = _crowd(points)
    if crowd > CROWD_MAX:
        raise InvalidInput(
            f"a minutiae record has {crowd} minutiae within {CROWD_PX} pixels, wanted at most {CROWD_MAX}; extract it again"
        )
    minutiae[:, :4] = points.astype(">u2").view(np.uint8)
    minutiae[:, 0] |= np.where(kinds == 0xC0, 0, kinds)  # kind 3 is reserved, kind 0 stands for other kinds
    return MinutiaeRecord(width, height, minutiae.tobytes(), moved, dropped)


def _inside(
    minutiae: NDArray[np.uint8], points: NDArray[np.int32], size: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.int32], int, int]:
    """(minutiae, their points, number of minutiae moved to the edge, number of dropped minutiae)."""
    beyond = (points - (np.array(size) - 1)).max(axis=1, initial=0)
    outside, far = int(np.count_nonzero(beyond > 0)), beyond > OUTSIDE_PX_MAX
    if outside > OUTSIDE_SHARE_MAX * len(points):
        raise InvalidInput(
            f"a minutiae record has {outside} of {len(points)} minutiae outside its {size[0]} x {size[1]} pixels, wanted at most a "
            "quarter; extract it again"
        )
    dropped = int(np.count_nonzero(far))
    kept = np.minimum(points[~far], np.array(size) - 1).astype(np.int32)
    return minutiae[~far].copy(), kept, outside - dropped, dropped


def _crowd(points: NDArray[np.int32]) -> int:
    """The greatest number of minutiae within CROWD_PX of a minutia, itself included; of up to CROWD_MAX minutiae, their number. points: int32
    (n, 2)."""
    if len(points) <= CROWD_MAX:
        return len(points)
    x, y = points.T.astype(np.int16)
    near = (np.abs(x[:, None] - x) <= CROWD_PX) & (np.abs(y[:, None] - y) <= CROWD_PX)
    return int(np.count_nonzero(near, axis=1).max())
