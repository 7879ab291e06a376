"""Registers on a PostgreSQL server that the tests start."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import biodedup as bd

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
    from tests.support.ray_cluster import started

    made = started()
    yield made
    ray.shutdown()
    made.shutdown()
