"""Runs the engine's tests of behaviour twice: on a gallery in a folder, and on a register in PostgreSQL.

Left out on a register: what only folders have (files, formats, locks, backups, failing disks), and the long tests.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

import biodedup as bd

ON_REGISTERS: dict[str, set[str]] = {
    "test_cases": {
        "test_damaged_verdicts_are_an_error_and_never_another_answer",
        "test_open_cases_and_verdicts_of_a_gallery_of_the_format_before_stand",
    },
    "test_encounters": set(),
    "test_engine": {
        "test_a_second_writer_is_refused_with_the_holders_name",
        "test_foreign_folders_and_files_are_not_galleries",
    },
    "test_policy": {
        "test_a_backup_has_every_version",
        "test_a_policy_table_that_lost_rows_or_was_changed_is_damage",
        "test_the_policy_that_made_an_older_gallery_is_its_first_version",
    },
}
"""Module -> its tests that are of folders alone."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    of_folders = ON_REGISTERS.get(metafunc.module.__name__.rpartition(".")[2])
    if of_folders is not None and metafunc.function.__name__ not in of_folders:
        kinds = ["folder", pytest.param("register", marks=pytest.mark.cluster)]
        metafunc.parametrize("back_end", kinds, indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    long = [item for item in items if item.get_closest_marker("slow") and item.get_closest_marker("cluster")]
    items[:] = [item for item in items if item not in long or Path(__file__).parent not in item.path.parents]


@pytest.fixture(autouse=True)
def back_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """`register`: `Engine.open(folder)` opens a register instead, one for each folder; the folder holds the copies of its segments."""
    kind = getattr(request, "param", "folder")
    if kind == "register":
        postgres, in_folder = request.getfixturevalue("postgres"), bd.Engine.open

        def in_register(path: str | Path, config: bd.Config | None = None, **more: object) -> bd.Engine:
            url = postgres.url("f" + hashlib.sha256(str(path).encode()).hexdigest()[:20])
            cluster = bd.ClusterConfig(segments=f"file://{path}/store", cache=Path(path))
            return in_folder(url, replace(config or bd.Config(), cluster=cluster), **more)

        monkeypatch.setattr(bd.Engine, "open", in_register)
    return kind
