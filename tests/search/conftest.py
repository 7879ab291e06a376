"""Settings that all tests of searches share."""

from __future__ import annotations

import pytest

from biodedup.search import costs


@pytest.fixture(autouse=True)
def _class_tables_from_the_first_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Galleries of tests are too small to be worth measured laws; their searches take the path of large ones."""
    monkeypatch.setattr(costs, "CLASSES_MEASURED_NS", 0.0)
