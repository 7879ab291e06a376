"""Gives tests and benchmarks access to the parts of an open engine.

Owns the names of the parts. Applications must not use it: the parts change without notice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from biodedup.embed.extractor import Extractor
from biodedup.engine.callers.approvals import Approvals
from biodedup.engine.callers.audit import AuditLog
from biodedup.engine.engine import Engine
from biodedup.engine.enrol import Enrolment
from biodedup.engine.search import BatchedSearch
from biodedup.gallery.catalogue.protocol import Catalogue
from biodedup.gallery.files.filesystem import Lock
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.maintenance import Maintenance
from biodedup.gallery.segments.tail import Tail
from biodedup.match.compare import Comparer
from biodedup.search.searcher import Searcher
from biodedup.search.selfjoin.join import SelfJoin

if TYPE_CHECKING:
    from biodedup.cluster.shards.ray_actors import RayShards


@dataclass(frozen=True)
class Internals:
    """The objects themselves, not copies: a test may replace a method of one."""

    gallery: Gallery
    extractor: Extractor
    comparer: Comparer
    searcher: Searcher
    searches: BatchedSearch
    join: SelfJoin
    enrolment: Enrolment
    elsewhere: RayShards | None
    approvals: Approvals
    audit: AuditLog

    @property
    def catalogue(self) -> Catalogue:
        """The gallery's database with its present connection."""
        return self.gallery._catalogue

    @property
    def tail(self) -> Tail:
        """The present rows that are not sealed yet."""
        return self.gallery._tail

    @property
    def maintenance(self) -> Maintenance:
        return self.gallery._maintenance

    @property
    def writer_lock(self) -> Lock | None:
        return self.gallery._lock_file

    @property
    def commits(self) -> int:
        """The number of commits that this engine knows of."""
        return self.gallery._state.commits

    def take_segment_number(self) -> int:
        return self.gallery._take_number()

    def stop_following(self) -> None:
        """Ends the thread that reads the commits of other front-ends."""
        cast(Any, self.gallery)._ended.set()

    def follow_once(self) -> None:
        """Reads the commits of other front-ends once."""
        cast(Any, self.gallery)._look()

    def break_gallery(self) -> None:
        """Puts the gallery into the state after a failed commit: the next write recovers first."""
        self.gallery._broken = True


def internals(engine: Engine) -> Internals:
    return Internals(
        gallery=engine._gallery,
        extractor=engine._extractor,
        comparer=engine._comparer,
        searcher=engine._searcher,
        searches=engine._searches,
        join=engine._join,
        enrolment=engine._enrolment,
        elsewhere=engine._elsewhere,
        approvals=engine._approvals,
        audit=engine._audit,
    )
