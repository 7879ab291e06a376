"""The parts of an open engine, for tests and benchmarks.

Owns their names. Makes no promise to applications: the parts change with the engine, without notice.
"""

from __future__ import annotations

from dataclasses import dataclass

from biodedup.embed.extractor import Extractor
from biodedup.engine.engine import Engine
from biodedup.engine.enrol import Enrolment
from biodedup.engine.search import BatchedSearch
from biodedup.gallery.gallery import Gallery
from biodedup.match.compare import Comparer
from biodedup.search.searcher import Searcher
from biodedup.search.selfjoin.join import SelfJoin


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


def internals(engine: Engine) -> Internals:
    return Internals(
        gallery=engine._gallery,
        extractor=engine._extractor,
        comparer=engine._comparer,
        searcher=engine._searcher,
        searches=engine._searches,
        join=engine._join,
        enrolment=engine._enrolment,
    )
