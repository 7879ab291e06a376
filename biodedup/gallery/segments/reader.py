"""Reads a segment: sealed rows in immutable files, one file for each column.

Owns the checks of what the files hold, and presents them as a `Part`. Never writes.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.compute
from numpy.typing import NDArray

from biodedup.errors import BiodedupError
from biodedup.gallery.answers import StoredDecision
from biodedup.gallery.files import packed
from biodedup.gallery.files.codec import Codec
from biodedup.gallery.files.codes import BLOCK_ROWS, STEP, Codes, blocks_of, join_nibbles
from biodedup.gallery.files.column_file import ColumnFile, open_column_file
from biodedup.gallery.files.filesystem import MALFORMED, Storage
from biodedup.gallery.files.packed import Packed
from biodedup.gallery.segments.layout import ENCOUNTER, LOOKUP, REST, SUBJECT, SegmentEntry, file_name, index_of
from biodedup.gallery.segments.part import PIECE_ROWS, Int64, ScannedRows
from biodedup.gallery.segments.stored_index import StoredIndex
from biodedup.gallery.segments.strings import StoredStrings, check_lookup, find_string, read_lookup
from biodedup.gallery.segments.tail import cells_of
from biodedup.values import COLUMNS, Float32

_DIMENSION_MAX = 1 << 16
_ANSWER_BYTES_MAX = 1 << 26
"""Of one answer's JSON: a decision has some kilobytes."""
_CHECKED_ROWS = 1 << 20
_SCANNED = ("sign", "outer", "high", "norm", "plane", "code", "scale")


def open_segment(storage: Storage, folder: Path, entry: SegmentEntry) -> Segment:
    """Raises GalleryDamaged where a file is absent, damaged or another one than the manifest's."""
    files = {}
    for kind, digest in entry.files.items():
        files[kind] = file = open_column_file(storage, folder / file_name(entry.number, kind))
        if file.digest != digest:
            raise file.damaged("it is another file than the manifest names")
    return Segment(entry, files)


