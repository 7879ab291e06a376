"""Shards: a gallery in pieces that are searched each on its own, and whose answers become one.

Owns the boundary (`Shard`), the search of one shard, and the merging of answers. Never decides and never compares minutiae.

A shard is asked for the k most similar rows of each probe (or for all from a similarity on), told how many rows all shards
have, and answers with candidates and with the similarity above which its answer is complete. Usually one round is enough;
where the k-th best of all shards lies below what one of them was complete to, this one is asked again, from there on.

How a local shard finds the k nearest of many without a heap: a probe's similarities to strangers are nearly normal, so that
their mean and deviation over a sample say which similarity T some more than k of all rows reach; rows at T have a known
distribution of estimates (`ErrorLaw`), whose lower tail of `miss_risk` is the cut. What reaches it is ranked by estimate, the best k
are compared exactly, and then everybody whose estimate could still belong among them. For many probes signs rule most rows out
beforehand (`signs.py`), where that is cheaper.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
from scipy.special import ndtri

from biodedup.errors import BiodedupError
from biodedup.gallery.files.codes import dequantise
from biodedup.gallery.segments.part import PIECE_ROWS, Column, Part
from biodedup.gallery.snapshot import Snapshot
from biodedup.search.multicolumn import together
from biodedup.search.multicolumn.together import MultiColumnHits, MultiColumnQuery
from biodedup.search.native.column_statistics import population_of, signs_of
from biodedup.search.native.exact_pairs import compared, ranked
from biodedup.search.native.scan_kernel import INSTRUCTIONS
from biodedup.search.native.scanner import Hits, Int64, Probes, Scanner, Tile, Unit
from biodedup.search.native.sign_tile import CLASS_TABLES, SIGN_TABLES
from biodedup.search.native.signs import TABLES_MOST, Signs
from biodedup.values import COLUMNS, Float32

EXACT_CELLS = 1 << 14
"""Up to so many cells of one codec are compared exactly."""
_RELEASE_PAIRS = 1_000  # compared at a time, after which the memory of what was read is given back
_READ_THROUGH_PAIRS = 10_000  # of a column, which a disk reads from end to end
_FORESEEN_BY = 16  # probes of a batch, about
_SIGN_PROBES = 16  # from so many on, taking the signs out of a block is worth it
# Costs of a row in nanoseconds, measured: a table, the comparison of what tables let through, taking a row's signs once for all
# probes, a number of an upper half.
_COSTS = {
    "avx2": (0.0105, 13.0, 14.0, 0.0105),
    "avx512": (0.0064, 17.0, 7.0, 0.008),
    "vnni": (0.0064, 17.0, 7.0, 0.0052),
    "vbmi": (0.0063, 17.0, 6.5, 0.0052),
}
_USUAL_NORM = 450.0  # of a code of 128 numbers; only to foresee how many rows pass
_SHARE_MAX = 0.02  # above this share of rows wanted, all are compared exactly
_log = logging.getLogger("biodedup")
_RAGGED_MOST = 1_000_000  # rows above a similarity, a probe, that a search collects


@dataclass(frozen=True)
class ShardQuery:
    """What a shard is asked for.

    k: so many of the best are enough, 0 for all; among: rows of all shards; at_least: float32 (q,), the similarity from which
    on rows are wanted, or None where the shard shall choose it so that the k best are among them; miss_risk: the probability that a row which should be found is not; 0 leaves nothing to chance.
    """

    column: str
    k: int
    among: int
    miss_risk: float
    at_least: Float32 | None = field(default=None, compare=False)
    groups: frozenset[str] | None = None
    from_row: int = 0
    end_row: int | None = None
    besides: MultiColumnQuery | None = field(default=None, compare=False)
    """Rows that this plan covers are left to it."""


@dataclass(frozen=True)
class ShardHits:
    """Candidates of a shard: which probe, row and exact similarity of each; complete_above: float32 (q,), the similarity from
    which on none is lacking, but for the miss risk. compared: pairs compared exactly."""

    which: Int64
    rows: Int64
    similarity: Float32
    complete_above: Float32
    version: int
    rows_scanned: int
    compared: int = 0


class Shard(Protocol):
    """Part of a gallery, here or elsewhere. Raises BiodedupError or OSError where it cannot answer."""

    def search(self, probes: Float32, plan: ShardQuery) -> ShardHits:
        """probes: float32 (q, d), unit rows."""

    def search_together(self, probes: Mapping[str, Float32], plan: MultiColumnQuery) -> MultiColumnHits:
        """probes: of each of the plan's columns float32 (q, d), unit rows."""


