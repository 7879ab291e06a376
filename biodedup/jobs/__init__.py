"""Long work over many records: resumable, with progress, built on the engine."""

from biodedup.jobs.adjudication import CasesResult, ExportResult, export_outcomes, list_cases, reasons_of, show_case
from biodedup.jobs.applied import Applied, Undone, undo
from biodedup.jobs.audit import AUDIT_SCHEMA, AuditResult, audit
from biodedup.jobs.audit import KINDS as AUDIT_KINDS
from biodedup.jobs.backlog import Backlog, QueueStatus, note_verdict, queue_status, write_status_page
from biodedup.jobs.calibrate import CalibrateResult, calibrate
from biodedup.jobs.dedup import DedupResult, dedup
from biodedup.jobs.demo import DemoResult, demo
from biodedup.jobs.doctor import Report, examine
from biodedup.jobs.enroll_batch import BatchResult, announce, enroll_batch
from biodedup.jobs.evaluate import Evaluation, evaluate
from biodedup.jobs.explain import Explained, explain, explain_templates
from biodedup.jobs.join import JoinResult, find_duplicates, is_gallery
from biodedup.jobs.kit_ingest import examine_batch, ingest_batches
from biodedup.jobs.kit_keys import load_centre_key, make_centre_key, make_keys, needs_passphrase
from biodedup.jobs.kit_outcomes import IngestResult
from biodedup.jobs.kit_pack import PackResult, pack_batch
from biodedup.jobs.kit_trust import load_trusted, revoke, set_trust
from biodedup.jobs.load import LoadResult, load
from biodedup.jobs.merge import MergeResult, merge
from biodedup.jobs.progress import Progress
from biodedup.jobs.sentinel_report import Watch, Watched
from biodedup.jobs.sentinels import forget_removed, watch

__all__ = [
    "AUDIT_KINDS",
    "AUDIT_SCHEMA",
    "Applied",
    "AuditResult",
    "Backlog",
    "BatchResult",
    "CalibrateResult",
    "CasesResult",
    "DedupResult",
    "DemoResult",
    "Evaluation",
    "Explained",
    "ExportResult",
    "IngestResult",
    "JoinResult",
    "LoadResult",
    "MergeResult",
    "PackResult",
    "Progress",
    "QueueStatus",
    "Report",
    "Undone",
    "Watch",
    "Watched",
    "announce",
    "audit",
    "calibrate",
    "dedup",
    "demo",
    "enroll_batch",
    "evaluate",
    "examine",
    "examine_batch",
    "explain",
    "explain_templates",
    "export_outcomes",
    "find_duplicates",
    "forget_removed",
    "ingest_batches",
    "is_gallery",
    "list_cases",
    "load",
    "load_centre_key",
    "load_trusted",
    "make_centre_key",
    "make_keys",
    "merge",
    "needs_passphrase",
    "note_verdict",
    "pack_batch",
    "queue_status",
    "reasons_of",
    "revoke",
    "set_trust",
    "show_case",
    "undo",
    "watch",
    "write_status_page",
]
