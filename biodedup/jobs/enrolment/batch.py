"""`enroll_batch`: enrols a manifest of encounters. Each encounter is searched in the whole gallery, including its own batch.

Owns the flow and the outcome of each record. Never extracts, compares or stores: worker processes extract templates, while the engine
searches and commits the previous batch.

    manifest -> read -> (workers) quality gate, templates -> engine: search, decide, commit -> outcome

1. The gallery's journal is authoritative. An encounter that it has decided is reported with that decision, and not extracted again.
2. Each encounter is compared with all encounters before it. The batches depend only on the manifest, so that a job that was killed and
   restarted ends with the same result. Two things may differ: `decided_at`, and scores by hundredths of a decibel, because sealing in the
   background rounds embeddings to eight bits. A decided encounter keeps its first decision.
3. A bad record is refused alone. A record that was refused without a decision may be sent again with other content under its encounter_id.
   A record whose file is absent or unreadable stays undecided until the file arrives: every run tries it again.
4. Within one manifest, the first record with an encounter_id owns it. A later record with the same id and other content is refused.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from biodedup.common.described import Described
from biodedup.common.executors import LOCAL, Executor
from biodedup.embed.isolation import FAILURES
from biodedup.engine import Engine
from biodedup.errors import InvalidInput
from biodedup.jobs.enrolment.outcomes import (
    WORDS,
    Outcome,
    OutcomeWriter,
    Tally,
    already_enrolled,
    decided,
    outcome_table,
    refused,
)
from biodedup.jobs.enrolment.queue import Arrival, Backlog, Finished
from biodedup.jobs.manifests.encounters import Content, Manifest, Record, derived_id, name_hash, name_of
from biodedup.jobs.manifests.options import DEFAULT_OPTIONS, TableOptions
from biodedup.jobs.shared.known_subject import verify_or_dispute
from biodedup.jobs.shared.output import check_table_name
from biodedup.jobs.shared.page import write_page
from biodedup.jobs.shared.progress import Progress, silent
from biodedup.jobs.shared.workers import Extraction, Workers
from biodedup.outcomes import outcome_of
from biodedup.required import INCOMPLETE, keep_better
from biodedup.values import Decision, Encounter, Refusal, Template, Verification

Templates: TypeAlias = dict[str, Any]
_T = TypeVar("_T")

_AHEAD, _AHEAD_MAX = 2, 16
"""Batches that are extracted while one is searched: the default, and the most that an executor gets."""
_TASK_ENCOUNTERS = 8
"""Encounters in a worker's task: the networks are faster with several images at once."""
_BATCH_BYTES_MAX = 64 << 20


@dataclass(frozen=True)
class BatchResult(Described):
    """The outcome of a manifest. already: how many of the enrolled subjects were enrolled before; repeated: records that repeat an earlier
    record of the manifest.

    extracted: encounters whose templates this run extracted; decided_now: encounters that this run decided. seconds: the duration of the run,
    and of its parts in the calling process: reading, waiting for extraction, searching and committing.
    """

    records: int
    statuses: dict[str, int]
    already: int
    repeated: int
    reasons: dict[str, int]
    extracted: int
    decided_now: int
    seconds: dict[str, float]

    @property
    def outcomes(self) -> dict[str, int]:
        """The counts of `statuses`, by outcome: `unique`, `duplicate`, `review`, `refused`."""
        return {outcome_of(status) or status: count for status, count in self.statuses.items()}

    def summary(self) -> dict[str, Any]:
        """The counts, JSON-ready."""
        rate = self.decided_now / self.seconds["all"] if self.seconds["all"] else 0.0
        return {
            "records": self.records,
            **self.statuses,
            "of these enrolled before": self.already,
            "repeated in the manifest": self.repeated,
            "reasons": self.reasons,
            "decided now": self.decided_now,
            "decided now, a second": round(rate, 1),
        }


