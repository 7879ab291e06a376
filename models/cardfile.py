"""Writing the measured part of a model card, below its marker line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from biodedup.jobs.evaluation.calibrate import card_text

MARKER = "# --- measured"


def data_folder() -> Path:
    """Where the real faces and fingers are, as the tests find them."""
    return Path(os.environ.get("BIODEDUP_DATA", Path(__file__).parents[2] / "shared" / "data"))


def write_measured(card: Path, tables: Mapping[str, Mapping[str, Any]]) -> None:
    """Replaces everything below the marker line of the card with these tables."""
    lines = card.read_text().splitlines()
    marker = next(i for i, line in enumerate(lines) if line.startswith(MARKER))
    lines = lines[: marker + 1]
    card.write_text("\n".join(lines) + "\n" + card_text(tables))
