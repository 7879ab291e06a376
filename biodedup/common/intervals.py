"""Exact confidence intervals of a rate (Clopper and Pearson, "The use of confidence or fiducial limits", Biometrika 26, 1934).

Owns the quantiles of the beta distribution that all rates use, for trials that are independent. Never counts anything.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import betaincinv  # scipy.stats takes a second to import

CONFIDENCE = 0.95


def exact_interval(events: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The two-sided interval of a share; (0, 1) without trials."""
    tail = (1 - confidence) / 2
    low = float(betaincinv(events, trials - events + 1, tail)) if events else 0.0
    high = float(betaincinv(events + 1, trials - events, 1 - tail)) if events < trials else 1.0
    return low, high


def upper_bound(events: Any, trials: int) -> Any:
    """The upper end of the one-sided 95 % interval. events: a number or an array; the result has its shape. Where every trial is an
    event the bound is that of one trial more."""
    events = np.asarray(events)
    return betaincinv(events + 1, np.maximum(trials - events, 1), CONFIDENCE)
