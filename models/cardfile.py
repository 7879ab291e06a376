"""Writing the measured part of a model card, below its marker line."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

MARKER = "# --- measured"


def data_folder() -> Path:
    """Where the real faces and fingers are, as the tests find them."""
    return Path(os.environ.get("BIODEDUP_DATA", Path(__file__).parents[2] / "shared" / "data"))


def write_measured(card: Path, tables: Mapping[str, Mapping[str, float | int | str | Sequence[float]]]) -> None:
    """Replaces everything below the marker line of the card with these tables."""
    lines = card.read_text().splitlines()
    marker = next(i for i, line in enumerate(lines) if line.startswith(MARKER))
    lines = lines[: marker + 1]
    for name, table in tables.items():
        lines += ["", f"[{name}]"]
        for key, value in table.items():
            if isinstance(value, str):
                lines.append(f'{key} = "{value}"')
            elif isinstance(value, (int, float)):
                lines.append(f"{key} = {value:.6g}" if isinstance(value, float) else f"{key} = {value}")
            else:
                numbers = [f"{number:.5g}" for number in value]
                rows = [", ".join(numbers[i : i + 12]) for i in range(0, len(numbers), 12)]
                lines += [f"{key} = [", *(f"    {row}," for row in rows), "]"]
    card.write_text("\n".join(lines) + "\n")
