"""A Redis server of the tests' own: `redis-server` of Debian's package, or of any other installation in the PATH."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from pathlib import Path


def server() -> str | None:
    """The path of `redis-server`, or None."""
    return shutil.which("redis-server")


class Redis:
    """A server that keeps its data in a folder, reached over a free port of this machine."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        command = [
            str(server()),
            "--bind",
            "127.0.0.1",
            "--port",
            str(port),
            "--dir",
            str(folder),
            "--appendonly",
            "yes",
        ]
        with (folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                return
            except OSError:
                if time.monotonic() > until or self._process.poll() is not None:
                    raise RuntimeError((folder / "log").read_text()) from None
                time.sleep(0.05)

    def close(self) -> None:
        self._process.kill()
        self._process.wait(60)
