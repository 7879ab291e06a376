"""Defines the exit codes of all commands.

Owns the meaning of each code. Never prints.
"""

from __future__ import annotations

from enum import IntEnum

from biodedup.errors import BiodedupError, CallerError, DataDamaged, RetryableError


class Exit(IntEnum):
    """What the exit codes mean."""

    DONE = 0
    CALLER = 2
    RETRY = 3
    DAMAGED = 4
    DUPLICATE = 10
    REVIEW = 11
    REFUSED = 12
    NOT_ACCEPTED = 13
    INTERRUPTED = 130


def exit_code(error: BiodedupError) -> int:
    """The exit code of an error."""
    branches = ((CallerError, Exit.CALLER), (RetryableError, Exit.RETRY), (DataDamaged, Exit.DAMAGED))
    return next((code for branch, code in branches if isinstance(error, branch)), 1)
