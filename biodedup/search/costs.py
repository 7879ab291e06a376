"""Cost constants, timed on a machine, by which a search chooses its fastest method.

Owns all constants of this kind. Never measures and never chooses. A wrong value makes a search slower, never incomplete.

These commands time the constants, or searches that depend on them. Repeat them after a change of the kernels:

    python benchmarks/costs.py       each constant of a scan        ROW_COSTS, MultiColumnCosts.one_column
    python benchmarks/speed.py       searches of one column         ROW_COSTS
    python benchmarks/columns.py     searches of several columns    MULTI_COLUMN_COSTS
    python benchmarks/selfjoin.py    self-joins                     BUCKET_*
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowCosts:
    """Nanoseconds per row. table: a table look-up. compared: the comparison of a row of 128 numbers that passes the tables. octet: reading a
    byte of a row's signs or classes, once for all probes. fetched: bringing the high nibbles of 128 numbers into the cache, once for all
    probes. number: a number of a vector in a scan without tables."""

    table: float
    compared: float
    octet: float
    fetched: float
    number: float

    def of(self, tables: int, octets: int, share: float, probes: int, numbers: int = 128) -> float:
        """Nanoseconds per row and probe of a scan with tables. share: the share of rows that pass the tables. numbers: of a row."""
        width = numbers / 128
        once = octets * self.octet + min(1.0, share * probes) * self.fetched * width
        return tables * self.table + share * self.compared * width + once / probes

    def of_all(self, numbers: int, probes: int) -> float:
        """Nanoseconds per row and probe of a scan without tables."""
        return numbers * self.number + numbers / 2 * self.octet / probes


@dataclass(frozen=True)
class MultiColumnCosts:
    """Costs in table look-ups per row. taken: unpacking the signs of a column, once for all probes. compared: the comparison of a row in a
    column by its high nibbles. one_column: a whole search of a single column."""

    taken: float
    compared: float
    one_column: float


ROW_COSTS = {
    "avx2": RowCosts(0.0077, 11.0, 0.09, 27.0, 0.0145),
    "vnni": RowCosts(0.0078, 4.5, 0.09, 18.0, 0.0145),
}
"""By instruction set. Other processors have no byte shuffles, so that there are no table look-ups. Both were timed on a core with AVX-512."""

CLASSES_MEASURED_NS = 1e9
"""Time to measure the error distributions of a column's class tables (`native/classes.py`)."""

AVX2_MULTI_COLUMN_COSTS = MultiColumnCosts(0.0, 900.0, 64.0)
MULTI_COLUMN_COSTS = MultiColumnCosts(8.0, 5_900.0, 98.0)
"""With AVX-512. Wider registers make look-ups cheaper, but not comparisons, whose rows are scattered in the cache."""

BUCKET_DIRECTION_NS, BUCKET_MEMBER_NS, BUCKET_PAIR_NS = 2.1, 1_500.0, 0.5
"""Self-join, in nanoseconds of a thread, with AVX2: the comparison of a row with a bucket's direction; the unpacking of a row as a member of
a bucket; the comparison of two members. A self-join without buckets also takes BUCKET_PAIR_NS per pair."""

JOIN_PAIR_NS, JOIN_COMPARED_ROW_MS, JOIN_SEARCHED_COLUMN_MS = 15.0, 1.6, 0.4
"""For the estimate before a join (`selfjoin/estimate.py`), timed on two loaded cores with 10,000 to 40,000 faces: a pair of a join without
buckets, with the start of the join; the comparison of a row with a candidate. The search for a row as a probe, per column, was timed with
200,000 subjects of a face and ten fingers (`benchmarks/ektp.py`)."""
