"""Searches that wait together are made together: one pass over the gallery serves all who asked meanwhile.

Owns the waiting. A pass takes hardly longer for eight probes than for one, since it is bound by memory; so callers on many
threads, each with a probe of its own, get the throughput of batches without knowing of each other. Who asks for a few does not
wait for somebody who asks for hundreds; but for hundreds who ask for one each he waits, or else small passes would be in their way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_AT_ONCE = 2  # one scans while the other's candidates are compared
_FAR_LARGER = 16  # who asks for more than others by this factor is not waited for


class Gathering(Generic[_Key, _Item, _Result]):
    """run: items of one key -> as many results, in their order. most: items that are run together. Thread-safe."""

    def __init__(self, run: Callable[[_Key, list[_Item]], list[_Result]], most: int) -> None:
        self._run = run
        self._most = most
        self._changed = threading.Condition()
        self._waiting: list[_Asked[_Key, _Item, _Result]] = []
        self._running: dict[int, int] = {}
        """Of each pass that goes on, by its leader: how many items one caller asked for at most."""

    def __call__(self, key: _Key, items: Sequence[_Item]) -> list[_Result]:
        """The results of these items, which are run in one go. Raises what `run` raises for them alone."""
        asked = _Asked[_Key, _Item, _Result](key, list(items))
        group: list[_Asked[_Key, _Item, _Result]] = []
        try:
            with self._changed:
                self._waiting.append(asked)
                while not asked.done and (asked.taken or self._must_wait(len(asked.items))):
                    self._changed.wait()
                if not asked.done:
                    self._take(asked, group)
                    self._running[id(asked)] = max(len(one.items) for one in group)
            if group:
                self._run_all(key, group)
        finally:  # whatever happened, nobody waits for a pass that has ended
            with self._changed:
                self._waiting = [one for one in self._waiting if one is not asked]
                self._running.pop(id(asked), None)
                for one in group:
                    one.done = True
                self._changed.notify_all()
        if asked.results is None:  # alone, or among others of whom one was at fault, nobody knows which
            return self._run(key, asked.items)
        return asked.results

    def _must_wait(self, count: int) -> bool:
        return sum(items < _FAR_LARGER * count for items in self._running.values()) >= _AT_ONCE

    def _take(self, asked: _Asked[_Key, _Item, _Result], group: list[_Asked[_Key, _Item, _Result]]) -> None:
        """Fills the group with those who are run together with this one."""
        room = self._most - len(asked.items)
        group.append(asked)
        for other in self._waiting:
            if other is not asked and other.key == asked.key and len(other.items) <= room:
                group.append(other)
                room -= len(other.items)
        for one in group:
            one.taken = True
        self._waiting = [other for other in self._waiting if not other.taken]

    def _run_all(self, key: _Key, group: Sequence[_Asked[_Key, _Item, _Result]]) -> None:
        try:
            results = self._run(key, [item for one in group for item in one.items])
        except Exception:
            if len(group) == 1:
                raise
            return
        for one in group:
            mine, results = results[: len(one.items)], results[len(one.items) :]
            one.results = mine if len(mine) == len(one.items) else None


class _Asked(Generic[_Key, _Item, _Result]):
    def __init__(self, key: _Key, items: list[_Item]) -> None:
        self.key = key
        self.items = items
        self.results: list[_Result] | None = None
        self.taken = False
        self.done = False
