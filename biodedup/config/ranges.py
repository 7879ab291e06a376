"""Checks of the ranges of settings.

Owns the texts of their errors. Never knows which settings exist.
"""

from __future__ import annotations

from math import inf

from biodedup.errors import InvalidInput


def check_range(settings: object, minimum: float, maximum: float, *names: str) -> None:
    """Raises InvalidInput unless each of these settings is a finite number from minimum to maximum."""
    for name in names:
        value = getattr(settings, name)
        if not minimum <= value <= maximum or value == inf:
            wanted = f"at least {minimum}" if maximum == inf else f"{minimum} to {maximum}"
            raise InvalidInput(f"{name} is {value}, wanted {wanted}")


def check_not_empty(settings: object, *names: str) -> None:
    """Raises InvalidInput for an empty text."""
    for name in names:
        if not getattr(settings, name):
            raise InvalidInput(f"{name} is empty, wanted a name")


def is_number(value: object) -> bool:
    """Whether the value is an int or a float, and not a bool: JSON keeps such a number as it is."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
