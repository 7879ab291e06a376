"""Decodes captures into pixels, from files, bytes and arrays of every accepted format.

Owns decoding and its limits. Never judges the content of a picture, and never logs or reports a path or a pixel.

1. The result for any bytes is `Pixels` or a `Refusal`. Only an array of the wrong type or shape raises an error.
2. The size and the cost of decoding are checked in the header (`headers.py`), before a pixel is decoded.
3. Only the formats in `FORMATS`, and WSQ, are tried. None of them starts another program or follows a reference.
4. A truncated image is refused, never padded.
5. A file of several pictures is refused as `several_pictures`, except a JPEG, in which cameras store further pictures of the same moment. A
   very large JPEG of a face is decoded at a fraction of its size.
6. A picture is refused as `pixel_format` if the range or the meaning of its numbers is unknown, so that 8-bit levels would be a guess.
"""

from __future__ import annotations

import io
import threading
import warnings
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import (  # noqa: F401  the plugins register themselves
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from biodedup.capture.pictures.headers import excess_of, implausible, unread_jpeg
from biodedup.capture.pictures.modes import eight_bits
from biodedup.capture.pictures.tiff import Layout, read_layout
from biodedup.capture.pictures.unread import unread_kind
from biodedup.capture.pictures.wsq import decode_wsq, is_wsq, read_size
from biodedup.capture.reading import read
from biodedup.config import CaptureConfig
from biodedup.errors import InvalidInput
from biodedup.values import CaptureData, Refusal

FORMATS = ("PNG", "JPEG", "JPEG2000", "TIFF", "WEBP", "GIF", "BMP", "PPM")
"""Pillow's names, formats with unambiguous signatures first. PPM covers PGM and PBM."""

DPI_MIN, DPI_MAX = 100.0, 4000.0
"""Range of believable resolutions. Lower values (72, 96) are defaults of screens, which image editors write."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """A decoded picture. rgb_or_grey: uint8 (h, w, 3) RGB or (h, w) grey, C-order. dpi: None if the file states no believable value. stated:
    the dpi in the file for x and y, believable or not. provenance: sentences about corrected metadata.
    """

    rgb_or_grey: NDArray[np.uint8] = field(repr=False)
    dpi: float | None = None
    stated: tuple[float, float] | None = None
    provenance: tuple[str, ...] = ()

    @property
    def rgb(self) -> NDArray[np.uint8]:
        """The picture as RGB, uint8 (h, w, 3)."""
        image = self.rgb_or_grey
        return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)

    @property
    def grey(self) -> NDArray[np.uint8]:
        """The picture as grey levels, uint8 (h, w), by the luma of ITU-R BT.601."""
        image = self.rgb_or_grey
        return image if image.ndim == 2 else np.asarray(Image.fromarray(image).convert("L"))


def decode(data: CaptureData, column: str, limits: CaptureConfig) -> Pixels | Refusal:
    """The pixels of a capture. 16 bits become 8, transparent pixels become white, and the EXIF orientation is applied.

    data: a path, the file's content, or an array as for `check_array`. column names the capture in a refusal.
    Raises InvalidInput for an array of the wrong type or shape.
    """
    if isinstance(data, np.ndarray):
        check_array(data)
        height, width = data.shape[:2]
        declined = _size_refusal(column, "array", width, height, limits)
        if declined:
            return declined
        pixels = _from_array(data)
        few = data.dtype.itemsize == 2 and _few_bits(pixels)
        return _pixel_format(column, "array", _FEW) if few else Pixels(pixels)
    content = read(data, column, limits)
    if isinstance(content, Refusal):
        return content
    if is_wsq(content):
        return _decode_wsq(content, column, limits)
    return _decode_pillow(content, column, limits)


def check_array(array: NDArray[Any]) -> None:
    """Raises InvalidInput unless uint8 or uint16 (h, w), (h, w, 3) RGB or (h, w, 4) RGBA."""
    if array.dtype.kind != "u" or array.dtype.itemsize > 2:
        raise InvalidInput(
            f"an image array has dtype {array.dtype}, wanted uint8 or uint16; "
            "scale it to 0..255 and convert it, as array.astype(np.uint8)"
        )
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise InvalidInput(
            f"an image array has shape {array.shape}, wanted (h, w), (h, w, 3) RGB or (h, w, 4) RGBA; "
            "pass one image at a time, channels last"
        )


def _decode_wsq(content: bytes, column: str, limits: CaptureConfig) -> Pixels | Refusal:
    size = read_size(content)
    if size is None:
        return _broken(column, "WSQ")
    excess = implausible("WSQ", size[0] * size[1], len(content))
    declined = _size_refusal(column, "WSQ", *size, limits) or (excess and Refusal(column, *excess))
    if declined:
        return declined
    image = decode_wsq(content)
    if image is None or image.grey.shape != size[::-1]:
        return _broken(column, "WSQ")
    return _with_dpi(image.grey, image.dpi)


def _decode_pillow(content: bytes, column: str, limits: CaptureConfig) -> Pixels | Refusal:
    name = _sniff(content)
    if name is None:
        kind = unread_kind(content)
        if kind is not None:
            return Refusal(column, "not_an_image", f"{kind}, which is not read; take out or convert its picture")
        return Refusal(column, "not_an_image", f"none of {', '.join(FORMATS)}, WSQ")
    shrinks = column == "face"
    excess = excess_of(name, content, limits.pixels_max, shrinks=shrinks)
    if excess is not None:
        return Refusal(column, *excess)
    layout = read_layout(content) if name == "TIFF" else None
    unread = layout.unread if layout is not None else unread_jpeg(content) if name == "JPEG" else None
    if unread is not None:
        return _pixel_format(column, name, unread)
    if layout is not None and layout.pages > 1:
        return _several_pictures(column, name)
    if layout is not None and layout.is_decoded_here:
        return _decode_tiff(content, layout, column, limits)
    content = content if layout is None else layout.for_pillow(content)
    with _quiet_pillow:
        try:
            # not Image.open, which has its own limit for large images
            with Image.OPEN[name][0](io.BytesIO(content), "") as image:
                if shrinks and name == "JPEG":
                    _shrink(image, limits.pixels_max)
                declined = _size_refusal(column, name, *image.size, limits)
                if declined:
                    return declined
                if name not in ("JPEG", "TIFF") and getattr(image, "is_animated", False):
                    return _several_pictures(column, name)
                image.load()
                dpi, mode = _resolution(image), image.mode
                orientation = _orientation(image)
                turn = _TURNS.get(orientation)
                pixels = eight_bits(image if turn is None else image.transpose(turn), name)
        except MemoryError:
            raise  # not a fault of the bytes
        except Exception as error:  # plugins raise many kinds of errors for damaged bytes: struct.error, KeyError, ...
            if str(error) in _UNKNOWN_LAYOUTS:
                return _pixel_format(column, name, "numbers in a layout that is not read")
            return _broken(column, name)
    if pixels is None:
        return _pixel_format(column, name, _MODES.get(mode, f"numbers of Pillow's mode {mode}"))
    if layout is not None:
        pixels, orientation = 255 - pixels if layout.inverted else pixels, layout.orientation
    if (layout.bits[0] if layout is not None else _png_depth(name, content)) == 16 and _few_bits(pixels):
        return _pixel_format(column, name, _FEW)
    return _with_dpi(pixels, dpi, orientation in _SIDEWAYS)


def _decode_tiff(content: bytes, layout: Layout, column: str, limits: CaptureConfig) -> Pixels | Refusal:
    """Decodes a layout that Pillow decodes wrongly."""
    declined = _size_refusal(column, "TIFF", layout.size[1], layout.size[0], limits)
    if declined:
        return declined
    levels = layout.levels(content)
    if levels is None:
        return _broken(column, "TIFF")
    if layout.bits[0] == 16 and _few_bits(levels):
        return _pixel_format(column, "TIFF", _FEW)
    turn = _TURNS.get(layout.orientation)
    if turn is not None:
        levels = np.array(Image.fromarray(levels).transpose(turn))
    return _with_dpi(levels, layout.dpi, layout.orientation in _SIDEWAYS)


def _sniff(content: bytes) -> str | None:
    """The format whose signature the bytes carry, or None."""
    for name in FORMATS:
        accept = Image.OPEN[name][1]
        if accept is not None and accept(content[:16]) is True:
            return name
    return None


def _png_depth(name: str, content: bytes) -> int:
    """The bits of a number in a PNG, from its header; 8 for other formats."""
    return content[24] if name == "PNG" and len(content) > 24 else 8


def _few_bits(pixels: NDArray[np.uint8]) -> bool:
    """Whether numbers of 16 bits use 14 bits or fewer, as some cameras store them. pixels: their higher 8 bits."""
    return 0 < int(pixels.max()) < 64


def _resolution(image: Image.Image) -> object:
    """The resolution in a file. If the file states only the ratio of both axes: the ratio, with 500 dpi for the lesser axis."""
    stated = image.info.get("dpi")
    if stated is not None:
        return stated
    ratio = image.info.get("aspect") or image.info.get("resolution")
    if ratio is None and image.info.get("jfif_unit") == 0:
        ratio = image.info.get("jfif_density")
    try:
        x, y = (float(value) for value in ratio or (1, 1))
        return (500 * x / min(x, y), 500 * y / min(x, y)) if x != y else None
    except (TypeError, ValueError, ArithmeticError):
        return None


def _shrink(image: Image.Image, pixels_max: int) -> None:
    """Makes Pillow decode a JPEG at a half or a quarter of its size if it is too large."""
    width, height = image.size
    for part in (1, 2, 4):
        if -(-width // part) * -(-height // part) <= pixels_max:
            break
    if part > 1:
        image.draft(None, (width // part, height // part))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a loaded picture, 1 for upright. (Pillow rotates a TIFF when it loads it.)"""
    try:
        if any(len(image.info.get(key, b"")) > _EXIF_BYTES_MAX for key in ("exif", "Raw profile type exif", "xmp")):
            return 1
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except Exception:
        return 1  # damaged EXIF data does not mean damaged pixels


_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that exchange the axes."""
_UNKNOWN_LAYOUTS = ("unknown pixel mode", "unknown data organization")  # of Pillow's reader of TIFF
_MODES = {"F": "floating-point numbers", "I": "32-bit numbers"}
_EXIF_BYTES_MAX = 1 << 20
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _from_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    levels = np.ascontiguousarray(array >> 8 if array.dtype.itemsize == 2 else array, dtype=np.uint8)
    if levels.ndim == 3 and levels.shape[2] == 4:
        pixels = eight_bits(Image.fromarray(levels, "RGBA"))
        assert pixels is not None
        return pixels
    return levels


def _with_dpi(pixels: NDArray[np.uint8], stated: object, exchanged: bool = False) -> Pixels:
    """The picture with its resolution. stated: the value in the file. exchanged: whether the orientation exchanged the axes."""
    try:
        x, y = (float(value) for value in (stated if isinstance(stated, tuple) else (stated, stated)))
    except (TypeError, ValueError, ArithmeticError):
        return Pixels(pixels)
    if not (0 < x < 1e6 and 0 < y < 1e6):
        return Pixels(pixels)
    x, y = (y, x) if exchanged else (x, y)
    return Pixels(pixels, x if DPI_MIN <= x <= DPI_MAX else None, (round(x, 2), round(y, 2)))


def _size_refusal(column: str, name: str, width: int, height: int, limits: CaptureConfig) -> Refusal | None:
    detail = f"{name}, {width} x {height} pixels"
    if width * height > limits.pixels_max:
        return Refusal(column, "too_many_pixels", detail, width * height, limits.pixels_max)
    if min(width, height) < limits.side_px_min:
        return Refusal(column, "too_small", detail, min(width, height), limits.side_px_min)
    return None


_FEW = "16-bit numbers that use 14 bits or fewer (white is not 65535)"


def _several_pictures(column: str, name: str) -> Refusal:
    return Refusal(column, "several_pictures", f"{name} of several pictures; save the right one in a file of its own")


def _pixel_format(column: str, name: str, content: str) -> Refusal:
    return Refusal(
        column, "pixel_format", f"{name} of {content}; wanted grey levels or colours of 8 or 16 bits; save it as PNG"
    )


def _broken(column: str, name: str) -> Refusal:
    return Refusal(column, "truncated", f"{name} that breaks off or is damaged")


class _QuietPillow:
    """Ignores Pillow's warnings while any thread is inside: they are about damaged metadata.

    `warnings.catch_warnings` alone restores the wrong filters when two threads overlap.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._caught = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._inside += 1

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._caught.__exit__(None, None, None)


_quiet_pillow = _QuietPillow()
