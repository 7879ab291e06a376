"""Adds subjects without a search, from columns of templates or from archives of captures.

Owns the checks of a batch, its outcome, and the choice between the journal and a new segment. Never searches.

1. A batch is added whole or not at all.
2. A repeated batch with the same encounter_id adds nothing.
3. A small batch goes through the journal. A large batch is written as a segment without the lock. The segment is attached under the lock
   if none of its subjects was enrolled meanwhile.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from biodedup.common.described import Described
from biodedup.engine.arrow.templates import one_batch, read_templates
from biodedup.engine.callers.audit import carried_out, current_call
from biodedup.engine.decide import Decider
from biodedup.engine.log import EngineLog
from biodedup.engine.prepare import Preparer, check_models, in_memory, require_subject
from biodedup.errors import CallerError, CaptureUnavailable, InvalidInput
from biodedup.gallery.answers import (
    LOADED,
    AnswerOf,
    StoredDecision,
    batch_answered_before,
    digest_of,
    to_json,
)
from biodedup.gallery.cases import earlier_answer
from biodedup.gallery.files.packed import Packed, pack_text, text
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.segments.new_cells import NewCells, presence_of
from biodedup.gallery.transaction import Transaction
from biodedup.search.searcher import CandidateSet
from biodedup.texts import KnownId
from biodedup.values import (
    COLUMNS,
    Decision,
    Encounter,
    Outcome,
    check_encounter_id,
    check_groups,
    check_id,
    check_model_ids,
    model_of,
)

_SAME_COSINE = 0.999  # a vector and its own eight-bit code have a cosine above 0.9995 (tests/gallery/test_gallery.py)

ArrowBatch: TypeAlias = pa.RecordBatch | pa.Table
"""Ids and templates of all columns (engine/arrow/templates.py)."""
Cells = NDArray[Any] | Sequence[bytes | None]
"""The caller's templates of a column: embeddings (n, d), or n minutiae records."""


@dataclass(frozen=True)
class Loaded(Described):
    """The outcome of a batch of templates. added: number of new subjects; present: number of subjects that are already enrolled with the
    same templates; conflicting: indices of the subjects that are enrolled with other templates, which stay unchanged; refused: (index,
    reason) of each unusable row of an Arrow batch, in order."""

    added: int
    present: int
    conflicting: tuple[int, ...]
    refused: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, eq=False)
class _Batch:
    """Subjects to add. ids: texts; cells: column -> its templates; digest: SHA-256 of the batch as sent."""

    ids: Packed
    cells: Mapping[str, NewCells]
    groups: list[tuple[str, ...]]
    encounter_id: str | None
    digest: bytes

    @property
    def count(self) -> int:
        return len(self.ids)

    def at(self, rows: NDArray[np.int64]) -> _Batch:
        """Returns the batch of the subjects at these indices. rows: int64 (n,), ascending."""
        if len(rows) == self.count:
            return self
        cells = {column: some.at(rows, self.count) for column, some in self.cells.items()}
        return replace(
            self,
            ids=self.ids.take(pa.array(rows)),
            cells={column: some for column, some in cells.items() if some.count},
            groups=[self.groups[i] for i in rows.tolist()],
        )

    def was_added(self, answer_of: AnswerOf) -> bool:
        """Whether an earlier call added this batch. Raises EncounterConflict if its encounter_id was used for other content."""
        return self.encounter_id is not None and batch_answered_before(
            answer_of(self.encounter_id), self.encounter_id, self.digest
        )

    def record(self, transaction: Transaction) -> None:
        if self.encounter_id is not None:
            answer = StoredDecision(self.digest, LOADED, json.dumps({"added": self.count}))
            transaction.record(self.encounter_id, answer)


