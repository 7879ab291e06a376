"""How a job reports its progress, and warns before long work.

Owns the interface between a job and its caller. Never prints.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

WARNING = "warning: "
"""A stage that begins so is a sentence for the caller. It comes before the work, with nothing done."""


class Progress(Protocol):
    """Called as work goes on."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def silent(stage: str, done: int, total: int) -> None:
    """Reports nothing."""


def warn(progress: Progress, sentences: Iterable[str], total: int) -> None:
    """Tells the caller what to know before the work begins. total: of the work that follows."""
    for sentence in sentences:
        progress(WARNING + sentence, 0, total)
