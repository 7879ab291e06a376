"""Candidates of a probe: which rows to compare, and their comparison with every capture that both sides have.

Owns the path from a probe to ranked candidates. Never writes and never decides.

1. Rows with a face go through the scan when the probe has one; the best `candidates` are compared with everything.
2. Rows that share only fingers with the probe are compared one by one, up to `finger_rows_max`; beyond it the result
   says `incomplete`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from biodedup.config import SearchConfig
from biodedup.errors import GalleryDamaged
from biodedup.gallery.part import Part
from biodedup.gallery.snapshot import Snapshot
from biodedup.match.compare import Comparer, Comparison
from biodedup.search.scan import Scanner
from biodedup.search.shard import FanOut, Nearest, Plan, Shard, as_set, local_shards
from biodedup.values import COLUMNS, FINGER_POSITIONS, Float32, Template

Probe = Mapping[str, Template]

PROBES = 256
"""Probes that are scanned together."""
JOIN_ROWS = 1024
"""Rows of a gallery that are compared together with all behind them."""
_BIT = {column: 1 << index for index, column in enumerate(COLUMNS)}
_FINGER_BITS = sum(_BIT[position] for position in FINGER_POSITIONS)


@dataclass(frozen=True)
class Found:
    """What a probe met among the rows searched. incomplete: some comparable rows were not compared."""

    comparisons: tuple[Comparison, ...] = ()
    incomplete: bool = False


class SnapshotRows:
    """A snapshot's rows, as the comparer reads candidates."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self.embeddings = snapshot.embeddings
        self.minutiae = snapshot.minutiae

    def columns(self, rows: Sequence[int]) -> list[tuple[str, ...]]:
        presence = self._snapshot.presence(rows).tolist()
        names = {bits: tuple(column for column in COLUMNS if bits & _BIT[column]) for bits in set(presence)}
        return [names[bits] for bits in presence]


