"""Calibrations of scores that are normal: one of faces, one of fingers."""

from __future__ import annotations

import numpy as np
from scipy.stats import norm

from biodedup.match.scores.calibration import Calibration

SCORE = np.linspace(-1, 1, 201)


def normal_law(mean, sd):
    llr = 10 / np.log(10) * (norm.logpdf(SCORE, mean, sd) - norm.logpdf(SCORE, 0, 0.089))
    llr[: llr.argmin()] = llr.min()
    return Calibration.from_card(
        {
            "score": SCORE,
            "llr_db": np.maximum.accumulate(llr.clip(-30)),
            "nonmated_db": -10 / np.log(10) * norm.logsf(SCORE, 0, 0.089),
            "measured_db": 60.0,
            "source": "a test",
        }
    )


FACE, FINGER = normal_law(0.66, 0.12), normal_law(0.475, 0.15)
