"""A snapshot: the rows that a reader sees, as of one version, whatever the writer does meanwhile.

Owns reading across parts: look-ups by id, templates by row, which rows live. Never changes anything.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from biodedup.gallery import packed
from biodedup.gallery.catalogue import ColumnModel
from biodedup.gallery.packed import Packed
from biodedup.gallery.part import Column, Int64, Part
from biodedup.gallery.storage import memory_bytes
from biodedup.values import BIT, COLUMNS, Float32, Template

_T = TypeVar("_T", bound=np.generic)
_DRAWN_SEED = 7
_MEMORY_SHARE = 0.75  # that a gallery may fill; of the rest everything else lives


@dataclass(frozen=True, eq=False)
class Snapshot:
    """parts: in the order of their rows; tombstones: removed rows that the parts still hold, int64, ascending."""

    version: int
    row_count: int
    parts: tuple[Part, ...]
    tombstones: Int64
    models: Mapping[str, ColumnModel]
    group_sets: Mapping[int, frozenset[str]]
    different: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    """subject_id -> subjects who were judged to be somebody else; in both directions."""
    _masks: dict[tuple[int, frozenset[str] | None, frozenset[int]], NDArray[np.bool_] | None] = field(
        default_factory=dict, repr=False
    )
    _bits: dict[tuple[Hashable, ...], NDArray[np.uint64]] = field(default_factory=dict, repr=False)

    # counts -----------------------------------------------------------------------------------------------------

    @cached_property
    def live_count(self) -> int:
        """Subjects enrolled."""
        return sum(part.count for part in self.parts) - len(self.tombstones)

    @cached_property
    def presences(self) -> Mapping[int, int]:
        """How many subjects have each combination of columns, as a mask."""
        counts: Counter[int] = Counter()
        for part in self.parts:
            counts.update(part.bits)
        for part, positions in self._by_part(self.tombstones):
            counts.subtract(part.presence(0, part.count)[positions].tolist())
        return {bits: count for bits, count in counts.items() if count}

    def count_with(self, bits: int) -> int:
        """Subjects with a template in one of these columns, a mask."""
        return sum(count for has, count in self.presences.items() if has & bits)

    def column_counts(self) -> dict[str, int]:
        """Subjects with a template in each column."""
        return {column: self.count_with(1 << index) for index, column in enumerate(COLUMNS)}

    def outcomes(self) -> dict[str, int]:
        """Encounters answered with each outcome."""
        counts: dict[str, int] = {}
        for part in self.parts:
            for outcome, count in part.answers.outcomes.items():
                counts[outcome] = counts.get(outcome, 0) + count
        return dict(sorted(counts.items()))

    @cached_property
    def streamed(self) -> frozenset[Column]:
        """Columns whose single cells no memory can hold beside all that is scanned. A large search reads through them, and the system
        is to forget them at once, or else it would forget what every search scans."""
        columns = [column for part in self.parts for column in part.columns.values()]
        room = _MEMORY_SHARE * memory_bytes() - sum(column.byte_counts[0] for column in columns)
        found = set()
        for column in columns:
            room -= column.byte_counts[1]
            if room < 0:
                found.add(column)
        return frozenset(found)

    # look-ups ---------------------------------------------------------------------------------------------------

    def row_of(self, subject_id: str) -> int | None:
        """The row of an enrolled subject."""
        hashed = packed.hash_of(subject_id)
        for part in reversed(self.parts):
            positions = part.find(subject_id, hashed)
            if positions:
                for row in part.rows(np.array(positions, np.int64)).tolist():
                    if self.is_live(row):
                        return int(row)
        return None

    def rows_of(self, subject_ids: Packed) -> Int64:
        """The row of each subject, -1 where it is not enrolled."""
        hashes = packed.hashes(subject_ids)
        rows = np.full(len(subject_ids), -1)
        for part in self.parts:
            found = part.find_many(subject_ids, hashes)
            at = np.flatnonzero(found >= 0)
            there = part.rows(found[at])
            live = ~np.isin(there, self.tombstones)
            rows[at[live]] = there[live]
            for i in at[~live].tolist():  # removed; another row of the part may have the id
                again = self.row_of(packed.text(subject_ids[i : i + 1])[0])
                rows[i] = rows[i] if again is None else again
        return rows

    def rows_different(self, subject_id: str | None) -> frozenset[int]:
        """The rows of subjects who were judged to be somebody else than this one."""
        rows = (self.row_of(other) for other in self.different.get(subject_id or "", ()))
        return frozenset(row for row in rows if row is not None)

    def are_different(self, subject_id: str, other_id: str) -> bool:
        """Whether these two were judged to be two people."""
        return other_id in self.different.get(subject_id, ())

    def is_live(self, row: int) -> bool:
        """Whether the row, which some snapshot had, is there and not removed."""
        return bool(self.are_live(np.array([row]))[0])

    def are_live(self, rows: Int64) -> NDArray[np.bool_]:
        """bool (n,): which of these rows, which some snapshot had, are there and not removed."""
        live = self._gather(rows, np.zeros(len(rows), bool), lambda part, at: at >= 0)
        if len(self.tombstones):
            at = np.minimum(np.searchsorted(self.tombstones, rows), len(self.tombstones) - 1)
            live &= self.tombstones[at] != rows
        return live

    def answer(self, encounter_id: str) -> tuple[bytes, str] | None:
        """(digest of what was sent, answer as JSON), or None for an encounter never seen."""
        hashed = packed.hash_of(encounter_id)
        for part in reversed(self.parts):
            found = part.answers.find(encounter_id, hashed)
            if found is not None:
                return found
        return None

    def subject_ids(self, rows: Sequence[int]) -> list[str]:
        ids = [""] * len(rows)
        wanted = np.array(rows, np.int64)
        order = np.argsort(wanted, kind="stable")
        start = 0
        for part, positions in self._by_part(wanted[order]):
            for i, subject_id in zip(order[start:], part.subject_ids_at(positions), strict=False):
                ids[i] = subject_id
            start += len(positions)
        return ids

    def all_subject_ids(self) -> Iterator[str]:
        """The enrolled, in order of enrolment."""
        for part in self.parts:
            mask = self.mask(part)
            for low in range(0, part.count, 1 << 16):
                ids = part.subject_ids(low, min(low + (1 << 16), part.count))
                yield from packed.text(ids if mask is None else ids.filter(mask[low : low + len(ids)]))

    def live_rows(self) -> Int64:
        """Of every enrolled subject, ascending."""
        found = [np.zeros(0, np.int64)]
        for part in self.parts:
            mask = self.mask(part)
            found.append(part.rows(np.arange(part.count) if mask is None else np.flatnonzero(mask)))
        return np.concatenate(found)

    def mask(
        self, part: Part, groups: Collection[str] | None = None, hidden: frozenset[int] = frozenset()
    ) -> NDArray[np.bool_] | None:
        """bool (count,): the rows of a part that live and, with groups, belong to one of them. None: all do. hidden: presences of
        rows that do not count."""
        key = (id(part), None if groups is None else frozenset(groups), hidden)
        if key not in self._masks:
            self._masks[key] = self._mask(part, *key[1:])
        return self._masks[key]

    def _mask(self, part: Part, groups: frozenset[str] | None, hidden: frozenset[int]) -> NDArray[np.bool_] | None:
        low, high = np.searchsorted(self.tombstones, (part.first_row, part.end_row))
        removed = part.at(self.tombstones[low:high])
        hides = any(bits in hidden for bits in part.bits)
        if not len(removed) and groups is None and not hides:
            return None
        mask = np.ones(part.count, bool)
        mask[removed] = False
        if groups is not None:
            wanted = [number for number, names in self.group_sets.items() if names & groups]
            mask &= np.isin(part.group_sets(0, part.count), wanted)
        if hides:
            mask &= ~np.isin(part.presence(0, part.count), list(hidden))
        return mask

    def live_bits(
        self,
        part: Part,
        column: Column,
        groups: frozenset[str] | None = None,
        hidden: frozenset[int] = frozenset(),
    ) -> NDArray[np.uint64]:
        """The mask over a column's cells, 64 of them in each number, the first in the lowest bit; empty where all live."""
        key = (id(part), id(column), groups, hidden)
        if key not in self._bits:
            self._bits[key] = self._live_bits(part, column, groups, hidden)
        return self._bits[key]

    def _live_bits(
        self, part: Part, column: Column, groups: frozenset[str] | None, hidden: frozenset[int]
    ) -> NDArray[np.uint64]:
        words = -(-column.count // 64)
        if groups is None and not any(bits in hidden for bits in part.bits):  # a few holes: not a number for every row
            low, high = np.searchsorted(self.tombstones, (part.first_row, part.end_row))
            cells = column.cells_at(part.at(self.tombstones[low:high]))
            cells = cells[cells >= 0]
            bits = np.full(words if len(cells) else 0, ~np.uint64(0))
            np.bitwise_and.at(bits, cells // 64, ~(np.uint64(1) << (cells % 64).astype(np.uint64)))
            return bits
        mask = self.mask(part, groups, hidden)
        return _as_bits(mask if mask is None or column.full else mask[column.positions(0, column.count)])

    def live_members(
        self, part: Part, presences: tuple[int, ...], positions: Int64 | None, groups: frozenset[str] | None
    ) -> NDArray[np.uint64]:
        """As `live_bits`, over the rows of a part that have one of some presences. positions: theirs, None for all."""
        key = (id(part), presences, groups)
        if key not in self._bits:
            mask = self.mask(part, groups)
            self._bits[key] = _as_bits(mask if mask is None or positions is None else mask[positions])
        return self._bits[key]

    # templates --------------------------------------------------------------------------------------------------

    def presence(self, rows: Sequence[int] | Int64) -> NDArray[np.uint16]:
        """uint16 (n,): bit c is set where the row has a template in COLUMNS[c]. rows: ascending or not."""
        return self._gather(rows, np.zeros(len(rows), np.uint16), lambda part, at: part.presence(0, part.count)[at])

    def encounter_ids(self, rows: Sequence[int]) -> list[str]:
        """The encounter that enrolled each row, '' where it was added without one."""
        found: dict[int, str] = {}
        for part, positions in self._by_part(np.sort(np.array(rows, np.int64))):
            for row, at in zip(part.rows(positions).tolist(), positions.tolist(), strict=True):
                found[row] = packed.text(part.encounter_ids(at, at + 1))[0]
        return [found[row] for row in rows]

    def quality(self, rows: Sequence[int], column: str) -> Float32:
        """float32 (n,): of the templates in a column; NaN where there is none, or it was not measured."""
        return self._gather(rows, np.full(len(rows), np.nan, np.float32), lambda part, at: _quality(part, column, at))

    def groups(self, rows: Sequence[int]) -> list[frozenset[str]]:
        """The groups of each row."""
        numbers = self._gather(
            rows, np.zeros(len(rows), np.uint32), lambda part, at: part.group_sets(0, part.count)[at]
        )
        return [self.group_sets.get(number, frozenset()) for number in numbers.tolist()]

    def embeddings(self, rows: Sequence[int] | Int64, column: str) -> Float32:
        """float32 (n, d), for rows that have this column; d = 0 where it holds no embeddings."""
        model = self.models.get(column)
        empty = np.zeros((len(rows), (model and model.dimension) or 0), np.float32)
        return self._gather(rows, empty, lambda part, at: _vectors(part, column, at))

    def minutiae(self, rows: Sequence[int] | Int64, column: str) -> dict[int, bytes]:
        """Records of those of the rows that have one in this column."""
        rows = rows.tolist() if isinstance(rows, np.ndarray) else rows
        records: dict[int, bytes] = {}
        for part, positions in self._by_part(np.sort(np.array(rows, np.int64))):
            if column in part.columns:
                cells = part.columns[column].cells_at(positions)
                has = cells >= 0
                found = part.columns[column].minutiae_at(cells[has])
                records.update(zip(part.rows(positions[has]).tolist(), found, strict=True))
        return {row: records[row] for row in rows if records.get(row)}

    def templates(self, row: int) -> dict[str, Template]:
        """All templates of one row."""
        ((part, position),) = self._by_part(np.array([row]))
        templates = {}
        for name, column in part.columns.items():
            cell = column.cells_at(position)
            if cell[0] < 0:
                continue
            embedding = None if column.dimension is None else column.vectors_at(cell)[0]
            quality = float(column.quality(int(cell[0]), int(cell[0]) + 1)[0])
            minutiae = column.minutiae_at(cell)[0] or None
            templates[name] = Template(
                name, self.models[name].model_id, embedding, minutiae, None if np.isnan(quality) else quality
            )
        return templates

    def sample(self, column: str, count: int) -> Float32:
        """Up to count embeddings of a column, the oldest, float32 (n, d)."""
        found: list[Float32] = []
        for part in self.parts:
            if column in part.columns and count > 0:
                vectors = part.columns[column].vectors(0, min(count, part.columns[column].count))
                found.append(vectors)
                count -= len(vectors)
        return np.concatenate(found) if found else np.zeros((0, 1), np.float32)

    def drawn(self, model_id: str, count: int) -> tuple[str, Int64]:
        """(column, rows) of up to count people with an embedding of this model, by chance; ('', none) without such a column.

        They are drawn among the first 2^n rows of all time, whatever has been sealed or merged: the same ones until one of them is
        removed, or there are twice as many rows.
        """
        columns = [name for name, one in self.models.items() if one.model_id == model_id and one.dimension]
        rows = _drawn((1 << self.row_count.bit_length()) // 2, count)
        rows = rows[self.are_live(rows)]
        presence = self.presence(rows)
        for column in columns:
            found = rows[(presence & BIT[column]) > 0][:count]
            if len(found) or column == columns[-1]:
                return column, np.sort(found)
        return "", np.zeros(0, np.int64)

    def sealed_before(self, rows: Int64) -> int:
        """How many of these rows, ascending, are sealed."""
        sealed = [part.end_row for part in self.parts if any(column.codec for column in part.columns.values())]
        return int(np.searchsorted(rows, sealed[-1] if sealed else 0))

    def _by_part(self, rows: Int64) -> Iterator[tuple[Part, Int64]]:
        """Ascending rows as (part, positions)."""
        low = 0
        while low < len(rows):
            index = bisect_right(self._starts, int(rows[low])) - 1
            high = len(rows)
            if index + 1 < len(self.parts) and rows[-1] >= self._starts[index + 1]:
                high = int(np.searchsorted(rows, self._starts[index + 1]))
            yield self.parts[index], self.parts[index].at(rows[low:high])
            low = high

    @cached_property
    def _starts(self) -> list[int]:
        return [part.first_row for part in self.parts]

    def _gather(
        self, rows: Sequence[int] | Int64, out: NDArray[_T], read: Callable[[Part, Int64], NDArray[_T]]
    ) -> NDArray[_T]:
        wanted = np.asarray(rows, np.int64)
        order = np.argsort(wanted, kind="stable")
        start = 0
        for part, positions in self._by_part(wanted[order]):
            out[order[start : start + len(positions)]] = read(part, positions)
            start += len(positions)
        return out


@cache
def _drawn(below: int, count: int) -> Int64:
    """Four times so many rows below a number, or all of them, in an order of chance."""
    rng = np.random.default_rng([_DRAWN_SEED, below])
    return rng.permutation(below) if below <= 4 * count else rng.choice(below, 4 * count, replace=False)


def _vectors(part: Part, column: str, positions: Int64) -> Float32:
    return part.columns[column].vectors_at(part.columns[column].cells_at(positions))


def _quality(part: Part, column: str, positions: Int64) -> Float32:
    found = np.full(len(positions), np.nan, np.float32)
    if column in part.columns:
        cells = part.columns[column].cells_at(positions)
        has = cells >= 0
        found[has] = part.columns[column].quality(0, part.columns[column].count)[cells[has]]
    return found


def _as_bits(mask: NDArray[np.bool_] | None) -> NDArray[np.uint64]:
    if mask is None:
        return np.zeros(0, np.uint64)
    bits = np.zeros(-(-len(mask) // 64) * 8, np.uint8)
    some = np.packbits(mask, bitorder="little")
    bits[: len(some)] = some
    return bits.view("<u8")
