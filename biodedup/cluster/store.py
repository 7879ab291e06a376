"""The segment store: immutable files of a register on a file system that every node can reach, through `pyarrow.fs`.

Owns uploads, downloads and their verification. Never decides which files are needed, and never changes a file.

1. A file's name contains the digest of its content (`12.face.DIGEST`), so that two histories of a gallery never use the same name.
2. An upload returns after the file was read back and compared with the local file, byte for byte. Only then may a manifest name it.
3. In a folder, a file gets its final name after it is complete and synced. On S3, an object appears only when it is complete.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pyarrow import ArrowException, fs

from biodedup.errors import GalleryDamaged, InvalidInput, StorageUnavailable
from biodedup.gallery.files.names import NEW_SUFFIX
from biodedup.gallery.files.private import create_private, make_private_folder

_PIECE_BYTES = 1 << 22


class SegmentStore:
    """The files of one register. url: `file:///folder` or `s3://bucket/folder`, for `pyarrow.fs.FileSystem.from_uri`; register_id: the
    register's folder below it, so that registers do not share files. Thread-safe."""

    def __init__(self, url: str, register_id: str) -> None:
        try:
            self._files, root = fs.FileSystem.from_uri(url)
        except (ArrowException, OSError, ValueError) as error:
            raise InvalidInput(
                f"ClusterConfig.segments is not the address of a file system ({error}); write file:///folder or s3://bucket/folder"
            ) from None
        self._root = f"{root.rstrip('/')}/{register_id}"
        self._is_local = isinstance(self._files, fs.LocalFileSystem)
        with _translated("opening the segment store"):
            if self._is_local:
                make_private_folder(Path(self._root))

    def upload(self, source: Path, name: str) -> None:
        """Copies a local file to the store and verifies the copy. Does nothing if the store has the same file already."""
        with _translated(f"uploading {name}"):
            if self._is_same(source, name):
                return
            if self._is_local:
                self._write_local(source, Path(self._path(name)))
            else:
                with source.open("rb") as content, self._files.open_output_stream(self._path(name)) as out:
                    while piece := content.read(_PIECE_BYTES):
                        out.write(piece)
            if not self._is_same(source, name):
                raise StorageUnavailable(
                    f"the store returns another content than was uploaded as {name}; send it again"
                )

    def download(self, name: str, target: Path) -> None:
        """Copies a file of the store to a new local file. The caller verifies the content. Raises GalleryDamaged if it is absent."""
        with _translated(f"downloading {name}"):
            file = create_private(target)
            with os.fdopen(file, "wb") as out, self._opened(name) as content:
                while piece := content.read(_PIECE_BYTES):
                    out.write(piece)
                out.flush()
                os.fsync(out.fileno())

    def size(self, name: str) -> int:
        """The size of a file, in bytes. Raises GalleryDamaged if it is absent."""
        with _translated(f"looking for {name}"):
            about = self._files.get_file_info(self._path(name))
        if about.type != fs.FileType.File:
            raise GalleryDamaged(f"the segment store lacks {name}, which the manifest names; restore it from a backup")
        return int(about.size)

    def ages(self, now: float) -> dict[str, float]:
        """Name of each file -> seconds since it was written. now: seconds since 1970."""
        with _translated("listing the segment store"):
            found = self._files.get_file_info(fs.FileSelector(self._root, allow_not_found=True))
        files = [about for about in found if about.type == fs.FileType.File]
        return {about.base_name: now - about.mtime.timestamp() for about in files}

    def remove(self, name: str) -> None:
        with _translated(f"removing {name}"), suppress(FileNotFoundError):
            self._files.delete_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        self.size(name)
        with self._files.open_input_stream(self._path(name)) as content:
            yield content

    def _is_same(self, source: Path, name: str) -> bool:
        """Whether the store has a file with this name and exactly the content of the local file."""
        about = self._files.get_file_info(self._path(name))
        if about.type != fs.FileType.File or about.size != source.stat().st_size:
            return False
        with source.open("rb") as content, self._files.open_input_stream(self._path(name)) as stored:
            while piece := content.read(_PIECE_BYTES):
                if stored.read(len(piece)) != piece:
                    return False
        return True

    @staticmethod
    def _write_local(source: Path, target: Path) -> None:
        new = target.with_name(f"{target.name}.{os.getpid()}{NEW_SUFFIX}")
        with source.open("rb") as content, os.fdopen(create_private(new), "wb") as out:
            while piece := content.read(_PIECE_BYTES):
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())
        new.replace(target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def stored_name(number: int, kind: str, digest: str) -> str:
    """The name of a segment's file in the store."""
    return f"{number}.{kind}.{digest}"


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    try:
        yield
    except (ArrowException, OSError) as error:
        raise StorageUnavailable(
            f"{doing} failed: {error}; nothing was acknowledged; check the store and send it again"
        ) from error
