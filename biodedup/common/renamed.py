"""Warns of names that were changed. An old name works for one release, with a DeprecationWarning."""

from __future__ import annotations

import warnings


def renamed(old: str, new: str) -> None:
    """Warns the caller of the function that calls this one."""
    warnings.warn(f"{old} is now {new}; the old name goes with the next release", DeprecationWarning, stacklevel=3)
