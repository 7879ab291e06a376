"""Where the pieces of a job are done: on this machine, or as tasks of a Ray cluster.

Owns what a job's caller names. The protocol is in `common/executors.py`, Ray in `cluster/tasks.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from biodedup.common.executors import LOCAL, Executor
from biodedup.errors import InvalidInput


@contextmanager
def ray_executor(address: str | None) -> Iterator[Executor]:
    """What a job takes as `executor`, to have its pieces done by a Ray cluster. Results are those of one machine, byte for byte.

    address: `host:port`, `auto` for the cluster that this machine belongs to, `local` for a new one of this process; None: this machine without
    Ray. Raises InvalidInput where Ray is not installed, StorageUnavailable where the cluster cannot be joined.
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
