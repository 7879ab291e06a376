"""Exact confidence intervals of a rate (Clopper and Pearson, "The use of confidence or fiducial limits", Biometrika 26, 1934).

Owns the quantiles of the beta distribution for all rates. The trials must be independent. Never counts events.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import betaincinv  # scipy.stats takes a second to import

CONFIDENCE = 0.95


def exact_interval(events: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The two-sided interval of the rate of events among trials; (0, 1) without trials."""
    tail = (1 - confidence) / 2
    low = float(betaincinv(events, trials - events + 1, tail)) if events else 0.0
    high = float(betaincinv(events + 1, trials - events, 1 - tail)) if events < trials else 1.0
    return low, high


def upper_bound(events: Any, trials: int) -> Any:
    """The upper end of the one-sided 95 % interval. events: a number or an array; the result has its shape. If every trial is an event, the
    bound is computed with one more trial, and is below 1."""
    events = np.asarray(events)
    return betaincinv(events + 1, np.maximum(trials - events, 1), CONFIDENCE)
