"""Verifies the hash chain of a register in PostgreSQL, and the segment files that its manifest names.

Owns the reading of the segment store for that. What is checked in the database is `gallery/care/log.py`'s. Never changes anything.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from biodedup.cluster.cache import SegmentCache, copies_of
from biodedup.cluster.key import new_key, place
from biodedup.cluster.opening import connect
from biodedup.cluster.store import SegmentStore
from biodedup.config import ClusterConfig
from biodedup.errors import GalleryDamaged
from biodedup.gallery.care.log import LogReport, Mark, check_log, unreadable
from biodedup.gallery.files.filesystem import MALFORMED, Storage
from biodedup.gallery.files.names import SEGMENT_FOLDER
from biodedup.gallery.segments.layout import SegmentEntry, number_of


def verify_register(
    storage: Storage,
    url: str,
    cluster: ClusterConfig,
    mark: Mark | None = None,
    public_keys: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> LogReport:
    """As `verify_chain`, of one commit. Reads every segment file of the store whole, one after the other, by way of a temporary folder.

    Raises NotAGallery, KeyMismatch, InvalidInput, StorageUnavailable.
    """
    try:
        with (
            closing(connect(url, cluster)) as catalogue,
            tempfile.TemporaryDirectory(prefix="biodedup-log-") as scratch,
        ):
            catalogue.open("", "", create=False)
            folder = Path(scratch)
            place(storage, folder, new_key(storage).key_id, catalogue.key_file)
            catalogue.take_key(storage.register_chain_key(folder))
            store = SegmentStore(cluster.segments, catalogue.register_id)
            catalogue.begin_reading()
            try:
                entries = catalogue.segments()
                report = check_log(catalogue, (), len(copies_of(entries)), mark, public_keys)
            finally:
                catalogue.rollback()
            found = _file_problems(storage, folder / SEGMENT_FOLDER, store, entries)
            return replace(report, problems=(*report.problems, *found))
    except (GalleryDamaged, *MALFORMED) as error:
        return unreadable(error)


def _file_problems(storage: Storage, folder: Path, store: SegmentStore, entries: Sequence[SegmentEntry]) -> list[str]:
    """Of every file in the store. What was merged away meanwhile is kept there for a while."""
    storage.make_folder(folder)
    cache, problems = SegmentCache(storage, folder, store, 1 << 62), []
    for copy in copies_of(entries):
        try:
            with cache.downloaded(copy):
                pass
        except GalleryDamaged as error:
            problems.append(f"segment {number_of(copy.name)}: {error}")
    return problems
