"""Honest updates: how many of a subject's further captures go to review, and how many because the first row contradicts them.

    python benchmarks/updates.py               faces of LFW and fingers of UareU, with real data (BIODEDUP_DATA)
    python benchmarks/updates.py --limit 20    the smoke size; keeps no result

Each subject is enrolled with the first capture and updated with all others, in their order. `contradicted by the first row`: the reason
`another_person` although a later row verifies the capture, which tells a small-step replacement of a person.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from report import data_folder, record

import biodedup as bd


def sequences(limit: int | None) -> dict[str, list[list[tuple[str, list[Any]]]]]:
    """kind -> for each subject its captures, in their order, as (name, captures)."""
    faces = [
        [(file.stem, [bd.Face(file)]) for file in sorted(folder.glob("*.jpg"))]
        for folder in sorted((data_folder() / "faces" / "lfw").iterdir())
    ]
    fingers: dict[str, list[tuple[str, list[Any]]]] = {}
    for file in sorted((data_folder() / "fingers" / "uareu").rglob("*.*")):
        fingers.setdefault(file.stem.rpartition("_")[0], []).append(
            (file.stem, [bd.Finger(file, "right_index", dpi=500)])
        )
    kinds = {
        "faces, LFW": [f for f in faces if len(f) >= 3],
        "fingers, UareU": [f for f in fingers.values() if len(f) >= 3],
    }
    return {kind: of[:limit] for kind, of in kinds.items()}


def measure(people: list[list[tuple[str, list[Any]]]]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, bd.Engine.open(Path(folder) / "g") as engine:
        for number, captures in enumerate(people):
            (_, first), *others = captures
            counts["subjects"] += 1
            if engine.import_captures([bd.Encounter(f"s{number}", first)])[0].outcome != "unique":
                counts["subjects without a usable first capture"] += 1
                continue
            for name, more in others:
                rows = len(engine.encounters(f"s{number}"))
                decision = engine.update(bd.Encounter(f"s{number}", more, encounter_id=f"{number}/{name}"))
                counts["updates"] += 1
                counts[f"updates, {decision.outcome}"] += 1
                if decision.outcome == "review":
                    counts["review, because of " + " + ".join(decision.reasons)] += 1
                    accepted = engine.verify(bd.Encounter(f"s{number}", more), f"s{number}").accepted
                    counts["review, contradicted by the first row"] += accepted and rows > 1
    return dict(sorted(counts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="subjects of each kind")
    arguments = parser.parse_args()
    figures = {kind: measure(people) for kind, people in sequences(arguments.limit).items()}
    record("updates", figures, keep=arguments.limit is None)


if __name__ == "__main__":
    main()
