"""Describes a search before it is made: what it scans, what it may miss, and on what evidence.

Owns the description. Never searches; the search itself follows the same codecs (`shards/native.py`), the same
multi-column plans (`multicolumn/plan.py`) and the same buckets (`selfjoin/buckets.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from biodedup.gallery.segments.part import Column, Part
from biodedup.gallery.snapshot import Snapshot
from biodedup.search.multicolumn.plan import MultiColumnPlan, MultiColumnQuery, covered_presences, row_groups_of
from biodedup.search.native.column_statistics import signs_of
from biodedup.search.native.sign_tile import CLASS_TABLES, SIGN_TABLES
from biodedup.search.selfjoin.buckets import Buckets
from biodedup.search.selfjoin.estimate import JoinEstimate
from biodedup.search.shards.native import by_codec, shares
from biodedup.values import COLUMNS


@dataclass(frozen=True)
class ColumnPlan:
    """How one column is searched, without the rows that are searched in several columns at once.

    rows: that have the column; coded_rows: of these, scanned by code (the others are compared exactly); scanned_bytes:
    of each; share: of the rows that is looked at; margin: standard deviations of the estimate's error that the cut-off
    allows for; error_sd: one of these, in similarity at 0.5; miss_bound: the probability of a miss is below it with 95
    % confidence, or None if the pairs set aside are too few to say so; checked: how many pairs these are; source: of
    the vectors that they were made from. by_signs: the same bound for batches of probes that rule rows out by their
    signs first, or None if they do not.
    """

    column: str
    rows: int
    coded_rows: int
    scanned_bytes: int
    share: float
    margin: float
    error_sd: float
    miss_bound: float | None
    checked: int
    source: str
    by_signs: float | None = None


@dataclass(frozen=True)
class SearchPlan:
    """What a search of these columns does. miss_risk: as it was asked for; multicolumn: how many rows are searched in
    several columns at once, and how."""

    miss_risk: float
    columns: tuple[ColumnPlan, ...]
    multicolumn: tuple[tuple[int, MultiColumnPlan], ...] = ()

    def explain(self) -> str:
        """In words, with the evidence; a line for rows that are searched in several columns at once, and one a
        column."""
        lines = [self._multicolumn_line(rows, plan) for rows, plan in self.multicolumn]
        return "\n".join(lines + [self._line(plan) for plan in self.columns])

    def _multicolumn_line(self, rows: int, plan: MultiColumnPlan) -> str:
        names = " + ".join(plan.columns)
        signs = " + ".join(map(str, plan.signs))
        single = ", ".join(f"{missed:.2g}" for missed in plan.single)
        return (
            f"{names}: {rows:,} rows that have all of them are searched in all at once, for {plan.cost:.0%} of the cost of "
            f"searching one column: {signs} signs let {plan.share:.2g} of the rows pass, which are then compared by their "
            f"high nibbles; of mates that reach the review threshold, {plan.missed} of {plan.drawn:,} drawn from the columns' "
            f"calibrations were lost, so that a mate is missed with a probability below {plan.miss_bound:.2g} (asked for: "
            f"{self.miss_risk:g}), 95 % confidence, if captures of a subject correlate by {plan.correlation:g}. Of all mates "
            f"{plan.joint:.2g} are lost; each column's signs alone would lose {single}, whose product is {prod(plan.single):.2g}"
        )

    def _line(self, plan: ColumnPlan) -> str:
        others = "other " if self.multicolumn else ""
        exact = plan.rows - plan.coded_rows
        start = f"{plan.column}: all of {plan.rows:,} {others}rows are looked at, {exact:,} of them exactly"
        if not plan.coded_rows:
            return f"{start}; no row can be missed"
        start += f", {plan.coded_rows:,} by {plan.scanned_bytes} bytes each"
        if self.miss_risk <= 0:
            return f"{start}; rows that the codes cannot rule out are compared exactly: no row can be missed"
        error = f"the estimate's error has a standard deviation of {plan.error_sd:.4f} at similarity 0.5"
        margin = f"rows down to {plan.margin:.2f} of these below the wanted similarity are compared exactly"
        if plan.miss_bound is None:
            evidence = f"a risk of {self.miss_risk:g} by the normal distribution: {plan.checked:,} pairs are too few to confirm it"
        else:
            evidence = (
                f"a row is missed with a probability below {plan.miss_bound:.2g} (asked for: {self.miss_risk:g}), 95 % "
                f"confidence, from {plan.checked:,} pairs set aside (made from {plan.source} vectors)"
            )
        if plan.by_signs is None:
            batches = "batches do not use sign tables, since their pairs are too few to confirm the risk"
        else:
            batches = f"in a batch that uses sign tables first, both steps together miss it below {plan.by_signs:.2g}"
        return f"{start}; {error}; {margin}: {evidence}; {batches}"


@dataclass(frozen=True)
class JoinPlan:
    """What a self-join does: every row compared with every other. buckets: None if it compares all pairs."""

    buckets: Buckets | None
    miss_risk: float
    estimate: JoinEstimate

    def explain(self) -> str:
        """In words, with the evidence."""
        return f"{self._method()}; {self.estimate.explain()}"

    def _method(self) -> str:
        if self.buckets is None:
            return "every row is compared with every other row"
        buckets = self.buckets
        return (
            f"rows that share one of {len(buckets):,} LSH buckets are compared, {buckets.share:.1%} of all pairs; of "
            f"{buckets.drawn:,} mates drawn from the calibration that reach the threshold, {buckets.missed} were missed, so "
            f"that a mate is missed with a probability below {buckets.miss_bound:.2g} (asked for: {self.miss_risk:g}), 95 % confidence"
        )


@dataclass(frozen=True)
class _Held:
    """A column of a part, and how many of its cells no multi-column plan covers."""

    column: Column
    cells: int


def plan_of(
    snapshot: Snapshot, columns: tuple[str, ...], miss_risk: float, multicolumn: MultiColumnQuery | None = None
) -> SearchPlan:
    """The plan of a search of these columns of a snapshot."""
    rows: dict[frozenset[str], int] = {}
    if multicolumn is not None:
        for part in snapshot.parts:
            for group in row_groups_of(part, multicolumn.columns):
                rows[frozenset(group.columns)] = rows.get(frozenset(group.columns), 0) + group.count
    plans = tuple((rows[names], plan) for names, plan in multicolumn.plans.items()) if multicolumn else ()
    return SearchPlan(miss_risk, tuple(_column(snapshot, c, miss_risk, multicolumn) for c in columns), plans)


def _column(snapshot: Snapshot, name: str, miss_risk: float, multicolumn: MultiColumnQuery | None) -> ColumnPlan:
    holding = [[_held(part, name, multicolumn) for part in parts if name in part.columns] for parts in shares(snapshot)]
    rows = sum(held.cells for pieces in holding for held in pieces)
    coded = [held for pieces in holding for group in by_codec(h for h in pieces if h.cells)[1] for held in group]
    if not coded:
        return ColumnPlan(name, rows, 0, 0, 1.0, 0.0, 0.0, 0.0, 0, "sample")
    codec = max(coded, key=lambda held: held.column.count).column.codec
    assert codec is not None, "these have one"
    law = codec.law
    z = law.margin(miss_risk)[0] if miss_risk > 0 else 0.0
    scanned_bytes = codec.scanned // 2 + 4
    coded_rows = sum(held.cells for held in coded)
    middle = law.similarity.index(0.5)
    by_signs = None
    if miss_risk > 0:
        largest = max((held.column for held in coded), key=lambda column: column.count)
        by_signs = max(
            (signs_of(largest, kind).laws[0].bound(miss_risk) or 1.0) for kind in (SIGN_TABLES, CLASS_TABLES)
        )
    return ColumnPlan(
        name,
        rows,
        coded_rows,
        scanned_bytes,
        1.0,
        z,
        law.sd[middle],
        law.bound(miss_risk) if miss_risk > 0 else None,
        law.checked,
        law.source,
        by_signs if by_signs is not None and by_signs < 1 else None,
    )


def _held(part: Part, name: str, multicolumn: MultiColumnQuery | None) -> _Held:
    covered = frozenset[int]() if multicolumn is None else covered_presences(part, multicolumn)
    bit = 1 << COLUMNS.index(name)
    return _Held(part.columns[name], sum(n for bits, n in part.bits.items() if bits & bit and bits not in covered))
