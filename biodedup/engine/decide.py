"""Makes a decision from the candidates of a search, and a verification from a 1:1 comparison.

Owns the choice of candidates, the verification of an update against its own subject, and the review threshold. The threshold is computed
from the scores that a mate is expected to reach with these captures. `match/judgement.py` holds the rules. Never searches and never writes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from biodedup.config import Config, Policy
from biodedup.engine.prepare import Probe
from biodedup.engine.sample import GallerySamples
from biodedup.errors import BiodedupError, CaptureUnavailable
from biodedup.gallery.policies import policy_digest
from biodedup.gallery.snapshot import Snapshot
from biodedup.match.compare import Comparer
from biodedup.match.judgement import SPEAKS_AGAINST_DB, TRUSTED_KINDS, judge, kinds_of
from biodedup.match.ranked import Comparison, Ranked
from biodedup.required import INCOMPLETE, doubtful
from biodedup.search.expected import expected
from biodedup.search.positions import comparable_bits
from biodedup.search.searcher import SHOWN, CandidateSet, SnapshotRows
from biodedup.values import Candidate, Decision, Encounter, Kind, Refusal, Verification


@dataclass(frozen=True, eq=False)
class Decider:
    """Decides with the policy in force. samples: the subjects that calibrate the scores; clock: returns the time in seconds since 1970, for
    `decided_at`. Thread-safe."""

    config: Config
    policy: Callable[[], Policy]
    comparer: Comparer
    samples: GallerySamples
    clock: Callable[[], float]

    def calibrated_on(self, searched: Snapshot) -> Decider:
        """Returns a decider that scores with the calibrations of the searched snapshot."""
        return self.with_comparer(self.comparer.calibrated_on(self.samples.of(searched)))

    def with_comparer(self, comparer: Comparer) -> Decider:
        """Returns a decider that scores with this comparer."""
        return replace(self, comparer=comparer)

    def decide(
        self,
        probe: Probe,
        found: CandidateSet,
        now: Snapshot,
        *,
        version: int,
        own: Sequence[int] = (),
        different: Collection[int] = (),
    ) -> Decision:
        """Decides on a probe. found: the result of the search; now: the snapshot of the decision, which may be newer.

        version: the version of the gallery after the commit; own: rows that cannot be candidates (the row of a case that is decided again,
        the rows of a subject that is updated); different: rows that a person has judged to be of another subject.
        """
        policy = self.policy()
        duplicate_db, band_db = policy.thresholds_db(now.searched_count)
        bits = comparable_bits(probe.templates, now.models, across=found.across)
        compared = now.count_with(bits) - int(np.count_nonzero(now.presence(own) & bits) if own else 0)
        mates = expected(self.comparer, policy, probe.templates, now, across=found.across) if compared else None
        review_db = band_db if mates is None or policy.review_db is not None else mates.review_db
        returned, cleared = self._chosen(probe, found.comparisons, now, own, different, (review_db, duplicate_db))
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
            outcome=verdict.outcome,
            subject_id=probe.encounter.subject_id,
            encounter_id=probe.encounter.encounter_id,
            candidates=_candidates(now, returned, verdict.kinds),
            refusals=probe.refusals,
            missing=probe.missing,
            duplicate_db=duplicate_db,
            review_db=review_db,
            gallery_size=now.searched_count,
            gallery_version=version,
            model_ids=tuple(sorted({template.model_id for template in probe.templates.values()})),
            incomplete=found.incomplete,
            decided_at=self.clock(),
            reasons=verdict.reasons,
            attainable_db=None if mates is None else mates.attainable_db,
            expected_fnir=None if mates is None else mates.fnir,
            compared=compared,
            cleared=_candidates(now, cleared, kinds_of(cleared, duplicate_db, review_db)),
            doubtful=doubtful(probe.templates.values()),
            policy_digest=policy_digest(policy),
        )

    def _chosen(
        self,
        probe: Probe,
        ranked: Ranked,
        now: Snapshot,
        own: Sequence[int],
        different: Collection[int],
        resembling_db: tuple[float, float],
    ) -> tuple[list[Comparison], list[Comparison]]:
        """Calls `first_of` for all compared rows. resembling_db: the thresholds for `Ranked.resembling`."""
        if not len(ranked):
            return [], []
        count = self.config.search.returned
        adds = any([self.comparer.has_minutiae_to_add(template) for template in probe.templates.values()])
        return first_of(
            ranked,
            (count, min(count, SHOWN) if adds else count),
            now.are_present(ranked.rows) & ~np.isin(ranked.rows, own),
            ranked.resembling(*resembling_db),
            lambda row: bool(different) and set(different).issuperset(now.siblings(row)),
        )

    def incomplete(self, probe: Probe, lacks: Sequence[Refusal], now: Snapshot, *, version: int) -> Decision:
        """Refuses an encounter that lacks required captures of the policy. lacks: the refusal of each missing capture."""
        decision = self.decide(probe, CandidateSet(), now, version=version)
        refusals = tuple(dict.fromkeys((*probe.refusals, *lacks)))
        return replace(decision, outcome="refused", reasons=(INCOMPLETE,), refusals=refusals)

    def confirmed(self, decision: Decision, probe: Probe, now: Snapshot, own: Sequence[int]) -> Decision:
        """Verifies an update. If its captures do not verify as the subject, the outcome becomes `review`. own: the subject's rows."""
        if decision.outcome not in ("unique", "review"):
            return decision
        compared = self._with_subject(probe, now, own)
        threshold_db = self._verify_db()
        (kind,) = kinds_of(compared, threshold_db, threshold_db) or ("",)
        if kind not in TRUSTED_KINDS or self._drifted(probe, now, own):
            return self.disputed(decision, probe, now, own)
        if self.policy().replays == "refuse" and any(part.replay for part in compared[0].evidence):
            return self._replayed(decision, compared, now)
        return decision

    def _replayed(self, decision: Decision, compared: Sequence[Comparison], now: Snapshot) -> Decision:
        """Returns the decision `review` on an update with a copy of an enrolled capture of the subject."""
        (subject,) = _candidates(now, compared, kinds_of(compared, decision.duplicate_db, decision.review_db))
        others = (replace(other, rank=rank) for rank, other in enumerate(decision.candidates, start=2))
        reasons = tuple(dict.fromkeys(("replay_suspected", *decision.reasons)))
        return replace(decision, outcome="review", candidates=(subject, *others), reasons=reasons)

    def _drifted(self, probe: Probe, now: Snapshot, own: Sequence[int]) -> bool:
        """Whether the subject's first row contradicts captures that later rows confirm.

        The captures may be of another person. A later row may resemble both people, for example a morph of two faces. own: ascending."""
        first = self._with_subject(probe, now, own[:1]) if len(own) > 1 else ()
        return bool(first) and first[0].llr_db <= SPEAKS_AGAINST_DB

    def disputed(self, decision: Decision, probe: Probe, now: Snapshot, own: Sequence[int]) -> Decision:
        """Returns the decision `review`, with the subject itself as the first candidate. A person must judge whether the captures are of
        the subject."""
        compared = self._with_subject(probe, now, own)
        kinds = kinds_of(compared, decision.duplicate_db, decision.review_db)
        kind: Kind = kinds[0] if kinds and kinds[0] not in ("", *TRUSTED_KINDS) else "another_person"
        if compared:
            (subject,) = _candidates(now, compared, [kind])
        else:
            subject = Candidate(probe.subject_id, 1, 0.0, False, (), kind=kind, rows=tuple(own))
        others = (replace(other, rank=rank) for rank, other in enumerate(decision.candidates, start=2))
        return replace(
            decision,
            outcome="review",
            candidates=(subject, *others),
            reasons=tuple(dict.fromkeys(("another_person", kind, *decision.reasons))),
        )

    def _with_subject(self, probe: Probe, now: Snapshot, own: Sequence[int]) -> Sequence[Comparison]:
        """Compares the probe with all rows of one subject. Returns one comparison, or none if no capture is comparable."""
        rows = np.array(own, np.int64)
        one_subject = np.zeros(len(rows), np.int64)
        return list(self.comparer.compare(probe.templates, SnapshotRows(now), rows, subjects=one_subject))

    def _verify_db(self) -> float:
        return -10 * float(np.log10(self.policy().verify_fmr))

    def refused(self, encounter: Encounter, error: BiodedupError, now: Snapshot) -> Decision:
        """Returns the decision `refused` for an encounter of a batch that raised an error. This decision is not recorded."""
        reason = error.reason if isinstance(error, CaptureUnavailable) else _snake_case(type(error).__name__)
        refusal = Refusal("encounter", reason, str(error))
        duplicate_db, review_db = self.policy().thresholds_db(now.searched_count)
        return Decision(
            outcome="refused",
            subject_id=encounter.subject_id,
            encounter_id=encounter.encounter_id,
            candidates=(),
            refusals=(refusal,),
            missing=(),
            duplicate_db=duplicate_db,
            review_db=review_db,
            gallery_size=now.searched_count,
            gallery_version=now.version,
            decided_at=self.clock(),
        )

    def verify(self, probe: Probe, subject_id: str, now: Snapshot, own: Sequence[int]) -> Verification:
        """Compares the probe 1:1 with all rows of a subject. own: the rows of the subject."""
        threshold_db = self._verify_db()
        compared = self._with_subject(probe, now, own)
        if not compared:
            return Verification(subject_id, False, 0.0, threshold_db, False, evidence=(), refusals=probe.refusals)
        best = compared[0]
        (kind,) = kinds_of([best], threshold_db, threshold_db)
        return Verification(
            subject_id=subject_id,
            accepted=kind in TRUSTED_KINDS
            and not (self.policy().replays == "refuse" and any(part.replay for part in best.evidence)),
            score_db=best.score_db,
            threshold_db=threshold_db,
            extrapolated=best.extrapolated,
            evidence=best.evidence,
            refusals=probe.refusals,
            kind=kind,
        )


