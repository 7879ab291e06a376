"""Captures that ask for far more work or memory than their size says: made here, none is anybody's file.

python -m tests.support.attacks [NAME ...]    extracts each in this process; prints name, outcome, seconds of the processor and megabytes of growth
"""

from __future__ import annotations

import io
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

ATTACKS: dict[str, Callable[[], tuple[str, bytes]]] = {}
"""Name -> a function that gives (face or finger, content)."""


def attack(make: Callable[[], bytes]) -> Callable[[], bytes]:
    kind = "finger" if "finger" in make.__name__ or "wsq" in make.__name__ else "face"
    ATTACKS[make.__name__] = lambda: (kind, make())
    return make


def saved(image: Image.Image, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def grey(side: int = 4000, level: int = 128) -> Image.Image:
    return Image.new("L", (side, side), level)


# JPEG -----------------------------------------------------------------------------------------------------------------


@attack
def jpeg_of_many_scans() -> bytes:
    """Progressive, 12 million pixels, its last scan 20,000 times: 400 kB."""
    content = saved(Image.new("L", (4000, 3000), 128), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * 10_000 + b"\xff\xd9"


@attack
def jpeg_of_many_scans_behind_a_thumbnail() -> bytes:
    """The same, with its scans behind a segment that says the picture is over."""
    content = jpeg_of_many_scans()
    return content[:2] + b"\xff\xe1\x00\x08\xff\xd8\xff\xd9\x00\x00" + content[2:]


@attack
def jpeg_of_many_pixels() -> bytes:
    return saved(Image.new("L", (11_000, 11_000), 128), "JPEG")


@attack
def jpeg_that_states_four_thousand_million_pixels() -> bytes:
    content = bytearray(saved(grey(64), "JPEG"))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    return bytes(content)


@attack
def jpeg_progressive_of_many_pixels() -> bytes:
    """As many as a face's baseline JPEG may have; here all coefficients would be kept."""
    content = bytearray(saved(Image.new("RGB", (64, 64), 128), "JPEG", progressive=True))
    struct.pack_into(">HH", content, content.index(b"\xff\xc2") + 5, 11_000, 11_000)
    return bytes(content)


@attack
def jpeg_of_many_markers() -> bytes:
    content = saved(grey(64), "JPEG")
    return content[:2] + b"\xff\xfe\x00\x02" * 10_000_000 + content[2:]


# JPEG 2000 ------------------------------------------------------------------------------------------------------------


def jp2(
    *, side: int = 4000, raw: bool = False, patch: Callable[[bytearray, int], None] | None = None, **options
) -> bytes:
    """A small picture that states a large size. patch: changes its codestream, which begins at a place."""
    content = bytearray(saved(Image.new("RGB", (64, 64), 128), "JPEG2000", no_jp2=raw, **options))
    start = content.index(b"\xff\x4f\xff\x51")
    struct.pack_into(">II", content, start + 8, side, side)
    struct.pack_into(">II", content, start + 24, side, side)
    if not raw:
        struct.pack_into(">II", content, content.index(b"ihdr") + 4, side, side)
    if patch is not None:
        patch(content, start)
    return bytes(content)


@attack
def jp2_of_many_pixels() -> bytes:
    return jp2(side=3900)


@attack
def jp2_of_as_many_pixels_as_are_allowed() -> bytes:
    return jp2(side=4000) + bytes(1 << 20)


@attack
def jp2_of_many_components() -> bytes:
    def patch(content: bytearray, start: int) -> None:
        struct.pack_into(">H", content, start + 2 + 2, 38 + 3 * 3)
        struct.pack_into(">H", content, start + 40, 16_000)

    return jp2(side=1000, patch=patch) + bytes(8 << 20)


@attack
def jp2_of_small_blocks() -> bytes:
    return jp2(side=3900, codeblock_size=(4, 4)) + bytes(1 << 20)


@attack
def j2k_of_small_blocks() -> bytes:
    return jp2(side=3900, codeblock_size=(4, 4), raw=True) + bytes(1 << 20)


@attack
def jp2_of_small_precincts() -> bytes:
    return jp2(side=3900, codeblock_size=(4, 4), precinct_size=(8, 8)) + bytes(1 << 20)


@attack
def jp2_of_many_tiles() -> bytes:
    def patch(content: bytearray, start: int) -> None:
        struct.pack_into(">II", content, start + 24, 16, 16)

    return jp2(side=3900, patch=patch) + bytes(1 << 20)


@attack
def jp2_of_many_layers() -> bytes:
    def patch(content: bytearray, start: int) -> None:
        struct.pack_into(">H", content, content.index(b"\xff\x52", start) + 6, 65_535)

    return jp2(side=3900, precinct_size=(64, 64), patch=patch) + bytes(1 << 20)


@attack
def jp2_behind_a_decoy() -> bytes:
    """A harmless codestream in a box that readers skip, before the other one."""
    decoy = saved(Image.new("RGB", (64, 64), 128), "JPEG2000", no_jp2=True)
    content = jp2_of_small_blocks()
    return content[:12] + struct.pack(">I4s", 8 + len(decoy), b"free") + decoy + content[12:]


# PNG ------------------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*extra: bytes, side: int = 400, data: bytes | None = None, deep: int = 8, colour: int = 0) -> bytes:
    rows = zlib.compress(bytes((side + 1) * side)) if data is None else data
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, deep, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@attack
def png_of_many_pixels() -> bytes:
    return png(side=30_000, data=zlib.compress(bytes(1 << 20)))


@attack
def png_of_as_many_pixels_as_are_allowed() -> bytes:
    return png(side=4000, data=zlib.compress(bytes((4 * 4000 + 1) * 4000)), colour=6)


@attack
def png_of_text_bombs() -> bytes:
    bomb = zlib.compress(bytes(64 << 20), 1)
    texts = [chunk(b"zTXt", b"key%d\0\0" % i + bomb) for i in range(20)]
    return png(*texts, chunk(b"iTXt", b"key\0\1\0\0\0" + bomb))


@attack
def png_of_a_profile_bomb() -> bytes:
    return png(chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(128 << 20), 1)))


