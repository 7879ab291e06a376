"""A transaction: changes of a gallery that become durable and visible together.

Owns staging: every change is written to the database and to staged parts, which only the transaction's own `snapshot` shows. Never commits;
the gallery does (gallery.py).
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biodedup.config import EXTERNAL_MINUTIAE
from biodedup.errors import BiodedupError, GalleryBusy, ModelMismatch, SubjectExists, UnknownSubject
from biodedup.gallery.answers import StoredDecision, to_json
from biodedup.gallery.cases import (
    RECAPTURE,
    Request,
    current_answer,
    pairs_of_old_verdicts,
    read_case,
    request_of,
    similar_cases,
)
from biodedup.gallery.catalogue.audit import AuditRecord
from biodedup.gallery.catalogue.protocol import Catalogue
from biodedup.gallery.catalogue.sqlite import ColumnModel, JournalCell, State, paired
from biodedup.gallery.files.encryption.subject_keys import SubjectKeys
from biodedup.gallery.files.encryption.transform import Transform, transform_id_of
from biodedup.gallery.files.filesystem import Storage
from biodedup.gallery.files.index_codec import FaissCodec
from biodedup.gallery.files.packed import Packed, pack, pack_text, text
from biodedup.gallery.policies import PolicyVersion
from biodedup.gallery.segments.layout import SegmentEntry, file_name, index_of, unused_number
from biodedup.gallery.segments.new_cells import NewCells
from biodedup.gallery.segments.part import Int64, Part
from biodedup.gallery.segments.reader import Segment, open_segment
from biodedup.gallery.segments.tail import Tail, TailPart
from biodedup.gallery.segments.writer import write_segment
from biodedup.gallery.snapshot import Snapshot
from biodedup.index_spec import IndexSpec
from biodedup.values import COLUMNS, Case, Decision, Template, Verdict

_log = logging.getLogger("biodedup.gallery")


class Transaction:
    """Staged changes. Only the thread that holds the gallery's lock uses it. version: of the content after the commit."""

    def __init__(
        self,
        catalogue: Catalogue,
        storage: Storage,
        folder: Path,
        gallery_id: str,
        state: State,
        before: Snapshot,
        tail: Tail,
    ) -> None:
        self.version = before.version + 1
        self.content_changed = False
        self.manifest_changed = False
        self.segments: list[Part] = [part for part in before.parts if isinstance(part, Segment)]
        self.tail = tail
        self.tombstones: Int64 = before.tombstones
        self.models = dict(before.models)
        self.group_sets = dict(before.group_sets)
        self.pending = before.pending
        self.different = before.different
        self.steps = before.steps
        self.indexing = before.indexing
        self.transform = before.transform
        self.keys = before.keys
        self.answers: dict[str, StoredDecision] = {}
        self.policies: list[PolicyVersion] = []
        self.new_segments: list[int] = []
        self.retired: list[Segment] = []
        self.retired_files: list[str] = []
        self.when_durable: list[Callable[[], None]] = []
        """Functions that are called when the commit is durable. They must not raise."""
        self.audited: list[AuditRecord] = []
        """Records for the audit log: the calls that this commit completes."""
        self._catalogue = catalogue
        self._storage = storage
        self._folder = folder
        self._gallery_id = gallery_id
        self._state = state
        self._commit_id = secrets.token_hex(8)
        self._last_snapshot: tuple[tuple[Any, ...], Snapshot] | None = None
        """(the objects that the last snapshot was made of, the snapshot)."""

    @property
    def changed(self) -> bool:
        return self.content_changed or self.manifest_changed

    @property
    def state(self) -> State:
        """The counters after the commit."""
        return replace(
            self._state,
            version=self._state.version + self.content_changed,
            commits=self._state.commits + 1,
            commit_id=self._commit_id,
            row_count=self.tail.end_row,
        )

    def snapshot(self) -> Snapshot:
        """A snapshot of the gallery with the staged changes."""
        extra_rows = self._state.extra_rows
        sources = (
            *(*self.segments, self.tail, self.tombstones, self.pending, self.different, self.steps, self.indexing),
            *(self.tail.count, extra_rows, self.content_changed),
        )
        if self._last_snapshot is not None and _are_same(self._last_snapshot[0], sources):
            return self._last_snapshot[1]
        snapshot = Snapshot(
            version=self._state.version + self.content_changed,
            row_count=self.tail.end_row,
            parts=(*self.segments, TailPart(self.tail, self.tail.count)),
            tombstones=self.tombstones,
            models=self.models,
            group_sets=self.group_sets,
            pending=self.pending,
            extra_rows=extra_rows,
            different=self.different,
            steps=self.steps,
            indexing=self.indexing,
            transform=self.transform,
            keys=self.keys,
        )
        self._last_snapshot = sources, snapshot
        return snapshot

    def answer(self, encounter_id: str) -> StoredDecision | None:
        """As `Gallery.answer`, with the staged changes."""
        staged = self.answers.get(encounter_id)
        if staged is not None:
            return staged
        found = self.snapshot().answer(encounter_id)
        return None if found is None else current_answer(self._catalogue, encounter_id, found)

    # content ----------------------------------------------------------------------------------------------------

    def add(
        self, subject_id: str, templates: Mapping[str, Template], encounter_id: str = "", groups: Iterable[str] = ()
    ) -> None:
        """Stages a new subject. Raises SubjectExists, ModelMismatch."""
        if self.snapshot().row_of(subject_id) is not None:
            raise exists(subject_id)
        self._append(subject_id, templates, encounter_id, groups)

    def add_encounter(
        self, subject_id: str, templates: Mapping[str, Template], encounter_id: str = "", groups: Iterable[str] = ()
    ) -> None:
        """Stages a row of a subject, which may be enrolled or new. Raises ModelMismatch."""
        enrolled = self.snapshot().row_of(subject_id) is not None
        self._append(subject_id, templates, encounter_id, groups)
        self._count_extra(int(enrolled))

    def open_case(
        self,
        subject_id: str,
        templates: Mapping[str, Template],
        encounter_id: str,
        request: Request,
        linked: Iterable[str] = (),
    ) -> int:
        """Opens a case: stages a pending row with the templates of an encounter in review, and its request. linked: the open cases among
        its candidates. Returns the row."""
        row = self._append(subject_id, templates, encounter_id, request.groups)
        self._catalogue.add_pending(row, encounter_id)
        self._catalogue.put_case(encounter_id, request.to_json(), None)
        self._catalogue.link(encounter_id, linked)
        self.pending = {**self.pending, row: encounter_id}
        return row

    def enrol_case(self, encounter_id: str) -> None:
        """Makes the pending row of a case a row of its subject. This enrols the subject if it is new."""
        row, subject_id = self._pending_row(encounter_id)
        enrolled = self.snapshot().row_of(subject_id) is not None
        self._drop_pending(row)
        self._count_extra(int(enrolled))
        self.content_changed = True

    def remove_case(self, encounter_id: str) -> None:
        """Removes the pending row of a case."""
        row, _ = self._pending_row(encounter_id)
        self._drop_pending(row)
        self._add_tombstones([row])

    def _pending_row(self, encounter_id: str) -> tuple[int, str]:
        row = self.snapshot().pending_row_of[encounter_id]
        return row, self.snapshot().subject_ids([row])[0]

    def _drop_pending(self, row: int) -> None:
        self._catalogue.drop_pending(row)
        self._catalogue.unlink(self.pending[row])
        self.pending = {other: encounter_id for other, encounter_id in self.pending.items() if other != row}

    def _count_extra(self, change: int) -> None:
        self._state = replace(self._state, extra_rows=self._state.extra_rows + change)

    def _append(
        self, subject_id: str, templates: Mapping[str, Template], encounter_id: str, groups: Iterable[str]
    ) -> int:
        repeated = self.snapshot().is_known(subject_id)
        for template in templates.values():
            dimension = None if template.embedding is None else len(template.embedding)
            self.settle_model(template.column, ColumnModel(template.model_id, dimension))
        templates = sealed(self.keys, templates)
        row, group_set = self.tail.end_row, self._group_set(frozenset(groups))
        self._catalogue.add_subjects([(row, subject_id, encounter_id, group_set)])
        self._catalogue.add_cells((row, template) for template in templates.values())
        self.tail.append(subject_id, encounter_id, group_set, templates, repeated=repeated)
        self.content_changed = True
        return row

    def add_many(self, subject_ids: Packed, cells: Mapping[str, NewCells], groups: Sequence[Iterable[str]]) -> None:
        """Stages new subjects in the journal. cells: column -> its templates; groups: of each subject. Raises SubjectExists,
        ModelMismatch."""
        self.refuse_enrolled(subject_ids)
        self.settle_models(cells)
        cells = sealed_cells(self.keys, cells, len(subject_ids))
        first, names = self.tail.end_row, text(subject_ids)
        rows = range(first, first + len(names))
        group_sets = self.group_sets_of(groups)
        self._catalogue.add_subjects(zip(rows, names, [""] * len(names), group_sets.tolist(), strict=True))
        for column, some in cells.items():
            self._catalogue.put_cells(_journalled(first, column, some))
        self.tail.append_cells(names, group_sets, cells)
        self.content_changed = True

    def attach(self, entry: SegmentEntry, extra_rows: int = 0) -> None:
        """Stages the rows of a segment that was written before. Its rows get the next row numbers. extra_rows: how many of its rows are not
        the first row of their subject. Raises GalleryBusy if the gallery has changed its secret transform since the segment was written,
        because the old secret may be destroyed."""
        self._refuse_other_transform(entry)
        if self.tail.count:
            self.seal()
        count = entry.end_row - entry.first_row
        entry = replace(entry, first_row=self.tail.end_row, end_row=self.tail.end_row + count)
        self._adopt(entry)
        answers = self.tail.answers
        self.tail = Tail(entry.end_row)
        self.tail.answers = answers
        self._count_extra(extra_rows)
        self.content_changed = True

    def _refuse_other_transform(self, entry: SegmentEntry) -> None:
        segment = open_segment(self._storage, self._folder, entry)
        try:
            outdated = {column.transform_id for column in segment.columns.values()} - {
                None,
                transform_id_of(self.transform),
            }
        finally:
            segment.close()
        if outdated:
            raise GalleryBusy(
                "the embeddings of the gallery got a new transform while rows were written; nothing was added; send them again"
            )

    def remove(self, subject_id: str) -> None:
        """Removes all rows of a subject. Raises UnknownSubject."""
        rows = self.snapshot().rows_under(subject_id)
        if not rows:
            raise UnknownSubject(f"subject {subject_id!r} is not enrolled; there is nothing to remove")
        self._add_tombstones(rows)
        self._count_extra(1 - len(rows))

    def remove_rows(self, rows: Sequence[int] | Int64) -> None:
        """Removes live rows, ascending. A subject without remaining rows is not enrolled any more."""
        now = self.snapshot()
        fewer = 0
        if now.extra_rows and len(rows):
            ids, counts = np.unique(now.subject_ids(np.asarray(rows).tolist()), return_counts=True)
            which, _ = now.all_rows_of(pack_text(ids.tolist()))
            fewer = int(np.minimum(counts, np.bincount(which, minlength=len(ids)) - 1).sum())
        self._add_tombstones(rows)
        self._count_extra(-fewer)

    def _add_tombstones(self, rows: Sequence[int] | Int64) -> None:
        if self.keys is not None and (doomed := self.snapshot().slots_of(rows)):
            self.keys.doom(doomed)
            self.when_durable.append(partial(destroy_doomed, self.keys, {slot for _, slot in doomed}))
        for row in np.asarray(rows).tolist():
            self._catalogue.add_tombstone(row, self.version)
        self.tombstones = np.union1d(self.tombstones, np.asarray(rows, np.int64))
        self.content_changed = self.content_changed or bool(len(rows))

    def record(self, encounter_id: str, answer: StoredDecision) -> None:
        """Stores the answer to an encounter, so that the same answer is given when it is sent again."""
        _ = answer.compressed  # computed and cached now, so that sealing is fast
        self._catalogue.add_answer(encounter_id, answer)
        self.answers[encounter_id] = answer
        self.content_changed = True

    def record_step(self, name: str, facts: Mapping[str, Any]) -> None:
        """Records that a job has completed a step. facts: its result, for JSON; `Snapshot.job_step` returns it."""
        text = json.dumps(dict(facts))
        self._catalogue.add_job_step(name, text)
        self.steps = {**self.steps, name: text}
        self.content_changed = True

    def set_policy(self, policy: PolicyVersion) -> None:
        """Stores the next version of the policy."""
        self._catalogue.add_policy(policy)
        self.policies.append(policy)
        self.content_changed = True

    def caller_tables(self, *, noted: bool = True) -> Catalogue:
        """The database, for the tables of budgets, alarms, cards and approvals. They are not content: the version does not change. noted:
        whether the caller changes rows."""
        self.manifest_changed = self.manifest_changed or noted
        return self._catalogue

    def add_audit(self, records: Sequence[AuditRecord]) -> None:
        """Appends records to the audit log. They are not content: the version does not change."""
        if records:
            self._catalogue.add_audit(records)
            self.manifest_changed = True

    def case(self, encounter_id: str) -> Case | None:
        return read_case(self._catalogue, self.snapshot(), encounter_id)

    def judge(self, verdicts: Sequence[Verdict], different: Sequence[tuple[int, int]]) -> None:
        """Records verdicts. different: pairs of rows that belong to two people by these verdicts."""
        self._catalogue.add_verdicts(verdicts)
        self._catalogue.add_judged(different)
        self.different = paired(different, self.different)
        self.content_changed = True

    def forget_cases(self, encounter_ids: Sequence[str]) -> None:
        """Deletes the requests, decisions and verdicts of closed cases."""
        assert not set(encounter_ids) & set(self.pending.values()), "open cases are kept"
        self._catalogue.forget_cases(encounter_ids)
        self.content_changed = self.content_changed or bool(encounter_ids)

    def revise(self, case: Case, decision: Decision) -> None:
        """Replaces the present decision of a case."""
        self._catalogue.put_case(case.encounter_id, request_of(case).to_json(), to_json(decision))
        if decision.outcome == "review":
            self._catalogue.link(case.encounter_id, similar_cases(decision))
        self.content_changed = True

    def adopt_cases(self) -> None:
        """Upgrades a gallery of an older format: open cases get pending rows, and verdicts are assigned to rows.

        If the templates of a case are of another model than the gallery's, they cannot be compared: the case is refused, with a request for
        a recapture.
        """
        for encounter_id in self._catalogue.held_cases():
            case, stored = self.case(encounter_id), self._catalogue.case(encounter_id)
            assert case is not None, "held templates belong to a case"
            try:
                self.open_case(case.subject_id, case.templates, encounter_id, request_of(case))
                if stored is not None:
                    self._catalogue.put_case(encounter_id, *stored)
            except ModelMismatch:
                refusals = (*case.decision.refusals, RECAPTURE)
                self.revise(case, replace(case.decision, outcome="refused", refusals=refusals))
            self._catalogue.drop_held(encounter_id)
        pairs = pairs_of_old_verdicts(self._catalogue.verdicts(), self.snapshot())
        self._catalogue.add_judged(pairs)
        self.different = paired(pairs, self.different)
        self._catalogue.set_encounters()
        self.manifest_changed = True

    def refuse_enrolled(self, subject_ids: Packed) -> None:
        rows = self.snapshot().rows_of(subject_ids)
        if (rows >= 0).any():
            raise exists(text(subject_ids.slice(int(np.argmax(rows >= 0)), 1))[0])

    def settle_models(self, cells: Mapping[str, NewCells]) -> None:
        for column, some in cells.items():
            self.settle_model(column, ColumnModel(some.model_id, some.dimension))

    def settle_model(self, column: str, model: ColumnModel) -> None:
        """Sets the model of a column by its first template. Raises ModelMismatch if the column has another model."""
        known = self.models.get(column)
        if known is None:
            self._catalogue.add_model(column, model)
            self.models[column] = model
        elif known != model:
            raise mismatch(column, known, model)

    def group_sets_of(self, groups: Sequence[Iterable[str]]) -> NDArray[np.uint32]:
        """uint32 (n,): the number of each subject's set of groups."""
        numbers = {names: self._group_set(names) for names in {frozenset(names) for names in groups}}
        return np.array([numbers[frozenset(names)] for names in groups], np.uint32)

    # the manifest -----------------------------------------------------------------------------------------------

    def seal(self) -> None:
        """Writes the journal into a new segment. Must be called before other changes are staged."""
        tail = TailPart(self.tail, self.tail.count)
        if not tail.count and not tail.answers.count:
            return
        number = self.take_number()
        keep = self.snapshot().mask(tail)
        parts = self.segments
        self._adopt(
            write_segment(
                storage=self._storage,
                folder=self._folder,
                number=number,
                gallery_id=self._gallery_id,
                parts=[tail],
                keeps=[keep],
                others=parts,
                transform=self.transform,
            )
        )
        self._drop_tombstones(self.tombstones[self.tombstones >= tail.first_row])
        self._catalogue.clear_journal()
        self.tail = Tail(tail.end_row)

    def take_sealed(self, entry: SegmentEntry, dropped: Int64, rest: Tail) -> None:
        """Stages a segment that was written from the first rows of the journal. The caller has deleted these rows from the journal.
        dropped: removed rows that the segment does not hold; rest: the remaining rows of the journal."""
        self._adopt(entry)
        self._drop_tombstones(dropped)
        self.tail = rest

    def swap(self, merged: Sequence[Segment], entry: SegmentEntry, dropped: Int64) -> None:
        """Replaces neighbouring segments by one merged segment. dropped: removed rows that the new segment does not hold."""
        numbers = [segment.entry.number for segment in merged]
        present = [part.entry.number for part in self.segments if isinstance(part, Segment)]
        at = present.index(numbers[0])
        assert present[at : at + len(merged)] == numbers, "only one thread merges"
        self._catalogue.drop_segments(numbers)
        del self.segments[at : at + len(merged)]
        self._adopt(entry, at)
        self._drop_tombstones(dropped)
        self.retired += merged

    def set_index(self, specs: Mapping[str, IndexSpec], *, forced: bool) -> None:
        """Stores the configured index engine of each column."""
        self.indexing = replace(self.indexing, specs=specs, forced=forced)
        self._catalogue.set_index(self.indexing)
        self.manifest_changed = True

    def set_transform(self, transform: Transform | None) -> None:
        """Sets the secret transform of new embeddings. The journal is sealed into a segment with this transform."""
        self.transform = transform
        self.indexing = replace(self.indexing, transform_id=transform_id_of(transform))
        self.seal()
        self._catalogue.set_transform(transform_id_of(transform))
        self.manifest_changed = True

    def add_codec(self, column: str, codec: FaissCodec) -> None:
        """Stores a trained codec."""
        if self.indexing.codec(column, codec.codec_id) is None:
            self._catalogue.add_codec(column, codec)
            self._set_codecs(column, (*self.indexing.codecs.get(column, ()), codec))

    def drop_codec(self, column: str, codec_id: str) -> None:
        self._catalogue.drop_codec(column, codec_id)
        self._set_codecs(column, tuple(c for c in self.indexing.codecs[column] if c.codec_id != codec_id))

    def _set_codecs(self, column: str, codecs: tuple[FaissCodec, ...]) -> None:
        self.indexing = replace(self.indexing, codecs={**self.indexing.codecs, column: codecs})
        self.manifest_changed = True

    def replace_index(self, segment: Segment, column: str, kind: str | None, digest: str = "") -> None:
        """Replaces the index file of a segment's column. kind, digest: of the new file, which was written before; None for no index."""
        at = self.segments.index(segment)
        old = [name for name in segment.entry.files if (index_of(name) or ("",))[0] == column]
        files = {name: known for name, known in segment.entry.files.items() if name not in old}
        entry = replace(segment.entry, files=files if kind is None else {**files, kind: digest})
        self._catalogue.drop_segments([entry.number])
        self._catalogue.add_segment(entry)
        self.segments[at] = open_segment(self._storage, self._folder, entry)
        self.retired_files += [file_name(entry.number, name) for name in old if name != kind]
        self.manifest_changed = True

    def take_number(self) -> int:
        """Takes the number for a new segment."""
        number = unused_number(self._storage, self._folder, self._state.next_segment)
        self._state = replace(self._state, next_segment=number + 1)
        return number

    def _adopt(self, entry: SegmentEntry, at: int | None = None) -> None:
        self.segments.insert(len(self.segments) if at is None else at, open_segment(self._storage, self._folder, entry))
        self.new_segments.append(entry.number)
        self._catalogue.add_segment(entry)
        self.manifest_changed = True

    def _drop_tombstones(self, rows: Int64) -> None:
        self._catalogue.drop_tombstones(rows.tolist())
        self.tombstones = np.setdiff1d(self.tombstones, rows, assume_unique=True)

    # shared -----------------------------------------------------------------------------------------------------

    @cached_property
    def _numbers(self) -> dict[frozenset[str], int]:
        """set of groups -> its number. A national register has about a hundred thousand sets."""
        return {names: number for number, names in self.group_sets.items()}

    def _group_set(self, names: frozenset[str]) -> int:
        """The number of a set of groups; 0 for the empty set."""
        if not names:
            return 0
        if names not in self._numbers:
            number = len(self.group_sets) + 1
            self._catalogue.add_group_set(number, names)
            self.group_sets[number], self._numbers[names] = names, number
            self.manifest_changed = True
        return self._numbers[names]