def first_of(
    ranked: Ranked,
    most: tuple[int, int],
    counts: NDArray[np.bool_],
    resembles: NDArray[np.bool_],
    is_different: Callable[[int], bool],
) -> tuple[list[Comparison], list[Comparison]]:
    """Returns (the candidates, strongest first; the rows ahead of the last candidate that a person judged to be of another subject).

    Rows that resemble the probe are chosen first. Other rows follow in the order of their embeddings' scores, which is the order of the
    search. most: (the largest number of resembling candidates, the number of candidates up to which other rows are added); counts: bool
    (n,), the rows that can be candidates; resembles: bool (n,); is_different: whether a person judged a row to be of another subject.
    """
    others = np.lexsort((ranked.rows, *-ranked.by_embeddings[::-1]))
    resembling = np.flatnonzero(resembles & counts)
    first: list[int] = []
    cleared: list[int] = []
    for ranks, places in zip((resembling, others[(counts & ~resembles)[others]]), most, strict=True):
        for rank in ranks.tolist():
            if len(first) >= places:
                break
            (cleared if is_different(int(ranked.rows[rank])) else first).append(rank)
    comparisons = ranked.at(sorted(first) + sorted(cleared))
    return comparisons[: len(first)], comparisons[len(first) :]


def _candidates(now: Snapshot, comparisons: Sequence[Comparison], kinds: Sequence[Kind]) -> tuple[Candidate, ...]:
    names = now.subject_ids([c.row for c in comparisons])
    return tuple(
        Candidate(
            subject_id=name,
            rank=rank,
            score_db=comparison.score_db,
            extrapolated=comparison.extrapolated,
            evidence=comparison.evidence,
            label_penalty_db=comparison.label_penalty_db,
            kind=kind,
            interval_db=comparison.interval_db,
            rows=now.siblings(comparison.row),
            case=now.pending.get(comparison.row, ""),
        )
        for rank, (name, comparison, kind) in enumerate(zip(names, comparisons, kinds, strict=True), start=1)
    )


def _snake_case(name: str) -> str:
    return "".join("_" + letter.lower() if letter.isupper() else letter for letter in name).lstrip("_")
