"""Describes a search before it is made: the rows that it scans, its miss risk, and the evidence for this risk.

Owns the description. Never searches. A search uses the same codecs (`shards/native.py`), multi-column plans (`multicolumn/plan.py`) and
buckets (`selfjoin/buckets.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from biodedup.gallery.files.index_codec import MATED_SIMILARITY
from biodedup.gallery.segments.part import Column, Part
from biodedup.gallery.snapshot import Snapshot
from biodedup.search.multicolumn.apart import ApartPlan
from biodedup.search.multicolumn.joint import JointPlan
from biodedup.search.multicolumn.plan import MultiColumnPlan, MultiColumnQuery, covered_presences, row_groups_of
from biodedup.search.multicolumn.scanned import ScannedPlan
from biodedup.search.native.column_statistics import classes_of
from biodedup.search.selfjoin.buckets import Buckets
from biodedup.search.selfjoin.estimate import JoinEstimate
from biodedup.search.shards import faiss as faiss_engine
from biodedup.search.shards.cells import by_codec
from biodedup.search.shards.native import shares, tables_for
from biodedup.values import BIT


@dataclass(frozen=True)
class ColumnPlan:
    """How a column is searched, without the rows that are searched in several columns at once.

    rows: the rows with the column. coded_rows: the rows that are scanned by their codes; all others are compared exactly. scanned_bytes: bytes
    of a scanned code. share: the share of rows that is scanned. margin: distance between the wanted similarity and the cut-off, in standard
    deviations of the estimate's error. error_sd: this standard deviation at similarity 0.5. miss_bound: the probability of a miss is below it
    with 95 % confidence; None if the pairs that were set aside are too few. checked: the number of these pairs. source: the vectors that they
    were made from. by_tables: the same bound if table look-ups exclude rows first, otherwise None. index: how the FAISS engine searches the
    column, or None.
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
    by_tables: float | None = None
    index: IndexPlan | None = None


@dataclass(frozen=True)
class IndexPlan:
    """How the FAISS engine searches a column.

    spec: the column's engine. rows: the column's rows in segments with an index. lists: (inverted lists that a search reads, number of lists),
    or None for an index without lists. error_sd, margin, miss_bound, checked: as in `ColumnPlan`, for mates in lists that are read.
    lost_bound: upper bound of the probability that a mate of MATED_SIMILARITY or more is in another list. lost: (similarity, share of the
    mates in other lists). used: whether the index keeps the miss risk; if not, the native engine searches.
    """

    spec: str
    rows: int
    lists: tuple[int, int] | None = None
    error_sd: float = 0.0
    margin: float = 0.0
    miss_bound: float | None = None
    checked: int = 0
    lost_bound: float = 0.0
    lost: tuple[tuple[float, float], ...] = ()
    used: bool = False


@dataclass(frozen=True)
class ColumnBytes:
    """Bytes of a column per subject of the gallery. scanned: bytes that a search reads, and that must be in memory for a fast search. disk:
    bytes of the column's file, with qualities and minutiae."""

    column: str
    scanned: float
    disk: float


