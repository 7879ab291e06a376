"""The public functions of all jobs: work over many records that reports its progress and resumes after an interruption.

`__init__.pyi` lists them. The module of a job is imported when the job is first used, so that `import biodedup.jobs` is quick.
"""

from types import FunctionType
from typing import Any

import lazy_loader

from biodedup.common.arguments import checked

_loaded, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """Imports a job on first use. Its arguments are checked at each call: a string is accepted in place of a `Path`."""
    value = _loaded(name)
    if isinstance(value, FunctionType) and name in __all__:
        value = globals()[name] = checked(value)
    return value
