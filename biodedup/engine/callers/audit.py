"""The audit log: records each call on an engine, with its caller, purpose and outcome.

Owns the choice of calls that are recorded, and the records that wait for a commit. Never records a biometric value or a score.
gallery/catalogue/audit.py defines the form and the hash chain of the records.

1. A call that changes the gallery is recorded in the commit that carries it out. If the commit fails, both are absent.
2. Records of other calls wait in memory until the next commit, at most `FLUSH_S`, or until more than `WAITING_MAX` wait; then the call that
   adds the last record commits all of them. A crash loses waiting records. Closing commits them.
3. A call that cannot be recorded is not answered: if the disk fails and `WAITING_MAX` records wait, calls raise the error. A process that only
   reads commits at once, unless it has done so within the last `FLUSH_S`. Its records wait beside the gallery
   (gallery/catalogue/readings.py), and the writer takes them in with its next commit.
4. The record of a stream (except `enroll_many`) is made when its first item is requested, because a stream may never end.
5. A call inside another call is recorded as well.
6. A caller without a name is recorded as `os:` and the operating system's user of the process. No principal has such a name.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pwd
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import wraps
from inspect import isgeneratorfunction, signature
from math import inf
from pathlib import Path
from time import monotonic, time
from typing import Any, TypeVar, cast

from biodedup.errors import BiodedupError, GalleryDamaged, InvalidInput
from biodedup.gallery.catalogue.audit import BROKEN, AuditRecord, archive_of, in_archive
from biodedup.gallery.catalogue.readings import Waiting
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import MALFORMED, Storage
from biodedup.gallery.files.private import file_bytes, replace_private
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.transaction import Transaction
from biodedup.principals import USER_PREFIX
from biodedup.texts import ID_LENGTH_MAX
from biodedup.values import Decision, Encounter, Verification

FLUSH_S = 1.0
"""The longest time that the record of a call without a commit waits, in seconds."""
WAITING_MAX = 1_000
DONE = "done"
ARCHIVE_STEP = "audit_archive:"
"""Prefix of the job step that records an archive file. The rest of the name is the SHA-256 of the file."""
_F = TypeVar("_F", bound=Callable[..., Any])
_log = logging.getLogger("biodedup.engine")
_ID_PARAMETERS = ("subject_id", "encounter_id", "encounter", "case")


@dataclass(eq=False)
class Call:
    """A running call. subjects: the subjects that it names; in_commit: whether its record belongs to the commit that it makes; itemised:
    whether its encounters are recorded one by one."""

    log: AuditLog
    kind: str
    principal: str
    purpose: str
    subjects: tuple[str, ...] = ()
    encounter_id: str = ""
    count: int = 1
    outcome: str = ""
    in_commit: bool = False
    itemised: bool = False
    written: bool = False
    at: float | None = None

    def records(self) -> list[AuditRecord]:
        at = self.log.clock() if self.at is None else self.at
        about = (self.encounter_id, self.count, self.outcome or DONE)
        return [self._record(at, self.kind, subject_id, *about) for subject_id in self.subjects or ("",)]

    def _record(
        self, at: float, kind: str, subject_id: str, encounter_id: str, count: int, outcome: str
    ) -> AuditRecord:
        return AuditRecord(
            at=at,
            principal=self.principal or process_user(),
            purpose=self.purpose,
            call=kind,
            subject_id=subject_id,
            encounter_id=encounter_id,
            count=count,
            outcome=outcome,
        )

    def carried_out(self, transaction: Transaction, kind: str, decision: Decision) -> None:
        """Records one encounter of this call, in the commit of its decision."""
        if self.log.mode != "none":
            names = decision.subject_id or "", decision.encounter_id or ""
            transaction.audited.append(self._record(decision.decided_at, kind, *names, 1, decision.outcome))

    def changed_nothing(self, kind: str, encounter: Encounter, outcome: str) -> None:
        """Records one encounter of this call that was decided before, or not accepted."""
        if self.log.waits:
            self.log.wait([self._record(self.log.clock(), kind, *_names_of(encounter), 1, outcome)])


_current: ContextVar[Call | None] = ContextVar("biodedup_call", default=None)

current_call = _current.get
"""Returns the running call of this thread, or None."""


def carried_out(*, outcome: str = "", count: int = 1, subjects: Sequence[str] = (), at: float | None = None) -> None:
    """States that the present transaction carries out the running call of this thread. at: the time of the change, in seconds since
    1970."""
    call = current_call()
    if call is not None:
        call.at = at
        call.in_commit, call.count, call.outcome = True, count, outcome or call.outcome
        call.subjects = tuple(subjects) or call.subjects


def named(*subject_ids: object) -> None:
    """States the subjects of the running call of this thread. The call gets one record for each."""
    call = current_call()
    if call is not None:
        call.subjects = tuple(_text(name) for name in dict.fromkeys(subject_ids) if isinstance(name, str))


def counted(count: int) -> None:
    """States the number of probes or subjects of the running call of this thread."""
    call = current_call()
    if call is not None:
        call.count = count


class AuditLog:
    """The audit log of one open gallery. Implements `Recorder`. mode: of `config.config.AUDITS`; clock: returns the time in seconds since
    1970. Thread-safe."""

    def __init__(self, gallery: Gallery, mode: str, clock: Callable[[], float]) -> None:
        self.mode, self.clock = mode, clock
        self.waits = mode == "all"
        """Whether calls without a commit are recorded."""
        self._gallery = gallery
        self._waiting: list[AuditRecord] = []
        self._staged: tuple[int, Call | None] = (0, None)
        """(the number of waiting records in the present commit, the call that it carries out)."""
        self._taken: Waiting | None = None
        """Calls of readers that the present commit holds."""
        self._lock, self._flushing = threading.Lock(), threading.Lock()
        self._flushed = -inf
        """When a reader last recorded, on the clock of `monotonic`."""
        self._wake, self._ended = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        if mode != "none" and not gallery.read_only:
            gallery.recorders.append(self)

    # calls ------------------------------------------------------------------------------------------------------

    @contextmanager
    def made(self, call: Call) -> Iterator[Call]:
        """Records the call that runs in the block."""
        token = _current.set(call)
        try:
            yield call
        except BaseException as error:
            self._ended_by(call, type(error).__name__)
            raise
        finally:
            _current.reset(token)
        if not call.itemised:
            self._ended_by(call, call.outcome or DONE)

    def _ended_by(self, call: Call, outcome: str) -> None:
        if not call.written or outcome != (call.outcome or DONE):
            call.outcome = outcome
            if self.waits:
                self.wait(call.records())

    def wait(self, records: list[AuditRecord]) -> None:
        """Adds records that wait for the next commit. If too many wait, it commits them, and raises the errors of a commit."""
        if self._ended.is_set():
            return  # the engine is closed
        with self._lock:
            self._waiting += records
            due = self._gallery.read_only and monotonic() - self._flushed >= FLUSH_S
            full = due or len(self._waiting) > WAITING_MAX
            if self._thread is None:
                self._thread = threading.Thread(target=self._flush_on_time, name="biodedup-audit", daemon=True)
                self._thread.start()
        if full:
            self.flush()
        self._wake.set()

    # commits ----------------------------------------------------------------------------------------------------

    def stage(self, transaction: Transaction) -> None:
        call = current_call()
        if call is not None and (call.log is not self or call.written or call.itemised or not call.in_commit):
            call = None
        with self._lock:
            waiting = list(self._waiting)
        self._staged = len(waiting), call
        own = [] if call is None else call.records()
        transaction.add_audit([*self._of_readers(transaction), *waiting, *own, *transaction.audited])

    def _of_readers(self, transaction: Transaction) -> list[AuditRecord]:
        """Their calls, which this commit takes in. What is damaged is left for `log verify` to name: it must not stop a writer."""
        try:
            self._taken = found = self._gallery.waiting_readings()
        except (BiodedupError, *MALFORMED) as error:
            _log.warning("audit: calls of readers cannot be taken in: %s", error)
            return []
        if found is None:
            return []
        transaction.caller_tables().put_readers_taken(found.last)
        broken = AuditRecord(at=self.clock(), principal="", purpose="", call=BROKEN, outcome=found.problem)
        return [*found.records, *([broken] if found.problem else [])]

    def settle(self) -> None:
        count, call = self._staged
        self._staged = 0, None
        taken, self._taken = self._taken, None
        if taken is not None:
            self._gallery.forget_readings(taken.last.number)
        with self._lock:
            del self._waiting[:count]
        if call is not None:
            call.written = True

    def flush(self) -> None:
        """Commits the waiting records. Raises StorageUnavailable, GalleryBusy; then the records still wait."""
        if self._gallery.read_only:
            self._flush_reader()
            return
        with self._lock:
            waiting = bool(self._waiting)
        if not waiting and not self._has_readings():  # takes the gallery's lock, under which `stage` takes ours
            return
        token = _current.set(None)
        try:
            with self._gallery.transaction() as transaction:
                transaction.manifest_changed = True
        finally:
            _current.reset(token)

    def _has_readings(self) -> bool:
        """Whether calls of readers are to be taken in."""
        try:
            return self.mode != "none" and self._gallery.waiting_readings() is not None
        except (BiodedupError, *MALFORMED) as error:
            _log.warning("audit: calls of readers cannot be taken in: %s", error)
            return False

    def _flush_reader(self) -> None:
        with self._flushing:
            with self._lock:
                waiting = list(self._waiting)
            if waiting:
                self._gallery.record_reading(waiting)
                with self._lock:
                    del self._waiting[: len(waiting)]
            self._flushed = monotonic()

    def close(self) -> None:
        """Commits the waiting records. If that fails, a log message states how many records are lost."""
        if not self._gallery.is_of_this_process:
            return
        self._ended.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self.flush()
        except BiodedupError as error:
            _log.error("audit: %d calls are not recorded: %s", len(self._waiting), error)

    def _flush_on_time(self) -> None:
        while not self._ended.is_set():
            self._wake.wait()
            self._wake.clear()
            if self._ended.wait(FLUSH_S):
                return
            try:
                self.flush()
            except (BiodedupError, MemoryError) as error:
                _log.warning("audit: records of calls wait for the next commit: %s", error)


@contextmanager
def recorded_reading(gallery: Gallery, mode: str, kind: str, count: int) -> Iterator[None]:
    """Records that a process reads a gallery without an engine, at the end of the block. mode: of `config.AUDITS`; count: of subjects. Raises
    StorageUnavailable, GalleryBusy where it cannot be recorded."""
    log = AuditLog(gallery, mode, time)
    try:
        with log.made(Call(log, kind, "", "", count=count)):
            yield
    finally:
        log.close()


def process_user() -> str:
    """Who calls without a name: `os:` and the operating system's user of this process."""
    number = os.geteuid()
    try:
        return USER_PREFIX + pwd.getpwuid(number).pw_name
    except KeyError:
        return f"{USER_PREFIX}{number}"


