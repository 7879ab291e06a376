"""From ranked evidence to an outcome.

Owns the rule. Never compares, never stores.
"""

from __future__ import annotations

from biodedup.values import Outcome


def outcome(
    best_db: float | None, duplicate_db: float, review_db: float, *, incomplete: bool, comparable: bool
) -> Outcome:
    """The outcome of a search.

    best_db: score_db of the strongest candidate, None without one. incomplete: part of the gallery was not seen.
    comparable: the probe had at least one usable capture. A search that could not see everything never says unique.
    """
    if not comparable:
        return "refused"
    if best_db is not None and best_db >= duplicate_db:
        return "duplicate"
    if incomplete or (best_db is not None and best_db >= review_db):
        return "review"
    return "unique"