@attack
def png_of_many_chunks() -> bytes:
    return png(chunk(b"abCd", b"") * 5_000_000)


@attack
def png_with_data_behind_its_picture() -> bytes:
    return png(data=zlib.compress(bytes(401 * 400) + bytes(1 << 28), 1))


@attack
def png_of_an_orientation_of_many_numbers() -> bytes:
    count = 20_000_000
    exif = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x0112, 3, count, 26) + bytes(4) + bytes(2 * count)
    return png(chunk(b"eXIf", exif))


# TIFF -----------------------------------------------------------------------------------------------------------------


def tiff(*entries: tuple[int, int, int, int], tail: bytes = b"", side: int = 400) -> bytes:
    """entries: further (tag, kind, count, value)."""
    own = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    tags = sorted({tag: (tag, *rest) for tag, *rest in [*own, *entries]}.values())
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8) + body + tail


@attack
def tiff_of_many_strips() -> bytes:
    count = 15_000_000
    return tiff((273, 4, count, 200), (279, 4, count, 200), (278, 4, 1, 400), tail=bytes(4 * count))


@attack
def tiff_of_many_tags_of_the_same_bytes() -> bytes:
    size = 4 << 20
    return tiff(*((40_000 + i, 7, size, 200) for i in range(900)), tail=bytes(size + 20_000))


@attack
def tiff_of_a_large_tile() -> bytes:
    return tiff(
        (259, 3, 1, 8), (322, 4, 1, 40_000), (323, 4, 1, 40_000), (324, 4, 1, 300), (325, 4, 1, 1000), tail=bytes(2000)
    )


@attack
def tiff_that_deflates() -> bytes:
    data = zlib.compress(bytes(4000 * 4000), 9)
    at = 8 + 2 + 12 * 9 + 4
    return tiff((259, 3, 1, 8), (273, 4, 1, at), (278, 4, 1, 4000), (279, 4, 1, len(data)), side=4000, tail=data)


@attack
def tiff_whose_directories_go_round() -> bytes:
    content = bytearray(tiff((273, 4, 1, 200), (278, 4, 1, 400), (279, 4, 1, 160_000), tail=bytes(200_000)))
    at = 10 + 12 * 9
    struct.pack_into("<I", content, at, 8)
    return bytes(content)


# others ---------------------------------------------------------------------------------------------------------------


@attack
def gif_of_a_long_preface() -> bytes:
    """Comments, which Pillow puts together one by one."""
    content = saved(grey(64), "GIF")
    at = content.index(b"\x2c", 13 + (3 << (content[10] & 7) + 1))
    return content[:at] + b"\x21\xfe\x01a\x00" * 10_000_000 + content[at:]


