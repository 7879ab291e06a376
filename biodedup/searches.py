"""Searches of the gallery as it is, those of several callers made together.

Owns which snapshot a search sees, and how many it looks at beyond those that are returned. Never compares (`search/rescore.py`),
decides or writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from biodedup.gallery.gallery import Gallery
from biodedup.gallery.snapshot import Snapshot
from biodedup.match.judgement import kinds_of
from biodedup.probes import Probe
from biodedup.search.gather import Gathering
from biodedup.search.rescore import PROBES, Found, Searcher
from biodedup.trace import untraced
from biodedup.values import Float32, Link, SearchResult, Template

_Groups = tuple[str, ...] | None


@dataclass(frozen=True)
class Seen:
    """What was found for some probes, in their order. snapshot: of the gallery that was searched; across: positions were searched
    across; spare: so many more were looked at."""

    found: Sequence[Found]
    snapshot: Snapshot
    across: bool
    spare: int


class Searches:
    """Searches one gallery; callers who wait at the same time share a pass. Thread-safe."""

    def __init__(self, gallery: Gallery, searcher: Searcher) -> None:
        self._gallery = gallery
        self._searcher = searcher
        self._probes = Gathering(self._seek, PROBES)
        self._vectors = Gathering(self._nearest_each, PROBES)

    def seek(self, probes: Sequence[Probe], *, across: bool, groups: _Groups = None, besides: int = 0) -> Seen:
        """Everybody who may be the same person. groups: only subjects that belong to one of them. besides: so many more are looked at;
        as many as were judged to be somebody else than a probe's subject are so anyway."""
        different = self._gallery.snapshot().different
        spare = besides + max(len(different.get(probe.encounter.subject_id or "", ())) for probe in probes)
        seen = self._probes((groups, across, spare), [probe.templates for probe in probes])
        return Seen([found for found, _ in seen], seen[0][1], across, spare)

    def completed(self, probe: Probe, found: Found, seen: Seen, now: Snapshot) -> Found:
        """What `seek` found for a probe, with what it would find in the rows that came since."""
        (since,) = self._searcher.search(
            now,
            [probe.templates],
            from_row=seen.snapshot.row_count,
            across=seen.across,
            spare=seen.spare,
        )
        return Found(
            found.comparisons.with_others(since.comparisons), found.incomplete or since.incomplete, found.across
        )

    def nearest(self, column: str, probes: Float32, k: int, groups: _Groups) -> SearchResult:
        """The k nearest of each in one column. probes: float32 (q, d), unit rows."""
        key = (column, k, groups)
        if len(probes) >= PROBES or not len(probes):  # a batch by itself
            return self._nearest(key, probes)
        found = self._vectors(key, list(probes))
        ids, similarity = np.stack([one.ids for one in found]), np.stack([one.similarity for one in found])
        return SearchResult(ids, similarity, found[0].gallery_version, found[0].incomplete)

    def links(self, snapshot: Snapshot, rows: Sequence[int], threshold_db: float, *, with_all: bool) -> list[Link]:
        """Pairs of these rows with those behind them, or with_all, that reach the threshold and were not judged different."""
        found = self._searcher.pairs(snapshot, rows, threshold_db, with_all=with_all)
        kinds = [kinds_of([pair], threshold_db, threshold_db)[0] for _, pair in found]
        names = snapshot.subject_ids([row for pair in found for row in (pair[0], pair[1].row)])
        return [
            Link((names[2 * i], names[2 * i + 1]), pair.score_db, pair.extrapolated, pair.evidence, kind)
            for i, ((_, pair), kind) in enumerate(zip(found, kinds, strict=True))
            if not snapshot.are_different(names[2 * i], names[2 * i + 1])
        ]

    def _seek(
        self, key: tuple[_Groups, bool, int], probes: list[Mapping[str, Template]]
    ) -> list[tuple[Found, Snapshot]]:
        (groups, across, spare), snapshot = key, self._gallery.snapshot()
        with untraced():  # probes of several callers
            results = self._searcher.search(snapshot, probes, groups=groups, across=across, spare=spare)
        return [(found, snapshot) for found in results]

    def _nearest_each(self, key: tuple[str, int, _Groups], probes: list[Float32]) -> list[SearchResult]:
        found = self._nearest(key, np.array(probes))
        return [replace(found, ids=ids, similarity=near) for ids, near in zip(found.ids, found.similarity, strict=True)]

    def _nearest(self, key: tuple[str, int, _Groups], probes: Float32) -> SearchResult:
        column, k, groups = key
        snapshot = self._gallery.snapshot()
        found = self._searcher.nearest(snapshot, column, probes, k, groups=groups)
        there = found.rows >= 0
        names = np.full(there.shape, "", object)
        names[there] = snapshot.subject_ids(found.rows[there].tolist())
        return SearchResult(names, found.similarity, snapshot.version, bool(found.failures))
