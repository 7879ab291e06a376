"""Pixel formats: the numbers of a file mean what its tags say, or the file is refused as `pixel_format`."""

from __future__ import annotations

import io
import itertools
import struct

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import biodedup as bd
from biodedup.capture.pictures.formats import Pixels, decode
from biodedup.config import CaptureConfig

LIMITS = CaptureConfig()
GREY = np.random.default_rng(0).integers(0, 256, (70, 90), np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (70, 90, 3), np.uint8)


def pixels_of(content: bytes) -> np.ndarray:
    result = decode(content, "face", LIMITS)
    assert isinstance(result, Pixels), result
    return result.rgb_or_grey


def refused(content: bytes) -> str:
    result = decode(content, "face", LIMITS)
    assert isinstance(result, bd.Refusal)
    assert result.reason == "pixel_format", result
    return result.detail


def tiff(array: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, array, **options)
    return out.getvalue()


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("order", "depth", "photometric", "compression", "tile"),
    [case for case in itertools.product("<>", (8, 16), ("minisblack", "miniswhite"), (None, "zlib"), (None, (32, 48)))],
)
def test_a_grey_tiff_gives_its_levels(order, depth, photometric, compression, tile):
    stored = 255 - GREY if photometric == "miniswhite" else GREY
    stored = stored if depth == 8 else stored.astype(np.uint16) << 8 | 7
    options = {"byteorder": order, "photometric": photometric, "compression": compression, "tile": tile}
    assert (pixels_of(tiff(stored, **options)) == GREY).all()


@pytest.mark.parametrize(
    ("order", "depth", "planes", "compression", "tile"),
    [case for case in itertools.product("<>", (8, 16), ("contig", "separate"), (None, "zlib"), (None, (32, 48)))],
)
def test_a_colour_tiff_gives_its_colours_whichever_way_they_are_stored(order, depth, planes, compression, tile):
    stored = COLOUR if depth == 8 else COLOUR.astype(np.uint16) << 8 | 7
    stored = stored if planes == "contig" else stored.transpose(2, 0, 1)
    options = {"byteorder": order, "planarconfig": planes, "compression": compression, "tile": tile, "rowsperstrip": 16}
    options |= {"photometric": "rgb"}
    result = decode(tiff(stored, **options), "face", LIMITS)
    assert isinstance(result, Pixels), result
    assert (result.rgb_or_grey == COLOUR).all()


def directory(data: bytes, tags: dict[int, int]) -> bytes:
    """A little-endian TIFF of one strip."""
    tags = {256: 90, 257: 70, 259: 1, 273: 8, 277: 1, 278: 70, 279: len(data), **tags}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_twelve_bits_are_scaled_to_eight():
    twelve = GREY.astype(np.uint16) << 4 | 9
    even, odd = twelve[:, ::2], twelve[:, 1::2]
    packed = np.dstack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255]).astype(np.uint8).tobytes()
    assert (pixels_of(directory(packed, {258: 12, 262: 1})) == GREY).all()
    assert (pixels_of(directory(packed, {258: 12, 262: 0})) == 255 - GREY).all()


def test_a_deep_tiff_is_turned_upright_and_states_its_resolution():
    stored = GREY.astype(np.uint16) << 8
    content = tiff(stored, resolution=(400, 400), resolutionunit="INCH", extratags=[(274, 3, 1, 6, True)])
    result = decode(content, "unknown", LIMITS)
    assert isinstance(result, Pixels), result
    assert (result.rgb_or_grey == np.rot90(GREY, -1)).all()
    assert result.dpi == pytest.approx(400)


def test_an_eight_bit_tiff_is_turned_upright_once():
    content = tiff(GREY, extratags=[(274, 3, 1, 6, True)])
    assert (pixels_of(content) == np.rot90(GREY, -1)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int8, np.int16, np.int32, np.uint32])
def test_a_tiff_of_numbers_without_a_known_range_is_refused_by_name(dtype):
    detail = refused(tiff(GREY.astype(dtype), photometric="minisblack"))
    assert "bit" in detail
    assert "save it as PNG" in detail


