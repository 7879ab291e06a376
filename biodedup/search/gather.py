"""Searches that wait together are made together: one pass over the gallery serves all who asked meanwhile.

Owns the waiting. A pass for eight probes takes hardly longer than one for one, since it is bound by memory; so callers on many
threads, each with a probe of its own, get the throughput of batches without knowing of each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_AT_ONCE = 2  # one scans while the other's candidates are compared


class Gathering(Generic[_Key, _Item, _Result]):
    """run: items of one key -> as many results, in their order. most: items that are run together. Thread-safe."""

    def __init__(self, run: Callable[[_Key, list[_Item]], list[_Result]], most: int) -> None:
        self._run = run
        self._most = most
        self._turn = threading.Semaphore(_AT_ONCE)
        self._lock = threading.Lock()
        self._waiting: list[_Asked[Any, Any, Any]] = []

    def __call__(self, key: _Key, items: Sequence[_Item]) -> list[_Result]:
        """The results of these items, which are run in one go. Raises what `run` raises for them alone."""
        asked = _Asked[_Key, _Item, _Result](key, list(items))
        with self._lock:
            self._waiting.append(asked)
        with self._turn:
            group = self._taken(asked)
            if len(group) == 1:
                return self._run(key, asked.items)
            if group:
                self._run_all(key, group)
        asked.done.wait()
        return self._run(key, asked.items) if asked.alone else asked.results

    def _run_all(self, key: _Key, group: Sequence[_Asked[_Key, _Item, _Result]]) -> None:
        results: list[_Result] = []
        try:
            results = self._run(key, [item for one in group for item in one.items])
        except Exception:  # whose fault it was is not known: each tries again by itself
            for one in group:
                one.alone = True
        finally:
            for one in group:
                one.results, results = results[: len(one.items)], results[len(one.items) :]
                one.alone |= len(one.results) < len(one.items)
                one.done.set()

    def _taken(self, asked: _Asked[_Key, _Item, _Result]) -> list[_Asked[_Key, _Item, _Result]]:
        """Those who are run together with this one; nobody, where somebody has taken it already."""
        with self._lock:
            if asked not in self._waiting:
                return []
            group, room = [asked], self._most - len(asked.items)
            for other in self._waiting:
                if other is not asked and other.key == asked.key and len(other.items) <= room:
                    group.append(other)
                    room -= len(other.items)
            self._waiting = [other for other in self._waiting if other not in group]
            return group


class _Asked(Generic[_Key, _Item, _Result]):
    def __init__(self, key: _Key, items: list[_Item]) -> None:
        self.key = key
        self.items = items
        self.results: list[_Result] = []
        self.alone = False
        self.done = threading.Event()
