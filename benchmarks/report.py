"""One JSON row a run, and where the real data is.

Owns the files in `results/`. Never measures.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from biodedup.embed.cards import load_card

RESULTS = Path(__file__).parent / "results"
PARTS = ("numpy", "faiss-cpu", "onnxruntime", "opencv-python-headless", "nbis-py")


def model_ids(column: str, dimension: int) -> dict[str, str]:
    """For bare vectors of a benchmark: those of the face model that is shipped, if they are as long as these, or else of a model without
    a calibration."""
    face = load_card("sface")
    named = column == "face" and dimension == face.dimension
    return {column: face.model_id if named else f"external-{dimension}"}


def data_folder() -> Path:
    """Where the real faces and fingers are; exits with the reason where they are absent."""
    folder = Path(os.environ.get("BIODEDUP_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        sys.exit("the real data is absent; set BIODEDUP_DATA to its folder")
    return folder


def record(name: str, figures: dict[str, Any], *, keep: bool) -> None:
    """Prints the figures and, if keep, appends them with commit, machine and versions to results/<name>.jsonl."""
    for key, value in figures.items():
        print(f"{key:<40} {value}")
    if not keep:
        return
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True)
    row = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() or None,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.system()},
        "python": platform.python_version(),
        "versions": {part: version(part) for part in PARTS},
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