class Searcher:
    """Searches snapshots. Thread-safe."""

    def __init__(self, comparer: Comparer, config: SearchConfig, threads: int) -> None:
        self._comparer = comparer
        self._config = config
        self._scanner = Scanner(threads)
        self._fan_out = FanOut()

    def close(self) -> None:
        self._fan_out.close()
        self._scanner.close()

    def search(
        self,
        snapshot: Snapshot,
        probes: Sequence[Probe],
        *,
        from_row: int = 0,
        groups: Collection[str] | None = None,
        floor_db: float = 0.0,
    ) -> list[Found]:
        """Each probe against the live rows from from_row on; with groups, those that belong to one of them.

        floor_db: 0 asks for the strongest; above it, for all whose face reaches it, and for none that has only a weaker face.
        """
        if from_row >= snapshot.row_count or not probes:
            return [Found()] * len(probes)
        scope = _Scope(snapshot, from_row, as_set(groups))
        source = SnapshotRows(snapshot)
        found = []
        near, failures = self._near_faces(scope, probes, floor_db)
        for probe, (rows, similarity) in zip(probes, near, strict=True):
            fingers = _finger_bits(probe)
            with_fingers = (snapshot.presence(rows.tolist()) & fingers) != 0
            # The scan's order is final where the face is all there is: of these only the first can be returned.
            if floor_db > 0 and len(rows):
                worth = with_fingers | (self._comparer.score_db(probe["face"], similarity) >= floor_db)
            else:
                worth = with_fingers | (np.cumsum(~with_fingers) <= self._config.returned)
            others = scope.rows_with(fingers, without=_BIT["face"] if "face" in probe else 0)
            incomplete = len(others) > self._config.finger_rows_max or (failures and "face" in probe)
            chosen = np.concatenate([rows[worth], others[: self._config.finger_rows_max]])
            found.append(Found(tuple(self._comparer.compare(probe, source, chosen.tolist())), bool(incomplete)))
        return found

    def pairs(self, snapshot: Snapshot, rows: Sequence[int], threshold_db: float) -> list[tuple[int, Comparison]]:
        """Pairs of one of these live rows, ascending, and of a row behind it, that score threshold_db or more; each once."""
        if any(bits != _BIT["face"] for part in snapshot.parts for bits in part.bits):
            return self._pairs_of_several_columns(snapshot, rows, threshold_db)
        faces = snapshot.embeddings(rows, "face")
        model_id = snapshot.models["face"].model_id
        probe = Template("face", model_id, faces[0])
        least = np.full(len(rows), self._similarity_at({"face": probe}, threshold_db), np.float32)
        plan = replace(_Scope(snapshot, rows[0], None).plan("face", 1, self._config.miss_risk), at_least=least)
        reached = self._fan_out.reached(self._shards(snapshot), faces, plan)
        if reached.failures:
            raise GalleryDamaged(f"a join that cannot see everybody is no join: {reached.failures[0]}")
        source, found = SnapshotRows(snapshot), []
        for row, face, (others, _) in zip(rows, faces, reached.found, strict=True):
            behind = others[others > row]
            if len(behind):
                compared = self._comparer.compare({"face": Template("face", model_id, face)}, source, behind.tolist())
                found += [(row, comparison) for comparison in compared if comparison.score_db >= threshold_db]
        return found

    def _pairs_of_several_columns(
        self, snapshot: Snapshot, rows: Sequence[int], threshold_db: float
    ) -> list[tuple[int, Comparison]]:
        found: dict[tuple[int, int], tuple[int, Comparison]] = {}
        for start in range(0, len(rows), 32):
            some = rows[start : start + 32]
            probes = [snapshot.templates(row) for row in some]
            for row, one in zip(some, self.search(snapshot, probes, floor_db=threshold_db), strict=True):
                for comparison in one.comparisons:
                    # the other side's candidates may lack this pair, so that it counts whoever finds it
                    if comparison.row != row and comparison.score_db >= threshold_db:
                        found.setdefault((min(row, comparison.row), max(row, comparison.row)), (row, comparison))
        return list(found.values())

    def nearest(
        self,
        snapshot: Snapshot,
        column: str,
        probes: Float32,
        k: int,
        *,
        from_row: int = 0,
        groups: Collection[str] | None = None,
    ) -> Nearest:
        """The live rows from from_row on that are most similar to each probe, float32 (q, d), unit rows; batch by batch."""
        scope = _Scope(snapshot, from_row, as_set(groups))
        shards = self._shards(snapshot)
        plan = scope.plan(column, min(k, max(scope.count, 1)), self._config.miss_risk)
        pieces = [
            self._fan_out.nearest(shards, probes[low : low + PROBES], plan)
            for low in range(0, max(len(probes), 1), PROBES)
        ]
        found = Nearest(
            np.concatenate([piece.rows for piece in pieces]),
            np.concatenate([piece.similarity for piece in pieces]),
            sum(piece.rows_scanned for piece in pieces),
            sum(piece.compared for piece in pieces),
            tuple(dict.fromkeys(text for piece in pieces for text in piece.failures)),
        )
        if plan.k == k:
            return found
        padding = ((0, 0), (0, k - plan.k))
        return replace(
            found,
            rows=np.pad(found.rows, padding, constant_values=-1),
            similarity=np.pad(found.similarity, padding, constant_values=-np.inf),
        )

    def _shards(self, snapshot: Snapshot) -> Sequence[Shard]:
        return local_shards(snapshot, self._scanner)

    def _near_faces(
        self, scope: _Scope, probes: Sequence[Probe], floor_db: float
    ) -> tuple[list[tuple[NDArray[np.int64], Float32]], bool]:
        """Rows and similarity of each probe's nearest faces, `candidates` of them and all that reach floor_db; and whether a
        shard failed."""
        near = [(np.zeros(0, np.int64), np.zeros(0, np.float32))] * len(probes)
        todo = [i for i, probe in enumerate(probes) if "face" in probe]
        if not todo:
            return near, False
        faces = np.array([probes[i]["face"].embedding for i in todo], np.float32)
        nearest = self.nearest(
            scope.snapshot, "face", faces, self._config.candidates, from_row=scope.from_row, groups=scope.groups
        )
        failed = bool(nearest.failures)
        for i, rows, similarity in zip(todo, nearest.rows, nearest.similarity, strict=True):
            near[i] = (rows[rows >= 0], similarity[rows >= 0])
        if floor_db > 0:
            full = len(near[todo[0]][0]) == self._config.candidates  # there may be more
            more = [i for i in todo if full and self._reaches(probes[i], near[i][1][-1:], floor_db)]
            if more:
                faces = np.array([probes[i]["face"].embedding for i in more], np.float32)
                least = np.array([self._similarity_at(probes[i], floor_db) for i in more], np.float32)
                plan = replace(scope.plan("face", 1, self._config.miss_risk), at_least=least)
                reached = self._fan_out.reached(self._shards(scope.snapshot), faces, plan)
                failed |= bool(reached.failures)
                near = [dict(zip(more, reached.found, strict=True)).get(i, found) for i, found in enumerate(near)]
        return near, failed

    def _reaches(self, probe: Probe, similarity: Float32, floor_db: float) -> bool:
        return bool(len(similarity) and self._comparer.score_db(probe["face"], similarity)[0] >= floor_db)

    def _similarity_at(self, probe: Probe, floor_db: float) -> float:
        """The least similarity of a face that reaches floor_db."""
        grid = np.linspace(-1, 1, 4001, dtype=np.float32)
        return float(grid[np.searchsorted(self._comparer.score_db(probe["face"], grid), floor_db).clip(1, 4000) - 1])


