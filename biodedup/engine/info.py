"""Reports on an open gallery: counts, models, thresholds, and notes on suspicious content that is not damage.

Owns the results of `Engine.info` and `Engine.notes`. Never changes anything.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from biodedup.config import Policy
from biodedup.gallery.care.history import date_notes
from biodedup.gallery.care.lookalikes import look_alikes
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.snapshot import Snapshot


def info_of(gallery: Gallery, policy: Policy) -> dict[str, Any]:
    """Counts, models and thresholds of the newest snapshot, as values for JSON."""
    snapshot = gallery.snapshot()
    duplicate_db, review_db = policy.thresholds_db(snapshot.searched_count)
    counts = snapshot.column_counts()
    models = {
        column: {
            "model_id": model.model_id,
            "dimension": model.dimension,
            "subjects": counts[column],
            "index": str(snapshot.indexing.spec(column)),
        }
        for column, model in snapshot.models.items()
    }
    return {
        "gallery_id": gallery.gallery_id,
        "gallery_version": snapshot.version,
        "subjects": snapshot.live_count,
        "rows": snapshot.live_count + snapshot.extra_rows,
        "removed_not_erased": len(snapshot.tombstones),
        "segments": len(snapshot.parts) - 1,
        "sealed_rows": snapshot.parts[-1].first_row,
        "columns": models,
        "groups": sorted(set().union(*snapshot.group_sets.values())),
        "encounters": snapshot.outcomes(),
        "open_cases": len(gallery.open_cases()),
        "policy": {"version": gallery.policies[-1].version, **asdict(policy)},
        "duplicate_db": round(duplicate_db, 2),
        "review_db": round(review_db, 2),
    }


def notes_of(snapshot: Snapshot, now: float) -> list[str]:
    """Notes on subject ids that look alike, and on decisions that were dated by a wrong clock. now: in seconds since 1970."""
    count, groups = look_alikes(snapshot)
    notes = [f"subject ids that look alike: {', '.join(map(repr, names))}" for names in groups]
    if count > len(groups):
        notes.append(f"... and {count - len(groups):,} more groups of subject ids that look alike")
    return notes + date_notes(snapshot, now)
