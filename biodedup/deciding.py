"""From what a search found to a decision, and from one comparison to a verification.

Owns which rows count as candidates, and what a mate would score with the captures at hand, from which the review threshold follows.
Never searches and never writes; the rules are those of `match/judgement.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from biodedup.completeness import INCOMPLETE
from biodedup.config import Config, Policy
from biodedup.errors import CallerError
from biodedup.gallery.snapshot import Snapshot
from biodedup.match.compare import Comparer, InHand
from biodedup.match.fusion import mated_quantile_db, mated_share_below
from biodedup.match.judgement import BELIEVED, judge, kinds_of
from biodedup.match.ranked import Comparison, Ranked
from biodedup.probes import Probe
from biodedup.search.across import comparable_bits
from biodedup.search.rescore import Found
from biodedup.values import Candidate, Decision, Encounter, Kind, Refusal, Template, Verification

_ATTAINED_SHARE = 0.95
_FIRST_ROWS = 64  # looked at together; the tenth that counts is nearly always among them


@dataclass(frozen=True)
class _Expected:
    """How a mate would score. attainable_db: nearly all of them score less; fnir: the share of them below review_db."""

    attainable_db: float
    review_db: float
    fnir: float


@dataclass(frozen=True, eq=False)
class Decider:
    """Decides by the policy in force. clock: the time in seconds, for `decided_at`. Thread-safe."""

    config: Config
    policy: Callable[[], Policy]
    comparer: Comparer
    clock: Callable[[], float]

    def decide(
        self, probe: Probe, found: Found, now: Snapshot, *, version: int, besides: int | None = None
    ) -> Decision:
        """version: of the gallery, once the decision stands. besides: the row that is being replaced, no candidate for itself."""
        policy = self.policy()
        duplicate_db, band_db = policy.thresholds_db(now.live_count)
        returned, cleared = _first(
            found.comparisons,
            self.config.search.returned,
            lambda rows: now.are_live(rows) & (rows != (-1 if besides is None else besides)),
            now.rows_different(probe.encounter.subject_id),
        )
        compared = now.count_with(comparable_bits(probe.templates, now.models, across=found.across))
        expected = self._expected(policy, probe.templates, now, band_db, across=found.across) if compared else None
        review_db = band_db if expected is None or policy.review_db is not None else expected.review_db
        verdict = judge(
            returned,
            duplicate_db,
            review_db,
            band_db=band_db,
            incomplete=found.incomplete,
            usable=bool(probe.templates),
            nothing_in_common=not compared and now.live_count > 0,
            trust_extrapolation=policy.trust_extrapolation,
        )
        names = now.subject_ids([c.row for c in (*returned, *cleared)])
        return Decision(
            verdict.outcome,
            probe.encounter.subject_id,
            probe.encounter.encounter_id,
            _candidates(names, returned, verdict.kinds),
            probe.refusals,
            probe.missing,
            duplicate_db,
            review_db,
            now.live_count,
            version,
            tuple(sorted({template.model_id for template in probe.templates.values()})),
            found.incomplete,
            self.clock(),
            verdict.reasons,
            None if expected is None else expected.attainable_db,
            None if expected is None else expected.fnir,
            compared,
            _candidates(names[len(returned) :], cleared, kinds_of(cleared, duplicate_db, review_db)),
        )

    def incomplete(self, probe: Probe, lacks: Sequence[Refusal], now: Snapshot, *, version: int) -> Decision:
        """The refusal of an encounter that lacks captures. lacks: each of them, with the reason."""
        decision = self.decide(probe, Found(), now, version=version)
        refusals = tuple(dict.fromkeys((*probe.refusals, *lacks)))
        return replace(decision, outcome="refused", reasons=(INCOMPLETE,), refusals=refusals)

    def refused(self, encounter: Encounter, error: CallerError, now: Snapshot) -> Decision:
        """What an encounter of a stream gets where by itself it would raise the error."""
        refusal = Refusal("encounter", _snake_case(type(error).__name__), str(error))
        duplicate_db, review_db = self.policy().thresholds_db(now.live_count)
        return Decision(
            "refused",
            encounter.subject_id,
            encounter.encounter_id,
            (),
            (refusal,),
            (),
            duplicate_db,
            review_db,
            now.live_count,
            now.version,
            decided_at=self.clock(),
        )

    def verify(self, probe: Probe, subject_id: str, enrolled: Mapping[str, Template]) -> Verification:
        """1:1 with a subject's templates."""
        threshold_db = -10 * float(np.log10(self.policy().verify_fmr))
        compared = self.comparer.compare(probe.templates, InHand(enrolled), [0])
        if not compared:
            return Verification(subject_id, False, 0.0, threshold_db, False, (), probe.refusals)
        best = compared[0]
        (kind,) = kinds_of([best], threshold_db, threshold_db)
        return Verification(
            subject_id,
            kind in BELIEVED,
            best.score_db,
            threshold_db,
            best.extrapolated,
            best.evidence,
            probe.refusals,
            kind,
        )

    def _expected(
        self, policy: Policy, templates: Mapping[str, Template], now: Snapshot, band_db: float, *, across: bool
    ) -> _Expected:
        """How a mate scores with these captures, those aside that nobody enrolled has; the review threshold follows from it."""
        calibrations = tuple(
            law.of(templates[column].embedding is not None and templates[column].minutiae is not None)
            for column, law in sorted(self.comparer.laws(templates).items())
            if now.count_with(comparable_bits({column: templates[column]}, now.models, across=across))
        )
        review_db = min(band_db, mated_quantile_db(policy.fnir_review, calibrations))
        attainable_db = mated_quantile_db(_ATTAINED_SHARE, calibrations)
        return _Expected(attainable_db, review_db, mated_share_below(review_db, calibrations))


def _first(
    ranked: Ranked,
    count: int,
    which_count: Callable[[NDArray[np.int64]], NDArray[np.bool_]],
    different: Collection[int],
) -> tuple[list[Comparison], list[Comparison]]:
    """(the first so many of the rows that count, those before them that were judged to be somebody else)."""
    first: list[int] = []
    cleared: list[int] = []
    for low in range(0, len(ranked), _FIRST_ROWS):
        rows = ranked.rows[low : low + _FIRST_ROWS]
        for at in np.flatnonzero(which_count(rows)).tolist():
            if len(first) < count:
                (cleared if int(rows[at]) in different else first).append(low + at)
        if len(first) == count:
            break
    comparisons = ranked.at(first + cleared)
    return comparisons[: len(first)], comparisons[len(first) :]


def _candidates(
    names: Sequence[str], comparisons: Sequence[Comparison], kinds: Sequence[Kind]
) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(name, rank, c.score_db, c.extrapolated, c.evidence, c.charge_db, kind, c.interval_db)
        for rank, (name, c, kind) in enumerate(zip(names, comparisons, kinds, strict=False), start=1)
    )


def _snake_case(name: str) -> str:
    return "".join("_" + letter.lower() if letter.isupper() else letter for letter in name).lstrip("_")
