"""Long work over many records: resumable, with progress, built on the engine."""

from biodedup.jobs.dedup import DedupResult, dedup
from biodedup.jobs.demo import DemoResult, demo
from biodedup.jobs.doctor import Report, examine
from biodedup.jobs.explain import Explained, explain, explain_templates
from biodedup.jobs.join import JoinResult, find_duplicates, is_gallery
from biodedup.jobs.load import LoadResult, load
from biodedup.jobs.progress import Progress

__all__ = [
    "DedupResult",
    "DemoResult",
    "Explained",
    "JoinResult",
    "LoadResult",
    "Progress",
    "Report",
    "dedup",
    "demo",
    "examine",
    "explain",
    "explain_templates",
    "find_duplicates",
    "is_gallery",
    "load",
]
