"""Applies a merge to a central gallery, and undoes it.

Owns the order of the steps and the log that an undo needs (`GALLERY/merges/ID.parquet`). Never decides which records are one person.

    log -> begun -> additions, a part at a time -> completions, a batch at a time -> removals -> applied
    undo: restore, a batch at a time -> withdraw additions -> undone

1. Every step is one durable transaction that is noted in the gallery, so that a killed run resumes, and nothing is done twice.
2. The log is on disk before anything changes: complete templates of the central gallery's subjects that will be removed or completed, and
   the source of each template that a survivor takes over.
3. At no time is a person in the gallery under no id: additions come before removals, restorations before withdrawals.
4. A survivor keeps its templates. From the records that it absorbs it takes over the templates that it lacks, and their groups.
5. Rows tell whether a subject is as a merge left it. An undo enrols anew, under other rows, and notes their subjects.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray

from biodedup.common import quality as quality_scale
from biodedup.common.described import Described
from biodedup.config import Config
from biodedup.errors import GalleryDamaged, InvalidInput
from biodedup.gallery.care.copying import copy_rows, record, steps_done
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import LocalStorage, Storage, whole, write_whole
from biodedup.gallery.files.names import MERGES_FOLDER
from biodedup.gallery.files.packed import pack_text
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.segments.part import Part
from biodedup.gallery.snapshot import Snapshot
from biodedup.jobs.merging.model import AbsorbedRecord, Member
from biodedup.jobs.merging.registers import Origins, refuse_sealed, step_of
from biodedup.jobs.shared.acting import NOBODY, Actor, authorised_job
from biodedup.jobs.shared.progress import Progress, silent
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
        # removed from the central gallery; left_out: of a district, and not added; completed: a survivor
        ("action", pa.string()),
        ("district", pa.string()),
        ("original_id", pa.string()),
        ("survivor", pa.string()),
        ("encounter_id", pa.string()),
        ("groups", pa.list_(pa.string())),  # before
        ("gets", pa.list_(pa.struct([("column", pa.string()), ("subject_id", pa.string())]))),  # and its giver
        ("joins", pa.list_(pa.string())),  # groups that a survivor comes into
        ("row", pa.int64()),  # the newest one; this, templates and older: in the central gallery, before
        ("templates", pa.list_(_TEMPLATE)),
        ("older", pa.list_(_ENCOUNTER)),  # the other rows, oldest first
    ]
)


@dataclass(frozen=True)
class Applied(Described):
    """added: subjects new to the gallery; removed: those of it that another record stands for now; left_out: records of districts
    that were not added, since another stands for them; completed: survivors that got templates or groups of these; subjects: the
    gallery's afterwards."""

    merge_id: str
    added: int
    removed: int
    left_out: int
    completed: int
    subjects: int


@dataclass(frozen=True)
class Undone(Described):
    """restored: subjects back under their ids; reverted: survivors that have only their own templates and groups again; withdrawn:
    additions taken away; kept_changed: ids that were enrolled anew since, and were left as they are."""

    merge_id: str
    restored: int
    reverted: int
    withdrawn: int
    kept_changed: tuple[str, ...]
    subjects: int


def standing_id(target: Snapshot, merge_id: str) -> str:
    """Under what id a merge is applied: its own, with a number behind it after an undo."""
    number, current = 1, merge_id
    while target.job_step(f"merge:{current}:undone") is not None:
        number += 1
        current = f"{merge_id}-{number}"
    return current


def _logs(folder: Path, storage: Storage) -> list[str]:
    """The names of all logs of a gallery."""
    with translated(f"reading {folder / MERGES_FOLDER}"):
        return sorted(storage.list_names(folder / MERGES_FOLDER) or ())


def begun(target: Snapshot, merge_id: str) -> bool:
    return target.job_step(f"merge:{merge_id}:begun") is not None


