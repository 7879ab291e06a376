"""Measures how finger embeddings score, alone and with minutiae, on real fingerprints, and writes it into the network's card.

    python models/measure_finger_embedding.py [mindtct | leader]

Fitted on FVC2002 DB1-4_B, UareU and SOCOFing: mated, all pairs of a finger's impressions; non-mated, all impressions of different
fingers of one set. Sensors differ, so the share of non-mated scores at or above a score is that of the worst set that has events
enough there. SFinGe's demonstration set is kept apart, and the calibration is reported on it. With minutiae: what is calibrated is the sum of
both llr_db, so the minutiae's card has to be measured first. The embedding alone is measured with MINDTCT's gate. Needs the fingers
(BIODEDUP_DATA) and about ten minutes.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import cv2
import numpy as np
from cardfile import data_folder, write_measured
from measure_finger_card import COMPARE, HELD_OUT, SETS, calibration, equal_error_rate
from numpy.typing import NDArray

import biodedup as bd
from biodedup.embed.cards import minutiae_card
from biodedup.match.calibration import Calibration

CARD = Path(__file__).with_name("finger256.toml")
COSINES = np.linspace(-0.2, 1.0, 61)
SUMS_DB = np.array([*range(-45, 60, 3), *range(60, 160, 10), 160, 200, 250, 300])
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


def scores(templates: list[bd.Template], owners: NDArray[np.int64]) -> tuple[Scores, Scores, NDArray[np.bool_]]:
    """(cosines, minutiae scores, mated or not) of all pairs."""
    vectors = np.array([template.embedding for template in templates])
    upper = np.triu_indices(len(templates), 1)
    records = [template.minutiae or b"" for template in templates]
    minutiae = [COMPARE(record, records[i + 1 :]) for i, record in enumerate(records[:-1])]
    cosines = (vectors @ vectors.T)[upper].astype(np.float64)
    return cosines, np.concatenate(minutiae).astype(np.float64), (owners[:, None] == owners)[upper]


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "mindtct"
    extractor = bd.Extractor(bd.Config(finger=bd.FingerConfig(model="finger256", minutiae=name)))
    write({one: scores(*read_set(extractor, one)) for one in (*SETS, "socofing")}, name)


def write(measured: dict[str, tuple[Scores, Scores, NDArray[np.bool_]]], name: str) -> None:
    """Into the card: the tables of these pairs; those of other minutiae stay."""
    card = minutiae_card(name)
    assert card.calibration is not None, "measured by measure_finger_card.py"
    fitted = [one for one in measured if one != HELD_OUT]

    def table(values: dict[str, Scores], knots: Scores) -> dict[str, float | str | list[float]]:
        mated = np.concatenate([values[one][measured[one][2]] for one in fitted])
        found = calibration(mated, [values[one][~measured[one][2]] for one in fitted], knots, lambda x: x)
        sets = "FVC2002 DB1-4_B, UareU and SOCOFing" if "socofing" in fitted else "FVC2002 DB1-4_B and UareU"
        return found | {"source": str(found["source"]).replace("FVC2002 DB1-4_B and UareU", sets)}

    cosines = {one: found[0] for one, found in measured.items()}
    kept = tomllib.loads(CARD.read_text())
    alone = table(cosines, COSINES) if name == "mindtct" else kept["calibration"]
    by_minutiae, by_cosine = Calibration.from_card(card.calibration), Calibration.from_card(alone)
    sums = {one: by_cosine.llr_db(c) + by_minutiae.llr_db(m) for one, (c, m, _) in measured.items()}
    both = table(sums, SUMS_DB.astype(np.float64))
    tables = kept.get("both", {}) | {card.model_id: both}
    write_measured(CARD, {"calibration": alone} | {f"both.{model_id}": one for model_id, one in tables.items()})
    for one, (_, minutiae, mated) in measured.items():
        if mated.any():
            rates = [equal_error_rate(v[mated], v[~mated]) for v in (cosines[one], minutiae, sums[one])]
            print(
                f"{one}: EER, all impressions: embedding {rates[0]:.2%}, minutiae {rates[1]:.2%}, both {rates[2]:.2%}"
            )
        found = Calibration.from_card(both).score_db(sums[one][~mated])
        shares = ", ".join(f"{10 ** (-db / 10):.3g}: {np.mean(found >= db):.3g}" for db in (10, 20, 30, 40))
        print(f"{one}: nominal FMR: measured {shares}" + (" (held out)" if one == HELD_OUT else ""))


if __name__ == "__main__":
    main()
