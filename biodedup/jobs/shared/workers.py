"""Worker processes that extract templates from captures while the caller searches.

Owns the order of encounters alone. The pool is `pebble`'s, in `embed/isolation.py`: a worker that dies or hangs is replaced, and costs its capture
alone. Never searches or stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Protocol, TypeAlias

from biodedup.config import Config, IsolationConfig
from biodedup.embed.isolation import IsolatedWorkers, Pending, Work
from biodedup.values import Face, Finger, Refusal, Template

Captures: TypeAlias = Sequence[Face | Finger]
Extracted: TypeAlias = list[list[Template | Refusal]]
"""Of each encounter, a template or a refusal for each capture, in order."""


class Extraction(Protocol):
    """A running extraction."""

    def result(self) -> Extracted: ...


class Workers:
    """Processes, each with an extractor and one thread. Use it as a context manager; no process starts before the first work.

    work: what a worker does with a capture, a function that it can import. capture_s_max: seconds that a capture may take; None: as the
    config says, or `IsolationConfig`. Raises InvalidInput for a limit that is none.
    """

    def __init__(
        self, config: Config, count: int, work: Work | None = None, *, capture_s_max: float | None = None
    ) -> None:
        limits = config.isolation or IsolationConfig()
        if capture_s_max is not None:
            limits = replace(limits, capture_s_max=capture_s_max)
        self._isolated = IsolatedWorkers(replace(config, isolation=limits), count, work)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._isolated.close()

    def submit(self, encounters: Sequence[Captures]) -> Extraction:
        """Starts the extraction."""
        return _Submitted([[self._isolated.submit(capture) for capture in captures] for captures in encounters])


class _Submitted:
    """Captures that the workers extract."""

    def __init__(self, pending: list[list[Pending]]) -> None:
        self._pending = pending

    def result(self) -> Extracted:
        return [[capture.result() for capture in captures] for captures in self._pending]
