"""Compares two sets of templates 1:1, and records comparisons in a trace, with the minutiae that are paired.

Owns the 1:1 comparison and its trace. Never computes raw scores and never calibrates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from biodedup.embed.cards import ModelCard, shipped_cards
from biodedup.errors import ModelMismatch
from biodedup.match.candidates import TemplateCandidates
from biodedup.match.compare import Comparer, compare_templates
from biodedup.match.prints.minutiae import CylinderMatcher, matched
from biodedup.match.ranked import Comparison, Ranked
from biodedup.match.scores.calibration import Calibration
from biodedup.match.scores.calibrations import Calibrations
from biodedup.trace import Trace, tracing
from biodedup.values import Decision, Evidence, Score, Template, Verification


@dataclass(frozen=True, eq=False)
class PairComparer:
    """Compares two sets of templates. Thread-safe."""

    calibrations: Calibrations
    comparer: Comparer

    def compare(
        self, a: Mapping[str, Template], b: Mapping[str, Template], *, across: bool = False
    ) -> Comparison | None:
        """The comparison of all captures of both sides, or None if no captures are comparable. Raises ModelMismatch."""
        for column in a.keys() & b.keys():
            if a[column].model_id != b[column].model_id:
                raise ModelMismatch(
                    f"the {column} templates are of {a[column].model_id} and {b[column].model_id}; extract both with one model"
                )
        return next(iter(self.comparer.compare(a, TemplateCandidates(b), [0], across=across)), None)

    def score(self, a: Template, b: Template) -> Score:
        """The score of two templates. Raises ModelMismatch; InvalidInput for a face and a finger, and for an invalid record."""
        a, b = self.calibrations.sound(a), self.calibrations.sound(b)
        score = compare_templates(self.comparer, a, b)
        if (steps := tracing()) is not None:
            _record_score(steps, a, b, score)
        return score

    def calibration_of(self, template: Template, part: Evidence) -> Calibration:
        """The calibration that gave this template's evidence."""
        model = self.comparer.score_models({template.column: template})[template.column]
        return model.of(part.similarity is not None and part.minutiae is not None)

    def raw_scores(self, template: Template, part: Evidence) -> list[tuple[str, float, float]]:
        """(`similarity` or `minutiae`, raw score, its llr_db) of each comparison that contributes to a capture's evidence."""
        model = self.comparer.score_models({template.column: template})[template.column]
        scores = [] if part.similarity is None else [("similarity", part.similarity, model.alone)]
        if part.minutiae is not None:
            added = None if part.similarity is None else model.with_minutiae
            of_minutiae = model.alone if added is None else added.minutiae
            scores.append(("minutiae", part.minutiae, of_minutiae))
        return [(name, raw, float(calibration.llr_db([raw])[0])) for name, raw, calibration in scores]


def pair_comparer(cards: Sequence[ModelCard]) -> PairComparer:
    """A comparer for templates of these models, without a gallery."""
    calibrations = Calibrations(cards)
    comparer = Comparer(calibrations.of, CylinderMatcher(), calibrations.with_minutiae, calibrations.replay_of)
    return PairComparer(calibrations, comparer)


@cache
def shipped_pair_comparer() -> PairComparer:
    """A comparer for templates of the models in the package."""
    return pair_comparer(shipped_cards())


def record_candidates(
    steps: Trace,
    probe: Mapping[str, Template],
    decision: Decision,
    ranked: Ranked,
    templates_of: Callable[[str], Mapping[str, Template] | None],
) -> None:
    """Adds a decision and its candidates to a trace. ranked: the search's comparisons. templates_of: subject_id -> its enrolled templates,
    or None."""
    steps.add("comparisons", candidates=len(ranked), minutiae=ranked.compared)
    for candidate in decision.candidates:
        steps.add("candidate", candidate=candidate)
        _record_minutiae(steps, probe, templates_of(candidate.subject_id) or {}, candidate.evidence)
    steps.add(
        "thresholds", duplicate_db=decision.duplicate_db, review_db=decision.review_db, size=decision.gallery_size
    )
    steps.add("decision", decision=decision)


def record_verification(
    steps: Trace, probe: Mapping[str, Template], stored: Mapping[str, Template], result: Verification
) -> None:
    """Adds a 1:1 comparison with an enrolled subject to a trace."""
    _record_minutiae(steps, probe, stored, result.evidence)
    steps.add("thresholds", threshold_db=result.threshold_db)
    steps.add("verification", verification=result)


def _record_score(steps: Trace, a: Template, b: Template, score: Score) -> None:
    """Adds a comparison of two templates to a trace."""
    if score.minutiae is not None and a.minutiae is not None and b.minutiae is not None:
        pairs, motion = matched(a.minutiae, b.minutiae)
        steps.add("matched_minutiae", a.column, candidate_column=b.column, pairs=pairs, motion=motion)
    steps.add("score", a.column, score=score)


def _record_minutiae(
    steps: Trace, probe: Mapping[str, Template], stored: Mapping[str, Template], evidence: Sequence[Evidence]
) -> None:
    for part in evidence:
        a, b = probe.get(part.column), stored.get(part.candidate_column)
        if part.minutiae is not None and a and b and a.minutiae is not None and b.minutiae is not None:
            pairs, motion = matched(a.minutiae, b.minutiae)
            steps.add("matched_minutiae", a.column, candidate_column=b.column, pairs=pairs, motion=motion)
