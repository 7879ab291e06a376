"""Chooses how a search compares face and fingers together, in rows that have several of the captures that the probe has.

Owns the plan of a multi-column search, the groups of rows that it applies to, and what it may miss. Never scans
(`scan.py`).

Why several at once: a mate whose face has aged and whose finger is dry is far down in either column, but hardly any
unrelated row is as near in both. One pass over some signs of all columns needs less arithmetic than one column by
itself, and loses fewer mates.

How: `choose` draws mates from the columns' calibrations, sends them through the measured distribution of sums of signs,
and takes the cheapest plan that loses no more than the miss risk of those that would reach the decision threshold.

Invariant: rows are grouped by which of the columns they have, so that a missing capture is never evidence.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, lru_cache
from math import sqrt
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from biodedup.common.intervals import upper_bound
from biodedup.errors import GalleryDamaged
from biodedup.gallery.files.codec import Codec
from biodedup.gallery.segments.part import Column, Int64, Part
from biodedup.gallery.segments.tail import TailPart
from biodedup.gallery.snapshot import Snapshot
from biodedup.match.scores.calibration import Calibration
from biodedup.search import costs
from biodedup.search.native.column_statistics import signs_of
from biodedup.search.native.dot_kernel import INSTRUCTIONS
from biodedup.search.native.signs import GROUP
from biodedup.values import BIT, COLUMNS, Float32

ROWS_MIN = 1 << 14
"""A group of fewer rows is searched column by column."""
_MATES = 160_000  # drawn; half choose the plan, half confirm it
_FEW_MATES = 16_384  # of these, that tell which group of signs says least
_SHARE_LEAST = 1e-5  # of unrelated rows that pass
_SEED = 2_011


@dataclass(frozen=True)
class LlrTable:
    """llr_db of one column, float32 (n,), at similarities 2 / (n - 1) apart, from -1 to 1."""

    llr_db: Float32

    @classmethod
    def of(cls, calibration: Calibration) -> LlrTable:
        return _llr_table(calibration)

    def at(self, similarity: Float32) -> Float32:
        last = len(self.llr_db) - 1
        index = np.rint((similarity + 1) * np.float32(last / 2)).astype(np.int32)
        return np.asarray(self.llr_db[np.clip(index, 0, last)])


_GRID = np.linspace(-1, 1, 20_001)


@lru_cache(maxsize=64)  # each decision asks for it, and a calibration never changes
def _llr_table(calibration: Calibration) -> LlrTable:
    return LlrTable(calibration.llr_db(_GRID).astype(np.float32))


@lru_cache(maxsize=512)
def llr_of_score(calibration: Calibration, score_db: float) -> float:
    """The llr_db of the least similarity that scores score_db; infinite if none does."""
    scores_db = calibration.score_db(_GRID)
    at = int(np.searchsorted(scores_db, score_db))
    return float(_llr_table(calibration).llr_db[at]) if at < len(scores_db) else np.inf


@dataclass(frozen=True)
class MultiColumnPlan:
    """How rows with these columns are searched.

    groups: of each column, how many groups of GROUP sign tables are looked up; signs: how many signs these know;
    weights: of each column's signs; share: of unrelated rows that pass. cost: relative to a search of one column by
    itself.

    correlation: between the captures of a subject, as assumed; drawn: mates that would reach the threshold and were set
    aside to confirm the plan; missed: of these. Of all mates, whatever they reach: joint, the share that is missed;
    single, for each column the share that all its signs alone would miss, if as many unrelated rows passed.
    """

    columns: tuple[str, ...]
    groups: tuple[int, ...]
    signs: tuple[int, ...]
    weights: tuple[float, ...]
    share: float
    cost: float
    correlation: float
    drawn: int
    missed: int
    single: tuple[float, ...]
    joint: float

    @property
    def miss_bound(self) -> float:
        """The upper end of the one-sided 95 % interval of the miss rate."""
        return float(upper_bound(self.missed, self.drawn))


@dataclass(frozen=True)
class MultiColumnQuery:
    """What a shard is asked for: for each probe the k rows with the most evidence, and all rows of at least
    floor_llr_db. It covers the rows whose columns have a plan; llr_tables: of each column.

    joint: it also covers the rows of the journal that have several of the columns (`joint.py`). lone_db: of each finger the llr_db from
    which such a row is wanted whatever its other captures say.
    """

    plans: Mapping[frozenset[str], MultiColumnPlan]
    llr_tables: Mapping[str, LlrTable]
    k: int
    floor_llr_db: float = np.inf
    groups: frozenset[str] | None = None
    from_row: int = 0
    joint: bool = False
    lone_db: Mapping[str, float] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(sorted(self.llr_tables))


@dataclass(frozen=True)
class MultiColumnHits:
    """Rows found: probe number, row and sum of llr_db of each, (n,). rows_scanned: for each probe; passed: pairs of a
    probe and a row that the signs let through. lone: bool (n,), which rows are wanted for one finger; None for none."""

    which: Int64
    rows: Int64
    llr_db: Float32
    rows_scanned: int
    passed: int
    lone: NDArray[np.bool_] | None = None


# groups of rows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RowGroup:
    """The rows of a part that have the same of a probe's columns. positions: of its members, ascending, or None for all
    rows of the part; bits: the presence masks of its rows."""

    part: Part
    columns: tuple[str, ...]
    positions: Int64 | None
    count: int
    bits: tuple[int, ...]

    def rows(self, members: Int64) -> Int64:
        return self.part.rows(members if self.positions is None else self.positions[members])

    def cells(self, column: str, members: Int64) -> Int64:
        at = members if self.positions is None else self.positions[members]
        cells = self.part.columns[column].cells_at(at)
        if len(cells) and cells.min() < 0:
            raise GalleryDamaged(f"column {column} lacks templates of rows that have one; run `biodedup doctor`")
        return cells

    def first_from(self, row: int) -> int:
        """The first member whose row is at least this one."""
        low, _ = self.part.position_range(row, self.part.end_row)
        return low if self.positions is None else int(np.searchsorted(self.positions, low))


# Kept for as long as the part lives: the values must not hold the part itself.
_positions: WeakKeyDictionary[Part, dict[tuple[int, ...], Int64 | None]] = WeakKeyDictionary()
_positions_lock = threading.Lock()


def row_groups_of(part: Part, columns: Collection[str]) -> Iterator[RowGroup]:
    """The part's groups of rows that can be searched in two or more of these columns at once."""
    sets: dict[tuple[str, ...], list[int]] = {}
    for bits in part.bits:
        sets.setdefault(tuple(c for c in sorted(columns) if bits >> COLUMNS.index(c) & 1), []).append(bits)
    for names, masks in sets.items():
        coded = all(part.columns[name].codec is not None for name in names)
        count = sum(part.bits[bits] for bits in masks)
        if len(names) < 2 or not coded or count < ROWS_MIN:
            continue
        key = tuple(sorted(masks))
        with _positions_lock:
            known = _positions.setdefault(part, {})
            if key not in known:
                all_rows = count == part.count
                known[key] = None if all_rows else np.flatnonzero(np.isin(part.presence(0, part.count), key))
            positions = known[key]
            if positions is not None and len(positions) != count:
                raise GalleryDamaged("rows have other templates than their segment says; run `biodedup doctor`")
        yield RowGroup(part, names, positions, count, key)


