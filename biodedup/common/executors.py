"""Divides a job's work into pieces that do not depend on each other, and has them done here or elsewhere.

Owns the protocol between a job and what does its pieces. Knows no job, and no machine.

1. A piece gives the same result wherever it is done, and results come in the order of the pieces: a job's files do not depend on the executor.
2. A process that does pieces elsewhere opens the recipe of the work once, and keeps what it has opened for the next pieces.
3. An executor repeats a piece whose process or machine is lost. An error of the work itself is raised to the job.
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
    """A piece that is being done, or will be."""

    def result(self) -> R_co:
        """Waits for it."""


class Recipe(Protocol):
    """All that another process needs to do pieces. It travels to other machines: it holds no key and no open file, and its paths are absolute."""

    @property
    def threads(self) -> int:
        """How many processors a piece keeps busy."""

    def opened(self) -> AbstractContextManager[Callable[[Any], Any]]:
        """Opens what the work needs. The function takes a piece and returns its result."""


class Work(ABC, Generic[P, R]):
    """Work of a job."""

    @abstractmethod
    def begin(self, piece: P) -> Pending[R]:
        """Begins with a piece in this process, or in processes that it owns."""

    @abstractmethod
    def recipe(self) -> Recipe:
        """What another process needs to do the pieces. Raises InvalidInput where the work cannot be done elsewhere."""

    def received(self, result: R) -> R:
        """A result that another process has sent, as one of this process."""
        return result


class Executor(Protocol):
    """Has pieces done."""

    @property
    def pieces_ahead(self) -> int:
        """How many pieces to hand over before the first result is waited for."""

    def submit(self, work: Work[P, R], piece: P) -> Pending[R]:
        """Hands over a piece."""


class Local:
    """Has pieces done by the work itself, on this machine."""

    pieces_ahead = 0

    def submit(self, work: Work[P, R], piece: P) -> Pending[R]:
        return work.begin(piece)


LOCAL = Local()


@dataclass(frozen=True)
class Deferred(Generic[P, R]):
    """A piece that is done when its result is asked for."""

    function: Callable[[P], R]
    piece: P

    def result(self) -> R:
        return self.function(self.piece)


def in_order(executor: Executor, work: Work[P, R], pieces: Iterable[P]) -> Iterator[R]:
    """The results of the pieces, in their order. No more pieces are read ahead than the executor asks for."""
    pending: deque[Pending[R]] = deque()
    for piece in pieces:
        pending.append(executor.submit(work, piece))
        if len(pending) > executor.pieces_ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