@dataclass(frozen=True)
class Nearest:
    """The answers of all shards. rows int64 (q, k), -1 pads, similarity float32 (q, k), descending, -inf pads; failures: what
    the shards said that did not answer: with any, the result is incomplete."""

    rows: Int64
    similarity: Float32
    rows_scanned: int
    compared: int
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Reached:
    """All rows from a similarity on: of each probe rows int64 (n,) and similarity float32 (n,), descending."""

    found: tuple[tuple[Int64, Float32], ...]
    failures: tuple[str, ...]


class FanOut:
    """Asks shards at the same time. Where some fail, the others' answers count, and say so; where all do, so does the search.
    Thread-safe."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(16, "biodedup-shard")  # they wait for the scan's pool, or for other machines

    def close(self) -> None:
        self._pool.shutdown()

    def nearest(self, shards: Sequence[Shard], probes: Float32, plan: ShardQuery) -> Nearest:
        """The k best of all shards."""
        answers, failures = self._ask(shards, [(probes, plan)] * len(shards))
        rows, similarity = _best(answers, len(probes), plan.k)
        scanned, compared = sum(a.rows_scanned for a in answers.values()), sum(a.compared for a in answers.values())
        again = {
            i: np.flatnonzero(answer.complete_above > similarity[:, -1]) for i, answer in answers.items()
        }  # rows between the two may lack
        again = {i: which for i, which in again.items() if len(which)}
        if again:
            deeper = [(probes[which], replace(plan, at_least=similarity[which, -1])) for which in again.values()]
            more, lost = self._ask([shards[i] for i in again], deeper)
            failures += lost
            for (i, which), answer in zip(again.items(), (more.get(j) for j in range(len(again))), strict=True):
                if answer is not None:
                    answers[i] = _replaced(answers[i], which, answer)
                    compared += answer.compared
            rows, similarity = _best(answers, len(probes), plan.k)
        return Nearest(rows, similarity, scanned, compared, tuple(failures))

    def reached(self, shards: Sequence[Shard], probes: Float32, plan: ShardQuery) -> Reached:
        """All rows from plan.at_least on."""
        answers, failures = self._ask(shards, [(probes, plan)] * len(shards))
        which = np.concatenate([np.zeros(0, np.int64), *(a.which for a in answers.values())])
        rows = np.concatenate([np.zeros(0, np.int64), *(a.rows for a in answers.values())])
        similarity = np.concatenate([np.zeros(0, np.float32), *(a.similarity for a in answers.values())])
        order, _ = ranked(which, similarity, rows, len(probes))
        cuts = np.searchsorted(which[order], np.arange(1, len(probes)))
        found = zip(np.split(rows[order], cuts), np.split(similarity[order], cuts), strict=True)
        return Reached(tuple(found), tuple(failures))

    def together(
        self, shards: Sequence[Shard], probes: Mapping[str, Float32], plan: MultiColumnQuery
    ) -> tuple[MultiColumnHits, tuple[str, ...]]:
        """The candidates of all shards, by probe, most evidence first; and what the shards said that did not answer."""
        answers, failures = self._all([partial(shard.search_together, probes, plan) for shard in shards])
        which, rows, llr_db = (
            np.concatenate([getattr(answer, name) for answer in answers.values()])
            for name in ("which", "rows", "llr_db")
        )
        order, rank = ranked(which, llr_db, rows, len(next(iter(probes.values()))))
        kept = order[(rank < plan.k) | (llr_db[order] >= plan.floor_llr_db)]
        passed = sum(answer.passed for answer in answers.values())
        scanned = sum(answer.rows_scanned for answer in answers.values())
        return MultiColumnHits(which[kept], rows[kept], llr_db[kept], scanned, passed), tuple(failures)

    def _ask(
        self, shards: Sequence[Shard], questions: Sequence[tuple[Float32, ShardQuery]]
    ) -> tuple[dict[int, ShardHits], list[str]]:
        return self._all([partial(shard.search, *q) for shard, q in zip(shards, questions, strict=True)])

    def _all(self, questions: Sequence[Callable[[], _Result]]) -> tuple[dict[int, _Result], list[str]]:
        """Answers by the shard's place, and what the others said."""
        asked = list(questions)
        if len(asked) > 1:
            asked = [self._pool.submit(question).result for question in questions]
        answers: dict[int, _Result] = {}
        errors: dict[int, BiodedupError | OSError] = {}
        for i, answer in enumerate(asked):
            try:
                answers[i] = answer()
            except (BiodedupError, OSError) as error:
                errors[i] = error
        if errors and not answers:
            raise next(iter(errors.values()))
        for i, failed in errors.items():
            _log.warning("a search is incomplete: shard %d: %s", i, failed)
        return answers, [f"shard {i}: {failed}" for i, failed in errors.items()]


