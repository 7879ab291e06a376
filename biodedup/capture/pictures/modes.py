"""Converts a Pillow image of any mode to 8-bit grey levels or RGB.

Owns the meaning of each mode. Never opens a file.

1. A mode whose range or meaning is unknown gives None.
2. Transparent pixels become white, as on paper.
3. LittleCMS converts CMYK with an ICC profile, and CIELAB. CMYK without a profile becomes 255 - min(255, colour + black).
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

_PROFILE_BYTES_MAX = 4 << 20
_GREY = ("1", "L")


def eight_bits(image: Image.Image, form: str | None = None) -> NDArray[np.uint8] | None:
    """The loaded image as uint8 (h, w) grey or (h, w, 3) RGB. None for floating-point numbers and for integers of unknown range. form:
    Pillow's name of the file format."""
    if image.mode.startswith("I"):
        return _integers(image, form)
    if image.mode == "LAB":
        return _by_profile(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")))
    if image.mode == "CMYK" and (converted := _by_own_profile(image)) is not None:
        return converted
    if image.mode == "La":  # alpha is premultiplied
        image = image.convert("LA")
    if image.has_transparency_data:
        grey = image.mode in ("L", "LA")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("L" if grey else "RGB"))
    if image.mode in _GREY:
        return np.asarray(image.convert("L"))
    if image.mode in ("P", "RGB", "RGBX", "YCbCr", "HSV", "CMYK", "PA", "RGBa"):
        return np.asarray(image.convert("RGB"))
    return None


def _integers(image: Image.Image, form: str | None) -> NDArray[np.uint8] | None:
    """The higher 8 of 16 bits, or None. Pillow uses mode I (32 bits) for PGM, whose numbers it scales to 16 bits, and for signed numbers, whose
    range is unknown."""
    if image.mode == "I" and form not in ("PPM", "PNG", "JPEG2000"):
        return None
    levels = np.asarray(image)
    if levels.size and (levels.min() < 0 or levels.max() > 0xFFFF):
        return None
    grey = (levels >> 8).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[levels == clear] = 255
    return grey


def _by_own_profile(image: Image.Image) -> NDArray[np.uint8] | None:
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or not 128 < len(profile) <= _PROFILE_BYTES_MAX:
        return None
    try:
        return _by_profile(image, ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None  # a damaged profile does not mean damaged pixels


def _by_profile(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> NDArray[np.uint8]:
    target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    converted = ImageCms.profileToProfile(image, profile, target, outputMode="RGB")
    assert converted is not None, "profileToProfile returns None only for inPlace=True"
    return np.asarray(converted)
