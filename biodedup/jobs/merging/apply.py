"""Applies a merge of registers to a central gallery, and undoes it.

Owns the order of the steps. `log.py` owns the log that an undo needs. Never decides which records belong to one person.

    log -> begun -> additions, a part at a time -> completions, a batch at a time -> removals -> applied
    undo: restore, a batch at a time -> withdraw additions -> undone

1. Every step is one durable transaction that the gallery records, so that a killed run resumes, and no step is done twice.
2. The log is on disk before anything changes.
3. Each person has an id in the gallery at all times: additions come before removals, and restorations before withdrawals.
4. A survivor keeps its templates. It takes over the groups of the records that it absorbs, and the templates that it lacks.
5. A subject with another row number than the merge gave it was changed since. An undo enrols subjects under new rows, and records which
   former rows they replace.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biodedup.common.described import Described
from biodedup.config import Config
from biodedup.errors import InvalidInput
from biodedup.gallery.care.copying import copy_rows, record, steps_done
from biodedup.gallery.files.filesystem import LocalStorage, Storage
from biodedup.gallery.files.packed import pack_text
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.segments.part import Part
from biodedup.gallery.snapshot import Snapshot
from biodedup.jobs.merging.log import log_batches, log_path, logged_merges, read_log, templates_of, write_log
from biodedup.jobs.merging.model import AbsorbedRecord
from biodedup.jobs.merging.registers import Origins, refuse_sealed, step_of
from biodedup.jobs.shared.acting import NOBODY, Actor, authorised_job
from biodedup.jobs.shared.progress import Progress, silent
from biodedup.values import Template


@dataclass(frozen=True)
class Applied(Described):
    """The result of applying a merge. added: subjects that were added; removed: subjects of the central gallery that were absorbed by another
    record; left_out: records of districts that were absorbed, and so not added; completed: survivors that took over templates or groups;
    subjects: number of subjects in the gallery afterwards."""

    merge_id: str
    added: int
    removed: int
    left_out: int
    completed: int
    subjects: int


@dataclass(frozen=True)
class Undone(Described):
    """The result of undoing a merge. restored: removed subjects that are enrolled again; reverted: survivors that lost the templates and groups
    that they took over; withdrawn: added subjects that were removed; kept_changed: ids that were enrolled again since the merge, which the undo
    does not change; subjects: number of subjects in the gallery afterwards."""

    merge_id: str
    restored: int
    reverted: int
    withdrawn: int
    kept_changed: tuple[str, ...]
    subjects: int


def current_id(target: Snapshot, merge_id: str) -> str:
    """The id under which a merge is applied: its own id; after an undo, with a number appended."""
    number, current = 1, merge_id
    while target.job_step(f"merge:{current}:undone") is not None:
        number += 1
        current = f"{merge_id}-{number}"
    return current


def begun(target: Snapshot, merge_id: str) -> bool:
    """Whether the application of a merge has begun."""
    return target.job_step(f"merge:{merge_id}:begun") is not None


def refuse_unfinished(folder: Path, target: Snapshot, storage: Storage) -> None:
    """Raises InvalidInput if the application of another merge to this gallery was interrupted."""
    for merge_id in logged_merges(folder, storage):
        finished = any(target.job_step(f"merge:{merge_id}:{stage}") is not None for stage in ("applied", "undone"))
        if begun(target, merge_id) and not finished:
            raise InvalidInput(
                f"merge {merge_id} was interrupted while it was applied to {folder}; run the same merge again to finish it, or "
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
    """Adds all subjects of the districts that are not absorbed, completes survivors, and removes absorbed subjects of the central gallery.

    registers: `Register.key` of each; absorbed: the absorbed records, grouped by survivor. An interrupted application resumes with the log, and
    then ignores both. Raises InvalidInput if the gallery has changed since it was compared.
    """
    target = _opened(folder, storage, config, new_id)
    try:
        name = f"merge:{merge_id}"
        log = log_path(folder, merge_id)
        if not begun(target.snapshot(), merge_id):
            refuse_unfinished(folder, target.snapshot(), storage)
            _refuse_changed(folder, target, registers)
            with authorised_job(
                actor, target, config, "merge", {"merge": merge_id}, role="supervise", kind="merge"
            ) as begin:
                write_log(log, log_batches(target.snapshot(), staged, absorbed), storage)
                with target.transaction() as transaction:
                    begin(transaction)
                    transaction.record_step(f"{name}:begun", {})
        progress("applying", 0, staged.live_count)
        ids: dict[str, list[str]] = {"removed": [], "left_out": [], "completed": []}
        for rows in read_log(log, storage, ["subject_id", "action"]):
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
    """Undoes a merge: the central gallery gets back its former subjects, with their former templates and groups.

    Subjects that were enrolled, updated or removed since the merge are not changed. An interrupted undo resumes; a finished undo changes
    nothing. by: the person who undoes it; sign: the file of the person's private key. Raises InvalidInput if the merge was not applied to this
    gallery, NotAllowed, ApprovalNeeded (`Policy.two_people`).
    """
    config = config or Config()
    refuse_sealed(config)
    storage = storage or LocalStorage(config.keys)
    log = log_path(folder, merge_id)
    Gallery.open_to_read(
        folder, storage, config.gallery
    ).close()  # so that a mistyped folder does not become a new gallery
    target = _opened(folder, storage, config, lambda: "")
    try:
        name = f"merge:{merge_id}"
        if not begun(target.snapshot(), merge_id):
            known = ", ".join(logged_merges(folder, storage)) or "none"
            raise InvalidInput(f"merge {merge_id!r} was not applied to {folder}; known merges: {known}")
        if all(target.snapshot().job_step(f"{name}:{stage}") is None for stage in ("undoing", "undone")):
            about = {"undo": merge_id}
            with authorised_job(
                Actor(by, sign), target, config, "merge", about, role="supervise", kind="undo"
            ) as begin:
                with target.transaction() as transaction:
                    begin(transaction)
                    transaction.record_step(f"{name}:undoing", {})
        replaced = _replaced_rows(target.snapshot(), folder, storage)
        restored, reverted, kept = _restore(target, log, name, replaced, progress)
        withdrawn = _withdraw(target, name, replaced, progress)
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
            f"{folder} has changed since it was compared with the districts; run the merge again without --apply, and check its "
            "report"
        )


def _to_be_added(
    staged: Snapshot, registers: Sequence[dict[str, Any]], left_out: Sequence[str]
) -> Callable[[Part], NDArray[np.bool_]]:
    """A function that selects the rows of a part of the staging gallery that are added to the central gallery."""
    origins = Origins(staged, [step_of(key) for key in registers])
    central = [owner for owner, key in enumerate(registers) if key["central"]]
    absorbed = np.sort(staged.all_rows_of(pack_text(left_out))[1])

    def keep(part: Part) -> NDArray[np.bool_]:
        rows = part.rows(np.arange(part.count))
        owners, _ = origins.of(rows)
        return ~np.isin(owners, central) & ~np.isin(rows, absorbed)

    return keep


# completing -----------------------------------------------------------------------------------------------------------


def _complete(target: Gallery, log: Path, name: str, staged: Snapshot, total: int, progress: Progress) -> int:
    """Gives survivors the templates and groups that they take over. Returns the number of completed survivors. total: their number in the log."""
    completed = 0
    for number, rows in enumerate(read_log(log, target.storage, ["subject_id", "action", "gets", "joins"])):
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
            templates = {
                get["column"]: _staged_template(staged, get["subject_id"], get["column"]) for get in survivor["gets"]
            }
            templates |= before.templates(row)
            transaction.add_encounter(survivor["subject_id"], templates, encounter_id, own.union(survivor["joins"]))
        facts = {"first_row": first_row, "end_row": transaction.tail.end_row}
        transaction.record_step(step, facts)
    return facts


def _staged_template(staged: Snapshot, subject_id: str, column: str) -> Template:
    templates = staged.best_templates(subject_id)
    assert templates is not None, "the staging gallery holds every subject that was compared"
    return templates[column]


# undoing --------------------------------------------------------------------------------------------------------------


def _completed_rows(target: Snapshot, name: str) -> list[tuple[int, int]]:
    """The rows of completed survivors, as ranges. Adjacent ranges are joined."""
    ranges: list[tuple[int, int]] = []
    for facts in _recorded(target, f"{name}:completed"):
        first_row = ranges.pop()[0] if ranges and ranges[-1][1] == facts["first_row"] else facts["first_row"]
        ranges.append((first_row, facts["end_row"]))
    return ranges


def _recorded(target: Snapshot, steps: str) -> Iterator[dict[str, Any]]:
    """The facts that the gallery has recorded of numbered steps."""
    number = 0
    while (facts := target.job_step(f"{steps}:{number}")) is not None:
        yield facts
        number += 1


def _replaced_rows(target: Snapshot, folder: Path, storage: Storage) -> dict[int, int]:
    """Row that an undo gave a subject -> the subject's row before that merge. Merges are undone in reverse order: for an earlier merge, a
    restored subject counts as unchanged, although its row is new."""
    replaced: dict[int, int] = {}
    for merge_id in logged_merges(folder, storage):
        for facts in _recorded(target, f"merge:{merge_id}:restored"):
            replaced |= dict(facts["rows"])
    for row in sorted(replaced):  # a replaced row may itself replace an earlier row, which has a smaller number
        replaced[row] = replaced.get(replaced[row], replaced[row])
    return replaced


def _restore(
    target: Gallery, log: Path, name: str, replaced: dict[int, int], progress: Progress
) -> tuple[int, int, list[str]]:
    """Enrols removed subjects again, and reverts survivors. Returns (restored, reverted, ids that were enrolled again meanwhile)."""
    restored, reverted, kept = 0, 0, list[str]()
    removals = target.snapshot().job_step(f"{name}:removed") is not None
    completed = _completed_rows(target.snapshot(), name)
    done, total = 0, sum(len(rows) for rows in read_log(log, target.storage, ["action"]))
    for number, rows in enumerate(read_log(log, target.storage)):
        step = f"{name}:restored:{number}"
        facts = target.snapshot().job_step(step)
        if facts is None:
            changed = [row for row in rows if row["action"] == "completed" or (removals and row["action"] == "removed")]
            facts = _restore_some(target, step, changed, completed, replaced)
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
    replaced: dict[int, int],
) -> dict[str, Any]:
    """Restores some subjects in one transaction. changed: their rows of the log; completed: row ranges of completed survivors."""
    facts: dict[str, Any] = {"restored": 0, "reverted": 0, "kept": [], "rows": []}
    with target.transaction() as transaction:
        current = transaction.snapshot().rows_of(pack_text([logged["subject_id"] for logged in changed])).tolist()
        to_restore, to_remove = [], []
        for logged, row in zip(changed, current, strict=True):
            if logged["action"] == "completed":
                if row in (-1, logged["row"]) or logged["row"] is None:
                    continue  # removed since; or not completed yet; or added by this merge, so that it is withdrawn later
                if any(low <= replaced.get(row, row) < high for low, high in completed):
                    to_remove.append(row)
                    row = -1
            if row >= 0:
                facts["kept"].append(logged["subject_id"])
            else:
                to_restore.append(logged)
        transaction.remove_rows(np.array(sorted(to_remove), np.int64))
        for logged in to_restore:
            facts["restored" if logged["action"] == "removed" else "reverted"] += 1
            if logged["action"] == "removed":
                for older in logged.get("older") or ():  # logs of older releases have no such column
                    transaction.add_encounter(
                        logged["subject_id"], templates_of(older), older["encounter_id"], older["groups"]
                    )
            facts["rows"].append((transaction.tail.end_row, logged["row"]))
            transaction.add_encounter(
                logged["subject_id"], templates_of(logged), logged["encounter_id"], logged["groups"]
            )
        transaction.record_step(step, facts)
    return facts


def _withdraw(target: Gallery, name: str, replaced: dict[int, int], progress: Progress) -> int:
    """Removes the subjects that the merge added and that are unchanged since. Returns their number."""
    now = target.snapshot()
    ranges = [step.rows for step in steps_done(now, name)] + _completed_rows(now, name)
    withdrawn = 0
    for number, (low, high) in enumerate(ranges):
        step_name = f"{name}:withdrawn:{number}"
        facts = target.snapshot().job_step(step_name)
        if facts is None:
            with target.transaction() as transaction:
                live = transaction.snapshot().live_rows()
                first, end = np.searchsorted(live, (low, high))
                moved = [row for row, before in replaced.items() if low <= before < high and now.is_present(row)]
                rows = np.union1d(live[first:end], np.array(moved, np.int64))
                transaction.remove_rows(rows)
                facts = {"withdrawn": len(rows)}
                transaction.record_step(step_name, facts)
        withdrawn += facts["withdrawn"]
        progress("withdrawing", number + 1, len(ranges))
    return withdrawn
