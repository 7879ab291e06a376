"""Makes connections, locks and files that a parent process opened unusable in a child of `os.fork`.

Owns the check of the process id, and what happens to open connections and locks in a child. Never closes anything of the parent's.

1. A file-system lock belongs to the open file, which parent and child share. The child closes its copy at once, which releases nothing,
   so that a child that outlives its parent does not hold the gallery.
2. SQLite must not close a connection in a child: that would roll back what the parent is writing. The child keeps it until it ends.
3. No fork happens in the middle of a transaction: it waits for the locks in `hold`, for five seconds at most.

What no rule here can prevent: OpenBLAS, under numpy, ends its threads before a fork, and hangs if another thread of the process is in a
matrix product then. A process that forks while its engine works sets OPENBLAS_NUM_THREADS=1, or starts children by `spawn`.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from typing import Any, Protocol
from weakref import WeakSet

from biodedup.errors import EngineClosed

_WAIT_S_MAX = 5.0
"""A fork goes ahead without a lock that is held for longer."""


class Inherited(Protocol):
    def drop(self) -> None:
        """In a child: gives up the child's copy, and changes nothing of the parent's."""


class Process:
    """The process that opened something."""

    def __init__(self) -> None:
        self._id = os.getpid()

    @property
    def is_this(self) -> bool:
        return os.getpid() == self._id

    def check(self) -> None:
        """Raises EngineClosed in a process that was forked since."""
        if not self.is_this:
            raise EngineClosed(
                f"the gallery was opened by process {self._id} before a fork, and this is process {os.getpid()}; "
                "open it in the process that uses it, after the fork"
            )


def hold(lock: Any) -> None:
    """lock: a threading.RLock that a fork waits for."""
    with _registry:
        _locks.add(lock)


def drop_in_child(inherited: Inherited) -> None:
    with _registry:
        _inherited.add(inherited)


def keep_for_ever(something: object) -> None:
    """Its reference count never becomes 0 in this process."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(something))


_registry = threading.Lock()
_locks: WeakSet[Any] = WeakSet()
_inherited: WeakSet[Any] = WeakSet()
_held: list[Any] = []


def _before() -> None:
    _registry.acquire()
    until = time.monotonic() + _WAIT_S_MAX
    for lock in list(_locks):
        if lock.acquire(timeout=max(until - time.monotonic(), 0.0)):
            _held.append(lock)


def _after_in_parent() -> None:
    while _held:
        _held.pop().release()
    _registry.release()


def _after_in_child() -> None:
    for inherited in list(_inherited):
        inherited.drop()
    _inherited.clear()
    _after_in_parent()


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
