"""Verifies a gallery: every database page, every checksum, and that its parts agree with each other.

Owns the list of problems. Never changes anything.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from biodedup.errors import CallerError, GalleryDamaged, NotAGallery
from biodedup.gallery.catalogue.counters import CounterSources, recomputed
from biodedup.gallery.catalogue.sqlite import SqliteCatalogue, State
from biodedup.gallery.files import packed
from biodedup.gallery.files.column_file import ColumnFile, open_column_file
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import MALFORMED, Storage
from biodedup.gallery.files.names import (
    BACKLOG_NAME,
    DATABASE_NAME,
    LEDGER_NAME,
    READERS_NAME,
    SEGMENT_FOLDER,
)
from biodedup.gallery.opening import check_format
from biodedup.gallery.segments.layout import ENCOUNTER, INDEX, LOOKUP, SUBJECT, SegmentEntry, file_name
from biodedup.gallery.segments.part import PIECE_ROWS
from biodedup.gallery.segments.reader import Segment
from biodedup.values import COLUMNS

COUNTERS = "counters"
"""Kind of a problem with the counters."""


@dataclass(frozen=True)
class Problem:
    """One problem. segment: None for the database; kind: `subject`, `encounter`, a column, a look-up, an index, `journal` or COUNTERS."""

    segment: int | None
    kind: str
    text: str

    def __str__(self) -> str:
        where = "database" if self.segment is None else f"segment {self.segment}"
        return f"{where}, {'column ' if self.kind in COLUMNS else ''}{self.kind}: {self.text}"


@dataclass(frozen=True)
class Manifest:
    """A gallery's files, as of one commit. files: the open files; problems: of files that could not be opened."""

    gallery_id: str
    version: int
    entries: Sequence[SegmentEntry]
    files: dict[tuple[int, str], ColumnFile]
    problems: list[Problem]
    tombstones: NDArray[np.int64]
    journal_ids: list[str]
    pending: Mapping[int, str]
    counters: State
    counter_sources: CounterSources


def inspect(storage: Storage, folder: Path) -> list[Problem]:
    """Verifies every page and every checksum, and compares derived files with the exact ones. It reads the whole gallery. In the databases
    of jobs, which are in the same folder, it verifies only the pages.

    Raises NotAGallery, StorageUnavailable.
    """
    try:
        return _inspected(storage, folder) + _problems_of_job_databases(storage, folder)
    except MALFORMED as error:
        if isinstance(error, CallerError):
            raise
        return [Problem(None, "journal", f"{type(error).__name__}: {error}")]
    except GalleryDamaged as error:
        return [Problem(None, "journal", str(error))]


def _problems_of_job_databases(storage: Storage, folder: Path) -> list[Problem]:
    """The problems of the databases of the enrolment queue and of field kits."""
    problems = []
    for name in {BACKLOG_NAME, LEDGER_NAME, READERS_NAME}.intersection(storage.list_names(folder) or ()):
        try:
            with (
                translated(f"reading {folder / name}"),
                closing(storage.connect(folder / name, read_only=True)) as database,
            ):
                found = [text for (text,) in database.execute("PRAGMA integrity_check(20)") if text != "ok"]
        except (NotAGallery, GalleryDamaged) as error:
            found = [str(error)]
        problems += [Problem(None, name, text) for text in found]
    return problems


