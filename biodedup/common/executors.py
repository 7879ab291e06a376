"""Runs the independent pieces of a job's work in this process, or in other processes and machines.

Owns the interface between a job and an executor. Independent of any job and any executor.

1. A piece has the same result in every place, and results come in the order of the pieces. So a job's files do not depend on the executor.
2. Another process opens the recipe of the work once, and keeps it open for the next pieces.
3. An executor repeats a piece whose process or machine is lost. An error of the work itself is raised in the job.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

P = TypeVar("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Pending(Protocol[R_co]):
    """The future result of a piece."""

    def result(self) -> R_co:
        """Waits for the piece, and returns its result. Raises the error of the work."""


class Recipe(Protocol):
    """Everything that another process needs to run pieces. It is sent to other machines, so it holds no key and no open file, and its paths
    are absolute."""

    @property
    def threads(self) -> int:
        """The number of processors that a piece uses."""

    def opened(self) -> AbstractContextManager[Callable[[Any], Any]]:
        """Opens the resources of the work. The function takes a piece and returns its result."""


class Work(ABC, Generic[P, R]):
    """The work of a job, which can be divided into pieces."""

    @abstractmethod
    def begin(self, piece: P) -> Pending[R]:
        """Starts a piece in this process, or in processes that it owns."""

    @abstractmethod
    def recipe(self) -> Recipe:
        """The recipe for other processes. Raises InvalidInput if the work must stay in this process."""

    def received(self, result: R) -> R:
        """Converts a result that another process has sent."""
        return result


class Executor(Protocol):
    """Runs pieces."""

    @property
    def pieces_ahead(self) -> int:
        """The number of pieces to submit before the job waits for the first result."""

    def submit(self, work: Work[P, R], piece: P) -> Pending[R]:
        """Starts a piece."""


class Local:
    """An executor that runs pieces on this machine, with `Work.begin`."""

    pieces_ahead = 0

    def submit(self, work: Work[P, R], piece: P) -> Pending[R]:
        return work.begin(piece)


LOCAL = Local()


@dataclass(frozen=True)
class Deferred(Generic[P, R]):
    """A piece that runs when its result is requested."""

    function: Callable[[P], R]
    piece: P

    def result(self) -> R:
        return self.function(self.piece)


def in_order(executor: Executor, work: Work[P, R], pieces: Iterable[P]) -> Iterator[R]:
    """The results of the pieces, in their order. It reads at most `pieces_ahead` pieces ahead."""
    return results_in_order(lambda piece: executor.submit(work, piece), pieces, executor.pieces_ahead)


def results_in_order(submit: Callable[[P], Pending[R]], pieces: Iterable[P], ahead: int) -> Iterator[R]:
    """The results of the pieces, in their order. submit: starts a piece. At most `ahead` pieces are started before the first result is
    awaited."""
    pending: deque[Pending[R]] = deque()
    for piece in pieces:
        pending.append(submit(piece))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
