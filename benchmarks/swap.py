"""What a search across positions costs: ten fingers against ten columns, with and without; and what it finds.

    python benchmarks/swap.py --folder /somewhere      200,000 subjects with ten fingers of 128 numbers; 300 MB of disk
    python benchmarks/swap.py --rows 3000 --probes 4   the smoke size; keeps no result

Fingers are isotropic, of a model without a card, so that every column is scanned by itself. Mates are at cosine 0.6. Single probes, and
batches of 32 through `Searcher.search`, take turns: as labelled, across. ratio: across over as labelled. found: mates that come first as a
duplicate, `labelled` rightly, and with the labels of `hands` or of `two` fingers (right index and middle) exchanged.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from report import record

import biodedup as bd
from biodedup.synthetic.vectors import mates_of
from biodedup.testing import internals

ROWS, PROBES, BATCH, STEP, COSINE = 200_000, 64, 32, 1 << 14, 0.6
FINGERS = bd.FINGER_POSITIONS[:10]


def batch(index: int, rows: int, column: int, dimension: int) -> np.ndarray:
    vectors = np.random.default_rng([23, index, column]).standard_normal((rows, dimension), np.float32)
    return vectors / np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None]


def build(gallery: Path, rows: int, dimension: int) -> None:
    with bd.Engine.open(gallery) as engine:
        for index, low in enumerate(range(0, rows, STEP)):
            count = min(STEP, rows - low)
            names = [f"s{row}" for row in range(low, low + count)]
            engine.add_templates(
                names,
                {f: batch(index, count, i, dimension) for i, f in enumerate(FINGERS)},
                model_id=f"external-{dimension}",
            )
        engine.compact()


def labels(mistake: str) -> dict[str, str]:
    """The finger that carries each label."""
    if mistake == "hands":
        return dict(zip(FINGERS, FINGERS[5:] + FINGERS[:5], strict=True))
    named = dict(zip(FINGERS, FINGERS, strict=True))
    if mistake == "two":
        named |= {"right_index": "right_middle", "right_middle": "right_index"}
    return named


def measure(gallery: Path, probes: int, dimension: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    with bd.Engine.open(gallery, read_only=True) as engine:
        figures["rows"] = rows = len(engine)
        whose = np.random.default_rng(1).permutation(min(STEP, rows))[:probes]
        mates = {
            f: mates_of(batch(0, min(STEP, rows), i, dimension)[whose], np.full(len(whose), COSINE), seed=50 + i)
            for i, f in enumerate(FINGERS)
        }
        for mistake in ("labelled", "two", "hands"):
            named = labels(mistake)
            encounters = [bd.Encounter(templates={f: mates[named[f]][i] for f in FINGERS}) for i in range(len(whose))]
            seconds: dict[bool, list[float]] = {False: [], True: []}
            found, reported = {False: 0, True: 0}, 0
            engine.identify(encounters[0], across_positions=True)
            for encounter, row in zip(encounters, whose, strict=True):
                for across in seconds:
                    started = time.perf_counter()
                    decision = engine.identify(encounter, across_positions=across)
                    seconds[across].append(time.perf_counter() - started)
                    best = decision.best
                    found[across] += decision.outcome in ("duplicate", "review") and best.subject_id == f"s{row}"
                    wrong = {f: other for f, other in named.items() if f != other}
                    reported += across and best is not None and dict(best.swaps) == wrong
            plain, across_ms = (1000 * float(np.median(seconds[across])) for across in (False, True))
            figures[f"{mistake}: one probe, p50 ms, as labelled; across"] = f"{plain:.0f}; {across_ms:.0f}"
            figures[f"{mistake}: ratio"] = round(across_ms / plain, 2)
            figures[f"{mistake}: found as labelled; across; labels told"] = (
                f"{found[False]}; {found[True]}; {reported} of {len(whose)}"
            )
        snapshot, searcher = internals(engine).gallery.snapshot(), internals(engine).searcher
        model_id = snapshot.models[FINGERS[0]].model_id
        some = [{f: bd.Template(f, model_id, mates[f][i]) for f in FINGERS} for i in range(min(BATCH, len(whose)))]
        spent: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(3):
            for across, taken in spent.items():
                started = time.perf_counter()
                searcher.search(snapshot, some, across=across)
                taken.append((time.perf_counter() - started) / len(some))
        plain, across_ms = (1000 * float(np.median(spent[across])) for across in (False, True))
        figures["batch, ms a probe, as labelled; across"] = f"{plain:.0f}; {across_ms:.0f}"
        figures["batch: ratio"] = round(across_ms / plain, 2)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--dimension", type=int, default=128)
    parser.add_argument("--probes", type=int, default=PROBES)
    parser.add_argument("--folder", type=Path, help="where the gallery is built")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        build(Path(folder) / "gallery", arguments.rows, arguments.dimension)
        figures = measure(Path(folder) / "gallery", arguments.probes, arguments.dimension)
    record("swap", figures, keep=arguments.rows >= ROWS)


if __name__ == "__main__":
    main()