def sealed(keys: SubjectKeys | None, templates: Mapping[str, Template]) -> Mapping[str, Template]:
    """The templates of one row, their minutiae sealed by a new key where the gallery has such keys."""
    if keys is None or all(template.minutiae is None for template in templates.values()):
        return templates
    (slot,) = keys.allocate(1)
    return {
        name: template
        if template.minutiae is None
        else replace(template, minutiae=keys.seal(slot, COLUMNS.index(template.column), template.minutiae))
        for name, template in templates.items()
    }


def sealed_cells(keys: SubjectKeys | None, cells: Mapping[str, NewCells], count: int) -> Mapping[str, NewCells]:
    """As `sealed`, of so many rows."""
    if keys is None or not any(some.has_minutiae for some in cells.values()):
        return cells
    slots = keys.allocate(count)
    found = {}
    for column, some in cells.items():
        each = zip(some.positions.tolist(), some.minutiae.to_pylist(), strict=True)
        records = [keys.seal(slots[at], COLUMNS.index(column), record) if record else b"" for at, record in each]
        found[column] = replace(some, minutiae=pack(records))
    return found


def destroy_doomed(keys: SubjectKeys, slots: Iterable[int]) -> None:
    """After a commit that removed rows. Where the disk fails, the next opening does it."""
    try:
        keys.destroy(slots)
    except BiodedupError as error:
        _log.error("keys of removed subjects are not destroyed yet, the next writer does so: %s", error)


