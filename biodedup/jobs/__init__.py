"""Long work over many records: resumable, with progress, built on the engine. A job's module is imported when it is first used."""

from types import FunctionType
from typing import Any

import lazy_loader

from biodedup.common.arguments import checked

_loaded, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """A job, whose arguments are checked: a text where a path is wanted becomes one."""
    value = _loaded(name)
    if isinstance(value, FunctionType) and name in __all__:
        value = globals()[name] = checked(value)
    return value
