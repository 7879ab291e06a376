"""The time of a decision after the comparison: calibration, fusion, ranking, kinds, thresholds.

    python benchmarks/decision.py

A thousand candidates have a face and two fingers, embeddings and minutiae, some with missing captures; their scores are drawn from impostors'
ranges. A loop over candidates computes the same sums as a reference: the scores must agree. Processor time of a single thread, median of many
measurements.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from report import record

from biodedup.config import Policy
from biodedup.embed.cards import joint_id, load_card, minutiae_card, shipped_cards
from biodedup.match.compare import as_labelled, pairings
from biodedup.match.judgement import judge
from biodedup.match.ranked import PairScores, Ranked, Scored, ScoreMatrix, ScoreModel, calibrated
from biodedup.match.scores.calibrations import Calibrations
from biodedup.match.scores.fusion import fused_score_db, mated_quantile_db, mated_share_below

COLUMNS = ("face", "right_index", "left_index")
RETURNED, GALLERY = 10, 200_000_000
TOGETHER = 20  # in one reading of the clock, which itself may take most of a millisecond


def milliseconds(work: Callable[[], object], rounds: int) -> float:
    taken = []
    for _ in range(max(rounds // TOGETHER, 1)):
        start = time.thread_time()
        for _ in range(TOGETHER):
            work()
        taken.append(time.thread_time() - start)
    return float(np.median(taken)) / TOGETHER * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=2000)
    options = parser.parse_args()
    n, rng = options.candidates, np.random.default_rng(0)
    known = Calibrations(shipped_cards())
    finger = joint_id(load_card("finger256"), minutiae_card("skeleton"))
    models = {
        c: ScoreModel(known.of(m), known.with_minutiae(m))
        for c, m in zip(COLUMNS, (load_card("sface").model_id, finger, finger), strict=True)
    }
    similarity = {c: rng.normal(0.0, 0.15, n) for c in COLUMNS}
    minutiae = {c: np.full(n, np.nan) if c == "face" else rng.uniform(1, 9, n) for c in COLUMNS}
    for c in COLUMNS[1:]:  # one in five has no record, one in ten no such finger
        minutiae[c][rng.random(n) < 0.2] = np.nan
        similarity[c][rng.random(n) < 0.1] = np.nan
    rows, members = np.arange(n), [(np.arange(n), pairings(COLUMNS, COLUMNS))]
    duplicate_db, band_db = Policy().thresholds_db(GALLERY)

    def ranked() -> Ranked:
        scores: dict[tuple[str, str], PairScores] = {
            (c, c): calibrated(models[c], similarity[c], minutiae[c], by_embedding=True) for c in COLUMNS
        }
        matrix = ScoreMatrix(rows, scores)
        return Ranked([Scored(matrix, matrix.fuse(*as_labelled(matrix, members)))])

    def decide() -> object:
        calibrations = tuple(model.of(column != "face") for column, model in models.items())
        review_db = min(band_db, mated_quantile_db(0.5, calibrations))
        mated_share_below(review_db, calibrations)
        return judge(ranked()[:RETURNED], duplicate_db, review_db, band_db=band_db)

    found = ranked()
    for one in (found[int(i)] for i in rng.choice(n, min(n, 200), replace=False)):
        used = [models[p.column].of(p.minutiae is not None) for p in one.evidence]
        sum_db = sum(part.llr_db for part in one.evidence)
        wanted = one.evidence[0].score_db if len(used) == 1 else float(fused_score_db(sum_db, used)[0])
        assert abs(one.score_db - wanted) < 0.26, (
            "one step of the table, where the order of adding moves a sum over its edge"
        )
    decide()
    figures = {
        "candidates": n,
        "captures": len(COLUMNS),
        "decision, ms": round(milliseconds(decide, options.rounds), 3),
        "of it ranking, ms": round(milliseconds(ranked, options.rounds), 3),
    }
    record("decision", figures, keep=options.candidates == 1000)


if __name__ == "__main__":
    main()
