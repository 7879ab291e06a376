"""Is a gallery sound, and if not, what can be had back? And copies of it while it is in use.

Owns verification, repair and backup. Never searches, and never changes what is sound.

1. A backup is a gallery: it can be opened, searched and inspected. Files are immutable, so that the next backup copies
   only segments that are new.
   What jobs keep beside the gallery comes along, so that they go on with the copy.
2. Repair never guesses. A derived file is written anew from its exact one and must come out byte for byte; an exact file is
   taken from a backup that holds the very file; a database only together with the backup's whole state. Counters are computed
   from the rows.
3. Nothing half-written has a name that is read: files get theirs when they are whole and synced.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from biodedup.errors import CallerError, GalleryDamaged, InvalidInput, NotAGallery
from biodedup.gallery.care.exposure import ASIDE_FOLDER
from biodedup.gallery.care.removal import refuse_foreign
from biodedup.gallery.catalogue.counters import Held, recomputed
from biodedup.gallery.catalogue.sqlite import Catalogue, State
from biodedup.gallery.files import packed
from biodedup.gallery.files.column_file import ColumnFile, open_column_file
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import NEW_SUFFIX, ODD_CONTENT, Storage
from biodedup.gallery.files.names import (
    BACKLOG_NAME,
    DATABASE_NAME,
    LEDGER_NAME,
    LOCK_NAME,
    MERGES_FOLDER,
    NEW_NAME,
    SEGMENT_FOLDER,
    SENTINELS_NAME,
)
from biodedup.gallery.files.private import refuse_link
from biodedup.gallery.gallery import check_format
from biodedup.gallery.segments.layout import DERIVED, ENCOUNTER, LOOKUP, SUBJECT, SegmentEntry, file_name, number_of
from biodedup.gallery.segments.part import PIECE_ROWS
from biodedup.gallery.segments.reader import Segment
from biodedup.gallery.segments.writer import rebuild_lookup
from biodedup.values import COLUMNS

COUNTERS = "counters"
"""Kind of a problem with these."""
_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Problem:
    """What is wrong. segment: None for the database; kind: `subject`, `encounter`, a column, a look-up, or `journal`."""

    segment: int | None
    kind: str
    text: str

    def __str__(self) -> str:
        where = "database" if self.segment is None else f"segment {self.segment}"
        return f"{where}, {'column ' if self.kind in COLUMNS else ''}{self.kind}: {self.text}"


@dataclass(frozen=True)
class Copied:
    """What a backup or a restoration did. version: the state copied; files: copied and kept ones; byte_count: copied; left_out:
    databases of jobs that are damaged, of which the target keeps what it had. Databases are copied each time, and not counted."""

    version: int
    files_copied: int
    files_kept: int
    byte_count: int
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Manifest:
    """A consistent view of a gallery's files. files: open ones; problems: of those that could not be opened."""

    gallery_id: str
    version: int
    entries: Sequence[SegmentEntry]
    files: dict[tuple[int, str], ColumnFile]
    problems: list[Problem]
    tombstones: NDArray[np.int64]
    journal_ids: list[str]
    pending: Mapping[int, str]
    counters: State
    held: Held


def inspect(storage: Storage, folder: Path) -> list[Problem]:
    """Checks every page, every checksum, and that what is derived agrees with what is exact. Reads everything.

    Raises NotAGallery, StorageUnavailable.
    """
    try:
        return _inspected(storage, folder)
    except ODD_CONTENT as error:
        if isinstance(error, CallerError):
            raise
        return [Problem(None, "journal", f"{type(error).__name__}: {error}")]
    except GalleryDamaged as error:
        return [Problem(None, "journal", str(error))]


