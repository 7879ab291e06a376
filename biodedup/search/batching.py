"""Batches concurrent searches: one pass over the gallery serves all callers that wait.

Owns the queue of waiting requests. Never searches itself.

A pass over the gallery is bound by memory bandwidth, so it takes hardly longer for eight probes than for one. So callers
on many threads with one probe each get the throughput of batches. A small request does not wait for one that is far
larger. It does wait for many small ones; otherwise small passes would slow each other down.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_PASSES = 2  # at the same time: one scans while the candidates of the other are compared
_FAR_LARGER = 16  # a request larger by this factor is not waited for


class Gathering(Generic[_Key, _Item, _Result]):
    """Runs items of one key in batches. run: items -> as many results, in their order; most: items of a batch.
    Thread-safe."""

    def __init__(self, run: Callable[[_Key, list[_Item]], list[_Result]], most: int) -> None:
        self._run = run
        self._most = most
        self._changed = threading.Condition()
        self._waiting: list[_Request[_Key, _Item, _Result]] = []
        self._running: dict[int, int] = {}
        """For each running pass, by the id of its first request: the items of its largest request."""

    def __call__(self, key: _Key, items: Sequence[_Item]) -> list[_Result]:
        """The results of these items, which run in one batch. Raises what `run` raises for these items alone."""
        request = _Request[_Key, _Item, _Result](key, list(items))
        group: list[_Request[_Key, _Item, _Result]] = []
        try:
            with self._changed:
                self._waiting.append(request)
                while not request.done and (request.taken or self._must_wait(len(request.items))):
                    self._changed.wait()
                if not request.done:
                    self._take(request, group)
                    self._running[id(request)] = max(len(member.items) for member in group)
            if group:
                self._run_all(key, group)
        finally:  # no request may wait for a pass that has ended
            with self._changed:
                self._waiting = [member for member in self._waiting if member is not request]
                self._running.pop(id(request), None)
                for member in group:
                    member.done = True
                self._changed.notify_all()
        if request.results is None:  # the batch failed, and any of its requests may be the cause
            return self._run(key, request.items)
        return request.results

    def _must_wait(self, count: int) -> bool:
        return sum(items < _FAR_LARGER * count for items in self._running.values()) >= _PASSES

    def _take(self, request: _Request[_Key, _Item, _Result], group: list[_Request[_Key, _Item, _Result]]) -> None:
        """Fills the group with the waiting requests that run in one batch with this one."""
        room = self._most - len(request.items)
        group.append(request)
        for other in self._waiting:
            if other is not request and other.key == request.key and len(other.items) <= room:
                group.append(other)
                room -= len(other.items)
        for member in group:
            member.taken = True
        self._waiting = [other for other in self._waiting if not other.taken]

    def _run_all(self, key: _Key, group: Sequence[_Request[_Key, _Item, _Result]]) -> None:
        try:
            results = self._run(key, [item for member in group for item in member.items])
        except Exception:
            if len(group) == 1:
                raise
            return
        for member in group:
            own, results = results[: len(member.items)], results[len(member.items) :]
            member.results = own if len(own) == len(member.items) else None


class _Request(Generic[_Key, _Item, _Result]):
    def __init__(self, key: _Key, items: list[_Item]) -> None:
        self.key = key
        self.items = items
        self.results: list[_Result] | None = None
        self.taken = False
        self.done = False
