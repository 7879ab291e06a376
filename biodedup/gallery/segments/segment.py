"""A segment: sealed rows in immutable files, one file for each column.

Owns which arrays the files hold, and how a segment is written from other parts: sealing the tail, loading in bulk and merging
segments are one function. Never decides when, and never touches the manifest.

Files of segment 12 (FORMAT.md): `12.subject`, `12.encounter`, two a column (`12.face` holds what a scan reads, `12.face.rest`
the lower halves of its codes), and two that are derived and can be rebuilt: `12.subject.lookup`, `12.encounter.lookup`.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute
from numpy.typing import NDArray

from biodedup.errors import BiodedupError, EngineClosed, GalleryDamaged
from biodedup.gallery.answers import StoredDecision
from biodedup.gallery.files import packed
from biodedup.gallery.files.codec import TRAINING_ROWS_MAX, TRAINING_ROWS_MIN, Codec, make_codec
from biodedup.gallery.files.codes import BLOCK_ROWS, STEP, Codes, joined, lower_halves, plane_shape, planes
from biodedup.gallery.files.column_file import BLOCK_BYTES, ColumnFile, Stream, open_column_file, write_column_file
from biodedup.gallery.files.filesystem import NEW_SUFFIX, ODD_CONTENT, Storage
from biodedup.gallery.files.packed import Packed
from biodedup.gallery.segments.part import PIECE_ROWS, Answers, Column, Int64, Rows, sorted_lookup
from biodedup.gallery.segments.tail import cells_of
from biodedup.values import COLUMNS, Float32

SUBJECT, ENCOUNTER, LOOKUP, REST = "subject", "encounter", ".lookup", ".rest"
DERIVED = (SUBJECT + LOOKUP, ENCOUNTER + LOOKUP)

_DIMENSION_MAX = 1 << 16
_ANSWER_BYTES_MAX = 1 << 26
"""Of one answer's JSON: a decision has some kilobytes."""
_REST_BLOCK_BYTES = 1 << 12  # the rests of single rows are read, from anywhere
_LOOKUP_ROWS = 1 << 20  # entries of a look-up sorted at once


_KINDS = (SUBJECT, ENCOUNTER, *DERIVED, *COLUMNS, *(column + REST for column in COLUMNS))
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")


def file_name(number: int, kind: str) -> str:
    """kind: `subject`, `encounter`, a column, or one of DERIVED."""
    return f"{number}.{kind}"


def number_of(name: str) -> int | None:
    """The segment that a file is of, by its name, finished or in the making; None for a file that is not ours."""
    number, _, kind = name.removesuffix(NEW_SUFFIX).partition(".")
    return int(number) if _NUMBER.fullmatch(number) and kind in _KINDS else None


def unused_number(storage: Storage, folder: Path, number: int) -> int:
    """The first one from `number` on of which no file is there."""
    taken = {number_of(name) for name in storage.list_names(folder) or ()}
    while number in taken:
        number += 1
    return number


