"""Describes the outcome of each record of a bulk enrolment: in a row of the result table, and in sentences for officials.

Owns the schema of the result table, and the meaning of each reason in plain words. Never decides.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from biodedup.advice import ADVICE
from biodedup.config import LabelConfig
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.private import make_private_folder
from biodedup.jobs.manifests.encounters import Record
from biodedup.jobs.shared.files import new_file
from biodedup.jobs.shared.output import check_table_name
from biodedup.jobs.shared.spreadsheet import escaped_formulas, escaped_names
from biodedup.outcomes import outcome_of
from biodedup.required import INCOMPLETE, SUPERSEDED
from biodedup.values import COLUMNS, Decision, Refusal, Verification

STATUS_OF = {"unique": "enrolled", "duplicate": "duplicate", "review": "adjudicate", "refused": "refused"}
SHOWN_MAX = 500
"""The page lists at most this many rows of each status; the table has all rows."""
_ROW_GROUP_ROWS = 8_192
_RESULT = pa.schema(
    [
        ("row", pa.int64()),
        ("encounter_id", pa.string()),
        ("subject_id", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("measured", pa.float64()),
        ("limit", pa.float64()),
        ("duplicate_of", pa.string()),
        ("strongest", pa.string()),
        ("score_db", pa.float64()),
        ("extrapolated", pa.bool_()),
        ("candidates", pa.int64()),
        ("duplicate_db", pa.float64()),
        ("review_db", pa.float64()),
        ("gallery_size", pa.int64()),
        ("gallery_version", pa.int64()),
        ("decided_at", pa.timestamp("us", "UTC")),
        ("refusals", pa.string()),
        ("outcome", pa.string()),
        ("label", pa.string()),
    ]
)

WORDS: Mapping[str, tuple[str, str]] = {
    **ADVICE,
    "already_enrolled": ("the same person is enrolled under this number already", "nothing"),
    "another_person": (
        "another person is enrolled under this number",
        "find out which of the two owns the number; one is wrong",
    ),
    "incomplete_search": ("part of the gallery could not be searched", "run `biodedup doctor`, then decide by hand"),
    "between_thresholds": (
        "similar to an enrolled person, but not certainly the same person",
        "a trained person compares the two",
    ),
    "uncalibrated": (
        "similar to an enrolled person, but the gallery cannot tell yet how similar different people are",
        "a trained person compares the two; with 200 people or more the gallery checks its calibration itself; your own model needs "
        "`biodedup calibrate`",
    ),
    "repeated": ("the manifest has the record twice", "nothing"),
    "encounter_conflict": (
        "the encounter number was used before, with other content",
        "give the later encounter a new number",
    ),
    "failed": ("the program failed on this capture", "look at the file; then run again with --retry-failed"),
    "decoder_failed": (
        "the program crashed on this capture, twice",
        "look at the file; then run again with --retry-failed",
    ),
    "too_slow": (
        "the program took too long for this capture, twice",
        "look at the file; then run again with --retry-failed, and a longer --capture-seconds",
    ),
    "too_much_memory": (
        "the program needed too much memory for this capture, twice",
        "look at the file; then run again with --retry-failed",
    ),
    "timed_out": (
        "the program took too long for this record, twice",
        "look at the file; then run again with --retry-failed, and a longer --capture-seconds",
    ),
    "recapture": ("the person who judged the case asks for new captures", "recapture, as another encounter"),
    "incomplete": (
        "captures are missing or cannot be used; the detail names each",
        "supply or recapture them, or state why this is impossible, and send the encounter again under its number",
    ),
    "not_sent": ("a required capture was not sent", "capture it, or state why this is impossible"),
    "too_few_fingers": ("the encounter has too few fingers", "capture more, or state why this is impossible"),
    "missing_file": ("the file that the manifest names does not exist", "supply it and run the same command again"),
    "unreadable": ("the file cannot be read", "check the disk and the permissions, and run the same command again"),
    "not_a_file": ("the path names a folder, a pipe or a device", "repair the manifest and run again"),
    "empty_file": ("the file is empty", "copy it again from the capture device, and run the same command again"),
    "too_many_pixels": ("the image is larger than any scanner makes", "check the file"),
    "too_many_scans": (
        "the image has more scans (passes over its pixels) than any camera writes",
        "save it again, or recapture",
    ),
    "too_complex": ("the file takes more work to decode than any capture needs", "save it again, or recapture"),
    "too_large_file": ("the file is larger than any capture", "check the file"),
    "malformed_row": (
        "the line has another number of cells than the table has columns",
        "repair the manifest and run again",
    ),
    "wrong_type": ("a cell holds the wrong kind of value", "repair the manifest and run again"),
    "not_utf8": ("a cell is not UTF-8 text", "write the manifest in UTF-8 and run again"),
    "no_subject_id": ("the record names no subject", "repair the manifest and run again"),
    "unusable_id": ("an identifier cannot be used; the detail says why", "repair the manifest and run again"),
    "unknown_position": ("the position is neither a finger nor the face", "repair the manifest and run again"),
    "no_capture": ("the record has no capture", "repair the manifest, or capture the person"),
    "invalid_input": ("a value cannot be used", "see the detail"),
    "model_mismatch": ("the template was made by another model", "extract it again with the gallery's model"),
}


@dataclass(frozen=True)
class Outcome:
    """The outcome of one encounter. reason: a key of `WORDS`."""

    status: str
    reason: str | None = None
    detail: str | None = None
    measured: float | None = None
    limit: float | None = None
    duplicate_of: str | None = None
    strongest: str | None = None
    score_db: float | None = None
    extrapolated: bool | None = None
    candidates: int | None = None
    duplicate_db: float | None = None
    review_db: float | None = None
    gallery_size: int | None = None
    gallery_version: int | None = None
    decided_at: float | None = None
    refusals: tuple[Refusal, ...] = ()
    before: tuple[Refusal, ...] = ()
    """The refusals that the gallery's journal does not have: jobs before release 0.3 did not store them there."""
    required: tuple[str, ...] | None = None
    """The captures that the policy required, if the encounter was refused as incomplete."""

    def to_json(self) -> str:
        return json.dumps(self, default=vars, separators=(",", ":"))  # asdict would copy every value

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        fields = json.loads(text)
        fields |= {name: tuple(Refusal(**refusal) for refusal in fields[name]) for name in ("refusals", "before")}
        if fields.get("required") is not None:
            fields["required"] = tuple(fields["required"])
        return cls(**fields)


