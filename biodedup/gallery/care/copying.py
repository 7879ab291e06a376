"""Copies rows of one gallery into another, without encoding vectors again.

Owns the renaming of subjects and groups on the way, and the record of finished steps. Never decides which rows are copied.

Each part of the source is one step: one durable, idempotent commit. Steps are recorded in the target as `NAME:0`, `NAME:1`, and so on, with
the range of source rows. So an interrupted copy continues after these rows, even if the source has merged its segments meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from biodedup.errors import CallerError, GalleryDamaged, SubjectExists
from biodedup.gallery.files import packed
from biodedup.gallery.files.packed import Packed
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.segments.part import PIECE_ROWS, Answers, Column, Int64, Part, sorted_lookup
from biodedup.gallery.segments.tail import TailAnswers
from biodedup.gallery.snapshot import Snapshot

Rename = Callable[[Packed], Packed]
Keep = Callable[[Part], NDArray[np.bool_] | None]


@dataclass(frozen=True)
class Step:
    """One step: rows [from_row, end_row) of the source became rows [first_row, first_row + end_row - from_row) of the target. added: the
    number of rows that were copied."""

    added: int
    first_row: int
    from_row: int
    end_row: int

    @property
    def rows(self) -> tuple[int, int]:
        """The range in the target."""
        return self.first_row, self.first_row + self.end_row - self.from_row


def steps_done(target: Snapshot, name: str) -> list[Step]:
    """The steps that were recorded under a name, in order."""
    steps: list[Step] = []
    while (facts := target.job_step(f"{name}:{len(steps)}")) is not None:
        steps.append(Step(**facts))
    return steps


def copy_rows(
    source: Snapshot,
    target: Gallery,
    name: str,
    keep: Keep,
    *,
    rename: Rename | None = None,
    groups: frozenset[str] = frozenset(),
) -> Iterator[Step]:
    """Copies the live rows of every part that were not copied before. Yields each step when it is durable.

    name: of the steps; keep: the rows of a part to copy, bool (count,), None for all live rows; rename: subject_ids -> new subject_ids;
    groups: added to each subject's groups. Raises SubjectExists, ModelMismatch, StorageUnavailable.
    """
    source = source.enrolled  # open cases are not copied
    done = steps_done(target.snapshot(), name)
    number, from_row = len(done), done[-1].end_row if done else 0
    for part in source.parts:
        rows = part.rows(np.arange(part.count))
        kept = (rows >= from_row) & _all_if_none(source.mask(part), part) & _all_if_none(keep(part), part)
        if kept.any():
            yield _copied(
                source=source,
                target=target,
                name=f"{name}:{number}",
                part=part,
                kept=kept,
                rename=rename,
                groups=groups,
            )
            number += 1


def record(target: Gallery, name: str, **facts: object) -> None:
    """Records in the target that a stage was reached. Does nothing if it is recorded already."""
    if target.snapshot().job_step(name) is None:
        with target.transaction() as transaction:
            transaction.record_step(name, facts)


def _copied(
    source: Snapshot,
    target: Gallery,
    name: str,
    part: Part,
    kept: NDArray[np.bool_],
    rename: Rename | None,
    groups: frozenset[str],
) -> Step:
    known = source.group_sets
    with target.transaction() as transaction:
        numbers = transaction.group_sets_of(
            [known.get(i, frozenset()) | groups for i in range(max(known, default=0) + 1)]
        )
    several = (
        np.concatenate([other.repeated for other in source.parts]) if source.extra_rows else np.zeros(0, np.uint64)
    )
    renamed = RenamedPart(part, numbers, rename, several)
    entry = target.write_part(renamed, kept)
    try:
        with target.transaction() as transaction:
            extra_rows = _extra_rows(transaction.snapshot(), renamed, kept)
            for column in part.columns:
                transaction.settle_model(column, source.models[column])
            step = Step(int(kept.sum()), transaction.tail.end_row, part.first_row, part.end_row)
            transaction.attach(entry, extra_rows)
            transaction.record_step(name, vars(step))
    except CallerError:  # raised before the segment was attached; after other errors the gallery removes unused files
        target.discard_rows(entry)
        raise
    return step


def _extra_rows(now: Snapshot, part: RenamedPart, kept: NDArray[np.bool_]) -> int:
    """The number of kept rows that are not the first row of their subject. Raises SubjectExists for an id that is enrolled in the target,
    unless the subject has several rows in the source: then its earlier rows were copied before."""
    extra, seen = 0, set[str]()
    for low in range(0, part.count, PIECE_ROWS):
        high = min(low + PIECE_ROWS, part.count)
        ids = part.subject_ids(low, high).filter(kept[low:high])
        enrolled, several = now.rows_of(ids) >= 0, np.isin(packed.hashes(ids), part.repeated)
        for i in np.flatnonzero(several).tolist():
            subject_id = packed.text(ids[i : i + 1])[0]
            extra += bool(enrolled[i]) or subject_id in seen
            seen.add(subject_id)
        taken = np.flatnonzero(enrolled & ~several)
        if len(taken):
            subject_id = packed.text(ids[int(taken[0]) : int(taken[0]) + 1])[0]
            raise SubjectExists(
                f"subject {subject_id!r} is enrolled already ({len(taken)} of {len(ids)} ids are); remove it, or give the "
                "district another name"
            )
    return extra


def _all_if_none(mask: NDArray[np.bool_] | None, part: Part) -> NDArray[np.bool_]:
    return np.ones(part.count, bool) if mask is None else mask


class RenamedPart:
    """A part of another gallery, with other ids and groups, and without answers. Implements `Rows`.

    group_sets: number of each group set in the source -> its number in the target; rename: None to keep the ids; several: hashes of the
    source ids of subjects with several rows.
    """

    def __init__(
        self, part: Part, group_sets: NDArray[np.uint32], rename: Rename | None, several: NDArray[np.uint64]
    ) -> None:
        self.first_row, self.end_row, self.count = part.first_row, part.end_row, part.count
        self._part = part
        self._group_sets = group_sets
        self._rename = rename
        self._several = several

    @property
    def columns(self) -> Mapping[str, Column]:
        return self._part.columns

    @property
    def answers(self) -> Answers:
        return TailAnswers({})

    @property
    def bits(self) -> Mapping[int, int]:
        return self._part.bits

    def rows(self, positions: Int64) -> Int64:
        return self._part.rows(positions)

    def presence(self, low: int, high: int) -> NDArray[np.uint16]:
        return self._part.presence(low, high)

    def group_sets(self, low: int, high: int) -> NDArray[np.uint32]:
        numbers = self._part.group_sets(low, high)
        if len(numbers) and int(numbers.max()) >= len(self._group_sets):
            raise GalleryDamaged("a row refers to a group set that does not exist; run `biodedup doctor`")
        return self._group_sets[numbers]

    def subject_ids(self, low: int, high: int) -> Packed:
        ids = self._part.subject_ids(low, high)
        return ids if self._rename is None else self._rename(ids)

    def encounter_ids(self, low: int, high: int) -> Packed:
        return self._part.encounter_ids(low, high)

    @cached_property
    def repeated(self) -> NDArray[np.uint64]:
        found = [np.zeros(0, np.uint64)]
        for low in range(0, self.count if len(self._several) else 0, PIECE_ROWS):
            high = min(low + PIECE_ROWS, self.count)
            at = np.isin(packed.hashes(self._part.subject_ids(low, high)), self._several)
            found.append(packed.hashes(self.subject_ids(low, high).filter(at)))
        return np.unique(np.concatenate(found))

    def lookup(self) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        if self._rename is None:
            return self._part.lookup()
        pieces = [
            packed.hashes(self.subject_ids(low, min(low + PIECE_ROWS, self.count)))
            for low in range(0, self.count, PIECE_ROWS)
        ]
        return sorted_lookup(np.concatenate([np.zeros(0, np.uint64), *pieces]))