def _inspected(storage: Storage, folder: Path) -> list[Problem]:
    with connected(storage, folder) as catalogue:
        if read_counters(catalogue) is None:
            return [
                Problem(None, COUNTERS, "its counters are lost; `biodedup doctor --repair` computes them from the rows")
            ]
        catalogue.begin_reading()  # so that a writer cannot seal the journal meanwhile
        try:
            database = [Problem(None, "journal", text) for text in catalogue.problems()]
        finally:
            catalogue.rollback()
        if database:
            return database
        manifest = read_manifest(storage, folder, catalogue)
    problems = list(manifest.problems)
    if (counted := recomputed(manifest.counters, manifest.counter_sources)) != manifest.counters:
        problems.append(
            Problem(
                None,
                COUNTERS,
                f"its counters are {in_words(manifest.counters)}, wanted {in_words(counted)} by its rows",
            )
        )
    for (number, kind), file in manifest.files.items():
        problems += [Problem(number, kind, text) for text in file.problems()]
    damaged = {problem.segment for problem in problems}
    for entry in manifest.entries:
        if entry.number not in damaged:
            files = {kind: manifest.files[entry.number, kind] for kind in entry.files}
            try:
                problems += _contradictions(Segment(entry, files))
            except GalleryDamaged as error:
                problems.append(Problem(entry.number, SUBJECT, str(error)))
    return problems or _twice(manifest)


@contextmanager
def connected(storage: Storage, folder: Path, *, read_only: bool = True) -> Iterator[SqliteCatalogue]:
    """The database of a gallery, with its format checked. Raises NotAGallery, GalleryDamaged, StorageUnavailable."""
    with translated(f"reading {folder}"):
        if DATABASE_NAME not in (storage.list_names(folder) or ()):
            if storage.list_names(folder / SEGMENT_FOLDER):
                raise GalleryDamaged(f"{folder} holds segments and no {DATABASE_NAME}; restore it from a backup")
            raise NotAGallery(f"{folder} holds no gallery")
        storage.unlock(folder, new=False)
        catalogue = SqliteCatalogue(storage.connect(folder / DATABASE_NAME, read_only=read_only))
        try:
            check_format(storage, catalogue, folder)
            yield catalogue
        finally:
            catalogue.close()


def read_manifest(
    storage: Storage, folder: Path, catalogue: SqliteCatalogue, copy: sqlite3.Connection | None = None
) -> Manifest:
    """Opens all files that the manifest names. copy: receives a copy of the database, as of the same commit."""
    catalogue.begin_reading()  # so that no writer removes a file before it is open here
    try:
        entries, state = catalogue.segments(), catalogue.state()
        files, problems = {}, []
        for entry in entries:
            for kind, digest in entry.files.items():
                try:
                    file = open_column_file(storage, folder / SEGMENT_FOLDER / file_name(entry.number, kind))
                    if file.digest != digest:
                        raise file.damaged("it is not the file that the manifest names")
                    files[entry.number, kind] = file
                except (GalleryDamaged, ValueError, KeyError) as error:
                    problems.append(Problem(entry.number, kind, str(error)))
        if copy is not None:
            catalogue.copy_to(copy)
        removed = catalogue.tombstones()
        pending, state = catalogue.pending(), catalogue.state()
        not_live = {*removed, *pending}
        journal = [subject_id for row, subject_id, *_ in catalogue.subjects() if row not in not_live]
        return Manifest(
            gallery_id=catalogue.meta()["gallery_id"],
            version=state.version,
            entries=entries,
            files=files,
            problems=problems,
            tombstones=np.array(removed, np.int64),
            journal_ids=journal,
            pending=pending,
            counters=state,
            counter_sources=read_counter_sources(catalogue, entries),
        )
    finally:
        catalogue.rollback()


