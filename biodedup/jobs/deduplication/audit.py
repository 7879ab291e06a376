"""`audit`: checks a roll against the gallery: people listed twice, not enrolled, or enrolled under two ids, by district.

Owns the kinds of findings and the report by district. Never compares itself: the engine joins and identifies.

1. A roll of subjects is compared with all subjects by the enrolled templates; a roll of captures is identified, one entry after the other.
2. A pair that a person ruled different is not reported.
3. An interrupted audit resumes (`out`.notes) with the threshold it began with, also when the gallery has changed. For a roll of subjects it
   then also compares subjects that were enrolled or updated since, and drops findings of subjects that were updated or removed, so that the
   result is that of the last version alone. An entry of captures keeps the version at which it was searched.
4. The same roll, gallery, version and threshold give the same bytes.
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
    "enrolled_twice": "listed once, and enrolled a second time under an id that is not listed",
    "not_enrolled": "listed, but not enrolled",
    "unclear": "may be an enrolled person; a person has to look",
    "refused": "a line, or a capture, that could not be used",
}
"""Each kind of finding in plain words, in the order of the report."""

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
_ON_A_PAGE = 500
_ENTRIES_NOTED = 16


@dataclass(frozen=True)
class Finding:
    """One thing to look into; fields as in AUDIT_SCHEMA. index: of its line among the usable ones, -1 for a refused one."""

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
    """What was found. lines: of the roll, those refused included; subjects: compared with gallery_size others; expected_false: findings
    of duplicates to be expected of different people alike, were all of these independent; versions: the oldest that an entry of
    captures was compared with, and the newest; of a roll of subjects one and the same."""

    findings: tuple[Finding, ...]
    lines: int
    subjects: int
    gallery_size: int
    versions: tuple[int, int]
    threshold_db: float
    expected_false: float
    lines_of: dict[str, int]
    links_left_out: int = 0
    """Of groups of subjects with more than 1,000 links, how many were left out. Each subject still has a finding."""

    def summary(self) -> dict[str, Any]:
        """Counts, JSON-ready. Of each kind the findings, and by district the lines that they concern."""
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
        """district -> its lines, and of each kind how many of them it concerns."""
        concerned: dict[str, dict[str, set[int]]] = {
            name: {kind: set() for kind in AUDIT_KINDS} for name in self.lines_of
        }
        for finding in self.findings:
            concerned[finding.district][finding.finding].add(finding.line)
            # of a repeated line the first one is right; of two ids it is not known which
            if finding.finding == "two_ids" and finding.other_line is not None:
                concerned[finding.other_district or ""][finding.finding].add(finding.other_line)
        return {
            name: {"lines": self.lines_of[name]}
            | {kind: len(lines) for kind, lines in concerned[name].items()}
            | {"any": len(set().union(*concerned[name].values()))}
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
    """Checks a roll (`read_roll`) and writes `out` (.parquet or .csv), a row a finding, and a page for people.

    threshold_db: None takes the policy's duplicate threshold at the size of the gallery when the audit begins. clock: seconds since 1970,
    for the page's date. Raises InvalidInput for a roll that cannot be read at all, GalleryDamaged, StorageUnavailable.
    """
    check_table_name(out)
    listed = read_roll(roll, options)
    key = _identity(engine, roll, threshold_db, options)
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
            found, subjects = _of_captures(engine, listed, roll.parent, threshold_db, notes, progress)
            left_out = 0
            pairs = subjects * len(engine)
        else:
            found, subjects, left_out = _of_subjects(engine, listed, threshold_db, notes, progress)
            pairs = subjects * (len(engine) - 1) - subjects * (subjects - 1) // 2
        found += [Finding("refused", line, district, detail=why) for line, district, why in listed.refused]
        result = AuditResult(
            findings=tuple(sorted(found, key=_place)),
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


def _identity(engine: Engine, roll: Path, threshold_db: float | None, options: TableOptions) -> dict[str, Any]:
    """What an interrupted audit and the one that resumes it must have in common."""
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


def _place(finding: Finding) -> tuple[int, int, int, int, str]:
    """By kind, by person, by line."""
    kind = list(AUDIT_KINDS).index(finding.finding)
    return kind, finding.person or 0, finding.line, finding.other_line or 0, finding.other_id or ""


# a roll of subjects -----------------------------------------------------------------------------------------------


def _of_subjects(
    engine: Engine, roll: Roll, threshold_db: float, notes: CheckpointFile, progress: Progress
) -> tuple[list[Finding], int, int]:
    """(findings, subjects that were compared, links of large clusters that were left out)."""
    encoded = roll.table["subject_id"].combine_chunks().dictionary_encode()
    ids: list[str] = encoded.dictionary.to_pylist()
    which = encoded.indices.to_numpy(zero_copy_only=False)
    _, first = np.unique(which, return_index=True)  # of each id, its first line
    at = dict(zip(ids, first.tolist(), strict=True))
    findings = []
    for again in np.setdiff1d(np.arange(len(which)), first).tolist():
        before = int(first[which[again]])
        findings.append(_finding(roll, "listed_twice", again, ids[which[again]], other=before))
    enrolled = engine.are_enrolled(ids)
    present = [ids[i] for i in np.flatnonzero(enrolled).tolist()]
    absent = [ids[i] for i in np.flatnonzero(~enrolled).tolist()]
    waiting = {case.subject_id: case.encounter_id for case in engine.cases()} if absent else {}
    for subject_id in absent:
        case = waiting.get(subject_id)
        detail = "" if case is None else f"in review: case {case}"
        findings.append(_finding(roll, "not_enrolled", at[subject_id], subject_id, detail=detail))
    warn(progress, engine.plan_join(threshold_db, listed=len(present)).estimate.warnings(), len(present))
    links, people = _people(_links(engine, present, threshold_db, notes, progress), set(present))
    people.sort(key=lambda cluster: min(at.get(name, len(which)) for name in cluster.subject_ids))
    person_of = {name: number for number, cluster in enumerate(people, start=1) for name in cluster.subject_ids}
    for link in links:
        mine, other = sorted(link.subject_ids, key=lambda name: (at.get(name, len(which)), name))
        about: dict[str, Any] = {
            "score_db": link.score_db,
            "extrapolated": link.extrapolated,
            "person": person_of[mine],
        }
        if other in at:
            findings.append(_finding(roll, "two_ids", at[mine], mine, other_id=other, other=at[other], **about))
        else:
            findings.append(_finding(roll, "enrolled_twice", at[mine], mine, other_id=other, **about))
    findings += _of_crowds(roll, people, at, findings)
    return findings, len(present), sum(cluster.links_left_out for cluster in people)


def _people(joined: Links, listed: set[str]) -> tuple[list[Link], list[Cluster]]:
    """(links of listed subjects, clusters with one): what links of others connect is one person only where links were left out."""
    links: list[Link] = []
    people: list[Cluster] = []
    for cluster in joined.clusters():
        own = [link for link in cluster.links if not listed.isdisjoint(link.subject_ids)]
        links += own
        if own:
            people += [cluster] if cluster.links_left_out else clusters_of(own)
    return sorted(links, key=lambda link: link.subject_ids), people


def _of_crowds(
    roll: Roll, people: Sequence[Cluster], at: Mapping[str, int], findings: Sequence[Finding]
) -> list[Finding]:
    """A finding for each listed subject of a crowd whose pairs with other listed ones were all left out."""
    told = {(f.finding, name) for f in findings for name in (f.subject_id, f.other_id)}
    more = []
    for number, cluster in enumerate(people, start=1):
        first, *others = sorted((name for name in cluster.subject_ids if name in at), key=lambda name: at[name])
        for name in others if cluster.links_left_out else ():
            if ("two_ids", name) not in told:
                detail = f"one of {len(cluster.subject_ids):,} records that are alike"
                about: dict[str, Any] = {"other_id": name, "other": at[name], "person": number, "detail": detail}
                more.append(_finding(roll, "two_ids", at[first], first, **about))
    return more


def _links(
    engine: Engine, present: Sequence[str], threshold_db: float, notes: CheckpointFile, progress: Progress
) -> Links:
    """Pairs of a listed subject and any other that reach the threshold, each once."""
    info = engine.info()
    state = {"version": info["gallery_version"], "sealed_rows": info["sealed_rows"]}
    changed = bool(notes.entries) and any(notes.entries[0][name] != value for name, value in state.items())
    if changed and any(entry.get("left_out") for entry in notes.entries):
        notes.begin_anew()  # a link that was left out may be the one that holds, once a subject is gone
    # for most of a gallery, comparing each subject with all later ones takes less than comparing each with all
    begun = notes.entries[0] if notes.entries else state | {"whole": 2 * len(present) > len(engine)}
    done = notes.entries[-1]["done"] if notes.entries else 0
    if begun["whole"] and all(begun[name] == value for name, value in state.items()):
        tiles, before = engine.join(threshold_db=threshold_db, skip=done), 0
    # 0: a join by LSH buckets, which completes no subject before its end
    elif notes.entries and (row := notes.entries[-1]["reached"][0]):
        rows = begun["reached"][1]
        # a full join has compared all subjects before `row` with each other; a join of listed subjects has compared those with all
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
    return _standing(engine, set(present), entries)


def _standing(engine: Engine, listed: set[str], entries: Sequence[dict[str, Any]]) -> Links:
    """The links, without subjects that were updated or removed since, and without pairs that were judged different since. Of others than
    listed subjects alone only those that may connect a crowd."""
    names = list(dict.fromkeys(name for entry in entries for link in entry["links"] for name in link[:2]))
    row_of = dict(zip(names, engine.rows_of(names).tolist(), strict=True))
    different = _different(engine)
    links = Links()
    for entry in entries:
        standing = []
        for a, b, score_db, extrapolated in entry["links"]:
            there = all(0 <= row_of[name] < entry["reached"][1] for name in (a, b))
            counts = "left_out" in entry or not listed.isdisjoint((a, b))
            if there and counts and frozenset((a, b)) not in different:
                standing.append(Link((min(a, b), max(a, b)), score_db, extrapolated, ()))
        links.add(standing, entry.get("left_out"))
    return links


def _different(engine: Engine) -> set[frozenset[str]]:
    """Pairs that were judged different."""
    return {
        frozenset((v.subject_id, v.candidate)) for v in engine.verdicts() if v.ruling == "different" and v.candidate
    }


def _finding(
    roll: Roll, kind: str, index: int, subject_id: str | None, *, other: int | None = None, **more: Any
) -> Finding:
    """index: of the line among the usable ones; other: of another one."""
    districts = roll.table["district"]
    if other is not None:
        more |= {"other_line": int(roll.lines[other]), "other_district": districts[other].as_py()}
    return Finding(kind, int(roll.lines[index]), districts[index].as_py(), subject_id, index=index, **more)


# a roll of captures -----------------------------------------------------------------------------------------------


def _of_captures(
    engine: Engine, roll: Roll, folder: Path, threshold_db: float, notes: CheckpointFile, progress: Progress
) -> tuple[list[Finding], int]:
    """(findings, entries that could be compared)."""
    entries = _entries(roll)
    # an entry's answer: [reason of refusal or None, [[subject_id, score_db, extrapolated], ...], gallery's review threshold]
    version = engine.gallery_version
    answers = [(entry["version"], answer) for entry in notes.entries for answer in entry["answers"]]
    for low in range(len(answers), len(entries), _ENTRIES_NOTED):
        new = [_identified(engine, roll, folder, lines, threshold_db) for lines in entries[low : low + _ENTRIES_NOTED]]
        notes.append({"version": version, "threshold_db": threshold_db, "answers": new})
        answers += [(version, answer) for answer in new]
        progress("identifying", len(answers), len(entries))
    different = _different(engine)
    findings: list[Finding] = []
    seen: dict[str, int] = {}
    compared = 0
    for lines, (as_of, (refusal, candidates, review_db)) in zip(entries, answers, strict=True):
        index = lines[0]
        detail = "" if as_of == version else f"as of version {as_of}"
        if refusal is not None:
            findings.append(_finding(roll, "refused", index, None, detail=refusal))
            continue
        compared += 1
        reached = [one for one in candidates if one[1] >= threshold_db]
        if not reached:
            near = [one for one in candidates if one[1] >= review_db][:1]
            for name, score_db, extrapolated in near:
                findings.append(_finding(roll, "unclear", index, None, other_id=name, score_db=score_db, extrapolated=extrapolated, detail=detail))  # fmt: skip
            if not near:
                findings.append(_finding(roll, "not_enrolled", index, None, detail=detail))
            continue
        (mine, score_db, extrapolated), *others = reached
        if mine in seen:
            about: dict[str, Any] = {"score_db": score_db, "extrapolated": extrapolated, "detail": detail}
            findings.append(_finding(roll, "listed_twice", index, mine, other=seen[mine], **about))
        seen.setdefault(mine, index)
        for name, other_db, beyond in others:
            if frozenset((mine, name)) not in different:
                findings.append(_finding(roll, "enrolled_twice", index, mine, other_id=name, score_db=other_db, extrapolated=beyond, detail=detail))  # fmt: skip
    return findings, compared


def _entries(roll: Roll) -> list[list[int]]:
    """The lines of each entry: those of one `entry`, or each by itself."""
    if "entry" not in roll.table.column_names:
        return [[index] for index in range(len(roll.lines))]
    entries: dict[str, list[int]] = {}
    for index, name in enumerate(roll.texts("entry")):
        entries.setdefault(name or f"\0{index}", []).append(index)
    return list(entries.values())


def _identified(engine: Engine, roll: Roll, folder: Path, lines: Sequence[int], threshold_db: float) -> list[Any]:
    try:
        decision = engine.unrestricted().identify(
            Encounter(captures=[_capture(roll, folder, index) for index in lines]), from_db=threshold_db
        )
    except CallerError as error:  # one bad record never stops a batch
        return [str(error), [], 0.0]
    if decision.outcome == "refused":
        return [_why(decision), [], 0.0]
    candidates = [[c.subject_id, c.score_db, c.extrapolated] for c in decision.candidates]
    return [None, candidates, decision.review_db]


def _why(decision: Decision) -> str:
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
    """The findings, and of each what else its line holds."""
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
        shown={kind: found[:_ON_A_PAGE] for kind, found in by_kind.items()},
        most=_ON_A_PAGE,
        captures=roll.of_captures,
        with_districts=roll.with_districts,
        **foot,
    )
