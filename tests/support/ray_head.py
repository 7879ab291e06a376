"""A Ray cluster whose head keeps its state in Redis: `ray start` starts all parts, as the deployment guide says, and the head may be killed."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.support import ROOT
from tests.support.redis import Redis

FRONT_END = "127.0.0.4"
"""The address of the node that a front-end joins; all nodes are on this machine."""
_STARTS = 4
_NODES = {"127.0.0.2": 1, "127.0.0.3": 1, FRONT_END: 0}
"""Address of each node -> its processors."""


class RayHead:
    """Redis, a head, two nodes with shards, and one for a front-end. address: of the head."""

    def __init__(self) -> None:
        import ray

        self._folder = Path(tempfile.mkdtemp(prefix="ray-"))  # a short path, because Ray's sockets are there
        self._redis = Redis(self._folder / "redis")
        self._numbers = itertools.count()
        self._port = _free_port()
        self.address = f"{ray.util.get_node_ip_address()}:{self._port}"
        self._head: subprocess.Popen[bytes] | None = None
        self._nodes: list[subprocess.Popen[bytes]] = []
        try:
            self.start()
            for address, processors in _NODES.items():
                given = f"--address={self.address}", f"--node-ip-address={address}", f"--num-cpus={processors}"
                self._nodes.append(self._started(*given))
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Starts the head. It finds its state in Redis."""
        (self._folder / "ray" / "ray_current_cluster").unlink(missing_ok=True)  # another machine would not have it
        given = "--head", f"--port={self._port}", "--num-cpus=0", "--include-dashboard=false"
        self._head = self._started(*given, f"--temp-dir={self._folder}/ray")

    def kill(self) -> None:
        """SIGKILL for all processes of the head at once: the GCS, the node's manager, and the process that started them."""
        if self._head is not None:
            _kill(self._head)
            self._head = None

    def close(self) -> None:
        for node in self._nodes:
            _kill(node)
        self.kill()
        self._redis.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _started(self, *given: str) -> subprocess.Popen[bytes]:
        """A part that runs. Nodes that start at the same time on one machine disturb each other, so that this waits; on a loaded machine a
        node may miss Ray's deadlines, and is started again."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--object-store-memory=100000000"]
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
        if "--head" in given:
            environment["RAY_REDIS_ADDRESS"] = self._redis.address
        for _ in range(_STARTS):
            log = self._folder / f"log-{next(self._numbers)}"
            with log.open("wb") as out:
                process = subprocess.Popen(
                    [*command, *given], env=environment, stdout=out, stderr=out, start_new_session=True
                )
            while process.poll() is None:
                if "Ray runtime started" in log.read_text():
                    return process
                time.sleep(0.2)
        raise RuntimeError(log.read_text())


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and those that it started, which are in its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)


def _free_port() -> int:
    """Below the ports that Ray gives to its workers."""
    for port in range(7_400, 7_500):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)):
                return port
    raise RuntimeError("no free port")
