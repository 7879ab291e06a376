"""Names of the files in a gallery's folder."""

from __future__ import annotations

from biodedup.gallery.files.filesystem import NEW_SUFFIX

DATABASE_NAME = "gallery.sqlite3"
LOCK_NAME = "writer.lock"
SEGMENT_FOLDER = "segments"
SENTINELS_NAME = "sentinels"
"""Probes that `biodedup doctor --canaries` keeps here (jobs/health/canary_file.py); no part of the gallery's content."""
BACKLOG_NAME, LEDGER_NAME, MERGES_FOLDER = "backlog.sqlite3", "kits.sqlite3", "merges"
"""What other jobs keep here (jobs/enrolment/queue.py, jobs/kits/ledger.py, jobs/merging/apply.py); no part of the content, but of a backup."""
NEW_NAME = DATABASE_NAME + NEW_SUFFIX  # a gallery in the making: it gets its name when it is whole
