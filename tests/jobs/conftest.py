"""Fixtures of field kits: their keys, and a centre that trusts them."""

from __future__ import annotations

from pathlib import Path

import pytest

from biodedup import jobs
from biodedup.jobs.kits.format.keys import CentreKey, KitKey, load_centre_key, load_key
from tests.support.kits import MONDAY


@pytest.fixture(scope="session")
def kit_keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[KitKey, CentreKey]:
    """A kit's key and a centre's."""
    folder = tmp_path_factory.mktemp("keys")
    jobs.make_keys("K1", folder / "K1.key", clock=lambda: MONDAY)
    jobs.make_centre_key(folder / "centre.key", clock=lambda: MONDAY)
    return load_key(folder / "K1.key"), load_centre_key(folder / "centre.key")


@pytest.fixture
def centre(tmp_path: Path) -> Path:
    """A folder with the keys of kits A and B, whose public halves are trusted, and the centre's."""
    (tmp_path / "trusted").mkdir()
    for kit in "AB":
        jobs.make_keys(kit, tmp_path / f"{kit}.key", clock=lambda: MONDAY)
        (tmp_path / "trusted" / f"{kit}.pub").write_bytes((tmp_path / f"{kit}.pub").read_bytes())
    jobs.make_centre_key(tmp_path / "centre.key", clock=lambda: MONDAY)
    return tmp_path