def refused(refusals: Sequence[Refusal], decided_at: float | None = None) -> Outcome:
    """The outcome of a refused encounter: with the reason of its only refusal, or as incomplete if it has several."""
    faults = [refusal for refusal in refusals if refusal.reason != SUPERSEDED]
    if len(faults) > 1:
        return incomplete(refusals, decided_at)
    first = faults[0] if faults else Refusal("encounter", "no_capture")
    detail = first.detail if first.column == "encounter" else f"{first.column}: {first.detail}".removesuffix(": ")
    return Outcome(
        "refused",
        first.reason,
        detail or None,
        first.measured,
        first.limit,
        decided_at=decided_at,
        refusals=tuple(refusals),
    )


def incomplete(
    refusals: Sequence[Refusal], decided_at: float | None = None, required: tuple[str, ...] | None = None
) -> Outcome:
    """The outcome of an encounter that was refused because captures are missing or unusable. required: the captures that the policy requires."""
    faults = sorted((refusal for refusal in refusals if refusal.reason != SUPERSEDED), key=_column_index)
    detail = "; ".join(f"{refusal.column}: {refusal.reason}" for refusal in faults)
    return Outcome(
        "refused", INCOMPLETE, detail or None, decided_at=decided_at, refusals=tuple(refusals), required=required
    )


def _column_index(refusal: Refusal) -> int:
    return COLUMNS.index(refusal.column) if refusal.column in COLUMNS else len(COLUMNS)


def decided(decision: Decision, before: Sequence[Refusal] = (), required: tuple[str, ...] | None = None) -> Outcome:
    """The outcome of a decision. before: refusals that the decision does not have; required: the captures that the policy requires."""
    before, refusals = tuple(before), (*before, *decision.refusals)
    if decision.outcome == "refused" and INCOMPLETE in decision.reasons:
        return incomplete(refusals, decision.decided_at, required)
    if decision.outcome == "refused":
        return refused(decision.refusals or refusals, decision.decided_at)
    best = decision.best
    compared = best is not None and bool(best.evidence)  # without evidence, only the subject_id makes it a candidate
    return Outcome(
        STATUS_OF[decision.outcome],
        _why(decision),
        None if compared or best is None else "no capture in common with the enrolled captures",
        duplicate_of=best.subject_id if best and decision.outcome == "duplicate" else None,
        strongest=best.subject_id if best else None,
        score_db=round(best.score_db, 3) if best and compared else None,
        extrapolated=best.extrapolated if best and compared else None,
        candidates=len(decision.candidates),
        duplicate_db=round(decision.duplicate_db, 3),
        review_db=round(decision.review_db, 3),
        gallery_size=decision.gallery_size,
        gallery_version=decision.gallery_version,
        decided_at=decision.decided_at,
        refusals=refusals,
        before=before,
    )


