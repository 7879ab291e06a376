"""Measures the calibration of MINDTCT + BOZORTH3 on real fingerprints, and writes it into its card.

    python models/measure_finger_card.py

Fitted on FVC2002 DB1-4_B and UareU: mated, all 28 pairs of a finger's 8 impressions; non-mated, first impressions across
fingers of one set. SFinGe's demonstration set is kept apart, and the calibration is reported on it. Needs the fingers
(BIODEDUP_DATA) and about three minutes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from cardfile import data_folder, write_measured
from numpy.typing import NDArray
from scipy.stats import gaussian_kde

from biodedup.capture.finger import FingerReader
from biodedup.capture.formats import Pixels, decode
from biodedup.config import CaptureConfig, FingerConfig
from biodedup.match.calibration import Calibration
from biodedup.match.minutiae import Bozorth3
from biodedup.values import Template

SETS = {
    "fvc2002/DB1_B": 500, "fvc2002/DB2_B": 569, "fvc2002/DB3_B": 500, "fvc2002/DB4_B": 500,
    "uareu": 512, "sfinge_demo": 500,
}  # fmt: skip
HELD_OUT = "sfinge_demo"
TAIL_EVENTS_MIN = 30
KNOTS = np.array([0, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 22, 24, 26, 28, 30, 35, 40, 45, 50, 60, 70, 80, 100, 120, 150, 200, 300, 400.0])  # fmt: skip


def read_set(folder: Path, dpi: float) -> tuple[dict[str, list[bytes]], int, int]:
    """(finger -> minutiae records of its impressions, refused, all)."""
    reader = FingerReader(FingerConfig(), "mindtct-1")
    fingers: dict[str, list[bytes]] = {}
    refused = total = 0
    for path in sorted(folder.glob("*.png")):
        pixels = decode(path, "unknown", CaptureConfig())
        assert isinstance(pixels, Pixels)
        result = reader.read(pixels, "unknown", dpi)
        total += 1
        if isinstance(result, Template):
            assert result.minutiae is not None
            fingers.setdefault(path.stem.rpartition("_")[0], []).append(result.minutiae)
        else:
            refused += 1
    return fingers, refused, total


def scores(fingers: dict[str, list[bytes]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mated and non-mated scores under the FVC protocol."""
    compare = Bozorth3().compare

    def against_rest(records: list[bytes]) -> Iterable[NDArray[np.float32]]:
        return (compare(record, records[i + 1 :]) for i, record in enumerate(records))

    mated = np.concatenate([part for records in fingers.values() for part in against_rest(records)])
    nonmated = np.concatenate(list(against_rest([records[0] for records in fingers.values()])))
    return mated.astype(np.float64), nonmated.astype(np.float64)


def equal_error_rate(mated: NDArray[np.float64], nonmated: NDArray[np.float64]) -> float:
    thresholds = np.unique(np.concatenate([mated, nonmated]))
    fnmr = np.array([np.mean(mated < t) for t in thresholds])
    fmr = np.array([np.mean(nonmated >= t) for t in thresholds])
    at = int(np.argmin(np.abs(fnmr - fmr)))
    return float((fnmr[at] + fmr[at]) / 2)


def calibration(mated: NDArray[np.float64], nonmated: NDArray[np.float64]) -> dict[str, float | str | list[float]]:
    """The card's table. Non-mated: empirical while enough events remain, then an exponential tail through the upper part.
    Mated: a kernel density of the square root of the score, on a floor of 1e-4."""
    survival = np.array([np.mean(nonmated >= knot) for knot in KNOTS])
    enough = survival * len(nonmated) >= TAIL_EVENTS_MIN
    last = int(np.flatnonzero(enough)[-1])
    tail = enough & (KNOTS >= 8)
    slope, start = np.polyfit(KNOTS[tail], -10 * np.log10(survival[tail]), 1)
    nonmated_db = np.where(enough, -10 * np.log10(np.maximum(survival, 1e-12)), start + slope * KNOTS)
    nonmated_db[last + 1 :] = np.maximum(nonmated_db[last + 1 :], nonmated_db[last])
    density = gaussian_kde(np.sqrt(mated))
    # mass of each side between knots, as shares a point of score; compared knot by knot
    edges = np.append((KNOTS[1:] + KNOTS[:-1]) / 2, 2 * KNOTS[-1])
    below = np.insert(edges[:-1], 0, 0.0)
    mated_mass = np.array([density.integrate_box_1d(np.sqrt(a), np.sqrt(b)) for a, b in zip(below, edges, strict=True)])
    mated_mass[0] += density.integrate_box_1d(-10, 0)
    cumulative = 10 ** (-np.interp(np.append(below, edges[-1]), KNOTS, nonmated_db) / 10)
    cumulative[0] = 1.0
    nonmated_mass = np.maximum(-np.diff(cumulative), 1e-300)
    llr_db = 10 * np.log10((mated_mass + 1e-4) / nonmated_mass)
    # Past the measured tail the ratio may grow no faster than the tail falls.
    llr_db[last + 1 :] = np.minimum(llr_db[last + 1 :], llr_db[last] + nonmated_db[last + 1 :] - nonmated_db[last])
    return {
        "score": KNOTS.tolist(),
        "llr_db": np.maximum.accumulate(llr_db).tolist(),
        "nonmated_db": np.maximum.accumulate(nonmated_db).tolist(),
        "measured_db": float(10 * np.log10(len(nonmated))),
        "source": f"FVC2002 DB1-4_B and UareU, {len(nonmated)} non-mated and {len(mated)} mated pairs",
    }


def main() -> None:
    mated, nonmated = {}, {}
    for name, dpi in SETS.items():
        fingers, refused, total = read_set(data_folder() / "fingers" / name, dpi)
        mated[name], nonmated[name] = scores(fingers)
        rate = equal_error_rate(mated[name], nonmated[name])
        print(
            f"{name}: EER {rate:.2%}, refused {refused} of {total}, {len(mated[name])} mated, {len(nonmated[name])} non-mated",
            flush=True,
        )
    fitted = [name for name in SETS if name != HELD_OUT]
    table = calibration(np.concatenate([mated[n] for n in fitted]), np.concatenate([nonmated[n] for n in fitted]))
    write_measured(Path(__file__).with_name("mindtct_bozorth3.toml"), {"calibration": table})
    found = Calibration.from_card(table).score_db(nonmated[HELD_OUT])
    for nominal_db in (5, 10, 15):
        print(f"{HELD_OUT}: nominal {10 ** (-nominal_db / 10):.3f}, measured FMR {np.mean(found >= nominal_db):.3f}")


if __name__ == "__main__":
    main()
