"""Describes the outcomes of field kits' batches and records, and writes them as a table, a summary and a page.

Owns the words of the result, and the checks of a kit's clock. Never decides, and never reads a batch file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from biodedup.common.described import Described
from biodedup.config import LabelConfig
from biodedup.jobs.kits.format.keys import PublicKey
from biodedup.jobs.kits.format.record import Record
from biodedup.jobs.kits.ledger import Taker
from biodedup.jobs.kits.trust import TrustedKey
from biodedup.jobs.shared.files import write_json
from biodedup.jobs.shared.output import write_table
from biodedup.jobs.shared.page import write_page
from biodedup.required import INCOMPLETE, SUPERSEDED
from biodedup.values import Decision

BatchState: TypeAlias = Literal["whole", "cut", "damaged", "refused", "repeated"]
RecordOutcome: TypeAlias = Literal[
    "enrolled", "duplicate", "review", "refused", "already_taken", "conflict", "subject_exists"
]
CLOCK_TOLERANCE_S = 300.0
"""Tolerated difference of two clocks, which differ by minutes if people set them."""
_OF_DECISION: dict[str, RecordOutcome] = {"unique": "enrolled", "duplicate": "duplicate", "review": "review", "refused": "refused"}  # fmt: skip
_LABELLED_AS: dict[str, str] = {"conflict": "refused", "subject_exists": "refused"}
_OF_REFUSAL: dict[str, RecordOutcome] = {"encounter_conflict": "conflict", "subject_exists": "subject_exists"}
_DAY_S = 86_400.0


@dataclass(frozen=True)
class Entry:
    """A record in a batch file. refused: the reason why it is refused before its captures are examined, or ''."""

    sequence: int
    encounter_id: str
    refused: str = ""


@dataclass(frozen=True)
class Examined:
    """A batch file whose signatures were checked. entries: its records, in order; void: void sequences; last_packed_at: the latest time at which
    a record was packed, by the kit's clock."""

    path: Path
    state: BatchState
    problem: str = ""
    public: TrustedKey | None = None
    digest: str = ""
    entries: tuple[Entry, ...] = ()
    void: tuple[int, ...] = ()
    last_packed_at: float | None = None


@dataclass(frozen=True)
class BatchOutcome:
    """The outcome of a batch file. state: `whole`; `cut`: incomplete; `damaged`: not as it was signed; `refused`: not a batch, or not allowed;
    `repeated`: the same file was ingested before."""

    batch: str
    kit_id: str
    state: BatchState
    records: int
    problem: str
    first_received_at: float | None = None
    out_of_order: int = 0
    clock_ahead_days: float | None = None
    void: int = 0


@dataclass(frozen=True)
class Outcome:
    """The outcome of a record. encounter_id: id in the gallery, bound to the kit's key; kit_encounter_id: the kit's id; decision, candidate,
    score_db: of the journal, also if the record was enrolled before; first_from: the kit and sequence that first brought the record; clock:
    reasons to doubt the kit's clock."""

    batch: str
    kit_id: str
    sequence: int
    subject_id: str
    encounter_id: str
    kit_encounter_id: str
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
    """A sequence that arrived with two encounters: the kit's state was lost, or its key is on two machines."""

    kit_id: str
    sequence: int
    encounter_id: str
    before: str


@dataclass(frozen=True)
class IngestResult(Described):
    """The result of an ingest. gaps: sequences that never arrived; trust_problems: unusable files in the trusted folder; written: False if an
    earlier result was not overwritten."""

    batches: tuple[BatchOutcome, ...]
    outcomes: tuple[Outcome, ...]
    gaps: tuple[Gap, ...]
    reused: tuple[Reused, ...]
    received_at: float
    trust_problems: tuple[str, ...] = ()
    written: bool = True

    def summary(self) -> dict[str, Any]:
        """The counts, JSON-ready."""
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
            "sequences_void": sum(batch.void for batch in self.batches),
            "problems": [*self.trust_problems, *(batch.problem for batch in self.batches if batch.problem)],
        }


def received_outcome(
    batch: str, kit_id: str, record: Record, encounter_id: str, received_at: float, doubts: Sequence[str]
) -> Outcome:
    """The preliminary outcome of a record before its decision. encounter_id: id in the gallery; doubts: reasons to doubt the kit's clock."""
    return Outcome(
        batch=batch,
        kit_id=kit_id,
        sequence=record.sequence,
        subject_id=record.encounter.subject_id or "",
        encounter_id=encounter_id,
        kit_encounter_id=record.encounter.encounter_id or "",
        outcome="refused",
        decision="",
        candidate=None,
        score_db=None,
        reason="",
        first_from="",
        captured_at=record.captured_at,
        packed_at=record.packed_at,
        received_at=received_at,
        clock="; ".join(doubts),
        kit_refusals="; ".join(_reason(refusal.column, refusal.reason) for refusal in record.refusals),
    )


