"""Checks that the keys of subjects (`Config.subject_keys`) open the minutiae of all enrolled rows.

Owns the sentences about keys that were destroyed, lost or replaced. Never changes anything.
"""

from __future__ import annotations

from collections.abc import Iterator

from biodedup.errors import GalleryDamaged
from biodedup.gallery.files.encryption.subject_keys import SubjectKeys, slot_of
from biodedup.gallery.segments.part import PIECE_ROWS
from biodedup.gallery.snapshot import Snapshot
from biodedup.values import COLUMNS


def check_subject_keys(snapshot: Snapshot) -> tuple[list[str], list[str]]:
    """(problems, notes), in sentences, each empty or with one sentence. A destroyed key of an enrolled row is a note: the gallery may be a
    backup from before the removal."""
    if snapshot.keys is None:
        return [], []
    destroyed, wrong = set[int](), set[int]()
    for row, opens in _opened(snapshot, snapshot.keys):
        if not opens:
            (wrong if opens is None else destroyed).add(row)
    problems, notes = [], []
    if wrong:
        problems.append(
            f"minutiae of {_listed(snapshot, wrong)} do not open: their keys are lost, or of another time or gallery; restore the newest "
            "copy of the keys"
        )
    if destroyed:
        notes.append(
            f"the keys of the minutiae of {_listed(snapshot, destroyed)} are destroyed: in a backup, their subjects were removed later; in a "
            "gallery in use, they were overwritten: restore the keys from their mirror"
        )
    return problems, notes


def _opened(snapshot: Snapshot, keys: SubjectKeys) -> Iterator[tuple[int, bool | None]]:
    """(row, whether a record of it opens: False if its key was destroyed, None if the key is missing or another one)."""
    rows = snapshot.live_rows()
    for low in range(0, len(rows), PIECE_ROWS):
        for column, row, record in snapshot.stored_minutiae(rows[low : low + PIECE_ROWS]):
            if slot_of(record) < 0:
                continue
            try:
                (found,) = keys.opened(COLUMNS.index(column), [record])
                yield row, bool(found)
            except GalleryDamaged:
                yield row, None


def _listed(snapshot: Snapshot, rows: set[int]) -> str:
    (first,) = snapshot.subject_ids([min(rows)])
    return f"{len(rows):,} enrolled row{'' if len(rows) == 1 else 's'} (the first: subject {first!r})"