def _inspected(storage: Storage, folder: Path) -> list[Problem]:
    with _connected(storage, folder) as catalogue:
        if _counters(catalogue) is None:
            return [
                Problem(None, COUNTERS, "its counters are lost; `biodedup doctor --repair` computes them from the rows")
            ]
        database = [Problem(None, "journal", text) for text in catalogue.problems()]
        if database:
            return database
        manifest = _manifest(storage, folder, catalogue)
    problems = list(manifest.problems)
    if (counted := recomputed(manifest.counters, manifest.held)) != manifest.counters:
        problems.append(
            Problem(None, COUNTERS, f"its counters say {_told(manifest.counters)}, its rows {_told(counted)}")
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


def repair(storage: Storage, folder: Path, backup: Path | None = None) -> list[str]:
    """Mends what can be mended and returns what was done, a line each. Call `inspect` afterwards.

    Raises GalleryBusy where a writer is at work, InvalidInput where the backup is of another gallery or damaged itself.
    """
    with translated(f"repairing {folder}"):
        refuse_link(folder / SEGMENT_FOLDER)
        lock = storage.lock(folder / LOCK_NAME)
        try:
            done: list[str] = []
            found = _inspect_or_lost(storage, folder)
            if any(problem.kind == COUNTERS for problem in found):
                done = _recount(storage, folder)
                found = _inspect_or_lost(storage, folder)
            if any(problem.segment is None for problem in found):
                return done + _restore(storage, folder, backup)
            return done + _mend(storage, folder, found, backup)
        finally:
            lock.release()


def backup(storage: Storage, folder: Path, target: Path) -> Copied:
    """Copies a gallery, as of one version, while others read and write it; again, it copies only new segments.

    The copy is a gallery, with what jobs keep beside it. Raises InvalidInput where the target holds something else,
    GalleryDamaged where the source is damaged, StorageUnavailable; the target's earlier state is whole until the new one is.
    """
    with translated(f"backing up to {target}"):
        _refuse_target(storage, folder, target)
        if storage.list_names(target) is None:
            storage.make_folder(target)
        if storage.list_names(target / SEGMENT_FOLDER) is None:
            storage.make_folder(target / SEGMENT_FOLDER)
        lock = storage.lock(target / LOCK_NAME)
        try:
            sentinels = _sentinels(storage, folder)  # opened first: they name no row that the copied database has not
            copied = _copy(storage, folder, target, check_kept=False)
            if sentinels is not None:
                _copy_file(storage, sentinels, target / SENTINELS_NAME)
                storage.sync_folder(target)
            return copied
        finally:
            lock.release()


def _refuse_target(storage: Storage, folder: Path, target: Path) -> None:
    """Raises InvalidInput or NotAGallery for a folder that is not for a backup of this gallery."""
    source, resolved = folder.resolve(), target.resolve()
    if resolved == source or (source / SEGMENT_FOLDER) in (resolved, *resolved.parents):
        raise InvalidInput(f"{target} is in the gallery itself; name an empty folder or an earlier backup")
    refuse_foreign(storage, target)
    if DATABASE_NAME in (storage.list_names(target) or ()):
        with _connected(storage, target):
            pass  # a database of ours


# verifying -------------------------------------------------------------------------------------------------------


@contextmanager
def _connected(storage: Storage, folder: Path, *, read_only: bool = True) -> Iterator[Catalogue]:
    with translated(f"reading {folder}"):
        if DATABASE_NAME not in (storage.list_names(folder) or ()):
            if storage.list_names(folder / SEGMENT_FOLDER):
                raise GalleryDamaged(f"{folder} holds segments and no {DATABASE_NAME}; restore it from a backup")
            raise NotAGallery(f"{folder} holds no gallery")
        catalogue = Catalogue(storage.connect(folder / DATABASE_NAME, read_only=read_only))
        try:
            check_format(storage, catalogue, folder)
            yield catalogue
        finally:
            catalogue.close()


def _manifest(
    storage: Storage, folder: Path, catalogue: Catalogue, copy: sqlite3.Connection | None = None
) -> _Manifest:
    """copy: gets the database as of the same version."""
    catalogue.begin_reading()  # while this lasts no writer can retire a file that is not open here yet
    try:
        entries, state = catalogue.segments(), catalogue.state()
        files, problems = {}, []
        for entry in entries:
            for kind, digest in entry.files.items():
                try:
                    file = open_column_file(storage, folder / SEGMENT_FOLDER / file_name(entry.number, kind))
                    if file.digest != digest:
                        raise file.damaged("it is another file than the manifest names")
                    files[entry.number, kind] = file
                except (GalleryDamaged, ValueError, KeyError) as error:
                    problems.append(Problem(entry.number, kind, str(error)))
        if copy is not None:
            catalogue.copy_to(copy)
        removed = catalogue.tombstones()
        pending, state = catalogue.pending(), catalogue.state()
        gone = {*removed, *pending}
        journal = [subject_id for row, subject_id, *_ in catalogue.subjects() if row not in gone]
        return _Manifest(
            catalogue.meta()["gallery_id"],
            state.version,
            entries,
            files,
            problems,
            np.array(removed, np.int64),
            journal,
            pending,
            state,
            _held(catalogue, entries),
        )
    finally:
        catalogue.rollback()


def _contradictions(segment: Segment) -> Iterator[Problem]:
    """Of a segment whose checksums are all right: does what it holds agree with itself?"""
    number = segment.entry.number
    presence = np.zeros(segment.count, np.uint16)
    for name, column in segment.columns.items():
        column.check_lengths()
        positions = column.positions(0, column.count)
        if (np.diff(positions) <= 0).any() or (
            len(positions) and not 0 <= positions[0] <= positions[-1] < segment.count
        ):
            yield Problem(number, name, "its cells are out of order")
        else:
            presence[positions] |= 1 << COLUMNS.index(name)
    if not np.array_equal(presence, segment.presence(0, segment.count)):
        yield Problem(number, SUBJECT, "the presence of templates is not that of the columns")
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
            yield Problem(number, kind + LOOKUP, "it is not the order of its ids")


def _extra_rows(manifest: _Manifest) -> tuple[int, int]:
    """(live rows beyond the first of their subject, those of them that nothing marks as such). Works range by range of the hash, so
    that memory is bounded by the range."""
    live: list[NDArray[np.uint64]] = []
    marked = [np.zeros(0, np.uint64)]
    hidden = np.union1d(manifest.tombstones, np.array(sorted(manifest.pending), np.int64))
    for entry in manifest.entries:
        segment = Segment(entry, {kind: manifest.files[entry.number, kind] for kind in entry.files})
        low, high = np.searchsorted(hidden, (segment.first_row, segment.end_row))
        left_out = segment.at(hidden[low:high])
        hashes, positions = segment.lookup()
        live.append(hashes[~np.isin(positions, left_out)] if len(left_out) else hashes)
        marked.append(segment.again)
    live.append(np.sort(packed.hashes(packed.pack_text(manifest.journal_ids))))
    marked.append(live[-1])  # those of the journal are found out when it is read
    known, extra, unmarked = np.unique(np.concatenate(marked)), 0, 0
    bounds = np.linspace(0, 2.0**64, 257)[1:-1].astype(np.uint64)
    cuts = [[0, *np.searchsorted(hashes, bounds).tolist(), len(hashes)] for hashes in live]
    for i in range(len(bounds) + 1):
        together = np.sort(np.concatenate([h[cut[i] : cut[i + 1]] for h, cut in zip(live, cuts, strict=True)]))
        several = together[1:][together[1:] == together[:-1]]
        extra += len(several)
        unmarked += int(np.count_nonzero(~np.isin(several, known))) if len(several) else 0
    return extra, unmarked


def _twice(manifest: _Manifest) -> list[Problem]:
    extra, unmarked = _extra_rows(manifest)
    problems = []
    if unmarked:
        problems.append(Problem(None, SUBJECT, f"{unmarked} subjects are enrolled twice"))
    if extra != manifest.counters.extra_rows:
        text = f"its counters say that {manifest.counters.extra_rows} rows are not the first of their subject, its rows {extra}"
        problems.append(Problem(None, COUNTERS, text))
    return problems


def _counters(catalogue: Catalogue) -> State | None:
    """None where they are lost or damaged."""
    try:
        return catalogue.state()
    except (GalleryDamaged, *ODD_CONTENT):
        return None


def _held(catalogue: Catalogue, entries: Sequence[SegmentEntry]) -> Held:
    changes = len(catalogue.answers()) + len(catalogue.job_steps()) + sum(1 for _ in catalogue.verdicts())
    return Held(entries, [row for row, *_ in catalogue.subjects()], catalogue.removal_versions(), changes)


def _told(state: State) -> str:
    return (
        f"rows {state.row_count}, next segment {state.next_segment}, version {state.version}, commits {state.commits}"
    )


# mending ---------------------------------------------------------------------------------------------------------


def _inspect_or_lost(storage: Storage, folder: Path) -> list[Problem]:
    try:
        return inspect(storage, folder)
    except (GalleryDamaged, NotAGallery) as error:
        return [Problem(None, "journal", str(error))]


def _recount(storage: Storage, folder: Path) -> list[str]:
    """Another writer, if there is one, finds a commit that is not its own, and stops."""
    with _connected(storage, folder, read_only=False) as catalogue:
        catalogue.begin()
        try:
            counted = recomputed(_counters(catalogue), _held(catalogue, catalogue.segments()))
            catalogue.set_state(counted)
            catalogue.commit()
        finally:
            catalogue.rollback()
        manifest = _manifest(storage, folder, catalogue)
        if not manifest.problems:  # which are mended first; then this is counted again
            counted = replace(counted, extra_rows=_extra_rows(manifest)[0])
            catalogue.begin()
            catalogue.set_state(counted)
            catalogue.commit()
    return [f"database: counters computed from the rows: {_told(counted)}"]


def _mend(storage: Storage, folder: Path, found: Sequence[Problem], backup: Path | None) -> list[str]:
    done: list[str] = []
    with _connected(storage, folder) as catalogue:
        manifest = _manifest(storage, folder, catalogue)
    digests = {(entry.number, kind): digest for entry in manifest.entries for kind, digest in entry.files.items()}
    damaged = dict.fromkeys((p.segment or 0, p.kind) for p in found if p.kind not in DERIVED)
    spare: dict[tuple[int, str], ColumnFile] = {}
    if backup is not None and damaged:
        with _connected(storage, backup) as catalogue:
            spare = _manifest(storage, backup, catalogue).files
    for number, kind in damaged:
        source = spare.get((number, kind))
        if source is None or source.digest != digests[number, kind] or source.problems():
            continue
        _copy_file(storage, source, folder / SEGMENT_FOLDER / source.name)
        done.append(f"segment {number}: {kind} taken from the backup")
    for number, kind in dict.fromkeys((p.segment or 0, p.kind) for p in found if p.kind in DERIVED):
        path = folder / SEGMENT_FOLDER / file_name(number, kind.removesuffix(LOOKUP))
        try:
            exact = open_column_file(storage, path)
            if exact.problems():
                continue
        except GalleryDamaged:
            continue
        digest = rebuild_lookup(storage, folder / SEGMENT_FOLDER, number, manifest.gallery_id, kind, exact)
        same = "byte for byte" if digest == digests[number, kind] else "but it is not the manifest's file"
        done.append(f"segment {number}: {kind} rebuilt from {kind.removesuffix(LOOKUP)}, {same}")
    storage.sync_folder(folder / SEGMENT_FOLDER)
    return done


def _restore(storage: Storage, folder: Path, backup: Path | None) -> list[str]:
    """The backup's whole state instead of a damaged database."""
    if backup is None:
        return []
    found = _inspect_or_lost(storage, backup)
    if found:
        raise InvalidInput(f"{backup} is damaged itself ({found[0]}); name another backup")
    with _connected(storage, backup) as catalogue:
        gallery_id = catalogue.meta()["gallery_id"]
    refuse_link(folder / SEGMENT_FOLDER)
    for name in filter(number_of, storage.list_names(folder / SEGMENT_FOLDER) or ()):
        try:
            about = open_column_file(storage, folder / SEGMENT_FOLDER / name).about
        except GalleryDamaged:
            continue
        if about["gallery"] != gallery_id:
            raise InvalidInput(f"{backup} is a backup of another gallery than {folder}; name one of this")
    aside = folder / ASIDE_FOLDER
    storage.make_folder(aside)
    if storage.list_names(folder / SEGMENT_FOLDER) is None:
        storage.make_folder(folder / SEGMENT_FOLDER)
    for name in (DATABASE_NAME, DATABASE_NAME + "-journal"):
        if name in (storage.list_names(folder) or ()):
            storage.replace(folder / name, aside / name)
    copied = _copy(storage, backup, folder, check_kept=True, aside=aside)
    return [
        f"restored version {copied.version} from the backup: what was committed later is lost; the damaged database, databases "
        f"of jobs, and segments that the backup does not name are in {aside.name}/"
    ]


def _copy(storage: Storage, source: Path, target: Path, *, check_kept: bool, aside: Path | None = None) -> Copied:
    # Before the gallery: a ledger that knows of less than the gallery is safe, one that knows of more hides what is missing.
    ledgers, left_out = _copied_databases(storage, source, target)
    with _new_database(storage, target / NEW_NAME) as copy, _connected(storage, source) as catalogue:
        manifest = _manifest(storage, source, catalogue, copy)
    if manifest.problems:
        raise GalleryDamaged(f"{source}: {manifest.problems[0]}; run `biodedup doctor`")
    present = {name for name in storage.list_names(target / SEGMENT_FOLDER) or () if number_of(name) is not None}
    if DATABASE_NAME in (storage.list_names(target) or ()):
        with _connected(storage, target) as catalogue:
            if catalogue.meta()["gallery_id"] != manifest.gallery_id:
                raise InvalidInput(f"{target} is another gallery or its backup; name an empty folder")
    # After the database was read: a merge's log is written before the gallery says that it has begun.
    copied, kept, byte_count = _copy_logs(storage, source / MERGES_FOLDER, target / MERGES_FOLDER)
    for file in manifest.files.values():
        path = target / SEGMENT_FOLDER / file.name
        if file.name in present and _is_same(storage, path, file, check_kept):
            kept += 1
            continue
        _copy_file(storage, file, path)
        copied, byte_count = copied + 1, byte_count + file.byte_count
    storage.sync_folder(target / SEGMENT_FOLDER)
    databases = [DATABASE_NAME, *ledgers]
    if aside is not None:  # where nothing was, the gallery makes it whole: last
        databases.reverse()
    for name in databases:
        _put_in_place(storage, target, name, aside)
    for name in sorted(present - {file.name for file in manifest.files.values()}):
        if aside is None:
            storage.remove(target / SEGMENT_FOLDER / name)
        else:
            storage.replace(target / SEGMENT_FOLDER / name, aside / name)
    return Copied(manifest.version, copied, kept, byte_count, left_out)


# what jobs keep beside a gallery ---------------------------------------------------------------------------------


@contextmanager
def _new_database(storage: Storage, path: Path) -> Iterator[sqlite3.Connection]:
    """An empty one, to be copied into."""
    storage.remove(path)
    storage.remove(path.with_name(f"{path.name}-journal"))
    connection = storage.connect(path, read_only=False)
    try:
        yield connection
    finally:
        connection.close()


def _copied_databases(storage: Storage, source: Path, target: Path) -> tuple[list[str], tuple[str, ...]]:
    """(those that were copied, each as of one moment and under its name with NEW_SUFFIX; those that are damaged)."""
    copied, damaged = [], []
    for name in (BACKLOG_NAME, LEDGER_NAME):
        if name not in (storage.list_names(source) or ()):
            continue
        try:
            with (
                _new_database(storage, target / (name + NEW_SUFFIX)) as copy,
                closing(storage.connect(source / name, read_only=True)) as original,
            ):
                original.backup(copy)
            copied.append(name)
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                raise
            damaged.append(name)  # bookkeeping: no reason to have no backup of the gallery
    return copied, tuple(damaged)


def _put_in_place(storage: Storage, target: Path, name: str, aside: Path | None) -> None:
    """Gives a copied database its name. aside: where what had it goes."""
    for old in (f"{name}-journal", name):  # the journal first: it is not to be rolled back into another database
        if aside is not None and old in (storage.list_names(target) or ()):
            storage.replace(target / old, aside / old)
    storage.remove(target / f"{name}-journal")
    storage.replace(target / (name + NEW_SUFFIX), target / name)
    storage.sync_folder(target)
    storage.remove(target / f"{name}{NEW_SUFFIX}-journal")


def _copy_logs(storage: Storage, source: Path, target: Path) -> tuple[int, int, int]:
    """Copies the logs of merges that the target has not: (files copied, files kept, bytes copied)."""
    names = [name for name in storage.list_names(source) or () if not name.endswith(NEW_SUFFIX)]
    if names:
        storage.make_folder(target)
    present = set(storage.list_names(target) or ())
    copied = byte_count = 0
    for name in names:
        log, there = source / name, target / name
        if name in present and all(a == b for a, b in zip_longest(_pieces(storage, log), _pieces(storage, there))):
            continue
        copied, byte_count = copied + 1, byte_count + _write_file(storage, _pieces(storage, log), there)
    if names:
        storage.sync_folder(target)
    return copied, len(names) - copied, byte_count


def _pieces(storage: Storage, path: Path) -> Iterator[bytes]:
    with storage.map(path) as content:
        for low in range(0, len(content), _COPY_BYTES):
            yield content[low : low + _COPY_BYTES]


def _sentinels(storage: Storage, folder: Path) -> ColumnFile | None:
    """The gallery's sentinels; None without any. Damaged ones are no reason to have no backup."""
    if SENTINELS_NAME not in (storage.list_names(folder) or ()):
        return None
    try:
        file = open_column_file(storage, folder / SENTINELS_NAME)
    except (GalleryDamaged, ValueError, KeyError):
        return None
    return None if file.problems() else file


def _is_same(storage: Storage, path: Path, file: ColumnFile, check: bool) -> bool:
    try:
        there = open_column_file(storage, path)
    except GalleryDamaged:
        return False
    if there.digest == file.digest:
        return not (check and there.problems())
    if not check:
        raise InvalidInput(f"{path.parent.parent} holds a backup of another history; name an empty folder")
    return False


def _copy_file(storage: Storage, source: ColumnFile, path: Path) -> None:
    for problem in source.problems():
        raise source.damaged(problem)
    _write_file(storage, source.content(_COPY_BYTES), path)


def _write_file(storage: Storage, pieces: Iterable[bytes], path: Path) -> int:
    """Returns how many bytes it has."""
    byte_count = 0
    new = path.with_name(path.name + NEW_SUFFIX)
    file = storage.create(new)
    try:
        for piece in pieces:
            file.write(piece)
            byte_count += len(piece)
        file.finish()
    except BaseException:
        file.discard()
        raise
    storage.replace(new, path)
    return byte_count
