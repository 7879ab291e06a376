"""Builds the FAISS indexes of a segment's columns from the stored vectors.

Owns the choice of columns that get an index, and the input of the index. Never trains a codec and never changes the manifest.

An index is built from the vectors as the segment stores them, with eight bits per component, so that it can be rebuilt from the segment.
The index of a merged segment is built from its vectors, not by `IndexIVF.merge_from`: in FAISS 1.15 that function writes beyond the end of
a fast-scan list whose size is a multiple of its block (`BlockInvertedLists::add_entries`), for example of 1,024 rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biodedup.gallery.files import index_codec
from biodedup.gallery.files.filesystem import Storage
from biodedup.gallery.files.index_codec import FaissCodec
from biodedup.gallery.segments.layout import INDEX, SegmentEntry, file_name
from biodedup.gallery.segments.part import PIECE_ROWS, Column
from biodedup.gallery.segments.reader import open_segment
from biodedup.gallery.segments.stored_index import write_index
from biodedup.values import Float32

CELLS_MIN = 1 << 14
"""A column with at most so many cells has no index and is compared exactly."""
_PIECES = 8  # FAISS receives so many pieces of PIECE_ROWS rows at a time


def with_indexes(
    storage: Storage,
    folder: Path,
    gallery_id: str,
    entry: SegmentEntry,
    codecs: Mapping[str, FaissCodec],
    go_on: Callable[[], bool] = lambda: True,
) -> SegmentEntry:
    """Writes an index for each column of a segment that has a codec and enough cells. Returns the entry with the index files."""
    if not codecs:
        return entry
    files = dict(entry.files)
    segment = open_segment(storage, folder, entry)
    try:
        for name, column in segment.columns.items():
            codec = codecs.get(name)
            if codec is not None and column.count > CELLS_MIN and column.dimension == codec.dimension:
                kind = name + INDEX + codec.codec_id
                index = built(column, codec, go_on)
                files[kind] = write_column_index(storage, folder, gallery_id, (entry.number, kind), index)
    finally:
        segment.close()
    storage.sync_folder(folder)
    return replace(entry, files=files)


def built(column: Column, codec: FaissCodec, go_on: Callable[[], bool] = lambda: True) -> Any:
    """Builds the index of a column. go_on: raises to stop."""

    def pieces() -> Iterator[Float32]:
        for start in range(0, column.count, _PIECES * PIECE_ROWS):
            go_on()
            end = min(start + _PIECES * PIECE_ROWS, column.count)
            spans = [(low, min(low + PIECE_ROWS, end)) for low in range(start, end, PIECE_ROWS)]
            yield np.concatenate([column.vectors(low, high) for low, high in spans])

    return index_codec.filled(codec, pieces())


def write_column_index(
    storage: Storage, folder: Path, gallery_id: str, which: tuple[int, str], index: Any, *, replaces: bool = False
) -> str:
    """Writes the file of an index. which: (number of the segment, kind of the file). Returns the digest."""
    number, kind = which
    about = {
        "gallery": gallery_id,
        "segment": number,
        "kind": kind,
        "codec": kind.partition(INDEX)[2],
        "cells": int(index.ntotal),
    }
    return write_index(storage, folder / file_name(number, kind), about, index, replaces=replaces)


def sample_of(columns: Sequence[Column], wanted: int) -> Float32:
    """A sample of at most `wanted` vectors, float32 (n, d), in pieces from evenly spaced places in these columns."""
    total = sum(column.count for column in columns)
    starts = np.linspace(0, total, -(-min(wanted, total) // PIECE_ROWS), endpoint=False).astype(np.int64)
    pieces: list[NDArray[np.float32]] = []
    for start in starts.tolist():
        for column in columns:
            if 0 <= start < column.count:
                pieces.append(column.vectors(start, min(start + PIECE_ROWS, column.count)))
                break
            start -= column.count
    return np.concatenate(pieces)[:wanted]
