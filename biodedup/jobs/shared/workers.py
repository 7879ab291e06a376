"""Extracts templates from captures in worker processes, while the caller searches.

Owns the grouping of captures by encounter, in order. `embed/isolation.py` owns the process pool (`pebble`): a worker that dies or hangs is
replaced, and only its capture fails. Never searches or stores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol, TypeAlias

import numpy as np

from biodedup.common.executors import Work as DividedWork
from biodedup.config import Config, IsolationConfig
from biodedup.embed.isolation import IsolatedWorkers, Pending, Work
from biodedup.values import Face, Finger, Refusal, Template

Captures: TypeAlias = Sequence[Face | Finger]
Extracted: TypeAlias = list[list[Template | Refusal]]
"""For each encounter: a template or a refusal for each of its captures, in order."""


class Extraction(Protocol):
    """A running extraction of some encounters."""

    def result(self) -> Extracted:
        """Waits for the extraction to end."""
        ...


class Workers(DividedWork[Sequence[Captures], Extracted]):
    """A pool of processes, each with an extractor and one thread. Use it as a context manager; the processes start with the first submission.

    count: number of processes. work: the function that a worker applies to a capture; it must be importable. capture_s_max: time limit of a
    capture in seconds; None takes it from the config, or from the defaults of `IsolationConfig`. Raises InvalidInput for an invalid limit.
    """

    def __init__(
        self, config: Config, count: int, work: Work | None = None, *, capture_s_max: float | None = None
    ) -> None:
        limits = config.isolation or IsolationConfig()
        if capture_s_max is not None:
            limits = replace(limits, capture_s_max=capture_s_max)
        self._recipe = ExtractionRecipe(replace(config, isolation=limits, keys=None, cluster=None), work)
        self._isolated = IsolatedWorkers(replace(self._recipe.config, keys=config.keys), count, work)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._isolated.close()

    def submit(self, encounters: Sequence[Captures]) -> Extraction:
        """Starts the extraction of some encounters."""
        return _Submitted([[self._isolated.submit(capture) for capture in captures] for captures in encounters])

    def begin(self, piece: Sequence[Captures]) -> Extraction:
        return self.submit(piece)

    def recipe(self) -> ExtractionRecipe:
        return self._recipe

    def received(self, result: Extracted) -> Extracted:
        """Copies the embeddings. Ray's arrays are read-only, and numba would compile its functions a second time for them."""
        return [[_writable(each) for each in of_encounter] for of_encounter in result]


def _writable(result: Template | Refusal) -> Template | Refusal:
    if isinstance(result, Refusal) or result.embedding is None:
        return result
    return replace(result, embedding=np.array(result.embedding))


@dataclass(frozen=True)
class ExtractionRecipe:
    """Describes an extraction that a process on another machine can start (a `Recipe`). That process decodes captures in a child process, so
    that no capture can end it."""

    config: Config
    work: Work | None
    threads: int = 1

    @contextmanager
    def opened(self) -> Iterator[Callable[[Sequence[Captures]], Extracted]]:
        isolated = IsolatedWorkers(self.config, 1, self.work)

        def extract(encounters: Sequence[Captures]) -> Extracted:
            return _Submitted([[isolated.submit(capture) for capture in captures] for captures in encounters]).result()

        try:
            yield extract
        finally:
            isolated.close()


class _Submitted:
    """An extraction whose captures are with the pool."""

    def __init__(self, pending: list[list[Pending]]) -> None:
        self._pending = pending

    def result(self) -> Extracted:
        return [[capture.result() for capture in captures] for captures in self._pending]
