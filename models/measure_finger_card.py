"""Measures the calibration of a minutiae extractor with CylinderMatcher on real fingerprints, and writes it into its card.

    python models/measure_finger_card.py [skeleton | mindtct | leader]

Fitted on FVC2002 DB1-4_B, UareU and SOCOFing: mated, all 28 pairs of a finger's 8 impressions; non-mated, all impressions of different
fingers of one set; the fit, in which sets have equal weight: `biodedup.match.scores.fitting`. Leaving each set out in turn shows the error on
a sensor that was not fitted. SFinGe's demonstration set is not used: two of its ten fingers are nearly the same. Equal error rates:
against first impressions, as FVC does. Needs the fingers (BIODEDUP_DATA) and a few minutes, with LEADER
more than an hour.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from cardfile import data_folder, write_measured
from numpy.typing import NDArray

from biodedup.capture.fingers.finger import FingerReader, FingerSample
from biodedup.capture.pictures.formats import Pixels, decode
from biodedup.config import CaptureConfig, FingerConfig
from biodedup.embed.cards import minutiae_card
from biodedup.match.prints.minutiae import CylinderMatcher
from biodedup.match.scores.calibration import Calibration
from biodedup.match.scores.fitting import REPLICATES, Nonmates, fit, measured_fmr

SETS = {
    "fvc2002/DB1_B": 500, "fvc2002/DB2_B": 569, "fvc2002/DB3_B": 500, "fvc2002/DB4_B": 500,
    "uareu": 512, "sfinge_demo": 500,
    "socofing": 200,
}  # fmt: skip
HELD_OUT = "sfinge_demo"
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
        if folder.name == "socofing":  # a finger has one impression, in a drawn frame
            pixels = replace(pixels, rgb_or_grey=np.ascontiguousarray(pixels.rgb_or_grey[2:-4, 2:-4]))
        result = reader.read(pixels, "unknown", dpi)
        total += 1
        if isinstance(result, FingerSample):
            finger = path.stem if folder.name == "socofing" else path.stem.rpartition("_")[0]
            fingers.setdefault(finger, []).append(result.minutiae)
        else:
            refused += 1
    return fingers, refused, total


def mated_scores(fingers: dict[str, list[bytes]]) -> NDArray[np.float64]:
    """All pairs of each finger's impressions."""
    parts = [COMPARE(r, records[i + 1 :]) for records in fingers.values() for i, r in enumerate(records)]
    return np.concatenate(parts).astype(np.float64)


def nonmated_scores(name: str, fingers: dict[str, list[bytes]], impressions: int) -> Nonmates:
    """The first impressions of each finger against those of every other."""
    chosen = [records[:impressions] for records in fingers.values()]
    scores, a, b = [], [], []
    for i, records in enumerate(chosen):
        others = [(j, other) for j in range(i + 1, len(chosen)) for other in chosen[j]]
        for record in records if others else ():
            scores.append(COMPARE(record, [other for _, other in others]))
            a.append(np.full(len(others), i))
            b.append(np.array([j for j, _ in others]))
    return Nonmates(name, np.concatenate(scores).astype(np.float64), np.concatenate(a), np.concatenate(b))


def equal_error_rate(mated: NDArray[np.float64], nonmated: NDArray[np.float64]) -> float:
    thresholds = np.unique(np.concatenate([mated, nonmated]))
    fnmr = np.array([np.mean(mated < t) for t in thresholds])
    fmr = np.array([np.mean(nonmated >= t) for t in thresholds])
    at = int(np.argmin(np.abs(fnmr - fmr)))
    return float((fnmr[at] + fmr[at]) / 2)


def calibration(
    mated: Mapping[str, NDArray[np.float64]],
    nonmated: Mapping[str, Nonmates],
    knots: NDArray[np.float64] = KNOTS,
    *,
    power: float = 1.0,
    replicates: int = REPLICATES,
) -> dict[str, Any]:
    """The card's table, of these sets alike; those without mated pairs count for the non-mated law alone."""
    pairs, mates = sum(len(one.scores) for one in nonmated.values()), sum(map(len, mated.values()))
    fvc = [name for name in nonmated if name.startswith("fvc2002")]
    names = ["FVC2002 " + ", ".join(name.removeprefix("fvc2002/") for name in fvc)] if fvc else []
    names += [name for name in nonmated if name not in fvc]
    source = f"{', '.join(names)}: {pairs} non-mated and {mates} mated pairs"
    return fit(
        [mated[name] for name in nonmated if len(mated[name])],
        list(nonmated.values()),
        knots,
        source=source,
        power=power,
        replicates=replicates,
    )


def report(table: Mapping[str, Any], one: Nonmates, how: str) -> None:
    """Prints what was measured where the table promises 0.01, 0.001 and 0.0001."""
    score_db = Calibration.from_card(table).score_db(one.scores)
    rates = [measured_fmr(score_db, nominal_db) for nominal_db in (20, 30, 40)]
    shares = ", ".join(f"{rate.nominal:g}: {rate.measured:.3g} [{rate.low:.2g}, {rate.high:.2g}]" for rate in rates)
    print(f"{one.name} ({how}): nominal FMR: measured {shares}", flush=True)


def leave_one_out(
    mated: Mapping[str, NDArray[np.float64]],
    nonmated: Mapping[str, Nonmates],
    knots: NDArray[np.float64] = KNOTS,
    power: float = 1.0,
) -> None:
    """Prints of each set what a table of the others promises on it."""
    for name, one in nonmated.items():
        others = {other: nonmated[other] for other in nonmated if other != name}
        report(calibration(mated, others, knots, power=power, replicates=2), one, "left out")


def main() -> None:
    extractor = sys.argv[1] if len(sys.argv) > 1 else "mindtct"
    card = minutiae_card(extractor)
    reader = FingerReader(FingerConfig(minutiae=extractor), card.weights)
    mated, nonmated = {}, {}
    for name, dpi in SETS.items():
        fingers, refused, total = read_set(data_folder() / "fingers" / name, dpi, reader)
        mated[name] = mated_scores(fingers)
        nonmated[name] = nonmated_scores(name, fingers, 10)
        if not len(mated[name]):
            print(f"{name}: refused {refused} of {total}, {len(nonmated[name].scores)} non-mated pairs", flush=True)
            continue
        first = nonmated_scores(name, fingers, 1).scores
        rate = equal_error_rate(mated[name], first)
        per_finger = 10 if name == HELD_OUT else 8
        lost = np.zeros(
            total * (per_finger - 1) // 2 - len(mated[name])
        )  # what refusals cost: mated pairs that score nothing
        with_refusals = equal_error_rate(np.concatenate([mated[name], lost]), first)
        pairs = f"{len(mated[name])} mated, {len(nonmated[name].scores)} non-mated pairs"
        print(
            f"{name}: EER {rate:.2%}, refusals as misses {with_refusals:.2%}, refused {refused} of {total}, {pairs}",
            flush=True,
        )
    apart = nonmated.pop(HELD_OUT)
    leave_one_out(mated, nonmated)
    table = calibration(mated, nonmated)
    write_measured(card.path, {"calibration": table})
    for one in nonmated.values():
        report(table, one, "fitted")
    report(table, apart, "kept apart")


if __name__ == "__main__":
    main()