def refuse_unfinished(folder: Path, target: Snapshot, storage: Storage) -> None:
    """Raises InvalidInput where another merge was interrupted while it was brought into this gallery."""
    for name in _logs(folder, storage):
        merge_id = name.removesuffix(".parquet")
        finished = any(target.job_step(f"merge:{merge_id}:{stage}") is not None for stage in ("applied", "undone"))
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
    absorbed: Sequence[AbsorbedRecord],
    *,
    config: Config,
    storage: Storage,
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
    progress: Progress = silent,
    actor: Actor = NOBODY,
) -> Applied:
    """Adds all subjects of the districts except absorbed ones, completes survivors, and removes the absorbed ones of the central
    gallery.

    registers: `Register.key` of each; absorbed: records that do not stay, those of one survivor side by side. Both count only when it
    begins; interrupted, it goes on with the log. Raises InvalidInput where the gallery has changed since it was compared.
    """
    target = _opened(folder, storage, config, new_id)
    try:
        name = f"merge:{merge_id}"
        log = folder / MERGES_FOLDER / f"{merge_id}.parquet"
        if not begun(target.snapshot(), merge_id):
            refuse_unfinished(folder, target.snapshot(), storage)
            _refuse_changed(folder, target, registers)
            with authorised_job(
                actor, target, config, "merge", {"merge": merge_id}, role="supervise", kind="merge"
            ) as begin:
                _write_log(log, _logged(target.snapshot(), staged, absorbed), storage)
                with target.transaction() as transaction:
                    begin(transaction)
                    transaction.record_step(f"{name}:begun", {})
        progress("applying", 0, staged.live_count)
        ids: dict[str, list[str]] = {"removed": [], "left_out": [], "completed": []}
        for rows in _read_log(log, storage, ["subject_id", "action"]):
            for row in rows:
                ids[row["action"]].append(row["subject_id"])
        removed, left_out = ids["removed"], ids["left_out"]
        added = 0
        for step in copy_rows(staged, target, name, _to_be_added(staged, registers, left_out)):
            added += step.added
            progress("applying", added, staged.live_count)
        completed = _complete(target, log, name, staged, len(ids["completed"]), progress)
        if target.snapshot().job_step(f"{name}:removed") is None:
            with target.transaction() as transaction:
                _, gone = transaction.snapshot().all_rows_of(pack_text(removed))
                transaction.remove_rows(np.sort(gone))
                transaction.record_step(f"{name}:removed", {"removed": len(removed)})
        record(target, f"{name}:applied")
        target.maintain()
        progress("applying", staged.live_count, staged.live_count)
        added = sum(step.added for step in steps_done(target.snapshot(), name))
        return Applied(merge_id, added, len(removed), len(left_out), completed, target.snapshot().live_count)
    finally:
        target.close()


def undo(
    merge_id: str,
    folder: Path,
    config: Config | None = None,
    *,
    by: str = "",
    sign: Path | None = None,
    progress: Progress = silent,
    storage: Storage | None = None,
) -> Undone:
    """Takes a merge back: the central gallery has the subjects that it had, with the templates and groups that they had.

    What was enrolled, updated or removed since is left as it is. Interrupted, it goes on; done already, it changes nothing. Raises
    InvalidInput for a merge that was not applied here, NotAllowed, ApprovalNeeded (`Policy.two_people`). by: the person who does it; sign:
    the file of its private key.
    """
    config = config or Config()
    refuse_sealed(config)
    storage = storage or LocalStorage(config.keys)
    log = folder / MERGES_FOLDER / f"{merge_id}.parquet"
    Gallery.open_to_read(folder, storage, config.gallery).close()  # a mistyped folder is no new gallery
    target = _opened(folder, storage, config, lambda: "")
    try:
        name = f"merge:{merge_id}"
        if not begun(target.snapshot(), merge_id):
            known = sorted(log_name.removesuffix(".parquet") for log_name in _logs(folder, storage))
            raise InvalidInput(
                f"merge {merge_id!r} was not applied to {folder}; known are: {', '.join(known) or 'none'}"
            )
        if all(target.snapshot().job_step(f"{name}:{stage}") is None for stage in ("undoing", "undone")):
            about = {"undo": merge_id}
            with authorised_job(
                Actor(by, sign), target, config, "merge", about, role="supervise", kind="undo"
            ) as begin:
                with target.transaction() as transaction:
                    begin(transaction)
                    transaction.record_step(f"{name}:undoing", {})
        stands_for = _stands_for(target.snapshot(), folder, storage)
        restored, reverted, kept = _restore(target, log, name, stands_for, progress)
        withdrawn = _withdraw(target, name, stands_for, progress)
        record(target, f"{name}:undone")
        target.maintain()
        return Undone(merge_id, restored, reverted, withdrawn, tuple(kept), target.snapshot().live_count)
    finally:
        target.close()


def _opened(folder: Path, storage: Storage, config: Config, new_id: Callable[[], str]) -> Gallery:
    return Gallery.open(folder, storage=storage, config=config.gallery, settings=config.to_dict(), gallery_id=new_id())


def _refuse_changed(folder: Path, target: Gallery, registers: Sequence[dict[str, Any]]) -> None:
    now = target.snapshot()
    central = [(key["gallery_id"], key["version"]) for key in registers if key["central"]]
    if central != [(target.gallery_id, now.version)] and (central or now.live_count):
        raise InvalidInput(
            f"{folder} has changed since it was compared with the districts; run the merge again without --apply, and look at its "
            "report"
        )