@dataclass(eq=False)
class _Item:
    """A record in progress. listed: it has a line in the backlog; stale: that line does not have the known outcome yet; repeats: the earlier
    record of this manifest that it is a copy of."""

    record: Record
    content: Content | None = None
    encounter_id: str | None = None
    outcome: Outcome | None = None
    listed: bool = True
    stale: bool = False
    repeats: _Item | None = None

    @property
    def undecided(self) -> bool:
        return self.outcome is None and self.repeats is None


@dataclass(eq=False)
class _Batch:
    """Records that are decided and noted together. extractions: items and the running extraction of their captures; waiting: items that the
    engine has to decide; finished: items whose outcome the backlog has to note."""

    items: list[_Item] = field(default_factory=list)
    extractions: list[tuple[list[_Item], Extraction]] = field(default_factory=list)
    waiting: deque[tuple[_Item, Encounter]] = field(default_factory=deque)
    finished: list[_Item] = field(default_factory=list)


def announce(
    backlog: Backlog, manifest: Path, *, options: TableOptions = DEFAULT_OPTIONS, clock: Callable[[], float] = time.time
) -> int:
    """Adds the encounters of a manifest to the backlog as captured, before their captures arrive. Returns the number of records.

    Raises InvalidInput if the manifest is not a table, or has no column encounter_id.
    """
    table = Manifest(manifest, options)
    if not table.has_ids:
        raise InvalidInput(
            f"{manifest} has no column encounter_id; add it, so that the captures can be recognised when they arrive"
        )
    survey = table.survey()
    backlog.announce(_arrivals(table), clock())
    return survey.count


def enroll_batch(
    engine: Engine,
    backlog: Backlog,
    manifest: Path,
    out: Path,
    *,
    report: Path | None = None,
    workers: int = 2,
    capture_s_max: float | None = None,
    retry_failed: bool = False,
    model_id: str | Mapping[str, str] | None = None,
    options: TableOptions = DEFAULT_OPTIONS,
    clock: Callable[[], float] = time.time,
    stopwatch: Callable[[], float] = time.perf_counter,
    progress: Progress = silent,
    pool: Workers | None = None,
    executor: Executor = LOCAL,
) -> BatchResult:
    """Enrols a manifest (.parquet or .csv). Writes `out` (.parquet or .csv) with one row for each record, and optionally a page for an official.

    An interrupted job resumes. A finished job that is run again changes nothing and writes the same table. A batch has
    `engine.config.batch_size` records.

    report: path of the HTML page; None writes none. workers: number of processes that extract. capture_s_max: time limit of a capture in
    seconds, after which its worker is killed; None takes the limit of the config's `isolation`. retry_failed: retry captures whose worker died
    or took too long. model_id: the model of the manifest's embeddings, one id for all or a mapping by column; required if the gallery has no
    model for a column. executor: where captures are extracted (`jobs.ray_executor`); `workers` is only used on this machine.
    Raises InvalidInput if the manifest is not a table, StorageUnavailable.
    """
    check_table_name(out)
    table = Manifest(manifest, options)
    with ExitStack() as stack:
        pool = pool or stack.enter_context(Workers(engine.config, workers, capture_s_max=capture_s_max))
        job = _Job(
            engine,
            backlog,
            table,
            pool,
            executor,
            retry_failed=retry_failed,
            model_id=model_id,
            clock=clock,
            stopwatch=stopwatch,
        )
        tally = job.run(stack.enter_context(outcome_table(out, table.metadata, engine.config.labels)), progress)
    result = job.result(tally)
    if report is not None:
        write_page(
            report,
            "batch.html",
            manifest=manifest.name,
            result=result,
            tally=tally,
            words=WORDS,
            label=engine.config.labels.of,
            at=clock(),
            size=len(engine),
            table=out.name,
        )
    return result


def _arrivals(table: Manifest) -> Iterator[Arrival]:
    for record in table.keys():
        if record.encounter_id is not None:
            yield Arrival(record.encounter_id, record.subject_id, record.captured_at)