class Segment:
    """An open segment, as a `Part`."""

    def __init__(self, entry: SegmentEntry, files: Mapping[str, ColumnFile]) -> None:
        self.entry = entry
        self.first_row, self.end_row = entry.first_row, entry.end_row
        self.files = files
        self._subject = subject = files[SUBJECT]
        self.count = subject.shape("presence")[0] if "presence" in subject else -1
        subject.expect("presence", "<u2", (self.count,))
        if self._dense and self.count != self.end_row - self.first_row:
            raise subject.damaged(f"{self.count} rows, wanted {self.end_row - self.first_row}")
        for name in ("row", "group_set"):
            if name in subject:
                subject.expect(name, "<u4", (self.count,))
        self.bits: Mapping[int, int] = _presences(subject, self.count)
        self._ids = StoredStrings(subject, "subject_id", self.count, text=True)
        with_encounters = "encounter_id.offset" in subject
        self._encounter_ids = StoredStrings(subject, "encounter_id", self.count, text=True) if with_encounters else None
        check_lookup(files[SUBJECT + LOOKUP], self.count)
        self._rows_sound = False
        for name, column in self.columns.items():
            if column.count != sum(count for bits, count in self.bits.items() if bits >> COLUMNS.index(name) & 1):
                raise files[name].damaged("it has another number of templates than its segment says")
        _ = self.answers

    def close(self) -> None:
        """Releases the files at once; see `ColumnFile.close`."""
        strings = [self._ids, self._encounter_ids]
        if (columns := self.__dict__.pop("columns", None)) is not None:
            for column in columns.values():
                strings.append(column._minutiae)
                if column.index is not None:
                    column.index.close()
        if (answers := self.__dict__.pop("answers", None)) is not None and answers.count:
            strings += [answers._ids, answers._digests, answers._texts]
        for stored in strings:
            if stored is not None:
                stored.__dict__.pop("_whole", None)
        for file in self.files.values():
            file.close()

    @cached_property
    def columns(self) -> Mapping[str, SegmentColumn]:
        files = self.files
        columns = {n: SegmentColumn(files[n], files.get(n + REST), self.count) for n in COLUMNS if n in files}
        for kind, file in files.items():
            if (which := index_of(kind)) is not None:
                if (column := columns.get(which[0])) is None:
                    raise file.damaged("it is the index of a column that the segment has not")
                column.index = StoredIndex(file, which[1], column.count, column.dimension)
        return columns

    @cached_property
    def answers(self) -> SegmentAnswers:
        return SegmentAnswers(self.files)

    @property
    def byte_count(self) -> int:
        return sum(file.byte_count for file in self.files.values())

    @property
    def scanned_bytes(self) -> int:
        """Of what scans of all columns read."""
        return sum(column.scanned_bytes for column in self.columns.values())

    @property
    def _dense(self) -> bool:
        return "row" not in self._subject

    def rows(self, positions: Int64) -> Int64:
        if self._dense:
            return positions + self.first_row
        return self._subject.take("row", positions).astype(np.int64) + self.first_row

    def _all_rows(self) -> NDArray[np.uint32]:
        rows = self._subject.read("row")
        if not self._rows_sound:
            if not _ascending_below(rows, self.end_row - self.first_row):
                raise self._subject.damaged("its rows are out of order")
            self._rows_sound = True
        return rows

    def at(self, rows: Int64) -> Int64:
        if self._dense:
            return rows - self.first_row
        return cells_of(self._all_rows(), rows - self.first_row)

    def position_range(self, low_row: int, high_row: int) -> tuple[int, int]:
        inside = np.clip((low_row - self.first_row, high_row - self.first_row), 0, self.end_row - self.first_row)
        low, high = inside if self._dense else _range(self._all_rows(), inside)
        return int(low), int(high)

    def presence(self, low: int, high: int) -> NDArray[np.uint16]:
        return self._subject.read("presence", low, high)

    def group_sets(self, low: int, high: int) -> NDArray[np.uint32]:
        if "group_set" in self._subject:
            return self._subject.read("group_set", low, high)
        return np.zeros(min(high, self.count) - low, np.uint32)

    def subject_ids(self, low: int, high: int) -> Packed:
        return self._ids.slice(low, high)

    def subject_ids_at(self, positions: Int64) -> list[str]:
        return self._ids.texts(positions)

    def encounter_ids(self, low: int, high: int) -> Packed:
        if self._encounter_ids is None:
            return packed.empties(high - low)
        return self._encounter_ids.slice(low, high)

    def find(self, subject_id: str, hashed: np.uint64) -> list[int]:
        return find_string(self.files[SUBJECT + LOOKUP], self._ids, subject_id, hashed)

    def find_all(self, subject_ids: Packed, hashes: NDArray[np.uint64]) -> tuple[Int64, Int64]:
        file = self.files[SUBJECT + LOOKUP]
        known = file.read("hash")
        order = np.argsort(hashes, kind="stable")  # ascending probes walk through the look-up once
        first = np.searchsorted(known, hashes[order])
        there = np.flatnonzero(known[np.minimum(first, len(known) - 1)] == hashes[order]) if len(known) else first[:0]
        first, which = first[there], order[there]
        counts = np.searchsorted(known, hashes[which], "right") - first
        which, places = np.repeat(which, counts), np.repeat(first, counts)
        places += np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
        positions = file.take("position", places).astype(np.int64)
        if len(which):  # two strings share a hash once in 2^64 pairs
            same = pyarrow.compute.equal(self._ids.take(positions), subject_ids.take(which))
            same = same.to_numpy(zero_copy_only=False)
            which, positions = which[same], positions[same]
        return which, positions

    @property
    def again(self) -> NDArray[np.uint64]:
        return self._subject.read("again") if "again" in self._subject else np.zeros(0, np.uint64)

    def lookup(self) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        return read_lookup(self.files[SUBJECT + LOOKUP], self.count)


