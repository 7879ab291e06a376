"""Formats: everything a capture can be, and everything that only claims to be one."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import biodedup as bd
from biodedup.capture.pictures import wsq
from biodedup.capture.pictures.formats import Pixels, decode
from biodedup.config import CaptureConfig
from tests.support.images import finger

LIMITS = CaptureConfig()


def encoded(image: np.ndarray, name: str, **options: object) -> bytes:
    import wsq  # noqa: F401  registers the format

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, name, **options)
    return buffer.getvalue()


def reason(data: object) -> str:
    result = decode(data, "face", LIMITS)
    assert isinstance(result, bd.Refusal)
    return result.reason


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "PPM", "WEBP", "GIF"])
def test_every_format_gives_the_picture(portrait, name):
    pixels = decode(encoded(portrait, name), "face", LIMITS)
    assert isinstance(pixels, Pixels)
    assert pixels.rgb.shape == portrait.shape
    assert np.abs(pixels.rgb.astype(int) - portrait).mean() < (12 if name == "GIF" else 6)


def test_wsq_is_read_with_its_size(tmp_path):
    image = finger(1)
    path = tmp_path / "f.wsq"
    path.write_bytes(encoded(image, "WSQ"))
    pixels = decode(path, "unknown", LIMITS)
    assert isinstance(pixels, Pixels)
    assert pixels.grey.shape == image.shape
    assert np.abs(pixels.grey.astype(int) - image).mean() < 12


def test_bytes_behind_the_end_of_a_wsq_are_ignored():
    assert isinstance(decode(encoded(finger(1), "WSQ") + bytes(3), "unknown", LIMITS), Pixels)


def test_a_file_states_its_resolution():
    content = encoded(finger(1), "PNG", dpi=(1000, 1000))
    assert decode(content, "unknown", LIMITS).dpi == pytest.approx(1000, rel=0.01)
    assert decode(encoded(finger(1), "PNG", dpi=(72, 72)), "unknown", LIMITS).dpi is None


@pytest.mark.slow
def test_sixteen_bits_cmyk_palette_alpha_and_orientation_come_out_as_eight_bit_colours(portrait):
    deep = (portrait[..., 0].astype(np.uint16) << 8) | 7
    pixels = decode(cv2.imencode(".png", deep)[1].tobytes(), "face", LIMITS)
    assert (pixels.grey == portrait[..., 0]).all()
    assert (decode(deep, "face", LIMITS).grey == portrait[..., 0]).all()
    cmyk = io.BytesIO()
    Image.fromarray(portrait).convert("CMYK").save(cmyk, "JPEG", quality=95)
    assert np.abs(decode(cmyk.getvalue(), "face", LIMITS).rgb.astype(int) - portrait).mean() < 12
    palette = io.BytesIO()
    Image.fromarray(portrait).quantize(256).save(palette, "PNG")
    assert np.abs(decode(palette.getvalue(), "face", LIMITS).rgb.astype(int) - portrait).mean() < 12
    clear = np.dstack([portrait, np.zeros(portrait.shape[:2], np.uint8)])
    assert (decode(clear, "face", LIMITS).rgb == 255).all()
    turned = Image.Exif()
    turned[0x0112] = 6  # turn by 90 degrees to the right
    content = encoded(portrait, "JPEG", quality=95, exif=turned)
    assert np.abs(decode(content, "face", LIMITS).rgb.astype(int) - np.rot90(portrait, -1)).mean() < 6


@pytest.mark.slow
def test_what_is_no_capture_is_refused_with_its_reason(tmp_path, portrait):
    assert reason(tmp_path / "absent.jpg") == "missing_file"
    assert reason(tmp_path) == "not_a_file"
    assert reason(b"") == "empty_file"
    text = tmp_path / "text.png"
    text.write_text("this is a text file")
    assert reason(text) == "not_an_image"
    for name in ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF"):
        content = encoded(portrait, name)
        assert reason(content[: len(content) // 2]) == "truncated", name
    content = encoded(finger(1), "WSQ")
    assert reason(content[: len(content) // 2]) == "truncated"
    assert reason(np.zeros((10, 300), np.uint8)) == "too_small"


def test_a_bomb_is_refused_from_its_header():
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")
    result = decode(bomb, "face", LIMITS)
    assert (result.reason, result.measured, result.limit) == ("too_many_pixels", 100_000_000, LIMITS.pixels_max)


@pytest.mark.parametrize(
    "array", [np.zeros((5,)), np.zeros((9, 9)), np.zeros((9, 9, 2), np.uint8), np.full((9, 9), np.nan)]
)
def test_an_array_that_is_no_image_is_the_callers_mistake(array):
    with pytest.raises(bd.InvalidInput, match="an image array has"):
        decode(array, "face", LIMITS)


SOUND = [encoded(finger(2, size=96), name) for name in ("PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "PPM", "WEBP", "GIF")]
SOUND_WSQ = encoded(finger(2, size=96), "WSQ")


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SOUND), st.data())
def test_damaged_bytes_never_raise(content, data):
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    assert isinstance(decode(bytes(damaged), "face", LIMITS), (Pixels, bd.Refusal))


def test_the_process_that_decodes_wsq_inherits_no_secret(monkeypatch):
    monkeypatch.setenv("REGISTER_KEY", "7f" * 32)
    monkeypatch.setattr(wsq, "_idle", [])
    wsq.decode_wsq(SOUND_WSQ)
    (child,) = wsq._idle
    environment = Path(f"/proc/{child.pid}/environ").read_text()
    wsq._stop(child)
    assert "REGISTER_KEY" not in environment


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(2, len(SOUND_WSQ) - 3), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_damaged_wsq_never_takes_the_process_with_it(changes):
    damaged = bytearray(SOUND_WSQ)
    for place, value in changes:
        damaged[place] = value
    assert isinstance(decode(bytes(damaged), "unknown", LIMITS), (Pixels, bd.Refusal))
    assert isinstance(decode(SOUND_WSQ, "unknown", LIMITS), Pixels)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_never_raise(content):
    assert isinstance(decode(content, "face", LIMITS), bd.Refusal)
