"""Searches the newest snapshot of the gallery for several callers at once.

Owns the choice of the snapshot, and the number of extra candidates. Never compares (`search/searcher.py`), decides or writes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from biodedup.engine.joining import Joining
from biodedup.engine.log import EngineLog
from biodedup.engine.prepare import Probe, check_models
from biodedup.engine.sample import GallerySamples
from biodedup.errors import ModelMismatch
from biodedup.gallery.files import packed
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.snapshot import Snapshot
from biodedup.match.candidates import JoinedCandidates, TemplateCandidates
from biodedup.match.ranked import Ranked
from biodedup.match.staged import Stage
from biodedup.search.batching import Batcher
from biodedup.search.scope import Scope
from biodedup.search.searcher import PROBES, CandidateSet, Searcher, SnapshotRows
from biodedup.search.selfjoin.join import SelfJoin
from biodedup.trace import untraced
from biodedup.values import Float32, SearchResult, Template

_Groups = tuple[str, ...] | None
_NearestKey = tuple[str, int, _Groups, float | None]
"""Column, number of subjects, groups and least similarity of a search; searches with the same key are batched."""
_ADDED_MAX = 1024
"""If more than this number of rows were added after a search, each probe is searched separately."""


@dataclass(frozen=True)
class SearchSnapshot:
    """The search results of some probes. found: one result for each probe, in the order of the probes; snapshot: the searched snapshot;
    across: whether fingers were compared across positions; extra_k: the number of extra candidates that were searched for; searcher: the
    searcher with the calibrations of this search, which the whole decision uses."""

    found: Sequence[CandidateSet]
    snapshot: Snapshot
    across: bool
    extra_k: int
    searcher: Searcher


class BatchedSearch:
    """Searches one gallery. Calls that wait at the same time share one scan. samples: the subjects that calibrate the scores.
    Thread-safe."""

    def __init__(
        self, gallery: Gallery, searcher: Searcher, join: SelfJoin, samples: GallerySamples, log: EngineLog
    ) -> None:
        self._log = log
        self._gallery = gallery
        self._searcher = searcher
        self._join = join
        self._samples = samples
        self._probes = Batcher(self._search, PROBES)
        self._vectors = Batcher(self._nearest_each, PROBES)

    def search(
        self,
        probes: Sequence[Probe],
        *,
        across: bool,
        groups: _Groups = None,
        extra_k: int = 0,
        from_db: float | None = None,
    ) -> SearchSnapshot:
        """Searches for subjects and open cases that may be the same person as each probe.

        groups: search only subjects in at least one of these groups. extra_k: the number of extra candidates, because the decision may
        leave out this number of candidates. from_db: the lowest score in dB of a candidate, if lower than the review threshold."""
        with self._log.timed(len(probes), self._gallery.snapshot().row_count):
            seen = self._probes((groups, across, extra_k, from_db), [probe.templates for probe in probes])
        _, snapshot, searcher = seen[0]
        return SearchSnapshot([found for found, *_ in seen], snapshot, across, extra_k, searcher)

    def compared_with_added(
        self, probes: Sequence[Probe], seen: SearchSnapshot, now: Snapshot
    ) -> Sequence[Ranked | None]:
        """Compares each probe with the rows that were added after its search, and with the earlier probes of its batch.

        The earlier probes may become rows before the probe is decided. Comparisons that cannot change the decision are left out. One call
        compares all pairs, which is faster than a search for each probe. The result is None for a probe that only has embeddings, and
        for a probe with fewer candidates than the search returns. All results are None in these cases: too many rows were added; an added
        row is of a subject with several rows; the model of a probe differs from the present model of its column."""
        from_row, count = seen.snapshot.row_count, now.row_count
        since = _rows_added(probes, seen.snapshot, now)
        if since is None:
            return [None] * len(probes)
        earlier = TemplateCandidates(*(probe.templates for probe in probes))
        scope = Scope(now, from_row, None, seen.across, seen.extra_k)
        rows, stages, is_compared = list[NDArray[np.int64]](), list[Stage | None](), list[bool]()
        for i, (probe, found) in enumerate(zip(probes, seen.found, strict=True)):
            counted = np.ones(len(found.comparisons), bool)
            above = seen.searcher.weakest_shown(found.comparisons, counted, seen.extra_k)
            has_more = any(map(seen.searcher.comparer.has_minutiae_to_add, probe.templates.values()))
            is_compared.append(above is not None and has_more)
            rows.append(np.concatenate([since, count + np.arange(i)]) if is_compared[i] else np.zeros(0, np.int64))
            stages.append(seen.searcher.stage(probe.templates, scope, above=above))
        compared = seen.searcher.comparer.compare_each(
            [probe.templates for probe in probes],
            JoinedCandidates(SnapshotRows(now), earlier, count),
            rows,
            across=seen.across,
            subjects=[None] * len(probes),
            stages=stages,
        )
        return [ranked if known else None for known, ranked in zip(is_compared, compared, strict=True)]

    def search_since(
        self,
        probe: Probe,
        found: CandidateSet,
        seen: SearchSnapshot,
        now: Snapshot,
        uncounted: Collection[int] = (),
        added: Ranked | None = None,
    ) -> CandidateSet:
        """Completes the result of `search` for one probe with the rows that were added after the search.

        uncounted: rows that cannot be candidates. added: the result of `compared_with_added`. If more rows are left out than extra
        candidates were searched for, the search may have missed other candidates. Then all rows are searched again.
        """
        before, extra_k = found.comparisons, max(seen.extra_k, len(uncounted))
        searcher, left_out = seen.searcher, np.zeros(len(before), bool)
        changed, joined = _changed_since(seen.snapshot, now, before.rows)
        if len(before):
            left_out = ~now.are_present(before.rows) | np.isin(before.rows, [*uncounted, *changed.tolist()])
        thresholds_db = searcher.thresholds_db(probe.templates, now, across=seen.across)
        lower = any(a > b for a, b in zip(found.complete_db, thresholds_db, strict=True))
        search_all = lower or np.count_nonzero(left_out) > seen.extra_k
        if not search_all and added is not None and not (len(added) or len(changed) or joined or left_out.any()):
            return replace(
                found, comparisons=before.with_others(added)
            )  # `added` has no rows, only a count of comparisons
        if not search_all:
            from_row = seen.snapshot.row_count
            may_find = searcher.may_find(now, probe.templates, from_row, thresholds_db[1], across=seen.across)
            if not may_find and not len(changed):
                return found
            # a subject with several rows may score lower than one of its rows
            above = None if now.extra_rows else searcher.weakest_shown(before, ~left_out, extra_k)
            since = self._since(searcher, probe, now, seen, from_row, extra_k, above=above, also=changed)
            before = before.without(changed)
        if search_all:
            self._log.searched_again()
            return self._since(searcher, probe, now, seen, 0, extra_k)
        incomplete = found.incomplete or since.incomplete
        complete_db = np.maximum(found.complete_db, since.complete_db)
        return CandidateSet(before.with_others(since.comparisons), incomplete, found.across, (*complete_db.tolist(),))

    @staticmethod
    def _since(
        searcher: Searcher,
        probe: Probe,
        now: Snapshot,
        seen: SearchSnapshot,
        from_row: int,
        extra_k: int,
        above: tuple[float, float] | None = None,
        also: Collection[int] = (),
    ) -> CandidateSet:
        (found,) = searcher.search(
            now, [probe.templates], from_row=from_row, across=seen.across, extra_k=extra_k, above=above, also=also
        )
        return found

    def nearest(
        self, column: str, probes: Float32, k: int, groups: _Groups, min_similarity: float | None
    ) -> SearchResult:
        """Returns the k nearest subjects of each probe in one column, of at least min_similarity. probes: float32 (q, d), unit rows."""
        key = (column, k, groups, min_similarity)
        with self._log.timed(len(probes), self._gallery.snapshot().row_count):
            if len(probes) >= PROBES or not len(probes):  # large enough for its own scan
                return self._nearest(key, probes)
            results = self._vectors(key, list(probes))
        ids, similarity = np.stack([r.ids for r in results]), np.stack([r.similarity for r in results])
        return SearchResult(ids, similarity, results[0].gallery_version, results[0].incomplete)

    def joining(self, snapshot: Snapshot, rows: NDArray[np.int64], threshold_db: float, *, with_all: bool) -> Joining:
        """Returns the join of these live rows with all later rows. with_all: join them with all other rows instead."""
        join = self._join.calibrated_on(self._samples.of(snapshot))
        return Joining(join, snapshot, rows, threshold_db, with_all=with_all)

    def _search(
        self, key: tuple[_Groups, bool, int, float | None], probes: list[Mapping[str, Template]]
    ) -> list[tuple[CandidateSet, Snapshot, Searcher]]:
        (groups, across, extra_k, from_db), snapshot = key, self._gallery.snapshot()
        searcher = self._searcher.calibrated_on(self._samples.of(snapshot))
        with untraced():  # the probes belong to several callers
            results = searcher.search(snapshot, probes, groups=groups, across=across, extra_k=extra_k, from_db=from_db)
        return [(found, snapshot, searcher) for found in results]

    def _nearest_each(self, key: _NearestKey, probes: list[Float32]) -> list[SearchResult]:
        batch = self._nearest(key, np.array(probes))
        return [replace(batch, ids=ids, similarity=near) for ids, near in zip(batch.ids, batch.similarity, strict=True)]

    def _nearest(self, key: _NearestKey, probes: Float32) -> SearchResult:
        column, k, groups, least = key
        snapshot = self._gallery.snapshot().enrolled
        floor = None if least is None else np.full(len(probes), least, np.float32)
        row_k = k
        while True:
            nearest = self._searcher.nearest(snapshot, column, probes, row_k, groups=groups, floor_similarity=floor)
            is_row = nearest.rows >= 0
            names = np.full(is_row.shape, "", object)
            names[is_row] = snapshot.subject_ids(nearest.rows[is_row].tolist())
            if not snapshot.extra_rows:
                return SearchResult(names, nearest.similarity, snapshot.version, bool(nearest.failures))
            ids, similarity = _first_of_each(names, nearest.similarity, k)
            # several rows may be of one subject, so row_k rows may hold fewer than k subjects
            if not (is_row[:, -1] & (ids[:, -1] == "")).any():
                return SearchResult(ids, similarity, snapshot.version, bool(nearest.failures))
            row_k *= 2


def _rows_added(probes: Sequence[Probe], before: Snapshot, now: Snapshot) -> NDArray[np.int64] | None:
    """Returns the live rows that were added after a snapshot, if the probes of a batch can be compared with these rows and with each other
    in one call; else None."""
    from_row, count = before.row_count, now.row_count
    columns = set[str]().union(*(probe.templates for probe in probes))
    is_alone = count == from_row and len(probes) == 1
    if is_alone or count - from_row > _ADDED_MAX or not columns <= now.models.keys():
        return None
    try:
        for probe in probes:
            check_models(probe.templates, now.models)
    except ModelMismatch:
        return None  # `Enrolment.decide` raises the error for that probe only
    rows = np.arange(from_row, count)
    rows = rows[now.are_present(rows)]
    return rows if now.with_siblings(rows)[1] is None else None


def _changed_since(before: Snapshot, now: Snapshot, compared: NDArray[np.int64]) -> tuple[NDArray[np.int64], bool]:
    """Returns (all rows, ascending, of subjects that had a row before and have gained or lost a row; whether a gained row is of a subject
    with several rows).

    The rows of one subject are scored together, so a gained or lost row changes the scores of the others. A subject also gains a row if a
    case is closed in its favour. compared: rows of the earlier snapshot; a row that is absent now is a lost row."""
    changed = np.zeros(0, np.int64)
    if not before.extra_rows and not now.extra_rows:
        return changed, False
    closed = np.setdiff1d(before.pending_rows, now.pending_rows)
    gained = np.append(closed, np.arange(before.row_count, now.row_count))
    rows, subjects = now.with_siblings(gained[now.are_present(gained)])
    joined = subjects is not None
    if subjects is not None:
        changed = rows[np.isin(subjects, subjects[rows < before.row_count])]
    if not before.extra_rows:
        return changed, joined
    lost = compared[~now.are_present(compared)]
    if not np.array_equal(before.tombstones, now.tombstones):
        lost = np.union1d(lost, np.setdiff1d(now.tombstones, before.tombstones, assume_unique=True))
    lost = lost[lost < before.row_count]
    if not len(lost):
        return changed, joined
    _, left = now.all_rows_of(packed.pack_text(before.subject_ids(lost.tolist())))
    return np.union1d(changed, left), joined


def _first_of_each(names: NDArray[np.object_], similarity: Float32, k: int) -> tuple[NDArray[np.object_], Float32]:
    """Returns (ids, similarity), (q, k) each: the k nearest subjects of each probe, with the similarity of the nearest row of each subject.
    names: (q, rows), most similar first."""
    ids, nearest = np.full((len(names), k), "", object), np.full((len(names), k), -np.inf, np.float32)
    for i, of_probe in enumerate(names.tolist()):
        first = {name: at for at, name in reversed(list(enumerate(of_probe))) if name}
        kept = sorted(first.values())[:k]
        ids[i, : len(kept)], nearest[i, : len(kept)] = names[i, kept], similarity[i, kept]
    return ids, nearest
