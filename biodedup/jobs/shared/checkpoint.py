"""The notes of a long job: one line for each finished piece, synced before the next piece begins.

Owns the file of an interrupted job. Never reads the meaning of a line.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.private import FILE_MODE, refuse_link


class Notes:
    """The notes of the work that `key` (JSON-ready) describes; those of other work, and a line cut short, are dropped.

    entries: what was noted before, in order. Raises StorageUnavailable.
    """

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self._path = path
        with translated(f"reading {path}"):
            refuse_link(path)
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            sound = [_parsed(line) for line in lines]
            if None in sound:
                sound = sound[: sound.index(None)]
            if sound[:1] != [key]:
                sound = []
            if lines:
                os.truncate(path, sum(map(len, lines[: len(sound)])))
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = os.fdopen(os.open(path, flags, FILE_MODE), "a")
            self._key = key
            self.entries: list[Any] = sound[1:]
            if not sound:
                self._write(key)

    def append(self, entry: Any) -> None:
        """Durable when it returns. Raises StorageUnavailable."""
        with translated(f"writing {self._path}"):
            self._write(entry)

    def begin_anew(self) -> None:
        """Drops all entries. Raises StorageUnavailable."""
        with translated(f"writing {self._path}"):
            self._file.truncate(0)
            self._write(self._key)
        self.entries = []

    def remove(self) -> None:
        """When the work is done and its result written."""
        with translated(f"removing {self._path}"):
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> Notes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _write(self, entry: Any) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
