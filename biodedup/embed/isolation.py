"""Extraction in worker processes with limits on time, memory and files.

Owns the processes (a `pebble` pool), and the refusal of a capture whose process dies, hangs or needs too much memory. Never reads a
path, searches or stores.

1. A capture that crashes its process, is too slow or takes too much memory is tried once more in another process, and then refused
   as `decoder_failed`, `too_slow` or `too_much_memory`. Other captures and processes go on, and the process is replaced.
2. Workers end when the process that started them ends, for whatever reason. They ignore Ctrl-C, which the parent handles.
3. The limits stop crashes, endless loops and decompression bombs. They are not a sandbox: code that takes over a decoder has the rights
   of the user.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import connection, forkserver, parent_process, resource_tracker
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from pebble import ProcessExpired, ProcessPool

from biodedup.capture.reading import held, read
from biodedup.config import Config, IsolationConfig
from biodedup.errors import CallerError, RetryableError
from biodedup.trace import explain, tracing
from biodedup.values import Capture, Face, Finger, Missing, Refusal, Template

if TYPE_CHECKING:
    from biodedup.embed.extractor import Extractor

Extracted: TypeAlias = Template | Refusal
Work: TypeAlias = Callable[[Any], Extracted]
_Step: TypeAlias = tuple[str, str, dict[str, Any]]

FAILURES = frozenset(("failed", "timed_out", "decoder_failed", "too_slow", "too_much_memory"))
"""Reasons that a program's failure gives rather than the capture; `timed_out` is what releases before called `too_slow`."""

_TRIES = 2
_POOLS = 5
"""A pool breaks when its last idle process dies; one that breaks this often cannot be kept running."""
_WALL = 6
"""Times the limit of the processor's time that a capture may take by the clock: others may keep the machine busy."""
_READY_S_MAX = 300.0  # to load models, and to compile code on its first run
_AHEAD = 4  # captures in the hands of a process, or waiting for it
_NO_MEMORY = 77
"""Exit code of a worker that ran out of memory: what is left of its heap is not used again."""
_FILE_BYTES_MAX = 64 << 20  # the caches of compiled code
_FILES_MAX = 256

_LATE = (-signal.SIGPROF, -signal.SIGALRM)

_extractor: Extractor | None = None  # a worker's own: models are loaded once a process
_limits = IsolationConfig()


class IsolatedWorkers:
    """Worker processes with an extractor each. Thread-safe; no process starts before the first capture.

    work: what a worker does with a capture, a function that it can import; None: extract it.
    """

    def __init__(self, config: Config, count: int, work: Work | None = None) -> None:
        self.limits = config.isolation or IsolationConfig()
        self._config = replace(config, threads=1, isolation=self.limits, keys=None)
        self._count = count
        self._work = work or _extract
        self._lock = threading.Lock()
        self._pool: ProcessPool | None = None
        self._closed = False

    def __enter__(self) -> IsolatedWorkers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes. Captures in their hands are not answered."""
        with self._lock:
            pool, self._pool, self._closed = self._pool, None, True
        _end(pool)

    def submit(self, capture: Face | Finger) -> Pending:
        """Begins with a capture in memory."""
        return Pending(self, capture, tracing() is not None)

    def extract(self, captures: Sequence[Capture]) -> list[Extracted]:
        """As `Extractor.extract`, of captures that were checked. A trace gets the steps that it would get without isolation."""
        results: list[Extracted] = []
        waiting: deque[Extracted | Pending] = deque()

        def take() -> None:
            first, item = waiting.popleft(), len(results)
            if isinstance(first, Pending):
                first = first.result(item)
            elif (steps := tracing()) is not None:
                steps.add("refusal", first.column, item, result=first)
            results.append(first)

        for capture in captures:
            waiting.append(self._begun(capture))
            if len(waiting) > _AHEAD * self._count:
                take()
        while waiting:
            take()
        return results

    def _begun(self, capture: Capture) -> Extracted | Pending:
        if isinstance(capture, Missing):
            return Refusal(capture.position, "missing", capture.reason)
        (capture,) = held([capture], self._config.capture)
        assert not isinstance(capture, Missing), "held as it was"
        if isinstance(capture.data, (bytes, os.PathLike)):
            content = read(capture.data, capture.column, self._config.capture)
            if isinstance(content, Refusal):
                return content
        return self.submit(capture)

    def scheduled(self, capture: Face | Finger, traced: bool) -> Future[tuple[Extracted, list[_Step]]]:
        """Gives a capture to the pool, which is started, or started anew, where there is none that works."""
        with self._lock:
            if self._closed:
                raise RetryableError("the extractor was closed while it worked; open it again")
            for _ in range(_POOLS):
                if self._pool is None:
                    self._pool = _started(self._count, self._config)
                try:
                    future: Future[tuple[Extracted, list[_Step]]] = self._pool.schedule(
                        _worked, (self._work, capture, traced), timeout=_WALL * self.limits.capture_s_max + _READY_S_MAX
                    )
                    return future
                except RuntimeError:  # it broke since
                    _end(self._pool)
                    self._pool = None
        raise _not_kept()


class Pending:
    """A capture in the hands of the workers."""

    def __init__(self, workers: IsolatedWorkers, capture: Face | Finger, traced: bool) -> None:
        self._workers, self._capture, self._traced = workers, capture, traced
        self._future = workers.scheduled(capture, traced)

    def result(self, item: int | None = None) -> Extracted:
        """The template or the refusal. item: the capture's number, for the trace. Raises RetryableError where no worker can be kept."""
        tries = broken = 0
        while True:
            try:
                result, steps = self._future.result()
                if (trace := tracing()) is not None:
                    for name, column, values in steps:
                        trace.add(name, column, item, **values)
                return result
            except BrokenProcessPool:  # says nothing of this capture
                broken += 1
                if broken == _POOLS:
                    raise _not_kept() from None
            except (TimeoutError, ProcessExpired) as error:
                tries += 1
                if tries == _TRIES:
                    return self._refused(error)
            self._future = self._workers.scheduled(self._capture, self._traced)

    def _refused(self, error: TimeoutError | ProcessExpired) -> Refusal:
        column, limits = self._capture.column, self._workers.limits
        if isinstance(error, TimeoutError) or error.exitcode in _LATE:
            detail = f"not done after {limits.capture_s_max:g} s of the processor, each time that it was tried"
            return Refusal(column, "too_slow", detail, None, limits.capture_s_max)
        if error.exitcode == _NO_MEMORY:
            detail = f"more than {limits.memory_bytes_max >> 20} MB"
            return Refusal(column, "too_much_memory", detail, None, limits.memory_bytes_max)
        detail = f"the process that read it ended (exit code {error.exitcode}), each time that it was tried"
        return Refusal(column, "decoder_failed", detail)


