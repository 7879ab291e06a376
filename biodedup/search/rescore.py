"""Candidates of a probe: which rows to compare, and their comparison with every capture that both sides have.

Owns the path from a probe to ranked candidates, exact. Never writes and never decides.

1. Rows with a face go through the scan when the probe has one; the best `candidates` are compared with everything.
2. Rows that share only fingers with the probe are compared one by one, up to `finger_rows_max`; beyond it the result
   says `incomplete`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from biodedup.config import SearchConfig
from biodedup.gallery.gallery import Gallery
from biodedup.match.compare import Comparer, Comparison
from biodedup.search.scan import top_k
from biodedup.values import COLUMNS, FINGER_POSITIONS, Float32, Template

Probe = Mapping[str, Template]

_BIT = {column: 1 << index for index, column in enumerate(COLUMNS)}
_FINGER_BITS = sum(_BIT[position] for position in FINGER_POSITIONS)


@dataclass(frozen=True)
class Found:
    """What a probe met among the rows searched. incomplete: some comparable rows were not compared."""

    comparisons: tuple[Comparison, ...] = ()
    incomplete: bool = False


class GalleryRows:
    """A gallery's rows, as the comparer reads candidates."""

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery

    def columns(self, rows: Sequence[int]) -> list[tuple[str, ...]]:
        if not rows:
            return []
        presence = self._gallery.presence(0, max(rows) + 1)[list(rows)].tolist()
        names = {bits: tuple(column for column in COLUMNS if bits & _BIT[column]) for bits in set(presence)}
        return [names[bits] for bits in presence]

    def embeddings(self, rows: Sequence[int], column: str) -> Float32:
        vectors = self._gallery.column(column)
        return np.zeros((len(rows), 0), np.float32) if vectors is None else vectors.at(np.array(rows, np.int64))[1]

    def minutiae(self, rows: Sequence[int], column: str) -> dict[int, bytes]:
        return self._gallery.minutiae(rows, column)


class Searcher:
    """Searches a range of a gallery's rows."""

    def __init__(self, gallery: Gallery, comparer: Comparer, config: SearchConfig, threads: int) -> None:
        self._gallery = gallery
        self._comparer = comparer
        self._config = config
        self._threads = threads
        self._rows = GalleryRows(gallery)

    def search(self, probes: Sequence[Probe], low: int, high: int, *, floor_db: float = 0.0) -> list[Found]:
        """Each probe against the live rows in [low, high).

        floor_db: 0 asks for the strongest; above it, for all whose face reaches it, and for none that has only a weaker face.
        """
        if low >= high or not probes:
            return [Found()] * len(probes)
        presence = self._gallery.presence(low, high)
        found = []
        for probe, (rows, similarity) in zip(probes, self._near_faces(probes, low, high, floor_db), strict=True):
            fingers = _finger_bits(probe)
            with_fingers = (presence[rows - low] & fingers) != 0
            # The scan's order is final where the face is all there is: of these only the first can be returned.
            if floor_db > 0 and len(rows):
                worth = with_fingers | (self._comparer.score_db(probe["face"], similarity) >= floor_db)
            else:
                worth = with_fingers | (np.cumsum(~with_fingers) <= self._config.returned)
            only_fingers = (presence & fingers) != 0
            if "face" in probe:
                only_fingers &= (presence & _BIT["face"]) == 0
            others = low + np.flatnonzero(only_fingers)
            incomplete = len(others) > self._config.finger_rows_max
            chosen = np.concatenate([rows[worth], others[: self._config.finger_rows_max]])
            found.append(Found(tuple(self._comparer.compare(probe, self._rows, chosen.tolist())), incomplete))
        return found

    def nearest(self, column: str, probes: Float32, k: int, low: int, high: int) -> tuple[NDArray[np.int64], Float32]:
        """rows int64 (q, k), -1 pads, and similarity float32 (q, k), of the live rows in [low, high)."""
        vectors = self._gallery.column(column)
        if vectors is None:
            return np.full((len(probes), k), -1, np.int64), np.full((len(probes), k), -np.inf, np.float32)
        cell_rows, cells = vectors.between(low, high)
        live = self._gallery.presence(low, high)[cell_rows - low] != 0
        near, similarity = top_k(cells, probes, k, live, self._threads)
        rows = np.full_like(near, -1)
        rows[near >= 0] = cell_rows[near[near >= 0]]
        return rows, similarity

    def _near_faces(
        self, probes: Sequence[Probe], low: int, high: int, floor_db: float
    ) -> list[tuple[NDArray[np.int64], Float32]]:
        """Rows and similarity of each probe's nearest faces: `candidates` of them, and all that reach floor_db."""
        near = [(np.zeros(0, np.int64), np.zeros(0, np.float32))] * len(probes)
        todo = [i for i, probe in enumerate(probes) if "face" in probe]
        k = min(self._config.candidates, high - low)
        while todo:
            faces = np.array([probes[i]["face"].embedding for i in todo], np.float32)
            rows, similarity = self.nearest("face", faces, k, low, high)
            for i, found, values in zip(todo, rows, similarity, strict=True):
                near[i] = (found[found >= 0], values[found >= 0])
            if floor_db <= 0 or k >= high - low:
                break
            todo = [i for i in todo if len(near[i][0]) == k and self._reaches(probes[i], near[i][1][-1:], floor_db)]
            k = min(4 * k, high - low)
        return near

    def _reaches(self, probe: Probe, similarity: Float32, floor_db: float) -> bool:
        return bool(self._comparer.score_db(probe["face"], similarity)[0] >= floor_db)


def _finger_bits(probe: Probe) -> int:
    """The gallery's finger columns that compare with this probe, as a presence mask."""
    fingers = sum(_BIT[column] for column in probe if column != "face")
    if not fingers:
        return 0
    return _FINGER_BITS if fingers & _BIT["unknown"] else fingers | _BIT["unknown"]