@attack
def gif_of_a_large_frame() -> bytes:
    content = bytearray(saved(grey(64), "GIF"))
    at = content.index(b"\x2c", 13 + (3 << (content[10] & 7) + 1))
    struct.pack_into("<HH", content, at + 5, 65_535, 65_535)
    return bytes(content)


@attack
def gif_of_many_frames() -> bytes:
    frames = [Image.new("L", (64, 64), i % 256) for i in range(2000)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:], optimize=False)


@attack
def webp_of_many_pixels() -> bytes:
    content = bytearray(saved(Image.new("RGB", (64, 64)), "WEBP", lossless=True))
    struct.pack_into("<I", content, 21, 0x0FFF_FFFF)
    return bytes(content)


@attack
def webp_of_many_frames() -> bytes:
    frames = [Image.new("RGB", (64, 64), (i, i, i)) for i in range(200)]
    return saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], minimize_size=False, method=0)


@attack
def bmp_of_run_lengths() -> bytes:
    side = 4000
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, 0, 2835, 2835, 256, 0)
    palette = bytes(1024)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + head + palette + b"\x01\x07" * (side * side)


@attack
def bmp_of_many_pixels() -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, 60_000, -60_000, 1, 24, 0, 0, 2835, 2835, 0, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54) + head + bytes(1000)


@attack
def ppm_in_words() -> bytes:
    return b"P3 3900 3900 255\n" + b"7 " * (3900 * 3900 * 3)


@attack
def ppm_of_odd_levels() -> bytes:
    return b"P6 4000 4000 1000\n" + bytes(4000 * 4000 * 6)


@attack
def ppm_of_a_long_remark() -> bytes:
    return b"P5 #" + b"x" * 90_000_000 + b"\n 100 100 255\n" + bytes(10_000)


def wsq(width: int, height: int, extra: bytes = b"") -> bytes:
    import wsq  # noqa: F401  registers the format

    content = bytearray(saved(Image.fromarray(np.arange(40_000, dtype=np.uint8).reshape(200, 200)), "WSQ"))
    at = content.index(b"\xff\xa2")
    struct.pack_into(">HH", content, at + 6, height, width)
    return bytes(content[:2] + extra + content[2:])


@attack
def wsq_of_many_pixels() -> bytes:
    return wsq(65_535, 65_535)


@attack
def wsq_of_as_many_pixels_as_are_allowed() -> bytes:
    return wsq(4000, 4000)


@attack
def wsq_of_many_markers() -> bytes:
    return wsq(200, 200, b"\xff\xa8\x00\x02" * 10_000_000)


def ridges(side: int) -> np.ndarray:
    """Ridges with breaks all over a square."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    phase = 2 * np.pi * (y + 40 * np.sin(x / 150)) / 9
    rng = np.random.default_rng(0)
    for px, py in rng.uniform(0, side, (40, 2)):
        phase += np.arctan2(y - py, x - px)
    return np.clip(128 - 95 * np.cos(phase) + rng.normal(0, 8, phase.shape), 0, 255).astype(np.uint8)


@attack
def finger_of_127_mm() -> bytes:
    return saved(Image.fromarray(np.tile(ridges(500), (5, 5))), "PNG")


@attack
def finger_as_large_as_is_allowed() -> bytes:
    return saved(Image.fromarray(ridges(1070)), "PNG")


@attack
def finger_of_noise() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (2500, 2500), dtype=np.uint8)
    return saved(Image.fromarray(noise), "PNG")


@attack
def finger_in_a_large_jpeg() -> bytes:
    return saved(grey(11_000), "JPEG")


def memory_mb(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) >> 10


def main(names: list[str]) -> None:
    import biodedup as bd

    extractor = bd.Extractor(bd.Config(threads=1))
    extractor.extract([bd.Face(np.zeros((300, 300), np.uint8)), bd.Finger(ridges(300))])
    for name in names or ATTACKS:
        kind, content = ATTACKS[name]()
        capture = bd.Face(content) if kind == "face" else bd.Finger(content)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, began = memory_mb("VmRSS"), time.process_time()  # the machine may be busy
        (result,) = extractor.extract([capture])
        seconds, growth = time.process_time() - began, memory_mb("VmHWM") - before
        told = result.reason if isinstance(result, bd.Refusal) else "template"
        sys.stdout.write(f"{name} {told} {seconds:.2f} {growth} {len(content)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
