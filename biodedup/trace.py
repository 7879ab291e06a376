"""A trace: records the intermediate results of each step of a call, on demand.

Holds the active trace of each thread. Never writes a file.

1. A trace belongs to the `with explain()` block that opened it. Other threads do not see it. A call that works in several threads uses
   `mapped`, which adds their steps in the order of the items.
2. A trace holds biometric data: pixels, minutiae, templates. No `repr` shows them; never log the values.
3. Without an active trace a step costs one read of a context variable:

    if (steps := tracing()) is not None:
        steps.add("face", "face", box=box)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeVar, overload

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False, repr=False)
class Step(Mapping[str, Any]):
    """The values of one step, by name: `step["landmarks"]`. column: the capture's column, or ""; item: the index of the capture in its
    batch, or None for a step of the whole batch."""

    name: str
    column: str
    item: int | None
    _values: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        """Names and shapes, no data."""
        shown = [f"{key}: {_shape(value)}" for key, value in self._values.items()]
        return f"<Step {' '.join(filter(None, (self.name, self.column)))} {{{', '.join(shown)}}}>"


class Trace(Sequence[Step]):
    """The steps of a call, in order. It is filled while the `with` block runs, and can be read afterwards."""

    def __init__(self) -> None:
        self._steps: list[Step] = []

    def add(self, name: str, column: str = "", item: int | None = None, **values: Any) -> None:
        self._steps.append(Step(name, column, item, values))

    def of(self, name: str, item: int | None = None) -> list[Step]:
        """The steps with this name; with `item`, only the steps of this item."""
        return [step for step in self._steps if step.name == name and item in (None, step.item)]

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> list[Step]: ...
    def __getitem__(self, index: int | slice) -> Step | list[Step]:
        return self._steps[index]

    def __len__(self) -> int:
        return len(self._steps)

    def __repr__(self) -> str:
        return f"<Trace of {len(self._steps)} steps: {', '.join(step.name for step in self._steps)}>"

    def _take(self, part: Trace, item: int) -> None:
        self._steps += [step if step.item is not None else replace(step, item=item) for step in part]


_active: ContextVar[Trace | None] = ContextVar("biodedup_trace", default=None)

tracing = _active.get
"""Returns the active trace, or None."""


@contextmanager
def explain() -> Iterator[Trace]:
    """Records the steps of every call that this thread makes in the block. The trace holds biometric data."""
    trace = Trace()
    token = _active.set(trace)
    try:
        yield trace
    finally:
        _active.reset(token)


@contextmanager
def untraced() -> Iterator[None]:
    """Suspends the active trace in the block. It is for work that serves several callers at once."""
    token = _active.set(None)
    try:
        yield
    finally:
        _active.reset(token)


def mapped(
    run: Callable[[Callable[[_Item], _Result], Sequence[_Item]], Iterable[_Result]],
    work: Callable[[_Item], _Result],
    items: Sequence[_Item],
) -> list[_Result]:
    """list(run(work, items)), with `map` or a pool's map as `run`; each step carries the index of its item."""
    trace = tracing()
    if trace is None:
        return list(run(work, items))
    parts = {i: Trace() for i in range(len(items))}

    def work_traced(i: int) -> _Result:
        token = _active.set(parts[i])  # in the thread that runs the work
        try:
            return work(items[i])
        finally:
            _active.reset(token)

    try:
        return list(run(work_traced, range(len(items))))  # type: ignore[arg-type]
    finally:
        for i, part in parts.items():
            trace._take(part, i)


def _shape(value: object) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        return f"{dtype} {shape}"
    sized = isinstance(value, (bytes, list, tuple, dict))
    return f"{type(value).__name__} ({len(value)})" if sized else type(value).__name__  # type: ignore[arg-type]
