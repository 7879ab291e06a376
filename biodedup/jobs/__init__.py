"""Long work over many records: resumable, with progress, built on the engine."""

from biodedup.jobs.dedup import DedupResult, dedup
from biodedup.jobs.demo import DemoResult, demo
from biodedup.jobs.doctor import Report, examine
from biodedup.jobs.join import JoinResult, find_duplicates, is_gallery
from biodedup.jobs.load import LoadResult, load
from biodedup.jobs.progress import Progress
from biodedup.jobs.sentinel_report import Watch, Watched
from biodedup.jobs.sentinels import forget_removed, watch

__all__ = [
    "DedupResult",
    "DemoResult",
    "JoinResult",
    "LoadResult",
    "Progress",
    "Report",
    "Watch",
    "Watched",
    "dedup",
    "demo",
    "examine",
    "find_duplicates",
    "forget_removed",
    "is_gallery",
    "load",
    "watch",
]
