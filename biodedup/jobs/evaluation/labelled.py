"""Reads labelled encounters (encounters whose subjects are known) and extracts their templates, for an evaluation.

Owns the reading of labelled sources, and an extraction that resumes: a working folder keeps the templates, in one file for each 128
encounters, named by a hash of the captures and settings. Never compares.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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

_RETRIED = FAILURES | {"unreadable"}
"""Refusals after which the next run extracts again. A missing file that arrives changes `mark_of`, and so is extracted anyway."""
PART = 128
"""Encounters in one file of templates. An interruption loses at most the extraction of so many."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """One encounter of a known subject. captures: files; templates: column -> template, read or extracted; groups: further columns of the
    source -> values."""

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
    """Reads the encounters of a labelled source. Returns (encounters, skipped files and rows).

    source: a folder with a subfolder for each subject, where each image is an encounter; a manifest; or a Parquet file of templates. finger: the
    images of a folder are fingers, with a resolution of `dpi`. model_id: the model of the embeddings in a Parquet file, one id for all or a
    mapping by column. Raises InvalidInput.
    """
    check_model_ids(model_id)
    if not source.exists():
        raise InvalidInput(
            f"{source} does not exist; name a folder with a subfolder for each subject, a manifest, or a Parquet file of templates"
        )
    if source.is_dir():
        found, left_out = _of_folder(source, finger, dpi)
    else:
        table = TableFile(source, options)
        ready = [name for name in table.names if name in COLUMNS]
        found, left_out = _of_templates(table, ready, config, model_id) if ready else _of_manifest(source, options)
    subjects = {encounter.subject_id for encounter in found}
    if len(subjects) < 2:
        report = "".join(f"; {sentence}" for sentence in left_out.sentences())
        raise InvalidInput(f"{source} has {len(subjects)} subjects; an evaluation needs two or more{report}")
    return found, left_out


def extracted(found: Sequence[Labelled], config: Config, work: Path, progress: Progress) -> list[Labelled]:
    """The encounters with the templates or refusals of their captures. work: the working folder, which keeps templates (biometric data)."""
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
        if any(encounter.captures for encounter in batch):
            make_private_folder(work)
            marks = "\n".join([settings, *(mark_of(encounter.encounter_id, encounter.captures) for encounter in batch)])
            part = work / f"{hashlib.sha256(marks.encode()).hexdigest()[:32]}.parquet"
            results = _read_part(storage, part)
            if results is None:
                captures: list[Capture] = [capture for encounter in batch for capture in encounter.captures]
                results = extractor.extract(captures)
                if not any(isinstance(result, Refusal) and result.reason in _RETRIED for result in results):
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
            raise InvalidInput(f"{relative} is not in a subject's subfolder; move it into one, or write a manifest")
        capture = Finger(folder / relative, "unknown", dpi) if finger else Face(folder / relative)
        found.append(Labelled(name, subject_id, (capture,)))
    if not found:
        raise no_images(folder, left_out)
    return found, left_out


def _of_manifest(manifest: Path, options: TableOptions) -> tuple[list[Labelled], LeftOut]:
    rows: dict[tuple[str, str], list[Any]] = {}
    usable, left_out = read_rows(manifest, options, carried=True)
    for row in usable:
        # without an encounter_id, each capture is an encounter
        name = row.encounter_id if row.encounter_id is not None else f"row {row.number}"
        rows.setdefault((row.subject_id, name), []).append(row)
    names = [name for _, name in rows]
    repeated = len(set(names)) < len(names)  # encounters may be numbered within each subject
    found = [
        Labelled(
            f"{subject_id}/{name}" if repeated else name,
            subject_id,
            tuple(row.capture for row in of_encounter),
            groups={
                key: _joined([row.other_columns[key] for row in of_encounter]) for key in of_encounter[0].other_columns
            },
        )
        for (subject_id, name), of_encounter in rows.items()
    ]
    return found, left_out


def _of_templates(
    file: TableFile, columns: Sequence[str], config: Config, model_id: str | Mapping[str, str] | None
) -> tuple[list[Labelled], LeftOut]:
    source = file.path
    if file.form is not None:
        raise InvalidInput(
            f"{source} is not Parquet, but has columns of templates, {', '.join(columns)}; write templates as Parquet"
        )
    table = pa.parquet.read_table(source)
    table = table.rename_columns(file.names)
    file.options.check_columns(file.names, (*RESERVED, *COLUMNS), source, carried=True)
    if "subject_id" not in table.column_names:
        raise InvalidInput(f"{source} has the columns {table.column_names}; wanted subject_id and the templates")
    cells = {
        name: _templates(table.column(name).combine_chunks(), name, config, model_of(name, model_id))
        for name in columns
    }
    other_columns = [name for name in table.column_names if name not in (*COLUMNS, *RESERVED)]
    usable, refused = _named(
        file, [name for name in ("subject_id", "encounter_id", *other_columns) if name in file.names]
    )
    names = [name for *_, name, _ in usable]
    repeated = len(set(names)) < len(names)
    found = []
    for i, subject_id, name, row in usable:
        results = [(column, cells[column][i]) for column in columns]
        found.append(
            Labelled(
                f"{subject_id}/{name}" if repeated else name,
                subject_id,
                templates={column: result for column, result in results if isinstance(result, Template)},
                refusals=tuple(result for _, result in results if isinstance(result, Refusal)),
                groups={key: row.get(key) for key in other_columns},
            )
        )
    if len({encounter.encounter_id for encounter in found}) < len(found):
        raise InvalidInput(f"{source} repeats an encounter_id of a subject; give each row its own encounter_id")
    return found, LeftOut(rows=tuple(refused))


def _named(
    file: TableFile, columns: Sequence[str]
) -> tuple[list[tuple[int, str, str, Mapping[str, Any]]], list[RefusedRow]]:
    """(the usable rows, the refused rows). A usable row is (index, subject_id, name of the encounter, all cells)."""
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
    """The template of each row; None if the cell is empty, a refusal if its content is invalid."""
    kind = cells.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return [None if not cell else _of_record(cell, column, config) for cell in cells.to_pylist()]
    is_list = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not pa.types.is_floating(kind.value_type):
        raise InvalidInput(f"column {column} is of type {kind}; wanted a list of float32, or binary minutiae records")
    lengths = set(pa.compute.list_value_length(cells).drop_null().unique().to_pylist())
    if len(lengths) > 1:
        raise InvalidInput(
            f"column {column} holds vectors of {sorted(lengths)} numbers; wanted one dimension, as of one model"
        )
    dimension = lengths.pop() if lengths else 1
    if model_id is None:
        raise InvalidInput(f"the model of the {column} vectors is not stated; name it, such as model_id='my-model-1'")
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
    """The encounters with the results of all their captures, in order."""
    remaining = iter(results)
    done = []
    for encounter in batch:
        templates: dict[str, Template] = dict(encounter.templates)
        refusals = list(encounter.refusals)
        for result in [next(remaining) for _ in encounter.captures]:
            if isinstance(result, Refusal):
                refusals.append(result)
            else:
                keep_better(templates, result)
        done.append(replace(encounter, templates=templates, refusals=tuple(refusals)))
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
    """The results in a file of templates; None if it is absent or unreadable: then the captures are extracted again."""
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
    """One value for the captures of an encounter. Different values are joined with ` + `."""
    kinds = list(dict.fromkeys(value for value in values if value is not None))
    return kinds[0] if len(kinds) == 1 else " + ".join(map(str, kinds)) if kinds else None