class SegmentColumn:
    """A column of a `Segment`."""

    def __init__(self, file: ColumnFile, rest: ColumnFile | None, row_count: int) -> None:
        self._file = file
        self._rest = rest
        self._row_count = row_count
        self.count: int = _number(file, "cells", row_count)
        self.dimension: int | None = None
        if file.about.get("dimension") is not None:
            self.dimension = _number(file, "dimension", _DIMENSION_MAX)
        self.full = "position" not in file
        self.index: StoredIndex | None = None
        self._positions_sound = False
        self._interleaved = "plane" in file  # formats 3 and 4
        if self.full and self.count != row_count:
            raise file.damaged(f"{self.count} templates, wanted {row_count}")
        if not self.full:
            file.expect("position", "<u4", (self.count,))
        if "quality" in file:
            file.expect("quality", "<f4", (self.count,))
        self._minutiae = StoredStrings(file, "minutiae", self.count) if "minutiae.offset" in file else None
        self._check_vectors()

    def _check_vectors(self) -> None:
        file, count, dimension, card = self._file, self.count, self.dimension, self._file.about.get("codec")
        if dimension is None or card is None:
            if dimension is not None:  # of format 2
                file.expect("code", "|i1", (count, dimension))
                file.expect("scale", "<f4", (count,))
            elif card is not None:
                raise file.damaged("a codec without vectors")
            return
        padded, scanned = -(-dimension // STEP) * STEP, card.get("scanned") if type(card) is dict else None
        if type(scanned) is not int or not STEP <= scanned <= padded or scanned % STEP:
            raise file.damaged("what it says of its codec")
        blocks = blocks_of(count)
        file.expect("rotation", "<f4", (padded, dimension))
        file.expect("norm", "<f4", (blocks * BLOCK_ROWS,))
        if self._interleaved:
            file.expect("plane", "|u1", (blocks, scanned // STEP, 4 * BLOCK_ROWS))
        else:
            for name in ("sign", "outer"):
                file.expect(name, "|u1", (blocks, scanned // STEP, BLOCK_ROWS))
            file.expect("high", "|u1", (count, scanned // 2))
        if self._rest is None:
            raise file.damaged("its rest is missing")
        self._rest.expect("rest", "|u1", (count, padded - scanned // 2))

    def _all_positions(self) -> NDArray[np.uint32]:
        positions = self._file.read("position")
        if not self._positions_sound:
            if not _ascending_below(positions, self._row_count):
                raise self._file.damaged("its templates are out of order")
            self._positions_sound = True
        return positions

    def cell_range(self, low: int, high: int) -> tuple[int, int]:
        if self.full:
            return low, high
        first, last = _range(self._all_positions(), np.array((low, high)))
        return int(first), int(last)

    def cells_at(self, positions: Int64) -> Int64:
        return positions if self.full else cells_of(self._all_positions(), positions)

    def positions(self, low: int, high: int) -> Int64:
        return np.arange(low, high) if self.full else self._all_positions()[low:high].astype(np.int64)

    @property
    def codec(self) -> Codec | None:
        """None for a column of minutiae alone, and for one of an older format, whose vectors are compared as they are."""
        return None if self._interleaved else self._stored_codec

    @cached_property
    def _stored_codec(self) -> Codec | None:
        card = self._file.about.get("codec")
        if card is None:
            return None
        try:
            transform = None if "turn" not in card else self._file.transforms(card["turn"]).of(self._file.about["kind"])
            return Codec.from_card(card, self._file.read("rotation"), transform)
        except MALFORMED as error:
            if isinstance(error, BiodedupError):
                raise
            raise self._file.damaged("what it says of its codec") from error

    @property
    def transform_id(self) -> str | None:
        """Of the transform that its vectors are stored with, "" without one; None where it has no vectors. Needs no key."""
        return None if self.dimension is None else str((self._file.about.get("codec") or {}).get("turn", ""))

    def vectors(self, low: int, high: int) -> Float32:
        if self.dimension is None:
            return np.zeros((high - low, 0), np.float32)
        if self._stored_codec is None:
            return _scaled(self._file.read("code", low, high), self._file.read("scale", low, high))
        return self._stored_codec.decode(*self._codes(low, high))

    def vectors_at(self, cells: Int64) -> Float32:
        if self.dimension is None:
            return np.zeros((len(cells), 0), np.float32)
        if self._stored_codec is None:
            return _scaled(self._file.take("code", cells), self._file.take("scale", cells))
        return self._stored_codec.decode(*self.codes_at(cells))

    def coded(self, codec: Codec, low: int, high: int) -> tuple[Codes, Float32]:
        if self._stored_codec is None or self._stored_codec.codec_id != codec.codec_id:
            return codec.encode(self.vectors(low, high))
        return self._codes(low, high)

    def scanned(self, low: int, high: int) -> ScannedRows:
        first, last = low // BLOCK_ROWS, blocks_of(high)
        start, end = first * BLOCK_ROWS, last * BLOCK_ROWS
        nibbles = self._file.read("high", start, min(end, self.count))
        norms = self._file.read("norm", start, end)
        signs, outer = (self._file.read(name, first, last) for name in ("sign", "outer"))
        return ScannedRows(signs, outer, nibbles, norms, self._norm_min)

    @cached_property
    def _norm_min(self) -> float:
        pieces = range(0, self.count, _CHECKED_ROWS)
        norms = (self._file.read("norm", low, min(low + _CHECKED_ROWS, self.count)) for low in pieces)
        return min(float(self._lengths(piece).min()) for piece in norms)

    def codes_at(self, cells: Int64) -> tuple[Codes, Float32]:
        assert self._rest is not None, "a column with a codec has a rest"
        rest = self._rest.take("rest", cells)
        if self._interleaved:
            self._file.check_rows("plane", cells // BLOCK_ROWS)
            high = _from_plane(self._file.unchecked("plane"), cells)
        else:
            self._file.check_rows("high", cells)
            high = self._file.unchecked("high")[cells]
        codes = join_nibbles(high, rest)
        return codes, self._lengths(self._file.take("norm", cells))

    def check_lengths(self) -> None:
        """Raises GalleryDamaged where a vector has no length, which no checksum tells."""
        for low in range(0, self.count if self._stored_codec is not None else 0, PIECE_ROWS):
            self._lengths(self._file.read("norm", low, min(low + PIECE_ROWS, self.count)))

    def _lengths(self, norms: Float32) -> Float32:
        """As they are, if vectors can be divided by them."""
        if not ((norms > 0) & (norms < np.inf)).all():
            raise self._file.damaged("a vector has no length")
        return norms

    @property
    def byte_counts(self) -> tuple[int, int]:
        return self._file.byte_count, 0 if self._rest is None else self._rest.byte_count

    @property
    def scanned_bytes(self) -> int:
        """Of the arrays that a scan of all rows reads, and of an index that is searched in their place."""
        scanned = sum(self._file.size_of(name) for name in _SCANNED if name in self._file)
        return scanned + (0 if self.index is None else self.index.byte_count)

    def release(self, *, forget: bool) -> None:
        if self._rest is not None:
            self._rest.release(forget=forget)

    def _codes(self, low: int, high: int) -> tuple[Codes, Float32]:
        if self._interleaved:
            return self.codes_at(np.arange(low, high))
        assert self._rest is not None, "a column with a codec has a rest"
        codes = join_nibbles(self._file.read("high", low, high), self._rest.read("rest", low, high))
        return codes, self._lengths(self._file.read("norm", low, high))

    def quality(self, low: int, high: int) -> Float32:
        if "quality" in self._file:
            return self._file.read("quality", low, high)
        return np.full(high - low, np.nan, np.float32)

    def minutiae(self, low: int, high: int) -> Packed:
        return packed.pack([b""] * (high - low)) if self._minutiae is None else self._minutiae.slice(low, high)

    def minutiae_at(self, cells: Int64) -> list[bytes]:
        if self._minutiae is None:
            return [b""] * len(cells)
        records: list[bytes] = self._minutiae.take(cells).to_pylist()
        return records


class SegmentAnswers:
    """The answers of a `Segment`."""

    def __init__(self, files: Mapping[str, ColumnFile]) -> None:
        self._file = files.get(ENCOUNTER)
        self.count = 0
        self.outcomes: Mapping[str, int] = {}
        if self._file is not None:
            self._lookup = files[ENCOUNTER + LOOKUP]
            self.count = _number(self._file, "encounters", self._file.byte_count)
            self.outcomes = _counts(self._file, "outcomes")
            self._ids = StoredStrings(self._file, "encounter_id", self.count, text=True)
            self._digests, self._texts = (StoredStrings(self._file, n, self.count) for n in ("digest", "answer"))
            check_lookup(self._lookup, self.count)

    def find(self, encounter_id: str, hashed: np.uint64) -> StoredDecision | None:
        if not self.count:
            return None
        found = find_string(self._lookup, self._ids, encounter_id, hashed)
        if not found:
            return None
        at = np.array([max(found)])  # the last answer: an encounter that was refused may have been sent again
        return StoredDecision.read(self._digests.take(at)[0].as_py(), self._inflated(self._texts.take(at)[0].as_py()))

    def _inflated(self, data: bytes) -> str:
        assert self._file is not None, "there are answers"
        inflating = zlib.decompressobj()
        try:
            text = inflating.decompress(data, _ANSWER_BYTES_MAX).decode()
        except (zlib.error, ValueError):
            raise self._file.damaged("an answer") from None
        if not inflating.eof:
            raise self._file.damaged(f"an answer that is cut short, or longer than {_ANSWER_BYTES_MAX:,} bytes")
        return text

    def ids(self, low: int, high: int) -> Packed:
        return self._ids.slice(low, high) if self.count else packed.pack([])

    def digests(self, low: int, high: int) -> Packed:
        return self._digests.slice(low, high) if self.count else packed.pack([])

    def texts(self, low: int, high: int) -> Packed:
        return self._texts.slice(low, high) if self.count else packed.pack([])

    def lookup(self) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        if not self.count:
            return np.zeros(0, np.uint64), np.zeros(0, np.uint32)
        return read_lookup(self._lookup, self.count)


def _number(file: ColumnFile, name: str, largest: int) -> int:
    """A count that a file states of itself."""
    value = file.about.get(name)
    if type(value) is not int or not 0 <= value <= largest:
        raise file.damaged(f"{name} {value!r:.40}, wanted at most {largest}")
    return value


def _counts(file: ColumnFile, name: str) -> dict[str, int]:
    counts = file.about.get(name)
    if type(counts) is not dict or not all(type(n) is int and n >= 0 for n in counts.values()):
        raise file.damaged(f"what it says of {name}")
    return counts


def _presences(file: ColumnFile, count: int) -> dict[int, int]:
    counts = _counts(file, "presence")
    presences = {int(bits): n for bits, n in counts.items() if bits.isascii() and bits.isdigit() and len(bits) < 6}
    if len(presences) != len(counts) or sum(counts.values()) != count or max(presences, default=0) >> len(COLUMNS):
        raise file.damaged("what it says of presence")
    return presences


def _ascending_below(array: NDArray[np.uint32], bound: int) -> bool:
    """Whether numbers rise and stay below a bound. In pieces, so that no second array of their size is made."""
    if not len(array):
        return True
    pieces = (array[low : low + _CHECKED_ROWS + 1] for low in range(0, len(array), _CHECKED_ROWS))
    return int(array[-1]) < bound and all((piece[1:] > piece[:-1]).all() for piece in pieces)


def _scaled(codes: NDArray[np.int8], scales: Float32) -> Float32:
    """The vectors of format 2."""
    vectors: Float32 = codes.astype(np.float32)
    vectors *= scales[:, None]
    return vectors


def _from_plane(plane: Codes, cells: Int64) -> Codes:
    """The high nibbles of some cells, as `codes.high_nibbles`, from the layout of formats 3 and 4."""
    words = plane.reshape(len(plane), -1, BLOCK_ROWS, STEP // 2)
    return np.ascontiguousarray(words[cells // BLOCK_ROWS, :, cells % BLOCK_ROWS]).reshape(len(cells), -1)


def _range(ascending: NDArray[np.uint32], bounds: Int64) -> Int64:
    """Where bounds fall; bounds get the array's type, so that the array is not converted."""
    return np.searchsorted(ascending, bounds.astype(ascending.dtype))