def _to_be_added(
    staged: Snapshot, registers: Sequence[dict[str, Any]], left_out: Sequence[str]
) -> Callable[[Part], NDArray[np.bool_]]:
    origins = Origins(staged, [step_of(key) for key in registers])
    central = [owner for owner, key in enumerate(registers) if key["central"]]
    absorbed = np.sort(staged.all_rows_of(pack_text(left_out))[1])

    def keep(part: Part) -> NDArray[np.bool_]:
        rows = part.rows(np.arange(part.count))
        owners, _ = origins.of(rows)
        return ~np.isin(owners, central) & ~np.isin(rows, absorbed)

    return keep


# the log --------------------------------------------------------------------------------------------------------------


def _logged(before: Snapshot, staged: Snapshot, absorbed: Sequence[AbsorbedRecord]) -> Iterator[Any]:
    """Record batches of LOG_SCHEMA."""
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
    """subject_id -> what the log says of a record, but for what becomes of it."""
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


def _write_log(log: Path, batches: Iterator[Any], storage: Storage) -> None:
    with translated(f"writing {log}"):
        storage.make_folder(log.parent)
        sink = pa.BufferOutputStream()
        with pa.parquet.ParquetWriter(sink, LOG_SCHEMA) as writer:
            for batch in batches:
                writer.write_batch(batch)
        write_whole(storage, log, memoryview(sink.getvalue()))
        storage.sync_folder(log.parent)


def _read_log(log: Path, storage: Storage, columns: Sequence[str] | None = None) -> Iterator[list[dict[str, Any]]]:
    """Its rows, so many at a time as are one step."""
    try:
        with pa.parquet.ParquetFile(pa.BufferReader(whole(storage, log))) as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                yield batch.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise GalleryDamaged(f"{log} is not readable ({type(error).__name__}); restore it from a backup") from error


# completing -----------------------------------------------------------------------------------------------------------


def _complete(target: Gallery, log: Path, name: str, staged: Snapshot, total: int, progress: Progress) -> int:
    """How many survivors have what they lacked now. total: how many are in the log."""
    completed = 0
    for number, rows in enumerate(_read_log(log, target.storage, ["subject_id", "action", "gets", "joins"])):
        step = f"{name}:completed:{number}"
        facts = target.snapshot().job_step(step)
        if facts is None:
            facts = _complete_some(target, step, staged, [row for row in rows if row["action"] == "completed"])
        completed += facts["end_row"] - facts["first_row"]
        progress("completing", completed, total)
    return completed


