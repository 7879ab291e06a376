"""Reads a gallery into memory: its counters, its segments, and the tail (the rows of the journal).

Owns the checks that these agree with each other. Never writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from biodedup.errors import BiodedupError, GalleryDamaged
from biodedup.gallery.cases import pairs_of_old_verdicts
from biodedup.gallery.catalogue.protocol import Catalogue
from biodedup.gallery.catalogue.sqlite import ColumnModel, JournalCell, State, paired
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import MALFORMED, Storage
from biodedup.gallery.files.names import SEGMENT_FOLDER
from biodedup.gallery.files.packed import hashes, pack_text
from biodedup.gallery.policies import PolicyVersion
from biodedup.gallery.segments.layout import SegmentEntry
from biodedup.gallery.segments.part import Int64, Part
from biodedup.gallery.segments.reader import Segment, open_segment
from biodedup.gallery.segments.tail import Tail, TailPart
from biodedup.gallery.snapshot import Snapshot
from biodedup.values import Float32


@dataclass(frozen=True)
class LoadedGallery:
    """A gallery in memory, as of one commit."""

    gallery_id: str
    state: State
    snapshot: Snapshot
    tail: Tail
    policies: tuple[PolicyVersion, ...]


def load(catalogue: Catalogue, storage: Storage, folder: Path) -> LoadedGallery:
    """Reads the whole gallery. Raises GalleryDamaged, StorageUnavailable."""
    try:
        with translated(f"reading {folder}"):
            catalogue.begin_reading()  # so that no writer removes a segment before it is open here
            try:
                with catalogue.compared_with_chain():
                    return read(catalogue, storage, folder)
            finally:
                catalogue.rollback()
    except MALFORMED as error:  # damage that SQLite's own checks do not find
        raise malformed_error(folder, error) from (None if isinstance(error, MemoryError) else error)


def read(catalogue: Catalogue, storage: Storage, folder: Path, opened: Sequence[Segment] = ()) -> LoadedGallery:
    """As `load`, inside the caller's transaction. opened: segments that are open already, which are used again."""
    state, models = catalogue.state(), catalogue.models()
    known = {segment.entry.number: segment for segment in opened}
    segments = [_open(storage, folder, entry, known.get(entry.number)) for entry in catalogue.segments()]
    tail = Tail(segments[-1].end_row if segments else 0)
    _fill(tail, models, catalogue, folder)
    tail.mark_again(_again(tail, segments))
    for segment, following in pairwise(segments):
        if segment.end_row != following.first_row:
            raise GalleryDamaged(f"{folder}: rows {segment.end_row} to {following.first_row} are in no segment")
    if tail.end_row != state.row_count:
        raise GalleryDamaged(f"{folder} has {tail.end_row} rows, wanted {state.row_count}; run `biodedup doctor`")
    tombstones = np.array(catalogue.tombstones(), np.int64)
    if len(tombstones) and not 0 <= tombstones[0] <= tombstones[-1] < tail.end_row:
        raise GalleryDamaged(f"{folder}: a tombstone names a row that does not exist; run `biodedup doctor`")
    for segment in segments:
        for name, column in segment.columns.items():
            if name not in models or models[name].dimension != column.dimension:
                raise segment.files[name].damaged("its vectors are of another model than the gallery's")
    bare = tail.first_row + np.flatnonzero(tail.presence.view() == 0)
    if len(np.setdiff1d(bare, tombstones)):
        raise GalleryDamaged(f"{folder}: the journal lacks templates; run `biodedup doctor`")
    parts: tuple[Part, ...] = (*segments, TailPart(tail, tail.count))
    snapshot = Snapshot(
        version=state.version,
        row_count=tail.end_row,
        parts=parts,
        tombstones=tombstones,
        models=models,
        group_sets=catalogue.group_sets(),
        pending=catalogue.pending(),
        extra_rows=state.extra_rows,
        different=catalogue.judged(),
        steps=catalogue.job_steps(),
        indexing=catalogue.index_settings(),
        transform=catalogue.transform(),
    )
    if not catalogue.has_encounters():  # an older format that no writer has upgraded yet
        snapshot = replace(snapshot, different=paired(pairs_of_old_verdicts(catalogue.verdicts(), snapshot)))
    return LoadedGallery(catalogue.meta()["gallery_id"], state, snapshot, tail, tuple(catalogue.policies()))