def covered_presences(part: Part, query: MultiColumnQuery) -> frozenset[int]:
    """The presence masks of the part's rows that the query covers."""
    if query.joint and is_journal(part, query.columns):
        columns = sum(BIT[column] for column in query.columns)
        return frozenset(bits for bits in part.bits if (bits & columns).bit_count() > 1)
    groups = (group for group in row_groups_of(part, query.columns) if frozenset(group.columns) in query.plans)
    return frozenset(bits for group in groups for bits in group.bits)


def is_journal(part: Part, columns: Collection[str]) -> bool:
    """Whether the part is the journal, with rows in these columns. Sealed columns of early releases have no codes either, but may be large,
    and searched elsewhere."""
    return isinstance(part, TailPart) and any(name in part.columns for name in columns)


def largest_groups(snapshot: Snapshot, columns: Collection[str]) -> dict[frozenset[str], RowGroup]:
    """The sets of these columns that rows can be searched in at once, and the largest group of each."""
    largest: dict[frozenset[str], RowGroup] = {}
    for part in snapshot.parts:
        for group in row_groups_of(part, columns):
            known = largest.get(frozenset(group.columns))
            if known is None or known.count < group.count:
                largest[frozenset(group.columns)] = group
    return largest


def codec_of(column: Column) -> Codec:
    assert column.codec is not None, "only coded columns are searched at once"
    return column.codec


