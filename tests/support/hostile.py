"""Work of a worker process that does what its capture asks for; a module of its own, since every process imports it."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

import biodedup as bd


def hostile(capture: bd.Face) -> bd.Refusal:
    """A worker's work without images: does what the capture asks for."""
    order = bytes(capture.data).decode()
    if order == "crash":
        ctypes.string_at(0)
    if order == "abort":
        os.abort()
    if order == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if order == "hang":
        time.sleep(60)
    if order == "loop":
        while True:
            pass
    if order == "memory":
        return bd.Refusal("face", str(len(bytearray(1 << 30))))
    if order == "mapped":
        return bd.Refusal("face", str(np.ones(1 << 28, np.float64).size))
    if order == "bug":
        raise KeyError("secret content")
    if order.startswith("write "):
        with Path(order[6:]).open("wb") as file:
            for _ in range(100):
                file.write(bytes(1 << 20))
    if order == "files":
        with ExitStack() as opened:
            files = [opened.enter_context(Path(os.devnull).open("rb")) for _ in range(1000)]
            return bd.Refusal("face", str(len(files)))
    if order == "limits":
        core, hears = resource.getrlimit(resource.RLIMIT_CORE), signal.pthread_sigmask(signal.SIG_BLOCK, ())
        return bd.Refusal("face", f"core {core[1]}, deaf {signal.SIGINT in hears}")
    return bd.Refusal("face", order, str(os.getpid()))
