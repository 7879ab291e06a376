"""`merge`: finds people who are enrolled in the galleries of several districts, and merges the galleries.

Owns the job from galleries to results: a staging copy beside the result, the join of all records with each other, clusters with their
survivors, and the check of ids that several districts use. Never compares templates, never lays out a result (`report.py`), and never writes
to a district's gallery.

1. The results depend only on the galleries, the settings and the rule; not on a clock, a random number, or an interruption. The same inputs
   give the same bytes.
2. Long steps write checkpoints to `OUT.work`, so that the same command resumes.
3. Only `apply` changes the central gallery, in steps that `undo` reverts (`apply.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from biodedup.common.described import Described
from biodedup.common.executors import LOCAL, Executor
from biodedup.config import Config
from biodedup.engine import Engine
from biodedup.errors import InvalidInput
from biodedup.gallery.care.removal import remove_gallery
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import LocalStorage, Storage
from biodedup.gallery.files.packed import pack_text
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.snapshot import Snapshot
from biodedup.jobs.deduplication.gallery import is_gallery, join_checkpoint, join_links
from biodedup.jobs.merging.apply import Applied, apply_merge, begun, current_id, refuse_unfinished
from biodedup.jobs.merging.ids import check_shared
from biodedup.jobs.merging.model import AbsorbedRecord, Findings, Group, Member, Settings
from biodedup.jobs.merging.registers import (
    Origins,
    Register,
    check_registers,
    colliding_hashes,
    named,
    opened,
    policy_of,
    refuse_sealed,
    shared_ids,
    stage,
)
from biodedup.jobs.merging.report import beside, write_results
from biodedup.jobs.merging.survivors import absorbed, check_rule, survivor
from biodedup.jobs.shared.acting import Actor
from biodedup.jobs.shared.files import write_json
from biodedup.jobs.shared.progress import Progress, silent, warn
from biodedup.match.judgement import TRUSTED_KINDS
from biodedup.search.clusters import clusters_of
from biodedup.values import COLUMNS, Cluster, Evidence, Link


@dataclass(frozen=True)
class MergeResult(Described):
    """The result of a merge. merge_id: the id for `undo`; summary: the content of the summary file; applied: None if the merge was not
    applied."""

    merge_id: str
    summary: dict[str, Any]
    applied: Applied | None = None


@dataclass(frozen=True, eq=False)
class _Run:
    """One run of the job. out: the result file; work: the folder beside it, from which a later run resumes."""

    out: Path
    config: Config
    storage: Storage
    progress: Progress
    executor: Executor

    @property
    def work(self) -> Path:
        return self.out.with_name(self.out.name + ".work")


def merge(
    sources: Sequence[str | Path],
    out: Path,
    *,
    into: str | Path | None = None,
    apply: bool = False,
    rule: str = "most_captures",
    prefer: Sequence[str] = (),
    min_db: float | None = None,
    config: Config | None = None,
    by: str = "",
    sign: Path | None = None,
    progress: Progress = silent,
    storage: Storage | None = None,
    executor: Executor = LOCAL,
) -> MergeResult:
    """Finds subjects of several galleries that are the same person. Writes `out` (.parquet) and four files beside it.

    sources: folders of galleries, or `NAME=FOLDER`. into: the central gallery; if it holds subjects, it is compared with the others, and its
    subjects keep their ids. apply: the result is applied to the central gallery. rule: which record of a person survives, a key of
    `survivors.RULES`; prefer: districts, the most preferred first, for ties. min_db: links reach this score, extrapolated or not; None takes
    the policy's duplicate threshold for the merged size, also lists links above its review threshold, and applies only links that are not
    extrapolated. The policy is that of the central gallery; otherwise that of config; otherwise the common policy of all districts. by: the
    person who applies the merge, who needs the role supervise if identities are configured; sign: the file of the person's private key.
    executor: where tiles and shared ids are compared (`jobs.ray_executor`).

    Raises NotAllowed, ApprovalNeeded (`Policy.two_people`): then the result is written, but not applied. Raises InvalidInput, PolicyMismatch,
    ModelMismatch, NotAGallery, GalleryBusy (another job writes this result), GalleryDamaged, StorageUnavailable.
    """
    _check_request(sources, out, into, apply)
    refuse_sealed(config)
    storage = storage or LocalStorage(None if config is None else config.keys)
    run = _Run(out, config or Config(), storage, progress, executor)
    central = None if into is None else named(into)[1]
    with _locked(run.work, run.storage), opened(sources, run.storage, run.config) as districts:
        existing = [into] if into is not None and central is not None and is_gallery(central) else []
        with opened(existing, run.storage, run.config) as targets:
            target = targets[0] if targets else None
            run = replace(run, config=replace(run.config, policy=policy_of(districts, target, run.config.policy)))
            settings_of = partial(_settings, config=run.config, rule=rule, prefer=prefer, min_db=min_db)
            keys = _saved_registers(run.work)
            merge_id = _begun_merge(keys, settings_of(keys), districts, target)
            if merge_id is not None:  # its decisions are final, even if the registers have changed
                summary, absorbed_records = _summary_of(out, merge_id), list[AbsorbedRecord]()
            else:
                registers = _registers(districts, target, central, run.storage)
                check_rule(rule, prefer, [register.name for register in registers])
                keys = _prepared(registers, keys, run.work)
                settings = settings_of(keys)
                absorbed_records, summary = _results(registers, settings, run)
                merge_id = _merge_id(keys, settings)
                if apply and target is not None:
                    merge_id = current_id(target.snapshot, merge_id)
        actor = Actor(by, sign)
        applied = (
            _applied(central, merge_id, keys, absorbed_records, run, actor) if apply and central is not None else None
        )
        return MergeResult(merge_id, summary, applied)


def _check_request(sources: Sequence[str | Path], out: Path, into: str | Path | None, apply: bool) -> None:
    if out.suffix != ".parquet":
        raise InvalidInput(f"the result cannot be named {out.name}; end the name with .parquet")
    if not sources:
        raise InvalidInput("no gallery was named; pass the districts' galleries, as FOLDER or NAME=FOLDER")
    if apply and into is None:
        raise InvalidInput("apply needs a central gallery; name it with --into FOLDER")


def _begun_merge(
    keys: Sequence[dict[str, Any]], settings: Settings, districts: Sequence[Register], target: Register | None
) -> str | None:
    """The id of this merge if an earlier run began to apply it to the target; otherwise None."""
    if target is None or [register.key for register in districts] != [key for key in keys if not key["central"]]:
        return None
    merge_id = current_id(target.snapshot, _merge_id(keys, settings))
    return merge_id if begun(target.snapshot, merge_id) else None


def _registers(
    districts: Sequence[Register], target: Register | None, central: Path | None, storage: Storage
) -> list[Register]:
    """The registers that are compared: the central gallery first, if it holds subjects, then the districts."""
    first = []
    if central is not None and target is not None:
        refuse_unfinished(central, target.snapshot, storage)
        first = [replace(target, central=True)] if target.snapshot.live_count else []
    registers = [*first, *districts]
    check_registers(registers)
    return registers


def _prepared(registers: Sequence[Register], saved: Sequence[dict[str, Any]], work: Path) -> list[dict[str, Any]]:
    """The keys of the registers. A staging gallery of other registers is removed."""
    keys = [register.key for register in registers]
    if keys != saved:
        _begin_anew(work, keys)
    return keys


def _applied(
    central: Path,
    merge_id: str,
    keys: Sequence[dict[str, Any]],
    absorbed_records: Sequence[AbsorbedRecord],
    run: _Run,
    actor: Actor,
) -> Applied:
    staging = Gallery.open_to_read(run.work / "gallery", run.storage, run.config.gallery)
    try:
        return apply_merge(
            central,
            merge_id,
            staging.snapshot(),
            keys,
            absorbed_records,
            config=run.config,
            storage=run.storage,
            progress=run.progress,
            actor=actor,
        )
    finally:
        staging.close()


def _results(
    registers: Sequence[Register], settings: Settings, run: _Run
) -> tuple[list[AbsorbedRecord], dict[str, Any]]:
    """Compares the registers and writes the result files. Returns (the absorbed records, the summary)."""
    colliding = colliding_hashes(registers)
    folder = run.work / "gallery"
    stage(registers, colliding, folder, run.config, run.storage, run.progress)
    shared = shared_ids(registers, colliding)
    staging = Gallery.open_to_read(folder, run.storage, run.config.gallery)
    try:
        staged = staging.snapshot()
        with Engine.open(folder, run.config, read_only=True, override_policy=True, storage=run.storage) as engine:
            warn(run.progress, engine.plan_join(settings.joined_db).estimate.warnings(), len(engine))
            with join_checkpoint(engine, run.work / "join.notes", settings.joined_db) as notes:
                joined = join_links(engine, notes, settings.joined_db, run.progress, run.executor)
            checked = check_shared(engine, staged, shared, run.work / "ids.notes", settings, run.progress, run.executor)
        links = _each_once(joined.kept())
        groups = _groups(registers, staged, links, settings)
        district_of = _districts(registers, staged, links)
    finally:
        staging.close()
    left_out = sum(joined.left_out.values())
    summary = write_results(
        run.out,
        Findings(
            registers=registers,
            links=links,
            groups=groups,
            checked=checked,
            district_of=district_of,
            settings=settings,
            left_out=left_out,
        ),
        run.config.labels,
    )
    return [record for group in groups if group.applies for record in group.absorbed], summary


# settings and saved state ---------------------------------------------------------------------------------------------


def _settings(
    keys: Sequence[Mapping[str, Any]], config: Config, rule: str, prefer: Sequence[str], min_db: float | None
) -> Settings:
    duplicate_db, review_db = config.stated_policy.thresholds_db(sum(key["subjects"] for key in keys))
    threshold_db = duplicate_db if min_db is None else min_db
    verify_db = -10 * float(np.log10(config.stated_policy.verify_fmr))
    across = config.search.across_positions
    return Settings(
        threshold_db=threshold_db,
        joined_db=min(review_db, threshold_db),
        verify_db=verify_db,
        rule=rule,
        prefer=tuple(prefer),
        min_db=min_db,
        across_positions=across,
    )


def _merge_id(keys: Sequence[Mapping[str, Any]], settings: Settings) -> str:
    return str(xxhash.xxh3_64_hexdigest(json.dumps([list(keys), vars(settings)], sort_keys=True).encode()))


def _summary_of(out: Path, merge_id: str) -> dict[str, Any]:
    path = beside(out, "summary.json")
    if not path.exists():
        raise InvalidInput(
            f"merge {merge_id} was begun, but its file {path} is gone; restore it, or run `biodedup undo {merge_id}` and merge again"
        )
    with translated(f"reading {path}"):
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary


def _saved_registers(work: Path) -> list[dict[str, Any]]:
    """The keys of the registers that the staging gallery is a copy of; empty if there is none."""
    plan = work / "registers.json"
    with translated(f"reading {plan}"):
        keys: list[dict[str, Any]] = json.loads(plan.read_text(encoding="utf-8")) if plan.exists() else []
    return keys


def _begin_anew(work: Path, keys: Sequence[Mapping[str, object]]) -> None:
    plan = work / "registers.json"
    with translated(f"clearing {work}"):
        plan.unlink(missing_ok=True)  # first, because a partly removed copy is not a copy of these registers
        remove_gallery(LocalStorage(), work / "gallery")
    write_json(list(keys), plan)


@contextmanager
def _locked(work: Path, storage: Storage) -> Iterator[None]:
    with translated(f"opening {work}"):
        storage.make_folder(work)
        lock = storage.lock(work / "writer.lock")
    try:
        yield
    finally:
        lock.release()


# clusters and their records -------------------------------------------------------------------------------------------


def _each_once(links: Sequence[Link]) -> list[Link]:
    """Each pair once, with its ids in order; the highest scores first."""
    unique: dict[tuple[str, str], Link] = {}
    for link in links:
        a, b = link.subject_ids
        ordered = link if a < b else replace(link, subject_ids=(b, a), evidence=tuple(map(_swapped, link.evidence)))
        known = unique.setdefault(ordered.subject_ids, ordered)
        if ordered.score_db > known.score_db:
            unique[ordered.subject_ids] = ordered
    return sorted(unique.values(), key=lambda link: (-link.score_db, link.subject_ids))


def _swapped(part: Evidence) -> Evidence:
    """The evidence seen from the other side."""
    return replace(part, column=part.candidate_column, candidate_column=part.column)


def _groups(registers: Sequence[Register], staged: Snapshot, links: Sequence[Link], settings: Settings) -> list[Group]:
    """The clusters of records of one person. A cluster applies if trusted links alone connect all its members."""
    strong = [link for link in links if link.score_db >= settings.threshold_db]
    clusters = clusters_of(strong)
    believed = (link for link in strong if link.kind in TRUSTED_KINDS)
    trusted = clusters_of(link for link in believed if settings.min_db is not None or not link.extrapolated)
    applying = {cluster.subject_ids for cluster in trusted}
    members = _members(registers, staged, [name for cluster in clusters for name in cluster.subject_ids])
    return [_group(number, cluster, members, cluster.subject_ids in applying, settings) for number, cluster in enumerate(clusters, start=1)]  # fmt: skip


def _group(number: int, cluster: Cluster, members: Mapping[str, Member], applies: bool, settings: Settings) -> Group:
    records = tuple(members[name] for name in cluster.subject_ids)
    chosen = survivor(records, settings.rule, settings.prefer)
    return Group(
        number=number,
        members=records,
        links=cluster.links,
        weakest_db=cluster.weakest_db,
        survivor=chosen,
        absorbed=absorbed(records, chosen),
        applies=applies,
    )


def _members(registers: Sequence[Register], staged: Snapshot, names: Sequence[str]) -> dict[str, Member]:
    """subject_id -> facts about the record. names: subject_ids in the staging gallery."""
    rows = staged.rows_of(pack_text(names))
    owners, own_rows = Origins(staged, [register.step for register in registers]).of(rows)
    templates = _templates(staged, rows.tolist())
    members: dict[str, Member] = {}
    for owner, register in enumerate(registers):
        indices = np.flatnonzero(owners == owner).tolist()
        register_rows = own_rows[indices].tolist()
        own_ids = register.snapshot.subject_ids(register_rows)
        encounter_ids = staged.encounter_ids(rows[indices].tolist())
        for i, row, own_id, encounter_id in zip(indices, register_rows, own_ids, encounter_ids, strict=True):
            members[names[i]] = Member(
                subject_id=names[i],
                district=register.name,
                original_id=own_id,
                captures=len(templates[i]),
                order=row,
                encounter_id=encounter_id,
                enrolled_at=_decided_at(register.snapshot, encounter_id),
                quality=_mean(templates[i].values()),
                central=register.central,
                templates=templates[i],
            )
    return members


def _templates(staged: Snapshot, rows: Sequence[int]) -> list[dict[str, float | None]]:
    """For each row: column -> quality of its template, 0 to 1, or None."""
    presence = staged.presence(rows)
    templates: list[dict[str, float | None]] = [{} for _ in rows]
    for column in staged.models:
        quality = staged.quality(rows, column).tolist()
        for i in np.flatnonzero(presence >> COLUMNS.index(column) & 1).tolist():
            templates[i][column] = None if np.isnan(quality[i]) else quality[i]
    return templates


def _mean(qualities: Iterable[float | None]) -> float | None:
    measured = [quality for quality in qualities if quality is not None]
    return round(sum(measured) / len(measured), 6) if measured else None


def _decided_at(snapshot: Snapshot, encounter_id: str) -> float | None:
    answer = snapshot.answer(encounter_id) if encounter_id else None
    return None if answer is None else json.loads(answer.text).get("decided_at")


def _districts(registers: Sequence[Register], staged: Snapshot, links: Sequence[Link]) -> dict[str, str]:
    """subject_id -> its district, for all subjects with a link."""
    names = sorted({name for link in links for name in link.subject_ids})
    rows = staged.rows_of(pack_text(names))
    owners, _ = Origins(staged, [register.step for register in registers]).of(rows)
    return {name: registers[owner].name for name, owner in zip(names, owners.tolist(), strict=True)}
