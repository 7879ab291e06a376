"""Several columns searched together: what the captures of a probe say adds up before anything is cut.

Owns the search of rows that have two or more of a probe's columns, in one shard, and the choice of how far it goes. A mate whose face has
aged and whose finger is dry is far down in either column, but hardly any stranger is as near in both; so one pass over some signs
of all columns needs less arithmetic than one column by itself, and loses fewer mates.

1. Signs of all columns, some of each (`signs.py`): their sums, weighted by what a column is worth, let a share of about 3e-4 pass.
2. Of these, while they are in the cache, the upper halves of all columns estimate similarities; their evidence adds as log-likelihood
   ratios, and what is among a probe's best so far, or reaches a floor, is kept.
3. The best are compared exactly, and so is whatever reaches the floor.

How many signs and which share: `choose` draws mates from the columns' calibrations, sends them through the measured law of 1, and
takes the cheapest that loses no more than the miss risk of those that would reach the decision threshold. Rows are kept apart by
what they have, so that a missing capture is no evidence.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import sqrt
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from biodedup.errors import GalleryDamaged
from biodedup.gallery.files.codec import Codec
from biodedup.gallery.files.codes import BLOCK_ROWS, turned
from biodedup.gallery.segments.part import PIECE_ROWS, Column, Int64, Part
from biodedup.gallery.snapshot import Snapshot
from biodedup.intervals import upper_bound
from biodedup.match.calibration import Calibration
from biodedup.search.native import sign_kernel
from biodedup.search.native.column_statistics import signs_of
from biodedup.search.native.exact_pairs import compared
from biodedup.search.native.scan_kernel import INSTRUCTIONS
from biodedup.search.native.scanner import Collected, Probes, Scanner
from biodedup.search.native.sign_kernel import SignedProbes
from biodedup.search.native.sign_tile import SIGNED
from biodedup.search.native.signs import (
    GROUP,
    NOT_SEEDED,
    SIGN,
    filled,
    limits_of,
    paired,
    rounding_variance,
    tables_of,
)
from biodedup.values import COLUMNS, Float32

ROWS_MIN = 1 << 16
"""A class of fewer rows is searched column by column."""
_UNIT = 1 << 24  # pairs of a probe and a row that a thread takes on at once
_SAMPLE_BLOCKS = 64  # of a class, that say what signs of strangers are
_RELEASE_PAIRS = 50_000  # compared, after which the memory of what was read is given back
_SLACK = 3.5  # standard deviations
_MATES = 160_000  # drawn to choose by; half choose, half confirm
_SHARE_LEAST = 1e-5
_SEED = 2_011
# Costs of a row, in tables that its signs are looked up in: taking a column's out of a block, once for all probes; a comparison by
# upper halves of one column; and a whole search of one column by itself. Measured; benchmarks/columns.py measures the sum. Wider
# registers make look-ups cheaper, not comparisons, whose rows come from all over the cache.
_TAKEN, _COMPARED, _ALONE = (0.0, 900.0, 64.0) if INSTRUCTIONS == "avx2" else (8.0, 5_900.0, 98.0)


@dataclass(frozen=True)
class Evidence:
    """llr_db of a column at similarities 2 / (n - 1) apart, from -1 to 1."""

    llr_db: Float32

    @classmethod
    def of(cls, calibration: Calibration) -> Evidence:
        return cls(calibration.llr_db(np.linspace(-1, 1, 20_001)).astype(np.float32))

    def at(self, similarity: Float32) -> Float32:
        last = len(self.llr_db) - 1
        place = np.rint((similarity + 1) * np.float32(last / 2)).astype(np.int32)
        return np.asarray(self.llr_db[np.clip(place, 0, last)])


@dataclass(frozen=True)
class Choice:
    """How rows with these columns are searched. groups: of GROUP tables of signs, of each column; signs: that these
    know; weights: of each column's signs; share: of strangers that they let through. cost: over that of searching one of the columns by itself.

    correlation: of captures that was assumed; drawn: mates that would reach the threshold, set aside from those that were chosen
    by; missed: of them. Of all mates, whatever they reach: joint, the share that is lost; single: of each column, the share that
    all its signs alone would lose, where as many strangers pass.
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
        """The upper end of the one-sided 95 % interval."""
        return float(upper_bound(self.missed, self.drawn))


