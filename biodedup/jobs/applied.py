"""A merge brought into a central gallery, and taken back.

Owns the order of the steps and the log that an undo needs (`GALLERY/merges/ID.parquet`). Never decides who is one person.

    log -> begun -> additions, a part at a time -> removals -> applied          undo: restore -> withdraw additions -> undone

1. Every step is one durable transaction that is noted in the gallery, so that what was killed goes on, and nothing is done twice.
2. The log is on the disk before anything changes: complete templates of the central gallery's subjects that will be removed.
3. At no time is a person in the gallery under no id: additions come before removals, restorations before withdrawals.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray

from biodedup.config import Config
from biodedup.errors import GalleryDamaged, InvalidInput
from biodedup.gallery.copying import copy_rows, note, record, steps_done
from biodedup.gallery.gallery import Gallery, translated
from biodedup.gallery.packed import pack_text
from biodedup.gallery.part import Part
from biodedup.gallery.snapshot import Snapshot
from biodedup.gallery.storage import LocalStorage, Storage
from biodedup.jobs.progress import Progress, silent
from biodedup.jobs.registers import Origins, step_of
from biodedup.jobs.survivors import Member
from biodedup.values import Template

LOG_FOLDER = "merges"
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
LOG_SCHEMA = pa.schema(
    [
        ("subject_id", pa.string()),
        ("action", pa.string()),  # removed from the central gallery, or left_out: of a district, and not added
        ("district", pa.string()),
        ("original_id", pa.string()),
        ("survivor", pa.string()),
        ("encounter_id", pa.string()),
        ("groups", pa.list_(pa.string())),
        ("templates", pa.list_(_TEMPLATE)),
    ]
)


@dataclass(frozen=True)
class Applied:
    """added: subjects new to the gallery; removed: those of it that another record stands for now; left_out: records of districts
    that were not added, since another stands for them; subjects: the gallery's afterwards."""

    merge_id: str
    added: int
    removed: int
    left_out: int
    subjects: int


@dataclass(frozen=True)
class Undone:
    """restored: subjects back under their ids; withdrawn: additions taken away; kept_changed: ids that were enrolled anew since, and
    were left as they are."""

    merge_id: str
    restored: int
    withdrawn: int
    kept_changed: tuple[str, ...]
    subjects: int


def standing_id(target: Snapshot, merge_id: str) -> str:
    """Under what id a merge is applied: its own, with a number behind it after an undo."""
    number, current = 1, merge_id
    while target.answer(f"merge:{current}:undone") is not None:
        number += 1
        current = f"{merge_id}-{number}"
    return current


def begun(target: Snapshot, merge_id: str) -> bool:
    return target.answer(f"merge:{merge_id}:begun") is not None


def refuse_unfinished(folder: Path, target: Snapshot, storage: Storage) -> None:
    """Raises InvalidInput where another merge was interrupted while it was brought into this gallery."""
    for name in sorted(storage.list_names(folder / LOG_FOLDER) or ()):
        merge_id = name.removesuffix(".parquet")
        finished = any(target.answer(f"merge:{merge_id}:{stage}") is not None for stage in ("applied", "undone"))
        if begun(target, merge_id) and not finished:
            raise InvalidInput(
                f"merge {merge_id} was interrupted while it was brought into {folder}; start the same merge again to finish it, or "
                f"`biodedup undo {merge_id}`"
            )


