"""From what a search found to a decision, and from one comparison to a verification.

Owns which rows count as candidates, how an update is checked against the subject itself, and what a mate would score with the captures at hand, from which the review threshold follows.
Never searches and never writes; the rules are those of `match/judgement.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from biodedup.config import Config, Policy
from biodedup.engine.prepare import Probe
from biodedup.engine.sample import GallerySamples
from biodedup.errors import BiodedupError, CaptureUnavailable
from biodedup.gallery.snapshot import Snapshot
from biodedup.match.compare import Comparer
from biodedup.match.fusion import mated_quantile_db, mated_share_below
from biodedup.match.judgement import BELIEVED, judge, kinds_of
from biodedup.match.ranked import Comparison, Ranked
from biodedup.required import INCOMPLETE
from biodedup.search.positions import comparable_bits
from biodedup.search.searcher import Found, SnapshotRows
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
    """Decides by the policy in force. samples: what calibrations are measured on; clock: the time in seconds, for `decided_at`.
    Thread-safe."""

    config: Config
    policy: Callable[[], Policy]
    comparer: Comparer
    samples: GallerySamples
    clock: Callable[[], float]

    def calibrated_on(self, searched: Snapshot) -> Decider:
        """The same decider, with the calibrations of the snapshot that was searched."""
        return replace(self, comparer=self.comparer.calibrated_on(self.samples.of(searched)))

    def decide(
        self,
        probe: Probe,
        found: Found,
        now: Snapshot,
        *,
        version: int,
        own: Sequence[int] = (),
        different: Collection[int] = (),
    ) -> Decision:
        """version: of the gallery, once the decision stands. own: rows that are no candidates: of the case that is decided, and of the
        subject that it is to update; different: rows that were judged to be of somebody else."""
        policy = self.policy()
        duplicate_db, band_db = policy.thresholds_db(now.searched_count)
        returned, cleared = _first(
            found.comparisons,
            self.config.search.returned,
            lambda rows: now.are_present(rows) & ~np.isin(rows, own),
            lambda row: bool(different) and set(different).issuperset(now.siblings(row)),
        )
        bits = comparable_bits(probe.templates, now.models, across=found.across)
        compared = now.count_with(bits) - int(np.count_nonzero(now.presence(own) & bits) if own else 0)
        expected = self._expected(policy, probe.templates, now, band_db, across=found.across) if compared else None
        review_db = band_db if expected is None or policy.review_db is not None else expected.review_db
        verdict = judge(
            returned,
            duplicate_db,
            review_db,
            band_db=band_db,
            incomplete=found.incomplete,
            usable=bool(probe.templates),
            nothing_in_common=not compared and now.present_count > len(own),
            trust_extrapolation=policy.trust_extrapolation,
            waiting=[c.row in now.pending for c in returned],
        )
        return Decision(
            verdict.outcome,
            probe.encounter.subject_id,
            probe.encounter.encounter_id,
            _candidates(now, returned, verdict.kinds),
            probe.refusals,
            probe.missing,
            duplicate_db,
            review_db,
            now.searched_count,
            version,
            tuple(sorted({template.model_id for template in probe.templates.values()})),
            found.incomplete,
            self.clock(),
            verdict.reasons,
            None if expected is None else expected.attainable_db,
            None if expected is None else expected.fnir,
            compared,
            _candidates(now, cleared, kinds_of(cleared, duplicate_db, review_db)),
        )

    def incomplete(self, probe: Probe, lacks: Sequence[Refusal], now: Snapshot, *, version: int) -> Decision:
        """The refusal of an encounter that lacks captures. lacks: each of them, with the reason."""
        decision = self.decide(probe, Found(), now, version=version)
        refusals = tuple(dict.fromkeys((*probe.refusals, *lacks)))
        return replace(decision, outcome="refused", reasons=(INCOMPLETE,), refusals=refusals)

    def confirmed(self, decision: Decision, probe: Probe, now: Snapshot, own: Sequence[int]) -> Decision:
        """The decision on an update: with captures that do not verify as the subject's, a person has to look. own: its rows."""
        if decision.outcome not in ("unique", "review"):
            return decision
        compared = self._with_subject(probe, now, own)
        threshold_db = self._verify_db()
        (kind,) = kinds_of(compared, threshold_db, threshold_db) or ("",)
        if kind in BELIEVED:
            return decision
        return self.disputed(decision, probe, now, own)

    def disputed(self, decision: Decision, probe: Probe, now: Snapshot, own: Sequence[int]) -> Decision:
        """The decision `review`, with the subject itself as the first candidate: are these captures theirs?"""
        compared = self._with_subject(probe, now, own)
        kinds = kinds_of(compared, decision.duplicate_db, decision.review_db)
        told: Kind = kinds[0] if kinds and kinds[0] not in ("", *BELIEVED) else "another_person"
        nothing = Candidate(probe.subject_id, 1, 0.0, False, (), kind=told, rows=tuple(own))
        (mine,) = _candidates(now, compared, [told]) if compared else (nothing,)
        others = (replace(other, rank=rank) for rank, other in enumerate(decision.candidates, start=2))
        return replace(
            decision,
            outcome="review",
            candidates=(mine, *others),
            reasons=tuple(dict.fromkeys(("another_person", told, *decision.reasons))),
        )

    def _with_subject(self, probe: Probe, now: Snapshot, own: Sequence[int]) -> Sequence[Comparison]:
        """The probe compared with all rows of the subject: one comparison, or none where nothing is comparable."""
        rows = np.array(own, np.int64)
        return self.comparer.compare(probe.templates, SnapshotRows(now), rows, subjects=np.zeros(len(rows), np.int64))[
            :
        ]

    def _verify_db(self) -> float:
        return -10 * float(np.log10(self.policy().verify_fmr))

    def refused(self, encounter: Encounter, error: BiodedupError, now: Snapshot) -> Decision:
        """What an encounter of a stream gets where by itself it would raise the error. It is not recorded."""
        reason = error.reason if isinstance(error, CaptureUnavailable) else _snake_case(type(error).__name__)
        refusal = Refusal("encounter", reason, str(error))
        duplicate_db, review_db = self.policy().thresholds_db(now.searched_count)
        return Decision(
            "refused",
            encounter.subject_id,
            encounter.encounter_id,
            (),
            (refusal,),
            (),
            duplicate_db,
            review_db,
            now.searched_count,
            now.version,
            decided_at=self.clock(),
        )

    def verify(self, probe: Probe, subject_id: str, now: Snapshot, own: Sequence[int]) -> Verification:
        """1:1 with all rows of a subject."""
        threshold_db = self._verify_db()
        compared = self._with_subject(probe, now, own)
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
    is_different: Callable[[int], bool],
) -> tuple[list[Comparison], list[Comparison]]:
    """(the first so many of the rows that count, those before them that were judged to be somebody else)."""
    first: list[int] = []
    cleared: list[int] = []
    for low in range(0, len(ranked), _FIRST_ROWS):
        rows = ranked.rows[low : low + _FIRST_ROWS]
        for at in np.flatnonzero(which_count(rows)).tolist():
            if len(first) < count:
                (cleared if is_different(int(rows[at])) else first).append(low + at)
        if len(first) == count:
            break
    comparisons = ranked.at(first + cleared)
    return comparisons[: len(first)], comparisons[len(first) :]


def _candidates(now: Snapshot, comparisons: Sequence[Comparison], kinds: Sequence[Kind]) -> tuple[Candidate, ...]:
    names = now.subject_ids([c.row for c in comparisons])
    return tuple(
        Candidate(
            name,
            rank,
            c.score_db,
            c.extrapolated,
            c.evidence,
            c.label_penalty_db,
            kind,
            c.interval_db,
            now.siblings(c.row),
            now.pending.get(c.row, ""),
        )
        for rank, (name, c, kind) in enumerate(zip(names, comparisons, kinds, strict=True), start=1)
    )


def _snake_case(name: str) -> str:
    return "".join("_" + letter.lower() if letter.isupper() else letter for letter in name).lstrip("_")