def _not_kept() -> RetryableError:
    return RetryableError(
        "worker processes cannot be kept running; a script has to make its calls under `if __name__ == '__main__':`, because each worker "
        "imports the script; otherwise look at the machine's memory and process limits, and try again"
    )


# in the calling process -----------------------------------------------------------------------------------------------


def _started(count: int, config: Config) -> ProcessPool:
    """A pool whose processes are forked from a server that has imported this package: a replaced one is there at once."""
    resource_tracker.ensure_running()  # before signals are blocked: its start unblocks them
    if sys.platform == "linux":
        context: Any = multiprocessing.get_context(
            "forkserver"
        )  # a fork of this process would copy locks that are held
        context.set_forkserver_preload(["__main__", __name__, "biodedup.embed.extractor"])
        with _deaf_to_interrupts():
            forkserver.ensure_running()
    else:
        context = multiprocessing.get_context("spawn")
    with _deaf_to_interrupts():
        pool = ProcessPool(count, initializer=_begin, initargs=(config,), context=context)
        pool.active  # noqa: B018  starts its processes
    return pool


def _end(pool: ProcessPool | None) -> None:
    if pool is not None:
        pool.stop()  # type: ignore[no-untyped-call]
        pool.join()


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started here do not hear Ctrl-C, from their first instruction on: the parent does, and ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# in a worker ----------------------------------------------------------------------------------------------------------


def _begin(config: Config) -> None:
    """A worker's first act."""
    from biodedup.embed.extractor import Extractor  # which imports this module

    global _extractor, _limits
    assert config.isolation is not None, "isolated workers have limits"
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # of one that replaces another, too
    for ends in (
        signal.SIGTERM,
        signal.SIGALRM,
        signal.SIGPROF,
    ):  # native code, too, which would not return to a handler of Python's
        signal.signal(ends, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _limits = config.isolation
    _extractor = Extractor(replace(config, isolation=None))
    _limit(resource.RLIMIT_DATA, _data_bytes() + _limits.memory_bytes_max)
    _limit(resource.RLIMIT_FSIZE, _FILE_BYTES_MAX)
    _limit(resource.RLIMIT_NOFILE, _FILES_MAX)
    _limit(resource.RLIMIT_CORE, 0)  # it would hold biometric data


def _limit(kind: int, value: int) -> None:
    """Lowers a limit, never raises it."""
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _data_bytes() -> int:
    """What counts for RLIMIT_DATA already: libraries' data and threads' stacks. 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "a worker has a parent"
    connection.wait([parent.sentinel])
    os._exit(1)


def _worked(work: Work, capture: Face | Finger, traced: bool) -> tuple[Extracted, list[_Step]]:
    """A task: a capture, and the steps of its trace if it is asked for."""
    try:
        if work is _extract and _extractor is not None:
            _extractor.load(capture)
        _wind_clocks(_limits.capture_s_max)
        if not traced:
            return work(capture), []
        with explain() as steps:
            result = work(capture)
        return result, [(step.name, step.column, dict(step)) for step in steps]
    except MemoryError:
        os._exit(_NO_MEMORY)
    except CallerError as error:
        return Refusal(capture.column, "invalid_input", str(error)), []
    except Exception as error:  # the type alone: a text may quote what a library was given
        return Refusal(capture.column, "failed", type(error).__name__), []
    finally:
        _wind_clocks(0)  # the answer is on its way, and others wait for the pipe


def _wind_clocks(seconds: float) -> None:
    """The time of one capture, 0 for none; the clocks end the process, also when no other is left to end it."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, _WALL * seconds)


def _extract(capture: Face | Finger) -> Extracted:
    assert _extractor is not None, "made when the worker began"
    (result,) = _extractor.extract([capture])
    return result
