"""`audit`: compares a roll, an office's list of people, with a gallery, and finds people who are listed twice or are not enrolled.

Owns the kinds of findings and the report by district. Never compares templates: the engine joins and identifies.

1. Subjects of a roll of ids are compared with all enrolled subjects, by their enrolled templates. The entries of a roll of captures are
   identified, one after the other.
2. A pair that a person ruled different is not reported.
3. An interrupted audit resumes (`out`.notes) with its first threshold, even if the gallery has changed. For a roll of ids it then also compares
   subjects that were enrolled or updated meanwhile, and drops findings of subjects that were updated or removed: the result is that of the
   gallery's last version. An entry of captures keeps the result of the version in which it was searched.
4. The same roll, gallery version and threshold give the same bytes.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from biodedup.common.described import Described
from biodedup.common.tables import flat, plain
from biodedup.engine import Engine
from biodedup.errors import CallerError
from biodedup.gallery.files.private import make_private_folder
from biodedup.jobs.manifests.fields import located
from biodedup.jobs.manifests.options import DEFAULT_OPTIONS, TableOptions
from biodedup.jobs.manifests.roll import Roll, read_roll
from biodedup.jobs.shared.checkpoint import CheckpointFile
from biodedup.jobs.shared.output import check_table_name, write_table
from biodedup.jobs.shared.page import write_page
from biodedup.jobs.shared.progress import Progress, silent, warn
from biodedup.search.clusters import Links, clusters_of
from biodedup.values import Capture, Cluster, Decision, Encounter, Face, Finger, Link

AUDIT_KINDS = {
    "two_ids": "one person listed under two ids",
    "listed_twice": "listed on two lines",
    "enrolled_twice": "listed once, but also enrolled under an id that is not listed",
    "not_enrolled": "listed, but not enrolled",
    "unclear": "possibly an enrolled person; an official has to compare them",
    "refused": "a line or a capture could not be used",
}
"""kind of finding -> its meaning in plain words, in the order of the report."""

AUDIT_SCHEMA = pa.schema(
    [
        ("finding", pa.string()),
        ("person", pa.int64()),
        ("subject_id", pa.string()),
        ("other_id", pa.string()),
        ("district", pa.string()),
        ("other_district", pa.string()),
        ("line", pa.int64()),
        ("other_line", pa.int64()),
        ("score_db", pa.float64()),
        ("extrapolated", pa.bool_()),
        ("detail", pa.string()),
    ]
)
_PAGE_ROWS_MAX = 500
_CHECKPOINT_ENTRIES = 16


@dataclass(frozen=True)
class Finding:
    """A finding of the audit, with the fields of AUDIT_SCHEMA. index: position of its line among the usable lines; -1 for a refused line."""

    finding: str
    line: int
    district: str
    subject_id: str | None = None
    other_id: str | None = None
    other_district: str | None = None
    other_line: int | None = None
    score_db: float | None = None
    extrapolated: bool | None = None
    person: int | None = None
    detail: str = ""
    index: int = field(default=-1, compare=False)


@dataclass(frozen=True)
class AuditResult(Described):
    """The result of an audit. lines: number of lines of the roll, refused lines included; subjects: how many subjects or entries were compared
    with the gallery; expected_false: expected number of false findings (pairs of different people), if comparisons were independent;
    versions: the oldest and the newest gallery version that was searched; lines_of: district -> number of lines."""

    findings: tuple[Finding, ...]
    lines: int
    subjects: int
    gallery_size: int
    versions: tuple[int, int]
    threshold_db: float
    expected_false: float
    lines_of: dict[str, int]
    links_left_out: int = 0
    """Number of links that are not reported, because their cluster has more than 1,000. Each of its subjects still has a finding."""

    def summary(self) -> dict[str, Any]:
        """The counts, JSON-ready: the findings of each kind, and the affected lines by district."""
        counts = Counter(finding.finding for finding in self.findings)
        return {
            "lines": self.lines,
            "subjects_compared": self.subjects,
            "gallery_size": self.gallery_size,
            "gallery_version_from": self.versions[0],
            "gallery_version": self.versions[1],
            "threshold_db": round(self.threshold_db, 2),
            "expected_false": float(f"{self.expected_false:.3g}"),
            "links_left_out": self.links_left_out,
            "beyond_what_was_measured": sum(bool(finding.extrapolated) for finding in self.findings),
            "findings": {kind: counts[kind] for kind in AUDIT_KINDS},
            "districts": self.districts(),
        }

    def districts(self) -> dict[str, dict[str, int]]:
        """district -> its number of lines, and the number of affected lines for each kind of finding."""
        affected: dict[str, dict[str, set[int]]] = {
            name: {kind: set() for kind in AUDIT_KINDS} for name in self.lines_of
        }
        for finding in self.findings:
            affected[finding.district][finding.finding].add(finding.line)
            # `listed_twice` affects only the repetition; of two ids, either may be the wrong one
            if finding.finding == "two_ids" and finding.other_line is not None:
                affected[finding.other_district or ""][finding.finding].add(finding.other_line)
        return {
            name: {"lines": self.lines_of[name]}
            | {kind: len(lines) for kind, lines in affected[name].items()}
            | {"any": len(set().union(*affected[name].values()))}
            for name in sorted(self.lines_of)
        }


def audit(
    engine: Engine,
    roll: Path,
    out: Path,
    *,
    report: Path | None = None,
    threshold_db: float | None = None,
    options: TableOptions = DEFAULT_OPTIONS,
    progress: Progress = silent,
    clock: Callable[[], float] = time.time,
) -> AuditResult:
    """Compares a roll (`read_roll`) with the gallery. Writes `out` (.parquet or .csv) with one row for each finding.

    report: path of an HTML page for officials; None writes none. threshold_db: None takes the policy's duplicate threshold for the gallery's
    size when the audit begins. clock: seconds since 1970, for the date on the page. Raises InvalidInput if the file is not a roll,
    GalleryDamaged, StorageUnavailable.
    """
    check_table_name(out)
    listed = read_roll(roll, options)
    key = _checkpoint_key(engine, roll, threshold_db, options)
    for path in (out, report):
        if path is not None:
            make_private_folder(path.parent)
    with CheckpointFile(out.with_name(out.name + ".notes"), key, engine.config.keys) as notes:
        if notes.entries:
            threshold_db = notes.entries[0]["threshold_db"]
        elif threshold_db is None:
            threshold_db = engine.policy.link_db(len(engine))
        versions = engine.gallery_version, engine.gallery_version
        if listed.of_captures:
            versions = min([versions[0], *(entry["version"] for entry in notes.entries)]), versions[1]
            found, subjects = _audit_captures(engine, listed, roll.parent, threshold_db, notes, progress)
            left_out = 0
            pairs = subjects * len(engine)
        else:
            found, subjects, left_out = _audit_subjects(engine, listed, threshold_db, notes, progress)
            pairs = subjects * (len(engine) - 1) - subjects * (subjects - 1) // 2
        found += [Finding("refused", line, district, detail=why) for line, district, why in listed.refused]
        result = AuditResult(
            findings=tuple(sorted(found, key=_sort_key)),
            lines=len(listed.lines) + len(listed.refused),
            subjects=subjects,
            gallery_size=len(engine),
            versions=versions,
            threshold_db=threshold_db,
            expected_false=max(pairs, 0) * 10 ** (-threshold_db / 10),
            lines_of=dict(Counter([*listed.texts("district"), *(district for _, district, _ in listed.refused)])),
            links_left_out=left_out,
        )
        write_table(_table(result, listed), out)
        if report is not None:
            _write_report(result, listed, roll, report, {"gallery": key["gallery"], "made": clock()})
        notes.remove()
    return result


def _checkpoint_key(engine: Engine, roll: Path, threshold_db: float | None, options: TableOptions) -> dict[str, Any]:
    """The facts that must be the same for an interrupted audit to resume."""
    key = {
        "roll": hashlib.sha256(roll.read_bytes()).hexdigest(),
        "gallery": engine.info()["gallery_id"],
        "policy": {name: plain(value) for name, value in flat(engine.policy).items()},
        "threshold_db": threshold_db,
        "across_positions": engine.config.search.across_positions,
    }
    if options != DEFAULT_OPTIONS:
        key["options"] = vars(options) | {"columns": dict(options.columns)}
    return key


def _sort_key(finding: Finding) -> tuple[int, int, int, int, str]:
    """The order of findings: by kind, person and line."""
    kind = list(AUDIT_KINDS).index(finding.finding)
    return kind, finding.person or 0, finding.line, finding.other_line or 0, finding.other_id or ""


# a roll of ids ----------------------------------------------------------------------------------------------------


def _audit_subjects(
    engine: Engine, roll: Roll, threshold_db: float, notes: CheckpointFile, progress: Progress
) -> tuple[list[Finding], int, int]:
    """(findings, number of compared subjects, number of links of large clusters that are not reported)."""
    encoded = roll.table["subject_id"].combine_chunks().dictionary_encode()
    ids: list[str] = encoded.dictionary.to_pylist()
    id_of_line = encoded.indices.to_numpy(zero_copy_only=False)
    _, first = np.unique(id_of_line, return_index=True)  # the first line of each id
    line_of = dict(zip(ids, first.tolist(), strict=True))
    findings = []
    for repetition in np.setdiff1d(np.arange(len(id_of_line)), first).tolist():
        number = id_of_line[repetition]
        findings.append(_finding(roll, "listed_twice", repetition, ids[number], other=int(first[number])))
    enrolled = engine.are_enrolled(ids)
    present = [ids[i] for i in np.flatnonzero(enrolled).tolist()]
    absent = [ids[i] for i in np.flatnonzero(~enrolled).tolist()]
    waiting = {case.subject_id: case.encounter_id for case in engine.cases()} if absent else {}
    for subject_id in absent:
        case = waiting.get(subject_id)
        detail = "" if case is None else f"in review: case {case}"
        findings.append(_finding(roll, "not_enrolled", line_of[subject_id], subject_id, detail=detail))
    warn(progress, engine.plan_join(threshold_db, listed=len(present)).estimate.warnings(), len(present))
    links, people = _people(_join(engine, present, threshold_db, notes, progress), set(present))
    unlisted = len(id_of_line)  # subjects that are not listed come after all lines
    people.sort(key=lambda cluster: min(line_of.get(name, unlisted) for name in cluster.subject_ids))
    person_of = {name: number for number, cluster in enumerate(people, start=1) for name in cluster.subject_ids}
    for link in links:
        subject_id, other_id = sorted(link.subject_ids, key=lambda name: (line_of.get(name, unlisted), name))
        kind, line = "two_ids" if other_id in line_of else "enrolled_twice", line_of[subject_id]
        values: dict[str, Any] = {
            "other_id": other_id,
            "other": line_of.get(other_id),
            "score_db": link.score_db,
            "extrapolated": link.extrapolated,
            "person": person_of[subject_id],
        }
        findings.append(_finding(roll, kind, line, subject_id, **values))
    findings += _findings_of_large_clusters(roll, people, line_of, findings)
    return findings, len(present), sum(cluster.links_left_out for cluster in people)


def _people(joined: Links, listed: set[str]) -> tuple[list[Link], list[Cluster]]:
    """(the links with a listed subject, the clusters that these links form: each is one person).

    Links between two unlisted subjects connect a cluster only if it has links that were left out.
    """
    links: list[Link] = []
    people: list[Cluster] = []
    for cluster in joined.clusters():
        of_listed = [link for link in cluster.links if not listed.isdisjoint(link.subject_ids)]
        links += of_listed
        if of_listed:
            people += [cluster] if cluster.links_left_out else clusters_of(of_listed)
    return sorted(links, key=lambda link: link.subject_ids), people


def _findings_of_large_clusters(
    roll: Roll, people: Sequence[Cluster], line_of: Mapping[str, int], findings: Sequence[Finding]
) -> list[Finding]:
    """A finding for each listed subject of a large cluster that has no finding yet, because its links were left out."""
    reported = {(f.finding, name) for f in findings for name in (f.subject_id, f.other_id)}
    added = []
    for number, cluster in enumerate(people, start=1):
        first, *others = sorted(
            (name for name in cluster.subject_ids if name in line_of), key=lambda name: line_of[name]
        )
        for name in others if cluster.links_left_out else ():
            if ("two_ids", name) not in reported:
                detail = f"one of {len(cluster.subject_ids):,} similar records"
                values: dict[str, Any] = {"other_id": name, "other": line_of[name], "person": number, "detail": detail}
                added.append(_finding(roll, "two_ids", line_of[first], first, **values))
    return added


def _join(
    engine: Engine, present: Sequence[str], threshold_db: float, notes: CheckpointFile, progress: Progress
) -> Links:
    """The pairs of an enrolled listed subject and another subject that reach the threshold, each pair once. Resumes from the checkpoint."""
    info = engine.info()
    state = {"version": info["gallery_version"], "sealed_rows": info["sealed_rows"]}
    changed = bool(notes.entries) and any(notes.entries[0][name] != value for name, value in state.items())
    if changed and any(entry.get("left_out") for entry in notes.entries):
        notes.begin_anew()  # if a subject is gone, a link that was left out may be the only one that connects others
    # if most of a gallery is listed, comparing each subject with all later ones takes less time than comparing each with all
    begun = notes.entries[0] if notes.entries else state | {"whole": 2 * len(present) > len(engine)}
    done = notes.entries[-1]["done"] if notes.entries else 0
    if begun["whole"] and all(begun[name] == value for name, value in state.items()):
        tiles, before = engine.join(threshold_db=threshold_db, skip=done), 0
    # `reached` is 0 in a join by LSH buckets, which completes no subject before its end
    elif notes.entries and (row := notes.entries[-1]["reached"][0]):
        rows = begun["reached"][1]
        # a full join has compared all subjects before `row` with each other; a join of listed subjects has compared them with all subjects
        since = (row, row) if begun["whole"] else (row, max(row, rows))
        tiles, before = engine.join(threshold_db=threshold_db, subject_ids=present, since=since), done
    else:
        tiles, before = engine.join(threshold_db=threshold_db, subject_ids=present), 0
    entries = list(notes.entries)
    for tile in tiles:
        links = [[*link.subject_ids, link.score_db, link.extrapolated] for link in tile.links]
        entry = {"done": before + tile.done, "reached": tile.reached, "links": links}
        entry |= {"left_out": tile.left_out} if tile.left_out else {}
        entries.append(state | {"whole": begun["whole"], "threshold_db": threshold_db} | entry)
        notes.append(entries[-1])
        progress("comparing", before + tile.done, before + tile.total)
    return _valid_links(engine, set(present), entries)


def _valid_links(engine: Engine, listed: set[str], entries: Sequence[dict[str, Any]]) -> Links:
    """The links of the checkpoint that are still valid: no subject was updated or removed since, and the pair was not ruled different. Links
    between two unlisted subjects are kept only if they may connect a large cluster."""
    names = list(dict.fromkeys(name for entry in entries for link in entry["links"] for name in link[:2]))
    row_of = dict(zip(names, engine.rows_of(names).tolist(), strict=True))
    different = _pairs_ruled_different(engine)
    links = Links()
    for entry in entries:
        valid = []
        for a, b, score_db, extrapolated in entry["links"]:
            unchanged = all(0 <= row_of[name] < entry["reached"][1] for name in (a, b))
            relevant = "left_out" in entry or not listed.isdisjoint((a, b))
            if unchanged and relevant and frozenset((a, b)) not in different:
                valid.append(Link((min(a, b), max(a, b)), score_db, extrapolated, ()))
        links.add(valid, entry.get("left_out"))
    return links


def _pairs_ruled_different(engine: Engine) -> set[frozenset[str]]:
    return {
        frozenset((v.subject_id, v.candidate)) for v in engine.verdicts() if v.ruling == "different" and v.candidate
    }


def _finding(
    roll: Roll, kind: str, index: int, subject_id: str | None, *, other: int | None = None, **values: Any
) -> Finding:
    """A finding on a line. index, other: positions of the line, and of the other line that it is about, among the usable lines; values: further
    fields."""
    districts = roll.table["district"]
    if other is not None:
        values |= {"other_line": int(roll.lines[other]), "other_district": districts[other].as_py()}
    return Finding(kind, int(roll.lines[index]), districts[index].as_py(), subject_id, index=index, **values)


# a roll of captures -----------------------------------------------------------------------------------------------


def _audit_captures(
    engine: Engine, roll: Roll, folder: Path, threshold_db: float, notes: CheckpointFile, progress: Progress
) -> tuple[list[Finding], int]:
    """(findings, number of entries that were compared)."""
    entries = _entries(roll)
    version = engine.gallery_version
    answers = [(entry["version"], answer) for entry in notes.entries for answer in entry["answers"]]
    for low in range(len(answers), len(entries), _CHECKPOINT_ENTRIES):
        part = entries[low : low + _CHECKPOINT_ENTRIES]
        new = [_identify(engine, roll, folder, lines, threshold_db) for lines in part]
        notes.append({"version": version, "threshold_db": threshold_db, "answers": new})
        answers += [(version, answer) for answer in new]
        progress("identifying", len(answers), len(entries))
    different = _pairs_ruled_different(engine)
    findings: list[Finding] = []
    first_line_of: dict[str, int] = {}
    compared = 0
    for lines, (as_of, (refusal, candidates, review_db)) in zip(entries, answers, strict=True):
        index = lines[0]
        detail = "" if as_of == version else f"as of version {as_of}"
        if refusal is not None:
            findings.append(_finding(roll, "refused", index, None, detail=refusal))
            continue
        compared += 1
        accepted = [candidate for candidate in candidates if candidate[1] >= threshold_db]
        if not accepted:
            unclear = [candidate for candidate in candidates if candidate[1] >= review_db][:1]
            for name, score_db, extrapolated in unclear:
                findings.append(_finding(roll, "unclear", index, None, other_id=name, score_db=score_db, extrapolated=extrapolated, detail=detail))  # fmt: skip
            if not unclear:
                findings.append(_finding(roll, "not_enrolled", index, None, detail=detail))
            continue
        (subject_id, score_db, extrapolated), *others = accepted
        if subject_id in first_line_of:
            values: dict[str, Any] = {"score_db": score_db, "extrapolated": extrapolated, "detail": detail}
            findings.append(
                _finding(roll, "listed_twice", index, subject_id, other=first_line_of[subject_id], **values)
            )
        first_line_of.setdefault(subject_id, index)
        for name, other_db, other_extrapolated in others:
            if frozenset((subject_id, name)) not in different:
                findings.append(_finding(roll, "enrolled_twice", index, subject_id, other_id=name, score_db=other_db, extrapolated=other_extrapolated, detail=detail))  # fmt: skip
    return findings, compared


def _entries(roll: Roll) -> list[list[int]]:
    """The lines of each entry: the lines with the same value in the column `entry`, or one line if it has none."""
    if "entry" not in roll.table.column_names:
        return [[index] for index in range(len(roll.lines))]
    entries: dict[str, list[int]] = {}
    for index, name in enumerate(roll.texts("entry")):
        entries.setdefault(name or f"\0{index}", []).append(index)
    return list(entries.values())


def _identify(engine: Engine, roll: Roll, folder: Path, lines: Sequence[int], threshold_db: float) -> list[Any]:
    """Identifies an entry. Returns [reason of the refusal or None, [[subject_id, score_db, extrapolated], ...], review threshold], JSON-ready."""
    try:
        decision = engine.unrestricted().identify(
            Encounter(captures=[_capture(roll, folder, index) for index in lines]), from_db=threshold_db
        )
    except CallerError as error:  # a bad entry never stops the job
        return [str(error), [], 0.0]
    if decision.outcome == "refused":
        return [_refusal_reasons(decision), [], 0.0]
    candidates = [[c.subject_id, c.score_db, c.extrapolated] for c in decision.candidates]
    return [None, candidates, decision.review_db]


def _refusal_reasons(decision: Decision) -> str:
    return "; ".join(dict.fromkeys(refusal.reason.replace("_", " ") for refusal in decision.refusals))


def _capture(roll: Roll, folder: Path, index: int) -> Capture:
    row = {
        name: str(roll.table[name][index].as_py())
        for name in ("path", "position", "dpi")
        if name in roll.table.column_names
    }
    path, position = located(folder, row["path"]), row.get("position") or "face"
    return Face(path) if position == "face" else Finger(path, position, float(row["dpi"]) if row.get("dpi") else None)


# results ------------------------------------------------------------------------------------------------------------


def _table(result: AuditResult, roll: Roll) -> pa.Table:
    """The findings, with the other columns of their lines."""
    names = AUDIT_SCHEMA.names
    table = pa.table({name: [getattr(f, name) for f in result.findings] for name in names}, AUDIT_SCHEMA)
    rows = pa.array([finding.index if finding.index >= 0 else None for finding in result.findings], pa.int64())
    for name in roll.others:
        table = table.append_column(
            f"roll_{name}" if name in names else name, roll.table[name].combine_chunks().take(rows)
        )
    return table


def _write_report(result: AuditResult, roll: Roll, source: Path, report: Path, foot: Mapping[str, Any]) -> None:
    by_kind = {kind: [f for f in result.findings if f.finding == kind] for kind in AUDIT_KINDS}
    write_page(
        report,
        "audit.html",
        title=f"Audit of {source.name}",
        result=result,
        summary=result.summary(),
        kinds=AUDIT_KINDS,
        shown={kind: found[:_PAGE_ROWS_MAX] for kind, found in by_kind.items()},
        most=_PAGE_ROWS_MAX,
        captures=roll.of_captures,
        with_districts=roll.with_districts,
        **foot,
    )