@dataclass(frozen=True)
class SearchPlan:
    """The plan of a search of these columns.

    miss_risk: the configured risk. columns: of each column. multicolumn: (number of rows, plan) of rows that are searched in several columns
    at once. apart: the miss risk of columns that are searched one after the other, or None. scanned: the columns that are scanned; None if
    all are scanned. sizes: of each column. joint: how rows of the journal are compared in several columns at once, or None.
    """

    miss_risk: float
    columns: tuple[ColumnPlan, ...]
    multicolumn: tuple[tuple[int, MultiColumnPlan], ...] = ()
    apart: ApartPlan | None = None
    scanned: ScannedPlan | None = None
    sizes: tuple[ColumnBytes, ...] = ()
    joint: JointPlan | None = None

    def explain(self) -> str:
        """The plan as text with the evidence: lines for rows that are searched in several columns at once, and a line for each column."""
        lines = [] if self.scanned is None else [self._scanned_line(self.scanned)]
        lines += [self._multicolumn_line(rows, plan) for rows, plan in self.multicolumn]
        lines += [self._joint_line(self.joint)] if self.joint is not None else []
        for plan in self.columns:
            lines.append(self._line(plan))
            if plan.index is not None:
                lines.append(self._index_line(plan.column, plan.index))
        lines += [self._apart_line(self.apart)] if self.apart is not None else []
        return "\n".join([*lines, self._bytes_line()] if self.sizes else lines)

    def _scanned_line(self, plan: ScannedPlan) -> str:
        others = " + ".join(plan.rescored)
        if not plan.scanned:
            return f"{others}: the setting scanned names none of them, so that all are scanned"
        start = f"{' + '.join(plan.scanned)}: these columns alone are scanned; {others} are compared for {plan.candidates:,} candidates"
        start += ", and scanned only for rows without a scanned column"
        if not plan.drawn:
            return f"{start}; the miss risk is unknown, because no mates were measured"
        return (
            f"{start}; of {plan.drawn:,} mates that reach the review threshold by all columns, drawn from their calibrations, {plan.missed:,} "
            f"are no candidates, so that this misses a mate with a probability below {plan.miss_bound:.2g}, 95 % confidence, in addition to "
            f"the scan, if captures of a subject correlate by {plan.correlation:g}"
        )

    def _bytes_line(self) -> str:
        scanned = ", ".join(f"{size.column} {size.scanned:,.0f}" for size in self.sizes if size.scanned >= 0.5)
        return (
            f"bytes a subject: {sum(size.scanned for size in self.sizes):,.0f} that a search reads in memory"
            f"{f' ({scanned})' if scanned else ''}, {sum(size.disk for size in self.sizes):,.0f} of sealed templates on disk"
        )

    def _index_line(self, column: str, index: IndexPlan) -> str:
        if not index.rows:
            return f"{column}: no segment has an index {index.spec} yet; the native engine searches"
        start = f"{column}: {index.rows:,} rows have an index {index.spec}"
        if not index.used:
            return (
                f"{start}, which loses a mate of cosine {MATED_SIMILARITY} or more with a probability of up to {index.lost_bound:.2g} "
                f"(asked for: {self.miss_risk:g}); the native engine searches"
            )
        text = f"{start}; FAISS estimates them, and rows down to {index.margin:.2f} standard deviations ({index.error_sd:.4f} each) "
        text += "below the wanted similarity are compared exactly: "
        if index.miss_bound is None:
            text += f"a risk of {self.miss_risk:g} by the normal distribution"
        else:
            text += f"a row is missed with a probability below {index.miss_bound:.2g}"
        text += f" (asked for: {self.miss_risk:g}), from {index.checked:,} planted mates"
        if index.lists is None:
            return text
        read, lists = index.lists
        text += f"; a search reads {read:,} of {lists:,} lists"
        if read < lists:
            shares = ", ".join(
                f"{share:.2g} at {similarity:g}" for similarity, share in index.lost if similarity >= 0.3
            )
            text += f", so that further mates are lost: {shares} of the mates at this cosine"
        return text

    def _apart_line(self, apart: ApartPlan) -> str:
        return (
            f"{' + '.join(apart.columns)}: searched one after the other, {apart.candidates:,} candidates each, whose evidence is added "
            f"afterwards; of {apart.drawn:,} mates that reach the review threshold, drawn from the columns' calibrations, {apart.missed:,} "
            f"are among the candidates of no column, so that a mate is missed with a probability below {apart.miss_bound:.2g}, 95 % "
            f"confidence, if captures of a subject correlate by {apart.correlation:g}"
        )

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

    def _joint_line(self, plan: JointPlan) -> str:
        text = f"{' + '.join(plan.columns)}: {plan.rows:,} rows of the journal are compared exactly in all of them at once; "
        text += "no row can be missed that has more evidence than the other candidates"
        if not plan.missed:
            return text
        return (
            f"{text}; so that a single finger that agrees alone is found, about {plan.lone_rows} more rows of each finger are candidates: of "
            f"such fingers that reach the duplicate threshold, {plan.missed:.1%} are missed, by their calibration, if embedding and minutiae "
            f"of a mate are independent"
        )

    def _line(self, plan: ColumnPlan) -> str:
        others = "other " if self.multicolumn or self.joint else ""
        by_index = plan.index.rows if plan.index is not None and plan.index.used else 0
        exact = plan.rows - plan.coded_rows - by_index
        start = f"{plan.column}: all of {plan.rows:,} {others}rows are looked at, {exact:,} of them exactly"
        if by_index:
            start += f", {by_index:,} by their FAISS index"
        if not plan.coded_rows:
            return start if by_index else f"{start}; no row can be missed"
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
        if plan.by_tables is None:
            batches = "no table look-ups are used, since their pairs are too few to confirm the risk"
        else:
            batches = f"with table look-ups first, both steps together miss it below {plan.by_tables:.2g}"
        return f"{start}; {error}; {margin}: {evidence}; {batches}"


