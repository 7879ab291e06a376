"""Checks the header of a picture before it is decoded, so that a small file cannot cause much work or memory use.

Owns the limits of each format. Never decodes, and never raises for the content of the bytes.

1. A check takes time proportional to the bytes, and visits at most `PARTS_MAX` parts of a file.
2. A check refuses only a file that exceeds a limit. A file that it cannot read is left to the decoder, which refuses it.
3. The limits are above what cameras and scanners make. Within them a decoder takes a few seconds and less than 500 MB.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from itertools import zip_longest
from typing import NamedTuple

PARTS_MAX = 20_000
"""Greatest number of segments, chunks or blocks. Pictures have hundreds, a PNG in chunks of 8 kB has thousands. A reader in Python takes 5 us
for each."""

SCANS_MAX = 64
"""Greatest number of scans of a JPEG. Progressive JPEGs have 6 to 15. Each scan goes over all pixels: a file of 390 kB took 117 s."""

SHRUNK_MAX = 8
"""A JPEG of a face may have this many times `pixels_max`, because it is decoded at a half or a quarter of its size."""

SLOW_PIXELS_MAX = 4_000_000
"""Greatest number of pixels for formats that Pillow decodes in Python: plain PNM, levels that are not 8 or 16 bits, run lengths in BMP."""

_SAMPLES_A_BYTE_MAX, _SAMPLES_FREE = 4096, 1 << 20
"""Greatest number of samples per byte of a file, and samples that are always allowed. Wavelets compress a picture of a single colour without
bound, but a capture is never a picture of a single colour."""
_COMPONENTS_MAX, _TILES_MAX, _PRECINCTS_MAX, _PACKETS_MAX, _CODE_BLOCKS_MAX = 4, 1024, 100_000, 1_000_000, 200_000
"""Limits of JPEG 2000. OpenJPEG takes 600 bytes for a code block and 10 kB for a tile. 16 million pixels have 50,000 code blocks of 32 x 32."""
_TAG_BYTES_MAX, _TAG_NUMBERS_MAX = 32 << 20, 100_000
_PREFACE_BYTES_MAX = 1 << 20


class Excess(NamedTuple):
    """The limit that a file exceeds, as a refusal reports it."""

    reason: str
    detail: str
    measured: float | None = None
    limit: float | None = None


def excess_of(name: str, content: bytes, pixels_max: int, *, shrinks: bool = False) -> Excess | None:
    """The limit that a file of this format exceeds, or None. name: Pillow's name, or WSQ. shrinks: whether a large JPEG is decoded at a
    fraction of its size."""
    try:
        if name == "JPEG":
            return _jpeg(content, pixels_max, shrinks)
        check = _CHECKS.get(name)
        return None if check is None else check(content, pixels_max)
    except (struct.error, IndexError, OverflowError):
        return None  # the file is truncated; the decoder refuses it


def too_many_pixels(name: str, width: int, height: int, pixels_max: int) -> Excess | None:
    if width * height <= pixels_max:
        return None
    return Excess("too_many_pixels", f"{name}, {width} x {height} pixels", width * height, pixels_max)


def implausible(name: str, samples: int, byte_count: int) -> Excess | None:
    """The excess of a file that states more samples than its bytes can encode, or None."""
    limit = _SAMPLES_A_BYTE_MAX * byte_count + _SAMPLES_FREE
    return _complex(f"{name}, samples for {byte_count} bytes", samples, limit) if samples > limit else None


def _complex(detail: str, measured: float, limit: float) -> Excess:
    return Excess("too_complex", detail, measured, limit)


# JPEG -----------------------------------------------------------------------------------------------------------------

_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # neither byte stuffing nor a restart marker
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_FRAMES_READ = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)
"""Baseline, extended and progressive frames. libjpeg-turbo also decodes arithmetic coding, of the last two."""


def _jpeg(content: bytes, pixels_max: int, shrinks: bool) -> Excess | None:
    at, scans, sequential = 2, 0, True
    width = height = 0
    for _ in range(PARTS_MAX):
        found = _MARKER.search(content, at)
        if found is None or found[1] == b"\xd9":
            break
        marker, at = found[1][0], found.end()
        if marker in (0x01, 0xD8):
            continue
        if marker in _FRAMES:
            tall, wide = struct.unpack_from(">HH", content, at + 3)
            width, height, sequential = max(width, wide), max(height, tall), sequential and marker in (0xC0, 0xC1)
        scans += marker == 0xDA
        at += max(int.from_bytes(content[at : at + 2], "big"), 2)
    else:
        return _complex("JPEG, markers", PARTS_MAX, PARTS_MAX)
    if scans > SCANS_MAX:
        return Excess("too_many_scans", "JPEG, scans", scans, SCANS_MAX)
    # several scans keep every coefficient in memory, at full size
    factor = SHRUNK_MAX if shrinks and sequential and scans == 1 else 1
    return too_many_pixels("JPEG", width, height, factor * pixels_max)


def unread_jpeg(content: bytes) -> str | None:
    """The feature of a JPEG that libjpeg does not decode (12-bit numbers, lossless or hierarchical coding), or None."""
    at = 2
    for _ in range(PARTS_MAX):
        found = _MARKER.search(content, at)
        if found is None or found[1] in (b"\xd9", b"\xda"):
            return None
        marker, at = found[1][0], found.end()
        if marker in (0x01, 0xD8):
            continue
        if marker in _FRAMES and len(content) > at + 2:
            if content[at + 2] != 8:
                return f"{content[at + 2]} bits a number"
            return None if marker in _FRAMES_READ else "lossless or hierarchical coding"
        at += max(int.from_bytes(content[at : at + 2], "big"), 2)
    return None


# JPEG 2000 ------------------------------------------------------------------------------------------------------------


_WHOLE = (15, 15)
"""Sizes of a precinct that covers its whole level."""


class _Coding(NamedTuple):
    """A coding style of a codestream. Sizes are exponents of two. precincts: of each level, from the largest picture."""

    layers: int = 1
    levels: int = 0
    block: tuple[int, int] = (10, 10)
    precincts: tuple[tuple[int, int], ...] = ()

    def worst(self, other: _Coding) -> _Coding:
        """A style with the more demanding value of both in each field."""
        return _Coding(
            max(self.layers, other.layers),
            max(self.levels, other.levels),
            (min(self.block[0], other.block[0]), min(self.block[1], other.block[1])),
            tuple(
                (min(a[0], b[0]), min(a[1], b[1]))
                for a, b in zip_longest(self.precincts, other.precincts, fillvalue=_WHOLE)
            ),
        )


def _jpeg2000(content: bytes, pixels_max: int) -> Excess | None:
    start = _codestream(content)
    if start is None:
        return None
    x1, y1, x0, y0, tile_width, tile_height, _, _, components = struct.unpack_from(">8IH", content, start + 8)
    width, height = max(x1 - x0, 0), max(y1 - y0, 0)
    declined = too_many_pixels("JPEG2000", width, height, pixels_max)
    declined = declined or implausible("JPEG2000", width * height * components, len(content))
    if declined or not (width and height and tile_width and tile_height):
        return declined
    tiles = (-(-x1 // tile_width)) * (-(-y1 // tile_height))
    coding = _worst_coding(content, start, components)
    if coding is None:
        return _complex("JPEG2000, markers", PARTS_MAX, PARTS_MAX)
    wide, tall = min(tile_width, width), min(tile_height, height)
    precincts = blocks = 0
    for level in range(min(coding.levels, 32) + 1):
        across, down = -(-wide // (1 << level)), -(-tall // (1 << level))
        precinct = coding.precincts[level] if level < len(coding.precincts) else _WHOLE
        own = (-(-across // (1 << precinct[0]))) * (-(-down // (1 << precinct[1])))
        # a code block is no larger than its precinct in a subband
        side = [max(min(size, room - 1), 0) for size, room in zip(coding.block, precinct, strict=True)]
        precincts += own
        blocks += 3 * own + (across * down >> sum(side))
    count = tiles * components
    for detail, measured, limit in (
        ("components", components, _COMPONENTS_MAX),
        ("tiles", tiles, _TILES_MAX),
        ("precincts", count * precincts, _PRECINCTS_MAX),
        ("packets", count * precincts * coding.layers, _PACKETS_MAX),
        ("code blocks", count * blocks, _CODE_BLOCKS_MAX),
    ):
        if measured > limit:
            return _complex(f"JPEG2000, {detail}", measured, limit)
    return None


def _codestream(content: bytes) -> int | None:
    """The position of the codestream, which may be in a box; None if it is not found."""
    if content.startswith(b"\xff\x4f\xff\x51"):
        return 0
    at = 0
    for _ in range(PARTS_MAX):
        length, kind = struct.unpack_from(">I4s", content, at)
        head = 8
        if length == 1:
            (length,), head = struct.unpack_from(">Q", content, at + 8), 16
        if kind == b"jp2c":
            return at + head
        if length < head:
            return None
        at += length
    return None


def _worst_coding(content: bytes, start: int, components: int) -> _Coding | None:
    """The most demanding coding style of the main header and of all tile parts. None if there are too many markers."""
    worst, at, tile_end = _Coding(), start + 2, 0
    for _ in range(PARTS_MAX):
        marker = content[at : at + 2]
        if marker == b"\xff\x93":  # the data of a tile follow
            if not tile_end:
                return worst
            at = tile_end
            continue
        length = int.from_bytes(content[at + 2 : at + 4], "big")
        if len(marker) < 2 or marker[0] != 0xFF or length < 2:
            return worst
        if marker == b"\xff\x90":
            (size,) = struct.unpack_from(">I", content, at + 6)
            tile_end = at + size if size >= 14 else 0
        elif marker == b"\xff\x52":
            (layers,) = struct.unpack_from(">H", content, at + 6)
            worst = worst.worst(_style(content, at + 9, layers, precincts=bool(content[at + 4] & 1)))
        elif marker == b"\xff\x53":
            wide = 1 if components < 257 else 2
            worst = worst.worst(_style(content, at + 5 + wide, 1, precincts=bool(content[at + 4 + wide] & 1)))
        at += 2 + length
    return None


def _style(content: bytes, at: int, layers: int, *, precincts: bool) -> _Coding:
    levels, across, down = content[at], content[at + 1] + 2, content[at + 2] + 2
    sizes = content[at + 5 : at + 6 + levels] if precincts else b""
    return _Coding(layers, levels, (across, down), tuple((size & 15, size >> 4) for size in reversed(sizes)))


# others ---------------------------------------------------------------------------------------------------------------


def _tiff(content: bytes, pixels_max: int) -> Excess | None:
    """Checks the first directory, which is all that Pillow reads. A tag may point to any bytes, and many tags to the same bytes."""
    order = "<" if content[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", content, 2)[0] == 43
    at = struct.unpack_from(order + ("Q" if big else "I"), content, 8 if big else 4)[0]
    count = struct.unpack_from(order + ("Q" if big else "H"), content, at)[0]
    at += 8 if big else 2
    if count > 1000:
        return _complex("TIFF, tags", count, 1000)
    entry = struct.Struct(order + ("HHQ8s" if big else "HHI4s"))
    sizes: dict[int, int] = {}
    total = 0
    for _ in range(count):
        tag, kind, length, value = entry.unpack_from(content, at)
        at += entry.size
        total += length * _TIFF_BYTES.get(kind, 1)
        if kind not in _TIFF_TEXT and length > _TAG_NUMBERS_MAX:
            return _complex("TIFF, numbers of a tag", length, _TAG_NUMBERS_MAX)
        if length == 1 and kind in (3, 4):
            sizes[tag] = struct.unpack_from(order + ("H" if kind == 3 else "I"), value)[0]
    if total > _TAG_BYTES_MAX:
        return _complex("TIFF, bytes of tags", total, _TAG_BYTES_MAX)
    rows = min(sizes.get(278, 0), sizes.get(257, 0))
    return (
        too_many_pixels("TIFF", sizes.get(256, 0), sizes.get(257, 0), pixels_max)
        or too_many_pixels("TIFF, a tile", sizes.get(322, 0), sizes.get(323, 0), pixels_max)
        or too_many_pixels("TIFF, a strip", sizes.get(256, 0), rows, pixels_max)
    )


_TIFF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_TIFF_TEXT = (1, 2, 6, 7)


def _png(content: bytes, pixels_max: int) -> Excess | None:
    width, height = struct.unpack_from(">II", content, 16)
    at = 8
    for _ in range(PARTS_MAX):
        if at + 12 > len(content):
            return too_many_pixels("PNG", width, height, pixels_max)
        at += 12 + struct.unpack_from(">I", content, at)[0]
    return _complex("PNG, chunks", PARTS_MAX, PARTS_MAX)


def _gif(content: bytes, pixels_max: int) -> Excess | None:
    """Checks the blocks up to the first frame. Later frames are not read."""
    width, height = struct.unpack_from("<HH", content, 6)
    at = 13 + (3 << (content[10] & 7) + 1 if content[10] & 0x80 else 0)
    begin = at
    for _ in range(PARTS_MAX):
        if at - begin > _PREFACE_BYTES_MAX:
            return _complex("GIF, bytes before the picture", at - begin, _PREFACE_BYTES_MAX)
        if content[at] == 0x2C:
            left, top, across, down = struct.unpack_from("<4H", content, at + 1)
            return too_many_pixels("GIF", max(width, left + across), max(height, top + down), pixels_max)
        if content[at] != 0x21:
            at += 1
            continue
        at += 2
        while content[at] and at - begin <= _PREFACE_BYTES_MAX:
            at += 1 + content[at]
        at += 1
    return _complex("GIF, blocks before the picture", PARTS_MAX, PARTS_MAX)


def _webp(content: bytes, pixels_max: int) -> Excess | None:
    kind = content[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(content[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L":
        bits = struct.unpack_from("<I", content, 21)[0]
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", content, 26))
    return too_many_pixels("WEBP", width, height, pixels_max)


def _bmp(content: bytes, pixels_max: int) -> Excess | None:
    if struct.unpack_from("<I", content, 14)[0] < 40:
        return None  # a header of OS/2: no run lengths
    width, height, compression = struct.unpack_from("<ii4xI", content, 18)
    limit = min(pixels_max, SLOW_PIXELS_MAX) if compression in (1, 2) else pixels_max
    return too_many_pixels("BMP", abs(width), abs(height), limit)


_PNM = re.compile(
    rb"P([1-6])(?:\s|#[^\n\r]*[\n\r])+(\d{1,9})(?:\s|#[^\n\r]*[\n\r])+(\d{1,9})(?:(?:\s|#[^\n\r]*[\n\r])+(\d{1,9}))?\s"
)


def _pnm(content: bytes, pixels_max: int) -> Excess | None:
    if content[1:2] not in (b"1", b"2", b"3", b"4", b"5", b"6"):
        return Excess(
            "pixel_format",
            "PNM of floating-point numbers or of other channels; wanted grey levels or colours; save it as PNG",
        )
    found = _PNM.match(content[:4096])
    if found is None:
        return _complex("PPM without a header in its first bytes", len(content), 4096) if len(content) > 4096 else None
    kind, width, height = int(found[1]), int(found[2]), int(found[3])
    slow = kind < 4 or (kind != 4 and found[4] not in (b"255", b"65535"))
    return too_many_pixels("PPM", width, height, min(pixels_max, SLOW_PIXELS_MAX) if slow else pixels_max)


_CHECKS: dict[str, Callable[[bytes, int], Excess | None]] = {
    "JPEG2000": _jpeg2000,
    "TIFF": _tiff,
    "PNG": _png,
    "GIF": _gif,
    "WEBP": _webp,
    "BMP": _bmp,
    "PPM": _pnm,
}
