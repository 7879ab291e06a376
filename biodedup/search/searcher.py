"""Candidates of a probe: which rows to compare, and their comparison with every capture that both sides have.

Owns the path from a probe to ranked candidates. Never writes and never decides.

1. Rows that have several of the probe's columns of embeddings are searched in all of them together (`together.py`), others
   column by column; the best `candidates` are compared with everything that both sides have.
2. Rows that share with the probe only columns of minutiae are compared one by one, up to `finger_rows_max`; beyond it the
   result says `incomplete`.
3. Across positions, when asked, a finger is looked for in the columns of all fingers (`across.py`): a label may be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from biodedup.config import Policy, SearchConfig
from biodedup.errors import GalleryDamaged
from biodedup.gallery.segments.part import Column, Part
from biodedup.gallery.snapshot import Snapshot
from biodedup.match.calibrations import SampleOf
from biodedup.match.compare import Comparer
from biodedup.match.ranked import Comparison, Ranked
from biodedup.search.multicolumn.together import Choice, Evidence, TogetherPlan, choose, codec_id, sets_of
from biodedup.search.native.scanner import Scanner
from biodedup.search.positions import comparable, comparable_bits, strongest
from biodedup.search.selfjoin.bucket_join import divided, meet
from biodedup.search.selfjoin.buckets import Caps
from biodedup.search.selfjoin.buckets import choose as choose_caps
from biodedup.search.shards.shard import FanOut, Nearest, Plan, Shard, as_set, local_shards
from biodedup.values import BIT, Float32, Template

Probe = Mapping[str, Template]
_Capture = tuple[int, str]  # (number of the probe, its column)

PROBES = 256
"""Probes that are scanned together."""
_MANY = 1024
"""Probes of one column alone: what is compared exactly is read from the disk once for all of them."""
JOIN_ROWS = 4096
"""Rows of a gallery that are compared together with all behind them."""


@dataclass(frozen=True)
class Found:
    """What a probe met among the rows searched. incomplete: some comparable rows were not compared; across: positions were
    searched across."""

    comparisons: Ranked = field(default_factory=Ranked)
    incomplete: bool = False
    across: bool = False


class SnapshotRows:
    """A snapshot's rows, as the comparer reads candidates."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.presence = snapshot.presence
        self.embeddings = snapshot.embeddings
        self.minutiae = snapshot.minutiae

    def model_ids(self) -> Mapping[str, str]:
        return {column: model.model_id for column, model in self.snapshot.models.items()}


