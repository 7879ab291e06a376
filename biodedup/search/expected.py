"""Predicts the scores of mates with a probe's captures, and sets the thresholds for a duplicate and for a review.

Owns the thresholds of a probe. Never compares and never decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from biodedup.config import Policy
from biodedup.gallery.snapshot import Snapshot
from biodedup.match.compare import Comparer
from biodedup.match.scores.calibration import Calibration
from biodedup.match.scores.fusion import mated_quantile_db, mated_share_below
from biodedup.required import QUALITY_GOOD
from biodedup.search.positions import comparable_bits
from biodedup.values import Template

_ATTAINED_SHARE = 0.95
_QUALITY_DB = 40.0
"""The score at FMR 1e-4, to which `Template.quality` refers."""


@dataclass(frozen=True)
class Expected:
    """Expected scores of mates with these captures. attainable_db: 95 % of mates score less. fnir: the share of mates below review_db."""

    attainable_db: float
    review_db: float
    fnir: float


def expected(
    comparer: Comparer, policy: Policy, templates: Mapping[str, Template], now: Snapshot, *, across: bool
) -> Expected | None:
    """The expected scores in a gallery of this size. Only columns that the gallery has count; None without such a column.

    Low quality lowers the expected scores of mates, but not the threshold. The threshold is for captures of usual quality, because a
    threshold within the scores of impostors would send impostors to review.
    """
    calibrations, mated_shares = [], []
    for column, model in sorted(comparer.score_models(templates).items()):
        template = templates[column]
        if now.count_with(comparable_bits({column: template}, now.models, across=across)):
            calibrations.append(model.of(template.embedding is not None and template.minutiae is not None))
            mated_shares.append(_mated_share(template.quality, calibrations[-1]))
    if not calibrations:
        return None
    _, band_db = policy.thresholds_db(now.searched_count)
    review_db = min(band_db, mated_quantile_db(policy.fnir_review, calibrations))
    attainable_db = mated_quantile_db(_ATTAINED_SHARE, calibrations, mated_shares)
    return Expected(attainable_db, review_db, mated_share_below(review_db, calibrations, mated_shares))


def _mated_share(quality: float | None, calibration: Calibration) -> float:
    """The share of a capture's mated comparisons that score as those of usual captures. It is 1 unless the quality is low; then it is chosen
    so that the share of comparisons above 40 dB is the quality."""
    if quality is None or quality >= QUALITY_GOOD:
        return 1.0
    usual = 1 - mated_share_below(_QUALITY_DB, (calibration,))
    return min(quality / usual, 1.0) if usual > 0 else 1.0


def thresholds_db(
    comparer: Comparer, policy: Policy, templates: Mapping[str, Template], now: Snapshot, *, across: bool
) -> tuple[float, float]:
    """The scores from which a candidate is a duplicate, and from which it goes to review."""
    duplicate_db, band_db = policy.thresholds_db(now.searched_count)
    mates = expected(comparer, policy, templates, now, across=across) if policy.review_db is None else None
    return duplicate_db, band_db if mates is None else mates.review_db
