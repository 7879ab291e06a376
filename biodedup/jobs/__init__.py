"""Long work over many records: resumable, with progress, built on the engine."""

from biodedup.jobs.backlog import Backlog, QueueStatus, queue_status, write_status_page
from biodedup.jobs.dedup import DedupResult, dedup
from biodedup.jobs.demo import DemoResult, demo
from biodedup.jobs.doctor import Report, examine
from biodedup.jobs.enroll_batch import BatchResult, announce, enroll_batch
from biodedup.jobs.join import JoinResult, find_duplicates, is_gallery
from biodedup.jobs.load import LoadResult, load
from biodedup.jobs.progress import Progress

__all__ = [
    "Backlog",
    "BatchResult",
    "DedupResult",
    "DemoResult",
    "JoinResult",
    "LoadResult",
    "Progress",
    "QueueStatus",
    "Report",
    "announce",
    "dedup",
    "demo",
    "enroll_batch",
    "examine",
    "find_duplicates",
    "is_gallery",
    "load",
    "queue_status",
    "write_status_page",
]
