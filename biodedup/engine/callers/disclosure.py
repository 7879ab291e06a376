"""Disclosure: removes scores and evidence from an answer, as the policy requires.

Owns the steps of coarse scores. Never changes an outcome, and never changes stored data.

A caller that sees scores can reconstruct an enrolled vector by hill climbing. The number of verifications until an attacker without
captures of the subject reaches 60 dB was measured on face embeddings (tests/support/climbing.py, 2026-11): 146 with full scores, 415 with
steps of 1 dB, 415 to 431 with steps of 10 dB, 445 to 600 with steps of 20 dB. So steps alone do not help. A score below the threshold is
therefore 0. Then the attacker first needs a capture that is accepted; by chance this is one in 1 / `verify_fmr`. Budgets (budgets.py) limit
the number of calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import floor

import numpy as np

from biodedup.config import Policy
from biodedup.values import Candidate, Decision, Float32, SearchResult, Verification, strong

STEP_DB = 10.0
STEP_SIMILARITY = 0.1


def disclosed_verification(result: Verification, policy: Policy) -> Verification:
    """A verification without evidence. `coarse`: the score in steps if it is accepted, else 0. `outcome`: the threshold if it is accepted,
    else 0."""
    if policy.disclosure == "full":
        return result
    score_db = 0.0
    if result.accepted:
        score_db = result.threshold_db if policy.disclosure == "outcome" else _stepped(result.score_db, STEP_DB)
    return replace(result, score_db=score_db, evidence=(), extrapolated=False)


def disclosed_decision(decision: Decision, policy: Policy) -> Decision:
    """A decision without evidence, with only the candidates that reach the review threshold or have a kind."""
    if policy.disclosure == "full":
        return decision

    def disclosed(candidate: Candidate) -> Candidate:
        reached = [db for db in (decision.review_db, decision.duplicate_db) if candidate.score_db >= db]
        score_db = max(reached, default=0.0)
        if reached and policy.disclosure == "coarse":
            score_db = _stepped(candidate.score_db, STEP_DB)
        return replace(
            candidate, score_db=score_db, evidence=(), extrapolated=False, label_penalty_db=0.0, interval_db=None
        )

    named = tuple(map(disclosed, strong(decision)))
    cleared = tuple(map(disclosed, strong(replace(decision, candidates=decision.cleared))))
    return replace(decision, candidates=named, cleared=cleared)


def disclosed_search(
    result: SearchResult, policy: Policy, review_db: float, score_db: Callable[[Float32], np.ndarray]
) -> SearchResult:
    """A search result without subjects below the review threshold, which become padding. `coarse`: similarities in steps of 0.1. `outcome`:
    0.

    score_db: similarities -> scores, by the column's calibration."""
    if policy.disclosure == "full":
        return result
    there = result.ids != ""
    named = np.zeros(there.shape, bool)
    named[there] = score_db(result.similarity[there]) >= review_db
    ids = np.where(named, result.ids, "")
    similarity = np.full(there.shape, -np.inf, np.float32)
    steps = np.floor(result.similarity[named] / STEP_SIMILARITY) * STEP_SIMILARITY
    similarity[named] = steps if policy.disclosure == "coarse" else 0.0
    return replace(result, ids=ids, similarity=similarity)


def _stepped(value: float, step: float) -> float:
    return floor(value / step) * step
