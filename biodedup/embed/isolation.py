"""Extracts templates in worker processes with limits on time, memory and files.

Owns the processes (a `pebble` pool), and the refusal of a capture whose process dies, hangs or needs too much memory. Workers never read a
path; nothing here searches or stores.

1. A capture that crashes its process, is too slow or takes too much memory is tried once more in another process. Then it is refused as
   `decoder_failed`, `too_slow` or `too_much_memory`. Other captures and processes continue, and the process is replaced.
2. Workers end when their parent process ends, for any reason. They ignore Ctrl-C, which the parent handles.
3. The limits stop crashes, endless loops and decompression bombs. They are not a sandbox: code that takes over a decoder has the user's
   rights.
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
from biodedup.keys import hidden_from_children
from biodedup.trace import explain, tracing
from biodedup.values import Capture, Face, Finger, Missing, Refusal, Template

if TYPE_CHECKING:
    from biodedup.embed.extractor import Extractor

Extracted: TypeAlias = Template | Refusal
Work: TypeAlias = Callable[[Any], Extracted]
_Step: TypeAlias = tuple[str, str, dict[str, Any]]

FAILURES = frozenset(("failed", "timed_out", "decoder_failed", "too_slow", "too_much_memory"))
"""Reasons of refusals for a failure of the program, not of the capture. `timed_out` is the name of `too_slow` in earlier releases."""

_TRIES = 2
_POOLS = 5
"""A pool breaks when its last idle process dies. After so many broken pools the workers cannot be kept running."""
_CLOCK_FACTOR = 6
"""A capture may take this many times its processor time by the clock, because the machine may be busy."""
_READY_S_MAX = 300.0  # to load models, and to compile code on its first run
_AHEAD = 4  # captures per process that are sent ahead
_NO_MEMORY = 77
"""Exit code of a worker that ran out of memory. It ends, because its heap is no longer reliable."""
_FILE_BYTES_MAX = 64 << 20  # the caches of compiled code
_FILES_MAX = 256

_LATE = (-signal.SIGPROF, -signal.SIGALRM)

_extractor: Extractor | None = None  # in a worker: its extractor, so that models are loaded once per process
_limits = IsolationConfig()


class IsolatedWorkers:
    """Worker processes with an extractor each. Thread-safe. No process starts before the first capture.

    work: the function that a worker applies to a capture; it must be importable. None: extraction.
    """

    def __init__(self, config: Config, count: int, work: Work | None = None) -> None:
        self.limits = config.isolation or IsolationConfig()
        self._config = replace(config, threads=1, isolation=self.limits, keys=None)
        self._keys = config.keys
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
        """Ends the processes. Captures that they work on get no result."""
        with self._lock:
            pool, self._pool, self._closed = self._pool, None, True
        _end(pool)

    def submit(self, capture: Face | Finger) -> Pending:
        """Starts work on a capture in memory."""
        return Pending(self, capture, tracing() is not None)

    def extract(self, captures: Sequence[Capture]) -> list[Extracted]:
        """As `Extractor.extract`, for checked captures. A trace gets the same steps as without isolation."""
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
        assert not isinstance(capture, Missing), "held does not change the kind"
        if isinstance(capture.data, (bytes, os.PathLike)):
            content = read(capture.data, capture.column, self._config.capture)
            if isinstance(content, Refusal):
                return content
        return self.submit(capture)

    def scheduled(self, capture: Face | Finger, traced: bool) -> Future[tuple[Extracted, list[_Step]]]:
        """Gives a capture to the pool. Starts a pool if there is none, or if the pool is broken."""
        with self._lock:
            if self._closed:
                raise RetryableError("the extractor was closed while it worked; open it again")
            for _ in range(_POOLS):
                if self._pool is None:
                    with hidden_from_children(self._keys):
                        self._pool = _started(self._count, self._config)
                try:
                    future: Future[tuple[Extracted, list[_Step]]] = self._pool.schedule(
                        _worked,
                        (self._work, capture, traced),
                        timeout=_CLOCK_FACTOR * self.limits.capture_s_max + _READY_S_MAX,
                    )
                    return future
                except RuntimeError:  # the pool is broken
                    _end(self._pool)
                    self._pool = None
        raise _not_kept()


class Pending:
    """A capture that the workers process."""

    def __init__(self, workers: IsolatedWorkers, capture: Face | Finger, traced: bool) -> None:
        self._workers, self._capture, self._traced = workers, capture, traced
        self._future = workers.scheduled(capture, traced)

    def result(self, item: int | None = None) -> Extracted:
        """The template or the refusal. item: the capture's number, for the trace. Raises RetryableError if no worker can be kept running."""
        tries = broken = 0
        while True:
            try:
                result, steps = self._future.result()
                if (trace := tracing()) is not None:
                    for name, column, values in steps:
                        trace.add(name, column, item, **values)
                return result
            except BrokenProcessPool:  # not a fault of this capture
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
            detail = f"not done after {limits.capture_s_max:g} s of processor time, in each try"
            return Refusal(column, "too_slow", detail, None, limits.capture_s_max)
        if error.exitcode == _NO_MEMORY:
            detail = f"more than {limits.memory_bytes_max >> 20} MB"
            return Refusal(column, "too_much_memory", detail, None, limits.memory_bytes_max)
        detail = f"the process that decoded it ended (exit code {error.exitcode}), in each try"
        return Refusal(column, "decoder_failed", detail)


