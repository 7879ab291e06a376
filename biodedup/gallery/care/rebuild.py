"""Rebuilds a gallery from its parts and the rows of its tables, for example from an export.

Owns the order of the steps: segments first, then the database in one transaction. Never changes the content.

1. The folder is new. Nothing reads it before the database is committed.
2. Row numbers, the gallery's id, its version and its policy do not change. Each sealed part becomes a segment; the journal stays a journal.
3. A sealed vector keeps its eight-bit code, because the codec of its part is used again.
"""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from biodedup.gallery.answers import StoredDecision
from biodedup.gallery.catalogue.sqlite import JournalCell, SqliteCatalogue, State
from biodedup.gallery.files import packed
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import Storage
from biodedup.gallery.files.names import DATABASE_NAME, SEGMENT_FOLDER
from biodedup.gallery.index_settings import IndexSettings
from biodedup.gallery.opening import new_transform
from biodedup.gallery.segments.part import PIECE_ROWS, Rows
from biodedup.gallery.segments.writer import write_segment

TABLES = (
    "model",
    "group_set",
    "pending",
    "review_case",
    "verdict",
    "judged",
    "link",
    "job_step",
    "policy",
    "alarm",
    "approval",
)
"""Tables that are copied row by row. The other tables (manifest, journal) are written from the parts."""

Report = Callable[[int], None]


@dataclass(frozen=True)
class Content:
    """The content of a gallery. settings: the configuration with which it was created (JSON); sealed: the parts before the journal, in the
    order of their rows; journal: the rows after them; table: returns the rows of one of TABLES; subject_keys: whether the parts' minutiae are
    sealed by keys of their rows."""

    gallery_id: str
    settings: str
    state: State
    index: IndexSettings
    sealed: Sequence[Rows]
    journal: Rows
    table: Callable[[str], Iterable[tuple[Any, ...]]]
    subject_keys: bool = False


def rebuild_gallery(storage: Storage, folder: Path, content: Content, report: Report = lambda rows: None) -> None:
    """Writes a gallery into a folder that is absent or empty. report: called with the number of rows written so far. Raises
    StorageUnavailable, and the errors of reading the parts."""
    segments, done = folder / SEGMENT_FOLDER, 0
    with translated(f"writing {folder}"):
        storage.make_folder(folder)
        storage.unlock(folder, new=True)
        storage.make_folder(segments)
        transform = new_transform(storage, folder, content.settings)
        entries = []
        for number, part in enumerate(content.sealed, 1):
            entries.append(
                write_segment(storage, segments, number, content.gallery_id, [part], [None], transform=transform)
            )
            done += part.count
            report(done)
        with closing(SqliteCatalogue(storage.connect(folder / DATABASE_NAME, read_only=False))) as catalogue:
            catalogue.begin()
            catalogue.lay_tables(content.gallery_id, content.settings)
            if transform is not None:
                catalogue.set_transform(transform.transform_id)
            if content.subject_keys:
                catalogue.set_subject_keys()
            catalogue.set_index(content.index)
            for table in TABLES:
                catalogue.put(table, content.table(table))
            for entry in entries:
                catalogue.add_segment(entry)
            _write_journal(catalogue, content.journal, content.state.version)
            catalogue.set_state(
                replace(content.state, next_segment=len(entries) + 1, commit_id=secrets.token_hex(8)),
            )
            catalogue.commit()
        storage.sync_folder(folder)
    report(done + content.journal.count)


def _write_journal(catalogue: SqliteCatalogue, part: Rows, version: int) -> None:
    """Writes the rows of the journal. The journal has no gaps: for a removed row it has a row without id, template and groups, and a
    tombstone."""
    following = part.first_row
    for low in range(0, part.count, PIECE_ROWS):
        high = min(low + PIECE_ROWS, part.count)
        rows = part.rows(np.arange(low, high)).tolist()
        _add_tombstones(catalogue, sorted(set(range(following, rows[-1] + 1)) - set(rows)), version)
        following = rows[-1] + 1
        ids, encounter_ids = packed.text(part.subject_ids(low, high)), packed.text(part.encounter_ids(low, high))
        catalogue.add_subjects(zip(rows, ids, encounter_ids, part.group_sets(low, high).tolist(), strict=True))
        for name, column in part.columns.items():
            first, last = column.cell_range(low, high)
            vectors = column.vectors(first, last)
            minutiae, quality = column.minutiae(first, last).to_pylist(), column.quality(first, last).tolist()
            at = part.rows(column.positions(first, last)).tolist()
            catalogue.put_cells(
                JournalCell(
                    row,
                    name,
                    None if column.dimension is None else np.asarray(vectors[i], "<f4").tobytes(),
                    minutiae[i] or None,
                    None if np.isnan(quality[i]) else quality[i],
                )
                for i, row in enumerate(at)
            )
    _add_tombstones(catalogue, range(following, part.end_row), version)
    answers = part.answers
    for low in range(0, answers.count, PIECE_ROWS):
        high = min(low + PIECE_ROWS, answers.count)
        ids, digests = packed.text(answers.ids(low, high)), answers.digests(low, high).to_pylist()
        for encounter_id, digest, data in zip(ids, digests, answers.texts(low, high).to_pylist(), strict=True):
            catalogue.add_answer(encounter_id, StoredDecision.read(digest, zlib.decompress(data).decode()))


def _add_tombstones(catalogue: SqliteCatalogue, rows: Iterable[int], version: int) -> None:
    """Writes removed rows."""
    for row in rows:
        catalogue.add_subjects([(row, "", "", 0)])
        catalogue.add_tombstone(row, version)