def _contradictions(segment: Segment) -> Iterator[Problem]:
    """Problems of a segment whose checksums are right, but whose arrays disagree with each other."""
    number = segment.entry.number
    presence = np.zeros(segment.count, np.uint16)
    for name, column in segment.columns.items():
        column.check_lengths()
        if column.index is not None:
            try:
                column.index.read()
            except GalleryDamaged as error:
                yield Problem(number, name + INDEX + column.index.codec_id, str(error))
        positions = column.positions(0, column.count)
        if (np.diff(positions) <= 0).any() or (
            len(positions) and not 0 <= positions[0] <= positions[-1] < segment.count
        ):
            yield Problem(number, name, "its cells are out of order")
        else:
            presence[positions] |= 1 << COLUMNS.index(name)
    if not np.array_equal(presence, segment.presence(0, segment.count)):
        yield Problem(number, SUBJECT, "the array `presence` disagrees with the columns")
    rows = segment.rows(np.arange(segment.count))
    if (np.diff(rows) <= 0).any() or (len(rows) and not segment.first_row <= rows[0] <= rows[-1] < segment.end_row):
        yield Problem(number, SUBJECT, "its rows are out of order")
    answers = segment.answers
    for kind, count, ids, lookup in (
        (SUBJECT, segment.count, segment.subject_ids, segment.lookup),
        (ENCOUNTER, answers.count, answers.ids, answers.lookup),
    ):
        pieces = [packed.hashes(ids(low, min(low + PIECE_ROWS, count))) for low in range(0, count, PIECE_ROWS)]
        hashes = np.concatenate([np.zeros(0, np.uint64), *pieces])
        order = np.argsort(hashes, kind="stable")
        known, indices = lookup()
        if not (np.array_equal(known, hashes[order]) and np.array_equal(indices, order)):
            yield Problem(number, kind + LOOKUP, "it disagrees with the ids")


def count_extra_rows(manifest: Manifest) -> tuple[int, int]:
    """(live rows beyond the first row of their subject, how many of these are not in `repeated`). It processes one range of hashes after
    the other, so that the memory is limited by the range."""
    live: list[NDArray[np.uint64]] = []
    marked = [np.zeros(0, np.uint64)]
    hidden = np.union1d(manifest.tombstones, np.array(sorted(manifest.pending), np.int64))
    for entry in manifest.entries:
        segment = Segment(entry, {kind: manifest.files[entry.number, kind] for kind in entry.files})
        low, high = np.searchsorted(hidden, (segment.first_row, segment.end_row))
        left_out = segment.at(hidden[low:high])
        hashes, positions = segment.lookup()
        live.append(hashes[~np.isin(positions, left_out)] if len(left_out) else hashes)
        marked.append(segment.repeated)
    live.append(np.sort(packed.hashes(packed.pack_text(manifest.journal_ids))))
    marked.append(live[-1])  # rows of the journal are marked when it is read
    known, extra, unmarked = np.unique(np.concatenate(marked)), 0, 0
    bounds = np.linspace(0, 2.0**64, 257)[1:-1].astype(np.uint64)
    cuts = [[0, *np.searchsorted(hashes, bounds).tolist(), len(hashes)] for hashes in live]
    for i in range(len(bounds) + 1):
        together = np.sort(np.concatenate([h[cut[i] : cut[i + 1]] for h, cut in zip(live, cuts, strict=True)]))
        several = together[1:][together[1:] == together[:-1]]
        extra += len(several)
        unmarked += int(np.count_nonzero(~np.isin(several, known))) if len(several) else 0
    return extra, unmarked


def _twice(manifest: Manifest) -> list[Problem]:
    extra, unmarked = count_extra_rows(manifest)
    problems = []
    if unmarked:
        problems.append(Problem(None, SUBJECT, f"{unmarked} subjects are enrolled twice"))
    if extra != manifest.counters.extra_rows:
        text = f"its counters have {manifest.counters.extra_rows} rows beyond the first of their subject, wanted {extra} by its rows"
        problems.append(Problem(None, COUNTERS, text))
    return problems


def read_counters(catalogue: SqliteCatalogue) -> State | None:
    """The stored counters; None if they are lost or damaged."""
    try:
        return catalogue.state()
    except (GalleryDamaged, *MALFORMED):
        return None


def read_counter_sources(catalogue: SqliteCatalogue, entries: Sequence[SegmentEntry]) -> CounterSources:
    changes = len(catalogue.answers()) + len(catalogue.job_steps()) + sum(1 for _ in catalogue.verdicts())
    return CounterSources(entries, [row for row, *_ in catalogue.subjects()], catalogue.removal_versions(), changes)


def in_words(state: State) -> str:
    """The counters as text."""
    return (
        f"rows {state.row_count}, next segment {state.next_segment}, version {state.version}, commits {state.commits}"
    )
