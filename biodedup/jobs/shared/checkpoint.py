"""Keeps the checkpoint file of a long job: one line of JSON for each finished piece, synced before the next piece begins.

Owns the file. Never interprets its entries.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from biodedup.gallery.files.encryption.keyring import register_key
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.private import FILE_MODE, refuse_link
from biodedup.keys import KeySource


class CheckpointFile:
    """An open checkpoint file. Its first line is `key` (JSON-ready), which describes the work.

    If the file has another key, all its entries are dropped. A line that was cut short is dropped with all lines after it.
    entries: the entries of earlier runs, in order; keys: if given, each line is encrypted under the register's key and bound to its number and to `key`.
    Raises StorageUnavailable.
    """

    def __init__(self, path: Path, key: dict[str, Any], keys: KeySource | None = None) -> None:
        self._path = path
        self._register = None if keys is None else register_key(keys)
        self._work = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self._count = 0
        with translated(f"reading {path}"):
            refuse_link(path)
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            sound = [self._parsed(number, line) for number, line in enumerate(lines)]
            if None in sound:
                sound = sound[: sound.index(None)]
            if sound[:1] != [key]:
                sound = []
            if lines:
                os.truncate(path, sum(map(len, lines[: len(sound)])))
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = os.fdopen(os.open(path, flags, FILE_MODE), "a")
            self._key = key
            self._count = len(sound)
            self.entries: list[Any] = sound[1:]
            if not sound:
                self._write(key)

    def append(self, entry: Any) -> None:
        """Adds an entry (JSON-ready), which is durable on return. Raises StorageUnavailable."""
        with translated(f"writing {self._path}"):
            self._write(entry)

    def begin_anew(self) -> None:
        """Drops all entries. Raises StorageUnavailable."""
        with translated(f"writing {self._path}"):
            self._file.truncate(0)
            self._count = 0
            self._write(self._key)
        self.entries = []

    def remove(self) -> None:
        """Removes the file, once the result of the work is written. Raises StorageUnavailable."""
        with translated(f"removing {self._path}"):
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> CheckpointFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _write(self, entry: Any) -> None:
        text = json.dumps(entry)
        if self._register is not None:
            text = base64.b64encode(self._register.wrap(text.encode(), self._place(self._count))).decode()
        self._count += 1
        self._file.write(text + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _parsed(self, number: int, line: bytes) -> Any:
        try:
            if not line.endswith(b"\n"):
                return None
            if self._register is not None:
                return json.loads(self._register.unwrap(base64.b64decode(line), self._place(number)) or b"")
            return json.loads(line)
        except ValueError:
            return None

    def _place(self, number: int) -> bytes:
        return f"biodedup notes {self._path.name} {self._work} {number}".encode()
