"""The plan of a search: what is scanned, what that may miss, and on what evidence.

Owns the statement. The search itself follows the same codecs (`shard.py`) and the same choices (`together.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from biodedup.gallery.segments.part import Column, Part
from biodedup.gallery.snapshot import Snapshot
from biodedup.search.multicolumn.together import MultiColumnPlan, MultiColumnQuery, covered, row_groups_of
from biodedup.search.native.column_statistics import signs_of
from biodedup.search.native.sign_tile import CLASS_TABLES, SIGN_TABLES
from biodedup.search.selfjoin.buckets import Buckets
from biodedup.search.shards.shard import by_codec, shares
from biodedup.values import COLUMNS


@dataclass(frozen=True)
class ColumnPlan:
    """How one column is searched, but for the rows that are searched in several together.

    rows: that have it; coded_rows: of these, scanned by code (the others are compared exactly); scanned_bytes: of each;
    share: of the rows that is looked at; margin: standard deviations of the estimate's error that a cut leaves; error_sd: one of
    these, in similarity at 0.5; miss_bound: the probability of a miss is below it with 95 % confidence, or None where the
    pairs set aside are too few to say so; checked: how many pairs these are; source: of the vectors they were made from.
    by_signs: the same bound where a batch of probes rules rows out by their signs first, or None where it does not.
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
    """What a search of these columns does. miss_risk: as it was asked for; together: rows that are searched in several columns
    at once, how many and how."""

    miss_risk: float
    columns: tuple[ColumnPlan, ...]
    together: tuple[tuple[int, MultiColumnPlan], ...] = ()

    def explain(self) -> str:
        """In words, with the evidence; a line for rows that are searched together, and for each column."""
        lines = [self._together(rows, choice) for rows, choice in self.together]
        return "\n".join(lines + [self._line(plan) for plan in self.columns])

    def _together(self, rows: int, choice: MultiColumnPlan) -> str:
        names = " + ".join(choice.columns)
        signs = " + ".join(map(str, choice.signs))
        single = ", ".join(f"{missed:.2g}" for missed in choice.single)
        return (
            f"{names}: {rows:,} rows that have all of them are searched in all at once, for {choice.cost:.0%} of what a search of "
            f"one column takes: {signs} signs let {choice.share:.2g} of the rows pass, whose upper halves are compared; of mates that "
            f"reach the review threshold, {choice.missed} of {choice.drawn:,} drawn from the columns' calibrations were lost, so that one is missed with a probability below {choice.miss_bound:.2g} (asked for: "
            f"{self.miss_risk:g}), 95 % confidence, where captures go together with a correlation of {choice.correlation:g}. Of all "
            f"mates {choice.joint:.2g} are lost; each column's signs alone would lose {single}, whose product is "
            f"{prod(choice.single):.2g}"
        )

    def _line(self, plan: ColumnPlan) -> str:
        others = "other " if self.together else ""
        start = f"{plan.column}: all of {plan.rows:,} {others}rows are looked at, {plan.rows - plan.coded_rows:,} of them exactly"
        if not plan.coded_rows:
            return f"{start}; no row can be missed"
        start += f", {plan.coded_rows:,} by {plan.scanned_bytes} bytes each"
        if self.miss_risk <= 0:
            return f"{start}; whatever the codes cannot rule out is compared exactly: no row can be missed"
        error = f"the estimate's error has a standard deviation of {plan.error_sd:.4f} at similarity 0.5"
        margin = f"rows down to {plan.margin:.2f} of these below the wanted similarity are compared exactly"
        if plan.miss_bound is None:
            evidence = (
                f"a risk of {self.miss_risk:g} by the normal law: {plan.checked:,} pairs are too few to confirm it"
            )
        else:
            evidence = (
                f"a row is missed with a probability below {plan.miss_bound:.2g} (asked for: {self.miss_risk:g}), 95 % "
                f"confidence, from {plan.checked:,} pairs set aside (made from {plan.source} vectors)"
            )
        if plan.by_signs is None:
            batches = "batches do not go by signs, whose pairs are too few to confirm the risk"
        else:
            batches = f"where a batch goes by signs first, by both steps together with a probability below {plan.by_signs:.2g}"
        return f"{start}; {error}; {margin}: {evidence}; {batches}"


@dataclass(frozen=True)
class JoinPlan:
    """What a join of everybody with everybody does. buckets: None where it compares all pairs."""

    buckets: Buckets | None
    miss_risk: float

    def explain(self) -> str:
        """In words, with the evidence."""
        if self.buckets is None:
            return "everybody is compared with everybody"
        buckets = self.buckets
        return (
            f"those are compared who meet in one of {len(buckets):,} buckets, {buckets.share:.1%} of all pairs; of {buckets.drawn:,} mates that "
            f"reach the threshold, as the calibration has them, {buckets.missed} were missed, so that one is missed with a probability "
            f"below {buckets.miss_bound:.2g} (asked for: {self.miss_risk:g}), 95 % confidence"
        )


@dataclass(frozen=True)
class _Held:
    """A column of a part, and how many of its cells are left to it."""

    column: Column
    cells: int


def plan_of(
    snapshot: Snapshot, columns: tuple[str, ...], miss_risk: float, together: MultiColumnQuery | None = None
) -> SearchPlan:
    """The plan of a search of these columns of a snapshot, as it is."""
    rows: dict[frozenset[str], int] = {}
    for part in snapshot.parts if together is not None else ():
        for one in row_groups_of(part, together.columns) if together is not None else ():
            rows[frozenset(one.columns)] = rows.get(frozenset(one.columns), 0) + one.count
    chosen = tuple((rows[names], choice) for names, choice in together.choices.items()) if together else ()
    return SearchPlan(miss_risk, tuple(_column(snapshot, c, miss_risk, together) for c in columns), chosen)


def _column(snapshot: Snapshot, name: str, miss_risk: float, together: MultiColumnQuery | None) -> ColumnPlan:
    holding = [[_held(part, name, together) for part in parts if name in part.columns] for parts in shares(snapshot)]
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
            (signs_of(largest, each).laws[0].bound(miss_risk) or 1.0) for each in (SIGN_TABLES, CLASS_TABLES)
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


def _held(part: Part, name: str, together: MultiColumnQuery | None) -> _Held:
    hidden = frozenset[int]() if together is None else covered(part, together)
    mine = 1 << COLUMNS.index(name)
    return _Held(part.columns[name], sum(n for bits, n in part.bits.items() if bits & mine and bits not in hidden))
