"""`export --to`: writes a whole gallery as Parquet files, which other programs can read, and from which `load` restores the gallery.

Owns the reading of one version of the gallery, while another process may write. Never changes the gallery.

1. Memory is bounded by a row group (`GROUP_ROWS`).
2. The folder gets its name after all files are written and synced.
3. Not exported are: files of other jobs beside the gallery (the backlog of `enroll-batch`, the ledger of field kits, canaries, logs of merges),
   which `biodedup backup` copies; removed rows; and indexes, which are built again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

import biodedup
from biodedup.common import quality as quality_scale
from biodedup.common.described import Described
from biodedup.config import Config
from biodedup.engine.callers.audit import recorded_reading
from biodedup.engine.callers.export_right import note_export
from biodedup.errors import InvalidInput
from biodedup.gallery.answers import StoredDecision, inflated, parsed
from biodedup.gallery.catalogue.sqlite import SqliteCatalogue
from biodedup.gallery.files import packed
from biodedup.gallery.files.encryption.subject_keys import unsealed
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import LocalStorage, Storage
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.segments.part import Part
from biodedup.gallery.segments.reader import Segment
from biodedup.gallery.snapshot import Snapshot
from biodedup.jobs.exchange.gallery_files import (
    CODECS,
    CODECS_NAME,
    DECISIONS,
    DECISIONS_NAME,
    ENROLLED,
    FILE_OF,
    GROUP_ROWS,
    NAMES,
    ROWS_NAME,
    WAITING,
    About,
    ExportedPart,
    described,
    new_table,
    rows_schema,
    table_schema,
)
from biodedup.jobs.shared.files import new_folder
from biodedup.jobs.shared.progress import Progress, silent
from biodedup.values import COLUMNS

_COPY_NAME = "database.copy"


@dataclass(frozen=True)
class ExportedGallery(Described):
    """The result of an export. folder: of the files; subjects: number of enrolled subjects; rows: their encounters, and encounters of open cases;
    decisions: stored answers, including receipts of loads; version: of the gallery; byte_count: total size of the files."""

    folder: Path
    subjects: int
    rows: int
    decisions: int
    version: int
    byte_count: int


def export_gallery(
    gallery: Path, folder: Path, config: Config | None = None, *, progress: Progress = silent
) -> ExportedGallery:
    """Writes a gallery to a new folder, as Parquet. The files hold biometric data, and have mode 0600.

    Other processes may search and change the gallery meanwhile. Raises InvalidInput if the folder is not empty or the gallery has an older
    format, NotAllowed (`Config.allow_template_export`), NotAGallery, GalleryDamaged, StorageUnavailable; then no folder is written.
    """
    note_export(config or Config(), "a whole gallery")
    storage = LocalStorage(None if config is None else config.keys)
    with (
        closing(_opened(gallery, storage, config or Config())) as opened,
        translated(f"writing {folder}"),
        new_folder(folder, (*NAMES, _COPY_NAME, f"{_COPY_NAME}-journal")) as new,
    ):
        with (
            _database(opened, storage, new) as (snapshot, catalogue),
            recorded_reading(opened, (config or Config()).audited, "export_gallery", snapshot.live_count),
        ):
            about = _write_tables(catalogue, snapshot, opened.gallery_id, new, progress)
        about.write(new, biodedup.__version__)
        size = sum(path.stat().st_size for path in new.iterdir())
        rows, decisions = (sum(part.rows for part in about.parts), sum(part.decisions for part in about.parts))
    return ExportedGallery(folder, snapshot.live_count, rows, decisions, snapshot.version, size)


def _opened(gallery: Path, storage: Storage, config: Config) -> Gallery:
    return Gallery.open_to_read(gallery, storage, config.gallery, config.subject_keys)


@contextmanager
def _database(gallery: Gallery, storage: Storage, folder: Path) -> Iterator[tuple[Snapshot, SqliteCatalogue]]:
    """Yields the newest snapshot, and a copy of the database at the same version. A writer waits only while the database is copied."""
    path = folder / _COPY_NAME
    try:
        with closing(storage.connect(path, read_only=False)) as copy:
            snapshot = gallery.copied_to(copy)
            catalogue = SqliteCatalogue(copy)
            if not (catalogue.is_current() and catalogue.has_encounters()):
                raise InvalidInput(
                    f"{gallery.folder} has an older format; open it for writing once, such as with `biodedup compact`, then export it"
                )
            yield snapshot, catalogue
    finally:
        storage.remove(path)
        storage.remove(path.with_name(f"{_COPY_NAME}-journal"))


def _write_tables(
    catalogue: SqliteCatalogue, snapshot: Snapshot, gallery_id: str, folder: Path, progress: Progress
) -> About:
    for table, name in FILE_OF.items():
        schema, rows = table_schema(table), catalogue.rows_of(table)
        with new_table(folder / name, schema) as writer:
            while batch := list(islice(rows, GROUP_ROWS)):
                columns = zip(*batch, strict=True)
                writer.write_table(
                    pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema)
                )
    parts = _write_rows(snapshot, folder, progress)
    _write_codecs(snapshot, folder)
    files = {name: described(folder / name) for name in (ROWS_NAME, DECISIONS_NAME, CODECS_NAME, *FILE_OF.values())}
    settings = catalogue.meta()["config"]
    return About(gallery_id, settings, catalogue.state(), snapshot.indexing.to_json(), parts, files)


def _write_rows(snapshot: Snapshot, folder: Path, progress: Progress) -> list[ExportedPart]:
    total = snapshot.present_count
    parts: list[ExportedPart] = []
    done = 0
    with (
        new_table(folder / ROWS_NAME, schema := rows_schema(snapshot.models)) as rows_file,
        new_table(folder / DECISIONS_NAME, DECISIONS) as decisions_file,
    ):
        for part in snapshot.parts:
            mask = snapshot.mask(part)
            positions = np.arange(part.count) if mask is None else np.flatnonzero(mask)
            for low in range(0, len(positions), GROUP_ROWS):
                chosen = positions[low : low + GROUP_ROWS]
                rows_file.write_table(_rows_of(snapshot, part, chosen, schema))
                done += len(chosen)
                progress("exporting", done, total)
            for low in range(0, part.answers.count, GROUP_ROWS):
                decisions_file.write_table(_decisions_of(part, low, min(low + GROUP_ROWS, part.answers.count)))
            parts.append(
                ExportedPart(
                    part.first_row,
                    part.end_row,
                    len(positions),
                    part.answers.count,
                    isinstance(part, Segment),
                    {name: column.codec.codec_id for name, column in part.columns.items() if column.codec is not None},
                )
            )
    return parts


def _rows_of(snapshot: Snapshot, part: Part, positions: NDArray[np.int64], schema: Any) -> Any:
    """A row group of `rows.parquet`. positions: of the rows in the part, ascending."""
    low, high = int(positions[0]), int(positions[-1]) + 1
    rows, inside = part.rows(positions), positions - low
    ids = part.subject_ids(low, high).take(pa.array(inside))
    encounters = packed.text(part.encounter_ids(low, high).take(pa.array(inside)))
    waiting = np.isin(rows, snapshot.pending_rows)
    cells: dict[str, Any] = {
        "row": rows,
        "state": np.where(waiting, WAITING, ENROLLED),
        "subject_id": packed.text(ids),
        "encounter_id": [encounter_id or None for encounter_id in encounters],
        "groups": [sorted(snapshot.group_sets.get(n, ())) for n in part.group_sets(low, high)[inside].tolist()],
        "presence": part.presence(low, high)[inside],
        "again": np.isin(packed.hashes(ids), part.repeated),
    }
    for name, model in snapshot.models.items():
        column = part.columns.get(name)
        all_cells = np.full(len(positions), -1) if column is None else column.cells_at(positions)
        has = all_cells >= 0
        vectors, minutiae, quality = np.zeros((0, model.dimension or 0), np.float32), [], np.zeros(0, np.float32)
        if column is not None and has.any():
            present = all_cells[has]
            vectors = column.vectors_at(present)
            minutiae = unsealed(snapshot.keys, COLUMNS.index(name), column.minutiae_at(present))
            first, last = int(present[0]), int(present[-1]) + 1
            quality = quality_scale.each_from_stored(name, column.quality(first, last)[present - first])
        cells[name] = _lists(vectors, has)
        cells[f"{name}_minutiae"] = _spread([record or None for record in minutiae], has)
        cells[f"{name}_quality"] = _spread([None if np.isnan(q) else q for q in quality.tolist()], has)
    return pa.table([pa.array(cells[field.name], field.type) for field in schema], schema)


def _spread(values: Sequence[Any], has: NDArray[np.bool_]) -> list[Any]:
    """A list with a value for each row: the next of `values` if the row has one, otherwise None. has: bool (rows,)."""
    spread: list[Any] = [None] * len(has)
    for i, value in zip(np.flatnonzero(has).tolist(), values, strict=True):
        spread[i] = value
    return spread


def _lists(vectors: NDArray[np.float32], has: NDArray[np.bool_]) -> Any:
    """An Arrow list array with a vector for each row that has one, otherwise null. has: bool (rows,)."""
    ends = np.cumsum(has) * vectors.shape[1]
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1), pa.float32())
    return pa.ListArray.from_arrays(pa.array(offsets), flat, mask=pa.array(~has))


def _decisions_of(part: Part, low: int, high: int) -> Any:
    """A row group of `decisions.parquet`."""
    answers = part.answers
    rows = []
    for encounter_id, digest, data in zip(
        packed.text(answers.ids(low, high)),
        answers.digests(low, high).to_pylist(),
        answers.texts(low, high).to_pylist(),
        strict=True,
    ):
        stored = StoredDecision.read(digest, inflated(data).decode())
        fields: Mapping[str, Any] = parsed(stored.text) if stored.kind == "decision" else {}
        rows.append(
            {
                "encounter_id": encounter_id,
                "kind": stored.kind,
                "outcome": stored.outcome,
                "subject_id": fields.get("subject_id"),
                "decided_at": fields.get("decided_at"),
                "digest": digest,
                "answer": stored.text,
            }
        )
    return pa.Table.from_pylist(rows, DECISIONS)


def _write_codecs(snapshot: Snapshot, folder: Path) -> None:
    """Writes each codec once, even if several parts use it."""
    codecs = {
        column.codec.codec_id: column.codec
        for part in snapshot.parts
        for column in part.columns.values()
        if column.codec is not None
    }
    with new_table(folder / CODECS_NAME, CODECS) as writer:
        for codec_id, codec in codecs.items():
            rotation = np.ascontiguousarray(codec.rotation, "<f4").tobytes()
            row = {
                "codec_id": codec_id,
                "dimension": codec.dimension,
                "card": json.dumps(codec.in_the_clear().card()),
                "rotation": rotation,
            }
            writer.write_table(pa.Table.from_pylist([row], CODECS))
