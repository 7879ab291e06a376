"""`kit ingest`: batch files of field kits into the gallery, with what became of every record.

Owns the job from files to outcomes. Bytes and signatures are `kit_file`'s, decisions the engine's, bookkeeping `kit_ledger`'s.

1. Of a file that is not what a trusted kit signed nothing is taken; of a file that was cut off every whole record is.
2. Each record is enrolled under its encounter_id: whatever comes twice is taken once.
3. A kit's clock is reported, and decides nothing.
4. Interrupted and started again with the same batches, it goes on, and ends with the same result, byte for byte.
"""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from biodedup.completeness import INCOMPLETE, SUPERSEDED
from biodedup.config import Config
from biodedup.engine import Engine
from biodedup.errors import BatchDamaged, CallerError
from biodedup.gallery.gallery import translated
from biodedup.jobs.kit_file import BatchReader, Record
from biodedup.jobs.kit_keys import PublicKey, load_trusted
from biodedup.jobs.kit_ledger import Ledger, Taker
from biodedup.jobs.progress import Progress, silent
from biodedup.jobs.results import check_table_name, write_json, write_page, write_table
from biodedup.values import Decision, Encounter, Missing

BatchState: TypeAlias = Literal["whole", "cut", "damaged", "refused", "repeated"]
RecordOutcome: TypeAlias = Literal[
    "enrolled", "duplicate", "review", "refused", "already_taken", "conflict", "subject_exists"
]
CLOCK_TOLERANCE_S = 300.0
"""Two clocks that are set by hand differ by minutes."""
_OF_DECISION: dict[str, RecordOutcome] = {"unique": "enrolled", "duplicate": "duplicate", "review": "review", "refused": "refused"}  # fmt: skip
_OF_REFUSAL: dict[str, RecordOutcome] = {"encounter_conflict": "conflict", "subject_exists": "subject_exists"}
_DAY_S = 86_400.0


@dataclass(frozen=True)
class Examined:
    """A batch file before anything is taken. entries: (sequence, encounter_id) in its order; last_packed_at: by the kit's clock."""

    path: Path
    state: BatchState
    problem: str = ""
    public: PublicKey | None = None
    digest: str = ""
    entries: tuple[tuple[int, str], ...] = ()
    void: tuple[int, ...] = ()
    last_packed_at: float | None = None


@dataclass(frozen=True)
class BatchOutcome:
    """What became of a file. state `refused`: no batch, or of an unknown kit; `repeated`: the same file was taken before."""

    batch: str
    kit_id: str
    state: BatchState
    records: int
    problem: str
    first_received_at: float | None = None
    out_of_order: int = 0
    clock_ahead_days: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a record. decision, candidate, score_db: of the journal, also where the record was taken before; first_from: the
    kit and sequence that brought it first; clock: why the kit's clock is doubtful."""

    batch: str
    kit_id: str
    sequence: int
    subject_id: str
    encounter_id: str
    outcome: RecordOutcome
    decision: str
    candidate: str | None
    score_db: float | None
    reason: str
    first_from: str
    captured_at: float | None
    packed_at: float
    received_at: float
    clock: str
    kit_refusals: str


@dataclass(frozen=True)
class Gap:
    """Sequences that never arrived."""

    kit_id: str
    key: str
    first: int
    last: int


@dataclass(frozen=True)
class Reused:
    """A sequence that came with two encounters: the kit's state was lost, or its key is on two machines."""

    kit_id: str
    sequence: int
    encounter_id: str
    before: str


@dataclass(frozen=True)
class IngestResult:
    """Everything that happened to some batch files."""

    batches: tuple[BatchOutcome, ...]
    outcomes: tuple[Outcome, ...]
    gaps: tuple[Gap, ...]
    reused: tuple[Reused, ...]
    received_at: float

    def summary(self) -> dict[str, Any]:
        """Counts, JSON-ready."""
        counts = Counter(outcome.outcome for outcome in self.outcomes)
        return {
            "batches": len(self.batches),
            "batches_not_taken": sum(batch.state in ("damaged", "refused") for batch in self.batches),
            "batches_cut": sum(batch.state == "cut" for batch in self.batches),
            "batches_repeated": sum(batch.state == "repeated" for batch in self.batches),
            "records": len(self.outcomes),
            **{name: counts[name] for name in (*_OF_DECISION.values(), "already_taken", "conflict", "subject_exists")},
            "clock_doubtful": sum(bool(outcome.clock) for outcome in self.outcomes),
            "clock_not_checked": sum(outcome.captured_at is None for outcome in self.outcomes),
            "sequences_missing": sum(gap.last - gap.first + 1 for gap in self.gaps),
            "sequences_reused": len(self.reused),
            "problems": [batch.problem for batch in self.batches if batch.problem],
        }