# the choice --------------------------------------------------------------------------------------------------------


def choose(
    group: RowGroup,
    calibrations: Mapping[str, Calibration],
    miss_risk: float,
    threshold_llr_db: float,
    correlation: float,
) -> MultiColumnPlan | None:
    """The cheapest plan for rows like this group's that misses at most this share of the mates that reach the
    threshold. correlation: between how well two captures of a subject match, as ranks on a normal scale. None if no
    plan is cheaper than a scan of each column by itself."""
    draw = Draw(group, calibrations, miss_risk, threshold_llr_db, correlation)
    cost_of = costs.AVX2_MULTI_COLUMN_COSTS if INSTRUCTIONS == "avx2" else costs.MULTI_COLUMN_COSTS
    options, groups = [], draw.most
    while True:
        for share in (max(share, _SHARE_LEAST) for share in draw.shares(groups)):
            cost = GROUP * sum(groups) + len(groups) * (cost_of.taken + cost_of.compared * share)
            options.append((cost, groups, share))
        fewer = [c for c, n in enumerate(groups) if n and sum(groups) > 1]
        if not options or not fewer:
            break
        least = fewer[int(np.argmin([draw.share_without(groups, c) for c in fewer]))]
        groups = (*groups[:least], groups[least] - 1, *groups[least + 1 :])
    for cost, groups, share in sorted(options):
        if cost < cost_of.one_column * len(groups) and draw.bound(groups, share) <= miss_risk:
            return draw.plan(groups, share, cost / cost_of.one_column)
    return None


