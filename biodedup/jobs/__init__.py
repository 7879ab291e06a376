"""Long work over many records: resumable, with progress, built on the engine."""

from biodedup.jobs.calibrate import CalibrateResult, calibrate
from biodedup.jobs.dedup import DedupResult, dedup
from biodedup.jobs.demo import DemoResult, demo
from biodedup.jobs.doctor import Report, examine
from biodedup.jobs.join import JoinResult, find_duplicates, is_gallery
from biodedup.jobs.load import LoadResult, load
from biodedup.jobs.progress import Progress

__all__ = [
    "CalibrateResult",
    "DedupResult",
    "DemoResult",
    "JoinResult",
    "LoadResult",
    "Progress",
    "Report",
    "calibrate",
    "dedup",
    "demo",
    "examine",
    "find_duplicates",
    "is_gallery",
    "load",
]