class Searcher:
    """Searches snapshots. Thread-safe."""

    def __init__(
        self, comparer: Comparer, config: SearchConfig, threads: int, policy: Callable[[], Policy] = Policy
    ) -> None:
        self._comparer = comparer
        self._config = config
        self._policy = policy
        self._choices: dict[tuple[object, ...], Choice | None] = {}
        self._caps: list[tuple[tuple[Column, int, float], Caps | None]] = []  # of the last join alone
        self._scanner = Scanner(threads)
        self._fan_out = FanOut()

    def calibrated_on(self, sample_of: SampleOf) -> Searcher:
        """The same searcher, with scores that are calibrated on these subjects."""
        searcher = copy(self)
        searcher._comparer = self._comparer.calibrated_on(sample_of)
        return searcher

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
        across: bool = False,
        spare: int = 0,
        excluded: Sequence[Collection[int]] = (),
    ) -> list[Found]:
        """Each probe against the live rows from from_row on; with groups, those that belong to one of them.

        floor_db: 0 asks for the strongest; above it, for all that reach it by one column, and for none that has only this column
        and is weaker. across: fingers are compared with fingers of other labels, too. spare: how many more to look at, since so many may
        turn out not to count. excluded: for each probe rows that it is not compared with.
        """
        if from_row >= snapshot.row_count or not probes:
            return [Found(across=across)] * len(probes)
        scope = _Scope(snapshot, from_row, as_set(groups), across, spare)
        source = SnapshotRows(snapshot)
        plans = self._plans(scope, probes, floor_db)
        near, failed = self._near(scope, probes, plans, floor_db)
        together, failed_too = self._near_together(scope, probes, plans)
        failed |= failed_too
        found = []
        for probe, lists, chosen, left_out in zip(probes, near, together, excluded or [()] * len(probes), strict=True):
            wanted = comparable_bits(probe, snapshot.models, across=across)
            for column, (rows, similarity) in lists.items():
                if _relabelled(column):
                    continue
                others = (snapshot.presence(rows.tolist()) & (wanted & ~BIT[column[1]])) != 0
                others |= self._comparer.has_more(probe[column[0]])
                # Where this column is all there is, the scan's order is final: of these only the first can be returned.
                if floor_db > 0 and len(rows):
                    worth = others | (self._comparer.score_db(probe[column[0]], similarity) >= floor_db)
                else:
                    worth = others | (np.cumsum(~others) <= self._config.returned + spare)
                chosen.append(rows[worth])
            chosen.append(self._strongest(probe, lists, floor_db, spare))
            scanned = sum(BIT[column] for column in {theirs for _, theirs in lists})
            singly = sum(BIT[c] for c, m in snapshot.models.items() if m.dimension is None) & wanted
            left = scope.rows_with(singly, without=scanned)
            incomplete = len(left) > self._config.finger_rows_max or (failed and bool(lists))
            rows = np.unique(np.concatenate([*chosen, left[: self._config.finger_rows_max]]))
            compared = self._compared(probe, source, rows, left_out, across)
            found.append(Found(compared, incomplete, across))
        return found

    def _compared(
        self,
        probe: Probe,
        source: SnapshotRows,
        rows: NDArray[np.int64],
        left_out: Collection[int],
        across: bool = False,
    ) -> Ranked:
        """The probe compared with the subjects that have these rows, with all rows of each but those left out."""
        rows, subjects = source.snapshot.with_siblings(rows)
        if left_out:
            kept = ~np.isin(rows, list(left_out))
            rows, subjects = rows[kept], None if subjects is None else subjects[kept]
        return self._comparer.compare(probe, source, rows, across=across, subjects=subjects)

    def _strongest(
        self,
        probe: Probe,
        lists: Mapping[tuple[str, str], tuple[NDArray[np.int64], Float32]],
        floor_db: float,
        spare: int,
    ) -> NDArray[np.int64]:
        """Rows found under other labels than the probe's that are worth comparing."""
        found = [(np.zeros(0, np.int64), np.zeros(0))]
        others = {columns: some for columns, some in lists.items() if _relabelled(columns)}
        models = {probe[mine].model_id for mine, _ in others}
        calibrations = {model_id: self._comparer.calibration(model_id) for model_id in models}
        for (mine, _), (rows, similarity) in others.items():
            calibration = calibrations[probe[mine].model_id]
            evidence = calibration.llr_db(similarity)
            if floor_db > 0:  # all that reach it by one finger
                evidence[calibration.score_db(similarity) >= floor_db] = np.inf
            found.append((rows, evidence))
        return strongest(found, self._config.candidates + spare)

    def caps(self, snapshot: Snapshot, threshold_db: float) -> Caps | None:
        """How a gallery of faces is joined by caps, for pairs that score threshold_db or more; None where it is not."""
        columns = [part.columns["face"] for part in snapshot.parts if "face" in part.columns]
        largest = max(columns, key=lambda column: column.count, default=None)
        if not _of_faces_alone(snapshot) or largest is None or largest.codec is None:
            return None
        model_id = snapshot.models["face"].model_id
        inside = {id(part) for part in divided(snapshot, "face", largest.codec)}
        rows = snapshot.live_count - sum(part.count for part in snapshot.parts if id(part) not in inside)
        key = (largest, rows, self._similarity_at(model_id, threshold_db))
        known = next(iter(self._caps), None)
        if known is None or known[0] != key:
            known = key, choose_caps(*key[:2], self._comparer.calibration(model_id), key[2], self._config.miss_risk)
            self._caps[:] = [known]
        return known[1]

    def pairs(
        self, snapshot: Snapshot, rows: Sequence[int], threshold_db: float, *, with_all: bool = False
    ) -> list[tuple[int, Comparison]]:
        """Pairs of one of these live rows, ascending, and of a row behind it, that score threshold_db or more; each once.
        with_all: of one of them, and any other row."""
        if not _of_faces_alone(snapshot):
            return self._pairs_with_all(snapshot, rows, threshold_db)
        faces = snapshot.embeddings(rows, "face")
        model_id = snapshot.models["face"].model_id
        least = np.full(len(rows), self._similarity_at(model_id, threshold_db), np.float32)
        # The last part, the tail, has no codes and is compared exactly: once, when its rows have their turn, not with every tile.
        tail = snapshot.parts[-1].first_row
        in_tail = rows[-1] >= tail
        everywhere = in_tail or with_all
        scope = _Scope(snapshot, 0 if everywhere else rows[0], None)
        plan = replace(scope.plan("face", 0, self._config.miss_risk), end_row=None if everywhere else tail)
        near: list[tuple[NDArray[np.int64], Float32]] = []
        for low in range(0, len(rows), PROBES):
            some = slice(low, low + PROBES)
            reached = self._fan_out.reached(self._shards(snapshot), faces[some], replace(plan, at_least=least[some]))
            if reached.failures:
                raise GalleryDamaged(f"a join that cannot see everybody is no join: {reached.failures[0]}")
            near += reached.found
        wanted = []
        for row, (others, _) in zip(rows, near, strict=True):
            behind = (others > row) & (others < tail) if row < tail else (others < tail) | (others > row)
            wanted.append(others[others != row if with_all else behind])
        return self._reaching(snapshot, rows, faces, wanted, threshold_db)

    def pairs_in(
        self, snapshot: Snapshot, caps: Caps, some: slice, threshold_db: float
    ) -> list[tuple[int, Comparison]]:
        """Pairs of live rows, the lower one first, that lie in one of some caps and score threshold_db or more; each once."""
        low, high = meet(self._scanner, snapshot, "face", caps, some)
        rows, starts = np.unique(low, return_index=True)
        faces = snapshot.embeddings(rows.tolist(), "face")
        return self._reaching(snapshot, rows.tolist(), faces, np.split(high, starts)[1:], threshold_db)

    def _reaching(
        self,
        snapshot: Snapshot,
        rows: Sequence[int],
        faces: Float32,
        wanted: Sequence[NDArray[np.int64]],
        threshold_db: float,
    ) -> list[tuple[int, Comparison]]:
        """Of each row, with its face, and the others that are wanted: pairs that score threshold_db or more."""
        source, model_id, found = SnapshotRows(snapshot), snapshot.models["face"].model_id, []
        for row, face, others in zip(rows, faces, wanted, strict=True):
            if len(others):
                probe = {"face": Template("face", model_id, face)}
                compared = self._compared(probe, source, others, _left_out(snapshot, row))
                found += [(row, comparison) for comparison in compared.reaching(threshold_db)]
        return found

    def _pairs_with_all(
        self, snapshot: Snapshot, rows: Sequence[int], threshold_db: float
    ) -> list[tuple[int, Comparison]]:
        found: dict[tuple[int, int], tuple[int, Comparison]] = {}
        for start in range(0, len(rows), 32):
            some = rows[start : start + 32]
            probes = [snapshot.templates(row) for row in some]
            excluded = [_left_out(snapshot, row) for row in some]
            across = self._config.across_positions
            results = self.search(snapshot, probes, floor_db=threshold_db, across=across, excluded=excluded)
            for row, one in zip(some, results, strict=True):
                for comparison in one.comparisons.reaching(threshold_db):
                    # the other side's candidates may lack this pair, so that it counts from either side
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
        besides: TogetherPlan | None = None,
    ) -> Nearest:
        """The live rows from from_row on that are most similar to each probe, float32 (q, d), unit rows; batch by batch.
        besides: the rows that this plan covers do not count."""
        scope = _Scope(snapshot, from_row, as_set(groups))
        shards = self._shards(snapshot)
        plan = replace(scope.plan(column, min(k, max(scope.count, 1)), self._config.miss_risk), besides=besides)
        pieces = [
            self._fan_out.nearest(shards, probes[low : low + _MANY], plan)
            for low in range(0, max(len(probes), 1), _MANY)
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

    def together(self, snapshot: Snapshot, columns: Collection[str]) -> TogetherPlan | None:
        """How rows that have several of these columns are searched; None where none are searched together."""
        models = {name: snapshot.models[name] for name in sorted(columns) if name in snapshot.models}
        calibrations = {n: self._comparer.calibration(m.model_id) for n, m in models.items() if m.dimension is not None}
        # without mates to go by, nothing can be said of what is missed
        calibrations = {name: calibration for name, calibration in calibrations.items() if calibration.mates_measured}
        if len(calibrations) < 2 or self._config.miss_risk <= 0:
            return None
        _, review_db = self._policy().thresholds_db(snapshot.live_count)
        review_db = 3.0 * (review_db // 3)  # so that a choice lasts until the gallery has doubled
        choices = {}
        for names, largest in sets_of(snapshot, calibrations).items():
            mine = {name: calibrations[name] for name in sorted(names)}
            key = (review_db, *(x for name in mine for x in (name, calibrations[name], codec_id(largest, name))))
            if key not in self._choices:
                least = self._comparer.llr_reaching(review_db, [models[name].model_id for name in mine])
                self._choices[key] = choose(
                    largest, mine, self._config.miss_risk, least, self._config.capture_correlation
                )
            choice = self._choices[key]
            if choice is not None:
                choices[names] = choice
        if not choices:
            return None
        # The order by all embeddings is nearly final: more are of no use, unless rows have other captures to compare.
        others = any(m.dimension is None or self._comparer.adds_minutiae(m.model_id) for m in snapshot.models.values())
        kept = self._config.candidates if others else min(4 * self._config.returned, self._config.candidates)
        return TogetherPlan(choices, {n: Evidence.of(c) for n, c in calibrations.items()}, kept)

    def _plans(self, scope: _Scope, probes: Sequence[Probe], floor_db: float) -> list[TogetherPlan | None]:
        """For each probe; the same object where they have the same columns."""
        known: dict[tuple[str, ...], TogetherPlan | None] = {(): None}
        plans = []
        for probe in probes:
            models = scope.snapshot.models
            names = tuple(sorted(c for c in probe if c in models and _is_embedded(probe[c], models[c].model_id)))
            if names not in known:
                plan = self.together(scope.snapshot, names)
                if plan is not None:
                    floor = np.inf
                    if floor_db > 0:
                        ids = [[models[name].model_id for name in sorted(one)] for one in plan.choices]
                        floor = min(self._comparer.llr_reaching(floor_db, some) for some in ids)
                    plan = replace(
                        plan,
                        k=plan.k + scope.spare,
                        floor_llr_db=floor,
                        groups=scope.groups,
                        from_row=scope.from_row,
                    )
                known[names] = plan
            plans.append(known[names])
        return plans

    def _near_together(
        self, scope: _Scope, probes: Sequence[Probe], plans: Sequence[TogetherPlan | None]
    ) -> tuple[list[list[NDArray[np.int64]]], bool]:
        """Rows to compare with each probe, as a list of arrays; and whether a shard failed."""
        chosen: list[list[NDArray[np.int64]]] = [[np.zeros(0, np.int64)] for _ in probes]
        failed = False
        for plan in {id(plan): plan for plan in plans if plan is not None}.values():
            mine = [i for i, other in enumerate(plans) if other is plan]
            for low in range(0, len(mine), PROBES):
                some = mine[low : low + PROBES]
                vectors = {c: np.array([probes[i][c].embedding for i in some], np.float32) for c in plan.columns}
                found, failures = self._fan_out.together(self._shards(scope.snapshot), vectors, plan)
                failed |= bool(failures)
                cuts = np.searchsorted(found.which, np.arange(1, len(some)))
                parts = zip(some, np.split(found.rows, cuts), np.split(found.llr_db, cuts), strict=True)
                together = sum(BIT[column] for column in plan.columns)
                for i, rows, llr_db in parts:
                    besides = comparable_bits(probes[i], scope.snapshot.models, across=scope.across) & ~together
                    others = (scope.snapshot.presence(rows.tolist()) & besides) != 0
                    others |= any(self._comparer.has_more(probes[i][column]) for column in plan.columns)
                    # by the sum of evidence, which is their final order but for what else they have in common
                    first = np.cumsum(~others) <= 2 * self._config.returned + scope.spare
                    chosen[i].append(rows[others | first | (llr_db >= plan.floor_llr_db)])
        return chosen, failed

    def _near(
        self,
        scope: _Scope,
        probes: Sequence[Probe],
        plans: Sequence[TogetherPlan | None],
        floor_db: float,
    ) -> tuple[list[dict[tuple[str, str], tuple[NDArray[np.int64], Float32]]], bool]:
        """For each probe, of each (its column, the gallery's column) that is compared by embeddings: the most similar rows, as
        many as `candidates` and all that reach floor_db. And whether a shard failed."""
        near: list[dict[tuple[str, str], tuple[NDArray[np.int64], Float32]]] = [{} for _ in probes]
        failed = False
        for theirs, model in scope.snapshot.models.items():
            # captures of all labels share a pass, but for those whose rows are searched together already
            asked: dict[int, tuple[TogetherPlan | None, dict[_Capture, Template]]] = {}
            for i, (probe, plan) in enumerate(zip(probes, plans, strict=True)):
                for mine, template in probe.items() if model.dimension is not None else ():
                    if comparable(mine, theirs, across=scope.across) and _is_embedded(template, model.model_id):
                        besides = plan if plan is not None and mine == theirs and mine in plan.columns else None
                        asked.setdefault(id(besides), (besides, {}))[1][i, mine] = template
            for besides, some in asked.values():
                failed |= self._near_in(scope, theirs, some, floor_db, near, besides)
        return near, failed

    def _near_in(
        self,
        scope: _Scope,
        column: str,
        asked: Mapping[_Capture, Template],
        floor_db: float,
        near: list[dict[tuple[str, str], tuple[NDArray[np.int64], Float32]]],
        besides: TogetherPlan | None,
    ) -> bool:
        vectors = np.array([probe.embedding for probe in asked.values()], np.float32)
        k = self._config.candidates + scope.spare
        nearest = self.nearest(
            scope.snapshot, column, vectors, k, from_row=scope.from_row, groups=scope.groups, besides=besides
        )
        failed = bool(nearest.failures)
        for (i, mine), rows, similarity in zip(asked, nearest.rows, nearest.similarity, strict=True):
            near[i][mine, column] = (rows[rows >= 0], similarity[rows >= 0])
        # those whose list is full, and reaches so far, may have more
        more = {
            at: probe
            for at, ((i, mine), probe) in enumerate(asked.items())
            if floor_db > 0
            and len(near[i][mine, column][0]) == k
            and self._comparer.score_db(probe, near[i][mine, column][1][-1:])[0] >= floor_db
        }
        captures = list(asked)
        for low in range(0, len(more), PROBES):
            some = list(more)[low : low + PROBES]
            least = np.array([self._similarity_at(more[at].model_id, floor_db) for at in some], np.float32)
            plan = replace(scope.plan(column, 0, self._config.miss_risk), at_least=least, besides=besides)
            reached = self._fan_out.reached(self._shards(scope.snapshot), vectors[some], plan)
            failed |= bool(reached.failures)
            for at, found in zip(some, reached.found, strict=True):
                i, mine = captures[at]
                near[i][mine, column] = found
        return failed

    def _similarity_at(self, model_id: str, floor_db: float) -> float:
        """The least similarity that reaches floor_db."""
        grid = np.linspace(-1, 1, 4001, dtype=np.float32)
        score_db = self._comparer.calibration(model_id).score_db(grid)
        return float(grid[np.searchsorted(score_db, floor_db).clip(1, 4000) - 1])


def _of_faces_alone(snapshot: Snapshot) -> bool:
    removed = 0  # the presence of a removed subject that is still in the journal
    return all(bits in (BIT["face"], removed) for part in snapshot.parts for bits in part.bits)


def _left_out(snapshot: Snapshot, row: int) -> Collection[int]:
    """Rows that a row is not joined with: of the same subject, and those that were judged to be of another."""
    return {*snapshot.siblings(row), *snapshot.different.get(row, ())}


class _Scope:
    """The rows that a search sees, and whether captures are looked for under other labels. spare: rows to be found on top."""

    def __init__(
        self, snapshot: Snapshot, from_row: int, groups: frozenset[str] | None, across: bool = False, spare: int = 0
    ) -> None:
        self.snapshot = snapshot
        self.from_row = from_row
        self.groups = groups
        self.across = across
        self.spare = spare

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


def _is_embedded(template: Template | None, model_id: str) -> bool:
    return template is not None and template.embedding is not None and template.model_id == model_id


def _relabelled(columns: tuple[str, str]) -> bool:
    """Whether a capture was looked for under another label than its own; one of unknown position has none."""
    return columns[0] != columns[1] and "unknown" not in columns
