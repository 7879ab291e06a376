"""Searches the rows of a shard in several columns at once, such as the face and fingers.

Owns the scan of a group of rows, and the exact comparison of the best rows. Never plans (`plan.py`).

1. Some signs of each column (`signs.py`) are summed with the weights of the columns. About 3e-4 of the rows pass.
2. Rows that pass are compared by the high nibbles of all columns while these are in the cache. The log-likelihood ratios of the columns are
   added. Rows among a probe's best so far, or above a floor, are kept.
3. The best rows, and all rows above the floor, are compared exactly.
4. Rows of the journal have no signs. They are all compared exactly (`joint.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from math import sqrt
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from biodedup.gallery.files.codes import BLOCK_ROWS, product
from biodedup.gallery.segments.part import PIECE_ROWS, Column, Int64, Part
from biodedup.gallery.snapshot import Snapshot
from biodedup.search.multicolumn import joint
from biodedup.search.multicolumn.plan import (
    LlrTable,
    MultiColumnHits,
    MultiColumnPlan,
    MultiColumnQuery,
    RowGroup,
    codec_of,
    is_journal,
    row_groups_of,
)
from biodedup.search.native import scan_kernel
from biodedup.search.native.column_statistics import signs_of
from biodedup.search.native.exact_pairs import compared
from biodedup.search.native.scan_kernel import ScanProbes
from biodedup.search.native.scanner import Collected, Probes, Scanner, paired
from biodedup.search.native.signs import GROUP, LEVELS
from biodedup.search.native.table_tile import TableKind
from biodedup.search.native.tables import limits_of, rounding_variance, tables_of
from biodedup.values import Float32

_PAIRS_PER_UNIT = 1 << 24  # greatest number of pairs of a probe and a row in a thread's unit of work
_UNIT_ROWS = 1 << 13  # smallest unit: with fewer rows, handing the unit to a thread takes longer than its scan
_SAMPLE_BLOCKS = 64  # blocks of a group in which the signs of unrelated rows are measured
_RELEASE_PAIRS = 50_000  # after the comparison of more pairs, the memory that holds the read cells is released
_SLACK = 3.5  # standard deviations

# entries live as long as their part, so that values must not refer to the part
_cells: WeakKeyDictionary[Part, dict[tuple[tuple[int, ...], tuple[str, ...]], NDArray[np.int32]]] = WeakKeyDictionary()
_moments: WeakKeyDictionary[Part, dict[tuple[object, ...], tuple[Float32, Float32]]] = WeakKeyDictionary()


def search(
    scanner: Scanner, snapshot: Snapshot, parts: Sequence[Part], probes: Mapping[str, Float32], query: MultiColumnQuery
) -> MultiColumnHits:
    """The hits in some parts. probes: column -> float32 (q, d), unit rows."""
    pieces = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, bool))]
    scanned, groups = 0, []
    for part in parts:
        if query.joint and is_journal(part, query.columns):
            hits = joint.search(scanner, snapshot, part, probes, query)
            pieces.append((hits.which, hits.rows, hits.llr_db, hits.lone))
            scanned += hits.scanned
            continue
        for group in row_groups_of(part, query.columns):
            plan = query.plans.get(frozenset(group.columns))
            first = group.first_from(query.from_row)
            if plan is not None and first < group.count:
                groups.append(_GroupScan(snapshot, group, plan, probes, query))
                scanned += group.count - first
    if groups:
        pieces += _search_groups(scanner, groups, query)
    which, rows, llr_db, lone = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    return MultiColumnHits(which, rows, llr_db, scanned, sum(group.passed for group in groups), lone)


_Hits = tuple[Int64, Int64, Float32, NDArray[np.bool_]]
"""Probe number, row and llr_db of each hit, and whether it is a hit because of a lone finger."""


def _search_groups(scanner: Scanner, groups: Sequence[_GroupScan], query: MultiColumnQuery) -> list[_Hits]:
    """Scans all groups, and compares the best rows of all groups exactly."""
    floor = min(group.floor for group in groups)
    start = -np.inf if query.k else floor  # with k = 0 only rows above the floor are wanted
    collected = Collected(np.full(len(groups[0]), start, np.float32), 2 * query.k, floor)
    units = [(number, span) for number, group in enumerate(groups) for span in group.units(scanner.threads)]
    scanner.run(lambda unit: groups[unit[0]].scan(*unit, collected), units)
    hits, pieces = collected.best(), []
    for number, group in enumerate(groups):
        of_group = hits.number == number
        if of_group.any():
            which, members, llr_db = group.compare(scanner, hits.which[of_group], hits.cell[of_group])
            pieces.append((which, group.rows(members), llr_db, np.zeros(len(which), bool)))
    return pieces


class _GroupScan:
    """The scan of a group of rows for a batch of probes. floor: the estimated evidence from which every row is kept."""

    def __init__(
        self,
        snapshot: Snapshot,
        group: RowGroup,
        plan: MultiColumnPlan,
        vectors: Mapping[str, Float32],
        query: MultiColumnQuery,
    ) -> None:
        self._group, self._query, self._streamed = group, query, snapshot.streamed
        self._columns = {name: group.part.columns[name] for name in plan.columns}
        self._probes = {name: Probes(codec_of(column), vectors[name]) for name, column in self._columns.items()}
        self._live = snapshot.live_members(group.part, group.bits, group.positions, query.groups)
        self._cells = _cells_of(group, plan.columns)
        self._signed = self._signed_probes(plan)
        self._first = group.first_from(query.from_row)
        self.rows = group.rows
        self.floor = query.floor_llr_db - _slack_db(self._columns, query.llr_tables)
        self.passed = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._signed)

    def _signed_probes(self, plan: MultiColumnPlan) -> ScanProbes:
        probes = list(self._probes.values())
        used = tables_by_column(self._group, plan)
        numbers = [
            signs_of(column).numbers(probe.rotated, tables) * np.float32(weight)
            for column, probe, tables, weight in zip(self._columns.values(), probes, used, plan.weights, strict=True)
        ]
        all_numbers = np.ascontiguousarray(np.concatenate(numbers, axis=1))
        tables, steps, middles = tables_of(all_numbers.reshape(len(all_numbers), -1, TableKind.SIGNS), LEVELS)
        mean, covariance = _sign_moments(self._group, plan)
        variance = np.einsum("ij,ij->i", product(all_numbers, covariance), all_numbers)
        variance += rounding_variance(tables.shape[1], steps)
        z = np.float32(-ndtri(plan.share))
        limits = limits_of(product(all_numbers, mean[:, None])[:, 0] + z * np.sqrt(variance), steps, middles)
        return ScanProbes(
            codes=paired([probe.codes for probe in probes]),
            parameters=np.stack([probe.parameters() for probe in probes]),
            evidence=np.stack([self._query.llr_tables[name].llr_db for name in self._columns]),
            tables=tables,
            places=np.tile(np.minimum(np.arange(tables.shape[1], dtype=np.int32), sum(used) - 1), (len(tables), 1)),
            limits=limits,
            used=np.array(used, np.int64),
            kind=TableKind.SIGNS,
        )

    def units(self, threads: int) -> list[tuple[int, int]]:
        """The units of work for this many threads: (first member, end) of each."""
        by_pairs = max(_PAIRS_PER_UNIT // len(self._signed) // BLOCK_ROWS, 16) * BLOCK_ROWS
        by_threads = max(-(-self._group.count // (4 * threads)), _UNIT_ROWS) // BLOCK_ROWS * BLOCK_ROWS
        size, count = min(by_pairs, by_threads), self._group.count
        return [(low, min(low + size, count)) for low in range(self._first // size * size, count, size)]

    def scan(self, number: int, unit: tuple[int, int], collected: Collected) -> None:
        """Scans the members of a unit, and adds the hits to `collected`. number: of this group."""
        low, high = unit
        members, stored = None, []
        if self._cells is None:
            stored = [column.scanned(low, high) for column in self._columns.values()]
        else:
            members = self._cells[:, low:high]
            bases = members[:, 0] // BLOCK_ROWS * BLOCK_ROWS
            for column, cells, base in zip(self._columns.values(), members, bases.tolist(), strict=True):
                stored.append(column.scanned(base, int(cells[-1]) + 1))
            members = np.ascontiguousarray(members - bases[:, None])
        live = self._live[low // BLOCK_ROWS : -(-high // BLOCK_ROWS)]
        room = 2 * self._signed.room
        which, cells, llr_db = np.empty(room, np.int32), np.empty(room, np.int64), np.empty(room, np.float32)
        block, span = 0, (max(self._first - low, 0), high - low)
        while block < -(-(high - low) // BLOCK_ROWS):
            cuts, out = collected.cuts, (which, cells, llr_db)
            count, block, passed = scan_kernel.scan(
                columns=stored,
                members=members,
                live=live,
                span=span,
                start=block,
                probes=self._signed,
                cuts=cuts,
                out=out,
            )
            if count:
                collected.add(which[:count].copy(), number, cells[:count] + low, llr_db[:count].copy())
            with self._lock:
                self.passed += passed

    def compare(self, scanner: Scanner, which: NDArray[np.int32], members: Int64) -> tuple[Int64, Int64, Float32]:
        """Compares pairs of a probe and a member exactly: (probe, member, llr_db) of each."""
        order = np.argsort(members, kind="stable")  # the order on the disk
        which, members = which[order], members[order]
        exact = np.zeros(len(members), np.float32)

        def compare(low: int) -> None:
            piece = slice(low, low + PIECE_ROWS)
            for name, column in self._columns.items():
                cells = self._group.cells(name, members[piece])
                similarity = compared(column, cells, self._probes[name].rotated, which[piece])
                exact[piece] += self._query.llr_tables[name].at(similarity)

        scanner.each(compare, range(0, len(members), PIECE_ROWS))
        for column in self._columns.values() if len(members) > _RELEASE_PAIRS else ():
            column.release(forget=column in self._streamed)
        return which.astype(np.int64), members, exact


def _cells_of(group: RowGroup, columns: Sequence[str]) -> NDArray[np.int32] | None:
    """The cells of the group's members in each column, int32 (columns, n), or None if member i has cell i in each column."""
    held = [group.part.columns[name] for name in columns]
    if group.positions is None and all(column.full for column in held):
        return None
    known = _cells.setdefault(group.part, {})
    key = (group.bits, tuple(columns))
    if key not in known:
        members = np.arange(group.count)
        known[key] = np.stack([group.cells(name, members).astype(np.int32) for name in columns])
    return known[key]