def apply_merge(
    folder: Path,
    merge_id: str,
    staged: Snapshot,
    registers: Sequence[dict[str, Any]],
    folded: Sequence[tuple[Member, str]],
    config: Config,
    storage: Storage,
    *,
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
    progress: Progress = silent,
) -> Applied:
    """Adds everybody of the districts but those who are folded, and removes the folded ones of the central gallery.

    registers: `Register.key` of each; folded: records that do not stay, and the subject_id that stands for each. Both count only when
    it begins; interrupted, it goes on with the log. Raises InvalidInput where the gallery has changed since it was compared.
    """
    target = _opened(folder, storage, config, new_id)
    try:
        name = f"merge:{merge_id}"
        log = folder / LOG_FOLDER / f"{merge_id}.parquet"
        if not begun(target.snapshot(), merge_id):
            refuse_unfinished(folder, target.snapshot(), storage)
            _refuse_changed(folder, target, registers)
            _write_log(log, _logged(target.snapshot(), folded), storage)
            record(target, f"{name}:begun")
        progress("applying", 0, staged.live_count)
        table = _read_log(log, ["subject_id", "action"])
        actions = np.array(table["action"].to_pylist(), object)
        ids = np.array(table["subject_id"].to_pylist(), object)
        removed, left_out = ids[actions == "removed"].tolist(), ids[actions == "left_out"].tolist()
        added = 0
        for step in copy_rows(staged, target, name, _to_be_added(staged, registers, left_out)):
            added += step.added
            progress("applying", added, staged.live_count)
        if target.snapshot().answer(f"{name}:removed") is None:
            with target.transaction() as transaction:
                rows = transaction.snapshot().rows_of(pack_text(removed))
                transaction.remove_rows(np.sort(rows[rows >= 0]))
                transaction.record(f"{name}:removed", note({"removed": len(removed)}))
        record(target, f"{name}:applied")
        target.maintain()
        progress("applying", staged.live_count, staged.live_count)
        added = sum(step.added for step in steps_done(target.snapshot(), name))
        return Applied(merge_id, added, len(removed), len(left_out), target.snapshot().live_count)
    finally:
        target.close()


def undo(
    merge_id: str,
    folder: Path,
    config: Config | None = None,
    *,
    progress: Progress = silent,
    storage: Storage | None = None,
) -> Undone:
    """Takes a merge back: the central gallery has the subjects that it had, with the templates and groups that they had.

    What was enrolled, updated or removed since is left as it is. Interrupted, it goes on; done already, it changes nothing. Raises
    InvalidInput for a merge that was not applied here.
    """
    storage = storage or LocalStorage()
    log = folder / LOG_FOLDER / f"{merge_id}.parquet"
    _opened(folder, storage, config or Config(), None).close()  # a mistyped folder is no new gallery
    target = _opened(folder, storage, config or Config(), lambda: "")
    try:
        name = f"merge:{merge_id}"
        if not begun(target.snapshot(), merge_id):
            known = sorted(one.removesuffix(".parquet") for one in storage.list_names(folder / LOG_FOLDER) or ())
            raise InvalidInput(
                f"merge {merge_id!r} was not applied to {folder}; known are: {', '.join(known) or 'none'}"
            )
        removals = target.snapshot().answer(f"{name}:removed") is not None
        restored, kept = _restore(target, log, name, progress) if removals else (0, [])
        withdrawn = _withdraw(target, name, progress)
        record(target, f"{name}:undone")
        target.maintain()
        return Undone(merge_id, restored, withdrawn, tuple(kept), target.snapshot().live_count)
    finally:
        target.close()


def _opened(folder: Path, storage: Storage, config: Config, new_id: Callable[[], str] | None) -> Gallery:
    """new_id: None to read only."""
    return Gallery.open(
        folder,
        storage=storage,
        config=config.gallery,
        settings=config.to_dict(),
        gallery_id="" if new_id is None else new_id(),
        read_only=new_id is None,
    )


def _refuse_changed(folder: Path, target: Gallery, registers: Sequence[dict[str, Any]]) -> None:
    now = target.snapshot()
    central = [(one["gallery_id"], one["version"]) for one in registers if one["central"]]
    if central != [(target.gallery_id, now.version)] and (central or now.live_count):
        raise InvalidInput(
            f"{folder} has changed since it was compared with the districts; run the merge again without --apply, and look at its "
            "report"
        )


def _to_be_added(
    staged: Snapshot, registers: Sequence[dict[str, Any]], left_out: Sequence[str]
) -> Callable[[Part], NDArray[np.bool_]]:
    origins = Origins(staged, [step_of(one) for one in registers])
    central = [owner for owner, one in enumerate(registers) if one["central"]]
    folded = np.sort(staged.rows_of(pack_text(left_out)))

    def keep(part: Part) -> NDArray[np.bool_]:
        rows = part.rows(np.arange(part.count))
        owners, _ = origins.of(rows)
        return ~np.isin(owners, central) & ~np.isin(rows, folded)

    return keep


# the log --------------------------------------------------------------------------------------------------------------


