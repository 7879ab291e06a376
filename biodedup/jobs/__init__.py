"""Long work over many records: resumable, with progress, built on the engine."""

from biodedup.jobs.applied import Applied, Undone, undo
from biodedup.jobs.dedup import DedupResult, dedup
from biodedup.jobs.demo import DemoResult, demo
from biodedup.jobs.doctor import Report, examine
from biodedup.jobs.join import JoinResult, find_duplicates, is_gallery
from biodedup.jobs.load import LoadResult, load
from biodedup.jobs.merge import MergeResult, merge
from biodedup.jobs.progress import Progress

__all__ = [
    "Applied",
    "DedupResult",
    "DemoResult",
    "JoinResult",
    "LoadResult",
    "MergeResult",
    "Progress",
    "Report",
    "Undone",
    "dedup",
    "demo",
    "examine",
    "find_duplicates",
    "is_gallery",
    "load",
    "merge",
    "undo",
]
