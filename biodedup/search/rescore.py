"""Candidates of a probe: which rows to compare, and their comparison with every capture that both sides have.

Owns the path from a probe to ranked candidates. Never writes and never decides.

1. Rows with a face go through the scan when the probe has one; the best `candidates` are compared with everything.
2. Rows that share only fingers with the probe are compared one by one, up to `finger_rows_max`; beyond it the result
   says `incomplete`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from biodedup.config import SearchConfig
from biodedup.gallery.part import PIECE_ROWS, Column, Part
from biodedup.gallery.snapshot import Snapshot
from biodedup.match.compare import Comparer, Comparison
from biodedup.search.scan import Scanner, Tile
from biodedup.values import COLUMNS, FINGER_POSITIONS, Float32, Template

Probe = Mapping[str, Template]

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

    def close(self) -> None:
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
        scope = _Scope(snapshot, from_row, groups)
        source = SnapshotRows(snapshot)
        found = []
        for probe, (rows, similarity) in zip(probes, self._near_faces(scope, probes, floor_db), strict=True):
            fingers = _finger_bits(probe)
            with_fingers = (snapshot.presence(rows.tolist()) & fingers) != 0
            # The scan's order is final where the face is all there is: of these only the first can be returned.
            if floor_db > 0 and len(rows):
                worth = with_fingers | (self._comparer.score_db(probe["face"], similarity) >= floor_db)
            else:
                worth = with_fingers | (np.cumsum(~with_fingers) <= self._config.returned)
            others = scope.rows_with(fingers, without=_BIT["face"] if "face" in probe else 0)
            incomplete = len(others) > self._config.finger_rows_max
            chosen = np.concatenate([rows[worth], others[: self._config.finger_rows_max]])
            found.append(Found(tuple(self._comparer.compare(probe, source, chosen.tolist())), incomplete))
        return found

    def nearest(
        self,
        snapshot: Snapshot,
        column: str,
        probes: Float32,
        k: int,
        *,
        from_row: int = 0,
        groups: Collection[str] | None = None,
    ) -> tuple[NDArray[np.int64], Float32]:
        """rows int64 (q, k), -1 pads, and similarity float32 (q, k), -inf pads, of the live rows from from_row on."""
        return self._scanner.top_k(_Scope(snapshot, from_row, groups).tiles(column), probes, k)

    def _near_faces(
        self, scope: _Scope, probes: Sequence[Probe], floor_db: float
    ) -> list[tuple[NDArray[np.int64], Float32]]:
        """Rows and similarity of each probe's nearest faces: `candidates` of them, and all that reach floor_db."""
        near = [(np.zeros(0, np.int64), np.zeros(0, np.float32))] * len(probes)
        todo = [i for i, probe in enumerate(probes) if "face" in probe]
        in_scope = scope.snapshot.row_count - scope.from_row
        k = min(self._config.candidates, in_scope)
        while todo:
            faces = np.array([probes[i]["face"].embedding for i in todo], np.float32)
            rows, similarity = self._scanner.top_k(scope.tiles("face"), faces, k)
            for i, found, values in zip(todo, rows, similarity, strict=True):
                near[i] = (found[found >= 0], values[found >= 0])
            if floor_db <= 0 or k >= in_scope:
                break
            todo = [i for i in todo if len(near[i][0]) == k and self._reaches(probes[i], near[i][1][-1:], floor_db)]
            k = min(4 * k, in_scope)
        return near

    def _reaches(self, probe: Probe, similarity: Float32, floor_db: float) -> bool:
        return bool(self._comparer.score_db(probe["face"], similarity)[0] >= floor_db)


class _Scope:
    """The rows that a search sees."""

    def __init__(self, snapshot: Snapshot, from_row: int, groups: Collection[str] | None) -> None:
        self.snapshot = snapshot
        self.from_row = from_row
        self._groups = groups

    def tiles(self, column: str) -> Iterator[Tile]:
        """The embeddings of a column."""
        for part, low, mask in self._parts():
            cells = part.columns.get(column)
            if cells is None or cells.dimension is None:
                continue
            first, last = cells.cell_range(low, part.count)
            for start in range(first, last, PIECE_ROWS):
                tile = _tile(part, cells, start, min(start + PIECE_ROWS, last), mask)
                if tile.count:
                    yield tile

    def rows_with(self, bits: int, *, without: int) -> NDArray[np.int64]:
        """Rows that have a template in one of the columns `bits`, and none in `without`."""
        found = [np.zeros(0, np.int64)]
        for part, low, mask in self._parts():
            if not bits or not any(has & bits and not has & without for has in part.bits):
                continue
            presence = part.presence(low, part.count)
            wanted = ((presence & bits) != 0) & ((presence & without) == 0)
            if mask is not None:
                wanted &= mask[low:]
            found.append(part.rows(low + np.flatnonzero(wanted)))
        return np.concatenate(found)

    def _parts(self) -> Iterator[tuple[Part, int, NDArray[np.bool_] | None]]:
        """(part, first position in scope, which of its rows are)."""
        for part in self.snapshot.parts:
            if part.end_row > self.from_row and part.count:
                low, _ = part.position_range(self.from_row, part.end_row)
                yield part, low, self.snapshot.mask(part, self._groups)


def _tile(part: Part, column: Column, first: int, last: int, mask: NDArray[np.bool_] | None) -> Tile:
    if mask is None or (keep := mask[column.positions(first, last)]).all():
        return Tile(
            last - first,
            lambda: column.vectors(first, last),
            lambda near: part.rows(first + near if column.full else column.positions(first, last)[near]),
        )
    kept = first + np.flatnonzero(keep)
    return Tile(
        len(kept),
        lambda: column.vectors_at(kept),
        lambda near: part.rows(kept[near] if column.full else column.positions(first, last)[kept[near] - first]),
    )


def _finger_bits(probe: Probe) -> int:
    """The gallery's finger columns that compare with this probe, as a presence mask."""
    fingers = sum(_BIT[column] for column in probe if column != "face")
    if not fingers:
        return 0
    return _FINGER_BITS if fingers & _BIT["unknown"] else fingers | _BIT["unknown"]
