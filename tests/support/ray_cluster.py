"""A Ray cluster of two nodes on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support import ROOT

_STARTS = 4  # on a loaded machine Ray's own processes may miss Ray's deadlines
NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}
# a node that is gone is missed after ten seconds, and one that stands still on a loaded machine is not
PATIENCE = {"health_check_timeout_ms": 60_000, "health_check_period_ms": 1_000, "health_check_failure_threshold": 10}


def started() -> Any:
    """The cluster, which this process has joined; `ray.shutdown()`, then its own `shutdown()` ends it."""
    import ray

    def joined(cluster: Any) -> None:
        ray.init(address=cluster.address, namespace="biodedup", log_to_driver=False, logging_level="warning")

    return _started(NODE, 1, joined)


def without_driver(nodes: int, root: Path = ROOT, patience: Mapping[str, int] = PATIENCE) -> Any:
    """A cluster whose head holds no shards, which other processes join. root: where its processes find the library; patience: Ray's settings,
    {} for its defaults."""
    return _started(NODE | {"num_cpus": 0}, nodes, lambda cluster: None, root, patience)


def _started(
    head: dict[str, int],
    nodes: int,
    then: Callable[[Any], None],
    root: Path = ROOT,
    patience: Mapping[str, int] = PATIENCE,
) -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(root), os.environ.get("PYTHONPATH")))
    )  # of Ray's processes
    from ray.cluster_utils import Cluster

    for left in reversed(range(_STARTS)):
        cluster = Cluster()
        try:
            cluster.add_node(**head, include_dashboard=False, _system_config=dict(patience))
            for _ in range(nodes):
                cluster.add_node(**NODE)
            cluster.wait_for_nodes()
            then(cluster)
            return cluster
        except Exception:
            with suppress(Exception):
                cluster.shutdown()
            if not left:
                raise
    raise AssertionError("not reached")
