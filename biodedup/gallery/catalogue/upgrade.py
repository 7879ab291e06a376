"""Converts a gallery of format 1 (release 0.1.0), which stored everything in SQLite, to the current format.

Owns the names of the old tables. The new database is written beside the old one, which it replaces once it is complete. So the gallery has
one complete database at every moment.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from biodedup.errors import GalleryDamaged
from biodedup.gallery.catalogue.sqlite import SqliteCatalogue, State
from biodedup.gallery.files.filesystem import Storage

OLD_FORMAT = 1


def upgrade(storage: Storage, old: sqlite3.Connection, new_path: Path) -> None:
    """Writes all rows of an open database of format 1 into the journal of a new one. Raises GalleryDamaged for unknown views or
    triggers."""
    query = "SELECT count(*) FROM sqlite_master WHERE type NOT IN ('table', 'index')"
    if old.execute(query).fetchone()[0]:
        raise GalleryDamaged(
            "the database holds views or triggers, which this program never creates; restore it from a backup"
        )
    meta = dict(old.execute("SELECT key, value FROM meta"))
    catalogue = SqliteCatalogue(storage.connect(new_path, read_only=False))
    try:
        catalogue.begin()
        catalogue.create(meta["gallery_id"], meta["config"])
        catalogue.put("model", old.execute("SELECT column_index, model_id, dimension FROM model"))
        catalogue.put("subject", old.execute("SELECT row, subject_id, coalesce(encounter_id, ''), 0 FROM subject"))
        catalogue.put("cell", old.execute("SELECT key, vector, minutiae, quality FROM cell"))
        removed = "SELECT row, removed_version FROM subject WHERE removed_version IS NOT NULL"
        catalogue.put("tombstone", old.execute(removed))
        catalogue.put("encounter", old.execute("SELECT encounter_id, digest, outcome, answer FROM encounter"))
        held = "SELECT encounter_id, column_index, model_id, vector, minutiae, quality FROM held"
        catalogue.put_held(old.execute(held))
        (row_count,) = old.execute("SELECT coalesce(max(row) + 1, 0) FROM subject").fetchone()
        catalogue.set_state(State(version=int(meta["version"]), row_count=row_count))
        catalogue.commit()
    finally:
        catalogue.close()