def already_enrolled(verified: Verification, decided_at: float) -> Outcome:
    """The outcome of another encounter of an enrolled subject that was verified as the same person."""
    return Outcome(
        "enrolled",
        "already_enrolled",
        f"verified at {verified.score_db:.1f} dB, threshold {verified.threshold_db:.1f} dB",
        verified.score_db,
        verified.threshold_db,
        strongest=verified.subject_id,
        score_db=round(verified.score_db, 3),
        extrapolated=verified.extrapolated,
        decided_at=decided_at,
        refusals=verified.refusals,
    )


def _why(decision: Decision) -> str | None:
    """The reason of an encounter that was not refused."""
    if decision.outcome == "unique":
        enrolled_before = any(candidate.subject_id == decision.subject_id for candidate in decision.cleared)
        return "already_enrolled" if enrolled_before else None
    if decision.outcome != "review":
        return None
    if "another_person" in decision.reasons:
        return "another_person"
    if decision.incomplete:
        return "incomplete_search"
    return "uncalibrated" if "uncalibrated" in decision.reasons else "between_thresholds"


@dataclass
class Tally:
    """The counts of a job, and the first rows of each status, for the page."""

    statuses: Counter[str] = field(default_factory=Counter)
    already: int = 0
    repeated: int = 0
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    by_group: dict[str, Counter[str]] = field(default_factory=dict)
    shown: dict[str, list[tuple[Record, str | None, Outcome]]] = field(default_factory=dict)
    capture_reasons: Counter[str] = field(default_factory=Counter)

    def add(self, record: Record, encounter_id: str | None, outcome: Outcome, *, repeated: bool) -> None:
        if repeated:
            self.repeated += 1
            return
        self.statuses[outcome.status] += 1
        self.already += outcome.reason == "already_enrolled"
        if outcome.reason:
            self.reasons[outcome.status, outcome.reason] += 1
        if outcome.status != "refused" or outcome.reason == INCOMPLETE:
            self.capture_reasons.update(refusal.reason for refusal in outcome.refusals if refusal.reason != SUPERSEDED)
        for group in record.groups or ("",):
            self.by_group.setdefault(group, Counter())[outcome.status] += 1
            if outcome.status == "refused" and outcome.reason:
                self.by_group[group][f"refused: {outcome.reason}"] += 1
        rows = self.shown.setdefault(outcome.status, [])
        if outcome.status != "enrolled" and len(rows) < SHOWN_MAX:
            rows.append((record, encounter_id, outcome))


class OutcomeWriter:
    """Writes the result table while the job runs. The same outcomes give the same table."""

    def __init__(self, path: Path, metadata: Any, labels: LabelConfig) -> None:
        self._labels = labels
        self._metadata = metadata
        self._schema = pa.schema(
            [*_RESULT, *(field.with_name(_result_name(field.name)).with_metadata(None) for field in metadata)]
        )
        self._rows: list[dict[str, Any]] = []
        self._as_csv = path.suffix == ".csv"
        self._writer = (
            pa.csv.CSVWriter(path, escaped_names(self._schema))
            if self._as_csv
            else pa.parquet.ParquetWriter(path, self._schema)
        )

    def add(self, record: Record, encounter_id: str | None, outcome: Outcome) -> None:
        row = {name: getattr(outcome, name) for name in _RESULT.names[3:-4]}
        row |= {"row": record.row, "encounter_id": encounter_id, "subject_id": record.subject_id}
        at = outcome.decided_at
        row["decided_at"] = None if at is None else datetime.fromtimestamp(at, UTC)
        row["refusals"] = json.dumps(outcome.refusals, default=vars) if outcome.refusals else None
        row |= {"outcome": outcome_of(outcome.status), "label": self._labels.of(outcome.status)}
        row |= {_result_name(name): record.metadata.get(name) for name in self._metadata.names}
        self._rows.append(row)
        if len(self._rows) >= _ROW_GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            table = pa.Table.from_pylist(self._rows, self._schema)
            self._writer.write_table(escaped_formulas(table) if self._as_csv else table)
            self._rows = []


@contextmanager
def outcome_table(path: Path, metadata: Any, labels: LabelConfig) -> Iterator[OutcomeWriter]:
    """Yields a writer. On exit the table gets its final name. Raises InvalidInput for a name that is not a table's, StorageUnavailable."""
    check_table_name(path)
    with translated(f"writing {path}"):
        make_private_folder(path.parent)
        with new_file(path) as temporary:
            writer = OutcomeWriter(temporary, metadata, labels)
            yield writer
            writer.close()


def _result_name(name: str) -> str:
    """The name of a metadata column in the result table: prefixed if the result has a column of that name."""
    return f"manifest_{name}" if name in _RESULT.names else name
