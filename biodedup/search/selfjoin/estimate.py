"""Estimates a join before it begins: the number of compared pairs, the time, and the expected number of impostor pairs in the result.

Owns the estimate and its warnings. Never compares, and never refuses a join.

The expected number of impostor pairs is the number of compared pairs times FMR(threshold), where score_db = -10 log10 FMR. Comparisons are
assumed to be independent.
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
    """An estimate. pairs: compared pairs of subjects. seconds: for the machine of `costs.py`; other machines may differ by several times."""

    subjects: int
    pairs: int
    threshold_db: float
    seconds: float

    @property
    def impostor_pairs(self) -> float:
        """The expected number of pairs of different people that reach the threshold."""
        return self.pairs * 10 ** (-self.threshold_db / 10)

    def explain(self) -> str:
        """The estimate as text."""
        return (
            f"{self.pairs:,} pairs of {self.subjects:,} subjects are compared, in about {duration(self.seconds)}; at {self.threshold_db:.1f} dB "
            f"impostors are expected to make {rounded(self.impostor_pairs)} of them"
        )

    def warnings(self) -> list[str]:
        """Warnings for the caller: the join takes long, or finds many impostor pairs."""
        sentences = []
        if self.impostor_pairs >= IMPOSTOR_PAIRS_WARNED:
            single_db = ceil(10 * log10(max(self.pairs, 1)))
            sentences.append(
                f"at {self.threshold_db:.1f} dB impostors are expected to make {rounded(self.impostor_pairs)} of the {self.pairs:,} pairs that "
                f"are compared; from {single_db} dB on they make at most one"
            )
        if self.seconds >= SECONDS_WARNED:
            sentences.append(
                f"{self.pairs:,} pairs are compared, which takes about {duration(self.seconds)} (estimated)"
            )
        return sentences


def estimate_of(
    subjects: int,
    threshold_db: float,
    columns: int,
    *,
    faces_only: bool,
    listed: int | None = None,
    buckets: Buckets | None = None,
) -> JoinEstimate:
    """The estimate of a join of all subjects, or of `listed` subjects with all subjects. columns: number of the gallery's columns. buckets: the
    LSH buckets of the join, or None."""
    joined = subjects if listed is None else listed
    pairs = comb(subjects, 2) - comb(subjects - joined, 2)
    if not faces_only:
        return JoinEstimate(subjects, pairs, threshold_db, joined * columns * costs.JOIN_SEARCHED_COLUMN_MS / 1e3)
    # a row with at least one candidate in the scan costs a comparison
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
    """A count, rounded to two digits: `500,000`, `12`, `0.0031`."""
    return f"{float(f'{count:.2g}'):,.0f}" if count >= 10 else f"{count:.2g}"


def duration(seconds: float) -> str:
    """`20 s`, `12 min`, `3.5 h`."""
    if seconds < 120:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7_200 else f"{seconds / 3600:.1f} h"
