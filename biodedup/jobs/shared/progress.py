"""Defines the callback with which a job reports its progress, and warns its caller before long work.

Owns the interface between a job and its caller. Never prints.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

WARNING = "warning: "
"""Prefix of a stage that is a warning, not progress. A job reports its warnings before the work begins."""


class Progress(Protocol):
    """The callback. stage: a name, or a warning; done, total: pieces of the work in this stage."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def silent(stage: str, done: int, total: int) -> None:
    """Reports nothing."""


def warn(progress: Progress, sentences: Iterable[str], total: int) -> None:
    """Reports each sentence as a warning. total: pieces of the work that follows."""
    for sentence in sentences:
        progress(WARNING + sentence, 0, total)
