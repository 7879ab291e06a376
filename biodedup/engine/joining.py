"""An N:N join (every subject with every other) of one snapshot, divided into independent steps.

Owns the order of the steps, and the conversion of row pairs into links between subjects. Never compares templates (`search/selfjoin` does).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import log10
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from biodedup.common.described import Described
from biodedup.gallery.snapshot import Snapshot
from biodedup.match.judgement import kinds_of
from biodedup.search.selfjoin.bucket_join import rows_outside
from biodedup.search.selfjoin.crowds import FoundPairs
from biodedup.search.selfjoin.join import JOIN_ROWS, SelfJoin
from biodedup.values import Link


@dataclass(frozen=True)
class JoinedTile(Described):
    """The result of one step of an N:N join. done: the number of subjects (of `total`) that were compared with all later ones, or the same
    share of the work; links: pairs that reach the threshold; reached: (row after the last compared row, rows of the gallery), from which
    another join can continue; left_out: a subject of each cluster with more than 1,000 links -> the number of its links that are not in
    `links` (see `Cluster.links_left_out`)."""

    done: int
    total: int
    links: tuple[Link, ...]
    reached: tuple[int, int]
    left_out: Mapping[str, int] = field(default_factory=dict)


class JoinStep(NamedTuple):
    """The input of one step: buckets if in_buckets, else rows that are compared with all others. first, last: a range of their numbers;
    done: the number of rows that are done after the step."""

    in_buckets: bool
    first: int
    last: int
    done: int


class Joining:
    """A join of live rows with later rows, or with all other rows (with_all). A step has the same result in every process with this
    snapshot."""

    def __init__(
        self, join: SelfJoin, snapshot: Snapshot, rows: NDArray[np.int64], threshold_db: float, *, with_all: bool
    ) -> None:
        """join: calibrated on the snapshot."""
        self._join, self._rows, self._threshold_db = join, rows, threshold_db
        self.snapshot = snapshot
        self._buckets = None if with_all else join.buckets(snapshot, threshold_db)
        self._rest = rows if self._buckets is None else rows_outside(snapshot, "face", self._buckets, rows)
        self._with_all = with_all or self._buckets is not None

    def steps(self, skip: int = 0) -> Iterator[JoinStep]:
        """The steps. skip: the number of rows that are done already."""
        count = len(self._rest)
        for first in range(min(skip, count), count, JOIN_ROWS):
            last = min(first + JOIN_ROWS, count)
            yield JoinStep(False, first, last, last)
        if self._buckets is None:
            return
        for members, done in self._buckets.steps(count, len(self._rows)):
            if done > skip:
                yield JoinStep(True, members.start, members.stop, done)

    def tile(self, step: JoinStep) -> JoinedTile:
        """Runs a step: the pairs that reach the threshold and were not judged different."""
        some, is_last = slice(step.first, step.last), step.done == len(self._rows)
        if step.in_buckets:
            assert self._buckets is not None, "only a join with buckets has such steps"
            found = self._join.pairs_in_buckets(self.snapshot, self._buckets, some, self._threshold_db)
            # before the last step, no row is complete: it may share a later bucket with another row
            reached = int(self._rows[-1]) + 1 if is_last else 0
        else:
            rows = self._rest[some].tolist()
            found = self._join.pairs(self.snapshot, rows, self._threshold_db, with_all=self._with_all)
            reached = rows[-1] + 1 if self._buckets is None or is_last else 0
        links, left_out = self._links(found)
        return JoinedTile(step.done, len(self._rows), tuple(links), (reached, self.snapshot.row_count), left_out)

    def _links(self, found: FoundPairs) -> tuple[list[Link], dict[str, int]]:
        """(the links, a subject of each very large cluster -> the number of its links that are left out)."""
        snapshot, pairs, left_out = self.snapshot, found.pairs, Counter[str]()
        for name, count in zip(snapshot.subject_ids(list(found.left_out)), found.left_out.values(), strict=True):
            left_out[name] += count
        names = snapshot.subject_ids([row for pair in pairs for row in (pair[0], pair[1].row)])
        links = []
        for i, (row, pair) in enumerate(pairs):
            trial_penalty_db = 10 * log10(len(snapshot.siblings(row)))  # Bonferroni: each row of the subject is a trial
            if pair.score_db - trial_penalty_db >= self._threshold_db:
                pair = replace(pair, score_db=pair.score_db - trial_penalty_db) if trial_penalty_db else pair
                (kind,) = kinds_of([pair], self._threshold_db, self._threshold_db)
                two = (names[2 * i], names[2 * i + 1])
                links.append(Link(two, pair.score_db, pair.extrapolated, pair.evidence, kind))
        return links, left_out