def decided_outcome(received: Outcome, taker: Taker | None, here: bool, decision: Decision) -> Outcome:
    """The outcome of a record after its decision. here: this record, and no copy of it, was enrolled, now or before an interruption of this run."""
    # a refusal for a caller's mistake is not in the journal, and is repeated each time
    journalled = all(refusal.column != "encounter" for refusal in decision.refusals)
    reasons = [refusal.reason for refusal in decision.refusals]
    outcome = next((_OF_REFUSAL[reason] for reason in reasons if reason in _OF_REFUSAL), _OF_DECISION[decision.outcome])
    taken = (
        journalled and decision.final
    )  # a decision that is not final allows new captures under the same encounter_id
    if taken and not here:
        outcome = "already_taken"
    first_from = ""
    if not here and outcome in ("already_taken", "conflict"):
        first_from = "enrolled directly" if taker is None else f"kit {taker.kit_id}, sequence {taker.sequence}"
    best = decision.best if decision.outcome in ("duplicate", "review") else None
    return replace(
        received,
        outcome=outcome,
        decision=decision.outcome if journalled else "",
        candidate=None if best is None else best.subject_id,
        score_db=None if best is None else round(best.score_db, 3),
        reason="; ".join(
            [_reason(refusal.column, refusal.reason) for refusal in decision.refusals if refusal.reason != SUPERSEDED]
            + [reason for reason in decision.reasons if reason in ("another_person", INCOMPLETE)]
        ),
        first_from=first_from,
    )


def clock_doubts(record: Record, public: PublicKey, previous: float | None, received_at: float) -> list[str]:
    """The reasons to doubt the kit's clock, if a record states captured_at. previous: captured_at of the previous record in the batch."""
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


def cut_text(path: Path, public: PublicKey | None, entries: Sequence[Entry]) -> str:
    """The problem of a file that was cut off."""
    kit = "the kit" if public is None else f"kit {public.kit_id}"
    if not entries:
        return f"{path} breaks off before its first record; copy it from {kit} again"
    return (
        f"{path} breaks off: {len(entries)} records were whole, up to sequence {entries[-1].sequence}; the number of missing records is unknown. "
        f"Copy the file from {kit} again; records that were enrolled are not enrolled twice"
    )


def described(file: Examined, first_received_at: float | None, received_at: float) -> BatchOutcome:
    """The outcome of a batch file. first_received_at: the time of an earlier ingest of the same file, or None."""
    sequences = [entry.sequence for entry in file.entries]
    ahead = None if file.last_packed_at is None else (file.last_packed_at - received_at) / _DAY_S
    return BatchOutcome(
        batch=file.path.name,
        kit_id=file.public.kit_id if file.public else "",
        state="repeated" if first_received_at is not None and file.state == "whole" else file.state,
        records=len(file.entries),
        problem=file.problem,
        first_received_at=first_received_at,
        out_of_order=sum(b < a for a, b in pairwise(sequences)),
        clock_ahead_days=round(ahead, 2) if ahead is not None and ahead * _DAY_S > CLOCK_TOLERANCE_S else None,
        void=len(file.void),
    )


def write_result(result: IngestResult, out: Path, report: Path | None, labels: LabelConfig) -> IngestResult:
    """Writes the table, the summary and the page. Returns the result. If every file was refused, the results of an earlier run are not
    overwritten."""
    page, summary = report or out.with_suffix(".html"), out.with_name(f"{out.stem}.summary.json")
    nothing_taken = not result.outcomes and all(batch.state != "whole" for batch in result.batches)
    if nothing_taken and any(path.exists() for path in (out, page, summary)):
        return replace(result, written=False)

    def moment(seconds: float | None) -> datetime | None:
        try:
            return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
        except (ValueError, OverflowError, OSError):
            return None  # the kit's clock is outside the range of dates

    times = ("captured_at", "packed_at", "received_at")
    rows = [
        asdict(o)
        | {name: moment(getattr(o, name)) for name in times}
        | {"label": labels.of(o.decision if o.outcome == "already_taken" else _LABELLED_AS.get(o.outcome, o.outcome))}
        for o in result.outcomes
    ]
    kinds = {"sequence": pa.int64(), "score_db": pa.float64()} | dict.fromkeys(times, pa.timestamp("ms", "UTC"))
    names = list(Outcome.__dataclass_fields__)
    names.insert(names.index("outcome") + 1, "label")
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in names])
    write_table(pa.Table.from_pylist(rows, schema=schema), out)
    write_json(result.summary(), summary)
    write_page(page, "kit_ingest.html", result=result, summary=result.summary())
    return result
