"""Decodes WSQ fingerprints in a child process.

Owns the child processes and their pipes. Never raises for the content of the bytes, and never decodes in the calling process: the C decoder
(package `wsq`, from NBIS) writes past its buffers on some damaged files, and so could crash the whole enrolment service.

1. A child that fails, crashes or takes too long is killed.
2. If a used child fails, a new child tries again, because an earlier file may have damaged the used child.
3. Children end with this process: their standard input closes. Their processor time is limited as well.
4. A child has limits on memory and files.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DECODE_S_MAX, DECODE_CLOCK_S_MAX = 5.0, 30.0
"""Seconds of processor time, and by the clock. An image of 16 megapixels takes 1 s; a decoder that takes much longer is in an endless loop."""

MEMORY_BYTES_MAX = 1 << 30
_MARKERS_MAX = 100
_INHERITED = {"PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR"}

_END = b"\xff\xa1"
_LENGTH = struct.Struct("<Q")
_HEADER = struct.Struct("<QQd")

# the child redirects standard output, so that text from the C code does not get into the pipe
_CHILD = f"""
import os, resource, struct, sys
for kind, most in ((resource.RLIMIT_DATA, {MEMORY_BYTES_MAX}), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))
sys.path.insert(0, sys.argv[1])
import _wsq
source = os.fdopen(os.dup(0), "rb")
sink = os.fdopen(os.dup(1), "wb")
null = os.open(os.devnull, os.O_RDWR)
os.dup2(null, 0)
os.dup2(null, 1)
while head := source.read({_LENGTH.size}):
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard, most = resource.getrlimit(resource.RLIMIT_CPU)[1], int(used.ru_utime + used.ru_stime + {1 + DECODE_S_MAX})
    resource.setrlimit(resource.RLIMIT_CPU, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    try:
        pixels, width, height, dpi = _wsq.decompress(source.read(*struct.unpack("{_LENGTH.format}", head)))
    except Exception:
        pixels, width, height, dpi = b"", 0, 0, 0
    sink.write(struct.pack("{_HEADER.format}", width, height, dpi))
    sink.write(pixels)
    sink.flush()
"""

_idle: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True, eq=False)
class WsqImage:
    """A decoded image. grey: uint8 (h, w). dpi: None if the file states none."""

    grey: NDArray[np.uint8]
    dpi: float | None


def is_wsq(content: bytes) -> bool:
    """Whether the content begins as a WSQ file: start of image, then a table, comment or frame."""
    return content[:3] == b"\xff\xa0\xff" and content[3:4] in b"\xa2\xa4\xa5\xa6\xa8"


def read_size(content: bytes) -> tuple[int, int] | None:
    """(width, height) from the frame header, or None if it is not found."""
    at = 2
    for _ in range(_MARKERS_MAX):
        if at + 10 > len(content) or content[at] != 0xFF:
            break
        if content[at + 1] == 0xA2:
            height, width = struct.unpack_from(">HH", content, at + 6)
            return width, height
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return None


def decode_wsq(content: bytes) -> WsqImage | None:
    """The image, or None if the bytes cannot be decoded. Callers check `read_size` first, because it determines the memory use."""
    end = content.rfind(_END)
    if end < 0:  # a file without its end marker is truncated; the decoder may not notice
        return None
    content = content[: end + len(_END)]  # some writers pad files
    while _idle:
        try:
            child = _idle.pop()
        except IndexError:
            break
        image = _ask(child, content)
        if image is not None:
            return image
    return _ask(_start(), content)


def _start() -> subprocess.Popen[bytes]:
    spec = importlib.util.find_spec("_wsq")
    if spec is None or spec.origin is None:
        raise ImportError("WSQ files need the package `wsq`; install it, as `pip install wsq`")
    return subprocess.Popen(
        [sys.executable, "-I", "-c", _CHILD, os.path.dirname(spec.origin)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={
            name: os.environ[name] for name in _INHERITED & os.environ.keys()
        },  # no secrets for a decoder of hostile files
    )


def _ask(child: subprocess.Popen[bytes], content: bytes) -> WsqImage | None:
    """Asks a child to decode. Afterwards the child is idle, or stopped if it failed."""
    image = None
    alarm = threading.Timer(DECODE_CLOCK_S_MAX, child.kill)
    alarm.daemon = True
    alarm.start()
    try:
        image = _exchange(child, content)
    finally:
        alarm.cancel()
        if image is None:
            _stop(child)
        else:
            _idle.append(child)
    return image


def _exchange(child: subprocess.Popen[bytes], content: bytes) -> WsqImage | None:
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(_LENGTH.pack(len(content)))
        child.stdin.write(content)
        child.stdin.flush()
    except BrokenPipeError:
        return None
    head = child.stdout.read(_HEADER.size)
    if len(head) < _HEADER.size:
        return None
    width, height, dpi = _HEADER.unpack(head)
    pixels = child.stdout.read(width * height)
    if not pixels or len(pixels) < width * height:
        return None
    return WsqImage(np.frombuffer(pixels, np.uint8).reshape(height, width), dpi if dpi > 0 else None)


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        assert pipe is not None
        try:
            pipe.close()
        except BrokenPipeError:
            pass  # what it had not read is of no interest


@atexit.register
def _stop_all() -> None:
    while _idle:
        _stop(_idle.pop())


def _forget_all() -> None:
    """A forked process leaves its parent's children alone."""
    for child in _idle:
        child.returncode = 0
    _idle.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