def examine_batch(path: Path, trusted: dict[bytes, PublicKey]) -> Examined:
    """Checks every signature of a file. What is wrong with it is in `state` and `problem`; raises StorageUnavailable alone."""
    entries: list[tuple[int, str]] = []
    last_packed_at: float | None = None
    public: PublicKey | None = None
    try:
        with BatchReader(path, trusted) as batch:
            public = batch.public
            for record in batch:
                entries.append((record.sequence, record.encounter.encounter_id or ""))
                last_packed_at = max(record.packed_at, last_packed_at or record.packed_at)
    except BatchDamaged as error:
        return Examined(path, "damaged", str(error), public)
    except CallerError as error:
        return Examined(path, "refused", str(error))
    problem = "" if batch.whole else _cut(path, public, entries)
    state: BatchState = "whole" if batch.whole else "cut"
    return Examined(path, state, problem, public, batch.digest.hex(), tuple(entries), batch.void, last_packed_at)


def ingest_batches(
    batches: Sequence[Path],
    gallery: Path,
    trusted: Path,
    out: Path,
    config: Config | None = None,
    *,
    report: Path | None = None,
    clock: Callable[[], float] = time.time,
    progress: Progress = silent,
) -> IngestResult:
    """Takes batch files into a gallery and writes `out` (.parquet or .csv), a row a record, with a summary and an HTML report beside it.

    trusted: a folder of the kits' .pub files. A file that cannot be taken is in the result, and stops no other.
    Raises InvalidInput (no trusted keys), GalleryBusy, GalleryDamaged, StorageUnavailable.
    """
    check_table_name(out)
    keys = load_trusted(trusted)
    with translated(f"writing beside {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
    examined = []
    for number, path in enumerate(batches, start=1):
        examined.append(examine_batch(path, keys))
        progress("checking", number, len(batches))
    usable = [one for one in examined if one.entries]
    if not usable:
        result = IngestResult(tuple(_described(one, None, 0.0) for one in examined), (), (), (), clock())
        _write(result, out, report)
        return result
    with Engine.open(gallery, config, clock=clock) as engine:
        ledger = Ledger(gallery)
        try:
            run, received_at = ledger.run([one.digest for one in usable], clock())
            result = _Ingest(engine, ledger, run, received_at, keys, progress).result(examined)
            _write(result, out, report)
            ledger.finish(run)
            return result
        finally:
            ledger.close()


class _Ingest:
    """One run over some examined files."""

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger,
        run: int,
        received_at: float,
        keys: dict[bytes, PublicKey],
        progress: Progress,
    ) -> None:
        self._engine = engine
        self._ledger = ledger
        self._run = run
        self._received_at = received_at
        self._keys = keys
        self._progress = progress
        self._done = 0
        self._total = 0

    def result(self, examined: Sequence[Examined]) -> IngestResult:
        self._total = sum(len(one.entries) for one in examined)
        outcomes: list[Outcome] = []
        described: list[BatchOutcome] = []
        reused: list[Reused] = []
        digests = set[str]()
        for file, one in enumerate(examined):
            first = None
            if one.public is not None and one.entries:
                key, kit_id = one.public.fingerprint.hex(), one.public.kit_id
                first = self._ledger.first_received(one.digest, kit_id, key, one.path.name, self._run, self._received_at)  # fmt: skip
                if one.digest in digests:
                    first = self._received_at
                digests.add(one.digest)
                before = self._ledger.arrived(key, kit_id, dict(one.entries), one.void)
                names = dict(one.entries)
                reused += [Reused(kit_id, n, names[n], name) for n, name in sorted(before.items())]
                outcomes += self._taken(file, one)
            described.append(_described(one, first, self._received_at))
        kits = {one.public.fingerprint.hex(): one.public.kit_id for one in examined if one.public and one.entries}
        gaps = [Gap(kit_id, key[:16], *span) for key, kit_id in kits.items() for span in self._ledger.absent(key)]  # fmt: skip
        return IngestResult(tuple(described), tuple(outcomes), tuple(gaps), tuple(reused), self._received_at)

    def _taken(self, file: int, one: Examined) -> Iterator[Outcome]:
        assert one.public is not None, "a batch with records has a key"
        kit_id = one.public.kit_id
        takers: dict[str, Taker] = {}
        for place, (sequence, encounter_id) in enumerate(one.entries):
            before = self._engine.decision(encounter_id)
            if encounter_id not in takers and (before is None or not before.final):
                takers[encounter_id] = Taker(self._run, file, place, one.public.kit_id, sequence)
        self._ledger.take(takers)
        waiting: deque[Record] = deque()

        def encounters() -> Iterator[Encounter]:
            with BatchReader(one.path, self._keys) as batch:
                # what was examined, and no more: the file may grow while it is read
                for record, _ in zip(batch, one.entries, strict=False):
                    waiting.append(record)
                    yield _sent(record)

        previous: float | None = None
        for place, decision in enumerate(self._engine.enroll_many(encounters())):
            record = waiting.popleft()
            taker = self._ledger.taker(record.encounter.encounter_id or "")
            here = taker is not None and (taker.run, taker.file, taker.place) == (self._run, file, place)
            doubts = clock_doubts(record, one.public, previous, self._received_at)
            told = partial(_outcome, one.path.name, kit_id, record, taker, here, self._received_at, doubts)
            outcome = self._with_subject(record, told(decision), told)
            if outcome.outcome == "refused":
                self._ledger.note_refused(self._run, file, place, json.dumps(asdict(outcome)))
            elif outcome.outcome == "conflict" and (before_repair := self._ledger.refused(self._run, file, place)):
                outcome = Outcome(
                    **json.loads(before_repair)
                )  # this run was interrupted after a later file had brought more
            yield outcome
            previous = record.captured_at if record.captured_at is not None else previous
            self._done += 1
            self._progress("enrolling", self._done, self._total)

    def _with_subject(self, record: Record, outcome: Outcome, told: Callable[[Decision], Outcome]) -> Outcome:
        """One subject_id in two encounters: a second visit, or another person's id, which somebody has to judge?"""
        if outcome.outcome != "subject_exists":
            return outcome
        encounter = _sent(record)
        try:
            if self._engine.verify(encounter, encounter.subject_id or "").accepted:
                return replace(outcome, reason="subject_exists: the same person")
            return told(self._engine.dispute(encounter))
        except CallerError:
            return replace(outcome, reason="subject_exists: cannot be compared")


