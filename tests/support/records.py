"""Writes containers of pictures: ISO/IEC 19794-4 and -5 records, and ANSI/NIST-ITL files."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence

import numpy as np
from PIL import Image


def encoded(array: np.ndarray, form: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, form)
    return out.getvalue()


def fir_2005(
    pictures: Sequence[tuple[int, bytes]], *, dpi=500, size=(0, 0), compression=4, quality=80, ansi=False
) -> bytes:
    """pictures: (position code, data), each a finger of one view."""
    body = struct.pack(">HHBBHHHHBBH", 0, 30, len(pictures), 1, dpi, dpi, dpi, dpi, 8, compression, 0)
    for code, data in pictures:
        body += struct.pack(">IBBBBBHHB", 14 + len(data), code, 1, 1, quality, 0, *size, 0) + data
    body = (b"\0\x2b\0\1" if ansi else b"") + body
    return b"FIR\x00010\0" + (14 + len(body)).to_bytes(6, "big") + body


def fir_2011(pictures: Sequence[tuple[int, bytes]], *, dpi=500, compression=4, quality=(80,), certified=False) -> bytes:
    body = struct.pack(">HBB", len(pictures), certified, len(pictures))
    for code, data in pictures:
        head = b"\xff" * 9 + bytes(5) + bytes([len(quality)]) + b"".join(struct.pack(">BHH", q, 0, 0) for q in quality)
        head += b"\1\0\0\1" if certified else b""
        head += struct.pack(">BBBHHHHBBBHHI", code, 0, 1, dpi, dpi, dpi, dpi, 8, compression, 0, 300, 300, len(data))
        body += struct.pack(">I", 4 + len(head) + len(data) + 3) + head + data + b"ext"
    return b"FIR\x00020\0" + struct.pack(">I", 12 + len(body)) + body


def fac_2005(pictures: Sequence[bytes], *, points=1) -> bytes:
    body = b""
    for data in pictures:
        head = (
            struct.pack(">H", points)
            + bytes(14)
            + bytes(8 * points)
            + struct.pack(">BBHHBBHH", 1, 0, 512, 512, 1, 2, 0, 0)
        )
        body += struct.pack(">I", 4 + len(head) + len(data)) + head + data
    return b"FAC\x00010\0" + struct.pack(">IH", 14 + len(body), len(pictures)) + body


def fac_2011(pictures: Sequence[bytes], *, quality=(70,), length_of_data=True) -> bytes:
    body = b""
    for index, data in enumerate(pictures):
        blocks = b"".join(struct.pack(">BHH", max(q - index, 0), 0, 0) for q in quality)
        head = b"\xff" * 9 + bytes(5) + bytes([len(quality)]) + blocks + bytes(17)
        head += struct.pack(">BBHHBHBB", 1, 0, 512, 512, 0, 0, 0, 1)
        data = struct.pack(">I", len(data)) + data if length_of_data else data
        body += struct.pack(">I", 4 + len(head) + len(data)) + head + data
    return b"FAC\x00030\0" + struct.pack(">IHBH", 17 + len(body), len(pictures), 0, 0) + body


def itl(records: Sequence[tuple[int, bytes]], *, native="19.69") -> bytes:
    """records: (type, whole record)."""
    count = "\x1e".join(
        [f"1\x1f{len(records)}", *(f"{kind}\x1f{index:02d}" for index, (kind, _) in enumerate(records))]
    )
    fields = ["1.002:0500", f"1.003:{count}", "1.004:ENR", "1.005:20260101", f"1.011:{native}", f"1.012:{native}"]
    return first("1.001", "\x1d".join(fields).encode() + b"\x1c") + b"".join(record for _, record in records)


def first(tag: str, rest: bytes) -> bytes:
    """A tagged record, with its own length in its first field."""
    length = len(rest)
    for _ in range(3):
        head = f"{tag}:{length}\x1d".encode()
        length = len(head) + len(rest)
    return head + rest


def tagged(kind: int, fields: dict[int, object], data: bytes) -> tuple[int, bytes]:
    rest = "\x1d".join(f"{kind}.{number:03d}:{value}" for number, value in fields.items()).encode()
    return kind, first(f"{kind}.001", rest + f"\x1d{kind}.999:".encode() + data + b"\x1c")


def type_4(code: int, data: bytes, size: tuple[int, int], compression: int) -> tuple[int, bytes]:
    head = struct.pack(">BB6sBHHB", 0, 0, bytes([code]) + b"\xff" * 5, 0, *size, compression)
    return 4, struct.pack(">I", 4 + len(head) + len(data)) + head + data


def type_9(fields: dict[int, object]) -> tuple[int, bytes]:
    """A record of text alone. Lists of lists are subfields of items."""

    def text(value: object) -> str:
        if not isinstance(value, list):
            return str(value)
        return "\x1e".join("\x1f".join(map(str, row)) for row in value)

    rest = "\x1d".join(f"9.{number:03d}:{text(value)}" for number, value in fields.items()).encode() + b"\x1c"
    return 9, first("9.001", rest)


def type_9_m1(minutiae: Sequence[tuple[int, int, int, int]], code: int, size=(400, 400), dpi=500) -> tuple[int, bytes]:
    """minutiae: (x, y, angle in degrees, type 1 or 2), from the top left."""
    rows = [[i + 1, x, y, angle // 2, kind, 70] for i, (x, y, angle, kind) in enumerate(minutiae)]
    scale = {128: size[0], 129: size[1], 130: 1, 131: dpi, 132: dpi, 133: 0, 134: code, 135: [[80, 1, 1]]}
    return type_9({2: 0, 3: 0, 4: "U", 126: [[27, 513, 0]], **scale, 136: len(rows), 137: rows})


def type_9_legacy(minutiae: Sequence[tuple[int, int, int, int]], code: int, height=400) -> tuple[int, bytes]:
    """As `type_9_m1`, at 500 dpi: 0.01 mm from the bottom left, directions away from the ridge."""
    rows = []
    for i, (x, y, angle, kind) in enumerate(minutiae):
        place = f"{round(x * 5.08):04d}{round((height - 1 - y) * 5.08):04d}{(angle + 180) % 360:03d}"
        rows.append([f"{i + 1:03d}", place, 25, "AB"[kind - 1], "002,03"])
    return type_9({2: 0, 3: 0, 4: "S", 5: [["NIST", "A"]], 6: code, 7: [["T", "LS"]], 10: len(rows), 11: 1, 12: rows})
