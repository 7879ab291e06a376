"""Measures how finger embeddings score, alone and with minutiae, on real fingerprints, and writes it into the network's card.

    python models/measure_finger_embedding.py [skeleton | mindtct | leader]

Fitted on FVC2002 DB1-4_B, UareU and SOCOFing: mated, all pairs of a finger's impressions; non-mated, all impressions of different
fingers of one set; the fit, in which sets have equal weight: `biodedup.match.scores.fitting`. Leaving each set out in turn shows the error on
a sensor that was not fitted. SFinGe's demonstration set is not used: two of its ten fingers are nearly the same. With minutiae: what is calibrated is the sum of
both llr_db, so the minutiae's card has to be measured first. The embedding alone is measured with MINDTCT's gate. Needs the fingers
(BIODEDUP_DATA) and about ten minutes.
"""

from __future__ import annotations

import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from cardfile import data_folder, write_measured
from measure_finger_card import COMPARE, HELD_OUT, SETS, calibration, equal_error_rate, leave_one_out, report
from numpy.typing import NDArray

import biodedup as bd
from biodedup.embed.cards import minutiae_card
from biodedup.match.scores.calibration import Calibration
from biodedup.match.scores.fitting import COSINE_POWER, Nonmates

CARD = Path(__file__).with_name("finger256.toml")
COSINES = np.linspace(-0.2, 1.0, 61)
SUMS_DB = np.array([*range(-45, 60, 3), *range(60, 160, 10), 160, 200, 250, 300], np.float64)
BATCH = 32
Scores = NDArray[np.float64]


def read_set(extractor: bd.Extractor, name: str) -> tuple[list[bd.Template], NDArray[np.int64]]:
    """(templates, which finger each is of) of all impressions that are not refused."""
    paths = sorted((data_folder() / "fingers" / name).glob("*.png"))
    if name == "socofing":  # a finger has one impression, in a drawn frame
        names = [path.stem for path in paths]
        captures = [bd.Finger(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)[2:-4, 2:-4], dpi=200) for path in paths]
    else:
        names = [path.stem.rpartition("_")[0] for path in paths]
        captures = [bd.Finger(path, dpi=SETS[name]) for path in paths]
    results = [r for i in range(0, len(captures), BATCH) for r in extractor.extract(captures[i : i + BATCH])]
    kept = [(t, owner) for t, owner in zip(results, names, strict=True) if isinstance(t, bd.Template)]
    owners = np.unique([owner for _, owner in kept], return_inverse=True)[1]
    return [template for template, _ in kept], owners.astype(np.int64)


@dataclass(frozen=True, eq=False)
class Measured:
    """All pairs of a set: cosines, scores of minutiae, whose the two are."""

    cosines: Scores
    minutiae: Scores
    a: NDArray[np.int64]
    b: NDArray[np.int64]

    @property
    def mated(self) -> NDArray[np.bool_]:
        return self.a == self.b


def scores(templates: list[bd.Template], owners: NDArray[np.int64]) -> Measured:
    vectors = np.array([template.embedding for template in templates])
    upper = np.triu_indices(len(templates), 1)
    records = [template.minutiae or b"" for template in templates]
    minutiae = [COMPARE(record, records[i + 1 :]) for i, record in enumerate(records[:-1])]
    cosines = (vectors @ vectors.T)[upper].astype(np.float64)
    return Measured(cosines, np.concatenate(minutiae).astype(np.float64), owners[upper[0]], owners[upper[1]])


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "mindtct"
    extractor = bd.Extractor(bd.Config(finger=bd.FingerConfig(model="finger256", minutiae=name)))
    write({one: scores(*read_set(extractor, one)) for one in SETS}, name)


def write(measured: dict[str, Measured], name: str) -> None:
    """Into the card: the tables of these pairs; those of other minutiae stay."""
    card = minutiae_card(name)
    assert card.calibration is not None, "measured by measure_finger_card.py"
    kept = tomllib.loads(CARD.read_text())
    cosines = {one: found.cosines for one, found in measured.items()}
    alone = table(measured, cosines, COSINES, COSINE_POWER) if name == "mindtct" else kept["calibration"]
    by_minutiae, by_cosine = Calibration.from_card(card.calibration), Calibration.from_card(alone)
    sums = {one: by_cosine.llr_db(m.cosines) + by_minutiae.llr_db(m.minutiae) for one, m in measured.items()}
    both = table(measured, sums, SUMS_DB, 1.0)
    tables = kept.get("both", {}) | {card.model_id: both}
    mean = {"measured": kept["measured"]} if "measured" in kept else {}
    write_measured(CARD, mean | {"calibration": alone, "both": tables})
    for one, found in measured.items():
        if found.mated.any():
            kinds = (cosines[one], found.minutiae, sums[one])
            rates = [equal_error_rate(values[found.mated], values[~found.mated]) for values in kinds]
            print(
                f"{one}: EER, all impressions: embedding {rates[0]:.2%}, minutiae {rates[1]:.2%}, both {rates[2]:.2%}"
            )


def table(measured: dict[str, Measured], values: dict[str, Scores], knots: Scores, power: float) -> dict[str, Any]:
    """Of these values of the pairs; prints what it promises and keeps."""
    mated = {one: values[one][found.mated] for one, found in measured.items()}
    nonmated = {
        one: Nonmates(one, values[one][~found.mated], found.a[~found.mated], found.b[~found.mated])
        for one, found in measured.items()
    }
    apart = nonmated.pop(HELD_OUT)
    leave_one_out(mated, nonmated, knots, power)
    fitted = calibration(mated, nonmated, knots, power=power)
    report(fitted, apart, "kept apart")
    return fitted


if __name__ == "__main__":
    main()
