"""Finds the gallery rows that are most similar to a probe, and ranks them by all captures that both sides have.

Owns the path from a probe to ranked candidates. Never writes, never decides, and never joins a gallery with itself (`selfjoin/`).

1. Rows that have several of the probe's columns of embeddings are searched in all of these columns at once (`multicolumn/`), other rows
   column by column. The best `candidates` rows are re-ranked: all captures that both sides have are compared.
2. Rows that share only columns of minutiae with the probe are compared by their minutiae, at most `finger_rows_max` rows. If there are more,
   the result is `incomplete`.
3. Re-ranking first compares the embeddings of all candidates, and then the minutiae of those whose decision they may change
   (`match/staged.py`).
4. Across positions, on request: a finger is also searched in the columns of all other fingers (`positions.py`), because labels may be
   wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from biodedup.config import Policy, SearchConfig
from biodedup.gallery.snapshot import Snapshot
from biodedup.match.candidates import check_dimension
from biodedup.match.compare import Comparer
from biodedup.match.encounters import presence_of_subjects
from biodedup.match.ranked import Ranked
from biodedup.match.scores.calibration import Calibration
from biodedup.match.scores.calibrations import SampleOf
from biodedup.match.staged import Stage
from biodedup.search.expected import thresholds_db
from biodedup.search.multicolumn.apart import ApartPlan
from biodedup.search.multicolumn.joint import JointPlan
from biodedup.search.multicolumn.plan import MultiColumnQuery, covered_presences, is_journal
from biodedup.search.multicolumn.planner import MultiColumnPlanner
from biodedup.search.multicolumn.scanned import ScannedPlan
from biodedup.search.native.scanner import Scanner
from biodedup.search.positions import comparable, comparable_bits, scanned_bits, strongest
from biodedup.search.scope import Scope
from biodedup.search.shards import faiss as faiss_engine
from biodedup.search.shards.base import Shard
from biodedup.search.shards.fan_out import FanOut, Nearest
from biodedup.search.shards.native import as_set
from biodedup.values import BIT, Float32, Template

TemplateSet = Mapping[str, Template]
"""A probe: column -> template."""
ShardsOf = Callable[[Snapshot, Scanner], Sequence[Shard]]
"""Divides a snapshot into shards, in this process or in others."""
_Capture = tuple[int, str]  # (number of the probe, its column)
_ColumnPair = tuple[str, str]  # (the probe's column, the gallery's column)
_Int64 = NDArray[np.int64]
_Near = tuple[_Int64, Float32]  # rows, and their similarity, descending

PROBES = 256
"""Number of probes that share a scan."""
SHOWN = 5
"""Number of candidates with minutiae that are compared in full and returned at any score."""
_SLACK_DB = 0.5
"""Margin for removals between the search and the commit: the thresholds fall by this much if one subject in ten is removed."""
_ROUNDING = 1e-4
"""Upper bound of the rounding error of cosines in single precision."""
_ONE_COLUMN_PROBES = 1024
"""Number of probes that share a search in a single column. Rows that are compared exactly are read from the disk once for all of them."""


@dataclass(frozen=True)
class CandidateSet:
    """The candidates of a probe. incomplete: some comparable rows were not compared. across: the search was across positions. complete_db:
    (llr_db of a finger, score_db of a candidate) from which no candidate was left out because of its embeddings."""

    comparisons: Ranked = field(default_factory=Ranked)
    incomplete: bool = False
    across: bool = False
    complete_db: tuple[float, float] = (0.0, 0.0)


class SnapshotRows:
    """A snapshot's rows, as `match.candidates.Candidates`."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.presence = snapshot.presence
        self.minutiae = snapshot.minutiae

    def similarities(self, rows: _Int64, column: str, probes: Float32, which: _Int64) -> Float32 | None:
        model = self.snapshot.models.get(column)
        if model is None or model.dimension is None:
            return None
        check_dimension(model.dimension, column, probes)
        return self.snapshot.similarities(rows, column, probes, which)

    def model_ids(self) -> Mapping[str, str]:
        return {column: model.model_id for column, model in self.snapshot.models.items()}