def _open(storage: Storage, folder: Path, entry: SegmentEntry, known: Segment | None) -> Segment:
    if known is not None and known.entry == entry:
        return known
    return open_segment(storage, folder / SEGMENT_FOLDER, entry)


def _fill(tail: Tail, models: Mapping[str, ColumnModel], catalogue: Catalogue, folder: Path) -> None:
    append_journal(tail, catalogue.subjects(), catalogue.cells(), models, folder)
    tail.answers.update(catalogue.answers())


def append_journal(
    tail: Tail,
    subjects: Sequence[tuple[int, str, str, int]],
    cells: Iterable[JournalCell],
    models: Mapping[str, ColumnModel],
    folder: Path,
) -> None:
    """Appends rows of the journal to a tail that ends before them. subjects: (row, subject_id, encounter_id, group_set). Raises
    GalleryDamaged."""
    first_row = tail.end_row
    if [row for row, *_ in subjects] != list(range(first_row, first_row + len(subjects))):
        raise GalleryDamaged(f"{folder}: the journal lacks rows; run `biodedup doctor`")
    lists: dict[str, tuple[list[int], list[bytes], list[bytes], list[float]]] = {}
    for cell in cells:
        if not 0 <= cell.row - first_row < len(subjects):
            raise GalleryDamaged(f"{folder}: templates without a subject; run `biodedup doctor`")
        if len(cell.vector or b"") != 4 * (models[cell.column].dimension or 0):
            raise GalleryDamaged(
                f"{folder}: column {cell.column} holds vectors of another length; run `biodedup doctor`"
            )
        positions, vectors, minutiae, quality = lists.setdefault(cell.column, ([], [], [], []))
        positions.append(cell.row - first_row)
        vectors.append(cell.vector or b"")
        minutiae.append(cell.minutiae or b"")
        quality.append(np.nan if cell.quality is None else cell.quality)
    arrays: dict[str, tuple[list[int], Float32 | None, list[bytes], list[float]]] = {}
    for name, (positions, vectors, minutiae, quality) in lists.items():
        dimension = models[name].dimension
        matrix = None if dimension is None else np.frombuffer(b"".join(vectors), "<f4").reshape(-1, dimension)
        if matrix is not None and not np.isfinite(matrix).all():
            raise GalleryDamaged(
                f"{folder}: column {name} of the journal holds infinite or undefined numbers; run `biodedup doctor`"
            )
        arrays[name] = (positions, matrix, minutiae, quality)
    tail.extend([(subject_id, encounter_id, group_set) for _, subject_id, encounter_id, group_set in subjects], arrays)


def malformed_error(folder: Path, error: Exception) -> Exception:
    """Converts an exception about malformed content into GalleryDamaged. Errors of this library and MemoryError are returned unchanged."""
    if isinstance(error, BiodedupError | MemoryError):
        return error
    return GalleryDamaged(
        f"{folder}: its tables hold malformed content ({type(error).__name__}); restore it from a backup"
    )


def _again(tail: Tail, segments: Sequence[Segment]) -> Int64:
    """The positions in a tail of rows that are not the first row under their subject_id."""
    if not tail.count:
        return np.zeros(0, np.int64)
    ids = pack_text(tail.subject_ids)
    known = hashes(ids)
    found = [np.unique(segment.find_all(ids, known)[0]) for segment in segments]
    found += [np.array([at for several in tail.positions_of.values() for at in several[1:]], np.int64)]
    return np.unique(np.concatenate(found))
