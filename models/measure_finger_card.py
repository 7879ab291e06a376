"""Measures the calibration of a minutiae extractor with CylinderMatcher on real fingerprints, and writes it into its card.

    python models/measure_finger_card.py [mindtct | leader]

Fitted on FVC2002 DB1-4_B and UareU: mated, all 28 pairs of a finger's 8 impressions; non-mated, all impressions of different
fingers of one set. Sensors differ, so the share of non-mated scores at or above a score is that of the worst set. SFinGe's demonstration set is kept apart, and the calibration is reported on it. Equal error rates: against
first impressions, as FVC does. Needs the fingers (BIODEDUP_DATA) and about four
minutes, nearly all of it for extraction, with LEADER half an hour.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cardfile import data_folder, write_measured
from numpy.typing import NDArray
from scipy.stats import gaussian_kde

from biodedup.capture.finger import FingerReader, FingerSample
from biodedup.capture.formats import Pixels, decode
from biodedup.config import CaptureConfig, FingerConfig
from biodedup.embed.cards import minutiae_card
from biodedup.match.calibration import Calibration
from biodedup.match.minutiae import CylinderMatcher

SETS = {
    "fvc2002/DB1_B": 500, "fvc2002/DB2_B": 569, "fvc2002/DB3_B": 500, "fvc2002/DB4_B": 500,
    "uareu": 512, "sfinge_demo": 500,
}  # fmt: skip
HELD_OUT = "sfinge_demo"
TAIL_EVENTS_MIN = 10
TAIL_FROM_DB = 10.0  # the tail is fitted from here on
KNOTS = np.array([0, *np.arange(1.5, 8, 0.5), *range(8, 16), *range(16, 32, 2), *range(32, 81, 8)])
"""Hardly any pair scores less than 1.5; a print and itself score 80 at most."""
COMPARE = CylinderMatcher().compare


def read_set(folder: Path, dpi: float, reader: FingerReader) -> tuple[dict[str, list[bytes]], int, int]:
    """(finger -> minutiae records of its impressions, refused, all)."""
    fingers: dict[str, list[bytes]] = {}
    refused = total = 0
    for path in sorted(folder.glob("*.png")):
        pixels = decode(path, "unknown", CaptureConfig())
        assert isinstance(pixels, Pixels)
        result = reader.read(pixels, "unknown", dpi)
        total += 1
        if isinstance(result, FingerSample):
            fingers.setdefault(path.stem.rpartition("_")[0], []).append(result.minutiae)
        else:
            refused += 1
    return fingers, refused, total


def mated_scores(fingers: dict[str, list[bytes]]) -> NDArray[np.float64]:
    """All pairs of each finger's impressions."""
    parts = [COMPARE(r, records[i + 1 :]) for records in fingers.values() for i, r in enumerate(records)]
    return np.concatenate(parts).astype(np.float64)


def nonmated_scores(fingers: dict[str, list[bytes]], impressions: int) -> NDArray[np.float64]:
    """The first impressions of each finger against those of every other."""
    chosen = [records[:impressions] for records in fingers.values()]
    parts = [
        COMPARE(r, [other for rest in chosen[i + 1 :] for other in rest])
        for i, records in enumerate(chosen)
        for r in records
    ]
    return np.concatenate(parts).astype(np.float64)


def equal_error_rate(mated: NDArray[np.float64], nonmated: NDArray[np.float64]) -> float:
    thresholds = np.unique(np.concatenate([mated, nonmated]))
    fnmr = np.array([np.mean(mated < t) for t in thresholds])
    fmr = np.array([np.mean(nonmated >= t) for t in thresholds])
    at = int(np.argmin(np.abs(fnmr - fmr)))
    return float((fnmr[at] + fmr[at]) / 2)


