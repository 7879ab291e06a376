"""Predicts how mates with a probe's captures score, and the scores from which a candidate is a duplicate or goes to review.

Owns the thresholds of a probe. Never compares and never decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from biodedup.config import Policy
from biodedup.gallery.snapshot import Snapshot
from biodedup.match.compare import Comparer
from biodedup.match.scores.fusion import mated_quantile_db, mated_share_below
from biodedup.search.positions import comparable_bits
from biodedup.values import Template

_ATTAINED_SHARE = 0.95


@dataclass(frozen=True)
class Expected:
    """The scores of mates with these captures. attainable_db: 95 % of mates score less; fnir: share of mates below review_db."""

    attainable_db: float
    review_db: float
    fnir: float


def expected(
    comparer: Comparer, policy: Policy, templates: Mapping[str, Template], now: Snapshot, *, across: bool
) -> Expected | None:
    """For a gallery of this size. Captures of columns that the gallery does not have do not count; None if there is no other."""
    calibrations = tuple(
        model.of(templates[column].embedding is not None and templates[column].minutiae is not None)
        for column, model in sorted(comparer.score_models(templates).items())
        if now.count_with(comparable_bits({column: templates[column]}, now.models, across=across))
    )
    if not calibrations:
        return None
    _, band_db = policy.thresholds_db(now.searched_count)
    review_db = min(band_db, mated_quantile_db(policy.fnir_review, calibrations))
    attainable_db = mated_quantile_db(_ATTAINED_SHARE, calibrations)
    return Expected(attainable_db, review_db, mated_share_below(review_db, calibrations))


def thresholds_db(
    comparer: Comparer, policy: Policy, templates: Mapping[str, Template], now: Snapshot, *, across: bool
) -> tuple[float, float]:
    """The scores from which a candidate is a duplicate, and from which it goes to review."""
    duplicate_db, band_db = policy.thresholds_db(now.searched_count)
    mates = expected(comparer, policy, templates, now, across=across) if policy.review_db is None else None
    return duplicate_db, band_db if mates is None else mates.review_db
