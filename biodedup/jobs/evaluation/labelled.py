"""Reads labelled encounters and extracts their templates, for an evaluation.

Owns the reading of labelled sources, and extraction that resumes: templates are kept in a working folder, one file for some encounters, named
by a hash of their source. Never compares.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from biodedup.capture.minutiae.record import standard, view_of
from biodedup.common import quality as quality_scale
from biodedup.config import Config
from biodedup.embed.extractor import Extractor
from biodedup.embed.isolation import FAILURES
from biodedup.errors import GalleryDamaged, InvalidInput
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import LocalStorage, Storage, whole, write_whole
from biodedup.gallery.files.private import make_private_folder
from biodedup.jobs.manifests.captures import (
    RESERVED,
    LeftOut,
    RefusedRow,
    images_of,
    label_of,
    mark_of,
    no_images,
    read_rows,
)
from biodedup.jobs.manifests.fields import Unusable, id_of, subject_of
from biodedup.jobs.manifests.options import DEFAULT_OPTIONS, TableOptions
from biodedup.jobs.manifests.tables import TableFile
from biodedup.jobs.shared.progress import Progress
from biodedup.required import keep_better
from biodedup.values import COLUMNS, Capture, Face, Finger, Refusal, Template, check_model_ids, model_of

_PASSING = FAILURES | {"unreadable"}  # a missing file that comes has another mark
PART = 128
"""Encounters of one file of templates: what an interruption costs at most."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """One encounter of a known subject. captures: files; templates: column -> template, given or extracted; groups: column of the
    source -> value."""

    encounter_id: str
    subject_id: str
    captures: tuple[Face | Finger, ...] = ()
    templates: Mapping[str, Template] = field(default_factory=dict, repr=False)
    refusals: tuple[Refusal, ...] = ()
    groups: Mapping[str, Any] = field(default_factory=dict)

    @property
    def enrolled(self) -> bool:
        return bool(self.templates)


def read_labelled(
    source: Path,
    config: Config,
    *,
    finger: bool = False,
    dpi: float | None = None,
    model_id: str | Mapping[str, str] | None = None,
    options: TableOptions = DEFAULT_OPTIONS,
) -> tuple[list[Labelled], LeftOut]:
    """The encounters of a folder (a folder per subject, an image an encounter; finger: they are fingers), of a manifest, or of a
    Parquet file of templates. model_id: what made the vectors among these, one for all or by column.
    Also what of it could not be used. Raises InvalidInput."""
    check_model_ids(model_id)
    if not source.exists():
        raise InvalidInput(
            f"{source} does not exist; name a folder per subject, a manifest, or a Parquet file of templates"
        )
    if source.is_dir():
        found, left_out = _of_folder(source, finger, dpi)
    else:
        table = TableFile(source, options)
        ready = [name for name in table.names if name in COLUMNS]
        found, left_out = _of_templates(table, ready, config, model_id) if ready else _of_manifest(source, options)
    subjects = {one.subject_id for one in found}
    if len(subjects) < 2:
        told = "".join(f"; {sentence}" for sentence in left_out.sentences())
        raise InvalidInput(f"{source} has {len(subjects)} subjects; errors are measured on two or more{told}")
    return found, left_out


def extracted(found: Sequence[Labelled], config: Config, work: Path, progress: Progress) -> list[Labelled]:
    """With the templates of their captures, or the reasons why there are none. work: a folder that keeps them; biometric data."""
    with Extractor(config) as extractor:
        return _extracted(found, config, extractor, work, progress)


def _extracted(
    found: Sequence[Labelled], config: Config, extractor: Extractor, work: Path, progress: Progress
) -> list[Labelled]:
    settings = json.dumps(
        [extractor.model_ids, asdict(config.face), asdict(config.finger), asdict(config.capture)], default=str
    )
    done: list[Labelled] = []
    storage = LocalStorage(config.keys)
    for low in range(0, len(found), PART):
        batch = found[low : low + PART]
        if any(one.captures for one in batch):
            make_private_folder(work)
            marks = "\n".join([settings, *(mark_of(one.encounter_id, one.captures) for one in batch)])
            part = work / f"{hashlib.sha256(marks.encode()).hexdigest()[:32]}.parquet"
            results = _read_part(storage, part)
            if results is None:
                captures: list[Capture] = [capture for one in batch for capture in one.captures]
                results = extractor.extract(captures)
                # what failed, or was not there, is tried again by the next run
                if not any(isinstance(one, Refusal) and one.reason in _PASSING for one in results):
                    _write_part(storage, part, _part_of(results))
            batch = _with_results(batch, iter(results))
        done += batch
        progress("templates", len(done), len(found))
    return done


def _of_folder(folder: Path, finger: bool, dpi: float | None) -> tuple[list[Labelled], LeftOut]:
    found = []
    images, left_out = images_of(folder)
    for name, relative in images.items():
        subject_id = label_of(relative)
        if subject_id is None:
            raise InvalidInput(f"{relative} lies in no subject's folder; move it into one, or write a manifest")
        capture = Finger(folder / relative, "unknown", dpi) if finger else Face(folder / relative)
        found.append(Labelled(name, subject_id, (capture,)))
    if not found:
        raise no_images(folder, left_out)
    return found, left_out


def _of_manifest(manifest: Path, options: TableOptions) -> tuple[list[Labelled], LeftOut]:
    rows: dict[tuple[str, str], list[Any]] = {}
    usable, left_out = read_rows(manifest, options, carried=True)
    for row in usable:
        # without an encounter_id every capture is an encounter of its own
        name = row.encounter_id if row.encounter_id is not None else f"row {row.number}"
        rows.setdefault((row.subject_id, name), []).append(row)
    names = [name for _, name in rows]
    twice = len(set(names)) < len(names)  # encounters numbered within each subject
    found = [
        Labelled(
            f"{subject_id}/{name}" if twice else name,
            subject_id,
            tuple(row.capture for row in some),
            groups={key: _joined([row.other_columns[key] for row in some]) for key in some[0].other_columns},
        )
        for (subject_id, name), some in rows.items()
    ]
    return found, left_out


def _of_templates(
    file: TableFile, columns: Sequence[str], config: Config, model_id: str | Mapping[str, str] | None
) -> tuple[list[Labelled], LeftOut]:
    source = file.path
    if file.form is not None:
        raise InvalidInput(f"{source} has columns of templates, {', '.join(columns)}; write templates as Parquet")
    table = pa.parquet.read_table(source)
    names_known = file.names
    table = table.rename_columns(names_known)
    file.options.check_columns(names_known, (*RESERVED, *COLUMNS), source, carried=True)
    if "subject_id" not in table.column_names:
        raise InvalidInput(f"{source} has the columns {table.column_names}; wanted subject_id beside the templates")
    cells = {
        name: _templates(table.column(name).combine_chunks(), name, config, model_of(name, model_id))
        for name in columns
    }
    other_columns = [name for name in table.column_names if name not in (*COLUMNS, *RESERVED)]
    usable, refused = _named(
        file, [name for name in ("subject_id", "encounter_id", *other_columns) if name in names_known]
    )
    names = [name for *_, name, _ in usable]
    twice = len(set(names)) < len(names)
    found = []
    for i, subject_id, name, given in usable:
        here = [(column, cells[column][i]) for column in columns]
        found.append(
            Labelled(
                f"{subject_id}/{name}" if twice else name,
                subject_id,
                templates={column: one for column, one in here if isinstance(one, Template)},
                refusals=tuple(one for _, one in here if isinstance(one, Refusal)),
                groups={key: given.get(key) for key in other_columns},
            )
        )
    if len({one.encounter_id for one in found}) < len(found):
        raise InvalidInput(f"{source} repeats an encounter_id of a subject; give each row its own")
    return found, LeftOut(rows=tuple(refused))


def _named(
    file: TableFile, columns: Sequence[str]
) -> tuple[list[tuple[int, str, str, Mapping[str, Any]]], list[RefusedRow]]:
    """(index of the row, subject_id, encounter's name, all cells) of rows that name a subject, and the others."""
    usable: list[tuple[int, str, str, Mapping[str, Any]]] = []
    refused: list[RefusedRow] = []
    for number, cells in file.rows(columns):
        try:
            subject_id = subject_of(cells)
            usable.append((number - 1, subject_id, id_of(cells, "encounter_id") or f"row {number}", cells))
        except Unusable as error:
            refused.append(RefusedRow(number, None, error.refusal))
    return usable, refused


def _templates(cells: pa.Array, column: str, config: Config, model_id: str | None) -> list[Template | Refusal | None]:
    """Of each row; None where there is none, a refusal where it is unsound."""
    kind = cells.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return [None if not cell else _of_record(cell, column, config) for cell in cells.to_pylist()]
    is_list = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not pa.types.is_floating(kind.value_type):
        raise InvalidInput(f"column {column} is of type {kind}; wanted a list of float32, or binary minutiae records")
    lengths = set(pa.compute.list_value_length(cells).drop_null().unique().to_pylist())
    if len(lengths) > 1:
        raise InvalidInput(f"column {column} holds vectors of {sorted(lengths)} numbers; one model has one dimension")
    dimension = lengths.pop() if lengths else 1
    if model_id is None:
        raise InvalidInput(f"the {column} vectors do not say what made them; name it, as model_id='my-model-1'")
    rows = iter(np.asarray(cells.drop_null().flatten(), np.float32).reshape(-1, dimension))
    found: list[Template | Refusal | None] = []
    for present in cells.is_valid().to_pylist():
        if not present:
            found.append(None)
            continue
        try:
            found.append(Template(column, model_id, next(rows)))
        except InvalidInput:
            found.append(Refusal(column, "not_a_unit_vector"))
    return found


def _of_record(record: bytes, column: str, config: Config) -> Template | Refusal:
    try:
        sound = standard(view_of(record, column))
    except InvalidInput:
        return Refusal(column, "unsound_record")
    return Template(column, config.finger.record_model_id, minutiae=sound)


def _with_results(batch: Sequence[Labelled], results: Iterable[Template | Refusal]) -> list[Labelled]:
    each = iter(results)
    done = []
    for encounter in batch:
        templates: dict[str, Template] = dict(encounter.templates)
        refusals = list(encounter.refusals)
        for result in [next(each) for _ in encounter.captures]:
            if isinstance(result, Refusal):
                refusals.append(result)
            else:
                keep_better(templates, result)
        done.append(
            Labelled(
                encounter.encounter_id,
                encounter.subject_id,
                encounter.captures,
                templates,
                tuple(refusals),
                encounter.groups,
            )
        )
    return done


def _part_of(results: Sequence[Template | Refusal]) -> pa.Table:
    nothing: dict[str, Any] = {"model_id": None, "embedding": None, "minutiae": None, "quality": None, "refusal": None}
    rows = []
    for result in results:
        row = nothing | {"column": result.column}
        if isinstance(result, Refusal):
            row["refusal"] = json.dumps(asdict(result))
        else:
            row |= {"model_id": result.model_id, "minutiae": result.minutiae}
            row["quality"] = quality_scale.as_stored(result.column, result.quality)
            row["embedding"] = None if result.embedding is None else result.embedding.tolist()
        rows.append(row)
    return pa.Table.from_pylist(rows, _PART_SCHEMA)


_PART_SCHEMA = pa.schema(
    {
        "column": pa.string(),
        "model_id": pa.string(),
        "embedding": pa.list_(pa.float32()),
        "minutiae": pa.binary(),
        "quality": pa.float64(),
        "refusal": pa.string(),
    }
)


def _write_part(storage: Storage, part: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table, sink)
    with translated(f"writing {part}"):
        write_whole(storage, part, memoryview(sink.getvalue()))


def _read_part(storage: Storage, part: Path) -> list[Template | Refusal] | None:
    """None where it is absent or cannot be read: it is made again."""
    try:
        rows = pa.parquet.read_table(pa.BufferReader(whole(storage, part))).to_pylist()
    except (OSError, ValueError, GalleryDamaged, pa.ArrowException):
        return None
    return [
        Refusal(**json.loads(row["refusal"]))
        if row["refusal"] is not None
        else Template(
            row["column"],
            row["model_id"],
            None if row["embedding"] is None else np.array(row["embedding"], np.float32),
            row["minutiae"],
            quality_scale.from_stored(row["column"], row["quality"]),
        )
        for row in rows
    ]


def _joined(values: Sequence[Any]) -> Any:
    """One value of an encounter's several captures; different ones side by side."""
    kinds = list(dict.fromkeys(value for value in values if value is not None))
    return kinds[0] if len(kinds) == 1 else " + ".join(map(str, kinds)) if kinds else None