def _best(answers: Mapping[int, ShardHits], count: int, k: int) -> tuple[Int64, Float32]:
    which = np.concatenate([np.zeros(0, np.int64), *(a.which for a in answers.values())])
    rows = np.concatenate([np.zeros(0, np.int64), *(a.rows for a in answers.values())])
    similarity = np.concatenate([np.zeros(0, np.float32), *(a.similarity for a in answers.values())])
    order, rank = ranked(which, similarity, rows, count)
    kept = order[rank < k]
    best_rows, best = np.full((count, k), -1), np.full((count, k), -np.inf, np.float32)
    best_rows[which[kept], rank[rank < k]] = rows[kept]
    best[which[kept], rank[rank < k]] = similarity[kept]
    return best_rows, best


def _replaced(answer: ShardHits, which: Int64, deeper: ShardHits) -> ShardHits:
    """An answer with what a second round found for some of its probes."""
    keep = ~np.isin(answer.which, which)
    return replace(
        answer,
        which=np.concatenate([answer.which[keep], which[deeper.which]]),
        rows=np.concatenate([answer.rows[keep], deeper.rows]),
        similarity=np.concatenate([answer.similarity[keep], deeper.similarity]),
    )


class LocalShard:
    """Some parts of a snapshot."""

    def __init__(self, snapshot: Snapshot, parts: Sequence[Part], scanner: Scanner) -> None:
        self._snapshot = snapshot
        self._parts = parts
        self._scanner = scanner

    def search(self, probes: Float32, plan: ShardQuery) -> ShardHits:
        pieces = [_Piece(self._snapshot, part, plan) for part in self._parts if plan.column in part.columns]
        pieces = [piece for piece in pieces if piece.first < piece.last]
        exact, coded = by_codec(pieces)
        found = _Found(len(probes), self._snapshot.version)
        for some in coded:
            if not self._search_coded(some, probes, plan, found):
                exact += some
        self._search_exact(exact, probes, plan, found)
        found.scanned = sum(piece.last - piece.first for piece in pieces)
        return found.answer()

    def search_together(self, probes: Mapping[str, Float32], plan: MultiColumnQuery) -> MultiColumnHits:
        return together.search(self._scanner, self._snapshot, self._parts, probes, plan)

    def _search_exact(self, pieces: Sequence[_Piece], probes: Float32, plan: ShardQuery, found: _Found) -> None:
        tiles = [tile for piece in pieces for tile in piece.tiles()]
        if not plan.k:
            assert plan.at_least is not None, "all rows, from a similarity on"
            for which, rows, similarity in self._scanner.exact_above(tiles, probes, plan.at_least):
                found.add(which, rows, similarity)
        elif tiles:
            rows, similarity = self._scanner.exact(tiles, probes, min(plan.k, sum(tile.count for tile in tiles)))
            which, at = np.nonzero(rows >= 0)
            found.add(which, rows[which, at], similarity[which, at])

    def _search_coded(self, pieces: Sequence[_Piece], probes: Float32, plan: ShardQuery, found: _Found) -> bool:
        """False where the codes are of no help, and nothing was done."""
        codec = pieces[0].column.codec
        assert codec is not None, "pieces without a codec are compared exactly"
        bounded = plan.miss_risk <= 0
        if bounded and codec.scanned < codec.rotation.shape[0]:
            return False
        coded = Probes(codec, probes)
        largest = max((piece.column for piece in pieces), key=lambda column: column.count)
        population = population_of(largest)
        if plan.at_least is None:
            wanted = plan.k + 4 * np.sqrt(plan.k) + 8
            if wanted > _SHARE_MAX * plan.among:
                return False
            least = population.reached_by(coded.rotated, wanted / plan.among)
        else:
            least = plan.at_least
        law, risk = codec.law, 0.0 if bounded else codec.law.margin(plan.miss_risk)[0]
        signs = None
        if not bounded and len(probes) >= _SIGN_PROBES:
            signed = _cheapest_signs(largest, coded, least, plan.miss_risk)
            if signed is not None:
                risk, _ = signed.laws[0].margin(plan.miss_risk)
                limits, law = signed.laws[0].cut(least, risk), signed.laws[1]
                signs = signed.probes(coded.rotated, limits, coded.codes, coded.parameters)

        def cut(similarity: Float32) -> Float32:
            return similarity - coded.rounding if bounded else law.cut(similarity, risk)

        cuts = cut(least)
        usual = 16 * coded.scales * coded.slack / _USUAL_NORM if bounded else np.float32(0)
        if population.share_reaching(cuts - usual, coded.rotated[:, : codec.scanned]) > _SHARE_MAX:
            return False
        most = _RAGGED_MOST if plan.at_least is not None else 50 * plan.k + 20_000
        units = [piece.unit(i) for i, piece in enumerate(pieces)]
        hits = self._scanner.above(units, coded, cuts, bounded=bounded, most=most, signs=signs)
        clipped = hits.cuts > cuts
        if clipped.any() and (bounded or plan.at_least is not None):
            return False  # too many to collect what was asked for
        if clipped.any():
            least = np.where(clipped, np.maximum(least, law.similarity_at(hits.cuts, risk)), least)
        rest = np.ones(len(hits.which), bool)
        if plan.at_least is None and not bounded:
            first = self._compare_best(pieces, coded, hits, plan.k, found)
            rest = hits.estimate >= cut(np.maximum(found.kth(plan.k), least))[hits.which]
            rest[first] = False
        self._compare(pieces, coded, hits, np.flatnonzero(rest), found)
        found.complete_above = np.maximum(found.complete_above, least)
        return True

    def _compare_best(self, pieces: Sequence[_Piece], probes: Probes, hits: Hits, k: int, found: _Found) -> Int64:
        """Compares the k best of each probe by their estimates; returns which they were."""
        order, rank = ranked(hits.which, hits.estimate, hits.cell, len(probes.codes))
        best = order[rank < k]
        self._compare(pieces, probes, hits, best, found)
        return best

    def _compare(self, pieces: Sequence[_Piece], probes: Probes, hits: Hits, chosen: Int64, found: _Found) -> None:
        """Compares some of the hits exactly, in the order of the disk."""
        chosen = chosen[np.argsort(hits.number[chosen].astype(np.int64) << 40 | hits.cell[chosen])]
        mine = [(piece, chosen[hits.number[chosen] == number]) for number, piece in enumerate(pieces)]

        def compare(one: tuple[_Piece, Int64]) -> None:
            piece, some = one
            which, cells = hits.which[some], hits.cell[some]
            similarity = compared(piece.column, cells, probes.rotated, which)
            found.add(which.astype(np.int64), piece.rows(cells), similarity, compared=len(some))
            if len(some) > _RELEASE_PAIRS:
                piece.column.release(forget=False)

        self._scanner.each(
            compare, [(p, some[low : low + PIECE_ROWS]) for p, some in mine for low in range(0, len(some), PIECE_ROWS)]
        )
        for piece, some in mine if self._snapshot.streamed else ():
            if piece.column in self._snapshot.streamed and len(some) > _READ_THROUGH_PAIRS:
                piece.column.release(forget=True)


