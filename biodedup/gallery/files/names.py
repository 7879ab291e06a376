"""Names of the files in a gallery's folder."""

from __future__ import annotations

import os
import re

NEW_SUFFIX = ".new"
"""Suffix of a file that is still being written."""
DATABASE_NAME = "gallery.sqlite3"
LOCK_NAME = "writer.lock"
KEY_NAME = "gallery.key"
"""The gallery's key, wrapped by the register's key (encryption/keyring.py); only in an encrypted gallery."""
SEGMENT_FOLDER = "segments"
CANARIES_NAME = "sentinels"
"""Canary probes of `biodedup doctor --canaries` (jobs/health/canary_file.py); not part of the gallery's content."""
BACKLOG_NAME, LEDGER_NAME, MERGES_FOLDER = "backlog.sqlite3", "kits.sqlite3", "merges"
"""Files of other jobs (jobs/enrolment/queue.py, jobs/kits/ledger.py, jobs/merging/log.py): not part of the content, but part of a
backup."""
READERS_NAME = "readers.sqlite3"
"""Calls of processes that only read, until the writer takes them into the audit log (catalogue/readings.py)."""
NEW_NAME = DATABASE_NAME + NEW_SUFFIX  # a new database; it gets its name when it is complete
_UNFINISHED = re.compile(r"(\.of-\d+)?\.new")


def unfinished(name: str) -> str:
    """The temporary name of a file while this process writes it. Other processes that write the same file use other names."""
    return f"{name}.of-{os.getpid()}{NEW_SUFFIX}"


def finished(name: str) -> str:
    """The final name of a file, from its final or its temporary name."""
    found = _UNFINISHED.search(name)
    return name if found is None or found.end() < len(name) else name[: found.start()]
