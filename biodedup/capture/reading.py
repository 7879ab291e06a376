"""Reads the file of a capture, once and within limits.

Owns the opening of all paths that a caller names, also of model cards. Never decodes, and never logs a path.

1. A path is opened once, so that the digest and the templates of an encounter are of the same bytes.
2. Only regular files are read, and at most `bytes_max` bytes. A folder, pipe, device or socket is refused without being opened.
3. The refusal says whether the file may be readable later (`MAY_COME`: absent, denied, an I/O error) or can never be a capture.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from io import BufferedReader
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biodedup.capture.pictures.containers import opened
from biodedup.config import CaptureConfig
from biodedup.values import Capture, Face, Finger, Missing, Refusal

MAY_COME = frozenset(("missing_file", "unreadable"))
"""Reasons of refusals that concern the file and not the capture: the same call may succeed later."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_NO_PATH = (errno.ELOOP, errno.ENAMETOOLONG)


class NotAFile(OSError):
    """The path names a folder, a pipe, a device or a socket."""


@dataclass(frozen=True)
class Unread(os.PathLike[str]):
    """The path of a capture that could not be read. It is not opened again. refusal: the reason."""

    path: str
    refusal: Refusal

    def __fspath__(self) -> str:
        return self.path


def read(data: str | os.PathLike[str] | bytes, column: str, limits: CaptureConfig) -> bytes | Refusal:
    """The bytes of a capture, or of its file; never empty. Or a refusal."""
    content = data if isinstance(data, bytes) else read_path(data, column, limits.bytes_max)
    if isinstance(content, Refusal):
        return content
    if not content:
        return Refusal(column, "empty_file", "0 bytes", 0, 1)
    return _too_large(column, len(content), limits.bytes_max) if len(content) > limits.bytes_max else content


def read_path(path: str | os.PathLike[str], column: str, bytes_max: int) -> bytes | Refusal:
    """The bytes of a regular file, or a refusal."""
    if isinstance(path, Unread):
        return replace(path.refusal, column=column)
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            content = b"" if size > bytes_max else file.read(size + 1)
    except NotAFile as error:
        return Refusal(column, "not_a_file", str(error.strerror))
    except (FileNotFoundError, NotADirectoryError):
        return Refusal(column, "missing_file", "no file at this path")
    except OSError as error:
        reason = "not_a_file" if error.errno in _NO_PATH else "unreadable"
        return Refusal(column, reason, os.strerror(error.errno) if error.errno else type(error).__name__)
    except ValueError:
        return Refusal(column, "not_a_file", "the path holds a null character")
    size = max(size, len(content))
    return _too_large(column, size, bytes_max) if size > bytes_max else content


def open_file(path: str | os.PathLike[str]) -> BufferedReader:
    """Opens a regular file for reading. It never opens, and never waits for, another kind of file. Raises OSError, NotAFile."""
    _check_regular(os.stat(path))
    # O_NONBLOCK: the path may be a pipe by now, and opening a pipe without a writer would block for ever
    file = open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY), "rb")
    try:
        _check_regular(os.fstat(file.fileno()))
    except NotAFile:
        file.close()
        raise
    return file


def held(captures: Iterable[Capture], limits: CaptureConfig) -> tuple[Capture, ...]:
    """The captures with the content of their files in place of paths. A path that cannot be read, and an array of too many pixels, becomes
    `Unread`. A container of several pictures becomes several captures (`pictures/containers.py`)."""
    return tuple(part for capture in captures for part in _parts(_held(capture, limits)))


def unread(refusal: Refusal) -> Finger:
    """A capture for which extraction returns this refusal."""
    return Finger(Unread(refusal.detail, refusal), refusal.column)


def _parts(capture: Capture) -> Iterator[Capture]:
    if isinstance(capture, Missing) or not isinstance(capture.data, bytes):
        yield capture
        return
    if isinstance(capture, Face) and capture.device is not None:
        yield capture  # the verdict is about the bytes of the container
        return
    for part in opened(capture, capture.data):
        yield unread(part) if isinstance(part, Refusal) else part


def _held(capture: Capture, limits: CaptureConfig) -> Capture:
    if isinstance(capture, Missing) or isinstance(capture.data, (bytes, Unread)):
        return capture
    if isinstance(capture.data, np.ndarray):
        too_large = _too_many_pixels(capture.data, capture.column, limits.pixels_max)
        return capture if too_large is None else replace(capture, data=Unread(too_large.detail, too_large))
    content = read_path(capture.data, capture.column, limits.bytes_max)
    return replace(capture, data=Unread(os.fspath(capture.data), content) if isinstance(content, Refusal) else content)


def absent(captures: Iterable[Capture]) -> Unread | None:
    """The first capture whose file may become readable later, or None."""
    for capture in captures:
        data = None if isinstance(capture, Missing) else capture.data
        if isinstance(data, Unread) and data.refusal.reason in MAY_COME:
            return data
    return None


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _KINDS if test(status.st_mode)), "something else")
        raise NotAFile(errno.EINVAL, f"{kind}, not a file")


def _too_large(column: str, size: int, bytes_max: int) -> Refusal:
    return Refusal(column, "too_large_file", f"{size} bytes", size, bytes_max)


def _too_many_pixels(pixels: NDArray[Any], column: str, pixels_max: int) -> Refusal | None:
    """The refusal of an array with too many pixels, before its digest copies it. An array that is not a picture passes; the decoder refuses
    it."""
    if pixels.dtype.kind != "u" or pixels.ndim not in (2, 3) or pixels.shape[0] * pixels.shape[1] <= pixels_max:
        return None
    height, width = pixels.shape[:2]
    return Refusal(column, "too_many_pixels", f"array, {width} x {height} pixels", width * height, pixels_max)
