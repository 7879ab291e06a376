"""Gives a column's sealed rows as FAISS indexes: as a `faiss.IndexShards` to search, or as indexes to write to files.

Owns the ids of the rows, which are row numbers (int64) of the gallery, and the removal of removed rows. Never searches.
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
    """A `faiss.IndexShards` over the sealed rows of a column, without removed rows. Segments without removed rows share their memory with the
    engine's searches. Raises InvalidInput if the column has no codec."""
    codec, indexes = codec_of(snapshot, name), []
    for segment, column, live in _columns(snapshot, name):
        rows = _rows(segment, column)
        if live is None and column.index is not None and column.index.codec_id == codec.codec_id:
            shared = index_codec.in_the_clear(column.index.loaded(), codec, shared=True)
            indexes.append(index_codec.numbered(shared, codec, rows))
        else:
            indexes.append(_copied(column, codec, rows, live))
    return index_codec.sharded(indexes, codec.dimension)


def copies_of(snapshot: Snapshot, name: str) -> Iterator[tuple[int, Any, Int64]]:
    """(segment number, a new index whose ids are row numbers, these rows) of each sealed segment with live rows."""
    codec = codec_of(snapshot, name)
    for segment, column, live in _columns(snapshot, name):
        rows = _rows(segment, column)
        yield segment.entry.number, _copied(column, codec, rows, live), rows if live is None else rows[live]


def codec_of(snapshot: Snapshot, name: str) -> FaissCodec:
    """The FAISS codec of a column. Raises InvalidInput for the native engine, and if the codec is not trained yet."""
    codec = snapshot.indexing.wanted(name)
    if codec is None:
        raise InvalidInput(
            f"column {name} has no FAISS index: its engine is {snapshot.indexing.spec(name)}; give it one by `biodedup reindex`, as "
            f"--index {name}={IndexSpec('IVF256,PQ64x4fs')}"
        )
    return codec


def _columns(snapshot: Snapshot, name: str) -> Iterator[tuple[Segment, Column, NDArray[np.bool_] | None]]:
    """(segment, column, mask of its live cells or None if all are live) of the sealed rows, without open cases."""
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
