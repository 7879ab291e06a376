"""The plan of a search: what is scanned, what that may miss, and on what evidence.

Owns the statement. The search itself follows the same codecs (`shard.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from biodedup.gallery.part import Column
from biodedup.gallery.snapshot import Snapshot
from biodedup.search.shard import by_codec, shares


@dataclass(frozen=True)
class ColumnPlan:
    """How one column is searched.

    rows: that have it; coded_rows: of these, scanned by code (the others are compared exactly); scanned_bytes: of each;
    share: of the rows that is looked at; margin: standard deviations of the estimate's error that a cut leaves; error_sd: one of
    these, in similarity at 0.5; miss_bound: the probability of a miss is below it with 95 % confidence, or None where the
    pairs set aside are too few to say so; checked: how many pairs these are; source: of the vectors they were made from.
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


@dataclass(frozen=True)
class SearchPlan:
    """What a search of these columns does. miss_risk: as it was asked for."""

    miss_risk: float
    columns: tuple[ColumnPlan, ...]

    def explain(self) -> str:
        """In words, with the evidence; a line a column."""
        return "\n".join(self._line(plan) for plan in self.columns)

    def _line(self, plan: ColumnPlan) -> str:
        start = (
            f"{plan.column}: all of {plan.rows:,} rows are looked at, {plan.rows - plan.coded_rows:,} of them exactly"
        )
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
        return f"{start}; {error}; {margin}: {evidence}"


@dataclass(frozen=True)
class _Of:
    column: Column


def plan_of(snapshot: Snapshot, columns: tuple[str, ...], miss_risk: float) -> SearchPlan:
    """The plan of a search of these columns of a snapshot, as it is."""
    return SearchPlan(miss_risk, tuple(_column(snapshot, column, miss_risk) for column in columns))


def _column(snapshot: Snapshot, name: str, miss_risk: float) -> ColumnPlan:
    columns = [part.columns[name] for part in snapshot.parts if name in part.columns]
    rows = sum(column.count for column in columns)
    holding = [[_Of(part.columns[name]) for part in parts if name in part.columns] for parts in shares(snapshot)]
    coded = [of.column for pieces in holding for group in by_codec(pieces)[1] for of in group]
    if not coded:
        return ColumnPlan(name, rows, 0, 0, 1.0, 0.0, 0.0, 0.0, 0, "sample")
    codec = max(coded, key=lambda column: column.count).codec
    assert codec is not None, "these have one"
    law = codec.law
    z, measured = law.margin(miss_risk) if miss_risk > 0 else (0.0, True)
    bound = law.risk_bound(sum(value < -z for value in law.lowest)) if measured and miss_risk > 0 else None
    scanned_bytes = codec.scanned // 2 + 4
    coded_rows = sum(column.count for column in coded)
    middle = law.similarity.index(0.5)
    return ColumnPlan(name, rows, coded_rows, scanned_bytes, 1.0, z, law.sd[middle], bound, law.checked, law.source)