def _cheapest_signs(column: Column, probes: Probes, least: Float32, miss_risk: float) -> Signs | None:
    """By which signs to search for rows of at least these similarities; None where all upper halves are compared sooner, as they
    are where no byte shuffles are to be had."""
    if INSTRUCTIONS not in _COSTS:
        return None
    table, compared, taken, number = _COSTS[INSTRUCTIONS]
    options = []
    some = slice(None, None, max(len(least) // _FORESEEN_BY, 1))
    all_signs = signs_of(column, SIGN_TABLES).tables
    for each, tables in (
        (SIGN_TABLES, all_signs // 8 * 4),
        (SIGN_TABLES, all_signs * 3 // 16 * 4),
        (SIGN_TABLES, TABLES_MOST),
        (CLASS_TABLES, TABLES_MOST),
    ):
        if not tables:
            continue
        signs = signs_of(column, each, tables)
        law = signs.quick_law
        share = signs.share_passing(law.cut(least[some], -float(ndtri(miss_risk / 2))), probes.rotated[some])
        options.append((signs.tables * table + share * compared + taken / len(probes.codes), each, tables))
    cost, each, tables = min(options)
    if cost >= probes.codec.scanned * number:
        return None
    signs = signs_of(column, each, tables)
    return signs if signs.laws[0].margin(miss_risk)[1] else None


_Result = TypeVar("_Result")
_HasColumn = TypeVar("_HasColumn", bound="_Coded")


class _Coded(Protocol):
    @property
    def column(self) -> Column: ...


def by_codec(pieces: Iterable[_HasColumn]) -> tuple[list[_HasColumn], list[list[_HasColumn]]]:
    """A shard's pieces: those that are compared exactly, and the others by their codec."""
    groups: dict[str, list[_HasColumn]] = {}
    for piece in pieces:
        groups.setdefault(piece.column.codec.codec_id if piece.column.codec else "", []).append(piece)
    exact = groups.pop("", [])
    coded = []
    for group in groups.values():
        if sum(piece.column.count for piece in group) > EXACT_CELLS:
            coded.append(group)
        else:
            exact += group
    return exact, coded


class _Found:
    """What a shard has found so far. Thread-safe."""

    def __init__(self, probes: int, version: int) -> None:
        self.complete_above = np.full(probes, -np.inf, np.float32)
        self.scanned = 0
        self._version = version
        self._compared = 0
        self._pieces: list[tuple[Int64, Int64, Float32]] = []
        self._lock = threading.Lock()

    def add(self, which: Int64, rows: Int64, similarity: Float32, compared: int = 0) -> None:
        with self._lock:
            self._pieces.append((which, rows, similarity))
            self._compared += compared

    def kth(self, k: int) -> Float32:
        """The k-th similarity of each probe so far, -inf where there are fewer."""
        answer = self.answer()
        return _best({0: answer}, len(self.complete_above), k)[1][:, -1]

    def answer(self) -> ShardHits:
        nothing = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
        which, rows, similarity = (np.concatenate(arrays) for arrays in zip(nothing, *self._pieces, strict=True))
        return ShardHits(which, rows, similarity, self.complete_above, self._version, self.scanned, self._compared)


class _Piece:
    """The cells of a part's column that a plan is about."""

    def __init__(self, snapshot: Snapshot, part: Part, plan: ShardQuery) -> None:
        self.column = part.columns[plan.column]
        self._snapshot, self._part, self._groups = snapshot, part, plan.groups
        self._hidden = frozenset[int]() if plan.besides is None else together.covered(part, plan.besides)
        end_row = part.end_row if plan.end_row is None else plan.end_row
        low, high = part.position_range(plan.from_row, max(end_row, plan.from_row))
        mine = 1 << COLUMNS.index(plan.column)
        covered = bool(self._hidden) and not any(bits & mine and bits not in self._hidden for bits in part.bits)
        searched = self.column.dimension is not None and not covered
        self.first, self.last = self.column.cell_range(low, high) if searched else (0, 0)

    def rows(self, cells: Int64) -> Int64:
        return self._part.rows(cells if self.column.full else self.column.positions(0, self.column.count)[cells])

    def unit(self, number: int) -> Unit:
        live = self._snapshot.live_bits(self._part, self.column, self._groups, self._hidden)
        return Unit(self.column, number, self.first, self.last, live)

    def tiles(self) -> Iterator[Tile]:
        mask = self._snapshot.mask(self._part, self._groups, self._hidden)
        for low in range(self.first, self.last, PIECE_ROWS):
            high = min(low + PIECE_ROWS, self.last)
            kept = None if mask is None else low + np.flatnonzero(mask[self.column.positions(low, high)])
            if kept is None or len(kept) == high - low:
                yield Tile(high - low, _reading(self.column, low, high), _rows_from(self, low), self.column.codec)
            elif len(kept):
                yield Tile(len(kept), _taking(self.column, kept), _rows_of(self, kept), self.column.codec)


def _reading(column: Column, low: int, high: int) -> Callable[[], Float32]:
    codec = column.codec
    return lambda: column.vectors(low, high) if codec is None else dequantise(*column.coded(codec, low, high))


def _taking(column: Column, cells: Int64) -> Callable[[], Float32]:
    return lambda: column.vectors_at(cells) if column.codec is None else dequantise(*column.codes_at(cells))


def _rows_from(piece: _Piece, low: int) -> Callable[[Int64], Int64]:
    return lambda near: piece.rows(low + near)


def _rows_of(piece: _Piece, cells: Int64) -> Callable[[Int64], Int64]:
    return lambda near: piece.rows(cells[near])


def local_shards(snapshot: Snapshot, scanner: Scanner) -> list[Shard]:
    """A snapshot as shards."""
    return [LocalShard(snapshot, parts, scanner) for parts in shares(snapshot)]


def shares(snapshot: Snapshot, rows_min: int = 1 << 20) -> list[Sequence[Part]]:
    """The parts of each shard: a large segment is one, the others are one together."""
    large = [part for part in snapshot.parts if part.count >= rows_min]
    small = [part for part in snapshot.parts if part.count < rows_min]
    return [*([part] for part in large), *([small] if small else [])]


def as_set(groups: Collection[str] | None) -> frozenset[str] | None:
    return None if groups is None else frozenset(groups)