class Searcher:
    """Searches snapshots. Thread-safe."""

    def __init__(
        self,
        comparer: Comparer,
        config: SearchConfig,
        threads: int,
        policy: Callable[[], Policy] = Policy,
        shards_of: ShardsOf = faiss_engine.shards,
    ) -> None:
        self._comparer = comparer
        self._shards_of = shards_of
        self._config = config
        self._policy = policy
        self._planner = MultiColumnPlanner(comparer, config, policy)
        self.scanner = Scanner(threads)
        self.fan_out = FanOut()

    def calibrated_on(self, sample_of: SampleOf) -> Searcher:
        """The same searcher, with calibrations measured on these subjects."""
        searcher = copy(self)
        searcher._comparer = self._comparer.calibrated_on(sample_of)
        return searcher

    @property
    def comparer(self) -> Comparer:
        return self._comparer

    def close(self) -> None:
        self.fan_out.close()
        self.scanner.close()

    def search(
        self,
        snapshot: Snapshot,
        probes: Sequence[TemplateSet],
        *,
        from_row: int = 0,
        groups: Collection[str] | None = None,
        floor_db: float = 0.0,
        across: bool = False,
        extra_k: int = 0,
        from_db: float | None = None,
        excluded: Sequence[Collection[int]] = (),
        above: tuple[float, float] | None = None,
        also: Collection[int] = (),
    ) -> list[CandidateSet]:
        """Searches the live rows from from_row on for each probe. groups: only rows in one of these groups.

        floor_db: 0 asks for the strongest rows. Above 0 it asks for all rows that reach this score in a single column, and weaker rows that
        have only this column are left out. across: whether fingers are also compared with fingers of other labels. extra_k: number of
        additional rows, because so many rows may be removed from the result. from_db: a score below the review threshold from which rows
        matter, or None. excluded: for each probe, rows that are not compared with it. above: as `Stage.above`. also: live rows that are
        compared with every probe, also outside the scope.
        """
        if (from_row >= snapshot.row_count and not len(also)) or not probes:
            return [CandidateSet(across=across)] * len(probes)
        scope = Scope(snapshot, from_row, as_set(groups), across, extra_k)
        return _Search(
            searcher=self,
            comparer=self._comparer,
            config=self._config,
            scope=scope,
            probes=probes,
            floor_db=floor_db,
            from_db=from_db,
            above=above,
            also=also,
        ).run(excluded)

    def nearest(
        self,
        snapshot: Snapshot,
        column: str,
        probes: Float32,
        k: int,
        *,
        from_row: int = 0,
        groups: Collection[str] | None = None,
        skip_covered: MultiColumnQuery | None = None,
        skip_columns: int = 0,
        floor_similarity: Float32 | None = None,
    ) -> Nearest:
        """The live rows from from_row on that are most similar to each probe in a column. probes: float32 (q, d), unit rows.

        Left out are: rows that the query skip_covered covers; rows with one of the columns skip_columns, a presence mask; rows below
        floor_similarity, float32 (q,).
        """
        scope = Scope(snapshot, from_row, as_set(groups))
        shards = self.shards(snapshot)
        query = scope.query(column, min(k, max(scope.count, 1)), self._config.miss_risk)
        query, batches = replace(query, skip_covered=skip_covered, skip_columns=skip_columns), []
        for start in range(0, max(len(probes), 1), _ONE_COLUMN_PROBES):
            part = slice(start, start + _ONE_COLUMN_PROBES)
            of_part = replace(query, floor_similarity=None if floor_similarity is None else floor_similarity[part])
            batches.append(self.fan_out.nearest(shards, probes[part], of_part))
        rows = np.concatenate([batch.rows for batch in batches])
        similarity = np.concatenate([batch.similarity for batch in batches])
        if k > query.k:
            padding = ((0, 0), (0, k - query.k))
            rows = np.pad(rows, padding, constant_values=-1)
            similarity = np.pad(similarity, padding, constant_values=-np.inf)
        return Nearest(
            rows,
            similarity,
            sum(batch.rows_scanned for batch in batches),
            sum(batch.compared for batch in batches),
            tuple(dict.fromkeys(text for batch in batches for text in batch.failures)),
        )

    def shards(self, snapshot: Snapshot) -> Sequence[Shard]:
        return self._shards_of(snapshot, self.scanner)

    def multicolumn_query(
        self, snapshot: Snapshot, columns: Collection[str], rescored: Collection[str] = ()
    ) -> MultiColumnQuery | None:
        """The query for rows that have several of these columns, or None if there are no such rows. rescored: other columns, which are
        compared for the candidates alone."""
        return self._planner.query(snapshot, columns, rescored)

    def joint(self, snapshot: Snapshot, query: MultiColumnQuery | None) -> JointPlan | None:
        """The plan of this query for the rows of the journal; None if it does not cover them."""
        return self._planner.joint(snapshot, query) if query is not None and query.joint else None

    def scanned(self, snapshot: Snapshot, columns: Collection[str]) -> ScannedPlan | None:
        """The scanned columns, and the miss risk of not scanning the others; None if all columns are scanned."""
        return self._planner.scanned(snapshot, columns)

    def apart(self, snapshot: Snapshot, columns: Collection[str]) -> ApartPlan | None:
        """The miss risk of searching these columns one after the other with FAISS; None if the native engine searches them."""
        return self._planner.apart(snapshot, columns)

    def weakest_shown(self, ranked: Ranked, counted: NDArray[np.bool_], extra_k: int) -> tuple[float, float] | None:
        """(score_db, llr_db) by embeddings of the last candidate that is returned at any score. A row of a later search needs more to be among
        them. counted: bool (n,), the rows of the earlier search that are candidates. None if there are fewer candidates."""
        score_db, llr_db = ranked.by_embeddings[:, counted]
        number = min(self._config.returned, SHOWN) + extra_k - 1
        if len(score_db) <= number:
            return None
        at = np.lexsort((-llr_db, -score_db))[number]
        return float(score_db[at]), float(llr_db[at])

    def compare(
        self,
        probe: TemplateSet,
        source: SnapshotRows,
        rows: _Int64,
        excluded: Collection[int],
        across: bool = False,
    ) -> Ranked:
        """Compares the probe with the subjects of these rows: with all rows of each subject, except the excluded rows."""
        rows, subjects = _with_siblings(source.snapshot, rows, excluded)
        return self._comparer.compare(probe, source, rows, across=across, subjects=subjects)

    def thresholds_db(self, probe: TemplateSet, snapshot: Snapshot, *, across: bool) -> tuple[float, float]:
        """The scores from which a candidate of this probe is a duplicate, and from which it goes to review."""
        return thresholds_db(self._comparer, self._policy(), probe, snapshot, across=across)

    def stage(
        self,
        probe: TemplateSet,
        scope: Scope,
        *,
        floor_db: float = 0.0,
        from_db: float | None = None,
        above: tuple[float, float] | None = None,
    ) -> Stage:
        """The choice of the candidates that a search compares in full. The other arguments are those of `search`."""
        risk, correlation = self._config.miss_risk, self._config.capture_correlation
        if floor_db > 0:
            return Stage(0, floor_db, risk, correlation=correlation)
        duplicate_db, review_db = self.thresholds_db(probe, scope.snapshot, across=scope.across)
        reach_db = (review_db if from_db is None else min(review_db, from_db)) - _SLACK_DB
        first = min(self._config.returned, SHOWN) + scope.extra_k
        return Stage(first, reach_db, risk, duplicate_db - _SLACK_DB, correlation, above=above)

    def may_find(
        self, snapshot: Snapshot, probe: TemplateSet, from_row: int, review_db: float, *, across: bool
    ) -> bool:
        """Whether `search` may return a row from from_row on; far faster than a search of a few rows. review_db: as in `thresholds_db`. It
        decides only for a single shared column and rows that are not sealed yet, by the rule of `_floor_similarities`; otherwise True."""
        if from_row >= snapshot.row_count:
            return False
        column, models = _only_column(probe, snapshot, across=across), snapshot.models
        template = None if column is None else probe[column]
        if template is None or template.embedding is None or self._comparer.has_minutiae_to_add(template):
            return True
        if template.model_id != models[template.column].model_id:
            return True
        if any(own != column and comparable(own, template.column, across=across) for own in probe):
            return True  # another finger of the probe may be the one under this label
        nearest = -np.inf
        for part in snapshot.parts:
            if part.end_row > from_row and template.column in part.columns:
                cells = part.columns[template.column]
                low, high = cells.cell_range(*part.position_range(from_row, part.end_row))
                if low < high:
                    if cells.codec is not None:
                        return True
                    nearest = max(nearest, float((cells.vectors(low, high) @ template.embedding).max()))
        if nearest == -np.inf:
            return False
        return bool(self._comparer.score_db(template, np.array([nearest + _ROUNDING]))[0] >= review_db - _SLACK_DB)

    def similarity_reaching(self, model_id: str, score_db: float) -> float:
        """The lowest similarity that scores score_db."""
        grid, scores_db = _scores_of_grid(self._comparer.calibration(model_id))
        return float(grid[min(max(int(np.searchsorted(scores_db, score_db)), 1), len(grid) - 1) - 1])