def move_old(transaction: Transaction, storage: Storage, out: Path, before: float) -> int:
    """See `Engine.archive_audit`. The file is durable before the commit that deletes the records."""
    if out.exists():
        raise InvalidInput(f"{out} exists already, and an archive is never replaced; name a new file")
    spans = [s for s in transaction.caller_tables(noted=False).audit_spans() if s.records and s.until < before]
    if spans:
        content = archive_of(spans)
        with translated(f"writing {out}"):
            replace_private(out, content)
            storage.sync_folder(out.absolute().parent)
        digest = hashlib.sha256(content).hexdigest()
        transaction.record_step(ARCHIVE_STEP + digest, {"first": spans[0].number, "last": spans[-1].last})
        for span in spans:
            transaction.caller_tables().put_audit_span(replace(span, records=b""))
    return sum(span.last - span.number + 1 for span in spans)


def read_archive(gallery: Gallery, file: Path) -> Iterator[AuditRecord]:
    """See `Engine.archived_audit`. Each record is verified with its span, and at the end the whole file with its recorded digest."""
    content = file_bytes(file, None)
    yield from in_archive(content, gallery.audit_log()[0])
    if ARCHIVE_STEP + hashlib.sha256(content).hexdigest() not in gallery.snapshot().steps:
        raise GalleryDamaged(
            f"{file} was changed after `log archive` wrote it: records were deleted, repeated or reordered; restore the file"
        )