def _not_kept() -> RetryableError:
    return RetryableError(
        "worker processes cannot be kept running; a script has to make its calls under `if __name__ == '__main__':`, because each worker "
        "imports the script; otherwise look at the machine's memory and process limits, and try again"
    )


# in the calling process -----------------------------------------------------------------------------------------------


def _started(count: int, config: Config) -> ProcessPool:
    """A pool. Its processes are forked from a server that has imported this package, so that a new process starts quickly."""
    resource_tracker.ensure_running()  # before signals are blocked: its start unblocks them
    if sys.platform == "linux":
        # a fork of this process would copy locks that are held
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__, "biodedup.embed.extractor"])
        with _interrupts_blocked():
            forkserver.ensure_running()
    else:
        context = multiprocessing.get_context("spawn")
    with _interrupts_blocked():
        pool = ProcessPool(count, initializer=_begin, initargs=(config,), context=context)
        pool.active  # noqa: B018  starts its processes
    return pool


def _end(pool: ProcessPool | None) -> None:
    if pool is not None:
        pool.stop()  # type: ignore[no-untyped-call]
        pool.join()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes that are started in this block ignore Ctrl-C from their first instruction on. The parent handles it and ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# in a worker ----------------------------------------------------------------------------------------------------------


def _begin(config: Config) -> None:
    """Initialises a worker."""
    from biodedup.embed.extractor import Extractor  # which imports this module

    global _extractor, _limits
    assert config.isolation is not None, "isolated workers have limits"
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # also in a worker that replaces another
    # the default action also ends native code, which would not return to a Python handler
    for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _limits = config.isolation
    _extractor = Extractor(replace(config, isolation=None))
    _limit(resource.RLIMIT_DATA, _data_bytes() + _limits.memory_bytes_max)
    _limit(resource.RLIMIT_FSIZE, _FILE_BYTES_MAX)
    _limit(resource.RLIMIT_NOFILE, _FILES_MAX)
    _limit(resource.RLIMIT_CORE, 0)  # a core dump would hold biometric data


def _limit(kind: int, value: int) -> None:
    """Lowers a limit, never raises it."""
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _data_bytes() -> int:
    """The present size that RLIMIT_DATA limits: the data of libraries and the stacks of threads. 0 if the system does not state it."""
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
    """Processes a capture: (result, the steps of its trace if traced)."""
    try:
        if work is _extract and _extractor is not None:
            _extractor.load(capture)
        _set_timers(_limits.capture_s_max)
        if not traced:
            return work(capture), []
        with explain() as steps:
            result = work(capture)
        return result, [(step.name, step.column, dict(step)) for step in steps]
    except MemoryError:
        os._exit(_NO_MEMORY)
    except CallerError as error:
        return Refusal(capture.column, "invalid_input", str(error)), []
    except Exception as error:  # only the type: the text may quote the input
        return Refusal(capture.column, "failed", type(error).__name__), []
    finally:
        _set_timers(0)  # the limits do not cover the return of the result


def _set_timers(seconds: float) -> None:
    """Sets the time limits of a capture; 0: none. The timers end the process itself, also if the parent has ended."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, _CLOCK_FACTOR * seconds)


def _extract(capture: Face | Finger) -> Extracted:
    assert _extractor is not None, "_begin makes it"
    (result,) = _extractor.extract([capture])
    return result
