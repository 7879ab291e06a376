"""Estimates a join before it begins: how many pairs it compares, how long it takes, and how many pairs impostors are expected to make.

Owns the estimate and its warnings. Never compares, and never refuses a join.

The expected number of impostor pairs is the number of compared pairs times FMR(threshold), where score_db = -10 log10 FMR. Comparisons are
taken to be independent.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, comb, exp, log10

from biodedup.search import costs
from biodedup.search.selfjoin.buckets import Buckets

IMPOSTOR_PAIRS_WARNED = 1_000
SECONDS_WARNED = 300.0


@dataclass(frozen=True)
class JoinEstimate:
    """pairs: of subjects, that are compared; seconds: an estimate for one machine, which others miss by a factor of several."""

    subjects: int
    pairs: int
    threshold_db: float
    seconds: float

    @property
    def impostor_pairs(self) -> float:
        """How many pairs of different people are expected to reach the threshold."""
        return self.pairs * 10 ** (-self.threshold_db / 10)

    def explain(self) -> str:
        """In words."""
        return (
            f"{self.pairs:,} pairs of {self.subjects:,} subjects are compared, in about {duration(self.seconds)}; at {self.threshold_db:.1f} dB "
            f"impostors are expected to make {rounded(self.impostor_pairs)} of them"
        )

    def warnings(self) -> list[str]:
        """Sentences for the caller before the work begins; none where it is short and impostors make few pairs."""
        told = []
        if self.impostor_pairs >= IMPOSTOR_PAIRS_WARNED:
            one_db = ceil(10 * log10(max(self.pairs, 1)))
            told.append(
                f"at {self.threshold_db:.1f} dB impostors are expected to make {rounded(self.impostor_pairs)} of the {self.pairs:,} pairs that "
                f"are compared; from {one_db} dB on they make one at most"
            )
        if self.seconds >= SECONDS_WARNED:
            told.append(f"{self.pairs:,} pairs are compared, which takes about {duration(self.seconds)} (estimated)")
        return told


def estimate_of(
    subjects: int,
    threshold_db: float,
    columns: int,
    *,
    faces_only: bool,
    listed: int | None = None,
    buckets: Buckets | None = None,
) -> JoinEstimate:
    """The estimate of a join of all subjects, or of `listed` ones with all. columns: that the gallery has; buckets: of the join, if it uses
    LSH."""
    joined = subjects if listed is None else listed
    pairs = comb(subjects, 2) - comb(subjects - joined, 2)
    if not faces_only:
        return JoinEstimate(subjects, pairs, threshold_db, joined * columns * costs.JOIN_SEARCHED_COLUMN_MS / 1e3)
    # a row whose scan lets a candidate pass costs a comparison of its own
    impostors_a_row = 2 * pairs / max(joined, 1) * 10 ** (-threshold_db / 10)
    seconds = joined * -(exp(-impostors_a_row) - 1) * costs.JOIN_COMPARED_ROW_MS / 1e3
    return JoinEstimate(subjects, pairs, threshold_db, seconds + _scan_s(subjects, joined, buckets))


def _scan_s(subjects: int, joined: int, buckets: Buckets | None) -> float:
    if buckets is None:
        return joined * subjects / 2 * costs.JOIN_PAIR_NS / 1e9
    count = len(buckets)
    member_share = float(buckets.share / count) ** 0.5
    a_row_ns = count * (costs.BUCKET_DIRECTION_NS + member_share * costs.BUCKET_MEMBER_NS)
    return float(subjects * (a_row_ns + buckets.share * subjects / 2 * costs.BUCKET_PAIR_NS) / 1e9)


def rounded(count: float) -> str:
    """A count as two figures tell it: `500,000`, `12`, `0.0031`."""
    return f"{float(f'{count:.2g}'):,.0f}" if count >= 10 else f"{count:.2g}"


def duration(seconds: float) -> str:
    """`20 s`, `12 min`, `3.5 h`."""
    if seconds < 120:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7_200 else f"{seconds / 3600:.1f} h"
