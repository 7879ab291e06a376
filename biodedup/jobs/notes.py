"""The notes of a long job: what was done, a line each, so that it goes on there when it is started again.

Owns the file. A line counts once it is whole and synced; notes of another job, and a line cut short, are dropped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from biodedup.gallery.gallery import translated


class Notes:
    """Lines of JSON under a key that says which job they are of. entries: those of an earlier run of the same job."""

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self._path = path
        self.entries: list[Any] = []
        with translated(f"writing {path}"):
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            sound = 0
            if lines and _parsed(lines[0]) == key:
                sound = len(lines[0])
                for line in lines[1:]:
                    entry = _parsed(line)
                    if entry is None:
                        break
                    self.entries.append(entry)
                    sound += len(line)
            self._file = path.open("r+b" if sound else "wb")
            self._file.truncate(sound)
            self._file.seek(sound)
            if not sound:
                self._write(key)

    def add(self, entry: Any) -> None:
        """Durable when this returns. Raises StorageUnavailable."""
        with translated(f"writing {self._path}"):
            self._write(entry)

    def finish(self) -> None:
        """The job is done: removes the file."""
        self._file.close()
        with translated(f"removing {self._path}"):
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> Notes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _write(self, entry: Any) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