@dataclass(frozen=True, eq=False)
class Loader:
    """Adds subjects to one gallery. new_id: makes ids for encounters without an id; seal_rows: a batch with at least this number of rows
    becomes a segment; threads: the number of threads that read the columns of a batch. Thread-safe."""

    gallery: Gallery
    preparer: Preparer
    decider: Decider
    new_id: Callable[[], str]
    seal_rows: int
    log: EngineLog
    threads: int = 1

    def add(
        self,
        subject_ids: Sequence[str],
        templates: Mapping[str, Cells],
        groups: Sequence[Sequence[str]] | None,
        encounter_id: str | None,
        *,
        model_id: str | Mapping[str, str] | None = None,
        keep_enrolled: bool,
    ) -> Loaded:
        """Adds a batch of templates.

        model_id: the embeddings' model, one for all columns or one for each. keep_enrolled: keep and report subjects that are enrolled
        already. Without it, such a subject raises SubjectExists. If another thread enrols a subject meanwhile, it always raises
        SubjectExists.
        """
        check_model_ids(model_id)
        return self._logged(
            self._add(self._batch(subject_ids, templates, model_id, groups, encounter_id), keep_enrolled)
        )

    def _logged(self, loaded: Loaded) -> Loaded:
        self.log.loaded(loaded.added, loaded.present, len(loaded.conflicting), len(loaded.refused))
        return loaded

    def add_arrow(
        self,
        batch: Any,
        encounter_id: str | None,
        *,
        model_id: str | Mapping[str, str] | None = None,
        keep_enrolled: bool,
    ) -> Loaded:
        """Adds an Arrow record batch or table as `add` does.

        keep_enrolled: also refuse and report unusable rows; without an encounter_id, the batch gets an id from its digest. If keep_enrolled
        is False, an unusable row raises InvalidInput."""
        check_model_ids(model_id)
        if encounter_id is not None:
            check_encounter_id(encounter_id)
        batch = one_batch(batch)
        read = read_templates(batch, threads=self.threads)
        bad = np.flatnonzero(read.refusals != "")
        refused = tuple(zip(bad.tolist(), map(str, read.refusals[bad]), strict=True))
        if refused and not keep_enrolled:
            first, reason = refused[0]
            raise InvalidInput(
                f"row {first} cannot be used: {reason} ({len(refused)} such rows of {len(batch)}); mend it, or call load_templates, which "
                "leaves such rows out and names them"
            )
        kept = np.flatnonzero(read.refusals == "")
        cells = {
            column: self.preparer.modelled(column, some.at(kept, len(batch)), model_of(column, model_id))
            for column, some in read.cells.items()
        }
        ids = pack_text(read.subject_ids.take(pa.array(kept)))
        groups: list[tuple[str, ...]] = (
            [()] * len(kept) if read.groups is None else [read.groups[i] for i in kept.tolist()]
        )
        digest = _digest_of(ids, cells, groups)
        if encounter_id is None and keep_enrolled:
            encounter_id = KnownId(f"load:{digest.hex()[:32]}")
        loaded = self._add(_Batch(ids, cells, groups, encounter_id, digest), keep_enrolled)
        conflicting = tuple(kept[list(loaded.conflicting)].tolist())
        return self._logged(replace(loaded, conflicting=conflicting, refused=refused))

    def _add(self, batch: _Batch, keep_enrolled: bool) -> Loaded:
        if batch.was_added(self.gallery.snapshot().answer):
            return Loaded(0, batch.count, ())
        present, conflicting = 0, tuple[int, ...]()
        if keep_enrolled:
            enrolled, same = self._compare_enrolled(batch)
            present, conflicting = int(np.count_nonzero(same)), tuple(np.flatnonzero(enrolled & ~same).tolist())
            batch = batch.at(np.flatnonzero(~enrolled))
        added = self._through_journal(batch) if batch.count < self.seal_rows else self._as_segment(batch)
        if not added:
            return Loaded(0, batch.count + present, conflicting)
        return Loaded(batch.count, present, conflicting)

    def _batch(
        self,
        subject_ids: Sequence[str],
        templates: Mapping[str, Cells],
        model_id: str | Mapping[str, str] | None,
        groups: Sequence[Sequence[str]] | None,
        encounter_id: str | None,
    ) -> _Batch:
        ids = [str(s) if isinstance(s, np.str_) else s for s in subject_ids]
        for subject_id in ids:
            check_id(subject_id, "subject_id")
        if len(set(ids)) != len(ids):
            raise InvalidInput(f"subject_ids holds {len(ids) - len(set(ids))} repetitions; each subject is one row")
        if not templates:
            raise InvalidInput("templates is empty; pass at least one column, as {'face': vectors}")
        named: list[tuple[str, ...]] = [()] * len(ids) if groups is None else [check_groups(some) for some in groups]
        cells = {
            column: self.preparer.column(column, given, model_of(column, model_id))
            for column, given in templates.items()
        }
        for what, count in [("groups", len(named)), *((f"column {c}", len(given)) for c, given in templates.items())]:
            if count != len(ids):
                raise InvalidInput(f"{what} has {count} rows for {len(ids)} subject_ids; pass one row each")
        without = np.flatnonzero(presence_of(cells, len(ids)) == 0)
        if len(without):
            raise InvalidInput(f"subject {ids[int(without[0])]!r} has no template; leave it out")
        if encounter_id is not None:
            check_encounter_id(encounter_id)
        packed = pack_text(ids)
        sent = {column: some for column, some in cells.items() if some.count or some.dimension is not None}
        return _Batch(packed, sent, named, encounter_id, _digest_of(packed, sent, named))

    def _compare_enrolled(self, batch: _Batch) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Returns (enrolled, enrolled with the same templates), bool (n,) each."""
        snapshot = self.gallery.snapshot()
        rows = snapshot.rows_of(batch.ids)
        enrolled = rows >= 0
        same = enrolled.copy()
        if not enrolled.any():
            return enrolled, same
        for column, cells in batch.cells.items():
            if cells.vectors is None:
                self._compare_records(rows, np.flatnonzero(enrolled), column, cells, same)
                continue
            cell = np.flatnonzero(enrolled[cells.positions])
            at = cells.positions[cell]
            has = (snapshot.presence(rows[at].tolist()) >> COLUMNS.index(column) & 1) == 1
            same[at[~has]] = False
            stored = snapshot.embeddings(rows[at[has]].tolist(), column)
            cosines = np.einsum("ij,ij->i", stored, cells.vectors[cell[has]]) if len(stored) else np.zeros(0)
            same[at[has]] &= cosines > _SAME_COSINE
            self._compare_records(rows, at, column, cells, same)
        return enrolled, same

    def _compare_records(
        self, rows: NDArray[np.int64], at: NDArray[np.int64], column: str, cells: NewCells, same: NDArray[np.bool_]
    ) -> None:
        """Sets `same` to False for subjects whose enrolled record differs from the sent record, or is enrolled or sent only.

        at: the indices of the subjects to compare, ascending."""
        records = self.gallery.snapshot().minutiae(rows[at].tolist(), column)
        sent = (
            dict(zip(cells.positions.tolist(), cells.minutiae.to_pylist(), strict=True)) if cells.has_minutiae else {}
        )
        if records or sent:
            same[at] &= [records.get(int(rows[i]), b"") == sent.get(i, b"") for i in at.tolist()]

    def _through_journal(self, batch: _Batch) -> bool:
        """Adds the batch through the journal. Returns False if another thread has added it meanwhile."""
        with self.gallery.transaction() as transaction:
            if batch.was_added(transaction.answer):
                return False
            batch.record(transaction)
            carried_out(count=batch.count)
            if batch.count:
                transaction.add_many(batch.ids, batch.cells, batch.groups)
        return True

    def _as_segment(self, batch: _Batch) -> bool:
        """Adds the batch as a new segment. Returns False if another thread has added it meanwhile."""
        with self.gallery.transaction() as transaction:
            group_sets = transaction.group_sets_of(batch.groups)
        entry = self.gallery.write_rows(batch.ids, batch.cells, group_sets)
        try:
            with self.gallery.transaction() as transaction:
                if batch.was_added(transaction.answer):
                    self.gallery.discard_rows(entry)
                    return False
                transaction.refuse_enrolled(batch.ids)
                transaction.settle_models(batch.cells)
                transaction.attach(entry)
                batch.record(transaction)
                carried_out(count=batch.count)
        except (
            CallerError
        ):  # after any other error, the commit may be durable; the next writer deletes segments that no commit names
            self.gallery.discard_rows(entry)
            raise
        return True

    def import_captures(self, encounters: Sequence[Encounter]) -> list[Decision]:
        """Adds subjects from their captures, and replaces enrolled subjects. The outcome `unique` means that the subject was added.

        An encounter with an absent or unreadable file is `refused`, and not recorded.
        """
        for encounter in encounters:
            require_subject(encounter)
        encounters, digests = list(encounters), [b""] * len(encounters)
        answers: dict[int, Decision | None] = {}
        taken: list[Decision] = []
        for i, encounter in enumerate(encounters):
            try:
                encounters[i] = in_memory(encounter, self.preparer.config.capture)
                digests[i] = digest_of(encounters[i])
                answers[i] = earlier_answer(self.gallery.answer, encounter, digests[i], self.gallery.snapshot)
            except CaptureUnavailable as error:
                answers[i] = self.decider.refused(encounter, error, self.gallery.snapshot())
        todo = [i for i, answer in answers.items() if answer is None]
        probes = dict(zip(todo, self.preparer.probes([encounters[i] for i in todo]), strict=True))
        with self.gallery.transaction() as transaction:
            for i, probe in probes.items():
                if isinstance(probe, CallerError):
                    answers[i] = self.decider.refused(encounters[i], probe, self.gallery.snapshot())
                    continue
                answer = earlier_answer(transaction.answer, probe.encounter, digests[i], transaction.snapshot)
                if answer is not None:  # repeated in this batch, or sent by another thread meanwhile
                    answers[i] = answer
                    continue
                check_models(probe.templates, transaction.models)
                encounter_id = probe.encounter.encounter_id or self.new_id()
                decision = self.decider.decide(
                    probe, CandidateSet(), transaction.snapshot(), version=transaction.version
                )
                outcome: Outcome = "unique" if probe.templates else "refused"  # there was no search
                answers[i] = decision = replace(decision, encounter_id=encounter_id, outcome=outcome, reasons=())
                if outcome == "unique":
                    if transaction.snapshot().row_of(probe.subject_id) is not None:
                        transaction.remove(probe.subject_id)
                    transaction.add(probe.subject_id, probe.templates, encounter_id, probe.encounter.groups)
                transaction.record(encounter_id, StoredDecision(digests[i], decision.outcome, to_json(decision)))
                taken.append(decision)
                if (call := current_call()) is not None:
                    call.carried_out(transaction, call.kind, decision)
                    call.itemised = True
        for decision in taken:
            self.log.decided("import", decision)
        return [answer for answer in answers.values() if answer is not None]


def _digest_of(ids: Packed, cells: Mapping[str, NewCells], groups: Sequence[tuple[str, ...]]) -> bytes:
    """SHA-256 of a batch of templates."""
    digest = hashlib.sha256("\n".join(text(ids)).encode())
    for column, some in sorted(cells.items(), key=lambda item: item[0]):
        digest.update(column.encode())
        for piece in some.digested(len(ids)):
            digest.update(piece)
    if any(groups):
        digest.update(json.dumps(groups).encode())
    return digest.digest()
