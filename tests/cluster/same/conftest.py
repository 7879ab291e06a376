"""The engine's own tests, on registers in PostgreSQL in place of folders."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest

import biodedup as bd
from tests.support.postgres import Postgres


@pytest.fixture(autouse=True)
def folders_are_registers(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Engine.open(folder)` opens a register instead, one for each folder; the folder holds the copies of its segments."""
    in_folder = bd.Engine.open

    def in_register(path: str | Path, config: bd.Config | None = None, **more: object) -> bd.Engine:
        url = postgres.url("f" + hashlib.sha256(str(path).encode()).hexdigest()[:20])
        cluster = bd.ClusterConfig(segments=f"file://{path}/store", cache=Path(path))
        return in_folder(url, replace(config or bd.Config(), cluster=cluster), **more)

    monkeypatch.setattr(bd.Engine, "open", in_register)


def same(module: object, left_out: Collection[str] = ()) -> dict[str, object]:
    """The tests and fixtures of a module, for the globals of another one. left_out: tests of what only folders have."""
    names = vars(module)
    return {name: value for name, value in names.items() if not name.startswith("__") and name not in left_out}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones run on folders alone."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    kept = [item for item in here if not item.get_closest_marker("slow")]
    items[:] = [item for item in items if item not in here or item in kept]
