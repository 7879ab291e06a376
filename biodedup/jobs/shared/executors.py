"""Chooses where the pieces of a job run: on this machine, or as tasks of a Ray cluster.

Owns the choice. `common/executors.py` defines the protocol `Executor`, and `cluster/tasks.py` implements it for Ray.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from biodedup.common.executors import LOCAL, Executor
from biodedup.errors import InvalidInput


@contextmanager
def ray_executor(address: str | None) -> Iterator[Executor]:
    """Yields the argument `executor` of a job, so that a Ray cluster does its pieces. The results are the same bytes as on one machine.

    address: `host:port`; `auto`: the cluster that this machine belongs to; `local`: a new cluster in this process; None: no Ray, this machine.
    Raises InvalidInput if Ray is not installed, StorageUnavailable if the cluster cannot be joined.
    """
    if address is None:
        yield LOCAL
        return
    try:
        from biodedup.cluster.tasks import ray_tasks  # other jobs need no Ray
    except ImportError as error:
        raise InvalidInput(f"a job on Ray needs {error.name}; pip install 'biodedup[cluster]'") from error
    with ray_tasks(address) as executor:
        yield executor