@dataclass(frozen=True)
class TogetherPlan:
    """What a shard is asked for: of each probe the k rows with the most evidence, and all of at least floor_llr_db, among those
    whose columns are one of `choices`."""

    choices: Mapping[frozenset[str], Choice]
    evidence: Mapping[str, Evidence]
    k: int
    floor_llr_db: float = np.inf
    groups: frozenset[str] | None = None
    from_row: int = 0

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(sorted(self.evidence))


@dataclass(frozen=True)
class Together:
    """Candidates: which probe, its row, and the sum of llr_db. rows_scanned: pairs of probe and row are these times probes;
    passed: pairs that the signs let through."""

    which: Int64
    rows: Int64
    llr_db: Float32
    rows_scanned: int
    passed: int


# rows by what they have --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Class:
    """Rows of a part that have the same of a probe's columns. positions: ascending, or None for all rows of the part."""

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

    def since(self, row: int) -> int:
        """The first member from a row on."""
        low, _ = self.part.position_range(row, self.part.end_row)
        return low if self.positions is None else int(np.searchsorted(self.positions, low))


# Kept for as long as the part: what is kept must not hold the part itself.
_positions: WeakKeyDictionary[Part, dict[tuple[int, ...], Int64 | None]] = WeakKeyDictionary()
_cells: WeakKeyDictionary[Part, dict[tuple[tuple[int, ...], tuple[str, ...]], NDArray[np.int32]]] = WeakKeyDictionary()
_strangers: WeakKeyDictionary[Part, dict[tuple[object, ...], tuple[Float32, Float32]]] = WeakKeyDictionary()
_making = threading.Lock()


def classes_of(part: Part, columns: Collection[str]) -> Iterator[Class]:
    """A part's rows by which of these columns they have; those that can be searched together, by themselves."""
    sets: dict[tuple[str, ...], list[int]] = {}
    for bits in part.bits:
        sets.setdefault(tuple(c for c in sorted(columns) if bits >> COLUMNS.index(c) & 1), []).append(bits)
    for names, several in sets.items():
        coded = all(part.columns[name].codec is not None for name in names)
        count = sum(part.bits[bits] for bits in several)
        if len(names) < 2 or not coded or count < ROWS_MIN:
            continue
        key = tuple(sorted(several))
        with _making:
            known = _positions.setdefault(part, {})
            if key not in known:
                all_of_them = count == part.count
                known[key] = None if all_of_them else np.flatnonzero(np.isin(part.presence(0, part.count), key))
            at = known[key]
            if at is not None and len(at) != count:
                raise GalleryDamaged("rows have other templates than their segment says; run `biodedup doctor`")
        yield Class(part, names, known[key], count, key)


def covered(part: Part, plan: TogetherPlan) -> frozenset[int]:
    """The presences of the rows of a part that the plan covers."""
    found = (one.bits for one in classes_of(part, plan.columns) if frozenset(one.columns) in plan.choices)
    return frozenset(bits for some in found for bits in some)


def sets_of(snapshot: Snapshot, columns: Collection[str]) -> dict[frozenset[str], Class]:
    """Which sets of these columns rows have that can be searched together, and the largest class of each."""
    found: dict[frozenset[str], Class] = {}
    for part in snapshot.parts:
        for one in classes_of(part, columns):
            known = found.get(frozenset(one.columns))
            if known is None or known.count < one.count:
                found[frozenset(one.columns)] = one
    return found


def _members(one: Class, columns: Sequence[str]) -> NDArray[np.int32] | None:
    """The cells of a class's members in each column, int32 (columns, n), or None where they are the members' own numbers."""
    held = [one.part.columns[name] for name in columns]
    if one.positions is None and all(column.full for column in held):
        return None
    known = _cells.setdefault(one.part, {})
    key = (one.bits, tuple(columns))
    if key not in known:
        every = np.arange(one.count)
        known[key] = np.stack([one.cells(name, every).astype(np.int32) for name in columns])
    return known[key]


