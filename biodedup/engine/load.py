"""Load: adds subjects without a search, from columns of templates or from archives of captures.

Owns the checks of a batch, its outcome, and whether it goes through the journal or becomes a segment. Never searches.

1. A batch is added whole or not at all.
2. A batch that is sent again under the same encounter_id adds nothing.
3. A small batch goes through the journal. A large one is written as a segment without the lock, and attached under the lock if none
   of its subjects was enrolled meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biodedup.described import Described
from biodedup.engine.decide import Decider
from biodedup.engine.prepare import Preparer, check_models, in_memory, require_subject
from biodedup.errors import CallerError, CaptureUnavailable, InvalidInput
from biodedup.gallery.answers import (
    LOADED,
    AnswerOf,
    StoredDecision,
    batch_answered_before,
    digest_of,
    digest_of_batch,
    to_json,
)
from biodedup.gallery.cases import standing_answer
from biodedup.gallery.files.packed import pack_text
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.transaction import Transaction
from biodedup.search.searcher import CandidateSet
from biodedup.values import (
    COLUMNS,
    Column,
    Decision,
    Encounter,
    Outcome,
    check_encounter_id,
    check_groups,
    check_id,
    check_model_ids,
    model_of,
)

_SAME_COSINE = 0.999  # between a vector and its own eight-bit code it is above 0.9995 (tests/gallery/test_gallery.py)

Cells = NDArray[Any] | Sequence[bytes | None]
"""A column as it is given: embeddings (n, d), or n minutiae records."""


@dataclass(frozen=True)
class Loaded(Described):
    """The outcome of a batch of templates. added: how many subjects are new; present: how many were enrolled before with the same
    templates; conflicting: indices of the subjects that are enrolled with other templates, which were kept."""

    added: int
    present: int
    conflicting: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Batch:
    """Subjects to add. columns: column -> (model_id, cells); digest: SHA-256 of the batch as it was sent."""

    ids: list[str]
    columns: Mapping[str, tuple[str, Column]]
    groups: list[tuple[str, ...]]
    encounter_id: str | None
    digest: bytes

    def at(self, rows: NDArray[np.int64]) -> _Batch:
        """The subjects at these indices."""
        return replace(
            self,
            ids=[self.ids[i] for i in rows.tolist()],
            columns={column: (model_id, _at(cells, rows)) for column, (model_id, cells) in self.columns.items()},
            groups=[self.groups[i] for i in rows.tolist()],
        )

    def was_added(self, answer_of: AnswerOf) -> bool:
        """Whether this batch was added before. Raises EncounterConflict if its encounter_id was used for other content."""
        return self.encounter_id is not None and batch_answered_before(
            answer_of(self.encounter_id), self.encounter_id, self.digest
        )

    def record(self, transaction: Transaction) -> None:
        if self.encounter_id is not None:
            answer = StoredDecision(self.digest, LOADED, json.dumps({"added": len(self.ids)}))
            transaction.record(self.encounter_id, answer)


@dataclass(frozen=True, eq=False)
class Loader:
    """Adds subjects to one gallery. new_id: makes ids for encounters without one; seal_rows: batches of so many rows become a segment.
    Thread-safe."""

    gallery: Gallery
    preparer: Preparer
    decider: Decider
    new_id: Callable[[], str]
    seal_rows: int

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

        model_id: the embeddings' model, one for all or by column. keep_enrolled: subjects that are enrolled already are kept and
        reported; otherwise they raise SubjectExists, as do subjects that another thread enrols meanwhile.
        """
        check_model_ids(model_id)
        batch = self._batch(subject_ids, templates, model_id, groups, encounter_id)
        if batch.was_added(self.gallery.snapshot().answer):
            return Loaded(0, len(batch.ids), ())
        present, conflicting = 0, tuple[int, ...]()
        if keep_enrolled:
            enrolled, same = self._compare_enrolled(batch)
            present, conflicting = int(np.count_nonzero(same)), tuple(np.flatnonzero(enrolled & ~same).tolist())
            batch = batch.at(np.flatnonzero(~enrolled))
        added = self._through_journal(batch) if len(batch.ids) < self.seal_rows else self._as_segment(batch)
        if not added:
            return Loaded(0, len(batch.ids) + present, conflicting)
        return Loaded(len(batch.ids), present, conflicting)

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
        columns = {
            column: self.preparer.column(column, cells, model_of(column, model_id))
            for column, cells in templates.items()
        }
        for what, count in [("groups", len(named)), *((f"column {c}", len(v)) for c, (_, v) in columns.items())]:
            if count != len(ids):
                raise InvalidInput(f"{what} has {count} rows for {len(ids)} subject_ids; pass one row each")
        if all(isinstance(cells, list) for _, cells in columns.values()):
            for subject_id, *records in zip(ids, *(cells for _, cells in columns.values()), strict=True):
                if not any(records):
                    raise InvalidInput(f"subject {subject_id!r} has no template; leave it out")
            columns = {column: (model_id, cells) for column, (model_id, cells) in columns.items() if any(cells)}
        if encounter_id is not None:
            check_encounter_id(encounter_id)
        return _Batch(ids, columns, named, encounter_id, digest_of_batch(ids, columns, named))

    def _compare_enrolled(self, batch: _Batch) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """(enrolled, enrolled with the same templates), bool (n,) each."""
        snapshot = self.gallery.snapshot()
        rows = snapshot.rows_of(pack_text(batch.ids))
        enrolled = rows >= 0
        same = enrolled.copy()
        at = np.flatnonzero(enrolled)
        for column, (_, cells) in batch.columns.items():
            if not isinstance(cells, np.ndarray):
                records = snapshot.minutiae(rows[at].tolist(), column)
                for i in at.tolist():
                    same[i] &= records.get(int(rows[i]), b"") == cells[i]
                continue
            has = (snapshot.presence(rows[at].tolist()) >> COLUMNS.index(column) & 1) == 1
            same[at[~has]] = False
            stored = snapshot.embeddings(rows[at[has]].tolist(), column)
            cosines = np.einsum("ij,ij->i", stored, cells[at[has]]) if len(stored) else np.zeros(0)
            same[at[has]] &= cosines > _SAME_COSINE
        return enrolled, same

    def _through_journal(self, batch: _Batch) -> bool:
        """Whether the batch was added; False if another thread added it meanwhile."""
        with self.gallery.transaction() as transaction:
            if batch.was_added(transaction.answer):
                return False
            batch.record(transaction)
            if batch.ids:
                transaction.add_many(batch.ids, batch.columns, batch.groups)
        return True

    def _as_segment(self, batch: _Batch) -> bool:
        """As `_through_journal`."""
        with self.gallery.transaction() as transaction:
            group_sets = transaction.group_sets_of(batch.groups)
        cells_of = {column: cells for column, (_, cells) in batch.columns.items()}
        entry = self.gallery.write_rows(batch.ids, cells_of, group_sets)
        try:
            with self.gallery.transaction() as transaction:
                if batch.was_added(transaction.answer):
                    self.gallery.discard_rows(entry)
                    return False
                transaction.refuse_enrolled(batch.ids)
                transaction.settle_models(batch.columns)
                transaction.attach(entry)
                batch.record(transaction)
        except (
            CallerError
        ):  # after another error the commit may stand; the next writer deletes segments that no commit names
            self.gallery.discard_rows(entry)
            raise
        return True

    def import_captures(self, encounters: Sequence[Encounter]) -> list[Decision]:
        """Adds subjects from their captures, and replaces enrolled ones. The outcome `unique` means added.

        An encounter whose file is absent or cannot be read is `refused`, and not recorded.
        """
        for encounter in encounters:
            require_subject(encounter)
        encounters, digests = list(encounters), [b""] * len(encounters)
        answers: dict[int, Decision | None] = {}
        for i, encounter in enumerate(encounters):
            try:
                encounters[i] = in_memory(encounter, self.preparer.config.capture)
                digests[i] = digest_of(encounters[i])
                answers[i] = standing_answer(self.gallery.answer, encounter, digests[i], self.gallery.snapshot())
            except CaptureUnavailable as error:
                answers[i] = self.decider.refused(encounter, error, self.gallery.snapshot())
        todo = [i for i, answer in answers.items() if answer is None]
        probes = dict(zip(todo, self.preparer.probes([encounters[i] for i in todo]), strict=True))
        with self.gallery.transaction() as transaction:
            for i, probe in probes.items():
                if isinstance(probe, CallerError):
                    answers[i] = self.decider.refused(encounters[i], probe, self.gallery.snapshot())
                    continue
                answer = standing_answer(transaction.answer, probe.encounter, digests[i], transaction.snapshot())
                if answer is not None:  # sent twice in this batch, or by another thread meanwhile
                    answers[i] = answer
                    continue
                check_models(probe.templates, transaction.models)
                encounter_id = probe.encounter.encounter_id or self.new_id()
                decision = self.decider.decide(
                    probe, CandidateSet(), transaction.snapshot(), version=transaction.version
                )
                outcome: Outcome = "unique" if probe.templates else "refused"  # nothing was searched
                answers[i] = decision = replace(decision, encounter_id=encounter_id, outcome=outcome, reasons=())
                if outcome == "unique":
                    if transaction.snapshot().row_of(probe.subject_id) is not None:
                        transaction.remove(probe.subject_id)
                    transaction.add(probe.subject_id, probe.templates, encounter_id, probe.encounter.groups)
                transaction.record(encounter_id, StoredDecision(digests[i], decision.outcome, to_json(decision)))
        return [answer for answer in answers.values() if answer is not None]


def _at(cells: Column, rows: NDArray[np.int64]) -> Column:
    return cells[rows] if isinstance(cells, np.ndarray) else [cells[row] for row in rows.tolist()]
