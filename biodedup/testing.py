"""The parts of an open engine, for tests and benchmarks.

Owns their names. Makes no promise to applications: the parts change with the engine, without notice.
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
        """The gallery's database, as it is connected now."""
        return self.gallery._catalogue

    @property
    def tail(self) -> Tail:
        """The rows that are not sealed yet, as the gallery holds them now."""
        return self.gallery._tail

    @property
    def maintenance(self) -> Maintenance:
        return self.gallery._maintenance

    @property
    def writer_lock(self) -> Lock | None:
        return self.gallery._lock_file

    @property
    def commits(self) -> int:
        """How many commits the gallery has, as this engine knows it."""
        return self.gallery._state.commits

    def take_segment_number(self) -> int:
        return self.gallery._take_number()

    def stop_following(self) -> None:
        """Ends the thread of a register that follows other front-ends."""
        cast(Any, self.gallery)._ended.set()

    def follow_once(self) -> None:
        """Takes one step of that thread."""
        cast(Any, self.gallery)._look()

    def break_gallery(self) -> None:
        """As after a commit that failed with the disk: the next write recovers first."""
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
