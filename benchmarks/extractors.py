"""Compares minutiae extractors: error rates with the present matcher, refusals, and milliseconds per print.

    python benchmarks/extractors.py                           # every extractor but LEADER, FVC2002 DB1-4_B and UareU
    python benchmarks/extractors.py leader --half report      # one extractor, the fingers on which no constant was chosen

Every print goes through the extractor alone, without the quality gate, so that extractors are compared on the same pairs. A print that
gives no minutiae is a mate that scores 0. Mated: all pairs of a finger's impressions; non-mated: all impressions of different fingers of
a set. FNMR at FMR 1e-3: one threshold for all sets, so that a sensor cannot have its own. Tuning half: the fingers of even rank in a
set; constants are chosen on these. Report half: the others. Records are kept in --folder. Needs the real data (BIODEDUP_DATA).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from minutiae import equal_error_rate
from numpy.typing import NDArray
from report import data_folder, record

from biodedup.capture.fingers.finger import minutiae_extractor
from biodedup.capture.fingers.one_pass import one_pass
from biodedup.capture.fingers.resampling import resampled
from biodedup.capture.minutiae.record import write_record
from biodedup.embed.cards import minutiae_card
from biodedup.match.prints.minutiae import CylinderMatcher

SETS = {"fvc2002/DB1_B": 500, "fvc2002/DB2_B": 569, "fvc2002/DB3_B": 500, "fvc2002/DB4_B": 500, "uareu": 512}
DPI = SETS | {"sfinge_demo": 500}
Half = Literal["all", "tuning", "report"]
Scores = NDArray[np.float32]


def pictures(name: str, half: Half = "all") -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(rank of the finger, its picture at 500 dpi) of every print of a set."""
    paths = sorted((data_folder() / "fingers" / name).glob("*.png"))
    fingers = sorted({path.stem.rpartition("_")[0] for path in paths})
    for path in paths:
        rank = fingers.index(path.stem.rpartition("_")[0])
        if half == "all" or rank % 2 == (half == "report"):
            yield rank, resampled(np.asarray(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), np.uint8), DPI[name])


def records(name: str, extractor: str, folder: Path | None) -> tuple[list[bytes], NDArray[np.int64], float]:
    """(records, b"" where there is none; the finger of each; milliseconds a print) of a set."""
    kept = folder and folder / f"{name.replace('/', '-')}-{extractor}.npz"
    if kept and kept.exists():
        with np.load(kept) as file:
            bodies, ends, fingers, ms = (file[key] for key in ("bodies", "ends", "fingers", "ms"))
        return [body.tobytes() for body in np.split(bodies, ends[:-1])], fingers, float(ms)
    extract: Any = minutiae_extractor(extractor, minutiae_card(extractor).weights)
    prints = list(pictures(name))
    found, spent = [], 0.0
    extract(prints[0][1], one_pass(prints[0][1]))
    for _, grey in prints:
        started = time.thread_time()
        try:
            print_ = one_pass(grey) if extractor == "skeleton" else None
            found.append(write_record(extract(grey, print_), 0, None))
        except ValueError:
            found.append(b"")
        spent += time.thread_time() - started
    fingers, ms = np.array([rank for rank, _ in prints]), 1000 * spent / len(prints)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        bodies = np.frombuffer(b"".join(found), np.uint8)
        np.savez(kept, bodies=bodies, ends=np.cumsum([len(one) for one in found]), fingers=fingers, ms=ms)
    return found, fingers, ms


def pair_scores(found: Sequence[bytes], fingers: NDArray[np.int64]) -> tuple[Scores, Scores]:
    """(mated, non-mated) scores of all pairs."""
    compare = CylinderMatcher().compare
    scores = []
    for i, one in enumerate(found):
        others = [j for j in range(i + 1, len(found)) if found[j]]
        row = np.zeros(len(found) - i - 1, np.float32)
        if one and others:
            row[np.array(others) - i - 1] = compare(one, [found[j] for j in others])
        scores.append(row)
    values = np.concatenate(scores)
    a, b = np.triu_indices(len(found), 1)
    same = fingers[a] == fingers[b]
    return values[same], values[~same]


def measure(of: dict[str, tuple[list[bytes], NDArray[np.int64], float]], half: Half) -> dict[str, Any]:
    """Figures of an extractor. of: set -> records, fingers, milliseconds."""
    mated, nonmated, figures = {}, {}, {}
    for name, (found, fingers, _) in of.items():
        kept = [i for i, rank in enumerate(fingers.tolist()) if half == "all" or rank % 2 == (half == "report")]
        mated[name], nonmated[name] = pair_scores([found[i] for i in kept], fingers[kept])
        figures[f"{name}: EER, %"] = round(100 * equal_error_rate(mated[name], nonmated[name]), 2)
        figures[f"{name}: without minutiae"] = sum(not found[i] for i in kept)
    # every set has equal weight in the threshold
    values = np.concatenate(list(nonmated.values()))
    weights = np.concatenate([np.full(len(one), 1 / len(one)) for one in nonmated.values()]) / len(nonmated)
    order = np.argsort(values)[::-1]
    threshold = values[order[np.searchsorted(np.cumsum(weights[order]), 1e-3)]]
    misses = {name: 100 * float(np.mean(one <= threshold)) for name, one in mated.items()}
    figures["mean EER, FVC2002, %"] = round(float(np.mean([figures[f"{n}: EER, %"] for n in of if "fvc" in n])), 2)
    figures["FNMR at FMR 1e-3, %, by set"] = {name: round(one, 2) for name, one in misses.items()}
    figures["FNMR at FMR 1e-3, %, mean of sets"] = round(float(np.mean(list(misses.values()))), 2)
    figures["ms a print"] = round(float(np.mean([ms for _, _, ms in of.values()])), 1)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extractors", nargs="*", default=["mindtct", "skeleton"])
    parser.add_argument("--half", choices=("all", "tuning", "report"), default="all")
    parser.add_argument("--folder", type=Path, help="where records are kept from run to run")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    for extractor in options.extractors:
        found = {name: records(name, extractor, options.folder) for name in SETS}
        figures = {"extractor": extractor, "half": options.half} | measure(found, options.half)
        record("extractors", figures, keep=True)


if __name__ == "__main__":
    main()