@dataclass(frozen=True)
class JoinPlan:
    """The plan of a self-join, which compares every row with every other row. buckets: None if it compares all pairs."""

    buckets: Buckets | None
    miss_risk: float
    estimate: JoinEstimate

    def explain(self) -> str:
        """The plan as text with the evidence."""
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
class _ColumnCells:
    """A column of a part, and the number of its cells that no multi-column plan covers."""

    column: Column
    cells: int


def plan_of(
    snapshot: Snapshot,
    columns: tuple[str, ...],
    miss_risk: float,
    multicolumn: MultiColumnQuery | None = None,
    apart: ApartPlan | None = None,
    scanned: ScannedPlan | None = None,
    joint: JointPlan | None = None,
) -> SearchPlan:
    """The plan of a search of these columns of a snapshot."""
    skip = (
        {name: sum(BIT[other] for other in scanned.scanned) for name in scanned.others} if scanned is not None else {}
    )
    rows: dict[frozenset[str], int] = {}
    if multicolumn is not None:
        for part in snapshot.parts:
            for group in row_groups_of(part, multicolumn.columns):
                rows[frozenset(group.columns)] = rows.get(frozenset(group.columns), 0) + group.count
    plans = tuple((rows[names], plan) for names, plan in multicolumn.plans.items()) if multicolumn else ()
    by_column = [_column(snapshot, c, miss_risk, multicolumn, skip.get(c, 0)) for c in columns]
    sizes = tuple(_bytes_of(snapshot, c, skip.get(c, 0)) for c in columns)
    by_column = [replace(plan, index=_index_plan(snapshot, plan.column, miss_risk)) for plan in by_column]
    return SearchPlan(
        miss_risk=miss_risk,
        columns=tuple(by_column),
        multicolumn=plans,
        apart=apart,
        scanned=scanned,
        sizes=sizes,
        joint=joint,
    )


