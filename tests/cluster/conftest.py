"""Registers on a PostgreSQL server that the tests start."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import biodedup as bd
from tests.support import ROOT

_numbers = itertools.count()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture
def register(postgres: Any, tmp_path: Path) -> Callable[..., bd.Engine]:
    """Opens front-ends of one register; each call is another front-end."""
    url = postgres.url(f"r{next(_numbers)}")
    opened: list[bd.Engine] = []

    def open_one(config: bd.Config | None = None, **more: object) -> bd.Engine:
        cluster = bd.ClusterConfig(**{"segments": f"file://{tmp_path}/store", **more.pop("cluster", {})})
        engine = bd.Engine.open(url, replace(config or bd.Config(), cluster=cluster), **more)
        opened.append(engine)
        return engine

    open_one.url = url
    yield open_one
    for engine in opened:
        engine.close()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """A Ray cluster of two nodes on this machine, which this process belongs to. A test that takes a node away adds it again."""
    ray = pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patched.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)  # of the processes that Ray starts
        from ray.cluster_utils import Cluster

        # a node that is gone is missed after ten seconds, and one that stands still on a loaded machine is not
        patience = {
            "health_check_timeout_ms": 60_000,
            "health_check_period_ms": 1_000,
            "health_check_failure_threshold": 10,
        }
        node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False, "_system_config": patience}
        made = Cluster(initialize_head=True, head_node_args=node)
        made.add_node(num_cpus=1, object_store_memory=100 << 20)
        made.wait_for_nodes()
    ray.init(address=made.address, namespace="biodedup", log_to_driver=False, logging_level="warning")
    yield made
    ray.shutdown()
    made.shutdown()
