"""Runs the pieces of a job as tasks on a Ray cluster.

Owns the tasks: how they are sent, repeated and cancelled. Ray holds no durable state: the job keeps its own checkpoint.

1. Ray repeats a task whose process or node is lost, up to `_RETRIES` times. After that the job ends with a RetryableError, and the same
   command continues from the checkpoint.
2. A process opens the recipe of the work once. It refuses a job of another release.
3. Linear algebra libraries use as many threads as in the job's own process, because the number of threads changes how sums are rounded. On
   processors of the same kind, results are then equal to the last bit.
4. Tasks whose results were not fetched are cancelled when the executor closes.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from threadpoolctl import threadpool_info, threadpool_limits

from biodedup.cluster.shards import wire
from biodedup.cluster.shards.ray_actors import joined
from biodedup.common.executors import Pending, Recipe, Work
from biodedup.errors import InvalidInput, StorageUnavailable

P = TypeVar("P")
R = TypeVar("R")

_RETRIES = 5
_AHEAD = 2  # tasks per processor: one runs, one waits
_COUNTED_S = 10.0  # after this time the processors are counted again
_NICE = 5  # a lower priority than Ray's own processes, so that their heartbeats are sent in time


@contextmanager
def ray_tasks(address: str) -> Iterator[RayExecutor]:
    """An executor on a Ray cluster. address: `host:port`; `auto` for the cluster of this machine; `local` for a new cluster in this
    process.

    Raises StorageUnavailable if the cluster cannot be joined, or no node has processors."""
    with joined(address) as ray:
        executor = RayExecutor(ray)
        try:
            yield executor
        finally:
            executor.close()


class RayExecutor:
    """An `Executor`. Not thread-safe: a job submits from one thread."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._works: dict[int, _Known] = {}
        self._sent: dict[str, Any] = {}
        self._count, self._counted_at = 0, -_COUNTED_S
        self._task = ray.remote(run_piece)
        if self._processors() < 1:
            raise StorageUnavailable("no node of the Ray cluster has processors; start one with --num-cpus")

    @property
    def pieces_ahead(self) -> int:
        return _AHEAD * max(self._processors(), 1)

    def submit(self, work: Work[P, R], piece: P) -> Pending[R]:
        known = self._works.get(id(work))
        if known is None:
            known = self._works[id(work)] = self._known(work)
        options = {"num_cpus": known.threads, "max_retries": _RETRIES, "name": type(work).__name__}
        reference = self._task.options(**options).remote(known.about, known.key, known.recipe, piece)
        self._sent[reference.hex()] = reference
        return _Sent(self, work, reference)

    def close(self) -> None:
        """Cancels the tasks whose results were not fetched."""
        for reference in self._sent.values():
            with suppress(Exception):  # the task ends with its process at the latest
                self._ray.cancel(reference, force=True)
        self._sent.clear()

    def wait(self, reference: Any) -> Any:
        """The result of a task. Raises the exception of the task, or a RetryableError if every attempt was lost."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            raise error.cause from None
        except errors.RayError as error:
            raise StorageUnavailable(
                f"Ray lost a task {1 + _RETRIES} times, or its result ({type(error).__name__}); check the nodes and their memory, and run "
                "the same command again"
            ) from None
        finally:
            self._sent.pop(reference.hex(), None)

    def _known(self, work: Work[Any, Any]) -> _Known:
        recipe = work.recipe()
        largest = max(int(node["Resources"].get("CPU", 0)) for node in self._nodes())
        threads = {library["prefix"]: library["num_threads"] for library in threadpool_info()}
        about = wire.release(), os.getcwd(), threads
        return _Known(work, about, uuid.uuid4().hex, self._ray.put(recipe), min(recipe.threads, max(largest, 1)))

    def _processors(self) -> int:
        if time.monotonic() - self._counted_at > _COUNTED_S:
            self._count = sum(int(node["Resources"].get("CPU", 0)) for node in self._nodes())
            self._counted_at = time.monotonic()
        return self._count

    def _nodes(self) -> list[dict[str, Any]]:
        try:
            return [node for node in self._ray.nodes() if node["Alive"]]
        except self._ray.exceptions.RayError as error:
            raise StorageUnavailable(f"Ray cannot list its nodes: {type(error).__name__}") from error


@dataclass(frozen=True)
class _Known:
    """A work whose recipe is stored in the cluster. work: kept alive, because its `id` is the key; about: see `run_piece`; recipe: Ray's
    reference; threads: the processors of a task."""

    work: Work[Any, Any]
    about: tuple[str, str, dict[str, int]]
    key: str
    recipe: Any
    threads: int


class _Sent(Generic[R]):
    def __init__(self, executor: RayExecutor, work: Work[Any, R], reference: Any) -> None:
        self._executor, self._work, self._reference = executor, work, reference

    def result(self) -> R:
        return self._work.received(self._executor.wait(self._reference))


# in a worker process of Ray ------------------------------------------------------------------------------------------------

_opened: dict[str, tuple[ExitStack, Callable[[Any], Any]]] = {}
"""The key of the latest work of this process -> (its open resources, its function)."""


def run_piece(about: tuple[str, str, dict[str, int]], key: str, recipe: Recipe, piece: Any) -> Any:
    """The function of every task. about: (release of the job, its working folder, threads of each library); key: of the work."""
    release, folder, threads = about
    if release != wire.release():
        raise InvalidInput(
            f"a Ray node has biodedup {wire.release()}, and the job has {release}; install one release on all nodes"
        )
    if key not in _opened:
        for stack, _ in _opened.values():
            stack.close()
        _opened.clear()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, _NICE)
        with suppress(OSError):
            os.chdir(folder)  # relative paths in the configuration start here
        # Ray sets 1; processes that the work starts shall have as many threads as those of the job
        os.environ["OMP_NUM_THREADS"] = str(max(threads.values(), default=1))
        stack = ExitStack()
        stack.enter_context(threadpool_limits(threads))
        _opened[key] = stack, stack.enter_context(recipe.opened())
        stack.enter_context(threadpool_limits(threads))  # again, for libraries that `opened` has loaded
    _, function = _opened[key]
    return function(piece)
