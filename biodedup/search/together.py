"""Several columns searched together: what the captures of a probe say adds up before anything is cut.

Owns the search of rows that have two or more of a probe's columns, in one shard, and the choice of how far it goes. A mate whose face has
aged and whose finger is dry is far down in either column, but hardly any stranger is as near in both; so one pass over the signs
of all columns needs less arithmetic than one column's codes, and loses fewer mates.

1. Signs of all columns, some words of each (`signs.py`): pairs that differ in few of them, a share of about 1e-3.
2. Of these, those that differ in few of all the signs, a share of about 1e-4.
3. Of these, the upper halves of all columns estimate similarities; their evidence adds as log-likelihood ratios.
4. The best are compared exactly, and so is whatever reaches a floor.

How many words and which shares: `choose` draws mates from the columns' calibrations, sends them through the measured laws of 1 and
2, and takes the cheapest that loses no more than the miss risk of those that would reach the decision threshold. Rows are kept apart
by what they have, so that a missing capture is no evidence. Signs are made when they are first wanted, 32 bytes a cell, in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import sqrt
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import beta, norm

from biodedup.gallery.codec import Codec
from biodedup.gallery.codes import BLOCK_ROWS, dequantise
from biodedup.gallery.part import PIECE_ROWS, Column, Int64, Part
from biodedup.gallery.snapshot import Snapshot
from biodedup.match.calibration import Calibration
from biodedup.search import kernel, sign_kernel
from biodedup.search.population import signs_of
from biodedup.search.scan import Probes, Scanner
from biodedup.search.signs import WORDS, Words, filled
from biodedup.values import COLUMNS, Float32

ROWS_MIN = 1 << 16
"""A class of fewer rows is searched column by column."""
_UNIT = 1 << 24  # pairs of a probe and a row that a thread takes on at once
_SAMPLE = 1_024  # rows of a class, that say in how many signs strangers differ
_RELEASE_PAIRS = 50_000  # compared, after which the memory of what was read is given back
_HELD = 4_000_000  # pairs in memory, before all but the best are let go
_SLACK = 3.5  # standard deviations
_MATES = 40_000  # drawn to choose by; half choose, half confirm
_SHARES = (3e-5, 1e-4, 2e-4, 4e-4, 7e-4, 1e-3, 2e-3, 4e-3, 1e-2)
_SECOND = (1e-5, 2e-5, 3e-5, 6e-5, 1e-4, 2e-4, 4e-4, 1e-3)
_SEED = 2_011
# Costs, in numbers of one row that a scan of codes reads in the same time; benchmarks/columns.py measures the sum.
_WORD, _HIT, _CHECKED = 10.3, 20_000.0, 180_000.0


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
    """How rows with these columns are searched. words: of each column, in the first pass; first, second: shares of strangers that
    pass. cost: as a share of a scan of the codes of the largest of the columns.

    correlation: of captures that was assumed; drawn: mates that would reach the threshold, set aside from those that were chosen
    by; missed: of them. Of all mates, whatever they reach: joint, the share that is lost; single: of each column, the share that
    all its signs alone would lose, where as many strangers pass.
    """

    columns: tuple[str, ...]
    words: tuple[int, ...]
    first: float
    second: float
    cost: float
    correlation: float
    drawn: int
    missed: int
    single: tuple[float, ...]
    joint: float

    @property
    def miss_bound(self) -> float:
        """The upper end of the one-sided 95 % interval (Clopper and Pearson, 1934)."""
        return float(beta.ppf(0.95, self.missed + 1, max(self.drawn - self.missed, 1)))


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
    passed: pairs that each pass let through, the first one, the second one."""

    which: Int64
    rows: Int64
    llr_db: Float32
    rows_scanned: int
    passed: tuple[int, int]


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
        return self.part.columns[column].cells_at(at)

    def since(self, row: int) -> int:
        """The first member from a row on."""
        low, _ = self.part.position_range(row, self.part.end_row)
        return low if self.positions is None else int(np.searchsorted(self.positions, low))


# Kept for as long as the part: what is kept must not hold the part itself.
_positions: WeakKeyDictionary[Part, dict[tuple[int, ...], Int64 | None]] = WeakKeyDictionary()
_planes: WeakKeyDictionary[Part, dict[tuple[tuple[int, ...], str], Words]] = WeakKeyDictionary()
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


def _signs(one: Class, column: str) -> Words:
    """uint64 (WORDS, 64 b) of a class's cells of a column."""
    known = _planes.setdefault(one.part, {})
    key = (one.bits, column)
    if key not in known:
        held = one.part.columns[column]
        whole = one.positions is None and held.full
        cells = None if whole else one.cells(column, np.arange(one.count))
        known[key] = signs_of(held).of_column(held, cells)
    return known[key]


# a search ----------------------------------------------------------------------------------------------------------