class _Job:
    """One run over a manifest."""

    def __init__(
        self,
        engine: Engine,
        backlog: Backlog,
        table: Manifest,
        pool: Workers,
        executor: Executor,
        *,
        retry_failed: bool,
        model_id: str | Mapping[str, str] | None,
        clock: Callable[[], float],
        stopwatch: Callable[[], float],
    ) -> None:
        self._done = self._extracted_count = self._decided_count = 0
        self._seconds = dict.fromkeys(("all", "reading", "waiting", "searching"), 0.0)
        self._engine, self._backlog, self._table = engine, backlog, table
        self._pool, self._executor = pool, executor
        self._retry_failed, self._model_id, self._clock, self._stopwatch = retry_failed, model_id, clock, stopwatch
        self._suspected: frozenset[int] = frozenset()
        self._owners: dict[str, _Item] = {}

    def run(self, writer: OutcomeWriter, progress: Progress) -> Tally:
        """Decides every record and writes its outcome."""
        started = self._stopwatch()
        survey = self._table.survey()
        self._suspected = survey.repeated
        if self._table.has_ids:
            self._backlog.enqueue(_arrivals(self._table), self._clock())
        tally = Tally()
        for batch in self._settled_batches():
            for item in batch.items:
                assert item.outcome is not None, "a settled batch has outcomes"
                writer.add(item.record, item.encounter_id, item.outcome)
                tally.add(item.record, item.encounter_id, item.outcome, repeated=item.repeats is not None)
            self._done += len(batch.items)
            progress("enrolling", self._done, max(survey.count, self._done))
        self._seconds["all"] = self._stopwatch() - started
        return tally

    def result(self, tally: Tally) -> BatchResult:
        return BatchResult(
            records=self._done,
            statuses={status: tally.statuses[status] for status in ("enrolled", "duplicate", "adjudicate", "refused")},
            already=tally.already,
            repeated=tally.repeated,
            reasons={reason: count for (_, reason), count in tally.reasons.most_common()},
            extracted=self._extracted_count,
            decided_now=self._decided_count,
            seconds={name: round(seconds, 3) for name, seconds in self._seconds.items()},
        )

    def _settled_batches(self) -> Iterator[_Batch]:
        """Batches in the manifest's order, each decided and committed. Meanwhile the next batches are extracted."""
        for batch in self._extracted_batches():
            yield self._timed(partial(self._settle, batch))

    def _settle(self, batch: _Batch) -> _Batch:
        """Decides and commits a batch. Scores depend on the gallery. They are the same in every run, because the batches depend only on the
        manifest, and each batch is searched after the previous one is committed."""
        decisions = self._engine.enroll_many([encounter for _, encounter in batch.waiting])
        for (item, encounter), decision in zip(batch.waiting, decisions, strict=True):
            item.outcome = self._outcome_of(encounter, decision)
        batch.waiting.clear()
        return self._finish(batch)

    def _timed(self, work: Callable[[], _T]) -> _T:
        """Does the work, and adds its duration to that of searching and committing."""
        began = self._stopwatch()
        result = work()
        self._seconds["searching"] += self._stopwatch() - began
        return result

    # reading ----------------------------------------------------------------------------------------------------

    def _extracted_batches(self) -> Iterator[_Batch]:
        """Batches whose captures are extracted. Workers extract the next batches meanwhile."""
        ahead: deque[_Batch] = deque()
        tasks = max(self._engine.config.batch_size // _TASK_ENCOUNTERS, 1)
        ahead_max = min(max(_AHEAD, -(-self._executor.pieces_ahead // tasks)), _AHEAD_MAX)
        for batch in chain(self._submitted_batches(), [None] * ahead_max):
            if batch is not None:
                ahead.append(batch)
            if ahead and (batch is None or len(ahead) > ahead_max):
                yield self._collect(ahead.popleft())

    def _submitted_batches(self) -> Iterator[_Batch]:
        """Batches whose files are read, and whose captures are submitted to the workers."""
        items: list[_Item] = []
        byte_count, began = 0, self._stopwatch()
        for record in self._table.records():
            item = self._read(record)
            items.append(item)
            byte_count += item.content.byte_count if item.content else 0
            if len(items) >= self._engine.config.batch_size or byte_count >= _BATCH_BYTES_MAX:
                batch = self._submit(items)
                self._seconds["reading"] += self._stopwatch() - began
                yield batch
                items, byte_count, began = [], 0, self._stopwatch()
        if items:
            yield self._submit(items)

    def _read(self, record: Record) -> _Item:
        """Reads the files of a record. Sets its outcome if that is known before extraction."""
        if record.problem is not None:
            item = _Item(record, None, record.encounter_id, refused([record.problem]))
            self._compare_with_owner(item)
            item.listed = item.listed and item.encounter_id is not None
            item.stale = item.listed and self._is_open(item)
            return item
        content = self._table.read(record, self._engine.config.capture)
        item = _Item(record, content, record.encounter_id or derived_id(record, content))
        self._compare_with_owner(item)
        if item.undecided:
            self._recall(item, content)
        return item

    def _compare_with_owner(self, item: _Item) -> None:
        """Compares a record with the first record of this manifest that has the same encounter_id: it is a repetition, or a conflict."""
        if item.encounter_id is None or name_hash(name_of(item.record)) not in self._suspected:
            return
        owner = self._owners.setdefault(item.encounter_id, item)
        if owner is item:
            return
        item.listed = False
        if owner.content is not None and item.content is not None and owner.content.digest == item.content.digest:
            item.repeats = owner
        elif item.outcome is None:
            item.outcome = _conflict(f"row {owner.record.row} of the manifest has the same encounter_id")

    def _is_open(self, item: _Item) -> bool:
        """Whether an encounter has no outcome yet, neither in the backlog nor in the journal."""
        assert item.encounter_id is not None, "a listed item has an id"
        entry = self._backlog.entry(item.encounter_id)
        return (entry is None or entry.outcome is None) and self._decided_before(item.encounter_id) is None

    def _decided_before(self, encounter_id: str) -> Decision | None:
        """The decision on an encounter in the gallery's journal; None if there is none, or if the encounter may be sent again."""
        decision = self._engine.decision(encounter_id)
        return decision if decision is not None and decision.final else None

    def _recall(self, item: _Item, content: Content) -> None:
        """Sets the outcome of an encounter that an earlier run decided, or refused with the same content."""
        assert item.encounter_id is not None, "an item that was read has an id"
        entry = self._backlog.entry(item.encounter_id)
        decision = self._decided_before(item.encounter_id)
        noted = None if entry is None or entry.outcome is None else Outcome.from_json(entry.outcome)
        same = entry is not None and entry.digest == content.digest
        if decision is not None:
            # without a digest there is nothing to compare: another command decided the encounter, or the backlog was lost
            unknown = entry is None or entry.digest is None or content.late
            if decision.subject_id != item.record.subject_id or not (same or unknown):
                item.outcome, item.listed = _conflict("the encounter was decided with other content before"), False
                return
            item.outcome = decided(decision, noted.before if noted else ())
            item.stale = entry is None or entry.status != item.outcome.status
        elif same and noted is not None and self._still_holds(item.record, noted):
            item.outcome = noted

    def _still_holds(self, record: Record, noted: Outcome) -> bool:
        """Whether an outcome of an earlier run is still valid, although the gallery's journal does not have it."""
        if noted.reason == "already_enrolled":
            return record.subject_id in self._engine
        if noted.reason == INCOMPLETE and noted.required is not None:
            return noted.required == self._engine.policy.required
        return noted.status == "refused" and not (self._retry_failed and noted.reason in FAILURES)

    def _submit(self, items: list[_Item]) -> _Batch:
        """Makes a batch, and submits its captures to the workers."""
        batch = _Batch(items)
        undecided = [item for item in items if item.undecided]
        self._list(item for item in items if item.undecided or item.stale)
        with_captures = [item for item in undecided if item.content and item.content.captures]
        for first in range(0, len(with_captures), _TASK_ENCOUNTERS):
            task = with_captures[first : first + _TASK_ENCOUNTERS]
            captures = [item.content.captures for item in task if item.content]
            batch.extractions.append((task, self._executor.submit(self._pool, captures)))
        self._extracted_count += len(with_captures)
        return batch

    def _list(self, items: Iterable[_Item]) -> None:
        """Adds items to the backlog as received."""
        arrivals = [
            Arrival(
                item.encounter_id,
                item.record.subject_id,
                item.record.captured_at,
                item.content.digest if item.content else None,
            )
            for item in items
            if item.encounter_id is not None
        ]
        if arrivals:
            self._backlog.receive(arrivals, self._clock())

    # deciding ---------------------------------------------------------------------------------------------------

    def _collect(self, batch: _Batch) -> _Batch:
        """Waits for the templates of a batch. Items with templates then wait for a decision; the other undecided items are refused."""
        began = self._stopwatch()
        extracted: dict[_Item, Sequence[Template | Refusal]] = {}
        for items, extraction in batch.extractions:
            extracted |= zip(items, extraction.result(), strict=True)
        self._seconds["waiting"] += self._stopwatch() - began
        batch.finished = [item for item in batch.items if item.stale]
        for item in batch.items:
            if item.undecided:
                batch.finished.append(item)
                assert item.content is not None, "an undecided item was read"
                templates, refusals = _templates(item.content, extracted.get(item, ()))
                if templates:
                    record = item.record
                    encounter = Encounter(
                        record.subject_id,
                        record.missing,
                        templates,
                        item.encounter_id,
                        record.groups,
                        refusals,
                        model_id=self._model_id,
                    )
                    batch.waiting.append((item, encounter))
                else:
                    item.outcome = refused(refusals, self._clock())
        if batch.waiting:
            notes = ((item.encounter_id or "", Outcome("searching").to_json()) for item, _ in batch.waiting)
            self._backlog.search(notes, self._clock())
        return batch

    def _outcome_of(self, encounter: Encounter, decision: Decision) -> Outcome:
        if decision.outcome == "refused" and decision.refusals and decision.refusals[0].reason == "subject_exists":
            return self._enrolled_before(encounter, decision)
        return decided(decision, required=self._engine.policy.required)

    def _finish(self, batch: _Batch) -> _Batch:
        """Sets the outcomes of repeated records, and notes all new outcomes in the backlog."""
        for item in batch.items:
            if item.repeats is not None:
                item.outcome = item.repeats.outcome
            if item.content is not None:  # an item stays in memory if records may repeat it; its captures are freed
                item.content = replace(item.content, captures=(), templates={})
        if batch.finished:
            self._backlog.finish(self._line(item) for item in batch.finished)
        self._decided_count += len(batch.finished)
        return batch

    def _enrolled_before(self, encounter: Encounter, decision: Decision) -> Outcome:
        """The outcome of an encounter whose subject_id is already enrolled: the same person, or a case."""
        assert decision.subject_id is not None, "the subject is enrolled under this id"
        match verify_or_dispute(self._engine, encounter, decision.subject_id):
            case Verification() as verified:
                return already_enrolled(verified, decision.decided_at)
            case Decision() as disputed:
                return decided(disputed)
        return decided(decision, encounter.declined)

    def _line(self, item: _Item) -> Finished:
        assert item.outcome is not None and item.encounter_id is not None, "a finished item has an outcome and an id"
        decided_at = self._clock() if item.outcome.decided_at is None else item.outcome.decided_at
        return Finished(item.encounter_id, item.outcome.status, decided_at, item.outcome.to_json())


def _conflict(detail: str) -> Outcome:
    return refused([Refusal("encounter", "encounter_conflict", detail)])


def _templates(content: Content, extracted: Sequence[Template | Refusal]) -> tuple[Templates, tuple[Refusal, ...]]:
    """(column -> template, refused captures). Of two captures of a finger, the better one is kept and the other is refused."""
    templates: Templates = dict(content.templates)
    refusals = list(content.refusals)
    for result in extracted:
        if isinstance(result, Refusal):
            refusals.append(result)
            continue
        if (worse := keep_better(templates, result)) is not None:
            refusals.append(worse)
    return templates, tuple(refusals)
