"""The local copies of a register's segment files: a cache folder with a limit on its size.

Owns the copies: fetching, verification and eviction. Never writes to the segment store.

1. A copy is used only after all of its checksums were verified and its digest is that of the manifest.
2. Several processes may share a folder. A copy gets its final name when it is complete. A process fetches a copy again if another process
   has removed it.
3. A memory-mapped copy stays readable after its file was removed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from biodedup.cluster.store import SegmentStore, stored_name
from biodedup.errors import GalleryDamaged, StorageUnavailable
from biodedup.gallery.files.column_file import open_column_file
from biodedup.gallery.files.filesystem import Storage
from biodedup.gallery.files.names import NEW_SUFFIX, unfinished
from biodedup.gallery.segments.layout import SegmentEntry, file_name, number_of

_FRESH_S = 3600.0  # a younger file that the manifest does not name may belong to another process's next commit


class Copy(NamedTuple):
    """A file of a segment: its local name, its digest, and its name in the store."""

    name: str
    digest: str
    stored: str


class SegmentCache:
    """Fetches and evicts copies. bytes_max: the limit for all copies together. Thread-safe."""

    def __init__(self, storage: Storage, folder: Path, store: SegmentStore, bytes_max: int) -> None:
        self._storage = storage
        self._folder = folder
        self._store = store
        self._bytes_max = bytes_max
        self._verified: set[tuple[str, str]] = set()
        self._fetching = threading.Lock()

    def absent(self, entries: Iterable[SegmentEntry]) -> list[Copy]:
        """The files of these segments that have no valid local copy."""
        return [copy for copy in copies_of(entries) if not self._is_there(copy)]

    def keep(self, copies: Iterable[Copy]) -> None:
        """Marks copies as verified."""
        self._verified.update((copy.name, copy.digest) for copy in copies)

    def fetch(self, entries: Sequence[SegmentEntry]) -> None:
        """Downloads the files of these segments that are absent. Raises StorageUnavailable if the folder is too small for all of them,
        GalleryDamaged if a file in the store is not the one that the manifest names."""
        with self._fetching:
            absent = self.absent(entries)
            if absent:
                self._make_room(absent, {copy.name for copy in copies_of(entries)})
            for copy in absent:
                self._fetch(copy)

    def _fetch(self, copy: Copy) -> None:
        with self.downloaded(copy) as new:
            new.replace(self._folder / copy.name)
        self.keep([copy])

    @contextmanager
    def downloaded(self, copy: Copy) -> Iterator[Path]:
        """A verified copy under a name of its own, which goes at the end. Raises as `fetch`."""
        new = self._folder / unfinished(copy.name)
        try:
            self._store.download(copy.stored, new)
            file = open_column_file(self._storage, new)
            try:
                problems = (
                    file.problems() if file.digest == copy.digest else ["it is not the file that the manifest names"]
                )
            finally:
                file.close()
            if problems:
                raise GalleryDamaged(f"{copy.stored} in the segment store: {problems[0]}; restore it from a backup")
            yield new
        finally:
            with suppress(OSError):
                new.unlink(missing_ok=True)

    def _is_there(self, copy: Copy) -> bool:
        path = self._folder / copy.name
        if not path.exists():
            return False
        if (copy.name, copy.digest) in self._verified:
            return True
        try:
            file = open_column_file(self._storage, path)
        except GalleryDamaged:
            return False
        try:
            is_valid = file.digest == copy.digest and not file.problems()
        finally:
            file.close()
        if is_valid:
            self.keep([copy])
        return is_valid

    def _make_room(self, absent: Sequence[Copy], needed: set[str]) -> None:
        """Removes the oldest copies that are not in `needed`, until the absent files fit. Raises StorageUnavailable if they do not fit."""
        wanted = sum(self._store.size(copy.stored) for copy in absent)
        sizes = {name: (self._folder / name).stat().st_size for name in self._names()}
        left = self._bytes_max - wanted - sum(sizes.values())
        for name in sorted(set(sizes) - needed, key=lambda name: (self._folder / name).stat().st_mtime):
            if left >= 0:
                break
            self._remove(name)
            left += sizes[name]
        if left < 0:
            raise StorageUnavailable(
                f"the segments need {-left:,} bytes more than ClusterConfig.cache_bytes_max ({self._bytes_max:,}); raise it"
            )

    def sweep(self, entries: Iterable[SegmentEntry]) -> None:
        """Removes the copies that do not belong to these segments. Files younger than an hour stay: another process may be about to commit
        them."""
        needed = {copy.name for copy in copies_of(entries)}
        unfinished = [name for name in self._storage.list_names(self._folder) or () if name.endswith(NEW_SUFFIX)]
        for name in {*self._names(), *unfinished} - needed:
            with suppress(OSError):
                if time.time() - (self._folder / name).stat().st_mtime > _FRESH_S:
                    self._remove(name)

    def _remove(self, name: str) -> None:
        self._verified = {known for known in self._verified if known[0] != name}
        with suppress(OSError):
            (self._folder / name).unlink(missing_ok=True)

    def _names(self) -> list[str]:
        return [name for name in self._storage.list_names(self._folder) or () if number_of(name) is not None]


def copies_of(entries: Iterable[SegmentEntry]) -> list[Copy]:
    """The files of segments."""
    return [
        Copy(file_name(entry.number, kind), digest, stored_name(entry.number, kind, digest))
        for entry in entries
        for kind, digest in entry.files.items()
    ]
