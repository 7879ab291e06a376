"""Takes pictures out of containers: ISO/IEC 19794-4 and 19794-5 records, and ANSI/NIST-ITL files.

Owns the choice of the picture for a capture. Never decodes a picture.

1. A `Finger` with a position means the picture of this finger, a `Face` the picture of the face. If there are several, the picture with the
   highest stated quality counts.
2. A `Finger` of unknown position means all pictures in the container: `opened` makes a capture of each.
3. A picture of several fingers or of a palm gives a refusal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from biodedup.capture.pictures.itl import PALM, is_itl, read_itl
from biodedup.capture.pictures.records import Picture, is_image_record, read_pictures
from biodedup.capture.pictures.unread import unread_kind
from biodedup.common.arguments import checked
from biodedup.errors import InvalidInput
from biodedup.values import Face, Finger, Refusal

READ = "finger and face image records of ISO/IEC 19794-4 and -5 of 2005 and 2011, and ANSI/NIST-ITL files in the traditional encoding"


def is_container(content: bytes) -> bool:
    """Whether the content begins as a container that this module reads."""
    return is_image_record(content) or is_itl(content)


def pictures_in(content: bytes) -> list[Picture]:
    """The pictures of a container. Raises InvalidInput."""
    return read_pictures(content) if is_image_record(content) else read_itl(content)


@checked
def read_captures(content: bytes) -> list[Face | Finger]:
    """The captures in a container: finger and face image records of ISO/IEC 19794-4 and -5, ANSI/NIST-ITL files.

    Pictures of several fingers and of palms are left out. An encounter with the container itself as a `Finger` reports them. Raises
    InvalidInput for damaged bytes and for another container format; the error names the format.
    """
    if not is_container(content):
        raise InvalidInput(f"{unread_kind(content) or 'this'} is not read; wanted {READ}")
    return [_capture(picture) for picture in pictures_in(content) if picture.column]


def opened(capture: Face | Finger, content: bytes) -> Iterator[Face | Finger | Refusal]:
    """The captures that a capture with this content stands for: a `Finger` of unknown position stands for each picture of its container; any
    other capture stands for itself."""
    if not isinstance(capture, Finger) or capture.position != "unknown" or not is_container(content):
        yield replace(capture, data=content)
        return
    try:
        pictures = pictures_in(content)
    except InvalidInput as error:
        yield Refusal(capture.column, "unsound_record", str(error))
        return
    for picture in pictures:
        if picture.column:
            yield _capture(picture, capture.dpi)
        else:
            yield _several(capture.column, picture)


def chosen(content: bytes, column: str) -> Picture | Refusal:
    """The picture in a container for a capture of this column, or a refusal. `unknown` means the only finger."""
    try:
        pictures = pictures_in(content)
    except InvalidInput as error:
        return Refusal(column, "unsound_record", str(error))
    fingers = [picture for picture in pictures if picture.column not in ("", "face")]
    fitting = [picture for picture in pictures if picture.column == column]
    if not fitting and column != "face" and len({finger.column for finger in fingers}) == 1:
        only = fingers[0].column
        fitting = fingers if "unknown" in (column, only) else []
    if fitting:
        return max(fitting, key=lambda picture: -1 if picture.quality is None else picture.quality)
    if not fingers and column != "face" and pictures and not pictures[0].column:
        return _several(column, pictures[0])
    held = ", ".join(dict.fromkeys(picture.column or picture.what for picture in pictures))
    return Refusal(column, "not_in_record", f"the record holds {held}; name one of these")


def _capture(picture: Picture, dpi: float | None = None) -> Face | Finger:
    if picture.column == "face":
        return Face(picture.data)
    if dpi is None and picture.dpi is not None and 72 <= min(picture.dpi) and max(picture.dpi) <= 4000:
        x, y = picture.dpi
        dpi = x if abs(x - y) <= 0.02 * x else None
    return Finger(picture.data, picture.column, dpi)


def _several(column: str, picture: Picture) -> Refusal:
    if picture.what == PALM:
        return Refusal(
            column, "several_fingers", "the record holds a palm (type 15), which is not compared; send fingers"
        )
    return Refusal(column, "several_fingers", f"the record holds {picture.what}; cut it into single fingers")