def _are_same(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    """Whether two tuples hold the same objects, or equal numbers."""
    return len(left) == len(right) and all(
        a is b or (isinstance(a, int) and a == b) for a, b in zip(left, right, strict=True)
    )


def _journalled(first_row: int, column: str, cells: NewCells) -> Iterator[JournalCell]:
    vectors = [None] * cells.count if cells.vectors is None else np.asarray(cells.vectors, "<f4")
    each = zip(cells.positions.tolist(), vectors, cells.minutiae.to_pylist(), cells.quality.tolist(), strict=True)
    for position, vector, record, quality in each:
        stated = None if np.isnan(quality) else quality
        yield JournalCell(
            first_row + position, column, None if vector is None else vector.tobytes(), record or None, stated
        )


def mismatch(column: str, known: ColumnModel, got: ColumnModel) -> ModelMismatch:
    """The error for a template whose model is not that of its column."""
    remedy = "extract again with the gallery's model, or use another gallery"
    if EXTERNAL_MINUTIAE in (known.model_id, got.model_id):
        remedy = f"{remedy}; if all records are of one extractor, state it in FingerConfig(record_model_id)"
    return ModelMismatch(
        f"column {column} holds templates of {known.model_id} (dimension {known.dimension}), got {got.model_id} "
        f"(dimension {got.dimension}); {remedy}"
    )


def exists(subject_id: str) -> SubjectExists:
    """The error for a subject that is enrolled already."""
    return SubjectExists(
        f"subject {subject_id!r} is enrolled already; verify against it, update it, or remove it before enrolling again"
    )