def _sign_moments(group: RowGroup, plan: MultiColumnPlan) -> tuple[Float32, Float32]:
    """Mean (n,) and covariance (n, n), over a sample of the group, of the signs that the plan uses in all its columns."""
    known = _moments.setdefault(group.part, {})
    key = (group.bits, plan.columns, plan.groups)
    if key not in known:
        starts = np.unique(np.linspace(0, group.count - 1, _SAMPLE_BLOCKS).astype(np.int64) // BLOCK_ROWS)
        members = (starts[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).reshape(-1)
        members = members[members < group.count]
        by_column = []
        for name, tables in zip(plan.columns, tables_by_column(group, plan), strict=True):
            column = group.part.columns[name]
            cells, inverse = np.unique(group.cells(name, members), return_inverse=True)
            by_column.append(signs_of(column).of_codes(column.codes_at(cells)[0], tables)[inverse])
        signs = np.concatenate(by_column, axis=1)
        covariance = np.cov(signs.T).reshape(signs.shape[1], -1)
        known[key] = signs.mean(axis=0).astype(np.float32), covariance.astype(np.float32)
    return known[key]


def tables_by_column(group: RowGroup, plan: MultiColumnPlan) -> list[int]:
    """The number of sign tables that the plan uses, for each column."""
    limits = [signs_of(group.part.columns[name]).tables for name in plan.columns]
    return [min(GROUP * groups, limit) for groups, limit in zip(plan.groups, limits, strict=True)]


def _slack_db(columns: Mapping[str, Column], llr_tables: Mapping[str, LlrTable]) -> float:
    """An upper bound of the error of the estimated evidence: the errors of all columns, each at the steepest part of its table."""
    variance = 0.0
    for name, column in columns.items():
        llr_db = llr_tables[name].llr_db
        steepest = float(np.diff(llr_db).max()) * (len(llr_db) - 1) / 2
        variance += (steepest * max(codec_of(column).law.sd)) ** 2
    return _SLACK * sqrt(variance)
