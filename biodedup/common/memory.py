"""Converts MemoryError into `OutOfMemory`, an error of this library that a caller can retry.

Owns this conversion, including the memory errors of numpy and Arrow. Never frees memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import isgeneratorfunction, unwrap
from typing import Any, TypeVar

from biodedup.errors import OutOfMemory

_T = TypeVar("_T")


@contextmanager
def enough_memory() -> Iterator[None]:
    """Raises OutOfMemory instead of MemoryError."""
    try:
        yield
    except MemoryError as error:
        raise out_of_memory(error) from error


def out_of_memory(error: BaseException) -> OutOfMemory:
    """The error for a failed allocation."""
    return OutOfMemory(
        f"there is not enough memory ({type(error).__name__}); nothing was acknowledged; free memory, or send smaller batches, and send it again"
    )


def within_memory(cls: type[_T]) -> type[_T]:
    """A class decorator that makes public methods raise OutOfMemory instead of MemoryError."""
    for name, method in list(vars(cls).items()):
        public = not name.startswith("_") or name in ("__len__", "__contains__")
        if public and callable(method):
            setattr(cls, name, _guarded(method))
        elif public and isinstance(method, classmethod):
            setattr(cls, name, classmethod(_guarded(method.__func__)))
    return cls


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    if isgeneratorfunction(unwrap(method)):  # unwrap: the wrapper of a decorated generator is not a generator function

        @wraps(method)
        def generate(*args: Any, **named: Any) -> Any:
            with enough_memory():
                yield from method(*args, **named)

        return generate

    @wraps(method)
    def call(*args: Any, **named: Any) -> Any:
        with enough_memory():
            return method(*args, **named)

    return call