class _Scope:
    """The rows that a search sees."""

    def __init__(self, snapshot: Snapshot, from_row: int, groups: frozenset[str] | None) -> None:
        self.snapshot = snapshot
        self.from_row = from_row
        self.groups = groups

    @property
    def count(self) -> int:
        """Rows in scope, of all groups."""
        return sum(part.count - part.position_range(part.first_row, self.from_row)[1] for part in self._parts())

    def plan(self, column: str, k: int, miss_risk: float) -> Plan:
        return Plan(column, k, self._among(column), miss_risk, None, self.groups, self.from_row)

    def _among(self, column: str) -> int:
        """Cells of a column in scope: of those in one of the groups, where groups are given."""
        total = 0
        for part in self._parts():
            cells = part.columns.get(column)
            if cells is not None:
                low, high = cells.cell_range(*part.position_range(self.from_row, part.end_row))
                mask = None if self.groups is None else self.snapshot.mask(part, self.groups)
                total += high - low if mask is None else min(int(np.count_nonzero(mask)), high - low)
        return total

    def rows_with(self, bits: int, *, without: int) -> NDArray[np.int64]:
        """Rows that have a template in one of the columns `bits`, and none in `without`."""
        found = [np.zeros(0, np.int64)]
        for part in self._parts():
            if not bits or not any(has & bits and not has & without for has in part.bits):
                continue
            low, _ = part.position_range(self.from_row, part.end_row)
            presence = part.presence(low, part.count)
            wanted = ((presence & bits) != 0) & ((presence & without) == 0)
            mask = self.snapshot.mask(part, self.groups)
            if mask is not None:
                wanted &= mask[low:]
            found.append(part.rows(low + np.flatnonzero(wanted)))
        return np.concatenate(found)

    def _parts(self) -> Iterator[Part]:
        return (part for part in self.snapshot.parts if part.end_row > self.from_row and part.count)


def _finger_bits(probe: Probe) -> int:
    """The gallery's finger columns that compare with this probe, as a presence mask."""
    fingers = sum(_BIT[column] for column in probe if column != "face")
    if not fingers:
        return 0
    return _FINGER_BITS if fingers & _BIT["unknown"] else fingers | _BIT["unknown"]