class _Search:
    """A call of `Searcher.search`: the rows that are found for each probe, and whether a shard failed."""

    def __init__(
        self,
        searcher: Searcher,
        comparer: Comparer,
        config: SearchConfig,
        scope: Scope,
        probes: Sequence[TemplateSet],
        floor_db: float,
        from_db: float | None,
        above: tuple[float, float] | None,
        also: Collection[int],
    ) -> None:
        self._searcher, self._comparer, self._config = searcher, comparer, config
        self._scope, self._snapshot, self._models = scope, scope.snapshot, scope.snapshot.models
        self._probes, self._floor_db = probes, floor_db
        self._shards = searcher.shards(scope.snapshot)
        self._returned = config.returned + scope.extra_k
        self._near: list[dict[_ColumnPair, _Near]] = [{} for _ in probes]
        """For each probe, pair of columns -> the most similar rows: the best `candidates` rows, and all rows that reach floor_db."""
        self._chosen: list[list[_Int64]] = [[np.array(sorted(also), np.int64)] for _ in probes]
        """For each probe, the rows to compare."""
        self._stages = [
            searcher.stage(probe, scope, floor_db=floor_db, from_db=from_db, above=above) for probe in probes
        ]
        scanned = () if floor_db > 0 else config.scanned  # a join scans all columns
        self._scanned = [scanned_bits(probe, self._models, scanned, across=scope.across) for probe in probes]
        """For each probe, the columns that are scanned, as a presence mask; 0: all columns."""
        self._presences = frozenset(bits for part in self._snapshot.parts for bits in part.bits)
        self._failed = False

    def run(self, excluded: Sequence[Collection[int]]) -> list[CandidateSet]:
        queries = self._multicolumn_queries()
        self._search_columns(queries)
        self._search_multicolumn(queries)
        across, missing = self._scope.across, list[bool]()
        rows, subjects, stages = list[_Int64](), list[_Int64 | None](), list[Stage]()
        for i, left_out in enumerate(excluded or [()] * len(self._probes)):
            of_probe, incomplete = self._rows_to_compare(i)
            with_siblings, of_subjects = _with_siblings(self._snapshot, of_probe, left_out)
            stage, query = self._stages[i], queries[i]
            stages.append(replace(stage, lone_db=query.lone_db) if query is not None and query.lone_db else stage)
            rows.append(with_siblings)
            subjects.append(of_subjects)
            missing.append(incomplete)
        ranked = self._comparer.compare_each(
            self._probes, SnapshotRows(self._snapshot), rows, across=across, subjects=subjects, stages=stages
        )
        return [
            CandidateSet(compared, incomplete, across, (stage.finger_db, stage.reach_db))
            for compared, incomplete, stage in zip(ranked, missing, stages, strict=True)
        ]

    # which rows are compared ---------------------------------------------------------------------------------------

    def _rows_to_compare(self, i: int) -> tuple[_Int64, bool]:
        """(the rows to compare with probe i, ascending; whether some comparable rows are missing)."""
        probe, near = self._probes[i], self._near[i]
        comparable_columns = comparable_bits(probe, self._models, across=self._scope.across)
        chosen = [*self._chosen[i]]
        for columns, (rows, similarity) in near.items():
            if not _relabelled(columns):
                chosen.append(self._worth_comparing(probe, columns, rows, similarity, comparable_columns))
        chosen.append(self._strongest_relabelled(probe, near))
        scanned = sum(BIT[column] for column in {column for _, column in near})
        minutiae_only = sum(BIT[c] for c, m in self._models.items() if m.dimension is None) & comparable_columns
        unscanned = self._scope.rows_with(minutiae_only, without=scanned)
        most = self._config.finger_rows_max
        incomplete = len(unscanned) > most or (self._failed and bool(near))
        return np.unique(np.concatenate([*chosen, unscanned[:most]])), incomplete

    def _worth_comparing(
        self, probe: TemplateSet, columns: _ColumnPair, rows: _Int64, similarity: Float32, comparable_columns: int
    ) -> _Int64:
        """Of the rows found in a column: those with other captures to compare, and the first of the other rows, whose order is final."""
        if not len(rows):
            return rows
        capture = probe[columns[0]]
        has_more = self._have(rows, comparable_columns & ~BIT[columns[1]])
        has_more |= self._comparer.has_minutiae_to_add(capture)
        if self._floor_db > 0 and len(rows):
            worth = has_more | (self._comparer.score_db(capture, similarity) >= self._floor_db)
        else:
            worth = has_more | (np.cumsum(~has_more) <= self._returned)
        return np.asarray(rows[worth])

    def _have(self, rows: _Int64, columns: int) -> NDArray[np.bool_]:
        """Whether the subject of each row has a capture in one of these columns, a presence mask, in any of its rows."""
        has = (self._snapshot.presence(rows.tolist()) & columns) != 0
        if self._snapshot.extra_rows and not has.all():
            all_rows, subjects = self._snapshot.with_siblings(np.unique(rows))
            if subjects is not None:
                presence = presence_of_subjects(self._snapshot.presence(all_rows.tolist()), subjects)
                has |= (presence[np.searchsorted(all_rows, rows)] & columns) != 0
        return np.asarray(has)

    def _strongest_relabelled(self, probe: TemplateSet, near: Mapping[_ColumnPair, _Near]) -> _Int64:
        """Rows found under other labels than the probe's that are worth comparing."""
        lists = [(np.zeros(0, np.int64), np.zeros(0))]
        relabelled = {columns: rows for columns, rows in near.items() if _relabelled(columns)}
        if not relabelled:
            return lists[0][0]
        models = {probe[name].model_id for name, _ in relabelled}
        calibrations = {model_id: self._comparer.calibration(model_id) for model_id in models}
        for (probe_column, _), (rows, similarity) in relabelled.items():
            calibration = calibrations[probe[probe_column].model_id]
            llr_db = calibration.llr_db(similarity)
            if self._floor_db > 0:  # all rows that reach it by a single finger
                llr_db[calibration.score_db(similarity) >= self._floor_db] = np.inf
            lists.append((rows, llr_db))
        return strongest(lists, self._config.candidates + self._scope.extra_k)

    # several columns at once ---------------------------------------------------------------------------------------

    def _multicolumn_queries(self) -> list[MultiColumnQuery | None]:
        """The query of each probe; the same object for probes with the same columns."""
        known: dict[tuple[tuple[str, ...], tuple[str, ...]], MultiColumnQuery | None] = {}
        queries, models = [], self._models
        for probe, scanned in zip(self._probes, self._scanned, strict=True):
            names = sorted(c for c in probe if c in models and _is_embedded(probe[c], models[c].model_id))
            rescored = tuple(name for name in names if scanned and not BIT[name] & scanned)
            key = tuple(names), rescored
            if key not in known:
                of_all = [name for name in names if name not in rescored]
                query = self._searcher.multicolumn_query(self._snapshot, of_all, rescored) if of_all else None
                known[key] = None if query is None else self._scoped(query)
            queries.append(known[key])
        return queries

    def _scoped(self, query: MultiColumnQuery) -> MultiColumnQuery | None:
        scope, floor_llr_db = self._scope, np.inf
        if self._floor_db > 0:
            kinds = [*query.plans, *(self._journal_kinds(query) if query.joint else ())]
            if not kinds:
                return None
            ids = [[self._models[name].model_id for name in sorted(names)] for names in kinds]
            floor_llr_db = min(self._comparer.llr_reaching(self._floor_db, model_ids) for model_ids in ids)
        k = query.k + scope.extra_k
        return replace(query, k=k, floor_llr_db=floor_llr_db, groups=scope.groups, from_row=scope.from_row)

    def _journal_kinds(self, query: MultiColumnQuery) -> set[frozenset[str]]:
        """The sets of this query's columns that rows of the journal have, of several columns each."""
        journals = [part for part in self._snapshot.parts if is_journal(part, query.columns)]
        kinds = {frozenset(c for c in query.columns if bits & BIT[c]) for part in journals for bits in part.bits}
        return {kind for kind in kinds if len(kind) > 1}

    def _search_multicolumn(self, queries: Sequence[MultiColumnQuery | None]) -> None:
        """Adds the rows that the multi-column queries find to the rows to compare."""
        for query in {id(query): query for query in queries if query is not None}.values():
            numbers = [i for i, other in enumerate(queries) if other is query]
            for low in range(0, len(numbers), PROBES):
                batch = numbers[low : low + PROBES]
                vectors = {
                    c: np.array([self._probes[i][c].embedding for i in batch], np.float32) for c in query.columns
                }
                hits, failures = self._searcher.fan_out.multicolumn(self._shards, vectors, query)
                self._failed |= bool(failures)
                cuts = np.searchsorted(hits.which, np.arange(1, len(batch)))
                wanted = hits.llr_db >= query.floor_llr_db
                wanted = wanted if hits.lone is None else wanted | hits.lone
                for i, rows, always in zip(batch, np.split(hits.rows, cuts), np.split(wanted, cuts), strict=True):
                    self._chosen[i].append(self._worth_comparing_of(query, self._probes[i], rows, always))

    def _worth_comparing_of(
        self, query: MultiColumnQuery, probe: TemplateSet, rows: _Int64, wanted: NDArray[np.bool_]
    ) -> _Int64:
        """Of the rows found by a query: those with other captures to compare, the first of the other rows, and all that are wanted at any
        rank. wanted: bool (n,)."""
        searched = sum(BIT[column] for column in query.columns)
        other_columns = comparable_bits(probe, self._models, across=self._scope.across) & ~searched
        has_more = self._have(rows, other_columns)
        has_more |= any(self._comparer.has_minutiae_to_add(probe[column]) for column in query.columns)
        # rows are sorted by the sum of their evidence; this is the final order unless they have other captures to compare
        first = np.cumsum(~has_more) <= self._config.returned + self._returned
        return np.asarray(rows[has_more | first | wanted])

    # one column after the other ------------------------------------------------------------------------------------

    def _search_columns(self, queries: Sequence[MultiColumnQuery | None]) -> None:
        """Finds the most similar rows of each pair of columns that is compared by embeddings."""
        across = self._scope.across
        for column, model in self._snapshot.models.items():
            # captures of all labels share a pass, unless a multi-column query covers rows of the column
            passes: dict[tuple[int, int], tuple[MultiColumnQuery | None, dict[_Capture, Template]]] = {}
            for i, (probe, query) in enumerate(zip(self._probes, queries, strict=True)):
                for name, template in probe.items() if model.dimension is not None else ():
                    if comparable(name, column, across=across) and _is_embedded(template, model.model_id):
                        skip = query if query is not None and name == column and name in query.columns else None
                        scanned = 0 if self._scanned[i] & BIT[column] else self._scanned[i]
                        passes.setdefault((id(skip), scanned), (skip, {}))[1][i, name] = template
            for (_, scanned), (skip, captures) in passes.items():
                if not any(bits & BIT[column] and not bits & scanned for bits in self._presences):
                    continue
                if skip is not None and self._covers(skip, column):
                    for i, name in captures:
                        self._near[i][name, column] = (np.zeros(0, np.int64), np.zeros(0, np.float32))
                else:
                    self._search_column(column, captures, skip, scanned)

    def _covers(self, query: MultiColumnQuery, column: str) -> bool:
        """Whether the query covers all rows that have this column."""
        for part in self._snapshot.parts:
            left = frozenset(bits for bits in part.bits if bits & BIT[column])
            if left and not left <= covered_presences(part, query):
                return False
        return True

    def _search_column(
        self,
        column: str,
        captures: Mapping[_Capture, Template],
        skip_covered: MultiColumnQuery | None,
        skip_columns: int,
    ) -> None:
        vectors = np.array([template.embedding for template in captures.values()], np.float32)
        scope, k = self._scope, self._config.candidates + self._scope.extra_k
        nearest = self._searcher.nearest(
            self._snapshot,
            column,
            vectors,
            k,
            from_row=scope.from_row,
            groups=scope.groups,
            skip_covered=skip_covered,
            skip_columns=skip_columns,
            floor_similarity=self._floor_similarities(column, captures),
        )
        self._failed |= bool(nearest.failures)
        for (i, name), rows, similarity in zip(captures, nearest.rows, nearest.similarity, strict=True):
            self._near[i][name, column] = (rows[rows >= 0], similarity[rows >= 0])
        if self._floor_db > 0:
            self._search_to_floor(column, captures, vectors, k, skip_covered)

    def _floor_similarities(self, column: str, captures: Mapping[_Capture, Template]) -> Float32 | None:
        """The similarities from which rows of a column matter, float32 (captures,); None if all rows matter. If a probe and the gallery share
        only this column, a candidate must reach the review threshold in it."""
        if self._floor_db > 0:
            return None
        floors, known = np.full(len(captures), -np.inf, np.float32), dict[tuple[str, float], float]()
        for at, ((i, name), template) in enumerate(captures.items()):
            only = _only_column(self._probes[i], self._snapshot, across=self._scope.across)
            if name == column and only == column and not self._comparer.has_minutiae_to_add(template):
                key = (template.model_id, self._stages[i].reach_db)
                if key not in known:
                    known[key] = self._searcher.similarity_reaching(*key)
                floors[at] = known[key]
        return floors if (floors > -np.inf).any() else None

    def _search_to_floor(
        self,
        column: str,
        captures: Mapping[_Capture, Template],
        vectors: Float32,
        k: int,
        skip_covered: MultiColumnQuery | None,
    ) -> None:
        """Searches again for captures whose k rows all reach floor_db, because all such rows are wanted."""
        order = list(captures)
        more = [
            at
            for at, ((i, name), template) in enumerate(captures.items())
            if len(self._near[i][name, column][0]) == k
            and self._comparer.score_db(template, self._near[i][name, column][1][-1:])[0] >= self._floor_db
        ]
        for low in range(0, len(more), PROBES):
            batch = more[low : low + PROBES]
            models = [captures[order[at]].model_id for at in batch]
            similarity = [self._searcher.similarity_reaching(model_id, self._floor_db) for model_id in models]
            query = replace(
                self._scope.query(column, 0, self._config.miss_risk),
                min_similarity=np.array(similarity, np.float32),
                skip_covered=skip_covered,
            )
            reached = self._searcher.fan_out.reached(self._shards, vectors[batch], query)
            self._failed |= bool(reached.failures)
            for at, near in zip(batch, reached.found, strict=True):
                i, name = order[at]
                self._near[i][name, column] = near