def calibration(
    mated: NDArray[np.float64],
    sets: list[NDArray[np.float64]],
    knots: NDArray[np.float64] = KNOTS,
    even: Callable[[NDArray[np.float64]], NDArray[np.float64]] = np.sqrt,
) -> dict[str, float | str | list[float]]:
    """The card's table. Non-mated: of the worst set, whose own tail goes on where its pairs end.
    Mated: a kernel density of the score, spread out by `even`, on a floor of 1e-4."""
    pairs = sum(map(len, sets))
    tails = [_nonmated_db(nonmated, knots) for nonmated in sets]
    nonmated_db = np.maximum.accumulate(np.min([tail for tail, _ in tails], axis=0))
    last = max(last for _, last in tails)
    density = gaussian_kde(even(mated))
    # mass of each side between knots, as shares a point of score; compared knot by knot
    edges = np.append((knots[1:] + knots[:-1]) / 2, 2 * knots[-1])
    below = np.insert(edges[:-1], 0, knots[0])
    mated_mass = np.array([density.integrate_box_1d(even(a), even(b)) for a, b in zip(below, edges, strict=True)])
    mated_mass[0] += density.integrate_box_1d(-1e3, even(knots[0]))
    cumulative = 10 ** (-np.interp(np.append(below, edges[-1]), knots, nonmated_db) / 10)
    cumulative[0] = 1.0
    nonmated_mass = np.maximum(-np.diff(cumulative), 1e-300)
    llr_db = 10 * np.log10((mated_mass + 1e-4) / nonmated_mass)
    common = int(np.flatnonzero(nonmated_mass > 1e-3)[0])  # lower scores are too rare to tell
    llr_db[:common] = llr_db[common]
    # Past the measured tail the ratio may grow no faster than the tail falls.
    llr_db[last + 1 :] = np.minimum(llr_db[last + 1 :], llr_db[last] + nonmated_db[last + 1 :] - nonmated_db[last])
    return {
        "score": knots.tolist(),
        "llr_db": np.maximum.accumulate(llr_db).tolist(),
        "nonmated_db": np.maximum.accumulate(nonmated_db).tolist(),
        "measured_db": float(10 * np.log10(pairs)),
        "source": f"FVC2002 DB1-4_B and UareU, {pairs} non-mated and {len(mated)} mated pairs",
    }


def _nonmated_db(nonmated: NDArray[np.float64], knots: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    """-10 log10 of the share at or above each knot: counted while enough remain, then along a line through the upper part of
    what was counted; and which knot was the last to be counted."""
    events = np.array([np.count_nonzero(nonmated >= knot) for knot in knots])
    found = -10 * np.log10(np.maximum(events, 1) / len(nonmated))
    last = int(np.flatnonzero(events >= TAIL_EVENTS_MIN)[-1])
    low = min(int(np.flatnonzero(found >= TAIL_FROM_DB)[0]), last - 2)  # three knots at least
    slope, start = np.polyfit(knots[low : last + 1], found[low : last + 1], 1)
    beyond = np.arange(len(knots)) > last
    return np.where(beyond, np.maximum(start + slope * knots, found[last]), found), last


def main() -> None:
    extractor = sys.argv[1] if len(sys.argv) > 1 else "mindtct"
    card = minutiae_card(extractor)
    reader = FingerReader(FingerConfig(minutiae=extractor), card.weights)
    mated, nonmated = {}, {}
    for name, dpi in SETS.items():
        fingers, refused, total = read_set(data_folder() / "fingers" / name, dpi, reader)
        mated[name] = mated_scores(fingers)
        nonmated[name] = nonmated_scores(fingers, 10)
        first = nonmated_scores(fingers, 1)
        rate = equal_error_rate(mated[name], first)
        per_finger = 10 if name == HELD_OUT else 8
        lost = np.zeros(
            total * (per_finger - 1) // 2 - len(mated[name])
        )  # what refusals cost: mated pairs that score nothing
        with_refusals = equal_error_rate(np.concatenate([mated[name], lost]), first)
        pairs = f"{len(mated[name])} mated, {len(nonmated[name])} non-mated pairs"
        print(
            f"{name}: EER {rate:.2%}, refusals as misses {with_refusals:.2%}, refused {refused} of {total}, {pairs}",
            flush=True,
        )
    fitted = [name for name in SETS if name != HELD_OUT]
    table = calibration(np.concatenate([mated[n] for n in fitted]), [nonmated[n] for n in fitted])
    write_measured(card.path, {"calibration": table})
    for name in SETS:
        found = Calibration.from_card(table).score_db(nonmated[name])
        shares = ", ".join(f"{10 ** (-db / 10):.3g}: {np.mean(found >= db):.3g}" for db in (10, 20, 30, 40))
        print(f"{name}: nominal FMR: measured {shares}" + (" (held out)" if name == HELD_OUT else ""))


if __name__ == "__main__":
    main()