def test_a_deep_tiff_that_breaks_off_is_truncated():
    content = tiff(GREY.astype(np.uint16), metadata=None)
    layout_end = len(content) - 500
    result = decode(content[:layout_end], "face", LIMITS)
    assert isinstance(result, bd.Refusal)
    assert result.reason == "truncated"


def test_sixteen_bits_in_thirty_two_are_refused_and_not_taken_for_black():
    assert "32" in refused(tiff(GREY.astype(np.uint32), photometric="minisblack"))


def test_one_bit_and_palettes_and_transparency_come_out_as_they_are_seen():
    bits = GREY > 127
    for form in ("PNG", "TIFF", "BMP", "PPM"):
        assert (pixels_of(saved(Image.fromarray(bits), form)) == np.where(bits, 255, 0)).all(), form
    palette = Image.fromarray(GREY % 2, "P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    seen = np.where((GREY % 2 == 1)[..., None], (200, 100, 50), (10, 20, 30))
    assert (pixels_of(saved(palette, "PNG")) == seen).all()
    clear = np.where((GREY % 2 == 1)[..., None], (200, 100, 50), (255, 255, 255))
    assert (pixels_of(saved(palette, "PNG", transparency=0)) == clear).all()
    half = Image.merge("LA", (Image.fromarray(GREY), Image.new("L", (90, 70), 128)))
    assert np.abs(pixels_of(saved(half, "PNG")).astype(int) - (255 - (255 - GREY.astype(int)) * 128 / 255)).max() <= 1


def test_the_transparent_level_of_sixteen_bits_becomes_white():
    deep = Image.fromarray(GREY.astype(np.uint16) << 8)
    content = saved(deep, "PNG", transparency=int(GREY[0, 0]) << 8)
    assert (pixels_of(content) == np.where(GREY == GREY[0, 0], 255, GREY)).all()


def test_alpha_that_was_multiplied_in_is_divided_out_before_white_shows_through():
    for colours, photometric in ((COLOUR, "rgb"), (GREY[..., None], "minisblack")):
        alpha = np.full((70, 90, 1), 255, np.uint8)
        stored = np.concatenate([colours, alpha], axis=2)
        content = tiff(stored, photometric=photometric, extrasamples=["assocalpha"], planarconfig="contig")
        assert (pixels_of(content) == (colours if colours.shape[2] == 3 else GREY)).all()


def test_cielab_becomes_the_colour_that_it_states():
    content = saved(Image.merge("LAB", [Image.new("L", (90, 70), v) for v in (136, 208, 195)]), "TIFF")
    assert np.abs(pixels_of(content)[0, 0].astype(int) - (255, 0, 0)).max() < 40  # L 53, a 80, b 67: red
    grey = saved(Image.merge("LAB", [Image.new("L", (90, 70), v) for v in (137, 128, 128)]), "TIFF")
    assert np.ptp(pixels_of(grey)[0, 0]) <= 2


def test_cmyk_is_converted_with_its_profile_if_it_has_one():
    cmyk = Image.fromarray(COLOUR).convert("CMYK")
    assert (pixels_of(saved(cmyk, "TIFF")) == np.asarray(cmyk.convert("RGB"))).all()
    damaged = saved(cmyk, "TIFF", icc_profile=bytes(200))
    assert (pixels_of(damaged) == np.asarray(cmyk.convert("RGB"))).all()


def test_pgm_of_any_largest_number_gives_its_levels():
    for largest in (255, 1023, 4095, 65535):
        levels = (GREY.astype(np.uint32) * largest // 255).astype(">u2" if largest > 255 else "u1")
        got = pixels_of(b"P5 90 70 %d\n" % largest + levels.tobytes())
        assert np.abs(got.astype(int) - GREY).max() <= 1, largest


def test_a_jpeg_of_twelve_bits_is_refused_by_name():
    content = bytearray(saved(Image.fromarray(GREY), "JPEG"))
    frame = content.index(b"\xff\xc0")
    content[frame + 4] = 12
    assert "12 bits" in refused(bytes(content))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_deep_tiff_never_raises(data):
    content = bytearray(data.draw(st.sampled_from(DEEP)))
    tags = content.index(struct.pack("<HHI", 256, 3, 1)) if struct.pack("<HHI", 256, 3, 1) in content else 8
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(tags - 2, min(tags + 250, len(content) - 1)))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    assert isinstance(decode(bytes(content), "face", LIMITS), (Pixels, bd.Refusal))


DEEP = [
    tiff(GREY.astype(np.uint16), metadata=None),
    tiff(np.stack([GREY] * 3).astype(np.uint16), photometric="rgb", planarconfig="separate", metadata=None),
    tiff(GREY.astype(np.uint16), tile=(32, 32), photometric="miniswhite", metadata=None),
]


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_sixteen_bits_that_hold_fewer_are_refused_and_not_taken_for_a_dark_picture(bits):
    few = GREY.astype(np.uint16) << (bits - 8)
    colours = COLOUR.astype(np.uint16) << (bits - 8)
    png = cv2.imencode(".png", colours)[1].tobytes()
    for content in (
        saved(Image.fromarray(few), "PNG"),
        png,
        tiff(few),
        tiff(few, compression="zlib"),
        tiff(colours),
        few,
        colours,
    ):
        detail = refused(content)
        assert "16-bit" in detail and "65535" in detail
    assert isinstance(decode(few << (16 - bits), "face", LIMITS), Pixels)


def test_a_black_picture_of_sixteen_bits_is_a_picture():
    assert not pixels_of(np.zeros((70, 90), np.uint16)).any()


def test_transparent_pixels_of_a_deep_tiff_become_white():
    alpha = np.where(GREY > 127, 0xFFFF, 0).astype(np.uint16)
    wanted = np.where((GREY > 127)[..., None], COLOUR, 255)
    for kind, planes in itertools.product(("unassalpha", "assocalpha"), ("contig", "separate")):
        deep = COLOUR.astype(np.uint16) * 257
        stored = np.dstack([deep * (alpha > 0)[..., None] if kind == "assocalpha" else deep, alpha])
        stored = stored if planes == "contig" else stored.transpose(2, 0, 1)
        content = tiff(stored, photometric="rgb", extrasamples=[kind], planarconfig=planes)
        assert np.abs(pixels_of(content).astype(int) - wanted).max() <= 1, (kind, planes)


def test_a_number_of_unknown_meaning_beside_the_colours_of_a_deep_tiff_is_ignored():
    stored = np.dstack([COLOUR.astype(np.uint16) * 257, np.zeros(GREY.shape, np.uint16)])
    assert (pixels_of(tiff(stored, photometric="rgb", extrasamples=["unspecified"])) == COLOUR).all()


def several(content: bytes) -> bd.Refusal:
    result = decode(content, "face", LIMITS)
    assert isinstance(result, bd.Refusal), result
    return result


def test_a_file_of_several_pictures_is_refused_by_name():
    first, second = Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)
    for form, name in (("GIF", "GIF"), ("PNG", "PNG"), ("WEBP", "WEBP"), ("TIFF", "TIFF")):
        refusal = several(saved(first, form, save_all=True, append_images=[second]))
        assert (refusal.reason, name in refusal.detail) == ("several_pictures", True), refusal
        assert isinstance(decode(saved(first, form, save_all=True), "face", LIMITS), Pixels)


def test_a_thumbnail_beside_the_picture_of_a_tiff_is_no_second_picture():
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        writer.write(GREY)
        writer.write(GREY[::4, ::4], subfiletype=1)
    assert (pixels_of(out.getvalue()) == GREY).all()


def test_a_tiff_whose_directories_form_a_circle_ends():
    content = bytearray(directory(GREY.tobytes(), {258: 8, 262: 1}))
    content[-4:] = struct.pack("<I", struct.unpack_from("<I", content, 4)[0])
    assert (pixels_of(bytes(content)) == GREY).all()