@lru_cache(maxsize=64)
def _scores_of_grid(calibration: Calibration) -> tuple[Float32, NDArray[np.float64]]:
    """(similarities from -1 to 1, ascending; their score_db)."""
    grid = np.linspace(-1, 1, 4001, dtype=np.float32)
    return grid, calibration.score_db(grid)


def _with_siblings(snapshot: Snapshot, rows: _Int64, excluded: Collection[int]) -> tuple[_Int64, _Int64 | None]:
    """(all rows of the subjects of these rows, but for the excluded ones, the subject of each; None if each row is one of its own)."""
    rows, subjects = snapshot.with_siblings(rows)
    if excluded:
        kept = ~np.isin(rows, list(excluded))
        rows, subjects = rows[kept], None if subjects is None else subjects[kept]
    return rows, subjects


def _is_embedded(template: Template | None, model_id: str) -> bool:
    return template is not None and template.embedding is not None and template.model_id == model_id


def _only_column(probe: TemplateSet, snapshot: Snapshot, *, across: bool) -> str | None:
    """The only column that a probe and the gallery share; None if there is none, or several."""
    shared = comparable_bits(probe, snapshot.models, across=across)
    return next((column for column in probe if BIT[column] == shared), None)


def _relabelled(columns: _ColumnPair) -> bool:
    """Whether a capture was searched in a column other than its own. A capture of unknown position has no column of its own."""
    return columns[0] != columns[1] and "unknown" not in columns
