"""A snapshot: an immutable view of all rows of a gallery, as of one version.

Owns reading across the parts of a gallery (segments and tail): look-ups by id, templates by row, the state of each row. Never changes
anything.

A row is one encounter. It is in one of three states. A *live* row belongs to an enrolled subject, which has one or more rows. A *pending*
row belongs to an open case: searches include it, look-ups by subject do not. A *removed* row has a tombstone, until a merge erases the row.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from biodedup.common import quality as quality_scale
from biodedup.common.vectors import dot_products
from biodedup.gallery.answers import StoredDecision, parsed
from biodedup.gallery.catalogue.sqlite import ColumnModel
from biodedup.gallery.files import packed
from biodedup.gallery.files.codes import dequantise
from biodedup.gallery.files.encryption.subject_keys import SubjectKeys, slot_of, unsealed
from biodedup.gallery.files.encryption.transform import Transform
from biodedup.gallery.files.filesystem import memory_bytes
from biodedup.gallery.files.packed import Packed
from biodedup.gallery.index_settings import IndexSettings
from biodedup.gallery.segments.part import Column, Int64, Part
from biodedup.gallery.segments.reader import Segment
from biodedup.values import BIT, COLUMNS, EnrolledEncounter, Float32, Template

_T = TypeVar("_T", bound=np.generic)
_DRAWN_SEED = 7
_MEMORY_SHARE = 0.75  # the share of the memory that a gallery may fill; the rest is for everything else


@dataclass(frozen=True, eq=False)
class Snapshot:
    """parts: in the order of their rows; tombstones: removed rows that the parts still hold, int64, ascending; pending: row of an open case
    -> its encounter_id; extra_rows: live rows beyond the first row of their subject; different: row -> rows that verdicts assign to another
    person, in both directions; steps: name of a completed job step -> its result (JSON); indexing: the index settings; transform: the
    secret transform of new embeddings; keys: the keys that minutiae are sealed by."""

    version: int
    row_count: int
    parts: tuple[Part, ...]
    tombstones: Int64
    models: Mapping[str, ColumnModel]
    group_sets: Mapping[int, frozenset[str]]
    pending: Mapping[int, str] = field(default_factory=dict, repr=False)
    extra_rows: int = 0
    different: Mapping[int, tuple[int, ...]] = field(default_factory=dict, repr=False)
    steps: Mapping[str, str] = field(default_factory=dict, repr=False)
    indexing: IndexSettings = field(default_factory=IndexSettings, repr=False)
    transform: Transform | None = field(default=None, repr=False)
    keys: SubjectKeys | None = field(default=None, repr=False)
    _masks: dict[tuple[int, frozenset[str] | None, frozenset[int]], NDArray[np.bool_] | None] = field(
        default_factory=dict, repr=False
    )
    _bits: dict[tuple[Hashable, ...], NDArray[np.uint64]] = field(default_factory=dict, repr=False)

    @property
    def segments(self) -> list[Segment]:
        """The sealed parts, in the order of their rows."""
        return [part for part in self.parts if isinstance(part, Segment)]

    # counts -----------------------------------------------------------------------------------------------------

    @cached_property
    def live_count(self) -> int:
        """The number of enrolled subjects."""
        return self.present_count - len(self.pending) - self.extra_rows

    @property
    def present_count(self) -> int:
        """The number of rows that are live or pending."""
        return sum(part.count for part in self.parts) - len(self.tombstones)

    @property
    def searched_count(self) -> int:
        """The number of enrolled subjects and open cases, which a search compares with a probe."""
        return self.live_count + len(self.pending)

    @cached_property
    def pending_row_of(self) -> dict[str, int]:
        """encounter_id of an open case -> its row."""
        return {encounter_id: row for row, encounter_id in self.pending.items()}

    @cached_property
    def pending_rows(self) -> Int64:
        """The rows of open cases, ascending."""
        return np.array(sorted(self.pending), np.int64)

    @cached_property
    def enrolled(self) -> Snapshot:
        """This snapshot without the open cases."""
        if not self.pending:
            return self
        without = np.union1d(self.tombstones, self.pending_rows)
        return replace(self, tombstones=without, pending={}, _masks={}, _bits={})

    @cached_property
    def presences(self) -> Mapping[int, int]:
        """presence (a bit mask of columns) -> the number of rows with exactly these columns."""
        counts: Counter[int] = Counter()
        for part in self.parts:
            counts.update(part.bits)
        for part, positions in self._by_part(self.tombstones):
            counts.subtract(part.presence(0, part.count)[positions].tolist())
        return {bits: count for bits, count in counts.items() if count}

    def count_with(self, bits: int) -> int:
        """The number of rows with a template in at least one of these columns. bits: a bit mask of columns."""
        return sum(count for has, count in self.presences.items() if has & bits)

    def column_counts(self) -> dict[str, int]:
        """column -> the number of live rows with a template in it."""
        return {column: self.enrolled.count_with(1 << index) for index, column in enumerate(COLUMNS)}

    def outcomes(self) -> dict[str, int]:
        """outcome -> the number of encounters with this answer."""
        counts: dict[str, int] = {}
        for part in self.parts:
            for outcome, count in part.answers.outcomes.items():
                counts[outcome] = counts.get(outcome, 0) + count
        return dict(sorted(counts.items()))

    @cached_property
    def streamed(self) -> frozenset[Column]:
        """Columns whose single cells do not fit into the memory beside the scanned arrays. After a large search reads their cells, the
        system is told to drop them from its cache; otherwise it would drop the scanned arrays, which every search needs."""
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
        """The newest row of an enrolled subject; None if the subject is not enrolled."""
        rows = self.rows_under(subject_id)
        return rows[-1] if rows else None

    def rows_under(self, subject_id: str) -> list[int]:
        """The live rows of a subject, ascending; empty if the subject is not enrolled."""
        return [row for row in self._present(subject_id) if row not in self.pending]

    def pending_under(self, subject_id: str) -> list[int]:
        """The pending rows under a subject_id, ascending."""
        return [row for row in self._present(subject_id) if row in self.pending]

    def is_known(self, subject_id: str) -> bool:
        """Whether an enrolled subject or an open case has this id."""
        return bool(self._present(subject_id))

    def count_under(self, subject_id: str) -> int:
        """The number of live and pending rows under a subject_id."""
        return len(self._present(subject_id))

    def _present(self, subject_id: str) -> list[int]:
        """The live and pending rows under a subject_id, ascending."""
        hashed = packed.hash_of(subject_id)
        rows: list[int] = []
        for part in self.parts:
            positions = part.find(subject_id, hashed)
            if positions:
                found = part.rows(np.array(positions, np.int64))
                rows += found[self.are_present(found)].tolist()
        return rows

    def rows_of(self, subject_ids: Packed) -> Int64:
        """The newest row of each subject, int64 (n,); -1 if the subject is not enrolled."""
        rows = np.full(len(subject_ids), -1)
        which, found = self.all_rows_of(subject_ids)
        rows[which] = found  # rows ascend, so the last assignment is the newest row
        return rows

    def all_rows_of(self, subject_ids: Packed) -> tuple[Int64, Int64]:
        """(index of the id, row) of every live row of these subjects. The rows of a subject ascend."""
        hashes = packed.hashes(subject_ids)
        which, rows = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for part in self.parts:
            some, positions = part.find_all(subject_ids, hashes)
            there = part.rows(positions)
            live = ~np.isin(there, self.enrolled.tombstones)
            which.append(some[live])
            rows.append(there[live])
        return np.concatenate(which), np.concatenate(rows)

    def with_siblings(self, rows: Int64) -> tuple[Int64, Int64 | None]:
        """(these rows and all other rows of their subjects, ascending; a number for the subject of each row). The numbers are None if every
        subject has one row. An open case counts as a subject."""
        if not self.extra_rows or not len(rows):
            return rows, None
        ids = packed.pack_text(self.subject_ids(rows.tolist()))
        hashes = packed.hashes(ids)
        several = np.zeros(len(rows), bool)
        for part in self.parts:
            several |= np.isin(hashes, part.repeated) if len(part.repeated) else False
        several &= ~np.isin(rows, self.pending_rows)
        at = np.flatnonzero(several)
        if not len(at):
            return rows, None
        order = np.argsort(hashes[at], kind="stable")
        at = at[order][np.append(True, np.diff(hashes[at][order]) != 0)]  # one row of each subject
        which, found = self.all_rows_of(ids.take(at))
        together = np.union1d(rows, found)
        subjects = len(ids) + np.arange(len(together))
        subjects[np.searchsorted(together, found)] = which
        return together, subjects

    def siblings(self, row: int) -> tuple[int, ...]:
        """All rows of the subject of a row, ascending."""
        if not self.extra_rows:
            return (row,)
        return tuple(self.with_siblings(np.array([row]))[0].tolist())

    def is_present(self, row: int) -> bool:
        """Whether a row, from this or another snapshot, is live or pending in this one."""
        return bool(self.are_present(np.array([row]))[0])

    def are_present(self, rows: Int64) -> NDArray[np.bool_]:
        """bool (n,): as `is_present`, for several rows."""
        present = self._gather(rows, np.zeros(len(rows), bool), lambda part, at: at >= 0)
        if len(self.tombstones):
            at = np.minimum(np.searchsorted(self.tombstones, rows), len(self.tombstones) - 1)
            present &= self.tombstones[at] != rows
        return present

    def job_step(self, name: str) -> dict[str, Any] | None:
        """The result of a completed job step, or None."""
        text = self.steps.get(name)
        if text is not None:
            return parsed(text)
        stored = self.answer(name)  # releases before 0.3.0 stored it as an answer
        return None if stored is None or stored.kind != "job" else parsed(stored.text)

    def answer(self, encounter_id: str) -> StoredDecision | None:
        """The stored answer to an encounter, or None for an unknown encounter."""
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
        """The ids of the enrolled subjects, each once, in the order of enrolment."""
        several = (
            {int(hashed) for part in self.parts for hashed in part.repeated.tolist()} if self.extra_rows else set()
        )
        seen: set[str] = set()
        for part in self.parts:
            mask = self.enrolled.mask(part)
            for low in range(0, part.count, 1 << 16):
                ids = part.subject_ids(low, min(low + (1 << 16), part.count))
                names = packed.text(ids if mask is None else ids.filter(mask[low : low + len(ids)]))
                if not several:
                    yield from names
                    continue
                for name in names:
                    if int(packed.hash_of(name)) not in several:
                        yield name
                    elif name not in seen:
                        seen.add(name)
                        yield name

    def live_rows(self) -> Int64:
        """The rows of all enrolled subjects, ascending."""
        found = [np.zeros(0, np.int64)]
        for part in self.parts:
            mask = self.enrolled.mask(part)
            found.append(part.rows(np.arange(part.count) if mask is None else np.flatnonzero(mask)))
        return np.concatenate(found)

    def mask(
        self, part: Part, groups: Collection[str] | None = None, excluded_presence: frozenset[int] = frozenset()
    ) -> NDArray[np.bool_] | None:
        """bool (count,): the rows of a part that are live or pending, and belong to one of the groups. None if all rows do. groups: None
        for no restriction; excluded_presence: rows with one of these presences are left out."""
        key = (id(part), None if groups is None else frozenset(groups), excluded_presence)
        if key not in self._masks:
            self._masks[key] = self._mask(part, *key[1:])
        return self._masks[key]

    def _mask(
        self, part: Part, groups: frozenset[str] | None, excluded_presence: frozenset[int]
    ) -> NDArray[np.bool_] | None:
        low, high = np.searchsorted(self.tombstones, (part.first_row, part.end_row))
        removed = part.at(self.tombstones[low:high])
        hides = any(bits in excluded_presence for bits in part.bits)
        if not len(removed) and groups is None and not hides:
            return None
        mask = np.ones(part.count, bool)
        mask[removed] = False
        if groups is not None:
            wanted = [number for number, names in self.group_sets.items() if names & groups]
            mask &= np.isin(part.group_sets(0, part.count), wanted)
        if hides:
            mask &= ~np.isin(part.presence(0, part.count), list(excluded_presence))
        return mask

    def live_bits(
        self,
        part: Part,
        column: Column,
        groups: frozenset[str] | None = None,
        excluded_presence: frozenset[int] = frozenset(),
    ) -> NDArray[np.uint64]:
        """The mask over a column's cells as bits: 64 cells in each uint64, the lowest bit first. Empty if all cells are in the mask."""
        key = (id(part), id(column), groups, excluded_presence)
        if key not in self._bits:
            self._bits[key] = self._live_bits(part, column, groups, excluded_presence)
        return self._bits[key]

    def _live_bits(
        self, part: Part, column: Column, groups: frozenset[str] | None, excluded_presence: frozenset[int]
    ) -> NDArray[np.uint64]:
        words = -(-column.count // 64)
        if groups is None and not any(bits in excluded_presence for bits in part.bits):
            # only tombstones: clear their bits, without an array over all rows
            low, high = np.searchsorted(self.tombstones, (part.first_row, part.end_row))
            cells = column.cells_at(part.at(self.tombstones[low:high]))
            cells = cells[cells >= 0]
            bits = np.full(words if len(cells) else 0, ~np.uint64(0))
            np.bitwise_and.at(bits, cells // 64, ~(np.uint64(1) << (cells % 64).astype(np.uint64)))
            return bits
        mask = self.mask(part, groups, excluded_presence)
        return _as_bits(mask if mask is None or column.full else mask[column.positions(0, column.count)])

    def live_members(
        self, part: Part, presences: tuple[int, ...], positions: Int64 | None, groups: frozenset[str] | None
    ) -> NDArray[np.uint64]:
        """As `live_bits`, for the rows of a part with one of these presences. positions: of these rows, None for all rows."""
        key = (id(part), presences, groups)
        if key not in self._bits:
            mask = self.mask(part, groups)
            self._bits[key] = _as_bits(mask if mask is None or positions is None else mask[positions])
        return self._bits[key]

    # templates --------------------------------------------------------------------------------------------------

    def presence(self, rows: Sequence[int] | Int64) -> NDArray[np.uint16]:
        """uint16 (n,): bit c is set if the row has a template in COLUMNS[c]. rows: in any order."""
        return self._gather(rows, np.zeros(len(rows), np.uint16), lambda part, at: part.presence(0, part.count)[at])

    def encounter_ids(self, rows: Sequence[int]) -> list[str]:
        """The encounter_id of each row; '' if the row was added without an encounter."""
        found: dict[int, str] = {}
        for part, positions in self._by_part(np.sort(np.array(rows, np.int64))):
            for row, at in zip(part.rows(positions).tolist(), positions.tolist(), strict=True):
                found[row] = packed.text(part.encounter_ids(at, at + 1))[0]
        return [found[row] for row in rows]

    def quality(self, rows: Sequence[int], column: str) -> Float32:
        """float32 (n,), 0 to 1: the quality of each row's template in a column. NaN without a template or a measured quality."""
        return self._gather(rows, np.full(len(rows), np.nan, np.float32), lambda part, at: _quality(part, column, at))

    def groups(self, rows: Sequence[int]) -> list[frozenset[str]]:
        """The groups of each row."""
        numbers = self._gather(
            rows, np.zeros(len(rows), np.uint32), lambda part, at: part.group_sets(0, part.count)[at]
        )
        return [self.group_sets.get(number, frozenset()) for number in numbers.tolist()]

    def embeddings(self, rows: Sequence[int] | Int64, column: str) -> Float32:
        """float32 (n, d), for rows that have this column. d = 0 if the column holds no embeddings."""
        model = self.models.get(column)
        empty = np.zeros((len(rows), (model and model.dimension) or 0), np.float32)
        return self._gather(rows, empty, lambda part, at: _vectors(part, column, at))

    def similarities(self, rows: Int64, column: str, probes: Float32, which: Int64) -> Float32:
        """The cosines float32 (n, q) of rows, which have this column, and the q vectors of each row's probe. probes: float32 (p, q, d), unit
        vectors; which: int64 (n,), the number of each row's probe."""
        found = np.zeros((len(rows), probes.shape[1]), np.float32)
        rotated: dict[int, Float32] = {}  # id of a codec -> the probes, rotated by it
        order, start = np.argsort(rows, kind="stable"), 0
        for part, positions in self._by_part(rows[order]):
            places = order[start : start + len(positions)]
            held = part.columns[column]
            cells = held.cells_at(positions)
            if held.codec is None:
                found[places] = dot_products(held.vectors_at(cells), probes, which[places])
            else:  # rotate the few probes instead of the many rows
                if id(held.codec) not in rotated:
                    rotated[id(held.codec)] = held.codec.rotate_probes(probes.reshape(-1, probes.shape[2])).reshape(
                        probes.shape
                    )
                vectors = dequantise(*held.codes_at(cells))
                found[places] = dot_products(vectors, rotated[id(held.codec)], which[places])
            start += len(positions)
        return found

    def minutiae(self, rows: Sequence[int] | Int64, column: str) -> dict[int, bytes]:
        """row -> its minutiae record in a column, for the rows that have one."""
        rows = rows.tolist() if isinstance(rows, np.ndarray) else rows
        records: dict[int, bytes] = {}
        for part, positions in self._by_part(np.sort(np.array(rows, np.int64))):
            if column in part.columns:
                cells = part.columns[column].cells_at(positions)
                has = cells >= 0
                found = unsealed(self.keys, COLUMNS.index(column), part.columns[column].minutiae_at(cells[has]))
                records.update(zip(part.rows(positions[has]).tolist(), found, strict=True))
        return {row: records[row] for row in rows if records.get(row)}

    def templates(self, row: int) -> dict[str, Template]:
        """All templates of one row."""
        (templates,) = self.templates_of([row])
        return templates

    def templates_of(self, rows: Sequence[int] | Int64) -> list[dict[str, Template]]:
        """All templates of each row, in the order of the columns in its part. Each column is read once for all rows."""
        wanted = np.asarray(rows, np.int64)
        templates: list[dict[str, Template]] = [{} for _ in range(len(wanted))]
        order, start = np.argsort(wanted, kind="stable"), 0
        for part, positions in self._by_part(wanted[order]):
            places = order[start : start + len(positions)]
            start += len(positions)
            for name, column in part.columns.items():
                cells = column.cells_at(positions)
                has = cells >= 0
                cells = cells[has]
                embeddings = [None] * len(cells) if column.dimension is None else list(column.vectors_at(cells))
                records = unsealed(self.keys, COLUMNS.index(name), column.minutiae_at(cells))
                model_id = self.models[name].model_id
                stored = column.quality(0, column.count)[cells].tolist()
                for place, *found in zip(places[has].tolist(), embeddings, records, stored, strict=True):
                    embedding, record, quality = found
                    if embedding is None and not record:
                        continue  # its key was destroyed: this is a copy from before the removal
                    templates[place][name] = Template(
                        name, model_id, embedding, record or None, quality_scale.from_stored(name, quality)
                    )
        return templates

    def slots_of(self, rows: Sequence[int] | Int64) -> list[tuple[int, int]]:
        """(row, slot) of the keys that the minutiae of these rows are sealed by."""
        found = {(row, slot_of(record)) for _, row, record in self.stored_minutiae(rows)}
        return sorted((row, slot) for row, slot in found if slot >= 0)

    def stored_minutiae(self, rows: Sequence[int] | Int64) -> Iterator[tuple[str, int, bytes]]:
        """(column, row, its record as it is stored: sealed by a key of the row, in the clear, or empty) of these rows."""
        for part, positions in self._by_part(np.sort(np.asarray(rows, np.int64))):
            for name, column in part.columns.items():
                cells = column.cells_at(positions)
                has = cells >= 0
                for row, record in zip(part.rows(positions[has]).tolist(), column.minutiae_at(cells[has]), strict=True):
                    yield name, row, record

    def encounters_of(self, subject_id: str) -> list[EnrolledEncounter]:
        """The encounters of an enrolled subject, oldest first."""
        rows = self.rows_under(subject_id)
        each = zip(rows, self.encounter_ids(rows), self.groups(rows), strict=True)
        return [EnrolledEncounter(row, eid, tuple(sorted(groups)), self.templates(row)) for row, eid, groups in each]

    def best_templates(self, subject_id: str) -> dict[str, Template] | None:
        """column -> the template of the best quality among all rows of a subject, the newest of equal ones. None if the subject is not
        enrolled."""
        rows = self.rows_under(subject_id)
        best: dict[str, Template] = {}
        for row in rows:
            for column, template in self.templates(row).items():
                known = best.get(column)
                if known is None or (template.quality or 0.0) >= (known.quality or 0.0):
                    best[column] = template
        return best if rows else None

    def sample(self, column: str, count: int) -> Float32:
        """The oldest embeddings of a column, at most `count`, float32 (n, d)."""
        found: list[Float32] = []
        for part in self.parts:
            if column in part.columns and count > 0:
                vectors = part.columns[column].vectors(0, min(count, part.columns[column].count))
                found.append(vectors)
                count -= len(vectors)
        return np.concatenate(found) if found else np.zeros((0, 1), np.float32)

    def drawn(self, model_id: str, count: int) -> tuple[str, Int64]:
        """A random sample of at most `count` subjects with an embedding of this model: (column, rows). ('', no rows) without such a column.

        The sample is drawn from the first 2^n rows, independently of sealing and merging. So it stays the same until a drawn row is
        removed, or the number of rows has doubled. It has no open cases, and one row of each subject, because other rows would be mates.
        """
        columns = [name for name, model in self.models.items() if model.model_id == model_id and model.dimension]
        rows = _drawn((1 << self.row_count.bit_length()) // 2, count)
        rows = rows[self.enrolled.are_present(rows)]
        if self.extra_rows:
            ids = self.subject_ids(rows.tolist())
            rows = rows[np.sort(np.unique(packed.hashes(packed.pack_text(ids)), return_index=True)[1])]
        presence = self.presence(rows)
        for column in columns:
            found = rows[(presence & BIT[column]) > 0][:count]
            if len(found) or column == columns[-1]:
                return column, np.sort(found)
        return "", np.zeros(0, np.int64)

    def sealed_before(self, rows: Int64) -> int:
        """The number of these rows, ascending, that are in segments."""
        sealed = [part.end_row for part in self.parts if any(column.codec for column in part.columns.values())]
        return int(np.searchsorted(rows, sealed[-1] if sealed else 0))

    def _by_part(self, rows: Int64) -> Iterator[tuple[Part, Int64]]:
        """Divides ascending rows by part: (part, positions in the part)."""
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
        """Fills `out` with the values of rows, in any order. read: the values of positions in a part."""
        wanted = np.asarray(rows, np.int64)
        order = np.argsort(wanted, kind="stable")
        start = 0
        for part, positions in self._by_part(wanted[order]):
            out[order[start : start + len(positions)]] = read(part, positions)
            start += len(positions)
        return out


@cache
def _drawn(below: int, count: int) -> Int64:
    """4 * count random row numbers below `below`, or all of them, in random order."""
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
    return quality_scale.each_from_stored(column, found)


def _as_bits(mask: NDArray[np.bool_] | None) -> NDArray[np.uint64]:
    if mask is None:
        return np.zeros(0, np.uint64)
    bits = np.zeros(-(-len(mask) // 64) * 8, np.uint8)
    some = np.packbits(mask, bitorder="little")
    bits[: len(some)] = some
    return bits.view("<u8")
