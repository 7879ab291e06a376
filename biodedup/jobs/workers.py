"""Processes that turn captures into templates, while the caller searches.

Owns the processes, and what it costs if one dies or hangs. Never searches or stores.

1. A worker that dies (out of memory, SIGKILL), or takes too long and is killed, costs the encounters in its hands another try, each
   alone; what ends two processes so is refused as `failed` or `timed_out`. Other workers, and the job, go on.
2. Workers end with the process that started them, however that ends.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import connection, get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Protocol, TypeAlias

from biodedup.config import Config
from biodedup.embed.extractor import Extractor
from biodedup.errors import CallerError, InvalidInput
from biodedup.values import Face, Finger, Refusal, Template

Captures: TypeAlias = Sequence[Face | Finger]
Extracted: TypeAlias = list[list[Template | Refusal]]
"""Of each encounter, a template or a refusal for each capture, in order."""
Task: TypeAlias = Callable[[Sequence[Captures]], Extracted]

RECORD_S_MAX = 30.0
"""Seconds that an encounter may take; a face and ten fingers take one or two."""
_DAY_S = 86_400.0

_log = logging.getLogger(__name__)
_extractor: Extractor | None = None  # a worker's own: models are loaded once a process


class Alarm(Protocol):
    """Calls back once its time is over, unless it is cancelled, as `threading.Timer`."""

    def start(self) -> None: ...
    def cancel(self) -> None: ...


class Workers:
    """Processes, each with an extractor and one thread. Use it as a context manager; no process starts before the first work.

    task: what a worker does, a function that it can import. record_s_max: seconds that an encounter may take; several in one hand
    may take so many times as long, and a process may start as slowly as it likes. alarm: the seam to the time.
    Raises InvalidInput for a limit that is none.
    """

    def __init__(
        self,
        config: Config,
        count: int,
        task: Task | None = None,
        *,
        record_s_max: float = RECORD_S_MAX,
        alarm: Callable[[float, Callable[[], None]], Alarm] = threading.Timer,
    ) -> None:
        if not 0 < record_s_max <= _DAY_S:
            raise InvalidInput(f"record_s_max is {record_s_max!r}, wanted seconds, above 0 and at most a day")
        self._config = replace(config, threads=1)
        self._task = task or extract
        self._record_s_max = record_s_max
        self._alarm = alarm
        self._threads = ThreadPoolExecutor(count, "biodedup-worker")  # each waits for one process
        self._lock = threading.Lock()
        self._processes: set[_Process] = set()
        self._idle: list[_Process] = []
        self._closed = False

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.join()

    def submit(self, encounters: Sequence[Captures]) -> Future[Extracted]:
        """Begins to extract."""
        return self._threads.submit(self._extracted, encounters)

    def _extracted(self, encounters: Sequence[Captures]) -> Extracted:
        try:
            return self._tried(encounters)
        except _NoResult as error:
            if self._closed:
                raise  # nobody waits for it
            _log.warning("a worker failed (%s); its captures are tried again alone", error.detail)
            return [self._alone(captures) for captures in encounters]

    def _alone(self, captures: Captures) -> list[Template | Refusal]:
        """One encounter by itself, so that nobody else is blamed for what it does."""
        for _ in range(2):  # the first may have ended because others took all memory
            try:
                (extracted,) = self._tried([captures])
                return extracted
            except _NoResult as error:
                last = error
        detail = f"each time that it was tried, {last.detail}"
        return [Refusal(capture.column, last.reason, detail) for capture in captures]

    def _tried(self, encounters: Sequence[Captures]) -> Extracted:
        """Raises _NoResult."""
        process = self._taken()
        limit_s, late = self._record_s_max * len(encounters), threading.Event()

        def end() -> None:
            late.set()
            process.kill()  # nothing less ends native code

        alarm = self._alarm(limit_s, end)
        alarm.start()
        try:
            answer = process.ask(encounters)
        finally:
            alarm.cancel()
        with self._lock:
            if answer is None or late.is_set():
                self._processes.remove(process)
            else:
                self._idle.append(process)
        if answer is None and late.is_set():
            raise _NoResult("timed_out", f"extraction took longer than {limit_s:g} s")
        if answer is None or isinstance(answer, str):
            raise _NoResult("failed", answer or f"the process that extracted it ended (exit code {process.join()})")
        return answer

    def _taken(self) -> _Process:
        """A process that is ready. Raises _NoResult."""
        with self._lock:
            if self._closed:
                raise _NoResult("failed", "the job was ended")
            if self._idle:
                return self._idle.pop()
            process = _Process(self._config, self._task)
            self._processes.add(process)
        process.wait_until_ready()
        return process


class _NoResult(Exception):
    """Nothing came of extraction. reason, detail: as of a refusal."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class _Process:
    """A process that extracts for one thread; another may kill it."""

    def __init__(self, config: Config, task: Task) -> None:
        context = get_context("spawn")  # a fork would copy the threads' locks, held or not
        resource_tracker.ensure_running()  # started in between, it would make this thread hear interrupts again
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, config, task), daemon=True)
        with _deaf_to_interrupts():
            self._process.start()
        theirs.close()  # else its end would never be seen

    def wait_until_ready(self) -> None:
        """A process that ends before it is ready says so when it is asked."""
        with suppress(EOFError, OSError):
            self._pipe.recv()

    def ask(self, encounters: Sequence[Captures]) -> Extracted | str | None:
        """What came of it; what went wrong; or None where the process has ended."""
        try:
            self._pipe.send(encounters)
            answer: Extracted | str = self._pipe.recv()
        except (EOFError, OSError):
            return None
        return answer

    def kill(self) -> None:
        self._process.kill()

    def join(self) -> int | None:
        """Waits for its end; returns the exit code."""
        self._process.join()
        return self._process.exitcode


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started here do not hear Ctrl-C, from their first instruction on: the parent does, and ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, config: Config, task: Task) -> None:
    """A worker's life: an extractor, an eye on the parent, and one task after another."""
    global _extractor
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _extractor = Extractor(config)
    pipe.send("ready")
    while True:
        encounters = pipe.recv()
        try:
            answer: Extracted | str = task(encounters)
        except Exception as error:
            # the type alone: a text may quote what a library was given
            answer = f"the program failed on it ({type(error).__name__})"
        pipe.send(answer)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "a worker was started by somebody"
    connection.wait([parent.sentinel])
    os._exit(1)  # nobody is left to hear of it


def extract(encounters: Sequence[Captures]) -> Extracted:
    """What a worker does: several encounters at once, since networks are quicker with several images."""
    assert _extractor is not None, "made when the worker began"
    flat = [capture for captures in encounters for capture in captures]
    try:
        results = iter(_extractor.extract(flat))
    except CallerError:
        results = iter([_one(_extractor, capture) for capture in flat])  # one bad capture never stops a batch
    return [[next(results) for _ in captures] for captures in encounters]


def _one(extractor: Extractor, capture: Face | Finger) -> Template | Refusal:
    try:
        (result,) = extractor.extract([capture])
        return result
    except CallerError as error:
        return Refusal(capture.column, "invalid_input", str(error))
