"""Hands a column's sealed rows to FAISS itself: as one `faiss.IndexShards` to search, or as indexes to write to files.

Owns how rows get their numbers and how removed rows are left out. Ids are row numbers (int64) of the gallery. Never scans.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biodedup.errors import InvalidInput
from biodedup.gallery.files import index_codec
from biodedup.gallery.files.index_codec import FaissCodec
from biodedup.gallery.segments.part import PIECE_ROWS, Column, Int64
from biodedup.gallery.segments.reader import Segment
from biodedup.gallery.snapshot import Snapshot
from biodedup.index_spec import IndexSpec


def shards_of(snapshot: Snapshot, name: str) -> Any:
    """A `faiss.IndexShards` over the sealed rows of a column, without those that are removed. Segments without removed rows share their
    memory with the engine's searches. Raises InvalidInput without a codec."""
    codec, together = codec_of(snapshot, name), []
    for segment, column, live in _columns(snapshot, name):
        rows = _rows(segment, column)
        if live is None and column.index is not None and column.index.codec_id == codec.codec_id:
            shared = index_codec.in_the_clear(column.index.loaded(), codec, shared=True)
            together.append(index_codec.numbered(shared, codec, rows))
        else:
            together.append(_copied(column, codec, rows, live))
    return index_codec.sharded(together, codec.dimension)


def copies_of(snapshot: Snapshot, name: str) -> Iterator[tuple[int, Any, Int64]]:
    """(number of the segment, an index of its own whose ids are row numbers, these rows) of each sealed segment with rows left."""
    codec = codec_of(snapshot, name)
    for segment, column, live in _columns(snapshot, name):
        rows = _rows(segment, column)
        yield segment.entry.number, _copied(column, codec, rows, live), rows if live is None else rows[live]


def codec_of(snapshot: Snapshot, name: str) -> FaissCodec:
    """The codec of a column. Of an engine whose codec is not trained yet, and of the native engine, raises InvalidInput."""
    codec = snapshot.indexing.wanted(name)
    if codec is None:
        raise InvalidInput(
            f"column {name} has no FAISS index: its engine is {snapshot.indexing.spec(name)}; give it one by `biodedup reindex`, as "
            f"--index {name}={IndexSpec('IVF256,PQ64x4fs')}"
        )
    return codec


def _columns(snapshot: Snapshot, name: str) -> Iterator[tuple[Segment, Column, NDArray[np.bool_] | None]]:
    """(segment, column, which of its cells are live or None for all) of the sealed rows, without open cases."""
    for segment in snapshot.segments:
        column = segment.columns.get(name)
        if column is None or not column.count:
            continue
        mask = snapshot.enrolled.mask(segment)
        live = None if mask is None else mask[column.positions(0, column.count)]
        if live is None or live.any():
            yield segment, column, None if live is None or live.all() else live


def _rows(segment: Segment, column: Column) -> Int64:
    return segment.rows(column.positions(0, column.count))


def _copied(column: Column, codec: FaissCodec, rows: Int64, live: NDArray[np.bool_] | None) -> Any:
    if column.index is not None and column.index.codec_id == codec.codec_id:
        index = index_codec.in_the_clear(column.index.read(), codec)
        return index_codec.renumbered(index, codec, rows, live)
    kept = np.arange(column.count) if live is None else np.flatnonzero(live)
    pieces = (column.vectors_at(kept[low : low + PIECE_ROWS]) for low in range(0, len(kept), PIECE_ROWS))
    index = index_codec.in_the_clear(index_codec.filled(codec, pieces), codec)
    return index_codec.renumbered(index, codec, rows[kept], None)
