"""Keeps the old names of the public interface for one release. Each use gives a DeprecationWarning.

Owns the text of the warning, and the old names of a dataclass's fields. Never knows which names changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

_C = TypeVar("_C", bound=type)
_OLD_NAMES = "_old_names"


def renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warns the caller of the function that calls this one."""
    text = f"{old} is now {new}; the old name goes with the next release"
    warnings.warn(text, DeprecationWarning, stacklevel=stacklevel)


def renamed_fields(**new_names: str) -> Callable[[_C], _C]:
    """A class decorator for a dataclass. new_names: old name of a field -> its new name.

    The old name still works as an argument and as an attribute. `old_names` tells the readers of tables.
    """

    def decorate(cls: _C) -> _C:
        init = cls.__init__  # type: ignore[misc]

        @wraps(init)
        def accept_old_names(self: Any, *args: Any, **fields: Any) -> None:
            for old in new_names.keys() & fields.keys():
                new = new_names[old]
                if new in fields:
                    raise TypeError(f"{cls.__name__} got {old} and {new}, which name one field; pass {new} alone")
                renamed(f"{cls.__name__}.{old}", new)
                fields[new] = fields.pop(old)
            init(self, *args, **fields)

        cls.__init__ = accept_old_names  # type: ignore[misc]
        setattr(cls, _OLD_NAMES, new_names)
        for old, new in new_names.items():
            setattr(cls, old, _alias(f"{cls.__name__}.{old}", new))
        return cls

    return decorate


def old_names(cls: type) -> dict[str, str]:
    """Old name -> new name of the dataclass's fields."""
    return dict(getattr(cls, _OLD_NAMES, {}))


def _alias(old: str, new: str) -> property:
    def read(self: Any) -> Any:
        renamed(old, new)
        return getattr(self, new)

    return property(read, doc=f"Deprecated: `{new}`.")
