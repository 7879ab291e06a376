"""The tail: the newest rows of a gallery, uncompressed in memory. The journal holds the same rows on disk.

Owns append-only arrays that readers use while one writer appends. Never reads or writes the disk. Its size is limited: a full tail is
sealed into a segment, and a new tail begins.

1. A reader uses a `TailPart` with a fixed number of rows. Rows that are appended later come after them. When an array grows, it is copied,
   and readers keep the old array.
2. Only the writer appends or rolls back. The gallery's lock ensures this.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biodedup.common import quality as quality_scale
from biodedup.gallery.answers import StoredDecision
from biodedup.gallery.files.codec import Codec
from biodedup.gallery.files.codes import Codes
from biodedup.gallery.files.packed import Packed, hash_of, hashes, pack, pack_text, text
from biodedup.gallery.segments.new_cells import NewCells, presence_of
from biodedup.gallery.segments.part import PIECE_ROWS, Int64, ScannedRows, sorted_lookup
from biodedup.gallery.segments.stored_index import StoredIndex
from biodedup.values import COLUMNS, Float32, Template


class GrowingArray:
    """An array with unused capacity along its first axis."""

    def __init__(self, dtype: type[np.generic], width: int | None = None) -> None:
        shape = (256,) if width is None else (256, width)
        self._data: NDArray[Any] = np.zeros(shape, dtype)
        self.count = 0

    def append(self, values: NDArray[Any]) -> None:
        needed = self.count + len(values)
        if needed > len(self._data):
            grown = np.zeros((max(needed, 2 * len(self._data)), *self._data.shape[1:]), self._data.dtype)
            grown[: self.count] = self._data[: self.count]
            self._data = grown
        self._data[self.count : needed] = values
        self.count = needed

    def view(self, count: int | None = None) -> NDArray[Any]:
        return self._data[: self.count if count is None else count]


class Tail:
    """The rows of the journal. first_row: the row at position 0."""

    def __init__(self, first_row: int) -> None:
        self.first_row = first_row
        self.subject_ids: list[str] = []
        self.encounter_ids: list[str] = []
        self.presence = GrowingArray(np.uint16)
        self.group_sets = GrowingArray(np.uint32)
        self.columns: dict[str, _Cells] = {}
        self.positions_of: dict[str, tuple[int, ...]] = {}
        self.repeated: list[tuple[int, int]] = []
        """(position, hash of the subject_id) of each row whose subject_id had a row already."""
        self.answers: dict[str, StoredDecision] = {}
        self._counted: tuple[int, dict[int, int]] = (0, {})
        """(the number of first rows that were counted, presence -> the number of these rows)."""

    def bits(self, count: int) -> dict[int, int]:
        """presence -> the number of the first `count` rows. The result is cached and extended, because every enrolment asks for it."""
        known, counts = self._counted
        if known > count:  # a reader of an older snapshot
            known, counts = 0, {}
        elif known == count:
            return counts
        more = np.bincount(self.presence.view(count)[known:])
        counts = dict(counts)
        for bits in np.flatnonzero(more).tolist():
            counts[bits] = counts.get(bits, 0) + int(more[bits])
        self._counted = count, counts
        return counts

    @property
    def count(self) -> int:
        return self.presence.count

    @property
    def end_row(self) -> int:
        return self.first_row + self.count

    def append(
        self,
        subject_id: str,
        encounter_id: str,
        group_set: int,
        templates: Mapping[str, Template],
        *,
        repeated: bool = False,
    ) -> None:
        """Adds a row. repeated: the subject_id has a row already."""
        first = self.count
        presence = 0
        for name, template in templates.items():
            vectors = None if template.embedding is None else np.array([template.embedding], np.float32)
            quality = quality_scale.as_stored(name, template.quality)
            records = [template.minutiae or b""]
            self._column(name, vectors).append(
                np.array([first]), vectors, records, np.array([np.nan if quality is None else quality], np.float32)
            )
            presence |= 1 << COLUMNS.index(name)
        self._append_rows([subject_id], encounter_id, np.array([group_set]), np.array([presence], np.uint16))
        if repeated:
            self.repeated.append((self.count - 1, int(hash_of(subject_id))))

    def append_cells(self, subject_ids: Sequence[str], group_sets: NDArray[Any], cells: Mapping[str, NewCells]) -> None:
        """Adds rows without an encounter_id."""
        first = self.count
        for name, some in cells.items():
            column = self._column(name, some.vectors)
            column.append(first + some.positions, some.vectors, some.minutiae.to_pylist(), some.quality)
        self._append_rows(subject_ids, "", group_sets, presence_of(cells, len(subject_ids)))

    def _column(self, name: str, vectors: Float32 | None) -> _Cells:
        """The cells of a column; creates the column if it does not exist."""
        if name not in self.columns:
            self.columns[name] = _Cells(None if vectors is None else vectors.shape[1])
        return self.columns[name]

    def _append_rows(
        self, subject_ids: Sequence[str], encounter_id: str, group_sets: NDArray[Any], presence: NDArray[np.uint16]
    ) -> None:
        """Adds rows whose cells were added before. Readers count the rows by `presence`, so it is extended last."""
        first = self.count
        self.subject_ids.extend(subject_ids)
        self.encounter_ids.extend([encounter_id] * len(subject_ids))
        for position, subject_id in enumerate(subject_ids, first):
            self.positions_of[subject_id] = (*self.positions_of.get(subject_id, ()), position)
        self.group_sets.append(group_sets)
        self.presence.append(presence)

    def extend(
        self,
        subjects: Sequence[tuple[str, str, int]],
        cells: Mapping[str, tuple[list[int], Float32 | None, list[bytes], list[float]]],
    ) -> None:
        """Adds rows. subjects: (subject_id, encounter_id, group_set); cells: column -> (positions among these rows, vectors, minutiae,
        quality)."""
        first, presence = self.count, np.zeros(len(subjects), np.uint16)
        for name, (positions, vectors, minutiae, quality) in cells.items():
            at = np.array(positions, np.int64)
            self._column(name, vectors).append(first + at, vectors, minutiae, np.array(quality, np.float32))
            presence[at] |= 1 << COLUMNS.index(name)
        self.subject_ids.extend(subject_id for subject_id, _, _ in subjects)
        self.encounter_ids.extend(encounter_id for _, encounter_id, _ in subjects)
        for position, (subject_id, _, _) in enumerate(subjects, first):
            self.positions_of[subject_id] = (*self.positions_of.get(subject_id, ()), position)
        self.group_sets.append(np.array([group_set for _, _, group_set in subjects], np.uint32))
        self.presence.append(presence)

    def mark_repeated(self, positions: Int64) -> None:
        """Marks rows whose subject_id had a row already. Called after `extend`."""
        ids = pack_text([self.subject_ids[position] for position in positions.tolist()])
        self.repeated += list(zip(positions.tolist(), hashes(ids).tolist(), strict=True))

    def truncate(self, count: int) -> None:
        """Removes the rows from position `count` on."""
        for subject_id in self.subject_ids[count:]:
            kept = tuple(p for p in self.positions_of.get(subject_id, ()) if p < count)
            if kept:
                self.positions_of[subject_id] = kept  # in one step, because readers look up earlier rows meanwhile
            else:
                self.positions_of.pop(subject_id, None)
        if self._counted[0] > count:
            self._counted = 0, {}
        del self.subject_ids[count:], self.encounter_ids[count:]
        while self.repeated and self.repeated[-1][0] >= count:
            self.repeated.pop()
        self.presence.count = self.group_sets.count = count
        for column in self.columns.values():
            column.truncate(count)


class _Cells:
    """The cells of one column, in growing arrays."""

    def __init__(self, dimension: int | None) -> None:
        self.dimension = dimension
        self.positions = GrowingArray(np.int64)
        self.vectors = GrowingArray(np.float32, dimension or 0)
        self.quality = GrowingArray(np.float32)
        self.minutiae: list[bytes] = []

    def append(self, positions: Int64, vectors: Float32 | None, minutiae: Sequence[bytes], quality: Float32) -> None:
        self.vectors.append(np.zeros((len(positions), 0), np.float32) if vectors is None else vectors)
        self.quality.append(quality)
        self.minutiae += minutiae
        self.positions.append(positions)  # last, because readers count cells by this array

    def truncate(self, count: int) -> None:
        cells = int(np.searchsorted(self.positions.view(), count))
        del self.minutiae[cells:]
        self.positions.count = self.vectors.count = self.quality.count = cells


class TailPart:
    """The first `count` rows of a tail. Implements `Part`."""

    def __init__(self, tail: Tail, count: int, answers: Mapping[str, StoredDecision] | None = None) -> None:
        """answers: None for all answers of the tail, including later ones."""
        self._own_answers = answers
        self.first_row = tail.first_row
        self.count = count
        self.end_row = tail.first_row + count
        self._tail = tail

    @cached_property
    def columns(self) -> Mapping[str, TailColumn]:
        found = {name: TailColumn(cells, self.count) for name, cells in list(self._tail.columns.items())}
        return {name: column for name, column in found.items() if column.count}

    @cached_property
    def answers(self) -> TailAnswers:
        return TailAnswers(self._tail.answers if self._own_answers is None else self._own_answers)

    @cached_property
    def bits(self) -> Mapping[int, int]:
        return self._tail.bits(self.count)

    def rows(self, positions: Int64) -> Int64:
        return positions + self.first_row

    def at(self, rows: Int64) -> Int64:
        return rows - self.first_row

    def position_range(self, low_row: int, high_row: int) -> tuple[int, int]:
        first, count = self.first_row, self.count
        return min(max(int(low_row) - first, 0), count), min(max(int(high_row) - first, 0), count)

    def presence(self, low: int, high: int) -> NDArray[np.uint16]:
        return self._tail.presence.view(self.count)[low:high]

    def group_sets(self, low: int, high: int) -> NDArray[np.uint32]:
        return self._tail.group_sets.view(self.count)[low:high]

    def subject_ids(self, low: int, high: int) -> Packed:
        return pack_text(self._tail.subject_ids[low:high])

    def subject_ids_at(self, positions: Int64) -> list[str]:
        return [self._tail.subject_ids[p] for p in positions.tolist()]

    def encounter_ids(self, low: int, high: int) -> Packed:
        return pack_text(self._tail.encounter_ids[low:high])

    def find(self, subject_id: str, hashed: np.uint64 | None = None) -> list[int]:
        return [p for p in self._tail.positions_of.get(subject_id, ()) if p < self.count]

    def find_all(self, subject_ids: Packed, hashes: NDArray[np.uint64]) -> tuple[Int64, Int64]:
        found = [self.find(subject_id) for subject_id in text(subject_ids)] if self.count else []
        which = np.repeat(np.arange(len(found)), np.array([len(positions) for positions in found], np.int64))
        return which, np.array([position for positions in found for position in positions], np.int64)

    @cached_property
    def repeated(self) -> NDArray[np.uint64]:
        """Not sorted, because each commit may add a row."""
        marked = self._tail.repeated
        return np.array([hashed for _, hashed in marked[: bisect_left(marked, (self.count, 0))]], np.uint64)

    def lookup(self) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        return sorted_lookup(hashes(self.subject_ids(0, self.count)))


class TailColumn:
    """A column of a `TailPart`. Implements `Column`, without the methods of a scan."""

    def __init__(self, cells: _Cells, row_count: int) -> None:
        self._cells = cells
        self.dimension = cells.dimension
        self.count = int(np.searchsorted(cells.positions.view(), row_count))
        self.full = self.count == row_count
        self.codec: Codec | None = None
        self.index: StoredIndex | None = None
        self._coded: tuple[Codec, Codes, Float32] | None = None

    def cell_range(self, low: int, high: int) -> tuple[int, int]:
        first, last = np.searchsorted(self._cells.positions.view(self.count), (low, high))
        return int(first), int(last)

    def cells_at(self, positions: Int64) -> Int64:
        return cells_of(self._cells.positions.view(self.count), positions)

    def positions(self, low: int, high: int) -> Int64:
        return self._cells.positions.view(self.count)[low:high]

    def vectors(self, low: int, high: int) -> Float32:
        return self._cells.vectors.view(self.count)[low:high]

    def vectors_at(self, cells: Int64) -> Float32:
        return self._cells.vectors.view(self.count)[cells]

    def coded(self, codec: Codec, low: int, high: int) -> tuple[Codes, Float32]:
        if self._coded is None or self._coded[0] is not codec:  # all cells: the writer reads them once for each array
            pieces = [codec.encode(self.vectors(at, at + PIECE_ROWS)) for at in range(0, self.count, PIECE_ROWS)]
            codes, norms = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
            self._coded = codec, codes, norms
        return self._coded[1][low:high], self._coded[2][low:high]

    def scanned(self, low: int, high: int) -> ScannedRows:
        raise NotImplementedError("the tail is compared exactly")

    def codes_at(self, cells: Int64) -> tuple[Codes, Float32]:
        raise NotImplementedError("the tail is compared exactly")

    @property
    def byte_counts(self) -> tuple[int, int]:
        return 0, 0

    def release(self, *, forget: bool) -> None:
        pass

    def quality(self, low: int, high: int) -> Float32:
        return self._cells.quality.view(self.count)[low:high]

    def minutiae(self, low: int, high: int) -> Packed:
        return pack(self._cells.minutiae[low : min(high, self.count)])

    def minutiae_at(self, cells: Int64) -> list[bytes]:
        return [self._cells.minutiae[c] for c in cells.tolist()]


class TailAnswers:
    """The answers of the journal. Implements `Answers`."""

    def __init__(self, answers: Mapping[str, StoredDecision]) -> None:
        self._answers = answers

    @property
    def count(self) -> int:
        return len(self._answers)

    @property
    def outcomes(self) -> Mapping[str, int]:
        return dict(Counter(answer.outcome for answer in list(self._answers.values())))

    def find(self, encounter_id: str, hashed: np.uint64 | None = None) -> StoredDecision | None:
        return self._answers.get(encounter_id)

    def ids(self, low: int, high: int) -> Packed:
        return pack_text(list(self._answers)[low:high])

    def digests(self, low: int, high: int) -> Packed:
        return pack([answer.digest for answer in list(self._answers.values())[low:high]])

    def texts(self, low: int, high: int) -> Packed:
        return pack([answer.compressed for answer in list(self._answers.values())[low:high]])

    def lookup(self) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        return sorted_lookup(hashes(self.ids(0, self.count)))


def cells_of(cell_positions: NDArray[Any], positions: Int64) -> Int64:
    """The index of each position in `cell_positions`, which ascend; -1 for a position that is not in it."""
    if not len(cell_positions):
        return np.full(len(positions), -1)
    # the dtype of the large array, so that numpy does not convert it
    wanted = positions.astype(cell_positions.dtype)
    cells = np.minimum(np.searchsorted(cell_positions, wanted), len(cell_positions) - 1)
    return np.where(cell_positions[cells] == wanted, cells, -1)
