"""Starts this machine's part of a Ray cluster: `biodedup cluster up`, a thin wrapper of `ray start`.

Owns the options of each part. Starts nothing else: PostgreSQL, the segment store and the front-ends are started by other means.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Literal

from biodedup.errors import InvalidInput, StorageUnavailable

Part = Literal["head", "shards", "front-end"]
PARTS: tuple[Part, ...] = ("head", "shards", "front-end")
_START_S = 120.0


def start_command(part: str, address: str | None, processors: int | None, memory_bytes: int | None = None) -> list[str]:
    """The arguments of `ray` that start a part. address: of the head, `host:port`; processors, memory_bytes: of a node with shards, None
    for the values that Ray detects. Raises InvalidInput."""
    if part not in PARTS:
        raise InvalidInput(f"the part is {part!r}, wanted one of {', '.join(PARTS)}")
    host, separator, port = (address or "").rpartition(":")
    if not separator or not host or not port.isdecimal():
        raise InvalidInput(
            f"the address of the head is {address!r}, wanted host:port, the same on all machines, as 10.0.0.1:6379"
        )
    for given, option in ((processors, "--cpus"), (memory_bytes, "--memory")):
        if given is not None and part != "shards":
            raise InvalidInput(f"a {part} holds no shards; leave {option} out")
    if part == "head":
        return ["start", "--head", f"--node-ip-address={host}", f"--port={port}", "--num-cpus=0"]
    count = 0 if part == "front-end" else processors
    stated = [f"--{name}={n}" for name, n in (("num-cpus", count), ("memory", memory_bytes)) if n is not None]
    return ["start", f"--address={address}", *stated]


def start(arguments: list[str]) -> str:
    """Runs `ray start`. The processes that it starts outlive this one. Returns its output. Raises StorageUnavailable."""
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}  # no usage reports from a register
    command = [sys.executable, "-m", "ray.scripts.scripts", *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_START_S, check=False)
    except subprocess.TimeoutExpired:
        raise StorageUnavailable(f"`ray start` did not end within {_START_S:g} s; is the head reachable?") from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise StorageUnavailable(f"`ray {' '.join(arguments)}` ended with code {done.returncode}: {last}")
    return done.stdout
