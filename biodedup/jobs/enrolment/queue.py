"""Keeps the backlog of bulk enrolments: the status of each encounter, and the time since which it has that status.

Owns an SQLite file beside the gallery, and computes counts, ages, rates, and the expected time to empty the queue. Never decides, and holds no
biometric data. The gallery's journal holds the decisions: if the backlog is lost, no enrolment is lost.

    captured -> received -> searching -> enrolled | duplicate | adjudicate | refused

1. Each change is one durable transaction (rollback journal, `synchronous=FULL`).
2. A refused encounter may be received again. For other encounters, the gallery's journal says whether they were decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from sqlite3 import Connection
from types import TracebackType
from typing import Any

from biodedup.common.arguments import checked
from biodedup.common.described import Described
from biodedup.config import Config, LabelConfig
from biodedup.errors import NotAGallery
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import LocalStorage, Storage
from biodedup.gallery.files.names import BACKLOG_NAME, DATABASE_NAME
from biodedup.gallery.files.private import make_private
from biodedup.jobs.enrolment.outcomes import STATUS_OF
from biodedup.jobs.shared.page import write_page
from biodedup.values import Decision

STATUSES = ("captured", "received", "searching", "adjudicate", "duplicate", "enrolled", "refused")
WAITING = ("received", "searching")
"""Statuses of encounters that wait for a decision: the queue."""

MEANINGS = {
    "captured": "announced; the captures are still to come",
    "received": "the captures are here, and wait for quality check and comparison",
    "searching": "being compared with every enrolled person",
    "adjudicate": "a trained person has to decide",
    "duplicate": "the same person is enrolled under another number",
    "enrolled": "in the gallery",
    "refused": "recapture the person, or repair the manifest",
}

_HOUR_S, _DAY_S = 3600.0, 86_400.0
_SPAN_S_MIN = 600.0  # a rate over less than ten minutes is not reliable
_SCHEMA = """
CREATE TABLE IF NOT EXISTS backlog (
    encounter_id TEXT PRIMARY KEY,
    subject_id TEXT,
    status TEXT NOT NULL,
    since REAL NOT NULL,
    captured_at REAL,
    received_at REAL,
    decided_at REAL,
    digest BLOB,
    outcome TEXT
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_status ON backlog (status, since);
CREATE INDEX IF NOT EXISTS by_arrival ON backlog (received_at);
CREATE INDEX IF NOT EXISTS by_decision ON backlog (decided_at);
"""


@dataclass(frozen=True)
class Arrival:
    """An encounter that a manifest names. digest: of its content, once that is read."""

    encounter_id: str
    subject_id: str | None = None
    captured_at: float | None = None
    digest: bytes | None = None


@dataclass(frozen=True)
class Finished:
    """The outcome of an encounter. outcome: JSON, which only the job interprets."""

    encounter_id: str
    status: str
    decided_at: float
    outcome: str


@dataclass(frozen=True)
class Entry:
    """The backlog's record of an encounter."""

    status: str
    digest: bytes | None
    outcome: str | None


@dataclass(frozen=True)
class StatusLine:
    """The encounters with one status. oldest_s, median_s: seconds since they got the status, or since their capture if it is `captured`."""

    count: int
    oldest_s: float | None
    median_s: float | None


@dataclass(frozen=True)
class QueueStatus(Described):
    """The state of the backlog, and whether the work keeps up with the intake.

    waiting: encounters without a decision, whose captures are here. intake_hour, intake_day, decided_hour, decided_day: encounters per hour,
    in the last hour and day. A decision rate is measured from the first decision in that window, over at least ten minutes, so that a job that
    has just begun is not averaged over the whole window.
    """

    at: float
    lines: dict[str, StatusLine]
    waiting: int
    intake_hour: float
    intake_day: float
    decided_hour: float
    decided_day: float
    clear_s: float | None
    """Seconds until the queue is empty at the present rate; None if the rate is unknown."""
    warning: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Backlog:
    """An open backlog file. Only the process that holds the gallery's lock writes it."""

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection = connection
        self._name = name

    @classmethod
    @checked
    def open(
        cls, gallery: Path, config: Config | None = None, *, read_only: bool = False, storage: Storage | None = None
    ) -> Backlog:
        """Opens the backlog of a gallery, and creates it if it is absent. config: needed for the key of an encrypted gallery. Raises
        NotAGallery, KeyMismatch, StorageUnavailable."""
        path = gallery / BACKLOG_NAME
        if not (gallery / DATABASE_NAME).is_file():
            raise NotAGallery(f"{gallery} holds no gallery; name the gallery's folder, as for enroll-batch")
        storage = storage or LocalStorage(None if config is None else config.keys)
        with translated(f"opening {path}"):
            storage.unlock(gallery, new=False)
            if not read_only:
                make_private(path)
            connection = storage.connect(path, read_only=read_only)
            if not read_only:
                for statement in _SCHEMA.split(";\n"):
                    connection.execute(statement)
        return cls(connection, str(path))

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Backlog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # changes ----------------------------------------------------------------------------------------------------

    def announce(self, arrivals: Iterable[Arrival], now: float) -> None:
        """Adds encounters that were captured elsewhere, and whose captures are still to come. Known encounters are not changed."""
        rows = (
            (a.encounter_id, a.subject_id, now if a.captured_at is None else a.captured_at, a.captured_at)
            for a in arrivals
        )
        self._write(
            "INSERT INTO backlog (encounter_id, subject_id, status, since, captured_at) VALUES (?, ?, 'captured', ?, ?) "
            "ON CONFLICT DO NOTHING",
            rows,
        )

    def enqueue(self, arrivals: Iterable[Arrival], now: float) -> None:
        """Adds encounters whose captures have arrived. Known encounters with a status other than captured are not changed."""
        rows = ((a.encounter_id, a.subject_id, now, a.captured_at, now) for a in arrivals)
        self._write(
            "INSERT INTO backlog (encounter_id, subject_id, status, since, captured_at, received_at) "
            "VALUES (?, ?, 'received', ?, ?, ?) ON CONFLICT DO UPDATE SET status = 'received', since = excluded.since, "
            "received_at = excluded.received_at, captured_at = coalesce(excluded.captured_at, captured_at) "
            "WHERE status = 'captured'",
            rows,
        )

    def receive(self, arrivals: Iterable[Arrival], now: float) -> None:
        """Sets encounters to received: their content was read and has to be decided. Earlier outcomes are dropped."""
        rows = ((a.encounter_id, a.subject_id, now, a.captured_at, now, a.digest) for a in arrivals)
        self._write(
            "INSERT INTO backlog (encounter_id, subject_id, status, since, captured_at, received_at, digest) "
            "VALUES (?, ?, 'received', ?, ?, ?, ?) ON CONFLICT DO UPDATE SET subject_id = excluded.subject_id, "
            "since = CASE WHEN status = 'received' THEN since ELSE excluded.since END, status = 'received', "
            "received_at = CASE WHEN status IN ('received', 'searching') THEN received_at ELSE excluded.received_at END, "
            "captured_at = coalesce(excluded.captured_at, captured_at), decided_at = NULL, outcome = NULL, "
            "digest = excluded.digest",
            rows,
        )

    def search(self, encounters: Iterable[tuple[str, str]], now: float) -> None:
        """Sets encounters to searching: they are being compared with the gallery. encounters: (encounter_id, interim outcome as JSON)."""
        self._write(
            "UPDATE backlog SET status = 'searching', since = ?, outcome = ? WHERE encounter_id = ?",
            ((now, note, encounter_id) for encounter_id, note in encounters),
        )

    def finish(self, finished: Iterable[Finished]) -> None:
        """Stores the outcomes of encounters."""
        self._write(
            "UPDATE backlog SET status = ?, since = ?, decided_at = ?, outcome = ? WHERE encounter_id = ?",
            ((each.status, each.decided_at, each.decided_at, each.outcome, each.encounter_id) for each in finished),
        )

    def judge(self, encounter_id: str, status: str, now: float) -> None:
        """Sets the status of an encounter after its adjudication."""
        self._write(
            "UPDATE backlog SET status = ?, since = ? WHERE encounter_id = ? AND status = 'adjudicate'",
            [(status, now, encounter_id)],
        )

    def _write(self, statement: str, rows: Iterable[Sequence[object]]) -> None:
        with translated(f"writing {self._name}"):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._connection.executemany(statement, rows)
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    # queries ----------------------------------------------------------------------------------------------------

    def entry(self, encounter_id: str) -> Entry | None:
        """The record of an encounter; None if it is unknown."""
        row = self._one("SELECT status, digest, outcome FROM backlog WHERE encounter_id = ?", encounter_id)
        return None if row is None else Entry(*row)

    def status(self, now: float) -> QueueStatus:
        """The state of the backlog. now: seconds since 1970."""
        with self._reading():
            return self._status(now)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """A read transaction: a consistent view of the table, while another process may write."""
        with translated(f"reading {self._name}"):
            self._connection.execute("BEGIN")
            try:
                yield
            finally:
                self._connection.execute("ROLLBACK")

    def _status(self, now: float) -> QueueStatus:
        lines = {status: self._line(status, now) for status in STATUSES}
        waiting = sum(lines[status].count for status in WAITING)
        received = {window_s: self._count("received_at", now - window_s, now) for window_s in (_HOUR_S, _DAY_S)}
        decided_hour, decided_day = self._decided_per_hour(now, _HOUR_S), self._decided_per_hour(now, _DAY_S)
        present = decided_hour or decided_day
        oldest_s = max((lines[status].oldest_s or 0.0 for status in WAITING), default=0.0)
        clear_s = 0.0 if not waiting else round(waiting / present * _HOUR_S) if present else None
        return QueueStatus(
            at=now,
            lines=lines,
            waiting=waiting,
            intake_hour=float(received[_HOUR_S]),
            intake_day=round(received[_DAY_S] * _HOUR_S / _DAY_S, 1),
            decided_hour=decided_hour,
            decided_day=decided_day,
            clear_s=clear_s,
            warning=_warning(
                waiting, oldest_s, received[_DAY_S], self._count("decided_at", now - _DAY_S, now), clear_s
            ),
        )

    def _line(self, status: str, now: float) -> StatusLine:
        (count,) = self._row("SELECT count(*) FROM backlog WHERE status = ?", status)
        if not count:
            return StatusLine(0, None, None)
        (oldest,) = self._row("SELECT min(since) FROM backlog WHERE status = ?", status)
        (median,) = self._row(
            "SELECT since FROM backlog WHERE status = ? ORDER BY since LIMIT 1 OFFSET ?", status, count // 2
        )
        return StatusLine(count, *(round(max(0.0, now - since), 1) for since in (oldest, median)))

    def _decided_per_hour(self, now: float, window_s: float) -> float:
        count = self._count("decided_at", now - window_s, now)
        if not count:
            return 0.0
        (first,) = self._row(
            "SELECT min(decided_at) FROM backlog WHERE decided_at > ? AND decided_at <= ?", now - window_s, now
        )
        return round(float(count * _HOUR_S / max(now - first, _SPAN_S_MIN)), 1)

    def _count(self, moment: str, after: float, until: float) -> int:
        (count,) = self._row(f"SELECT count(*) FROM backlog WHERE {moment} > ? AND {moment} <= ?", after, until)
        return int(count)

    def _row(self, query: str, *values: object) -> Any:
        row = self._one(query, *values)
        assert row is not None, "counts and minima always have a row"
        return row

    def _one(self, query: str, *values: object) -> Any:
        with translated(f"reading {self._name}"):
            return self._connection.execute(query, values).fetchone()


def queue_status(gallery: Path, now: float, config: Config | None = None) -> QueueStatus:
    """The state of a gallery's bulk enrolments. Another process may write meanwhile. now: seconds since 1970. Raises NotAGallery, KeyMismatch,
    StorageUnavailable."""
    if (gallery / DATABASE_NAME).is_file() and not (gallery / BACKLOG_NAME).is_file():
        nothing = StatusLine(0, None, None)
        return QueueStatus(
            at=now,
            lines=dict.fromkeys(STATUSES, nothing),
            waiting=0,
            intake_hour=0.0,
            intake_day=0.0,
            decided_hour=0.0,
            decided_day=0.0,
            clear_s=0.0,
            warning="",
        )
    with Backlog.open(gallery, config, read_only=True) as backlog:
        return backlog.status(now)


def note_verdict(gallery: Path, decision: Decision, now: float, config: Config | None = None) -> None:
    """Stores the outcome of a closed case in the backlog, if the gallery has one. Raises StorageUnavailable."""
    if (gallery / BACKLOG_NAME).is_file() and decision.outcome != "review" and decision.encounter_id is not None:
        with Backlog.open(gallery, config) as backlog:
            backlog.judge(decision.encounter_id, STATUS_OF[decision.outcome], now)


def write_status_page(path: Path, status: QueueStatus, labels: LabelConfig | None = None) -> None:
    """Writes the state as an HTML page for officials. labels: the words for outcomes; None: `unique`, `review`, .... Raises
    StorageUnavailable."""
    write_page(path, "status.html", status=status, meanings=MEANINGS, label=(labels or LabelConfig()).of)


def _warning(waiting: int, oldest_s: float, received: int, decided: int, clear_s: float | None) -> str:
    """The warning of a growing or stalled queue, or ''. oldest_s: waiting time of the oldest encounter; received, decided: encounters of the
    last day. No warning if the queue clears within an hour, or if a job may just have started (ten minutes)."""
    if not waiting or (clear_s is None and oldest_s < _SPAN_S_MIN):
        return ""
    if clear_s is None:
        return f"{waiting:,} encounters wait, and nothing was decided within a day: start enroll-batch again"
    if received > decided and clear_s > _HOUR_S:
        return (
            f"the queue grows: in the last day {received:,} encounters were received, but only {decided:,} were decided; run more hours or "
            "add machines"
        )
    return ""
