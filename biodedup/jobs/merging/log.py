"""Reads and writes the log of an applied merge, from which the merge can be undone: `GALLERY/merges/ID.parquet`.

Owns its schema and location. Never changes a gallery.

The log holds the complete templates of the central gallery's subjects that the merge removes or completes, and the source of each template that
a survivor takes over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from biodedup.common import quality as quality_scale
from biodedup.errors import GalleryDamaged
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import Storage, whole, write_whole
from biodedup.gallery.files.names import MERGES_FOLDER
from biodedup.gallery.files.packed import pack_text
from biodedup.gallery.snapshot import Snapshot
from biodedup.jobs.merging.model import AbsorbedRecord, Member
from biodedup.values import EnrolledEncounter, Template

_BATCH_ROWS = 1_000

_TEMPLATE = pa.struct(
    [
        ("column", pa.string()),
        ("model_id", pa.string()),
        ("embedding", pa.list_(pa.float32())),
        ("minutiae", pa.binary()),
        ("quality", pa.float32()),
    ]
)
_ENCOUNTER = pa.struct(
    [("encounter_id", pa.string()), ("groups", pa.list_(pa.string())), ("templates", pa.list_(_TEMPLATE))]
)
LOG_SCHEMA = pa.schema(
    [
        ("subject_id", pa.string()),
        # removed: from the central gallery; left_out: a district's record that is not added; completed: a survivor
        ("action", pa.string()),
        ("district", pa.string()),
        ("original_id", pa.string()),
        ("survivor", pa.string()),
        ("encounter_id", pa.string()),
        ("groups", pa.list_(pa.string())),  # before the merge
        # templates that a survivor takes over, and the record that each comes from
        ("gets", pa.list_(pa.struct([("column", pa.string()), ("subject_id", pa.string())]))),
        ("joins", pa.list_(pa.string())),  # groups that a survivor takes over
        # of subjects of the central gallery, before the merge: the newest row, its templates, and older rows from the oldest on
        ("row", pa.int64()),
        ("templates", pa.list_(_TEMPLATE)),
        ("older", pa.list_(_ENCOUNTER)),
    ]
)


def log_path(folder: Path, merge_id: str) -> Path:
    """The path of a merge's log in a gallery's folder."""
    return folder / MERGES_FOLDER / f"{merge_id}.parquet"


def logged_merges(folder: Path, storage: Storage) -> list[str]:
    """The ids of all merges that have a log in a gallery, sorted."""
    with translated(f"reading {folder / MERGES_FOLDER}"):
        names = storage.list_names(folder / MERGES_FOLDER) or ()
    return sorted(name.removesuffix(".parquet") for name in names)


def log_batches(before: Snapshot, staged: Snapshot, absorbed: Sequence[AbsorbedRecord]) -> Iterator[Any]:
    """The content of a log. before: the central gallery before the merge; staged: the staging gallery; absorbed: grouped by survivor."""
    clusters = [
        list(group) for _, group in groupby(absorbed, lambda absorbed_record: absorbed_record.survivor.subject_id)
    ]
    for low in range(0, len(clusters), _BATCH_ROWS):
        batch = clusters[low : low + _BATCH_ROWS]
        members = [
            member
            for cluster in batch
            for member in (cluster[0].survivor, *(absorbed_record.member for absorbed_record in cluster))
        ]
        entry_of = _entries(before, [member for member in members if member.central])
        entry_of |= _entries(staged, [member for member in members if not member.central])
        entries: list[dict[str, Any]] = []
        for cluster in batch:
            survivor, joins = entry_of[cluster[0].survivor.subject_id], set[str]()
            for absorbed_record in cluster:
                entry = entry_of[absorbed_record.member.subject_id]
                action = "removed" if absorbed_record.member.central else "left_out"
                entries.append(entry | {"action": action, "survivor": survivor["subject_id"]})
                joins.update(entry["groups"])
            gets = [
                {"column": column, "subject_id": absorbed_record.member.subject_id}
                for absorbed_record in cluster
                for column in absorbed_record.gives
            ]
            joins.difference_update(survivor["groups"])
            if gets or joins:
                entries.append(survivor | {"action": "completed", "gets": gets, "joins": sorted(joins)})
        yield pa.RecordBatch.from_pylist(entries, LOG_SCHEMA)


def _entries(snapshot: Snapshot, members: Sequence[Member]) -> dict[str, dict[str, Any]]:
    """subject_id -> the facts of the log about a record, without its action."""
    rows = snapshot.rows_of(pack_text([member.subject_id for member in members])).tolist()
    return {
        member.subject_id: {
            "subject_id": member.subject_id,
            "district": member.district,
            "original_id": member.original_id,
            "encounter_id": member.encounter_id,
            "groups": sorted(groups),
            "row": row if member.central else None,
            "templates": _template_rows(snapshot.templates(row)) if member.central else None,
            "older": [_encounter(encounter) for encounter in snapshot.encounters_of(member.subject_id)[:-1]]
            if member.central
            else None,
        }
        for member, row, groups in zip(members, rows, snapshot.groups(rows), strict=True)
    }


def _encounter(encounter: EnrolledEncounter) -> dict[str, Any]:
    templates = _template_rows(encounter.templates)
    return {"encounter_id": encounter.encounter_id, "groups": list(encounter.groups), "templates": templates}


def _template_rows(templates: Mapping[str, Template]) -> list[dict[str, Any]]:
    return [vars(t) | {"quality": quality_scale.as_stored(t.column, t.quality)} for t in templates.values()]


def write_log(log: Path, batches: Iterator[Any], storage: Storage) -> None:
    with translated(f"writing {log}"):
        storage.make_folder(log.parent)
        sink = pa.BufferOutputStream()
        with pa.parquet.ParquetWriter(sink, LOG_SCHEMA) as writer:
            for batch in batches:
                writer.write_batch(batch)
        write_whole(storage, log, memoryview(sink.getvalue()))
        storage.sync_folder(log.parent)


def read_log(log: Path, storage: Storage, columns: Sequence[str] | None = None) -> Iterator[list[dict[str, Any]]]:
    """The rows of a log, in batches: each batch is one step of the application. columns: None reads all. Raises GalleryDamaged."""
    try:
        with pa.parquet.ParquetFile(pa.BufferReader(whole(storage, log))) as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                yield batch.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise GalleryDamaged(f"{log} cannot be read ({type(error).__name__}); restore it from a backup") from error


def templates_of(logged: dict[str, Any]) -> dict[str, Template]:
    """column -> template of a row of the log, or of one of its older encounters."""
    return {fields["column"]: _template(fields) for fields in logged["templates"]}


def _template(fields: dict[str, Any]) -> Template:
    embedding = None if fields["embedding"] is None else np.array(fields["embedding"], np.float32)
    quality = quality_scale.from_stored(fields["column"], fields["quality"])
    return Template(fields["column"], fields["model_id"], embedding, fields["minutiae"], quality)
