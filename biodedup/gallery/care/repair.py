"""Repairs a damaged gallery.

Owns what is rebuilt and from what. Never searches, and never changes what is sound.

Repair never guesses. A derived file is written anew from its exact one and must come out byte for byte; an exact file is taken
from a backup that holds the very file; a database only together with the backup's whole state. Counters are computed from the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from biodedup.errors import GalleryDamaged, InvalidInput, NotAGallery
from biodedup.gallery.care.backup import copy_file, copy_gallery
from biodedup.gallery.care.exposure import ASIDE_FOLDER
from biodedup.gallery.care.verify import (
    COUNTERS,
    Problem,
    connected,
    count_extra_rows,
    in_words,
    inspect,
    read_counter_sources,
    read_counters,
    read_manifest,
)
from biodedup.gallery.catalogue.chain import REPAIRED
from biodedup.gallery.catalogue.counters import recomputed
from biodedup.gallery.files.column_file import ColumnFile, open_column_file
from biodedup.gallery.files.encryption.sealed_file import key_id_of
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import Storage, stored_key
from biodedup.gallery.files.names import (
    DATABASE_NAME,
    KEY_NAME,
    LOCK_NAME,
    SEGMENT_FOLDER,
)
from biodedup.gallery.files.private import refuse_link
from biodedup.gallery.segments.indexing import built, write_column_index
from biodedup.gallery.segments.layout import INDEX, LOOKUP, file_name, index_of, is_derived, number_of
from biodedup.gallery.segments.reader import open_segment
from biodedup.gallery.segments.writer import rebuild_lookup


def repair(storage: Storage, folder: Path, backup: Path | None = None) -> list[str]:
    """Repairs what can be repaired, and returns what was done, one line each. Call `inspect` afterwards.

    Raises GalleryBusy where a writer is at work, InvalidInput where the backup is of another gallery or damaged itself.
    """
    with translated(f"repairing {folder}"):
        refuse_link(folder / SEGMENT_FOLDER)
        lock = storage.lock(folder / LOCK_NAME)
        try:
            done = _key_from(storage, folder, backup)
            found = _inspect_or_lost(storage, folder)
            if any(problem.kind == COUNTERS for problem in found):
                done += _recount(storage, folder)
                found = _inspect_or_lost(storage, folder)
            if any(problem.segment is None for problem in found):
                return done + _restore(storage, folder, backup)
            return done + _mend(storage, folder, found, backup)
        finally:
            lock.release()


def _key_from(storage: Storage, folder: Path, backup: Path | None) -> list[str]:
    """Takes a key file that is lost from the backup. Raises InvalidInput where the folder's files are of another key."""
    there = None if backup is None else stored_key(backup)
    if backup is None or there is None or stored_key(folder) is not None:
        return []
    for name in storage.list_names(folder / SEGMENT_FOLDER) or ():
        with (folder / SEGMENT_FOLDER / name).open("rb") as file:
            if key_id_of(file.read(64)) not in (None, there.gallery_key_id):
                raise InvalidInput(f"{backup} is a backup of another gallery than {folder}; name one of this")
    storage.share_key(backup, folder, lost=True)
    return [f"{KEY_NAME} taken from the backup"]


def _inspect_or_lost(storage: Storage, folder: Path) -> list[Problem]:
    try:
        return inspect(storage, folder)
    except (GalleryDamaged, NotAGallery) as error:
        return [Problem(None, "journal", str(error))]


def _recount(storage: Storage, folder: Path) -> list[str]:
    """Another writer, if there is one, finds a commit that is not its own, and stops."""
    with connected(storage, folder, read_only=False) as catalogue:
        catalogue.chain.anew = REPAIRED
        catalogue.begin()
        try:
            counted = recomputed(read_counters(catalogue), read_counter_sources(catalogue, catalogue.segments()))
            catalogue.set_state(counted)
            catalogue.commit()
        finally:
            catalogue.rollback()
        manifest = read_manifest(storage, folder, catalogue)
        if not manifest.problems:  # which are mended first; then this is counted again
            counted = replace(counted, extra_rows=count_extra_rows(manifest)[0])
            catalogue.begin()
            catalogue.set_state(counted)
            catalogue.commit()
    return [f"database: counters computed from the rows: {in_words(counted)}"]


def _mend(storage: Storage, folder: Path, found: Sequence[Problem], backup: Path | None) -> list[str]:
    done: list[str] = []
    with connected(storage, folder) as catalogue:
        manifest = read_manifest(storage, folder, catalogue)
    digests = {(entry.number, kind): digest for entry in manifest.entries for kind, digest in entry.files.items()}
    damaged = dict.fromkeys((p.segment or 0, p.kind) for p in found if not is_derived(p.kind))
    intact: dict[tuple[int, str], ColumnFile] = {}
    if backup is not None and damaged:
        with connected(storage, backup) as catalogue:
            intact = read_manifest(storage, backup, catalogue).files
    for number, kind in damaged:
        source = intact.get((number, kind))
        if source is None or source.digest != digests[number, kind] or source.problems():
            continue
        copy_file(storage, source, folder / SEGMENT_FOLDER / source.name)
        done.append(f"segment {number}: {kind} taken from the backup")
    derived = dict.fromkeys((p.segment or 0, p.kind) for p in found if is_derived(p.kind))
    for number, kind in derived:
        if index_of(kind) is not None:
            done += _mend_index(storage, folder, number, kind)
            continue
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


def _mend_index(storage: Storage, folder: Path, number: int, kind: str) -> list[str]:
    """Builds a FAISS index again from the segment's vectors. Without its codec it is dropped: the next writer builds one anew."""
    name, codec_id = kind.split(INDEX)
    with connected(storage, folder, read_only=False) as catalogue:
        catalogue.begin()
        try:
            entry = next(entry for entry in catalogue.segments() if entry.number == number)
            bare = replace(entry, files={k: digest for k, digest in entry.files.items() if k != kind})
            codec = catalogue.index_settings().codec(name, codec_id)
            segment = open_segment(storage, folder / SEGMENT_FOLDER, bare)
            try:
                files, done = dict(bare.files), "dropped, since its codec is lost; the next writer builds one"
                if codec is not None:
                    index, gallery_id = built(segment.columns[name], codec), catalogue.meta()["gallery_id"]
                    which = (number, kind)
                    files[kind] = write_column_index(
                        storage, folder / SEGMENT_FOLDER, gallery_id, which, index, replaces=True
                    )
                    done = f"built again from {name}"
            finally:
                segment.close()
            catalogue.drop_segments([number])
            catalogue.add_segment(replace(entry, files=files))
            storage.sync_folder(folder / SEGMENT_FOLDER)
            catalogue.commit()
        except GalleryDamaged:
            return []  # the column itself is damaged; a second repair builds its index
        finally:
            catalogue.rollback()
    return [f"segment {number}: {kind} {done}"]


def _restore(storage: Storage, folder: Path, backup: Path | None) -> list[str]:
    """The backup's whole state instead of a damaged database."""
    if backup is None:
        return []
    found = _inspect_or_lost(storage, backup)
    if found:
        raise InvalidInput(f"{backup} is damaged itself ({found[0]}); name another backup")
    with connected(storage, backup) as catalogue:
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
    storage.share_transforms(backup, folder, None)
    copied = copy_gallery(storage, backup, folder, check_kept=True, aside=aside)
    return [
        f"restored version {copied.version} from the backup: what was committed later is lost; the damaged database, databases "
        f"of jobs, and segments that the backup does not name are in {aside.name}/"
    ]
