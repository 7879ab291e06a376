"""Writes a segment from other parts: sealing the tail, loading in bulk and merging segments are one function.

Owns which arrays the files of a segment hold. Never decides when, and never touches the manifest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biodedup.errors import EngineClosed, GalleryDamaged
from biodedup.gallery.files import packed
from biodedup.gallery.files.codec import TRAINING_ROWS_MAX, TRAINING_ROWS_MIN, Codec, make_codec
from biodedup.gallery.files.codes import (
    BLOCK_ROWS,
    STEP,
    bit_blocks,
    blocks_of,
    high_nibbles,
    low_nibbles,
    outer_bits,
    sign_bits,
)
from biodedup.gallery.files.column_file import BLOCK_BYTES, ColumnFile, Stream, write_column_file
from biodedup.gallery.files.encryption.transform import ColumnTransform, Transform, transform_id_of
from biodedup.gallery.files.filesystem import Storage
from biodedup.gallery.files.packed import Packed
from biodedup.gallery.segments.layout import ENCOUNTER, LOOKUP, REST, SUBJECT, SegmentEntry, file_name
from biodedup.gallery.segments.part import PIECE_ROWS, Answers, Column, Int64, Rows, sorted_lookup
from biodedup.gallery.segments.strings import StoredStrings
from biodedup.values import COLUMNS

_REST_BLOCK_BYTES = 1 << 12  # the rests of single rows are read, from anywhere
_LOOKUP_ROWS = 1 << 20  # entries of a look-up sorted at once


class Abandoned(EngineClosed):
    """Writing stopped because `go_on` returned False."""


@dataclass(frozen=True)
class _Source:
    """One part that is written. keep: bool (count,), or None for all rows; base: the number of rows kept of the parts before it."""

    part: Rows
    keep: NDArray[np.bool_] | None
    base: int

    @property
    def kept(self) -> int:
        return self.part.count if self.keep is None else int(np.count_nonzero(self.keep))

    def pieces(self) -> Iterator[tuple[int, int, NDArray[np.bool_] | None]]:
        for low in range(0, self.part.count, PIECE_ROWS):
            high = min(low + PIECE_ROWS, self.part.count)
            yield low, high, None if self.keep is None else self.keep[low:high]

    def new_positions(self, positions: NDArray[Any]) -> Int64:
        """The positions of kept rows in the new segment."""
        moved = positions.astype(np.int64) + self.base
        return moved if self.keep is None else moved - np.searchsorted(np.flatnonzero(~self.keep), positions)


def write_segment(
    storage: Storage,
    folder: Path,
    number: int,
    gallery_id: str,
    parts: Sequence[Rows],
    keeps: Sequence[NDArray[np.bool_] | None],
    others: Iterable[Rows] = (),
    go_on: Callable[[], bool] = lambda: True,
    *,
    threads: int = 1,
    transform: Transform | None = None,
) -> SegmentEntry:
    """Writes adjacent parts as one segment, synced, and returns its entry for the manifest.

    keeps: which rows of each part are kept, bool (count,); None for all. others: parts whose codecs may be reused. threads: that write
    columns of many rows side by side. turn: of the stored embeddings. Raises Abandoned when go_on turns false; then, and after any other
    error, files may be left that no manifest names.
    """
    sources, base = [], 0
    for part, keep in zip(parts, keeps, strict=True):
        sources.append(_Source(part, keep, base))
        base += sources[-1].kept
    about = {"gallery": gallery_id, "segment": number}
    files = {}

    def write(kind: str, more: Mapping[str, Any], streams: Sequence[Stream], block_bytes: int = BLOCK_BYTES) -> None:
        counted = [Stream(s.name, s.dtype, s.shape, _watched(s.pieces, go_on)) for s in streams]
        about_file = {**about, "kind": kind, **more}
        path = folder / file_name(number, kind)
        files[kind] = write_column_file(storage, path, about_file, counted, block_bytes)

    first_row, end_row = parts[0].first_row, parts[-1].end_row
    write(SUBJECT, {"presence": _presence_counts(sources)}, _subject_streams(sources, base, first_row, end_row))
    write(SUBJECT + LOOKUP, {}, _lookup_streams([(s.part.lookup(), s) for s in sources], base))

    def write_column(name: str) -> None:
        codec = _codec_for(name, parts, [*others, *parts], None if transform is None else transform.of(name))
        more, streams, rest = _column_streams(name, sources, base, codec)
        if more["cells"]:
            write(name, more, streams)
            if rest:
                write(name + REST, {}, rest, _REST_BLOCK_BYTES)

    present = [name for name in COLUMNS if any(name in part.columns for part in parts)]
    _each(write_column, present, threads if base >= PIECE_ROWS else 1)
    for kind, more, streams in _answer_files([part.answers for part in parts]):
        write(kind, more, streams)
    storage.sync_folder(folder)
    order = [kind for name in COLUMNS for kind in (name, name + REST)]
    files = dict(sorted(files.items(), key=lambda item: order.index(item[0]) if item[0] in order else -1))
    return SegmentEntry(number, first_row, end_row, files)


def _each(work: Callable[[str], None], names: Sequence[str], threads: int) -> None:
    """Does the work of each name, several at once. After an error no further one is begun, and those that run are waited for."""
    if threads == 1 or len(names) < 2:
        for name in names:
            work(name)
        return
    with ThreadPoolExecutor(threads, "biodedup-write") as pool:
        running = [pool.submit(work, name) for name in names]
        try:
            for future in running:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def rebuild_lookup(storage: Storage, folder: Path, number: int, gallery_id: str, kind: str, exact: ColumnFile) -> str:
    """Writes a derived file anew from the exact one (`subject` or `encounter`); the same bytes as before. Returns its digest."""
    name = "subject_id" if kind == SUBJECT + LOOKUP else "encounter_id"
    count = exact.shape(f"{name}.offset")[0] - 1
    ids = StoredStrings(exact, name, count, text=True)
    hashes = [packed.hashes(ids.slice(low, min(low + PIECE_ROWS, count))) for low in range(0, count, PIECE_ROWS)]
    entries = sorted_lookup(np.concatenate([np.zeros(0, np.uint64), *hashes]))
    about = {"gallery": gallery_id, "segment": number, "kind": kind}
    streams = _lookup_streams([(entries, _Shift(0))], count)
    return write_column_file(storage, folder / file_name(number, kind), about, streams, replaces=True)


def _watched(pieces: Iterable[NDArray[Any]], go_on: Callable[[], bool]) -> Iterator[NDArray[Any]]:
    for piece in pieces:
        if not go_on():
            raise Abandoned("the engine was closed while segments were merged; they are merged another time")
        yield piece


def _presence_counts(sources: Sequence[_Source]) -> dict[str, int]:
    counts = np.zeros(1 << len(COLUMNS), np.int64)
    for source in sources:
        for low, high, keep in source.pieces():
            bits = _kept(source.part.presence(low, high), keep)
            if len(bits) and bits.max() >= len(counts):
                raise GalleryDamaged("a row has templates in columns that there are not; run `biodedup doctor`")
            counts += np.bincount(bits, minlength=len(counts))
    return {str(bits): int(counts[bits]) for bits in np.flatnonzero(counts)}


def _subject_streams(sources: Sequence[_Source], count: int, first_row: int, end_row: int) -> list[Stream]:
    def each(read: Callable[[Rows, int, int], Any]) -> Callable[[], Iterator[Any]]:
        def pieces() -> Iterator[Any]:
            for source in sources:
                for low, high, keep in source.pieces():
                    yield _kept(read(source.part, low, high), keep)

        return pieces

    streams = []
    if count != end_row - first_row:
        rows = each(lambda part, low, high: part.rows(np.arange(low, high)) - first_row)
        streams.append(Stream("row", "<u4", (count,), rows()))
    streams.append(Stream("presence", "<u2", (count,), each(lambda part, low, high: part.presence(low, high))()))
    groups = each(lambda part, low, high: part.group_sets(low, high))
    if any(piece.any() for piece in groups()):
        streams.append(Stream("group_set", "<u4", (count,), groups()))
    streams += _string_streams("subject_id", count, each(lambda part, low, high: part.subject_ids(low, high)))
    encounters = _string_streams("encounter_id", count, each(lambda part, low, high: part.encounter_ids(low, high)))
    if encounters[1].shape[0]:
        streams += encounters
    again = np.unique(np.concatenate([np.zeros(0, np.uint64), *(source.part.again for source in sources)]))
    if len(again):
        streams.append(Stream("again", "<u8", (len(again),), [again]))
    return streams


def _codec_for(
    name: str, parts: Sequence[Rows], known: Sequence[Rows], transform: ColumnTransform | None = None
) -> Codec | None:
    """The codec that a column has where it has most cells; a new one where it has none, one that was made from too little, or one of another
    turn."""
    columns = [part.columns[name] for part in parts if name in part.columns]
    if columns[0].dimension is None:
        return None
    columns_of_all = [part.columns[name] for part in known if name in part.columns]
    coded = [
        c
        for c in columns_of_all
        if c.codec is not None and transform_id_of(c.codec.transform) == transform_id_of(transform)
    ]
    codec = max(coded, key=lambda column: column.count).codec if coded else None
    if codec is not None and not (codec.provisional and sum(c.count for c in columns) >= TRAINING_ROWS_MIN):
        return codec
    samples, wanted = [], TRAINING_ROWS_MAX
    for column in columns:
        samples.append(column.vectors(0, min(wanted, column.count)))
        wanted -= len(samples[-1])
    return make_codec(columns[0].dimension, samples, transform)


def _column_streams(
    name: str, sources: Sequence[_Source], count: int, codec: Codec | None
) -> tuple[dict[str, Any], list[Stream], list[Stream]]:
    """(`about`, the arrays of the column's file, the arrays of its rest)."""
    holding = [(source, source.part.columns[name]) for source in sources if name in source.part.columns]
    dimension = holding[0][1].dimension

    def each(read: Callable[[Column, int, int], Any]) -> Callable[[], Iterator[Any]]:
        def pieces() -> Iterator[Any]:
            for source, column in holding:
                for low in range(0, column.count, PIECE_ROWS):
                    high = min(low + PIECE_ROWS, column.count)
                    keep = None if source.keep is None else source.keep[column.positions(low, high)]
                    yield _kept(read(column, low, high), keep)

        return pieces

    def positions() -> Iterator[Int64]:
        for source, column in holding:
            for low in range(0, column.count, PIECE_ROWS):
                at = column.positions(low, min(low + PIECE_ROWS, column.count))
                yield source.new_positions(at if source.keep is None else at[source.keep[at]])

    cells = sum(len(piece) for piece in positions())
    streams = []
    if cells != count:
        streams.append(Stream("position", "<u4", (cells,), positions()))
    about: dict[str, Any] = {"cells": cells, "dimension": dimension}
    rest = []
    if codec is not None:
        scanned, rotating = codec.scanned, codec
        about["codec"] = codec.card()
        codes = each(lambda c, low, high: c.coded(rotating, low, high)[0])
        norms = each(lambda c, low, high: c.coded(rotating, low, high)[1])
        blocks = blocks_of(cells)
        filler = np.zeros(blocks * BLOCK_ROWS - cells, np.float32)
        streams.append(Stream("rotation", "<f4", codec.rotation.shape, [codec.stored_rotation]))
        bits = (blocks, scanned // STEP, BLOCK_ROWS)
        streams.append(Stream("sign", "|u1", bits, bit_blocks(sign_bits(piece, scanned) for piece in codes())))
        streams.append(Stream("outer", "|u1", bits, bit_blocks(outer_bits(piece, scanned) for piece in codes())))
        higher = (high_nibbles(piece, scanned) for piece in codes())
        streams.append(Stream("high", "|u1", (cells, scanned // 2), higher))
        streams.append(Stream("norm", "<f4", (blocks * BLOCK_ROWS,), chain(norms(), [filler])))
        lower = (low_nibbles(piece, scanned) for piece in codes())
        rest.append(Stream("rest", "|u1", (cells, codec.rest_bytes), lower))
    quality = each(lambda c, low, high: c.quality(low, high))
    if not all(np.isnan(piece).all() for piece in quality()):
        streams.append(Stream("quality", "<f4", (cells,), quality()))
    minutiae = _string_streams("minutiae", cells, each(lambda c, low, high: c.minutiae(low, high)))
    if minutiae[1].shape[0]:
        streams += minutiae
    return about, streams, rest


def _answer_files(answers: Sequence[Answers]) -> Iterator[tuple[str, dict[str, Any], list[Stream]]]:
    """For each file of stored answers its kind, what it says of itself, and its arrays. None where there are no answers."""
    count = sum(a.count for a in answers)
    if not count:
        return
    outcomes = sum((Counter(dict(a.outcomes)) for a in answers), Counter[str]())
    about = {"encounters": count, "outcomes": dict(sorted(outcomes.items()))}
    yield ENCOUNTER, about, _answer_streams(answers, count)
    bases = np.cumsum([0, *(a.count for a in answers)])
    found = [(a.lookup(), _Shift(int(b))) for a, b in zip(answers, bases, strict=False)]
    yield ENCOUNTER + LOOKUP, {}, _lookup_streams(found, count)


def _answer_streams(answers: Sequence[Answers], count: int) -> list[Stream]:
    def each(read: Callable[[Answers, int, int], Packed]) -> Callable[[], Iterator[Packed]]:
        def pieces() -> Iterator[Packed]:
            for some in answers:
                for low in range(0, some.count, PIECE_ROWS):
                    yield read(some, low, min(low + PIECE_ROWS, some.count))

        return pieces

    return [
        *_string_streams("encounter_id", count, each(lambda a, low, high: a.ids(low, high))),
        *_string_streams("digest", count, each(lambda a, low, high: a.digests(low, high))),
        *_string_streams("answer", count, each(lambda a, low, high: a.texts(low, high))),
    ]


def _string_streams(name: str, count: int, pieces: Callable[[], Iterator[Packed]]) -> list[Stream]:
    def offsets() -> Iterator[Int64]:
        yield np.zeros(1, np.int64)
        end = 0
        for piece in pieces():
            ends = packed.to_arrays(piece)[0][1:] + end
            end = int(ends[-1]) if len(ends) else end
            yield ends

    total = sum(int(packed.to_arrays(piece)[0][-1]) for piece in pieces())
    data = (packed.to_arrays(piece)[1] for piece in pieces())
    return [Stream(f"{name}.offset", "<i8", (count + 1,), offsets()), Stream(f"{name}.bytes", "|u1", (total,), data)]


class _Shift:
    """As a `_Source` of which every row is kept: positions in a look-up move by `base`."""

    keep = None

    def __init__(self, base: int) -> None:
        self._base = base

    def new_positions(self, positions: NDArray[Any]) -> Int64:
        return positions.astype(np.int64) + self._base


_Lookup = tuple[NDArray[np.uint64], NDArray[np.uint32]]


def _lookup_streams(lookups: Sequence[tuple[_Lookup, _Source | _Shift]], count: int) -> list[Stream]:
    """Merges look-ups range by range of the hash, so that memory is bounded by the range."""
    bounds = np.linspace(0, 2.0**64, -(-count // _LOOKUP_ROWS) + 1)[1:-1].astype(np.uint64)
    cuts = [[0, *np.searchsorted(hashes, bounds).tolist(), len(hashes)] for (hashes, _), _ in lookups]

    def merged(which: int) -> Iterator[NDArray[Any]]:
        for i in range(len(bounds) + 1):
            keys, values = [], []
            for ((hashes, positions), source), cut in zip(lookups, cuts, strict=True):
                some, at = hashes[cut[i] : cut[i + 1]], positions[cut[i] : cut[i + 1]]
                if source.keep is not None:
                    some, at = some[source.keep[at]], at[source.keep[at]]
                keys.append(some)
                values.append(source.new_positions(at))
            key, value = np.concatenate(keys), np.concatenate(values)
            yield (key, value)[which][np.lexsort((value, key))]

    return [Stream("hash", "<u8", (count,), merged(0)), Stream("position", "<u4", (count,), merged(1))]


def _kept(values: Any, keep: NDArray[np.bool_] | None) -> Any:
    if keep is None:
        return values
    return values[keep] if isinstance(values, np.ndarray) else values.filter(keep)