def audited(*, changes: bool = False) -> Callable[[_F], _F]:
    """A decorator for methods of `Engine`: each call is recorded under the method's name, with the ids in its arguments. changes: whether
    the call changes the gallery, so that its commit contains the record; otherwise it commits only budgets."""

    def decorated(method: _F) -> _F:
        places = {name: at for at, name in enumerate(signature(method).parameters) if name in _ID_PARAMETERS}

        def call_of(engine: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> Call:
            call: Call = engine._new_call(method.__name__, in_commit=changes)
            for name, at in places.items():
                value = given[at - 1] if at <= len(given) else named.get(name)
                _name(call, name, value)
            return call

        @wraps(method)
        def plain(engine: Any, *given: Any, **named: Any) -> Any:
            call = call_of(engine, given, named)
            with engine._audit.made(call):
                result = method(engine, *given, **named)
                call.outcome = call.outcome or _outcome_of(result)
                return result

        @wraps(method)
        def stream(engine: Any, *given: Any, **named: Any) -> Any:
            items = method(engine, *given, **named)
            with engine._audit.made(call_of(engine, given, named)):
                first = next(items, _NOTHING)
            if first is not _NOTHING:
                yield first
                yield from items

        return cast(_F, stream if isgeneratorfunction(method) else plain)

    return decorated


_NOTHING = object()


def _name(call: Call, parameter: str, value: object) -> None:
    """Adds the ids in an argument to the call. At this time only the types of ids have been checked."""
    subject_id, encounter_id = "", ""
    if parameter == "subject_id" and isinstance(value, str):
        subject_id = value
    elif parameter == "encounter" and isinstance(value, Encounter):
        subject_id, encounter_id = _names_of(value)
    elif parameter in ("encounter_id", "case"):
        known = value if isinstance(value, str) else getattr(value, "encounter_id", "")
        encounter_id = known if isinstance(known, str) else ""
    if subject_id:
        call.subjects = (_text(subject_id),)
    call.encounter_id = _text(encounter_id) or call.encounter_id


def _names_of(encounter: Encounter) -> tuple[str, str]:
    return str(encounter.subject_id or ""), str(encounter.encounter_id or "")


def _text(name: str) -> str:
    """A name in a form that every database accepts. A text that is too long for an id is truncated."""
    return name[:ID_LENGTH_MAX].encode("utf-8", "replace").decode().replace("\0", "?")


def _outcome_of(result: object) -> str:
    if isinstance(result, Decision):
        return result.outcome
    if isinstance(result, Verification):
        return "accepted" if result.accepted else "not accepted"
    return DONE
