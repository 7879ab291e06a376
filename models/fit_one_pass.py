"""Fits the regressions of `biodedup.capture.fingers.ridge_minutiae` and `biodedup.capture.fingers.one_pass`, and prints their weights.

    python models/fit_one_pass.py reliability   # of minutiae, on 160 generated fingers: needs no data
    python models/fit_one_pass.py quality       # of prints, and their certainty, on the tuning half (BIODEDUP_DATA)

Reliability: a minutia is true if the master has one within six pixels and 36 degrees of it. Quality: a print's mean score with its
mates, 20 at most. Certainty: prints against photographs, textures and documents of scikit-image, LFW faces and noise.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
from cardfile import data_folder
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from extractors import SETS, pictures

from biodedup.capture.fingers.one_pass import Print, one_pass
from biodedup.capture.fingers.resampling import resampled
from biodedup.capture.fingers.ridge_minutiae import record_of, ridge_minutiae
from biodedup.capture.fingers.ridges import RidgeMap, directions
from biodedup.capture.minutiae.record import write_record
from biodedup.match.prints.minutiae import CylinderMatcher
from biodedup.synthetic import Impression, Master, draw_impression, draw_master

Floats = NDArray[np.float64]
SEED, IMPRESSIONS = 12, 3
NEAR_PX, NEAR_RAD = 6.0, np.pi / 5


def logistic(given: Floats, wanted: NDArray[np.bool_], ridge: float = 1.0) -> Floats:
    """Weights and, last, the constant, by Newton's method."""
    x = np.column_stack([given, np.ones(len(given))])
    weights, penalty = np.zeros(x.shape[1]), ridge * np.eye(x.shape[1])
    penalty[-1, -1] = 1e-9
    for _ in range(30):
        p = 1 / (1 + np.exp(-x @ weights))
        curve = (x * (p * (1 - p))[:, None]).T @ x + penalty
        weights -= np.linalg.solve(curve, x.T @ (p - wanted) + penalty @ weights)
    return weights


def area_under_curve(score: Floats, wanted: NDArray[np.bool_]) -> float:
    rank, count = np.argsort(np.argsort(score)) + 1, wanted.sum()
    return float((rank[wanted].sum() - count * (count + 1) / 2) / count / (~wanted).sum())