def _outcome(
    batch: str,
    kit_id: str,
    record: Record,
    taker: Taker | None,
    here: bool,
    received_at: float,
    doubts: Sequence[str],
    decision: Decision,
) -> Outcome:
    """here: this very record is the one that was taken, now or before this run was interrupted."""
    # what a caller's mistake refuses is not in the journal, and is refused again each time
    journalled = all(refusal.column != "encounter" for refusal in decision.refusals)
    taken = journalled and decision.final  # repaired captures are taken under the same encounter_id
    reasons = [refusal.reason for refusal in decision.refusals]
    outcome = next((_OF_REFUSAL[reason] for reason in reasons if reason in _OF_REFUSAL), _OF_DECISION[decision.outcome])
    if taken and not here:
        outcome = "already_taken"
    first_from = ""
    if not here and outcome in ("already_taken", "conflict"):
        first_from = "enrolled directly" if taker is None else f"kit {taker.kit_id}, sequence {taker.sequence}"
    best = decision.best if decision.outcome in ("duplicate", "review") else None
    return Outcome(
        batch,
        kit_id,
        record.sequence,
        record.encounter.subject_id or "",
        record.encounter.encounter_id or "",
        outcome,
        decision.outcome if journalled else "",
        None if best is None else best.subject_id,
        None if best is None else round(best.score_db, 3),
        "; ".join(
            [_reason(refusal.column, refusal.reason) for refusal in decision.refusals if refusal.reason != SUPERSEDED]
            + [reason for reason in decision.reasons if reason in ("another_person", INCOMPLETE)]
        ),
        first_from,
        record.captured_at,
        record.packed_at,
        received_at,
        "; ".join(doubts),
        "; ".join(_reason(refusal.column, refusal.reason) for refusal in record.refusals),
    )


