"""Machine-timed cost constants, by which a search chooses the cheapest way.

Owns every constant that was timed on a machine. Never measures and never chooses; a wrong value makes a search slower,
never incomplete.

These commands time the constants, or what they add up to; repeat them after a change of the kernels:

    python benchmarks/costs.py       each constant of a scan        ROW_COSTS, MultiColumnCosts.one_column
    python benchmarks/speed.py       searches of one column         ROW_COSTS
    python benchmarks/columns.py     searches of several columns    MULTI_COLUMN_COSTS
    python benchmarks/selfjoin.py    self-joins                     BUCKET_*
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowCosts:
    """Nanoseconds a row. table: one table look-up; compared: the comparison of a row that the tables let through;
    octet: reading a byte of a row's signs or classes, once for all probes; fetched: bringing a row's high nibbles into the cache, once
    for all probes; number: one number of a scan without tables."""

    table: float
    compared: float
    octet: float
    fetched: float
    number: float

    def of(self, tables: int, octets: int, share: float, probes: int) -> float:
        """A row and probe of a scan with tables. share: of the rows that passes."""
        once = octets * self.octet + min(1.0, share * probes) * self.fetched
        return tables * self.table + share * self.compared + once / probes

    def of_all(self, numbers: int, probes: int) -> float:
        """A row and probe of a scan without tables."""
        return numbers * self.number + numbers / 2 * self.octet / probes


@dataclass(frozen=True)
class MultiColumnCosts:
    """In table look-ups a row. taken: unpacking the signs of one column, once for all probes; compared: the comparison
    of a row in one column by its high nibbles; one_column: a whole search of one column by itself."""

    taken: float
    compared: float
    one_column: float


ROW_COSTS = {
    "avx2": RowCosts(0.0077, 11.0, 0.09, 27.0, 0.0145),
    "vnni": RowCosts(0.0078, 4.5, 0.09, 18.0, 0.0145),
}
"""By instruction set. Without one of these there are no byte shuffles, and no table look-ups. Timed on a core with AVX-512, both."""

CLASSES_MEASURED_NS = 1e9
"""What it takes to measure the laws of a column's class tables (`native/classes.py`)."""

AVX2_MULTI_COLUMN_COSTS = MultiColumnCosts(0.0, 900.0, 64.0)
MULTI_COLUMN_COSTS = MultiColumnCosts(8.0, 5_900.0, 98.0)
"""With AVX-512. Wider registers make look-ups cheaper, but not comparisons: their rows come from all over the cache."""

BUCKET_DIRECTION_NS, BUCKET_MEMBER_NS, BUCKET_PAIR_NS = 2.1, 1_500.0, 0.5
"""Self-join, nanoseconds of a thread, with AVX2: a row compared with a bucket's direction; a row unpacked as a member
of a bucket; a pair of members compared. A self-join without buckets takes BUCKET_PAIR_NS a pair, too."""

JOIN_PAIR_NS, JOIN_COMPARED_ROW_MS, JOIN_SEARCHED_COLUMN_MS = 15.0, 1.6, 0.4
"""For the estimate that a join states before it begins (`selfjoin/estimate.py`), timed on two loaded cores with 10,000 to 40,000 faces: a pair
of a join without buckets, its start included; a row with a candidate, compared; a row searched like a probe, for each column, among 200,000
subjects with a face and ten fingers (`benchmarks/ektp.py`)."""
