"""How well the quality of a print predicts its errors: the quality of one pass beside NFIQ 2.

    python benchmarks/finger_quality.py                   # the report half of FVC2002 DB1-4_B and UareU
    python benchmarks/finger_quality.py --fit             # fits the tables of biodedup/common/quality.py on the tuning half
    python benchmarks/finger_quality.py --smoke           # generated fingers, no data, without NFIQ 2

Error-versus-discard curve (Grother and Tabassi, "Performance of biometric quality measures", 2007): the prints of lowest quality are left
out, as if they were captured again, and FNMR is of the mated pairs that remain, at the threshold where FMR is 1e-3 with all prints. A pair
counts with the lower of its two qualities. Rank correlation: of a print's quality with its mean mated score. Nothing is refused.
"Forced": prints that the default gate refuses; how many of their mated pairs miss. The halves: `extractors.py`.

--fit: logistic regression of the mated comparisons that pass at 40 dB (the product's own: embedding and minutiae) on the score of each of
their two prints, and on their NFIQ 2. Then, on the report half, what a quality foretells beside what passed: the calibration.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from extractors import SETS, Half, pictures
from numpy.typing import NDArray
from report import record
from scipy.optimize import minimize

import biodedup as bd
from biodedup.capture.fingers.nbis_parts import nfiq2
from biodedup.capture.fingers.one_pass import one_pass
from biodedup.capture.fingers.ridge_minutiae import record_of
from biodedup.capture.minutiae.record import write_record
from biodedup.common.quality import each_from_stored
from biodedup.config import FingerConfig
from biodedup.match.prints.minutiae import CylinderMatcher
from biodedup.synthetic import draw_impression, draw_master

DISCARDED = (0, 1, 2, 5, 10, 20)
Greys = Sequence[tuple[int, NDArray[np.uint8]]]
Floats = NDArray[np.float64]


def nfiq2_or_0(grey: NDArray[np.uint8]) -> float:
    try:
        return nfiq2(grey)
    except ValueError:
        return 0.0


def ranks(values: Floats) -> Floats:
    return np.asarray(np.unique(values, return_inverse=True)[1], np.float64)


def measure(sets: dict[str, Greys], peers: dict[str, Callable[[NDArray[np.uint8]], float]]) -> dict[str, Any]:
    compare, config = CylinderMatcher().compare, FingerConfig()
    qualities: dict[str, list[float]] = {"one pass": []} | {name: [] for name in peers}
    mated: list[tuple[int, int, float]] = []  # two prints, counted through all sets, and their score
    nonmated: list[NDArray[np.float32]] = []
    refused: list[bool] = []
    for prints in sets.values():
        first, records = len(refused), []
        for _, grey in prints:
            found = one_pass(grey)
            m, body = found.measures, record_of(found.minutiae, grey.shape)
            records.append(write_record(body, 0, None))
            qualities["one pass"].append(m.score)
            gate = (
                m.certainty < config.certainty_min,
                m.area_mm2 < config.area_mm2_min,
                body.count < config.minutiae_min,
            )
            refused.append(any(gate) or m.quality < config.quality_min)
            for name, peer in peers.items():
                qualities[name].append(peer(grey))
        for i, (finger, _) in enumerate(prints):
            scores = compare(records[i], records[i + 1 :])
            same = np.array([other == finger for other, _ in prints[i + 1 :]], bool)
            mated += [(first + i, first + i + 1 + int(j), float(scores[j])) for j in np.flatnonzero(same)]
            nonmated.append(scores[~same])
    threshold = float(np.quantile(np.concatenate(nonmated), 1 - 1e-3, method="higher"))
    a, b = np.array([pair[:2] for pair in mated]).T
    miss = np.array([pair[2] for pair in mated]) <= threshold
    mean_score = np.zeros(len(refused))
    for side in (a, b):
        np.add.at(mean_score, side, [min(pair[2], 20) for pair in mated])
    figures: dict[str, Any] = {"prints": len(refused), "mated pairs": len(mated)}
    for name, values in qualities.items():
        quality = np.array(values) + 1e-6 * np.random.default_rng(0).random(len(values))  # ties in a fixed order
        figures[f"{name}: rank correlation"] = round(float(np.corrcoef(ranks(quality), ranks(mean_score))[0, 1]), 2)
        kept = {share: quality >= np.quantile(quality, share / 100) for share in DISCARDED}
        figures[f"{name}: FNMR, %, worst {list(DISCARDED)} % discarded"] = [
            round(100 * float(np.mean(miss[k[a] & k[b]])), 2) for k in kept.values()
        ]
    gone = np.array(refused)
    figures["refused by the default gate"] = int(gone.sum())
    if gone.any():
        figures["forced: FNMR of what is refused, %"] = round(100 * float(np.mean(miss[gone[a] | gone[b]])), 1)
    return figures


def comparisons(half: Half) -> tuple[Floats, Floats, Floats]:
    """(scores, NFIQ 2, passed) float64 (2 n,): of the two prints of each mated comparison. Nothing is refused."""
    open_gate = bd.FingerConfig(quality_min=0, certainty_min=0, area_mm2_min=0, minutiae_min=0)
    extractor = bd.Extractor(bd.Config(finger=open_gate, threads=1))
    rows: list[tuple[float, float, bool]] = []
    for name in SETS:
        prints = list(pictures(name, half))
        templates = extractor.extract([bd.Finger(grey, dpi=500) for _, grey in prints])
        scores = [float((t.minutiae or bytes(27))[26]) if isinstance(t, bd.Template) else 0.0 for t in templates]
        other = [nfiq2_or_0(grey) for _, grey in prints]
        for i, j in combinations(range(len(prints)), 2):
            if prints[i][0] == prints[j][0]:
                a, b = templates[i], templates[j]
                passed = isinstance(a, bd.Template) and isinstance(b, bd.Template) and bd.compare(a, b).score_db >= 40
                rows += [(scores[k], other[k], passed) for k in (i, j)]
    columns = np.array(rows, np.float64).T
    return columns[0], columns[1], columns[2]


def logistic(values: Floats, passed: Floats) -> Callable[[Floats], Floats]:
    sign = 2 * passed - 1
    found = minimize(lambda w: np.mean(np.log1p(np.exp(-sign * (w[0] + w[1] * values)))), [0, 0.05]).x
    return lambda at: 1 / (1 + np.exp(-(found[0] + found[1] * at)))


def fit() -> dict[str, Any]:
    scores, other, passed = comparisons("tuning")
    at = np.arange(0, 101, 10.0)
    figures: dict[str, Any] = {
        f"{name}: probability at 0, 10, ... 100": logistic(values, passed)(at).round(3).tolist()
        for name, values in (("score", scores), ("NFIQ 2", other))
    }
    scores, _, passed = comparisons("report")
    quality = each_from_stored("unknown", scores)
    for low, high in pairwise((0, 0.8, 0.9, 0.95, 0.98, 0.99, 1)):
        chosen = (quality >= low) & (quality < high)
        if chosen.any():
            told = quality[chosen].mean(), passed[chosen].mean(), np.count_nonzero(chosen)
            figures[f"report half, quality {low} to {high}: foretold, passed, of"] = [round(float(v), 3) for v in told]
    return figures


def generated(fingers: int, impressions: int) -> Greys:
    rng = np.random.default_rng(5)
    return [
        (i, draw_impression(rng, m).image)
        for i in range(fingers)
        for m in [draw_master(rng)]
        for _ in range(impressions)
    ]


def draw(figures: dict[str, Any], path: Path) -> None:
    """The error-versus-discard curves of what `measure` returns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in figures.items():
        if ": FNMR, %" in name:
            axes.plot(DISCARDED, curve, marker="o", label=name.partition(":")[0])
    axes.set(xlabel="prints of least quality discarded, %", ylabel="FNMR at FMR 1e-3, %", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    if options.smoke:
        record("finger_quality", measure({"generated": generated(4, 3)}, {}), keep=False)
        return
    if options.fit:
        record("finger_quality", fit(), keep=True)
        return
    sets = {name: list(pictures(name, "report")) for name in SETS}
    figures = measure(sets, {"NFIQ 2": nfiq2_or_0})
    if options.plot is not None:
        draw(figures, options.plot)
    record("finger_quality", figures, keep=True)


if __name__ == "__main__":
    main()
