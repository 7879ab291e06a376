"""Long work over many records: resumable, with progress, built on the engine."""

from biodedup.jobs.dedup import DedupResult, dedup
from biodedup.jobs.demo import DemoResult, demo
from biodedup.jobs.doctor import Report, examine
from biodedup.jobs.explain import Explained, explain, explain_templates
from biodedup.jobs.join import JoinResult, find_duplicates, is_gallery
from biodedup.jobs.kit_ingest import IngestResult, examine_batch, ingest_batches
from biodedup.jobs.kit_keys import load_trusted, make_keys
from biodedup.jobs.kit_pack import PackResult, pack_batch
from biodedup.jobs.load import LoadResult, load
from biodedup.jobs.progress import Progress

__all__ = [
    "DedupResult",
    "DemoResult",
    "Explained",
    "IngestResult",
    "JoinResult",
    "LoadResult",
    "PackResult",
    "Progress",
    "Report",
    "dedup",
    "demo",
    "examine",
    "examine_batch",
    "explain",
    "explain_templates",
    "find_duplicates",
    "ingest_batches",
    "is_gallery",
    "load",
    "load_trusted",
    "make_keys",
    "pack_batch",
]
