"""`merge`: finds the subjects that several districts' galleries share, and brings the galleries together.

Owns the job from galleries to results: a staging copy beside the result, the join of all with all, clusters with their survivors, and ids
that several districts gave. Never compares itself, never lays out a result (`report.py`), and never writes to a district's gallery.

1. The results depend on the galleries, the settings and the rule alone: on no clock, no random number, and not on where the job was
   interrupted. The same inputs give the same bytes.
2. Long steps are noted as they go (`OUT.work`), so that the same command resumes.
3. The central gallery changes with `apply` only, by steps that `undo` reverts (`apply.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from biodedup.config import Config
from biodedup.engine import Engine
from biodedup.errors import InvalidInput
from biodedup.gallery.care.removal import remove_gallery
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import LocalStorage, Storage
from biodedup.gallery.files.packed import pack_text
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.snapshot import Snapshot
from biodedup.jobs.deduplication.gallery import is_gallery, join_notes, linked
from biodedup.jobs.merging.apply import Applied, apply_merge, begun, refuse_unfinished, standing_id
from biodedup.jobs.merging.model import AbsorbedRecord, Checked, Group, Member, Settings
from biodedup.jobs.merging.registers import (
    Origins,
    Register,
    SharedId,
    check_registers,
    colliding_hashes,
    named,
    opened,
    policy_of,
    shared_ids,
    stage,
)
from biodedup.jobs.merging.report import beside, write_results
from biodedup.jobs.merging.survivors import absorbed, check_rule, survivor
from biodedup.jobs.shared.checkpoint import Notes
from biodedup.jobs.shared.files import write_json
from biodedup.jobs.shared.progress import Progress, silent, warn
from biodedup.match.judgement import BELIEVED
from biodedup.search.clusters import clusters_of
from biodedup.values import COLUMNS, Cluster, Encounter, Evidence, Link

_CHECKED_TOGETHER = 200  # shared ids compared between two notes


@dataclass(frozen=True)
class MergeResult:
    """merge_id: names it for `undo`. summary: as written, JSON-ready. applied: None unless the central gallery has it now."""

    merge_id: str
    summary: dict[str, Any]
    applied: Applied | None = None


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
    progress: Progress = silent,
    storage: Storage | None = None,
) -> MergeResult:
    """Finds the subjects of several galleries that are one person, and writes `out` (.parquet) and four files beside it.

    sources: galleries, or `NAME=FOLDER`. into: the central gallery; one that holds subjects is compared with the others, and its
    subjects keep their ids. apply: bring the result into it. rule: which record survives, a key of `survivors.RULES`; prefer: districts, best
    first, where the rule ties. min_db: link from this score on, extrapolated or not; None takes the policy's duplicate threshold for
    the merged size, lists what lies above its review threshold, and applies only what is within the measured scores. The policy is the
    central gallery's, else the one of config, else the one that all districts have.

    Raises InvalidInput, PolicyMismatch, ModelMismatch, NotAGallery, GalleryBusy (another job has this result), GalleryDamaged, StorageUnavailable.
    """
    if out.suffix != ".parquet":
        raise InvalidInput(f"the result is named {out.name}; end it with .parquet")
    if not sources:
        raise InvalidInput("no gallery was named; pass the districts' galleries, as FOLDER or NAME=FOLDER")
    if apply and into is None:
        raise InvalidInput("there is nothing to apply it to; name the central gallery, as --into FOLDER")
    storage, config = storage or LocalStorage(), config or Config()
    work = out.with_name(out.name + ".work")
    with _locked(work, storage), opened(sources, storage, config) as districts:
        central = None if into is None else named(into)[1]
        existing = [into] if into is not None and central is not None and is_gallery(central) else []
        with opened(existing, storage, config) as found:
            target = found[0] if found else None
            config = replace(config, policy=policy_of(districts, target, config.policy))
            saved = _saved_registers(work)
            standing = _settings(saved, config, rule, prefer, min_db)
            if central and target and [r.key for r in districts] == [one for one in saved if not one["central"]]:
                merge_id = standing_id(target.snapshot, _merge_id(saved, standing))
                if begun(target.snapshot, merge_id):  # what was decided stands, whatever the registers are now
                    summary = _summary_of(out, merge_id)
                    applied = _applied(central, merge_id, work, saved, (), config, storage, progress) if apply else None
                    return MergeResult(merge_id, summary, applied)
            if central and target:
                refuse_unfinished(central, target.snapshot, storage)
            first = [replace(target, central=True)] if target and target.snapshot.live_count else []
            registers = [*first, *districts]
            check_registers(registers)
            check_rule(rule, prefer, [register.name for register in registers])
            keys = [register.key for register in registers]
            if keys != saved:
                _begin_anew(work, keys)
            settings = _settings(keys, config, rule, prefer, min_db)
            absorbed_records, summary = _found(registers, work, out, settings, config, storage, progress)
            merge_id = _merge_id(keys, settings)
            applied_as = merge_id if target is None else standing_id(target.snapshot, merge_id)
        if not apply:
            return MergeResult(merge_id, summary)
        assert central is not None, "it was asked for above"
        return MergeResult(
            applied_as, summary, _applied(central, applied_as, work, keys, absorbed_records, config, storage, progress)
        )


def _applied(
    central: Path,
    merge_id: str,
    work: Path,
    registers: Sequence[dict[str, Any]],
    absorbed_records: Sequence[AbsorbedRecord],
    config: Config,
    storage: Storage,
    progress: Progress,
) -> Applied:
    staging = Gallery.open_to_read(work / "gallery", storage, config.gallery)
    try:
        return apply_merge(
            central, merge_id, staging.snapshot(), registers, absorbed_records, config, storage, progress=progress
        )
    finally:
        staging.close()


def _found(
    registers: Sequence[Register],
    work: Path,
    out: Path,
    settings: Settings,
    config: Config,
    storage: Storage,
    progress: Progress,
) -> tuple[list[AbsorbedRecord], dict[str, Any]]:
    """(the records that are absorbed, the summary); the result files are written."""
    colliding = colliding_hashes(registers)
    stage(registers, colliding, work / "gallery", config, storage, progress)
    shared = shared_ids(registers, colliding)
    staging = Gallery.open_to_read(work / "gallery", storage, config.gallery)
    try:
        staged = staging.snapshot()
        with Engine.open(work / "gallery", config, read_only=True, override_policy=True, storage=storage) as engine:
            warn(progress, engine.plan_join(settings.joined_db).estimate.warnings(), len(engine))
            with join_notes(engine, work / "join.notes", settings.joined_db) as notes:
                found = linked(engine, notes, settings.joined_db, progress)
            checked = _check_shared(engine, staged, shared, work / "ids.notes", settings, progress)
        links = _each_once(found.kept())
        groups = _groups(registers, staged, links, settings)
        district_of = _districts(registers, staged, links)
    finally:
        staging.close()
    summary = write_results(out, registers, links, groups, checked, district_of, settings, sum(found.left_out.values()))
    return [record for group in groups if group.applies for record in group.absorbed], summary


# what was asked for ---------------------------------------------------------------------------------------------------


def _settings(
    keys: Sequence[Mapping[str, Any]], config: Config, rule: str, prefer: Sequence[str], min_db: float | None
) -> Settings:
    duplicate_db, review_db = config.stated_policy.thresholds_db(sum(one["subjects"] for one in keys))
    threshold_db = duplicate_db if min_db is None else min_db
    verify_db = -10 * float(np.log10(config.stated_policy.verify_fmr))
    across = config.search.across_positions
    return Settings(threshold_db, min(review_db, threshold_db), verify_db, rule, tuple(prefer), min_db, across)


def _merge_id(keys: Sequence[Mapping[str, Any]], settings: Settings) -> str:
    return str(xxhash.xxh3_64_hexdigest(json.dumps([list(keys), vars(settings)], sort_keys=True).encode()))


def _summary_of(out: Path, merge_id: str) -> dict[str, Any]:
    path = beside(out, "summary.json")
    if not path.exists():
        raise InvalidInput(
            f"merge {merge_id} was begun, and its {path} is gone; restore that file, or `biodedup undo {merge_id}` and merge again"
        )
    with translated(f"reading {path}"):
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary


def _saved_registers(work: Path) -> list[dict[str, Any]]:
    """What the staging gallery is a copy of; empty where there is none."""
    plan = work / "registers.json"
    with translated(f"reading {plan}"):
        found: list[dict[str, Any]] = json.loads(plan.read_text(encoding="utf-8")) if plan.exists() else []
    return found


def _begin_anew(work: Path, keys: Sequence[Mapping[str, object]]) -> None:
    plan = work / "registers.json"
    with translated(f"clearing {work}"):
        plan.unlink(missing_ok=True)  # first: a copy that is cleared in part is one of nothing
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


# what is found --------------------------------------------------------------------------------------------------------


def _each_once(links: Sequence[Link]) -> list[Link]:
    """Each pair once, its ids in order, strongest first."""
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
    strong = [link for link in links if link.score_db >= settings.threshold_db]
    clusters = clusters_of(strong)
    believed = (link for link in strong if link.kind in BELIEVED)
    trusted = clusters_of(link for link in believed if settings.min_db is not None or not link.extrapolated)
    whole = {cluster.subject_ids for cluster in trusted}
    members = _members(registers, staged, [name for cluster in clusters for name in cluster.subject_ids])
    return [_group(number, cluster, members, cluster.subject_ids in whole, settings) for number, cluster in enumerate(clusters, start=1)]  # fmt: skip


def _group(number: int, cluster: Cluster, members: Mapping[str, Member], applies: bool, settings: Settings) -> Group:
    records = tuple(members[name] for name in cluster.subject_ids)
    chosen = survivor(records, settings.rule, settings.prefer)
    return Group(number, records, cluster.links, cluster.weakest_db, chosen, absorbed(records, chosen), applies)


def _members(registers: Sequence[Register], staged: Snapshot, names: Sequence[str]) -> dict[str, Member]:
    """The facts about each of these subjects."""
    rows = staged.rows_of(pack_text(names))
    owners, own_rows = Origins(staged, [register.step for register in registers]).of(rows)
    templates = _templates(staged, rows.tolist())
    members: dict[str, Member] = {}
    for owner, register in enumerate(registers):
        at = np.flatnonzero(owners == owner).tolist()
        rows_there = own_rows[at].tolist()
        own_ids = register.snapshot.subject_ids(rows_there)
        encounter_ids = staged.encounter_ids(rows[at].tolist())
        for i, row, own_id, encounter_id in zip(at, rows_there, own_ids, encounter_ids, strict=True):
            members[names[i]] = Member(
                names[i],
                register.name,
                own_id,
                len(templates[i]),
                row,
                encounter_id,
                _decided_at(register.snapshot, encounter_id),
                _mean(templates[i].values()),
                register.central,
                templates[i],
            )
    return members


def _templates(staged: Snapshot, rows: Sequence[int]) -> list[dict[str, float | None]]:
    """Of each row, column -> quality of its template, 0 to 1."""
    presence = staged.presence(rows)
    found: list[dict[str, float | None]] = [{} for _ in rows]
    for column in staged.models:
        quality = (staged.quality(rows, column) / (1.0 if column == "face" else 100.0)).tolist()
        for i in np.flatnonzero(presence >> COLUMNS.index(column) & 1).tolist():
            found[i][column] = None if np.isnan(quality[i]) else quality[i]
    return found


def _mean(qualities: Iterable[float | None]) -> float | None:
    measured = [quality for quality in qualities if quality is not None]
    return round(sum(measured) / len(measured), 6) if measured else None


def _decided_at(snapshot: Snapshot, encounter_id: str) -> float | None:
    answer = snapshot.answer(encounter_id) if encounter_id else None
    return None if answer is None else json.loads(answer.text).get("decided_at")


def _check_shared(
    engine: Engine,
    staged: Snapshot,
    shared: Sequence[SharedId],
    notes_path: Path,
    settings: Settings,
    progress: Progress,
) -> list[Checked]:
    """Compares each subject whose id an earlier district gave, too, with the subject of that district, 1:1."""
    first: dict[str, SharedId] = {}
    later = [one for one in shared if first.setdefault(one.subject_id, one) is not one]
    info = engine.info()
    key = {"gallery": info["gallery_id"], "version": info["gallery_version"], "verify_db": settings.verify_db}
    scores: list[float | None] = []
    with Notes(notes_path, key) as notes:
        for entry in notes.entries:
            scores += entry
        for low in range(len(scores), len(later), _CHECKED_TOGETHER):
            some = later[low : low + _CHECKED_TOGETHER]
            rows = staged.rows_of(pack_text([first[one.subject_id].merged_id for one in some])).tolist()
            found: list[float | None] = []
            for one, row in zip(some, rows, strict=True):
                compared = engine.verify(Encounter(None, templates=staged.templates(row)), one.merged_id)
                found.append(compared.score_db if compared.evidence else None)
            notes.append(found)
            scores += found
            progress("checking ids", len(scores), len(later))
    score_of = dict(zip((id(one) for one in later), scores, strict=True))
    checked = []
    for one in shared:
        if id(one) not in score_of:
            checked.append(Checked(one, None, None, None))
            continue
        score_db = score_of[id(one)]
        verdict = "same_person" if score_db is not None and score_db >= settings.verify_db else "another_person"
        against = first[one.subject_id].owner
        checked.append(Checked(one, against, score_db, "not_comparable" if score_db is None else verdict))
    return checked


def _districts(registers: Sequence[Register], staged: Snapshot, links: Sequence[Link]) -> dict[str, str]:
    names = sorted({name for link in links for name in link.subject_ids})
    rows = staged.rows_of(pack_text(names))
    owners, _ = Origins(staged, [register.step for register in registers]).of(rows)
    return {name: registers[owner].name for name, owner in zip(names, owners.tolist(), strict=True)}
