"""Makes connections, locks and files that a parent process has opened unusable in a child of `os.fork`.

Owns the check of the process id, and the treatment of open connections and locks in a child. Never closes anything of the parent's.

1. A file lock belongs to the open file, which parent and child share. The child closes its copy at once. This does not release the lock,
   and a child that outlives its parent does not hold it.
2. A child must not close an SQLite connection, because that would roll back the parent's transaction. The child keeps it until it ends.
3. A fork does not happen in the middle of a transaction: it waits for the locks registered by `hold`, for at most five seconds.

Known limit: OpenBLAS (used by numpy) stops its threads before a fork, and hangs if another thread is in a matrix product at that time. A
process that forks while its engine works must set OPENBLAS_NUM_THREADS=1, or start children with `spawn`.
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
"""The longest time that a fork waits for locks; then it continues without them."""


class Inherited(Protocol):
    """An open resource that a child of a fork inherits."""

    def drop(self) -> None:
        """Called in the child: gives up the child's copy, and changes nothing of the parent's."""


class Process:
    """Remembers the process that has opened a resource."""

    def __init__(self) -> None:
        self._id = os.getpid()

    @property
    def is_this(self) -> bool:
        return os.getpid() == self._id

    def check(self) -> None:
        """Raises EngineClosed in a child of a fork."""
        if not self.is_this:
            raise EngineClosed(
                f"the gallery was opened by process {self._id} before a fork, and this is process {os.getpid()}; "
                "open it in the process that uses it, after the fork"
            )


def hold(lock: Any) -> None:
    """Registers a threading.RLock that a fork waits for."""
    with _registry:
        _locks.add(lock)


def drop_in_child(inherited: Inherited) -> None:
    """Registers a resource that a child drops."""
    with _registry:
        _inherited.add(inherited)


def keep_for_ever(something: object) -> None:
    """Prevents that an object is ever deleted in this process, by an extra reference."""
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