@dataclass(frozen=True)
class SegmentEntry:
    """A segment as the manifest names it. files: kind -> digest."""

    number: int
    first_row: int
    end_row: int
    files: Mapping[str, str]

    def __post_init__(self) -> None:
        """Raises GalleryDamaged for what no writer of ours wrote: names of files are made of it."""
        whole = all(type(number) is int for number in (self.number, self.first_row, self.end_row))
        named = isinstance(self.files, Mapping) and all(type(digest) is str for digest in self.files.values())
        if not (whole and named and self.number >= 1 and 0 <= self.first_row <= self.end_row):
            raise GalleryDamaged("the manifest names a segment that cannot be; run `biodedup doctor`")
        lacking = {SUBJECT, SUBJECT + LOOKUP} - set(self.files)
        if ENCOUNTER in self.files:
            lacking |= {ENCOUNTER + LOOKUP} - set(self.files)
        if lacking or not set(self.files) <= set(_KINDS):
            raise GalleryDamaged(
                f"the manifest names other files of segment {self.number} than it has; run `biodedup doctor`"
            )


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
        self._ids = _Strings(subject, "subject_id", self.count, text=True)
        with_encounters = "encounter_id.offset" in subject
        self._encounter_ids = _Strings(subject, "encounter_id", self.count, text=True) if with_encounters else None
        _check_lookup(files[SUBJECT + LOOKUP], self.count)
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
        if (answers := self.__dict__.pop("answers", None)) is not None and answers.count:
            strings += [answers._ids, answers._digests, answers._texts]
        for one in strings:
            if one is not None:
                one.__dict__.pop("_whole", None)
        for file in self.files.values():
            file.close()

    @cached_property
    def columns(self) -> Mapping[str, SegmentColumn]:
        files = self.files
        return {n: SegmentColumn(files[n], files.get(n + REST), self.count) for n in COLUMNS if n in files}

    @cached_property
    def answers(self) -> SegmentAnswers:
        return SegmentAnswers(self.files)

    @property
    def byte_count(self) -> int:
        return sum(file.byte_count for file in self.files.values())

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
        return _find(self.files[SUBJECT + LOOKUP], self._ids, subject_id, hashed)

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
        return _read_lookup(self.files[SUBJECT + LOOKUP], self.count)


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
        self._positions_sound = False
        if self.full and self.count != row_count:
            raise file.damaged(f"{self.count} templates, wanted {row_count}")
        if not self.full:
            file.expect("position", "<u4", (self.count,))
        if "quality" in file:
            file.expect("quality", "<f4", (self.count,))
        self._minutiae = _Strings(file, "minutiae", self.count) if "minutiae.offset" in file else None
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
        shape = plane_shape(count, scanned)
        file.expect("rotation", "<f4", (padded, dimension))
        file.expect("plane", "|u1", shape)
        file.expect("norm", "<f4", (shape[0] * BLOCK_ROWS,))
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

    @cached_property
    def codec(self) -> Codec | None:
        """None for a column of minutiae alone, and for one of format 2."""
        card = self._file.about.get("codec")
        if card is None:
            return None
        try:
            return Codec.from_card(card, self._file.read("rotation"))
        except ODD_CONTENT as error:
            if isinstance(error, BiodedupError):
                raise
            raise self._file.damaged("what it says of its codec") from error

    def vectors(self, low: int, high: int) -> Float32:
        if self.dimension is None:
            return np.zeros((high - low, 0), np.float32)
        if self.codec is None:
            return _scaled(self._file.read("code", low, high), self._file.read("scale", low, high))
        return self.codec.decode(*self._codes(low, high))

    def vectors_at(self, cells: Int64) -> Float32:
        if self.dimension is None:
            return np.zeros((len(cells), 0), np.float32)
        if self.codec is None:
            return _scaled(self._file.take("code", cells), self._file.take("scale", cells))
        return self.codec.decode(*self.codes_at(cells))

    def coded(self, codec: Codec, low: int, high: int) -> tuple[Codes, Float32]:
        if self.codec is None or self.codec.codec_id != codec.codec_id:
            return codec.encode(self.vectors(low, high))
        return self._codes(low, high)

    def plane(self, low: int, high: int) -> tuple[Codes, Float32]:
        first, last = low // BLOCK_ROWS, -(-high // BLOCK_ROWS)
        norms: Float32 = self._file.read("norm", first * BLOCK_ROWS, last * BLOCK_ROWS)
        return self._file.read("plane", first, last), norms

    def codes_at(self, cells: Int64) -> tuple[Codes, Float32]:
        assert self._rest is not None, "a column with a codec has a rest"
        self._rest.check_rows("rest", cells)
        self._file.check_rows("plane", cells // BLOCK_ROWS)
        codes = joined(self._file.unchecked("plane"), self._rest.unchecked("rest"), cells)
        return codes, self._lengths(self._file.take("norm", cells))

    def check_lengths(self) -> None:
        """Raises GalleryDamaged where a vector has no length, which no checksum tells."""
        for low in range(0, self.count if self.codec is not None else 0, PIECE_ROWS):
            self._lengths(self._file.read("norm", low, min(low + PIECE_ROWS, self.count)))

    def _lengths(self, norms: Float32) -> Float32:
        """As they are, if vectors can be divided by them."""
        if not ((norms > 0) & (norms < np.inf)).all():
            raise self._file.damaged("a vector has no length")
        return norms

    @property
    def byte_counts(self) -> tuple[int, int]:
        return self._file.byte_count, 0 if self._rest is None else self._rest.byte_count

    def release(self, *, forget: bool) -> None:
        if self._rest is not None:
            self._rest.release(forget=forget)

    def _codes(self, low: int, high: int) -> tuple[Codes, Float32]:
        assert self._rest is not None, "a column with a codec has a rest"
        first = low // BLOCK_ROWS * BLOCK_ROWS
        plane, norms = self.plane(low, high)
        rest = self._rest.read("rest", low, high)
        cells = np.arange(low, high)
        return joined(plane, rest, cells - first, low - first), self._lengths(norms[low - first : high - first])

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
            self._ids = _Strings(self._file, "encounter_id", self.count, text=True)
            self._digests, self._texts = (_Strings(self._file, n, self.count) for n in ("digest", "answer"))
            _check_lookup(self._lookup, self.count)

    def find(self, encounter_id: str, hashed: np.uint64) -> StoredDecision | None:
        if not self.count:
            return None
        found = _find(self._lookup, self._ids, encounter_id, hashed)
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
        return _read_lookup(self._lookup, self.count)


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
    pieces = (array[low : low + _LOOKUP_ROWS + 1] for low in range(0, len(array), _LOOKUP_ROWS))
    return int(array[-1]) < bound and all((piece[1:] > piece[:-1]).all() for piece in pieces)


def _check_lookup(file: ColumnFile, count: int) -> None:
    file.expect("hash", "<u8", (count,))
    file.expect("position", "<u4", (count,))


def _read_lookup(file: ColumnFile, count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    hashes, positions = file.read("hash"), file.read("position")
    if len(positions) and int(positions.max()) >= count:
        raise file.damaged("it points outside its segment")
    named = np.zeros(count, bool)
    named[positions] = True
    if not named.all():
        raise file.damaged("it names a row twice")
    return hashes, positions


def _scaled(codes: NDArray[np.int8], scales: Float32) -> Float32:
    """The vectors of format 2."""
    vectors: Float32 = codes.astype(np.float32)
    vectors *= scales[:, None]
    return vectors


def _range(ascending: NDArray[np.uint32], bounds: Int64) -> Int64:
    """Where bounds fall; of the array's own type, lest all of it be converted."""
    return np.searchsorted(ascending, bounds.astype(ascending.dtype))


class _Strings:
    """Byte strings in two arrays of a file."""

    def __init__(self, file: ColumnFile, name: str, count: int, *, text: bool = False) -> None:
        self._file = file
        self._offset, self._bytes = f"{name}.offset", f"{name}.bytes"
        self._text = text
        file.expect(self._offset, "<i8", (count + 1,))
        self._size = file.shape(self._bytes)[0] if self._bytes in file else 0
        file.expect(self._bytes, "|u1", (self._size,))

    def slice(self, low: int, high: int) -> Packed:
        offsets = self._file.read(self._offset, low, high + 1)
        if not (len(offsets) and 0 <= offsets[0] and offsets[-1] <= self._size and (np.diff(offsets) >= 0).all()):
            raise self._file.damaged(f"places in its array {self._bytes} that are not there")
        strings = packed.from_arrays(offsets, self._file.read(self._bytes, int(offsets[0]), int(offsets[-1])))
        if self._text and not packed.is_text(strings):
            raise self._file.damaged(f"its array {self._bytes} is no text")
        return strings

    def take(self, indices: Int64) -> Packed:
        ends = self._file.take(self._offset, np.concatenate([indices, indices + 1])).reshape(2, -1)
        self._file.check_spans(self._bytes, ends[0], ends[1])
        return self._whole.take(indices)

    def texts(self, indices: Int64) -> list[str]:
        if len(indices) > 64:
            some = self.take(indices)
            if not packed.is_text(some):
                raise self._file.damaged(f"its array {self._bytes} is no text")
            return packed.text(some)
        # of a few, quicker than by way of Arrow
        starts, ends = self._file.take(self._offset, np.concatenate([indices, indices + 1])).reshape(2, -1)
        self._file.check_spans(self._bytes, starts, ends)
        content = self._file.unchecked(self._bytes)
        try:
            return [
                content[start:end].tobytes().decode() for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
            ]
        except UnicodeDecodeError:
            raise self._file.damaged(f"its array {self._bytes} is no text") from None

    @cached_property
    def _whole(self) -> Packed:
        offsets = self._file.unchecked(self._offset)
        if not 0 <= offsets[0] <= offsets[-1] <= self._size:
            raise self._file.damaged(f"places in its array {self._bytes} that are not there")
        return packed.from_whole(offsets, self._file.unchecked(self._bytes))


def _find(file: ColumnFile, strings: _Strings, wanted: str, target: np.uint64) -> list[int]:
    """Indices of a string of this hash, by interpolation: hashes are uniform, so that their place is known to within a few
    square roots."""
    count = file.shape("hash")[0]
    guess, reach = int(target) * count >> 64, 8 * isqrt(count) + 64
    low, high = max(guess - reach, 0), min(guess + reach, count)
    near = file.read("hash", low, high)
    first = int(near.searchsorted(target))
    if (first == 0 and low > 0) or (first == len(near) and high < count):
        low, near = 0, file.read("hash")
        first = int(near.searchsorted(target))
    if first == len(near) or near[first] != target:
        return []
    last = int(near.searchsorted(target, "right"))
    if last == len(near) and low + last < count:  # equal hashes at the window's end
        last = int(file.read("hash").searchsorted(target, "right")) - low
    indices = file.read("position", low + first, low + last).astype(np.int64)
    names = strings.texts(indices)
    return [i for i, name in zip(indices.tolist(), names, strict=True) if name == wanted]


# writing ---------------------------------------------------------------------------------------------------------


class Abandoned(EngineClosed):
    """Writing was told to stop."""


@dataclass(frozen=True)
class _Source:
    """One part of what is written. keep: bool (count,), or None for all; base: rows kept of the parts before it."""

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
        """Where kept positions come to lie."""
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
) -> SegmentEntry:
    """Writes adjacent parts as one segment, synced, and returns what the manifest shall say of it.

    keeps: which rows of each part are kept, bool (count,); None for all. others: parts whose codecs it shall have. Raises Abandoned when go_on turns false; then, and
    after any other error, files may be left that no manifest names.
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
    for name in COLUMNS:
        if any(name in part.columns for part in parts):
            more, streams, rest = _column_streams(name, sources, base, _codec_for(name, parts, [*others, *parts]))
            if more["cells"]:
                write(name, more, streams)
                if rest:
                    write(name + REST, {}, rest, _REST_BLOCK_BYTES)
    answers = [part.answers for part in parts]
    count = sum(a.count for a in answers)
    if count:
        outcomes = sum((Counter(dict(a.outcomes)) for a in answers), Counter[str]())
        write(
            ENCOUNTER,
            {"encounters": count, "outcomes": dict(sorted(outcomes.items()))},
            _answer_streams(answers, count),
        )
        bases = np.cumsum([0, *(a.count for a in answers)])
        found = [(a.lookup(), _Shift(int(b))) for a, b in zip(answers, bases, strict=False)]
        write(ENCOUNTER + LOOKUP, {}, _lookup_streams(found, count))
    storage.sync_folder(folder)
    return SegmentEntry(number, first_row, end_row, files)


def rebuild_lookup(storage: Storage, folder: Path, number: int, gallery_id: str, kind: str, exact: ColumnFile) -> str:
    """Writes a derived file anew from the exact one (`subject` or `encounter`); the same bytes as before. Returns its digest."""
    name = "subject_id" if kind == SUBJECT + LOOKUP else "encounter_id"
    count = exact.shape(f"{name}.offset")[0] - 1
    ids = _Strings(exact, name, count, text=True)
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


def _codec_for(name: str, parts: Sequence[Rows], known: Sequence[Rows]) -> Codec | None:
    """The codec that a column has where it has most cells; a new one where it has none, or one that was made from too little."""
    columns = [part.columns[name] for part in parts if name in part.columns]
    if columns[0].dimension is None:
        return None
    coded = [part.columns[name] for part in known if name in part.columns and part.columns[name].codec is not None]
    codec = max(coded, key=lambda column: column.count).codec if coded else None
    if codec is not None and not (codec.provisional and sum(c.count for c in columns) >= TRAINING_ROWS_MIN):
        return codec
    samples, wanted = [], TRAINING_ROWS_MAX
    for column in columns:
        samples.append(column.vectors(0, min(wanted, column.count)))
        wanted -= len(samples[-1])
    return make_codec(columns[0].dimension, samples)


def _column_streams(
    name: str, sources: Sequence[_Source], count: int, codec: Codec | None
) -> tuple[dict[str, Any], list[Stream], list[Stream]]:
    """What `about` says, the arrays of the column's file, and those of its rest."""
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
        scanned, turn = codec.scanned, codec
        about["codec"] = codec.card()
        codes = each(lambda c, low, high: c.coded(turn, low, high)[0])
        norms = each(lambda c, low, high: c.coded(turn, low, high)[1])
        shape = plane_shape(cells, scanned)
        filler = np.zeros(shape[0] * BLOCK_ROWS - cells, np.float32)
        streams.append(Stream("rotation", "<f4", codec.rotation.shape, [codec.rotation]))
        streams.append(Stream("plane", "|u1", shape, planes(codes(), scanned)))
        streams.append(Stream("norm", "<f4", (shape[0] * BLOCK_ROWS,), chain(norms(), [filler])))
        lower = (lower_halves(piece, scanned) for piece in codes())
        rest.append(Stream("rest", "|u1", (cells, codec.rest_bytes), lower))
    quality = each(lambda c, low, high: c.quality(low, high))
    if not all(np.isnan(piece).all() for piece in quality()):
        streams.append(Stream("quality", "<f4", (cells,), quality()))
    minutiae = _string_streams("minutiae", cells, each(lambda c, low, high: c.minutiae(low, high)))
    if minutiae[1].shape[0]:
        streams += minutiae
    return about, streams, rest


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
    """How the entries of a look-up move when everything is kept."""

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
