"""Fixtures: a synthetic population, and captures that the dependencies ship."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from skimage import data as skimage_data

import biodedup as bd
from biodedup import jobs
from biodedup.engine.prepare import Preparer
from biodedup.jobs.kits.keys import CentreKey, KitKey, load_centre_key, load_key
from tests.support import ROOT
from tests.support.kits import MONDAY
from tests.support.vectors import SFACE

_DECLINED = Preparer._unnamed


@pytest.fixture(autouse=True, scope="session")
def vectors_without_a_model() -> Iterator[None]:
    """Bare vectors need a model_id. Most tests are not about models: theirs are SFace's where they are faces of 128 numbers,
    and of a model without a card otherwise. `@pytest.mark.models` leaves everything to the test."""

    def named(self: Preparer, column: str, dimension: int) -> str:
        return SFACE if (column, dimension) == ("face", 128) else f"external-{dimension}"

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Preparer, "_unnamed", named)
        yield


@pytest.fixture(autouse=True)
def models_are_named(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "models" in request.keywords:
        monkeypatch.setattr(Preparer, "_unnamed", _DECLINED)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[bd.Engine]:
    with bd.Engine.open(tmp_path / "gallery") as engine:
        yield engine


@pytest.fixture(scope="session")
def portrait() -> np.ndarray:
    """uint8 (512, 512, 3) RGB: one real face."""
    return np.asarray(skimage_data.astronaut())


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real data for measuring, or a skip with the reason."""
    folder = Path(os.environ.get("BIODEDUP_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the real data is absent; set BIODEDUP_DATA to its folder")
    return folder


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
