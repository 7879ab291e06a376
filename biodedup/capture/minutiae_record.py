"""Minutiae as bytes: ISO/IEC 19794-2:2005 records of one finger view.

Owns the layout. Never extracts or compares.

Header (24 bytes), view header (4), six bytes a minutia (type and x, y, angle, quality), length of extended data (2).
Everything is big-endian. Coordinates are pixels; angles count 360/256 degrees anticlockwise.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from biodedup.errors import InvalidInput

MINUTIA_BYTES = 6
_HEADER = struct.Struct(
    ">4s4sIHHHHHBB"
)  # magic, version, length, device, width, height, resolution x, y, views, reserved
_VIEW = struct.Struct(">BBBB")  # position, view and impression, quality, count
_PIXELS_PER_CM = 197  # 500 dpi

CROWD_PX, CROWD_MAX = 32, 40
"""No finger has more minutiae as close as this to one of them: at most 16 in FVC2002 DB1-4_B, UareU, SFinGe and SOCOFing,
2026-11. BOZORTH3 takes 25 s for one comparison of 150 minutiae that all lie in one point."""


@dataclass(frozen=True)
class MinutiaeRecord:
    """body: six bytes a minutia, as the standard lays them out."""

    width: int
    height: int
    body: bytes = field(repr=False)

    @property
    def count(self) -> int:
        return len(self.body) // MINUTIA_BYTES

    def strongest(self, count: int) -> MinutiaeRecord:
        """At most this many minutiae, those of the highest quality, in their order."""
        if self.count <= count:
            return self
        rows = np.frombuffer(self.body, np.uint8).reshape(-1, MINUTIA_BYTES)
        kept = np.sort(np.argsort(-rows[:, 5].astype(int), kind="stable")[:count])
        return MinutiaeRecord(self.width, self.height, rows[kept].tobytes())


def write_record(record: MinutiaeRecord, position_code: int, quality: int) -> bytes:
    """The record as bytes. position_code: ISO code 0 (unknown) to 10; quality: 0..100."""
    length = _HEADER.size + _VIEW.size + len(record.body) + 2
    header = _HEADER.pack(
        b"FMR\0", b" 20\0", length, 0, record.width, record.height, _PIXELS_PER_CM, _PIXELS_PER_CM, 1, 0
    )
    return header + _VIEW.pack(position_code, 0, quality, record.count) + record.body + b"\0\0"


def read_record(content: bytes) -> MinutiaeRecord:
    """The first view of a record. Raises InvalidInput unless the record is sound."""
    least = _HEADER.size + _VIEW.size
    if len(content) < least:
        raise InvalidInput(f"a minutiae record has {len(content)} bytes, wanted {least} or more; send it whole")
    magic, version, length, _, width, height, _, _, views, _ = _HEADER.unpack_from(content)
    if (magic, version) != (b"FMR\0", b" 20\0"):
        raise InvalidInput("a minutiae record is not ISO/IEC 19794-2:2005; convert it, or extract it again")
    if length != len(content) or views < 1 or not (width and height):
        raise InvalidInput(
            f"a minutiae record states {length} bytes, {views} views, {width} x {height} pixels and has {len(content)} "
            "bytes; send it whole"
        )
    count = int(content[_HEADER.size + 3])
    body = content[least : least + MINUTIA_BYTES * count]
    if len(body) < MINUTIA_BYTES * count:
        raise InvalidInput(f"a minutiae record states {count} minutiae and is too short for them; send it whole")
    points = np.frombuffer(body, ">u2").reshape(count, 3) & 0x3FFF
    if (points[:, 0] >= width).any() or (points[:, 1] >= height).any():
        raise InvalidInput(f"a minutiae record has points outside its {width} x {height} pixels; extract it again")
    crowd = _crowd(points[:, :2].astype(np.int32))
    if crowd > CROWD_MAX:
        raise InvalidInput(
            f"a minutiae record has {crowd} minutiae within {CROWD_PX} pixels, wanted {CROWD_MAX} at most; extract it again"
        )
    return MinutiaeRecord(width, height, body)


def _crowd(points: NDArray[np.int32]) -> int:
    """The most minutiae within CROWD_PX of one of them, itself included. points: int32 (n, 2)."""
    if not len(points):
        return 0
    apart = np.abs(points[:, None] - points[None]).max(axis=2)
    return int(np.count_nonzero(apart <= CROWD_PX, axis=1).max())
