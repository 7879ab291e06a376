"""Long work over many records: resumable, with progress, built on the engine."""

from biodedup.jobs.adjudication import CasesResult, ExportResult, export_outcomes, list_cases, reasons_of, show_case
from biodedup.jobs.audit import AUDIT_SCHEMA, AuditResult, audit
from biodedup.jobs.audit import KINDS as AUDIT_KINDS
from biodedup.jobs.dedup import DedupResult, dedup
from biodedup.jobs.demo import DemoResult, demo
from biodedup.jobs.doctor import Report, examine
from biodedup.jobs.join import JoinResult, find_duplicates, is_gallery
from biodedup.jobs.load import LoadResult, load
from biodedup.jobs.progress import Progress

__all__ = [
    "AUDIT_KINDS",
    "AUDIT_SCHEMA",
    "AuditResult",
    "CasesResult",
    "DedupResult",
    "DemoResult",
    "ExportResult",
    "JoinResult",
    "LoadResult",
    "Progress",
    "Report",
    "audit",
    "dedup",
    "demo",
    "examine",
    "export_outcomes",
    "find_duplicates",
    "is_gallery",
    "list_cases",
    "load",
    "reasons_of",
    "show_case",
]