def search(
    scanner: Scanner, snapshot: Snapshot, parts: Sequence[Part], probes: Mapping[str, Float32], plan: TogetherPlan
) -> Together:
    """probes: of each column of the plan float32 (q, d), unit rows."""
    count = len(next(iter(probes.values())))
    pieces: list[tuple[Int64, Int64, Float32]] = [
        (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    ]
    scanned, passed = 0, np.zeros(2, np.int64)
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
    return Together(which, rows, llr_db, scanned, (int(passed[0]), int(passed[1])))


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
        self.one, self.plan, self.choice, self.count = one, plan, choice, count
        self.columns = {name: one.part.columns[name] for name in choice.columns}
        self.probes = {name: Probes(_codec(column), probes[name]) for name, column in self.columns.items()}
        self.live = snapshot.live_members(one.part, one.bits, one.positions, plan.groups)
        order = [
            (name, word) for name, words in zip(choice.columns, choice.words, strict=True) for word in range(words)
        ]
        others = [(name, w) for name in choice.columns for w in range(WORDS) if (name, w) not in order]
        planes = {name: _signs(one, name) for name in choice.columns}
        mine = {name: signs_of(c).of(self.probes[name].turned) for name, c in self.columns.items()}
        self.planes = [planes[name][word] for name, word in order]
        self.all_planes = self.planes + [planes[name][word] for name, word in others]
        self.all_signs = np.ascontiguousarray(np.stack([mine[name][:, word] for name, word in order + others], axis=1))
        signs = np.ascontiguousarray(self.all_signs[:, : len(order)])
        # in how many signs a share of strangers differs from each probe
        members = np.linspace(0, one.count - 1, min(_SAMPLE, one.count)).astype(np.int64)
        mean, sd = sign_kernel.distances(self.all_planes, len(order), members, self.all_signs)
        limits = np.floor(mean + norm.ppf((choice.first, choice.second)) * sd)
        self.filled = filled(signs, np.maximum(limits[:, 0], 0).astype(np.uint64))
        self.all_limits = np.maximum(limits[:, 1], 0).astype(np.uint64)
        self.floor = plan.floor_llr_db - _slack_db(self.columns, plan.evidence)
        self.found: list[tuple[NDArray[Any], NDArray[Any], Float32]] = []
        self.held = 0
        self.passed = np.zeros(2, np.int64)
        self._lock = threading.Lock()

    def scan(self, scanner: Scanner, first: int) -> None:
        size = max(_UNIT // self.count // BLOCK_ROWS, 16) * BLOCK_ROWS
        size = min(size, max(-(-self.one.count // (4 * scanner.threads)) // BLOCK_ROWS, 1) * BLOCK_ROWS)
        scanner.run([lambda low=low: self._scan(low, first, size) for low in range(first // size * size, self.one.count, size)])  # type: ignore[misc]  # fmt: skip

    def _scan(self, low: int, first: int, size: int) -> None:
        high = min(low + size, self.one.count)
        blocks = slice(low // BLOCK_ROWS, -(-high // BLOCK_ROWS))
        rows = slice(BLOCK_ROWS * blocks.start, BLOCK_ROWS * blocks.stop)
        planes = [plane[rows] for plane in self.planes]
        room = max(1 << 15, 4 * BLOCK_ROWS * self.count)
        which, cells = np.empty(room, np.int32), np.empty(room, np.int64)
        block = 0
        while block < blocks.stop - blocks.start:
            number, block = sign_kernel.scan(
                planes,
                self.live[blocks],
                (max(first - low, 0), high - low),
                block,
                *self.filled,
                self.count,
                (which, cells),
            )
            pairs = (which[:number], cells[:number])
            kept = sign_kernel.keep_near(
                [plane[rows] for plane in self.all_planes], self.all_signs, self.all_limits, pairs
            )
            if kept:
                self._estimate(which[:kept].copy(), cells[:kept] + low)
            with self._lock:
                self.passed += (number, kept)

    def _estimate(self, which: NDArray[np.int32], members: Int64) -> None:
        llr_db = np.zeros(len(which), np.float32)
        for name, column in self.columns.items():
            probe, cells = self.probes[name], self.one.cells(name, members)
            base = int(cells.min()) // BLOCK_ROWS * BLOCK_ROWS
            plane, norms = column.plane(base, int(cells.max()) + 1)
            dots = kernel.dots(plane, which, cells - base, probe.codes)
            llr_db += self.plan.evidence[name].at(probe.estimates(which, dots, norms[cells - base]))
        with self._lock:
            self.found.append((which, members, llr_db))
            self.held += len(which)
            if self.held > _HELD:  # strangers that are not normal at all
                self.found = [self._best()]
                self.held = len(self.found[0][0])

    def _best(self) -> tuple[NDArray[np.int32], Int64, Float32]:
        """Of each probe the k best by their estimates, and all that may reach the floor."""
        nothing = (np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.float32))
        which, members, llr_db = (np.concatenate(arrays) for arrays in zip(nothing, *self.found, strict=True))
        order = np.lexsort((members, -llr_db, which))
        rank = np.arange(len(order)) - np.searchsorted(which[order], np.arange(self.count))[which[order]]
        kept = order[(rank < self.plan.k) | (llr_db[order] >= self.floor)]
        return which[kept], members[kept], llr_db[kept]

    def compare(self, scanner: Scanner) -> tuple[Int64, Int64, Float32]:
        """The best, compared exactly: probe, member, llr_db."""
        which, members, _ = self._best()
        order = np.argsort(members, kind="stable")  # as the disk has them
        which, members = which[order], members[order]
        exact = np.zeros(len(members), np.float32)

        def compare(low: int) -> None:
            some = slice(low, low + PIECE_ROWS)
            for name, column in self.columns.items():
                cells, inverse = np.unique(self.one.cells(name, members[some]), return_inverse=True)
                vectors = dequantise(*column.codes_at(cells))[inverse]
                similarity = np.einsum("ij,ij->i", vectors, self.probes[name].turned[which[some]])
                exact[some] += self.plan.evidence[name].at(similarity)

        scanner.each([lambda low=low: compare(low) for low in range(0, len(members), PIECE_ROWS)])  # type: ignore[misc]
        for column in self.columns.values() if len(members) > _RELEASE_PAIRS else ():
            column.release()
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
    draw = _Draw(one, calibrations, threshold_llr_db, correlation)
    numbers = [_codec(one.part.columns[name]).scanned for name in one.columns]
    found = []
    for first, second in product(_SHARES, _SECOND):
        words = (WORDS,) * len(numbers)
        while second <= first and draw.bound(words, first, second, chosen=True) <= miss_risk:
            cost = _WORD * sum(words) + _HIT * first + _CHECKED * second
            found.append((cost, words, first, second))
            fewer = [(*words[:c], n - 1, *words[c + 1 :]) for c, n in enumerate(words) if n and sum(words) > 2]
            if not fewer:
                break
            words = min(fewer, key=lambda some: draw.bound(some, first, second, chosen=True))
    for cost, words, first, second in sorted(found):
        if cost < sum(numbers) and draw.bound(words, first, second, chosen=False) <= miss_risk:
            return draw.choice(words, first, second, cost / max(numbers))
    return None


class _Draw:
    """Mates and strangers, drawn from what is known of each column."""

    def __init__(
        self, one: Class, calibrations: Mapping[str, Calibration], threshold_llr_db: float, correlation: float
    ) -> None:
        self._columns, self._correlation = one.columns, correlation
        rng = np.random.default_rng(_SEED)
        llr_db = np.zeros(_MATES)
        mates, strangers = [], []
        common = sqrt(correlation) * rng.standard_normal(_MATES)
        for name in one.columns:
            similarity = _mated(calibrations[name], ndtr(common + sqrt(1 - correlation) * rng.standard_normal(_MATES)))
            llr_db += calibrations[name].llr_db(similarity)
            law = signs_of(one.part.columns[name]).words
            mates.append(law.mated(similarity, rng))
            strangers.append(law.strangers)
        self._mates = np.array(mates)  # (columns, WORDS, mates): signs that differ in each word
        self._strangers = np.array(strangers)  # (columns, WORDS + 1, 2): mean and variance in so many words
        self._reaching = llr_db >= threshold_llr_db
        self._missed = cache(self._missed_by)

    def _limit(self, words: Sequence[int], share: float) -> float:
        mean, variance = sum(self._strangers[c, n] for c, n in enumerate(words))
        return float(np.floor(mean + norm.ppf(share) * np.sqrt(variance)))

    def _missed_by(self, words: tuple[int, ...], share: float) -> NDArray[np.bool_]:
        differing = sum(self._mates[c, :n].sum(axis=0) for c, n in enumerate(words))
        return np.asarray(differing > self._limit(words, share))

    def bound(self, words: tuple[int, ...], first: float, second: float, *, chosen: bool) -> float:
        lost, drawn = self._count(words, first, second, chosen=chosen)
        return float(beta.ppf(0.95, lost + 1, max(drawn - lost, 1)))

    def _count(self, words: tuple[int, ...], first: float, second: float, *, chosen: bool) -> tuple[int, int]:
        missed = self._missed(words, first) | self._missed((WORDS,) * len(words), second)
        half = slice(0, None, 2) if chosen else slice(1, None, 2)
        return int((missed & self._reaching)[half].sum()), int(self._reaching[half].sum())

    def choice(self, words: tuple[int, ...], first: float, second: float, cost: float) -> Choice:
        lost, drawn = self._count(words, first, second, chosen=False)
        single = [
            float(self._missed(tuple(WORDS if i == c else 0 for i in range(len(words))), second).mean())
            for c in range(len(words))
        ]
        joint = float((self._missed(words, first) | self._missed((WORDS,) * len(words), second)).mean())
        return Choice(self._columns, words, first, second, cost, self._correlation, drawn, lost, tuple(single), joint)


def _mated(calibration: Calibration, quantiles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Similarities of mates, as the calibration has them: the density of strangers times the likelihood ratio."""
    grid = np.linspace(-1, 1, 4001)
    survival = 10 ** (-calibration.score_db(grid) / 10)
    density = np.append(survival[:-1] - survival[1:], 0.0) * 10 ** (calibration.llr_db(grid) / 10)
    total = np.cumsum(density)
    return np.asarray(np.interp(quantiles * total[-1], total, grid))