def _signs_of_strangers(one: Class, choice: Choice) -> tuple[Float32, Float32]:
    """Mean (n,) and covariance (n, n) of the signs that a choice looks at, of all its columns."""
    known = _strangers.setdefault(one.part, {})
    key = (one.bits, choice.columns, choice.groups)
    if key not in known:
        starts = np.unique(np.linspace(0, one.count - 1, _SAMPLE_BLOCKS).astype(np.int64) // BLOCK_ROWS)
        members = (starts[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).reshape(-1)
        members = members[members < one.count]
        seen = []
        for name, tables in zip(choice.columns, tables_by_column(one, choice), strict=True):
            column = one.part.columns[name]
            cells, inverse = np.unique(one.cells(name, members), return_inverse=True)
            seen.append(signs_of(column, SIGNED).of_codes(column.codes_at(cells)[0], tables)[inverse])
        signs = np.concatenate(seen, axis=1)
        covariance = np.cov(signs.T).reshape(signs.shape[1], -1)
        known[key] = signs.mean(axis=0).astype(np.float32), covariance.astype(np.float32)
    return known[key]


def tables_by_column(one: Class, choice: Choice) -> list[int]:
    """Of each column, how many tables of signs the choice looks at."""
    limits = [signs_of(one.part.columns[name], SIGNED).tables for name in choice.columns]
    return [min(GROUP * groups, limit) for groups, limit in zip(choice.groups, limits, strict=True)]


# a search ----------------------------------------------------------------------------------------------------------


def search(
    scanner: Scanner, snapshot: Snapshot, parts: Sequence[Part], probes: Mapping[str, Float32], plan: TogetherPlan
) -> Together:
    """probes: of each column of the plan float32 (q, d), unit rows."""
    count = len(next(iter(probes.values())))
    pieces: list[tuple[Int64, Int64, Float32]] = [
        (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    ]
    scanned, passed = 0, 0
    for part in parts:
        for one in classes_of(part, plan.columns):
            choice = plan.choices.get(frozenset(one.columns))
            first = one.since(plan.from_row)
            if choice is None or first >= one.count:
                continue
            run = _Run(snapshot, one, choice, probes, plan, count)
            run.scan(scanner, first)
            which, members, llr_db = run.compare(scanner)
            pieces.append((which, one.rows(members), llr_db))
            scanned += one.count - first
            passed += run.passed
    which, rows, llr_db = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    return Together(which, rows, llr_db, scanned, passed)


class _Run:
    """One class and a batch of probes."""

    def __init__(
        self,
        snapshot: Snapshot,
        one: Class,
        choice: Choice,
        probes: Mapping[str, Float32],
        plan: TogetherPlan,
        count: int,
    ) -> None:
        self.one, self.plan, self.streamed = one, plan, snapshot.streamed
        self.columns = {name: one.part.columns[name] for name in choice.columns}
        self.probes = {name: Probes(_codec(column), probes[name]) for name, column in self.columns.items()}
        self.live = snapshot.live_members(one.part, one.bits, one.positions, plan.groups)
        self.members = _members(one, choice.columns)
        self.signed = self._signed(choice)
        floor = plan.floor_llr_db - _slack_db(self.columns, plan.evidence)
        start = -np.inf if plan.k else floor  # nobody is wanted below it
        self.collected = Collected(np.full(count, start, np.float32), 2 * plan.k, floor)
        self.passed = 0
        self._lock = threading.Lock()

    def _signed(self, choice: Choice) -> SignedProbes:
        mine = list(self.probes.values())
        used = tables_by_column(self.one, choice)
        numbers = [
            signs_of(column, SIGNED).numbers(probe.turned, tables) * np.float32(weight)
            for column, probe, tables, weight in zip(self.columns.values(), mine, used, choice.weights, strict=True)
        ]
        tables, steps, middles = tables_of(numbers, SIGN, SIGNED)
        together = np.concatenate(numbers, axis=1)
        mean, covariance = _signs_of_strangers(self.one, choice)
        variance = np.einsum("ij,ij->i", turned(together, covariance), together)
        variance += rounding_variance(tables.shape[1], steps)
        z = np.float32(-ndtri(choice.share))
        limits = limits_of(turned(together, mean[None])[:, 0] + z * np.sqrt(variance), steps, middles)
        return SignedProbes(
            *filled(tables, limits),
            np.array(used, np.int64),
            SIGNED,
            NOT_SEEDED,
            paired([probe.codes for probe in mine]),
            np.stack([probe.parameters for probe in mine]),
            np.stack([self.plan.evidence[name].llr_db for name in self.columns]),
        )

    def scan(self, scanner: Scanner, first: int) -> None:
        size = max(_UNIT // len(self.signed) // BLOCK_ROWS, 16) * BLOCK_ROWS
        size = min(size, max(-(-self.one.count // (4 * scanner.threads)) // BLOCK_ROWS, 1) * BLOCK_ROWS)
        scanner.run(lambda low: self._scan(low, first, size), range(first // size * size, self.one.count, size))

    def _scan(self, low: int, first: int, size: int) -> None:
        high = min(low + size, self.one.count)
        members, planes = None, []
        if self.members is None:
            planes = [column.plane(low, high) for column in self.columns.values()]
        else:
            members = self.members[:, low:high]
            bases = members[:, 0] // BLOCK_ROWS * BLOCK_ROWS
            for column, mine, base in zip(self.columns.values(), members, bases.tolist(), strict=True):
                planes.append(column.plane(base, int(mine[-1]) + 1))
            members = np.ascontiguousarray(members - bases[:, None])
        live = self.live[low // BLOCK_ROWS : -(-high // BLOCK_ROWS)]
        room = 2 * self.signed.room
        which, cells, llr_db = np.empty(room, np.int32), np.empty(room, np.int64), np.empty(room, np.float32)
        block, span = 0, (max(first - low, 0), high - low)
        while block < -(-(high - low) // BLOCK_ROWS):
            cuts = self.collected.cuts
            found = (which, cells, llr_db)
            number, block, passed = sign_kernel.scan(planes, members, live, span, block, self.signed, cuts, found)
            if number:
                self.collected.add(which[:number].copy(), 0, cells[:number] + low, llr_db[:number].copy())
            with self._lock:
                self.passed += passed

    def compare(self, scanner: Scanner) -> tuple[Int64, Int64, Float32]:
        """The best, compared exactly: probe, member, llr_db."""
        hits = self.collected.best()
        order = np.argsort(hits.cell, kind="stable")  # as the disk has them
        which, members = hits.which[order], hits.cell[order]
        exact = np.zeros(len(members), np.float32)

        def compare(low: int) -> None:
            some = slice(low, low + PIECE_ROWS)
            for name, column in self.columns.items():
                cells = self.one.cells(name, members[some])
                similarity = compared(column, cells, self.probes[name].turned, which[some])
                exact[some] += self.plan.evidence[name].at(similarity)

        scanner.each(compare, range(0, len(members), PIECE_ROWS))
        for column in self.columns.values() if len(members) > _RELEASE_PAIRS else ():
            column.release(forget=column in self.streamed)
        return which.astype(np.int64), members, exact


def _slack_db(columns: Mapping[str, Column], evidence: Mapping[str, Evidence]) -> float:
    """By how much estimated evidence may be too low: similarities' errors at the steepest of each column, together."""
    variance = 0.0
    for name, column in columns.items():
        llr_db = evidence[name].llr_db
        steepest = float(np.diff(llr_db).max()) * (len(llr_db) - 1) / 2
        variance += (steepest * max(_codec(column).law.sd)) ** 2
    return _SLACK * sqrt(variance)


def _codec(column: Column) -> Codec:
    assert column.codec is not None, "only coded columns are searched together"
    return column.codec


def codec_id(one: Class, column: str) -> str:
    return _codec(one.part.columns[column]).codec_id


# the choice --------------------------------------------------------------------------------------------------------


def choose(
    one: Class,
    calibrations: Mapping[str, Calibration],
    miss_risk: float,
    threshold_llr_db: float,
    correlation: float,
) -> Choice | None:
    """The cheapest way to search rows like those of a class that loses at most this share of the mates that reach the
    threshold. correlation: of how well two captures of a subject match, as ranks on a normal scale. None where no way is cheaper
    than to scan each column by itself."""
    draw = _Draw(one, calibrations, miss_risk, threshold_llr_db, correlation)
    found, groups = [], draw.most
    while True:
        for share in (max(least, _SHARE_LEAST) for least in draw.shares(groups)):
            cost = GROUP * sum(groups) + len(groups) * (_TAKEN + _COMPARED * share)
            found.append((cost, groups, share))
        fewer = [(*groups[:c], n - 1, *groups[c + 1 :]) for c, n in enumerate(groups) if n and sum(groups) > 1]
        if not found or not fewer:
            break
        groups = min(fewer, key=lambda some: draw.shares(some)[0])
    for cost, groups, share in sorted(found):
        if cost < _ALONE * len(groups) and draw.bound(groups, share) <= miss_risk:
            return draw.choice(groups, share, cost / _ALONE)
    return None


class _Draw:
    """Mates and strangers, drawn from what is known of each column."""

    def __init__(
        self,
        one: Class,
        calibrations: Mapping[str, Calibration],
        miss_risk: float,
        threshold_llr_db: float,
        correlation: float,
    ) -> None:
        self._columns, self._correlation = {name: one.part.columns[name] for name in one.columns}, correlation
        rng = np.random.default_rng(_SEED)
        llr_db = np.zeros(_MATES)
        mates, strangers = [], []
        common = sqrt(correlation) * rng.standard_normal(_MATES)
        for name, column in self._columns.items():
            quantiles = ndtr(common + sqrt(1 - correlation) * rng.standard_normal(_MATES))
            similarity = calibrations[name].mated_similarities(quantiles)
            llr_db += calibrations[name].llr_db(similarity)
            law = signs_of(column, SIGNED).groups
            mates.append(np.cumsum(law.mated(similarity, rng), axis=0).astype(np.float32))
            strangers.append(law.strangers)
        self.most = tuple(len(sums) for sums in mates)
        # by Fisher's discriminant: what parts mates from strangers most, column by column
        weights = [(m[-1].mean() - s[-1, 0]) / (m[-1].var() + s[-1, 1]) for m, s in zip(mates, strangers, strict=True)]
        self._weights = tuple(float(max(w, 1e-6) / max(weights)) for w in weights)
        self._mates = [
            np.pad(sums, ((1, 0), (0, 0))) * np.float32(w) for sums, w in zip(mates, self._weights, strict=True)
        ]
        self._strangers = [s * (w, w * w) for s, w in zip(strangers, self._weights, strict=True)]
        reaching = llr_db >= threshold_llr_db
        self._to_choose, self._to_confirm = (np.flatnonzero(reaching[half::2]) * 2 + half for half in (0, 1))
        lost = np.arange(int(miss_risk * len(self._to_choose)) + 1)
        self._may_lose = int(np.searchsorted(upper_bound(lost, len(self._to_choose)), miss_risk, side="right")) - 1
        self.shares = cache(self._shares)

    def _above(self, groups: tuple[int, ...]) -> Float32:
        """Of mates, by how many of the strangers' standard deviations their sums are above the strangers' mean."""
        mean, variance = sum(strangers[n] for strangers, n in zip(self._strangers, groups, strict=True))
        sums = sum(mates[n] for mates, n in zip(self._mates, groups, strict=True))
        return np.asarray((sums - mean) / np.sqrt(variance), np.float32)

    def _shares(self, groups: tuple[int, ...]) -> list[float]:
        """Of strangers, how many have to pass for no more of the mates to be lost than the risk, and on the safe side; ascending,
        none where there are too few mates to tell."""
        if self._may_lose < 0:
            return []
        lost = sorted({self._may_lose, self._may_lose * 2 // 3, self._may_lose // 3}, reverse=True)
        mates = np.partition(self._above(groups)[self._to_choose], lost)
        return [float(ndtr(-mates[n])) for n in lost]

    def bound(self, groups: tuple[int, ...], share: float) -> float:
        """Of the mates that were set aside, how many may be lost (Choice.miss_bound)."""
        return float(upper_bound(self._lost(groups, share), len(self._to_confirm)))

    def _lost(self, groups: tuple[int, ...], share: float) -> int:
        return int((self._above(groups)[self._to_confirm] < -ndtri(share)).sum())

    def choice(self, groups: tuple[int, ...], share: float, cost: float) -> Choice:
        least = -ndtri(share)
        single = [
            float((self._above(tuple(n if i == c else 0 for i, n in enumerate(self.most))) < least).mean())
            for c in range(len(groups))
        ]
        mine = zip(self._columns.values(), groups, strict=True)
        return Choice(
            tuple(self._columns),
            groups,
            tuple(signs_of(column, SIGNED).count(GROUP * n) for column, n in mine),
            self._weights,
            share,
            cost,
            self._correlation,
            len(self._to_confirm),
            self._lost(groups, share),
            tuple(single),
            float((self._above(groups) < least).mean()),
        )