class Draw:
    """Mates and unrelated rows, drawn from what is known of each column."""

    def __init__(
        self,
        group: RowGroup,
        calibrations: Mapping[str, Calibration],
        miss_risk: float,
        threshold_llr_db: float,
        correlation: float,
    ) -> None:
        self._columns, self._correlation = {name: group.part.columns[name] for name in group.columns}, correlation
        rng = np.random.default_rng(_SEED)
        llr_db = np.zeros(_MATES)
        mates, unrelated = [], []
        common = sqrt(correlation) * rng.standard_normal(_MATES)
        with ThreadPoolExecutor(thread_name_prefix="biodedup-plan") as pool:  # a column takes a quarter of a second
            laws = list(pool.map(lambda column: signs_of(column).groups, self._columns.values()))
        for name, law in zip(self._columns, laws, strict=True):
            quantiles = ndtr(common + sqrt(1 - correlation) * rng.standard_normal(_MATES))
            similarity = calibrations[name].mated_similarities(quantiles)
            llr_db += calibrations[name].llr_db(similarity)
            mates.append(np.cumsum(law.mated(similarity, rng), axis=0).astype(np.float32))
            unrelated.append(law.unrelated)
        self.most = tuple(len(sums) for sums in mates)
        # Fisher's linear discriminant: what separates mates from unrelated rows best, column by column
        weights = [(m[-1].mean() - u[-1, 0]) / (m[-1].var() + u[-1, 1]) for m, u in zip(mates, unrelated, strict=True)]
        self._weights = tuple(float(max(w, 1e-6) / max(weights)) for w in weights)
        self._mates = [
            np.pad(sums, ((1, 0), (0, 0))) * np.float32(w) for sums, w in zip(mates, self._weights, strict=True)
        ]
        self._unrelated = [u * (w, w * w) for u, w in zip(unrelated, self._weights, strict=True)]
        reaching = llr_db >= threshold_llr_db
        self._to_choose, self._to_confirm = (np.flatnonzero(reaching[half::2]) * 2 + half for half in (0, 1))
        lost = np.arange(int(miss_risk * len(self._to_choose)) + 1)
        bounds = upper_bound(lost, len(self._to_choose))
        self._may_lose = int(np.searchsorted(bounds, miss_risk, side="right")) - 1
        self.shares = cache(self._shares)
        self._few = self._to_choose[:_FEW_MATES]
        self._without: tuple[tuple[int, ...], Float32] = (), np.zeros(0, np.float32)

    def share_without(self, groups: tuple[int, ...], column: int) -> float:
        """About the share of unrelated rows that has to pass with one group of this column less, from some of the mates: it tells which
        group says least."""
        if self._without[0] != groups:
            self._without = (
                groups,
                np.sum([mates[n, self._few] for mates, n in zip(self._mates, groups, strict=True)], axis=0),
            )
        fewer = tuple(n - (c == column) for c, n in enumerate(groups))
        sums, mates = self._without[1], self._mates[column]
        sums = sums - mates[groups[column], self._few] + mates[fewer[column], self._few]
        mean, variance = sum(unrelated[n] for unrelated, n in zip(self._unrelated, fewer, strict=True))
        lost = self._may_lose * len(self._few) // max(len(self._to_choose), 1)
        return float(ndtr(-(np.partition(sums, lost)[lost] - mean) / np.sqrt(variance)))

    def _z(self, groups: tuple[int, ...]) -> Float32:
        """The mates' sums, in standard deviations of the unrelated rows' sums above their mean."""
        mean, variance = sum(unrelated[n] for unrelated, n in zip(self._unrelated, groups, strict=True))
        sums = sum(mates[n] for mates, n in zip(self._mates, groups, strict=True))
        return np.asarray((sums - mean) / np.sqrt(variance), np.float32)

    def _shares(self, groups: tuple[int, ...]) -> list[float]:
        """Shares of unrelated rows that have to pass so that no more mates are lost than the risk, and safer ones;
        ascending. Empty if there are too few mates to tell."""
        if self._may_lose < 0:
            return []
        lost = sorted({self._may_lose, self._may_lose * 2 // 3, self._may_lose // 3}, reverse=True)
        z = np.partition(self._z(groups)[self._to_choose], lost)
        return [float(ndtr(-z[n])) for n in lost]

    def bound(self, groups: tuple[int, ...], share: float) -> float:
        """The upper bound of the share of mates that is lost, from those set aside (MultiColumnPlan.miss_bound)."""
        return float(upper_bound(self._lost(groups, share), len(self._to_confirm)))

    def _lost(self, groups: tuple[int, ...], share: float) -> int:
        return int((self._z(groups)[self._to_confirm] < -ndtri(share)).sum())

    def plan(self, groups: tuple[int, ...], share: float, cost: float) -> MultiColumnPlan:
        z_min = -ndtri(share)
        single = [
            float((self._z(tuple(n if i == c else 0 for i, n in enumerate(self.most))) < z_min).mean())
            for c in range(len(groups))
        ]
        by_column = zip(self._columns.values(), groups, strict=True)
        return MultiColumnPlan(
            columns=tuple(self._columns),
            groups=groups,
            signs=tuple(signs_of(column).count(GROUP * n) for column, n in by_column),
            weights=self._weights,
            share=share,
            cost=cost,
            correlation=self._correlation,
            drawn=len(self._to_confirm),
            missed=self._lost(groups, share),
            single=tuple(single),
            joint=float((self._z(groups) < z_min).mean()),
        )