def own_minutiae(master: Master) -> NDArray[np.float32]:
    """The minutiae of a generated finger."""
    ridges = master.ridges.astype(np.float32) / 127
    direction, coherence, _ = directions(ridges, 4.0)
    whole = np.ones(ridges.shape, np.uint8)
    exact = RidgeMap(ridges, direction, np.full_like(ridges, 6), whole, ridges, coherence, coherence)
    return ridge_minutiae(exact, tuple(3 * side // 2 for side in ridges.shape)).points / np.float32([1.5, 1.5, 1])


def true_ones(print_: Print, impression: Impression, own: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which minutiae of a print are the finger's own; each of these counts once."""
    points = print_.minutiae.points
    x, y = (np.clip(np.rint(points[:, i]), 0, impression.at.shape[-1] - 1).astype(int) for i in (0, 1))
    apart = np.hypot(impression.at[0][y, x][:, None] - own[:, 0], impression.at[1][y, x][:, None] - own[:, 1])
    turn = np.abs(np.angle(np.exp(1j * (points[:, 2, None] - impression.angle - own[:, 2]))))
    cost = np.where((apart < NEAR_PX) & (turn < NEAR_RAD), apart / NEAR_PX + turn / NEAR_RAD, np.inf)
    true = np.zeros(len(points), bool)
    for at in np.argsort(cost, axis=None)[: np.count_nonzero(np.isfinite(cost))]:
        i, j = np.unravel_index(at, cost.shape)
        if np.isfinite(cost[i, j]):
            true[i], cost[i], cost[:, j] = True, np.inf, np.inf
    return true


def fit_reliability(fingers: int) -> None:
    rng = np.random.default_rng(SEED)
    features, true, finger = [], [], []
    for number in range(fingers):
        master = draw_master(rng)
        own = own_minutiae(master)
        for _ in range(IMPRESSIONS):
            impression = draw_impression(rng, master)
            print_ = one_pass(impression.image)
            if print_.measures.area_mm2 > 20:
                features.append(print_.minutiae.features)
                true.append(true_ones(print_, impression, own))
                finger.append(np.full(len(true[-1]), number))
    x, y, number = np.concatenate(features).astype(np.float64), np.concatenate(true), np.concatenate(finger)
    kept_out = number % 4 == 0
    weights = logistic(x[~kept_out], y[~kept_out])
    sure = np.column_stack([x, np.ones(len(x))]) @ weights
    print(f"{len(y)} minutiae, {np.mean(y):.1%} true; area under the curve on fingers kept out",
          f"{area_under_curve(sure[kept_out], y[kept_out]):.3f}")  # fmt: skip
    for low in np.arange(0, 1, 0.2):
        p = 1 / (1 + np.exp(-sure[kept_out]))
        within = (p >= low) & (p < low + 0.2)
        print(f"reliability {low:.1f} to {low + 0.2:.1f}: {np.mean(y[kept_out][within]):.2f} of {within.sum()} true")
    print(np.array2string(np.round(logistic(x, y), 3), separator=", "))


def others() -> list[NDArray[np.uint8]]:
    """Pictures of no finger."""
    import skimage.data as data

    rng = np.random.default_rng(SEED)
    named = "astronaut coins camera brick grass gravel moon page text coffee chelsea rocket clock horse cell".split()
    found = [np.asarray(getattr(data, name)()) for name in named]
    faces = sorted((data_folder() / "faces" / "lfw").glob("*/*.jpg"))[:120]
    found += [np.asarray(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)) for path in faces]
    for sigma in (0.0, 1.0, 1.5, 2.0, 3.0, 4.0):
        noise = rng.standard_normal((320, 300), np.float32)
        noise = np.asarray(cv2.GaussianBlur(noise, (0, 0), sigma) if sigma else noise)
        found.append(np.clip(128 + 60 * noise / noise.std(), 0, 255))
    grey = [cv2.cvtColor(one[..., :3], cv2.COLOR_RGB2GRAY) if one.ndim == 3 else one for one in found]
    return [np.asarray(one * (255 if one.dtype == bool else 1), np.uint8) for one in grey]


def fit_quality() -> None:
    compare = CylinderMatcher().compare
    given, scores, sets, prints = [], [], [], []
    for name in (*SETS, "sfinge_demo"):
        some = [(finger, grey.shape, one_pass(grey)) for finger, grey in pictures(name, "tuning")]
        records = [write_record(record_of(one.minutiae, shape), 0, None) for _, shape, one in some]
        for i, (finger, _, one) in enumerate(some):
            mates = [records[j] for j, (other, _, _) in enumerate(some) if other == finger and j != i]
            scores.append(float(np.minimum(compare(records[i], mates), 20).mean()))
            m = one.measures
            given.append([np.log1p(m.reliable), m.agreement, 1.0])
            sets.append(name)
            prints.append(one)
    x, y, of = np.array(given), np.array(scores), np.array(sets)
    print("rank correlation of each set, left out:")
    for name in (*SETS, "sfinge_demo"):
        weights = np.linalg.lstsq(x[of != name], y[of != name], rcond=None)[0]
        ranks = [np.argsort(np.argsort(v)) for v in (x[of == name] @ weights, y[of == name])]
        print(f"  {name} {np.corrcoef(*ranks)[0, 1]:.2f}")
    print("quality", np.array2string(np.round(np.linalg.lstsq(x, y, rcond=None)[0], 3), separator=", "))
    frames = sorted((data_folder() / "fingers" / "socofing").glob("*.png"))[:200]
    framed = [np.asarray(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE))[2:-4, 2:-4] for path in frames]
    prints += [one_pass(resampled(one, 200)) for one in framed]
    junk = [one_pass(np.ascontiguousarray(one)) for one in others()]
    measured = [one.measures for one in prints + junk]
    x = np.array([[m.agreement, m.coherence, m.filtered_coherence, m.reliability] for m in measured])
    finger = np.arange(len(x)) < len(prints)
    weights = logistic(x, finger, 0.02)
    odds = np.column_stack([x, np.ones(len(x))]) @ weights
    print("certainty", np.array2string(np.round(weights, 3), separator=", "))
    print(
        "log odds: prints, least",
        np.sort(odds[finger])[:8].round(1),
        "others, most",
        np.sort(odds[~finger])[-8:].round(1),
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["reliability"]:
        fit_reliability(160)
    elif sys.argv[1:] == ["quality"]:
        fit_quality()
    else:
        sys.exit(__doc__)
