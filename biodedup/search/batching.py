"""Batches concurrent searches: one pass over the gallery serves all waiting callers.

Owns the queue of waiting requests. Never searches.

A pass over the gallery is bound by memory bandwidth, so that eight probes take hardly longer than one. Callers on many threads with one
probe each therefore get the throughput of batches. A small request does not wait for a far larger request. It waits for other small
requests, because parallel small passes would slow each other down.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_PASSES = 2  # passes at the same time: one scans while the candidates of the other are compared
_FAR_LARGER = 16  # a request does not wait for a request that is larger by this factor


class Batcher(Generic[_Key, _Item, _Result]):
    """Runs items with the same key in batches. run: (key, items) -> a result for each item, in order. batch_size: greatest number of items in
    a batch. Thread-safe."""

    def __init__(self, run: Callable[[_Key, list[_Item]], list[_Result]], batch_size: int) -> None:
        self._run = run
        self._batch_size = batch_size
        self._changed = threading.Condition()
        self._waiting: list[_Request[_Key, _Item, _Result]] = []
        self._running: dict[int, int] = {}
        """Id of a pass's first request -> the number of items of the pass's largest request."""

    def __call__(self, key: _Key, items: Sequence[_Item]) -> list[_Result]:
        """The results of these items, which run in one batch. Raises the errors of `run` for these items alone."""
        request = _Request[_Key, _Item, _Result](key, list(items))
        batch: list[_Request[_Key, _Item, _Result]] = []
        try:
            with self._changed:
                self._waiting.append(request)
                while not request.done and (request.taken or self._must_wait(len(request.items))):
                    self._changed.wait()
                if not request.done:
                    self._take(request, batch)
                    self._running[id(request)] = max(len(member.items) for member in batch)
            if batch:
                self._run_all(key, batch)
        finally:  # also after an error, so that no request waits for a pass that has ended
            with self._changed:
                self._waiting = [member for member in self._waiting if member is not request]
                self._running.pop(id(request), None)
                for member in batch:
                    member.done = True
                self._changed.notify_all()
        if request.results is None:  # the batch failed; this request may or may not be the cause
            return self._run(key, request.items)
        return request.results

    def _must_wait(self, count: int) -> bool:
        return sum(items < _FAR_LARGER * count for items in self._running.values()) >= _PASSES

    def _take(self, request: _Request[_Key, _Item, _Result], batch: list[_Request[_Key, _Item, _Result]]) -> None:
        """Fills the batch with this request and waiting requests with the same key."""
        room = self._batch_size - len(request.items)
        batch.append(request)
        for other in self._waiting:
            if other is not request and other.key == request.key and len(other.items) <= room:
                batch.append(other)
                room -= len(other.items)
        for member in batch:
            member.taken = True
        self._waiting = [other for other in self._waiting if not other.taken]

    def _run_all(self, key: _Key, batch: Sequence[_Request[_Key, _Item, _Result]]) -> None:
        try:
            results = self._run(key, [item for member in batch for item in member.items])
        except Exception:
            if len(batch) == 1:
                raise
            return
        for member in batch:
            of_member, results = results[: len(member.items)], results[len(member.items) :]
            member.results = of_member if len(of_member) == len(member.items) else None


class _Request(Generic[_Key, _Item, _Result]):
    def __init__(self, key: _Key, items: list[_Item]) -> None:
        self.key = key
        self.items = items
        self.results: list[_Result] | None = None
        self.taken = False
        self.done = False