def _logged(before: Snapshot, folded: Sequence[tuple[Member, str]]) -> Iterator[Any]:
    """Record batches of LOG_SCHEMA."""
    for low in range(0, len(folded), _BATCH_ROWS):
        some = folded[low : low + _BATCH_ROWS]
        rows = before.rows_of(pack_text([member.subject_id for member, _ in some])).tolist()
        central = [row for row, (member, _) in zip(rows, some, strict=True) if member.central]
        groups = dict(zip(central, before.groups(central), strict=True))
        entries = [
            {
                "subject_id": member.subject_id,
                "action": "removed" if member.central else "left_out",
                "district": member.district,
                "original_id": member.original_id,
                "survivor": stays,
                "encounter_id": member.encounter_id,
                "groups": sorted(groups[row]) if member.central else None,
                "templates": [vars(one) for one in before.templates(row).values()] if member.central else None,
            }
            for row, (member, stays) in zip(rows, some, strict=True)
        ]
        yield pa.RecordBatch.from_pylist(entries, LOG_SCHEMA)


def _write_log(log: Path, batches: Iterator[Any], storage: Storage) -> None:
    temporary = log.with_name(log.name + ".new")
    with translated(f"writing {log}"):
        storage.make_folder(log.parent)
        sink = pa.BufferOutputStream()
        with pa.parquet.ParquetWriter(sink, LOG_SCHEMA) as writer:
            for batch in batches:
                writer.write_batch(batch)
        file = storage.create(temporary)
        try:
            file.write(memoryview(sink.getvalue()))
            file.finish()
        except BaseException:
            file.discard()
            raise
        storage.replace(temporary, log)
        storage.sync_folder(log.parent)


def _read_log(log: Path, columns: Sequence[str]) -> Any:
    try:
        return pa.parquet.read_table(log, columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        raise GalleryDamaged(f"{log} is not readable ({type(error).__name__}); restore it from a backup") from error


# taking back ----------------------------------------------------------------------------------------------------------


def _restore(target: Gallery, log: Path, name: str, progress: Progress) -> tuple[int, list[str]]:
    """(how many, ids that were taken meanwhile)."""
    restored, kept = 0, list[str]()
    try:
        file = pa.parquet.ParquetFile(log)
    except (OSError, pa.ArrowException) as error:
        raise GalleryDamaged(f"{log} is not readable ({type(error).__name__}); restore it from a backup") from error
    with file:
        for number, batch in enumerate(file.iter_batches(_BATCH_ROWS)):
            step = f"{name}:restored:{number}"
            answer = target.snapshot().answer(step)
            if answer is None:
                facts = _restore_some(target, step, [row for row in batch.to_pylist() if row["action"] == "removed"])
            else:
                facts = json.loads(answer[1])
            restored += facts["restored"]
            kept += facts["kept"]
            progress("restoring", (number + 1) * _BATCH_ROWS, file.metadata.num_rows)
    return restored, kept


def _restore_some(target: Gallery, step: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    kept = []
    with target.transaction() as transaction:
        for row in rows:
            if transaction.snapshot().row_of(row["subject_id"]) is not None:
                kept.append(row["subject_id"])
                continue
            templates = {one["column"]: _template(one) for one in row["templates"]}
            transaction.add(row["subject_id"], templates, row["encounter_id"], row["groups"])
        facts = {"restored": len(rows) - len(kept), "kept": kept}
        transaction.record(step, note(facts))
    return facts


def _template(one: dict[str, Any]) -> Template:
    embedding = None if one["embedding"] is None else np.array(one["embedding"], np.float32)
    return Template(one["column"], one["model_id"], embedding, one["minutiae"], one["quality"])


def _withdraw(target: Gallery, name: str, progress: Progress) -> int:
    steps = steps_done(target.snapshot(), name)
    withdrawn = 0
    for number, step in enumerate(steps):
        noted = f"{name}:withdrawn:{number}"
        answer = target.snapshot().answer(noted)
        if answer is None:
            with target.transaction() as transaction:
                live = transaction.snapshot().live_rows()
                low, high = np.searchsorted(live, step.rows)
                transaction.remove_rows(live[low:high])
                facts = {"withdrawn": int(high - low)}
                transaction.record(noted, note(facts))
        else:
            facts = json.loads(answer[1])
        withdrawn += facts["withdrawn"]
        progress("withdrawing", number + 1, len(steps))
    return withdrawn