def _complete_some(target: Gallery, step: str, staged: Snapshot, survivors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    with target.transaction() as transaction:
        before = transaction.snapshot()
        rows = before.rows_of(pack_text([survivor["subject_id"] for survivor in survivors]))
        enrolled = [(survivor, row) for survivor, row in zip(survivors, rows.tolist(), strict=True) if row >= 0]
        rows = rows[rows >= 0]
        first_row = transaction.tail.end_row
        transaction.remove_rows(np.sort(rows))
        groups, encounter_ids = before.groups(rows.tolist()), before.encounter_ids(rows.tolist())
        for (survivor, row), own, encounter_id in zip(enrolled, groups, encounter_ids, strict=True):
            templates = {get["column"]: _staged(staged, get["subject_id"], get["column"]) for get in survivor["gets"]}
            templates |= before.templates(row)
            transaction.add_encounter(survivor["subject_id"], templates, encounter_id, own.union(survivor["joins"]))
        facts = {"first_row": first_row, "end_row": transaction.tail.end_row}
        transaction.record_step(step, facts)
    return facts


def _staged(staged: Snapshot, subject_id: str, column: str) -> Template:
    templates = staged.best_templates(subject_id)
    assert templates is not None, "the staging gallery holds every subject that was compared"
    return templates[column]


# taking back ----------------------------------------------------------------------------------------------------------


def _completed_rows(target: Snapshot, name: str) -> list[tuple[int, int]]:
    """Ranges of the rows that survivors got as they were completed; of neighbouring ones, one."""
    ranges: list[tuple[int, int]] = []
    for facts in _noted(target, f"{name}:completed"):
        first_row = ranges.pop()[0] if ranges and ranges[-1][1] == facts["first_row"] else facts["first_row"]
        ranges.append((first_row, facts["end_row"]))
    return ranges


def _noted(target: Snapshot, steps: str) -> Iterator[dict[str, Any]]:
    """What was noted of steps that have numbers."""
    number = 0
    while (facts := target.job_step(f"{steps}:{number}")) is not None:
        yield facts
        number += 1


def _stands_for(target: Snapshot, folder: Path, storage: Storage) -> dict[int, int]:
    """Row that an undo gave to a subject -> the row that it had before that merge. Merges are undone in reverse order: to the ones
    before, a restored subject is still what they have left."""
    before: dict[int, int] = {}
    for log in _logs(folder, storage):
        for facts in _noted(target, f"merge:{log.removesuffix('.parquet')}:restored"):
            before |= dict(facts["rows"])
    for row in sorted(before):  # a row is behind the one that it stands for
        before[row] = before.get(before[row], before[row])
    return before


def _restore(
    target: Gallery, log: Path, name: str, stands_for: dict[int, int], progress: Progress
) -> tuple[int, int, list[str]]:
    """(how many removed subjects are back, how many survivors were reverted, ids that were taken meanwhile)."""
    restored, reverted, kept = 0, 0, list[str]()
    removals = target.snapshot().job_step(f"{name}:removed") is not None
    completed = _completed_rows(target.snapshot(), name)
    done, total = 0, sum(len(rows) for rows in _read_log(log, target.storage, ["action"]))
    for number, rows in enumerate(_read_log(log, target.storage)):
        step = f"{name}:restored:{number}"
        facts = target.snapshot().job_step(step)
        if facts is None:
            changed = [row for row in rows if row["action"] == "completed" or (removals and row["action"] == "removed")]
            facts = _restore_some(target, step, changed, completed, stands_for)
        restored += facts["restored"]
        reverted += facts["reverted"]
        kept += facts["kept"]
        done += len(rows)
        progress("restoring", done, total)
    return restored, reverted, kept


def _restore_some(
    target: Gallery,
    step: str,
    changed: Sequence[dict[str, Any]],
    completed: Sequence[tuple[int, int]],
    stands_for: dict[int, int],
) -> dict[str, Any]:
    facts: dict[str, Any] = {"restored": 0, "reverted": 0, "kept": [], "rows": []}
    with target.transaction() as transaction:
        now = transaction.snapshot().rows_of(pack_text([before["subject_id"] for before in changed])).tolist()
        again, leave = [], []
        for before, row in zip(changed, now, strict=True):
            if before["action"] == "completed":
                if row in (-1, before["row"]) or before["row"] is None:
                    continue  # removed since; not completed yet; or added by this merge, and to be withdrawn
                if any(low <= stands_for.get(row, row) < high for low, high in completed):
                    leave.append(row)
                    row = -1
            if row >= 0:
                facts["kept"].append(before["subject_id"])
            else:
                again.append(before)
        transaction.remove_rows(np.array(sorted(leave), np.int64))
        for before in again:
            facts["restored" if before["action"] == "removed" else "reverted"] += 1
            if before["action"] == "removed":
                for older in before.get("older") or ():  # a log of an older release has none
                    transaction.add_encounter(
                        before["subject_id"], _templates(older), older["encounter_id"], older["groups"]
                    )
            facts["rows"].append((transaction.tail.end_row, before["row"]))
            transaction.add_encounter(
                before["subject_id"], _templates(before), before["encounter_id"], before["groups"]
            )
        transaction.record_step(step, facts)
    return facts


def _templates(logged: dict[str, Any]) -> dict[str, Template]:
    return {fields["column"]: _template(fields) for fields in logged["templates"]}


def _template(fields: dict[str, Any]) -> Template:
    embedding = None if fields["embedding"] is None else np.array(fields["embedding"], np.float32)
    quality = quality_scale.from_stored(fields["column"], fields["quality"])
    return Template(fields["column"], fields["model_id"], embedding, fields["minutiae"], quality)


def _withdraw(target: Gallery, name: str, stands_for: dict[int, int], progress: Progress) -> int:
    now = target.snapshot()
    ranges = [step.rows for step in steps_done(now, name)] + _completed_rows(now, name)
    withdrawn = 0
    for number, (low, high) in enumerate(ranges):
        noted = f"{name}:withdrawn:{number}"
        facts = target.snapshot().job_step(noted)
        if facts is None:
            with target.transaction() as transaction:
                live = transaction.snapshot().live_rows()
                first, end = np.searchsorted(live, (low, high))
                moved = [row for row, before in stands_for.items() if low <= before < high and now.is_present(row)]
                rows = np.union1d(live[first:end], np.array(moved, np.int64))
                transaction.remove_rows(rows)
                facts = {"withdrawn": len(rows)}
                transaction.record_step(noted, facts)
        withdrawn += facts["withdrawn"]
        progress("withdrawing", number + 1, len(ranges))
    return withdrawn
