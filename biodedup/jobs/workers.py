"""Processes that turn captures into templates, while the caller searches.

Owns the pool and what the death of a worker costs. Never searches or stores.

1. A worker that dies (out of memory, SIGKILL) costs what was in the pool's hands another try, each encounter alone in a process;
   what ends two of these is refused as `failed`. The job goes on.
2. Workers end with the process that started them, however that ends.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context, parent_process
from types import TracebackType
from typing import TypeAlias

from biodedup.config import Config
from biodedup.embed.extractor import Extractor
from biodedup.errors import CallerError
from biodedup.values import Face, Finger, Refusal, Template

Captures: TypeAlias = Sequence[Face | Finger]
Extracted: TypeAlias = list[list[Template | Refusal]]
"""Of each encounter, a template or a refusal for each capture, in order."""
Task: TypeAlias = Callable[[Sequence[Captures]], Extracted]

_log = logging.getLogger(__name__)
_extractor: Extractor | None = None  # a worker's own: models are loaded once a process


@dataclass(frozen=True, eq=False)
class Ticket:
    """Work that was handed to the pool, and is kept until its result was taken."""

    encounters: Sequence[Captures]
    future: Future[Extracted]


class Workers:
    """A pool of processes, each with an extractor and one thread. Use it as a context manager; no process starts before the
    first work. task: what a worker does, a function that it can import."""

    def __init__(self, config: Config, count: int, task: Task | None = None) -> None:
        self._config = replace(config, threads=1)
        self._count = count
        self._task = task or extract
        self._pool: ProcessPoolExecutor | None = None
        self._alone: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in (self._pool, self._alone):
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def submit(self, encounters: Sequence[Captures]) -> Ticket:
        """Begins to extract; `result` waits for it."""
        for _ in range(2):
            if self._pool is None:
                self._pool = self._started(self._count)
            try:
                with _deaf_to_interrupts():
                    return Ticket(encounters, self._pool.submit(self._task, encounters))
            except RuntimeError:  # broken by a worker's death since
                self._pool = None
        raise AssertionError("a pool that was just made takes work")

    def result(self, ticket: Ticket) -> Extracted:
        try:
            return ticket.future.result()
        except Exception as error:
            # the type alone: a text may quote what a library was given
            _log.warning("a worker failed (%s); its captures are tried again alone", type(error).__name__)
            return [self._again(encounter) for encounter in ticket.encounters]

    def _again(self, captures: Captures) -> list[Template | Refusal]:
        """One encounter in a process that does nothing else, so that nobody else is blamed for its death."""
        reason = ""
        for _ in range(2):  # where it was first, another's death may have ended it
            if self._alone is None:
                self._alone = self._started(1)
            try:
                with _deaf_to_interrupts():
                    future = self._alone.submit(self._task, [captures])
                (extracted,) = future.result()
                return extracted
            except Exception as error:
                self._alone.shutdown()
                self._alone, reason = None, type(error).__name__
        detail = f"the process that extracted it ended, each time that it was tried ({reason})"
        return [Refusal(capture.column, "failed", detail) for capture in captures]

    def _started(self, count: int) -> ProcessPoolExecutor:
        # spawn: a fork would copy the threads' locks, held or not
        return ProcessPoolExecutor(count, get_context("spawn"), _begin, (self._config,))


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started here do not hear Ctrl-C, from their first instruction on: the parent does, and ends the pool."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(config: Config) -> None:
    """In a new worker: an extractor, and an eye on the parent."""
    global _extractor
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _extractor = Extractor(config)


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
