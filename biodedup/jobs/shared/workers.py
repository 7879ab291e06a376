"""Worker processes that extract templates from captures while the caller searches.

Owns the order of encounters alone. The pool is `pebble`'s, in `embed/isolation.py`: a worker that dies or hangs is replaced, and costs its capture
alone. Never searches or stores.
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
"""Of each encounter, a template or a refusal for each capture, in order."""


class Extraction(Protocol):
    """A running extraction."""

    def result(self) -> Extracted: ...


class Workers(DividedWork[Sequence[Captures], Extracted]):
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
        self._recipe = ExtractionRecipe(replace(config, isolation=limits, keys=None, cluster=None), work)
        self._isolated = IsolatedWorkers(self._recipe.config, count, work)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._isolated.close()

    def submit(self, encounters: Sequence[Captures]) -> Extraction:
        """Starts the extraction."""
        return _Submitted([[self._isolated.submit(capture) for capture in captures] for captures in encounters])

    def begin(self, piece: Sequence[Captures]) -> Extraction:
        return self.submit(piece)

    def recipe(self) -> ExtractionRecipe:
        return self._recipe

    def received(self, result: Extracted) -> Extracted:
        """Ray's arrays cannot be written to, and compiled code would be compiled once more for them."""
        return [[_own(each) for each in of_encounter] for of_encounter in result]


def _own(result: Template | Refusal) -> Template | Refusal:
    if isinstance(result, Refusal) or result.embedding is None:
        return result
    return replace(result, embedding=np.array(result.embedding))


@dataclass(frozen=True)
class ExtractionRecipe:
    """Extraction in another process, a `Recipe`: there too a process of its own decodes captures, so that none of them can end the task."""

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
    """Captures that the workers extract."""

    def __init__(self, pending: list[list[Pending]]) -> None:
        self._pending = pending

    def result(self) -> Extracted:
        return [[capture.result() for capture in captures] for captures in self._pending]