def _sent(record: Record) -> Encounter:
    """The encounter of a record; one of templates alone says which captures could not become any. What `--only-good` left out of a
    record of images was left out on the operator's word: it was not sent."""
    encounter = record.encounter
    if any(not isinstance(capture, Missing) for capture in encounter.captures):
        return encounter
    return replace(encounter, declined=[one for one in record.refusals if one.column not in encounter.templates])


def clock_doubts(record: Record, public: PublicKey, previous: float | None, received_at: float) -> list[str]:
    """What speaks against the kit's clock; nothing where a record has no time to check. previous: captured_at of the record before
    this one in its batch."""
    captured_at, doubts = record.captured_at, list[str]()
    if captured_at is None:
        return doubts
    if captured_at > received_at + CLOCK_TOLERANCE_S:
        doubts.append(f"captured {_days(captured_at - received_at)} in the future")
    if captured_at < public.made_at - CLOCK_TOLERANCE_S:
        doubts.append(f"captured {_days(public.made_at - captured_at)} before the kit's key was made")
    if captured_at > record.packed_at + CLOCK_TOLERANCE_S:
        doubts.append("captured after it was packed")
    if previous is not None and captured_at < previous - CLOCK_TOLERANCE_S:
        doubts.append("captured before the record that precedes it")
    return doubts


def _days(seconds: float) -> str:
    return f"{seconds / _DAY_S:,.0f} days" if seconds >= 2 * _DAY_S else f"{seconds / 3600:,.1f} hours"


def _reason(column: str, reason: str) -> str:
    return reason if column == "encounter" else f"{column}: {reason}"


def _cut(path: Path, public: PublicKey | None, entries: Sequence[tuple[int, str]]) -> str:
    kit = "the kit" if public is None else f"kit {public.kit_id}"
    if not entries:
        return f"{path} breaks off before its first record; copy it from {kit} again"
    return (
        f"{path} breaks off: {len(entries)} records were whole, of an unknown number, up to sequence {entries[-1][0]}; ask {kit} for the "
        "rest: copy the file again, what was taken already will not be doubled"
    )


def _described(one: Examined, first_received_at: float | None, received_at: float) -> BatchOutcome:
    sequences = [sequence for sequence, _ in one.entries]
    ahead = None if one.last_packed_at is None else (one.last_packed_at - received_at) / _DAY_S
    return BatchOutcome(
        one.path.name,
        one.public.kit_id if one.public else "",
        "repeated" if first_received_at is not None and one.state == "whole" else one.state,
        len(one.entries),
        one.problem,
        first_received_at,
        sum(b < a for a, b in pairwise(sequences)),
        round(ahead, 2) if ahead is not None and ahead * _DAY_S > CLOCK_TOLERANCE_S else None,
    )


def _write(result: IngestResult, out: Path, report: Path | None) -> None:
    def moment(seconds: float | None) -> datetime | None:
        try:
            return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
        except (ValueError, OverflowError, OSError):
            return None  # a clock that is beyond any calendar

    times = ("captured_at", "packed_at", "received_at")
    rows = [asdict(o) | {name: moment(getattr(o, name)) for name in times} for o in result.outcomes]
    kinds = {"sequence": pa.int64(), "score_db": pa.float64()} | dict.fromkeys(times, pa.timestamp("ms", "UTC"))
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in Outcome.__dataclass_fields__])
    write_table(pa.Table.from_pylist(rows, schema=schema), out)
    write_json(result.summary(), out.with_name(f"{out.stem}.summary.json"))
    write_page(report or out.with_suffix(".html"), "kit_ingest.html", result=result, summary=result.summary())