def _bytes_of(snapshot: Snapshot, name: str, skip: int) -> ColumnBytes:
    """The bytes of a column. skip: as `ShardQuery.skip_columns`."""
    held = [(part, part.columns[name]) for part in snapshot.parts if name in part.columns]
    scanned, disk = 0, sum(sum(column.byte_counts) for _, column in held)
    for part, column in held:
        rows = sum(count for bits, count in part.bits.items() if bits & BIT[name] and not bits & skip)
        if column.codec is not None:  # signs, outer bits, high nibbles and norm
            scanned += rows * (column.codec.scanned * 3 // 4 + 4)
        elif column.dimension is not None:
            scanned += rows * 4 * column.dimension
    subjects = max(snapshot.searched_count, 1)
    return ColumnBytes(name, scanned / subjects, disk / subjects)


def _index_plan(snapshot: Snapshot, name: str, miss_risk: float) -> IndexPlan | None:
    """How FAISS searches the column; None for a column of the native engine without an index."""
    columns = [part.columns[name] for part in snapshot.parts if name in part.columns]
    indexed = [column for column in columns if column.index is not None]
    spec = snapshot.indexing.spec(name)
    if spec.is_native and not indexed:
        return None
    if not indexed:
        return IndexPlan(str(spec), 0)
    largest = max(indexed, key=lambda column: column.count)
    assert largest.index is not None, "only columns with an index"
    codec = snapshot.indexing.codec(name, largest.index.codec_id)
    rows = sum(column.count for column in indexed)
    if codec is None:
        return IndexPlan(str(spec), rows, lost_bound=1.0)
    tail_risk = codec.tail_risk(miss_risk)
    margin = codec.law.margin(tail_risk)[0] if miss_risk > 0 else 0.0
    return IndexPlan(
        spec=str(codec.spec),
        rows=rows,
        lists=codec.lists,
        error_sd=codec.law.sd[codec.law.similarity.index(0.5)],
        margin=margin,
        miss_bound=codec.law.bound(tail_risk) if miss_risk > 0 else None,
        checked=codec.law.checked,
        lost_bound=codec.lost_bound,
        lost=tuple(zip(codec.law.similarity, codec.lost, strict=True)),
        used=faiss_engine.usable_codec(snapshot, name, largest, miss_risk) is not None,
    )


_TABLE_SHARE = 0.625  # share of the number pairs that the tables of most searches cover


def _column(
    snapshot: Snapshot, name: str, miss_risk: float, multicolumn: MultiColumnQuery | None, skip: int
) -> ColumnPlan:
    holding = [
        [_cells_left(part, name, multicolumn, skip) for part in parts if name in part.columns]
        for parts in shares(snapshot.parts)
    ]
    rows = sum(held.cells for pieces in holding for held in pieces)
    holding = [
        [h for h in pieces if not faiss_engine.usable_codec(snapshot, name, h.column, miss_risk)] for pieces in holding
    ]
    coded = [held for pieces in holding for group in by_codec(h for h in pieces if h.cells)[1] for held in group]
    if not coded:
        return ColumnPlan(
            column=name,
            rows=rows,
            coded_rows=0,
            scanned_bytes=0,
            share=1.0,
            margin=0.0,
            error_sd=0.0,
            miss_bound=0.0,
            checked=0,
            source="sample",
        )
    codec = max(coded, key=lambda held: held.column.count).column.codec
    assert codec is not None, "only columns with a codec"
    law = codec.law
    z = law.margin(miss_risk)[0] if miss_risk > 0 else 0.0
    scanned_bytes = codec.scanned // 4
    coded_rows = sum(held.cells for held in coded)
    middle = law.similarity.index(0.5)
    by_tables = None
    if miss_risk > 0:
        largest = max((held.column for held in coded), key=lambda column: column.count)
        by_tables = classes_of(largest, tables_for(codec.scanned, _TABLE_SHARE)).error_distributions[0].bound(miss_risk)
    return ColumnPlan(
        column=name,
        rows=rows,
        coded_rows=coded_rows,
        scanned_bytes=scanned_bytes,
        share=1.0,
        margin=z,
        error_sd=law.sd[middle],
        miss_bound=law.bound(miss_risk) if miss_risk > 0 else None,
        checked=law.checked,
        source=law.source,
        by_tables=by_tables if by_tables is not None and by_tables < 1 else None,
    )


def _cells_left(part: Part, name: str, multicolumn: MultiColumnQuery | None, skip: int) -> _ColumnCells:
    covered = frozenset[int]() if multicolumn is None else covered_presences(part, multicolumn)
    left = [n for bits, n in part.bits.items() if bits & BIT[name] and not bits & skip and bits not in covered]
    return _ColumnCells(part.columns[name], sum(left))
